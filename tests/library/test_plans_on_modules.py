"""Plans on transformers' models, as a user of another trainer has them: what trains, and what is told.

Run: pytest tests/library
"""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hft_megatron import Plan, draw_plan
from hft_megatron.cli.plan import PlanOptions
from hft_megatron.config.loading import load_options
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.hft.plan import make_plan
from tests.support.models import make_llama

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = torch.arange(24).reshape(2, 12)


def make_model(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> set[str]:
    """One step; the names of the parameters that changed."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_drawing_the_plan_of_a_70b_model_loads_neither_torch_nor_megatron() -> None:
    program = """
import sys
from hft_megatron import Plan, draw_plan
plan = draw_plan({"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
                  "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}, seed=1)
assert isinstance(plan, Plan)
assert plan.trainable_parameters + plan.frozen_parameters == 70_553_706_496
assert not {"torch", "megatron", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_plan_is_applied_without_megatron() -> None:
    program = """
import sys, torch
from hft_megatron import draw_plan
from hft_megatron.hft import on_modules
assert "megatron" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, []),
        ({"ratio": 0.3, "level": "layer", "seed": 5}, ["--hft-ratio", "0.3", "--hft-level", "layer", "--seed", "5"]),
        ({"pairing": "complementary", "rotation": "complementary", "round": 1},
         ["--hft-pairing", "complementary", "--hft-rotation", "complementary", "--hft-first-round", "1"]),
        ({"selection": "hift", "ratio": 0.25}, ["--hft-selection", "hift", "--hft-ratio", "0.25"]),
        ({"train": ["*.q_proj", "model.layers.0.*"], "freeze": "lm_head", "freeze_embedding": True},
         ["--hft-train", "*.q_proj,model.layers.0.*", "--hft-freeze", "lm_head", "--hft-freeze-embedding"]),
    ],
)  # fmt: skip
def test_the_same_values_draw_the_plan_of_the_command_line(
    arguments: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    folder = make_llama(tmp_path, "gqa")
    options = load_options(PlanOptions, ["--load-hf", str(folder), *words])
    config = LlamaConfig.from_pretrained(folder)
    shape = ModelShape.from_hf_config(config.to_dict(), "config")
    first = options.hft.hft_first_round or 0
    expected = make_plan(shape, options.hft, default_seed=options.training.seed, round=first)
    for model in (config, config.to_dict(), folder, folder / "config.json", str(folder), shape):
        assert draw_plan(model, **arguments).digest == expected.digest


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ratio": 2}, "ratio=2 must be a number between 0 and 1."),
        ({"ratio": "half"}, "ratio='half' must be"),
        ({"level": "layers"}, "level='layers' must be one of category, layer, model."),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0."),
        ({"round": 1.5}, "round=1.5 must be a whole number"),
        ({"pairing": "complementary", "ratio": 0.3}, "pairing complementary needs ratio 0.5, but it is 0.3;"),
        ({"selection": "lisa", "level": "model"}, "level model has no effect with selection lisa"),
        ({"train": ["*.z_proj"]}, "train *.z_proj matches no unit of the model;"),
        ({"selection": "spectrum"}, "give them as scores"),
        ({"freeze": "*.q_proj,"}, "freeze '*.q_proj,' has an empty pattern"),
    ],
)
def test_a_mistake_is_told_in_terms_of_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        draw_plan(LlamaConfig(**SIZES), **arguments)
    assert sentence in str(error.value)
    assert "--" not in str(error.value)


def test_what_is_no_llama_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM is not a config; give model.config"):
        draw_plan(make_model())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='model_type is "gpt2"'):
        draw_plan({"model_type": "gpt2"})


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights(plan: Plan) -> set[str]:
    return {f"{name}.weight" for name in plan.training}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["whole", "checkpointed", "reentrant"])
@pytest.mark.parametrize("frozen_ends", [False, True])
def test_exactly_what_the_plan_trains_changes(tied: bool, checkpointing: bool | None, frozen_ends: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    plan = draw_plan(model.config, freeze_embedding=frozen_ends, freeze_head=frozen_ends)
    plan.apply(model)
    verify = plan.audit(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model.eval()
    model.train()
    assert step(model) == weights(plan) == trainable(model)
    assert {name for name, one in model.named_parameters() if one.grad is not None} == weights(plan)
    verify()


def test_the_next_round_trains_its_own_half_and_drops_old_gradients() -> None:
    model = make_model()
    for round in range(3):
        plan = draw_plan(model.config, rotation="complementary", round=round)
        plan.apply(model)
        assert step(model) == weights(plan)
        assert {name for name, one in model.named_parameters() if one.grad is not None} == weights(plan)


@pytest.mark.parametrize("whole_modules", [None, ["lm_head", "embed_tokens"]])
def test_adapters_of_peft_follow_their_unit_and_its_weights_stay_frozen(whole_modules: list[str] | None) -> None:
    model = make_model()
    plan = draw_plan(model.config, freeze_embedding=True)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=whole_modules))
    plan.apply(adapted)
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    expected = {
        f"base_model.model.{unit}.lora_{side}.default.weight"
        for unit in plan.training
        if unit.startswith("model.layers.") and unit.endswith("_proj")
        for side in "AB"
    }
    if whole_modules:
        expected.add("base_model.model.lm_head.modules_to_save.default.weight")
    assert trainable(adapted) == expected
    step(adapted)  # B is zero, so that A has no gradient in the first step
    assert step(adapted) == expected


def test_adapters_that_peft_adds_afterwards_are_not_trained_in_silence() -> None:
    model = make_model()
    plan = draw_plan(model.config)
    plan.apply(model)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(RuntimeError, match=r"but something changed its requires_grad after plan.apply; .* after PEFT"):
        step(adapted)
    plan.apply(adapted)
    step(adapted)


def test_adapters_that_are_not_active_are_left_as_they_are() -> None:
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]), adapter_name="policy")
    adapted.add_adapter("reference", LoraConfig(target_modules=["q_proj"]))
    adapted.set_adapter("policy")
    plan = draw_plan(adapted.config)
    plan.apply(adapted)
    assert trainable(adapted)
    assert all(".policy." in name for name in trainable(adapted))
    with pytest.raises(ValueError, match="no unit that the plan trains has an adapter"):
        draw_plan(adapted.config, freeze=["*.q_proj"]).apply(adapted)


@pytest.mark.parametrize("foreign", ["bias", "parametrization", "scale"])
def test_what_is_no_weight_of_a_llama_is_refused_and_freezes_nothing_in_silence(foreign: str) -> None:
    model = make_model()
    matrix = model.model.layers[1].self_attn.q_proj
    if foreign == "bias":
        matrix.bias = nn.Parameter(torch.zeros(32))
    elif foreign == "scale":
        matrix.weight_scale = nn.Parameter(torch.ones(1))
    else:
        nn.utils.parametrizations.weight_norm(matrix)
    with pytest.raises(ValueError, match=r"the parameter model.layers.1.self_attn.q_proj.* belongs to no unit"):
        draw_plan(model.config).apply(model)


def test_embeddings_that_are_given_or_saved_by_peft_are_guarded_too() -> None:
    model = make_model()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=["embed_tokens"]))
    draw_plan(model.config).apply(adapted)
    step(adapted)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(TOKENS)
    next(one for name, one in adapted.named_parameters() if "lora_A" in name and one.requires_grad).requires_grad_(
        False
    )
    with pytest.raises(RuntimeError, match="trainable, but something changed its requires_grad"):
        step(adapted)
    with pytest.raises(RuntimeError, match="trainable, but something changed its requires_grad"):
        adapted(inputs_embeds=embeddings)


def run_under_fsdp(folder: str) -> list[str]:
    """On a rank: what is said to a plan before and after FSDP 1 and 2 and DistributedDataParallel, and what trains."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    said = []
    plan = draw_plan(folder)
    model = LlamaForCausalLM.from_pretrained(folder).train()
    plan.apply(model)
    replicated = DistributedDataParallel(model)
    try:
        plan.apply(replicated)
    except ValueError as error:
        said.append(str(error))
    sharded = LlamaForCausalLM.from_pretrained(folder).train()
    plan.apply(sharded)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    verify = plan.audit(sharded)
    optimizer = torch.optim.SGD([one for one in sharded.parameters() if one.requires_grad], lr=0.1)
    sharded(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    verify()
    said.append(",".join(sorted(name for name, one in sharded.named_parameters() if one.grad is not None)))
    next(one for one in sharded.parameters() if not one.requires_grad).requires_grad_(True)
    try:
        sharded(input_ids=TOKENS)
    except RuntimeError as error:
        said.append(str(error))
    return said


def test_a_plan_holds_under_fsdp_2_and_is_refused_on_a_model_that_ddp_has(ranks: Any, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    wanted = ",".join(sorted(weights(draw_plan(tmp_path))))
    for refused, trained, guarded in ranks(2).run(run_under_fsdp, folder=str(tmp_path)):
        assert refused.startswith("the model is already wrapped in DistributedDataParallel")
        assert trained == wanted
        assert "frozen, but something changed its requires_grad" in guarded


def test_what_something_else_makes_trainable_is_told_at_the_next_forward_pass_in_training() -> None:
    model = make_model()
    plan = draw_plan(model.config)
    plan.apply(model)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"^plan .* made .* frozen, but something changed its requires_grad"):
        step(model)
    model.eval()(input_ids=TOKENS)
    other = draw_plan(model.config, seed=2)
    other.apply(model.train())
    assert step(model) == weights(other)


def test_an_optimizer_that_holds_frozen_weights_is_refused() -> None:
    model = make_model()
    plan = draw_plan(model.config)
    early = torch.optim.AdamW(model.parameters())
    frozen = len(list(model.parameters())) - len(plan.training)
    with pytest.raises(
        ValueError, match=rf"the optimizer holds {frozen} parameters that the plan freezes, first model"
    ):
        plan.apply(model, early)
    late = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    plan.apply(model, late)
    step(model, late)
    following = draw_plan(model.config, train=["*.q_proj"])
    with pytest.raises(ValueError, match=r"the optimizer lacks \d+ parameters that the plan trains, first model"):
        following.apply(model, torch.optim.AdamW([model.lm_head.weight]))
    plan.apply(model, late)
    assert len(late.state) == len(plan.training)


def test_a_model_that_is_not_the_plans_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"unit model.layers.4.self_attn.q_proj"):
        draw_plan({**model.config.to_dict(), "num_hidden_layers": 5}).apply(model)
    with pytest.raises(ValueError, match=r"the parameter model.layers.3.* belongs to no unit"):
        draw_plan({**model.config.to_dict(), "num_hidden_layers": 3}).apply(model)
    with pytest.raises(ValueError, match=r"gate_proj.weight has 1,536 parameters, but 3,072 in the plan"):
        draw_plan({**model.config.to_dict(), "intermediate_size": 96}).apply(model)
    with pytest.raises(ValueError, match=r"unit lm_head; .* with its head"):
        draw_plan(model.config).apply(make_model(tie_word_embeddings=True))


def test_wrappers_around_the_model_change_nothing() -> None:
    model = make_model()
    plan = draw_plan(model.config)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    plan.apply(Wrapped())
    assert trainable(model) == weights(plan)
    compiled = torch.compile(model, backend="eager")
    draw_plan(model.config, seed=3).apply(compiled)
    assert trainable(model) == weights(draw_plan(model.config, seed=3))


def test_a_copy_of_the_model_is_nobodys_plan_and_a_changed_frozen_weight_is_named() -> None:
    model = make_model()
    plan = draw_plan(model.config)
    plan.apply(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.requires_grad_(True)
        assert len(step(other)) == len(list(other.parameters()))
    verify = plan.audit(model)
    verify()
    frozen = next(name for name, one in model.named_parameters() if not one.requires_grad)
    with torch.no_grad():
        model.get_parameter(frozen).view(-1)[3] += 1e-3
    with pytest.raises(RuntimeError, match=rf"1 of \d+ frozen weights have changed, first {frozen}"):
        verify()
