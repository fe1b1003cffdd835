"""Validation: the objective's measures on all validation data, and on each of its sources where there are several.

Batches hold examples of one source alone. The measures of a source are therefore the same as without other sources, and
those of all sources together are means over all their tokens (or pairs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hft_megatron.data.batches import ValidationSteps
from hft_megatron.parallel.groups import Placement
from hft_megatron.tracking.tracker import of_validation
from hft_megatron.trainer.garbage import collected_around_validation
from hft_megatron.trainer.method import Objective, means_of, run_schedule
from hft_megatron.trainer.run import Reference, Run


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Values of one validation, by the objective's names; empty off the last pipeline stage."""

    together: dict[str, float]
    by_source: Mapping[str, dict[str, float]]
    """Values by the name of the source; empty where there is only one."""

    def metrics(self) -> dict[str, float]:
        """Values by their names in trackers."""
        found = {of_validation(name): value for name, value in self.together.items()}
        for source, measured in self.by_source.items():
            found |= {of_validation(name, source): value for name, value in measured.items()}
        return found


def validate(run: Run) -> Measured:
    """Validates the run's current weights; collective."""
    with collected_around_validation(run.config.training), run.wrapped.gathered_parameters():
        return measure_sources(
            run.validation,
            run.wrapped.chunks,
            run.objective,
            run.reference,
            run.placement,
            iteration=run.state.iteration,
        )


def measure_sources(
    sources: Mapping[str, ValidationSteps],
    chunks: Sequence[torch.nn.Module],
    objective: Objective,
    reference: Reference | None,
    placement: Placement,
    *,
    iteration: int,
) -> Measured:
    """Measures the objective on all batches of the sources (or --eval-iters of each) with ``chunks``, which must hold
    their weights whole; collective. A weighted objective is measured without its weights and without ``reference``."""
    if objective.unweighted is not None:
        objective, reference = objective.unweighted, None
    reports: dict[str, list[dict[str, Tensor]]] = {name: [] for name in sources}
    with torch.no_grad():
        for chunk in chunks:
            chunk.eval()
        for name, source in sources.items():
            for batch in source.steps(iteration):
                if reference is not None:
                    reference.attach(batch)
                reports[name] += run_schedule(objective.forward_step, chunks, batch, forward_only=True)
        for chunk in chunks:
            chunk.train()
    return Measured(
        together=means_of(objective, [report for source in reports.values() for report in source], placement),
        by_source={name: means_of(objective, source, placement) for name, source in reports.items()}
        if len(reports) > 1
        else {},
    )
