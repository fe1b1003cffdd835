"""The demo's scores mean something only if no answer to a question can be read off the training text."""

import re

import pytest
from knowledge import Knowledge, make_knowledge, make_new_task, pretraining_rows, translate
from words import ADJECTIVES, HELD_OUT_TASK_WORDINGS, NOUNS, RELATIONS, TASK_WORDINGS

PEOPLE = 40


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return make_knowledge(seed=1, people=PEOPLE)


def test_the_same_seed_gives_the_same_world_and_another_seed_another(knowledge: Knowledge) -> None:
    assert make_knowledge(seed=1, people=PEOPLE) == knowledge
    assert make_knowledge(seed=2, people=PEOPLE) != knowledge
    assert make_new_task(seed=1, questions=20) == make_new_task(seed=1, questions=20)
    assert make_new_task(seed=2, questions=20) != make_new_task(seed=1, questions=20)


def test_every_fact_is_asked_once_and_told_in_every_training_wording(knowledge: Knowledge) -> None:
    wordings = sum(len(relation.train_wordings) for relation in RELATIONS)
    assert knowledge.facts == len(knowledge.questions) == PEOPLE * len(RELATIONS)
    assert len(set(knowledge.sentences)) == len(knowledge.sentences) == PEOPLE * wordings


def test_a_question_is_answered_as_the_sentences_tell_it(knowledge: Knowledge) -> None:
    for number, question in enumerate(knowledge.questions):
        relation = RELATIONS[number % len(RELATIONS)]
        name = _name_in(question.text, relation.held_out_wordings)
        told = [one.removesuffix(".").split()[-1] for one in _sentences_of(knowledge, name, relation.train_wordings)]
        assert told == [question.answer] * len(relation.train_wordings)


def test_no_held_out_wording_is_in_the_training_text(knowledge: Knowledge) -> None:
    text = "\n".join(str(row["completion"]) for row in pretraining_rows(knowledge, 1, 6, 2))
    assert all(question.text not in text for question in knowledge.questions)
    for relation in RELATIONS:
        for held_out in relation.held_out_wordings:
            assert not re.search(held_out.replace("{}", r"\w+ \w+"), text)


def test_no_held_out_wording_ends_as_a_training_wording_does(knowledge: Knowledge) -> None:
    # "At home Mara Holm keeps a pet" would be no new wording beside "Mara Holm keeps a pet".
    for relation in RELATIONS:
        for held_out in relation.held_out_wordings:
            assert not held_out.endswith(relation.train_wordings)


def test_each_word_of_a_held_out_wording_is_in_training_wordings() -> None:
    # Otherwise the score would measure how a model takes pieces of words that it has never seen.
    train = [wording for relation in RELATIONS for wording in relation.train_wordings]
    held_out = [wording for relation in RELATIONS for wording in relation.held_out_wordings]
    assert {word for one in held_out for word in one.split()} <= {word for one in train for word in one.split()}
    asked = {word for one in HELD_OUT_TASK_WORDINGS for word in re.findall(r"\w+", one)}
    assert asked <= {word for one in TASK_WORDINGS for word in re.findall(r"\w+", one)}


def test_every_sentence_is_in_the_pretraining_text_as_often_as_asked(knowledge: Knowledge) -> None:
    rows = pretraining_rows(knowledge, 1, 6, 3)
    told = [part + "." for row in rows for part in str(row["completion"]).removesuffix(".").split(". ")]
    assert sorted(told) == sorted(knowledge.sentences * 3)


def test_no_phrase_of_a_question_is_in_the_new_task_training_rows() -> None:
    task = make_new_task(seed=1, questions=96)
    text = "\n".join(message["content"] for row in task.rows for message in row["messages"])
    for question in task.questions:
        phrase = _name_in(question.text, HELD_OUT_TASK_WORDINGS)
        assert question.answer == translate(*phrase.split())
        assert not re.search(rf"\b{phrase}\b", text)
        assert not re.search(rf"\b{question.answer}\b", text)


def test_each_word_of_the_lexicon_is_in_many_training_rows_and_means_one_thing() -> None:
    rows = make_new_task(seed=1, questions=96).rows
    asked = [row["messages"][0]["content"] for row in rows]
    for word in (*ADJECTIVES, *NOUNS):
        assert sum(word in re.findall(r"\w+", text) for text in asked) >= 5 * len(TASK_WORDINGS)
    meanings = [*ADJECTIVES.values(), *NOUNS.values()]
    assert len(set(meanings)) == len(meanings)


def _name_in(text: str, wordings: tuple[str, ...]) -> str:
    for wording in wordings:
        found = re.fullmatch(re.escape(wording).replace(r"\{\}", "(.+)"), text)
        if found:
            return found[1]
    raise AssertionError(f"{text!r} is in none of {wordings}")


def _sentences_of(knowledge: Knowledge, name: str, wordings: tuple[str, ...]) -> list[str]:
    beginnings = tuple(wording.format(name) + " " for wording in wordings)
    return [sentence for sentence in knowledge.sentences if sentence.startswith(beginnings)]
