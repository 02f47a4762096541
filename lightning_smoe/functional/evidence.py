"""All that is known of one layer when its plan is made."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from lightning_smoe.functional.experts import Activation, ExpertWeights
from lightning_smoe.functional.pairs import OutputSums, PairSums
from lightning_smoe.functional.sums import ExpertSums

# Numbers of one block of outputs of all experts: 2**25 in float32 are 128 MB. Of Qwen1.5-MoE, 60
# experts of hidden size 2048, that is 273 tokens; products of fewer rows are markedly slower.
_BLOCK_NUMBERS = 1 << 25


@dataclass(frozen=True, eq=False)
class TokenSample:
    """What the router of one layer did with a sample of calibration tokens.

    Args:
        states: What the experts read.
        router_logits: The router's raw scores.
        routing_weights: Weight of each selected expert, as multiplied with its output.
        expert_indices: The selected experts.
    """

    states: Float[Tensor, "tokens hidden"]
    router_logits: Float[Tensor, "tokens experts"]
    routing_weights: Float[Tensor, "tokens top_k"]
    expert_indices: Int[Tensor, "tokens top_k"]

    @property
    def num_tokens(self) -> int:
        """Tokens in the sample."""
        return len(self.states)

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenSample":
        """Applies one change to every tensor (tokens on the first axis)."""
        return TokenSample(*(change(getattr(self, field.name)) for field in fields(self)))

    def to(self, device: torch.device) -> "TokenSample":
        """Moves the sample to a device."""
        return self.map(lambda tensor: tensor.to(device))

    def thinned(self, num_tokens: int) -> "TokenSample":
        """Takes that many tokens, evenly spread, so that no part of the text is left out."""
        total = self.num_tokens
        chosen = min(num_tokens, total)
        places = torch.arange(chosen, device=self.states.device) * total // chosen
        return self.map(lambda tensor: tensor[places])

    @cached_property
    def gates(self) -> Float[Tensor, "tokens experts"]:
        """Routing weight of every expert for every token, zero where it is not selected."""
        dense = torch.zeros_like(self.router_logits, dtype=torch.float32)
        return dense.scatter_add_(1, self.expert_indices.long(), self.routing_weights.float())


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is known of one layer: sums over all tokens, a sample of tokens, and the weights.

    Args:
        sums: Sums over all calibration tokens, without a domain axis.
        sample: What the router did with a sample of them.
        weights: The experts.
        activate: The experts' activation.
        chosen_from: For a selection of a layer's experts, the whole layer, and which of it.
    """

    sums: ExpertSums
    sample: TokenSample
    weights: ExpertWeights
    activate: Activation
    chosen_from: "tuple[Evidence, Int64[Tensor, ' members']] | None" = None

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.weights.up_proj)

    @cached_property
    def gates(self) -> Float[Tensor, "tokens experts"]:
        """Routing weight of every expert for every sampled token, zero where it is not selected."""
        return self.sample.gates

    @cached_property
    def output_sums(self) -> OutputSums:
        """Sums of every expert's outputs; computed once, at the first use."""
        experts, hidden = self.num_experts, self.weights.down_proj.shape[1]
        sums = OutputSums.zeros(experts, hidden, self.sample.states.device)
        router_probs = self.sample.router_logits.float().softmax(1)
        for tokens, outputs in self.output_blocks():
            sums.add(outputs, router_probs[tokens])
        return sums

    @cached_property
    def pairs(self) -> PairSums:
        """Sums over pairs of experts' outputs; computed once, at the first use."""
        sums = PairSums.zeros(self.num_experts, self.sample.states.device)
        for tokens, outputs in self.output_blocks():
            sums.add(outputs, self.gates[tokens])
        return sums

    def activations(self, expert: int) -> Float[Tensor, "tokens intermediate"]:
        """What an expert's output matrix multiplies, on all sampled tokens."""
        return self.weights.activations(self.sample.states, expert, self.activate)

    def output_blocks(self) -> Iterator[tuple[slice, Float[Tensor, "experts block hidden"]]]:
        """Outputs f(x) of every expert on every sampled token, a block of tokens at a time.

        Yields:
            The tokens of the block, and the outputs before routing weights, in float32.
        """
        states = self.sample.states
        size = max(1, _BLOCK_NUMBERS // (self.num_experts * states.shape[1]))
        for start in range(0, len(states), size):
            tokens = slice(start, min(start + size, len(states)))
            some = states[tokens]
            shape = (self.num_experts, *some.shape)
            outputs = torch.empty(shape, dtype=torch.float32, device=states.device)
            for expert, place in enumerate(outputs):
                place.copy_(self.weights.outputs(some, expert, self.activate))
            yield tokens, outputs

    def select(self, experts: Int64[Tensor, " members"]) -> "Evidence":
        """Restricts to the named experts, in that order; gates of the others are left out.

        The sample keeps all its tokens, and `expert_indices` and `routing_weights` of the whole
        layer are replaced by dense ones over the chosen experts.
        """
        chosen = self.sample.gates[:, experts]
        every = torch.arange(len(experts), device=chosen.device).expand(len(chosen), -1)
        sample = TokenSample(
            self.sample.states, self.sample.router_logits[:, experts], chosen, every
        )
        return Evidence(
            self.sums.select(experts),
            sample,
            self.weights.select(experts),
            self.activate,
            (self, experts),
        )
