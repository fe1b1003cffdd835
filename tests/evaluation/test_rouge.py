"""ROUGE-L beside the package that TRACE calls. Run: pytest tests/evaluation/test_rouge.py"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_megatron.evaluation.rouge import rouge_l

# 100 * Rouge(metrics=["rouge-l"]).get_scores(reference, prediction, avg=True)["rouge-l"]["f"], rouge 1.0.1.
OF_THE_PACKAGE = (
    ("the cat sat on the mat", "the cat lay on the mat", 79.99999950000002),
    (
        "The council approved the budget. It passed unanimously.",
        "It passed unanimously. The council approved the budget.",
        99.9999995,
    ),
    (
        "The motion to approve the minutes carried. Council Bill 120 was read. The vote was five to two.",
        "A bill about water rates was read. The motion carried by a vote of five to two.",
        56.24999950195313,
    ),
    ("a a a b", "a b b b", 99.9999995),
    ("b a c", "a b c d", 57.14285665306124),
    (
        "Die Stadt Zürich baut neue Straßen. Das kostet viel Geld.",
        "Zürich baut Straßen. Das ist teuer und kostet Geld.",
        63.15789423822715,
    ),
    ("我 支持 这个 对象", "我 反对 这个 对象", 74.9999995),
    ("我支持这个对象。", "我支持这个对象。", 99.9999995),
    ("One. . Two", "One.. Three. Two", 66.66666616666667),
    (" leading\nand\ttabs. ", "leading and tabs", 85.7142852244898),
)


@pytest.mark.parametrize(("prediction", "reference", "score"), OF_THE_PACKAGE)
def test_scores_are_those_of_the_package(prediction: str, reference: str, score: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(("prediction", "reference"), [("", "a text"), ("a text", ""), ("...", "a text"), ("", "")])
def test_what_the_package_refuses_as_empty_scores_0(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, reference) == 0


TEXTS = st.text(st.sampled_from("ab . ü\n支"), max_size=30)


@given(TEXTS, TEXTS)
@settings(max_examples=100, deadline=None)
def test_scores_lie_between_0_and_100_and_an_equal_text_has_100(one: str, other: str) -> None:
    assert 0 <= rouge_l(one, other) <= 100
    assert rouge_l(one, one) == (pytest.approx(100, abs=1e-5) if one.strip(".") else 0)
