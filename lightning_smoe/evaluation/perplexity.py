"""What a compressed model kept of the original, token by token on held-out text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.data.positions import counted_positions
from lightning_smoe.errors import InputError
from lightning_smoe.functional.chunked import chunk_size_of, chunks
from lightning_smoe.functional.divergence import kl_divergence, token_nll
from lightning_smoe.models.head import final_states, logits_of, vocab_size_of


@dataclass(frozen=True)
class Quality:
    """Quality of a model on held-out text.

    Args:
        nll: Negative log-likelihood of each domain, in nats a token.
        kl: KL(teacher || model) of each domain, in nats a token.
        top1_agreement: Fraction of tokens where the likeliest next token is the teacher's.
    """

    nll: dict[str, float]
    kl: dict[str, float]
    top1_agreement: float
    perplexity: float = field(init=False)
    mean_kl: float = field(init=False)

    def __post_init__(self) -> None:
        mean_nll = sum(self.nll.values()) / len(self.nll)
        object.__setattr__(self, "perplexity", _exp(mean_nll))
        object.__setattr__(self, "mean_kl", sum(self.kl.values()) / len(self.kl))

    def to_json(self) -> dict[str, Any]:
        """Returns the quality as it stands in report.json."""
        domains = {name: _exp(nll) for name, nll in self.nll.items()}
        return {
            "perplexity": {"mean": self.perplexity, "domains": domains},
            "kl": {"mean": self.mean_kl, "domains": self.kl},
            "top1_agreement": self.top1_agreement,
        }


def _exp(nats: float) -> float:
    # Infinite for a hopeless model, where math.exp raises.
    return torch.tensor(nats, dtype=torch.float64).exp().item()


class EvaluationModule(LightningModule):
    """Compares a model with its teacher under the test loop.

    Args:
        model: The model to judge.
        teacher: The original; the model itself when it is judged alone.
        domains: Names of the domains, by number.
    """

    _teacher: PreTrainedModel

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel, domains: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.model = model
        # Not a sub-module: a model judged against itself would be there twice.
        object.__setattr__(self, "_teacher", teacher)
        self._domains = domains

    def setup(self, stage: str) -> None:
        """Moves the teacher to the device of the model."""
        self._teacher.to(self.trainer.strategy.root_device)  # type: ignore[arg-type]  # transformers 5.23

    def on_test_start(self) -> None:
        """Makes empty sums."""
        self._sums = DomainSums(self._domains, self.device)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds up one batch, at every position whose next token is to be learned."""
        wanted = found = final_states(self._teacher, batch)
        if self.model is not self._teacher:
            found = final_states(self.model, batch)
        self._sums.add(batch, (self._teacher, wanted), (self.model, found))

    def on_test_epoch_end(self) -> None:
        """Adds up all processes.

        Raises:
            InputError: A domain has no token to predict.
        """
        self.quality = self._sums.quality(self.trainer.strategy)


class DomainSums:
    """Sums over tokens by domain: nats, KL, agreements and tokens.

    Args:
        domains: Names of the domains, by number.
        device: Where the sums are kept.
    """

    def __init__(self, domains: tuple[str, ...], device: torch.device) -> None:
        self._domains = domains
        self._sums: Float64[Tensor, "4 domains"] = torch.zeros(
            4, len(domains), dtype=torch.float64, device=device
        )

    def add(
        self,
        batch: Mapping[str, Tensor],
        teacher: tuple[PreTrainedModel, Float[Tensor, "batch sequence hidden"]],
        student: tuple[PreTrainedModel, Float[Tensor, "batch sequence hidden"]],
    ) -> None:
        """Adds a batch up, a piece of the vocabulary-wide logits at a time.

        Args:
            batch: The text.
            teacher: The original, of which the head is used, and its final hidden states.
            student: The same of the model to judge.
        """
        counted = counted_positions(batch)[:, :-1]
        domain = batch["domain"][:, None].expand_as(counted)[counted]
        target = batch["input_ids"][:, 1:][counted]
        (original, wanted), (model, found) = teacher, student
        wanted, found = wanted[:, :-1][counted], found[:, :-1][counted]
        for piece in chunks(len(target), chunk_size_of(vocab_size_of(original))):
            logits = logits_of(original, wanted[piece])
            ours = logits if found is wanted else logits_of(model, found[piece])
            values = [
                token_nll(ours, target[piece]),
                kl_divergence(logits, ours),
                (logits.argmax(-1) == ours.argmax(-1)).float(),
                torch.ones_like(target[piece], dtype=torch.float32),
            ]
            self._sums.index_add_(1, domain[piece], torch.stack(values).double())

    def quality(self, strategy: Strategy) -> Quality:
        """What all processes found together.

        Raises:
            InputError: A domain has no token to predict.
        """
        nll, kl, agreements, tokens = strategy.reduce(self._sums, reduce_op="sum").cpu()
        empty = [d for d, number in zip(self._domains, tokens.tolist(), strict=True) if not number]
        if empty:
            raise InputError(
                f"the text of {', '.join(empty)} has no token that follows another; give longer "
                "documents, or leave the domain out of data.domains"
            )
        return Quality(
            dict(zip(self._domains, (nll / tokens).tolist(), strict=True)),
            dict(zip(self._domains, (kl / tokens).tolist(), strict=True)),
            (agreements.sum() / tokens.sum()).item(),
        )
