"""Small tokenizers made on the spot: SentencePiece models and a byte-level Hugging Face folder."""

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park.",
    "Natalia sold 48/2 = 24 clips in May, and 48+24 = 72 clips altogether. #### 72",
    "What is the capital of France? The capital of France is Paris.",
    "Answer: 17\nStance: B\n\nSummary: the meeting was about the new bridge.",
] * 5


def train_sentencepiece(folder: Path, **options: object) -> Path:
    """A ``tokenizer.model`` as LLaMA's are made (lossless BPE with bytes); ``options`` override the trainer's."""
    settings: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 360,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "hard_vocab_limit": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **{**settings, **options},
    )
    return folder / "tokenizer.model"


def make_byte_level(
    folder: Path,
    chat_template: str | None = None,
    special: Sequence[str] = (),
    *,
    merges: bool = True,
    **config: object,
) -> Path:
    """A folder like Llama-3's: byte-level BPE, a begin token, special tokens outside the merges, no word-start mark.

    ``special`` are tokens besides begin, end and padding. Without ``merges`` the others are bytes, under any version of
    the library that trains.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS + ["\n\n\n"] * 50,
        trainers.BpeTrainer(vocab_size=330 if merges else 256, initial_alphabet=alphabet, show_progress=False),
    )
    names = dict.fromkeys(("<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>", *special))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    bos = ("<|bos|>", tokenizer.token_to_id("<|bos|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder
