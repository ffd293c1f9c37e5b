"""The exception that means "the user can fix this": command lines print it as a single line and exit 1."""

from collections.abc import Callable
from string import Formatter
from typing import Any


class UserError(Exception):
    """A mistake of the user's or a limit of the machine; the message names the thing, the value and the remedy."""

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The message, with each parameter that it names as spell has it: a command line's options, say."""
        return str(self)


class ParameterError(UserError):
    """A UserError about parameters. In its template a parameter's name is a field, {device}, and each {} is a value.

    str() speaks of parameters by their own names, as whoever calls the library knows them. A value may be another
    UserError, whose parameters are then spelled, too.
    """

    def __init__(self, template: str, *values: object) -> None:
        super().__init__(template, *values)
        self.template, self.values = template, values

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[str], str]) -> str:
        """As UserError.spelled."""
        values = [value.spelled(spell) if isinstance(value, UserError) else value for value in self.values]
        return Formatter().vformat(self.template, values, _Names(spell))


class _Names(dict[str, Any]):
    """Every name, as spell has it."""

    def __init__(self, spell: Callable[[str], str]) -> None:
        super().__init__()
        self.spell = spell

    def __missing__(self, name: str) -> str:
        return self.spell(name)
