"""In every format and template the trained tokens decode to exactly the assistant's texts, on made-up and real rows.

Run: pytest tests/data/test_templates.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from hft_megatron.data.templates import BUILT_IN
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, trained_texts, write_rows
from tests.support.tiers import quick
from tests.support.tokenizers import make_byte_level, train_sentencepiece

HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
OWN = (
    "{{ bos_token }}{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
"""A template of the tokenizer's own, without marks."""
TEXTS = [
    "Héllo 🙂",
    "",
    " \n lead and trail\t\n",
    "日本語\r\n",
    "<s> </s> [/INST] <|im_end|>",
    "a",
    "\u200b\u0000",
    "\ufeff<|eot_id|>",
]
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", TEXTS[0]), ("assistant", TEXTS[0])],
    [("system", TEXTS[4]), ("user", "a"), ("assistant", TEXTS[2]), ("user", TEXTS[3]), ("assistant", TEXTS[4])],
    [("user", ""), ("assistant", ""), ("user", TEXTS[6]), ("assistant", TEXTS[6])],
    [("user", "a"), ("user", "b"), ("assistant", TEXTS[3]), ("assistant", TEXTS[7]), ("user", "last")],
    [("assistant", TEXTS[5]), ("user", "a"), ("system", "b"), ("assistant", TEXTS[1])],
    [("system", "a"), ("system", "b"), ("assistant", TEXTS[0]), ("assistant", TEXTS[0])],
]


@pytest.fixture(scope="module", params=["sentencepiece", "byte level"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder, with every token that a built-in template needs and a template of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        make_byte_level(folder, chat_template=OWN, special=HEADERS)
        return folder
    train_sentencepiece(folder / "model", control_symbols=list(HEADERS))
    load_tokenizer(None, folder / "model").export(folder)
    (folder / "chat_template.jinja").write_text(OWN)
    return folder


def load_with(folder: Path, template: str) -> Tokenizer:
    return load_tokenizer(None, folder, None if template == "own" else template)


Conversation = list[tuple[str, str]]
FORMS: dict[str, Callable[[Conversation], dict[str, Any] | None]] = {
    "messages": lambda turns: {"messages": [{"role": role, "content": text} for role, text in turns]},
    "sharegpt": lambda turns: {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in turns
        ]
    },
    "alpaca": lambda turns: {
        "instruction": "do",
        "input": turns[0][1],
        "output": next(text for role, text in turns if role == "assistant"),
    },
    "prompt-completion": lambda turns: {"prompt": turns[0][1], "completion": answers(turns)[0]},
    "input-output": lambda turns: {"input": turns[0][1], "output": answers(turns)[0]},
    "trace": lambda turns: {"prompt": turns[0][1], "answer": answers(turns)[0]},
    "text": lambda turns: {"text": answers(turns)[0]},
}


def answers(turns: Conversation) -> list[str]:
    return [text for role, text in turns if role == "assistant"]


@pytest.mark.parametrize("template", [*BUILT_IN, "own"])
@pytest.mark.parametrize("form", FORMS)
def test_the_trained_tokens_decode_to_exactly_the_assistants_texts(
    folder: Path, tmp_path: Path, form: str, template: str
) -> None:
    tokenizer = load_with(folder, template)
    dataset = load(write_rows(tmp_path / "rows.jsonl", [FORMS[form](turns) for turns in CONVERSATIONS]), tokenizer)
    assert dataset.parts[0].formats == (form,)
    assert len(dataset) == len(CONVERSATIONS)
    for index, turns in enumerate(CONVERSATIONS):
        whole = answers(turns) if form in ("messages", "sharegpt") else answers(turns)[:1]
        rendered = template if form in ("messages", "sharegpt", "alpaca") else "verbatim"
        assert trained_texts(dataset, tokenizer, index, rendered) == whole


@pytest.mark.parametrize("template", [*BUILT_IN, "own"])
def test_the_last_turn_all_turns_and_the_end_token_follow_the_options(
    folder: Path, tmp_path: Path, template: str
) -> None:
    tokenizer = load_with(folder, template)
    path = write_rows(tmp_path / "rows.jsonl", [FORMS["messages"](turns) for turns in CONVERSATIONS])
    answered, last, whole = (
        load(path, tokenizer),
        load(path, tokenizer, loss_on="last"),
        load(path, tokenizer, loss_on="all"),
    )
    endless = load(path, tokenizer, train_on_eos=False)
    all_endless = load(path, tokenizer, loss_on="all", train_on_eos=False)
    special = {token.id for token in tokenizer.facts.special_tokens}
    for index, turns in enumerate(CONVERSATIONS):
        assert trained_texts(last, tokenizer, index, template) == answers(turns)[-1:]
        ids, mask = answered.example(index)
        ends = np.array([token in special for token in ids]) & mask
        assert int(ends.sum()) == len(answers(turns))
        assert np.array_equal(endless.example(index)[1], mask & ~ends)
        # Without the loss on answers alone, text is cut at the end tokens only, so ids may differ at old seams.
        assert whole.example(index)[1].all()
        ids, mask = all_endless.example(index)
        assert tokenizer.decode(ids.tolist()) == tokenizer.decode(whole.example(index)[0].tolist())
        assert int((~mask).sum()) == len(answers(turns))


@pytest.mark.parametrize("template", [*BUILT_IN, "own"])
def test_transformers_gives_the_same_ids_and_mask_for_an_exported_tokenizer(
    folder: Path, tmp_path: Path, template: str
) -> None:
    tokenizer = load_with(folder, template)
    tokenizer.export(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    # Cuts and hidden names are this project's: texts that neither merge with a tag nor name a token are alike.
    turns = [
        ("system", "Be brief."),
        ("user", "What is it?"),
        ("assistant", "It is 4."),
        ("user", "?"),
        ("assistant", "x"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    dataset = load(write_rows(tmp_path / "rows.jsonl", [{"messages": messages}]), tokenizer)
    ids, mask = dataset.example(0)
    # GPT-2's rule splits two line ends differently before a text and at the end, where generation begins.
    if not (template == "llama3" and tokenizer.continues_after_special):
        theirs = loaded.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=template != "own")
        assert theirs["input_ids"] == ids.tolist()
        assert template == "own" or theirs["assistant_masks"] == mask.astype(int).tolist()
    prompt = loaded.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False)
    assert prompt == ids[: int(mask.argmax())].tolist()


def test_llama_2_and_3_and_chatml_are_the_published_forms() -> None:
    from hft_megatron.data.rendering import Renderer, cut_marks

    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    turns = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")]
    messages = [{"role": role, "content": text} for role, text in turns]

    def rendered(name: str) -> str:
        return cut_marks(Renderer(BUILT_IN[name], variables).render(messages, add_generation_prompt=False))[0]

    assert rendered("llama2") == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST] D </s>"
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    assert rendered("llama3") == "<s>" + "".join(header.format(role, text) for role, text in turns)
    assert rendered("chatml") == "<s>" + "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert rendered("tulu") == (
        "<s><|system|>\nS\n<|user|>\nA\n<|assistant|>\nB</s>\n<|user|>\nC\n<|assistant|>\nD</s>"
    )
    assert rendered("plain") == "<s>S\nA\nB</s>\nC\nD</s>"


def test_a_template_file_is_used_and_exported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(BUILT_IN["plain"])
    tokenizer = load_tokenizer(None, folder, str(tmp_path / "mine.jinja"))
    tokenizer.export(tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == BUILT_IN["plain"]
    assert load_tokenizer(None, folder).facts.chat_template == OWN


def test_a_template_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    sentencepiece = train_sentencepiece(tmp_path / "model")
    (tmp_path / "bad.jinja").write_text("{{ bos_token }}\n{% for m in messages %}")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    (tmp_path / "empty.jinja").touch()
    cases = [
        ("llama3", r"llama3 needs the special token <\|start_header_id\|>, which the tokenizer doesn't have; use tulu"),
        ("chatml", r"chatml needs the special token <\|im_start\|>"),
        ("alpaca", "alpaca is neither a file nor one of plain, tulu, llama2, llama3, chatml; name one of them"),
        (str(tmp_path), "cannot be read: Is a directory"),
        (str(tmp_path / "bytes.jinja"), "cannot be read: it is not text in UTF-8"),
        (str(tmp_path / "empty.jinja"), "empty.jinja is empty; name a jinja file with a template"),
        (str(tmp_path / "bad.jinja"), "bad.jinja: the chat template is not valid jinja: line 2: Unexpected end of"),
    ]
    for choice, sentence in cases:
        with pytest.raises(UserError, match=f"^--chat-template .*{sentence}") as caught:
            load_tokenizer(None, sentencepiece, choice)
        assert "\n" not in str(caught.value)


def real_rows(shared_data: Path) -> list[dict[str, Any]]:
    """Conversations of many turns, some with a system turn, in languages with other scripts."""
    rows = []
    for name, count in (("dpo_en_demo_norm", 120), ("hh_mixed_norm", 120), ("ultrafeedback_train", 60)):
        lines = (shared_data / f"preference/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows += [{"messages": json.loads(line)["chosen"]} for line in lines]
    return rows


@pytest.mark.parametrize("kind", quick(["HuggingFaceTokenizer", "SentencePieceTokenizer"], ["SentencePieceTokenizer"]))
@pytest.mark.parametrize("template", quick(["plain", "tulu", "llama2"], ["llama2"]))
def test_real_conversations_train_exactly_what_the_assistant_says(
    shared_data: Path, tmp_path: Path, template: str, kind: str
) -> None:
    tokenizer = load_tokenizer(kind, shared_data / "tokenizers/llama2", template)
    rows = real_rows(shared_data)
    dataset = load(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, seq_length=20_000)
    assert len(dataset) == len(rows) == 300
    for index, row in enumerate(rows):
        expected = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert trained_texts(dataset, tokenizer, index, template) == expected


@pytest.mark.parametrize("task", ["C-STANCE", "FOMC", "Py150", "ScienceQA", "NumGLUE-cm", "20Minuten"])
def test_real_trace_folders_train_exactly_the_answers(
    shared_data: Path, llama2: Callable[[str | None], Tokenizer], task: str
) -> None:
    tokenizer = llama2(None)
    folder = shared_data / "trace/mini" / task
    dataset = load(folder, tokenizer, seq_length=50_000)
    rows = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    assert dataset.parts[0].formats == ("trace",)
    assert len(dataset) == len(rows) == 64
    for index, row in enumerate(rows):
        assert trained_texts(dataset, tokenizer, index, "verbatim") == [row["answer"]]
