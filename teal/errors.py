"""The one exception that means "the user can fix this": command lines print it as a single line and exit 1."""


class UserError(Exception):
    """A mistake in what the user gave, or a limit of the machine.

    The message names the thing, the value and the remedy.
    """
