"""Compression as a LightningModule: batches wait while the model is rebuilt layer by layer."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import apply_layer, router_rows, tell_count
from lightning_smoe.compression.plan import CompressionPlan, LayerPlan
from lightning_smoe.compression.record import (
    bias_output,
    check_understood,
    output_features,
    output_weights,
    record,
    set_output_weights,
)
from lightning_smoe.compression.refit import refit_by_sweeps, refit_jointly
from lightning_smoe.functional.moments import Moments
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import router_features, router_targets
from lightning_smoe.models.layer import MoELayer, decoder_layer_of
from lightning_smoe.models.walk import WaitingBatch, decoder_layers, embed, run_layer

logger = logging.getLogger(__name__)

# Features of one system of equations: the products of 8,192 features take 0.5 GB.
_MOST_FEATURES = 8192


class CompressionModule(LightningModule):
    """Carries out a plan under the predict loop, on calibration text where the plan is fitted.

    The loop takes every batch up to the first decoder layer. Then each layer runs on all batches
    twice over: once as it was, which gives the targets, and once compressed, which gives the next
    layer the inputs it will really have. The layer is rebuilt in place: it is not
    needed as it was once all batches went through.

    Args:
        model: The original; it is the compressed model afterwards.
        plan: What becomes of its experts.
    """

    def __init__(self, model: PreTrainedModel, plan: CompressionPlan) -> None:
        super().__init__()
        self.model = model
        self._plan = plan
        self._batches: list[WaitingBatch] = []

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Embeds one batch and lets it wait."""
        is_token = batch["attention_mask"].bool() & batch["valid"][:, None]
        with torch.inference_mode(False):
            waiting = embed(self.model, batch["input_ids"], batch["attention_mask"], is_token)
        self._batches.append(waiting)
        return {}

    def on_predict_epoch_end(self) -> None:
        """Compresses one decoder layer after the other."""
        # Weights made in inference mode could never be rounded, trained or saved in place.
        with torch.inference_mode(False), torch.no_grad():
            self._walk()
        tell_count(self.model)
        self._batches = []

    def _walk(self) -> None:
        plans = {decoder_layer_of(name)[1]: plan for name, plan in self._plan.by_name().items()}
        layers = decoder_layers(self.model)
        compressed = original = self._batches
        start = time.monotonic()
        for index in range(max(plans, default=-1) + 1):
            if index not in plans:
                same = compressed is original
                original = _step(layers[index], original, index)
                compressed = original if same else _step(layers[index], compressed, index)
                continue
            targets, original = self._targets(layers[index], original, index, plans[index])
            error = self._compress(layers[index], compressed, targets, plans[index])
            compressed = _step(layers[index], compressed, index)
            self._log_layer(plans, index, error, time.monotonic() - start)

    def _log_layer(
        self, plans: dict[int, LayerPlan], index: int, error: str, seconds: float
    ) -> None:
        done = sum(i <= index for i in plans)
        left = seconds / done * (len(plans) - done)
        plan = plans[index]
        if self.global_rank == 0:
            logger.info(
                "compress: layer %d, %d -> %d experts%s; %d of %d layers, %.0f s left",
                index, plan.num_experts, len(plan.groups), error, done, len(plans), left,
            )  # fmt: skip

    def _targets(
        self, decoder: nn.Module, batches: Sequence[WaitingBatch], index: int, plan: LayerPlan
    ) -> tuple[list[Tensor], list[WaitingBatch]]:
        """The original layer's outputs, and its batches one layer on."""
        layer = _block(decoder, plan.name)
        targets, after = [], []
        for batch in batches:
            run = _runner(decoder, batch, index)
            block, states = record(layer, batch.is_token, run)
            targets.append(block.output)
            after.append(WaitingBatch(states, batch.calls, batch.is_token))
        return targets, after

    def _compress(
        self,
        decoder: nn.Module,
        batches: Sequence[WaitingBatch],
        targets: Sequence[Tensor],
        layer_plan: LayerPlan,
    ) -> str:
        layer = _block(decoder, layer_plan.name)
        moments = None
        if self._plan.router.needs_tokens:
            moments = self._router_moments(decoder, layer, batches, layer_plan)
        apply_layer(layer, layer_plan, self._plan, moments)
        if self._plan.refit is None:
            return ""
        pairs = list(zip(batches, targets, strict=True))
        return self._refit(decoder, layer, pairs, self._plan.refit)

    def _router_moments(
        self,
        decoder: nn.Module,
        layer: MoELayer,
        batches: Sequence[WaitingBatch],
        layer_plan: LayerPlan,
    ) -> Moments:
        """Products of router inputs and wanted logits, under the compressed model's own inputs."""
        grouping, rows = layer_plan.grouping, router_rows(layer)
        has_bias = rows.bias is not None
        width = rows.weight.shape[1] + has_bias
        moments = Moments.zeros(width, grouping.num_groups, self.device)
        for batch in batches:
            block, _ = record(layer, batch.is_token, _runner(decoder, batch, layer.index))
            inputs = router_features(block.tokens.states, has_bias)
            moments.add(inputs, router_targets(block.tokens.router_logits, grouping))
        return moments.reduced(self._sum_over_processes)

    def _refit(
        self,
        decoder: nn.Module,
        layer: MoELayer,
        pairs: Sequence[tuple[WaitingBatch, Tensor]],
        refit: Refit,
    ) -> str:
        before = output_weights(layer)
        records = []
        for number, (batch, target) in enumerate(pairs):
            block, _ = record(layer, batch.is_token, _runner(decoder, batch, layer.index))
            if number == 0:
                check_understood(layer, block, output_features(layer, block).values)
            records.append((block, target - bias_output(layer, block)))
        fit = refit_jointly if before.shape[1] <= _MOST_FEATURES else refit_by_sweeps
        after, errors = fit(layer, records, before, refit.strength, reduce=self._sum_over_processes)
        set_output_weights(layer, after)
        return f", layer error {errors[0]:.3f} -> {errors[1]:.3f} of the output's energy"

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        reduced: Tensor = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        return reduced


def _block(decoder: nn.Module, name: str) -> MoELayer:
    """The block of a decoder layer, by its path in the whole model."""
    path, index = decoder_layer_of(name)
    return MoELayer(name, decoder.get_submodule(name.removeprefix(f"{path}.{index}.")))


def _runner(decoder: nn.Module, batch: WaitingBatch, index: int) -> Callable[[], Tensor]:
    return lambda: run_layer(decoder, batch, index)


def _step(decoder: nn.Module, batches: Sequence[WaitingBatch], index: int) -> list[WaitingBatch]:
    """Takes every batch through one decoder layer."""
    states = [run_layer(decoder, batch, index) for batch in batches]
    return [WaitingBatch(s, b.calls, b.is_token) for s, b in zip(states, batches, strict=True)]
