"""What a save and a load hold beyond the model and its optimizer. Run: pytest -s tests/checkpoint/test_memory.py"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.allocations import Allocations
from tests.support.models import make_llama
from tests.support.ranks import RankPools
from tests.support.toy_training import make_run, take_steps

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 2000}
"""28 million parameters, of which half train: 170 MB of masters and moments."""


def run_save_and_load(folder: str, save: str, asynchronous: bool) -> dict[str, Any]:
    """Bytes of this rank's files, and of the tensors that a save and a load made and held at a time, at most.

    Tensors, and not the process's memory: that grew by 50 to 80 MB for 57 MB of files, as the heap had more or less
    room before.
    """
    from hft_megatron.checkpoint.store import load_checkpoint
    from hft_megatron.checkpoint.writer import CheckpointWriter
    from hft_megatron.config.checkpoint import CheckpointConfig

    # A step of one short example each: what counts here is the state.
    run = make_run(folder, {}, training={"bf16": True, "global_batch_size": 4})
    take_steps(run, 1)
    writer = CheckpointWriter(CheckpointConfig(save=save, async_save=asynchronous), run.placement)
    with Allocations() as saving:
        writer.save(run.wrapped, run.state)
        writer.finish(wait=True)
    path = Path(save) / "iter_0000001"
    written = sum(file.stat().st_size for file in path.glob(f"__{run.placement.rank}_*.distcp"))
    with Allocations() as loading:
        load_checkpoint(path, run.wrapped, run.placement)
    weights = sum(weight.nbytes for chunk in run.wrapped.modules for weight in chunk.parameters())
    return {"weights": weights, "written": written, "saving": saving.most, "loading": loading.most}


@pytest.mark.slow(reason="four ranks train, save and load 28 million parameters")
@pytest.mark.parametrize(("asynchronous", "times"), [(False, 1.3), (True, 2.3)], ids=["foreground", "background"])
def test_a_rank_holds_what_it_writes_and_all_ranks_write_about_as_much(
    ranks: RankPools, tmp_path: Path, asynchronous: bool, times: float
) -> None:
    folder = str(make_llama(tmp_path / "model", **SIZES))
    answers = ranks(4).run(run_save_and_load, folder=folder, save=str(tmp_path / "run"), asynchronous=asynchronous)
    for answer in answers:
        print({name: f"{value / 1e6:.1f} MB" for name, value in answer.items()})
    total = sum(answer["written"] for answer in answers)
    for answer in answers:
        assert answer["written"] == pytest.approx(total / 4, rel=0.25)
        assert answer["saving"] < times * answer["written"]
        # All weights pass through every rank, and its share of the state; all of the state would be four times that.
        assert answer["loading"] < answer["weights"] + answer["written"]
