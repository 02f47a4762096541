"""Distance that ignores rotation and scale of what two experts put out."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lightning_smoe.functional.distance import Distance, cosines, tidy
from lightning_smoe.functional.evidence import Evidence


@dataclass(frozen=True)
class LinearCka(Distance):
    """One minus the linear centred kernel alignment of two experts' outputs.

    `CKA = <K_i, K_j> / (||K_i|| ||K_j||)` with K the centred matrix of inner products of an
    expert's outputs on each two tokens (https://arxiv.org/abs/1905.00414; between experts in GRAPE,
    https://arxiv.org/abs/2604.06542). It does not see rotation, scale or shift of outputs, so it
    finds experts that tell the same tokens apart, not ones that can stand in for each other. An
    expert of constant output is at distance 1 from all others.

    It costs `E T^2 (D + E)` for E experts, T tokens and D hidden dimensions, and memory for E
    tables of T^2.

    Args:
        num_tokens: Tokens compared, at least 4, taken at even steps from the sample.
        debiased: Whether to leave out each token's product with itself (Song et al. 2012). With
            fewer tokens than hidden dimensions the plain value is high for unrelated experts too.
    """

    num_tokens: int = 512
    debiased: bool = False

    def __post_init__(self) -> None:
        if self.num_tokens < 4:
            raise ValueError(f"num_tokens={self.num_tokens} is too few to compare; take 4 or more")

    def __call__(self, evidence: Evidence) -> Float64[Tensor, "experts experts"]:
        last = evidence.sample.num_tokens - 1
        tokens = torch.linspace(0, last, min(self.num_tokens, last + 1)).round().long()
        states = evidence.sample.states[tokens.to(evidence.sample.states.device)]
        kernels = torch.stack(
            [
                self._kernel(evidence.weights.outputs(states, expert, evidence.activate).float())
                for expert in range(evidence.num_experts)
            ]
        ).flatten(1)
        return tidy(1 - cosines((kernels @ kernels.mT).double()))

    def _kernel(self, outputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens tokens"]:
        """Inner products of each two tokens' centred outputs, scaled to unit norm."""
        outputs = outputs - outputs.mean(0)
        kernel = outputs @ outputs.mT
        if self.debiased:
            kernel = _u_centred(kernel)
        norm = kernel.norm()
        return kernel / norm if norm > 0 else kernel


def _u_centred(kernel: Float[Tensor, "tokens tokens"]) -> Float[Tensor, "tokens tokens"]:
    """Centres a kernel without its diagonal; products of such kernels estimate without bias."""
    kernel = kernel.clone().fill_diagonal_(0)
    tokens = len(kernel)
    row = kernel.sum(0) / (tokens - 2)
    mean = kernel.sum() / ((tokens - 1) * (tokens - 2))
    return (kernel - row.unsqueeze(0) - row.unsqueeze(1) + mean).fill_diagonal_(0)
