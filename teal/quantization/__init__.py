"""Rounding weights with care: GPTQ, half-quadratic fits, and the folders that hold the result.

Used by quantize.py; the layers that compute with the result are in teal/layers.
"""
