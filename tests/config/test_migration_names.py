"""Every name in the tables of docs/migrating.md is answered as the page says.

Run: pytest tests/config/test_migration_names.py
"""

import re
from collections.abc import Iterator
from pathlib import Path

from hft_megatron.config.flags import flags_of, named
from hft_megatron.config.megatron_rows import Row
from hft_megatron.config.run import RunConfig
from tests.support.answered_values import NAMED_VALUES, VALUES

MIGRATING = Path(__file__).parents[2] / "docs/migrating.md"
NOT_OPTIONS = {"llamafactory-cli", "megatron", "swift", "callbacks", "peft-config", "train-dataset"}
"""Commands, and arguments of Python classes that no command line has."""


def migrated() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of the page's option tables, each with the options beside it."""
    text = MIGRATING.read_text(encoding="utf-8").partition("\n## Data")[0]
    for line in text.splitlines():
        if not line.startswith("| ") or "| ours |" in line:
            continue
        theirs, ours, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        spans = re.findall(r"`([^`]*)`", re.sub(r"\((?:[^()]|\([^()]*\))*\)", "", theirs))
        for position, span in enumerate(spans):
            found = re.fullmatch(r"(?:--)?([a-z0-9_-]+)((?:: |=| ).*)?", span)
            # What follows a name with a value is another value of it.
            is_value = not span.startswith("--") and re.search(r"[ =]", spans[0]) is not None and position > 0
            if found and not is_value and found[1].replace("_", "-") not in NOT_OPTIONS:
                yield found[1].replace("_", "-"), tuple(re.findall(r"`--([a-z-]+)", ours))


def test_every_name_of_the_migration_tables_is_answered_with_the_option_beside_it() -> None:
    found = list(migrated())
    assert len(found) > 150
    for name, ours in found:
        meant = named(name, flags_of(RunConfig))
        assert meant is not None, f"--{name} is answered with the nearest name"
        if isinstance(meant, Row) and meant.state == "refused" and ours:
            said = " ".join(meant.refusal(name, [value] if value else []) for value in (*VALUES, *NAMED_VALUES))
            assert any(f"--{option}" in said for option in ours), (name, ours)
