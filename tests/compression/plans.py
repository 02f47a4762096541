"""Plans for tiny models of twelve experts, and what they are tried on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.module import CompressionModule
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.record import BlockRecord, record
from lightning_smoe.compression.refit import RefitOutcome
from lightning_smoe.data.packing import TokenWindows
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.calibration.batches import WindowData, predict, random_windows

Groups = Sequence[Sequence[int]]
NAME = "model.layers.0.mlp"
MANY = ["qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral", "ernie4_5_moe"]
# Every block of six keeps four slots.
KEPT = [[0], [1], [2], [5], [6], [7], [8], [11]]
MERGED = [[0, 3], [1], [2, 4], [5], [6, 7], [8], [9, 10], [11]]
# Experts 1 and 4 share a slot; every block of six keeps five slots.
PAIRED = [[0], [1, 4], [2], [3], [5], [6], [7, 9], [8], [10], [11]]


def layer_plan(groups: Groups, dropped: Sequence[int] = (), name: str = NAME) -> LayerPlan:
    """A plan with equal shares for one layer."""
    return LayerPlan(name, 12, tuple(map(tuple, groups)), tuple(dropped))


def pairs(first: int = 0, last: int = 11) -> list[list[int]]:
    """Groups of two neighbours each."""
    return [[e, e + 1] for e in range(first, last, 2)]


def whole_plan() -> CompressionPlan:
    """A plan with shares for both layers of mixtral."""
    shares = torch.arange(12, dtype=torch.float64)
    plans = (layer_plan(pairs(), name=f"model.layers.{i}.mlp") for i in range(2))
    return CompressionPlan(tuple(replace(p, weights=shares + i) for i, p in enumerate(plans)))


def plan_for(
    layers: Sequence[MoELayer],
    groups: Groups = KEPT,
    weights: Tensor | None = None,
    **settings: Any,
) -> CompressionPlan:
    """The same groups for every layer; settings are those of the whole plan."""
    placed = {expert for group in groups for expert in group}
    dropped = [expert for expert in range(12) if expert not in placed]
    plans = (replace(layer_plan(groups, dropped, x.name), weights=weights) for x in layers)
    return CompressionPlan(tuple(plans), **settings)


def compressed(
    model: PreTrainedModel,
    plan: CompressionPlan,
    windows: TokenWindows | None = None,
    samples: Mapping[str, TokenSample] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model, compressed in place."""
    windows = random_windows() if windows is None else windows
    predict(CompressionModule(model, plan, samples), WindowData(windows), **options)
    return model


def trainer() -> Trainer:
    """A Trainer on the CPU that shows and keeps nothing."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def refitted(
    model: PreTrainedModel, plan: CompressionPlan, windows: TokenWindows
) -> tuple[PreTrainedModel, dict[str, RefitOutcome]]:
    """The model, compressed in place, and what its refit did."""
    module = CompressionModule(model, plan)
    predict(module, WindowData(windows, batch_size=32))
    return model, module.refits


@torch.no_grad()
def blocks_of(
    model: PreTrainedModel, index: int, windows: TokenWindows | None = None
) -> tuple[MoELayer, BlockRecord]:
    """What one block of a whole model reads and writes on the calibration text."""
    layer = find_moe_layers(model)[index]
    windows = random_windows() if windows is None else windows
    mask = windows.attention_mask
    block, _ = record(
        layer,
        mask.bool(),
        lambda: model.base_model(windows.input_ids, attention_mask=mask, use_cache=False),
    )
    return layer, block


def copy_expert(layer: MoELayer, source: int, target: int, order: Tensor | None = None) -> None:
    """Makes one expert equal to another, its neurons in another order if one is given."""
    width = layer.intermediate_size
    order = torch.arange(width) if order is None else order
    weights = layer.weights().map(torch.clone)
    for name, tensor in vars(weights).items():
        if tensor is None:
            continue
        copied = tensor[source].clone()
        if name == "down_proj":
            copied = copied[:, order]
        elif name != "down_bias":
            copied = copied[order]
        tensor[target] = copied
    index = torch.arange(layer.num_experts)
    index[target] = source
    layer.replace(weights, lambda tensor: tensor.rows[index])
