"""How far a student's predictions are from a teacher's, and from the text, token by token."""

import math

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax


def log_probabilities(
    logits: Float[Tensor, "... vocab"], temperature: float = 1.0
) -> Float[Tensor, "... vocab"]:
    """Log-probabilities in nats, in float32; float64 stays.

    Args:
        logits: Of any float type.
        temperature: Divides the logits, above 0.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # No copy of the vocabulary's size where nothing is divided.
    return log_softmax(wide if temperature == 1 else wide / temperature, dim=-1)


def divergence(
    first: Float[Tensor, "... classes"], second: Float[Tensor, "... classes"]
) -> Float[Tensor, "..."]:
    """KL(first || second) of log-probabilities at each position, in nats."""
    return kl_div(second, first, reduction="none", log_target=True).sum(-1)


def mixture(
    first: Float[Tensor, "... classes"], second: Float[Tensor, "... classes"], share: float
) -> Float[Tensor, "... classes"]:
    """Log-probabilities where the first distribution has some share and the second the rest.

    Args:
        first: Log-probabilities in nats.
        second: Others of the same classes.
        share: Share of the first, in (0, 1).
    """
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def jensen_shannon(
    first: Float[Tensor, "... classes"], second: Float[Tensor, "... classes"], beta: float
) -> Float[Tensor, "..."]:
    """`beta * KL(first || m) + (1 - beta) * KL(second || m)` in nats, of log-probabilities.

    Args:
        first: Log-probabilities in nats.
        second: Others of the same classes.
        beta: Share of the first in the mixture `m`, in (0, 1).
    """
    middle = mixture(first, second, beta)
    return beta * divergence(first, middle) + (1 - beta) * divergence(second, middle)


def kl_divergence(
    teacher_logits: Float[Tensor, "... vocab"],
    student_logits: Float[Tensor, "... vocab"],
    temperature: float = 1.0,
) -> Float32[Tensor, "..."]:
    """Returns KL(teacher || student) over the vocabulary at each position, in nats.

    Softened distributions have gradients smaller by the square of the temperature, so the result
    is multiplied by it (https://arxiv.org/abs/1503.02531).

    Args:
        teacher_logits: Finite logits of the model to imitate.
        student_logits: Finite logits of the model that imitates.
        temperature: Divides both logits, above 0; higher weighs unlikely tokens more.

    Raises:
        ValueError: The temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; 1 compares plain softmaxes")
    teacher = log_probabilities(teacher_logits.float(), temperature)
    student = log_probabilities(student_logits.float(), temperature)
    return divergence(teacher, student) * temperature**2


def token_nll(
    logits: Float[Tensor, "... vocab"], targets: Int64[Tensor, "..."]
) -> Float32[Tensor, "..."]:
    """Returns the negative log-likelihood of each target token, in nats.

    Args:
        logits: Logits that predict the target at the same position.
        targets: Token ids; -100, the mark of transformers for padding, gives zero.
    """
    flat = logits.float().reshape(-1, logits.shape[-1])
    return cross_entropy(flat, targets.reshape(-1), reduction="none").view(targets.shape)
