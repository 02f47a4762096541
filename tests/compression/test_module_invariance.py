"""What a compression keeps, and what its result may not depend on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_smoe.compression import module
from lightning_smoe.compression.module import CompressionModule
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp
from lightning_smoe.models.layer import find_moe_layers
from tests.calibration.batches import WindowData, padded_left, predict, random_windows
from tests.compression.plans import MANY, MERGED, compressed, plan_for
from tests.families import build


@pytest.mark.parametrize("family", MANY)
def test_a_refit_of_great_strength_changes_nothing(family: str) -> None:
    layers = find_moe_layers(build(family))
    plain = compressed(build(family), plan_for(layers)).state_dict()
    held = compressed(build(family), plan_for(layers, refit=Refit(1e12))).state_dict()
    for name, tensor in held.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", MANY)
def test_refitting_experts_that_were_only_permuted_changes_no_logit(
    family: str, tokens: Tensor
) -> None:
    model = build(family)
    with torch.no_grad():
        before = model(tokens).logits
    groups = [[expert] for expert in [3, 5, 1, 0, 2, 4, 11, 9, 10, 6, 8, 7]]
    compressed(model, plan_for(find_moe_layers(model), groups, refit=Refit()))
    with torch.no_grad():
        after = model(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_the_identity_plan_keeps_every_tensor_exactly_under_refit() -> None:
    model, original = build("qwen2_moe"), build("qwen2_moe").state_dict()
    plan = CompressionPlan.identity(find_moe_layers(model))
    compressed(model, replace(plan, router=LogSumExp(), refit=Refit()))
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", MANY)
@pytest.mark.parametrize("index", [0, 1])
def test_layers_that_are_not_in_the_plan_keep_every_bit(family: str, index: int) -> None:
    model, original = build(family), build(family).state_dict()
    chosen = find_moe_layers(model)[index]
    compressed(model, plan_for([chosen], MERGED, refit=Refit(), router=LogSumExp()))
    for name, tensor in model.state_dict().items():
        if not name.startswith(chosen.name):
            assert torch.equal(tensor, original[name]), name
    counts = [layer.num_experts for layer in find_moe_layers(model)]
    assert counts == [8 if i == index else 12 for i in range(2)]


@pytest.mark.parametrize("family", MANY)
def test_in_a_compressed_layer_only_experts_router_and_output_matrices_change(family: str) -> None:
    model, original = build(family), build(family).state_dict()
    compressed(model, plan_for(find_moe_layers(model), refit=Refit()))
    for name, tensor in model.state_dict().items():
        may_change = "down_proj.weight" in name or "experts." in name.replace("shared_experts", "")
        if tensor.shape == original[name].shape and not may_change:
            assert torch.equal(tensor, original[name]), name


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_padding_and_batching_do_not_change_the_result(family: str) -> None:
    layers = find_moe_layers(build(family))
    plan = plan_for(layers, MERGED, refit=Refit(), router=LogSumExp())
    wanted = compressed(build(family), plan).state_dict()
    windows = random_windows()
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    for other in (windows.select(order), padded_left(windows)):
        found = build(family)
        predict(CompressionModule(found, plan), WindowData(other, batch_size=3))
        for name, tensor in found.state_dict().items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-4)


def test_the_same_text_gives_the_same_bytes() -> None:
    found = []
    for _ in range(2):
        model = build("ernie4_5_moe")
        plan = plan_for(find_moe_layers(model), MERGED, refit=Refit(), router=LogSumExp())
        found.append(compressed(model, plan).state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


class SaveWeights(Callback):
    """Writes the weights that every process ended with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        save_file(tensors, self._folder / f"{trainer.global_rank}.safetensors")


@pytest.mark.parametrize("num_sequences", [13, 1])
@pytest.mark.parametrize(
    ("family", "most_features"),
    [
        ("mixtral", 1000),
        ("deepseek_v3", 1000),
        ("gpt_oss", 1000),
        pytest.param("qwen2_moe", 0, marks=pytest.mark.slow),
    ],
    ids=["mixtral", "deepseek_v3", "gpt_oss", "expert by expert"],
)
def test_two_processes_give_the_weights_of_one(
    family: str,
    most_features: int,
    num_sequences: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MOST_FEATURES", most_features)
    # Two processes on one core wait for each other at every expert.
    monkeypatch.setattr("lightning_smoe.compression.sweeps._MOST_SWEEPS", 2)
    windows = random_windows(num_sequences)
    model = build(family)
    plan = plan_for(find_moe_layers(model), MERGED, refit=Refit(3.0), router=LogSumExp())
    data = WindowData(windows)
    predict(
        CompressionModule(model, plan), data, SaveWeights(tmp_path), devices=2, strategy="ddp_fork"
    )
    alone = compressed(build(family), plan, windows).state_dict()
    both = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name, tensor in alone.items():
        ours, theirs = (weights[f"model.{name}"] for weights in both)
        assert torch.equal(ours, theirs), name
        torch.testing.assert_close(ours, tensor, rtol=1e-5, atol=1e-5)
