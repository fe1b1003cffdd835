"""Checks of a run's inputs: its files, its layout, and the memory of its ranks."""

import netrc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from hft_megatron.checkpoint.verification import checkpoint_bytes
from hft_megatron.config import derived
from hft_megatron.config.lora import with_adapters
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import MethodName
from hft_megatron.config.run import RunConfig
from hft_megatron.config.validation import shape_of, validate, validate_plan
from hft_megatron.conversion.load import check_weights
from hft_megatron.costs.memory_fit import verdict
from hft_megatron.costs.rank_memory import MemoryModel, in_bytes, memory_of_run
from hft_megatron.data.tokenizer import fit_tokenizer
from hft_megatron.data.tokenizer_loading import holds_tokenizer, load_tokenizer
from hft_megatron.doctor.findings import Finding, finding_of
from hft_megatron.doctor.machine import device_memory
from hft_megatron.doctor.measurements import checkpoints_at_a_time, space_finding
from hft_megatron.engine.cpu_backend import has_fast_bf16
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.plan_file import load_plans
from hft_megatron.hft.units import units_of
from hft_megatron.methods.registry import METHODS
from hft_megatron.trainer.inputs import read_inputs

WHAT = "memory of a rank"
_ELSE = "use a smaller --seq-length, or see `hft-megatron plan --memory` for larger layouts with recomputation"


def memory_finding(model: MemoryModel, plan: Plan, room: int) -> Finding:
    """Check of a rank's memory: wrong where not even the model, its gradients and its optimizer fit into ``room``
    bytes; a warning where only the longest sequences don't fit, which the data may not have."""
    judged = verdict(model, plan.trains, room)
    memory, batch = judged.memory, model.micro_batch
    value = (
        f"{in_bytes(memory.total)} of {in_bytes(room)}: weights {in_bytes(memory.weights)}, gradients "
        f"{in_bytes(memory.gradients)}, optimizer {in_bytes(memory.optimizer)}, activations and logits of "
        f"{batch.sequences} x {batch.seq_length:,} tokens {in_bytes(memory.activations + memory.logits)}"
    )
    if judged.fits:
        return Finding(what=WHAT, value=value)
    ways = [f"add {proposal.words}" for proposal in judged.options[:1]]
    ways += [f"use {proposal.words}" for proposal in judged.layouts[:1]]
    advice = ", or ".join(ways) or _ELSE
    if memory.before_activations > room:
        return Finding(what=WHAT, value=value, status="wrong", fix=f"It does not fit: {advice}.")
    fix = f"It does not fit for sequences as long as --seq-length: {advice}."
    return Finding(what=WHAT, value=value, status="warning", fix=fix)


Look = tuple[str, Callable[[], Iterator[Finding]]]


@dataclass(kw_only=True)
class RunInputs:
    """Checks the parts of a run one after the other; a part that depends on a wrong one is skipped."""

    method: MethodName
    config: RunConfig
    world_size: int
    has_data: bool
    """False checks the rest as for a run that trains nothing."""
    said: set[str | None]
    """Sentences about errors that were found already, which the check of the whole run would repeat."""
    _shape: ModelShape | None = None
    _model_is_wrong: bool = True
    _tokenizer_is_wrong: bool = False

    def looks(self) -> Iterator[Look]:
        """Checks by name, in order."""
        yield "model", self._look_at_model
        yield "tokenizer", self._look_at_tokenizer
        yield "weights", self._look_at_weights
        yield "run", self._look_at_run
        yield "wandb", self._look_at_wandb

    def _look_at_model(self) -> Iterator[Finding]:
        model = self.config.model

        def look() -> str:
            shape = shape_of(model)
            self._shape = None if shape is None else with_adapters(shape, self.config.lora)
            self._model_is_wrong = False
            return "a LLaMA whose vocabulary is the tokenizer's" if self._shape is None else _in_words(self._shape)

        yield self._noted(finding_of("model", model.load_hf or "from sizes", look))

    def _look_at_tokenizer(self) -> Iterator[Finding]:
        data = self.config.data
        path = data.tokenizer_model or self.config.model.load_hf
        is_wanted = self.has_data or data.tokenizer_model is not None or (path is not None and holds_tokenizer(path))
        if path is None or not is_wanted or self._model_is_wrong:
            return

        def look() -> str:
            assert path is not None
            tokenizer = load_tokenizer(data.tokenizer_type, path, data.chat_template)
            if self._shape is None:
                shape = shape_of(self.config.model, vocab_size=tokenizer.vocab_size)
                assert shape is not None
                self._shape = with_adapters(shape, self.config.lora)
            tokenizer = fit_tokenizer(tokenizer, self._shape.vocab_size)
            return f"{path}: ids up to {tokenizer.vocab_size - 1:,} for {self._shape.vocab_size:,} rows of the model"

        finding = self._noted(finding_of("tokenizer", path, look))
        self._tokenizer_is_wrong = finding.status == "wrong"
        yield finding

    def _look_at_weights(self) -> Iterator[Finding]:
        folder, shape = self.config.model.load_hf, self._shape
        if folder is None or shape is None:
            return

        def look() -> str:
            check_weights(folder, shape)
            return f"{folder}: all {len(units_of(shape.base))} tensors, in the shapes of config.json"

        yield self._noted(finding_of("weights", folder, look))

    def _look_at_run(self) -> Iterator[Finding]:
        """Check of the inputs that a run reads before it builds a model."""
        if self._model_is_wrong:
            return
        config, save = self._readable(), self.config.checkpoint.save
        if not self._tokenizer_is_wrong:
            try:
                validate(config, self._shape, self.world_size, self.method)
                inputs = read_inputs(METHODS[self.method], config, self._shape, self.world_size)
                config = inputs.config
                yield Finding(what="run", value="; ".join(inputs.describe()) or "no data is given")
            except UserError as error:
                if str(error) not in self.said:
                    yield self._noted(Finding(what="run", value=self.method, status="wrong", fix=str(error)))
        if self._shape is None:
            return
        with suppress(UserError):  # about the plan, and reported above
            if self.config.training.train_iters != 0:
                validate_plan(config, self._shape, self.world_size)
                yield self._look_at_memory(config, self._shape)
            if save is not None:
                yield self._look_at_space(config, self._shape, save)

    def _readable(self) -> RunConfig:
        if self.has_data:
            return self.config
        training, optimizer = self.config.training, self.config.optimizer
        if training.train_samples is not None:  # Options that count samples have no meaning with a length of 0.
            training = replace(training, train_samples=None, rampup_batch_size=())
            optimizer = replace(
                optimizer,
                lr_decay_style="constant",
                lr_decay_samples=None,
                lr_wsd_decay_samples=None,
                lr_warmup_samples=0,
            )
        return replace(self.config, training=replace(training, train_iters=0, train_epochs=None), optimizer=optimizer)

    def _look_at_memory(self, config: RunConfig, shape: ModelShape) -> Finding:
        model = memory_of_run(
            config,
            shape,
            self.world_size,
            sequences_per_sample=METHODS[self.method].sequences_per_sample,
            bf16=_takes_bf16(config),
            on_cuda=torch.cuda.is_available(),
        )
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return memory_finding(model, _first_plan(config, shape), device_memory(local_ranks))

    def _look_at_space(self, config: RunConfig, shape: ModelShape, save: str) -> Finding:
        bf16 = _takes_bf16(config)
        length = derived.known_train_iters(config.training)
        kept = checkpoints_at_a_time(config.checkpoint, length) if length is not None and self.has_data else None
        return space_finding(save, checkpoint_bytes(_first_plan(config, shape), config, bf16=bf16), kept)

    def _look_at_wandb(self) -> Iterator[Finding]:
        if self.config.logging.wandb_project is not None:
            yield wandb_finding(os.environ)

    def _noted(self, finding: Finding) -> Finding:
        self.said.add(finding.fix)
        return finding


def wandb_finding(environment: Mapping[str, str]) -> Finding:
    """Check of wandb's login, if it needs one; the key itself is never shown."""
    if environment.get("WANDB_MODE") in ("offline", "disabled"):
        return Finding(what="wandb", value=f"WANDB_MODE is {environment['WANDB_MODE']}")
    if environment.get("WANDB_API_KEY"):
        return Finding(what="wandb", value="WANDB_API_KEY is set")
    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc().authenticators("api.wandb.ai") is not None:
            return Finding(what="wandb", value="logged in by ~/.netrc")
    fix = "--wandb-project will fail without a login: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline."
    return Finding(what="wandb", value="no login found", status="warning", fix=fix)


def _takes_bf16(config: RunConfig) -> bool:
    return has_fast_bf16() if config.training.bf16 is None else config.training.bf16


def _first_plan(config: RunConfig, shape: ModelShape) -> Plan:
    """The first plan; later ones train about as much. Spectrum's scores, which need the weights, don't change the
    amount."""
    if config.hft.hft_plan is not None:
        return load_plans(config.hft.hft_plan, shape)[0]
    scores = dict.fromkeys((unit.name for unit in units_of(shape)), 0.0)
    round = config.hft.hft_first_round or 0
    return make_plan(shape, config.hft, default_seed=config.training.seed, round=round, scores=scores)


def _in_words(shape: ModelShape) -> str:
    parameters = shape.parameter_count()
    return f"a LLaMA of {parameters:,} parameters in {shape.num_layers} layers, {in_bytes(2 * parameters)} in bf16"
