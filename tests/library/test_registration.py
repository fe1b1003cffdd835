"""What somebody adds by registration alone works wherever the built-in ones do. Run: pytest tests/library

docs/library.md says how.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hft_megatron import draw_plan
from hft_megatron.cli import main
from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.cli.entry import COMMANDS, Command
from hft_megatron.config import names, validation
from hft_megatron.config.corpus import CorpusConfig
from hft_megatron.config.data import DataConfig
from hft_megatron.data.formats import table
from hft_megatron.data.formats.completions import parse_prompt_completion
from hft_megatron.data.formats.table import Record
from hft_megatron.hft import rules
from hft_megatron.hft.policy import Draw, Policy
from hft_megatron.hft.units import Unit
from hft_megatron.methods import registry
from tests.support.runs import make_inputs, read_metrics, run_method_words, run_sft_words, words_for


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


class LowerHalf(rules.SelectionRule):
    """The lower half of the layers, and what stands outside of them."""

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        layers = 1 + max(unit.layer for unit in units if unit.layer is not None)
        return frozenset(unit.name for unit in units if unit.layer is None or unit.layer < layers // 2)


def parse_question(row: Mapping[str, Any], place: str) -> Record:
    return parse_prompt_completion({"prompt": row["q"], "completion": row["a"]}, place)


def register_both() -> None:
    rules.register("lower-half", LowerHalf(), names.Selection(what="trains the lower half", without=("hft_level",)))
    table.register("question", table.Format(keys=("q", "a"), parse=parse_question))


def run_registered(words: Sequence[str]) -> dict[str, Any]:
    """On a rank, which takes other cases afterwards."""
    register_both()
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
    register_both()
    inputs = make_inputs(tmp_path)
    assert main(["sft", "--help"]) == 0
    said = capsys.readouterr().out
    assert "lower-half}" in said
    assert "question}" in "".join(said.split())
    assert main(["plan", "--load-hf", str(inputs / "model"), "--hft-selection", "lower-half", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    words = ["--hft-selection", "lower-half", "--hft-level", "layer"]
    assert main(["plan", "--load-hf", str(inputs / "model"), *words]) == 2
    assert "has no meaning with --hft-selection lower-half, which trains the lower half" in capsys.readouterr().err
    drawn = draw_plan(inputs / "model", selection="lower-half")
    assert drawn.digest == planned["digest"]
    rows = [{"q": f"Say {number}", "a": f"{3 * number}"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--train-data-path", tmp_path / "rows.jsonl", "--hft-selection", "lower-half", "--train-iters", 3]
    save = ["--save", tmp_path / "run", "--pipeline-model-parallel-size", 2, "--data-format", "question"]
    ranks(2).run(run_registered, words=words_for(inputs, *options, *save))
    assert read_metrics(tmp_path / "run")[0]["plan digest"] == drawn.short_digest


@dataclass(frozen=True, kw_only=True)
class CountOptions:
    """What the command takes."""

    up_to: int = 3
    """Where it ends."""


@pytest.mark.usefixtures("registries")
def test_a_command_of_ones_own_is_in_the_help_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def run(options: CountOptions, status: StatusFolder) -> None:
        show(" ".join(map(str, range(options.up_to))))

    COMMANDS["count"] = Command(summary="count to a number", options=CountOptions, run=run)
    assert main(["--help"]) == 0
    assert "count        count to a number" in capsys.readouterr().out
    assert main(["count", "--up-to", "4"]) == 0
    assert capsys.readouterr().out == "0 1 2 3\n"


def load_doubled() -> Any:
    """Twice the next-token loss, as an objective of one's own."""
    from hft_megatron.methods import next_token
    from hft_megatron.methods.sft.data import read_sft_data
    from hft_megatron.trainer.method import Method, Objective

    def forward_step(batches: Iterator[Any], chunk: Any) -> tuple[Any, Any]:
        losses, reduce = next_token.forward_step(batches, chunk)
        return losses, lambda output: reduce(2 * output)

    objective = Objective(loss_name=next_token.LOSS, forward_step=forward_step, measure=next_token.measure)
    return Method(name="doubled", objective=lambda config: objective, read_data=read_sft_data)


def register_doubled() -> None:
    registry.register(
        registry.Declaration(
            name="doubled",
            summary="train twice the loss",
            groups={"data": DataConfig},
            rules=registry.SUPERVISED_RULES,
            load=load_doubled,
        )
    )


def run_doubled(words: Sequence[str]) -> dict[str, Any]:
    """On a rank, which takes other cases afterwards."""
    register_doubled()
    try:
        return run_method_words("doubled", words)
    finally:
        del registry.DECLARED["doubled"], validation.DATA_RULES["doubled"]
        names.known(names.MethodName).remove("doubled")


@pytest.mark.usefixtures("registries")
def test_an_objective_of_ones_own_has_a_command_with_options_rules_and_a_run(
    ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_doubled()
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
            load=load_doubled,
        )
    )
    assert main(["doctor", "--load-hf", "model", "--data-path", "corpus"]) == 2
    assert "are options of pretrain and doubled; add --method pretrain" in capsys.readouterr().err
    assert main(["doctor", "--method", "doubled", "--load-hf", "model", "--train-data-path", "data.jsonl"]) == 2
    assert "are no options of doubled; give --data-path." in capsys.readouterr().err
