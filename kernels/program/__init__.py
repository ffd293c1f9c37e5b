"""A whole decode step as one CUDA kernel: program.cu and its parts, what cuts the work (plan.py), and what runs it."""
