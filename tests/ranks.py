"""The body of a rank: logits of the models that a file lists. python -m torch.distributed.run -m tests.ranks FILE"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from teal.calibration.choose import choose_plan
from teal.checkpoint.loading import load_for_decoding
from teal.decoding.backends import choose_backend
from teal.options import ModelOptions
from teal.teal_layers import sparsify
from tests.token_logits import SEQUENCES, TOKENS, logits, step_logits


def logits_of(options: dict[str, object]) -> Tensor:
    """What a model with these ModelOptions gives, sparse if they name a plan: its modules, or the backend they name."""
    given = ModelOptions(**({"device": "cpu", "dtype": "fp32"} | options))  # type: ignore[arg-type]
    loaded = load_for_decoding(given)
    if given.is_sparse:
        sparsify(loaded.model, choose_plan(loaded, given.sparsity, given.plan))
    if given.backend == "auto":
        return logits(loaded.model)
    ids = SEQUENCES[:1, :TOKENS].to(loaded.model.device)
    return step_logits(choose_backend(loaded.model, False, given.backend), ids)[0].transpose(0, 1).float().cpu()


def main() -> None:
    path, ranks = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    found = {
        name: logits_of(given | {"tensor_parallel": ranks}) for name, given in json.loads(path.read_text()).items()
    }
    torch.save(found, path.with_name(f"rank{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main()
