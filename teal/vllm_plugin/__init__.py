"""A plugin of vLLM: `vllm serve MODEL --quantization teal` decodes with this project's sparse and quantized products.

vLLM finds register.py by the package's entry point; config.py says which layer is computed by what.
"""
