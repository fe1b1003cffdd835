"""Values that the tests give to other trainers' names."""

VALUES = ("", "1", "0", "-1", "0.5", "true", "false", "no", "steps", "all", "none", "x", "a/b", "1e400", "nan", "{}")

NAMED_VALUES = (
    *(
        "nll",
        "dft",
        "sigmoid",
        "ipo",
        "freeze",
        "full",
        "lora",
        "llama3",
        "sft",
        "dpo",
        "pt",
        "rm",
        "wandb",
        "bfloat16",
    ),
    *("default", "last_round", "epoch", "best", "delete", "left", "right", "split", "constant", "warmup_stable_decay"),
    *("constant_with_warmup", "cosine_with_min_lr", "float32", "q_proj", "auto"),
)
"""Values that some names have answers of their own to."""
