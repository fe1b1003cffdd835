"""A generated answer's prompt has the tokens that training puts before it, and what came is measured as a text.

Run: pytest tests/evaluation/test_kinds_generate.py
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.data.chat import ChatTemplate, LossRule
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.examples import Generated
from hft_megatron.evaluation.kinds import KINDS
from tests.support.data_files import load, write_rows
from tests.support.tasks import asked, prompt_text, task_of
from tests.support.tokenizers import train_sentencepiece

ASKING: dict[str, Any] = {"kind": "generate", "files": "a.jsonl", "prompt": "question", "target": "answer"}
ROWS = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(1, 7)]
TEMPLATED = {**ASKING, "prompt": "Q: {{ question }}\nA:", "target_delimiter": " "}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "a.jsonl", ROWS)
    return tmp_path


def texts_of(folder: Path, tokenizer: Tokenizer, **settings: Any) -> list[str]:
    examples = asked(task_of(folder, **settings), tokenizer).examples
    return [prompt_text(example, tokenizer) for example in examples]


def sentencepiece(folder: Path, **options: Any) -> Tokenizer:
    train_sentencepiece(folder, **options)
    return load_tokenizer("SentencePieceTokenizer", folder)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "one that removes spaces"])
@pytest.mark.parametrize("question", ["1 + 1 =", "1 + 1 = ", "<|bos|> <s> hi\n", "态度"])
def test_a_plain_prompt_has_the_tokens_that_training_puts_before_the_answer(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, question: str
) -> None:
    if kind != "byte level":
        removes = {"remove_extra_whitespaces": True} if kind == "one that removes spaces" else {}
        tokenizer = sentencepiece(tmp_path / "tokenizer", **removes)
    write_rows(tmp_path / "a.jsonl", [{"prompt": question, "answer": "17 bridges"}])
    (example,) = asked(task_of(tmp_path, **{**ASKING, "prompt": "prompt"}), tokenizer).examples
    assert example.prompt is not None
    ids, trained = load(tmp_path / "a.jsonl", tokenizer).example(0)
    assert example.prompt.tolist() == ids[: int(trained.argmax())].tolist()
    assert example.prompt[0] == tokenizer.bos_id


def test_in_a_chat_the_prompt_is_the_users_message_and_generation_starts_behind_it(
    folder: Path, tokenizer: Tokenizer
) -> None:
    task = task_of(folder, **ASKING, chat=True, system="Be brief.")
    example = asked(task, tokenizer).examples[0]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    pieces = ChatTemplate(tokenizer.facts, LossRule()).pieces([*messages, {"role": "assistant", "content": "2"}])
    ((ids, trained),) = tokenizer.encode_pieces([pieces])
    assert example.prompt is not None
    assert example.prompt.tolist() == ids[: int(trained.argmax())].tolist()


def test_few_shot_examples_are_the_first_others_of_the_files(folder: Path, tokenizer: Tokenizer) -> None:
    first, second, third, *_ = texts_of(folder, tokenizer, **TEMPLATED, fewshot=2)
    assert first == "Q: 2+2?\nA: 4\n\nQ: 3+3?\nA: 6\n\nQ: 1+1?\nA:"
    assert second == "Q: 1+1?\nA: 2\n\nQ: 3+3?\nA: 6\n\nQ: 2+2?\nA:"
    assert third == "Q: 1+1?\nA: 2\n\nQ: 2+2?\nA: 4\n\nQ: 3+3?\nA:"
    described = {"fewshot": 1, "description": "Add.", "fewshot_separator": "\n--\n", "limit": 1}
    assert texts_of(folder, tokenizer, **TEMPLATED, **described) == ["Add.\n--\nQ: 2+2?\nA: 4\n--\nQ: 1+1?\nA:"]


def test_drawn_examples_differ_by_row_and_seed_and_are_never_the_row_itself(folder: Path, tokenizer: Tokenizer) -> None:
    write_rows(folder / "train.jsonl", [*ROWS, *ROWS])  # each row twice: neither copy may be drawn
    settings = {**TEMPLATED, "fewshot": 3, "fewshot_files": "train.jsonl"}
    drawn = texts_of(folder, tokenizer, **settings, fewshot_seed=1)
    assert drawn == texts_of(folder, tokenizer, **settings, fewshot_seed=1)
    assert drawn[:2] == texts_of(folder, tokenizer, **settings, fewshot_seed=1, limit=2)
    assert drawn != texts_of(folder, tokenizer, **settings, fewshot_seed=2)
    assert len({text.rpartition("\n\n")[0] for text in drawn}) == len(ROWS)
    for row, text in zip(ROWS, drawn, strict=True):
        assert text.count(f"Q: {row['question']}") == 1
        assert text.count("Q:") == 4


def test_too_few_examples_to_draw_from_are_an_error(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"fewshot is 6, but .* have 5 rows besides the one in question, .*:1; lower"):
        texts_of(folder, tokenizer, **ASKING, fewshot=6)


def test_a_prompt_without_room_is_an_error_or_loses_its_beginning(folder: Path, tokenizer: Tokenizer) -> None:
    settings = {**ASKING, "max_new_tokens": 10}
    whole = asked(task_of(folder, **settings), tokenizer).examples[0].prompt
    assert whole is not None
    window = len(whole) + 10
    assert asked(task_of(folder, **settings), tokenizer, window).examples[0].prompt is not None
    sentence = (
        r"6 records \(.*a\.jsonl:1, .*a\.jsonl:2, \.\.\.\): the prompt has up to \d+ tokens, but max_new_tokens 10"
    )
    with pytest.raises(UserError, match=sentence):
        asked(task_of(folder, **settings), tokenizer, window - 1)
    cut = asked(task_of(folder, **settings, cut_long_prompts=True), tokenizer, window - 1)
    assert cut.examples[0].prompt is not None
    assert cut.examples[0].prompt.tolist() == [whole[0], *whole[2:]]
    assert cut.counts["prompts_cut"] == cut.counts["prompt_tokens_cut"] == 6
    assert cut.notes == ("made: prompts cut at their beginning: 6 of 6, by 6 tokens together",)
    with pytest.raises(UserError, match="nothing would be left of the prompt"):
        asked(task_of(folder, **settings, cut_long_prompts=True), tokenizer, 11)
    with pytest.raises(UserError, match="max_new_tokens 10 of the task made leaves no token of the model's 10"):
        asked(task_of(folder, **settings), tokenizer, 10)


def test_the_record_has_what_the_measures_saw(folder: Path, tokenizer: Tokenizer) -> None:
    write_rows(folder / "a.jsonl", [{"question": "6*7?", "answer": "6*7 is\n#### 1,042"}])
    settings = {"extract": "last_number", "extract_target": "final_answer", "metrics": ["exact_match", "bleu"]}
    task = task_of(folder, **ASKING, **settings)
    (example,) = asked(task, tokenizer).examples
    answer = Generated(ids=(1, 2), text="It is $1,042.00.", ended_by="stop string")
    record = KINDS["generate"].record(task, example, answer)
    bleu = record["statistics"].pop("bleu")
    assert len(bleu) == 10
    assert record == {
        "example": "a.jsonl:1",
        "prediction": "It is $1,042.00.",
        "extracted": "1042",
        "references": ["1042"],
        "ended_by": "stop string",
        "statistics": {"exact_match": [1.0, 1.0]},
    }
    assert json.loads(json.dumps(record)) == record


def test_a_column_with_a_list_has_several_references(folder: Path, tokenizer: Tokenizer) -> None:
    write_rows(folder / "a.jsonl", [{"question": "capital?", "answer": {"aliases": ["Paris", "paris"]}}])
    task = task_of(folder, **{**ASKING, "target": "answer.aliases"})
    (example,) = asked(task, tokenizer).examples
    answer = Generated(ids=(), text="paris", ended_by="end token")
    assert KINDS["generate"].record(task, example, answer)["statistics"] == {"exact_match": [1.0, 1.0]}


def test_empty_prompts_and_targets_are_counted(folder: Path, tokenizer: Tokenizer) -> None:
    write_rows(folder / "a.jsonl", [{"question": "", "answer": "2"}, {"question": "x", "answer": " "}, ROWS[0]])
    found = asked(task_of(folder, **ASKING), tokenizer)
    assert found.counts == {"prompts_cut": 0, "prompt_tokens_cut": 0, "empty_prompts": 1, "empty_targets": 1}
    assert found.notes == ("made: empty prompts: 1 of 3", "made: empty targets: 1 of 3")
    assert found.examples[0].prompt is not None
    assert found.examples[0].prompt.tolist() == [tokenizer.bos_id]


PLACES = {
    "no column": (
        {"prompt": "questoin"},
        r"a\.jsonl:1: `prompt` is questoin, but .* the columns are question, answer\.",
    ),
    "no column of a column": ({"prompt": "question.x"}, r"a\.jsonl:1: `prompt` is question\.x, but there is no such c"),
    "undefined": (
        {"prompt": "{{ q }}"},
        r"a\.jsonl:1: the template of `prompt` fails: 'q' is undefined; the columns a",
    ),
    "fails": ({"prompt": "{{ 1 // 0 }}"}, r"a\.jsonl:1: the template of `prompt` fails: integer div"),
    "unsafe": ({"prompt": "{{ question.__class__ }}"}, r"a\.jsonl:1: the template of `prompt` fails: access to attri"),
    "nothing found": ({"extract_target": "final_answer"}, r"a\.jsonl:1: extract_target final_answer finds nothing in"),
    "rows of lines": ({"rows": "examples"}, r"tasks\.yaml:1: rows examples is for \.json files, but .*a\.jsonl is n"),
    "columns of lines": ({"columns": ["a"]}, r"tasks\.yaml:1: columns are for \.csv and \.tsv files, but .*a\.jsonl"),
}


@pytest.mark.parametrize("mistake", PLACES)
def test_what_a_row_lacks_is_said_with_its_place(folder: Path, tokenizer: Tokenizer, mistake: str) -> None:
    settings, sentence = PLACES[mistake]
    with pytest.raises(UserError, match=sentence):
        asked(task_of(folder, **{**ASKING, **settings}), tokenizer)


def test_columns_that_hold_no_text_are_refused(folder: Path, tokenizer: Tokenizer) -> None:
    for value, sentence in (
        ([], "is an empty list"),
        ({"a": 1}, "is an object, but it must be text"),
        (None, "is null"),
    ):
        write_rows(folder / "a.jsonl", [{"question": "x", "answer": value}])
        with pytest.raises(UserError, match=sentence):
            asked(task_of(folder, **ASKING), tokenizer)
    write_rows(folder / "a.jsonl", [{"question": None, "answer": "2"}])
    with pytest.raises(UserError, match=r"the template of `prompt` fails: a value that it prints is null; the columns"):
        asked(task_of(folder, **TEMPLATED), tokenizer)
    write_rows(folder / "a.jsonl", [["x"]])
    with pytest.raises(UserError, match=r"a\.jsonl:1: the row is a list"):
        asked(task_of(folder, **ASKING), tokenizer)
    (folder / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"tasks\.yaml:1: the task made is empty: there is no row in .*a\.jsonl\."):
        asked(task_of(folder, **ASKING), tokenizer)


def test_every_kind_of_file_gives_the_same_examples(folder: Path, tokenizer: Tokenizer) -> None:
    lines = (folder / "a.jsonl").read_bytes()
    table = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.csv").write_text(table)
    (folder / "a.tsv").write_text(table.replace(",", "\t"))
    (folder / "under.json").write_text(json.dumps({"canary": "x", "examples": ROWS}, indent=1))
    (folder / "headless.csv").write_text(table.partition("\n")[2])
    expected = texts_of(folder, tokenizer, **ASKING)
    more: dict[str, dict[str, Any]] = {
        "under.json": {"rows": "examples"},
        "headless.csv": {"columns": ["question", "answer"]},
    }
    for name in ("a.json", "a.jsonl.gz", "a.csv", "a.tsv", *more):
        assert texts_of(folder, tokenizer, **{**ASKING, "files": name}, **more.get(name, {})) == expected, name


def test_an_object_without_the_list_of_rows_is_refused(folder: Path, tokenizer: Tokenizer) -> None:
    settings = {**ASKING, "files": "a.json", "rows": "examples"}
    for text, sentence in (
        ('{"data": []}', r"a\.json: the file must be an object with a list under examples, but it holds the keys data"),
        ("[]", "but it holds an empty list"),
        ('{"examples": [', "a.json: the file is not valid JSON"),
    ):
        (folder / "a.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            asked(task_of(folder, **settings), tokenizer)


def test_few_shot_examples_may_be_of_another_split_of_a_trace_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, row in (("test", ROWS[0]), ("eval", ROWS[1]), ("train", ROWS[2])):
        (tmp_path / f"{name}.json").write_text(json.dumps([row, {**row, "answer": "none"}]))
    settings = {**TEMPLATED, "files": ".", "fewshot": 1, "limit": 1, "fewshot_separator": "|"}
    assert texts_of(tmp_path, tokenizer, **settings) == ["Q: 1+1?\nA: none|Q: 1+1?\nA:"]
    assert texts_of(tmp_path, tokenizer, **settings, split="eval") == ["Q: 2+2?\nA: none|Q: 2+2?\nA:"]
    assert texts_of(tmp_path, tokenizer, **settings, fewshot_split="train") == ["Q: 3+3?\nA: 6|Q: 1+1?\nA:"]


def test_a_template_keeps_white_space_at_its_end(folder: Path, tokenizer: Tokenizer) -> None:
    assert texts_of(folder, tokenizer, **{**ASKING, "prompt": "{{ question }} \n\n"}, limit=1) == ["1+1? \n\n"]


def test_names_of_examples_tell_files_apart_wherever_these_are(folder: Path, tokenizer: Tokenizer) -> None:
    for name in ("x", "y"):
        (folder / name).mkdir()
        (folder / name / "test.json").write_text(json.dumps(ROWS[:1]))
    examples = asked(task_of(folder, **{**ASKING, "files": ["x", "y", "a.jsonl"], "limit": 3}), tokenizer).examples
    assert [example.place for example in examples] == [
        "x/test.json:1, record 1",
        "y/test.json:1, record 1",
        "a.jsonl:1",
    ]
