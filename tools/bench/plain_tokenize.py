"""The plain way to tokenize a JSON Lines file: transformers' tokenizer, record by record, in a pool of processes.

Run: ``python tools/bench/plain_tokenize.py INPUT OUTPUT TOKENIZER WORKERS``. ``preprocess.py`` measures against it. It
writes the token ids, and the mask of prompt and completion, without an index.
"""

import json
import multiprocessing
import sys
from typing import Any

import numpy as np
from transformers import AutoTokenizer

_tokenizer: Any = None


def start(folder: str) -> None:
    """Called first in every process."""
    global _tokenizer
    _tokenizer = AutoTokenizer.from_pretrained(folder)


def encode(line: bytes) -> tuple[list[int], int]:
    """The ids of a record, and how many of them are its prompt's."""
    record = json.loads(line)
    if "text" in record:
        return [*_tokenizer(record["text"]).input_ids, _tokenizer.eos_token_id], 0
    prompt = _tokenizer(record["prompt"]).input_ids
    completion = _tokenizer(record["completion"], add_special_tokens=False).input_ids
    return [*prompt, *completion, _tokenizer.eos_token_id], len(prompt)


def main() -> None:
    """Tokenize the file."""
    source, target, folder, workers = sys.argv[1:]
    with (
        multiprocessing.get_context("fork").Pool(int(workers), initializer=start, initargs=(folder,)) as pool,
        open(source, "rb") as lines,
        open(f"{target}.bin", "wb") as tokens,
        open(f"{target}_loss_mask.bin", "wb") as masks,
    ):
        for ids, prompt in pool.imap(encode, lines, chunksize=32):
            tokens.write(np.array(ids, dtype=np.uint16).tobytes())
            masks.write((np.arange(len(ids)) >= prompt).astype(np.uint8).tobytes())


if __name__ == "__main__":
    main()
