"""The body of a rank: logits of the models that a file lists. python -m torch.distributed.run -m tests.ranks FILE"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from teal.calibration.choose import choose_plan
from teal.checkpoint.loading import load_for_decoding
from teal.decoding.backends import choose_backend
from teal.layers import team
from teal.model import Transformer
from teal.options import LOCAL_RANK, ModelOptions
from teal.teal_layers import sparsify
from tests.token_logits import SEQUENCES, TOKENS, logits, steps


def logits_of(options: dict[str, object]) -> Tensor:
    """What a model with these ModelOptions gives, sparse if they name a plan: its modules, or the backend they name."""
    return logits_in_turn([options])[0] if "backend" in options else logits(model_of(options))


@torch.inference_mode()
def logits_in_turn(cases: list[dict[str, object]]) -> list[Tensor]:
    """What several models give by the backends they name, whose steps take turns, as a draft's and its target's do."""
    backends = [choose_backend(model_of(options), False, str(options["backend"])) for options in cases]
    ids = SEQUENCES[:1, :TOKENS].to(backends[0].model.device)
    turns = zip(*(steps(b, ids, b.model.new_cache(1, TOKENS)) for b in backends), strict=True)
    return [torch.stack(found, dim=1).float().cpu() for found in zip(*turns, strict=True)]


def model_of(options: dict[str, object]) -> Transformer:
    """A model with these ModelOptions, sparse if they name a plan."""
    given = ModelOptions(**({"device": "cpu", "dtype": "fp32"} | options))  # type: ignore[arg-type]
    loaded = load_for_decoding(given)
    if given.is_sparse:
        sparsify(loaded.model, choose_plan(loaded, given.sparsity, given.plan))
    return loaded.model


def share_one_card() -> None:
    """Let all ranks run on the first GPU: their kernels see each other's memory, and take turns. NCCL refuses that."""
    os.environ |= {LOCAL_RANK: "0", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    team.BACKENDS["cuda"], team.gather_into = "cpu:gloo,cuda:gloo", gather_by_gloo


def gather_by_gloo(whole: Tensor, part: Tensor) -> None:
    """As dist.all_gather_into_tensor, which gloo does not have for CUDA."""
    parts = list(torch.empty(whole.shape, dtype=whole.dtype).chunk(dist.get_world_size()))
    dist.all_gather(parts, part.cpu())
    whole.copy_(torch.cat(parts))


def main() -> None:
    path, ranks = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if 0 < torch.cuda.device_count() < ranks:
        share_one_card()
    cases = {name: given | {"tensor_parallel": ranks} for name, given in json.loads(path.read_text()).items()}
    in_turn = all("backend" in given for given in cases.values())
    found = logits_in_turn(list(cases.values())) if in_turn else map(logits_of, cases.values())
    torch.save(dict(zip(cases, found, strict=True)), path.with_name(f"rank{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main()
