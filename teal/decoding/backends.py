"""Which backend runs a model: its modules, compiled blocks, fused kernels or one program. Chosen after replacements."""

from importlib.util import find_spec

import torch
from torch import Tensor

from teal.decoding.backend import FUSED_INPUTS, Backend, CompiledBackend, EagerBackend, StepBackend
from teal.decoding.cpu_program import CpuProgramBackend
from teal.errors import ParameterError, UserError
from teal.extras import block_extras
from teal.layers.block_linear import BlockWeight
from teal.layers.int8_cache import has_int8_cache
from teal.layers.phase import PhasedModule
from teal.layers.team import team_of
from teal.model import KVCache, Transformer
from teal.options import BACKENDS, MAX_ROWS, check_choice
from teal.plan import keep_all_plan
from teal.teal_layers import sparsify

# What fused_block.py computes beyond a plain block, by its names in extras.py; anything new is refused until it does.
FUSED_EXTRAS = frozenset({
    "activation gelu_tanh", "layer norms", "sublayers without a norm before", "norms after sublayers",
    "norms of q and k over all heads", "a soft cap of attention scores",
})  # fmt: skip


class FusedBackend(StepBackend):
    """Decode by seven kernels a plain block (fused_block.py); prefill by another backend, on the same weights.

    Projections of a dense model in floats are replaced, in place, by modules of the layout that the kernels read.
    """

    name = "fused"

    def __init__(self, model: Transformer, reason: str, compile: bool) -> None:
        from teal.decoding.fused_block import fused_decode  # its kernels need Triton, which a CPU does not

        if not has_kernel_layout(model):
            sparsify(model, keep_all_plan(model.config))
        super().__init__(CompiledBackend(model, reason) if compile else EagerBackend(model, reason))
        self.block_decode = fused_decode

    def _decode(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        """More rows than the kernels take go through the modules, and so does what is counted."""
        if tokens.shape[0] > MAX_ROWS or self.state.counting:
            return self.model.hidden_states(tokens, positions, kv_cache)
        x = self.model.embed(tokens)
        tensors = self.position_tensors(positions, kv_cache.length)
        for (block, window, k, v), (cos, sin, _) in zip(self.layers(kv_cache), tensors, strict=True):
            x = self.block_decode(block, window, x, cos, sin, positions, k, v)
        return x


def choose_backend(model: Transformer, compile: bool | None = None, forced: str = "auto") -> Backend:
    """The backend for model's device and formats, or the one that is forced. compile None: on CUDA only.

    Raises UserError if the forced one is unknown, cannot run, or contradicts compile.
    """
    check_choice("backend", forced, BACKENDS)
    if (forced, compile) in (("eager", True), ("compiled", False)):
        raise ParameterError("{backend} {} contradicts compile={}; give one of them", forced, compile)
    device = model.device
    name, reason = forced, "asked for"
    if forced == "auto":
        layout = has_kernel_layout(model)
        name, reason = best_backend(
            device.type, layout, has_int8_cache(model), compile, layout and _program_pays(model),
            team_of(model) is not None,
        )  # fmt: skip
    beneath = name  # a program leaves to it what it does not take
    if name == "program":
        beneath = "fused" if device.type == "cuda" else "compiled" if compile else "eager"
    if beneath == "fused" and (obstacle := _fused_obstacle(model)):
        if forced in ("fused", "program"):
            raise ParameterError("{backend} {} cannot run: {}", forced, obstacle)
        name = beneath = "eager" if compile is False else "compiled"
        reason = f"fused cannot run: {obstacle}"
    if beneath == "fused":
        backend: Backend = FusedBackend(model, reason, device.type == "cuda" if compile is None else compile)
    else:
        backend = CompiledBackend(model, reason) if beneath == "compiled" else EagerBackend(model, reason)
    return _program(backend, forced == "program") if name == "program" else backend


def _program(others: Backend, forced: bool) -> Backend:
    """The program of the model's device, or others, which then say why, where it cannot run.

    Raises ParameterError, or OutOfMemoryError, if it is forced and cannot.
    """
    try:
        if others.model.device.type == "cpu":
            return CpuProgramBackend(others)
        from teal.decoding.cuda_program import CudaProgramBackend  # its kernel needs CUDA's libraries

        return CudaProgramBackend(others)
    except UserError as error:
        if forced:
            raise ParameterError("{backend} program cannot run: {}", error) from None
        reason = str(error)
    except torch.OutOfMemoryError:
        if forced:
            raise
        reason = "its tables need more memory than the GPU has left"
    others.reason = f"program cannot run: {reason}"
    return others


def best_backend(
    device: str, kernel_layout: bool, int8_cache: bool, compile: bool | None, program_pays: bool = False,
    is_shared: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """Name and reason of the fastest backend on a type of device.

    kernel_layout: see has_kernel_layout. program_pays: whether CUDA's program beats the fused kernels. is_shared:
    whether several devices have a part of the model each.
    """
    if device == "cuda" and kernel_layout and program_pays:
        return "program", "a step of one row is one kernel on this GPU"
    if device == "cuda" and kernel_layout:
        return "fused", "sparse or quantized weights on CUDA"
    if device == "cuda" and int8_cache:
        return "fused", "a KV cache in 8 bits on CUDA"
    if device == "cuda" and is_shared:  # dense: 366 tok/s of Llama-3-8B on two H200, compiled 299
        return "fused", "several GPUs share the model, whose sums its kernels exchange"
    if device == "cuda" and compile is None:
        return "compiled", "dense weights in floats on CUDA"
    if compile:
        return "compiled", "compiling was asked for"
    if device == "cpu" and not is_shared:
        return "program", "a step is one native call on a CPU"
    return "eager", f"compiling was {'not asked for' if compile is None else 'refused'}"


def has_kernel_layout(model: Transformer) -> bool:
    """Whether the projections are stored as the fused kernels read them: SparseLinear and QuantizedLinear modules."""
    return any(isinstance(module, PhasedModule) for module in model.layers.modules())


PAIR_CHANNELS = 4096  # of a model for which two GPUs' program was measured: Llama-3-8B's


def _program_pays(model: Transformer) -> bool:
    """Whether CUDA's program has been measured to beat the fused kernels: on an H100 and an H200.

    On two GPUs it is faster with an 8B: in 16 bits by 8 to 13%, in 4 by 22 to 29%. On four a 70B is slower at 50%.
    There sums were compared with one GPU's only where all ranks took turns on one card.
    """
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) != (9, 0):
        return False
    team = team_of(model)
    return team is None or (team.rank.count <= 2 and model.config.hidden_size <= PAIR_CHANNELS)


def _fused_obstacle(model: Transformer) -> str:
    """Why the fused kernels cannot run model; empty if they can."""
    inputs = tuple(p.input for p in model.config.projections())
    if inputs != FUSED_INPUTS:
        wanted, found = (", ".join(names) for names in (FUSED_INPUTS, inputs))
        return f"its kernels take inputs {wanted}, and this model's block has {found}"
    if features := [name for name in block_extras(model.config) if name not in FUSED_EXTRAS]:
        return f"its kernels do not compute {', '.join(features)}"
    if any(isinstance(module, BlockWeight) for module in model.modules()):
        return "weights in a GGUF file's integers have no such kernels; {dequantize} them"
    if find_spec("triton") is None:
        return "its kernels need Triton, which is not installed"
    from teal.kernels.gemv.launch import kernels_run_on

    device = model.device
    return "" if kernels_run_on(device) else f"its kernels need CUDA, and the model is on {device.type}"
