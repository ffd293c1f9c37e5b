"""Loads the compiled program onto a GPU and launches it: cooperatively, so that all blocks run at once or none does."""

import ctypes
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from teal.errors import UserError
from teal.kernels.formats.packing import Weight
from teal.kernels.program.compiler import checked, cubin
from teal.kernels.program.plan import Device, Plan

KERNEL = b"decode_step"
SCALE_BITS = 14  # scales are enlarged to below 2^14: times inputs below 2 they are within fp16


def device_facts(device: torch.device) -> Device:
    """What plan.py must know of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing in its stubs
        torch.cuda.get_device_capability(device),
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


def meta_words(weight: Weight, by_group: bool = False) -> tuple[Tensor | None, float]:
    """The scales and zeros of a quantized weight as formats.cuh reads them, and what its sums are multiplied with.

    int32 [K, groups], or [groups, K] by_group; None and 1.0 for floats.
    """
    if weight.scales is None:
        return None, 1.0
    if weight.zeros is None:
        words, unscale = weight.scales.float().view(torch.int32), 1.0
    else:
        largest = float(weight.scales.abs().max().float())
        unscale = 2.0 ** (math.frexp(largest)[1] - SCALE_BITS) if 0 < largest < math.inf else 1.0
        scales = (weight.scales.float() / unscale).to(weight.scales.dtype)
        words = scales.view(torch.int16).to(torch.int32) << 16 | weight.zeros.half().view(torch.int16).to(torch.int32)
    return (words.t() if by_group else words).contiguous(), unscale


def matrix_words(
    weight: Weight, meta: tuple[Tensor | None, float], thresholds: Tensor, bias: Tensor | None
) -> list[int]:
    """A Matrix of formats.cuh."""
    pointers = [0 if t is None else t.data_ptr() for t in (weight.values, meta[0], thresholds, bias)]
    return [*pointers, thresholds.numel(), *struct.unpack("q", struct.pack("d", meta[1]))]
