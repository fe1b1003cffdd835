"""The cases of a table that run in the quick tier: a few that differ much. The others are slow, and run in CI as
well."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], among_quick: Iterable[Any], *, reason: str | None = None) -> list[Any]:
    """All ``cases`` for ``pytest.mark.parametrize``, those that are not ``among_quick`` marked slow, for a ``reason``
    where they take more than ten seconds."""
    slow = pytest.mark.slow if reason is None else pytest.mark.slow(reason=reason)
    names, chosen = list(cases), set(among_quick)
    assert chosen <= set(names), f"no such cases: {chosen - set(names)}"
    return [name if name in chosen else pytest.param(name, marks=slow) for name in names]
