"""Logits are fp32 on every path: two that one bf16 number would stand for keep their order."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.checkpoint.loading import load_for_decoding
from teal.checkpoint.weights import load_model
from teal.decoding.engine import Engine
from teal.decoding.requests import Done, Piece, Request, TokenLogprob
from teal.decoding.scheduler import Scheduler
from teal.decoding.speculation import SpeculativeEngine
from teal.evaluation.quality import continue_greedily, window_logits
from teal.kernels import quantized_matmul as quantized_matmul_file
from teal.kernels import sparse_linear as sparse_linear_file
from teal.kernels.argmax import argmax_step
from teal.kernels.cpu.native import native_kernels
from teal.kernels.quantized_matmul import quantized_matmul
from teal.kernels.reduce_partials import reduce_partials
from teal.kernels.sparse_gemv import sparse_gemv
from teal.kernels.sparse_linear import sparse_linear, sparse_linear_op
from teal.layers import output_head
from teal.layers.output_head import NativeHead
from teal.layers.phase import decoding
from teal.layers.quantized_linear import round_to_nearest
from teal.model import OutputHead
from teal.options import DraftOptions, ModelOptions
from teal.plan import keep_all_plan
from teal.teal_layers import sparsify
from tests.conftest import QUANTIZABLE, assert_near, save_tiny_model, tiny_config

SECOND, FIRST = 100, 120  # in one group of weights, whose scale is 1/64; argmax takes the first of equal logits
LOGITS = {FIRST: 64 * 127 / 64, SECOND: (63 * 127 + 126) / 64}  # neighbours in bf16 are 1/2 apart, in fp16 1/16
PROMPTS = [[5, 9, 33, 7], [8, 8], [11, 12, 13]]


@pytest.fixture(scope="module")
def close_folder(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer_json: str) -> Path:
    """A checkpoint whose logits are LOGITS and 0 for all other tokens, whatever the text."""
    folder = tmp_path_factory.mktemp("close")
    model = save_tiny_model(tiny_config("llama", **QUANTIZABLE, vocab_size=320), folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
            elif "norm" in name or "embed_tokens" in name:
                parameter.fill_(1.0)
        model.lm_head.weight[[FIRST, SECOND]] = 127 / 64
        model.lm_head.weight[SECOND, 0] = 126 / 64
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    return folder


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (output_head, sparse_linear_file, quantized_matmul_file):
        monkeypatch.setattr(file, "native_kernels", lambda: None)


def load(folder: Path, dtype: str, **options: Any) -> SpeculativeEngine:
    """An engine; sparse: with a plan that keeps all."""
    plan, compile = options.pop("sparse", False), options.pop("compile", None)
    loaded = load_for_decoding(ModelOptions(str(folder), device="cpu", dtype=dtype, **options), sparse=plan)
    return SpeculativeEngine.from_loaded(loaded, keep_all_plan(loaded.model.config) if plan else None, compile)


OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"sparse": True},
    "int8-head": {"quant": "int8", "quant_lm_head": "int8"},
    "int4-sparse-int8-head": {"quant": "int4", "quant_lm_head": "int8", "sparse": True},
    "compiled": {"compile": True},
    "int8-cache": {"kv_cache": "int8"},
}


def expect(token: int, tokens: list[int]) -> None:
    assert tokens == [token] * len(tokens) and tokens, tokens


DTYPES_OF_OPTIONS = [
    pytest.param(name, dtype, marks=[pytest.mark.slow] if name == "compiled" and dtype != "bf16" else [])
    for name in OPTIONS
    for dtype in ("bf16", "fp16", "fp32")
]  # compiling takes 10 s a dtype; test_cli.py compiles in fp32


@pytest.mark.parametrize("name,dtype", DTYPES_OF_OPTIONS)
def test_the_larger_logit_wins(close_folder: Path, dtype: str, name: str) -> None:
    engine = load(close_folder, dtype, **OPTIONS[name])
    expect(FIRST, list(engine.generate(PROMPTS[0], max_new_tokens=4, ignore_eos=True)))
    engine.look_up(3)
    expect(FIRST, list(engine.generate([FIRST] * 6, max_new_tokens=8, ignore_eos=True)))
    assert engine.stats.accepted_tokens > 0


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("name", ["dense", "int8-head"])
def test_the_larger_logit_wins_without_a_compiler(close_folder: Path, name: str) -> None:
    engine = load(close_folder, "bf16", **OPTIONS[name])
    expect(FIRST, list(engine.generate(PROMPTS[0], max_new_tokens=4, ignore_eos=True)))


@pytest.mark.parametrize("draft_quant", [None, "int8"])
def test_drafts_and_their_verification_agree_on_it(close_folder: Path, draft_quant: str | None) -> None:
    engine = SpeculativeEngine.load_with_draft(
        ModelOptions(str(close_folder), device="cpu", dtype="bf16"),
        DraftOptions(length=3, sparsity=0.1, quant=draft_quant),
    )
    expect(FIRST, list(engine.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True)))
    assert engine.stats.accepted_tokens == engine.stats.drafted_tokens > 0


@pytest.mark.parametrize("name", ["dense", "sparse", "int8-head"])
def test_rows_of_a_scheduler_and_their_log_probabilities(close_folder: Path, name: str) -> None:
    scheduler = Scheduler(load(close_folder, "bf16", **OPTIONS[name]))
    found: list[list[TokenLogprob]] = [[] for _ in PROMPTS]

    def taker(row: list[TokenLogprob]) -> Callable[[Piece | Done], None]:
        return lambda event: row.extend(event.logprobs) if isinstance(event, Piece) else None

    for row, ids in zip(found, PROMPTS, strict=True):
        scheduler.submit(Request(ids, taker(row), max_new_tokens=5, top_logprobs=2, ignore_eos=True))
    scheduler.close_when_idle()
    scheduler.run()
    for row in found:
        expect(FIRST, [entry.token for entry in row])
        for entry in row:
            (first, best), (second, other) = entry.top
            assert (first, second) == (FIRST, SECOND)
            assert best - other == pytest.approx(LOGITS[FIRST] - LOGITS[SECOND], rel=1e-2)


@pytest.mark.parametrize("name", ["dense", "int8-head"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_evaluation_sees_fp32(close_folder: Path, dtype: str, name: str) -> None:
    model = load(close_folder, dtype, **OPTIONS[name]).model
    for length in (4, 40):  # rows of a kernel, and a matrix product
        logits = window_logits(model, torch.arange(length)[None], 1)
        assert logits.dtype == torch.float32
        for token, value in LOGITS.items():
            torch.testing.assert_close(logits[:, token], torch.full((length - 1,), value), rtol=2e-5, atol=0)
        assert bool((logits.argmax(-1) == FIRST).all())
    expect(FIRST, continue_greedily(model, torch.tensor([PROMPTS[0]]), 4)[0].tolist())


def test_the_triton_kernels_of_a_quantized_head() -> None:
    """Run by the interpreter on a CPU: partial sums added up to fp32, and the first largest of them."""
    x, weight = torch.ones(1, 64, dtype=torch.bfloat16), torch.zeros(64, 320, dtype=torch.bfloat16)
    weight[:, [FIRST, SECOND]] = 127 / 64
    weight[0, SECOND] = 126 / 64
    packed = round_to_nearest(weight, 8, 32)
    partials = sparse_gemv(x, packed[0], torch.zeros(1), [320], *packed[1:])
    logits = reduce_partials(partials, torch.float32, None, None)
    assert logits[0, FIRST] == LOGITS[FIRST] and logits[0, SECOND] == LOGITS[SECOND]
    token, position = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    argmax_step(logits, token, position)
    assert token.item() == FIRST


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def head(V: int, C: int, dtype: torch.dtype) -> NativeHead:
    made = NativeHead(C, V, bias=False, dtype=dtype).requires_grad_(False)
    made.weight.copy_(torch.randn(V, C, generator=torch.Generator().manual_seed(V + C)))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V,C", [(1, 1), (3, 15), (130, 16), (515, 97), (64, 576)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 40])
def test_the_native_head_against_fp64(rows: int, V: int, C: int, dtype: torch.dtype) -> None:
    native = head(V, C, dtype)
    x = torch.randn(rows, C, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = native(x)
    assert y.dtype == torch.float32
    assert_near("native logits", y, x.double() @ native.weight.double().t(), 1e-6)
    assert_near("logits of the plain head", OutputHead.forward(native, x), y, 1e-6)
    if rows <= 13:
        assert torch.equal(y, torch.cat([native(row) for row in x.split(1)])), "a row alone has other bits"
        assert torch.equal(native(x[None])[0], y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_native_head_reads_every_number(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, 1.0, -1.5, smallest, smallest / 4, -smallest / 8, torch.finfo(dtype).max, math.inf, -math.inf]
    native = head(len(values), 1, dtype)
    native.weight.copy_(torch.tensor(values)[:, None])
    assert torch.equal(native(torch.ones(1, 1, dtype=dtype))[0], native.weight[:, 0].float())
    native.weight.fill_(math.nan)
    assert bool(native(torch.ones(1, 1, dtype=dtype)).isnan().all())


def test_the_native_product_refuses_other_shapes() -> None:
    native = native_kernels()
    assert native is not None
    x, weight = torch.ones(2, 8), torch.ones(5, 8)
    for message, arguments in {
        "expected few rows": (x[:, :4], weight),
        "rows must be contiguous": (x[:, :5], weight.t()),
        "expected fp32, bf16 or fp16": (x, weight.double()),
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            native.linear_fp32(*arguments)
    with pytest.raises(ValueError, match="expected few rows"):
        native.linear_fp32(torch.ones(9, 8), weight)


def weight_and_rows(bits: int | None, rows: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """x [rows, 64], the arguments for a weight [64, 96] and its values in fp64."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 64), (64, 96)))
    if bits is None:
        return x, [weight, None, None], weight.double()
    packed = round_to_nearest(weight, bits, 32)
    exact = quantized_matmul_file.dequantize(packed[0], packed[1].double(), packed[2])
    return x, list(packed), exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 5, 20])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_sparse_products_can_be_fp32(
    bits: int | None, rows: int, compiler: bool, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:  # fmt: skip
    x, (weight, scales, zeros), exact = weight_and_rows(bits, rows, dtype)
    assert weight is not None
    if not compiler:
        request.getfixturevalue("no_compiler")
    arguments = (x, weight, torch.tensor([0.3, 0.6]), [64, 32], scales, zeros, None)
    kept = torch.cat([x.masked_fill(x.abs() < x.new_tensor(t), 0).double() @ part for t, part in
                      zip((0.3, 0.6), exact.split([64, 32], dim=1), strict=True)], dim=1)  # fmt: skip
    y = sparse_linear(*arguments, torch.float32)
    assert y.dtype == torch.float32 and sparse_linear(*arguments).dtype == dtype
    if compiler and rows <= 8:  # otherwise weights are rounded to x's dtype first
        assert_near("sparse product of one rounding", y, kept, 1e-6)
        assert torch.equal(sparse_linear(*arguments), y.to(dtype))
        torch.library.opcheck(sparse_linear_op, (*arguments, torch.float32))
    assert_near("sparse product", y, kept, 4 * torch.finfo(dtype).eps)
    if scales is not None:
        dense = quantized_matmul(x, weight, scales, zeros, out_dtype=torch.float32)
        assert_near("dense product", dense, x.double() @ exact, 1e-6)


@pytest.mark.parametrize("sparse", [False, True])
@torch.inference_mode()
def test_the_residual_stream_keeps_what_bf16_would_lose(tmp_path: Path, sparse: bool) -> None:
    """Each of 3 blocks adds 1/4 to 256, whose neighbour in bf16 is 258."""
    save_tiny_model(tiny_config("llama", attention_bias=True), tmp_path)
    model = load_model(tmp_path, torch.device("cpu"), torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.fill_(0.25 if name.endswith("wo.bias") else 256.0 if "embedding" in name else 0.0)
    if sparse:
        sparsify(model, keep_all_plan(model.config))
    for tokens in ([[5]], [[5, 9, 33]]):
        positions = torch.arange(len(tokens[0]))[None]
        with decoding(model) if len(tokens[0]) == 1 else nullcontext():
            hidden = model.hidden_states(torch.tensor(tokens), positions, model.new_cache(1, 8))
        assert hidden.dtype == torch.float32 and bool((hidden == 256.75).all())


def test_the_default_model_knows_a_capital_in_bf16(default_folder: Path) -> None:
    """With a residual stream and logits in bf16 its answer began with another word, nearly as likely."""
    engine = Engine.load(str(default_folder), device="cpu", dtype="bf16")
    ids = engine.tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in "".join(engine.stream(ids, max_new_tokens=24))
