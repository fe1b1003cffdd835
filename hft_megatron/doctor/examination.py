"""The order of preflight checks: each rank for itself, then its device, then the ranks together."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from hft_megatron.config.derived import data_parallel_size
from hft_megatron.config.names import MethodName
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.doctor.findings import Diagnosis, Finding, GroupSpeed, RankReport, Row, TimeLimit, merged
from hft_megatron.doctor.machine import device_finding, host_findings, software_findings
from hft_megatron.doctor.measurements import measure_all_reduce, save_folder_finding, speed_findings
from hft_megatron.doctor.run_inputs import RunInputs
from hft_megatron.errors import PeersLost
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.groups import Placement, host_name, start_backend, start_groups, stop_groups

OTHER_RANKS_WAIT_S = 30.0
"""Seconds that a rank which lost the others waits: rank 0, which has lost them too, must report before it ends."""
OTHERS_SPEAK_S = 5.0
"""Seconds that rank 0 waits after its time limit: those of others may end a moment later."""
Show = Callable[[Diagnosis], None]


@dataclass(kw_only=True)
class Examination:
    """One rank's part of ``hft-megatron doctor``."""

    method: MethodName
    config: RunConfig
    world_size: int
    has_model: bool
    has_data: bool
    show: Show
    """Called once, on rank 0."""

    def __post_init__(self) -> None:
        self._rank = int(os.environ["RANK"])
        self._findings: list[Finding] = []
        minutes = self.config.parallel.distributed_timeout_minutes
        self._limit = TimeLimit(seconds=60.0 * minutes, on_expiry=self._give_up)

    def run(self) -> Diagnosis:
        """Runs all checks, shows the report on rank 0 and returns it on every rank; every rank calls it.

        Raises UserError where ranks cannot be placed on devices. Where a check does not return within
        --distributed-timeout-minutes, the findings so far are shown and the process ends.
        """
        for what, look in self._looks():
            with self._limit.of(what):
                for finding in look():
                    self._findings.append(finding)
        try:
            diagnosis = self._look_together()
        except (RuntimeError, PeersLost) as error:
            # torch's errors of process groups and the network, and ours of the launcher's store.
            self._findings.append(_ranks_do_not_meet(_first_line(error)))
            return self._alone(OTHER_RANKS_WAIT_S)
        if self._rank == 0:
            self.show(diagnosis)
        # torchrun ends all ranks as soon as one has failed: rank 0 must report first.
        with self._limit.of("end"):
            dist.barrier()
        stop_groups()
        return diagnosis

    def _looks(self) -> Iterator[tuple[str, Callable[[], Iterator[Finding]]]]:
        yield "software", software_findings
        # Ranks of one host see one machine and one file system.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        yield "machine", host_findings
        if self.config.checkpoint.save is not None:
            yield "save folder", self._look_at_save_folder
        if self.has_model:
            inputs = RunInputs(
                method=self.method,
                config=self.config,
                world_size=self.world_size,
                has_data=self.has_data,
                said={finding.fix for finding in self._findings},
            )
            yield from inputs.looks()

    def _look_at_save_folder(self) -> Iterator[Finding]:
        yield save_folder_finding(self.config, self.world_size)

    def _look_together(self) -> Diagnosis:
        parallel = _without_chunks(self.config.parallel)
        with self._limit.of("process groups"):
            # Longer than the time limit here, which reports more: their own would only end the process.
            start_backend(replace(parallel, distributed_timeout_minutes=parallel.distributed_timeout_minutes + 1))
            placement = start_groups(parallel, num_layers=1, seed=0)
        with self._limit.of("device"):
            self._findings.append(device_finding(placement.device, dist.get_backend()))
        speeds = []
        for kind, group in _groups(placement).items():
            with self._limit.of(f"all-reduce, {kind}"):
                speeds.append(_speed_of(kind, group, placement))
        mine = RankReport(
            rank=self._rank, host=host_name(), findings=tuple(self._findings), speeds=tuple(filter(None, speeds))
        )
        with self._limit.of("gathering"):
            reports = gathered(mine)
        return self._diagnosis(reports, (*merged(reports), *speed_findings(reports)))

    def _diagnosis(self, reports: Sequence[RankReport], rows: Iterable[Row]) -> Diagnosis:
        parallel = self.config.parallel
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        data, hosts = data_parallel_size(parallel, self.world_size), sorted({report.host for report in reports})
        return Diagnosis(
            setting=(
                f"TP {tensor} x PP {pipeline} x DP {data}, world size {self.world_size:,}, on "
                f"{hosts[0] if len(hosts) == 1 else f'{len(hosts)} hosts'}"
            ),
            rows=tuple(rows),
            facts={
                "world_size": self.world_size,
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
                "data_parallel_size": data,
                "hosts": hosts,
            },
        )

    def _alone(self, others_wait_s: float) -> Diagnosis:
        """The findings of this rank alone, when the others cannot be reached: rank 0 shows all of them, others print
        what is wrong and wait, because torchrun ends all ranks as soon as one has failed."""
        mine = [RankReport(rank=self._rank, host=host_name(), findings=tuple(self._findings))]
        diagnosis = self._diagnosis(mine, merged(mine))
        if self._rank == 0:
            self.show(diagnosis)
            return diagnosis
        for finding in self._findings:
            if finding.status == "wrong":
                speaker = f"rank {self._rank} on {host_name()}"
                print(f"{speaker}: {finding.what}: {finding.value}. {finding.fix}", file=sys.stderr, flush=True)
        time.sleep(others_wait_s)
        return diagnosis

    def _give_up(self, what: str) -> None:
        self._findings.append(_does_not_return(what, self._limit.seconds / 60))
        # Rank 0 has a time limit of its own, which may have begun later.
        self._alone(self._limit.seconds)
        if self._rank == 0 and self.world_size > 1:
            # torchrun ends the others as soon as this rank is gone.
            time.sleep(OTHERS_SPEAK_S)


def _does_not_return(what: str, minutes: float) -> Finding:
    fix = (
        "It hangs, or waits for a rank that does: check the output of the other ranks, the network and the disks; "
        "--distributed-timeout-minutes sets the time limit."
    )
    return Finding(what=what, value=f"did not return in {minutes:g} min", status="wrong", fix=fix)


def _ranks_do_not_meet(value: str) -> Finding:
    fix = (
        "The ranks cannot reach each other, or one has died: check the output of the other ranks, and set "
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME where a host has several networks."
    )
    return Finding(what="process groups", value=value, status="wrong", fix=fix)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _without_chunks(parallel: ParallelConfig) -> ParallelConfig:
    """The layout without model chunks, which change no group and depend on a model."""
    return replace(parallel, num_layers_per_virtual_pipeline_stage=None)


def _groups(placement: Placement) -> dict[str, Any]:
    return {"tensor": placement.groups.tp, "pipeline": placement.groups.pp, "data": placement.groups.dp}


def _speed_of(kind: str, group: dist.ProcessGroup, placement: Placement) -> GroupSpeed | None:
    """Speed of a group's all-reduce; None for a group of one rank, which sends nothing. All groups of a kind run at the
    same time, as in training."""
    ranks = tuple(dist.get_process_group_ranks(group))
    dist.barrier()
    if len(ranks) == 1:
        return None
    speed = measure_all_reduce(group, placement.device)
    return GroupSpeed(
        kind=kind,
        ranks=ranks,
        message_bytes=speed.message_bytes,
        seconds=speed.seconds,
        is_right=speed.is_right,
    )
