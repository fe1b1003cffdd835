"""The reference that a run must equal: a plain PyTorch loop over transformers' LLaMA, one example at a time.

It uses none of our code except the parsed options, the plan of each round, and the examples in their order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from hft_megatron.cli.entry import commands
from hft_megatron.config.dpo import DpoConfig
from hft_megatron.config.loading import load_options
from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.names import MethodName
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.data.order import PackedOrder, PackingRule, SampleOrder, SampleStream
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.methods.registry import METHODS
from tests.support.corpora import END


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A single sequence: ``tokens``, ``labels`` (int64) and ``mask`` (bool), each of shape (positions,)."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor


Example = Answer | tuple[Answer, Answer]
"""A sequence, or a pair's chosen and rejected one."""


@dataclass(frozen=True, kw_only=True)
class PlainStep:
    """Results of one step of the reference."""

    loss: float
    grad_norm: float
    learning_rate: float
    zeros: int
    """Number of elements of the trained gradients that are 0."""
    params_norm: float
    """Norm of all weights after the step: masters of trainable ones, frozen ones as they are."""
    rewards: tuple[float, float] | None
    """Mean of the chosen and of the rejected answers, of preference pairs."""
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class PlainRun:
    """All steps, and the state after them."""

    steps: list[PlainStep]
    weights: dict[str, Tensor]
    source: dict[str, Tensor]
    """The weights of the folder."""
    before: dict[str, Tensor]
    """The same in the run's own data type."""
    examples: int
    """Sequences or pairs that were trained on; more than samples where they are packed."""
    updates: dict[str, int]
    """unit -> updates that its moments have seen, of units that have moments."""
    validated: dict[str, tuple[float, int]]
    """Summed loss of the last weights, and its number of tokens (or pairs), by the name of the validation's source."""


def parse(method: MethodName, words: Sequence[str]) -> RunConfig:
    """The options of ``hft-megatron METHOD WORDS``."""
    config: RunConfig = load_options(commands()[method].options, list(words)).as_run
    return config


def plain_run(method: MethodName, words: Sequence[str], cache: str) -> PlainRun:
    """Trains like ``hft-megatron METHOD WORDS``. ``cache`` is a folder for megatron-core's indices of a corpus.

    In bf16 it does the engine's arithmetic: bf16 weights and products, fp32 sums over micro-batches and fp32 masters.
    """
    config = parse(method, words)
    folder, bf16 = str(config.model.load_hf), config.training.bf16 is True
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    valid: dict[str, list[Example]] = {}
    if method == "pretrain":
        samples = _samples_of_corpus(config, cache)
    else:
        samples, valid = samples_of_files(method, config, shape)
    loss_of: Any = partial(token_loss, model)
    if method == "dpo":
        reference = LlamaForCausalLM.from_pretrained(folder, dtype=model.dtype)
        loss_of = partial(_pair_loss, model, reference, config.dpo)
    optimizer = _Optimizer(model, config)
    steps, examples = [], 0
    assert config.training.train_iters is not None
    assert config.training.global_batch_size is not None
    for step in range(config.training.train_iters):
        if step == 0 or _round_of(config, step) != _round_of(config, step - 1):
            number = _round_of(config, step)
            plan = make_plan(shape, config.hft, default_seed=config.training.seed, round=number)
            optimizer.begin_round(plan, is_first=step == 0)
        batch = samples(step)
        examples += sum(map(len, batch))
        total, count, rewards = 0.0, 0, torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(batch), config.training.micro_batch_size):
            model.zero_grad()
            for example in chain(*batch[start : start + config.training.micro_batch_size]):
                loss, weight, reward = loss_of(example)
                loss.backward()
                total, count, rewards = total + loss.item(), count + weight, rewards + reward
            optimizer.accumulate()
        rate = learning_rate(config, step)
        norm, zeros = optimizer.step(count, rate)
        means = (float(rewards[0] / count), float(rewards[1] / count)) if method == "dpo" else None
        steps.append(
            PlainStep(
                loss=total / count,
                grad_norm=norm,
                learning_rate=rate,
                zeros=zeros,
                params_norm=optimizer.params_norm,
                rewards=means,
                plan=plan,
            )
        )
    validated = {}
    with torch.no_grad():
        for name, members in valid.items():
            found = [loss_of(member) for member in members]
            validated[name] = sum(loss.item() for loss, _, _ in found), sum(weight for _, weight, _ in found)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    source = load_file(Path(folder) / "model.safetensors")
    return PlainRun(
        steps=steps,
        weights=weights,
        source=source,
        before=before,
        examples=examples,
        updates=optimizer.updates,
        validated=validated,
    )


def learning_rate(config: RunConfig, update: int) -> float:
    """Megatron's rate of update number ``update`` (from 0): linear from 0 over the warm-up, then a half cosine."""
    options, length = config.optimizer, config.training.train_iters
    assert length is not None
    assert options.lr_decay_style == "cosine"
    if update < options.lr_warmup_iters:
        return options.lr * update / options.lr_warmup_iters
    done = (update - options.lr_warmup_iters) / (length - options.lr_warmup_iters)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def _round_of(config: RunConfig, step: int) -> int:
    interval = config.hft.hft_round_interval
    return 0 if interval == "stage" else step // int(interval)


class _Optimizer:
    """A single AdamW over fp32 masters, whose weights take turns in having gradients."""

    def __init__(self, model: LlamaForCausalLM, config: RunConfig) -> None:
        self._named = {name.removesuffix(".weight"): p for name, p in model.named_parameters()}
        self._masters = {unit: p.detach().float().clone() for unit, p in self._named.items()}
        self._config = config
        options: OptimizerConfig = config.optimizer
        self._adam = torch.optim.AdamW(
            [
                {"params": [m for m in self._masters.values() if m.dim() > 1], "weight_decay": options.weight_decay},
                {"params": [m for m in self._masters.values() if m.dim() == 1], "weight_decay": 0.0},
            ],
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
        )
        self._training: frozenset[str] = frozenset()

    def begin_round(self, plan: Plan, *, is_first: bool) -> None:
        """Carries moments and masters of units that keep training, and keeps those of frozen units where asked for."""
        hft = self._config.hft
        for unit, parameter in self._named.items():
            keeps_training = unit in self._training and plan.trains(unit)
            kept = hft.hft_moments == "carry" and (keeps_training or hft.hft_frozen_moments == "host")
            if not kept and not is_first:
                self._adam.state.pop(self._masters[unit], None)
                self._masters[unit].copy_(parameter.detach().float())
            parameter.requires_grad = plan.trains(unit)
        self._training = plan.training

    def accumulate(self) -> None:
        for unit, parameter in self._named.items():
            if parameter.requires_grad:
                master = self._masters[unit]
                assert parameter.grad is not None
                master.grad = parameter.grad.float() if master.grad is None else master.grad + parameter.grad.float()

    def step(self, count: int, rate: float) -> tuple[float, int]:
        """Updates with the mean over ``count`` tokens or pairs; returns the gradient norm before clipping, and how many
        elements are 0."""
        trained = [self._masters[unit] for unit, p in self._named.items() if p.requires_grad]
        for master in trained:
            assert master.grad is not None
            master.grad /= count
        largest = self._config.optimizer.clip_grad
        norm = float(torch.nn.utils.clip_grad_norm_(trained, largest if largest > 0 else math.inf))
        for group in self._adam.param_groups:
            group["lr"] = rate
        zeros = sum(int((master.grad == 0).sum()) for master in trained if master.grad is not None)
        fraction = self._config.optimizer.mofo_fraction
        before = {} if fraction is None else {unit: master.clone() for unit, master in self._masters.items()}
        self._adam.step()
        if fraction is not None:
            self._take_back(before, fraction, rate)
        self._adam.zero_grad()
        with torch.no_grad():
            for unit, parameter in self._named.items():
                if parameter.requires_grad:
                    parameter.copy_(self._masters[unit])
        return norm, zeros

    def _take_back(self, before: dict[str, Tensor], fraction: float, rate: float) -> None:
        """Undoes weight changes that MoFO's rule excludes, except decay (arXiv 2407.20999, algorithm 1, and its
        authors' code)."""
        for unit, master in self._masters.items():
            if master.dim() > 1 and master.grad is not None:
                size = self._adam.state[master]["exp_avg"].abs()
                threshold = size.flatten().topk(int(size.numel() * fraction)).values[-1]
                decayed = before[unit] * (1 - rate * self._config.optimizer.weight_decay)
                master.copy_(torch.where(size >= threshold, master, decayed))

    @property
    def params_norm(self) -> float:
        weights = [self._masters[unit] if p.requires_grad else p.detach() for unit, p in self._named.items()]
        return math.sqrt(sum(float(weight.double().square().sum()) for weight in weights))

    @property
    def updates(self) -> dict[str, int]:
        states = {unit: self._adam.state.get(master, {}) for unit, master in self._masters.items()}
        return {unit: int(state["step"]) for unit, state in states.items() if "step" in state}


def token_loss(model: LlamaForCausalLM, example: Answer) -> tuple[Tensor, int, Tensor]:
    """Sum over the trained tokens, their number, and no rewards."""
    return -_log_probability(model, example), int(example.mask.sum()), torch.zeros(2)


def _pair_loss(
    model: LlamaForCausalLM, reference: LlamaForCausalLM, options: DpoConfig, pair: tuple[Answer, Answer]
) -> tuple[Tensor, int, Tensor]:
    """Loss of one pair (by the formulas of methods/dpo/objective.py, held against TRL's), 1, and rewards."""
    log_probs = torch.stack([_log_probability(model, answer) for answer in pair])
    with torch.no_grad():
        expected = torch.stack([_log_probability(reference, answer) for answer in pair])
    tokens = torch.tensor([int(answer.mask.sum()) for answer in pair])
    averaged = options.dpo_average_log_probs if options.dpo_average_log_probs is not None else options.dpo_loss == "ipo"
    ratios = (log_probs - expected) / (tokens if averaged else 1)
    beta, epsilon, margin = options.dpo_beta, options.dpo_label_smoothing, ratios[0] - ratios[1]
    loss = {
        "sigmoid": lambda: (1 - epsilon) * _softplus(-beta * margin) + epsilon * _softplus(beta * margin),
        "hinge": lambda: (1 - beta * margin).clamp(min=0),
        "ipo": lambda: (margin - 1 / (2 * beta)) ** 2,
    }[options.dpo_loss]()
    return loss - options.dpo_sft_weight * log_probs[0] / tokens[0], 1, beta * ratios.detach()


_softplus = torch.nn.functional.softplus


def _log_probability(model: LlamaForCausalLM, example: Answer) -> Tensor:
    """Log-probability of the trained labels together, in nats, fp64."""
    logits = model(example.tokens[None]).logits[0].float()
    of_labels = logits.log_softmax(dim=-1).gather(1, example.labels[:, None])[:, 0]
    return of_labels[example.mask].double().sum()


Samples = Callable[[int], list[list[Example]]]
"""Step -> the examples of each of its samples: one, or under packing several."""


def samples_of_files(
    method: MethodName, config: RunConfig, shape: ModelShape
) -> tuple[Samples, dict[str, list[Example]]]:
    """Training samples by the number of the step, and the examples of each source of the validation data."""
    tokenizer = load_tokenizer(None, str(config.model.load_hf), None)
    data: Any = METHODS[method].read_data(config, tokenizer, shape, 1)
    train = data.train
    order: SampleStream = SampleOrder(num_examples=len(train), seed=config.training.seed)
    if config.data.packing:
        room, positions = config.training.seq_length, train.lengths - 1 if method == "sft" else None
        assert room is not None
        if method == "dpo":  # A pair has the room of two sequences.
            room, positions = 2 * room, train.answers.lengths.reshape(-1, 2).sum(axis=1) - 2
        order = PackedOrder(order, positions, PackingRule(capacity=room, algorithm="first_fit_decreasing", window=4096))

    def example(number: int, dataset: Any = train) -> Example:
        if method == "sft":
            return _shifted(*dataset.example(number))
        return _shifted(*dataset.answers.example(2 * number)), _shifted(*dataset.answers.example(2 * number + 1))

    def of_step(step: int) -> list[list[Example]]:
        size = config.training.global_batch_size
        assert size is not None
        return [[example(i) for i in order.sample(at)] for at in range(step * size, (step + 1) * size)]

    valid = {name: [example(number, one) for number in range(len(one))] for name, one in data.valid.items()}
    return of_step, valid


def _shifted(ids: NDArray[Any], trained: NDArray[Any]) -> Answer:
    tokens = torch.from_numpy(ids.astype("int64"))
    return Answer(tokens=tokens[:-1], labels=tokens[1:], mask=torch.from_numpy(trained[1:].copy()))


class _Alone:
    """The tokenizer interface that megatron-core's GPTDataset needs."""

    vocab_size, eod = 334, END
    unique_identifiers = ("alone",)


def _samples_of_corpus(config: RunConfig, cache: str) -> Samples:
    size, iterations = config.training.global_batch_size, config.training.train_iters
    assert size is not None
    assert iterations is not None
    weights, prefixes = config.corpus.data_path[::2], config.corpus.data_path[1::2]
    options = GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.training.seq_length,
        blend=(list(prefixes), [float(weight) for weight in weights]),
        split=f"{config.corpus.split},0",
        path_to_cache=cache,
        tokenizer=_Alone(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.corpus.eod_mask_loss,
        create_attention_mask=False,
    )
    # Here is no process group, and no rank 0 but this one.
    with patch.object(torch.distributed, "get_rank", lambda: 0):
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [iterations * size, 0, 0], lambda: True, options)
        samples = builder.build()[0]

    def examples(number: int) -> list[Example]:
        row = samples[number]
        lengths = [len(row["tokens"])]
        if config.corpus.reset_attention_mask:
            starts = [
                0,
                *(place + 1 for place in range(lengths[0] - 1) if row["tokens"][place] == _Alone.eod),
                *lengths,
            ]
            lengths = [stop - start for start, stop in pairwise(starts)]
        parts = zip(*(row[name].split(lengths) for name in ("tokens", "labels", "loss_mask")), strict=True)
        return [Answer(tokens=tokens, labels=labels, mask=mask.bool()) for tokens, labels, mask in parts]

    return lambda step: [examples(number) for number in range(step * size, (step + 1) * size)]
