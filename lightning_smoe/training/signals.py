"""What the decoder layers of a model do in a pass, at the positions that count."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lightning_smoe.data.positions import flat_positions
from lightning_smoe.functional.router_losses import router_score
from lightning_smoe.functional.routing import Score
from lightning_smoe.models.layer import MoELayer, decoder_layer_of

# `hidden`: output of a decoder layer. `branch`: weighted sum of its routed experts' outputs, before
# a shared expert's is added. `router_logits`: raw scores of router rows. `expert_counts`: how often
# each expert was selected; the only one that has experts, not tokens, on its first axis.
Signal = Literal["hidden", "branch", "router_logits", "expert_counts"]


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """What of a decoder layer does not change while it is trained.

    Args:
        index: Number of the decoder layer, counted from zero.
        moe: Name of its mixture-of-experts block, if it has one.
        num_experts: Experts of the block.
        expert_map: The expert of each router row, where rows share experts; on the CPU.
    """

    index: int
    moe: str | None = None
    num_experts: int = 0
    expert_map: Int[Tensor, " rows"] | None = None


@dataclass(frozen=True, eq=False)
class LayerSignals:
    """What one decoder layer did in one pass.

    Args:
        facts: Which layer it is.
        recorded: Its signals, counted tokens on the first axis.
        score: What makes a router logit a weight.
    """

    facts: LayerFacts
    recorded: Mapping[Signal, Tensor]
    score: Score = "softmax"

    def __getitem__(self, signal: Signal) -> Tensor:
        """One signal; a KeyError where the layer has none or it was not asked for."""
        return self.recorded[signal]


class LayerRecorder:
    """Records what a model's decoder layers do.

    To be made before a layer is wrapped (LoRA); what is inside the wrapping is watched then.

    Args:
        model: The causal language model.
        layers: All its mixture-of-experts layers.
        wanted: What is recorded.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[MoELayer], wanted: Collection[Signal]
    ) -> None:
        self._wanted = frozenset(wanted)
        stack = model.get_submodule(decoder_layer_of(layers[0].name)[0])
        self._decoder_layers = list(stack.children())
        self._moe_layers = {layer.index: layer for layer in layers}
        # Read now: where LoRA wraps experts, looking at a weight within a pass would compute it.
        self._facts = {i: LayerFacts(i) for i in range(len(self._decoder_layers))} | {
            layer.index: LayerFacts(layer.index, layer.name, layer.num_experts, _map_of(layer))
            for layer in layers
        }
        self._scores: dict[int, Score] = {}

    def available(self, signals: Collection[Signal]) -> dict[int, str]:
        """Numbers and names of the decoder layers that have some signals."""
        only_moe = not set(signals) <= {"hidden"}
        return {i: _name(facts) for i, facts in self._facts.items() if facts.moe or not only_moe}

    @contextmanager
    def recording(
        self, counted: Bool[Tensor, "batch sequence"]
    ) -> Iterator[dict[str, LayerSignals]]:
        """Gives a dictionary that holds the signals of one pass once the context has ended.

        Gradients reach the model through them. Under gradient checkpointing the hooks only look on,
        so that a layer computed again without them saves the same tensors.

        Args:
            counted: Positions whose signals are wanted.
        """
        signals: dict[str, LayerSignals] = {}
        if not self._wanted:
            yield signals
            return
        # Before the pass: finding them waits for the device.
        positions = flat_positions(counted)
        seen: dict[int, dict[str, Tensor]] = {index: {} for index in self._facts}
        with ExitStack() as stack:
            for index, module in enumerate(self._decoder_layers):
                for hook in self._hooks(index, module, seen[index]):
                    stack.callback(hook.remove)
            yield signals
        for index, raw in seen.items():
            recorded = self._recorded(index, raw, positions)
            if recorded:
                facts = self._facts[index]
                signals[_name(facts)] = LayerSignals(
                    facts, recorded, self._scores.get(index, "softmax")
                )

    def _hooks(self, index: int, module: nn.Module, seen: dict[str, Tensor]) -> list[Any]:
        """Hooks that keep what passes, as it is: nothing is computed within the pass."""

        def output(name: str) -> Callable[..., None]:
            def keep(_: nn.Module, __: Any, found: Any) -> None:
                seen[name] = found[0] if isinstance(found, tuple) else found

            return keep

        def logits(_: nn.Module, __: Any, found: Any) -> None:
            seen["router_logits"] = layer.router_logits(found)

        def routing(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, seen["rows"], seen["weights"] = (*args, *kwargs.values())

        hooks: list[Any] = []
        if "hidden" in self._wanted:
            hooks.append(module.register_forward_hook(output("hidden")))
        if index not in self._moe_layers:
            return hooks
        layer = self._moe_layers[index]
        if "router_logits" in self._wanted:
            hooks.append(layer.router.register_forward_hook(logits))
        if self._wanted & {"router_logits", "expert_counts"}:
            hooks.append(layer.experts.register_forward_pre_hook(routing, with_kwargs=True))
        if "branch" in self._wanted:
            hooks.append(layer.experts.register_forward_hook(output("branch")))
        return hooks

    def _recorded(
        self, index: int, raw: dict[str, Tensor], positions: Int[Tensor, " tokens"]
    ) -> dict[Signal, Tensor]:
        """Takes out what was wanted, at the positions that count."""
        facts = self._facts[index]
        recorded: dict[Signal, Tensor] = {}
        if "router_logits" in raw and index not in self._scores:
            # Once, and from all positions: a process may have none that counts.
            seen = (raw["router_logits"], raw["rows"], raw["weights"])
            self._scores[index] = router_score(*seen)
        signal: Signal
        for signal in ("hidden", "branch", "router_logits"):
            if signal in raw:
                flat = raw[signal].reshape(-1, raw[signal].shape[-1])
                recorded[signal] = flat.index_select(0, positions)
        if "expert_counts" in self._wanted and "rows" in raw:
            rows = raw["rows"].index_select(0, positions).flatten().long()
            experts = rows if facts.expert_map is None else facts.expert_map.to(rows.device)[rows]
            counts = torch.zeros(facts.num_experts, dtype=torch.int64, device=rows.device)
            recorded["expert_counts"] = counts.scatter_add_(0, experts, torch.ones_like(experts))
        return recorded


def _name(facts: LayerFacts) -> str:
    return facts.moe or f"decoder layer {facts.index}"


def _map_of(layer: MoELayer) -> Int[Tensor, " rows"] | None:
    return None if layer.expert_map is None else layer.expert_map.cpu()
