"""Adapter to lm-evaluation-harness (the optional package lm_eval): our models, dense or sparse, on its tasks."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.checkpoint.tokenizer import Tokenizer
from teal.decoding.streaming import StopStrings
from teal.errors import ParameterError, UserError
from teal.evaluation.installed import import_installed
from teal.evaluation.quality import continue_greedily
from teal.model import Transformer
from teal.teal_layers import sparse_prefill

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise ParameterError("{lm_eval} needs the package lm_eval; pip install lm_eval") from None

import_installed("evaluate")  # which tasks import; run from a checkout they would get the command evaluate.py

DEFAULT_MAX_GEN_TOKENS = 256  # as the harness' own models


@register_model("teal")
class HarnessModel(TemplateLM):
    """A Transformer as the harness sees one. sparse_share of the tokens of each scored text are sparse."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, sparse_share: float) -> None:
        super().__init__()
        self.model = model
        self.text = tokenizer
        self.sparse_share = sparse_share
        self.max_length = model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        if not self.text.eos_ids:
            raise UserError("the tokenizer has no end-of-text token, which the harness needs")
        return min(self.text.eos_ids)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning-of-text token if there is one, else the end's."""
        if self.text.bos_ids:
            return self.text.bos_ids[0]
        return self.text.backend.special.get(self.text.special_texts["bos"] or "", self.eot_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids without a beginning-of-text token, the harness' convention for causal models."""
        return self.text.encode(string, allow_special=True, add_bos=False)

    @torch.inference_mode()
    def _log_probs(self, context: list[int], continuation: list[int]) -> tuple[Tensor, Tensor]:
        """fp32 log-probabilities [n, V] that predict the continuation, and its ids [n]."""
        ids = (context + continuation)[-(self.max_length + 1) :]
        tokens = torch.tensor([ids[:-1]], device=self.model.device)
        cache = self.model.new_cache(1, tokens.shape[1])
        positions = torch.arange(tokens.shape[1], device=self.model.device)[None]
        with sparse_prefill(self.model, self.sparse_share):
            hidden = self.model.hidden_states(tokens, positions, cache)
        logits = self.model.logits(hidden[0, -len(continuation) :]).float()
        return logits.log_softmax(-1), torch.tensor(ids[-len(continuation) :], device=self.model.device)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for request in requests:
            context, continuation = request[1], request[2]
            log_probs, ids = self._log_probs(context, continuation)
            total = float(log_probs.gather(1, ids[:, None]).sum())
            results.append((total, bool((log_probs.argmax(-1) == ids).all())))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in disjoint windows of the model's context."""
        totals = []
        for text in (str(request.args[0]) for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scored = self._loglikelihood_tokens(
                [(("", ""), list(c), list(t)) for c, t in map(make_disjoint_window, windows)]
            )
            totals.append(sum(score for score, _ in scored))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string, the end-of-text token or the asked number of tokens."""
        texts = []
        for request in requests:
            context, options = str(request.args[0]), dict(request.args[1])
            limit = int(options.get("max_gen_toks", DEFAULT_MAX_GEN_TOKENS))
            if options.get("do_sample") or options.get("temperature", 0.0):
                raise UserError("the task samples; this adapter decodes greedily only")
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            ids = self.tok_encode(context)[-(self.max_length - limit) :]
            made = continue_greedily(self.model, torch.tensor([ids]), limit)[0].tolist()
            end = next((i for i, token in enumerate(made) if token in self.text.eos_ids), len(made))
            cut = StopStrings(tuple(stop for stop in stops if stop))
            texts.append(cut.push(self.text.decode(made[:end])) + ("" if cut.stopped else cut.flush()))
        return texts


@functools.cache
def _task_manager(folder: Path | None) -> TaskManager:
    """The harness' own tasks and those of folder. They are found once for all sparsities: it takes 5 s."""
    return TaskManager(include_path=None if folder is None else str(folder))


def run_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: list[str],
    sparse_share: float,
    limit: int | None,
    folder: Path | None,
) -> dict[str, float]:
    """Metrics of the harness' tasks as {"task/metric": value}; folder holds further task definitions.

    Raises UserError for a task the harness does not know.
    """
    manager = _task_manager(folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ParameterError(
            "{lm_eval} {}: no such task of lm_eval {}; see its --tasks list", unknown[0], lm_eval.__version__
        )
    adapter = HarnessModel(model, tokenizer, sparse_share)
    output = lm_eval.simple_evaluate(model=adapter, tasks=tasks, limit=limit, task_manager=manager)
    found = {}
    for task, metrics in output["results"].items():
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in name:
                found[f"{task}/{name.split(',')[0]}"] = float(value)
    return found
