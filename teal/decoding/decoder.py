"""The one loop that makes texts: blocks of prompts and decode steps in turns, for one request or several.

Prompts are read in blocks, between which the running requests take steps. Neither a long prompt nor another's plan
keeps anybody waiting for more than a block and a few steps. Blocks go in turn to the prompt with the least left and to
the one that came first. So short ones begin soon, and long ones get half at least. Requests of one plan share a step;
plans take turns. A request's text does not depend on what is beside it. On a CPU this holds to the bit for sparse and
quantized models, whose kernels sum each row as if it were alone.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from teal.decoding.plan_switch import Tally
from teal.decoding.prefill import Prefill
from teal.decoding.requests import Done, Observer, Request, TokenLogprob
from teal.decoding.row_table import Flight, Group, RowTable
from teal.decoding.rows import GREEDY, DecodeRows
from teal.decoding.runner import ModelRunner
from teal.decoding.sequence import Sequence, token_logprob
from teal.errors import ParameterError, UserError
from teal.options import COUNTED_TOKENS, SamplingParams, check_bias, check_ids, check_prompt
from teal.plan import SparsityPlan
from teal.teal_layers import achieved_sparsity

PREFILL_CHUNK = 512  # prompt tokens of a prefill call; bounds the attention mask and the activations
# Steps between two blocks of prompts, less after a shorter one. Of a 135M model a block takes as long as 5 to 8 steps
# of one row, or 2 of eight. So neither reading nor writing gets much more time than the other.
STEPS_A_BLOCK = 4


class Decoder:
    """Requests on so many rows of a cache of up to context positions, for the model of a runner.

    single: one request at a time, whose steps may sample on the device, and that reuses all that the row holds.
    block: tokens of a prefill call, and otherwise the unit that prompts share. ahead: a step starts before the host has
    read the one before. Not thread-safe: whoever calls it must have the runner to himself.
    """

    def __init__(
        self, runner: ModelRunner, rows: int, context: int, block: int, ahead: bool, single: bool = False
    ) -> None:
        self.runner, self.context, self.ahead = runner, context, ahead
        with torch.inference_mode():  # tensors made outside and inside it would each be compiled for
            self.rows = DecodeRows(runner, rows, context, single)
        self.table = RowTable(self.rows, rows, 1 if single else block)
        self.prefill = Prefill(self.rows, self.table, block)
        self.sequences: dict[Request, Sequence] = {}
        self.owed_steps = 0  # to the running requests, before another block
        self.own_plan = runner.plan  # of requests that name none
        self.achieved: list[dict[str, float]] = []  # by the request that was counted last
        self.observer = Observer()
        on_cuda = runner.device.type == "cuda"
        self.device_context: AbstractContextManager[object] = (
            torch.cuda.device(runner.device) if on_cuda else nullcontext()
        )

    @property
    def admitted(self) -> list[Request]:
        """Requests that have a row of the cache."""
        return [*self.table.running, *self.prefill.requests]

    def has_room(self) -> bool:
        return self.table.has_room()

    @torch.inference_mode()
    def warm(self) -> None:
        """Compile and capture what greedy requests need now, not in the middle of an answer."""
        with self.device_context:
            self.rows.warm()

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be run; cut its length to what the context has room for."""
        check_prompt(request.prompt_ids, self.context)
        check_ids(request.prompt_ids, self.runner.model.config.vocab_size)
        check_bias(request.params, self.runner.model.config.vocab_size)
        if request.max_new_tokens < 1:
            raise ParameterError("{max_new_tokens} {} is out of range; expected at least 1", request.max_new_tokens)
        if request.plan is not None and self.own_plan is None:
            raise UserError("a plan was given for an engine that was loaded dense; load it with a sparsity or a plan")
        request.max_new_tokens = min(request.max_new_tokens, self.context - len(request.prompt_ids))

    def blocks_left(self, request: Request) -> int:
        """How many calls of advance read the rest of an admitted request's prompt, if it is alone."""
        return max(1, -(-(len(request.prompt_ids) - request.prefilled - 1) // self.prefill.block))

    @torch.inference_mode()
    def admit(self, request: Request) -> None:
        """Give a checked request a free row; there must be one."""
        request.stats.prompt_tokens = len(request.prompt_ids)
        self.table.take(request, self.runner.cache_key(self._plan_of(request)))
        self.prefill.requests.append(request)
        self.rows.reserve(len(request.prompt_ids) + request.max_new_tokens, self.table.held())

    @torch.inference_mode()
    def advance(self) -> None:
        """Read the next block of a prompt, or let every running request take a step. There must be a request."""
        with self.device_context:
            if self.prefill.requests and not (self.owed_steps > 0 and self.table.groups):
                self._prefill_block()
            else:
                self._step_all()

    @torch.inference_mode()
    def end(self, request: Request, reason: str, error: str | None = None) -> None:
        """Take an admitted request out and say so to whoever waits for it, unless it was cancelled."""
        if request.counting:
            self._stop_counting(request)
        sequence = self.sequences.pop(request, None)
        if request in self.prefill.requests:
            self.prefill.requests.remove(request)
        self.table.leave(request)
        self.finish(request, reason, error, sequence)

    def finish(self, request: Request, reason: str, error: str | None = None, sequence: Sequence | None = None) -> None:
        """Tell of the end of a request that has no row any more, or never had one."""
        self.observer.finished(request, reason)
        if request.cancelled:
            return
        request.stats.finish_reason = reason
        if sequence is not None and error is None and (tail := sequence.rest()) is not None:
            request.emit(tail)
        request.emit(Done(reason, error))

    def abandon(self, request: Request) -> None:
        """End an admitted request without a word to it."""
        request.cancelled = True
        self.end(request, "cancelled")

    def fail(self, message: str) -> None:
        """End all requests with an error; nothing is known any more of what the rows hold."""
        for request in self.admitted:
            self.end(request, "error", message)
        self.table.forget()

    @torch.inference_mode()
    def use_own_plan(self) -> None:
        """Leave the model as it is for others: by the plan of requests that name none, and not counting."""
        self._switch(self.own_plan)

    def _plan_of(self, request: Request) -> SparsityPlan | None:
        return request.plan or self.own_plan

    def _switch(self, plan: SparsityPlan | None, tally: Tally | None = None) -> None:
        """Let the next calls of the model be of this plan, and count what they drop in tally."""
        if plan is not None and plan is not self.runner.plan:
            self.runner.switch_plan(plan)
        if self.runner.plan_switch is not None:
            self.runner.plan_switch.count(tally)

    def _stop_counting(self, request: Request) -> None:
        """Note what was dropped while request was counted; go on for the others of its plan."""
        group = self.table.group_of(request)
        if group is None or group.tally is None:
            return
        self._switch(group.plan, group.tally)
        self.achieved = achieved_sparsity(self.runner.model)
        if not any(other.counting for other in group.requests if other is not request):
            group.tally = None
            self._switch(group.plan)

    def _prefill_block(self) -> None:
        """Read the next part of a prompt; with the last part the request runs."""
        request = self.prefill.next()
        plan = self._plan_of(request)
        self._switch(plan)
        tokens, logits = self.prefill.read_block(request)
        self.owed_steps = -(-tokens * STEPS_A_BLOCK // self.prefill.block)
        if logits is not None:
            self.table.join(request, plan)
            self.sequences[request] = Sequence(request, self.rows, self.runner.tokenizer)
            self._choose(request, logits, int(logits.argmax()) if request.is_plain else None)

    def _step_all(self) -> None:
        """One step of every plan, or a round of drafting."""
        self.owed_steps -= 1
        for group in list(self.table.groups):
            if group.requests and not self._speculate(group):
                self._step(group)

    def _samples_on_device(self, request: Request) -> bool:
        """Whether its steps choose by its own parameters, so that they need no host in between."""
        return request.matcher is None and self.rows.single and not request.params.counts_or_biases

    def _is_chosen_by_step(self, request: Request) -> bool:
        """Whether its token is the one that a step chooses."""
        return request.is_plain or self._samples_on_device(request)

    def _needs_no_host(self, request: Request) -> bool:
        """Whether that token is all that the request wants of a step."""
        return self._is_chosen_by_step(request) and request.top_logprobs is None and not request.counting

    def _params_of(self, group: Group) -> SamplingParams:
        """By what a step chooses: one request's own if its row is the only one, else the argmax."""
        return request.params if self._samples_on_device(request := group.requests[0]) else GREEDY

    def _step(self, group: Group) -> None:
        """One token more for every running request of a plan."""
        flight, rows = group.flight or self._launch(group), self.table.rows_of(group)
        group.flight = None
        same = flight.requests == group.requests and flight.rows == rows
        if self.ahead and same and not self._may_draft(group) and self._goes_on(group):
            group.flight = self._launch(group, fed=True)
        for request in group.requests:
            if request in flight.requests:
                self.table.contents_of(request).ids.append(request.token)
        for i, (request, token) in enumerate(zip(flight.requests, flight.step.tokens(), strict=True)):
            if request in group.requests:  # it has not ended meanwhile
                chosen = token if self._is_chosen_by_step(request) else None
                self._choose(request, flight.step.logits[i : i + 1], chosen)

    def _goes_on(self, group: Group) -> bool:
        """Whether another step of the same requests may start before their tokens are known, and is of use to one."""
        requests = group.requests
        return all(map(self._needs_no_host, requests)) and any(request.tokens_left > 1 for request in requests)

    def _may_draft(self, group: Group) -> bool:
        """Whether the runner drafts under the plan, and one request runs that needs no host.

        Beside others it takes ordinary steps, which read the weights once for all of them.
        """
        requests = self.table.running
        drafts = self.runner.drafts_under(group.plan)
        return drafts and len(requests) == 1 and self._needs_no_host(requests[0])

    def _speculate(self, group: Group) -> bool:
        """Several tokens by drafting and verifying, if that may be and there is something to verify."""
        drafter = self.runner.drafter
        if drafter is None or group.flight is not None or not self._may_draft(group):
            return False
        request, ids = group.requests[0], self.table.contents[0].ids
        sequence, stats = self.sequences[request], request.stats
        if drafter.looks_up:
            sequence.text.extend([*ids, request.token][len(sequence.text.text) :])
        drafts = min(drafter.best_length(sequence.acceptance), request.tokens_left - 1)
        drafts = drafter.propose(sequence.text, drafts)
        if drafts == 0:
            return False
        self._switch(group.plan)
        self.rows.feed(range(1), [request.token], [len(ids)])
        tokens = self.rows.round(drafter, self._params_of(group), drafts, len(ids) + drafts + 1)
        sequence.acceptance.add(drafts, len(tokens) - 1)
        stats.rounds += 1
        stats.drafted_tokens += drafts
        stats.accepted_tokens += len(tokens) - 1
        self.observer.drafted(drafts, len(tokens) - 1)
        for token in tokens:
            if request in group.requests:
                ids.append(request.token)
                self._choose(request, None, token)
        return True

    def _launch(self, group: Group, fed: bool = False) -> Flight:
        """Start a step of a plan's requests. fed: it goes on from one of the same requests that was just started."""
        requests, rows = list(group.requests), self.table.rows_of(group)
        lengths = [len(self.table.contents[row].ids) for row in rows]
        if not fed:
            self.rows.feed(rows, [request.token for request in requests], lengths)
        counting = any(request.counting for request in requests)
        if counting and group.tally is None and self.runner.plan_switch is not None:
            group.tally = self.runner.plan_switch.tally()
        self._switch(group.plan, group.tally if counting else None)
        length = max(lengths) + (2 if fed else 1)
        return Flight(requests, rows, self.rows.step(rows, length, self._params_of(group), eager=counting))

    def _choose(self, request: Request, logits: Tensor | None, chosen: int | None) -> None:
        """Take the token that a step chose, or sample one from logits [1, V]; pass it on, and end what is over.

        A grammar without a way on ends this request and no other.
        """
        sequence = self.sequences[request]
        try:
            if chosen is None:
                assert logits is not None
                chosen = sequence.sample(logits)
            complete = request.matcher is not None and request.matcher.accept(chosen)
        except UserError as error:
            self.end(request, "refused", str(error))
            return
        seconds = request.timed()
        (self.observer.first_token if request.new_tokens == 1 else self.observer.next_token)(seconds)
        if request.count_sparsity and request.new_tokens == COUNTED_TOKENS:
            self._stop_counting(request)
        request.token = chosen
        logprob = None
        if request.top_logprobs is not None and logits is not None:
            logprob = token_logprob(logits[0], chosen, request.top_logprobs)
        self._pass_on(request, sequence, logprob, complete)

    def _pass_on(self, request: Request, sequence: Sequence, logprob: TokenLogprob | None, complete: bool) -> None:
        """Emit what its newest token adds, and end the request with its last one."""
        if request.token in self.runner.tokenizer.eos_ids and not request.ignore_eos:
            self.end(request, "stop")
            return
        if (piece := sequence.push(request.token, logprob)) is not None:
            request.emit(piece)
        if sequence.filter.stopped or complete:
            self.end(request, "stop")
        elif request.tokens_left <= 0:
            self.end(request, "length")
