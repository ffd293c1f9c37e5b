"""What the machine can do: the device and dtype to use by default, and how fast it reads memory."""

import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from errors import UserError
from files import atomic_file, cache_folder, cpu_name
from kernels.sparse_linear import sparse_linear

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROBE_SIZE = 2048  # a bf16 matrix of 8 MiB: larger than a core's own cache
PROBE_ROWS = 16  # of the product that stands for prefill
READ_PROBE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}  # several times any last-level cache


def pick_device(name: str) -> torch.device:
    """The device called name: "cpu", "cuda", "cuda:N", or "auto" (cuda if there is one). Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: unknown device; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def pick_dtype(name: str, device: torch.device, sparse: bool) -> torch.dtype:
    """The dtype called name; "auto" is bf16 on CUDA and whichever of bf16 and fp32 is faster on this CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    return faster_cpu_dtype(sparse)


def faster_cpu_dtype(sparse: bool) -> torch.dtype:
    """bf16 or fp32, by timing products of a dense or sparse model once per CPU, threads and torch version.

    The result is kept, so that the choice, and with it the text, cannot flip between runs. The sparse kernel widens bf16
    itself and gains nearly the factor of two, but prefill and the output head are torch's, which emulates bf16 on CPUs
    without instructions for it: on an EPYC with AVX2 at a thirtieth of the speed of fp32.
    """
    key = f"{'sparse' if sparse else 'dense'}, {cpu_name()} x{torch.get_num_threads()}, torch {torch.__version__}, prefill"
    path = cache_folder("hardware") / "cpu_dtype.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if known.get(key) not in ("bf16", "fp32"):
        seconds = {name: _time_token(DTYPES[name], sparse) for name in ("bf16", "fp32")}
        known[key] = min(seconds, key=lambda name: seconds[name])
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return DTYPES[known[key]]


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over a large buffer reads: the practical ceiling for a memory-bound decode."""
    count = READ_PROBE_BYTES[device.type] // 4
    buffer = torch.ones(count, dtype=torch.float32, device=device)

    def read() -> None:
        buffer.sum()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return buffer.nbytes / _median_seconds(read)


def _time_token(dtype: torch.dtype, sparse: bool) -> float:
    """Seconds that a few matrices take for a token of a prompt and a decoded one."""
    weights = [torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype) for _ in range(4)]
    x = torch.arange(PROBE_SIZE, dtype=dtype)[None]
    half = torch.tensor([PROBE_SIZE / 2])

    def products() -> None:
        for weight in weights:
            if sparse:
                sparse_linear(x, weight, half, [PROBE_SIZE])
            else:
                F.linear(x, weight)

    prompt = torch.ones(PROBE_ROWS, PROBE_SIZE, dtype=dtype)
    prefill = _median_seconds(lambda: prompt @ weights[0], repeats=3) * len(weights) / PROBE_ROWS
    return _median_seconds(products) + prefill


def _median_seconds(action: Callable[[], object], repeats: int = 7) -> float:
    times = []
    action()
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
