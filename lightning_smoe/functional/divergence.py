"""How far a student's predictions are from a teacher's, and from the text, token by token."""

from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax


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
    teacher = log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = log_softmax(student_logits.float() / temperature, dim=-1)
    pointwise = kl_div(student, teacher, reduction="none", log_target=True)
    return pointwise.sum(-1) * temperature**2


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
