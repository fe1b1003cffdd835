"""lm-evaluation-harness on models that a command names, one after the other."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hft_megatron.config.run_folder import write_atomically
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.forward import free_memory
from hft_megatron.evaluation.lm_eval import find_tasks, run_lm_eval
from hft_megatron.evaluation.side_by_side import Evaluation, check_agreement, precision
from hft_megatron.parallel.consensus import on_rank_0, together
from hft_megatron.parallel.groups import Placement, leave_groups, start_groups
from hft_megatron.parallel.peers import Peers


@dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """Tasks and settings for the harness."""

    names: Sequence[str]
    include_path: str | None
    num_fewshot: int | None
    limit: int | None


def evaluate_by_harness(
    evaluation: Evaluation, tasks: HarnessTasks, company: Peers, announce: Callable[[str], None]
) -> str:
    """The harness's own tables of all models on rank 0, empty elsewhere; collective over all ranks of the job.

    Its results, by the models' names, are written to the output file where there is one. Raises the same UserError on
    every rank, for unknown tasks and, before a model is built, for ranks that have read other models.
    """
    company.join(evaluation.parallel)
    found = find_tasks(tasks.names, tasks.include_path)
    bf16 = precision(evaluation)
    tokenizers: list[Tokenizer] = []
    together(lambda: tokenizers.extend(saved.tokenizer(evaluation.tokenizer_model) for saved in evaluation.models))
    placement = start_groups(evaluation.parallel, evaluation.models[0].shape.num_layers, seed=0)
    read = _read(evaluation, tokenizers, placement)
    check_agreement(read)
    results: dict[str, dict[str, Any]] = {}
    for number, (saved, tokenizer) in enumerate(zip(evaluation.models, tokenizers, strict=True)):
        if number > 0:
            placement = start_groups(evaluation.parallel, saved.shape.num_layers, seed=0)
        announce(f"> {saved.name}: lm-evaluation-harness, {', '.join(tasks.names)}")
        model = saved.open(evaluation.parallel, placement, bf16=bf16)
        of_model = run_lm_eval(
            model,
            tokenizer,
            found,
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            batch_size=evaluation.batch_size,
            say=announce,
        )
        del model
        free_memory(placement.device)
        leave_groups()
        # Its notes about the machine are not for everybody who gets the file.
        kept = {name: value for name, value in of_model.items() if name != "pretty_env_info"}
        results[saved.name] = {"digest": read["models"][saved.name], "iteration": saved.iteration, **kept}
    return on_rank_0(lambda: _written(results, evaluation.output))


def _read(evaluation: Evaluation, tokenizers: Sequence[Tokenizer], placement: Placement) -> dict[str, dict[str, Any]]:
    """This rank's reading of every model, which must be the same on all ranks; collective."""
    models = evaluation.models
    return {
        "models": {saved.name: saved.digest(placement) for saved in models},
        "iterations": {saved.name: saved.iteration for saved in models},
        "tokenizers": {
            saved.name: tokenizer.facts.identity for saved, tokenizer in zip(models, tokenizers, strict=True)
        },
        "config.json": {saved.name: asdict(saved.shape) for saved in models},
    }


def _written(found: dict[str, dict[str, Any]], output: Path | None) -> str:
    from lm_eval.utils import handle_non_serializable, make_table

    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(found, indent=1, default=handle_non_serializable, ensure_ascii=False)
            write_atomically(output, text + "\n")
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error}; choose another folder.") from error
    return "\n".join(f"{name}\n{make_table(results)}" for name, results in found.items())
