"""What layers and the whole model would be with fewer experts, tried out before it is decided."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.apply import apply_layer
from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.planner import Hold, evidence_of, plan_layer, protected_experts
from lightning_smoe.compression.recipe import Recipe
from lightning_smoe.errors import InputError
from lightning_smoe.functional.divergence import kl_divergence
from lightning_smoe.functional.evidence import Evidence, TokenSample
from lightning_smoe.functional.router import RouterBatch, RouterTokens
from lightning_smoe.models.head import model_inputs
from lightning_smoe.models.layer import MoELayer

# Compressed layers kept beside those of one allocation: what two more moves of a search change.
_SPARE_LAYERS = 4
# Tokens that go through a block at once.
_BLOCK_TOKENS = 4096


class Trials:
    """Layers of one model, compressed by one recipe to any number of experts; nothing is changed.

    The refit is left out: it would take a pass over the text for each trial.

    Args:
        model: The original.
        statistics: What its experts did on calibration text.
        recipe: The method.
        layers: Layers to change.
        keep: A fraction of all experts, in (0, 1] and not whole, or a count a layer.
        text: Calibration text, sequences on the first axis of `input_ids` and `attention_mask`.
        batch_size: Sequences that run at once, at least 1.
        hold: Gives a layer its weights for a while; none if all are there all the time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        statistics: Statistics,
        recipe: Recipe,
        *,
        layers: Sequence[MoELayer],
        keep: int | float,
        text: Mapping[str, Tensor],
        batch_size: int = 8,
        hold: Hold | None = None,
    ) -> None:
        self._streams = hold is not None
        self._hold: Hold = hold or nullcontext
        self.recipe, self.layers, self.keep = recipe, list(layers), keep
        self._model, self._statistics = model, statistics
        self._text, self._batch_size = text, batch_size
        self._alone = protected_experts(statistics, recipe)
        self._plans: dict[tuple[str, int], LayerPlan] = {}
        # One layer's at a time: the sums over pairs of experts are large.
        self._evidence = lru_cache(maxsize=1)(self._find_evidence)
        self._block = lru_cache(maxsize=len(self.layers) + _SPARE_LAYERS)(self._make_block)
        self._by_name = {layer.name: layer for layer in self.layers}

    def forget(self) -> None:
        """Frees what is kept of layers."""
        self._evidence.cache_clear()
        self._block.cache_clear()

    def evidence(self, layer: MoELayer) -> Evidence:
        """All that is known of a layer."""
        return self._evidence(layer.name)

    def _find_evidence(self, name: str) -> Evidence:
        # Before the next layer comes: the one before would stay beside it.
        self._evidence.cache_clear()
        layer = self._by_name[name]
        with self._hold(layer):
            return evidence_of(layer, self._statistics)

    def plan(self, layer: MoELayer, count: int) -> LayerPlan:
        """What becomes of a layer's experts if so many stay."""
        key = (layer.name, count)
        if key not in self._plans:
            evidence, alone = self.evidence(layer), self._alone[layer.name]
            self._plans[key] = plan_layer(layer, evidence, self.recipe, count, alone=alone)
        return self._plans[key]

    @torch.no_grad()
    def layer_errors(
        self, layer: MoELayer, counts: Sequence[int], *, relative: bool = True
    ) -> list[float]:
        """Errors of the routed experts' output on the sampled tokens.

        `||y_k - y||^2 / ||y||^2` over the sample, with y_k what the layer gives if k experts stay:
        its own router, compressed, chooses among them. Inputs are those of the original model.

        Args:
            layer: The layer.
            counts: Numbers of experts that stay.
            relative: Divide by the energy of the output, and not by the number of tokens.
        """
        with self._hold(layer):
            states = self._sample(layer).states
            wanted = _routed_output(layer, states).double()
            energy = wanted.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
            scale = float(energy) if relative else len(states)
            errors = []
            for count in counts:
                block = self._make_block(layer.name, count)
                found = _routed_output(MoELayer(layer.name, block), states)
                errors.append(float((found.double() - wanted).square().sum()) / scale)
            return errors

    def measure(self, num_tokens: int) -> "Measure":
        """Measures whole models on so many calibration tokens, the first of the balanced order.

        Raises:
            InputError: There are none, or the model is not in memory.
        """
        if self._streams:
            raise InputError(
                "model.budget measures whole models, which do not fit in memory here (model.stream)"
                "; set a budget that goes by layers, such as Uniform or LayerErrorDP"
            )
        length = self._text["input_ids"].shape[1]
        rows = slice(0, max(1, num_tokens // length))
        text = {name: tensor[rows] for name, tensor in self._text.items()}
        batches = [
            {name: tensor[start : start + self._batch_size] for name, tensor in text.items()}
            for start in range(0, len(text["input_ids"]), self._batch_size)
        ]
        return Measure(self._model, batches, self)

    def blocks(self, counts: Mapping[str, int]) -> dict[str, nn.Module]:
        """Compressed blocks by the layer's name; a layer that keeps all is left out."""
        # Those of whole allocations are kept: the next may differ in two layers only.
        make = self._block if len(counts) == len(self.layers) else self._make_block
        return {
            name: make(name, count)
            for name, count in counts.items()
            if count != self._by_name[name].num_experts
        }

    def _sample(self, layer: MoELayer) -> TokenSample:
        return self._statistics.samples[layer.name].to(layer.router_tensors[0].rows.device)

    @torch.no_grad()
    def _make_block(self, name: str, count: int) -> nn.Module:
        layer = self._by_name[name]
        layer_plan = self.plan(layer, count)
        settings = {k: v for k, v in vars(self.recipe.execution).items() if k != "refit"}
        plan = CompressionPlan((layer_plan,), **settings)
        block = copy.deepcopy(layer.block)
        sample = self._sample(layer)
        tokens = None
        if plan.router.needs_tokens:
            batch = RouterBatch(sample.states, sample.router_logits, sample.router_logits)
            tokens = RouterTokens([batch], lambda tensor: tensor)
        apply_layer(MoELayer(name, block), layer_plan, plan, tokens=tokens, sample=sample)
        return block


class Measure:
    """KL(original || compressed) on fixed tokens, in nats a token.

    The original's logits are kept in memory: tokens times vocabulary times four bytes.

    Args:
        model: The original.
        batches: The text.
        trials: Makes compressed layers.

    Raises:
        InputError: The text has no token that follows another.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], trials: Trials
    ) -> None:
        self._model, self._trials = model, trials
        self._batches = [{k: t.to(model.device) for k, t in b.items()} for b in batches]
        self._wanted = [self._logits(batch).cpu() for batch in self._batches]
        self._num_tokens = sum(int(_is_predicted(b).sum()) for b in self._batches)
        if not self._num_tokens:
            raise InputError(
                "the calibration text has no token that follows another, so budgets cannot be "
                "measured; give longer text"
            )

    def __call__(self, counts: Mapping[str, int]) -> float:
        """Measures the model of which these layers keep so many experts, and the others all."""
        blocks = self._trials.blocks(counts)
        if not blocks:
            return 0.0
        total = 0.0
        with _swapped(self._model, blocks):
            for batch, wanted in zip(self._batches, self._wanted, strict=True):
                found = self._logits(batch)
                divergence = kl_divergence(wanted.to(found.device), found)
                total += float(divergence[_is_predicted(batch)].double().sum())
        return total / self._num_tokens

    @torch.no_grad()
    def _logits(self, batch: dict[str, Tensor]) -> Float[Tensor, "batch sequence vocab"]:
        logits: Tensor = self._model(**model_inputs(batch), use_cache=False).logits[:, :-1]
        return logits


def _is_predicted(batch: dict[str, Tensor]) -> Tensor:
    real = batch["attention_mask"].bool()
    return real[:, 1:] & real[:, :-1]


@contextmanager
def _swapped(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts blocks into the places of those of a model, for a while."""
    originals = {name: model.get_submodule(name) for name in blocks}
    try:
        for name, block in blocks.items():
            model.set_submodule(name, block)
        yield
    finally:
        for name, block in originals.items():
            model.set_submodule(name, block)


def _routed_output(
    layer: MoELayer, states: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """What the routed experts of a layer add up to."""
    outputs: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(output.reshape(-1, output.shape[-1]))

    hook = layer.experts.register_forward_hook(note)
    try:
        for part in states.split(_BLOCK_TOKENS):
            layer.block(part.to(layer.experts.down_proj.dtype)[None])
    finally:
        hook.remove()
    return torch.cat(outputs)
