"""serve.py with answers that the request tells, in its field "script": python -m tests.scripted --checkpoint FOLDER"""

from typing import Any

import torch
from torch import Tensor

from teal.cli import command_line as cli
from teal.cli import serve
from teal.serving.openai_api import Service


class Script:
    """A grammar (generation.Matcher) that allows one text, by one list of tokens."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = list(ids)

    def mask(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor(self.ids[:1]), 0.0)

    def accept(self, token: int) -> bool:
        assert token == self.ids.pop(0)
        return not self.ids


def follow_scripts() -> None:
    """Let requests name their answers from now on."""
    requests = Service.requests

    def scripted(service: Service, body: Any, *arguments: Any) -> Any:
        found = requests(service, body, *arguments)
        if script := (body.model_extra or {}).get("script"):
            tokenizer = service.engine.tokenizer
            for request in found:
                request.matcher = Script(tokenizer.encode(script)[len(tokenizer.bos_ids) :])
        return found

    Service.requests = scripted  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    follow_scripts()
    cli.run(serve.main)
