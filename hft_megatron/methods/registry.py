"""The methods: each has a command with its options and rules, and gives a run its data and objective.

Declared without torch, so that the command line can check options before it loads anything.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

from hft_megatron.config import corpus, data, dpo, ewc, objectives, valid_sources
from hft_megatron.config.corpus import CorpusConfig
from hft_megatron.config.data import DataConfig
from hft_megatron.config.dpo import DpoConfig
from hft_megatron.config.exports import BEST_METRICS, best_is_measured_by
from hft_megatron.config.names import MethodName, add
from hft_megatron.config.objectives import ObjectivesConfig
from hft_megatron.config.validation import DATA_RULES, Rule
from hft_megatron.methods.objectives.registry import chosen, objective_fits_the_run, objective_of

if TYPE_CHECKING:
    from hft_megatron.trainer.method import Method


@dataclass(frozen=True, kw_only=True, eq=False)
class Declaration:
    """Declaration of a method, before torch is imported."""

    name: MethodName
    """Name of its command, and of the method in a file of --stages."""
    summary: str
    """Description of the command, in a line."""
    groups: Mapping[str, type]
    """Groups of its own options, by name: a group of a run, or for one of that name a class with some of its fields."""
    rules: tuple[Rule, ...]
    """Rules for its data and its own options."""
    first: tuple[str, ...] = ()
    """Names of options that --help shows beside those of every run, the data above all; without any it shows all."""
    measures: Mapping[str, bool] = field(default_factory=dict)
    """Validation metrics that --save-hf-best can use: names of the log, and whether higher is better."""
    load: "Callable[[], Method]"
    """Imports its code."""


DECLARED: dict[MethodName, Declaration] = {}
"""Declared methods by name."""


def register(declaration: Declaration) -> None:
    """Adds a method: its command, its options and its rules."""
    add(MethodName, declaration.name)
    DECLARED[declaration.name] = declaration
    BEST_METRICS[declaration.name] = declaration.measures
    DATA_RULES[declaration.name] = (*declaration.rules, best_is_measured_by(declaration.name))


class _Loaded(Mapping[MethodName, "Method"]):
    """The methods themselves, each imported on first use."""

    def __getitem__(self, name: MethodName) -> "Method":
        return _load(DECLARED[name].load)

    def __iter__(self) -> Iterator[MethodName]:
        return iter(DECLARED)

    def __len__(self) -> int:
        return len(DECLARED)


METHODS = _Loaded()


@cache
def _load(load: "Callable[[], Method]") -> "Method":
    return load()


SUPERVISED_RULES: tuple[Rule, ...] = (
    data.training_data_is_given,
    data.data_sources_are_clear,
    valid_sources.validation_sources_are_clear,
    data.packing_is_asked_for,
    data.validation_has_data,
)
"""Rules of every method that trains on records."""


RECORDS_FIRST = ("train-data-path", "valid-data-path", "chat-template", "packing", "train-epochs")
"""Options that --help shows for a method that trains on records."""

OF_SFT_ALONE: tuple[Rule, ...] = (ewc.nothing_is_held, objectives.examples_are_learned_as_they_are)
"""Rules of the other methods, which refuse SFT's own options where all stages share theirs."""


@dataclass(frozen=True, kw_only=True)
class PretrainDataConfig:
    """What of a run's data options has a meaning here: the corpus holds ids already."""

    train_data_path: tuple[str, ...] = ()
    """Like --data-path, in place of it and of --split: prefixes of .bin and .idx files for training alone."""
    valid_data_path: tuple[str, ...] = ()
    """Beside --train-data-path, for validation, also with weights."""
    data_cache_path: str | None = None
    """Folder in which the first process of a start keeps the indices of samples, for the others and for later starts;
    when unset every rank makes its own, in memory. Made-up data has none."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] | None = None
    """Found from the files when unset."""
    tokenizer_model: str | None = None
    """The one that the corpus was made with, which an export gets too; the --load-hf folder when unset."""


def _sft() -> "Method":
    from hft_megatron.methods.continual.ewc import elastic_weights
    from hft_megatron.methods.objectives.asked import asked_of_run
    from hft_megatron.methods.sft.data import read_sft_data
    from hft_megatron.trainer.method import Method

    return Method(
        name="sft",
        objective=objective_of,
        read_data=read_sft_data,
        notes=lambda config: chosen(config).notes(config),
        reference=asked_of_run,
        last_hooks=elastic_weights,
    )


def _dpo() -> "Method":
    from hft_megatron.methods.dpo.data import read_preference_data
    from hft_megatron.methods.dpo.objective import preference_objective
    from hft_megatron.methods.dpo.reference_of_run import reference_of_run
    from hft_megatron.trainer.method import Method

    return Method(
        name="dpo",
        objective=lambda config: preference_objective(config.dpo),
        read_data=read_preference_data,
        notes=lambda config: dpo.note_unused_cache(config.dpo),
        sequences_per_sample=2,
        reference=reference_of_run,
    )


def _pretrain() -> "Method":
    from hft_megatron.methods.next_token import NEXT_TOKEN
    from hft_megatron.methods.pretrain.data import read_corpus_data
    from hft_megatron.trainer.method import Method

    return Method(name="pretrain", objective=lambda config: NEXT_TOKEN, read_data=read_corpus_data)


register(
    Declaration(
        name="sft",
        summary="fine-tune a LLaMA on instructions, half of its matrices at a time",
        groups={"data": DataConfig, "objectives": ObjectivesConfig},
        rules=(*SUPERVISED_RULES, objective_fits_the_run),
        first=RECORDS_FIRST,
        measures={"lm loss": False},
        load=_sft,
    )
)
register(
    Declaration(
        name="dpo",
        summary="tune a LLaMA on preference pairs, half of its matrices at a time",
        groups={"data": DataConfig, "dpo": DpoConfig},
        rules=(*SUPERVISED_RULES, *dpo.DPO_RULES, valid_sources.sources_hold_pairs, *OF_SFT_ALONE),
        first=(*RECORDS_FIRST, "dpo-loss", "dpo-beta", "dpo-reference"),
        measures={"preference loss": False, "rewards/accuracies": True, "rewards/margins": True},
        load=_dpo,
    )
)
register(
    Declaration(
        name="pretrain",
        summary="pre-train a LLaMA on Megatron's .bin and .idx files, half of its matrices at a time or all of them",
        groups={"corpus": CorpusConfig, "data": PretrainDataConfig},
        rules=(*corpus.CORPUS_RULES, *OF_SFT_ALONE),
        first=(
            *("num-layers", "hidden-size", "num-attention-heads", "max-position-embeddings"),
            *("data-path", "split", "mock-data", "tokenizer-model"),
        ),
        measures={"lm loss": False},
        load=_pretrain,
    )
)
