"""What an export takes over from its source. Run: pytest tests/conversion/test_kept_files.py"""

import json
from pathlib import Path

import pytest

from hft_megatron.conversion.kept_files import LARGEST_BYTES, keep_files
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for
from tests.trainer.test_convert import convert, files

KEPT = {
    "LICENSE.txt": "mine",
    "NOTICE": "n",
    "README.md": "# card",
    "USE_POLICY.md": "p",
    "assets/picture.svg": "<svg/>",
    "preprocessor_config.json": "{}",
    "vocab.json": "{}",
}
LEFT_OUT = {
    ".gitattributes": ("", "hidden"),
    ".git/HEAD": ("", "hidden"),
    "checkpoint-500/notes.txt": ("", "specific to the source"),
    "exports.json": ("{}", "specific to the source"),
    "iter_0000004/config.json": ("", "specific to the source"),
    "large.txt": ("x" * (LARGEST_BYTES + 1), "above 10 MB"),
    "model.gguf": ("", "weights"),
    "original/params.json": ("{}", "specific to the source"),
    "other/weights.pth": ("", "a folder with weights"),
    "pytorch_model.bin.index.json": ("{}", "weights"),
    "trainer_state.json": ("{}", "specific to the source"),
    "training_args.bin": ("", "specific to the source"),
    **dict.fromkeys(
        (
            "adapter_config.json",
            "all_results.json",
            "eval_results.json",
            "events.out.tfevents.1700000000.host.1.0",
            "generated_predictions.jsonl",
            "latest",
            "latest_checkpointed_iteration.txt",
            "train_results.json",
            "trainer_log.jsonl",
            "training_loss.png",
            "zero_to_fp32.py",
        ),
        ("{}", "specific to the source"),
    ),
}


def fill(folder: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_every_small_file_is_kept_and_what_is_left_out_is_said_with_the_reason(tmp_path: Path) -> None:
    left_out = {name: text for name, (text, _) in LEFT_OUT.items()}
    replaced = dict.fromkeys(("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"), "")
    source = fill(tmp_path / "source", KEPT | left_out | replaced)
    (source / "link").symlink_to(source / "LICENSE.txt")
    (source / "gone").symlink_to(source / "absent")
    (source / "elsewhere").symlink_to(tmp_path)
    target = fill(tmp_path / "target", {"config.json": "new"})
    [line] = keep_files(source, target, others=["tokenizer.json"])
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == KEPT | {"link": "mine", "config.json": "new"}
    kept, _, left = line.partition("; left out: ")
    assert kept == f"export: from {source}, also copied: " + ", ".join(
        sorted({name.partition("/")[0] + "/" * ("/" in name) for name in (*KEPT, "link")})
    )
    reasons = {name.partition("/")[0]: reason for name, (_, reason) in LEFT_OUT.items()}
    reasons |= {"gone": "not a file", "elsewhere": "a link to a folder"}
    listed = [f"{name} ({reasons[name]})" for name in sorted(reasons)]
    assert left == f"{', '.join(listed[:12])} and {len(listed) - 12} more"


def test_a_file_that_cannot_be_read_does_not_end_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "source", {"NOTICE": ""})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "NOTICE (Permission denied)" in keep_files(source, tmp_path)[0]


def test_with_nothing_to_keep_there_is_nothing_to_say(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", {"model.safetensors": ""})
    assert keep_files(source, tmp_path) == []


@pytest.mark.parametrize("rendered", [True, False], ids=["conversations", "texts"])
def test_a_run_and_the_conversion_of_its_checkpoint_keep_what_the_folder_had(
    rendered: bool, ranks: RankPools, tmp_path: Path
) -> None:
    """The built-in template is added where it was trained with, and nowhere else; a null stays one."""
    inputs = make_inputs(tmp_path)
    source = fill(inputs / "model", {"LICENSE.txt": "mine", "USE_POLICY.md": "p", "original/params.json": "{}"})
    names = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**names, "pad_token": None, "padding_side": "left"}))
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": True}))
    if not rendered:
        rows = [{"prompt": f"Say {number}", "completion": " word"} for number in range(8)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = words_for(inputs, "--train-iters", 3, "--save", tmp_path / "run", "--save-hf", tmp_path / "out")
    [report] = ranks(1).run(run_sft_words, words=words)
    out = tmp_path / "out"
    assert (out / "LICENSE.txt").read_text() == "mine"
    assert (out / "USE_POLICY.md").exists()
    assert not (out / "original").exists()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        **names,
        "pad_token": None,
        "padding_side": "left",
    }
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["temperature"], generation["do_sample"], "pad_token_id" in generation) == (0.6, True, False)
    assert json.loads((out / "config.json").read_text()).get("pad_token_id") is None
    [kept] = [line for line in report["said"] if line.startswith("export: from ")]
    assert "USE_POLICY.md" in kept
    assert "left out: original (specific to the source)" in kept
    assert any("chat_template.jinja is added" in line for line in report["said"]) == rendered
    assert (out / "chat_template.jinja").exists() == rendered
    convert(tmp_path / "run", tmp_path / "converted")
    assert files(tmp_path / "converted") == files(out)
