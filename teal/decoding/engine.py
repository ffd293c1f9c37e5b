"""A model and its tokenizer on a device: prefill, decode step by step, keep the KV cache between prompts.

A decode step reads one token, writes the next one, and advances the position, all in tensors that
stay where they are: on CUDA the step is captured once in a graph and replayed, and while the host
reads token i from a pinned copy the device is already computing token i + 1.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from teal.calibration.choose import choose_plan
from teal.checkpoint.loading import Check, LoadedModel, load_for_decoding
from teal.checkpoint.tokenizer import Tokenizer
from teal.decoding.compilation import capture, compile_model
from teal.decoding.exclusive import Exclusive
from teal.decoding.plan_switch import PlanSwitch
from teal.decoding.sampling import argmax_step, sample
from teal.decoding.statistics import GenerationStats
from teal.decoding.streaming import StopStrings, StreamDecoder
from teal.errors import ParameterError, UserError
from teal.layers.int8_cache import has_int8_cache
from teal.layers.quantized_linear import is_quantized
from teal.model import Block, KVCache, Transformer
from teal.options import DEFAULT_MAX_NEW_TOKENS, ModelOptions, SamplingParams, check_prompt
from teal.plan import SparsityPlan, keep_all_plan
from teal.progress import progress
from teal.teal_layers import set_counting, sparsify

PREFILL_CHUNK = 512  # tokens; bounds the attention mask and the activations of long prompts
IN_USE = (
    "this engine is making another text: exhaust or close its generator first, load a second engine, or give several "
    "prompts to scheduler.generate_batch"
)
CACHE_STEP = 256  # the KV cache grows in multiples of this, so that few lengths are ever compiled


class Engine:
    """Generates tokens with one model at batch size one. Build with Engine.load; then call generate.

    It makes one text at a time, from whatever threads: as long as a generator of generate or stream is unfinished, or a
    Scheduler runs on the engine, another generation and a change of its settings raise RuntimeError. A generator is
    finished when it is exhausted, closed, or nothing refers to it any more, as after a break out of a for loop over it.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, name: str, use_graph: bool) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.use_graph = use_graph
        self.plan: SparsityPlan | None = None
        self.layout = 0  # the number of the plan's layout (plan_switch.py)
        self.plan_switch: PlanSwitch | None = None  # None: dense
        self.loaded: LoadedModel | None = None
        self.load_s = 0.0
        self.compile_s = 0.0
        self.stats = GenerationStats()
        weight = model.embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.generator = torch.Generator(self.device)
        self.cached_ids: list[int] = []
        self.cached_under: object = None  # cache_key when they were cached
        self.use = Exclusive(IN_USE)
        limit = model.config.max_seq_len
        with torch.inference_mode():  # tensors made outside and inside it would each be compiled for
            self._set_cache(model.new_cache(1, min(CACHE_STEP, limit)))
            self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self.position = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self.seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=self.device)

    @classmethod
    def load(cls, checkpoint: str | ModelOptions | None = None, *, check: Check | None = None, **options: Any) -> Self:
        """Load a model and make it sparse if it is to be: all of ModelOptions, or its fields by name.

        check: see load_for_decoding. Raises UserError for anything the user can mend.
        """
        model = checkpoint if isinstance(checkpoint, ModelOptions) else ModelOptions(checkpoint)
        model = replace(model, **options)
        loaded = load_for_decoding(model, check)
        plan = choose_plan(loaded, model.sparsity, model.plan) if model.is_sparse else None
        return cls.from_loaded(loaded, plan, model.compile, model.backend)

    @classmethod
    def from_loaded(
        cls, loaded: LoadedModel, plan: SparsityPlan | None, compile: bool | None = None, backend: str = "auto"
    ) -> Self:
        """An engine for a model in memory, which becomes sparse in place if a plan is given. Else as load."""
        on_cuda = loaded.model.embedding.weight.is_cuda
        compile = on_cuda if compile is None else compile
        engine = cls(loaded.model, loaded.tokenizer, loaded.name, use_graph=compile and on_cuda)
        engine.plan = plan
        engine.loaded, engine.load_s = loaded, loaded.load_s
        if plan is None and on_cuda and (is_quantized(engine.model) or has_int8_cache(engine.model)):
            plan = keep_all_plan(engine.model.config)  # the fused kernels are those that read few bits fast
        if plan is not None:
            plan.check_weights(loaded.weights)
            sparsify(engine.model, plan)
            engine.plan_switch = PlanSwitch(engine.model)
            engine.layout = engine.plan_switch.use(plan)
            if on_cuda:
                from teal.decoding.fused_block import fuse_blocks  # its kernels need Triton, which a CPU does not

                fuse_blocks(engine.model)
        if compile:
            engine._compile()
        return engine

    def use_plan(self, plan: SparsityPlan) -> None:
        """Decode with another plan's thresholds from now on.

        Raises UserError if the engine is dense or the plan is for another model, RuntimeError if it is in use.
        """
        with self.use.taken():
            self.switch_plan(plan)

    def switch_plan(self, plan: SparsityPlan) -> None:
        """As use_plan, for whoever has taken self.use."""
        switch = self._require_sparse()
        if self.loaded is not None:
            plan.check_weights(self.loaded.weights)
        self.layout = switch.use(plan)
        self.plan = plan

    def cache_key(self, plan: SparsityPlan | None) -> object:
        """What keys and values depend on beside their tokens: they may be reused where it is equal."""
        return plan, 0.0 if self.plan_switch is None else self.plan_switch.sparse_share

    def use_sparsity(self, sparsity: float) -> None:
        """As use_plan, with the plan that load takes for a sparsity. Raises UserError if it would have to be made now."""
        self._require_sparse()
        assert self.loaded is not None
        plain = all(isinstance(layer, Block) for layer in self.model.layers)  # not wrapped by now
        with self.use.taken():
            self.switch_plan(choose_plan(self.loaded, sparsity, None, can_calibrate=plain))

    @property
    def calibrate_s(self) -> float:
        """Seconds that quick calibrations took, at load and since."""
        return self.loaded.calibrate_s if self.loaded is not None else 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block sparse layers count what they keep (teal_layers.achieved_sparsity), off a GPU's fast path."""
        with self.use.taken():  # no text is begun without and ended with counting
            graph, self.use_graph = self.use_graph, False
            set_counting(self.model, True)
        try:
            yield
        finally:
            set_counting(self.model, False)
            self.use_graph = graph

    def _require_sparse(self) -> PlanSwitch:
        if self.plan is None or self.plan_switch is None:
            raise UserError("this engine was loaded dense; load it with a sparsity or a plan")
        return self.plan_switch

    def _compile(self) -> None:
        """Compile prefill and decode, and pay for it now with a few tokens, not at the user's first one."""
        start = time.perf_counter()
        compile_model(self.model)
        warm_ids = [i % self.model.config.vocab_size for i in range(4)]
        for _ in self.generate(warm_ids, SamplingParams(), max_new_tokens=3, ignore_eos=True):
            pass
        self.cached_ids = []
        self.compile_s = time.perf_counter() - start

    def _set_cache(self, cache: KVCache) -> None:
        self.cache = cache
        # By layout of the plan, sampling parameters and how many tokens are drafted: none in an ordinary step.
        self.graphs: dict[tuple[int, SamplingParams, int], torch.cuda.CUDAGraph] = {}

    def _reserve(self, length: int) -> None:
        """Make the cache hold at least length tokens, keeping what is in it."""
        if length > self.cache.length:
            rounded = -(-length // CACHE_STEP) * CACHE_STEP
            self._set_cache(self.cache.resized(min(rounded, self.model.config.max_seq_len)))

    def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams = SamplingParams(),
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        ignore_eos: bool = False,
    ) -> Generator[int, None, None]:
        """Yield tokens that continue prompt_ids, ending before an end-of-text token; fills self.stats.

        Keys and values of a prefix shared with the previous call are reused if the plan is the same. Raises UserError
        for an empty prompt, one that leaves no room in the model's context, or a count below 1; RuntimeError if the
        engine is in use. All this happens when the first token is asked for.
        """
        limit = self.model.config.max_seq_len
        check_prompt(prompt_ids, limit)
        if max_new_tokens < 1:
            raise ParameterError("{max_new_tokens} {} is out of range; expected at least 1", max_new_tokens)
        with self.use.taken():
            yield from self._generate(prompt_ids, params, min(max_new_tokens, limit - len(prompt_ids)), ignore_eos)

    def _generate(
        self, prompt_ids: list[int], params: SamplingParams, max_new_tokens: int, ignore_eos: bool
    ) -> Iterator[int]:
        """As generate, for right arguments, while self.use is taken."""
        stats = self.stats = GenerationStats(prompt_tokens=len(prompt_ids), finish_reason="length")
        eos = frozenset() if ignore_eos else self.tokenizer.eos_ids
        start = time.perf_counter()
        self.generator.manual_seed(params.seed)
        self._prefill(prompt_ids, params, len(prompt_ids) + max_new_tokens)
        self.cached_ids = list(prompt_ids)
        fed: list[int] = []  # a token is fed to the model, and so cached, by the step that makes the next one
        for token in self._tokens(params, max_new_tokens):
            self.cached_ids += fed
            fed = [token]
            now = time.perf_counter()
            if stats.new_tokens == 0:
                stats.first_token_s = now - start
            else:
                stats.token_s.append(now - start)
            start = now
            stats.new_tokens += 1
            if token in eos:
                stats.finish_reason = "stop"
                return
            yield token

    def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams = SamplingParams(),
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        stops: tuple[str, ...] = (),
        ignore_eos: bool = False,
    ) -> Iterator[str]:
        """Yield the continuation of prompt_ids as pieces of text, ending before the first stop string.

        Pieces end on character boundaries. Raises as generate does.
        """
        decoder, filter = StreamDecoder(self.tokenizer, prompt_ids), StopStrings(stops)
        with closing(self.generate(prompt_ids, params, max_new_tokens, ignore_eos)) as tokens:
            for token in tokens:
                if piece := filter.push(decoder.push(token)):
                    yield piece
                if filter.stopped:
                    self.stats.finish_reason = "stop"
                    return
        if tail := filter.push(decoder.flush()) + filter.flush():
            yield tail

    @torch.inference_mode()
    def _prefill(self, ids: list[int], params: SamplingParams, capacity: int) -> None:
        """Run the prompt through the model and leave its first continuation in self.token.

        Calls get at least two tokens where the prompt has them: one alone would count as decoding and
        be sparse, and the same prompt would give another text with a warm cache than with a cold one.
        """
        reused, key = 0, self.cache_key(self.plan)
        if key != self.cached_under:
            self.cached_ids, self.cached_under = [], key
        while reused < min(len(self.cached_ids), len(ids) - 2) and self.cached_ids[reused] == ids[reused]:
            reused += 1
        self.stats.reused_tokens = reused
        self.cached_ids = self.cached_ids[:reused]  # true also if this call is interrupted
        self._reserve(capacity)
        prompt = torch.tensor([ids], device=self.device)
        positions = torch.arange(len(ids), device=self.device)[None]
        chunks = -(-(len(ids) - reused) // PREFILL_CHUNK)
        parts = list(zip(*(t[:, reused:].tensor_split(chunks, dim=1) for t in (prompt, positions)), strict=True))
        for part, at in progress(parts, "reading the prompt", "chunk", delay=1.0):
            hidden = self.model.hidden_states(part, at, self.cache)
        self.seen.zero_().scatter_(1, prompt, True)
        self.position.fill_(len(ids))
        self._choose(self.model.logits(hidden[:, -1]), params)

    def _choose(self, logits: Tensor, params: SamplingParams) -> None:
        """Sample from logits [1, V] into self.token."""
        token = sample(logits, params, self.seen, self.generator)
        self.token.copy_(token[:, None])
        self.seen.scatter_(1, self.token, True)

    def _step(self, params: SamplingParams) -> None:
        """Feed self.token at self.position; leave the next token and position in their place."""
        logits = self.model.logits(self.model.hidden_states(self.token, self.position, self.cache)[:, -1])
        if params.is_argmax:
            argmax_step(logits, self.token, self.position)
        else:
            self.position += 1
            self._choose(logits, params)

    def _tokens(self, params: SamplingParams, count: int) -> Iterator[int]:
        """The token that prefill chose and count - 1 more."""
        step = self._captured_step(params) if self.use_graph else lambda: self._step(params)
        if self.device.type == "cuda":
            yield from self._overlapped_tokens(step, count)
            return
        for i in range(count):
            if i:
                with torch.inference_mode():
                    step()
            yield int(self.token)

    def _overlapped_tokens(self, step: Callable[[], None], count: int) -> Iterator[int]:
        """As _tokens, with step i + 1 launched before the host waits for token i."""
        host = torch.empty(count, dtype=torch.int64, pin_memory=True)
        events = [torch.cuda.Event() for _ in range(count)]

        def publish(i: int) -> None:
            host[i : i + 1].copy_(self.token[0], non_blocking=True)
            events[i].record()

        with torch.cuda.device(self.device):
            publish(0)
            for i in range(count):
                if i + 1 < count:
                    with torch.inference_mode():
                        step()
                    publish(i + 1)
                events[i].synchronize()
                yield int(host[i])

    def _captured_step(self, params: SamplingParams) -> Callable[[], None]:
        """A CUDA graph of _step for these sampling parameters and the current cache, captured on first use."""
        return self._captured((params.without_seed(), 0), lambda: self._step(params)).replay

    @torch.inference_mode()
    def _captured(self, of: tuple[SamplingParams, int], step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The CUDA graph of this step; if need be it is recorded, which leaves tensors and random state as they were."""
        key = self.layout, *of
        if key not in self.graphs:
            random_state = self.generator.get_state()
            self.graphs[key] = capture(step, (self.token, self.position, self.seen), self.generator)
            self.generator.set_state(random_state)
        return self.graphs[key]
