"""nn.Linear on a CPU that emulates products of its dtype: many rows are multiplied in fp32 (kernels/matmul.py)."""

from torch import Tensor, nn

from teal.kernels.matmul import MIN_FP32_ROWS, emulates, matmul_in_fp32
from teal.model import Transformer


class WideLinear(nn.Linear):
    """An nn.Linear in bf16 or fp16 whose products with many rows have fp32 sums, rounded once before the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) < MIN_FP32_ROWS[x.dtype]:
            return super().forward(x)
        y = matmul_in_fp32(rows, self.weight.t()).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def use_wide_linears(model: Transformer) -> None:
    """Replace projections in place, on the same weights, if this CPU emulates their dtype. Others than floats stay."""
    for block in model.blocks:
        for p in block.projections():
            linear = block.get_submodule(p.module)
            if type(linear) is not nn.Linear or linear.weight.device.type != "cpu" or not emulates(linear.weight.dtype):
                continue
            wide = WideLinear(linear.in_features, linear.out_features, bias=False, device="meta")
            wide.weight, wide.bias = linear.weight, linear.bias
            block.set_submodule(p.module, wide)
