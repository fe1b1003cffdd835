"""Explanations of the values of other trainers' options, which follow ``--name value:`` in an error.

Each function takes the value, empty where none was given, and the values of all that is given, by name with dashes.
"""

import math
import os
from collections.abc import Mapping

from hft_megatron.config.declared import declared
from hft_megatron.config.dpo import DpoConfig
from hft_megatron.config.megatron_rows import Conversion
from hft_megatron.config.objectives import ObjectivesConfig

Given = Mapping[str, str]

LEAVE = "leave it out"
CHAT_TEMPLATES = ("plain", "tulu", "llama2", "llama3", "chatml")
"""Names that --chat-template takes beside files."""

_DECAY_STYLES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant, and --lr-warmup-iters or --lr-warmup-fraction",
    "inverse_sqrt": "inverse-square-root",
    "cosine_with_min_lr": "cosine, and --min-lr",
    "warmup_stable_decay": "WSD, and --lr-wsd-decay-iters",
}
"""Values of --lr-decay-style, and what goes with them, by transformers' names."""
_COMMANDS = {"pt": "pretrain", "sft": "sft", "dpo": "dpo"}
"""Commands, by LLaMA-Factory's stages."""
_TRACKERS = {"tensorboard": "--tensorboard-dir FOLDER", "wandb": "--wandb-project NAME"}
_EXAMPLE_RANKS = 8


def _number(value: str | None) -> float | None:
    try:
        number = math.nan if value is None else float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _whole(value: str | None) -> int | None:
    """The number where it is a whole one of at least 1."""
    number = _number(value)
    return int(number) if number is not None and number >= 1 and number == int(number) else None


def is_on(value: str) -> bool:
    """Whether a value turns a switch on; as in transformers, so does its name alone."""
    return value.lower() in ("", "true", "yes", "1")


def switch(on: str, off: str = LEAVE) -> Conversion:
    """Conversion of a switch."""
    return lambda value, given: on if is_on(value) else off


def choice(words: Mapping[str, str], other: str) -> Conversion:
    """Conversion of a value by its explanation; ``other`` is that of the rest."""
    return lambda value, given: words.get(value.lower(), other)


def model(value: str, given: Given) -> str:
    """Folder of a model, or its name on the Hugging Face hub."""
    is_name = value.count("/") == 1 and not value.startswith((".", "~", "/", "$")) and not os.path.exists(value)
    if not value or is_name:
        example = f": `hf download {value} --local-dir FOLDER` makes it" if value else ""
        return f"give --load-hf with the folder of the model{example}"
    return f"give --load-hf {value}"


def files(option: str) -> Conversion:
    """Conversion of data sets, which are files here."""

    def converted(value: str, given: Given) -> str:
        names = value.replace(",", " ").split()
        if names and all(map(os.path.exists, names)):
            return f"give {option} {' '.join(names)}"
        return f"give {option} with the files of the data"

    return converted


def template(value: str, given: Given) -> str:
    """Name of a chat template."""
    if value in CHAT_TEMPLATES:
        return f"give --chat-template {value}"
    return (
        f"give --chat-template with one of {', '.join(CHAT_TEMPLATES)} or a jinja file; without it the tokenizer's own "
        f"is used"
    )


def global_batch(value: str, given: Given) -> str:
    """Steps of gradient accumulation, with the micro-batch size of the command."""
    micro, steps = given.get("per-device-train-batch-size", given.get("micro-batch-size")), _whole(value)
    ranks = "the data-parallel ranks"
    if steps is None:
        return f"give --global-batch-size, --micro-batch-size x these steps x {ranks}"
    size = _whole(micro)
    if size is None:
        return f"give --global-batch-size, --micro-batch-size x {steps} x {ranks}"
    one, more = size * steps, size * steps * _EXAMPLE_RANKS
    return f"give --global-batch-size, {size} x {steps} x {ranks}: {one} for one rank, {more} for {_EXAMPLE_RANKS}"


def epochs(value: str, given: Given) -> str:
    """Epochs; transformers' may be fractions."""
    if _whole(given.get("max-steps")) is not None:
        return "the steps of --max-steps take its place; leave it out"
    whole = _whole(value)
    if whole is None:
        return "give --train-epochs with a whole number, or the length as --train-iters or --train-samples"
    return f"give --train-epochs {whole}"


def steps(value: str, given: Given) -> str:
    """Length of the run in steps; -1 means unset."""
    whole = _whole(value)
    return LEAVE if whole is None else f"give --train-iters {whole}"


def interval(option: str) -> Conversion:
    """Conversion of an interval in steps; below 1 it is a share of the run."""

    def converted(value: str, given: Given) -> str:
        whole = _whole(value)
        return f"give {option} in iterations" if whole is None else f"give {option} {whole}"

    return converted


def strategy(option: str) -> Conversion:
    """Conversion of a rule for an interval: never, in steps, which ``option`` has, or another."""
    words = {"no": f"{LEAVE}, and {option}", "steps": f"{LEAVE}; {option} has the iterations"}
    return choice(words, f"give {option}, in iterations")


def warmup(value: str, given: Given) -> str:
    """Steps of warm-up; below 1 a share of the run."""
    number = _number(value)
    if number is not None and 0 < number < 1:
        return f"give --lr-warmup-fraction {value}"
    return f"give --lr-warmup-iters {value if number is None else f'{number:g}'}".rstrip()


def decay_style(value: str, given: Given) -> str:
    """Name of a learning-rate schedule."""
    if value in _DECAY_STYLES:
        return f"give --lr-decay-style {_DECAY_STYLES[value]}"
    return "give --lr-decay-style with constant, linear, cosine, inverse-square-root or WSD"


def trackers(value: str, given: Given) -> str:
    """Destinations of the metrics."""
    found = [option for name, option in _TRACKERS.items() if name in value.lower()]
    if value.lower() == "none":
        return LEAVE
    return f"give {' and '.join(found) or ' or '.join(_TRACKERS.values())}"


def fine_tuning(value: str, given: Given) -> str:
    """Trainable weights: adapters, all of the model's, or some."""
    if value.lower() == "lora":
        rank = given.get("lora-rank", given.get("lora-r"))
        return f"{LEAVE}; --lora-rank {rank} says it" if rank else "give --lora-rank with the rank"
    words = {
        "full": "give --hft-ratio 1; without it half of the matrices train",
        "freeze": "give --hft-ratio 0, and --hft-train with patterns of the names that train",
    }
    return words.get(value.lower(), "give --lora-rank for adapters, or --hft-ratio for the model's own weights")


def lora_targets(value: str, given: Given) -> str:
    """Names of matrices, or a word for all of them."""
    names = value.replace(",", " ").split()
    if not names or names[0].lower() in ("all", "all-linear"):
        return f"{LEAVE}; all seven matrices of a layer have an adapter"
    return f"give --lora-targets {','.join(names)}"


def loss(value: str, given: Given) -> str:
    """Name of a loss of preference pairs, or of examples."""
    losses = declared(DpoConfig)["dpo_loss"].choices
    if value in losses:
        return f"give --dpo-loss {value}"
    if value in declared(ObjectivesConfig)["objective"].choices:
        return f"give --objective {value}"
    return f"give --dpo-loss with {', '.join(losses)} for pairs, or --objective for examples"


def command(value: str, given: Given) -> str:
    """Stage of LLaMA-Factory, or ms-swift's kind of alignment."""
    if value.lower() in _COMMANDS:
        return f"the command says it, `hft-megatron {_COMMANDS[value.lower()]}`; {LEAVE}"
    return "it is not built; the commands are `hft-megatron sft`, `dpo` and `pretrain`"


def data_type(value: str, given: Given) -> str:
    """Data type of the weights."""
    words = {
        "bfloat16": "give --bf16",
        "float16": "16-bit training is in bf16; give --bf16",
        "float32": "give --no-bf16",
        "auto": LEAVE,
    }
    return words.get(value.lower().removeprefix("torch."), "give --bf16 or --no-bf16")


def truncation(value: str, given: Given) -> str:
    """Treatment of a long example in ms-swift."""
    words = {"delete": "drop", "right": "truncate", "split": "split"}
    return f"give --long-examples {words.get(value.lower(), 'drop, truncate, which cuts off the end, or split')}"


def timeout(value: str, given: Given) -> str:
    """Seconds, which are minutes here."""
    seconds = _number(value)
    minutes = "" if seconds is None else f" {seconds / 60:g}"
    return f"give --distributed-timeout-minutes{minutes}"
