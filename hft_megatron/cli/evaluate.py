"""``hft-megatron evaluate``: tasks put to models, in any layout and without a conversion.

Run: ``hft-megatron evaluate --model BASE RUN --tasks tasks.yaml --output results.json``, under torchrun where a model
needs more than one rank.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from hft_megatron.cli.boundary import StatusFolder, end_of_peers, note, show
from hft_megatron.config.declared import check_bounds, declared, flag
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.validation import validate_plan
from hft_megatron.errors import UserError
from hft_megatron.parallel import launch

if TYPE_CHECKING:
    from hft_megatron.evaluation.side_by_side import Evaluation
    from hft_megatron.evaluation.tasks import Task
    from hft_megatron.parallel.peers import Peers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How models are spread over ranks; replicas share the examples. What a run has of it has no say."""

    tensor_model_parallel_size: Annotated[int, Ge(1)] = 1
    pipeline_model_parallel_size: Annotated[int, Ge(1)] = 1
    decoder_first_pipeline_num_layers: Annotated[int, Ge(1)] | None = None
    """Layers of the first pipeline stage, where stages are uneven."""
    decoder_last_pipeline_num_layers: Annotated[int, Ge(1)] | None = None
    """Layers of the last pipeline stage."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """nccl where CUDA is present, gloo elsewhere, when unset."""
    distributed_timeout_minutes: Annotated[float, Gt(0)] = ParallelConfig.distributed_timeout_minutes
    """How long ranks wait for each other, when they meet and for a batch of answers."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is evaluated on what."""

    model: tuple[str, ...] = ()
    """Hugging Face folders, runs (their --save: the newest checkpoint) and checkpoints of runs (RUN/iter_0000100). The
    others are compared with the first. Load only runs you trust: torch reads a checkpoint's index with pickle."""
    base: str | None = None
    """What the models were tuned from: how far their weights are from it, and of texts how much likelier they were
    before and how much the predictions differ (KL divergences)."""
    tasks: str | None = None
    """YAML file of tasks; examples/tasks has some."""
    task_names: tuple[str, ...] = ()
    """Only these tasks of the file."""
    limit: Annotated[int, Ge(1)] | None = None
    """Only the first so many rows of every task."""
    output: str | None = None
    """New file for the results (.json); the answers to every example go into a .predictions.jsonl beside it. A command
    that was stopped resumes when it is given again; one of --lm-eval-tasks, which writes at its end alone, begins
    anew."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Sequences that a replica reads at once."""
    bf16: bool | None = None
    """Read all weights as bf16, or (--no-bf16) fp32. Unset: bf16 where all runs among the models train in it, or, where
    there are only Hugging Face folders, where every rank's processor is fast at it."""
    tokenizer_model: str | None = None
    """Hugging Face folder or SentencePiece .model file, in place of every model's own."""
    lm_eval_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness instead of --tasks: names, patterns, or YAML files. Rank 0 runs the harness, all
    ranks answer. Needs `pip install 'hft-megatron[lm-eval]'`; own tasks may contain code, which is run."""
    lm_eval_include: str | None = None
    """Folder of own tasks for the harness."""
    lm_eval_fewshot: Annotated[int, Ge(0)] | None = None
    """Solved examples in front of each question of the harness; as each task has it when unset."""
    compare: tuple[str, ...] = ()
    """Two result files instead of models: how the second differs from the first, with intervals. FILE:MODEL where a
    file has several."""
    frontier: tuple[str, ...] = ()
    """Runs (their --save) instead of models: what each had forgotten where it had learned the same, because at one
    learning rate a method that learns less forgets less. Names of metrics.jsonl say what is meant, see below.
    NAME=RUN,RUN takes runs of one method, such as at several learning rates, together."""
    frontier_learning: str | None = None
    """What was learned, such as `lm loss validation/new`."""
    frontier_forgetting: str | None = None
    """What may have been forgotten, such as `lm loss validation/old` or `tasks/stories/bits_per_byte`."""
    frontier_levels: Annotated[int, Ge(1)] = 5
    """Levels of learning, in equal steps up to the furthest that all methods reach."""
    layout: Layout = field(default_factory=Layout)


def run(options: EvaluateOptions, status: StatusFolder) -> None:
    """Check the options, then evaluate or compare. Raises UserError for every mistake."""
    check_bounds(options)
    if options.compare or options.frontier:
        show(_from_files(options))
        return
    # Imported in functions: other commands, and the checks, must not wait for it all.
    tasks = _checked(options)
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    evaluation = _evaluation(options, tasks)
    launch.place_this_process()
    from hft_megatron.parallel.groups import stop_groups
    from hft_megatron.parallel.peers import peers
    from hft_megatron.trainer.out_of_memory import memory_errors_as

    no_memory = (
        f"rank {launch.rank()} ran out of memory at --batch-size {options.batch_size}; make that less, or spread the "
        f"models over more ranks with --tensor-model-parallel-size."
    )
    with (
        peers(evaluation.parallel.distributed_timeout_minutes, end_of_peers(status)) as company,
        memory_errors_as(lambda _: no_memory),
    ):
        text = _by_harness(options, evaluation, company) if options.lm_eval_tasks else _by_tasks(evaluation, company)
        company.leave()
        stop_groups()
    if text:
        note(text)


def _evaluation(options: EvaluateOptions, tasks: "tuple[Task, ...]") -> "Evaluation":
    """With what the models say of themselves; UserError for those that can't be evaluated so."""
    from hft_megatron.evaluation.saved_models import SavedModel
    from hft_megatron.evaluation.side_by_side import Evaluation
    from hft_megatron.evaluation.weight_changes import check_alike
    from hft_megatron.trainer.convert import units_trained

    parallel = ParallelConfig(**vars(options.layout))
    models = [SavedModel.read(name) for name in options.model]
    base = None if options.base is None else SavedModel.read(options.base, "--base")
    for model in [*models, *([] if base is None else [base])]:
        validate_plan(RunConfig(parallel=parallel), model.shape, launch.world_size())
        if base is not None:
            check_alike((f"{base.option} {base.name}", f"{model.option} {model.name}"), (base.shape, model.shape))
    of_runs = [model for model in models if base is not None and model.run is not None]
    return Evaluation(
        models=models,
        base=base,
        trained={model.name: units_trained(model.run) for model in of_runs if model.run is not None},
        tasks=tasks,
        parallel=parallel,
        batch_size=options.batch_size,
        bf16=options.bf16,
        tokenizer_model=options.tokenizer_model,
        output=None if options.output is None else Path(options.output),
    )


def _by_tasks(evaluation: "Evaluation", company: "Peers") -> str:
    """The table of all models, on rank 0."""
    from hft_megatron.evaluation.side_by_side import evaluate
    from hft_megatron.report.evaluation import results_text

    results = evaluate(evaluation, company, note)
    return results_text(results["models"], results["records"]) if launch.rank() == 0 else ""


def _by_harness(options: EvaluateOptions, evaluation: "Evaluation", company: "Peers") -> str:
    """The tables of lm-evaluation-harness, on rank 0."""
    from hft_megatron.evaluation.harness import HarnessTasks, evaluate_by_harness

    tasks = HarnessTasks(
        names=options.lm_eval_tasks,
        include_path=options.lm_eval_include,
        num_fewshot=options.lm_eval_fewshot,
        limit=options.limit,
    )
    return evaluate_by_harness(evaluation, tasks, company, note)


def _checked(options: EvaluateOptions) -> "tuple[Task, ...]":
    """The tasks that are asked for; UserError for options that don't fit together, before anything heavy is read."""
    from hft_megatron.evaluation.results import check_output
    from hft_megatron.evaluation.task_files import read_tasks

    if not options.model:
        raise UserError("--model is missing: name a Hugging Face folder or the --save folder of a run.")
    twice = [name for name in options.model if options.model.count(name) > 1]
    if twice:
        raise UserError(f"--model {twice[0]} is there twice; name every model once.")
    own = {name for group in (EvaluateOptions, Layout) for name in declared(group)} - _FRONTIER - {"compare"}
    if options.lm_eval_tasks:
        _refuse_others(options, "--lm-eval-tasks", own - {"tasks", "task_names", "base"}, "asks the harness's tasks")
    else:
        _refuse_others(options, "--tasks", own - _HARNESS, "needs --frontier or --lm-eval-tasks for that")
    if options.tasks is None and options.base is None and not options.lm_eval_tasks:
        raise UserError("--tasks is missing: name a YAML file of tasks, such as examples/tasks/text.yaml.")
    tasks = () if options.tasks is None else read_tasks(Path(options.tasks))
    names = [task.name for task in tasks]
    if options.task_names and options.tasks is None:
        raise UserError(f"--task-names {' '.join(options.task_names)} needs --tasks, whose names they are; add it.")
    for name in options.task_names:
        if name not in names:
            raise UserError(
                f"--task-names {name}: --tasks {options.tasks} has no such task; it has {', '.join(names)}."
            )
    if options.output is not None:
        check_output(Path(options.output))
    chosen = tuple(task for task in tasks if not options.task_names or task.name in options.task_names)
    if options.limit is None:
        return chosen
    return tuple(replace(task, limit=min(options.limit, task.limit or options.limit)) for task in chosen)


_FRONTIER = {"frontier", "frontier_learning", "frontier_forgetting", "frontier_levels"}
_HARNESS = {"lm_eval_tasks", "lm_eval_include", "lm_eval_fewshot"}


def _refuse_others(options: EvaluateOptions, asked: str, own: Collection[str], why: str) -> None:
    """UserError for the first option that is given and not among a mode's ``own``."""
    groups: tuple[object, ...] = (options, options.layout)
    for group in groups:
        kind: type = type(group)
        for name, option in declared(kind).items():
            value = getattr(group, name)
            if name not in own and not is_dataclass(value) and value != option.default:
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UserError(f"{flag(name)} {shown} can't be given with {asked}, which {why}; leave one out.")


def _from_files(options: EvaluateOptions) -> str:
    """What --compare and --frontier show, of files that earlier commands have left."""
    from hft_megatron.evaluation.comparison import compare
    from hft_megatron.evaluation.frontier import curve_of_run, frontier, shared_levels
    from hft_megatron.report.evaluation import comparison_text, frontier_text

    asked, own = ("--compare", {"compare"}) if options.compare else ("--frontier", _FRONTIER)
    _refuse_others(options, asked, own, "reads files that are there already")
    if options.compare:
        if len(options.compare) != 2:
            raise UserError(f"--compare {' '.join(options.compare)}: give two result files.")
        return comparison_text(compare(*options.compare))
    if options.frontier_learning is None or options.frontier_forgetting is None:
        missing = "learning" if options.frontier_learning is None else "forgetting"
        raise UserError(f"--frontier-{missing} is missing: name a value of the runs' metrics.jsonl.")
    curves, wanted = {}, (options.frontier_learning, options.frontier_forgetting)
    for word in options.frontier:
        name, equals, runs = word.partition("=")
        folders = runs.split(",") if equals else [word]
        if not all(folders) or not name or name in curves or ("," in word and not equals):
            raise UserError(f"--frontier {word}: write RUN, or NAME=RUN,RUN with another name for every method.")
        curves[name] = [curve_of_run(folder, *wanted) for folder in folders]
    return frontier_text(frontier(curves, shared_levels(curves, options.frontier_levels)), *wanted)
