"""What every command line shares: one line for a mistake, exit codes, argument types. Imports nothing heavy."""

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import environment  # noqa: F401 - before torch
from errors import UserError
from params import KV_CACHES

EXIT_ERROR, EXIT_USAGE = 1, 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE


class Completion(argparse.Action):
    """Print a completion script of the parser for a shell, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        import shtab

        print(shtab.complete(parser, values))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and whose help shows defaults."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.add_argument(
            "--print-completion", choices=("bash", "zsh", "tcsh"), action=Completion, default=argparse.SUPPRESS,
            help="print a completion script for this shell and exit",
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message} (see {self.prog} --help)\n")


def run(main: Callable[[], None]) -> NoReturn:
    """Run main and exit: 0, or one line on stderr and a code that says what happened. Bugs keep their traceback."""
    code = 0
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: stdout was closed before the text ended", file=sys.stderr)
        code = EXIT_BROKEN_PIPE
    except Exception as error:
        message = _machine_limit(error)
        if message is None:
            raise
        code = _fail(message)
    sys.exit(code)


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_ERROR


def _machine_limit(error: Exception) -> str | None:
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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose the model, its device and dtype."""
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", help="model folder, .gguf file or hub id (org/name); default SmolLM2-135M-Instruct"
    )
    source.add_argument(
        "--random-weights", metavar="NAME", help="a known architecture with random weights, for speed only"
    )
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    model.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: the faster one")


def add_kv_cache_argument(group: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """The option that chooses how keys and values are kept."""
    group.add_argument("--kv-cache", choices=KV_CACHES, default=KV_CACHES[0], help="int8: keys and values in 8 bits")


def positive_int(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


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


def sparsities(text: str) -> tuple[float, ...]:
    """Argument type: numbers with 0 <= sparsity < 1, commas between."""
    return tuple(sparsity(part) for part in text.split(","))
