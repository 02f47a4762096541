"""What a teacher says of the next token, in full or as its likeliest tokens and the rest's mass."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax


class TeacherTokens(ABC):
    """A teacher's next-token distributions at some positions, over classes of tokens.

    A class is one token of the vocabulary, or all tokens that are not among a few named ones.
    """

    @abstractmethod
    def log_probs(self, temperature: float) -> Float[Tensor, "tokens classes"]:
        """Log-probabilities of the classes, in nats.

        Args:
            temperature: Divides the logits before the softmax, above 0.

        Raises:
            ValueError: The distributions are known at another temperature only.
        """

    @abstractmethod
    def classes_of(
        self, log_probs: Float[Tensor, "tokens vocab"]
    ) -> Float[Tensor, "tokens classes"]:
        """Another model's log-probabilities of the same classes; keeps gradients."""


@dataclass(frozen=True, eq=False)
class FullTokens(TeacherTokens):
    """Distributions over the whole vocabulary: every token is a class.

    Args:
        logits: The teacher's logits.
    """

    logits: Float[Tensor, "tokens vocab"]

    def log_probs(self, temperature: float) -> Float[Tensor, "tokens classes"]:
        """Log-probabilities of all tokens, in float32."""
        return log_softmax(self.logits.float() / temperature, dim=-1)

    def classes_of(
        self, log_probs: Float[Tensor, "tokens vocab"]
    ) -> Float[Tensor, "tokens classes"]:
        """The same log-probabilities."""
        return log_probs

    def top(self, top_k: int, temperature: float) -> "TeacherTokens":
        """The likeliest tokens and the mass of all others; the whole where that is all of them."""
        if top_k >= self.logits.shape[-1]:
            return self
        log_probs = self.log_probs(temperature)
        indices = log_probs.topk(top_k, dim=-1).indices
        return TopTokens(indices, with_tail(log_probs, indices), temperature)


@dataclass(frozen=True, eq=False)
class TopTokens(TeacherTokens):
    """Distributions over a few named tokens and one class for all others.

    The last class is the tail. A bare top-K without it teaches a student to be surer than its
    teacher (https://arxiv.org/abs/2503.16870).

    Args:
        indices: The named tokens.
        known: Log-probabilities of the named tokens, then of the tail.
        temperature: What they were taken at.
    """

    indices: Int[Tensor, "tokens top_k"]
    known: Float[Tensor, "tokens classes"]
    temperature: float

    def log_probs(self, temperature: float) -> Float[Tensor, "tokens classes"]:
        """Log-probabilities of the named tokens and of the tail."""
        if temperature != self.temperature:
            raise ValueError(
                f"the teacher's distributions are known at temperature {self.temperature}, not "
                f"{temperature}; use the same, or ask the teacher itself"
            )
        return self.known

    def classes_of(
        self, log_probs: Float[Tensor, "tokens vocab"]
    ) -> Float[Tensor, "tokens classes"]:
        """Log-probabilities of the named tokens and of all others together."""
        return with_tail(log_probs, self.indices)


def with_tail(
    log_probs: Float[Tensor, "tokens vocab"], indices: Int[Tensor, "tokens top_k"]
) -> Float[Tensor, "tokens classes"]:
    """Log-probabilities of named tokens, and in the last column of all others together.

    Args:
        log_probs: Log-probabilities of the whole vocabulary, in nats.
        indices: Different tokens, fewer than there are.
    """
    named = log_probs.gather(-1, indices)
    # Not one minus the rest: where the named tokens hold nearly all, nothing would be left of it.
    others = log_probs.scatter(-1, indices, -torch.inf)
    return torch.cat([named, others.logsumexp(-1, keepdim=True)], dim=-1)
