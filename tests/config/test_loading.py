"""Options from files and words. Run: pytest tests/config/test_loading.py"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.data import DataConfig
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.loading import load_options, read_resolved, write_resolved
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.errors import UserError

NO_OPTION = "belongs to no option; options start with --, and --help-all shows which take several values."


@dataclass(frozen=True, kw_only=True)
class Options:
    """As a command declares them."""

    config: str | None = None
    check: bool = False
    run: RunConfig = field(default_factory=RunConfig)


def load(*words: str) -> RunConfig:
    return load_options(Options, words).run


def test_without_words_every_option_has_its_default() -> None:
    assert load_options(Options, []) == Options()


def test_adamw_s_defaults_are_pytorch_s_and_clipping_is_megatron_s() -> None:
    options = OptimizerConfig()
    [group] = torch.optim.AdamW([torch.zeros(1)]).param_groups
    assert (options.adam_beta1, options.adam_beta2) == group["betas"]
    assert options.adam_eps == group["eps"]
    assert options.weight_decay == group["weight_decay"]
    assert options.clip_grad == 1.0


def test_dashes_underscores_and_equals_signs_mean_the_same() -> None:
    for words in (
        ("--train-iters", "7"),
        ("--train_iters", "7"),
        ("--train-iters=7",),
        ("--train_iters=7",),
    ):
        assert load(*words).training.train_iters == 7


def test_switches_turn_on_and_off_and_three_state_ones_stay_unset() -> None:
    assert load("--sequence-parallel").parallel.sequence_parallel
    assert not load("--sequence-parallel", "--no-sequence-parallel").parallel.sequence_parallel
    assert load().training.bf16 is None
    assert load("--bf16").training.bf16 is True
    assert load("--no_bf16").training.bf16 is False


def test_the_last_of_a_repeated_option_counts() -> None:
    assert load("--lr", "1", "--seed", "5", "--lr", "2").optimizer.lr == 2.0


def test_values_that_look_like_options_or_numbers_are_kept_as_written() -> None:
    assert load("--save=--x").checkpoint.save == "--x"
    assert load("--save", "").checkpoint.save == ""
    assert load("--wandb-exp-name", "007").logging.wandb_exp_name == "007"
    assert load("--lr", "-1").optimizer.lr == -1.0


def test_an_option_that_takes_several_words_takes_all_up_to_the_next(tmp_path: Path) -> None:
    words = ("0.3", "a.jsonl", "0.7", "-b.jsonl")
    assert load("--train-data-path", *words, "--lr", "1").data == DataConfig(train_data_path=words)
    assert load("--train-data-path=--a").data.train_data_path == ("--a",)
    assert load("--train-data-path", "a", "b", "--train-data-path", "c").data.train_data_path == ("c",)
    (tmp_path / "run.yaml").write_text("train-data-path: [0.3, a.jsonl]\nvalid_data_path: v.jsonl\n")
    data = load("--config", str(tmp_path / "run.yaml")).data
    assert data == DataConfig(train_data_path=("0.3", "a.jsonl"), valid_data_path=("v.jsonl",))


def test_recompute_activations_is_the_selective_kind_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recompute_activations: true\n")
    for words in (("--recompute-activations",), ("--config", str(tmp_path / "run.yaml"))):
        assert load(*words).training.recompute_granularity == "selective"
    assert load().training.recompute_granularity is None


def test_the_command_line_overrides_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "lr: 1e-3\n"  # YAML itself reads this as text
        "train_iters: 5\n"
        "parallel:\n  tensor-model-parallel-size: 2\n  sequence_parallel: yes\n"
        "overlap-grad-reduce: false\n"
        "wandb-exp-name: 007\n"
        "global_batch_size: null\n"
    )
    config = load("--train-iters", "9", "--config", str(file))
    assert config == RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        training=TrainingConfig(train_iters=9),
        optimizer=OptimizerConfig(lr=1e-3),
        logging=LoggingConfig(wandb_exp_name="007"),
    )
    assert not load("--config", str(file), "--no-sequence-parallel").parallel.sequence_parallel


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load("--config", str(tmp_path / "run.yaml")) == RunConfig()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr abc", "--lr abc: the value must be a number of at least 0."),
        ("--lr=", "--lr '': the value must be a number of at least 0."),
        ("--train-iters 1.5", "--train-iters 1.5: the value must be a whole number of at least 0."),
        ("--train_iters x", "--train_iters x: the value must be a whole number of at least 0."),
        (
            "--lr-decay-style step",
            "--lr-decay-style step: the value must be one of constant, linear, cosine, inverse-square-root, WSD.",
        ),
        ("--lr", "--lr needs a value: a number of at least 0."),
        ("--lr --seed 1", "--lr needs a value: a number of at least 0."),
        ("--bf16=true", "--bf16=true: a switch takes no value; write --bf16."),
        ("--bf16 true", "--bf16 true: a switch takes no value; write --bf16."),
        ("--bf16 False", "--bf16 False: a switch takes no value; write --no-bf16."),
        ("--no-bf16=true", "--no-bf16=true: a switch takes no value; write --no-bf16."),
        ("--bf16=1", "--bf16=1: a switch takes no value; write --bf16 or --no-bf16."),
        (
            "--grad-reduce-in-bf16 true",
            "--grad-reduce-in-bf16 true: a switch takes no value; write --no-accumulate-allreduce-grads-in-fp32.",
        ),
        ("--swiglu true", "--swiglu true: a switch takes no value; write --swiglu."),
        ("--swiglu false", "--swiglu false: a switch takes no value; leave it out."),
        ("--bf16 on", f"The word 'on' {NO_OPTION}"),
        ("run.yaml", f"The word 'run.yaml' {NO_OPTION}"),
        ("-lr 1", f"The word '-lr' {NO_OPTION}"),
        (
            "--tensor-model-paralel-size 2",
            "--tensor-model-paralel-size is not an option; the nearest is --tensor-model-parallel-size.",
        ),
        (
            "--no-overlap_grad_reducee",
            "--no-overlap_grad_reducee is not an option; the nearest is --no-overlap-grad-reduce.",
        ),
        ("--no-lr", "--no-lr is not an option; the nearest is --min-lr."),
        ("--zzzzzzzzzzz", "--zzzzzzzzzzz is not an option; --help-all lists all of them."),
        (
            "--normalization LayerNorm",
            "--normalization LayerNorm: all norms are RMSNorm; leave it out, or give RMSNorm.",
        ),
        ("--normalization", "--normalization needs a value: RMSNorm."),
        ("--attention-dropout 0.1 --swiglu", "--attention-dropout 0.1: nothing is dropped; leave it out, or give 0.0."),
        ("--fp16", "--fp16: 16-bit training is in bf16; give --bf16."),
        ("--num_experts=8", "--num_experts 8: mixtures of experts are not built; only dense LLaMA models train."),
        (
            "--validation-set-names a b",
            "--validation-set-names a b: a .yaml file of --valid-data-path names its sources; leave it out.",
        ),
        (
            "--context-parallel-size 2",
            "--context-parallel-size 2 is not built yet; split activations by --sequence-parallel.",
        ),
        ("--use_megatron_fsdp", "--use_megatron_fsdp is not built yet; data parallelism shards the optimizer alone."),
        (
            "--transformer-impl inference_optimized",
            "--transformer-impl inference_optimized: nothing is generated while a model trains.",
        ),
        ("--encoder-num-layers x", "--encoder-num-layers x: the value must be a whole number of at least 1."),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        load(*words.split())
    assert str(error.value) == said
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1\nlrr: 2\n", "run.yaml:2: lrr is not an option; the nearest is --lr."),
        ("lr: abc\n", "run.yaml:1: lr abc: the value must be a number of at least 0."),
        ("parallel:\n  sequence-parallel: 2\n", "run.yaml:2: sequence-parallel 2: the value must be true or false."),
        (
            "train-data-path: [a, [b]]\n",
            "run.yaml:1: train-data-path holds a list or a mapping; the value must be one or more words.",
        ),
        ("lr: [1, 2]\n", "run.yaml:1: lr holds a list or a mapping; the value must be a number of at least 0."),
        (
            "lr: 1\nseed: 2\noptimizer:\n  lr: 3\n",
            "run.yaml:4: lr is set twice, first at {0}run.yaml:1: lr; leave one of them out.",
        ),
        ("- lr\n", "run.yaml: the file must hold `option: value` lines."),
        ("lr: 1\nseed: [2\n", "run.yaml:3 is not valid YAML: expected ',' or ']', but got '<stream end>'."),
        ("? [lr]\n: 1\n", "run.yaml:1: a key must be the name of an option or of a group."),
        ("check: true\n", "run.yaml:1: check is not an option; --help-all lists all of them."),
        ("config: other.yaml\n", "run.yaml:1: config is not an option; --help-all lists all of them."),
        ("swiglu: false\n", "run.yaml:1: swiglu false: the feed-forward layers are SwiGLU; leave it out."),
        ("swiglu: 1\n", "run.yaml:1: swiglu 1: the value must be true or false."),
        (
            "fp16: false\nmodel:\n  fp16: true\n",
            "run.yaml:3: fp16 is set twice, first at {0}run.yaml:1: fp16; leave one of them out.",
        ),
        (
            "hidden_dropout: 0.1\n",
            "run.yaml:1: hidden_dropout 0.1: nothing is dropped; leave it out, or give 0.0.",
        ),
        ("fp16: true\n", "run.yaml:1: fp16: 16-bit training is in bf16; give --bf16."),
        (
            "validation-set-names: [a, b]\n",
            "run.yaml:1: validation-set-names a b: a .yaml file of --valid-data-path names its sources; leave it out.",
        ),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load("--config", str(tmp_path / "run.yaml"))
    assert str(error.value) == f"{tmp_path}/{said.format(f'{tmp_path}/')}"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load("--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        load("--config", str(tmp_path / "binary.yaml"))


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = RunConfig(
        parallel=ParallelConfig(sequence_parallel=True),
        training=TrainingConfig(bf16=False, global_batch_size=8),
        optimizer=OptimizerConfig(lr=1.2345678901234567e-05, adam_eps=1e-8),
        data=DataConfig(train_data_path=("0.5", "a b.jsonl", "0.5", "null")),
        hft=HFTConfig(hft_ratio=1 / 3),
        checkpoint=CheckpointConfig(save="null", load="a: b # c", save_hf="007"),
        logging=LoggingConfig(wandb_project="true", wandb_exp_name="größer"),
    )
    path = tmp_path / "resolved_config.yaml"
    write_resolved(config, path)
    assert read_resolved(path) == config
    assert load("--config", str(path)) == config
    write_resolved(replace(config, hft=HFTConfig()), path)
    assert read_resolved(path).hft == HFTConfig()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    # Earlier versions wrote options of which they had but one value.
    gone = "context_parallel_size: 1\nexpert_model_parallel_size: 1\nuse_megatron_fsdp: false\nfp8_format: null\n"
    path.write_text(f"{path.read_text()}{gone}")
    assert read_resolved(path).hft == HFTConfig()
