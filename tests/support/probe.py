"""Observations of a run on a rank, from the live engine while it trains: bits, buffers, bytes, costs and times."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hft_megatron.config.derived import padded_vocab_size
from hft_megatron.costs.rank_costs import CostModel, RankCosts
from hft_megatron.model.parameter_names import chunk_parameters, chunk_places, local_elements
from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.optimizer.wrapping import MARKS
from hft_megatron.trainer.run import Run
from tests.support.runs import Recorder
from tests.support.toy_training import local_weights
from tests.support.wire import sent_bytes

Weights = dict[tuple[str, str], Tensor]


def leftovers(slot: ParameterSlot, run: Run) -> list[str]:
    """Remaining costs of a frozen weight."""
    weight, shards = slot.parameter, run.wrapped.shards
    found = [name for name in MARKS if hasattr(weight, name)]
    found += ["requires_grad"] if weight.requires_grad else []
    found += ["grad"] if weight.grad is not None else []
    if shards.is_stub_optimizer:
        return found
    found += ["a range in the optimizer"] if weight in shards.model_param_group_index_map else []
    buckets = [bucket for buffer in shards.buffers for bucket in buffer.buckets]
    found += ["a bucket"] if any(weight in bucket.params for bucket in buckets) else []
    memory = weight.untyped_storage().data_ptr()
    buffers = [tensor for buffer in shards.buffers for tensor in (buffer.param_data, buffer.grad_data)]
    found += ["a place in a buffer"] if any(memory == b.untyped_storage().data_ptr() for b in buffers) else []
    return found


def padded_rows(slot: ParameterSlot, run: Run) -> Tensor:
    """The rows of a vocabulary matrix on this rank that only pad it."""
    first = run.placement.tensor_rank * slot.parameter.size(0)
    return slot.parameter.detach()[max(0, run.wrapped.modules[0].shape.vocab_size - first) :]


def live_costs(run: Run) -> dict[str, int]:
    """Bytes that this rank holds, from the live tensors."""
    shards = run.wrapped.shards
    # A rank that owns nothing to train has megatron-core's stub, without buffers and groups.
    live = not shards.is_stub_optimizer
    masters = [main for group in shards.shard_fp32_from_float16_groups for main in group] if live else []
    moments = (
        [state[key] for state in shards.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")] if live else []
    )
    parameters = [parameter for module in run.wrapped.modules for parameter in module.parameters()]
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "gradient_bytes": sum(buffer.grad_data.nbytes for buffer in shards.buffers) if live else 0,
        "optimizer_bytes": sum(tensor.nbytes for tensor in [*masters, *moments]),
    }


def cost_model(run: Run) -> CostModel:
    """The cost model of the run's ranks, which only lacks the plan."""
    return CostModel(
        shape=run.wrapped.modules[0].shape,
        parallel=run.config.parallel,
        world_size=run.placement.world_size,
        bf16=run.config.training.bf16 is True,
        fp32_gradients=run.config.training.accumulate_allreduce_grads_in_fp32,
    )


def costs_by_formula(run: Run) -> RankCosts:
    """Bytes that this rank must hold and send in a step."""
    place = run.placement
    return cost_model(run).stage_costs(run.wrapped.plan.trains, place.pipeline_rank)[place.data_rank]


def parameters_by_table(run: Run) -> list[list[tuple[str, int]]]:
    """Names and sizes of this rank's parameters, chunk by chunk, as the table of names has them."""
    place, shape = run.placement, run.wrapped.modules[0].shape
    return [
        [
            (name.local_name, local_elements(name, shape, tensor_size=place.tensor_size, vocab_multiple=1))
            for name in chunk_parameters(chunk, shape)
        ]
        for chunk in chunk_places(shape, run.config.parallel, place.pipeline_rank)
    ]


class Probe(Recorder):
    """A hook that looks at every step and both ends of every round. ``report`` holds its observations, for JSON."""

    def __init__(self) -> None:
        super().__init__(kill_at=None, kill_rank=0)
        self.rounds: list[dict[str, Any]] = []
        self._before: Weights = {}
        self._counts: dict[str, int] = {}
        self._last = (0, 0)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Counts the bytes that megatron-core really sends within the context."""
        with sent_bytes() as self._counts:
            yield

    def _sent(self) -> list[int]:
        now = (self._counts["reduce_scatter"], self._counts["all_gather"])
        since, self._last = [now[0] - self._last[0], now[1] - self._last[1]], now
        return since

    def at_round_start(self, run: Run) -> None:
        super().at_round_start(run)
        self._before = local_weights(run)
        self.rounds.append({"digest": run.wrapped.plan.digest, "steps": []})

    def after_step(self, run: Run, result: Any) -> None:
        super().after_step(run, result)
        self.rounds[-1]["steps"].append(
            {
                "iteration": run.state.iteration,
                "sent": self._sent(),
                "reported": [result.reduce_scatter_bytes, result.all_gather_bytes],
                "times": {**result.times.sections, "other": result.times.other},
                "drawn": float(torch.rand(())),
            }
        )

    def at_round_end(self, run: Run) -> None:
        super().at_round_end(run)
        plan, slots, after = run.wrapped.plan, list(parameter_slots(run.wrapped.modules)), local_weights(run)
        same = {key: torch.equal(before, after[key]) for key, before in self._before.items()}
        frozen = [slot for slot in slots if not plan.trains(slot.unit)]
        trained = [slot for slot in slots if plan.trains(slot.unit)]
        # The few weights of a norm are near 1, where a whole step can be less than half of bf16's.
        moving = [slot for slot in trained if slot.parameter.dim() > 1 or slot.parameter.dtype == torch.float32]
        formula = costs_by_formula(run)
        self.rounds[-1] |= {
            "changed while frozen": [slot.hf_name for slot in frozen if not same[slot.unit, slot.local_name]],
            "unchanged while trained": [slot.hf_name for slot in moving if same[slot.unit, slot.local_name]],
            "leftovers": {slot.hf_name: found for slot in frozen if (found := leftovers(slot, run))},
            "kept gradients": [slot.hf_name for slot in trained if slot.parameter.grad is not None],
            "padding": sum(float(padded_rows(slot, run).abs().sum()) for slot in slots if slot.is_vocab),
            "wire by formula": [formula.reduce_scatter_bytes, formula.all_gather_bytes],
            "held": live_costs(run),
            "reported as held": {
                "trainable_parameters": sum(slot.parameter.numel() for slot in trained),
                "gradient_bytes": run.wrapped.shards.gradient_bytes,
                "optimizer_bytes": run.wrapped.shards.master_bytes + run.wrapped.shards.moment_bytes,
            },
            "held by formula": {name: getattr(formula, name) for name in live_costs(run)},
        }

    def report(self) -> dict[str, Any]:
        run: Run = self.run
        shape = run.wrapped.modules[0].shape
        return {
            # A run that is resumed where a round ends leaves that round without a step.
            "rounds": [seen for seen in self.rounds if seen["steps"]],
            "padded rows": padded_vocab_size(shape, run.placement.tensor_size, 1) - shape.vocab_size,
            "place": [run.placement.tensor_rank, run.placement.pipeline_rank, run.placement.data_rank],
            "table": parameters_by_table(run),
            "parameters": [[(n, p.numel()) for n, p in m.named_parameters()] for m in run.wrapped.modules],
        }
