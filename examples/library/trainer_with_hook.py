"""This project's trainer as a library, with a hook after every step.

Run: python examples/library/trainer_with_hook.py MODEL DATA.jsonl OUTPUT
(or, on several GPUs, torchrun --nproc-per-node N examples/library/trainer_with_hook.py ...)
"""

import sys
from typing import Any

from hft_megatron import Hook, Trainer


class Losses(Hook):
    """Prints the mean loss of each round."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, run: Any, result: Any) -> None:
        """After every optimizer step."""
        if result.loss is not None:  # the last pipeline stage knows it
            self.losses.append(result.loss)

    def at_round_end(self, run: Any) -> None:
        """Before the next round, and after the last."""
        if self.losses:
            print(f"round {run.state.round}: mean loss {sum(self.losses) / len(self.losses):.4f}", flush=True)
            self.losses.clear()


def main(folder: str, data: str, output: str) -> None:
    """Fine-tunes half of the matrices, and from the middle on the other half."""
    Trainer(
        "sft",
        load_hf=folder,
        train_data_path=[data],
        train_iters=6,
        global_batch_size=4,
        seq_length=128,
        lr=1e-3,
        hft_round_interval=3,
        hft_rotation="complementary",
        save_hf=output,
        hooks=[Losses()],
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
