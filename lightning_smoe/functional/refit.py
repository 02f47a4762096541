"""Linear maps fitted in closed form: output projections, and router rows of merged experts."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lightning_smoe.errors import InputError

# Products are summed from float32: a smaller shrinkage is lost in their rounding.
_SMALLEST_STRENGTH = 1e-6
# Half a decade apart: between neighbours the error differs by a percent or two. The strong ones are
# for little text: at 2,048 calibration tokens a fit that may not go above 1 loses to no fit at all.
_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def check_strength(strength: float) -> None:
    """Refuses a shrinkage that cannot hold a system of equations together.

    Raises:
        ValueError: It is below 1e-6.
    """
    if not strength >= _SMALLEST_STRENGTH:
        raise ValueError(f"strength={strength} must be at least {_SMALLEST_STRENGTH:.0e}")


@dataclass(frozen=True)
class Refit:
    """Closed-form refit of the output matrices of the kept experts and of the shared expert.

    All output matrices of a layer are fitted together to the original layer's output, under the
    compressed model's own routing and inputs, one layer after the other:
    `W = W_0 + (Y - W_0 Phi) Phi^T (Phi Phi^T + lam I)^-1`. A fifth of the calibration sequences is
    held out to choose lam and to judge the fit: one that raises the error there is left out. The
    weights are then fitted to all sequences.

    Args:
        strength: lam relative to the mean energy of a feature, at least 1e-6; pulls toward the
            weights before the refit. Null chooses among 0.03 to 10 on held-out sequences.
        correct_drift: Fit each layer to what takes the compressed model's residual stream to the
            original's, so that later layers make up for what earlier ones lost.
    """

    strength: float | None = None
    correct_drift: bool = True

    def __post_init__(self) -> None:
        if self.strength is not None:
            check_strength(self.strength)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths to choose from."""
        return _STRENGTHS if self.strength is None else (self.strength,)


def ridge_toward(
    start: Float[Tensor, "outputs features"],
    gram: Float64[Tensor, "features features"],
    cross: Float64[Tensor, "outputs features"],
    strength: float,
) -> Float[Tensor, "outputs features"]:
    """Fits `W Phi = Y` by least squares, shrunk toward the start weights rather than toward zero.

    `W = W_0 + (Y Phi^T - W_0 Phi Phi^T) (Phi Phi^T + lam I)^-1`, the minimum of
    `||W Phi - Y||^2 + lam ||W - W_0||^2`, with lam the strength times the mean diagonal of
    `Phi Phi^T`. Features that never fired keep their start weights exactly and do not count in
    that mean.

    Args:
        start: Weights W_0 to fall back on where the data say nothing.
        gram: `Phi Phi^T`, summed over tokens.
        cross: `Y Phi^T`, targets times features, summed over the same tokens.
        strength: Shrinkage relative to the mean energy of a feature, above 0.

    Returns:
        The fitted weights in the dtype of the start weights.

    Raises:
        ValueError: The strength is not positive.
        InputError: It is too small to hold the equations together.
    """
    if not strength > 0:
        raise ValueError(f"strength={strength} leaves the fit undetermined; take a positive one")
    fired = gram.diagonal() > 0
    fitted = start.clone()
    if not bool(fired.any()):
        return fitted
    energy = gram[fired][:, fired]
    weights = start[:, fired].double()
    residual = cross[:, fired] - weights @ energy
    energy.diagonal().add_(strength * energy.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(energy)
    if int(failed):
        raise InputError(
            f"strength={strength:.1e} is too small for a fit on so few calibration tokens; "
            "raise it tenfold, or data.calib_tokens"
        )
    step = torch.cholesky_solve(residual.mT, factor).mT
    fitted[:, fired] = (weights + step).to(start.dtype)
    return fitted


def log_sum_exp_targets(
    router_logits: Float[Tensor, "tokens experts"],
    assignment: Int64[Tensor, " experts"],
    num_groups: int,
) -> Float[Tensor, "tokens groups"]:
    """Returns the logit each group needs to get the summed probability of its members.

    `t_c = log sum_{j in c} exp(l_j)`: the softmax of these targets is the softmax of the members'
    logits, summed within groups. Rows of a router are fitted to them with `ridge_toward`.

    Args:
        router_logits: Logits of the original router.
        assignment: Group of each expert, or -1 for one that was dropped.
        num_groups: Number of groups.

    Returns:
        Targets in float32 or wider.

    Raises:
        ValueError: A group has no member, or an expert is in a group that does not exist.
    """
    present = set(assignment.tolist()) - {-1}
    if present != set(range(num_groups)):
        raise ValueError(
            f"experts are assigned to groups {sorted(present)} but num_groups={num_groups}; "
            f"give each of the groups 0 to {num_groups - 1} a member, and use no other number"
        )
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    groups = [logits[:, assignment == group].logsumexp(1) for group in range(num_groups)]
    return torch.stack(groups, dim=1)
