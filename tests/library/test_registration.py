"""What somebody adds by registration alone works wherever the built-in ones do. Run: pytest tests/library

docs/library.md says how.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hft_megatron import draw_plan
from hft_megatron.cli import main
from hft_megatron.cli.entry import COMMANDS
from hft_megatron.config import names, validation
from hft_megatron.config.corpus import CorpusConfig
from hft_megatron.data import token_cache
from hft_megatron.data.formats import table
from hft_megatron.hft import rules
from hft_megatron.methods import registry
from tests.support.runs import make_inputs, read_metrics, run_method_words, run_sft_words, words_for


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("registrations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


OWN = load("examples/library/registrations.py")
"""What docs/library.md shows."""


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As they were, afterwards."""
    for kind in (names.SelectionName, names.DataFormat, names.MethodName):
        monkeypatch.setattr(kind, "known", list(names.known(kind)))
    tables: tuple[dict[Any, Any], ...] = (
        rules.RULES,
        names.SELECTIONS,
        table.FORMATS,
        COMMANDS,
        registry.DECLARED,
        validation.DATA_RULES,
    )
    saved = [dict(one) for one in tables]
    yield
    for one, before in zip(tables, saved, strict=True):
        one.clear()
        one.update(before)


def run_registered(words: Sequence[str]) -> dict[str, Any]:
    """On a rank, which takes other cases afterwards."""
    OWN.register_rule_and_format()
    try:
        return run_sft_words(words)
    finally:
        del rules.RULES["lower-half"], names.SELECTIONS["lower-half"], table.FORMATS["question"]
        names.known(names.SelectionName).remove("lower-half")
        names.known(names.DataFormat).remove("question")


@pytest.mark.usefixtures("registries")
def test_a_selection_rule_and_a_format_of_ones_own_work_in_help_plan_run_and_library(
    ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    OWN.register_rule_and_format()
    inputs = make_inputs(tmp_path)
    assert main(["sft", "--help-all"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "lower-half}" in said
    assert ", question; default: unset)" in said
    assert main(["plan", "--load-hf", str(inputs / "model"), "--hft-selection", "lower-half", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    words = ["--hft-selection", "lower-half", "--hft-level", "layer"]
    assert main(["plan", "--load-hf", str(inputs / "model"), *words]) == 2
    assert "has no effect with --hft-selection lower-half, which trains the lower half" in capsys.readouterr().err
    drawn = draw_plan(inputs / "model", selection="lower-half")
    assert drawn.digest == planned["digest"]
    rows = [{"q": f"Say {number}", "a": f"{3 * number}"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--train-data-path", tmp_path / "rows.jsonl", "--hft-selection", "lower-half", "--train-iters", 3]
    save = ["--save", tmp_path / "run", "--pipeline-model-parallel-size", 2, "--data-format", "question"]
    ranks(2).run(run_registered, words=words_for(inputs, *options, *save))
    assert read_metrics(tmp_path / "run")[0]["plan digest"] == drawn.short_digest


@pytest.mark.usefixtures("registries")
def test_a_command_of_ones_own_is_in_the_help_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    OWN.register_command()
    assert main(["--help"]) == 0
    assert "count        count to a number" in capsys.readouterr().out
    assert main(["count", "--up-to", "4"]) == 0
    assert capsys.readouterr().out == "0 1 2 3\n"


def run_doubled(words: Sequence[str]) -> dict[str, Any]:
    """On a rank, which takes other cases afterwards."""
    OWN.register_objective()
    try:
        return run_method_words("doubled", words)
    finally:
        del registry.DECLARED["doubled"], validation.DATA_RULES["doubled"]
        names.known(names.MethodName).remove("doubled")


@pytest.mark.usefixtures("registries")
def test_an_objective_of_ones_own_has_a_command_with_options_rules_and_a_run(
    ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    OWN.register_objective()
    inputs = make_inputs(tmp_path)
    assert main(["--help"]) == 0
    assert "doubled      train twice the loss" in capsys.readouterr().out
    assert main(["doubled", "--help"]) == 0
    assert "--train-data-path" in capsys.readouterr().out
    assert main(["doubled", "--load-hf", str(inputs / "model"), "--train-iters", "3"]) == 2
    assert "--train-data-path" in capsys.readouterr().err
    words = words_for(inputs, "--train-iters", 3, "--clip-grad", 0, "--tensor-model-parallel-size", 2)
    [doubled, _] = ranks(2).run(run_doubled, words=words)
    [plain, _] = ranks(2).run(run_sft_words, words=words)
    for name in ("loss", "grad_norm"):
        assert doubled["steps"][0][name] == pytest.approx(2 * plain["steps"][0][name], rel=1e-6)


@pytest.mark.usefixtures("registries")
def test_the_doctor_asks_the_declaration_of_ones_own_method_what_data_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    registry.register(
        registry.Declaration(
            name="doubled",
            summary="train twice the loss",
            groups={"corpus": CorpusConfig},
            rules=(),
            load=OWN.load_doubled,
        )
    )
    assert main(["doctor", "--load-hf", "model", "--data-path", "corpus"]) == 2
    assert "are options of pretrain and doubled only; add --method pretrain" in capsys.readouterr().err
    assert main(["doctor", "--method", "doubled", "--load-hf", "model", "--train-data-path", "data.jsonl"]) == 2
    assert "are not options of doubled; give --data-path." in capsys.readouterr().err


@pytest.mark.usefixtures("registries")
def test_a_parser_of_ones_own_is_asked_again_when_it_changes(tmp_path: Path) -> None:
    """Tokens are kept by what makes them, and a parser is part of that."""
    keys = []
    for text in ('return Completion(prompt=row["q"], completion=row["a"], place=place)', "raise ValueError('no')"):
        file = tmp_path / "registrations.py"
        source = Path("examples/library/registrations.py").read_text()
        file.write_text(source.replace('return Completion(prompt=row["q"], completion=row["a"], place=place)', text))
        own = load(str(file))
        table.FORMATS["question"] = table.Format(keys=("q", "a"), parse=own.parse_question)
        keys.append(token_cache.code_of_data())
    assert keys[0] != keys[1]


@pytest.mark.usefixtures("registries")
def test_a_parser_may_be_anything_that_can_be_called() -> None:
    class Parser:
        def __call__(self, row: Mapping[str, Any], place: str) -> Any:
            return OWN.parse_question(row, place)

    keys = []
    for parse in (OWN.parse_question, partial(OWN.parse_question), Parser(), dict.get):
        table.FORMATS["question"] = table.Format(keys=("q", "a"), parse=parse)
        keys.append(token_cache.code_of_data())
    assert keys[0] == keys[1]
    assert len({key[0] for key in keys}) == 3


@pytest.mark.usefixtures("registries")
def test_the_mistake_of_a_parser_of_ones_own_is_told_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    OWN.register_rule_and_format()
    inputs = make_inputs(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"q": "one", "a": "two"}\n{"q": "three", "a": ""}\n')
    words = [
        "show-data",
        "--tokenizer-model",
        str(inputs / "model"),
        "--train-data-path",
        str(tmp_path / "rows.jsonl"),
    ]
    assert main([str(word) for word in words]) == 2
    assert f"{tmp_path}/rows.jsonl:2: as question the answer `a` is empty." in capsys.readouterr().err
