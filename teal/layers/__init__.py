"""What takes the place of a plain model's layers: quantized projections, 8-bit keys and values, a faster head.

Imports kernels and model; used by whatever loads or decodes. Sparse projections are in teal_layers.py.
"""
