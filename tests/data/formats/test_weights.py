"""A turn whose record takes it out of what is learned is context. Run: pytest tests/data/formats"""

import json
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.data.formats.conversations import Chat
from hft_megatron.data.formats.preference import Preference
from hft_megatron.data.records import weigh
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, trained_texts, write_rows
from tests.support.tokenizers import make_byte_level

TEXTS = [
    ("user", "1 + 2?"),
    ("assistant", "4"),
    ("user", "No."),
    ("assistant", "3"),
    ("user", "?"),
    ("assistant", "Yes"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(None, make_byte_level(tmp_path_factory.mktemp("tokenizer")), "chatml")


def conversation(**of_turn: Any) -> list[dict[str, Any]]:
    """The messages; ``a1={"weight": 0}`` adds keys to the second."""
    return [
        {"role": role, "content": text, **of_turn.get(f"{role[0]}{number}", {})}
        for number, (role, text) in enumerate(TEXTS)
    ]


def sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt"}
    return [
        {"from": names[turn["role"]], "value": turn["content"]}
        | {key: value for key, value in turn.items() if key not in ("role", "content")}
        for turn in messages
    ]


OFF = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"training": 0}, {"train_on_turn": False}]
OFF += [{"loss_mask": 0}, {"weight": 0, "train": False}, {"weight": None, "loss": False}, {"masked": True}]


@pytest.mark.parametrize("off", OFF, ids=str)
def test_a_turn_that_is_switched_off_is_read_and_not_trained(tmp_path: Path, tokenizer: Tokenizer, off: Any) -> None:
    messages = conversation(a1=off, a3={"weight": 1, "masked": False}, a5={"train": True}, u0={"masked": True})
    plain = load(write_rows(tmp_path / "plain.jsonl", [{"messages": conversation()}]), tokenizer)
    for row in ({"messages": messages}, {"conversations": sharegpt(messages)}):
        dataset = load(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)
        assert trained_texts(dataset, tokenizer, 0, "chatml") == ["3", "Yes"]
        assert dataset.example(0)[0].tolist() == plain.example(0)[0].tolist()
        assert dataset.parts[0].counts.untrained_turns == 1
        assert dataset.describe()[1:] == [f"{tmp_path / 'rows.jsonl'}: turns not trained, by a key of their own: 1"]
        assert dataset.digest != plain.digest


def test_the_options_and_the_turns_both_take_out_what_is_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    halves = {"prompt": conversation(a1={"weight": 1})[:2], "completion": conversation(a3={"weight": 0})[2:]}
    path = write_rows(tmp_path / "halves.jsonl", [halves])
    assert trained_texts(load(path, tokenizer), tokenizer, 0, "chatml") == ["Yes"]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": conversation(a3={"loss": False})}])
    assert trained_texts(load(path, tokenizer, loss_on="last"), tokenizer, 0, "chatml") == ["Yes"]
    names = {token.id: token.content for token in tokenizer.facts.special_tokens}
    for train_on_eos, left_out in ((True, "3<|im_end|>"), (False, "<|im_end|>3<|im_end|><|im_end|>")):
        ids, mask = load(path, tokenizer, loss_on="all", train_on_eos=train_on_eos).example(0)
        assert "".join(names.get(token) or tokenizer.decode([token]) for token in ids[~mask].tolist()) == left_out


def test_an_ignored_weight_trains_the_turn_and_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": conversation(a1={"weight": 0})}])
    dataset = load(path, tokenizer, ignore_keys=("weight",))
    assert trained_texts(dataset, tokenizer, 0, "chatml") == ["4", "3", "Yes"]
    assert dataset.describe()[1:] == [f"{path}: keys ignored by --ignore-keys: weight (1)"]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"a1": {"weight": 0.5}}, "`weight` of message 2 is 0.5, but it must be 0 or 1, or false or true"),
        ({"a1": {"weight": 2}}, "`weight` of message 2 is 2, but"),
        ({"a1": {"train": "false"}}, "`train` of message 2 is 'false', but"),
        ({"a1": {"loss_mask": [0, 1]}}, r"`loss_mask` of message 2 is \[0, 1\], but"),
        ({"a1": {"weight": 1, "loss": False}}, "`weight` 1 and `loss` False of message 2 contradict each other"),
        ({"u2": {"masked": False}}, "`masked` of message 3 asks to train the user's turn, but only the assis"),
        ({"a1": {"masked": 0, "train": False}}, "`train` False and `masked` 0 of message 2 contradict each other"),
        ({"u2": {"train": True}}, "`train` of message 3 asks to train the user's turn, but only the assis"),
    ],
)
def test_a_value_that_is_neither_yes_nor_no_is_named(keys: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^x:1: {sentence}"):
        weigh(Chat(place="x:1", messages=tuple(conversation(**keys))))


def test_a_record_without_a_turn_to_train_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    off = {f"a{number}": {"weight": 0} for number in (1, 3, 5)}
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": conversation(**off)}])
    with pytest.raises(UserError, match=r"rows.jsonl:1: the example has no token to predict, because its messages"):
        load(path, tokenizer)
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": conversation(a5={"weight": 0})}])
    with pytest.raises(UserError, match="no token to predict, because its messages exclude"):
        load(path, tokenizer, loss_on="last")


def test_a_question_that_is_switched_off_contradicts_training_everything(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": conversation(u2={"weight": 0}, u0={"weight": 1})}])
    assert trained_texts(load(path, tokenizer), tokenizer, 0, "chatml") == ["4", "3", "Yes"]
    with pytest.raises(UserError, match="message 3 is not to be trained, but --loss-on all trains every"):
        load(path, tokenizer, loss_on="all")


def test_pairs_have_no_use_for_weights_of_their_answers() -> None:
    prompt, answer = conversation(u0={"weight": 0})[:1], {"role": "assistant", "content": "3"}
    pair = Preference(place="x:1", prompt=tuple(prompt), chosen=({**answer, "weight": 1},), rejected=(answer,))
    weighed = weigh(pair)
    assert isinstance(weighed, Preference)
    assert (weighed.prompt, weighed.chosen) == (({"role": "user", "content": "1 + 2?"},), (answer,))
    off = Preference(place="x:1", prompt=(), chosen=({**answer, "train": False},), rejected=(answer,))
    with pytest.raises(UserError, match=r"^x:1: message 1 of `chosen` is not to be trained, but the answers of a pair"):
        weigh(off)


PRINTING = "{% for m in messages %}{{ m | tojson }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
PRINTING += "{% endfor %}"


def call(**arguments: Any) -> dict[str, Any]:
    return {"name": "f", "arguments": arguments}


def test_a_record_means_the_same_in_parquet_and_in_json(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    tokenizer = load_tokenizer(None, make_byte_level(tmp_path / "tokenizer", chat_template=PRINTING))
    # Parquet has both arguments in both calls, and a null for the one that is missing.
    turns: list[Any] = [
        {"role": "assistant", "content": "b", "weight": 1, "calls": [call(a=1)], "list": None},
        {"role": "assistant", "content": "c", "weight": None, "calls": [call(b={"c": 2}), call()], "list": [1]},
        {"role": "assistant", "content": "d", "weight": None, "calls": [], "list": [1]},
    ]
    rows = [{"messages": [turn], "label": None} for turn in turns]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sets = [load(tmp_path / name, tokenizer) for name in ("rows.parquet", "rows.json")]
    for index in range(len(rows)):
        one, other = (dataset.example(index) for dataset in sets)
        assert one[0].tolist() == other[0].tolist()
        assert one[1].tolist() == other[1].tolist()
    texts = [tokenizer.decode(sets[0].example(index)[0].tolist()) for index in range(len(rows))]
    assert not any("null" in text for text in texts)
    assert '{"c": 2}' in texts[1]
    assert '"calls"' not in texts[2]


def test_a_null_that_an_argument_has_in_json_is_printed_as_transformers_does(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, make_byte_level(tmp_path / "tokenizer", chat_template=PRINTING))
    parts = [{"type": "text", "text": "b", "image_url": None}]
    message = {"role": "assistant", "content": parts, "name": None, "calls": [call(unit=None, city=[{"d": None}])]}
    dataset = load(write_rows(tmp_path / "rows.jsonl", [{"messages": [message], "topic": None}]), tokenizer)
    text = tokenizer.decode(dataset.example(0)[0].tolist())
    assert '"arguments": {"unit": null, "city": [{"d": null}]}' in text
    assert '"name": null' not in text


def test_a_weight_without_a_value_might_as_well_be_missing() -> None:
    weighed = weigh(Chat(place="x:1", messages=tuple(conversation(a1={"weight": "", "train": []}, a3={"loss": 0}))))
    assert isinstance(weighed, Chat)
    assert weighed.untrained == {3}
