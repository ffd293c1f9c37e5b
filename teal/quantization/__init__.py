"""Rounding weights with care: GPTQ, and half-quadratic fits.

Used by quantize.py to write a folder. Rounding to nearest in memory and the layers are in teal/layers.
"""
