"""Parts of the Triton kernels: listing kept channels, gathering their rows, products, tiles, launch.

Imported by the operations in kernels/; no operation is defined here.
"""
