"""Alternatives that people use, as trainers that take one step at a time: transformers under DDP, ZeRO-1 and FSDP2, and
megatron-core's own GPTModel. Each starts from the same Hugging Face folder."""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

Job = dict[str, Any]
MicroBatch = dict[str, Tensor]
RATE, DECAY, BETAS, EPS, CLIP = 1e-4, 0.01, (0.9, 0.999), 1e-8, 1.0
"""The product's defaults, and the rate of ``peers.py``."""


def groups_of(parameters: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices decay and vectors don't, as in the product."""
    training = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in training if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in training if p.dim() == 1], "weight_decay": 0.0},
    ]


class Transformers:
    """``LlamaForCausalLM`` with its loss over the trained tokens of the global batch, like Hugging Face's Trainer:
    ranks are averaged, the norm is clipped, and AdamW is torch's default or its fused one."""

    def __init__(self, job: Job) -> None:
        dist.init_process_group("nccl" if job["device"] == "cuda" else "gloo")
        if job["device"] == "cuda":
            torch.cuda.set_device(job["rank"])
        dtype = torch.bfloat16 if job["device"] == "cuda" else torch.float32
        self._device = job["device"]
        self._model = LlamaForCausalLM.from_pretrained(
            Path(job["folder"]) / "model", dtype=dtype, attn_implementation="sdpa"
        ).to(job["device"])
        self._model.train()
        if job["frozen"]:
            trains = set(json.loads((Path(job["folder"]) / "trains.json").read_text(encoding="utf-8")))
            for name, parameter in self._model.named_parameters():
                parameter.requires_grad_(name.removesuffix(".weight") in trains)
        self._wrapped: Any = self._wrap(self._model, job)
        common: dict[str, Any] = {"lr": RATE, "betas": BETAS, "eps": EPS, "fused": True if job["fused"] else None}
        if job["sharding"] == "zero1":
            matrices, vectors = groups_of(self._wrapped.parameters())
            self._optimizer: Any = ZeroRedundancyOptimizer(
                matrices["params"], torch.optim.AdamW, weight_decay=DECAY, **common
            )
            self._optimizer.add_param_group(vectors)
        else:
            self._optimizer = torch.optim.AdamW(groups_of(self._wrapped.parameters()), **common)

    def _wrap(self, model: Any, job: Job) -> Any:
        if job["sharding"] != "fsdp2":
            return DistributedDataParallel(model)
        mesh = init_device_mesh(job["device"], (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def step(self, batch: list[MicroBatch]) -> dict[str, float]:
        """One optimizer step over the micro-batches; returns the ``loss`` of the global batch."""
        counts = torch.tensor([sum(float(one["loss_mask"].sum()) for one in batch)], device=self._device)
        dist.all_reduce(counts)
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for number, one in enumerate(batch):
            with self._without_reduction(is_last=number + 1 == len(batch)):
                logits = self._wrapped(input_ids=one["tokens"], use_cache=False).logits
                labels = one["labels"].masked_fill(one["loss_mask"] == 0, -100)
                loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
                # Both kinds of wrapper average over ranks.
                (loss * dist.get_world_size() / counts[0]).backward()
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_([p for p in self._model.parameters() if p.requires_grad], CLIP)
        self._optimizer.step()
        dist.all_reduce(total)
        return {"loss": float(total / counts[0])}

    def _without_reduction(self, *, is_last: bool) -> Any:
        if isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext() if is_last else self._wrapped.no_sync()
        self._wrapped.set_requires_gradient_sync(is_last)
        return nullcontext()


class Stock:
    """megatron-core's ``GPTModel`` by its local layer specification, with torch's attention like the product (and with
    --sequence-parallel the product's norm), and its own distributed optimizer: the alternative without this
    project."""

    def __init__(self, job: Job) -> None:
        from megatron.core.distributed import DistributedDataParallel as MegatronDDP
        from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

        from hft_megatron.config.model_shape import ModelShape, load_hf_config
        from hft_megatron.config.parallel import ParallelConfig
        from hft_megatron.config.training import TrainingConfig
        from hft_megatron.model.build import transformer_config
        from hft_megatron.model.layers import RMSNorm
        from hft_megatron.model.torch_attention import TorchAttention
        from hft_megatron.parallel.groups import start_backend, start_groups
        from hft_megatron.parallel.step_clock import BACKWARD, FORWARD, StepClock

        folder, parallel = Path(job["folder"]) / "model", ParallelConfig(**job["layout"])
        start_backend(parallel)
        self._shape = shape = ModelShape.from_hf_config(load_hf_config(str(folder)), str(folder))
        self._placement = start_groups(parallel, shape.num_layers, seed=1)
        dtype = torch.bfloat16 if job["device"] == "cuda" else torch.float32
        self._phases = FORWARD, BACKWARD
        self._config = config = transformer_config(shape, parallel, TrainingConfig(), dtype=dtype)
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = TorchAttention
        if parallel.sequence_parallel:  # which megatron-core's norm for machines without Apex refuses
            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
            layers = get_num_layers_to_build(config)
            spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)
        model = GPTModel(
            config,
            spec,
            vocab_size=shape.vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=self._placement.pipeline_rank == 0,
            post_process=self._placement.pipeline_rank + 1 == self._placement.pipeline_size,
            position_embedding_type="rope",
            rotary_base=int(shape.rotary_base),
            share_embeddings_and_output_weights=shape.tie_embeddings,
        ).to(job["device"])
        self._load(model, folder)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self._model = MegatronDDP(config, ddp, model)
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=RATE,
                weight_decay=DECAY,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                adam_eps=EPS,
                clip_grad=CLIP,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
            ),
            [self._model],
            use_gloo_process_groups=False,
        )
        self._clock = StepClock()
        config.timers = self._clock.megatron_timers
        config.grad_scale_func = self._optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads

    @torch.no_grad()
    def _load(self, model: Any, folder: Path) -> None:
        from safetensors.torch import load_file

        weights, shape = load_file(folder / "model.safetensors"), self._shape
        per_group = shape.num_attention_heads // shape.num_query_groups
        numbers = {
            f"decoder.layers.{index}.": f"decoder.layers.{layer.layer_number - 1}."
            for index, layer in enumerate(model.decoder.layers)
        }
        for local_name, parameter in model.named_parameters():
            name = re.sub(r"decoder\.layers\.\d+\.", lambda found: numbers[found[0]], local_name)
            whole = _stock_weight(name, weights, shape.num_query_groups, per_group, shape.kv_channels)
            parameter.copy_(self._shard(whole, parameter, is_gated="linear_fc1" in name))

    def _shard(self, whole: Tensor, parameter: Tensor, *, is_gated: bool) -> Tensor:
        """This tensor-parallel rank's part; of gate and up each where both are in one matrix."""
        if whole.shape == parameter.shape:
            return whole
        rank, size = self._placement.tensor_rank, self._placement.tensor_size
        dim = 0 if whole.size(0) != parameter.size(0) else 1
        parts = whole.chunk(2) if is_gated else (whole,)
        return torch.cat([part.chunk(size, dim)[rank] for part in parts])

    def step(self, batch: list[MicroBatch]) -> dict[str, Any]:
        """One optimizer step over the micro-batches; returns the ``loss`` of the global batch, and ``phases (ms)``."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self._clock.begin()
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        rows, length = batch[0]["tokens"].shape
        reports = get_forward_backward_func()(
            forward_step_func=_stock_forward,
            data_iterator=iter(batch),
            model=[self._model],
            num_microbatches=len(batch),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=False,
        )
        self._optimizer.step()
        # Only the last pipeline stage has reports; tensor-parallel ranks have the same ones.
        total = torch.stack([torch.zeros(2), *(report["sums"].cpu() for report in reports)]).sum(dim=0)
        total = total.to(batch[0]["tokens"].device)
        dist.all_reduce(total)
        sections = self._clock.end().sections
        return {
            "loss": float(total[0] / total[1]),
            "phases (ms)": {name: sections[name] for name in self._phases},
        }


def _stock_forward(batches: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    one = next(batches)
    positions = torch.arange(one["tokens"].size(1), device=one["tokens"].device).expand_as(one["tokens"])
    losses = model(one["tokens"], positions, None, labels=one["labels"])

    def loss_of(losses: Tensor) -> Any:
        total, count = (losses.float() * one["loss_mask"]).sum(), one["loss_mask"].sum()
        return total, count.int(), {"sums": torch.stack([total.detach(), count])}

    return losses, loss_of


def _stock_weight(name: str, weights: dict[str, Tensor], groups: int, per_group: int, channels: int) -> Tensor:
    """A parameter of GPTModel from Hugging Face's: projections of a query group are together, gate above up."""
    outer = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        # On the last of several stages, of a tied model too.
        "output_layer.weight": "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight",
    }
    if name in outer:
        return weights[outer[name]]
    _, _, layer, part = name.split(".", 3)
    of = lambda inner: weights[f"model.layers.{layer}.{inner}.weight"]  # noqa: E731
    if part == "self_attention.linear_qkv.weight":
        query, key, value = (of(f"self_attn.{kind}_proj") for kind in "qkv")
        hidden = query.size(1)
        parts = (
            query.view(groups, per_group * channels, hidden),
            *(one.view(groups, channels, hidden) for one in (key, value)),
        )
        return torch.cat(parts, dim=1).view(-1, hidden)
    if part == "mlp.linear_fc1.weight":
        return torch.cat([of("mlp.gate_proj"), of("mlp.up_proj")])
    inner = {
        "input_layernorm.weight": "input_layernorm",
        "self_attention.linear_proj.weight": "self_attn.o_proj",
        "pre_mlp_layernorm.weight": "post_attention_layernorm",
        "mlp.linear_fc2.weight": "mlp.down_proj",
    }
    return of(inner[part])


TRAINERS: dict[str, Callable[[Job], Any]] = {"transformers": Transformers, "stock": Stock}
