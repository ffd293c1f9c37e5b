"""The console commands of an installed copy (pip install .): the scripts of a checkout, under names of their own."""

from importlib import import_module

from teal.cli import command_line


def generate() -> None:
    command_line.run(import_module("teal.cli.generate").main)


def serve() -> None:
    command_line.run(import_module("teal.cli.serve").main)


def calibrate() -> None:
    command_line.run(import_module("teal.cli.calibrate").main)


def quantize() -> None:
    command_line.run(import_module("teal.cli.quantize").main)


def evaluate() -> None:
    command_line.run(import_module("teal.cli.evaluate").main)
