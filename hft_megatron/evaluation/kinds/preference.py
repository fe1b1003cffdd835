"""Tasks of preference pairs: the model should find the chosen answer more likely than the rejected one."""

from itertools import islice
from typing import Any

import numpy as np

from hft_megatron.config.data import data_keys, ignored_keys
from hft_megatron.data.chat import LossRule
from hft_megatron.data.examples import count_keys
from hft_megatron.data.pair_reading import BadPair, check_halves, check_record, encoded_pairs
from hft_megatron.data.record_errors import RecordErrors, check_use, notes_of_keys
from hft_megatron.data.records import RecordReader, RecordRules
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.examples import EvalExample, Generated, TaskExamples
from hft_megatron.evaluation.kinds.kind import Answer
from hft_megatron.evaluation.prompts import Cuts
from hft_megatron.evaluation.task_rows import names_of_places
from hft_megatron.evaluation.tasks import Task, TaskKind


class PreferencePairs:
    """See Kind. Pairs and their tokens are those that ``hft-megatron dpo`` trains on, end token included."""

    name: TaskKind = "preference"
    default_metrics: tuple[str, ...] = ("preference_accuracy",)

    def metrics(self) -> tuple[str, ...]:
        return ("preference_accuracy", "preference_accuracy_per_token")

    def read(self, task: Task, tokenizer: Tokenizer, window: int) -> TaskExamples:
        rules = RecordRules(
            data_format="preference",
            data_keys=data_keys(task.data_keys),
            prompt_separator=task.prompt_separator,
            ignore_keys=ignored_keys(task.ignore_keys),
        )
        paths, reader, errors = task.paths(), RecordReader(rules), RecordErrors()
        cuts = Cuts(task=task, begin=tokenizer.bos_id, errors=errors)
        what = f"the prompt and the longer answer have {{}} tokens, but the model predicts at most {window + 1}"
        name_of, examples, read, bad = names_of_places(paths), list[EvalExample](), 0, 0
        unread, ignored = dict[str, int](), dict[str, int]()
        records = islice(reader.read(paths, errors), task.limit)
        for pair, halves in encoded_pairs((record for _, record in records), tokenizer, LossRule(), errors):
            read += 1
            count_keys(unread, pair.keys.unread)
            count_keys(ignored, pair.keys.ignored)
            try:
                check_record(pair)
                check_halves(halves)
            except BadPair:
                bad += 1
                continue
            longest = max(len(ids) for ids, _ in halves)
            surplus = cuts.surplus(pair.place, longest, int(np.argmax(halves[0][1])), window + 1, what)
            sequences = tuple(cuts.sequence(half, surplus) for half in halves)
            examples.append(EvalExample(place=name_of(pair.place), sequences=sequences))
        cuts.check()
        check_use(rules.data_keys, rules.prompt_separator, [reader.use()], task.place)
        if not examples:
            why = f"all {bad:,} pairs were left out" if bad else "there is no pair in its files"
            raise UserError(f"{task.place}: the task {task.name} is empty: {why}.")
        notes = cuts.notes(read) + notes_of_keys(task.name, unread, ignored)
        if bad:
            notes.append(
                f"{task.name}: pairs left out, whose answers are empty, the same or to different prompts: {bad:,} of "
                f"{read:,}"
            )
        return TaskExamples(examples=tuple(examples), notes=tuple(notes), counts={**cuts.counts(), "bad_pairs": bad})

    def record(self, task: Task, example: EvalExample, answer: Answer) -> dict[str, Any]:
        assert not isinstance(answer, Generated)
        chosen, rejected = answer
        values = {
            "preference_accuracy": chosen.log_prob > rejected.log_prob,
            "preference_accuracy_per_token": chosen.log_prob / chosen.tokens > rejected.log_prob / rejected.tokens,
        }
        return {
            "example": example.place,
            "log_probs": [chosen.log_prob, rejected.log_prob],
            "tokens": [chosen.tokens, rejected.tokens],
            "statistics": {name: [float(values[name]), 1.0] for name in task.metrics},
        }
