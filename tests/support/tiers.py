"""Which cases of a table run in the quick tier: a few that differ much. The others are slow, and run in CI as well."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], among_quick: Iterable[Any]) -> list[Any]:
    """All ``cases`` for ``pytest.mark.parametrize``, those that are not ``among_quick`` marked slow."""
    names, chosen = list(cases), set(among_quick)
    assert chosen <= set(names), f"no such cases: {chosen - set(names)}"
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]
