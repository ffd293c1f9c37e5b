"""Products with a GGUF file's integers as compiled for other processors: 256-bit registers, and none that is known."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

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
DTYPES = {torch.float32: (0, 1e-6), torch.bfloat16: (1, 8e-5)}  # blocks.cpp rounds x: test_blocks.py
Product = Callable[[Blocks, Tensor, float], Tensor]


@pytest.fixture(scope="module", params=PROCESSORS)
def product(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Product:
    """y = what |x| >= limit keeps of x, times a weight, by blocks.cpp as compiled for a processor."""
    if COMPILER is None or platform.machine() != "x86_64" or PROCESSORS[request.param] not in processor_features():
        pytest.skip("needs g++ and such a processor")
    library = tmp_path_factory.mktemp("processor") / "product.so"
    flags = [flag for flag in FLAGS if not flag.startswith(("-O", "-march"))]
    flags += [
        "-O1",
        "-w",
        "-shared",
        f"-march={request.param}",
        f"-I{FOLDER}",
        *(f"-I{path}" for path in include_paths()),
    ]
    sources = (Path(__file__).with_name("blocks_for_a_processor.cpp"), FOLDER / "gather.cpp")
    subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).product

    def run(weight: Blocks, x: Tensor, limit: float) -> Tensor:
        kind = BLOCK_TYPES[weight.kind]
        numbers = (kind.bits, kind.offset, kind.group, kind.has_minima, kind.nested)
        values, y = x.float().contiguous(), torch.empty(len(x), weight.N)
        function(
            ctypes.c_void_p(weight.data.data_ptr()), (ctypes.c_int32 * 5)(*numbers), ctypes.c_int64(weight.K),
            ctypes.c_int64(weight.N), ctypes.c_int32(DTYPES[x.dtype][0]), ctypes.c_void_p(values.data_ptr()),
            ctypes.c_int64(len(x)), ctypes.c_float(limit), ctypes.c_void_p(y.data_ptr()),
        )  # fmt: skip
        return y

    return run


@pytest.mark.parametrize("limit", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products(product: Product, kind: str, dtype: torch.dtype, limit: float) -> None:
    weight = random_blocks(kind, 768, 200)
    floats = dequantize(weight)
    for rows in (1, 3, 9):
        x = torch.randn(rows, 768, generator=torch.Generator().manual_seed(rows)).to(dtype)
        kept = torch.where(x.float().abs() < limit, 0.0, x.float())
        assert_near(f"{rows} rows", product(weight, x, limit), kept @ floats, DTYPES[dtype][1])
