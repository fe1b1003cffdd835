"""One table of runs, in which every pair of what a run can combine comes at least once; each is asserted for all.

A row is a whole run with its checkpoints and its export, and the same run resumed from the checkpoint in its middle,
there or at another layout. Of both is asserted: losses, norms, rates, rewards and weights are those of plain PyTorch;
what is frozen keeps its bits and costs nothing; bytes on the wire and bytes held are those of the formula; the log has
what was done. Run: pytest tests/trainer/test_run_matrix.py
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain, combinations, groupby, product
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from hft_megatron.config.names import MethodName
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE
from tests.support.checkpoints import largest_differences
from tests.support.corpora import random_documents, write_corpus
from tests.support.models import LAYOUTS, LLAMA3_ROPE, flags
from tests.support.plain_run import PlainRun, PlainStep, plain_run
from tests.support.preferences import write_pairs
from tests.support.probe import Probe
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, read_metrics, run_recorded, write_data

STEPS = 6
BATCH = 8
SEED = 4
"""Under it all rounds of all rows have something to train, and not the same."""
UNEVEN = {"hidden_size": 36, "intermediate_size": 54, "head_dim": 10}
"""No parameter's size is a multiple of 64 or 128, so that every rule of padding shows in the sums of bytes."""
LR = {"sft": 1e-2, "pretrain": 1e-2, "dpo": 5e-3}
"""Much is learned in six steps, yet not all: where a preference loss has come to zero nothing moves any more."""
CLIP = {"sft": 1.9, "pretrain": 1.0, "dpo": 0.3}
"""Near the norms: there are rows where not every step is clipped."""
SLOW = pytest.mark.slow(reason="a row is two whole runs, and their reference")
TOLERANCE = 1e-5
"""Relative, of losses and gradient norms in fp32. The promise is 1e-4."""
LOSS_BF16, NORM_BF16 = 3e-3, 0.1
NEAR_ZERO, NEAR_ZERO_BF16 = 2e-7, 3e-3
"""Of the first step's loss. A preference loss is made of small differences between sums over all tokens of two answers,
and IPO's is the square of one. Measured in bf16: 1.3e-3."""
EPSILON, EPSILON_BF16 = 1e-5, 1e-3
"""Of Adam: large enough that a gradient that is rounding and nothing else moves no weight by a whole step."""
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}
VALID = ("few", "more")
"""Files of validation data, of 5 and of 11 examples or pairs: neither fills its last batch."""
RECOMPUTE = {
    "none": [],
    "full": ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    "selective": ["--recompute-granularity", "selective"],
}
ROUNDS = {
    "one": [],
    "reset": ["--hft-round-interval", "2"],
    "carry": ["--hft-round-interval", "2", "--hft-moments", "carry"],
    "host": ["--hft-round-interval", "2", "--hft-moments", "carry", "--hft-frozen-moments", "host"],
}
APART = ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"]
PREFERENCE_LOSSES = (
    ["--dpo-beta", "0.1", "--dpo-label-smoothing", "0.1"],
    ["--dpo-beta", "0.1"],
    ["--dpo-beta", "0.1", "--dpo-sft-weight", "0.3"],
    ["--dpo-beta", "0.1", "--dpo-average-log-probs"],
    ["--dpo-beta", "0.05", "--dpo-loss", "hinge"],
    ["--dpo-beta", "0.1", "--dpo-loss", "ipo"],
)


def ranks_of(layout: str) -> int:
    sizes = LAYOUTS[layout]
    model = sizes.get("tensor_model_parallel_size", 1) * sizes.get("pipeline_model_parallel_size", 1)
    return {"dp2": 2, "dp4": 4}.get(layout, int(model))


@dataclass(frozen=True)
class Row:
    """One row of the table; the types are all that each column of ``TABLE`` can hold."""

    method: Literal["sft", "pretrain", "dpo-precompute", "dpo-shared", "dpo-model"]
    """With the kind of reference, of preference pairs."""
    layout: Literal["tp1", "tp2", "tp2_sp", "pp2_uneven", "pp2_vpp", "dp2"]
    resumed: Literal["there", "tp1", "tp2_sp", "pp2_vpp", "dp2"]
    """At the same layout, to the last bit, or elsewhere."""
    saved_at: Literal[3, 4]
    """Of 6 iterations: within a round of two, or between two of them."""
    rounds: Literal["one", "reset", "carry", "host"]
    """One for the whole run, or a new one every two iterations with fresh moments, with those of units that continue
    training, or with those of frozen units as well."""
    level: Literal["full", "category", "layer", "model"]
    frozen: Literal["drawn", "stage", "bottom"]
    """Only what is drawn, a whole pipeline stage, or the embedding and the first two layers."""
    overlap: bool
    recompute: Literal["none", "full", "selective"]
    micro: Literal[1, 4]
    """Micro-batches of a step on a rank."""
    packing: bool
    """Several examples in a sequence, or the documents of a corpus' sample, that don't see each other."""
    decay: bool
    clip: bool
    tied: bool
    bf16: bool

    @property
    def command(self) -> MethodName:
        name: Any = self.method.partition("-")[0]
        return name

    @property
    def world_size(self) -> int:
        return ranks_of(self.layout) * (2 if self.overlap and self.layout != "dp2" else 1)

    @property
    def micro_batch_size(self) -> int:
        """The reference takes the same: in bf16 it shows."""
        replicas = 2 if self.layout == "dp2" or self.overlap else 1
        return BATCH // replicas // self.micro

    def layout_words(self) -> list[str]:
        return [
            *flags(LAYOUTS[self.layout] | (OVERLAP if self.overlap else {})),
            *("--micro-batch-size", str(self.micro_batch_size)),
            *(["--no-overlap-p2p-communication"] if self.layout == "pp2_vpp" and self.recompute == "full" else []),
        ]

    def resumed_words(self) -> list[str]:
        """Fewer micro-batches than at the other layout, or more."""
        if self.resumed == "there":
            return self.layout_words()
        return [*flags(LAYOUTS[self.resumed] | (OVERLAP if self.resumed == "dp2" else {})), "--micro-batch-size", "2"]

    @property
    def resumed_world_size(self) -> int:
        return self.world_size if self.resumed == "there" else ranks_of(self.resumed)

    def freeze_words(self) -> list[str]:
        """What is frozen besides the draw."""
        ratio = {"full": ["--hft-ratio", "1"], "none": ["--hft-ratio", "0"]}
        level = ratio.get(self.level) or ["--hft-level", self.level]
        if self.frozen == "drawn":
            return level
        layers, other = range(2), []
        if self.frozen == "stage":
            layers = range(3) if self.layout == "pp2_uneven" else range(0, 4, 2)
        if self.frozen == "stage" and self.tied:  # A tied embedding is frozen on both stages: here the last one.
            layers, other = range(3, 4) if self.layout == "pp2_uneven" else range(1, 4, 2), ["model.norm"]
        patterns = ",".join([*(f"model.layers.{layer}.*" for layer in layers), *other])
        head = ["--hft-freeze-head"] if self.tied else []
        return [*level, "--hft-freeze-embedding", *head, "--hft-freeze", patterns]


Value = tuple[str, Any]
FORBIDDEN: set[frozenset[Value]] = {
    *(frozenset({("frozen", "stage"), ("layout", layout)}) for layout in ("tp1", "tp2", "tp2_sp", "dp2")),
    # The interleaved schedule takes micro-batches two by two.
    frozenset({("layout", "pp2_vpp"), ("micro", 1)}),
    # Overlapped traffic needs two replicas to mean anything, and one rank is the simplest case of all.
    frozenset({("layout", "tp1"), ("overlap", True)}),
    *(frozenset({("layout", name), ("resumed", name)}) for name in ("tp1", "tp2_sp", "pp2_vpp", "dp2")),
    *(frozenset({("level", "full"), ("rounds", name)}) for name in ("reset", "carry", "host")),
    *(frozenset({("level", "full"), ("frozen", name)}) for name in ("stage", "bottom")),
}
"""Pairs of values that no row can have."""


def read_rows(text: str) -> list[Row]:
    """One row per line, below the names of the columns."""
    names, *lines = (line.split() for line in text.strip().splitlines())
    assert names == list(get_type_hints(Row))
    words: dict[str, Any] = {"yes": True, "-": False} | {str(number): number for number in (1, 3, 4)}
    return [Row(*(words.get(word, word) for word in line)) for line in lines]


# A covering array of strength two from a greedy search over random completions; 30 rows are the least for 5 x 6 values.
TABLE = read_rows("""
method         layout     resumed saved_at rounds level    frozen overlap recompute micro packing decay clip tied bf16
sft            tp1        there   3        reset  category drawn  -       none      4     yes     yes   yes  -    -
sft            tp1        tp2_sp  3        carry  category bottom -       full      1     -       -     yes  yes  yes
pretrain       tp1        there   4        host   layer    bottom -       selective 1     yes     -     -    -    -
dpo-precompute tp1        dp2     3        reset  model    bottom -       full      1     -       -     yes  yes  -
dpo-shared     tp1        pp2_vpp 3        reset  category bottom -       selective 1     -       -     yes  yes  -
dpo-model      tp1        dp2     4        one    full     drawn  -       selective 4     -       -     -    yes  -
sft            tp2        pp2_vpp 4        carry  category bottom yes     full      4     yes     -     yes  yes  -
pretrain       tp2        tp1     4        reset  model    bottom -       full      4     -       yes   -    -    -
dpo-precompute tp2        tp2_sp  4        one    full     drawn  yes     selective 1     yes     yes   yes  yes  -
dpo-shared     tp2        there   3        host   layer    drawn  yes     none      4     -       -     -    -    yes
dpo-model      tp2        dp2     3        one    layer    drawn  yes     none      4     -       yes   yes  -    yes
sft            tp2_sp     dp2     3        host   layer    drawn  -       selective 1     -       -     yes  yes  -
pretrain       tp2_sp     tp1     3        host   category bottom yes     full      1     yes     -     yes  -    -
dpo-precompute tp2_sp     tp1     3        reset  category bottom yes     full      4     -       -     -    -    yes
dpo-precompute tp2_sp     pp2_vpp 3        reset  layer    bottom -       none      1     yes     yes   yes  yes  yes
dpo-shared     tp2_sp     tp1     3        one    full     drawn  yes     selective 4     yes     yes   -    yes  -
dpo-model      tp2_sp     there   4        carry  model    drawn  -       full      1     yes     -     -    yes  -
sft            pp2_uneven tp1     4        one    full     drawn  yes     none      1     yes     -     yes  -    yes
pretrain       pp2_uneven tp2_sp  3        carry  model    stage  -       full      1     yes     yes   yes  yes  yes
dpo-precompute pp2_uneven there   3        one    category stage  yes     none      1     -       yes   yes  -    yes
dpo-shared     pp2_uneven dp2     4        host   layer    stage  -       full      1     yes     -     -    -    -
dpo-shared     pp2_uneven dp2     3        host   model    bottom -       selective 4     -       yes   yes  yes  yes
dpo-model      pp2_uneven pp2_vpp 3        reset  category stage  yes     none      4     yes     -     -    -    -
dpo-model      pp2_uneven tp2_sp  4        host   layer    stage  yes     none      4     -       -     yes  yes  -
sft            pp2_vpp    tp2_sp  4        reset  model    stage  -       selective 4     yes     -     -    -    yes
pretrain       pp2_vpp    dp2     3        carry  category stage  yes     none      4     -       -     yes  -    -
dpo-precompute pp2_vpp    dp2     3        host   model    bottom yes     full      4     yes     yes   -    -    -
dpo-shared     pp2_vpp    there   3        one    full     drawn  -       full      4     yes     yes   yes  yes  -
dpo-model      pp2_vpp    tp1     3        carry  layer    stage  yes     selective 4     -       yes   yes  yes  yes
sft            dp2        there   4        reset  model    drawn  yes     selective 1     yes     yes   yes  yes  yes
pretrain       dp2        pp2_vpp 4        one    model    bottom yes     none      1     -       -     -    yes  yes
pretrain       dp2        pp2_vpp 3        one    full     drawn  -       full      4     -       yes   -    -    -
dpo-precompute dp2        tp1     3        carry  model    bottom -       none      4     -       -     yes  yes  yes
dpo-shared     dp2        tp2_sp  3        carry  layer    drawn  yes     none      4     -       -     yes  yes  -
dpo-model      dp2        pp2_vpp 4        host   category bottom yes     selective 4     yes     -     yes  -    -
""")
QUICK = {0, 4, 8, 11, 27, 31}
"""Among them is a tied embedding that trains at both ends of a pipeline."""
ENGINE = {11, 16, 17, 18, 24, 31}
"""What also runs under the other line of megatron-core: several ranks, each method, resumed elsewhere.

With the quick rows they hold every value of every column.
"""
BEYOND = read_rows("""
method     layout  resumed    saved_at rounds level    frozen overlap recompute micro packing decay clip tied bf16
sft        tp2_pp2 pp3_uneven 3        host   category drawn  yes     none      1     -       yes   yes  yes  -
dpo-shared tp2_pp2 there      3        carry  category drawn  -       full      4     yes     yes   yes  yes  yes
pretrain   pp4     tp2_pp2    4        one    none     drawn  -       none      4     -       yes   yes  -    -
sft        pp2_vpp pp4        4        one    none     drawn  -       none      4     -       yes   yes  yes  -
sft        tp2_sp  dp4        3        host   category drawn  yes     full      1     -       yes   yes  -    -
""")
"""Values that no column has: more ranks, up to 8, a checkpoint of even stages resumed at uneven ones, and no layer that
trains, so that ranks in the middle own nothing."""

ROWS = [*TABLE, *BEYOND]


def pairs_of(row: Row) -> set[frozenset[Value]]:
    return set(map(frozenset, combinations(asdict(row).items(), 2)))


def test_the_table_holds_every_possible_pair_of_values_and_a_few_rows_every_value() -> None:
    hints = get_type_hints(Row)
    columns = [
        [(name, value) for value in ((False, True) if kind is bool else get_args(kind))] for name, kind in hints.items()
    ]
    possible = {frozenset(pair) for two in combinations(columns, 2) for pair in product(*two)} - FORBIDDEN
    assert set().union(*map(pairs_of, TABLE)) == possible
    assert set().union(*(asdict(TABLE[number]).items() for number in QUICK | ENGINE)) == {*chain(*columns)}


def test_every_preference_loss_has_a_row_in_fp32_and_the_usual_one_a_quick_row() -> None:
    precise = [number for number, row in enumerate(ROWS) if row.command == "dpo" and not row.bf16]
    assert all(any(preference_loss(number) is loss for number in precise) for loss in PREFERENCE_LOSSES)
    assert any(preference_loss(number) == ["--dpo-beta", "0.1"] for number in QUICK.intersection(precise))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``folders(tied)``: a tiny model with an odd vocabulary, wide heads and scaled RoPE, and data for each method."""
    root = tmp_path_factory.mktemp("matrix")

    @lru_cache
    def make(tied: bool) -> Path:
        rope = {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500.0}}
        folder = make_inputs(root / f"tied-{tied}", "gqa", **UNEVEN, **rope, tie_word_embeddings=tied)
        write_pairs(folder / "pairs.jsonl", 24)
        for number, name in enumerate(VALID):
            write_data(folder / f"{name}.jsonl", 5 + 6 * number)
            write_pairs(folder / f"{name}-pairs.jsonl", 5 + 6 * number, first=40)
        write_corpus(folder / "a", random_documents(80, vocab_size=40))
        write_corpus(folder / "b", random_documents(30, seed=1, vocab_size=40))
        return folder

    return make


def preference_loss(number: int) -> list[str]:
    """Options of a row of preference pairs, which take ``PREFERENCE_LOSSES`` in turn."""
    before = sum(row.command == "dpo" for row in ROWS[:number])
    return PREFERENCE_LOSSES[before % len(PREFERENCE_LOSSES)]


def valid_of(row: Row) -> list[str]:
    """Names of the sources that the row's run validates on after its last step."""
    return {"sft": [*VALID], "dpo": [f"{name}-pairs" for name in VALID], "pretrain": []}[row.command]


def words_of(row: Row, number: int, folder: Path) -> list[str]:
    """Everything but the layout and the folders of the run."""
    data: list[object] = {
        "sft": ["--train-data-path", folder / "data.jsonl", "--seq-length", 96, "--valid-data-path"],
        "dpo": ["--train-data-path", folder / "pairs.jsonl", "--seq-length", 96, "--valid-data-path"],
        "pretrain": ["--data-path", 0.7, folder / "a", 0.3, folder / "b", "--split", "90,10", "--seq-length", 32],
    }[row.command]
    data += [folder / f"{name}.jsonl" for name in valid_of(row)]
    if row.command == "dpo":
        kind = row.method.partition("-")[2]
        data += ["--dpo-reference", kind, *preference_loss(number)]
        data += ["--dpo-reference-cache", folder / "cache"] if kind == "precompute" else []
    words = [*data, "--load-hf", folder / "model", "--train-iters", STEPS, "--global-batch-size", BATCH, "--seed", SEED]
    words += ["--lr", LR[row.command], "--min-lr", 2e-4, "--lr-warmup-iters", 1]
    words += ["--weight-decay", 0.1 if row.decay else 0.0, "--clip-grad", CLIP[row.command] if row.clip else 0.0]
    words += ["--bf16" if row.bf16 else "--no-bf16", "--adam-eps", EPSILON_BF16 if row.bf16 else EPSILON]
    words += [*RECOMPUTE[row.recompute], *ROUNDS[row.rounds], *row.freeze_words()]
    words += (APART if row.command == "pretrain" else ["--packing"]) if row.packing else []
    words += ["--log-params-norm", "--log-num-zeros-in-grad", "--timing-log-level", 2]
    return [str(word) for word in words]


@pytest.mark.slow
def test_what_is_kept_at_a_switch_and_who_shares_a_pack_show_in_the_losses(folders: Any) -> None:
    """Else the rows could not tell one kind of moments from another, or packs from examples."""
    row, folder = TABLE[0], folders(False)
    assert (row.method, row.rounds, row.packing) == ("sft", "reset", True)
    runs = [
        plain_run(row.command, words_of(replace(row, rounds=rounds, packing=packing), 0, folder), "")
        for rounds, packing in (("reset", True), ("carry", True), ("host", True), ("reset", False))
    ]
    losses = [[step.loss for step in run.steps] for run in runs]
    for one, other in combinations(losses, 2):
        assert one != pytest.approx(other, rel=100 * TOLERANCE)
    assert runs[0].examples > 1.5 * runs[3].examples


def marks_of(number: int) -> list[pytest.MarkDecorator]:
    return [*([pytest.mark.engine] if number in ENGINE else []), *([] if number in QUICK else [SLOW])]


def run_row(method: MethodName, words: list[str]) -> dict[str, Any]:
    """On a rank: what ``run_recorded`` returns, and what the probe has seen."""
    probe = Probe()
    with probe.watch():
        values = run_recorded(method, words, probe)
    return {**values, **probe.report()}


@pytest.mark.long(reason="a run of up to four ranks and its resume; the first of a process makes its ranks ready")
@pytest.mark.parametrize(
    ("number", "row"),
    [
        pytest.param(number, row, id=f"{number} {row.method} {row.layout}", marks=marks_of(number))
        for number, row in enumerate(ROWS)
    ],
)
def test_a_run_equals_plain_pytorch_costs_what_the_formula_says_and_resumes_anywhere(
    number: int, row: Row, ranks: RankPools, folders: Any, tmp_path: Path
) -> None:
    folder = folders(row.tied)
    words = words_of(row, number, folder)
    sized = [*words, "--micro-batch-size", str(row.micro_batch_size)]
    expected = plain_run(row.command, sized, str(folder / "indices"))
    check_reference(row, expected)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def run(world_size: int, layout: list[str], save: Path) -> list[dict[str, Any]]:
        kept = ["--save", save, "--load", save, "--save-interval", row.saved_at, "--save-hf", f"{save}-hf"]
        return ranks(world_size).run(run_row, method=row.command, words=[*words, *layout, *map(str, kept)])

    first = run(row.world_size, row.layout_words(), whole)
    check_run(row, first, expected, whole, begun=0, words=row.layout_words())

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / f"iter_{STEPS:07d}")
    (resumed / CHECKPOINT_TRACKER_FILE).write_text(str(row.saved_at))
    second = run(row.resumed_world_size, row.resumed_words(), resumed)
    check_run(row, second, expected, resumed, begun=row.saved_at, words=row.resumed_words())
    if row.resumed == "there":
        check_same_bits(first, second)
    check_same_checkpoint(row, ranks, whole, resumed, expected)


def check_reference(row: Row, expected: PlainRun) -> None:
    """Agreement with it means something: it clips and packs, its rounds differ, it learns more than is tolerated."""
    first, last = expected.steps[0].loss, expected.steps[-1].loss
    loss, near_zero = (LOSS_BF16, NEAR_ZERO_BF16) if row.bf16 else (TOLERANCE, NEAR_ZERO)
    assert first - last > 3 * (loss + near_zero) * first
    assert not row.clip or max(step.grad_norm for step in expected.steps) > CLIP[row.command]
    assert not row.packing or expected.examples > 1.5 * STEPS * BATCH
    assert (len({step.plan.training for step in expected.steps}) > 1) == (row.rounds != "one")


def check_run(
    row: Row, answers: Sequence[dict[str, Any]], expected: PlainRun, save: Path, *, begun: int, words: Sequence[str]
) -> None:
    """Everything that one run shows; ``begun`` is the iteration that it was resumed from, ``words`` its layout."""
    steps = expected.steps[begun:]
    check_learning(row, answers, steps, begins_at=expected.steps[0].loss)
    for answer in answers:
        assert [step["iteration"] for step in answer["steps"]] == list(range(begun + 1, STEPS + 1))
        assert [step["consumed"] for step in answer["steps"]] == [BATCH * i for i in range(begun + 1, STEPS + 1)]
        check_rounds(answer, steps, overlaps="--overlap-param-gather" in words)
        assert answer["table"] == answer["parameters"], "the table of names is the engine's order of registration"
    idle = [answer for answer in answers if not any(seen["held"]["trainable_parameters"] for seen in answer["rounds"])]
    assert idle or begun > 0 or (row.frozen != "stage" and row.layout != "pp4")
    assert json.loads(answers[0]["state"]["unit steps"]) == expected.updates
    check_replicas(answers)
    check_log(row, answers[-1], save, begun, expected)
    check_export(row, expected, Path(f"{save}-hf"))


def check_learning(
    row: Row, answers: Sequence[dict[str, Any]], steps: Sequence[PlainStep], *, begins_at: float
) -> None:
    loss, norm = (LOSS_BF16, NORM_BF16) if row.bf16 else (TOLERANCE, TOLERANCE)
    near_zero = NEAR_ZERO_BF16 if row.bf16 else NEAR_ZERO
    last_stage = [answer for answer in answers if answer["steps"][0]["loss"] is not None]
    assert last_stage
    for answer in answers:
        norms = [step["grad_norm"] for step in answer["steps"]]
        assert norms == pytest.approx([step.grad_norm for step in steps], rel=norm)
        assert [step["lr"] for step in answer["steps"]] == pytest.approx([step.learning_rate for step in steps])
    for answer in last_stage:
        losses = [step["loss"] for step in answer["steps"]]
        assert losses == pytest.approx([step.loss for step in steps], rel=loss, abs=near_zero * begins_at)
        for half, name in enumerate(("rewards/chosen", "rewards/rejected") if row.command == "dpo" else ()):
            seen = [step["measured"][name] for step in answer["steps"]]
            rewards = [step.rewards[half] for step in steps if step.rewards is not None]
            assert seen == pytest.approx(rewards, rel=loss, abs=0.1 * max(map(abs, rewards)) if row.bf16 else 1e-5)


def check_rounds(answer: dict[str, Any], steps: Sequence[PlainStep], *, overlaps: bool) -> None:
    """Bits, leftovers, bytes and times of each round on one rank."""
    digests = [digest for digest, _ in groupby(step.plan.digest for step in steps)]
    assert [seen["digest"] for seen in answer["rounds"]] == digests
    for seen in answer["rounds"]:
        assert seen["changed while frozen"] == []
        assert seen["unchanged while trained"] == []
        assert seen["leftovers"] == {}
        assert seen["kept gradients"] == []
        assert seen["padding"] == 0.0
        assert seen["held"] == seen["held by formula"] == seen["reported as held"]
        for number, step in enumerate(seen["steps"]):
            assert step["sent"] == step["reported"]
            assert step["sent"][0] == seen["wire by formula"][0]
            times, sends = step["times"], step["sent"][0] > 0
            assert min(times[name] for name in ("forward", "backward", "optimizer", "other")) > 0
            assert (times["reduce-scatter wait"] > 0) == sends
            # Overlapped gathers belong to the step that needs them, unless a checkpoint or the probe has forced them.
            if not overlaps or (number > 0 and step["iteration"] not in (4, 5)):
                assert step["sent"][1] == seen["wire by formula"][1]
                assert (times["all-gather wait"] > 0) == sends


def check_replicas(answers: Sequence[dict[str, Any]]) -> None:
    """Data-parallel ranks hold the same weights."""
    weights: dict[tuple[int, ...], dict[str, str]] = {}
    for answer in answers:
        mine = {name: bits for name, bits in answer["state"].items() if name[0].isdecimal()}
        assert mine
        assert weights.setdefault(tuple(answer["place"][:2]), mine) == mine


def check_validation(row: Row, line: dict[str, Any], expected: PlainRun) -> None:
    """The loss on each source is plain PyTorch's, whatever the batches are, and together their mean over all tokens."""
    assert {*expected.validated} == {*valid_of(row)}
    loss, near_zero = (LOSS_BF16, NEAR_ZERO_BF16) if row.bf16 else (TOLERANCE, NEAR_ZERO)
    name = {"sft": "lm loss", "dpo": "preference loss"}[row.command]
    found = [line[f"{name} validation/{source}"] for source in expected.validated]
    sums, counts = zip(*expected.validated.values(), strict=True)
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    assert found == pytest.approx(means, rel=loss, abs=near_zero * expected.steps[0].loss)
    together = sum(value * count for value, count in zip(found, counts, strict=True)) / sum(counts)
    assert line[f"{name} validation"] == pytest.approx(together, rel=1e-12)


def check_log(row: Row, last: dict[str, Any], save: Path, begun: int, expected: PlainRun) -> None:
    lines, steps = read_metrics(save), expected.steps[begun:]
    if valid_of(row):
        check_validation(row, lines.pop(), expected)
    assert [line["iteration"] for line in lines] == list(range(1, STEPS + 1))
    for line, step, plain in zip(lines[begun:], last["steps"], steps, strict=True):
        assert line["grad norm"] == step["grad_norm"]
        assert line["learning rate"] == step["lr"]
        assert line["consumed samples"] == step["consumed"]
        assert {name: line[name] for name in step["measured"]} == step["measured"]
        assert step["loss"] in step["measured"].values()
        assert line["plan digest"] == plain.plan.short_digest
        assert line["trainable params"] == plain.plan.trainable_parameters
        assert line["frozen params"] == plain.plan.frozen_parameters
        assert line["params norm"] == pytest.approx(plain.params_norm, rel=1e-3 if row.bf16 else TOLERANCE)
        padding = (
            last["padded rows"] * UNEVEN["hidden_size"] * len({"model.embed_tokens", "lm_head"} & plain.plan.training)
        )
        assert row.bf16 or line["num zeros"] == plain.zeros + padding
        for section in ("forward time", "backward time", "optimizer time", "all-gather wait", "reduce-scatter wait"):
            fastest, slowest = (line[f"{section}, {which} rank (ms)"] for which in ("fastest", "slowest"))
            assert 0 <= fastest <= line[f"{section} (ms)"] <= slowest


def check_export(row: Row, expected: PlainRun, folder: Path) -> None:
    """The exported weights: bits of what was frozen throughout; of what was trained the distance from the reference, in
    shares of how far that has moved. In bf16 a weight may be rounded the other way, which is all that some moved."""
    exported = load_file(folder / "model.safetensors")
    trained = set().union(*(step.plan.training for step in expected.steps))
    assert exported.keys() == expected.weights.keys()
    rounding, allowed = (2**-7, 0.15) if row.bf16 else (0.0, 1e-4)
    far = {}
    for name, weight in exported.items():
        assert weight.dtype == torch.float32, "as the source has it"
        before, after = expected.before[name].float(), expected.weights[name].float()
        if name.removesuffix(".weight") not in trained:
            assert torch.equal(weight, expected.source[name]), f"{name} was frozen"
            continue
        excess = ((weight - after).abs() - rounding * after.abs()).clamp(min=0).norm()
        if not excess <= allowed * (after - before).norm():
            far[name] = float(excess / (after - before).norm())
    assert not far


def check_same_bits(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> None:
    for whole, resumed in zip(first, second, strict=True):
        assert resumed["steps"] == whole["steps"][-len(resumed["steps"]) :]
        assert resumed["state"] == whole["state"]
        draws = [[step["drawn"] for seen in run["rounds"] for step in seen["steps"]] for run in (whole, resumed)]
        assert draws[1] == draws[0][-len(draws[1]) :], "the probe draws a number after every step"


def check_same_checkpoint(row: Row, ranks: RankPools, whole: Path, resumed: Path, expected: PlainRun) -> None:
    """Weights, masters, moments and what is kept for frozen units, in the last checkpoints of both runs."""
    one, other = (str(save / f"iter_{STEPS:07d}") for save in (whole, resumed))
    [differences] = ranks(1).run(largest_differences, one=one, other=other)
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in differences)
    assert any(name.startswith("optimizer.state.param.") for name in differences) == row.bf16
    kept = expected.updates.keys() - expected.steps[-1].plan.training
    assert any(name.startswith("resting.exp_avg.") for name in differences) == bool(kept)
    allowed = 0.0 if row.resumed == "there" else (0.1 if row.bf16 else 2e-4)
    off = {name: difference for name, difference in differences.items() if difference > allowed}
    assert not off
