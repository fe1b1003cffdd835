"""Tokenizer folders by the rules of published ones: their files, classes and settings, around small vocabularies.

The files of a folder, the name of its class and its settings decide how it is read; the vocabularies are
trained on a few lines.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hft_megatron.data.sentencepiece_conversion import to_rust_tokenizer
from hft_megatron.data.sentencepiece_model import read_vocabulary
from hft_megatron.data.tiktoken_conversion import WORDS
from hft_megatron.data.tokenizer_files import no_files
from tests.support.tokenizers import CORPUS, train_sentencepiece

LLAMA = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "sp_model_kwargs": {}}
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PUTS_BEGIN = {
    "llama1": True,
    "llama2": True,
    "llama3": True,
    "llama3.2": True,
    "tinyllama": True,
    "openllama": True,
    "codellama": True,
    "smollm2": False,
    "mistral": True,
    "yi": False,
    "vicuna": True,
    "deepseek": True,
}
"""All folders, and whether each tokenizer puts its begin token before a text."""


class PublishedTokenizers:
    """Makes each folder once, below ``folder``; a vocabulary that several have is trained once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """The folder that is built like the published one."""
        path = self._folder / name
        if not path.exists():
            path.mkdir(parents=True)
            makers: dict[str, Callable[[Path], None]] = {
                "llama1": self._llama1,
                "llama2": self._llama2,
                "llama3": self._llama3,
                "llama3.2": self._llama32,
                "tinyllama": self._tinyllama,
                "openllama": self._openllama,
                "codellama": self._codellama,
                "smollm2": self._smollm2,
                "mistral": self._mistral,
                "yi": self._yi,
                "vicuna": self._vicuna,
                "deepseek": self._deepseek,
            }
            makers[name](path)
            _write(path, "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
        return path

    def _llama1(self, path: Path) -> None:
        shutil.copyfile(self._lossless, path / "tokenizer.model")
        names = {key: _token(name, normalized=True) for key, name in LLAMA_NAMES.items()}
        _write(path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **LLAMA, **names})

    def _llama2(self, path: Path, **settings: Any) -> None:
        shutil.copyfile(self._lossless, path / "tokenizer.model")
        to_rust_tokenizer(read_vocabulary(self._lossless, no_files(path)), bos_id=1).save(str(path / "tokenizer.json"))
        names = {key: _token(name) for key, name in LLAMA_NAMES.items()}
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": None, **LLAMA, **names}
        _write(path, "tokenizer_config.json", {**config, **settings})

    def _tinyllama(self, path: Path) -> None:
        self._llama2(path, pad_token="</s>", padding_side="right", model_max_length=2048, **LLAMA_NAMES)

    def _mistral(self, path: Path) -> None:
        listed = {str(number): _token(name, special=True) for number, name in enumerate(("<unk>", "<s>", "</s>"))}
        self._llama2(path, legacy=True, added_tokens_decoder=listed, use_default_system_prompt=False, **LLAMA_NAMES)

    def _codellama(self, path: Path) -> None:
        self._llama2(path, tokenizer_class="CodeLlamaTokenizer", legacy=None, prefix_token="▁<PRE>", fill_token="<F>")
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.add_special_tokens(
            [AddedToken(name, normalized=False) for name in ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<F>")]
        )
        tokenizer.save(str(path / "tokenizer.json"))

    def _openllama(self, path: Path) -> None:
        train_sentencepiece(path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
        (path / "tokenizer.vocab").unlink()
        names = {key: _token(name, normalized=True) for key, name in LLAMA_NAMES.items()}
        _write(path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **LLAMA, **names})
        _write(path, "special_tokens_map.json", names)

    def _yi(self, path: Path) -> None:
        chat = ("<|im_start|>", "<|im_end|>")
        train_sentencepiece(
            path, user_defined_symbols=list(chat), bos_piece="<|startoftext|>", eos_piece="<|endoftext|>"
        )
        (path / "tokenizer.vocab").unlink()
        pieces = ("<unk>", "<|startoftext|>", "<|endoftext|>", *chat)
        config = {
            "tokenizer_class": "LlamaTokenizer",
            **LLAMA,
            "add_bos_token": False,
            "legacy": True,
            "added_tokens_decoder": {str(number): _token(name, special=True) for number, name in enumerate(pieces)},
            "bos_token": "<|startoftext|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
        }
        _write(path, "tokenizer_config.json", config)

    def _vicuna(self, path: Path) -> None:
        self._llama1(path)
        _write(path, "added_tokens.json", {"<pad>": len(Tokenizer.from_str(self._lossless_json).get_vocab())})
        names = {key: _token(name) for key, name in LLAMA_NAMES.items()} | {"pad_token": "<unk>"}
        _write(path, "special_tokens_map.json", names)
        config = {"tokenizer_class": "LlamaTokenizer", **LLAMA, "legacy": False, **names}
        _write(path, "tokenizer_config.json", config)

    def _llama3(self, path: Path, names: Mapping[str, str] = {}) -> None:
        tokenizer = Tokenizer.from_str(self._words_json)
        special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (*special, *names.values())])
        begin = (special[0], tokenizer.token_to_id(special[0]))
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin]),
            ]
        )
        tokenizer.save(str(path / "tokenizer.json"))
        listed = {str(n): json.loads(_flags(token)) for n, token in tokenizer.get_added_tokens_decoder().items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": listed}
        _write(path, "tokenizer_config.json", {**config, "bos_token": special[0], "eos_token": special[1], **names})

    def _llama32(self, path: Path) -> None:
        self._llama3(path, {"pad_token": "<|finetune_right_pad_id|>", "eos_token": "<|eot_id|>"})

    def _smollm2(self, path: Path) -> None:
        tokenizer = Tokenizer.from_str(self._digits_json)
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
        tokenizer.save(str(path / "tokenizer.json"))
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "additional_special_tokens": special[1:3],
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        }
        _write(path, "tokenizer_config.json", config)

    def _deepseek(self, path: Path) -> None:
        tokenizer = Tokenizer.from_str(self._digits_json)
        begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001 - as DeepSeek writes them
        tokenizer.add_special_tokens([AddedToken(name, normalized=True) for name in (begin, end)])
        tokenizer.add_tokens([AddedToken("ø", normalized=True), AddedToken("ö", normalized=True)])
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.save(str(path / "tokenizer.json"))
        names = {"bos_token": _token(begin, normalized=True), "eos_token": _token(end, normalized=True)}
        config = {"tokenizer_class": "LlamaTokenizerFast", **LLAMA, "legacy": True, "unk_token": None, **names}
        _write(path, "tokenizer_config.json", {**config, "pad_token": names["eos_token"]})

    @cached_property
    def _lossless(self) -> Path:
        return train_sentencepiece(self._folder / "lossless")

    @cached_property
    def _lossless_json(self) -> str:
        return to_rust_tokenizer(read_vocabulary(self._lossless, no_files(self._folder)), bos_id=1).to_str()

    @cached_property
    def _words_json(self) -> str:
        steps = [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        return _byte_level(pre_tokenizers.Sequence(steps), ignore_merges=True)

    @cached_property
    def _digits_json(self) -> str:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        return _byte_level(pre_tokenizers.Sequence(steps))


def _byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, **model: bool) -> str:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


def _token(content: str, **flags: bool) -> dict[str, Any]:
    token = {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}
    return token if "special" in flags else {"__type": "AddedToken", **token}


def _flags(token: AddedToken) -> str:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return json.dumps({name: getattr(token, name) for name in names})


def _write(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
