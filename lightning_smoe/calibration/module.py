"""Calibration as a LightningModule under the predict loop, watched by a callback."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from lightning_smoe.calibration.observer import Batch, RoutedTokens, observing
from lightning_smoe.calibration.processes import over_processes
from lightning_smoe.calibration.sample import is_sampled, joined, take
from lightning_smoe.calibration.statistics import (
    Statistics,
    add_routed,
    domain_of_positions,
    empty_sums,
)
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.head import model_inputs
from lightning_smoe.models.layer import MoELayer, find_moe_layers


class CalibrationModule(LightningModule):
    """Runs calibration text through a model; an `ExpertStatistics` callback watches.

    Args:
        model: The model; only its decoder runs, not the output layer over the vocabulary.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, Any]:
        """Runs one batch; what it is for happens in the hooks."""
        self.model.base_model(**model_inputs(batch), use_cache=False)
        return {}


class ExpertStatistics(Callback):
    """Gathers the statistics of every expert while a `CalibrationModule` predicts.

    Args:
        domains: Names of the domains, by number.
        manifest: What the statistics are made from.
        stride: Keeps one token of so many whole, to compare experts on; at least 1.
    """

    def __init__(self, domains: tuple[str, ...], manifest: Manifest, stride: int = 1) -> None:
        self._domains, self._manifest, self._stride = domains, manifest, stride
        self._hooks = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes empty sums in this process, and sets the hooks."""
        layers = find_moe_layers(pl_module)
        device, number = pl_module.device, len(self._domains)
        self._names = {layer.name: layer.name.removeprefix("model.") for layer in layers}
        self._sums = {layer.name: empty_sums(layer, number, device) for layer in layers}
        self._parts: dict[str, list[TokenSample]] = {layer.name: [] for layer in layers}
        self._hooks.enter_context(observing(layers, lambda: self._batch, self._add, True))

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any
    ) -> None:
        """Notes which positions of the batch count."""
        is_token = batch["attention_mask"].bool() & batch["valid"][:, None]
        domain = domain_of_positions(batch["domain"], is_token.shape[1])
        self._batch = Batch(is_token.reshape(-1), domain)
        self._sampled = is_sampled(batch["document"], self._stride)[is_token]

    def _add(self, layer: MoELayer, tokens: RoutedTokens) -> None:
        add_routed(self._sums[layer.name], tokens)
        self._parts[layer.name].append(take(tokens, self._sampled))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up the sums, and joins the samples, of all processes."""
        self._hooks.close()
        sums = {self._names[name]: sums for name, sums in self._sums.items()}
        samples = {self._names[name]: joined(parts) for name, parts in self._parts.items()}
        found = Statistics(sums, samples, self._domains, self._manifest)

        reduce = over_processes(trainer.strategy)
        self.statistics = found.reduced(trainer.global_rank, reduce)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Takes the hooks away."""
        self._hooks.close()
