"""Where prompt and answer meet in a tokenizer that removes white space at the ends of a text."""

from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from hft_megatron.data.chat import LossRule
from hft_megatron.data.examples import completion_pieces
from hft_megatron.data.formats.completions import Completion
from hft_megatron.data.tokenizer import Piece, Place, Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.data_files import load, write_rows
from tests.support.published_tokenizers import PublishedTokenizers
from tests.support.tokenizers import train_sentencepiece


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PublishedTokenizers(tmp_path_factory.mktemp("published")).path("openllama")


@pytest.fixture(scope="module", params=["own", "export"])
def tokenizer(folder: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of the folder, and of what it is exported to, which has another pipeline."""
    own = load_tokenizer(None, folder)
    if request.param == "own":
        return own
    own.export(out := tmp_path_factory.mktemp("out"))
    return load_tokenizer(None, out)


def encoded(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the completion, without begin and end token."""
    pieces = completion_pieces(Completion(place="x:1", prompt=prompt, completion=completion), tokenizer, LossRule())
    ((ids, mask),) = tokenizer.encode_pieces([pieces])
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    return ids[~mask].tolist()[1:], ids[mask].tolist()[:-1]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The answer: ", "Paris"),
        ("The answer:\n", "Paris"),
        ("The answer:", " Paris"),
        ("The answer: \n", " \n Paris "),
        ("The answer:\u3000", "Paris"),
        ("The answer:\u200b", "Paris"),
        ("The answer", "s"),
        ("The answer▁", "Paris"),
        ("The answer ", " "),
        (" ", "Paris"),
    ],
)
def test_prompt_and_answer_are_sentencepieces_of_both_and_the_prompt_is_its_own(
    folder: Path, tokenizer: Tokenizer, prompt: str, completion: str
) -> None:
    own = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids, answer = encoded(tokenizer, prompt, completion)
    assert ids == own.encode(prompt)
    assert ids + answer == own.encode(prompt + completion)


def test_one_answer_behind_prompts_with_and_without_a_space_is_encoded_twice(tokenizer: Tokenizer) -> None:
    """In one call, in which equal pieces are encoded once."""
    pieces = [
        [Piece(text=text, place=Place.START, trained=False), Piece(text="Paris", place=Place.INSIDE, trained=True)]
        for text in ("It is ", "It is", "It is ")
    ]
    spaced, joined, again = (ids[mask].tolist() for ids, mask in tokenizer.encode_pieces(pieces))
    assert spaced == again == tokenizer.encode("Paris")
    assert joined == tokenizer.encode_batch(["Paris"], continues=True)[0] != spaced


def test_white_space_in_front_of_a_special_token_is_not_carried_behind_it(tokenizer: Tokenizer) -> None:
    end = tokenizer.special(tokenizer.eos_id, trained=True)
    texts = [Piece(text=text, place=Place.INSIDE, trained=True) for text in ("one ", "two")]
    ((ids, _),) = tokenizer.encode_pieces([[texts[0], end, texts[1]]])
    one, two = tokenizer.encode_batch(["one", "two"], continues=True)
    assert ids.tolist() == [*one, tokenizer.eos_id, *two]


def test_an_answer_behind_a_header_that_ends_a_line_is_what_transformers_gives_after_export(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(None, folder, "tulu")
    messages = [{"role": "user", "content": "What? "}, {"role": "assistant", "content": "Paris"}]
    ids, mask = load(write_rows(tmp_path / "rows.jsonl", [{"messages": messages}]), tokenizer).example(0)
    tokenizer.export(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template(messages, return_dict=False) == ids.tolist()
    asked = loaded.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert asked == ids[: int(mask.argmax())].tolist()
    assert ids[mask].tolist() == [*tokenizer.encode("Paris"), tokenizer.eos_id]


def test_without_a_mark_at_the_start_a_blank_prompt_gives_the_answer_none(tmp_path: Path) -> None:
    file = train_sentencepiece(tmp_path, remove_extra_whitespaces=True, add_dummy_prefix=False)
    own = SentencePieceProcessor(model_file=str(file))
    assert encoded(load_tokenizer(None, file), " ", "Paris") == ([], own.encode(" Paris"))
