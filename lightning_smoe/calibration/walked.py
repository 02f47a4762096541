"""Calibration decoder layer by decoder layer, for models that do not fit in memory."""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from lightning.pytorch import LightningModule
from torch import Tensor, nn

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
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.progress import WalkProgress
from lightning_smoe.models.residence import Residence
from lightning_smoe.models.walk import WaitingBatch, embed, run_layer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Text:
    """One batch of calibration text, and which of its tokens are kept whole."""

    waiting: WaitingBatch
    batch: Batch
    sampled: Bool[Tensor, " tokens"]


class WalkedCalibration(LightningModule):
    """Gathers the same statistics, bit for bit, with one decoder layer in memory.

    The predict loop takes every batch up to the first decoder layer; then each layer runs on all
    batches. What each layer did is written down before the next, so a killed run goes on there.

    Args:
        residence: The model.
        domains: Names of the domains, by number.
        manifest: What the statistics are made from.
        stride: Keeps one token of so many whole, to compare experts on; at least 1.
        progress: Where layers that are done are noted.
    """

    _residence: Residence

    def __init__(
        self,
        residence: Residence,
        domains: tuple[str, ...],
        manifest: Manifest,
        *,
        progress: WalkProgress,
        stride: int = 1,
    ) -> None:
        super().__init__()
        # Not a sub-module: Lightning would move weights that are not there.
        object.__setattr__(self, "_residence", residence)
        self._domains, self._manifest, self._stride = domains, manifest, stride
        self._progress = progress
        self._outside = ExitStack()
        self._texts: list[_Text] = []

    def on_predict_start(self) -> None:
        """Brings what comes before the first decoder layer."""
        self._outside.enter_context(self._residence.outside(self.device, "inputs"))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Embeds one batch and lets it wait."""
        is_token = batch["attention_mask"].bool() & batch["valid"][:, None]
        domain = domain_of_positions(batch["domain"], is_token.shape[1])
        sampled = is_sampled(batch["document"], self._stride)[is_token]
        waiting = embed(self._residence.model, batch, is_token)
        self._texts.append(_Text(waiting, Batch(is_token.reshape(-1), domain), sampled))
        return {}

    def on_predict_epoch_end(self) -> None:
        """Runs one decoder layer after the other on all batches."""
        self._outside.close()
        layers = {layer.index: layer for layer in find_moe_layers(self._residence.model)}
        states = [text.waiting.states for text in self._texts]
        begun = self._progress.open()
        if begun:
            noted = self._progress.states(begun)
            states = [noted[str(i)].to(self.device) for i in range(len(states))]
            logger.info("calibrate: goes on behind %d decoder layers that are done", begun)
        start, last = time.monotonic(), max(layers)
        for index in range(begun, last + 1):
            with self._residence.layer(index, self.device) as decoder, self._numbers():
                states = self._through(decoder, layers.get(index), states, index)
            self._progress.note(index + 1, {str(i): s for i, s in enumerate(states)})
            self._log(index - begun + 1, last + 1 - begun, index, start)
        self._texts = []
        self.statistics = self._joined(layers)

    def _numbers(self) -> AbstractContextManager[Any]:
        """The precision that Lightning runs a step in."""
        return self.trainer.strategy.precision_plugin.forward_context()

    def _through(
        self, decoder: nn.Module, layer: MoELayer | None, states: Sequence[Tensor], index: int
    ) -> list[Float[Tensor, "..."]]:
        """Takes all batches through a decoder layer, and writes down what its experts did."""
        sums = None if layer is None else empty_sums(layer, len(self._domains), self.device)
        parts: list[TokenSample] = []
        now: _Text
        after = []

        def add(_: MoELayer, tokens: RoutedTokens) -> None:
            if sums is not None:
                add_routed(sums, tokens)
                parts.append(take(tokens, now.sampled))

        watched = [] if layer is None else [layer]
        with observing(watched, lambda: now.batch, add, with_outputs=True):
            for text, state in zip(self._texts, states, strict=True):
                now = text
                after.append(run_layer(decoder, text.waiting.moved(state), index))
        if layer is not None and sums is not None:
            found = Statistics(
                {layer.name: sums}, {layer.name: joined(parts)}, self._domains, self._manifest
            ).reduced(self.global_rank, over_processes(self.trainer.strategy))
            if self.global_rank == 0:
                found.save(self._progress.path(f"layer-{index:05d}.safetensors"))
        return after

    def _joined(self, layers: dict[int, MoELayer]) -> Statistics | None:
        """All that was written down; only on the first process, which wrote it."""
        if self.global_rank > 0:
            return None
        paths = [self._progress.path(f"layer-{index:05d}.safetensors") for index in layers]
        parts = [Statistics.load(path) for path in paths]
        return Statistics(
            {name: sums for part in parts for name, sums in part.layers.items()},
            {name: sample for part in parts for name, sample in part.samples.items()},
            self._domains,
            self._manifest,
        )

    def _log(self, done: int, total: int, index: int, start: float) -> None:
        left = (time.monotonic() - start) / done * (total - done)
        if self.global_rank == 0:
            logger.info(
                "calibrate: decoder layer %d; %d of %d, %.0f s left", index, done, total, left
            )
