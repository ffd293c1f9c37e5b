"""TEAL's published histograms and greedy tables as plans."""

import csv
import math
import pickle
from pathlib import Path

import pytest
import torch

from teal.calibration.published import import_teal
from teal.errors import UserError
from tests.conftest import PROJECTIONS

HEADER = ["Effective Sparsity", "Activation Error", "Baseline Error", *PROJECTIONS]


def write_fixture(folder: Path, layers: int = 2) -> None:
    """Histograms of a unit Gaussian (h1) and of a Laplace distribution (h2), and a greedy path of three steps."""
    centers = torch.linspace(-8, 8, 4001)
    gauss, laplace = torch.exp(-(centers**2) / 2), torch.exp(-centers.abs())
    for i in range(layers):
        for part in ("self_attn", "mlp"):
            path = folder / "histograms" / f"layer-{i}" / part
            path.mkdir(parents=True)
            content = {"h1": 1e6 * gauss, "h1_centers": centers, "h2": 1e6 * laplace, "h2_centers": centers}
            torch.save(content, path / "histograms.pt")
        path = folder / "lookup" / f"layer-{i}"
        path.mkdir(parents=True)
        with (path / "results.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            for share in (0.25, 0.4, 0.5):
                writer.writerow([share, 1, 1, *(share - 0.01 * j for j in range(7))])


def test_uniform_thresholds_are_the_quantiles(tmp_path: Path) -> None:
    write_fixture(tmp_path)
    plan = import_teal(tmp_path, 0.5, "uniform")
    assert len(plan.layers) == 2 and plan.model == {"num_layers": 2}
    for layer in plan.layers:
        assert set(layer) == set(PROJECTIONS)
        for name in ("q", "k", "v", "gate", "up"):
            assert math.erf(layer[name].threshold / math.sqrt(2)) == pytest.approx(0.5, abs=2e-3), name
        for name in ("o", "down"):
            assert 1 - math.exp(-layer[name].threshold) == pytest.approx(0.5, abs=2e-3), name


def test_greedy_sparsities_come_from_the_first_row_that_reaches_the_target(tmp_path: Path) -> None:
    write_fixture(tmp_path)
    layer = import_teal(tmp_path, 0.3, "greedy").layers[1]
    assert [round(layer[n].sparsity, 6) for n in PROJECTIONS] == [0.4, 0.39, 0.38, 0.37, 0.36, 0.35, 0.34]
    assert math.erf(layer["q"].threshold / math.sqrt(2)) == pytest.approx(0.4, abs=2e-3)
    with pytest.raises(UserError, match=r"ends before sparsity 0\.6"):
        import_teal(tmp_path, 0.6, "greedy")


class Harmful:
    def __reduce__(self) -> tuple:
        return (Path("/tmp/teal-pickle-ran").touch, ())


def test_a_pickle_disguised_as_histograms_is_refused(tmp_path: Path) -> None:
    write_fixture(tmp_path)
    file = tmp_path / "histograms" / "layer-1" / "mlp" / "histograms.pt"
    marker = Path("/tmp/teal-pickle-ran")
    marker.unlink(missing_ok=True)
    for content in (pickle.dumps(Harmful()), pickle.dumps({"h1": [1]}), b"", b"not a file of torch"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"layer-1/mlp/histograms\.pt"):
            import_teal(tmp_path, 0.5, "uniform")
    torch.save({"h1": torch.ones(3), "h1_centers": torch.ones(4)}, file)
    with pytest.raises(UserError, match="do not match"):
        import_teal(tmp_path, 0.5, "uniform")
    assert not marker.exists()


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layer-0"):
        import_teal(tmp_path, 0.5, "uniform")
    write_fixture(tmp_path)
    (tmp_path / "lookup" / "layer-1" / "results.csv").write_text("a,b\n1,x\n")
    with pytest.raises(UserError, match=r"layer-1/results\.csv"):
        import_teal(tmp_path, 0.5, "greedy")
    (tmp_path / "lookup" / "layer-0" / "results.csv").unlink()
    with pytest.raises(UserError, match="missing; use method uniform"):
        import_teal(tmp_path, 0.5, "greedy")
    with pytest.raises(UserError, match="method global needs the model's gradients"):
        import_teal(tmp_path, 0.5, "global")
    (tmp_path / "histograms" / "layer-0" / "self_attn" / "histograms.pt").unlink()
    with pytest.raises(UserError, match="missing"):
        import_teal(tmp_path, 0.5, "uniform")


def test_published_mistral_files(tmp_path: Path) -> None:
    """The real files: 32 layers, thresholds that grow with sparsity, greedy averages at the target by memory."""
    archive = Path(__file__).parents[3] / "shared" / "reference" / "teal-mistral-7b-histograms.tar.xz"
    if not archive.exists():
        pytest.skip("the published histograms are not here")
    import tarfile

    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "Mistral-7B"
    low, high, greedy = (import_teal(folder, p, m) for p, m in ((0.25, "uniform"), (0.5, "uniform"), (0.5, "greedy")))
    assert len(high.layers) == 32
    for a, b in zip(low.layers, high.layers, strict=True):
        assert all(0 < a[name].threshold < b[name].threshold for name in PROJECTIONS)
    sizes = {"q": 16, "k": 4, "v": 4, "o": 16, "gate": 56, "up": 56, "down": 56}
    for layer in greedy.layers:
        share = sum(layer[n].sparsity * size for n, size in sizes.items()) / sum(sizes.values())
        assert share == pytest.approx(0.5, abs=0.01)
