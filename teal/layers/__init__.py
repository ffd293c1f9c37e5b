"""What takes the place of a plain model's layers: quantized projections, 8-bit keys and values, a faster head.

Import `rounding` to quantize a model in memory. Sparse projections are in teal_layers.py.
"""
