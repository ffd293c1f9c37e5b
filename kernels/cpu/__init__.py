"""The C++ of the CPU kernels, and how it is compiled and loaded.

Import `native` for the compiled functions; operations that call them are in kernels/.
"""
