"""The plans of some rounds with what they cost on every rank of a layout: what text, JSON and picture show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import ParallelConfig
from hft_megatron.hft.plan import Plan
from hft_megatron.model.parameter_names import chunk_places
from hft_megatron.optimizer.rank_costs import CostModel, RankCosts

StageCosts = tuple[tuple[RankCosts, ...], ...]
"""By pipeline stage, then by data-parallel rank; tensor-parallel ranks are alike."""


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Plans of one model on one layout."""

    plans: tuple[Plan, ...]
    model: CostModel
    by_round: tuple[StageCosts, ...]
    full: StageCosts
    """Of full fine-tuning on the same layout."""

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    @property
    def parallel(self) -> ParallelConfig:
        return self.model.parallel

    def total(self, costs: StageCosts) -> RankCosts:
        """Sum over all ranks, tensor-parallel ones included."""
        nothing = RankCosts(
            trainable_parameters=0, gradient_bytes=0, optimizer_bytes=0, reduce_scatter_bytes=0, all_gather_bytes=0
        )
        replicas = self.parallel.tensor_model_parallel_size
        return sum((rank for stage in costs for rank in stage for _ in range(replicas)), start=nothing)

    def stage_of_layers(self) -> dict[int, int]:
        """Pipeline stage by layer."""
        return {
            layer: stage
            for stage in range(self.parallel.pipeline_model_parallel_size)
            for place in chunk_places(self.shape, self.parallel, stage)
            for layer in range(place.first_layer, place.first_layer + place.layers)
        }


def make_report(plans: Sequence[Plan], model: CostModel) -> PlanReport:
    """Works out the costs of every plan and of full fine-tuning; ``plans`` must fit the model."""

    def all_stages(trains: Callable[[str], bool]) -> StageCosts:
        stages = range(model.parallel.pipeline_model_parallel_size)
        return tuple(model.stage_costs(trains, stage) for stage in stages)

    return PlanReport(
        plans=tuple(plans),
        model=model,
        by_round=tuple(all_stages(plan.trains) for plan in plans),
        full=all_stages(lambda unit: True),
    )
