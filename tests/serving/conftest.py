"""The server that most tests of this room ask: one for each file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server_process import Server, serving


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with serving(
        tiny_folder, "--sparsity", "0.3", "--sparsities", "0.5", "--name", "tiny", "--max-body-mb", "1"
    ) as running:
        yield running
