"""Products with a GGUF file's integers as compiled for other processors: 256 bits, none known, ARM in an emulator."""

import ctypes
import platform
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from teal.kernels.cpu.native import FLAGS, FOLDER, processor_features, unit_arguments, units
from teal.kernels.formats.blocks import BLOCK_TYPES, Blocks, dequantize
from tests.block_models import KINDS, random_blocks
from tests.conftest import assert_near

COMPILER = shutil.which("g++")
PROCESSORS = {"x86-64-v3": "avx2", "x86-64": "sse2"}  # what -march is given, and what it takes to run that
ARM_COMPILER, ARM_EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
SOURCES = ("blocks.cpp", "widen_blocks.cpp", "gather.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of floats.h
TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 8e-5)]  # blocks.cpp rounds x: test_blocks.py


def build(compiler: str, path: Path, wrapper: str, sources: tuple[str, ...], *options: str) -> Path:
    """The wrapper beside this file and sources of the kernels, at path."""
    flags = [flag for flag in FLAGS if not flag.startswith(("-O", "-march"))]
    flags += ["-O1", "-w", f"-I{FOLDER}", *(f"-I{folder}" for folder in include_paths())]
    files = [Path(__file__).with_name(wrapper), *(FOLDER / source for source in sources)]
    subprocess.run([compiler, *flags, *options, *map(str, files), "-o", str(path)], check=True)
    return path


def compiled(wrapper: str, processor: str, folder: Path, *sources: str) -> ctypes.CDLL:
    """As build, for a processor of this machine's kind, loaded."""
    assert COMPILER is not None
    return ctypes.CDLL(str(build(COMPILER, folder / "kernels.so", wrapper, sources, "-shared", f"-march={processor}")))


def numbers_of(weight: Blocks) -> tuple[int, ...]:
    """Those of blocks_of in tensors.h."""
    kind = BLOCK_TYPES[weight.kind]
    return kind.bits, kind.offset, kind.group, kind.has_minima, kind.nested


class Kernels:
    """blocks.cpp and widen_blocks.cpp as compiled for a processor."""

    def __init__(self, processor: str, folder: Path) -> None:
        self.library = compiled("blocks_for_a_processor.cpp", processor, folder, *SOURCES)

    @staticmethod
    def _weight(weight: Blocks, dtype: torch.dtype) -> tuple[Any, ...]:
        sizes = (ctypes.c_int64(weight.K), ctypes.c_int64(weight.N), ctypes.c_int32(DTYPES.index(dtype)))
        return ctypes.c_void_p(weight.data.data_ptr()), (ctypes.c_int32 * 5)(*numbers_of(weight)), *sizes

    def product(self, weight: Blocks, x: Tensor, limit: float) -> Tensor:
        """What |x| >= limit keeps of x, times weight: fp32."""
        values, y = x.float().contiguous(), torch.empty(len(x), weight.N)
        self.library.product(
            *self._weight(weight, x.dtype), ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(len(x)),
            ctypes.c_float(limit), ctypes.c_void_p(y.data_ptr()),
        )  # fmt: skip
        return y

    def floats(self, weight: Blocks, dtype: torch.dtype) -> Tensor:
        """The weight in dtype."""
        out = torch.empty(weight.K, weight.N, dtype=dtype)
        self.library.floats(*self._weight(weight, dtype), ctypes.c_void_p(out.data_ptr()))
        return out


class EmulatedKernels(Kernels):
    """The same for ARM, whose NEON registers have 128 bits, in an emulator."""

    def __init__(self, folder: Path) -> None:
        assert ARM_COMPILER is not None
        options = ("-static", "-DTEAL_EMULATED")
        self.program = build(ARM_COMPILER, folder / "kernels", "blocks_for_a_processor.cpp", SOURCES, *options)

    def _call(self, weight: Blocks, dtype: torch.dtype, x: Tensor, limit: float) -> bytearray:
        sizes = (weight.K, weight.N, len(x), weight.data.numel())
        call = struct.pack("<4q6ifi", *sizes, *numbers_of(weight), DTYPES.index(dtype), limit, 0)
        text = call + weight.data.numpy().tobytes() + x.float().numpy().tobytes()
        assert ARM_EMULATOR is not None
        return bytearray(
            subprocess.run([ARM_EMULATOR, self.program], input=text, check=True, capture_output=True).stdout
        )

    def product(self, weight: Blocks, x: Tensor, limit: float) -> Tensor:
        return torch.frombuffer(self._call(weight, x.dtype, x, limit), dtype=torch.float32).view(len(x), weight.N)

    def floats(self, weight: Blocks, dtype: torch.dtype) -> Tensor:
        found = self._call(weight, dtype, torch.empty(0, weight.K), 0.0)
        return torch.frombuffer(found, dtype=dtype).view(weight.K, weight.N)


@pytest.fixture(scope="module", params=[*PROCESSORS, "aarch64"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if request.param == "aarch64":
        if ARM_COMPILER is None or ARM_EMULATOR is None:
            pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64-static")
        return EmulatedKernels(tmp_path_factory.mktemp("arm"))
    if COMPILER is None or platform.machine() != "x86_64" or PROCESSORS[request.param] not in processor_features():
        pytest.skip("needs g++ and such a processor")
    return Kernels(request.param, tmp_path_factory.mktemp("processor"))


@pytest.mark.parametrize("limit", [0.0, 0.7])
@pytest.mark.parametrize("dtype,tolerance", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kernels: Kernels, kind: str, dtype: torch.dtype, tolerance: float, limit: float) -> None:
    weight = random_blocks(kind, 768, 200)
    floats = dequantize(weight)
    for rows in (1, 3, 9):
        x = torch.randn(rows, 768, generator=torch.Generator().manual_seed(rows)).to(dtype)
        kept = torch.where(x.float().abs() < limit, 0.0, x.float())
        assert_near(f"{rows} rows", kernels.product(weight, x, limit), kept @ floats, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_exact(kernels: Kernels, kind: str) -> None:
    weight = random_blocks(kind, 512, 300)
    for dtype in DTYPES:
        assert torch.equal(kernels.floats(weight, dtype), dequantize(weight).to(dtype)), dtype


@pytest.mark.skipif(COMPILER is None or "avx2" not in processor_features(), reason="needs g++ and such a processor")
def test_amx(tmp_path: Path) -> None:
    """Products of bf16 by matrix registers, emulated: any number of rows, each with the bits that it has alone."""
    library, K, width = compiled("amx_on_cpu.cpp", "x86-64-v3", tmp_path), 160, 64
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(K, width, generator=generator).bfloat16()
    panel = weight.view(K // 2, 2, width).transpose(1, 2).contiguous()

    def product(x: Tensor, channels: int) -> Tensor:
        y = torch.ones(len(x), width)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, panel, y)]
        sizes = [ctypes.c_int64(size) for size in (len(x), K, channels)]
        library.multiply(pointers[0], *sizes[:2], pointers[1], sizes[2], pointers[2])
        return y

    for rows in (1, 15, 16, 17, 32, 40, 71):
        x = torch.randn(rows, K, generator=generator).bfloat16()
        found = product(x, 64)
        assert_near(f"{rows} rows", found, 1 + x.float() @ weight.float(), 1e-6)
        assert torch.equal(product(x, K), found)
        assert torch.equal(product(x[-1:].contiguous(), K)[0], found[-1])


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_ops_are_one_unit_without_vector_instructions() -> None:
    """Where other branches of their files hold, too, no two have a name in common."""
    assert COMPILER is not None
    ops = units()[0]
    flags = [flag for flag in FLAGS if not flag.startswith("-march")] + ["-march=x86-64", "-w", "-fsyntax-only"]
    flags += [f"-I{folder}" for folder in include_paths()]
    assert len(ops) > 2
    subprocess.run([COMPILER, *flags, *unit_arguments(ops)], check=True)
