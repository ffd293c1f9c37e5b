"""Measure what sparsity costs in quality: python evaluate.py --text book.txt --sparsity 0,0.4,0.5 --method uniform"""

from teal.cli.command_line import run
from teal.cli.evaluate import main

if __name__ == "__main__":
    run(main)
