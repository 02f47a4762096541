"""What the routers do while a model is trained, as pictures and numbers in TensorBoard."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_smoe.calibration.observer import Batch, RoutedTokens, observing
from lightning_smoe.models.layer import MoELayer


class RouterMonitor(Callback):
    """Logs what the routers do with the validation text, at each validation.

    `router/load` is a picture of layers by experts: the fraction of a layer's routed tokens that
    each expert gets, times the number of experts (1 = balanced). `router/entropy` is the entropy of
    the loads in nats, `router/unused_experts` how many experts no token visited, `router/drift` the
    length of the rows' change since training began, relative to the length that they had.

    Args:
        layers: Layers of the model that is trained, as they are before it.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._hooks = ExitStack()
        self._layers = layers
        self._num_experts = [layer.num_experts for layer in layers]
        self._start = [_rows(layer).clone() for layer in layers]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting."""
        self._counts = {
            layer.name: torch.zeros(count, dtype=torch.int64, device=pl_module.device)
            for layer, count in zip(self._layers, self._num_experts, strict=True)
        }
        self._hooks.enter_context(observing(self._layers, lambda: self._batch, self._count))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any
    ) -> None:
        """Notes which positions count."""
        is_token = batch["attention_mask"].bool() & batch["valid"][:, None]
        self._batch = Batch(is_token.reshape(-1), torch.zeros_like(is_token.reshape(-1)).long())

    def _count(self, layer: MoELayer, tokens: RoutedTokens) -> None:
        chosen = tokens.expert_indices.reshape(-1)
        counts = self._counts[layer.name]
        counts += torch.bincount(chosen, minlength=len(counts))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the loads of all processes together."""
        self._hooks.close()
        loads = []
        for name, count in self._counts.items():
            total = trainer.strategy.reduce(count, reduce_op="sum").double()
            load = total / total.sum()
            loads.append((name, (load * len(load)).cpu()))
            entropy = -torch.special.xlogy(load, load).sum()
            unused = (total == 0).sum().float()
            pl_module.log(f"router/entropy/{name}", entropy.float(), sync_dist=True)
            pl_module.log(f"router/unused_experts/{name}", unused, sync_dist=True)
        for layer, start in zip(self._layers, self._start, strict=True):
            drift = (_rows(layer) - start).norm() / start.norm()
            pl_module.log(f"router/drift/{layer.name}", drift.to(pl_module.device), sync_dist=True)
        if trainer.is_global_zero and not trainer.sanity_checking:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    figure = draw_loads(loads)
                    logger.experiment.add_figure("router/load", figure, trainer.global_step)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Takes the hooks away."""
        self._hooks.close()


@torch.no_grad()
def _rows(layer: MoELayer) -> Float[Tensor, "rows hidden"]:
    """The router's rows, whole also where processes share them out, in main memory."""
    weight = next(tensor.rows for tensor in layer.router_tensors if tensor.kind == "weight")
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return whole.detach().cpu().float()


def draw_loads(loads: list[tuple[str, Float[Tensor, " _"]]]) -> Figure:
    """Draws layers by experts; the darker, the more tokens an expert gets.

    Args:
        loads: Name of each layer, and the load of each of its experts relative to an even one;
            layers may have different numbers of experts.
    """
    widest = max(len(load) for _, load in loads)
    table = torch.full((len(loads), widest), torch.nan, dtype=torch.float64)
    for row, (_, load) in enumerate(loads):
        table[row, : len(load)] = load
    figure = Figure(figsize=(2 + widest * 0.12, 1 + len(loads) * 0.25), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table.numpy(), aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(loads)), [name for name, _ in loads])
    axes.set_xlabel("expert")
    figure.colorbar(image, label="load (1 = even)")
    return figure
