"""What a compressed model kept of the original, token by token on held-out text."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.data.positions import counted_positions
from lightning_smoe.errors import InputError
from lightning_smoe.functional.divergence import kl_divergence, token_nll
from lightning_smoe.models.head import model_inputs


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
        """Makes empty sums: nats, KL, agreements and tokens of each domain."""
        self._sums: Float64[Tensor, "4 domains"] = torch.zeros(
            4, len(self._domains), dtype=torch.float64, device=self.device
        )

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds up one batch, at every position whose next token is to be learned."""
        inputs = model_inputs(batch)
        wanted = self._teacher(**inputs, use_cache=False).logits[:, :-1]
        found = wanted
        if self.model is not self._teacher:
            found = self.model(**inputs, use_cache=False).logits[:, :-1]
        counted = counted_positions(batch)[:, :-1]
        values = torch.stack(
            [
                token_nll(found, batch["input_ids"][:, 1:]),
                kl_divergence(wanted, found),
                (wanted.argmax(-1) == found.argmax(-1)).float(),
                torch.ones_like(counted, dtype=torch.float32),
            ]
        )
        by_sequence = torch.where(counted, values.double(), 0.0).sum(-1)
        self._sums.index_add_(1, batch["domain"], by_sequence)

    def on_test_epoch_end(self) -> None:
        """Adds up all processes.

        Raises:
            InputError: A domain has no token to predict.
        """
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum").cpu()
        nll, kl, agreements, tokens = sums
        empty = [d for d, number in zip(self._domains, tokens.tolist(), strict=True) if not number]
        if empty:
            raise InputError(
                f"the text of {', '.join(empty)} has no token that follows another; give longer "
                "documents, or leave the domain out of data.domains"
            )
        self.quality = Quality(
            dict(zip(self._domains, (nll / tokens).tolist(), strict=True)),
            dict(zip(self._domains, (kl / tokens).tolist(), strict=True)),
            (agreements.sum() / tokens.sum()).item(),
        )
