"""Which experts of a layer share a slot: the ways to decide it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from lightning_smoe.functional.clustering import Clusterer, GateMassWard
from lightning_smoe.functional.distance import Distance, Output
from lightning_smoe.functional.evidence import Evidence
from lightning_smoe.functional.group_sizes import GroupSizes, fit_group_sizes
from lightning_smoe.functional.partition import check_num_groups
from lightning_smoe.functional.saliency import GateMass, Saliency


class Grouper(ABC):
    """Partition of the experts of one layer into a given number of groups."""

    @abstractmethod
    def __call__(self, evidence: Evidence, num_groups: int) -> Int64[Tensor, " experts"]:
        """Assigns every expert to a group.

        Args:
            evidence: All that is known of the layer.
            num_groups: Number of groups, from 1 to the number of experts.

        Returns:
            Group of each expert; groups are numbered by first appearance and none is empty.

        Raises:
            ValueError: There cannot be that many groups, or none that keep to the limits set.
        """


@dataclass(frozen=True)
class Clustered(Grouper):
    """Groups by a clustering of distances, if need be of limited or of equal size.

    Groups that break a limit are reassigned around their medoids, whatever clusterer they come from
    (see `fit_group_sizes`).

    Args:
        distance: How far two experts are apart.
        clusterer: How groups follow from distances.
        mass: Weight of each expert, for clusterers that look at it.
        max_group_size: Most experts of one group, at least 1; none sets no limit.
        equal_sizes: Whether sizes differ by at most one, as expert parallelism likes them.
    """

    distance: Distance = Output()
    clusterer: Clusterer = GateMassWard()
    mass: Saliency = GateMass()
    max_group_size: int | None = None
    equal_sizes: bool = False

    def __post_init__(self) -> None:
        if self.max_group_size is not None and self.max_group_size < 1:
            raise ValueError(
                f"max_group_size={self.max_group_size} leaves no room for an expert; take 1 or more"
            )

    def __call__(self, evidence: Evidence, num_groups: int) -> Int64[Tensor, " experts"]:
        # Before any expert is run.
        sizes = self._sizes(evidence.num_experts, num_groups)
        distance = self.distance(evidence)
        labels = self.clusterer(distance, self.mass(evidence), num_groups)
        return fit_group_sizes(labels, distance, sizes)

    def _sizes(self, num_experts: int, num_groups: int) -> GroupSizes:
        check_num_groups(num_groups, num_experts)
        largest = num_experts if self.max_group_size is None else self.max_group_size
        if largest * num_groups < num_experts:
            raise ValueError(
                f"max_group_size={largest} leaves no room for {num_experts} experts in "
                f"{num_groups} groups; raise it to {-(-num_experts // num_groups)} or more"
            )
        if self.equal_sizes:
            return GroupSizes.equal(num_experts, num_groups)
        return GroupSizes(1, largest)
