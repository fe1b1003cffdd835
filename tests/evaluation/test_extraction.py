"""Answers out of generated texts. Run: pytest tests/evaluation/test_extraction.py"""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_megatron.errors import UserError
from hft_megatron.evaluation.extraction import RULES, extractor

FOUND = [
    ("whole", " a\n ", " a\n "),
    ("stripped", " a\nb \n", "a\nb"),
    ("first_line", "18\nQuestion: next", "18"),
    ("first_line", "\n18", ""),
    ("first_line", "18", "18"),
    ("first_token", "  B. dovish", "B."),
    ("first_token", " \n", ""),
    ("first_letter", "The answer is (B).", "B"),
    ("first_letter", "B", "B"),
    ("first_letter", "Answer: C. neutral", "C"),
    ("first_letter", "选A因为支持", "A"),
    ("first_letter", "I'm sure it's B2 or BC, no: D!", "D"),
    ("first_letter", "ÄB Bé a b", ""),
    ("last_number", "so 5 + 3 = 8 apples.", "8"),
    ("last_number", "It costs $-1,234.50.", "-1234.5"),
    ("last_number", "12,345,678 in all", "12345678"),
    ("last_number", "1,2,3", "3"),
    ("last_number", "1,0000", "0"),
    ("last_number", "18.00", "18"),
    ("last_number", "100", "100"),
    ("last_number", "007", "7"),
    ("last_number", "-0.0", "0"),
    ("last_number", "10-5", "5"),
    ("last_number", "(2)-5", "5"),
    ("last_number", "is \u22125 degrees", "-5"),
    ("last_number", "0.50 or .75", "0.75"),
    ("last_number", "50%", "50"),
    ("last_number", "none", ""),
    ("final_answer", "6 * 3 = <<6*3=18>>18\n#### 1,800", "1800"),
    ("final_answer", "#### -3.5 and then\n#### 7", "-3.5"),
    ("final_answer", "####18", ""),
    ("boxed", r"so $\boxed{\frac{1}{2}}$, not $\boxed{3$", ""),
    ("boxed", r"\boxed{1} then \boxed {\frac{1}{2}}.", r"\frac{1}{2}"),
    ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    ("boxed", "12", ""),
    ("regex:answer is (.*)", "the answer is 5\nthe answer is 6", "5"),
    ("regex:(?s:.*)answer is (.*)", "the answer is 5\nthe answer is 6", "6"),
    ("regex:[0-9]+", "a 12 b 13", "12"),
    ("regex:(a)|b", "b", ""),
    ("regex:x", "abc", ""),
]


@pytest.mark.parametrize(("rule", "text", "answer"), FOUND)
def test_a_rule_finds_its_answer(rule: str, text: str, answer: str) -> None:
    assert extractor(rule)(text) == answer


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        ("first_line", "18\nQuestion: 1 + 1", "18"),
        (r"regex:(?s)(.*?)(?:Meeting transcripts|\Z)", "A summary.\nMeeting transcripts:\n...", "A summary.\n"),
        (r"regex:(?s)(.*?)(?:Question:|\Z)", "A\nBecause.", "A\nBecause."),
        (r"regex:(?s)(.*?)(?:<EOL>|\Z)", "x = 1 <EOL> y", "x = 1 "),
        (r"regex:(?s)(.*?)(?:Paragraph|\Z)", "Ein Satz.\n\nParagraph:", "Ein Satz.\n\n"),
        (r"regex:(?s)\A.", "A\nBecause.", "A"),  # ScienceQA: the letter, and the reasons
        (r"regex:(?s)\A..(.*)", "A\nBecause.\n", "Because.\n"),
    ],
)
def test_cuts_of_the_trace_benchmark_are_rules(rule: str, text: str, answer: str) -> None:
    assert extractor(rule)(text) == answer


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (
            "last_numbr",
            "extract: last_numbr is not a rule; the nearest of whole, stripped, first_line, first_token, first_letter, "
            "last_number, final_answer, boxed, regex:PATTERN is last_number.",
        ),
        (
            "regex:(a",
            "extract: regex:(a is not a regular expression of Python (missing ), unterminated subpattern at position 0)"
            "; correct it.",
        ),
        ("regex:", "extract: regex: needs a pattern after it, such as regex:answer is (.*)."),
    ],
)
def test_a_rule_that_is_none_is_refused_in_a_sentence(rule: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        extractor(rule)
    assert str(refused.value) == sentence


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_what_it_finds_and_takes_any_text(name: str) -> None:
    assert RULES[name].__doc__

    @given(st.text(st.sampled_from("aB1,.-{}\\ \n支#")))
    @settings(max_examples=50, deadline=None)
    def finds(text: str) -> None:
        answer = RULES[name](text)
        assert len(answer) <= len(text)

    finds()


def test_the_last_number_of_a_gsm8k_answer_is_its_final_answer(shared_data: Path) -> None:
    lines = (shared_data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 1319
    assert [extractor("last_number")(text) for text in answers] == [extractor("final_answer")(text) for text in answers]
    assert all(extractor("final_answer")(text) for text in answers)
