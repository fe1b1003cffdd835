"""Real tokenizers, which take seconds to load."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer


@pytest.fixture(scope="session")
def llama2(shared_data: Path) -> Callable[[str | None], Tokenizer]:
    """``llama2(--tokenizer-type)`` is Llama 2's tokenizer of that kind, loaded once."""
    return cache(lambda kind: load_tokenizer(kind, shared_data / "tokenizers/llama2"))
