"""Rounding weights: to nearest in memory, with care by GPTQ or half-quadratic fits.

Import `rounding` for a model in memory, `gptq` and `half_quadratic` to write a folder. Its layers are in teal/layers.
"""
