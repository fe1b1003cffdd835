"""SARI beside the reference program. Run: pytest tests/evaluation/test_sari.py"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_megatron.evaluation.sari import sari

# 100 * SARIsent(normalize(source), normalize(prediction), list(map(normalize, references))), by metrics/sari/sari.py of
# huggingface/evaluate with sacrebleu 2.6.0. The first is the example of its documentation.
OF_EVALUATE = (
    (
        "About 95 species are currently accepted .",
        "About 95 you now get in .",
        [
            "About 95 species are currently known .",
            "About 95 species are now accepted .",
            "95 species are now accepted .",
        ],
        26.953601953601954,
    ),
    ("The cat perched imposingly on the mat.", "The cat sat on the mat.", ["The cat sat on the mat."], 100.0),
    (
        "The cat perched imposingly on the mat.",
        "The cat perched imposingly on the mat.",
        ["The cat sat on the mat."],
        53.28282828282829,
    ),
    ("The cat perched imposingly on the mat.", "", ["The cat sat on the mat."], 18.174603174603178),
    ("", "A cat.", ["A cat."], 100.0),
    (
        "Die Bundesrätin äusserte sich zurückhaltend über die Massnahmen. Sie werde abwarten, sagte sie.",
        "Die Bundesrätin wartet ab. Sie sagt wenig über die Massnahmen.",
        ["Die Bundesrätin will warten. Über die Massnahmen sagt sie wenig."],
        56.59722222222222,
    ),
    (
        "Am 3.5.2021 stiegen die Preise um 1,5 Prozent.",
        "Die Preise stiegen um 1,5 Prozent.",
        [
            "Die Preise sind gestiegen: um 1,5 Prozent.",
            "Im Mai stiegen die Preise.",
            "Die Preise stiegen im Mai 2021.",
        ],
        54.207246213825165,
    ),
    (
        "这 只 猫 坐 在 垫子 上 。",
        "猫 坐 在 垫子 上 。",
        ["猫 在 垫子 上 。", "这 猫 坐 着 。"],
        48.07539682539683,
    ),
    (
        'He said "no" & left; it\'s over.',
        "He said no.",
        ["He refused and left.", 'He said "no" and left.'],
        35.76388888888889,
    ),
    ("word word word", "word", ["word word", "word"], 81.66666666666667),
)


@pytest.mark.parametrize(("source", "prediction", "references", "score"), OF_EVALUATE)
def test_scores_are_those_of_evaluate(source: str, prediction: str, references: list[str], score: float) -> None:
    assert sari(source, prediction, references) == pytest.approx(score, abs=1e-9)


TEXTS = st.text(st.sampled_from("ab ,.Ü支"), max_size=20)


@given(TEXTS, TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_scores_lie_between_0_and_100(source: str, prediction: str, references: list[str]) -> None:
    assert 0 <= sari(source, prediction, references) <= 100 + 1e-9


@given(st.lists(st.sampled_from("abcdef"), unique=True), TEXTS)
@settings(max_examples=100, deadline=None)
def test_the_only_reference_has_100_where_the_source_has_no_word_twice(source: list[str], reference: str) -> None:
    assert sari(" ".join(source), reference, [reference]) == pytest.approx(100)


def test_a_word_that_is_kept_once_of_twice_is_no_right_deletion_even_in_the_reference() -> None:
    assert sari("a a", "a", ["a"]) == pytest.approx(100 - 100 / 12)
