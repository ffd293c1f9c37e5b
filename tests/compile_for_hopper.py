"""Compile every kernel launch of the decode step for sm_90 without a GPU; run by test_decode_kernels.py.

Launches are taken from the real launchers: Triton's JITFunction.run is replaced by one that compiles for a fixed
target and launches nothing. The interpreter accepts code that the compiler refuses, and machines without a GPU
would not notice.
"""

from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, serialize_specialization_data

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
POINTERS |= {torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8"}
compiled: list[str] = []


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Compile what this launch would run."""
    meta = {name: options.pop(name) for name in list(options) if name in self.arg_names}
    values = dict(zip(self.arg_names, args, strict=False)) | meta
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, parameter) in enumerate(zip(self.arg_names, self.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options.pop("launch_pdl", None)
    # What a hook is given whenever a kernel is compiled; vLLM sets one after its start.
    serialize_specialization_data(self.fn.__name__, signature, constants, attributes, SimpleNamespace(), "", HOPPER)
    source = ASTSource(self, signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=HOPPER, options=options)
    gemv = values.get("META")
    if gemv is not None and gemv.BITS < 16 and self.fn.__name__ == "sparse_gemv_kernel":
        assert "cvt.rn.f32" not in kernel.asm["ptx"], "integers are converted, at a quarter of the rate"
        uses_tensor_cores = "mma.sync" in kernel.asm["ptx"]
        # Of several rows the sums of gather_quantized.py do, too, through tl.dot.
        assert uses_tensor_cores == gemv.TENSOR_CORE or (uses_tensor_cores and gemv.BLOCK_B > 1)
    compiled.append(self.fn.__name__)


def compile_quantized(x: Tensor, residual: Tensor, norm: Tensor, t1: Tensor, t2: Tensor) -> None:
    """Products with weights of 8 and 4 bits, for x [B, C] of a dtype, and these weights in floats."""
    from teal.kernels.dequantize import launch as floats
    from teal.kernels.norm_gemv import norm_gemv
    from teal.kernels.sparse_gemv import sparse_gemv

    C, dtype = x.shape[1], x.dtype
    scales, zeros = torch.zeros(C, 4, dtype=dtype), torch.zeros(C, 4, dtype=torch.uint8)
    sparse_gemv(x, torch.zeros(C, 512, dtype=torch.int8), t1, [512], scales)
    norm_gemv(residual, norm, 1e-5, torch.zeros(C, 64, dtype=torch.int32), t2, [256, 256], scales, zeros)
    sparse_gemv(x, torch.zeros(C, 64, dtype=torch.int32), t1, [512], scales, zeros)
    floats(torch.zeros(C, 512, dtype=torch.int8), scales, None)
    floats(torch.zeros(C, 64, dtype=torch.int32), scales, zeros)
    compile_refined(x, residual, norm, t1)
    if dtype == torch.bfloat16:  # groups along the input
        scales, zeros = (torch.zeros(C // 8, 512, dtype=kind) for kind in (dtype, torch.uint8))
        sparse_gemv(x, torch.zeros(C, 512, dtype=torch.int8), t1, [512], scales)
        sparse_gemv(x, torch.zeros(C, 64, dtype=torch.int32), t1, [512], scales, zeros)
        floats(torch.zeros(C, 512, dtype=torch.int8), scales, None)
        floats(torch.zeros(C, 64, dtype=torch.int32), scales, zeros)


def compile_refined(x: Tensor, residual: Tensor, norm: Tensor, t1: Tensor) -> None:
    """Products with a weight of 4 bits whose channels may be refined, and this weight in floats."""
    from teal.kernels.activation_gemv import activation_gemv
    from teal.kernels.attention_gemv import attention_gemv
    from teal.kernels.dequantize import launch as floats
    from teal.kernels.norm_gemv import norm_gemv
    from teal.kernels.sparse_gemv import sparse_gemv

    (B, C), E = x.shape, 3
    values, zeros = torch.zeros(C + E, 64, dtype=torch.int32), torch.zeros(C + E, 4, dtype=torch.uint8)
    quantized = (torch.zeros(C + E, 4, dtype=x.dtype), zeros, torch.arange(E, dtype=torch.int32))
    sparse_gemv(x, values, t1, [512], *quantized)
    norm_gemv(residual, norm, 1e-5, values, t1, [512], *quantized)
    activation_gemv(torch.zeros(2, B, 2 * C), values, t1, *quantized)
    one = torch.zeros(B, 4, 1)
    attention_gemv(torch.zeros(B, 4, 1, C // 4), one, one, values, t1, *quantized)
    floats(values, *quantized)


def compile_families(residual: Tensor, norm: Tensor, t1: Tensor) -> None:
    """What families beyond plain ones take: norms after sublayers, of all heads and layer norms, GELU, soft caps."""
    from teal.kernels.activation_gemv import activation_gemv
    from teal.kernels.norm_gemv import norm_gemv
    from teal.kernels.norm_residual import norm_residual
    from teal.kernels.rope_attention import rope_attention
    from teal.kernels.sparse_gemv import sparse_gemv

    (B, C), dtype, D, H, KV = residual.shape, norm.dtype, 256, 4, 2
    weight = torch.zeros(C, C, dtype=dtype)
    norm_gemv(residual, norm, 1e-5, weight, t1, [C], bias=norm)
    sparse_gemv(residual, weight, t1, [C])
    activation_gemv(torch.zeros(2, B, 2 * C), weight, t1, activation="gelu_tanh")
    for bias in (None, norm):
        norm_residual(residual, norm, bias, 1e-5, residual)
    angles, positions = torch.zeros(B, D // 2), torch.zeros(B, 1, dtype=torch.int64)
    cache = torch.zeros(B, KV, 64, D, dtype=dtype)
    qkv = torch.zeros(1, B, (H + 2 * KV) * D)
    for norms in ((None, None), (torch.zeros(H * D, dtype=dtype), torch.zeros(KV * D, dtype=dtype))):
        rope_attention(qkv, None, *norms, 1e-6, angles, angles, positions, cache, cache, H, 0, dtype, 50.0)


def compile_exchange(partials: Tensor, bias: Tensor, residual: Tensor) -> None:
    """The sum over two ranks."""
    from teal.kernels.exchange_partials import exchange_partials, programs_of

    B, C = residual.shape
    words, peers = torch.zeros(2, 2, B * C, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    epochs = torch.zeros(programs_of(B, C), dtype=torch.int32)
    exchange_partials(partials, torch.float32, bias, residual, words, epochs, peers, 1)


def main() -> None:
    """Go through a decode step's kernels for each dtype and one or several rows."""
    from teal.kernels.gemv import launch

    launch.has_tensor_cores = lambda device: True
    launch.has_dependent_launch = lambda device: True
    from teal.kernels.activation_gemv import activation_gemv
    from teal.kernels.argmax import argmax_step
    from teal.kernels.attention_gemv import attention_gemv
    from teal.kernels.formats.kv_int8 import packed_width
    from teal.kernels.norm_gemv import norm_gemv
    from teal.kernels.reduce_partials import reduce_partials
    from teal.kernels.rope_attention import rope_attention
    from teal.kernels.sparse_gemv import sparse_gemv

    JITFunction.run = compile_only
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for B, C, H, KV, D, hidden in ((1, 512, 8, 2, 64, 1024), (3, 576, 9, 3, 64, 1536), (8, 40, 4, 2, 10, 88)):
            residual, x, norm = torch.zeros(B, C), torch.zeros(B, C, dtype=dtype), torch.zeros(C, dtype=dtype)
            sizes = [H * D, KV * D, KV * D]
            t3, t2, t1 = torch.zeros(3), torch.zeros(2), torch.zeros(1)
            qkv = norm_gemv(residual, norm, 1e-5, torch.zeros(C, sum(sizes), dtype=dtype), t3, sizes)
            angles, positions = torch.zeros(B, D // 2), torch.zeros(B, 1, dtype=torch.int64)
            k, v = (torch.zeros(B, KV, 64, D, dtype=dtype) for _ in range(2))
            head = torch.zeros(D, dtype=dtype)
            bias = torch.zeros(sum(sizes), dtype=dtype)
            splits = rope_attention(qkv, bias, head, head, 1e-6, angles, angles, positions, k, v, H, 16, dtype)
            k, v = (torch.zeros(B, KV, 64, packed_width(D), dtype=torch.int8) for _ in range(2))
            rope_attention(qkv, bias, head, head, 1e-6, angles, angles, positions, k, v, H, 0, dtype)
            o = attention_gemv(*splits, torch.zeros(H * D, C, dtype=dtype), t1)
            compile_exchange(o, norm, residual)
            residual = reduce_partials(o, torch.float32, norm, residual)
            gate_up = norm_gemv(residual, norm, 1e-5, torch.zeros(C, 2 * hidden, dtype=dtype), t2, [hidden, hidden])
            activation_gemv(gate_up, torch.zeros(hidden, C, dtype=dtype), t1)
            sparse_gemv(x, torch.zeros(C, 64, dtype=dtype), t1, [64])
            compile_quantized(x, residual, norm, t1, t2)
            compile_families(residual, norm, t1)
            argmax_step(torch.zeros(B, 1000, dtype=dtype), positions, torch.zeros(B, 1, dtype=torch.int64))
    print(f"{len(compiled)} launches of {len(set(compiled))} kernels compiled")


if __name__ == "__main__":
    main()
