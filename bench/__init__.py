"""Benchmarks of kernels, of decoding and of serving: python -m bench.decode and the like."""

import sys

from teal import interrupts

if sys.argv[0] == "-m":  # being started, not imported: Ctrl-C may come while torch is imported
    interrupts.install_for_imports()
