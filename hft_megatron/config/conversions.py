"""Explanations of the values of other trainers' options, which follow ``--name value:`` in an error.

Each function takes the value, empty where there is none, and what the command is given.
"""

import math
import os
from collections.abc import Mapping

from hft_megatron.config.declared import declared
from hft_megatron.config.dpo import DpoConfig
from hft_megatron.config.given import LEAVE, Given
from hft_megatron.config.megatron_rows import Conversion
from hft_megatron.config.objectives import ObjectivesConfig

CHAT_TEMPLATES = ("plain", "tulu", "llama2", "llama3", "chatml")
"""Names that --chat-template takes beside files."""

_DECAY_STYLES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant, without a warm-up",
    "constant_with_warmup": "constant, and --lr-warmup-iters or --lr-warmup-fraction",
    "inverse_sqrt": "inverse-square-root",
    "cosine_with_min_lr": "cosine, and --min-lr",
    "warmup_stable_decay": "WSD and --lr-wsd-decay-style cosine, and --lr-wsd-decay-iters",
}
"""Values of --lr-decay-style, and what goes with them, by transformers' names."""
_COMMANDS = {"pt": "pretrain", "sft": "sft", "dpo": "dpo"}
"""Commands, by LLaMA-Factory's stages."""
_TRACKERS = {"tensorboard": "--tensorboard-dir FOLDER", "wandb": "--wandb-project NAME"}
_EXAMPLE_RANKS = 8

SOME_LAYERS = (
    "give --hft-ratio 0, and --hft-train with patterns of the names that train; --hft-freeze-embedding, "
    "--hft-freeze-head and --hft-freeze model.norm freeze the rest"
)


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


def _written(number: float) -> str:
    """A number without an exponent, to two places."""
    return f"{number:.2f}".rstrip("0").rstrip(".")


def is_on(value: str) -> bool:
    """Whether a value turns a switch on, for transformers or in YAML; for transformers its name alone does."""
    return value.lower() in ("", "true", "t", "yes", "y", "on", "1")


def switch(on: str, off: str = LEAVE) -> Conversion:
    """Conversion of a switch."""
    return lambda value, given: on if is_on(value) else off


def unless_zero(otherwise: str) -> Conversion:
    """Conversion of a number that turns something off where it is 0."""
    return lambda value, given: LEAVE if _number(value) == 0 or value.lower() == "false" else otherwise


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
    micro = given.values.get("per-device-train-batch-size", given.values.get("micro-batch-size"))
    steps = _whole(value)
    ranks = "the data-parallel ranks"
    if steps is None:
        return f"give --global-batch-size, --micro-batch-size x these steps x {ranks}"
    size = _whole(micro)
    if size is None:
        return f"give --global-batch-size, --micro-batch-size x {steps} x {ranks}"
    one, more = size * steps, size * steps * _EXAMPLE_RANKS
    return f"give --global-batch-size, {size} x {steps} x {ranks}: {one} for one rank, {more} for {_EXAMPLE_RANKS}"


def epochs(value: str, given: Given) -> str:
    """Epochs; transformers' may be fractions, and a corpus has none."""
    if "data-path" in given.options and "long-examples" not in given.options:
        return "a corpus has no epochs; give its length as --train-iters or --train-samples"
    if _whole(given.values.get("max-steps")) is not None:
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


def strategy(option: str, never: str) -> Conversion:
    """Conversion of a rule for an interval: never, in steps, which ``option`` has, when a model is best, or another."""
    best = "give --save-hf-best with a metric of the validation, such as 'lm loss'"
    words = {"no": never, "steps": f"{LEAVE}; {option} has the iterations", "best": best}
    return choice(words, f"give {option}, in iterations")


def warmup(value: str, given: Given) -> str:
    """Steps of warm-up; below 1 a share of the run."""
    number = _number(value)
    if number is not None and 0 < number < 1:
        return f"give --lr-warmup-fraction {value}"
    return f"give --lr-warmup-iters {value if number is None else _written(number)}".rstrip()


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
        rank = given.values.get("lora-rank", given.values.get("lora-r"))
        return f"{LEAVE}; --lora-rank {rank} sets it" if rank else "give --lora-rank with the rank"
    words = {
        "full": "give --hft-ratio 1; without it half of the matrices train",
        "freeze": SOME_LAYERS,
    }
    return words.get(value.lower(), "give --lora-rank for adapters, or --hft-ratio for the model's own weights")


def lora_targets(value: str, given: Given) -> str:
    """Names of matrices, or a word for all of them."""
    names = value.replace(",", " ").split()
    if not names or names[0].lower() in ("all", "all-linear"):
        return f"{LEAVE}; all seven matrices of a layer have an adapter"
    return f"give --lora-targets {','.join(names)}"


def pair_loss(value: str, given: Given) -> str:
    """Name of a loss of preference pairs."""
    losses = declared(DpoConfig)["dpo_loss"].choices
    if value in losses:
        return f"give --dpo-loss {value}"
    return f"give --dpo-loss with one of {', '.join(losses)}"


def loss(value: str, given: Given) -> str:
    """Name of a loss of preference pairs, or of examples."""
    if value in declared(ObjectivesConfig)["objective"].choices:
        return f"give --objective {value}"
    return pair_loss(value, given)


def command(value: str, given: Given) -> str:
    """Stage of LLaMA-Factory, or ms-swift's kind of alignment."""
    if value.lower() in _COMMANDS:
        return f"the command sets it, `hft-megatron {_COMMANDS[value.lower()]}`; {LEAVE}"
    return f"{value or 'it'} is not supported; the commands are `hft-megatron sft`, `dpo` and `pretrain`"


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
    words = {
        "delete": "give --long-examples drop",
        "left": "the beginning is never cut off; give --long-examples truncate, which cuts off the end",
        "right": "give --long-examples truncate",
        "split": "give --long-examples split",
    }
    return words.get(value.lower(), "give --long-examples with drop, truncate or split")


def timeout(value: str, given: Given) -> str:
    """Seconds, which are minutes here."""
    seconds = _number(value)
    if seconds is None:
        return "give --distributed-timeout-minutes, in minutes"
    return f"give --distributed-timeout-minutes {_written(seconds / 60)}"


def loss_scale(value: str, given: Given) -> str:
    """Megatron-LM's factor of the loss in fp16, or ms-swift's name of the tokens that train."""
    words = {
        "default": f"{LEAVE}; --loss-on assistant is the default",
        "last_round": "give --loss-on last",
        "all": "give --loss-on all",
    }
    if _number(value) is not None:
        return f"bf16 and fp32 scale no loss; {LEAVE}, or give 1"
    return words.get(value.lower(), "give --loss-on with the tokens that train: assistant, last or all")
