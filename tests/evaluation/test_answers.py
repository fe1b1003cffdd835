"""Questions are put in batches that fit. Run: pytest tests/evaluation/test_answers.py"""

from itertools import pairwise

from hft_megatron.evaluation.answers import TOKENS_OF_A_BATCH, batches_of


def test_batches_have_so_many_questions_the_longest_first() -> None:
    assert batches_of([3, 9, 3, 5, 9], 2) == [[1, 4], [3, 0], [2]]
    assert batches_of([], 2) == []


def test_a_batch_has_no_more_tokens_than_its_bound_and_at_least_one_question() -> None:
    window = TOKENS_OF_A_BATCH // 4
    lengths = [window] * 9 + [4 * TOKENS_OF_A_BATCH, TOKENS_OF_A_BATCH, 10, window + 1, 20]
    batches = batches_of(lengths, 16)
    assert batches == [[9], [10], [12, 0, 1], [2, 3, 4, 5], [6, 7, 8, 13, 11]]
    for batch, following in pairwise(batches):
        assert sum(lengths[number] for number in [*batch, following[0]]) > TOKENS_OF_A_BATCH, "there was no room"
