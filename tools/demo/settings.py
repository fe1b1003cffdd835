"""Every number of the demo: the knowledge, the model's size, and both trainings."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_FOLDER = REPOSITORY / "runs" / "demo"
RANKS = 2
"""Processes of every training: DP 2 while pretraining, TP 2 while fine-tuning."""
ENOUGH = 0.9
"""Share of exact matches that counts as knowing the facts, and as having learned the new task."""

KNOWLEDGE_SEED = 1
PEOPLE = 120
SENTENCES_PER_ROW = 6
"""Number of sentences that fit 64 tokens, the padded length of a batch."""
NEW_TASK_QUESTIONS = 96
VOCABULARY = 1024

PRETRAINING_STEPS = 400
PRETRAINING_BATCH = 32
MODEL_OPTIONS = (
    *("--num-layers", "4"),
    *("--hidden-size", "192"),
    *("--ffn-hidden-size", "512"),
    *("--num-attention-heads", "6"),
    *("--max-position-embeddings", "128"),
    "--untie-embeddings-and-output-weights",
)
PRETRAINING_OPTIONS = (
    *("--hft-ratio", "1"),
    *("--train-iters", str(PRETRAINING_STEPS)),
    *("--global-batch-size", str(PRETRAINING_BATCH)),
    *("--micro-batch-size", str(PRETRAINING_BATCH // RANKS)),
    *("--seq-length", "64"),
    *("--lr", "2e-3"),
    *("--min-lr", "1e-4"),
    *("--lr-decay-style", "cosine"),
    *("--lr-warmup-iters", "30"),
    *("--adam-beta2", "0.98"),
    *("--seed", str(KNOWLEDGE_SEED)),
    *("--save-interval", "200"),
    *("--log-interval", "20"),
)

FINE_TUNING_STEPS = 150
"""The number of steps at which both methods are compared."""
EVALUATION_INTERVAL = 50
LONGEST_FINE_TUNING = 4 * FINE_TUNING_STEPS
"""Limit of half fine-tuning's steps until it has learned the new task as well."""
FINE_TUNING_BATCH = 32
FINE_TUNING_OPTIONS = (
    *("--global-batch-size", str(FINE_TUNING_BATCH)),
    *("--seq-length", "64"),
    *("--lr", "5e-4"),
    *("--lr-decay-style", "constant"),  # so that a run can continue beyond its last step
    *("--lr-warmup-fraction", "0"),
    *("--log-interval", "10"),
)
