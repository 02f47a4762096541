"""Experts that no plan may touch, whatever their importance."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

# Thresholds of the paper and of every public implementation.
_QUANTILE = 0.995
_FRACTION_OF_LARGEST = 0.1


def super_experts(
    output_max: Sequence[Float64[Tensor, "..."]], depth: float = 1.0
) -> list[Int64[Tensor, "..."]]:
    """Finds the few experts whose outputs make the massive activations that attention relies on.

    With a the largest |f(x)| of an expert, over tokens and hidden dimensions: `a > P99.5` of all
    experts of all layers and `a > 0.1 max a` (https://arxiv.org/abs/2507.23279, where pruning 3 of
    the 6144 experts of Qwen3-30B-A3B ruins it). They should be neither pruned nor merged.

    The first threshold is a rank: about one expert in 200 exceeds it in any model, and in a model
    of fewer than 200 experts the largest one alone. The paper also asks that massive activations
    form in the layer; outputs tend to grow again in the last layers, where `depth` leaves them out.

    Args:
        output_max: `ExpertSums.output_max` of every layer, in the order of the model.
        depth: Fraction of the layers, from the first, whose experts may be named, in (0, 1]; the
            public code of REAP takes 0.75.

    Returns:
        Experts of each layer, in ascending order; mostly none.

    Raises:
        ValueError: There is no layer, or the depth is not in (0, 1].
    """
    if not output_max or not 0 < depth <= 1:
        raise ValueError(
            f"super experts of {len(output_max)} layers to depth {depth} are not defined; give at "
            "least one layer and a depth in (0, 1]"
        )
    every = torch.cat([layer.flatten().cpu() for layer in output_max])
    floor = torch.maximum(every.quantile(_QUANTILE), _FRACTION_OF_LARGEST * every.max())
    searched = math.ceil(depth * len(output_max))
    named = []
    for place, layer in enumerate(output_max):
        is_super = (layer > floor.to(layer.device)) & (place < searched)
        named.append(is_super.nonzero().squeeze(1))
    return named
