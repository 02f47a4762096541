"""Compression as a LightningModule: batches wait while the model is rebuilt layer by layer."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import apply_layer, finish
from lightning_smoe.compression.dual_refit import refit_by_tokens
from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.record import (
    bias_output,
    check_understood,
    output_features,
    output_weights,
    record,
    set_output_weights,
    shared_output,
)
from lightning_smoe.compression.refit import (
    RefitOutcome,
    RefitRecord,
    refit_jointly,
)
from lightning_smoe.compression.residual import output_factor, output_wanted
from lightning_smoe.compression.streams import LayerSink, Streams
from lightning_smoe.compression.sweeps import refit_by_sweeps
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import RouterBatch, RouterTokens
from lightning_smoe.functional.scale import OutputProducts, ScaleRepair, scale_outputs
from lightning_smoe.models.layer import MoELayer, decoder_layer_of
from lightning_smoe.models.residence import InMemory, Residence
from lightning_smoe.models.walk import WaitingBatch, embed, run_layer

logger = logging.getLogger(__name__)

# Features, or tokens, of one system of equations: the products of 8,192 take 0.5 GB.
_MOST_FEATURES = 8192


@dataclass(frozen=True, eq=False)
class _Taught:
    """What the original's block and decoder layer gave for one batch."""

    output: Float[Tensor, "tokens hidden"]
    router_logits: Float[Tensor, "tokens experts"]
    states: Float[Tensor, "batch sequence hidden"]


class CompressionModule(LightningModule):
    """Carries out a plan under the predict loop, on calibration text where the plan is fitted.

    The loop takes every batch up to the first decoder layer. Then each layer runs on all batches
    twice over: once as it was, which gives the targets, and once compressed, which gives the next
    layer the inputs it will really have. The layer is rebuilt in place: it is not
    needed as it was once all batches went through.

    Args:
        model: The original, which is the compressed model afterwards; or where its weights are, if
            its layers come one at a time.
        plan: What becomes of its experts.
        samples: Samples of tokens by the layer's name, for mergers that look at them.
        sink: Takes each layer that is done, before it is let go; none keeps all in memory.

    Attributes:
        refits: What the refit of each layer did, by the layer's name.
    """

    _residence: Residence

    def __init__(
        self,
        model: PreTrainedModel | Residence,
        plan: CompressionPlan,
        samples: Mapping[str, TokenSample] | None = None,
        *,
        sink: LayerSink | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, Residence):
            # Not a sub-module: Lightning would move weights that are not there.
            object.__setattr__(self, "_residence", model)
        else:
            self.model = model
            object.__setattr__(self, "_residence", InMemory(model))
        self._plan = plan
        self._samples = samples or {}
        self._sink = sink
        self._outside = ExitStack()
        self._batches: list[WaitingBatch] = []
        self.refits: dict[str, RefitOutcome] = {}

    def on_predict_start(self) -> None:
        """Brings what comes before the first decoder layer."""
        self._outside.enter_context(self._residence.outside(self.device, "inputs"))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Embeds one batch and lets it wait."""
        is_token = batch["attention_mask"].bool() & batch["valid"][:, None]
        with torch.inference_mode(False):
            waiting = embed(self._residence.model, batch, is_token)
        self._batches.append(waiting)
        return {}

    def on_predict_epoch_end(self) -> None:
        """Compresses one decoder layer after the other."""
        self._outside.close()
        # Weights made in inference mode could never be rounded, trained or saved in place.
        with torch.inference_mode(False), torch.no_grad():
            self._walk()
        if self._sink is None:
            finish(self._residence.model)
        self._batches = []

    def _walk(self) -> None:
        plans = {decoder_layer_of(name)[1]: plan for name, plan in self._plan.by_name().items()}
        streams = Streams(self._batches, self._batches)
        begun, last = 0, max(plans, default=-1)
        if self._sink is not None:
            begun, states, self.refits = self._sink.resume()
            streams = streams if not begun else Streams.of(self._batches, states, self.device)
            last = self._residence.num_layers - 1
        start = time.monotonic()
        for index in range(begun, last + 1):
            done = ""
            with self._residence.layer(index, self.device) as decoder:
                if index <= max(plans, default=-1) and self._plan.reads_tokens:
                    streams, done = self._through(decoder, streams, index, plans.get(index))
                elif index in plans:
                    self._compress(decoder, [], [], plans[index])
                if self._sink is not None:
                    self._sink.put(index, decoder, streams.states(), self.refits)
            if index in plans:
                self._log_layer(plans, (begun, index), done, time.monotonic() - start)

    def _through(
        self, decoder: nn.Module, streams: Streams, index: int, plan: LayerPlan | None
    ) -> tuple[Streams, str]:
        """Takes both streams through a decoder layer, and compresses it in between."""
        if plan is None:
            original = _step(decoder, streams.original, index)
            if streams.are_one:
                return Streams(original, original), ""
            return Streams(original, _step(decoder, streams.compressed, index)), ""
        teacher, original = self._teach(decoder, streams.original, index, plan)
        done = self._compress(decoder, streams.compressed, teacher, plan)
        return Streams(original, _step(decoder, streams.compressed, index)), done

    def _log_layer(
        self, plans: dict[int, LayerPlan], place: tuple[int, int], error: str, seconds: float
    ) -> None:
        begun, index = place
        done, here = (sum(least <= i <= index for i in plans) for least in (0, begun))
        left = seconds / here * (len(plans) - done)
        plan = plans[index]
        if self.global_rank == 0:
            logger.info(
                "compress: layer %d, %d -> %d experts%s; %d of %d layers, %.0f s left",
                index, plan.num_experts, len(plan.groups), error, done, len(plans), left,
            )  # fmt: skip

    def _teach(
        self, decoder: nn.Module, batches: Sequence[WaitingBatch], index: int, plan: LayerPlan
    ) -> tuple[list[_Taught], list[WaitingBatch]]:
        """What the original block does with each batch, and the batches one layer on."""
        layer = _block(decoder, plan.name)
        taught, after = [], []
        for batch in batches:
            block, states = record(layer, batch.is_token, _runner(decoder, batch, index))
            taught.append(_Taught(block.output, block.tokens.router_logits, states))
            after.append(batch.moved(states))
        return taught, after

    def _compress(
        self,
        decoder: nn.Module,
        batches: Sequence[WaitingBatch],
        teacher: Sequence[_Taught],
        layer_plan: LayerPlan,
    ) -> str:
        layer = _block(decoder, layer_plan.name)
        pairs = list(zip(batches, teacher, strict=True))
        tokens = None
        if self._plan.router.needs_tokens:
            batched = (self._router_batch(decoder, layer, *pair) for pair in pairs)
            tokens = RouterTokens(batched, self._sum_over_processes)
        sample = self._samples.get(layer.name)
        apply_layer(layer, layer_plan, self._plan, tokens=tokens, sample=sample)
        if self._plan.scale is not None:
            self._rescale(decoder, layer, pairs, self._plan.scale)
        if self._plan.refit is None:
            return ""
        outcome = self._refit(decoder, layer, pairs, self._plan.refit)
        self.refits[layer.name] = outcome
        return f", {outcome}"

    def _rescale(
        self,
        decoder: nn.Module,
        layer: MoELayer,
        pairs: Sequence[tuple[WaitingBatch, _Taught]],
        repair: ScaleRepair,
    ) -> None:
        """Gives what the routed experts add the size that it had, in place."""
        products = OutputProducts.zeros(self.device)
        for batch, teacher in pairs:
            block, _ = record(layer, batch.is_token, _runner(decoder, batch, layer.index))
            beside = shared_output(layer, block)
            products.add(teacher.output - beside, block.output - beside)
        scale = repair(products.reduced(self._sum_over_processes))
        layer.store(scale_outputs(layer.weights(), scale))

    def _router_batch(
        self, decoder: nn.Module, layer: MoELayer, batch: WaitingBatch, teacher: _Taught
    ) -> RouterBatch:
        """What the original router makes of the compressed model's states, and of its own."""
        block, _ = record(layer, batch.is_token, _runner(decoder, batch, layer.index))
        tokens = block.tokens
        return RouterBatch(tokens.states, tokens.router_logits, teacher.router_logits)

    def _refit(
        self,
        decoder: nn.Module,
        layer: MoELayer,
        pairs: Sequence[tuple[WaitingBatch, _Taught]],
        refit: Refit,
    ) -> RefitOutcome:
        before = output_weights(layer)
        records, factor = [], 1.0
        for number, (batch, teacher) in enumerate(pairs):
            run = _runner(decoder, batch, layer.index)
            block, states = record(layer, batch.is_token, run)
            if number == 0:
                check_understood(layer, block, output_features(layer, block).values)
                if refit.correct_drift:
                    factor = output_factor(layer, batch.is_token, run)
            target = teacher.output
            if refit.correct_drift:
                mask = batch.is_token
                target = output_wanted(teacher.states[mask], states[mask], block.output, factor)
            held_out = batch.held_out[:, None].expand_as(batch.is_token)[batch.is_token]
            records.append(RefitRecord(block, target - bias_output(layer, block), held_out))
        num_tokens = sum(len(record.target) for record in records)
        fit = refit_by_sweeps
        if before.shape[1] <= _MOST_FEATURES:
            fit = refit_jointly
        elif num_tokens <= _MOST_FEATURES and self.trainer.world_size == 1:
            fit = refit_by_tokens
        after, outcome = fit(layer, records, before, refit, reduce=self._sum_over_processes)
        if outcome.applied:
            set_output_weights(layer, after)
        return outcome

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
    return [batch.moved(s) for s, batch in zip(states, batches, strict=True)]
