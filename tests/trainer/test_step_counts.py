"""What a step costs, counted and not timed: products, operators, host reads, messages, memory and Python.

Full and half fine-tuning on two ranks, with two layers and with four: a cost that grows with layers or with parameters
shows in the difference. Run: pytest tests/trainer/test_step_counts.py
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hft_megatron.costs.rank_memory import MemoryModel, MicroBatch
from hft_megatron.engine.lines import engine_line
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.units import (
    ATTENTION_IN,
    ATTENTION_OUT,
    EMBEDDING_NAME,
    FINAL_NORM_NAME,
    LM_HEAD_NAME,
    MLP_IN,
    MLP_OUT,
)
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.step import train_step
from tests.support.allocations import Allocations
from tests.support.models import make_llama
from tests.support.operator_calls import OperatorCalls
from tests.support.probe import cost_model, costs_by_formula
from tests.support.python_lines import PythonLines
from tests.support.ranks import RankPools
from tests.support.runs import Recorder, make_inputs, run_recorded, words_for
from tests.support.toy_training import GLOBAL_BATCH, TINY, make_run
from tests.support.wire import Messages
from tests.support.work_account import PRODUCTS

RANKS, MICRO_BATCHES = 2, 2
IS_NEWER = engine_line().name == "0.19"
"""megatron-core, which then takes one view more of each gradient and one operator and number more in the norm, and does
not read whether there is any trained token."""
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
SECOND = "model.layers.1."
BOTTOM = {
    "hft_ratio": 1.0,
    "hft_freeze": f"{EMBEDDING_NAME},model.layers.0.*,{SECOND}input_layernorm,{SECOND}self_attn.q_proj",
}
"""The lowest weights that train are keys and values of the second layer: no gradient of their input is needed."""
PLANS: dict[str, dict[str, Any]] = {"full": {"hft_ratio": 1.0}, "half": {"hft_ratio": 0.5}, "bottom frozen": BOTTOM}
DTYPES = ("fp32", "bf16")
FEW, MANY = 2, 4
"""Layers."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The most that a step of two micro-batches may take of something, by what there is of the model."""

    fixed: int
    """Of the step as a whole, its batch, embedding, head and loss."""
    layer: int
    """Of each layer, whatever trains in it."""
    matrix: int
    """Of each trainable matrix, the head's among them: its gradient."""
    norm: int
    """Of each trainable norm: its gradient."""
    shard: int
    """Of each parameter that this rank updates a part of: its norm, and in bf16 the copy back from fp32."""

    def of(self, found: dict[str, Any]) -> int:
        """The limit of one step."""
        model = self.layer * found["layers"] + self.matrix * found["matrices"] + self.norm * found["norms"]
        return int(self.fixed + model + self.shard * found["shards"])


CALLS = {
    "fp32": Limit(fixed=214, layer=164, matrix=2, norm=9, shard=0),
    "bf16": Limit(fixed=230, layer=180, matrix=4, norm=9, shard=1),
}
"""Operators that compute or copy. Both norms of a layer take 16 in a forward pass on a CPU, one each on CUDA. A
matrix's gradient in bf16 is a product and an addition on a CPU, and one kernel otherwise; a norm's is 4, and clears
what the last step has left."""
VIEWS = {
    "fp32": Limit(fixed=110 + IS_NEWER, layer=120, matrix=10 + IS_NEWER, norm=2 + IS_NEWER, shard=3),
    "bf16": Limit(fixed=110 + IS_NEWER, layer=120, matrix=10 + IS_NEWER, norm=2 + IS_NEWER, shard=6 + IS_NEWER),
}
"""Operators without a kernel. megatron-core takes a view, a slice and a detached one of each shard for its gradient,
and in bf16 again for its weight."""
STORAGES = {
    "fp32": Limit(fixed=162 + IS_NEWER, layer=140, matrix=2, norm=6, shard=1),
    "bf16": Limit(fixed=178 + IS_NEWER, layer=156, matrix=4, norm=6, shard=1),
}
"""New memory, of whatever size: a matrix' is what stands for its gradient before autograd, a shard's its norm."""
UPDATE_CALLS = 20 + IS_NEWER
"""Operators from reduced gradients to gathered weights, however many parameters there are: 10 for the norm of all, with
its term of the losses, its sum over ranks and its read; 2 to clip, 4 for two groups (with weight decay and without) of
fused AdamW and their counts of steps, 2 marks for a profiler, and 2 messages. In bf16 one more for each shard, as
``CALLS`` has it."""
UPDATE_BYTES, UPDATE_BYTES_OF_A_SHARD = 28 + 4 * IS_NEWER, 8
"""New memory of the update: numbers of 4 or 8 bytes, and of each shard its norm, twice: one by one and as a vector."""
READS = {**({} if IS_NEWER else {"__bool__": 1}), "item": 1, "__float__": 1}
"""Of a whole step: megatron-core asks whether the global batch has any trained token, the norm of the gradients decides
about clipping, and the mean loss is for the log."""
UPDATE_READS = {"item": 1}
"""The norm."""
CONTROL_BYTES = 4 + 4 + 16
"""Of a step to other ranks besides gradients and weights: the number of trained tokens, the square of the norm, and in
fp64 the loss and its tokens."""
TURNOVER = {"fp32": 4.2, "bf16": 5.4}
"""Bytes of all new memory in a micro-batch over the most that the formula has of them at a time under full fine-tuning:
forward pass, gradients of activations, and in bf16 the fp32 copies of norms and loss."""


def counted(run: Run) -> dict[str, Any]:
    """One step of the run's first batch; what is counted of the update counts for the whole as well."""
    optimizer = run.wrapped.optimizer
    update, updating, made_updating = optimizer.step, OperatorCalls(), Allocations()

    def counted_update() -> Any:
        with updating, made_updating:
            return update()

    with (
        patch.object(optimizer, "step", counted_update),
        Messages() as messages,
        Allocations() as made,
        OperatorCalls() as operators,
    ):
        train_step(run)
    return {
        "products": sum(operators.calls[name] for name in PRODUCTS),
        "attention": [operators.calls[FLASH], operators.calls[f"{FLASH}_backward"]],
        "calls": operators.calls.total(),
        "views": operators.views.total(),
        "reads": operators.reads,
        "update calls": updating.calls.total(),
        "update reads": updating.reads,
        "update bytes": sum(made_updating.sizes),
        "storages": len(made.sizes),
        "bytes": sum(made.sizes),
        "largest": max(made.sizes),
        "sent": messages.bytes,
    }


def run_counted(folder: str, hft: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """A step that comes after another, what the one behind it has otherwise, and the formulas' words for both."""
    training = {"bf16": bf16, "micro_batch_size": GLOBAL_BATCH // RANKS // MICRO_BATCHES}
    hft = dict(hft)
    # Every step clips: whether one does is no matter of cost here.
    run = make_run(folder, {}, ratio=hft.pop("hft_ratio"), training=training, optimizer={"clip_grad": 0.01}, hft=hft)
    train_step(run)
    found, again = counted(run), counted(run)
    batch, plan, shape = run.batches.step(0), run.wrapped.plan, run.wrapped.modules[0].shape
    assert len(batch.micro_batches) == MICRO_BATCHES
    costs, micro_batch = costs_by_formula(run), MicroBatch(sequences=batch.sequences, seq_length=batch.seq_length)
    memory = MemoryModel(
        costs=cost_model(run),
        training=run.config.training,
        micro_batch=micro_batch,
        micro_batches=MICRO_BATCHES,
        on_cuda=False,
    ).stage(lambda unit: True, 0)
    training_units = [unit for unit in plan.units if plan.trains(unit.name)]
    return {
        **found,
        "other in the next step": sorted(name for name in found if found[name] != again[name]),
        "layers": shape.num_layers,
        "matrices": sum(unit.category in MATRICES for unit in training_units),
        "norms": sum(unit.category in ("norm", "final_norm") for unit in training_units),
        "shards": len(run.wrapped.shards.model_param_gbuf_map),
        "gradient buffer": run.wrapped.shards.gradient_bytes,
        "products by rule": products_by_rule(plan, shape.num_layers),
        "frozen matrices": sum(unit.category in MATRICES and not plan.trains(unit.name) for unit in plan.units),
        "sent by formula": (costs.reduce_scatter_bytes + costs.all_gather_bytes) * (RANKS - 1) // RANKS,
        "activations": memory.activations + memory.logits,
        "logits": 4 * micro_batch.tokens * shape.vocab_size,
    }


COUNTED = 3
"""The iteration whose lines are counted: what is made once is there."""
WITH_THE_MODEL = ("model", "engine")
"""Parts of the package whose Python runs for each layer: on a CPU ``engine`` looks at every call of torch."""
HOOKS = ("optimizer/wrapping.py:clear_and_add", "optimizer/wrapping.py:_clear")
"""Functions that autograd calls for each gradient that it has made."""
LINES_OF_HOOKS = 5
"""Theirs for each trainable parameter in two micro-batches: 2 for each gradient, and 3 where a norm's is cleared."""
MATRICES = ("attention", "feed_forward", "lm_head")
"""Categories of units with a product of their own: the embedding is a look-up."""


def products_by_rule(plan: Plan, layers: int) -> list[int]:
    """Matrix products of a step, and attention's kernels forward and backward.

    A matrix has one product forward, one for the gradient of its input where anything below trains, and one for its own
    where it trains.
    """
    flows, products, attention = plan.trains(EMBEDDING_NAME), 0, 0

    def pass_through(*names: str, is_matrix: bool = True) -> None:
        nonlocal flows, products
        if is_matrix:
            products += sum(1 + flows + plan.trains(name) for name in names)
        flows |= any(map(plan.trains, names))

    for layer in range(layers):
        below = f"model.layers.{layer}."
        pass_through(f"{below}input_layernorm", is_matrix=False)
        pass_through(*(below + name for name in ATTENTION_IN))
        attention += flows
        pass_through(below + ATTENTION_OUT)
        pass_through(f"{below}post_attention_layernorm", is_matrix=False)
        pass_through(*(below + name for name in MLP_IN))
        pass_through(below + MLP_OUT)
    pass_through(FINAL_NORM_NAME, is_matrix=False)
    pass_through(LM_HEAD_NAME)
    return [MICRO_BATCHES * count for count in (products, layers, attention)]


Counts = dict[str, list[dict[str, Any]]]
"""By case, what each rank has counted."""


def case(plan: str, dtype: str, layers: int) -> str:
    return f"{plan}, {dtype}, {layers} layers"


PAIRS = [(dtype, layers) for dtype in DTYPES for layers in (FEW, MANY)]
"""Of which both full and half are counted."""
CASES = [*(case(plan, *pair) for plan in ("full", "half") for pair in PAIRS), case("bottom frozen", "fp32", MANY)]


@pytest.fixture(scope="module")
def counts(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Counts:
    folder, found = tmp_path_factory.mktemp("counts"), {}
    for layers in (FEW, MANY):
        model = str(make_llama(folder / str(layers), **TINY, num_hidden_layers=layers))
        for dtype, (plan, hft) in itertools.product(DTYPES, PLANS.items()):
            name = case(plan, dtype, layers)
            if name in CASES:
                found[name] = ranks(RANKS).run(run_counted, folder=model, hft=hft, bf16=dtype == "bf16")
    assert found.keys() == set(CASES)
    return found


def dtype_of(name: str) -> str:
    return name.split(", ")[1]


@pytest.mark.parametrize("name", CASES)
def test_a_step_makes_each_product_of_its_plan_once_and_none_for_a_frozen_matrix(counts: Counts, name: str) -> None:
    for found in counts[name]:
        assert [found["products"], *found["attention"]] == found["products by rule"]


@pytest.mark.parametrize("name", CASES)
def test_operators_and_new_memory_stay_within_what_layers_and_trainable_weights_ask_for(
    counts: Counts, name: str
) -> None:
    for found in counts[name]:
        for kind, limits in (("calls", CALLS), ("views", VIEWS), ("storages", STORAGES)):
            assert found[kind] <= limits[dtype_of(name)].of(found), (kind, found)


@pytest.mark.parametrize("name", CASES)
def test_the_update_takes_no_operator_and_no_buffer_for_each_parameter(counts: Counts, name: str) -> None:
    for found in counts[name]:
        shards = found["shards"]
        assert shards > 0
        assert found["update calls"] <= UPDATE_CALLS + CALLS[dtype_of(name)].shard * shards
        assert found["update bytes"] <= UPDATE_BYTES + UPDATE_BYTES_OF_A_SHARD * shards


@pytest.mark.parametrize("name", CASES)
def test_the_host_reads_a_fixed_few_numbers_in_a_step_and_one_of_them_in_the_update(counts: Counts, name: str) -> None:
    for found in counts[name]:
        assert (found["reads"], found["update reads"]) == (READS, UPDATE_READS)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_sends_half_of_both_buffers_once_and_a_few_numbers(counts: Counts, name: str) -> None:
    for found in counts[name]:
        assert found["sent by formula"] > 0
        assert found["sent"] == {"send": found["sent by formula"], "allreduce_": CONTROL_BYTES}


@pytest.mark.parametrize("name", CASES)
def test_no_new_memory_is_larger_than_the_logits_nor_as_large_as_the_gradient_buffer(counts: Counts, name: str) -> None:
    for found in counts[name]:
        assert found["largest"] <= found["logits"] < found["gradient buffer"]
        assert found["bytes"] <= TURNOVER[dtype_of(name)] * MICRO_BATCHES * found["activations"]


@pytest.mark.parametrize("name", CASES)
def test_the_next_step_of_the_same_batch_counts_the_same(counts: Counts, name: str) -> None:
    for found in counts[name]:
        assert found["other in the next step"] == []


class LinesOfAnIteration(Recorder):
    """Counts from one step's end to the next one's: hooks, and a whole step."""

    def __init__(self) -> None:
        super().__init__(kill_at=None, kill_rank=0)
        self.python = PythonLines()

    def after_step(self, run: Run, result: Any) -> None:
        super().after_step(run, result)
        if run.state.iteration == COUNTED - 1:
            self.python.__enter__()
        elif run.state.iteration == COUNTED:
            self.python.__exit__()


def run_counting_lines(words: list[str]) -> dict[str, Any]:
    """Lines of ours outside the model, by file and function, in one iteration of ``hft-megatron sft``; and the number
    of trainable parameters."""
    recorder = LinesOfAnIteration()
    run_recorded("sft", words, recorder)
    lines = recorder.python.lines
    return {
        "lines": {name: count for name, count in lines.items() if name.split("/")[0] not in WITH_THE_MODEL},
        "parameters": len(recorder.run.wrapped.training_slots),
    }


@pytest.mark.parametrize("plan", ["full", "half"])
def test_outside_the_model_no_line_of_ours_runs_once_for_each_layer_or_parameter(
    ranks: RankPools, tmp_path: Path, plan: str
) -> None:
    few, many = (
        ranks(RANKS).run(
            run_counting_lines,
            words=words_for(
                make_inputs(tmp_path / str(layers), num_hidden_layers=layers, **TINY),
                *("--bf16", "--clip-grad", 0.01, "--train-iters", COUNTED, "--hft-ratio", PLANS[plan]["hft_ratio"]),
            ),
        )
        for layers in (FEW, MANY)
    )
    for small, large in zip(few, many, strict=True):
        less, more = small["lines"], large["lines"]
        assert {"trainer/step.py:train_step", "trainer/hooks.py:_record"} <= more.keys()
        # Which rank was the slowest, and what time is left, may take a line more or less in any iteration.
        grown = {name: count - less.get(name, 0) for name, count in more.items()}
        of_hooks = sum(grown.pop(name) for name in HOOKS)
        assert 0 < of_hooks <= LINES_OF_HOOKS * (large["parameters"] - small["parameters"])
        assert {name: growth for name, growth in grown.items() if growth >= MANY - FEW} == {}


@pytest.mark.parametrize(("dtype", "layers"), PAIRS)
def test_half_makes_fewer_products_by_its_frozen_matrices_sends_less_and_takes_no_more_of_anything(
    counts: Counts, dtype: str, layers: int
) -> None:
    for half, full in zip(*(counts[case(plan, dtype, layers)] for plan in ("half", "full")), strict=True):
        assert half["frozen matrices"] > 0
        assert full["products"] - half["products"] == MICRO_BATCHES * half["frozen matrices"]
        assert half["sent"]["send"] < full["sent"]["send"]
        for kind in ("calls", "views", "update calls", "storages", "bytes", "update bytes"):
            assert half[kind] <= full[kind], kind
        assert half["reads"] == full["reads"]
