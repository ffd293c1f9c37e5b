"""What every command line shares: one line for a mistake, exit codes, argument types. Imports nothing heavy."""

import argparse
import errno
import importlib.util
import io
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from teal import __version__, interrupts
from teal.architectures import ARCHITECTURES
from teal.cli import ranks
from teal.errors import UserError
from teal.user_text import is_text

EXIT_ERROR, EXIT_USAGE = 1, 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
# Options that are not called as the parameter that they set; all others are, with dashes.
SPELLED = {
    "quant_lm_head": "--lm-head",
    "draft_length": "--speculate",
    "draft_lookup": "--speculate-lookup",
}


class Completion(argparse.Action):
    """Print a completion script of the parser for a shell, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        import shtab

        print(shtab.complete(parser, values))
        parser.exit()


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of each option that has one, spelled as it would be typed."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = shown_default(action)
        return f"{action.help} (default: {shown})" if shown else f"{action.help}"


def shown_default(action: argparse.Action) -> str:
    """The default as one would type it; empty for a switch, and for an option that is off, or none, unless given."""
    value = action.default
    if action.nargs == 0 or value is None or value is argparse.SUPPRESS or value in ([], ()):
        return ""
    return ",".join(
        f"{v:g}" if isinstance(v, float) else str(v) for v in (value if isinstance(value, tuple) else [value])
    )


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, whose help shows defaults, and which takes only UTF-8."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, add_help=False)
        general = self.add_argument_group("general")
        general.add_argument("-h", "--help", action="help", help="show this help and exit")
        general.add_argument(
            "--version", action="version", version=f"%(prog)s {__version__}", help="show the version and exit"
        )
        general.add_argument(
            "--print-completion", choices=("bash", "zsh", "tcsh"), action=Completion, default=argparse.SUPPRESS,
            help="print a completion script for this shell and exit",
        )  # fmt: skip

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; an argument that is no text is an error, for nothing later could read or print it."""
        before = "argument"
        for argument in sys.argv[1:] if args is None else args:
            if "\0" in argument or not is_text(argument):
                self.error(f"{before}: {argument[:80]!a} is not UTF-8 text; convert it, or rename the file")
            before = argument if argument.startswith("-") else "argument"
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def run(main: Callable[[], None]) -> NoReturn:
    """Run main and exit: 0, or one line on stderr and a code that says what happened. Bugs keep their traceback."""
    interrupts.install()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell's >&-
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for the life of the process
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # reading and printing never fail; is_text tells what was read
            stream.reconfigure(errors=errors)
    code: Any = 0
    try:
        main()
        sys.stdout.flush()
    except SystemExit as end:  # of argparse
        code = end.code
    except BaseException as error:
        code = _report(error)
    if interrupts.pending():
        interrupts.say()
        code = interrupts.EXIT_INTERRUPTED
    interrupts.work_is_done()
    ranks.leave(code if isinstance(code, int) else 0 if code is None else 1)
    sys.exit(code)


def _report(error: BaseException) -> int:
    """Say on stderr what error means, in a line; returns the exit code. A bug is raised on."""
    if isinstance(error, KeyboardInterrupt) or interrupts.pending():
        interrupts.say()
        return interrupts.EXIT_INTERRUPTED
    if isinstance(error, UserError):
        return _fail(message_of(error))
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: stdout was closed before the text ended", file=sys.stderr)
        return EXIT_BROKEN_PIPE
    message = _machine_limit(error)
    if message is None:
        raise
    return _fail(message)


def message_of(error: UserError) -> str:
    """The message, which names options where the library names the parameters that they set."""
    return error.spelled(lambda parameter: SPELLED.get(parameter, "--" + parameter.replace("_", "-")))


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_ERROR


def _machine_limit(error: BaseException) -> str | None:
    """The line for an error that is the machine's limit and not a bug, or None."""
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        reason = text.splitlines()[0] if text else "allocation failed"
        return f"out of memory ({reason}); use a smaller model, a shorter context or --dtype bf16"
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if (isinstance(error, OSError) and error.errno in full) or any(f"os error {code}" in text for code in full):
        return f"the disk is full or a file-size limit was hit ({text}); free space or set XDG_CACHE_HOME elsewhere"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check that the path exists and is accessible"
    return None


def require_package(package: str, option: str, value: object) -> None:
    """Raise UserError if option has a value and the package that it needs is not installed."""
    if value is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"{option} needs the package {package}; pip install {package}")


def architecture(text: str) -> str:
    """Argument type: the name of a known architecture, in any case."""
    if text.lower() not in (name.lower() for name in ARCHITECTURES):
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; expected one of {', '.join(ARCHITECTURES)}")
    return text


def host(text: str) -> str:
    """Argument type: an address, or a name that can be looked up."""
    try:
        text.encode("idna")
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no host name; give an address such as 127.0.0.1") from None
    return text


def positive_int(text: str, least: int = 1) -> int:
    """Argument type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def count(text: str) -> int:
    """Argument type: a whole number of at least 0."""
    return positive_int(text, least=0)


def positive_ints(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers of at least 1, commas between."""
    return tuple(positive_int(part) for part in text.split(","))


def sparsity(text: str) -> float:
    """Argument type: a number with 0 <= sparsity < 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"sparsity {text!r} is out of range; expected 0 <= sparsity < 1")
    return value


def token_bias(text: str) -> tuple[int, float]:
    """Argument type: a token id and what is added to its logits, a colon between."""
    token, _, bias = text.partition(":")
    try:
        return count(token), float(bias)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is no TOKEN_ID:BIAS, such as 42:-100") from None


def sparsities(text: str) -> tuple[float, ...]:
    """Argument type: numbers with 0 <= sparsity < 1, commas between, each once."""
    return tuple(dict.fromkeys(sparsity(part) for part in text.split(",")))
