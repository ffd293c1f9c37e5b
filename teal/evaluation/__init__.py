"""What sparsity and rounding cost: perplexity, divergence, agreement, tasks, plots.

Import `quality` for figures, `harness` for lm-evaluation-harness, `plots` for pictures.
"""
