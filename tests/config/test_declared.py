"""What a declaration of an option says. Run: pytest tests/config/test_declared.py"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt

from hft_megatron.config.declared import SAME_RUN, check_bounds, declared
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: Annotated[int, Ge(1), SAME_RUN] | None = None
    share: Annotated[float, Ge(0), Le(1)] = 0.5
    beta: Annotated[float, Ge(0), Lt(1)] = 0.9
    rate: Annotated[float, Gt(0)] = 1.0
    kind: Literal["a", "b"] = "a"
    on: bool = False


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("name", "expected", "allowed", "refused"),
    [
        ("count", "a whole number of at least 1", [1, 7], [0, -1, 1.0, True, "1", None]),
        ("share", "a number between 0 and 1", [0, 1, 0.25], [-0.1, 1.1, float("nan"), float("inf"), True]),
        ("beta", "a number from 0 to below 1", [0, 0.999], [1, 1.0, -1]),
        ("rate", "a number above 0", [1e-9, 5], [0, -1.0, float("inf")]),
        ("kind", "one of a, b", ["a"], ["c", None]),
        ("on", "true or false", [True, False], [0, "true"]),
    ],
)
def test_a_declaration_says_what_its_value_must_be(
    name: str, expected: str, allowed: list[Any], refused: list[Any]
) -> None:
    option = declared(Inner)[name]
    assert option.expected == expected
    assert [value for value in allowed if not option.allows(value)] == []
    assert [value for value in refused if option.allows(value)] == []


def test_numbers_out_of_bounds_are_named_in_groups_within_groups() -> None:
    check_bounds(Outer())
    check_bounds(Outer(inner=Inner(count=3, beta=0.0)))
    for inner, sentence in (
        (Inner(count=0), "--count 0: must be a whole number of at least 1."),
        (Inner(beta=1.0), "--beta 1.0: must be a number from 0 to below 1."),
    ):
        with pytest.raises(UserError) as error:
            check_bounds(Outer(inner=inner))
        assert str(error.value) == sentence


def test_marks_are_found_on_either_side_of_none() -> None:
    assert SAME_RUN in declared(Inner)["count"].marks
    assert SAME_RUN not in declared(Inner)["share"].marks
