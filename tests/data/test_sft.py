"""Examples hold exactly the tokens they should, trained where they should, and every record is accounted for."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hft_megatron.config.data import DataConfig
from hft_megatron.data import dataset as dataset_module
from hft_megatron.data.chat import LossRule
from hft_megatron.data.dataset import SftDataset
from hft_megatron.data.examples import ExampleRules, completion_pieces
from hft_megatron.data.files.sources import TRAIN_SPLIT, find_sources
from hft_megatron.data.formats.completions import Completion
from hft_megatron.data.loading import load_sft_dataset, training_data, validation_data
from hft_megatron.data.pairs import load_pair_dataset
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, trained_text, write_rows
from tests.support.preprocessing import make
from tests.support.tokenizers import make_byte_level, train_sentencepiece

MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '### ' + m['role'] + ':\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(None, train_sentencepiece(tmp_path / "tokenizer"))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_real_prompt_and_completion_rows_train_exactly_the_completion(
    shared_data: Path, llama2: Callable[[str | None], Tokenizer], tmp_path: Path, kind: str
) -> None:
    lines = (shared_data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    rows = [json.loads(line) for line in lines]
    endings = ["\n", "", " ", "\nAnswer:", "\n\n"]
    pairs = [
        {"prompt": row["question"] + endings[number % 5], "completion": row["answer"]}
        for number, row in enumerate(rows)
    ]
    tokenizer = llama2(kind)
    dataset = load(write_rows(tmp_path / "gsm8k.jsonl", pairs), tokenizer, 2048, "error")
    assert len(dataset) == 300
    for index, pair in enumerate(pairs):
        assert trained_text(dataset, tokenizer, index) == pair["completion"]
        ids, mask = dataset.example(index)
        assert ids[0] == tokenizer.bos_id
        # What generation will be given is exactly what stands before the trained span.
        assert ids[1 : int(mask.argmax())].tolist() == tokenizer.encode(pair["prompt"])


# What an export of Llama 2's tokenizer gives is loaded in seconds; templates treat the small one's text alike.
@pytest.mark.parametrize(
    ("template", "source"),
    [(None, "tokenizers/llama2"), (MARKED, "stories260K")],
    ids=["built in", "marked"],
)
def test_real_conversations_train_exactly_the_assistants_text(
    shared_data: Path, tmp_path: Path, template: str | None, source: str
) -> None:
    lines = (shared_data / "preference/ultrafeedback_train.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    rows = [{"messages": json.loads(line)["chosen"]} for line in lines]
    folder = tmp_path / "tokenizer"
    load_tokenizer("SentencePieceTokenizer", shared_data / source).export(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(None, folder)
    dataset = load(write_rows(tmp_path / "chosen.jsonl", rows), tokenizer, 1 << 16, "error")
    assert len(dataset) == 300
    for index, row in enumerate(rows):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert trained_text(dataset, tokenizer, index) == row["messages"][-1]["content"]


def test_the_seam_gives_the_tokens_of_generation(tokenizer: Tokenizer) -> None:
    pieces = completion_pieces(Completion(place="x:1", prompt="Answer:", completion="17"), tokenizer, LossRule())
    ((ids, mask),) = tokenizer.encode_pieces([pieces])
    prompt = [tokenizer.bos_id, *tokenizer.encode("Answer:")]
    digits = tokenizer.encode_batch(["1", "7"], continues=True)
    assert ids.tolist() == [*prompt, *digits[0], *digits[1], tokenizer.eos_id]
    assert mask.tolist() == [False] * len(prompt) + [True] * 3


def test_without_a_prompt_the_completion_starts_the_text(tokenizer: Tokenizer) -> None:
    pieces = completion_pieces(Completion(place="x:1", prompt="", completion="Once upon"), tokenizer, LossRule())
    ((ids, mask),) = tokenizer.encode_pieces([pieces])
    assert ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("Once upon"), tokenizer.eos_id]
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_the_literal_name_of_a_special_token_in_a_prompt_is_text(tokenizer: Tokenizer) -> None:
    pieces = completion_pieces(Completion(place="x:1", prompt="<s> x </s>", completion="<s>"), tokenizer, LossRule())
    ((ids, _),) = tokenizer.encode_pieces([pieces])
    assert [int(token) for token in ids if token in (tokenizer.bos_id, tokenizer.eos_id)] == [
        tokenizer.bos_id,
        tokenizer.eos_id,
    ]


def long_rows(tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], int]:
    """An example that just fits the returned sequence length, one with one position more, one with a long prompt."""
    rows = [
        {"prompt": "Q", "completion": "1234"},
        {"prompt": "Q", "completion": "12345"},
        {"prompt": "7" * 40, "completion": "1"},
    ]
    pieces = completion_pieces(Completion(place="x:1", prompt="Q", completion="1234"), tokenizer, LossRule())
    return rows, len(tokenizer.encode_pieces([pieces])[0][0]) - 1


def test_the_length_limit_is_on_positions_and_long_examples_follow_the_option(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows, seq_length = long_rows(tokenizer)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"^2 records \(.*rows.jsonl:2, .*:3\): the example has up to \d+ pos"):
        load(path, tokenizer, seq_length, "error")

    dropped = load(path, tokenizer, seq_length, "drop")
    assert (len(dropped), dropped.parts[0].counts.dropped, dropped.parts[0].counts.truncated) == (1, 2, 0)
    assert dropped.num_positions(0) == seq_length

    truncated = load(path, tokenizer, seq_length, "truncate")
    assert (len(truncated), truncated.parts[0].counts.dropped, truncated.parts[0].counts.truncated) == (2, 1, 1)
    assert truncated.num_positions(1) == seq_length
    # One token of the second example is cut off; of the third nothing is left that is trained.
    lost = 1 + load(path, tokenizer).num_positions(2)
    assert f"1 truncated and 1 dropped with {lost} tokens lost (" in truncated.describe()[0]
    assert truncated.parts[0].counts.trained_tokens == 5 + 5


@pytest.mark.parametrize("seq_length", [1, 2, 3, 5, 8, 40])
def test_split_examples_predict_every_trained_token_once_and_none_twice(
    tmp_path: Path, tokenizer: Tokenizer, seq_length: int
) -> None:
    rows = [
        {"prompt": "Q", "completion": "0123456789" * 3},
        {"prompt": "7" * 40, "completion": "1"},
        {"prompt": "Q", "completion": "1"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    whole, split = load(path, tokenizer, 4096), load(path, tokenizer, seq_length, "split")

    def predicted(dataset: SftDataset) -> list[int]:
        parts = [dataset.example(index) for index in range(len(dataset))]
        return [int(token) for ids, mask in parts for token in ids[1:][mask[1:]]]

    assert predicted(split) == predicted(whole)
    counts, positions = split.parts[0].counts, int(whole.lengths.sum()) - len(whole)
    assert all(0 < split.num_positions(index) <= seq_length for index in range(len(split)))
    assert counts.trained_tokens == whole.parts[0].counts.trained_tokens
    assert counts.split == sum(whole.num_positions(index) > seq_length for index in range(3))
    assert (counts.truncated, counts.dropped) == (0, 0)
    # What is lost are parts of prompts in which nothing is trained.
    assert counts.lost_tokens == positions - (int(split.lengths.sum()) - len(split))
    assert counts.lost_tokens > 0
    assert f"0 dropped with {counts.lost_tokens} tokens lost, {counts.split} split (" in split.describe()[0]


def test_data_without_examples_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="holds no example to train on: it is empty"):
        load(path, tokenizer, 8, "error")
    write_rows(path, [{"prompt": "7" * 40, "completion": "1"}])
    with pytest.raises(UserError, match="all 1 were longer than --seq-length 8"):
        load(path, tokenizer, 8, "truncate")


def test_an_example_with_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path / "tokenizer", bos_id=-1))
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "", "completion": ""}])
    with pytest.raises(UserError, match=r"rows.jsonl:1: the example has no token to predict"):
        load(path, tokenizer, 8, "error")


def test_a_conversation_the_template_refuses_is_named_by_line(tmp_path: Path) -> None:
    folder = make_byte_level(tmp_path / "hf", chat_template="{{ raise_exception('roles must alternate') }}")
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}])
    with pytest.raises(UserError, match=r"rows.jsonl:1: the chat template refuses the messages: roles must alternate"):
        load(path, load_tokenizer(None, folder), 8, "error")


@pytest.mark.parametrize(
    ("words", "end"),
    [("one by one!", "one by one."), ("No.", "No."), ("user/assistant/...", "user/assistant/…."), ("so", "so.")],
)
def test_a_templates_own_words_end_with_one_stop(tmp_path: Path, words: str, end: str) -> None:
    folder = make_byte_level(tmp_path / "hf", chat_template=f"{{{{ raise_exception('{words}') }}}}")
    path = write_rows(tmp_path / "rows.jsonl", [ANSWERED])
    tokenizer = load_tokenizer(None, folder)
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    assert str(caught.value).endswith(f"refuses the messages: {end}")
    with pytest.raises(UserError) as caught:
        make(tmp_path / "prefix", path, tokenizer)
    assert f"refuses the messages: {end[:-1]}; or skip it with --on-bad-line skip." in str(caught.value)


ANSWERED = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level", "marked"])
def test_any_text_is_trained_exactly_or_refused_by_line(tmp_path: Path, kind: str) -> None:
    if kind == "sentencepiece":
        tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path / "tokenizer"))
    else:
        folder = make_byte_level(tmp_path / "tokenizer", chat_template=MARKED if kind == "marked" else None)
        tokenizer = load_tokenizer(None, folder)
    parts = ["<s>", "</s>", "<|im_end|>", "<|assistant|>", " ", "\n", "\t", "\r\n", "a", "Once", "7", "é", "🧑‍🚀"]
    parts += ["\x00", "{{ x }}", "{% generation %}", "\u2028", "\ufeff", "\ufdd1", "日本", "\\", '"']
    rng = random.Random(0)
    path, refused = tmp_path / "rows.jsonl", 0
    for _ in range(300):
        user, assistant = ("".join(rng.choices(parts, k=rng.randint(0, 6))) for _ in range(2))
        row = {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}
        write_rows(path, [row, ANSWERED])  # a source of empty answers alone would be refused
        if "\ufdd1" in user + assistant:
            with pytest.raises(UserError, match=r"rows.jsonl:1: the text contains a Unicode noncharacter"):
                load(path, tokenizer, 512, "error")
            refused += 1
        else:
            dataset = load(path, tokenizer, 512, "error")
            assert trained_text(dataset, tokenizer, 0) == assistant
    assert 0 < refused < 150


def test_many_records_come_out_in_file_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "n", "completion": str(number)} for number in range(2500)]
    dataset = load(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, 64, "error")
    assert [trained_text(dataset, tokenizer, index) for index in range(0, 2500, 7)] == [
        str(number) for number in range(0, 2500, 7)
    ]
    assert [array.dtype for array in dataset.example(0)] == [np.int32, np.bool_]


def test_the_digest_changes_with_everything_that_changes_examples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    other_path = write_rows(tmp_path / "other.jsonl", rows * 2)
    other_tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path / "other", vocab_size=350))
    tokenizer.export(tmp_path / "templated")
    (tmp_path / "templated/chat_template.jinja").write_text(MARKED)
    tokenizer.export(tmp_path / "exported")
    digests = [
        load(path, tokenizer, 64, "error").digest,
        load(other_path, tokenizer, 64, "error").digest,
        load(path, other_tokenizer, 64, "error").digest,
        load(path, load_tokenizer(None, tmp_path / "exported"), 64, "error").digest,
        load(path, load_tokenizer(None, tmp_path / "templated"), 64, "error").digest,
        load(path, tokenizer, 65, "error").digest,
        load(path, tokenizer, 64, "drop").digest,
    ]
    assert len(set(digests)) == len(digests)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(path.read_bytes())
    assert load(moved, tokenizer, 64, "error").digest == digests[0]


def sources(tmp_path: Path) -> list[Path]:
    """Four examples of "a" and eight of "b"."""
    return [
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": str(number)} for number in range(count)])
        for name, count in (("a", 4), ("b", 8))
    ]


def test_several_sources_without_weights_are_one_data_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a, b = sources(tmp_path)
    dataset = load([a, b], tokenizer)
    assert [part.examples for part in dataset.parts] == [4, 8]
    order = dataset.order(seed=3)
    assert sorted(order.sample_index(consumed) for consumed in range(12)) == list(range(12))
    single = load(
        write_rows(tmp_path / "c.jsonl", [json.loads(line) for file in (a, b) for line in file.open()]), tokenizer
    )
    for index in range(12):
        assert np.array_equal(dataset.example(index), single.example(index))
    assert [order.sample_index(c) for c in range(30)] == [single.order(seed=3).sample_index(c) for c in range(30)]
    assert len(dataset.describe()) == 2
    assert "weight" not in "".join(dataset.describe())


def test_weights_decide_how_many_samples_of_an_epoch_are_of_each_source(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a, b = sources(tmp_path)
    dataset = load([0.75, a, 0.25, b], tokenizer)
    order = dataset.order(seed=3)
    drawn = [order.sample_index(consumed) for consumed in range(12)]
    assert sum(index < 4 for index in drawn) == 9
    assert "9 samples of it in an epoch of 12 (weight 0.75)" in dataset.describe()[0]
    with pytest.raises(
        UserError, match=r"the weight 0.001 of .*b.jsonl gives it no sample in an epoch of 12; raise it"
    ):
        load([1, a, 0.001, b], tokenizer)


def test_the_digest_is_of_bytes_weights_and_their_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a, b = sources(tmp_path)
    lists: list[list[object]] = [[a, b], [b, a], [a], [1, a, 1, b], [1, a, 2, b], [a, a]]
    digests = [load(words, tokenizer).digest for words in lists]
    assert len(set(digests)) == len(lists)
    (tmp_path / "copy").mkdir()
    for file in (a, b):
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    copies = [1, tmp_path / "copy/a.jsonl", 2.0, tmp_path / "copy/b.jsonl"]
    assert load(copies, tokenizer).digest == digests[4]


def test_the_loss_rule_is_part_of_the_digest(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = sources(tmp_path)[0]
    rules: list[dict[str, Any]] = [{}, {"loss_on": "all"}, {"loss_on": "last"}, {"train_on_eos": False}]
    assert len({load(path, tokenizer, **rule).digest for rule in rules}) == 4


def test_keys_and_separator_are_part_of_the_digest_and_stand_in_the_log(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q", "completion": "1", "title": "T"}])
    loads = [
        load(path, tokenizer),
        load(path, tokenizer, joined="\n"),
        load(path, tokenizer, keys=(("title", "text"),)),
    ]
    assert len({dataset.digest for dataset in loads}) == 3
    notes = ["", ", '\\n' between prompt and answer", ", `title` as `text`"]
    for dataset, note in zip(loads, notes, strict=True):
        assert dataset.describe()[0].startswith(f"{path} (prompt-completion{note}): 1 examples of 1 records")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data_keys": "titel=text"}, r"--data-keys titel=text: no record of --train-data-path has the key `titel`; "),
        ({"prompt_separator": r"\n"}, r"--prompt-separator '\\n' goes between a prompt and an answer that are texts"),
    ],
)
def test_an_option_about_records_that_does_nothing_is_named(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, str], sentence: str
) -> None:
    text = str(write_rows(tmp_path / "text.jsonl", [{"text": "a"}]))
    pair = str(write_rows(tmp_path / "pair.jsonl", [{"prompt": "Q", "completion": "1", "titel": "T"}]))
    with pytest.raises(UserError, match=sentence):
        training_data(DataConfig(train_data_path=(text,), **options), tokenizer, 99)
    # Where something of a mixture has a use for it, it did something; validation data may do without.
    data = DataConfig(train_data_path=(text, pair), valid_data_path=(text,), **options)
    assert training_data(data, tokenizer, 99) is not None
    assert len(validation_data(data, tokenizer, 99)) == 1
    with pytest.raises(UserError, match=sentence.replace("--train", "--valid")):
        validation_data(DataConfig(valid_data_path=(text,), **options), tokenizer, 99)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("path: absent.jsonl", "FILE:1: path FOLDER/absent.jsonl: there is no such file."),
        ("path: [text.jsonl, made]", "FILE:1: path FOLDER/made is preprocessed and must be a source alone"),
        (
            "path: text.jsonl, chat_template: absent",
            "FILE:1: --chat-template FOLDER/absent is neither a file nor one of",
        ),
        (
            "path: text.jsonl, data_keys: a=text",
            "FILE:1: --data-keys a=text: no record of x has the key `a`; correct it.",
        ),
        (
            "path: text.jsonl, prompt_separator: b",
            "FILE:1: --prompt-separator 'b' goes between a prompt and an answer",
        ),
    ],
)
def test_what_an_entry_of_the_validation_data_asks_for_and_does_not_get_is_named(
    tmp_path: Path, tokenizer: Tokenizer, entry: str, sentence: str
) -> None:
    write_rows(tmp_path / "text.jsonl", [{"text": "a"}])
    (tmp_path / "made.idx").touch()
    file = tmp_path / "valid.yaml"
    file.write_text(f"- {{name: x, {entry}}}\n- {{name: y, path: [text.jsonl, text.jsonl]}}\n")
    with pytest.raises(UserError) as error:
        validation_data(DataConfig(train_data_path=("t",), valid_data_path=(str(file),)), tokenizer, 99)
    assert str(error.value).startswith(sentence.replace("FILE", str(file)).replace("FOLDER", str(tmp_path)))


def test_all_that_is_wrong_with_records_is_said_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = [{"prompt": "Q", "completion": "7" * size} for size in (90, 40, 60)]
    good = {"prompt": "Q", "completion": "1"}
    a = write_rows(tmp_path / "a.jsonl", [good, long[0], {"prompt": 1, "completion": "1"}])
    b = write_rows(tmp_path / "b.jsonl", long[1:])
    with pytest.raises(UserError) as caught:
        load([a, b], tokenizer, 20)
    first, second = str(caught.value).split(". ")
    assert first.startswith(f"3 records ({a}:2, {b}:1, ...): the example has up to ")
    assert second.startswith(f"{a}:3: `prompt` is a number")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "b"},
    ]
    path = write_rows(tmp_path / "tools.jsonl", [{"messages": messages}] * 3)
    with pytest.raises(UserError, match=r"^3 records \(.*:1, .*:2, \.\.\.\): the chat template .*the role tool"):
        load(path, tokenizer)
    with pytest.raises(UserError, match=r"^2 records \(.*:1, .*:2\): the example has no token to predict"):
        load(write_rows(tmp_path / "text.jsonl", [{"text": ""}] * 2), tokenizer, train_on_eos=False)


def test_preference_pairs_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match=r"rows.jsonl:1: the record is a preference pair .* cannot learn"):
        load(path, tokenizer)


@pytest.mark.parametrize(
    ("rule", "trained"),
    [
        ({"loss_on": "all"}, [True, True, True, True]),
        ({"loss_on": "all", "train_on_eos": False}, [True, True, True, False]),
        ({}, [False, False, True, True]),
        ({"loss_on": "last"}, [False, False, True, True]),
        ({"train_on_eos": False}, [False, False, True, False]),
    ],
)
def test_the_loss_rule_decides_what_of_a_completion_is_trained(
    tokenizer: Tokenizer, rule: dict[str, Any], trained: list[bool]
) -> None:
    pieces = completion_pieces(Completion(place="x:1", prompt="7", completion="12"), tokenizer, LossRule(**rule))
    assert [(piece.text, piece.trained) for piece in pieces] == list(
        zip(["<s>", "7", "12", "</s>"], trained, strict=True)
    )


MEANING = {2: "56ad15c2fa597c6f818079c5ad4c25f3f22b4e6fcac405e9b112a21816ea99a9"}
"""sha256 of what the records below become, by the version of reading."""


def test_the_same_records_become_the_same_examples_or_the_reading_has_another_version(tmp_path: Path) -> None:
    """Where this fails, what records mean has changed: raise ``_READING``, so that runs of before are not resumed."""
    tokenizer = load_tokenizer(None, make_byte_level(tmp_path / "bytes", merges=False))
    asked, answer = {"role": "user", "content": "a \n"}, {"role": "assistant", "content": " b "}
    sft: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                asked,
                answer,
                asked,
                {**answer, "weight": 0},
                asked,
                answer,
            ]
        },
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "id": 1},
        {"instruction": "a", "input": "i", "output": "b", "history": [["c", "d"]]},
        {"prompt": "a ", "completion": " b"},
        {"prompt": "a", "answer": "b"},
        {"input": "a", "output": "b"},
        {"text": "a<|im_end|>b"},
    ]
    pairs: list[dict[str, Any]] = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a \n", "chosen": "a \nb", "rejected": "a \nc"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"system": "s", "prompt": "a", "chosen": [answer], "rejected": [{**answer, "content": "c"}]},
        {"chosen": [asked, answer], "rejected": [asked, {**answer, "content": "c"}]},
        {"conversations": [asked], "chosen": answer, "rejected": {**answer, "content": "c"}},
        {"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"},
    ]
    digest = hashlib.sha256()
    for number, row in enumerate([*sft, *pairs]):
        path = write_rows(tmp_path / f"{number}.jsonl", [row])
        sources = find_sources("--train-data-path", [str(path)], TRAIN_SPLIT)
        rules = ExampleRules(seq_length=512)
        found = (
            load_sft_dataset(sources, tokenizer, rules)
            if number < len(sft)
            else load_pair_dataset(sources, tokenizer, rules, "error").answers
        )
        for index in range(len(found)):
            for array in found.example(index):
                digest.update(array.tobytes())
    assert {dataset_module._READING: digest.hexdigest()} == MEANING


def test_examples_are_named_by_the_file_and_line_of_their_record(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"prompt": "Say it: ", "completion": "yes"}
    long = {"prompt": "Say it: ", "completion": "yes " * 40}
    lines = write_rows(tmp_path / "b.jsonl", [row, long, row])
    other = write_rows(tmp_path / "a: 1.jsonl", [row])
    array = tmp_path / "c.json"
    array.write_text(json.dumps([row, row], indent=0))
    prefix = tmp_path / "kept"
    make(prefix, lines, tokenizer, seq_length=30, long_examples="drop")
    words = [tmp_path / "*.jsonl", array, prefix]
    dataset = load(words, tokenizer, seq_length=30, long_examples="drop")
    names = [dataset.names([index]) for index in range(len(dataset))]
    assert names[:3] == [f"{other}:1", f"{lines}:1", f"{lines}:3"]
    assert names[3:5] == [f"{array}:2, record 1", f"{array}:6, record 2"]
    assert names[5:] == [f"example 1 of {prefix}", f"example 2 of {prefix}"]
    assert dataset.names([1] * 9) == f"{', '.join([f'{lines}:1'] * 8)} and 1 more"
    split = load(lines, tokenizer, seq_length=30, long_examples="split")
    assert split.names([1, 2]) == f"{lines}:2, {lines}:2"


def test_pairs_are_named_by_the_file_and_line_of_their_record(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pair = {"prompt": "Say it: ", "chosen": "yes", "rejected": "no"}
    files = [write_rows(tmp_path / f"{name}.jsonl", [pair] * count) for name, count in (("a", 1), ("b", 2))]
    sources = find_sources("--train-data-path", [str(file) for file in files], TRAIN_SPLIT)
    dataset = load_pair_dataset(sources, tokenizer, ExampleRules(seq_length=64), "error")
    assert dataset.names([0, 1, 2]) == f"{files[0]}:1, {files[1]}:1, {files[1]}:2"
