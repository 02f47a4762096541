"""What a student is trained for, on the distributions of the next token."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import nll_loss

from lightning_smoe.functional.divergence import (
    divergence,
    jensen_shannon,
    log_probabilities,
    mixture,
)
from lightning_smoe.functional.targets import TeacherTokens
from lightning_smoe.training.objective_names import logged_name


def check_positive(**values: float | int) -> None:
    """Checks hyper-parameters.

    Raises:
        ValueError: One is not above 0.
    """
    wrong = {name: value for name, value in values.items() if not 0 < value < math.inf}
    if wrong:
        raise ValueError(f"{' and '.join(values)} must be above 0, and there is {wrong}")


class TokenObjective(ABC):
    """A loss on next-token distributions; subclasses are frozen dataclasses with a `weight`."""

    weight: float
    # What both models' logits are divided by; a field of those that have a choice.
    temperature: float = 1.0

    @property
    def name(self) -> str:
        """What it is called in logs."""
        return logged_name(type(self))

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with the teacher."""
        return True

    @abstractmethod
    def __call__(
        self,
        teacher: TeacherTokens,
        student_logits: Float[Tensor, "tokens vocab"],
        targets: Int64[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        """The loss at each position, in nats, with gradients towards the student's logits.

        Args:
            teacher: What the teacher says at the positions.
            student_logits: What the student says.
            targets: The tokens that follow in the text.
        """


def _both(
    teacher: TeacherTokens, student_logits: Float[Tensor, "tokens vocab"], temperature: float
) -> tuple[Float[Tensor, "tokens classes"], Float[Tensor, "tokens classes"]]:
    """Log-probabilities of the teacher's classes: the teacher's, and the student's."""
    found = teacher.classes_of(log_probabilities(student_logits, temperature))
    return teacher.log_probs(temperature), found


@dataclass(frozen=True)
class CrossEntropy(TokenObjective):
    """Negative log-likelihood of the text; it needs no teacher.

    Args:
        weight: Factor in the sum of objectives, above 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_positive(weight=self.weight)

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with the teacher: it does not."""
        return False

    def __call__(
        self,
        teacher: TeacherTokens,
        student_logits: Float[Tensor, "tokens vocab"],
        targets: Int64[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        return nll_loss(log_probabilities(student_logits), targets, reduction="none")


@dataclass(frozen=True)
class ForwardKL(TokenObjective):
    """KL(teacher || student), times the squared temperature (https://arxiv.org/abs/1503.02531).

    Args:
        weight: Factor in the sum of objectives, above 0.
        temperature: Divides both models' logits, above 0; higher weighs unlikely tokens more.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(weight=self.weight, temperature=self.temperature)

    def __call__(
        self,
        teacher: TeacherTokens,
        student_logits: Float[Tensor, "tokens vocab"],
        targets: Int64[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        wanted, found = _both(teacher, student_logits, self.temperature)
        return divergence(wanted, found) * self.temperature**2


@dataclass(frozen=True)
class ReverseKL(TokenObjective):
    """KL(student || teacher), times the squared temperature (https://arxiv.org/abs/2306.08543).

    It makes a student surer than its teacher.

    Args:
        weight: Factor in the sum of objectives, above 0.
        temperature: Divides both models' logits, above 0.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(weight=self.weight, temperature=self.temperature)

    def __call__(
        self,
        teacher: TeacherTokens,
        student_logits: Float[Tensor, "tokens vocab"],
        targets: Int64[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        wanted, found = _both(teacher, student_logits, self.temperature)
        return divergence(found, wanted) * self.temperature**2


@dataclass(frozen=True)
class JensenShannon(TokenObjective):
    """Generalised Jensen-Shannon divergence of GKD (https://arxiv.org/abs/2306.13649).

    `beta * KL(p || m) + (1 - beta) * KL(q || m)`, `m = beta * p + (1 - beta) * q`, with the
    teacher's p and the student's q; times the squared temperature.

    Args:
        weight: Factor in the sum of objectives, above 0.
        beta: The teacher's share in the mixture, in (0, 1); near 0 like forward KL, near 1 like
            reverse KL, each times what is near 0.
        temperature: Divides both models' logits, above 0.
    """

    weight: float = 1.0
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(weight=self.weight, temperature=self.temperature)
        if not 0 < self.beta < 1:
            raise ValueError(f"beta={self.beta} must lie between 0 and 1; use a KL for either end")

    def __call__(
        self,
        teacher: TeacherTokens,
        student_logits: Float[Tensor, "tokens vocab"],
        targets: Int64[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        wanted, found = _both(teacher, student_logits, self.temperature)
        return jensen_shannon(wanted, found, self.beta) * self.temperature**2


@dataclass(frozen=True)
class SkewedKL(TokenObjective):
    """Skewed KL of DistiLLM (https://arxiv.org/abs/2402.03898), times the squared temperature.

    Forward: `KL(p || skew * p + (1 - skew) * q)`; reverse: `KL(q || skew * q + (1 - skew) * p)`,
    with the teacher's p and the student's q.

    Args:
        weight: Factor in the sum of objectives, above 0.
        skew: Share of the first distribution in the second, in (0, 1).
        direction: Which distribution comes first: the teacher's (forward) or the student's.
        temperature: Divides both models' logits, above 0.
    """

    weight: float = 1.0
    skew: float = 0.1
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(weight=self.weight, temperature=self.temperature)
        if not 0 < self.skew < 1:
            raise ValueError(f"skew={self.skew} must lie between 0 and 1; at 0 use a KL")

    def __call__(
        self,
        teacher: TeacherTokens,
        student_logits: Float[Tensor, "tokens vocab"],
        targets: Int64[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        first, second = _both(teacher, student_logits, self.temperature)
        if self.direction == "reverse":
            first, second = second, first
        return divergence(first, mixture(first, second, self.skew)) * self.temperature**2


@dataclass(frozen=True)
class TopKKL(TokenObjective):
    """KL(teacher || student) on the teacher's likeliest tokens and one class for all others.

    Never above the full divergence, and equal to it where top_k is the vocabulary; without the tail
    it would be biased (https://arxiv.org/abs/2503.16870). Times the squared temperature.

    Args:
        weight: Factor in the sum of objectives, above 0.
        top_k: Tokens that are told apart, 1 or more.
        temperature: Divides both models' logits, above 0.
    """

    weight: float = 1.0
    top_k: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(weight=self.weight, top_k=self.top_k, temperature=self.temperature)

    def __call__(
        self,
        teacher: TeacherTokens,
        student_logits: Float[Tensor, "tokens vocab"],
        targets: Int64[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        coarse = teacher.top(self.top_k, self.temperature)
        wanted, found = _both(coarse, student_logits, self.temperature)
        return divergence(wanted, found) * self.temperature**2
