"""The body of a rank: logits of the models that a file lists. python -m torch.distributed.run -m tests.ranks FILE"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from teal.calibration.choose import choose_plan
from teal.checkpoint.loading import load_for_decoding
from teal.decoding.backends import choose_backend
from teal.options import ModelOptions
from teal.teal_layers import sparsify
from tests.conftest import ROOT
from tests.token_logits import logits, step_logits


def logits_of(options: dict[str, object]) -> Tensor:
    """What a model with these ModelOptions gives, sparse if they name a plan: its modules, or the backend they name."""
    given = ModelOptions(**({"device": "cpu", "dtype": "fp32"} | options))  # type: ignore[arg-type]
    loaded = load_for_decoding(given)
    if given.is_sparse:
        sparsify(loaded.model, choose_plan(loaded, given.sparsity, given.plan))
    if given.backend == "auto":
        return logits(loaded.model)
    return step_logits(choose_backend(loaded.model, False, given.backend)).float().cpu()


def logits_of_ranks(cases: Mapping[str, dict[str, object]], ranks: int, folder: Path) -> list[dict[str, Tensor]]:
    """logits_of each of the cases, by so many processes of torchrun: what every rank has."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launcher, "-m", "tests.ranks", path], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{i}.pt") for i in range(ranks)]


def main() -> None:
    path, ranks = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    found = {
        name: logits_of(given | {"tensor_parallel": ranks}) for name, given in json.loads(path.read_text()).items()
    }
    torch.save(found, path.with_name(f"rank{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main()
