"""Plans that read no tokens, carried out on every family."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.calibration.observer import Batch, RoutedTokens, observing
from lightning_smoe.compression.apply import apply_layer, apply_plan, router_rows
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, MeanRows
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.compression.plans import PAIRED, plan_for
from tests.families import build
from tests.weights import parts

# In another order than the original's, within each block of six.
KEPT = [[5], [1], [2], [0], [7], [11], [6], [8]]


@torch.no_grad()
def test_kept_experts_and_their_rows_are_those_of_the_original(tiny_moe: PreTrainedModel) -> None:
    before = [layer.weights().map(torch.clone) for layer in find_moe_layers(tiny_moe)]
    rows = [
        [tensor.rows.clone() for tensor in layer.router_tensors]
        for layer in find_moe_layers(tiny_moe)
    ]
    apply_plan(tiny_moe, plan_for(find_moe_layers(tiny_moe), KEPT))
    kept = torch.tensor([group[0] for group in KEPT])
    for number, layer in enumerate(find_moe_layers(tiny_moe)):
        assert layer.num_experts == 8
        for after, original in zip(parts(layer.weights()), parts(before[number]), strict=True):
            assert torch.equal(after, original[kept])
        for tensor, original in zip(layer.router_tensors, rows[number], strict=True):
            assert torch.equal(tensor.rows, original[kept])


@torch.no_grad()
def test_the_pruned_model_runs_and_says_how_many_experts_it_has(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    apply_plan(tiny_moe, plan_for(find_moe_layers(tiny_moe), KEPT))
    assert tiny_moe(tokens).logits.isfinite().all()
    config = tiny_moe.config.to_dict()
    named = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    assert {config[name] for name in named if name in config} == {8}


@torch.no_grad()
def test_permuting_experts_changes_no_logit(tiny_moe: PreTrainedModel, tokens: Tensor) -> None:
    before = tiny_moe(tokens).logits
    order = [3, 5, 1, 0, 2, 4, 11, 9, 10, 6, 8, 7]
    apply_plan(tiny_moe, plan_for(find_moe_layers(tiny_moe), [[expert] for expert in order]))
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "glm4_moe", "minimax_m2"]
)
def test_dropping_experts_that_no_token_visits_changes_no_logit(
    family: str, tokens: Tensor
) -> None:
    # Where the weights of the selected experts are normalised among themselves.
    model, few = build(family), tokens[:1, :3]
    before = model(few).logits
    layers = find_moe_layers(model)
    visited: dict[str, list[int]] = {}

    def note(layer: MoELayer, routed: RoutedTokens) -> None:
        visited[layer.name] = routed.expert_indices.unique().tolist()

    batch = Batch(torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))
    with observing(layers, lambda: batch, note):
        model(few)
    for layer in layers:
        assert len(visited[layer.name]) < 12
        apply_plan(model, plan_for([layer], [[expert] for expert in visited[layer.name]]))
    torch.testing.assert_close(model(few).logits, before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_that_are_not_in_the_plan_keep_every_bit(tiny_moe: PreTrainedModel) -> None:
    layers = find_moe_layers(tiny_moe)
    before = {name: tensor.clone() for name, tensor in tiny_moe.state_dict().items()}
    apply_plan(tiny_moe, plan_for(layers[1:], PAIRED, router=MeanRows()))
    for name, tensor in tiny_moe.state_dict().items():
        if not name.startswith(layers[1].name):
            assert torch.equal(tensor, before[name]), name
    assert [layer.num_experts for layer in find_moe_layers(tiny_moe)] == [12, 10]


@torch.no_grad()
def test_a_plan_that_is_fitted_on_tokens_is_refused_here() -> None:
    model = build("mixtral")
    layers = find_moe_layers(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plans = (
        plan_for(layers, PAIRED, router=LogSumExp()),
        plan_for(layers, PAIRED, refit=Refit()),
    )
    for plan in plans:
        with pytest.raises(ValueError, match="fitted on calibration tokens; run it with Compr"):
            apply_plan(model, plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_new_tensors_hold_no_memory_of_the_old_and_can_be_trained(tokens: Tensor) -> None:
    model = build("mixtral")
    layers = find_moe_layers(model)
    apply_plan(model, plan_for(layers, KEPT))
    for layer in find_moe_layers(model):
        down = layer.experts.down_proj
        assert isinstance(down, nn.Parameter)
        assert down.requires_grad
        assert down.untyped_storage().nbytes() == 8 * 32 * 24 * 4
    model(tokens, labels=tokens).loss.backward()
    assert find_moe_layers(model)[0].experts.down_proj.grad is not None


def test_a_layer_alone_can_be_compressed() -> None:
    model = build("gpt_oss")
    layer = find_moe_layers(model)[1]
    plan = plan_for([layer], PAIRED, router=MeanRows())
    apply_layer(layer, plan.layers[0], plan)
    rows = router_rows(layer)
    assert layer.num_experts == 10
    assert rows.weight.shape == (10, 32)
    assert rows.bias is not None
    assert rows.bias.shape == (10,)
