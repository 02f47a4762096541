"""Router repairs fitted on tokens, beyond the log-sum-exp ridge of `router.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_smoe.errors import InputError
from lightning_smoe.functional.curved_ridge import CurvedBatch, curved_ridge
from lightning_smoe.functional.refit import check_strength
from lightning_smoe.functional.router import (
    Grouping,
    MeanRows,
    RouterBatch,
    RouterRepair,
    RouterRows,
    RouterTokens,
    ridge_rows,
    router_features,
    router_targets,
)


@dataclass(frozen=True)
class TeacherLogits(RouterRepair):
    """Fits rows on the compressed model's states to what the original router said of its own.

    `argmin_w sum_x (w x' - log sum_{j in slot} exp(l_j(x)))^2 + lam ||w - mean row||^2`, x' the
    state of a token in the compressed model and x the same token's in the original. This undoes
    the drift that earlier layers cause as far as it is linear, so slots of one move too; where
    nothing drifted it is `LogSumExp`, whose limits with sigmoid scores it shares. For pruning the
    mean row is the kept expert's own. Layers that the plan leaves as they are keep their rows.

    Args:
        strength: lam relative to the mean energy of a feature, at least 1e-6; on the shipped model
            about 1 is best for merging and 0.01 for pruning.
    """

    needs_tokens: ClassVar[bool] = True
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
        if tokens is None:
            raise ValueError("TeacherLogits is fitted on calibration tokens and got none")
        pairs = ((batch.states, batch.teacher_logits) for batch in tokens.batches)
        return ridge_rows(rows, grouping, pairs, strength=self.strength, reduce=tokens.reduce)


@dataclass(frozen=True)
class HessianRidge(RouterRepair):
    """Fits all rows together so that the softmax over slots comes near the original's (HARC).

    `min_W sum_x (W x - t)^T (diag p - p p^T) (W x - t) + lam ||W - mean rows||^2` with t the
    log-sum-exp of each slot's logits and p = softmax(t): to second order twice the divergence
    `KL(p || softmax(W x))`, https://arxiv.org/abs/2606.03391. An expert's logit counts for the
    tokens that it matters to, and what is added to all logits of a token alike does not. Solved
    exactly, by conjugate gradients. The paper shrinks by scaling down what couples the weights;
    here rows are pulled toward the mean rows, as in the other fits. Slots of one move too, unless
    there are no others.

    Keeps the states of this process's tokens until it is done, in their dtype, and two numbers a
    token and slot. For softmax routers: the gates of sigmoid routers do not follow p.

    Args:
        strength: lam relative to the mean diagonal of the system, at least 1e-6.
        states: Whose states the wanted logits are of: the compressed model's, as in the paper, or
            the original's, which also corrects drift as `TeacherLogits` does.
        num_steps: Conjugate gradient steps at most, at least 1; they end before once the error is
            1e-5 of what it was.
    """

    needs_tokens: ClassVar[bool] = True
    strength: float = 1.0
    states: Literal["compressed", "original"] = "compressed"
    num_steps: int = 100

    def __post_init__(self) -> None:
        check_strength(self.strength)
        _check_at_least_one("num_steps", self.num_steps)

    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
        if tokens is None:
            raise ValueError("HessianRidge is fitted on calibration tokens and got none")
        drifts = self.states == "original"
        start = MeanRows()(rows, grouping, None)
        if not drifts and bool((grouping.sizes == 1).all()):
            return start

        def weigh(batch: RouterBatch) -> CurvedBatch:
            logits = batch.teacher_logits if drifts else batch.logits
            targets = router_targets(logits, grouping)
            return _curved(batch, start, targets, targets.softmax(1), coupled=True)

        return _fit(start, tokens, weigh, self.strength, num_steps=self.num_steps)


@dataclass(frozen=True)
class TopKRidge(RouterRepair):
    """Fits rows to the largest logits of each token alone (TopK-MSE of EAC-MoE).

    `min_W sum_x sum_{c in top k of t} (w_c x' - t_c)^2 + lam ||W - mean rows||^2` with t the
    log-sum-exp of each slot's logits in the original model and x' the token's state in the
    compressed one, https://arxiv.org/abs/2508.01625. Slots far from being selected do not bend the
    fit; nothing but lam keeps them small. Solved exactly, by conjugate gradients. As in
    `TeacherLogits` drift is corrected and slots of one move too, and as in `LogSumExp` sigmoid
    scores are met in the limit of small gates. Memory as in `HessianRidge`.

    Args:
        top_k: Logits of a token that count, from the number the router selects to the slots.
        strength: lam relative to the mean diagonal of the system, at least 1e-6.
        num_steps: Conjugate gradient steps at most, at least 1; see `HessianRidge`.
    """

    needs_tokens: ClassVar[bool] = True
    top_k: int = 8
    strength: float = 1.0
    num_steps: int = 100

    def __post_init__(self) -> None:
        check_strength(self.strength)
        _check_at_least_one("top_k", self.top_k)
        _check_at_least_one("num_steps", self.num_steps)

    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
        if tokens is None:
            raise ValueError("TopKRidge is fitted on calibration tokens and got none")
        if self.top_k > grouping.num_groups:
            raise InputError(
                f"TopKRidge has top_k={self.top_k} but the plan keeps {grouping.num_groups} "
                "experts; lower top_k, or set router to TeacherLogits, which counts all"
            )
        start = MeanRows()(rows, grouping, None)

        def weigh(batch: RouterBatch) -> CurvedBatch:
            targets = router_targets(batch.teacher_logits, grouping)
            chosen = targets.topk(self.top_k, dim=1).indices
            mask = torch.zeros_like(targets).scatter(1, chosen, 1.0)
            return _curved(batch, start, targets, mask, coupled=False)

        return _fit(start, tokens, weigh, self.strength, num_steps=self.num_steps)


def _curved(
    batch: RouterBatch,
    start: RouterRows,
    targets: Float[Tensor, "tokens groups"],
    weights: Float[Tensor, "tokens groups"],
    *,
    coupled: bool,
) -> CurvedBatch:
    """One batch of a fit that starts from given rows."""
    features = router_features(batch.states, start.bias is not None)
    given = features.to(targets.dtype) @ start.joined.to(targets.dtype).T
    return CurvedBatch(features, targets - given, weights, coupled)


def _fit(
    start: RouterRows,
    tokens: RouterTokens,
    weigh: Callable[[RouterBatch], CurvedBatch],
    strength: float,
    *,
    num_steps: int,
) -> RouterRows:
    batches = [weigh(batch) for batch in tokens.batches]
    joined = curved_ridge(
        start.joined, batches, strength, num_steps=num_steps, reduce=tokens.reduce
    )
    return start.like(joined)


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
