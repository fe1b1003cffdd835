"""Paths, or weights and paths in turn. Run: pytest tests/config/test_data_sources.py"""

import pytest

from hft_megatron.config.data import DataSource, data_sources
from hft_megatron.errors import UserError


def test_words_are_paths_or_weights_and_paths_in_turn() -> None:
    assert data_sources("--x", []) == ()
    assert data_sources("--x", ["a", "b", "a"]) == tuple(DataSource(path=path, weight=None) for path in "aba")
    assert data_sources("--x", ["0.3", "a", "7e-1", "./2"]) == (
        DataSource(path="a", weight=0.3),
        DataSource(path="./2", weight=0.7),
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("0.5", "--x: no path follows the weight 0.5; write ./0.5 for a file of that name."),
        ("a 1", "--x: no path follows the weight 1"),
        ("1 2 a", "--x: no path follows the weight 1"),
        ("1 a b", "--x: b has no weight, but other paths do; give every path one, or none."),
        ("a 1 b", "--x: a has no weight"),
        ("0 a 1 b", "--x: the weight 0 must be above 0; leave out"),
        ("-1 a", "--x: the weight -1 must be above 0; leave out"),
        ("nan a", "--x: the weight nan must be above 0; leave out"),
        ("inf a", "--x: the weight inf must be above 0; leave out"),
    ],
)
def test_words_that_make_no_mixture_are_named(words: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        data_sources("--x", words.split())
