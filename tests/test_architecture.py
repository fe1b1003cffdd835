"""Who may import whom. Run: pytest tests/test_architecture.py

The layers are those of the design: each row imports only rows below it, and parts of one row leave each other alone.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hft_megatron"

ROWS: tuple[frozenset[str], ...] = (
    frozenset({"__main__"}),
    frozenset({"cli"}),
    frozenset({"training"}),
    frozenset({"checkpoint", "conversion"}),
    frozenset({"objectives", "optimizer"}),
    frozenset({"hft"}),
    frozenset({"model", "data", "tracking"}),
    frozenset({"parallel"}),
    frozenset({"config"}),
    frozenset({"errors"}),
    frozenset({"__init__"}),
)
"""From the top down."""

PURE = (
    "checkpoint.size",
    "config",
    "data.shown_examples",
    "data.visible_tokens",
    "errors",
    "hft.plan",
    "hft.plan_file",
    "hft.rounds",
    "hft.units",
    "model.parameter_names",
    "optimizer.rank_costs",
    "training.doctor.findings",
)
"""Modules, or parts, whose imports must not lead to torch or megatron."""
HEAVY = ("torch", "megatron", "transformer_engine", "apex")


def modules() -> dict[str, Path]:
    """Name below the package (``hft.plan``) and file of every module; a folder's __init__ has the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, with_lazy: bool = True) -> Iterator[str]:
    """Dotted names that a file imports; ``from a import b`` gives ``a`` and ``a.b``. Lazy ones stand in functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if node in lazy and not with_lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own_imports(path: Path, *, with_lazy: bool = True) -> set[str]:
    """Modules of this package that a file imports, by their name below it."""
    below = {name.removeprefix("hft_megatron.") for name in imports(path, with_lazy=with_lazy)}
    return below & MODULES.keys()


def is_pure(name: str) -> bool:
    return any(f"{name}.".startswith(f"{pure}.") for pure in PURE)


def row_of(part: str) -> int:
    rows = [number for number, row in enumerate(ROWS) if part in row]
    assert len(rows) == 1, f"{part} belongs to no row of the design: add it"
    return rows[0]


def test_the_package_is_found() -> None:
    assert len(MODULES) >= 20
    assert {"cli.entry", "config.schema", "hft.plan", "errors"} <= MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_its_own_part_and_rows_below(name: str) -> None:
    part = name.partition(".")[0]
    for imported in own_imports(MODULES[name]):
        other = imported.partition(".")[0]
        assert other == part or row_of(other) > row_of(part), f"{name} must not import {imported}"


@pytest.mark.parametrize("name", [name for name in MODULES if is_pure(name)])
def test_pure_modules_never_reach_torch_or_megatron(name: str) -> None:
    reached, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current in reached:
            continue
        reached.add(current)
        # Importing a module also runs the __init__ of every folder above it.
        todo += [*own_imports(MODULES[current]), *(f for f in [current.partition(".")[0]] if f in MODULES)]
        heavy = [imported for imported in imports(MODULES[current]) if imported.partition(".")[0] in HEAVY]
        assert not heavy, f"{name} reaches {heavy[0]} through {current}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.partition(".")[0] in ("cli", "__main__")])
def test_the_command_line_reaches_torch_only_inside_functions(name: str) -> None:
    for imported in own_imports(MODULES[name], with_lazy=False):
        allowed = is_pure(imported) or imported.partition(".")[0] in ("cli", "__init__")
        assert allowed, f"{name} imports {imported}"
    assert not [imported for imported in imports(MODULES[name]) if imported.partition(".")[0] in HEAVY]


@pytest.mark.parametrize("name", MODULES)
def test_megatron_training_is_never_imported(name: str) -> None:
    for imported in imports(MODULES[name]):
        top, _, rest = imported.partition(".")
        assert top != "megatron" or rest.partition(".")[0] in ("", "core"), f"{name} imports {imported}"


CATCH_EVERYTHING = {
    "cli.boundary": "the edge of the process",
    "data.huggingface_tokenizer": "the tokenizers library raises plain Exception for a broken file",
}
"""The modules that may, and why."""


def test_exceptions_of_every_kind_are_caught_only_where_a_reason_is_given() -> None:
    broad = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type
                if caught is None or (isinstance(caught, ast.Name) and caught.id == "Exception"):
                    broad.add(name)
    assert broad == CATCH_EVERYTHING.keys()
