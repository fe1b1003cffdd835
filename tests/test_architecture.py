"""Who may import whom. Run: pytest tests/test_architecture.py

The layers are those of the design: each row imports only rows below it, and parts of one row leave each other alone.
Every file is parsed once, and a test that fails names all offenders with file and line.
"""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "hft_megatron"

ROWS: tuple[frozenset[str], ...] = (
    frozenset({"__main__"}),
    frozenset({"cli"}),
    frozenset({"__init__"}),
    frozenset({"library", "doctor"}),
    frozenset({"methods"}),
    frozenset({"trainer"}),
    frozenset({"report"}),
    frozenset({"evaluation"}),
    frozenset({"checkpoint"}),
    frozenset({"conversion"}),
    frozenset({"optimizer"}),
    frozenset({"costs"}),
    frozenset({"hft"}),
    frozenset({"model", "data", "tracking"}),
    frozenset({"parallel"}),
    frozenset({"engine"}),
    frozenset({"config"}),
    frozenset({"errors"}),
)
"""From the top down."""

PURE = (
    "__init__",
    "config",
    "conversion.merge_inputs",
    "conversion.weight_files",
    "costs",
    "data.formats",
    "data.shown_examples",
    "doctor.findings",
    "errors",
    "evaluation.bootstrap",
    "evaluation.columns",
    "evaluation.comparison",
    "evaluation.examples",
    "evaluation.extraction",
    "evaluation.frontier",
    "evaluation.journal",
    "evaluation.kinds",
    "evaluation.matrix",
    "evaluation.measures",
    "evaluation.prompts",
    "evaluation.results",
    "evaluation.rouge",
    "evaluation.sari",
    "evaluation.task_files",
    "evaluation.task_rows",
    "evaluation.tasks",
    "evaluation.trace",
    "hft.plan",
    "hft.plan_file",
    "hft.rounds",
    "hft.units",
    "library.plans",
    "methods.objectives.registry",
    "methods.registry",
    "model.parameter_names",
    "parallel.launch",
    "report.continual",
    "report.evaluation",
    "report.plan",
    "report.plan_picture",
    "report.plan_text",
    "report.plan_time",
    "report.shown_data",
    "report.tables",
)
"""Modules, or parts, whose imports must not lead to torch or megatron."""
DOORS = {
    "__init__": "Trainer and Hook, on first use",
    "methods.objectives.registry": "what an objective trains with, once a run begins",
    "methods.registry": "what a method trains with, once a run begins",
    "hft.plan": "what a plan does with a model, which somebody has made with torch",
}
"""Pure modules whose functions may import what isn't, and why."""
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
MOST_PARTS_OF_A_RUN = 15
"""Modules that the assembly of a run imports: it is where a newcomer begins to read."""
HEAVY = ("torch", "megatron", "transformer_engine", "apex")

CATCH_EVERYTHING = {
    "cli.boundary": "the edge of the process",
    "data.rust_pipeline": "the tokenizers library raises plain Exception for a broken file",
    "data.tokenizer_export": "whatever transformers raises for a folder, its own files are read all the same",
}
"""The modules that may, and why."""


class Import(NamedTuple):
    """A dotted name that a file imports; ``from a import b`` gives ``a`` and ``a.b``. Lazy ones stand in functions."""

    name: str
    place: str
    lazy: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def own(self) -> str | None:
        """The module of this package that it is, by its name below the package."""
        below = self.name.removeprefix("hft_megatron.")
        return below if below in MODULES else None


@dataclass
class Module:
    """What the tests look at in a file; places are ``cli/entry.py:12``."""

    imports: list[Import]
    relative_imports: list[str]
    broad_handlers: list[str]
    """Where an exception of every kind is caught."""


def parse(path: Path) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(outer)
    }
    for_types_alone = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and isinstance(outer.test, ast.Name) and outer.test.id == "TYPE_CHECKING"
        for inner in ast.walk(outer)
    }
    module = Module([], [], [])
    for node in filter(lambda node: node not in for_types_alone, ast.walk(tree)):
        place = f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            module.imports += [Import(alias.name, place, node in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            module.relative_imports.append(place)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            module.imports += [Import(str(name), place, node in lazy) for name in names]
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type
            if caught is None or (isinstance(caught, ast.Name) and caught.id == "Exception"):
                module.broad_handlers.append(place)
    return module


def modules() -> dict[str, Module]:
    """Every module by its name below the package (``hft.plan``); a folder's __init__ has the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = parse(path)
    return found


MODULES = modules()


def is_pure(name: str) -> bool:
    return any(f"{name}.".startswith(f"{pure}.") for pure in PURE)


def row_of(part: str) -> int:
    (row,) = (number for number, row in enumerate(ROWS) if part in row)
    return row


def shown(offenders: list[str]) -> str:
    return "\n".join(["", *dict.fromkeys(offenders)])


def test_the_package_is_found_and_each_of_its_parts_has_one_row() -> None:
    assert len(MODULES) >= 20
    assert {"cli.entry", "config.run", "hft.plan", "errors"} <= MODULES.keys()
    parts = sorted(part for row in ROWS for part in row)
    assert parts == sorted({name.partition(".")[0] for name in MODULES})


def test_a_module_imports_only_its_own_part_and_rows_below() -> None:
    offenders = []
    for name, module in MODULES.items():
        part = name.partition(".")[0]
        offenders += [f"{place}: a relative import" for place in module.relative_imports]
        for imported in module.imports:
            other = (imported.own or part).partition(".")[0]
            if other != part and row_of(other) <= row_of(part):
                offenders.append(f"{imported.place}: {name} must not import {imported.name}")
    assert not offenders, shown(offenders)


def test_pure_modules_never_reach_torch_or_megatron() -> None:
    reached_from: dict[str, list[str]] = {}
    for name in filter(is_pure, MODULES):
        todo, reached = [name], {name}
        while todo:
            module = MODULES[current := todo.pop()]
            imports = [imported for imported in module.imports if not (imported.lazy and current in DOORS)]
            heavy = [imported for imported in imports if imported.top in HEAVY]
            for imported in heavy:
                reached_from.setdefault(f"{imported.place}: {current} imports {imported.top}", []).append(name)
            if heavy:
                continue  # What lies behind it is reached through torch anyway, and would fill pages.
            # Importing a module also runs the __init__ of every folder above it.
            above = {"__init__", current.partition(".")[0]} & MODULES.keys()
            following = above.union(imported.own for imported in imports if imported.own) - reached
            reached |= following
            todo += following
    offenders = [
        f"{offence}, reached from {', '.join(dict.fromkeys(names))}" for offence, names in reached_from.items()
    ]
    assert not offenders, shown(offenders)


def test_the_command_line_reaches_torch_only_inside_functions() -> None:
    offenders = []
    for name, module in MODULES.items():
        if name.partition(".")[0] not in ("cli", "__main__"):
            continue
        for imported in module.imports:
            own = imported.own
            impure = own and MODULES[own].imports and not (is_pure(own) or own.partition(".")[0] in ("cli", "__init__"))
            if imported.top in HEAVY or (impure and not imported.lazy):
                offenders.append(f"{imported.place}: {name} imports {imported.name}")
    assert not offenders, shown(offenders)


def test_megatron_training_is_never_imported() -> None:
    offenders = []
    for module in MODULES.values():
        for imported in module.imports:
            below = imported.name.split(".")[1:2]
            if imported.top == "megatron" and below not in ([], ["core"]):
                offenders.append(f"{imported.place}: {imported.name}")
    assert not offenders, shown(offenders)


def test_exceptions_of_every_kind_are_caught_only_where_a_reason_is_given() -> None:
    broad = {name: module.broad_handlers for name, module in MODULES.items() if module.broad_handlers}
    offenders = [place for name, places in broad.items() if name not in CATCH_EVERYTHING for place in places]
    offenders += [f"{name} does it no longer" for name in CATCH_EVERYTHING.keys() - broad]
    assert not offenders, shown(offenders)


def test_files_and_functions_can_be_read_in_one_sitting() -> None:
    offenders = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        place = path.relative_to(PACKAGE.parent)
        if len(text.splitlines()) > LONGEST_FILE:
            offenders.append(f"{place} has more than {LONGEST_FILE} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                offenders.append(f"{place}:{node.lineno}: {node.name} has more than {LONGEST_FUNCTION} lines")
    assert not offenders, shown(offenders)


def test_the_assembly_of_a_run_names_few_parts() -> None:
    own = {imported.own for imported in MODULES["trainer.assembly"].imports if imported.own}
    assert len(own) <= MOST_PARTS_OF_A_RUN, sorted(own)
