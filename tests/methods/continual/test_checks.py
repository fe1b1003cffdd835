"""Mistakes in the data of a sequence, found before anything is trained. Run: pytest tests/methods/continual"""

import json
from pathlib import Path

import pytest

from hft_megatron.config.continual import sequence_fits_the_run
from hft_megatron.errors import UserError
from hft_megatron.evaluation.matrix import Cell
from hft_megatron.methods.continual.run import TaskSequence, _matrix, check_sequence
from hft_megatron.methods.continual.sequence import parts_of
from hft_megatron.methods.continual.tasks import read_continual_tasks
from tests.support.models import make_llama
from tests.support.runs import VOCAB_SIZE
from tests.support.sequences import IGNORED, NAMES, options_of, write_rows, write_sequence
from tests.support.tokenizers import make_byte_level


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continual") / "model"
    make_llama(folder, vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=56)
    return make_byte_level(folder)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_sequence(tmp_path)


def sequence_of(tasks: Path, model: Path, *words: object) -> TaskSequence:
    options = options_of(tasks, tasks.parent / "run", "--load-hf", model, "--global-batch-size", 4, *IGNORED, *words)
    base = options.as_run
    found = read_continual_tasks(options.continual, base)
    parts = parts_of(found, base, options.continual)
    return TaskSequence(options=options.continual, base=base, tasks=found, general=(), parts=parts)


def test_all_tasks_are_read_and_nothing_is_written(tasks: Path, model: Path) -> None:
    before = sorted(tasks.parent.iterdir())
    lines = check_sequence(sequence_of(tasks, model, "--replay-ratio", 0.5), world_size=1)
    for number, name in enumerate(NAMES):
        assert any(line.startswith(f"stage {number} (sft): {tasks.parent / name}.jsonl") for line in lines), lines
        assert f"{name}: 16 examples to evaluate" in lines
    assert sorted(tasks.parent.iterdir()) == before


def write_test_set(tasks: Path, rows: list[dict[str, str]]) -> None:
    """The evaluation of the third task gets a file of its own."""
    write_rows(tasks.parent / "test.jsonl", rows)
    tasks.write_text(tasks.read_text().replace("files: animals.jsonl", "files: test.jsonl"))


@pytest.mark.parametrize("setting", [("--replay-ratio", 0.5), ()])
def test_a_mistake_in_the_last_tasks_data_is_found(tasks: Path, model: Path, setting: tuple[object, ...]) -> None:
    (tasks.parent / "animals.jsonl").write_text("")
    with pytest.raises(UserError, match=r"animals.jsonl"):
        check_sequence(sequence_of(tasks, model, *setting), world_size=1)
    write_rows(tasks.parent / "animals.jsonl", [{"prompt": "who?", "answer": "a cat"}, {"prompt": "who?"}])
    with pytest.raises(UserError, match=r"animals.jsonl:2: .*answer"):
        check_sequence(sequence_of(tasks, model, *setting), world_size=1)


def test_a_mistake_in_what_is_asked_is_found(tasks: Path, model: Path) -> None:
    write_test_set(tasks, [])
    with pytest.raises(UserError, match=r"test.jsonl"):
        check_sequence(sequence_of(tasks, model), world_size=1)
    write_test_set(tasks, [{"prompt": "a", "answer": "b"}, {"prompt": "a"}])
    with pytest.raises(UserError, match=r"test.jsonl:2.*answer"):
        check_sequence(sequence_of(tasks, model), world_size=1)
    write_test_set(tasks, [{"prompt": "a", "reply": "b"}])
    with pytest.raises(UserError, match=r"test.jsonl:1.*answer"):
        check_sequence(sequence_of(tasks, model), world_size=1)


def test_a_list_may_change_behind_what_is_done_alone(tasks: Path, model: Path) -> None:
    whole = sequence_of(tasks, model)
    matrix, _ = _matrix(whole)
    matrix.put(1, "colours", Cell(value=50.0, examples=16))
    whole.folder.mkdir()
    matrix.write(whole.folder / "matrix.json")
    other_order = sequence_of(tasks, model, "--continual-order", "colours", "animals", "numbers")
    assert [column.name for column in _matrix(other_order)[0].tasks] == ["colours", "animals", "numbers"]
    with pytest.raises(UserError, match=r"the sequence has 2 tasks, but that of .*matrix.json has 3"):
        _matrix(sequence_of(tasks, model, "--continual-order", "colours", "animals"))
    with pytest.raises(UserError, match=r"task 1 of .*, which is done, was colours, and is numbers now"):
        _matrix(sequence_of(tasks, model, "--continual-order", "numbers", "colours", "animals"))
    assert json.loads((whole.folder / "matrix.json").read_text())["rows"][1]["after"] == "colours"


def test_divergences_need_texts_and_a_base(tasks: Path, model: Path) -> None:
    wanted = sequence_of(tasks, model, "--continual-kl-to-base")
    with pytest.raises(UserError, match=r"--continual-kl-to-base .* --continual-general is not given; add it"):
        sequence_fits_the_run(wanted.options, wanted.base)
