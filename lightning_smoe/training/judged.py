"""What a validation finds: KL to the teacher and perplexity, domain by domain."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_smoe.errors import InputError
from lightning_smoe.training.objectives import CrossEntropy, ForwardKL

# What is taken at each position.
JUDGED = (ForwardKL(), CrossEntropy())


class DomainSums:
    """KL, negative log-likelihood and tokens of each domain, added up.

    Args:
        domains: Names of the domains, by number.
        device: Where they are added up.
    """

    def __init__(self, domains: Sequence[str], device: torch.device) -> None:
        self._domains = domains
        shape = (len(JUDGED) + 1, len(domains))
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(
        self, values: Float[Tensor, "objectives tokens"], domain: Int[Tensor, " tokens"]
    ) -> None:
        """Adds what was found at some positions."""
        ones = torch.ones_like(values[:1])
        self._sums.index_add_(1, domain, torch.cat([values, ones]).double())

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Means over tokens, over domains and, if there are several, of each, under their names.

        Args:
            reduce: Sums over all processes.

        Raises:
            InputError: A domain has no token to predict.
        """
        kl, nll, tokens = reduce(self._sums)
        for domain in [d for d, n in zip(self._domains, tokens.tolist(), strict=True) if not n]:
            raise InputError(
                f"the validation text of {domain} has no token to predict; give it longer "
                "documents, or leave the domain out of data.domains"
            )
        kl, nll = kl / tokens, nll / tokens
        found = {"kl": kl.mean().float(), "perplexity": nll.mean().exp().float()}
        if len(self._domains) > 1:
            for number, domain in enumerate(self._domains):
                found[f"kl/{domain}"] = kl[number].float()
                found[f"perplexity/{domain}"] = nll[number].exp().float()
        return found
