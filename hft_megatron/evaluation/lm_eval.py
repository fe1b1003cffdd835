"""Tasks of lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness) on a model in its layout."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hft_megatron.data.chat import end_token_ids
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.evaluation.service import Service
from hft_megatron.parallel.consensus import on_rank_0, together

if TYPE_CHECKING:
    from hft_megatron.evaluation.lm_eval_tasks import FoundTasks

_NAME = "lm-evaluation-harness"


def check_lm_eval() -> None:
    """Raises UserError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{_NAME} is not installed; run `pip install 'hft-megatron[lm-eval]'`.")


def find_tasks(names: Sequence[str], include_path: str | None) -> "FoundTasks | None":
    """The tasks of these names on rank 0, which alone reads their settings; None elsewhere. Collective over all ranks.

    A name may be a task, a pattern of names, or a YAML file; ``include_path`` is a folder of own tasks. Raises
    UserError, on every rank, where the harness isn't installed and for an unknown task.
    """
    together(check_lm_eval)
    found: list[FoundTasks] = []

    def find() -> None:
        from hft_megatron.evaluation import lm_eval_tasks

        found.append(lm_eval_tasks.find_tasks(names, include_path))

    on_rank_0(find)
    return found[0] if found else None


def run_lm_eval(
    model: ModelInPlace,
    tokenizer: Tokenizer,
    tasks: "FoundTasks | None",
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The harness's results of ``simple_evaluate``, on rank 0; empty elsewhere. Collective over all ranks.

    Rank 0 reads the tasks and scores the answers, which all ranks give. Texts become the ids that transformers gives
    them with the tokenizer of an export of the model, under the rules of the harness's own ``hf`` model. ``tasks`` are
    those of ``find_tasks``; they may contain code, which is run. ``say`` prints a line on rank 0.

    Raises UserError, on every rank, for a task whose data cannot be reached, or that needs something this model doesn't
    support.
    """
    from hft_megatron.evaluation.lm_eval_model import HarnessModel, WithSpecialTokens
    from hft_megatron.evaluation.lm_eval_tasks import evaluate

    encoder = transformers_tokenizer(tokenizer)
    service = Service(model, WithSpecialTokens(encoder), batch_size=batch_size, say=say)

    def work() -> dict[str, Any]:
        harness = HarnessModel(
            encoder, window=model.window, end_ids=end_token_ids(tokenizer.facts), ask=service.ask, say=say
        )
        assert tasks is not None, "this is rank 0"
        return evaluate(harness, tasks, num_fewshot=num_fewshot, limit=limit)

    return service.run(work, name=_NAME) or {}


def transformers_tokenizer(tokenizer: Tokenizer) -> Any:
    """The tokenizer that transformers' ``AutoTokenizer`` loads from a folder exported by this one."""
    from transformers import AutoTokenizer

    with TemporaryDirectory(prefix="tokenizer-") as folder:
        tokenizer.export(Path(folder))
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
