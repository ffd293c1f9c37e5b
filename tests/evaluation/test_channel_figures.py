"""What bench.energy measures of plain and rotated weights, and the figures drawn from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.bench import energy
from teal.bench.energy import Measured, measure, rotated
from teal.calibration.curves import GRID
from teal.calibration.sensitivity import Samples
from teal.calibration.stages import weight_counts
from teal.checkpoint.rotation import Rotation, rotate_layer
from teal.checkpoint.weights import block_targets, load_model
from teal.evaluation.plots import plot_by_layer
from teal.model import Projection, Transformer
from tests.conftest import PROJECTIONS, assert_near, assert_one_line_error
from tests.evaluation.test_evaluation import InvokeMain

QUICK = ("--sequences", "2", "--length", "48", "--device", "cpu", "--dtype", "fp32")


@pytest.fixture
def model(tiny_folder: Path) -> Transformer:
    return load_model(tiny_folder, torch.device("cpu"), torch.float32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(random(*shape, shape[-1], seed=1))[0]


def normed(model: Transformer) -> Projection:
    return next(p for p in model.blocks[0].projections() if p.input == "normed")


def test_rotated_samples_are_those_of_rotated_weights(model: Transformer) -> None:
    """The product stays what it is, and a gradient at the output comes back through the folded weight."""
    c, block = model.config, model.blocks[1]
    rotation = Rotation(orthogonal(c.hidden_size), orthogonal(c.num_layers, c.num_kv_heads, c.head_dim))
    assert rotation.residual is not None
    Q, R, plain = rotation.residual, rotation.heads[1], block_targets(block)
    turned = rotate_layer(block, 1, plain, rotation)
    for p in block.projections():
        for name, hf_name, size in zip(p.names, p.hf_names, p.sizes, strict=True):
            x, g = random(7, p.in_features), random(7, size, seed=2)
            before, after = (tensors[f"{hf_name}.weight"].double() for tensors in (plain, turned))
            own = Samples(x, g @ before.float())
            found = rotated(block, p, own, Q, R)
            if name == "down":  # its inputs stay, and only its outputs are turned
                assert found is own
                continue
            here = g.double() @ Q.double() if name == "o" else g.double()
            if name == "v":
                heads = (7, c.num_kv_heads, c.head_dim)
                here = torch.einsum("nkd,kde->nke", here.view(heads), R.double()).reshape(here.shape)
            y = x.double() @ before.t()
            back = found.inputs.double() @ after.t()
            back = back @ Q.double().t() if name == "o" else back
            if name == "v":
                back = torch.einsum("nke,kde->nkd", back.view(heads), R.double()).reshape(back.shape)
            assert_near(f"{name} product", back, y, 1e-5)
            assert_near(f"{name} gradient", found.gradients, here @ after, 1e-5)


def test_energy_and_kept_share(model: Transformer) -> None:
    """Of channels of known scale: energies fall from the largest, and half of the entries are kept."""
    p, found, scales = normed(model), Measured(), torch.tensor([1.0, 4.0, 2.0])
    found.note(p, random(4000, 3) * scales, 0.5)
    [energies], [kept] = found.energy["normed"], found.kept["normed"]
    assert energies.tolist() == pytest.approx([16 / 7, 4 / 7, 1 / 7], rel=0.1)
    assert float(kept.mean()) == pytest.approx(0.5, abs=1e-3)
    assert kept.tolist() == sorted(kept.tolist(), reverse=True) and float(kept[0]) > 0.7


def test_an_identity_changes_nothing(model: Transformer) -> None:
    """With norms of ones, for a norm's weight is folded in either case."""
    c, ids = model.config, torch.randint(5, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.attention_norm, block.ffn_norm):
                norm.get_parameter("weight").fill_(1.0)
    found = measure(model, Rotation(torch.eye(c.hidden_size), torch.eye(c.head_dim).repeat(3, 2, 1, 1)), ids, 0.5)
    plain, turned = found["plain"], found["rotated"]
    assert [set(layer) for layer in plain.curves] == 3 * [set(PROJECTIONS)]
    for i in range(3):
        for name in PROJECTIONS:
            assert plain.curves[i][name] == pytest.approx(turned.curves[i][name], rel=1e-4)
    assert {input: len(parts) for input, parts in plain.energy.items()} == {"normed": 6, "attended": 3, "activated": 3}
    for input in plain.energy:
        for a, b in zip(plain.energy[input], turned.energy[input], strict=True):
            assert_near(f"{input} energy", b, a, 1e-5)


def test_shares_reach_the_target_at_less_cost(model: Transformer) -> None:
    found = Measured(curves=[{name: [(i + 1) * p**2 for p in GRID] for name in PROJECTIONS} for i in range(3)])
    found.note(normed(model), random(100, 32), 0.5)
    sizes = weight_counts(model.config.projections())
    shares = found.allocation(sizes, 0.5)
    dropped = sum(sizes[name] * share for layer in shares for name, share in layer.items())
    assert dropped == pytest.approx(0.5 * 3 * sum(sizes.values()))
    row = found.row("plain", 0.5, shares)
    assert row["nats_uniform"] == pytest.approx(7 * 0.25 * (1 + 2 + 3))
    assert row["nats_global"] < 0.95 * row["nats_uniform"]
    assert shares[0]["q"] > shares[2]["q"]


def test_the_command_draws_three_figures(tiny_folder: Path, tmp_path: Path, call_main: InvokeMain) -> None:
    code, out, err = call_main(energy.main, "--checkpoint", tiny_folder, *QUICK, "-o", tmp_path / "new")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert (result["rotation_tokens"], result["tokens"]) == (4 * 96, 96)
    assert [row["weights"] for row in result["rows"]] == ["plain", "rotated"]
    assert result["figures"] == [str(tmp_path / "new" / name) for name in energy.FIGURES]
    for path in result["figures"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_a_foreign_figure_is_not_drawn_over(tiny_folder: Path, tmp_path: Path, call_main: InvokeMain) -> None:
    (tmp_path / "errors.png").write_text("a photograph")
    code, out, err = call_main(energy.main, "--checkpoint", tiny_folder, *QUICK, "-o", tmp_path)
    assert out == ""
    assert_one_line_error(code, err, "errors.png", "exists and is not")
    assert [path.name for path in tmp_path.iterdir()] == ["errors.png"]


def test_errors_of_zero_are_drawn(tmp_path: Path) -> None:
    """On a log scale of colours they have none."""
    plot_by_layer({"plain": [{"q": 0.0, "k": 1e-3}, {"q": 1e-2, "k": 1.0}]}, "nats", tmp_path / "a.png", log=True)
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_sparsity_out_of_reach_is_refused_at_once(tiny_folder: Path, tmp_path: Path, call_main: InvokeMain) -> None:
    code, out, err = call_main(energy.main, "--checkpoint", tiny_folder, "--sparsity", "0.97", "-o", tmp_path / "new")
    assert out == "" and not (tmp_path / "new").exists()
    assert_one_line_error(code, err, "0.97")
