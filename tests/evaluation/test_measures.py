"""Measures: values from sums of statistics. Run: pytest tests/evaluation/test_measures.py"""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_megatron.evaluation.measures import MEASURES, with_literals


def value(name: str, *examples: tuple[str, list[str]], source: str = "") -> float:
    """The value of a measure of texts over examples of a prediction and its references."""
    statistics = MEASURES[name].statistics
    assert statistics is not None
    return total(name, [statistics(prediction, references, source) for prediction, references in examples])


def total(name: str, statistics: Sequence[Sequence[float]]) -> float:
    return MEASURES[name].total([sum(column) for column in zip(*statistics, strict=True)])


BESIDE_A_BASE = ["base_cross_entropy", "forgetting", "kl_base_tuned", "kl_tuned_base"]
OF_TEXTS = [name for name, measure in MEASURES.items() if measure.statistics is not None]


def test_the_measures_of_the_field_are_there_each_under_its_own_name() -> None:
    assert {name: measure.name for name, measure in MEASURES.items()} == {name: name for name in MEASURES}
    assert [name for name, measure in MEASURES.items() if not measure.higher_is_better] == [
        "cross_entropy",
        "perplexity",
        "bits_per_byte",
        *BESIDE_A_BASE,
    ]
    assert [name for name, measure in MEASURES.items() if measure.of_tokens] == [
        "accuracy_per_token",
        "preference_accuracy_per_token",
        "cross_entropy",
        "perplexity",
        *BESIDE_A_BASE,
    ]


@pytest.mark.parametrize(
    "name",
    ["accuracy", "accuracy_per_token", "accuracy_per_byte", "preference_accuracy", "preference_accuracy_per_token"],
)
def test_shares_are_in_percent(name: str) -> None:
    assert total(name, [(1, 1), (0, 1), (1, 1), (0, 1)]) == 50
    assert MEASURES[name].unit == "%"


def test_probability_is_the_mean_share_of_the_correct_choices() -> None:
    assert total("probability", [(0.25, 1), (0.75, 1), (0.8, 1)]) == pytest.approx(60)


def test_texts_are_measured_per_token_and_per_byte_over_the_whole_corpus() -> None:
    """Not as a mean over documents: 30 nats over 12 tokens."""
    assert total("cross_entropy", [(10, 2), (20, 10)]) == 2.5
    assert total("perplexity", [(10, 2), (20, 10)]) == pytest.approx(math.exp(2.5))
    assert total("bits_per_byte", [(10 * math.log(2), 8), (20 * math.log(2), 32)]) == pytest.approx(0.75)


def test_a_perplexity_beyond_floats_is_infinite_and_of_no_tokens_there_is_none() -> None:
    assert total("perplexity", [(1e6, 1)]) == math.inf
    assert math.isnan(total("perplexity", [(0, 0)]))


def test_exact_match_is_character_by_character_with_any_reference() -> None:
    assert value("exact_match", ("18", ["18"]), ("18 ", ["18"]), ("b", ["a", "b"]), ("B", ["b"])) == 50


@pytest.mark.parametrize("name", sorted(set(OF_TEXTS) - {"sari"}))
def test_an_empty_prediction_counts_and_scores_0(name: str) -> None:
    text = "x = self . value ( 1 )"
    assert value(name, ("", [text])) == 0
    assert value(name, ("", [""])) == 0
    assert 30 < value(name, (text, [text]), ("", [text])) < 51  # the brevity penalty of BLEU is more than half


@pytest.mark.parametrize("name", ["exact_match", "rouge_l", "edit_similarity", "code_similarity"])
def test_the_nearest_of_several_references_counts(name: str) -> None:
    assert value(name, ("a cat sat", ["a dog ran off", "a cat sat"])) == pytest.approx(100, abs=1e-5)


# rapidfuzz 3.14.6; fuzzywuzzy's ratio is the nearest whole number.
@pytest.mark.parametrize(
    ("one", "other", "similarity"),
    [("return self.name", "return self.value", 84.84848484848484), ("Straße", "Strasse", 76.92307692307692)],
)
def test_edit_similarity_is_not_rounded(one: str, other: str, similarity: float) -> None:
    assert value("edit_similarity", (one, [other])) == pytest.approx(similarity, abs=1e-9)


def test_codes_are_compared_with_their_literals() -> None:
    assert (
        with_literals("a = <NUM_LIT:1> + <NUM_LIT> ; b = <STR_LIT:x y> <STR_LIT> <CHAR_LIT:\n>")
        == "a = 1 + 0 ; b = x y  \n"
    )
    assert value("code_similarity", ("x = 1", ["x = <NUM_LIT:1>"])) == 100
    assert value("edit_similarity", ("x = 1", ["x = <NUM_LIT:1>"])) < 100
    assert value("code_similarity", ("<STR_LIT>", ["x"])) == 0  # empty once its literals are replaced


# sacrebleu 2.6.0: BLEU().corpus_score(predictions, streams of references).score
OF_SACREBLEU: list[tuple[float, list[tuple[str, list[str]]]]] = [
    (
        55.095453843244776,
        [
            ("The cat sat on the mat.", ["The cat sat on a mat."]),
            ("He left early, at 5.30 p.m.", ["He left at 5.30 p.m."]),
        ],
    ),
    (
        56.73740569387404,
        [
            (
                "It is a guide to action which ensures that the military always obeys the commands of the party",
                [
                    "It is a guide to action that ensures that the military will forever heed Party commands",
                    "It is the guiding principle which guarantees the military forces always being under the command "
                    "of the Party",
                ],
            ),
            (
                "he read the book because he was interested in world history",
                [
                    "he was interested in world history because he read the book",
                    "he read it as the history of the world interested him",
                ],
            ),
        ],
    ),
    (
        57.89300674674101,
        [
            ("", ["something else"]),
            (
                "Über die Straße gehen die Leute nach Hause zurück.",
                ["Über die Strasse gehen die Leute nach Hause zurück."],
            ),
        ],
    ),
    (0.0, [("short", ["a longer reference"])]),
    (75.98356856515926, [("我 支持 这个 对象 的 立场", ["我 支持 这个 对象 的 观点"])]),
]


@pytest.mark.parametrize(("score", "examples"), OF_SACREBLEU)
def test_bleu_from_sums_is_that_of_the_corpus(score: float, examples: list[tuple[str, list[str]]]) -> None:
    assert value("bleu", *examples) == pytest.approx(score, abs=1e-9)


TEXTS = st.text(st.sampled_from("ab <NUM_LIT:1>.ü支\n"), max_size=20)


@pytest.mark.parametrize("name", OF_TEXTS)
@given(
    examples=st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=2)), min_size=1, max_size=3), source=TEXTS
)
@settings(max_examples=30, deadline=None)
def test_scores_of_texts_lie_between_0_and_100(name: str, examples: list[tuple[str, list[str]]], source: str) -> None:
    assert 0 <= value(name, *examples, source=source) <= 100 + 1e-9


@pytest.mark.parametrize("name", ["exact_match", "bleu", "edit_similarity", "code_similarity"])
def test_the_reference_itself_scores_100(name: str) -> None:
    assert value(name, ("the cat sat on the mat .", ["the cat sat on the mat ."])) == pytest.approx(100)
