"""Several prompts read beside each other, a block at a time."""

from torch import Tensor

from teal.decoding.requests import Request
from teal.decoding.row_table import RowTable
from teal.decoding.rows import DecodeRows


class Prefill:
    """Prompts that have rows of the cache and are not read to their ends. block: tokens of a call of the model."""

    def __init__(self, rows: DecodeRows, table: RowTable, block: int) -> None:
        self.rows = rows
        self.table = table
        self.block = block
        self.requests: list[Request] = []  # first come first
        self.blocks = 0  # read so far

    def next(self) -> Request:
        """By turns the prompt that came first and the one with the least left: no short one waits long."""
        if self.blocks % 2 == 0:
            return self.requests[0]
        return min(self.requests, key=lambda request: len(request.prompt_ids) - request.prefilled)

    def read_block(self, request: Request) -> tuple[int, Tensor | None]:
        """Put the next part of a prompt into the cache: how many tokens, and after the last part fp32 logits [1, V].

        What other rows have of the prompt is copied. The model must have the thresholds of the request's plan.
        """
        self.blocks += 1
        self.table.borrow(request)
        ids, begin = request.prompt_ids, request.prefilled
        end = begin + self.block
        if end >= len(ids) - 1:  # one token that is left over joins the block before
            end = len(ids)
        logits = self.rows.prefill(self.table.owners.index(request), ids[:end], begin)
        self.table.filled(request, end)
        if end < len(ids):
            return end - begin, None
        self.requests.remove(request)
        return end - begin, logits
