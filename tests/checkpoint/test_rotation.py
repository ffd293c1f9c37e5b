"""A rotated checkpoint computes what the original does, in another basis, and says what it is."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from teal.calibration.rotation import find_rotation
from teal.calibration.texts import default_text, first_tokens, rotation_text, split_text, spread_sequences
from teal.checkpoint.config import FAMILIES, load_config
from teal.checkpoint.loading import describe, load_for_decoding
from teal.checkpoint.rotation import Rotation, rotation_record, write_rotated
from teal.checkpoint.weights import load_model, stored_weights, weights_identity
from teal.cli import calibrate, quantize
from teal.errors import UserError
from teal.evaluation.quality import continue_greedily
from teal.model import RMSNorm, Transformer
from teal.options import ModelOptions
from teal.plan import SparsityPlan
from tests.conftest import QUANTIZABLE, assert_near, assert_one_line_error, save_tiny_model, tiny_config

CPU = torch.device("cpu")


def orthogonal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64))[0].float()


def random_rotation(folder: Path, residual: bool = True) -> Rotation:
    c = load_config(folder)
    heads = orthogonal(c.num_layers, c.num_kv_heads, c.head_dim)
    return Rotation(orthogonal(c.hidden_size) if residual else None, heads)


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    ids = torch.randint(3, 190, (2, 40), generator=torch.Generator().manual_seed(1))
    return model(ids, torch.arange(40).expand(2, 40), model.new_cache(2, 40))


def set_biases(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensors[name] = torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("residual", [True, False], ids=["stream and heads", "heads alone"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family: str, tied: bool, residual: bool, tmp_path: Path) -> None:
    bias = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    save_tiny_model(tiny_config(family, tie_word_embeddings=tied, **bias), tmp_path / "a")
    set_biases(tmp_path / "a")
    write_rotated(tmp_path / "a", tmp_path / "b", random_rotation(tmp_path / "a", residual), {"text": "t"})
    before, after = (load_model(tmp_path / name, CPU, torch.float32) for name in "ab")
    assert not after.config.tie_embeddings
    assert_near("logits", logits(after), logits(before), 1e-5)
    v = before.config.kv_size
    for one, other in zip(before.blocks, after.blocks, strict=True):
        moved = [
            not torch.allclose(a, b, atol=1e-3)
            for a, b in (
                (one.attention.wqkv.weight[:-v], other.attention.wqkv.weight[:-v]),
                (one.attention.wqkv.weight[-v:], other.attention.wqkv.weight[-v:]),
                (one.attention.wo.weight, other.attention.wo.weight),
                (one.feed_forward.gate_up.weight, other.feed_forward.gate_up.weight),
                (one.feed_forward.down.weight, other.feed_forward.down.weight),
            )
        ]
        assert moved == [residual, True, True, residual, residual]
        norms = [other.attention_norm, other.ffn_norm]
        assert all(bool((norm.weight == 1).all()) for norm in norms if isinstance(norm, RMSNorm)) == residual


def test_channels_are_sorted_by_energy(tiny_folder: Path, tmp_path: Path) -> None:
    """In the basis that was found: of the residual stream over both norms, and of each head."""
    model = load_model(tiny_folder, CPU, torch.float32)
    sequences = torch.randint(3, 190, (8, 64), generator=torch.Generator().manual_seed(3))
    rotation = find_rotation(model, sequences)
    assert rotation.residual is not None
    for matrix in (rotation.residual, rotation.heads):
        assert_near("R^T R", matrix.mT @ matrix, torch.eye(matrix.shape[-1]).expand_as(matrix), 1e-5)
    write_rotated(tiny_folder, tmp_path / "b", rotation, {})
    turned = load_model(tmp_path / "b", CPU, torch.float32)
    plain, rotated = energies(model, sequences), energies(turned, sequences)
    largest = slice(0, model.config.hidden_size // 4)
    assert rotated["normed"][largest].sum() > 1.05 * plain["normed"].sort(descending=True).values[largest].sum()
    heads = rotated["attended"].view(3, 2, -1, 8).sum(2)  # [layer, key/value head, channel]
    assert bool((heads[..., :-1] >= heads[..., 1:] * 0.999).all())


@torch.inference_mode()
def energies(model: Transformer, sequences: Tensor) -> dict[str, Tensor]:
    """Shares of the channels in the energy of all inputs of q, k, v and gate, up; energies of those of o by layer."""
    found: dict[str, list[Tensor]] = {"normed": [], "attended": []}

    def note(x: tuple[Tensor, ...], norm: nn.Module | None) -> None:
        z = x[0].float()
        z = z if norm is None else z / norm.weight  # type: ignore[operator]
        found["attended" if norm is None else "normed"].append(z.square().mean((0, 1)))

    for block in model.blocks:
        for p in block.projections():
            norm = block.get_submodule(p.norm) if p.input == "normed" else None
            if p.input != "activated":
                block.get_submodule(p.module).register_forward_pre_hook(lambda _, x, norm=norm: note(x, norm))
    positions = torch.arange(sequences.shape[1]).expand_as(sequences)
    model(sequences, positions, model.new_cache(*sequences.shape))
    normed = torch.stack(found["normed"]).mean(0)
    return {"normed": normed / normed.sum(), "attended": torch.cat(found["attended"])}


def test_fewer_tokens_than_channels_are_refused(tiny_folder: Path) -> None:
    model = load_model(tiny_folder, CPU, torch.float32)
    with pytest.raises(UserError, match="rotate: 40 tokens cannot tell the energy of 48 channels"):
        find_rotation(model, torch.zeros(1, 40, dtype=torch.int64))


def test_parts_of_a_text_do_not_overlap() -> None:
    text = "".join(chr(256 + i) for i in range(50_000))
    turned, (used, held_out) = set(rotation_text(text)), (set(part) for part in split_text(text, rotated=True))
    assert not turned & used and not turned & held_out and not used & held_out
    assert turned | used | held_out == set(text)
    assert turned | used == set(split_text(text)[0])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path) -> Iterator[list[str]]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(30_000)))
    size = ["--sequences", "3", "--length", "32", "--text", "text.txt", "--device", "cpu", "--dtype", "fp32"]
    yield ["calibrate.py", "--checkpoint", str(tiny_folder), "--sparsity", "0.5", *size]


def run_calibrate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", list(arguments))
    calibrate.main()


def test_the_command(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """It writes a checkpoint that says what it is, with plans that fit it and not the original; again it goes on."""
    run_calibrate(monkeypatch, *command, "--rotate", "turned")
    turned = tmp_path / "turned"
    record = rotation_record(turned)
    assert record is not None and record["source"] == weights_identity(tiny_folder) and record["sequences"] == 12
    assert describe(str(turned), None).is_rotated and not describe(str(tiny_folder), None).is_rotated
    plan = SparsityPlan.load(turned / "teal-0.5.json")
    plan.check_weights(stored_weights(turned, "turned"))
    assert plan.method == "global"
    with pytest.raises(UserError, match="made for turned"):
        plan.check_weights(stored_weights(tiny_folder, "tiny"))
    loaded = load_for_decoding(ModelOptions(str(turned), dtype="fp32", device="cpu"))
    original = load_model(tiny_folder, CPU, torch.float32)
    assert_near("logits", logits(loaded.model), logits(original), 1e-5)
    before = (turned / "config.json").stat().st_mtime_ns
    arguments = [a.replace("0.5", "0.4") for a in command]
    run_calibrate(monkeypatch, *arguments, "--rotate", "turned")
    assert (turned / "config.json").stat().st_mtime_ns == before and (turned / "teal-0.4.json").exists()
    capsys.readouterr()


@pytest.mark.parametrize("what", ["again", "another folder", "quantized", "random"])
def test_refused_in_one_line(
    what: str, command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    source, target = tmp_path / "source", tmp_path / "turned"
    save_tiny_model(tiny_config("llama", vocab_size=300, **QUANTIZABLE), source)
    for file in Path(command[2]).glob("tokenizer*"):
        (source / file.name).write_bytes(file.read_bytes())
    command[2] = str(source)
    if what == "again":
        write_rotated(source, tmp_path / "once", random_rotation(source), {})
        command[2] = str(tmp_path / "once")
        expected = "--rotate: {} is rotated already"
    elif what == "another folder":
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
        expected = "--rotate turned: exists, and is not {} rotated"
    elif what == "quantized":
        from teal.layers.quantized_linear import QuantConfig

        quantize.quantize_folder(source, tmp_path / "small", QuantConfig("int8", 32))
        command[2] = str(tmp_path / "small")
        expected = "--rotate: {} is quantized; rotate the original"
    else:
        command[1:3] = ["--random-weights", "stories15M"]
        expected = "--rotate does not go with --random-weights"
    assert_one_line_error(lambda: run_calibrate(monkeypatch, *command, "--rotate", "turned"), capsys, expected)
    assert what != "another folder" or [p.name for p in target.iterdir()] == ["thesis.txt"]
    assert what == "another folder" or not target.exists()


def test_a_quantized_one_is_still_known(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama", **QUANTIZABLE), tmp_path / "a")
    write_rotated(tmp_path / "a", tmp_path / "b", random_rotation(tmp_path / "a"), {})
    from teal.layers.quantized_linear import QuantConfig

    quantize.quantize_folder(tmp_path / "b", tmp_path / "c", QuantConfig("int4", 32))
    assert rotation_record(tmp_path / "c") is not None
    own, original = (stored_weights(tmp_path / name, name) for name in "cb")
    assert own is not None and original is not None and own.identity == original.identity


def test_an_unknown_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"teal_rotation": {"version": 9}}))
    with pytest.raises(UserError, match="teal_rotation .* is not usable; this code reads 1"):
        rotation_record(tmp_path)


def test_text_of_the_default_model_stays(default_folder: Path, tmp_path: Path) -> None:
    """Greedy text of a real model, in the basis that was found for it, is the original's; logits agree to 1e-4."""
    loaded = load_for_decoding(ModelOptions(None, dtype="fp32", device="cpu"))
    encode = loaded.tokenizer.encode
    rotation = find_rotation(loaded.model, spread_sequences(encode, rotation_text(default_text()), 8, 128))
    write_rotated(default_folder, tmp_path / "b", rotation, {})
    # 16-bit files would hold other weights; the rotation itself is exact
    turned = load_rotated_in_floats(loaded.model, rotation)
    prompts = first_tokens(encode, split_text(default_text())[1], 4 * 64).view(4, 64)
    expected, found = (continue_greedily(model, prompts, 24) for model in (loaded.model, turned))
    assert torch.equal(found, expected)


def load_rotated_in_floats(model: Transformer, rotation: Rotation) -> Transformer:
    raise NotImplementedError
