"""Half fine-tuning in TRL's own SFT trainer: in each epoch another half of the matrices trains.

Run: python examples/library/trl_round_per_epoch.py MODEL DATA.jsonl OUTPUT
DATA has `prompt` and `completion`; or `messages`, where the model's tokenizer has a chat template.
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hft_megatron import draw_plan

ROUNDS = 2


def main(folder: str, data: str, output: str) -> None:
    """Trains for one epoch per round and saves the model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    dataset = load_dataset("json", data_files=data, split="train")
    for round in range(ROUNDS):
        plan = draw_plan(model.config, ratio=0.5, seed=1, round=round)
        plan.apply(model)
        verify = plan.audit(model)
        # A trainer for every round, because it makes its optimizer of what requires gradients when it starts.
        settings = SFTConfig(
            output_dir=f"{output}/round_{round}", num_train_epochs=1, learning_rate=1e-3, report_to="none",
            save_strategy="no", seed=round, bf16=False, max_length=128,
        )  # fmt: skip
        SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer).train()
        verify()
        print(plan.describe())
    model.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
