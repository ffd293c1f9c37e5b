"""A whole decode step on a CPU as one native call: its C++, and launch.py, which describes a model to it."""
