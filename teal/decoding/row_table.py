"""Which request has which row of the cache, and what the rows hold that later prompts may start from.

Running requests have the first rows, those of one plan side by side, since a step takes neighbouring rows and has one
plan's thresholds:

    plan A: rows 0 1 2 | plan B: rows 3 4 | prompts being read, and rows that finished requests have left

A prompt that begins as one before may start from its keys and values if they were made under the same plan. Where
several requests are served, only those of whole blocks are shared, which prefill always computes alike. A request's
text then does not depend on what was served before, to the bit on a CPU. A single row shares all that it holds.
"""

from dataclasses import dataclass, field

from teal.decoding.plan_switch import Tally
from teal.decoding.requests import Request
from teal.decoding.rows import DecodeRows, Step
from teal.plan import SparsityPlan


@dataclass(slots=True)
class Contents:
    """Tokens whose keys and values a row holds; of the first shared ones they were made by prefill in whole blocks."""

    ids: list[int] = field(default_factory=list)
    shared: int = 0
    made_under: object = None  # ModelRunner.cache_key

    def common(self, ids: list[int], made_under: object, block: int) -> int:
        """How many tokens of a prompt may be taken from here instead of being computed under made_under.

        They are whole blocks; of blocks of one token all tokens held are shared.
        """
        # At least two tokens are left for prefill: a call of one alone would be compiled for separately.
        limit = min(self.shared if block > 1 else len(self.ids), len(ids) - 2)
        if limit < block or self.made_under != made_under:
            return 0
        same = 0
        while same + block <= limit and self.ids[same : same + block] == ids[same : same + block]:
            same += block
        return same


@dataclass(slots=True)
class Flight:
    """A step whose tokens nobody has read yet."""

    requests: list[Request]
    rows: range
    step: Step


@dataclass(slots=True, eq=False)
class Group:
    """Running requests of one plan, in the order of their rows."""

    plan: SparsityPlan | None
    requests: list[Request] = field(default_factory=list)
    flight: Flight | None = None
    tally: Tally | None = None  # of the entries dropped, while that is counted for one of the requests


class RowTable:
    """Gives rows to requests and keeps those of one plan together. block: the tokens that are shared or not as one."""

    def __init__(self, rows: DecodeRows, count: int, block: int) -> None:
        self.rows = rows
        self.block = block
        self.contents = [Contents() for _ in range(count)]
        self.owners: list[Request | None] = [None] * count
        self.groups: list[Group] = []

    @property
    def running(self) -> list[Request]:
        """Request i is in row i."""
        return [request for group in self.groups for request in group.requests]

    def has_room(self) -> bool:
        return None in self.owners

    def contents_of(self, request: Request) -> Contents:
        return self.contents[self.owners.index(request)]

    def rows_of(self, group: Group) -> range:
        begin = 0
        for before in self.groups:
            if before is group:
                break
            begin += len(before.requests)
        return range(begin, begin + len(group.requests))

    def held(self) -> list[int]:
        """How many positions of each row hold something: a step in flight fills one more."""
        return [len(contents.ids) + 1 if contents.ids else 0 for contents in self.contents]

    def group_of(self, request: Request) -> Group | None:
        """None if it does not run."""
        return next((group for group in self.groups if request in group.requests), None)

    def take(self, request: Request, made_under: object) -> None:
        """Give request the free row that holds most of its prompt's start; of several, the one with least to lose."""
        ids = request.prompt_ids

        def worth(row: int) -> tuple[int, int]:
            return self.contents[row].common(ids, made_under, self.block), -len(self.contents[row].ids)

        row = max((row for row, owner in enumerate(self.owners) if owner is None), key=worth)
        reused = worth(row)[0]
        self.owners[row] = request
        self.contents[row] = Contents(ids[:reused], reused, made_under)
        request.prefilled = request.stats.reused_tokens = reused

    def borrow(self, request: Request) -> None:
        """Copy what another row has of request's prompt beyond what its own has by now."""
        row, ids = self.owners.index(request), request.prompt_ids
        own = self.contents[row]
        held = [contents.common(ids, own.made_under, self.block) for contents in self.contents]
        source = max(range(len(held)), key=held.__getitem__)
        if held[source] > request.prefilled:
            self.rows.copy(source, row, held[source])
            own.ids, own.shared = ids[: held[source]], held[source]
            request.stats.reused_tokens += held[source] - request.prefilled
            request.prefilled = held[source]

    def filled(self, request: Request, end: int) -> None:
        """Note that prefill has put the prompt's tokens up to end into the row, in one call."""
        own = self.contents_of(request)
        own.ids = request.prompt_ids[:end]
        if end - request.prefilled == self.block:
            own.shared = end
        request.prefilled = end

    def join(self, request: Request, plan: SparsityPlan | None) -> None:
        """Let request run: the rows of its plan are now one more, and each later group's first one goes to its end."""
        group = next((group for group in self.groups if group.plan is plan), None)
        if group is None:
            group = Group(plan)
            self.groups.append(group)
        group.requests.append(request)
        for later in self.groups[self.groups.index(group) + 1 :]:
            later.requests.append(later.requests.pop(0))
        self._arrange()

    def leave(self, request: Request) -> None:
        """Free request's row, which keeps what it holds; each later group's last one goes to its beginning."""
        self.owners[self.owners.index(request)] = None
        group = self.group_of(request)
        if group is None:
            return
        last = group.requests.pop()
        if last is not request:
            group.requests[group.requests.index(request)] = last
        for later in self.groups[self.groups.index(group) + 1 :]:
            later.requests.insert(0, later.requests.pop())
        if not group.requests:
            self.groups.remove(group)
        self._arrange()

    def forget(self) -> None:
        """After a failure: nothing is known of what the rows hold."""
        self.contents = [Contents() for _ in self.contents]

    def _arrange(self) -> None:
        """Bring every running request into its row."""
        for row, request in enumerate(self.running):
            if self.owners[row] is not request:
                self._swap(row, self.owners.index(request))

    def _swap(self, a: int, b: int) -> None:
        length = max(len(self.contents[a].ids), len(self.contents[b].ids))
        self.rows.swap(a, b, length + 1)  # and the position that a step in flight fills
        self.contents[a], self.contents[b] = self.contents[b], self.contents[a]
        self.owners[a], self.owners[b] = self.owners[b], self.owners[a]
