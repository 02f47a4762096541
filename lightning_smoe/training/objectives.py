"""What a student is trained for, on the distributions of the next token."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lightning_smoe.functional.targets import TeacherTokens


class TokenObjective(ABC):
    """A loss on next-token distributions; subclasses are frozen dataclasses with a `weight`."""

    weight: float

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
        if not self.weight > 0 or not self.temperature > 0:
            raise ValueError("weight and temperature must be above 0")

    def __call__(
        self,
        teacher: TeacherTokens,
        student_logits: Float[Tensor, "tokens vocab"],
        targets: Int64[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        """The divergence at each position."""
        found = log_softmax(student_logits.float() / self.temperature, dim=-1)
        wanted = teacher.log_probs(self.temperature)
        pointwise = kl_div(teacher.classes_of(found), wanted, reduction="none", log_target=True)
        return pointwise.sum(-1) * self.temperature**2
