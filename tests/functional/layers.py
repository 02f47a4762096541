"""A small random layer with the evidence that plans are made from, summed by plain loops."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from lightning_smoe.functional.evidence import Evidence, TokenSample
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.sums import ExpertSums

_NAMES = (
    "gate_sum",
    "output_norm_sum",
    "gated_norm_sum",
    "output_energy_sum",
    "gated_energy_sum",
    "output_max",
)


def swiglu(gate: Tensor | None, up: Tensor) -> Tensor:
    """The activation of gated experts; that of the others where there is no gate."""
    return torch.relu(up) if gate is None else silu(gate) * up


def random_weights(
    num_experts: int = 6,
    hidden: int = 8,
    intermediate: int = 5,
    *,
    gated: bool = True,
    biased: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> ExpertWeights:
    """Experts with normally distributed weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num_experts, *shape, generator=generator, dtype=torch.float64).to(dtype)

    return ExpertWeights(
        up_proj=draw(intermediate, hidden),
        down_proj=draw(hidden, intermediate),
        gate_proj=draw(intermediate, hidden) if gated else None,
        gate_bias=draw(intermediate) if gated and biased else None,
        up_bias=draw(intermediate) if biased else None,
        down_bias=draw(hidden) if biased else None,
    )


def evidence_of(
    weights: ExpertWeights,
    num_tokens: int = 40,
    top_k: int = 2,
    *,
    normalize: bool = False,
    unvisited: int | None = None,
    seed: int = 1,
) -> Evidence:
    """Evidence of these experts under a random softmax router.

    Args:
        weights: The experts.
        num_tokens: Tokens, all of which are in the sample.
        top_k: Experts a token visits.
        normalize: Whether the selected weights are scaled to sum to one.
        unvisited: An expert that no token visits.
        seed: Seed of router and tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    num_experts, _, hidden = weights.up_proj.shape
    dtype = weights.up_proj.dtype
    states = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    router = torch.randn(num_experts, hidden, generator=generator, dtype=torch.float64).to(dtype)
    logits = states @ router.T
    if unvisited is not None:
        logits[:, unvisited] = -30.0
    gates, indices = logits.softmax(1).topk(top_k)
    if normalize:
        gates = gates / gates.sum(1, keepdim=True)
    sample = TokenSample(states, logits, gates, indices)
    return Evidence(sums_of(weights, sample), sample, weights, swiglu)


def sums_of(weights: ExpertWeights, sample: TokenSample) -> ExpertSums:
    """The sums of a sample, token by token."""
    num_experts, _, hidden = weights.up_proj.shape
    sums = {name: torch.zeros(num_experts, dtype=torch.float64) for name in _NAMES}
    count = torch.zeros(num_experts, dtype=torch.int64)
    total = torch.zeros(num_experts, hidden, dtype=torch.float64)
    for token in range(sample.num_tokens):
        for gate, index in zip(
            sample.routing_weights[token], sample.expert_indices[token], strict=True
        ):
            expert = int(index)
            state = sample.states[token : token + 1]
            output = weights.outputs(state, expert, swiglu)[0].double()
            norm = output.norm()
            count[expert] += 1
            total[expert] += output
            sums["gate_sum"][expert] += gate
            sums["output_norm_sum"][expert] += norm
            sums["gated_norm_sum"][expert] += gate * norm
            sums["output_energy_sum"][expert] += norm**2
            sums["gated_energy_sum"][expert] += (gate * norm) ** 2
            sums["output_max"][expert] = max(sums["output_max"][expert], output.abs().max())
    logits = sample.router_logits.double()
    return ExpertSums(
        num_tokens=torch.tensor(sample.num_tokens),
        count=count,
        output_sum=total,
        logit_gram=logits.T @ logits,
        **sums,
    )
