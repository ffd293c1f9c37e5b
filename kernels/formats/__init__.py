"""How 8- and 4-bit weights and 8-bit keys and values lie in memory: layout, pack, unpack.

Imported by kernels and by the layers that hold such tensors; imports torch alone.
"""
