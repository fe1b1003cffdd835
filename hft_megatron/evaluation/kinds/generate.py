"""Tasks whose answer is generated, and compared with references as a text."""

from typing import Any

from hft_megatron.data.files.rows import Row
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.columns import texts_of
from hft_megatron.evaluation.examples import EvalExample, Generated, TaskExamples
from hft_megatron.evaluation.extraction import extractor
from hft_megatron.evaluation.kinds.kind import Answer
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.evaluation.prompts import Cuts, Prompts
from hft_megatron.evaluation.task_rows import TaskRow, read_task_rows
from hft_megatron.evaluation.tasks import Task, TaskKind


class Generate:
    """See Kind."""

    name: TaskKind = "generate"
    default_metrics: tuple[str, ...] = ("exact_match",)

    def metrics(self) -> tuple[str, ...]:
        return tuple(name for name, measure in MEASURES.items() if measure.statistics is not None)

    def read(self, task: Task, tokenizer: Tokenizer, window: int) -> TaskExamples:
        room = window - task.max_new_tokens
        if room < 1:
            raise UserError(
                f"{task.place}: max_new_tokens {task.max_new_tokens} of the task {task.name} leaves no token of the "
                f"model's {window} for the prompt; lower it."
            )
        rows = read_task_rows(task)
        prompts = Prompts(task, tokenizer, lambda row: _targets(task, row)[0])
        questions = [prompts.question(row, number) for number, row in enumerate(rows)]
        encoded = tokenizer.encode_pieces([prompts.prompt_pieces(question) for question in questions])
        references = [_references(task, row) for row in rows]
        cuts = Cuts(task=task, begin=tokenizer.bos_id)
        what = f"the prompt has {{}} tokens, but max_new_tokens {task.max_new_tokens} leaves {room} of {window}"
        examples = []
        for question, (ids, _), texts in zip(questions, encoded, references, strict=True):
            row = question.row
            if not len(ids):
                raise UserError(f"{row.row.place}: the prompt is empty, so there is nothing to continue; remove it.")
            surplus = cuts.surplus(row.row.place, len(ids), len(ids), room, what)
            facts = {"references": texts, "source": question.prompt}
            examples.append(EvalExample(place=row.name, prompt=cuts.cut(ids, surplus), facts=facts))
        cuts.check()
        empty = {
            "empty_prompts": sum(not question.prompt.strip() for question in questions),
            "empty_targets": sum(not any(text.strip() for text in texts) for texts in references),
        }
        notes = [
            f"{task.name}: {name.replace('_', ' ')}: {count:,} of {len(rows):,}"
            for name, count in empty.items()
            if count
        ]
        return TaskExamples(
            examples=tuple(examples),
            notes=(*cuts.notes(len(rows)), *notes),
            counts={**cuts.counts(), **empty},
        )

    def record(self, task: Task, example: EvalExample, answer: Answer) -> dict[str, Any]:
        assert isinstance(answer, Generated)
        extracted = extractor(task.extract)(answer.text)
        references, source = example.facts["references"], example.facts["source"]
        statistics = {}
        for name in task.metrics:
            of_text = MEASURES[name].statistics
            assert of_text is not None
            statistics[name] = list(of_text(extracted, references, source))
        return {
            "example": example.place,
            "prediction": answer.text,
            "extracted": extracted,
            "references": references,
            "ended_by": answer.ended_by,
            "statistics": statistics,
        }


def _targets(task: Task, row: Row) -> list[str]:
    assert task.target is not None
    return texts_of(task.target, "target", row)


def _references(task: Task, row: TaskRow) -> list[str]:
    targets = _targets(task, row.row)
    extract = extractor(task.extract_target)
    references = [extract(target) for target in targets]
    for target, reference in zip(targets, references, strict=True):
        if target.strip() and not reference:
            raise UserError(
                f"{row.row.place}: extract_target {task.extract_target} finds nothing in the target {target[-40:]!r}; "
                f"choose another rule, or correct the row."
            )
    return references
