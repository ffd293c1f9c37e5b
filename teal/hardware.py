"""What the machine can do: the device and dtype to use by default, and how fast it reads memory."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from teal.errors import ParameterError
from teal.files import atomic_file, cache_folder, cpu_name
from teal.kernels.sparse_linear import sparse_linear
from teal.options import check_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BF16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16")  # of torch.cpu.get_capabilities(); the last is Arm's
PROBE_SIZE = 2048  # a bf16 matrix of 8 MiB: larger than a core's own cache
PROBE_ROWS = 16  # of the product that stands for prefill
# A round is the least of so many turns of each dtype. fp32 is chosen if bf16 takes longer by MARGIN in each of ROUNDS.
TURNS, ROUNDS, MAX_ROUNDS, MARGIN = 5, 3, 8, 1.25
READ_PROBE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}  # several times any last-level cache


def pick_device(name: str) -> torch.device:
    """The device called name: "cpu", "cuda", "cuda:N", or "auto" (cuda if there is one). Raises UserError."""
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if int(index or 0) >= count:
        raise ParameterError("{device} {}: this machine has {} CUDA devices; use {device} cpu", name, count)
    return torch.device(name)


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """The dtype to compute in, and why."""

    dtype: torch.dtype
    reason: str


def pick_dtype(name: str, device: torch.device, sparse: bool) -> DtypeChoice:
    """The dtype called name; "auto" is bf16 on CUDA, and on a CPU the faster one of bf16 and fp32."""
    if name != "auto":
        return DtypeChoice(DTYPES[name], "as asked for")
    if device.type == "cuda":
        return DtypeChoice(torch.bfloat16, "the default on CUDA")
    return faster_cpu_dtype(sparse)


def faster_cpu_dtype(sparse: bool) -> DtypeChoice:
    """bf16 where the processor multiplies it; else what timing products of a dense or sparse model finds faster.

    bf16 is half the bytes to read. But prefill is torch's, which emulates bf16 on CPUs without instructions for it. On
    an EPYC with AVX2 that has a thirtieth of the speed of fp32. What was measured is kept for each CPU, number of
    threads and version of torch. So the choice, and with it the text, does not change from run to run.
    """
    if feature := bf16_feature():
        return DtypeChoice(torch.bfloat16, f"this processor multiplies bf16 ({feature})")
    key = f"{'sparse' if sparse else 'dense'}, {cpu_name()} x{torch.get_num_threads()}, torch {torch.__version__}"
    path = cache_folder("hardware") / "bf16_over_fp32.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or not _is_ratios(known.get(key)):
        known = (known if isinstance(known, dict) else {}) | {key: _measure_ratios(sparse)}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    ratios = known[key]
    times = f"bf16 took {statistics.median(ratios):.2f} times as long as fp32"
    if all(ratio > MARGIN for ratio in ratios):
        return DtypeChoice(torch.float32, times)
    if all(ratio <= MARGIN for ratio in ratios):
        return DtypeChoice(torch.bfloat16, times)
    return DtypeChoice(torch.bfloat16, f"{times}, but measurements disagree: bf16 in doubt")


def bf16_feature() -> str | None:
    """The instructions by which this CPU multiplies bf16, if it has any."""
    capabilities = torch.cpu.get_capabilities()
    return next((name for name in BF16_FEATURES if capabilities.get(name)), None)


def _is_ratios(value: object) -> bool:
    return isinstance(value, list) and len(value) == ROUNDS and all(isinstance(ratio, float) for ratio in value)


def _measure_ratios(sparse: bool) -> list[float]:
    """Times of bf16 over those of fp32, in the last ROUNDS rounds. They go on until so many agree, MAX_ROUNDS at most.

    Both take turns within a round, and the least time of each counts: other load only ever adds to it.
    """
    timers = [_token_timer(DTYPES[name], sparse) for name in ("bf16", "fp32")]
    ratios: list[float] = []
    for _ in range(MAX_ROUNDS):
        samples = [[timer() for timer in timers] for _ in range(TURNS)]
        bf16, fp32 = (min(times) for times in zip(*samples, strict=True))
        ratios = [*ratios, bf16 / fp32][-ROUNDS:]
        if len(ratios) == ROUNDS and len({ratio > MARGIN for ratio in ratios}) == 1:
            break
    return ratios


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over a large buffer reads: the practical ceiling for a memory-bound decode."""
    count = READ_PROBE_BYTES[device.type] // 4
    buffer = torch.ones(count, dtype=torch.float32, device=device)

    def read() -> None:
        buffer.sum()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return buffer.nbytes / _median_seconds(read)


def _token_timer(dtype: torch.dtype, sparse: bool) -> Callable[[], float]:
    """A function that takes the time of a few matrices for a decoded token and for one of a prompt, in seconds."""
    weights = [torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype) for _ in range(4)]
    x = torch.arange(PROBE_SIZE, dtype=dtype)[None]
    prompt = torch.ones(PROBE_ROWS, PROBE_SIZE, dtype=dtype)
    half = torch.tensor([PROBE_SIZE / 2])

    def seconds() -> float:
        start = time.perf_counter()
        for weight in weights:
            if sparse:
                sparse_linear(x, weight, half, [PROBE_SIZE])
            else:
                F.linear(x, weight)
        decoded = time.perf_counter()
        prompt @ weights[0]
        return decoded - start + (time.perf_counter() - decoded) * len(weights) / PROBE_ROWS

    seconds()  # compiles and allocates
    return seconds


def _median_seconds(action: Callable[[], object], repeats: int = 7) -> float:
    times = []
    action()
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
