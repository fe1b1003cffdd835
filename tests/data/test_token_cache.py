import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from hft_megatron.data import token_cache
from hft_megatron.data.dataset import ExamplesInMemory, SftDataset
from hft_megatron.data.examples import ExampleRules
from hft_megatron.data.files.sources import TRAIN_SPLIT, find_sources
from hft_megatron.data.loading import load_sft_dataset
from hft_megatron.data.pairs import load_pair_dataset
from hft_megatron.data.token_cache import Tokenized, open_token_cache, user_cache
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import write_rows
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_cli, run_sft_words, words_for
from tests.support.tokenizers import make_byte_level

DECISIVE = {"files": ["one"], "rules": {"seq_length": 8}}


def tokenized(*ids: int) -> Tokenized:
    store = ExamplesInMemory(
        tokens=np.array(ids, dtype=np.int32),
        trained=np.array([token % 2 == 0 for token in ids]),
        offsets=np.array([0, 1, len(ids)], dtype=np.int64),
        places=np.array(["0:1", "0:2"], dtype=np.bytes_),
    )
    return Tokenized(store=store, account={"records": 2, "notes": ["two lines"]})


def never() -> Tokenized:
    raise AssertionError("this was to be found")


def ids_of(found: Tokenized) -> list[list[int]]:
    return [found.store.example(index)[0].tolist() for index in range(len(found.store.lengths))]


def test_what_one_process_has_made_another_maps(tmp_path: Path) -> None:
    cache = open_token_cache(str(tmp_path))
    for make in (lambda: tokenized(5, 6, 7), never):
        found = cache.tokenized(DECISIVE, make)
        assert ids_of(found) == [[5], [6, 7]]
        assert found.store.example(1)[1].tolist() == [True, False]
        assert found.account == {"records": 2, "notes": ["two lines"]}
        assert isinstance(found.store.tokens, np.memmap)
        assert found.note.startswith("tokens are read from" if make is never else "tokens are cached in")


def test_other_rules_other_code_and_other_libraries_are_other_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_token_cache(str(tmp_path))
    cache.tokenized(DECISIVE, lambda: tokenized(1, 2))
    assert ids_of(cache.tokenized({**DECISIVE, "rules": {}}, lambda: tokenized(3, 4))) == [[3], [4]]
    monkeypatch.setattr(token_cache, "code_of_data", lambda: ["other code"])
    assert ids_of(cache.tokenized(DECISIVE, lambda: tokenized(5, 6))) == [[5], [6]]
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 3


@pytest.mark.parametrize("damage", ["a bit", "the account", "a file"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    cache = open_token_cache(str(tmp_path))
    cache.tokenized(DECISIVE, lambda: tokenized(1, 2, 3))
    entry = next(entry for entry in tmp_path.iterdir() if entry.is_dir())
    if damage == "a bit":
        content = bytearray((entry / "tokens.npy").read_bytes())
        content[-1] ^= 1
        (entry / "tokens.npy").write_bytes(content)
    elif damage == "the account":
        (entry / "account.json").write_text("{")
    else:
        (entry / "trained.npy").unlink()
    assert ids_of(cache.tokenized(DECISIVE, lambda: tokenized(7, 8, 9))) == [[7], [8, 9]]
    assert ids_of(cache.tokenized(DECISIVE, never)) == [[7], [8, 9]]


def _slow_in_process(folder: str, log: str, mistake: bool) -> None:
    def make() -> Tokenized:
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.5)
        if mistake:
            raise UserError("data.jsonl:3: no.")
        return tokenized(1, 2, 3)

    try:
        found = open_token_cache(folder).tokenized(DECISIVE, make)
        said = str(ids_of(found))
    except UserError as error:
        said = str(error)
    with open(log, "a") as file:
        file.write(said + "\n")
    os._exit(0)


@pytest.mark.parametrize(("mistake", "said"), [(False, "[[1], [2, 3]]"), (True, "data.jsonl:3: no.")])
def test_of_processes_that_come_at_once_one_does_the_work_and_all_have_its_outcome(
    tmp_path: Path, mistake: bool, said: str
) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "cache"), str(log), mistake)
    processes = [context.Process(target=_slow_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(log.read_text().splitlines()) == sorted(["made", *[said] * 3])


def test_a_later_start_looks_again_after_a_mistake(tmp_path: Path) -> None:
    cache = open_token_cache(str(tmp_path))

    def fail() -> Tokenized:
        raise UserError("data.jsonl:3: no.")

    for _ in range(2):
        with pytest.raises(UserError, match=r"data\.jsonl:3"):
            cache.tokenized(DECISIVE, fail)
    assert ids_of(cache.tokenized(DECISIVE, lambda: tokenized(1, 2))) == [[1], [2]]


def test_a_folder_that_cannot_be_used_is_named_where_it_was_given_and_else_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"--data-cache-path .*file/cache cannot be used: Not a directory; name a writable folder"
    ):
        open_token_cache(str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache = open_token_cache(None)
    for ids in ((1, 2), (3, 4)):
        assert ids_of(cache.tokenized(DECISIVE, lambda ids=ids: tokenized(*ids))) == [[ids[0]], [ids[1]]]  # type: ignore[misc]


def test_without_room_for_an_entry_its_maker_continues_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    cache = open_token_cache(str(tmp_path))
    assert ids_of(cache.tokenized(DECISIVE, lambda: tokenized(1, 2))) == [[1], [2]]
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(None, make_byte_level(tmp_path_factory.mktemp("tokenizer")))


def _same(found: SftDataset, plain: SftDataset) -> None:
    assert (found.digest, found.accounts(), found.parts) == (plain.digest, plain.accounts(), plain.parts)
    assert found.describe()[:-1] == plain.describe()
    assert re.fullmatch(r"tokens are (cached in|read from) /.*", found.describe()[-1])
    assert found.lengths.tolist() == plain.lengths.tolist()
    for index in range(len(plain)):
        for mine, theirs in zip(found.example(index), plain.example(index), strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.tolist() == theirs.tolist()


def test_a_kept_data_set_is_the_one_that_the_files_give(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    turns += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d" * 40}]
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b", "id": 1}] * 3)
    other = write_rows(tmp_path / "other.jsonl", [{"messages": turns}, {"messages": turns[2:]}])
    sources = find_sources("--train-data-path", ["0.4", str(one), "0.6", str(other)], TRAIN_SPLIT)
    rules = ExampleRules(seq_length=32, long_examples="truncate")
    plain = load_sft_dataset(sources, tokenizer, rules)
    for _ in range(2):
        _same(load_sft_dataset(sources, tokenizer, rules, open_token_cache(str(tmp_path / "cache"))), plain)
    assert len(list((tmp_path / "cache").glob("*.lock"))) == 1


def test_kept_pairs_are_those_that_the_files_give(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = {"prompt": "a", "chosen": "ab", "rejected": "ac"}
    path = write_rows(tmp_path / "pairs.jsonl", [good, {**good, "rejected": "ab"}, {**good, "id": 1, "chosen": "d"}])
    sources = find_sources("--train-data-path", [str(path)], TRAIN_SPLIT)
    rules = ExampleRules(seq_length=32)
    plain = load_pair_dataset(sources, tokenizer, rules, "skip")
    for _ in range(2):
        found = load_pair_dataset(sources, tokenizer, rules, "skip", open_token_cache(str(tmp_path / "cache")))
        assert (found.sources, found.describe()[:-1]) == (plain.sources, plain.describe())
        _same(found.answers, plain.answers)


def test_files_with_the_same_bytes_that_are_read_otherwise_are_two_entries(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    cache, examples = open_token_cache(str(tmp_path / "cache")), []
    for name in ("a.txt", "a.csv"):
        (tmp_path / name).write_text("text\na\nb\n")
        sources = find_sources("--train-data-path", [str(tmp_path / name)], TRAIN_SPLIT)
        examples.append(len(load_sft_dataset(sources, tokenizer, ExampleRules(seq_length=99), cache)))
    assert examples == [3, 2]


def test_the_check_before_a_start_tokenizes_for_all_ranks(ranks: RankPools, tmp_path: Path) -> None:
    inputs, cache = make_inputs(tmp_path / "inputs"), tmp_path / "cache"
    words = words_for(inputs, "--data-cache-path", cache)
    assert run_cli([*words, "--check"], log=tmp_path / "log") == 0
    [entry] = [found for found in cache.iterdir() if found.is_dir()]
    written = (entry / "tokens.npy").stat()
    ranks(2).run(run_sft_words, words=words)
    assert [found for found in cache.iterdir() if found.is_dir()] == [entry]
    assert (entry / "tokens.npy").stat().st_ino == written.st_ino


def test_a_user_without_a_home_directory_tokenizes_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert ids_of(open_token_cache(None).tokenized(DECISIVE, lambda: tokenized(1, 2))) == [[1], [2]]
    with pytest.raises(UserError, match="--dpo-reference-cache is missing, and there is no home directory for a cache"):
        user_cache("reference", "--dpo-reference-cache")


def test_what_nobody_used_for_a_month_is_removed_and_nothing_of_others(tmp_path: Path) -> None:
    cache = open_token_cache(str(tmp_path))
    for number in (1, 2):
        cache.tokenized({"n": number}, lambda: tokenized(1, 2))
    (tmp_path / ".0123abcd-0123abcd").mkdir()  # a process was killed in the middle
    (tmp_path / "mine").mkdir()
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    cache.tokenized({"n": 1}, never)  # a use
    cache.tokenized({"n": 3}, lambda: tokenized(5, 6))
    kept = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert len(kept) == 3
    assert "mine" in kept
    cache.tokenized({"n": 1}, never)


def test_an_entry_can_be_read_by_whoever_can_read_the_folder(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        open_token_cache(str(tmp_path)).tokenized(DECISIVE, lambda: tokenized(1, 2))
    finally:
        os.umask(before)
    [entry] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert entry.stat().st_mode & 0o777 == 0o755
