"""A model and its tokenizer on a device: one text at a time, whose KV cache is kept for the next prompt."""

import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from typing_extensions import Self

from teal.calibration.choose import choose_plan
from teal.checkpoint.loading import Check, LoadedModel, load_for_decoding
from teal.checkpoint.tokenizer import Tokenizer
from teal.decoding.backend import Backend
from teal.decoding.backends import choose_backend
from teal.decoding.decoder import PREFILL_CHUNK, Decoder
from teal.decoding.exclusive import Exclusive
from teal.decoding.plan_switch import PlanSwitch
from teal.decoding.requests import Done, Piece, Request
from teal.decoding.rows import DecodeRows
from teal.decoding.runner import ModelRunner
from teal.decoding.statistics import GenerationStats
from teal.errors import UserError
from teal.model import KVCache
from teal.options import DEFAULT_MAX_NEW_TOKENS, ModelOptions, SamplingParams
from teal.plan import SparsityPlan
from teal.progress import progress
from teal.teal_layers import set_counting, sparsify

# Of a prompt that compiles prefill for all lengths. Attention treats few rows otherwise (model.SMALL_ATTENTION_ROWS):
# after one of 4 tokens the first longer prompt compiled anew, for 13 s on an H100.
WARM_TOKENS = 32
IN_USE = (
    "this engine is making another text: exhaust or close its generator first, load a second engine, or give several "
    "prompts to teal.generate_batch"
)


class Engine(ModelRunner):
    """Generates tokens with one model at batch size one. Build with Engine.load; then call generate.

    It makes one text at a time, from whatever threads. As long as a generator of generate or stream is unfinished, or a
    Scheduler runs on the engine, it is in use. Another generation and a change of its settings then raise RuntimeError.
    A generator is finished when it is exhausted, closed, or nothing refers to it any more. A break out of a for loop
    over it leaves no reference.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer, name: str) -> None:
        super().__init__(backend, tokenizer)
        self.name = name
        self.loaded: LoadedModel | None = None
        self.load_s = 0.0
        self.compile_s = 0.0
        self.stats = GenerationStats()
        self.use = Exclusive(IN_USE)
        context, on_cuda = self.model.config.max_seq_len, self.device.type == "cuda"
        self.decoder = Decoder(self, 1, context, PREFILL_CHUNK, ahead=on_cuda, single=True)

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
        """An engine for a model in memory, which becomes sparse in place if a plan is given. Else as load.

        backend: see choose_backend.
        """
        if plan is not None:
            plan.check_weights(loaded.weights)
            sparsify(loaded.model, plan)
        engine = cls(choose_backend(loaded.model, compile, backend), loaded.tokenizer, loaded.name)
        engine.loaded, engine.load_s, engine.weights = loaded, loaded.load_s, loaded.weights
        if plan is not None:
            engine.plan, engine.plan_switch = plan, PlanSwitch(engine.model)
            engine.layout = engine.plan_switch.use(plan)
        if engine.backend.compiles and not engine.follows:
            engine._compile()
        return engine

    def follow(self) -> None:
        """Of a rank that is not the first: do what that one's engines do, until it ends."""
        assert self.calls is not None
        self.calls.follow(DecodeRows)

    def use_plan(self, plan: SparsityPlan) -> None:
        """Decode with another plan's thresholds from now on.

        Raises UserError if the engine is dense or the plan is for another model, RuntimeError if it is in use.
        """
        with self.use.taken():
            self.switch_plan(plan)

    def use_sparsity(self, sparsity: float) -> None:
        """As use_plan, with the plan that load takes for a sparsity. Raises UserError if that has to be made now."""
        self.require_sparse()
        assert self.loaded is not None
        with self.use.taken():
            self.switch_plan(choose_plan(self.loaded, sparsity, None, can_calibrate=self.backend.keeps_modules))

    @property
    def calibrate_s(self) -> float:
        """Seconds that quick calibrations took, at load and since."""
        return self.loaded.calibrate_s if self.loaded is not None else 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block sparse layers count what they keep (achieved_sparsity), off a GPU's fast path."""
        with self.use.taken():  # no text is begun without and ended with counting
            graph, self.use_graph = self.use_graph, False
            set_counting(self.model, True)
        try:
            yield
        finally:
            set_counting(self.model, False)
            self.use_graph = graph

    def _compile(self) -> None:
        """Compile prefill and decode now, by a few tokens, not at the user's first one."""
        start = time.perf_counter()
        config = self.model.config
        warm_ids = [i % config.vocab_size for i in range(min(WARM_TOKENS, config.max_seq_len - 3))]
        for _ in self.generate(warm_ids, SamplingParams(), max_new_tokens=3, ignore_eos=True):
            pass
        self.cached_ids = []
        self.compile_s = time.perf_counter() - start

    @property
    def cached_ids(self) -> list[int]:
        """Tokens whose keys and values are kept for a prompt that begins with them. Set it to forget some."""
        return self.decoder.table.contents[0].ids

    @cached_ids.setter
    def cached_ids(self, ids: list[int]) -> None:
        self.decoder.table.contents[0].ids = ids

    @property
    def cache(self) -> KVCache:
        """The keys and values of cached_ids."""
        return self.decoder.rows.cache

    def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams = SamplingParams(),
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        ignore_eos: bool = False,
    ) -> Generator[int, None, None]:
        """Yield tokens that continue prompt_ids, ending before an end-of-text token; fills self.stats.

        Keys and values of a prefix shared with the previous call are reused if the plan is the same. Raises UserError
        for an empty prompt, one that leaves no room in the model's context, or a count below 1. Raises RuntimeError if
        the engine is in use. All this happens when the first token is asked for.
        """
        events: deque[Piece | Done] = deque()
        request = Request(prompt_ids, events.append, params, max_new_tokens, ignore_eos=ignore_eos, detokenize=False)
        for given, piece in enumerate(pieces := self._run(request, events)):
            assert piece.token is not None
            try:
                yield piece.token
            except GeneratorExit:
                pieces.close()
                # A round of drafting may have cached more than was given.
                del self.cached_ids[len(prompt_ids) + given :]
                raise

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
        events: deque[Piece | Done] = deque()
        for piece in self._run(Request(prompt_ids, events.append, params, max_new_tokens, stops, ignore_eos), events):
            yield piece.text

    def _run(self, request: Request, events: "deque[Piece | Done]") -> Generator[Piece, None, None]:
        """What request emits into events, while the engine is taken for it."""
        decoder = self.decoder
        decoder.check(request)
        with self.use.taken():
            decoder.own_plan, self.stats = self.plan, request.stats
            decoder.admit(request)
            try:
                blocks = range(decoder.blocks_left(request))
                for _ in progress(blocks, "reading the prompt", "chunk", delay=1.0):
                    decoder.advance()
                while True:
                    while events:
                        event = events.popleft()
                        if isinstance(event, Piece):
                            yield event
                        elif event.error is not None:
                            raise UserError(event.error)
                        else:
                            return
                    decoder.advance()
            finally:
                if request in decoder.admitted:
                    decoder.abandon(request)
