"""What a teacher says of the next token, in full or as its likeliest tokens and the rest's mass."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_smoe.functional.divergence import log_probabilities


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

    @abstractmethod
    def top(self, top_k: int, temperature: float) -> "TeacherTokens":
        """The likeliest tokens and the mass of all others; the whole where that is all of them.

        Args:
            top_k: How many tokens keep their names, 1 or more.
            temperature: What the distributions are taken at.

        Raises:
            ValueError: Fewer tokens have names, or the temperature is another.
        """


@dataclass(frozen=True, eq=False)
class FullTokens(TeacherTokens):
    """Distributions over the whole vocabulary: every token is a class.

    Args:
        logits: The teacher's logits.
    """

    logits: Float[Tensor, "tokens vocab"]

    def log_probs(self, temperature: float) -> Float[Tensor, "tokens classes"]:
        """Log-probabilities of all tokens, in float32 at least."""
        return log_probabilities(self.logits, temperature)

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

    The last class is the tail; there is none where every token is named. A bare top-K without it
    teaches a student to be surer than its teacher (https://arxiv.org/abs/2503.16870).

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

    def top(self, top_k: int, temperature: float) -> "TeacherTokens":
        """The likeliest of the named tokens; the others join the tail."""
        known, num_named = self.log_probs(temperature), self.indices.shape[-1]
        if top_k == num_named:
            return self
        if top_k > num_named:
            raise ValueError(
                f"top_k={top_k} tokens are wanted, but {num_named} of the teacher are known; "
                "lower top_k, or store more of the teacher"
            )
        places = known[:, :num_named].topk(top_k, dim=-1).indices
        return TopTokens(self.indices.gather(-1, places), with_tail(known, places), temperature)


@dataclass(frozen=True, eq=False)
class UnknownTokens(TeacherTokens):
    """Stands where no objective asks the teacher."""

    def log_probs(self, temperature: float) -> Float[Tensor, "tokens classes"]:
        """Refuses: there is no teacher."""
        raise ValueError("an objective that says it needs no teacher asked one")

    def classes_of(
        self, log_probs: Float[Tensor, "tokens vocab"]
    ) -> Float[Tensor, "tokens classes"]:
        """Every token is a class."""
        return log_probs

    def top(self, top_k: int, temperature: float) -> "TeacherTokens":
        """Knows no more of the likeliest tokens."""
        return self


def with_tail(
    log_probs: Float[Tensor, "tokens classes"], indices: Int[Tensor, "tokens top_k"]
) -> Float[Tensor, "tokens _"]:
    """Log-probabilities of named classes, and in the last column of all others together.

    Args:
        log_probs: Log-probabilities of all classes, in nats.
        indices: Different classes; where all are named, there is no last column.
    """
    places = indices.long()
    named = log_probs.gather(-1, places)
    if indices.shape[-1] == log_probs.shape[-1]:
        return named
    # Not one minus the rest: where the named tokens hold nearly all, nothing would be left of it.
    others = log_probs.scatter(-1, places, -torch.inf)
    return torch.cat([named, others.logsumexp(-1, keepdim=True)], dim=-1)
