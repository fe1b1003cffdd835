"""Several models evaluated on the same tasks, one after the other, each in the requested layout."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import hft_megatron
from hft_megatron.config.derived import splits_sequences
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.engine import cpu_backend
from hft_megatron.errors import UserError
from hft_megatron.evaluation.examples import Answer
from hft_megatron.evaluation.forgetting import check_one_vocabulary
from hft_megatron.evaluation.forward import free_memory
from hft_megatron.evaluation.journal import Journal, differing
from hft_megatron.evaluation.outcomes import Outcome, ReadTask, outcome_of, read_task
from hft_megatron.evaluation.results import FORMAT, write_results
from hft_megatron.evaluation.saved_models import OPTION, SavedModel
from hft_megatron.evaluation.tasks import Task
from hft_megatron.evaluation.weight_changes import WeightChanges, weight_changes
from hft_megatron.parallel.consensus import gathered, on_rank_0, together
from hft_megatron.parallel.groups import Placement, leave_groups, start_groups
from hft_megatron.parallel.peers import Peers

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Models, tasks and settings of an evaluation."""

    models: Sequence[SavedModel]
    base: SavedModel | None = None
    """The model that the others were tuned from: texts and weights are compared with it."""
    trained: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Units that a run may have trained, by the model's name: no other may differ from the base's."""
    tasks: Sequence[Task]
    parallel: ParallelConfig
    batch_size: int
    """Number of sequences that a replica reads at once."""
    bf16: bool | None
    """One precision for all models. None: bf16 where all runs among them train in it, or, where there are only Hugging
    Face folders, where every rank's processor is fast at it."""
    tokenizer_model: str | None
    output: Path | None
    """The result file; None: no file is written."""


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model with its questions."""

    model: SavedModel
    tokenizer: Tokenizer | None
    """None where there are no questions."""
    tasks: Sequence[ReadTask]
    bf16: bool


def evaluate(evaluation: Evaluation, company: Peers, announce: Announce) -> Mapping[str, Any]:
    """The contents of the result file, with ``records`` by model and task; the same on every rank.

    Collective over all ranks of the job. With an output file, questions that a killed command has answered aren't asked
    again, and the file is the same to the last byte. Raises the same UserError on every rank.
    """
    company.join(evaluation.parallel)
    bf16 = precision(evaluation)
    subjects: list[_Subject] = []
    # Every rank reads for itself, and only an error is sent to the others: examples may be many.
    together(lambda: subjects.extend(_subjects(evaluation, bf16=bf16)))
    for number, subject in enumerate(subjects):
        if any(subject.tasks is earlier.tasks for earlier in subjects[:number]):
            continue
        for line in [note for read in subject.tasks for note in read.read.notes]:
            announce(f"> {subject.model.name}: {line}")
    placement = start_groups(evaluation.parallel, subjects[0].model.shape.num_layers, seed=0)
    settings = _settings(evaluation, subjects, placement)
    check_agreement(settings)
    journal = _OpenJournal(evaluation.output, settings, placement, announce)
    records: dict[tuple[str, str], Sequence[Mapping[str, Any]]] = {}
    models = []
    for number, subject in enumerate(subjects):
        if number > 0:
            placement = start_groups(evaluation.parallel, subject.model.shape.num_layers, seed=0)
        outcomes = _outcomes(subject, evaluation, placement, journal, announce)
        result = _result(subject, settings, outcomes)
        if evaluation.base is not None:
            result["weight_changes"] = _weight_changes(subject.model, evaluation, placement, announce)
        models.append(result)
        leave_groups()
        records |= {(subject.model.name, name): outcome.records for name, outcome in outcomes.items()}
    results = {"format": FORMAT, "settings": settings["settings"], "base": settings["base"], "models": models}
    if evaluation.output is not None:
        output = evaluation.output
        on_rank_0(lambda: write_results(output, results, records))
        journal.finish()
    return {**results, "records": records}


def precision(evaluation: Evaluation) -> bool:
    """True if weights are read as bf16; collective."""
    fast = all(gathered(cpu_backend.has_fast_bf16()))
    of_runs = [model.own_bf16 for model in evaluation.models if model.own_bf16 is not None]
    if evaluation.bf16 is not None:
        return evaluation.bf16
    return all(of_runs) if of_runs else fast


def _subjects(evaluation: Evaluation, *, bf16: bool) -> list[_Subject]:
    """Reads tokenizers and tasks; tasks that two models read alike are read once."""
    read: dict[tuple[str, str, int], list[ReadTask]] = {}
    subjects = []
    base = evaluation.base
    for model in evaluation.models:
        if not evaluation.tasks:
            subjects.append(_Subject(model=model, tokenizer=None, tasks=[], bf16=bf16))
            continue
        tokenizer = model.tokenizer(evaluation.tokenizer_model)
        window = model.shape.max_position_embeddings
        key = tokenizer.facts.identity, tokenizer.facts.chat_template, window
        if key not in read:
            read[key] = _read_tasks(evaluation, model.name, tokenizer, window)
        subjects.append(_Subject(model=model, tokenizer=tokenizer, tasks=read[key], bf16=bf16))
        if base is not None and any(task.kind == "text" for task in evaluation.tasks):
            names = f"{base.option} {base.name}", f"{model.option} {model.name}"
            sizes = base.shape.vocab_size, model.shape.vocab_size
            check_one_vocabulary(names, sizes, (base.tokenizer(evaluation.tokenizer_model), tokenizer))
    return subjects


def _read_tasks(evaluation: Evaluation, model: str, tokenizer: Tokenizer, window: int) -> list[ReadTask]:
    """All tasks for one tokenizer and window. Raises UserError for each error, which may concern one model only."""
    try:
        return [read_task(task, tokenizer, window) for task in evaluation.tasks]
    except UserError as error:
        if len(evaluation.models) == 1:
            raise
        raise UserError(f"{OPTION} {model}: {error}") from error


def _settings(evaluation: Evaluation, subjects: Sequence[_Subject], placement: Placement) -> dict[str, Any]:
    """Everything that decides the answers: an unfinished evaluation resumes only where all of it is the same. The
    number of replicas is not part of it."""
    base = evaluation.base
    return {
        "models": {subject.model.name: subject.model.digest(placement) for subject in subjects},
        "base": None if base is None else {"name": base.name, "digest": base.digest(placement)},
        "tokenizers": {subject.model.name: _identity(subject) for subject in subjects},
        "tasks": {task.name: task.digest for task in evaluation.tasks},
        "questions": {
            subject.model.name: {read.task.name: read.digest() for read in subject.tasks} for subject in subjects
        },
        "config.json": {subject.model.name: asdict(subject.model.shape) for subject in subjects},
        "settings": {
            "hft_megatron": hft_megatron.__version__,
            "torch": torch.__version__,
            "device": placement.device.type,
            # On a CPU the order of sums depends on it, and so the last digits.
            "threads": torch.get_num_threads() if placement.device.type == "cpu" else None,
            "dtypes": {subject.model.name: _dtype(subject) for subject in subjects},
            "batch_size": evaluation.batch_size,
            "tensor_model_parallel_size": placement.tensor_size,
            "pipeline_model_parallel_size": placement.pipeline_size,
            "sequence_parallel": splits_sequences(evaluation.parallel),
        },
    }


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Raises the same UserError on every rank where one has read other data, such as a newer checkpoint; collective."""
    first, *others = gathered(settings)
    for rank, theirs in enumerate(others, start=1):
        if theirs != first:
            raise UserError(
                f"rank {rank} found other {differing(first, theirs)} than rank 0; every rank must see the same models "
                f"and data: use storage that all hosts share, and name one checkpoint of a run that is training."
            )


def _identity(subject: _Subject) -> str | None:
    return None if subject.tokenizer is None else subject.tokenizer.facts.identity


def _dtype(subject: _Subject) -> str:
    return "bfloat16" if subject.bf16 else "float32"


class _OpenJournal:
    """The journal, which rank 0 holds, for every rank."""

    def __init__(
        self, output: Path | None, settings: Mapping[str, Any], placement: Placement, announce: Announce
    ) -> None:
        self._journal: Journal | None = None
        self._known: dict[tuple[str, str], dict[int, list[Answer]]] = {}
        if output is None:
            return

        def read() -> dict[tuple[str, str], dict[int, list[Answer]]]:
            self._journal = Journal(output, settings)
            return self._journal.answers

        self._known = on_rank_0(read)
        batches = sum(map(len, self._known.values()))
        if batches:
            announce(f"> --output {output}: resuming an evaluation that was stopped, with {batches} batches answered")

    def known(self, model: str, task: str) -> Mapping[int, Sequence[Answer]]:
        return self._known.get((model, task), {})

    def add(self, model: str, task: str, batch: int, answers: Sequence[Answer]) -> None:
        if self._journal is not None:
            self._journal.add(model, task, batch, answers)

    def finish(self) -> None:
        if self._journal is not None:
            self._journal.close(finished=True)


def _outcomes(
    subject: _Subject, evaluation: Evaluation, placement: Placement, journal: _OpenJournal, announce: Announce
) -> dict[str, Outcome]:
    """Outcomes by the names of the tasks, of one model; its memory is free afterwards."""
    name = subject.model.name
    announce(f"> {name}: {_description(subject)}")
    if subject.tokenizer is None:
        return {}
    model = subject.model.open(evaluation.parallel, placement, bf16=subject.bf16)
    has_texts = any(read.task.kind == "text" for read in subject.tasks)
    base = None
    if evaluation.base is not None and has_texts:
        base = evaluation.base.open(evaluation.parallel, placement, bf16=subject.bf16)
    outcomes = {}
    for read in subject.tasks:
        task = read.task.name

        def keep(batch: int, answers: Sequence[Answer], task: str = task) -> None:
            journal.add(name, task, batch, answers)

        outcomes[task] = outcome_of(
            read,
            model,
            subject.tokenizer,
            batch_size=evaluation.batch_size,
            say=announce,
            base=base,
            known=journal.known(name, task),
            keep=keep,
        )
        values = ", ".join(f"{measure} {value:.4g}" for measure, value in outcomes[task].values.items())
        announce(f"  {task}: {len(outcomes[task].records)} examples, {values}")
    del model, base
    free_memory(placement.device)
    return outcomes


def _weight_changes(
    model: SavedModel, evaluation: Evaluation, placement: Placement, announce: Announce
) -> dict[str, Any]:
    """Distance of the model's weights from its base's, with frozen units that changed nevertheless; collective."""
    base = evaluation.base
    assert base is not None
    share = slice(placement.rank, None, placement.world_size)

    def of_this_rank() -> WeightChanges:
        with base.weights() as before, model.weights() as after:
            return weight_changes(before, after, share)

    found = WeightChanges.joined(together(of_this_rank))
    whole = found.whole()
    announce(
        f"  weights: {100 * whole.changed / whole.parameters:.4g} % of the parameters differ from the base's, by "
        f"{whole.relative:.4g} of their norm"
    )
    result: dict[str, Any] = {
        "relative": _in_json(whole.relative),
        "changed_share": whole.changed / whole.parameters,
        "by_category": {name: _in_json(change.relative) for name, change in found.by_category().items()},
        "units": {unit.unit: _in_json(unit.relative) for unit in found.units},
    }
    if model.name in evaluation.trained:
        wrong = found.changed_though_frozen(evaluation.trained[model.name])
        result["changed_though_frozen"] = list(wrong)
        if wrong:
            announce(
                f"  warning: {', '.join(wrong)}: the run froze these units, but they differ from the base's; did "
                f"the run start from --base {base.name}?"
            )
    return result


def _in_json(value: float) -> float | None:
    """None for infinity, which JSON lacks: a perplexity, or the change of a weight that was zero."""
    return value if math.isfinite(value) else None


def _description(subject: _Subject) -> str:
    iteration = subject.model.iteration
    place = "a Hugging Face folder" if iteration is None else f"iteration {iteration} of a run"
    shape = subject.model.shape
    size = f"{shape.parameter_count():,} parameters and {shape.max_position_embeddings:,} positions"
    return f"a LLaMA of {size}, {place}, {_dtype(subject)}"


def _result(subject: _Subject, settings: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    name = subject.model.name
    return {
        "name": name,
        "digest": settings["models"][name],
        "iteration": subject.model.iteration,
        "tokenizer_digest": _identity(subject),
        "tasks": [
            {
                "name": read.task.name,
                "digest": read.task.digest,
                "kind": read.task.kind,
                "examples": len(outcomes[read.task.name].records),
                "questions": settings["questions"][name][read.task.name],
                "values": {metric: _in_json(value) for metric, value in outcomes[read.task.name].values.items()},
                "counts": dict(outcomes[read.task.name].counts),
            }
            for read in subject.tasks
        ],
    }
