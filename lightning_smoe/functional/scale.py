"""One number a layer that gives its routed output the size it had."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights


@dataclass(frozen=True, eq=False)
class OutputProducts:
    """Sums over tokens for the scale of a layer.

    Args:
        cross: Sum of `<y, z>`, y the wanted routed output and z the compressed layer's.
        wanted: Sum of ||y||^2.
        given: Sum of ||z||^2.
    """

    cross: Float64[Tensor, ""]
    wanted: Float64[Tensor, ""]
    given: Float64[Tensor, ""]

    @staticmethod
    def zeros(device: torch.device) -> "OutputProducts":
        """Sums over no tokens."""
        cross, wanted, given = torch.zeros(3, dtype=torch.float64, device=device)
        return OutputProducts(cross, wanted, given)

    def add(
        self, wanted: Float[Tensor, "tokens hidden"], given: Float[Tensor, "tokens hidden"]
    ) -> None:
        """Adds tokens, in place."""
        y, z = wanted.double(), given.double()
        self.cross.add_((y * z).sum())
        self.wanted.add_(y.square().sum())
        self.given.add_(z.square().sum())

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> "OutputProducts":
        """Adds up the sums of all processes.

        Args:
            reduce: Sum of a tensor over processes.
        """
        return OutputProducts(reduce(self.cross), reduce(self.wanted), reduce(self.given))


@dataclass(frozen=True)
class ScaleRepair:
    """Scales a layer's routed output by one number, in closed form.

    Where routing weights are not normalized (`norm_topk_prob` false), a softmax over fewer, flatter
    slots changes the size of the routed output beside the shared expert's. With y the routed output
    that is wanted and z the one there is, `projection` takes `sum <y, z> / sum ||z||^2`, the least
    squares, and `norm` takes `sqrt(sum ||y||^2 / sum ||z||^2)`, which also keeps the size where y
    and z do not agree. The number goes into the experts' output matrices and biases
    (`scale_outputs`), not into the router: the routed output is linear in them whatever the router
    does, while none of softmax, normalization and top-k lets rows carry a factor. The joint `Refit`
    includes the projection; with it, this has nothing left to do.

    Args:
        match: What is wanted of the scaled output.
    """

    match: Literal["projection", "norm"] = "projection"

    def __call__(self, products: OutputProducts) -> float:
        """Finds the number; 1 if the compressed layer gives nothing that could be scaled."""
        if not bool(products.given > 0):
            return 1.0
        if self.match == "projection":
            return (products.cross / products.given).item()
        return (products.wanted / products.given).sqrt().item()


def scale_outputs(weights: ExpertWeights, scale: float) -> ExpertWeights:
    """Multiplies what every expert gives by one number."""
    bias = None if weights.down_bias is None else weights.down_bias * scale
    return replace(weights, down_proj=weights.down_proj * scale, down_bias=bias)
