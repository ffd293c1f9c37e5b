"""The output head on a CPU: a compiled product with fp32 sums, which replaces model.py's plain one from outside."""

import torch
from torch import Tensor

from teal.kernels.cpu.native import native_kernels
from teal.model import OutputHead, Transformer

MAX_CALL_ROWS = 8  # of the kernel
# With more rows a matrix product of parts in fp32 is as fast. 49,152 x 576 in bf16 and 17 rows take 18.6 and 15 ms of
# one Zen 5 core. For one row it takes 4.5 ms and the kernel 3.3, as torch's product with a bf16 result does.
MAX_KERNEL_ROWS = 16


class NativeHead(OutputHead):
    """An OutputHead whose product is linear_fp32.cpp's for a few rows: each has the bits that it has alone."""

    def forward(self, x: Tensor) -> Tensor:
        """As OutputHead.forward."""
        rows = x.reshape(-1, self.in_features)
        native = native_kernels() if len(rows) <= MAX_KERNEL_ROWS else None
        if native is None:
            return super().forward(x)
        found = [native.linear_fp32(part, self.weight) for part in rows.split(MAX_CALL_ROWS)]
        return (found[0] if len(found) == 1 else torch.cat(found)).view(*x.shape[:-1], self.out_features)


def use_native_head(model: Transformer) -> None:
    """Replace the output head in place, on the same weight. One that is not of floats, or not on a CPU, stays."""
    head = model.lm_head
    if isinstance(head, OutputHead) and head.weight.device.type == "cpu":
        model.lm_head = NativeHead(head.in_features, head.out_features, bias=False, device="meta")
        model.lm_head.weight = head.weight
