"""Drop an expert or merge it with another, whichever the layer can make up for."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from lightning_smoe.compression.recipe import Assignment, Execution, Recipe
from lightning_smoe.functional.absorption import Absorber
from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.matching import cheapest_sets
from lightning_smoe.functional.merging import Merger
from lightning_smoe.functional.pooled_matching import slot_costs
from lightning_smoe.functional.pooling import NeuronPool
from lightning_smoe.functional.refit import Refit, check_strength
from lightning_smoe.functional.router import LogSumExp, RouterRepair


@dataclass(frozen=True)
class Hybrid(Recipe):
    """Drops some experts and merges some pairs, by the error that is left after the joint refit.

    Each drop and each merge with a likely partner, those that pooling loses least with, has a
    price: the squared error that a ridge refit of the other experts could not make up for, on few
    tokens, each left out of its own fit (`functional.absorption.Absorber`). As many are carried out
    as slots must go, no expert in two of them, of least summed price, exactly. No published source.

    Prices of merges take the exact sum of the members' routing weights, which the router comes
    close to only as far as one row can; prices of drops let no other expert take the place. Prices
    are of one change alone and are added up. On the shipped model, drops alone by these prices lose
    less than both kinds, and REAP with the refit (configs/recipe/stock.yaml) less than either.

    Args:
        num_partners: Partners that each expert is tried with, at least 0; with none, only drops.
        num_tokens: Sampled tokens that prices are made on, at least 2. Memory is 8 bytes times its
            square, and time grows with it too.
        strength: Shrinkage of the refit that is priced, relative to the mean energy of a feature,
            at least 1e-6.
        merger: How two experts become one.
        router: How the router's rows follow; it must be able to lose rows.
        refit: Closed-form refit of what is kept and the shared expert.
        protect: Keep super experts as they are.
    """

    num_partners: int = 4
    num_tokens: int = 1024
    strength: float = 0.1
    merger: Merger = NeuronPool()
    router: RouterRepair = LogSumExp()
    refit: Refit = Refit()
    protect: bool = True

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.num_partners < 0:
            raise ValueError(f"num_partners={self.num_partners} is below 0; give 0 or more")
        if self.num_tokens < 2:
            raise ValueError(f"num_tokens={self.num_tokens} leaves nothing to fit; give 2 or more")
        if self.router.keeps_all_rows:
            raise ValueError(
                f"Hybrid drops experts, but under the router {type(self.router).__name__} every "
                "row needs a slot; take lightning_smoe.functional.router.LogSumExp, or the recipe "
                "Merge, which drops none"
            )

    def __call__(
        self, evidence: Evidence, num_groups: int, single: Bool[Tensor, " experts"]
    ) -> tuple[Assignment, Float64[Tensor, " experts"]]:
        number, device = evidence.num_experts, evidence.gates.device
        slot_of = torch.arange(number, device=device)
        shares = torch.ones(number, dtype=torch.float64, device=device)
        if num_groups < number:
            # Where more experts are to stay alone than there are slots for, none is.
            alone = single if int(single.sum()) <= num_groups else torch.zeros_like(single)
            free = (~alone).nonzero().squeeze(1).tolist()
            changes, prices = self._priced(evidence, free)
            for place in cheapest_sets(changes, prices, number - num_groups):
                heir, *gone = changes[place]
                # Of a pair, the second joins the first; an expert on its own goes.
                slot_of[gone or [heir]] = heir if gone else -1
        return _numbered(slot_of), shares

    def _priced(
        self, evidence: Evidence, free: list[int]
    ) -> tuple[list[tuple[int, ...]], list[float]]:
        absorber = Absorber.of(evidence, self.num_tokens, self.strength)
        pairs = likely_pairs(absorber.evidence, free, self.num_partners)
        prices = [absorber.price(absorber.drop(expert)) for expert in free]
        prices += [absorber.price(absorber.merge(pair, self.merger)) for pair in pairs]
        return [*((expert,) for expert in free), *pairs], prices

    @property
    def execution(self) -> Execution:
        """As set; neurons are not aligned before they are pooled."""
        return Execution(self.router, self.merger, None, self.refit)

    @property
    def protects_super_experts(self) -> bool:
        """As set."""
        return self.protect


def likely_pairs(
    evidence: Evidence, experts: list[int], num_partners: int
) -> list[tuple[int, int]]:
    """Pairs of each expert and the few partners that pooling loses least with, lower first."""
    partners = min(num_partners, len(experts) - 1)
    if partners < 1:
        return []
    apart = [[place] for place in range(len(experts))]
    cost = slot_costs(evidence, experts, evidence.gates[:, experts], apart)
    cost.fill_diagonal_(torch.inf)
    nearest = cost.topk(partners, largest=False).indices.tolist()
    found = {
        (min(one, experts[other]), max(one, experts[other]))
        for one, others in zip(experts, nearest, strict=True)
        for other in others
    }
    return sorted(found)


def _numbered(slot_of: Assignment) -> Assignment:
    """Numbers the slots that are there, in order; -1 stays."""
    kept = sorted(set(slot_of.tolist()) - {-1})
    place = {-1: -1, **{slot: number for number, slot in enumerate(kept)}}
    return torch.tensor([place[slot] for slot in slot_of.tolist()], device=slot_of.device)
