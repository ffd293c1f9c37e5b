"""Rounding weights with care: GPTQ, half-quadratic fits, and more bits for the channels that need them.

Used by quantize.py to write a folder. Rounding to nearest in memory and the layers are in teal/layers.
"""
