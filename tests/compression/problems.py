"""A layer that is to give other outputs, with all that a refit of it is compared with."""

import torch
from torch import Tensor

from lightning_smoe.calibration.observer import RoutedTokens
from lightning_smoe.compression.dual_refit import refit_by_tokens
from lightning_smoe.compression.record import (
    BlockRecord,
    bias_output,
    output_features,
    output_weights,
)
from lightning_smoe.compression.refit import RefitOutcome, RefitRecord, refit_jointly
from lightning_smoe.compression.sweeps import refit_by_sweeps
from lightning_smoe.functional.refit import Refit
from lightning_smoe.models.layer import MoELayer
from tests.compression.plans import blocks_of
from tests.families import build

FITTERS = {
    "jointly": refit_jointly,
    "by sweeps": refit_by_sweeps,
    "by tokens": refit_by_tokens,
}


def same(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


def some(block: BlockRecord, rows: Tensor) -> BlockRecord:
    """What a block did with some of its tokens."""
    tokens = block.tokens
    return BlockRecord(
        RoutedTokens(
            tokens.states[rows],
            tokens.router_logits[rows],
            tokens.routing_weights[rows],
            tokens.expert_indices[rows],
            tokens.domain[rows],
            None,
        ),
        None if block.shared is None else block.shared[rows],
        block.output[rows],
    )


class Problem:
    """A layer that is to give outputs on the way to those of another model's layer.

    Args:
        family: Of both models.
        part: How far on the way; 0 is what it gives already.
        noise: Standard deviation of what nothing can explain, in units of the outputs'.
    """

    def __init__(self, family: str, part: float = 1.0, noise: float = 0.0) -> None:
        self.layer: MoELayer
        self.layer, self.block = blocks_of(build(family), 0)
        own, other = self.block.output, blocks_of(build(family, seed=9), 0)[1].output
        drawn = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
        wanted = own + part * (other - own) + noise * own.std() * drawn
        self.wanted = (wanted - bias_output(self.layer, self.block)).detach()
        self.held_out = torch.arange(len(own)) % 5 == 0
        self.start = output_weights(self.layer).detach()
        self.records = [RefitRecord(self.block, self.wanted, self.held_out)]
        self.features = output_features(self.layer, self.block).values.detach().double()
        self.target = self.wanted.double()

    def solve(self, fitter: str, refit: Refit) -> tuple[Tensor, RefitOutcome]:
        return FITTERS[fitter](self.layer, self.records, self.start, refit, reduce=same)

    def restrict(self, rows: Tensor) -> None:
        """Leaves only some of the tokens."""
        record = RefitRecord(some(self.block, rows), self.wanted[rows], self.held_out[rows])
        self.records = [record]
        self.features, self.target = self.features[rows], self.target[rows]
        self.held_out = self.held_out[rows]

    def error(self, weights: Tensor, rows: Tensor | slice = slice(None)) -> float:
        """Squared error relative to the targets."""
        wrong = self.features[rows] @ weights.double().T - self.target[rows]
        return float(wrong.square().sum() / self.target[rows].square().sum())

    def solution(self, strength: float, rows: Tensor | slice = slice(None)) -> Tensor:
        """Least squares on some tokens, with the start weights as extra ones."""
        features, start = self.features[rows], self.start.double()
        energy = features.square().sum(0)
        lam = strength * energy[energy > 0].mean()
        extra = lam.sqrt() * torch.eye(len(start.T), dtype=torch.float64)
        matrix = torch.cat([features, extra])
        target = torch.cat([self.target[rows], extra @ start.T])
        weights: Tensor = torch.linalg.lstsq(matrix, target).solution.T
        return weights

    def objective(self, weights: Tensor, strength: float) -> float:
        """Squared error plus the shrinkage, relative to the targets."""
        energy = self.features.square().sum(0)
        change = (weights.double() - self.start.double()).square().sum()
        penalty = strength * energy[energy > 0].mean() * change
        return self.error(weights) + float(penalty / self.target.square().sum())
