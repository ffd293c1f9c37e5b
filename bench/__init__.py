"""Speed of kernels, of decoding and of serving."""

import environment  # noqa: F401 - before torch
