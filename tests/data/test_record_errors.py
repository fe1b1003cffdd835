"""A problem is told once, with the number of its records and the first two places.

Run: pytest tests/data/test_record_errors.py
"""

import pytest

from hft_megatron.data.record_errors import RecordErrors, RecordRefused
from hft_megatron.errors import UserError


def told(*found: tuple[str, UserError]) -> str:
    errors = RecordErrors()
    for place, error in found:
        errors.add(place, error)
    assert len(errors) == len(found)
    return errors.told()


def test_one_record_is_told_as_it_was_refused() -> None:
    error = UserError("a:1: it is wrong; correct it.")
    assert told(("a:1", error)) == str(error)
    refused = RecordRefused("a:1", "it has {} positions; drop it.", 7)
    assert str(refused) == told(("a:1", refused)) == "a:1: it has 7 positions; drop it."


def test_records_with_one_fault_are_counted_with_two_places_and_the_largest_size() -> None:
    sizes = [("a:1", 7), ("a:4", 9), ("b:2", 8)]
    found = [(place, RecordRefused(place, "it has {} positions; drop it.", size)) for place, size in sizes]
    assert told(*found) == "3 records (a:1, a:4, ...): it has up to 9 positions; drop it."
    assert told(*found[:2]) == "2 records (a:1, a:4): it has up to 9 positions; drop it."


def test_sentences_that_differ_in_numbers_alone_are_one_fault_and_the_first_is_shown() -> None:
    found = [(f"a:{line}", UserError(f"a:{line}: message {line} is {{}}.")) for line in (3, 5, 6)]
    assert told(*found) == "3 records (a:3, a:5, ...), of which the first: message 3 is {}."


def test_the_most_frequent_faults_come_first_and_a_few_are_told() -> None:
    found = [(f"a:{line}", UserError(f"a:{line}: {'x' * (line % 300)}.")) for line in range(1000)]
    found += [("b:1", UserError("b:1: y."))] * 2
    sentences = told(("c:1", UserError("c:1: z.")), *[("d:1", UserError("d:1: z."))] * 9, *found).split(". ")
    assert sentences[0] == "10 records (c:1, d:1, ...): z"
    assert len(sentences) == 9
    assert sentences[-1].endswith("records have other errors.")
    counted = [int(sentence.split()[0].replace(",", "")) for sentence in sentences]
    assert sum(counted) == 1012


def test_no_fault_raises_nothing() -> None:
    errors = RecordErrors()
    errors.raise_if_any()
    errors.add("a:1", UserError("a:1: x."))
    with pytest.raises(UserError, match=r"^a:1: x\.$"):
        errors.raise_if_any()
