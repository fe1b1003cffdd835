"""wandb for real, offline: the run's file is read back record by record."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.errors import UserError
from hft_megatron.tracking.trackers import WandbTracker

wandb = pytest.importorskip("wandb")


BLOCK_BYTES = 32768
FILE_HEADER_BYTES = 7
CHUNK_HEADER = struct.Struct("<IHB")
"""Checksum, length and type (1 whole, 2 first, 3 middle, 4 last) of one chunk of LevelDB's log format."""


def payloads_of(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log behind a file header."""
    position, pending = FILE_HEADER_BYTES, b""
    while position + CHUNK_HEADER.size <= len(data):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < CHUNK_HEADER.size:
            position += left_in_block
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        position += CHUNK_HEADER.size
        pending += data[position : position + length]
        position += length
        if kind in (1, 4):
            yield pending
            pending = b""


def records_of(folder: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = []
    for payload in payloads_of(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        records.append(record)
    return records


def test_an_offline_run_holds_the_options_and_the_metrics_under_megatrons_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HFT_TEST_SECRET", "do-not-record-me")
    tracker = WandbTracker(
        project="halves", name="first", folder=str(tmp_path / "run"), config={"hft": {"hft_ratio": 0.5}}
    )
    loss = 0.1 + 0.2
    tracker.log(5, {"lm loss": loss, "learning rate": 0.5, "elapsed time per iteration (ms)": 250.0})
    tracker.log(5, {"lm loss validation": 2.0})
    tracker.log(6, {"lm loss": 1.0})
    tracker.close()
    wandb.teardown()  # offline, the file is complete only when wandb's own process has ended

    records = records_of(tmp_path / "run")
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("halves", "first")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["hft"] == {"hft_ratio": 0.5}
    history = [
        {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["_step"] for row in history] == [5, 6]
    assert {key: value for key, value in history[0].items() if not key.startswith("_")} == {
        "lm loss": loss,
        "learning-rate": 0.5,
        "iteration-time": 0.25,
        "lm loss validation": 2.0,
    }
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files
    assert not any(b"do-not-record-me" in path.read_bytes() for path in files)
    assert not [path for path in files if path.suffix in (".patch", ".py") or path.name == "output.log"]


@pytest.mark.parametrize("kind", ["UsageError", "CommError", "AuthenticationError"])
def test_a_refused_start_is_one_sentence_that_names_the_option_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def refuse(**_: Any) -> None:
        raise getattr(wandb.errors, kind)("no API key\nor no network.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        UserError,
        match=r"--wandb-project halves: wandb did not start \(no API key or no network\).*WANDB_MODE=offline",
    ):
        WandbTracker(project="halves", name=None, folder=str(tmp_path), config={})
