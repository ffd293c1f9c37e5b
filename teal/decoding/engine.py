"""A model and its tokenizer on a device: one text at a time, whose KV cache is kept for the next prompt."""

import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from typing_extensions import Self

from teal.calibration.texts import default_text, text_hash
from teal.calibration.thresholds import calibrate_uniform
from teal.checkpoint.loading import Check, LoadedModel, load_for_decoding, load_plan
from teal.checkpoint.tokenizer import Tokenizer
from teal.decoding.backends import Backend
from teal.decoding.compilation import compile_model
from teal.decoding.decoder import PREFILL_CHUNK, Decoder
from teal.decoding.exclusive import Exclusive
from teal.decoding.plan_switch import PlanSwitch
from teal.decoding.requests import Done, Piece, Request
from teal.decoding.runner import ModelRunner
from teal.decoding.statistics import GenerationStats
from teal.errors import UserError
from teal.layers.int8_cache import has_int8_cache
from teal.layers.quantized_linear import is_quantized
from teal.model import Block, KVCache, Transformer
from teal.options import DEFAULT_MAX_NEW_TOKENS, SamplingParams
from teal.plan import SparsityPlan, cached_plan, keep_all_plan, plan_file
from teal.progress import progress
from teal.teal_layers import set_counting, sparsify

IN_USE = (
    "this engine is making another text: exhaust or close its generator first, load a second engine, or give several "
    "prompts to scheduler.generate_batch"
)


class Engine(ModelRunner):
    """Generates tokens with one model at batch size one. Build with Engine.load; then call generate.

    It makes one text at a time, from whatever threads: as long as a generator of generate or stream is unfinished, or a
    Scheduler runs on the engine, another generation and a change of its settings raise RuntimeError. A generator is
    finished when it is exhausted, closed, or nothing refers to it any more, as after a break out of a for loop over it.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, name: str, backend: Backend, use_graph: bool) -> None:
        super().__init__(model, tokenizer, backend, use_graph)
        self.name = name
        self.loaded: LoadedModel | None = None
        self.load_s = 0.0
        self.compile_s = 0.0
        self.stats = GenerationStats()
        self.use = Exclusive(IN_USE)
        context, on_cuda = model.config.max_seq_len, self.device.type == "cuda"
        self.decoder = Decoder(self, 1, context, PREFILL_CHUNK, ahead=on_cuda, single=True)

    @classmethod
    def load(
        cls,
        checkpoint: str | None = None,
        *,
        random_weights: str | None = None,
        sparsity: float = 0.0,
        plan: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        compile: bool | None = None,
        quant: str | None = None,
        quant_lm_head: bool = False,
        kv_cache: str = "float",
        force_plan: bool = False,
        check: Check | None = None,
    ) -> Self:
        """Load a checkpoint (see source.resolve_checkpoint) and make it sparse.

        sparsity 0 with no plan is the dense model. quant ("int8", "int4") rounds its weights, quant_lm_head those of the
        output head to 8 bits, kv_cache "int8" keys and values. force_plan takes plans of other models, too. compile None
        means: on CUDA only. check: see load_for_decoding. Raises UserError for anything the user can mend.
        """
        if not 0 <= sparsity < 1:
            raise UserError(f"--sparsity {sparsity} is out of range; expected 0 <= sparsity < 1")
        sparse = sparsity > 0 or plan is not None
        loaded = load_for_decoding(
            checkpoint, random_weights, device, dtype, sparse, quant, quant_lm_head, kv_cache, force_plan, check
        )
        return cls.from_loaded(loaded, choose_plan(loaded, sparsity, plan) if sparse else None, compile)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, plan: SparsityPlan | None, compile: bool | None = None) -> Self:
        """An engine for a model in memory, which becomes sparse in place if a plan is given. Else as load."""
        on_cuda = loaded.model.embedding.weight.is_cuda
        compile = on_cuda if compile is None else compile
        engine = cls(loaded.model, loaded.tokenizer, loaded.name, Backend(loaded.model), use_graph=compile and on_cuda)
        engine.plan = plan
        engine.loaded, engine.load_s, engine.weights = loaded, loaded.load_s, loaded.weights
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

    def use_sparsity(self, sparsity: float) -> None:
        """As use_plan, with the plan that load takes for a sparsity. Raises UserError if it would have to be made now."""
        self.require_sparse()
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

    def _compile(self) -> None:
        """Compile prefill and decode, and pay for it now with a few tokens, not at the user's first one."""
        start = time.perf_counter()
        compile_model(self.model)
        warm_ids = [i % self.model.config.vocab_size for i in range(4)]
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
        for an empty prompt, one that leaves no room in the model's context, or a count below 1; RuntimeError if the
        engine is in use. All this happens when the first token is asked for.
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


def choose_plan(
    loaded: LoadedModel, sparsity: float, plan: str | None, can_calibrate: bool = True
) -> SparsityPlan:  # fmt: skip
    """The plan in the file named plan, or the one for this sparsity beside the checkpoint, or a quick uniform one.

    Sparsity 0 without a file is the plan that keeps all.
    """
    if plan is None and sparsity == 0:
        return keep_all_plan(loaded.model.config)
    path = plan_file(loaded.folder, sparsity, plan)
    return quick_plan(loaded, sparsity, can_calibrate) if path is None else load_plan(path, loaded)


def quick_plan(loaded: LoadedModel, sparsity: float, can_calibrate: bool = True) -> SparsityPlan:
    """A uniform plan calibrated on the default text, or found in the cache; calibrating makes the model sparse.

    Raises UserError if it is not in the cache and can_calibrate says that the model cannot be calibrated.
    """
    text = default_text()
    weight = loaded.model.embedding.weight
    path = cached_plan(loaded.identity, f"{text_hash(text)}-uniform", weight.dtype, weight.device, sparsity)
    if path.exists():
        return SparsityPlan.load(path)
    if not can_calibrate:
        raise UserError(
            f"there is no plan for sparsity {sparsity:g} yet; python calibrate.py --sparsity {sparsity:g} makes one"
        )
    print(f"calibrating sparsity {sparsity:g} on Python's help topics (once)", file=sys.stderr)
    start = time.perf_counter()
    plan = calibrate_uniform(
        loaded.model, loaded.tokenizer.encode, sparsity, text, loaded.weights, save=lambda plans: plans[0].save(path)
    )
    plan.save(path)
    loaded.calibrate_s += time.perf_counter() - start
    return plan
