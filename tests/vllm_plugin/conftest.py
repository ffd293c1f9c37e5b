"""The stand-in for vLLM, as a fixture."""

from collections.abc import Iterator

import pytest

from tests.vllm_plugin import standin


@pytest.fixture
def engine() -> Iterator[standin.Engine]:
    """Within a test vLLM is the stand-in; what it would have set is a field here."""
    with standin.installed() as found:
        yield found
