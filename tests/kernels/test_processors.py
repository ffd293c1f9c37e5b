"""Products with a GGUF file's integers as compiled for other processors: 256-bit registers, and none that is known."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from teal.kernels.cpu.native import FLAGS, FOLDER, processor_features
from teal.kernels.formats.blocks import BLOCK_TYPES, Blocks, dequantize
from tests.block_models import KINDS, random_blocks
from tests.conftest import assert_near

COMPILER = shutil.which("g++")
PROCESSORS = {"x86-64-v3": "avx2", "x86-64": "sse2"}  # what -march is given, and what it takes to run that
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of floats.h
TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 8e-5)]  # blocks.cpp rounds x: test_blocks.py


class Kernels:
    """blocks.cpp and widen_blocks.cpp as compiled for a processor."""

    def __init__(self, processor: str, folder: Path) -> None:
        assert COMPILER is not None
        path = folder / "blocks.so"
        flags = [flag for flag in FLAGS if not flag.startswith(("-O", "-march"))]
        flags += [
            "-O1",
            "-w",
            "-shared",
            f"-march={processor}",
            f"-I{FOLDER}",
            *(f"-I{path}" for path in include_paths()),
        ]
        sources = [str(FOLDER / f"{name}.cpp") for name in ("blocks", "widen_blocks", "gather")]
        wrapper = str(Path(__file__).with_name("blocks_for_a_processor.cpp"))
        subprocess.run([COMPILER, *flags, wrapper, *sources, "-o", str(path)], check=True)
        self.library = ctypes.CDLL(str(path))

    @staticmethod
    def _weight(weight: Blocks, dtype: torch.dtype) -> tuple[Any, ...]:
        kind = BLOCK_TYPES[weight.kind]
        numbers = (kind.bits, kind.offset, kind.group, kind.has_minima, kind.nested)
        sizes = (ctypes.c_int64(weight.K), ctypes.c_int64(weight.N), ctypes.c_int32(DTYPES.index(dtype)))
        return ctypes.c_void_p(weight.data.data_ptr()), (ctypes.c_int32 * 5)(*numbers), *sizes

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


@pytest.fixture(scope="module", params=PROCESSORS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
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
