"""When a run exports its model in Hugging Face's format: every --save-hf-interval iterations, and at the end."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from hft_megatron.config.export_folder import ExportFolder
from hft_megatron.config.export_rules import best_metric, higher_is_better
from hft_megatron.config.schema import CheckpointConfig
from hft_megatron.conversion.destinations import Destination, FinalExport, IterationExport, NewFolder
from hft_megatron.conversion.export import export_folder
from hft_megatron.conversion.save import Announce, ExportRules
from hft_megatron.errors import RunFailed
from hft_megatron.model.llama import LlamaModel
from hft_megatron.parallel.groups import Placement
from hft_megatron.training.audits import AuditRounds
from hft_megatron.training.hook import Hook
from hft_megatron.training.inputs import Inputs
from hft_megatron.training.run import Run
from hft_megatron.training.step import StepResult


def exports_of(options: CheckpointConfig) -> ExportFolder | None:
    """The --save-hf folder where a run exports during training; None where it exports at the end alone."""
    if options.save_hf is None or options.save_hf_interval is None:
        return None
    metric = best_metric(options)
    return ExportFolder(
        Path(options.save_hf),
        keep=options.save_hf_keep,
        metric=metric,
        higher=metric is not None and higher_is_better(metric),
    )


@dataclass
class Exporter:
    """Exports the model of a run; every rank calls it."""

    options: CheckpointConfig
    inputs: Inputs
    placement: Placement
    announce: Announce
    _said: set[str] = field(default_factory=set)

    def export(self, destination: Destination, chunks: Sequence[LlamaModel], trained: frozenset[str]) -> None:
        """Exports with the newest values of the units ``trained``; RunFailed on all ranks where rank 0 can't write."""
        asked = self.options.save_dtype
        rules = ExportRules(
            source=self.inputs.config.model.load_hf,
            trained=trained,
            adds_template=self.inputs.identity.uses_chat_template or self.inputs.config.data.chat_template is not None,
            save_dtype=None if asked is None else getattr(torch, asked),
            keep_source_tokenizer=self.options.keep_source_tokenizer,
        )
        export_folder(
            destination, chunks, self.inputs.shape, self.placement, rules, self.inputs.tokenizer, self._say_once
        )

    def export_at_end(self, chunks: Sequence[LlamaModel], trained: frozenset[str], iteration: int) -> None:
        """Exports to --save-hf itself, if that is given; not again where a finished run is started again."""
        if self.options.save_hf is None:
            return
        folder = exports_of(self.options)
        is_there = [folder is not None and folder.has_final()]
        dist.broadcast_object_list(is_there, src=0)
        if is_there[0]:
            self.announce(f"> --save-hf {self.options.save_hf} holds the export of iteration {iteration} already")
            return
        destination: Destination = NewFolder(target=Path(self.options.save_hf))
        if folder is not None:
            destination = FinalExport(folder=folder, iteration=iteration)
        self.export(destination, chunks, trained)

    def _say_once(self, line: str) -> None:
        """What is said of every export, such as that its tokenizer files are not the source's, is said of the first."""
        if line not in self._said:
            self._said.add(line)
            self.announce(line)


@dataclass
class ExportModels(Hook):
    """Exports every --save-hf-interval steps, with what was measured on the validation data after that step.

    Before the checkpoint of the same step, so that a run which goes on from a checkpoint lacks no export before it.
    Where one can't be written the run ends after that checkpoint.
    """

    exporter: Exporter
    folder: ExportFolder
    interval: int
    measured: Callable[[Run], Mapping[str, float]] | None
    """Gives what was validated after this step, by name, on every rank, collective; None where nothing is."""
    audit: AuditRounds | None

    def after_step(self, run: Run, result: StepResult) -> None:
        if run.state.iteration % self.interval:
            return
        if self.audit is not None:
            self.audit.verify(run)
        measured = {} if self.measured is None else self.measured(run)
        destination = IterationExport(folder=self.folder, iteration=run.state.iteration, measured=measured)
        trained = run.rounds.trained_until(run.state.round)
        begun = time.perf_counter()
        try:
            with run.wrapped.gathered_parameters():
                self.exporter.export(destination, run.wrapped.modules, trained)
        except RunFailed as failure:
            run.failure = str(failure)
        run.announce(f"  training stood still for {(time.perf_counter() - begun) * 1e3:,.0f} ms")
