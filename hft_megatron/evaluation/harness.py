"""lm-evaluation-harness on models that a command names, one after the other."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft_megatron.config.run_folder import write_atomically
from hft_megatron.errors import UserError
from hft_megatron.evaluation.lm_eval import check_lm_eval, run_lm_eval
from hft_megatron.evaluation.side_by_side import Evaluation, precision
from hft_megatron.parallel.consensus import on_rank_0, together
from hft_megatron.parallel.groups import leave_groups, start_groups
from hft_megatron.parallel.peers import Peers


@dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """What the harness is asked to do."""

    names: Sequence[str]
    include_path: str | None
    num_fewshot: int | None
    limit: int | None


def evaluate_by_harness(
    evaluation: Evaluation, tasks: HarnessTasks, company: Peers, announce: Callable[[str], None]
) -> str:
    """The harness's own tables of all models on rank 0, empty elsewhere; collective over all ranks of the job.

    Its results, by the models' names, go into the output file where there is one. Raises the same UserError on every
    rank.
    """
    company.join(evaluation.parallel)
    together(check_lm_eval)
    bf16 = precision(evaluation)
    found: dict[str, dict[str, Any]] = {}
    for saved in evaluation.models:
        tokenizer = together(lambda saved=saved: saved.tokenizer(evaluation.tokenizer_model))[0]  # type: ignore[misc]
        placement = start_groups(evaluation.parallel, saved.shape.num_layers, seed=0)
        digest = saved.digest(placement)
        announce(f"> {saved.name}: lm-evaluation-harness, {', '.join(tasks.names)}")
        model = saved.open(evaluation.parallel, placement, bf16=bf16)
        results = run_lm_eval(
            model,
            tokenizer,
            tasks.names,
            include_path=tasks.include_path,
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            batch_size=evaluation.batch_size,
            say=announce,
        )
        del model
        gc.collect()
        leave_groups()
        # What it notes of the machine is nobody's business who gets the file.
        kept = {name: value for name, value in results.items() if name != "pretty_env_info"}
        found[saved.name] = {"digest": digest, "iteration": saved.iteration, **kept}
    return on_rank_0(lambda: _written(found, evaluation.output))


def _written(found: dict[str, dict[str, Any]], output: Path | None) -> str:
    from lm_eval.utils import handle_non_serializable, make_table

    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(found, indent=1, default=handle_non_serializable, ensure_ascii=False)
            write_atomically(output, text + "\n")
        except OSError as error:
            raise UserError(f"--output {output} can't be written: {error}; choose another folder.") from error
    return "\n".join(f"{name}\n{make_table(results)}" for name, results in found.items())
