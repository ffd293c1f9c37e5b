"""The console commands of an installed copy (pip install .): the scripts of a checkout, under names of their own."""

from importlib import import_module

from teal.cli import command_line


def _run(command: str) -> None:
    command_line.run(import_module(f"teal.cli.{command}").main)


def generate() -> None:
    _run("generate")


def serve() -> None:
    _run("serve")


def calibrate() -> None:
    _run("calibrate")


def quantize() -> None:
    _run("quantize")


def evaluate() -> None:
    _run("evaluate")
