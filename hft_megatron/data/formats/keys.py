"""The keys of records and messages that mean something to some trainer, and their treatment here.

A record's key that is neither here nor in its format is not read and named in the log; a message's must be printed by
the chat template. docs/data.md shows this table, and a test compares the two.
"""

from dataclasses import dataclass
from typing import Literal

from hft_megatron.config.names import DataFormat

CHAT: tuple[DataFormat, ...] = ("messages", "sharegpt")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One or more keys of the same meaning."""

    names: tuple[str, ...]
    meaning: str
    """Meaning as a noun."""
    peers: str
    """Trainers that read it, or ``none``."""
    treatment: Literal["honoured", "printed", "refused", "harmless"]
    """Read; an error unless the chat template prints it; an error; ignored and named in the log."""
    formats: tuple[DataFormat, ...] = ()
    """Formats of the records that this is about; empty for all whose format doesn't read the key."""
    roles: tuple[str, ...] = ()
    """Roles of the messages that this is about; empty for all others."""
    fix: str = "remove it"
    """Advice for a refused key, besides ignoring it."""
    neutral: tuple[object, ...] = ()
    """Values with which a refused key is harmless, because they change nothing."""
    may_be_a_copy: bool = False
    """True if a refused key is harmless where its texts are among the record's other texts."""
    may_be_within: bool = False
    """True if it is also harmless where another text of the record contains all of its texts."""


TOOL_ROLES = ("tool", "ipython", "function", "observation")
TURN_WEIGHTS = ("weight", "loss_mask")
"""1 says no more than the options of the run do, so that all turns may have it."""
TURN_SWITCHES = ("train", "training", "train_on_turn", "loss")
"""True asks for the turn to be trained, whoever's it is."""
TURN_MASKS = ("masked",)
"""The opposite: true takes the turn out."""

RECORD_KEYS = (
    Key(names=("system",), meaning="the system message", peers="LLaMA-Factory, ms-swift", treatment="honoured",
        formats=("sharegpt", "alpaca")),
    Key(names=("input", "history"), meaning="what the instruction is about, and earlier turns",
        peers="Alpaca, LLaMA-Factory", treatment="honoured", formats=("alpaca",)),
    Key(names=("prompt", "conversations", "messages", "instruction", "input", "history", "system"),
        meaning="the prompt of both answers: `prompt`, else `conversations` or `messages` (where the answers begin "
        "with the assistant), else `instruction` with `input` and `history`; and the system message",
        peers="TRL, LLaMA-Factory", treatment="honoured", formats=("preference",)),
    Key(names=("system", "history"), meaning="the system message and earlier turns", peers="LLaMA-Factory, ms-swift",
        treatment="refused", fix="make messages of it", may_be_a_copy=True),
    Key(names=("system_prompt",), meaning="the system message", peers="axolotl, ms-swift", treatment="refused",
        formats=("sharegpt", "alpaca", "preference"), fix="read it with --data-keys system_prompt=system",
        may_be_a_copy=True),
    Key(names=("system_prompt",), meaning="the system message", peers="axolotl, ms-swift", treatment="refused",
        fix="make messages of it, or name it with --data-keys system_prompt=system beside an `instruction` and an "
        "`output`", may_be_a_copy=True),
    Key(names=("context",), meaning="what the instruction is about", peers="Dolly, axolotl", treatment="refused",
        formats=("alpaca", "preference"), fix="read it with --data-keys context=input beside an `instruction`",
        may_be_a_copy=True, may_be_within=True),
    Key(names=("context",), meaning="what the question is about", peers="Dolly, axolotl", treatment="refused",
        formats=("prompt-completion", "trace", "input-output"),
        fix="name it with --data-keys context=input beside an `instruction` and an `output`",
        may_be_a_copy=True, may_be_within=True),
    Key(names=("instruction",), meaning="what is to be done with the input", peers="Alpaca", treatment="refused",
        formats=("input-output",), fix="choose --data-format alpaca and write an empty `instruction` where none is",
        may_be_a_copy=True, may_be_within=True),
    Key(names=("instruction",), meaning="what is to be done", peers="Alpaca", treatment="refused",
        formats=("prompt-completion", "trace"), fix="write it into the prompt", may_be_a_copy=True, may_be_within=True),
    Key(names=("choices", "options"), meaning="the answers to choose from", peers="axolotl", treatment="refused",
        formats=("alpaca", "preference", "prompt-completion", "trace", "input-output"),
        fix="write them into the question", may_be_a_copy=True, may_be_within=True),
    Key(names=("reflection", "corrected"), meaning="what follows the answer and is trained, too", peers="axolotl",
        treatment="refused", formats=("alpaca",), fix="write it into the output", may_be_a_copy=True),
    Key(names=("prompt", "completion"), meaning="another question and answer", peers="TRL", treatment="refused",
        may_be_a_copy=True),
    Key(names=("messages", "conversations", "instruction", "input"),
        meaning="a second prompt, beside the one that is read",
        peers="ms-swift, LLaMA-Factory", treatment="refused", formats=("preference",), may_be_a_copy=True),
    Key(names=("chosen", "rejected"), meaning="the answers of a preference pair", peers="TRL, LLaMA-Factory",
        treatment="refused", fix="train on pairs with hft-megatron dpo --data-format preference"),
    Key(names=("rejected_response", "rejected_messages"), meaning="the worse answer beside `messages`",
        peers="ms-swift", treatment="refused",
        fix="write `prompt`, `chosen` and `rejected`, and train on pairs with hft-megatron dpo"),
    Key(names=("kto_tag", "label"), meaning="a good/bad label, or a class",
        peers="TRL, LLaMA-Factory, ms-swift", treatment="refused"),
    Key(names=("margin", "score"), meaning="how much better the chosen answer is", peers="TRL, OpenRLHF",
        treatment="refused", formats=("preference",)),
    Key(names=("weight", "train", "loss"), meaning="weight of the record in the loss", peers="axolotl, ms-swift",
        treatment="refused", neutral=(1, "1", "1.0", "true", "True")),
    Key(names=("loss_mask", "loss_scale", "mask"), meaning="which part of the record counts in the loss, or how much",
        peers="LLaMA-Factory, ms-swift, NeMo", treatment="refused"),
    Key(names=("segments",), meaning="texts with a label each", peers="axolotl", treatment="refused"),
    Key(names=("input_ids", "labels", "assistant_masks", "completion_mask"),
        meaning="tokens, and which of them are trained", peers="TRL, axolotl", treatment="refused"),
    Key(names=("image", "images", "video", "videos", "audio", "audios", "objects"),
        meaning="images, video, audio, or regions in them", peers="LLaMA-Factory, ms-swift, TRL", treatment="refused"),
    Key(names=("tools", "functions", "tool_choice", "parallel_tool_calls"), meaning="tools that the prompt describes",
        peers="OpenAI, TRL, LLaMA-Factory, ms-swift", treatment="refused"),
    Key(names=("documents", "chat_template", "chat_template_kwargs"), meaning="inputs of the chat template",
        peers="TRL, ms-swift", treatment="refused"),
    Key(names=("text",), meaning="the record as one text", peers="TRL, axolotl", treatment="harmless"),
    Key(names=("id", "source", "score_chosen", "score_rejected"), meaning="origin of the record, and how it was rated",
        peers="none", treatment="harmless"),
)  # fmt: skip
MESSAGE_KEYS = (
    Key(names=TURN_WEIGHTS, meaning="whether the turn is trained, 0 or 1", peers="OpenAI, axolotl, LLaMA-Factory",
        treatment="honoured"),
    Key(names=TURN_SWITCHES, meaning="whether the turn is trained, false or true", peers="axolotl, ms-swift",
        treatment="honoured"),
    Key(names=TURN_MASKS, meaning="whether the turn is left out of what is trained, false or true", peers="torchtune",
        treatment="honoured"),
    Key(names=("train_detail", "training_detail", "loss_scale", "mask", "label"),
        meaning="which part of the turn is trained, or how much", peers="axolotl, ms-swift, NeMo",
        treatment="refused"),
    Key(names=("image", "images", "video", "videos", "audio", "audios"), meaning="images, video or audio",
        peers="LLaMA-Factory, ms-swift, OpenAI", treatment="refused"),
    Key(names=("tool_calls", "function_call"), meaning="calls of tools", peers="OpenAI, TRL, axolotl",
        treatment="printed"),
    Key(names=("reasoning_content", "reasoning", "thinking"), meaning="reasoning before the answer",
        peers="axolotl, Megatron-Bridge, TRL", treatment="printed"),
    Key(names=("name",), meaning="the tool whose result it is; the call before it says the same", peers="OpenAI",
        treatment="harmless", roles=TOOL_ROLES),
    Key(names=("name",), meaning="who speaks", peers="OpenAI", treatment="printed"),
    Key(names=("tool_call_id",),
        meaning="the call that this result answers; the order of the messages says the same", peers="OpenAI",
        treatment="harmless"),
)  # fmt: skip


def is_empty(value: object) -> bool:
    """True if the value is one that columns without a value hold in some data: its key might as well be missing."""
    return value in (None, "", "[]", "{}", "null", [], {})


def refusal_of(key: str, value: object, format: DataFormat) -> Key | None:
    """The row that forbids a record of ``format`` to have ``key`` with this value, None where it may."""
    for row in RECORD_KEYS:
        if key in row.names and row.treatment == "refused" and (not row.formats or format in row.formats):
            return None if is_empty(value) or value in row.neutral else row
    return None


def message_row(key: str, role: str) -> Key | None:
    """The row about a key of a message of this role, None for one that no known trainer reads."""
    return next((row for row in MESSAGE_KEYS if key in row.names and (not row.roles or role in row.roles)), None)
