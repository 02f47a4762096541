"""Adapters: what they change, and what merging them gives."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.mapped import become_mapped
from lightning_smoe.models.parts import parameters_of_parts
from lightning_smoe.training.adapters import merge_trained, prepare_training
from lightning_smoe.training.lora import Lora, Target
from lightning_smoe.training.trainable import TrainedGroup
from tests.families import FAMILIES, build
from tests.models.sharing import share

ROUNDING = 1e-5
RATE = 1e-3
# Two layouts in memory, shared experts, and a router that selects by a bias of its own.
SOME_FAMILIES = ["qwen2_moe", "gpt_oss", "deepseek_v3"]


def everything(model: PreTrainedModel) -> Lora:
    """Adapters of all that the model has."""
    targets: list[Target] = ["attention", "experts", "router"]
    return Lora(targets=targets + (["shared"] if parameters_of_parts(model)["shared"] else []))


def half(family: str) -> PreTrainedModel:
    """A model in bfloat16."""
    model = build(family)
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # declared wrongly in transformers 5.23
    return model


def adapt(model: PreTrainedModel, lora: Lora, trainable: Sequence[str] = ()) -> list[TrainedGroup]:
    return prepare_training(model, trainable, lora, learning_rate=RATE)


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """As if trained: what can change is changed, and returned."""
    generator = torch.Generator().manual_seed(3)
    state = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    for value in state.values():
        value.add_(torch.randn(value.shape, generator=generator), alpha=0.03)
    return state


@pytest.fixture(params=[*FAMILIES, *(f"mapped {family}" for family in SOME_FAMILIES)])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of every family, and some whose router rows share experts."""
    is_mapped, _, family = request.param.rpartition(" ")
    made = build(family)
    if is_mapped:
        become_mapped(share(made))
    return made


def test_adapters_change_nothing_at_first_and_merged_give_what_they_gave_attached(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    fresh = copy.deepcopy(model)
    before = model(tokens).logits
    lora = everything(model)
    adapt(model, lora)
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=0)
    state = trained(model)
    logits = model(tokens).logits
    assert (logits - before).abs().max() > 1000 * ROUNDING
    merge_trained(fresh, lora, state)
    torch.testing.assert_close(fresh(tokens).logits, logits, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_merged_model_is_a_plain_model_again(family: str) -> None:
    plain, merged = build(family), build(family)
    lora = everything(plain)
    adapt(plain, lora)
    merge_trained(merged, lora, trained(plain))
    plain = build(family)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert not hasattr(merged, "peft_config")
    assert [layer.name for layer in find_moe_layers(merged)]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_hooks_on_modules_that_were_found_before_still_fire(family: str, tokens: Tensor) -> None:
    model = build(family)
    layers = find_moe_layers(model)
    seen: list[Any] = []
    for layer in layers:
        layer.router.register_forward_hook(lambda *_: seen.append("router"))
        layer.experts.register_forward_pre_hook(lambda *_: seen.append("experts"))
    adapt(model, everything(model))
    model(tokens)
    assert seen == ["router", "experts"] * len(layers)
    # A mapped model and the planner read shapes from the same objects.
    assert all(layer.num_experts == 12 for layer in layers)


def test_only_adapters_are_trained_in_float32_and_counted_by_target() -> None:
    model = half("qwen2_moe")
    groups = adapt(model, Lora(rank=2, learning_rate=0.5))
    assert [group.name for group in groups] == ["lora attention", "lora shared", "lora experts"]
    named = {name: p for group in groups for name, p in group.parameters.items()}
    assert named == {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in named.values()} == {torch.float32}
    assert {group.learning_rate for group in groups} == {0.5}
    experts = groups[2]
    # Two layers of twelve experts: gate_up_proj is 48 x 32 and down_proj 32 x 24.
    assert experts.num_parameters == 2 * 12 * 2 * (48 + 32 + 32 + 24)


def test_the_same_seed_gives_the_same_adapters() -> None:
    states = []
    for seed in (0, 0, 1):
        model = build("mixtral")
        torch.rand(1)
        prepare_training(model, (), Lora(), learning_rate=RATE, seed=seed)
        states.append(dict(model.state_dict()))
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


# The name before transformers 5.23, which this project still allows.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_leaves_every_gradient_as_it_was(tokens: Tensor) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = build("qwen2_moe").train()
        lora = everything(model)
        adapt(model, lora)
        trained(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(value is not None and value.any() for value in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_parts_are_trained_in_full_beside_adapters_of_others(
    tokens: Tensor, tmp_path: Path
) -> None:
    model, fresh = build("qwen2_moe"), build("qwen2_moe")
    lora = Lora(targets=["experts"])
    groups = adapt(model, lora, ["router", "norm"])
    assert [group.name for group in groups] == ["router", "norm", "lora experts"]
    assert all(n in dict(model.named_parameters()) for group in groups for n in group.parameters)
    state = trained(model)
    reason = merge_trained(fresh, lora, state, adapter=tmp_path / "adapter", adapted="elsewhere")
    torch.testing.assert_close(fresh(tokens).logits, model(tokens).logits, rtol=0, atol=ROUNDING)
    assert reason is not None
    assert reason.startswith("no adapter is written: 8 tensors were trained in full beside it")
    assert not (tmp_path / "adapter").exists()


def test_merging_keeps_the_types_of_weights_but_adds_in_float32() -> None:
    model, fresh = half("mixtral"), half("mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    before = fresh.get_parameter(name).detach().clone()
    lora = Lora(targets=["experts"])
    adapt(model, lora)
    state = trained(model)
    merge_trained(fresh, lora, state)
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    first, second = (
        state[f"model.layers.0.mlp.experts.lora_{x}.default.weight"] for x in ("A", "B")
    )
    # peft names the inputs of expert e in rows e * rank and on, and its outputs in columns e and
    # every num_experts on.
    change = 2 * second.reshape(32, 8, 12)[:, :, 5] @ first.reshape(12, 8, 24)[5]
    expected = (before[5].float() + change).to(torch.bfloat16)
    found = fresh.get_parameter(name)[5]
    # Products of other shapes round otherwise in float32: rarely to the next bfloat16.
    assert (found == expected).float().mean() > 0.99


def test_tensors_of_another_adapter_are_refused() -> None:
    model = build("mixtral")
    adapt(model, Lora(targets=["experts"]))
    state = trained(model)
    with pytest.raises(InputError, match=r"adapted otherwise \(such as .*self_attn"):
        merge_trained(build("mixtral"), Lora(targets=["attention", "experts"]), state)


def _average_gradients(rank: int, meeting: Path, results: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=2
    )
    model = build("qwen2_moe")
    adapt(model, everything(model))
    trained(model)
    rows = torch.arange(2, 34).reshape(2, 16)
    # Without a name it would be gone, with its reducer, before the way back.
    parallel = DistributedDataParallel(model)
    parallel(rows[rank : rank + 1]).logits.square().mean().backward()
    if rank == 0:
        named = model.named_parameters()
        results.put({n: p.grad.numpy() for n, p in named if p.grad is not None})


def test_two_processes_average_the_gradients_of_every_adapter(tmp_path: Path) -> None:
    context = get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_average_gradients, args=(rank, tmp_path / "meeting", results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = results.get()
    for process in processes:
        process.join()
    model = build("qwen2_moe")
    adapt(model, everything(model))
    trained(model)
    model(torch.arange(2, 34).reshape(2, 16)).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(torch.from_numpy(found[name]), parameter.grad)
