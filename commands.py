"""The console commands of an installed copy (pip install .): the scripts of this folder, under names of their own."""

import sys
from pathlib import Path


def _run(script: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # the scripts import each other by their plain names
    import importlib

    import cli

    cli.run(importlib.import_module(script).main)


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
