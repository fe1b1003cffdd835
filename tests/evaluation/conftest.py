"""A tokenizer that all tests of tasks share."""

import pytest

from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.tokenizers import make_byte_level


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level, with a begin token and ChatML's."""
    return load_tokenizer(None, make_byte_level(tmp_path_factory.mktemp("tokenizer")))
