"""Loads the compiled program onto a GPU and launches it: cooperatively, so that all blocks run at once or none does."""

import ctypes
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from teal.errors import UserError
from teal.kernels.formats.packing import Weight
from teal.kernels.program.compiler import checked, cubin
from teal.kernels.program.plan import Plan, part_of
from teal.kernels.program.shapes import Device, Format

KERNEL = b"decode_step"
SCALE_BITS = 14  # scales are enlarged to below 2^14: times inputs below 2 they are within fp16


def device_facts(device: torch.device) -> Device:
    """What plan.py must know of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing in its stubs
        torch.cuda.get_device_capability(device),
        2 * properties.memory_clock_rate * properties.memory_bus_width / 8e6,  # kHz, bits
    )


class Program:
    """The kernel of a plan on a device, with the memory that its blocks share. Raises UserError if it cannot run there.

    Not for two streams at once: launches share the workspace.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        from cuda.bindings import driver

        self.plan, self.device = plan, device
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # torch's context is the current one
            self.module = checked(driver.cuModuleLoadData(cubin(plan.source, torch.cuda.get_device_capability(device))))
            self.kernel = checked(driver.cuModuleGetFunction(self.module, KERNEL))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(self.kernel, attribute, plan.shared_bytes))
            blocks = checked(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.kernel, plan.threads, plan.shared_bytes)
            )
        room = blocks * torch.cuda.get_device_properties(device).multi_processor_count
        if room < plan.grid:
            raise UserError(f"{plan.grid} blocks must run at once, and the GPU has room for {room}")
        self.words = torch.zeros(plan.words, dtype=torch.int64, device=device)
        self.counters = torch.zeros(2, dtype=torch.int32, device=device)

    def launch(self, arguments: Sequence[int]) -> None:
        """Run once on the current stream. arguments: program.cu's Arguments, each of 64 bits."""
        from cuda.bindings import driver

        values = (ctypes.c_int64 * len(arguments))(*arguments)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(values))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        plan = self.plan
        checked(
            driver.cuLaunchCooperativeKernel(
                self.kernel, plan.grid, 1, 1, plan.threads, 1, 1, plan.shared_bytes, stream, ctypes.addressof(pointers)
            )
        )


class Tables(NamedTuple):
    """What formats.cuh's Matrix has of a weight beside its values, under Matrix's names; made once."""

    meta: Tensor | None = None
    unscale: float = 1.0
    second: Tensor | None = None
    second_meta: Tensor | None = None


def tables(weight: Weight, product: str, plan: Plan, gate_up: Format) -> Tables:
    """The tables of a weight of one of shapes.PRODUCTS; none of floats. gate_up: the format of that product."""
    if weight.scales is None:
        return Tables()
    words, unscale = _meta_words(weight)
    second, second_meta = _second_rows(weight, words, product, plan, gate_up)
    if product == "MLP" and not weight.by_input:
        words = pad(words, (0, 0, 0, plan.sizes["GATE_UP_ROWS"] - len(words))).t().contiguous()
    return Tables(words, unscale, second, second_meta)


def _second_rows(
    weight: Weight, words: Tensor, product: str, plan: Plan, gate_up: Format
) -> tuple[Tensor | None, Tensor | None]:
    """Matrix's second and second_meta, of the words of all rows; None of a product that no block refines."""
    room, device, K = plan.sizes[f"{product}_SECONDS"], words.device, weight.K
    if not room:
        return None, None
    refined = torch.empty(0, dtype=torch.int64) if weight.refined is None else weight.refined.long().cpu()
    parts = part_of(product, torch.arange(K), gate_up, plan.sizes)
    mine = parts[refined]
    counts = mine.bincount(minlength=int(parts.max()) + 1)
    by_part = mine.argsort(stable=True)
    earlier = torch.empty_like(mine)  # refined channels of its part before each
    earlier[by_part] = torch.arange(len(mine)) - (counts.cumsum(0) - counts)[mine[by_part]]
    rows = K + torch.arange(len(refined))
    second = torch.zeros(K, dtype=torch.int32)
    second[refined] = (rows | earlier << 16).to(torch.int32)
    second_meta = torch.zeros(len(counts), room, words.shape[1], dtype=torch.int32, device=device)
    second_meta[mine.to(device), earlier.to(device)] = words[K:]
    if product == "MLP":
        second_meta = second_meta.transpose(1, 2).contiguous()
    return second.to(device), second_meta


def _meta_words(weight: Weight) -> tuple[Tensor, float]:
    """The scales and zeros of a quantized weight as words int32 [rows, groups], and what sums are multiplied with."""
    assert weight.scales is not None
    if weight.zeros is None:
        words, unscale = weight.scales.float().view(torch.int32), 1.0
    else:
        largest = float(weight.scales.abs().max().float())
        unscale = 2.0 ** (math.frexp(largest)[1] - SCALE_BITS) if 0 < largest < math.inf else 1.0
        scales = (weight.scales.float() / unscale).to(weight.scales.dtype)
        words = scales.view(torch.int16).to(torch.int32) << 16 | weight.zeros.half().view(torch.int16).to(torch.int32)
    return words.contiguous(), unscale


def matrix_words(values: Tensor, tables: Tables, thresholds: Tensor, bias: Tensor | None) -> list[int]:
    """A Matrix of formats.cuh."""
    parts = (values, tables.meta, tables.second, tables.second_meta, thresholds, bias)
    pointers = [0 if t is None else t.data_ptr() for t in parts]
    return [*pointers, thresholds.numel(), *struct.unpack("q", struct.pack("d", tables.unscale))]
