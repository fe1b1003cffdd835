"""Every mistake a user can make with options: one sentence, exit code 2, nothing started.

Run: pytest tests/cli/test_mistakes.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hft_megatron.cli import main
from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.cli.conftest import Training

GOOD = "--load-hf MODEL --train-data-path data.jsonl"
RAMPED = f"{GOOD} --global-batch-size 8 --train-samples 40"
EXPORTS = "--save-hf OUT --save-hf-interval 4"
FROM_FLAGS = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 8 --max-position-embeddings 128 "
    "--tokenizer-model tok --train-data-path data.jsonl"
)

GOOD_COMMANDS = [
    (1, GOOD),
    (1, f"{FROM_FLAGS} --vocab-size 300"),
    (1, FROM_FLAGS),
    (8, f"{GOOD} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"),
    (4, f"{GOOD} --tensor-model-parallel-size 4 --overlap-grad-reduce --overlap-param-gather"),
    (3, f"{GOOD} --pipeline-model-parallel-size 3 --decoder-last-pipeline-num-layers 2"),
    (2, f"{GOOD} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 2"),
    (1, f"{GOOD} --recompute-granularity full --recompute-method uniform --recompute-num-layers 4"),
    (1, f"{GOOD} --recompute-granularity full --recompute-method block --recompute-num-layers 3"),
    (1, f"{GOOD} --recompute-granularity selective"),
    (2, f"{RAMPED} --rampup-batch-size 2 2 20 --lr-warmup-samples 8 --lr-decay-samples 30"),
    (1, f"{GOOD} --recompute-activations --no-overlap-p2p-communication --no-manual-gc-eval"),
    (1, f"{GOOD} --hft-ratio 0"),
    (4, f"{GOOD} --profile --use-pytorch-profiler --profile-step-end 11 --profile-ranks 0 3 --tensorboard-dir TB"),
    (1, f"{GOOD} --profile-step-start 12 --use-pytorch-profiler"),
    (1, f"{GOOD} --sequence-parallel --hft-ratio 0"),
    (1, f"{GOOD} --packing --packing-window 50 --long-examples split --train-epochs 2 --lr-warmup-iters 500"),
    (1, f"{GOOD} --hft-ratio 1 --lr-warmup-fraction 0.03 --seq-length 128"),
    (1, f"{GOOD} --eval-interval 5 --eval-iters 2 --valid-data-path valid.jsonl --save RUN --save-interval 10"),
    (1, f"{GOOD} --train-data-path 0.3 a.jsonl 0.7 b.jsonl.gz --loss-on last --chat-template llama2"),
    (1, f"{GOOD} --objective eaft --kl-to-base 0.1 --kl-reference model"),
    (1, f"{GOOD} --objective ift --hft-freeze-embedding --ift-weights detached"),
    (1, f"{GOOD} --objective ift --hft-freeze model.embed*"),
    (1, f"{GOOD} --objective ift --lora-rank 4"),
    (1, "--load-hf MODEL --train-iters 0 --save-hf OUT --save-dtype bfloat16"),
    (1, f"{GOOD} {EXPORTS} --save-hf-keep 2 --valid-data-path valid.jsonl --eval-interval 2"),
    (
        1,
        f"{GOOD} --save RUN --save-interval 5 --keep-last 2 --save-retain-interval 20 --async-save --save-trained-only",
    ),
]

MISTAKES = [
    # the layout
    (3, f"{GOOD} --tensor-model-parallel-size 3", "--tensor-model-parallel-size 3", "8 attention heads", "fits is 2"),
    (
        8,
        f"{GOOD} --tensor-model-parallel-size 8",
        "--tensor-model-parallel-size 8 does not divide the model's 4 query groups: ranks would hold copies of key and",
        "fits is 4, and --pipeline-model-parallel-size spreads",
    ),
    (
        4,
        f"{FROM_FLAGS} --ffn-hidden-size 90 --tensor-model-parallel-size 4",
        "--tensor-model-parallel-size 4",
        "90 feed-forward channels",
        "size that fits is 2",
    ),
    (
        3,
        f"{GOOD} --pipeline-model-parallel-size 3",
        "--pipeline-model-parallel-size 3 does not divide the model's 8 layers",
        "--decoder-last-pipeline-num-layers 2 fits (2 x 3 + 2 layers)",
    ),
    (
        4,
        f"{GOOD} --pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 1",
        "--decoder-first-pipeline-num-layers 1 leaves 7 of the model's 8 layers, which the other 3",
        "--decoder-first-pipeline-num-layers 2 fits (4 x 2 layers)",
    ),
    (
        2,
        f"{GOOD} --pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 8",
        "--decoder-last-pipeline-num-layers 8 leaves 0 of the model's 8 layers for the other stage",
        "--decoder-last-pipeline-num-layers 7 fits",
    ),
    (
        2,
        f"{GOOD} --pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 0",
        "--decoder-last-pipeline-num-layers 0: must be a whole number of at least 1",
    ),
    (
        2,
        f"{GOOD} --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 5 "
        "--num-layers-per-virtual-pipeline-stage 1",
        "--num-layers-per-virtual-pipeline-stage 1 needs stages of equal size",
    ),
    (
        2,
        f"{GOOD} --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 6 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 3",
        "--recompute-num-layers 3 does not divide the 6 and 2 layers of a pipeline stage; the nearest number that fits",
    ),
    (
        2,
        f"{GOOD} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
        "--num-layers-per-virtual-pipeline-stage 3",
        "4 layers of a pipeline stage",
        "number that fits is 2",
    ),
    (1, f"{GOOD} --num-layers-per-virtual-pipeline-stage 2", "needs --pipeline-model-parallel-size of at least 2"),
    (
        2,
        f"{GOOD} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4",
        "--num-layers-per-virtual-pipeline-stage 4",
        "there is nothing to interleave",
    ),
    (6, f"{GOOD} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", "world size 6", "start 4 ranks"),
    (1, f"{GOOD} --tensor-model-parallel-size 2", "world size 1", "start 2 ranks"),
    (1, f"{GOOD} --overlap-param-gather", "--overlap-param-gather needs --overlap-grad-reduce"),
    # the objective
    (1, f"{GOOD} --objective nnl", "--objective", "nnl", "nll, dft, eaft, talr, asft, ift"),
    (
        1,
        f"{GOOD} --kl-to-base 0.1 --kl-reference precompute",
        "--kl-reference precompute keeps one number per answer",
        "choose shared or model",
    ),
    (1, f"{GOOD} --kl-reference model", "the first weights for --kl-to-base, which is 0; leave it out, or add"),
    (1, f"{GOOD} --objective dft --ift-lambda 0.3", "is an option of --objective ift, but --objective is dft"),
    (1, f"{GOOD} --objective ift", "gives the input embedding no gradient", "add --hft-freeze-embedding"),
    (
        1,
        f"{GOOD} --objective ift --hft-freeze-embedding --kl-to-base 0.1",
        "--kl-to-base 0.1 compares distributions on the examples as they are",
        "leave it out",
    ),
    # the profiler
    (
        1,
        f"{GOOD} --profile --profile-step-start 12",
        "--profile-step-end 12 must be above --profile-step-start 12: the first",
        "give at least 13",
    ),
    (2, f"{GOOD} --profile --profile-ranks 1 2", "--profile-ranks 2: this run has ranks 0 to 1; give one of them"),
    (1, f"{GOOD} --profile --profile-ranks all", "--profile-ranks all: the value must be one or more whole numbers"),
    (1, f"{GOOD} --profile --use-pytorch-profiler", "--use-pytorch-profiler needs a folder", "--tensorboard-dir"),
    # not built yet
    (2, f"{GOOD} --context-parallel-size 2", "--context-parallel-size 2 is not built yet"),
    (2, f"{GOOD} --expert-model-parallel-size 2", "--expert-model-parallel-size 2 is not built yet"),
    (1, f"{GOOD} --fp8-format hybrid", "--fp8-format hybrid is not built yet"),
    (1, f"{GOOD} --use-megatron-fsdp", "--use-megatron-fsdp is not built yet"),
    # the batch
    (1, f"{GOOD} --rampup-batch-size 4 4", "--rampup-batch-size 4 4: must be three whole numbers of at least 1"),
    (1, f"{GOOD} --rampup-batch-size 4 x 4", "--rampup-batch-size 4 x 4: the value must be one or more whole numbers"),
    (1, f"{GOOD} --train-samples 9 --rampup-batch-size 1 1 4", "1 1 4 needs --global-batch-size, its last size; add"),
    (1, f"{RAMPED} --rampup-batch-size 8 4 9", "--global-batch-size 8 must be START 8 plus a multiple of INCREMENT"),
    (1, f"{RAMPED} --rampup-batch-size 2 4 9", "--rampup-batch-size 2 4 9: --global-batch-size 8", "that fits is 10."),
    (
        2,
        f"{RAMPED} --micro-batch-size 2 --rampup-batch-size 4 2 9",
        "--rampup-batch-size: INCREMENT 2 is not a multiple of 4, the fewest sequences of a step",
    ),
    (
        2,
        f"{RAMPED} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
        "--rampup-batch-size 1 7 9",
        "--rampup-batch-size: START 1 is not a multiple of 2, the fewest sequences",
    ),
    (
        1,
        f"{GOOD} --global-batch-size 8 --rampup-batch-size 4 4 9",
        "--rampup-batch-size 4 4 9 needs the length of the run in samples; give it",
    ),
    (1, f"{RAMPED} --rampup-batch-size 4 4 40", "--train-samples 40 ends before --rampup-batch-size", "more than 40"),
    (
        1,
        f"{RAMPED} --rampup-batch-size 4 4 9 --hft-round-interval 2 --hft-lr-schedule round",
        "--hft-lr-schedule round has one schedule for all rounds; leave one of the two out",
    ),
    (
        2,
        f"{GOOD} --micro-batch-size 2 --global-batch-size 6",
        "--global-batch-size 6",
        "--micro-batch-size 2 x data-parallel size 2 = 4",
    ),
    (
        2,
        f"{GOOD} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 3",
        "--global-batch-size 3 makes 3 micro-batches",
        "--pipeline-model-parallel-size 2",
    ),
    (1, f"{GOOD} --seq-length 129", "--seq-length 129", "128 positions"),
    # records
    (1, f"{GOOD} --data-keys prompt=question", "'question' is not a key of any format", "such as question=prompt"),
    (1, f"{GOOD} --prompt-separator \\x", "--prompt-separator \\x: a \\ must be followed by n, t or another"),
    # recomputation
    (1, f"{GOOD} --recompute-granularity full", "needs --recompute-method"),
    (
        1,
        f"{GOOD} --recompute-activations --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 1",
        "--recompute-activations recomputes attention only, but --recompute-granularity full whole layers; keep one",
    ),
    (1, f"{GOOD} --recompute-activations --recompute-num-layers 2", "but --recompute-num-layers 2 whole layers"),
    (1, f"{GOOD} --empty-unused-memory-level 3", "--empty-unused-memory-level 3: the value must be one of 0, 1, 2"),
    (1, f"{GOOD} --manual-gc --manual-gc-interval -1", "--manual-gc-interval -1: must be a whole number of at least 0"),
    (1, f"{GOOD} --recompute-granularity full --recompute-method block", "needs --recompute-num-layers"),
    (1, f"{GOOD} --recompute-method block", "--recompute-method block needs --recompute-granularity full"),
    (
        1,
        f"{GOOD} --recompute-granularity selective --recompute-num-layers 1",
        "--recompute-num-layers 1 needs --recompute-granularity full",
    ),
    (
        1,
        f"{GOOD} --recompute-granularity full --recompute-method uniform --recompute-num-layers 3",
        "--recompute-num-layers 3 does not divide the 8 layers",
    ),
    (
        1,
        f"{GOOD} --recompute-granularity full --recompute-method block --recompute-num-layers 9",
        "--recompute-num-layers 9 is more than the 8 layers",
    ),
    # numbers
    (1, f"{GOOD} --hft-ratio 1.5", "--hft-ratio 1.5: must be a number between 0 and 1"),
    (1, f"{GOOD} --hft-ratio -0.1", "--hft-ratio -0.1: must be a number between 0 and 1"),
    (1, f"{GOOD} --hft-ratio nan", "--hft-ratio nan: must be a number between 0 and 1"),
    # the method
    (1, f"{GOOD} --hft-selection lisa --hft-level layer", "--hft-level layer has no effect with --hft-selection lisa"),
    (1, f"{GOOD} --hft-round-interval 0", "--hft-round-interval 0 must be stage, epoch, or"),
    (1, f"{GOOD} --hft-plan absent.json", "--hft-plan absent.json is not a readable file"),
    # more numbers
    (1, f"{GOOD} --micro-batch-size 0", "--micro-batch-size 0: must be a whole number of at least 1"),
    (1, f"{GOOD} --global-batch-size -8", "--global-batch-size -8: must be a whole number of at least 1"),
    (1, f"{GOOD} --tensor-model-parallel-size 0", "--tensor-model-parallel-size 0: must be a whole number of at least"),
    (1, f"{GOOD} --train-iters -1", "--train-iters -1: must be a whole number of at least 0"),
    (1, f"{GOOD} --train-epochs 0", "--train-epochs 0: must be a whole number of at least 1"),
    (1, f"{GOOD} --train-epochs 2 --train-iters 100", "--train-iters 100 and --train-epochs 2 are both given"),
    (1, f"{GOOD} --train-samples 9 --train-iters 100", "--train-iters 100 and --train-samples 9 are both given"),
    (1, f"{GOOD} --train-samples 9 --train-epochs 1", "--train-epochs 1 and --train-samples 9 are both given"),
    (1, f"{GOOD} --train-samples 7 --global-batch-size 8", "--train-samples 7 is less than one step", "at least 8"),
    (
        1,
        f"{GOOD} --train-samples 9 --lr-decay-iters 5",
        "--lr-decay-iters 5 does not fit a run whose length is --train-samples 9; give --lr-decay-samples.",
    ),
    (
        1,
        f"{GOOD} --lr-warmup-samples 5",
        "--lr-warmup-samples 5 does not fit a run whose length is in iterations; give --lr-warmup-iters, or",
    ),
    (1, f"{GOOD} --train-samples 9 --lr-warmup-samples 9", "--lr-warmup-samples 9 must be below --train-samples 9"),
    (
        1,
        f"{GOOD} --train-samples 9 --lr-decay-style WSD --lr-wsd-decay-samples 9 --lr-warmup-samples 1",
        "--lr-wsd-decay-samples 9 is longer than the decay after the warm-up, 8; give at most 8",
    ),
    (1, f"{GOOD} --no-bf16 --grad-reduce-in-bf16", "--no-accumulate-allreduce-grads-in-fp32 sums"),
    (1, f"{GOOD} --use-precision-aware-optimizer", "masters and moments are fp32; other types take"),
    (1, f"{GOOD} --packing --packing-window 0", "--packing-window 0: must be a whole number of at least 1"),
    (1, f"{GOOD} --packing-window 50", "--packing-window 50 needs --packing; add it"),
    (1, f"{GOOD} --packing-algorithm first_fit_shuffle", "--packing-algorithm first_fit_shuffle needs --packing"),
    (1, f"{GOOD} --lr -1e-5", "--lr -1e-05: must be a number of at least 0"),
    (1, f"{GOOD} --skip-nonfinite-steps -1", "--skip-nonfinite-steps -1: must be a whole number of at least 0"),
    (1, f"{GOOD} --loss-spike-threshold 0", "--loss-spike-threshold 0.0: must be a number above 0"),
    (1, f"{GOOD} --lr nan", "--lr nan: must be a number"),
    (1, f"{GOOD} --weight-decay inf", "--weight-decay inf: must be a number"),
    (1, f"{GOOD} --adam-eps 0", "--adam-eps 0.0: must be a number above 0"),
    (1, f"{GOOD} --adam-beta2 1", "--adam-beta2 1.0: must be a number from 0 to below 1"),
    (1, f"{GOOD} --min-lr 1", "--min-lr 1.0 is above --lr"),
    (1, f"{GOOD} --lr-warmup-iters 5 --lr-warmup-fraction 0.1", "--lr-warmup-fraction 0.1 and --lr-warmup-iters 5"),
    (1, f"{GOOD} --mofo-fraction 0", "--mofo-fraction 0.0: must be a number above 0 and at most 1"),
    (1, f"{GOOD} --mofo-fraction 1.5", "--mofo-fraction 1.5: must be a number above 0 and at most 1"),
    (1, f"{GOOD} --mofo-fraction half", "--mofo-fraction half: the value must be a number above 0 and at most 1"),
    (1, f"{GOOD} --lr-warmup-fraction 1", "--lr-warmup-fraction 1.0: must be a number from 0 to below 1"),
    (1, f"{GOOD} --lr-warmup-iters 100", "--lr-warmup-iters 100 must be below --train-iters 100"),
    (1, f"{GOOD} --lr-schedule-start 3", "--lr-schedule-start 3 needs --lr-schedule-iters"),
    (
        1,
        f"{GOOD} --train-iters 5 --lr-schedule-iters 7 --lr-schedule-start 3",
        "--lr-schedule-start 3 plus --train-iters 5 is more than --lr-schedule-iters 7; give at least 8",
    ),
    (1, f"{GOOD} --train-samples 9 --lr-schedule-iters 99", "--lr-schedule-iters 99 counts iterations"),
    (
        1,
        f"{GOOD} --hft-round-interval 5 --hft-lr-schedule round --lr-schedule-iters 999",
        "--lr-schedule-iters 999 spans several runs",
    ),
    (
        1,
        f"{GOOD} --train-iters 5 --lr-schedule-iters 9 --lr-warmup-iters 9",
        "--lr-warmup-iters 9 must be below --lr-schedule-iters 9",
    ),
    (1, f"{GOOD} --lr-decay-iters 0", "--lr-decay-iters 0: must be a whole number of at least 1"),
    (1, f"{GOOD} --lr-warmup-iters 7 --lr-decay-iters 7", "--lr-warmup-iters 7 must be below --lr-decay-iters 7"),
    (1, f"{GOOD} --decoupled-min-lr 1e-6", "--decoupled-min-lr 1e-06 needs --decoupled-lr; add it"),
    (1, f"{GOOD} --min-lr 1e-6 --decoupled-lr 1e-7", "--min-lr 1e-06 is above --decoupled-lr 1e-07; give"),
    (
        1,
        f"{GOOD} --decoupled-lr 1e-6 --hft-freeze-embedding --hft-freeze-head",
        "--decoupled-lr 1e-06 is the learning rate of embedding and head, but --hft-freeze-embedding and",
    ),
    (1, f"{GOOD} --lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    (1, f"{GOOD} --lr-wsd-decay-iters 5", "--lr-wsd-decay-iters 5 needs --lr-decay-style WSD, but it is cosine"),
    (1, f"{GOOD} --lr-wsd-decay-style linear", "--lr-wsd-decay-style linear needs --lr-decay-style WSD"),
    (
        1,
        f"{GOOD} --lr-decay-style WSD --lr-wsd-decay-iters 91 --lr-warmup-iters 10",
        "--lr-wsd-decay-iters 91 is longer than the decay after the warm-up, 90; give at most 90",
    ),
    (1, f"{GOOD} --lr-decay-style inverse-square-root", "is not defined without a warm-up; give --lr-warmup-iters"),
    (1, f"{GOOD} --lr-warmup-init 1e-6", "--lr-warmup-init 1e-06 is the learning rate at the start of a "),
    (1, f"{GOOD} --lr-warmup-iters 5 --lr-warmup-init 1", "--lr-warmup-init 1.0 is above --lr 1e-05"),
    (1, f"{GOOD} --end-weight-decay 1", "--end-weight-decay 1.0 needs --weight-decay-incr-style linear or cosine"),
    (
        1,
        f"{GOOD} --weight-decay-incr-style linear --end-weight-decay 1",
        "--weight-decay-incr-style linear needs --start-weight-decay; add it",
    ),
    (
        1,
        f"{GOOD} --weight-decay-incr-style cosine --start-weight-decay 1 --end-weight-decay 0.5",
        "--end-weight-decay 0.5 is below --start-weight-decay 1.0, but weight decay can only rise; give at least 1.0",
    ),
    (1, f"{GOOD} --save-interval 0", "--save-interval 0: must be a whole number of at least 1"),
    # the model
    (1, "--train-data-path data.jsonl", "No model is given", "--load-hf"),
    (1, f"{GOOD} --num-layers 2", "--num-layers 2 cannot be given with --load-hf"),
    (1, "--load-hf absent --train-data-path data.jsonl", "--load-hf absent: there is no such folder"),
    (1, "--load-hf . --train-data-path data.jsonl", "--load-hf .: there is no config.json"),
    (1, "--num-layers 2 --train-data-path data.jsonl", "--hidden-size is missing"),
    (1, f"{FROM_FLAGS} --num-layers 0", "--num-layers 0: must be a whole number of at least 1"),
    (1, f"{FROM_FLAGS} --num-query-groups 3", "--num-query-groups 3", "8 attention heads"),
    (1, f"{FROM_FLAGS} --hidden-size 63", "--num-attention-heads 8 does not divide the model's hidden size 63"),
    (1, f"{FROM_FLAGS} --kv-channels 7", "--kv-channels 7", "is odd"),
    # data, tokenizer and folders
    (1, "--load-hf MODEL", "--train-data-path is missing"),
    (1, FROM_FLAGS.replace("--tokenizer-model tok", ""), "--tokenizer-model is missing"),
    (1, FROM_FLAGS.replace("--tokenizer-model tok", "--train-iters 0"), "--tokenizer-model is missing"),
    (1, f"{GOOD} --train-data-path 1 a.jsonl b.jsonl", "--train-data-path: b.jsonl has no weight, but other paths do"),
    (1, f"{GOOD} --train-data-path 0 a.jsonl", "--train-data-path: the weight 0 must be above 0"),
    (1, f"{GOOD} --valid-data-path 2 a.jsonl", "--valid-data-path 2 a.jsonl: validation uses every example exactly"),
    (1, f"{GOOD} --loss-on users", "--loss-on users: the value must be one of assistant, all, last"),
    (1, f"{GOOD} --data-format csv", "--data-format csv: the value must be one of messages, preference, sharegpt"),
    (1, f"{GOOD} --eval-interval 5", "--eval-interval 5 needs --valid-data-path"),
    (1, f"{GOOD} --eval-iters 5", "--eval-iters 5 needs --valid-data-path"),
    (1, f"{GOOD} --eval-on-start", "--eval-on-start needs --valid-data-path, or --eval-tasks; add it or le"),
    (1, f"{GOOD} --valid-data-path a.jsonl b.jsonl a.jsonl", "--valid-data-path a.jsonl is given twice"),
    (1, f"{GOOD} --valid-data-path absent.yaml", "--valid-data-path absent.yaml cannot be read"),
    (1, f"{GOOD} --save-interval 5", "--save-interval 5 needs --save"),
    (1, f"{GOOD} --keep-last 2", "--keep-last 2 needs --save"),
    (1, f"{GOOD} --save-retain-interval 2", "--save-retain-interval 2 needs --save"),
    (1, f"{GOOD} --async-save", "--async-save needs --save; add it or leave --async-save out"),
    (1, f"{GOOD} --save-trained-only", "--save-trained-only needs --save"),
    (1, f"{GOOD} --load MODEL", "--load MODEL is a Hugging Face folder; give it as --load-hf"),
    (1, f"{GOOD} --load-fallback", "--load-fallback needs --load"),
    (1, f"{GOOD} --finetune", "--finetune needs --load"),
    (1, f"{GOOD} --override-opt_param-scheduler", "--override-opt-param-scheduler needs --load"),
    (
        1,
        f"{GOOD} --load RUN --override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
        "--override-opt-param-scheduler uses this command's schedule, but --use-checkpoint-opt-param-scheduler the",
    ),
    (1, f"{GOOD} --finetune --load RUN --save RUN", "--finetune starts a new run", "choose another --save folder"),
    (
        1,
        f"{GOOD} --finetune --load RUN --hft-selection spectrum",
        "--hft-selection spectrum scores the weights of --load-hf",
        "export that run with --save-hf",
    ),
    (1, f"{GOOD} --save RUN --keep-last 0", "--keep-last 0: must be a whole number of at least 1"),
    (
        1,
        f"{GOOD} --save RUN --save-interval 10 --save-retain-interval 25",
        "--save-retain-interval 25 must be a multiple of --save-interval 10, such as 20",
    ),
    (1, f"{GOOD} --exit-duration-in-mins 0", "--exit-duration-in-mins 0.0: must be a number above 0"),
    (1, f"{GOOD} --exit-interval 0", "--exit-interval 0: must be a whole number of at least 1"),
    (1, f"{GOOD} --exit-on-missing-checkpoint", "--exit-on-missing-checkpoint needs --load; add it"),
    (1, f"{GOOD} --no-load-optim", "--no-load-optim needs --load; add it"),
    (1, f"{GOOD} --iterations-to-skip 3 0", "--iterations-to-skip 0: iterations are numbered from 1"),
    (1, f"{GOOD} --iterations-to-skip 3 x", "--iterations-to-skip 3 x: the value must be one or more whole numbers"),
    (1, f"{GOOD} --save-dtype float32", "--save-dtype float32 needs --save-hf"),
    (1, f"{GOOD} --keep-source-tokenizer", "--keep-source-tokenizer needs --save-hf"),
    (1, f"{GOOD} --save-hf-interval 2", "--save-hf-interval 2 needs --save-hf; add it"),
    (1, f"{GOOD} --save-hf OUT --save-hf-interval 0", "--save-hf-interval 0: must be a whole number of at least 1"),
    (1, f"{GOOD} --save-hf OUT --save-hf-keep 2", "--save-hf-keep 2 needs --save-hf-interval; add it"),
    (1, f"{GOOD} --save-hf OUT --save-hf-best loss", "--save-hf-best loss needs --save-hf-interval; add it"),
    (1, f"{GOOD} {EXPORTS} --save-hf-keep 0", "--save-hf-keep 0: must be a whole number of at least 1"),
    (1, f"{GOOD} {EXPORTS} --train-iters 0", "--save-hf-interval 4 exports during training, but --train-iters 0"),
    (1, f"{GOOD} {EXPORTS} --save-hf-best loss", "--save-hf-best loss needs validations", "--eval-interval 4."),
    (
        1,
        f"{GOOD} {EXPORTS} --save-hf-best loss --valid-data-path v.jsonl --eval-interval 3",
        "--save-hf-interval 4 must be a multiple of --eval-interval 3, such as 3:",
    ),
    (
        1,
        f"{GOOD} {EXPORTS} --save-hf-best valid_loss --valid-data-path v.jsonl --eval-interval 2",
        "--save-hf-best valid_loss is not a validation metric of sft; choose lm loss.",
    ),
    (1, f"{GOOD} --save-hf MODEL --save-hf-interval 2", "--save-hf MODEL is not empty"),
    (1, f"{GOOD} --wandb-exp-name x", "--wandb-exp-name x needs --wandb-project"),
    (1, f"{GOOD} --save-hf MODEL", "--save-hf MODEL is not empty"),
    (1, f"{GOOD} --save-hf MODEL/config.json", "--save-hf MODEL/config.json is a file"),
    (1, f"{GOOD} --save MODEL/config.json", "--save MODEL/config.json is a file"),
    # names and values
    (1, f"{GOOD} --trian-iters 5", "--trian-iters is not an option; the nearest is --train-iters"),
    (1, f"{GOOD} --lr abc", "--lr abc: the value must be a number"),
    (1, f"{GOOD} --group-query-attention --fp16", "--fp16: 16-bit training is in bf16; give --bf16."),
]  # fmt: skip


def words(options: str, model_folder: Path) -> list[str]:
    base = model_folder.parent
    places = {"MODEL": str(model_folder), "RUN": str(base / "run"), "OUT": str(base / "out")}
    for name, place in places.items():
        options = options.replace(name, place)
    return ["sft", *options.split()]


@pytest.mark.parametrize(("world_size", "options"), GOOD_COMMANDS)
def test_options_that_fit_are_handed_to_training(
    world_size: int, options: str, model_folder: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert main([*words(options, model_folder), "--check"]) == EXIT_OK
    assert [name for name, *_ in training.calls] == ["check"]


@pytest.mark.parametrize(
    ("world_size", "options", "said"), [(world, options, said) for world, options, *said in MISTAKES]
)
@pytest.mark.parametrize("check", [True, False], ids=["check", "train"])
def test_a_mistake_is_one_sentence_and_exit_code_2(
    world_size: int,
    options: str,
    said: list[str],
    check: bool,
    model_folder: Path,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    code = main(words(options, model_folder) + ["--check"] * check)
    out, err = capsys.readouterr()
    assert code == EXIT_USAGE
    assert out == ""
    assert err.startswith("hft-megatron: error: ")
    assert err.count("\n") == 1
    assert err.endswith(".\n")
    for part in said:
        assert part.replace("MODEL", str(model_folder)) in err
    assert training.calls == []


def test_a_model_that_is_not_llama_is_named(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    assert main(words(GOOD, model_folder)) == EXIT_USAGE
    assert 'model_type is "qwen2"' in capsys.readouterr().err


def test_a_folder_with_checkpoints_is_not_written_over_unless_it_is_resumed(
    model_folder: Path, training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "latest_checkpointed_iteration.txt").write_text("100")
    save = [*words(GOOD, model_folder), "--save", str(run)]
    assert main(save) == EXIT_USAGE
    assert f"add --load {run} to resume it" in capsys.readouterr().err
    assert main([*save, "--load", f"{run}/"]) == EXIT_OK


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "x")])
def test_a_broken_launch_environment_is_named(
    name: str,
    value: str,
    model_folder: Path,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert main(words(GOOD, model_folder)) == EXIT_USAGE
    err = capsys.readouterr().err
    assert f"{name}={value}" in err or "missing from the environment" in err


def test_a_real_process_reports_a_mistake_without_importing_torch(model_folder: Path) -> None:
    code = (
        "import sys; from hft_megatron.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *words(f"{GOOD} --hft-ratio 2", model_folder)]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert ended.returncode == EXIT_USAGE
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == ["hft-megatron: error: --hft-ratio 2.0: must be a number between 0 and 1."]
