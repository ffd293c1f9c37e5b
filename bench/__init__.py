"""Benchmarks of kernels, of decoding and of serving: python -m bench.decode and the like."""

import sys

import environment  # noqa: F401 - before torch
import interrupts

if sys.argv[0] == "-m":  # being started, not imported: Ctrl-C may come while torch is imported
    interrupts.install_for_imports()
