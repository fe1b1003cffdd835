"""Starts the process groups of a run and gives this rank's place in them."""

import gc
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from hft_megatron.config.derived import virtual_pipeline_size
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.engine import cpu_backend
from hft_megatron.errors import UserError
from hft_megatron.parallel.meeting import Meeting, meet

_ENVIRONMENT = {
    # cuBLAS picks its workspace, and so its order of summation, freely unless it is fixed.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # Ring adds in the order of ranks whatever the message size; the tuner would switch algorithms.
    "NCCL_ALGO": "Ring",
}


def make_deterministic() -> None:
    """Makes torch and NCCL deterministic; must run before CUDA and NCCL start. Variables set by the user are kept."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # It would fill every empty tensor, but everything here writes before it reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Place of this rank in the layout. ``virtual_stages`` is 1 without the interleaved schedule."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    virtual_stages: int
    groups: ProcessGroupCollection

    @property
    def coordinates(self) -> str:
        return f"TP {self.tensor_rank}, PP {self.pipeline_rank}, DP {self.data_rank}"

    @property
    def device(self) -> torch.device:
        return torch.device(torch.cuda.current_device())

    @property
    def is_last_rank(self) -> bool:
        """True on the rank that prints and records losses, as in Megatron: it is on the last pipeline stage."""
        return self.rank == self.world_size - 1


def start_backend(parallel: ParallelConfig, meeting: Meeting | None = None) -> None:
    """Joins the default process group, at ``meeting`` or a new one; without CUDA turns the CPU backend on.

    An existing default group is kept. Raises the errors of ``meet``.
    """
    has_cuda = torch.cuda.is_available()
    interleaved = parallel.num_layers_per_virtual_pipeline_stage is not None
    if parallel.distributed_backend == "nccl" and not has_cuda:
        raise UserError(
            "--distributed-backend nccl needs a CUDA device, but torch finds none; use gloo or leave it out."
        )
    if parallel.distributed_backend == "gloo" and has_cuda:
        raise UserError(
            "--distributed-backend gloo lacks collectives for CUDA tensors, but torch finds a CUDA device; use nccl or "
            "leave it out (to run on CPU, set CUDA_VISIBLE_DEVICES= in the environment)."
        )
    if has_cuda:
        local_rank, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= devices:
            raise UserError(
                f"torchrun's --nproc-per-node starts local rank {local_rank}, but this host has {devices} CUDA "
                f"devices; start at most {devices} ranks on it."
            )
        torch.cuda.set_device(local_rank)
    else:
        cpu_backend.activate()
    if not dist.is_initialized():
        meeting = meeting or meet(parallel.distributed_timeout_minutes)
        dist.init_process_group(
            parallel.distributed_backend or ("nccl" if has_cuda else "gloo"),
            store=meeting.store,
            rank=meeting.rank,
            world_size=meeting.world_size,
            timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
            # NCCL then connects its ranks at once, and knows the device of a rank's barrier. Sends and receives that
            # are not batched, those of the interleaved schedule, would then wait for each other in one stream.
            device_id=torch.device("cuda", torch.cuda.current_device()) if has_cuda and not interleaved else None,
        )


def start_groups(parallel: ParallelConfig, num_layers: int, seed: int) -> Placement:
    """Builds megatron-core's groups for this layout and seeds its random states; the default group must exist."""
    virtual = virtual_pipeline_size(parallel, num_layers)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        # gloo twins of the data-parallel groups serve memory-lean gathers, which this trainer does not use.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    return Placement(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        virtual_stages=virtual or 1,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def leave_groups() -> None:
    """Destroys megatron-core's groups and keeps the default group, for another model; every rank calls it."""
    # Destroying a group on one rank breaks a neighbour that is still receiving.
    dist.barrier()
    parallel_state.destroy_model_parallel()
    # destroy_model_parallel only forgets its groups; each would keep its sockets and threads.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def stop_groups() -> None:
    """Destroys megatron-core's groups and the default group, so that the process can end without warnings."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def host_name() -> str:
    """This machine's name, for messages about a rank."""
    return socket.gethostname()
