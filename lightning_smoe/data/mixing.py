"""How often each domain is drawn in training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from lightning_smoe.data.choice import keyed_generator
from lightning_smoe.errors import InputError


def check_weights(weights: Mapping[str, float], domains: Sequence[str]) -> None:
    """Checks that each domain of the training text has a weight.

    Args:
        weights: `data.domain_weights`.
        domains: Names of the domains.

    Raises:
        InputError: A domain is missing or unknown, or a weight is no share.
    """
    if missing := [name for name in domains if name not in weights]:
        raise InputError(
            f"data.domain_weights leaves out {', '.join(missing)} -> give every domain of the "
            f"training text a weight, 0 for none of it"
        )
    if unknown := [name for name in weights if name not in domains]:
        raise InputError(
            f"data.domain_weights names {', '.join(unknown)}, which the training text does not "
            f"have -> it has: {', '.join(domains)}"
        )
    wrong = [
        name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)
    ]
    if wrong or not any(weights.values()):
        raise InputError(
            f"data.domain_weights={dict(weights)} -> write numbers of 0 or more, one above 0"
        )


@dataclass(frozen=True, eq=False)
class Mixture:
    """Windows drawn by domain, in proportion to weights.

    A domain's windows are drawn in random order without replacement, epoch after epoch; when
    they are used up, they are drawn again in another order. What an epoch draws follows from its
    number alone.

    Args:
        domain: Index of each window's domain.
        weights: Weight of each domain, 0 or more.
    """

    domain: Int64[Tensor, " batch"]
    weights: tuple[float, ...]

    def counts(self, total: int) -> list[int]:
        """Windows of each domain in an epoch: proportional, by largest remainders.

        Args:
            total: Windows of an epoch.
        """
        whole = math.fsum(self.weights)
        shares = [total * weight / whole for weight in self.weights]
        counts = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
        for index in by_remainder[: total - sum(counts)]:
            counts[index] += 1
        return counts

    def check(self, total: int, names: Sequence[str]) -> None:
        """Checks that each domain that has a weight is drawn.

        Args:
            total: Windows of an epoch.
            names: Names of the domains.

        Raises:
            InputError: One is not.
        """
        for name, weight, count in zip(names, self.weights, self.counts(total), strict=True):
            if weight > 0 and not count:
                raise InputError(
                    f"data.domain_weights gives {name!r} {weight:g}, which is none of the {total} "
                    f"sequences of an epoch -> raise it or set it to 0, or give more text"
                )

    def draw(self, epoch: int, total: int, seed: int) -> Int64[Tensor, " drawn"]:
        """Windows of an epoch, domain after domain.

        Args:
            epoch: Number of the epoch, from 0.
            total: Windows of an epoch.
            seed: Seed of the order.
        """
        parts = []
        for index, count in enumerate(self.counts(total)):
            mine = (self.domain == index).nonzero().squeeze(1)
            first = epoch * count
            rounds = range(first // len(mine), -(-(first + count) // len(mine)))
            orders = [
                mine[torch.randperm(len(mine), generator=keyed_generator(seed, "mix", index, k))]
                for k in rounds
            ]
            skipped = first % len(mine)
            parts.append(torch.cat([mine[:0], *orders])[skipped : skipped + count])
        return torch.cat(parts)
