"""A rotated checkpoint computes what the original does, in another basis, and says what it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teal.calibration.rotation import find_rotation
from teal.calibration.texts import default_text, first_tokens, rotation_text, split_text, spread_sequences
from teal.checkpoint.config import load_config
from teal.checkpoint.families import FAMILIES
from teal.checkpoint.identity import stored_weights, weights_identity
from teal.checkpoint.loading import describe
from teal.checkpoint.rotation import Rotation, rotation_record, turns_stream, write_rotated
from teal.checkpoint.tokenizer import load_tokenizer
from teal.checkpoint.weights import load_model
from teal.cli import calibrate, quantize
from teal.errors import UserError
from teal.evaluation.quality import continue_greedily
from teal.layers.quantized_linear import QuantConfig
from teal.model import RMSNorm, Transformer
from teal.plan import SparsityPlan
from tests.conftest import (
    DEFAULT_OR_SHALLOW,
    QUANTIZABLE,
    assert_near,
    assert_one_line_error,
    float_tensors,
    link_files,
    save_tiny_model,
    tiny_config,
)

CPU = torch.device("cpu")
PROMPTS, CONTINUED = 4, 24  # of the text that has to stay


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
    rotation = random_rotation(tmp_path / "a", residual)
    if residual and not turns_stream(load_config(tmp_path / "a")):
        with pytest.raises(UserError, match="other norms than RMS norms before sublayers; rotate heads alone"):
            write_rotated(tmp_path / "a", tmp_path / "b", rotation, {"text": "t"})
        return
    write_rotated(tmp_path / "a", tmp_path / "b", rotation, {"text": "t"})
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
        for norm in (other.attention_norm, other.ffn_norm):
            assert not isinstance(norm, RMSNorm) or bool((norm.weight == 1).all()) == residual


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
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path) -> list[str]:
    """Arguments of calibrate.py, the checkpoint in second place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) for i in range(150_000)))
    size = ["--sequences", "3", "--length", "32", "--text", "text.txt", "--device", "cpu", "--dtype", "fp32"]
    return ["--checkpoint", str(tiny_folder), "--sparsity", "0.5", "--rotate", "turned", *size]


def test_the_command(
    command: list[str], call_main: Callable[..., tuple[int, str, str]], tmp_path: Path, tiny_folder: Path
) -> None:
    """It writes a checkpoint that says what it is, with plans that fit it and not the original; again it goes on."""
    code, out, err = call_main(calibrate.main, *command)
    assert code == 0, err
    assert out.split() == ["turned", "turned/teal-0.5.json"]
    assert "warning: 384 tokens are few for a rotation of 48 channels" in err
    turned = tmp_path / "turned"
    record = rotation_record(turned)
    assert record is not None and record["source"] == weights_identity(tiny_folder) and record["sequences"] == 12
    assert describe(str(turned), None).is_rotated and not describe(str(tiny_folder), None).is_rotated
    plan = SparsityPlan.load(turned / "teal-0.5.json")
    plan.check_weights(stored_weights(turned, "turned"))
    assert plan.method == "global"
    with pytest.raises(UserError, match="made for turned"):
        plan.check_weights(stored_weights(tiny_folder, "tiny"))
    original = load_model(tiny_folder, CPU, torch.float32)
    assert_near("logits", logits(load_model(turned, CPU, torch.float32)), logits(original), 1e-5)
    before = (turned / "config.json").stat().st_mtime_ns
    code, out, err = call_main(calibrate.main, *(a.replace("0.5", "0.4") for a in command))
    assert code == 0 and out.split() == ["turned/teal-0.4.json"], err
    assert (turned / "config.json").stat().st_mtime_ns == before


def test_a_short_text_is_refused_before_the_model_is_rotated(
    command: list[str], call_main: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("a few words")
    code, _, err = call_main(calibrate.main, *command)
    assert_one_line_error(code, err, "3 sequences of 32 tokens are needed", "the 2/5 for calibration")
    assert not (tmp_path / "turned").exists()


@pytest.mark.parametrize("what", ["again", "another folder", "quantized", "random"])
def test_refused_in_one_line(
    what: str, command: list[str], call_main: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:  # fmt: skip
    source, target = tmp_path / "source", tmp_path / "turned"
    save_tiny_model(tiny_config("llama", vocab_size=300, **QUANTIZABLE), source)
    for file in Path(command[1]).glob("tokenizer*"):
        (source / file.name).symlink_to(file)
    command[1], given = str(source), source
    if what == "again":
        given = tmp_path / "once"
        write_rotated(source, given, random_rotation(source), {})
        expected = f"--rotate: {given} is rotated already"
    elif what == "another folder":
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
        expected = f"--rotate turned: exists, and is not {source} rotated"
    elif what == "quantized":
        given = tmp_path / "small"
        quantize.quantize_folder(source, given, QuantConfig("int8", 32))
        expected = f"--rotate: {given} is quantized; rotate the original"
    else:
        expected = "--rotate does not go with --random-weights"
    command[1] = str(given)
    if what == "random":
        command[:2] = ["--random-weights", "llama-3-8b"]
    code, _, err = call_main(calibrate.main, *command)
    assert_one_line_error(code, err, expected)
    assert what != "another folder" or [p.name for p in target.iterdir()] == ["thesis.txt"]
    assert what == "another folder" or not target.exists()


def test_a_quantized_one_is_still_known(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama", **QUANTIZABLE), tmp_path / "a")
    write_rotated(tmp_path / "a", tmp_path / "b", random_rotation(tmp_path / "a"), {})
    quantize.quantize_folder(tmp_path / "b", tmp_path / "c", QuantConfig("int4", 32))
    assert rotation_record(tmp_path / "c") is not None
    own, original = (stored_weights(tmp_path / name, name) for name in "cb")
    assert own is not None and original is not None and own.identity == original.identity


def test_an_unknown_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"teal_rotation": {"version": 9}}))
    with pytest.raises(UserError, match=r"teal_rotation .* is not usable; this code reads 1"):
        rotation_record(tmp_path)


@DEFAULT_OR_SHALLOW
def test_text_of_a_real_model_stays(real_folder: Path, tmp_path: Path) -> None:
    """Greedy text of the default model in the basis that was found for it, in fp32: the original's to the last token.

    The files' 16 bits would be rounded once more, so here they are 32. The basis is orthogonal to fp32's last digits
    whatever it was found in.
    """
    wide = link_files(real_folder, tmp_path / "wide", "*.safetensors*")
    tensors = {name: tensor.float() for name, tensor in float_tensors(real_folder).items()}
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    encode = load_tokenizer(real_folder).encode
    model = load_model(wide, CPU, torch.float32)
    tokens = spread_sequences(encode, rotation_text(default_text()), 8, 128)
    rotation = find_rotation(load_model(real_folder, CPU, torch.bfloat16), tokens)
    write_rotated(wide, tmp_path / "turned", rotation, {})
    turned = load_model(tmp_path / "turned", CPU, torch.float32)
    prompts = first_tokens(encode, split_text(default_text())[1], PROMPTS * 64).view(PROMPTS, 64)
    expected, found = (continue_greedily(m, prompts, CONTINUED) for m in (model, turned))
    assert torch.equal(found, expected)
    one, other = (m(prompts, torch.arange(64).expand_as(prompts), m.new_cache(PROMPTS, 64)) for m in (model, turned))
    assert float((one - other).abs().max()) < 1e-4 * float(one.abs().max())


@pytest.mark.gpu
def test_a_gpu_turns_weights_as_a_cpu_does(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama"), tmp_path / "a")
    rotation = random_rotation(tmp_path / "a")
    assert rotation.residual is not None
    write_rotated(tmp_path / "a", tmp_path / "cpu", rotation, {})
    write_rotated(tmp_path / "a", tmp_path / "gpu", Rotation(rotation.residual.cuda(), rotation.heads.cuda()), {})
    one, other = (load_model(tmp_path / name, CPU, torch.float32).state_dict() for name in ("cpu", "gpu"))
    for name, tensor in one.items():
        assert_near(name, other[name], tensor, 1e-6)
