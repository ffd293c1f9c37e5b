"""Serve a model over HTTP, as OpenAI's API does: python serve.py --sparsity 0.5"""

from teal.cli.command_line import run
from teal.cli.serve import main

if __name__ == "__main__":
    run(main)
