"""Points, their distances, and partitions as sets: what tests of clusterers are made of."""

from collections.abc import Callable, Iterable
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import normalize

Partition = set[frozenset[int]]


def points(num_experts: int = 12, seed: int = 0) -> Tensor:
    """Normally distributed points in four dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_experts, 4, generator=generator, dtype=torch.float64)


def random_mass(num_experts: int = 12, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_experts, generator=generator, dtype=torch.float64)


def ones(num_experts: int) -> Tensor:
    return torch.ones(num_experts, dtype=torch.float64)


def distances(at: Tensor) -> Tensor:
    """Euclidean distances."""
    return torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")


def cosine_distances(at: Tensor) -> Tensor:
    """One minus the cosines."""
    gram = normalize(at) @ normalize(at).T
    return (1 - (gram + gram.T) / 2).clamp(min=0).fill_diagonal_(0)


def partition(labels: Iterable[int]) -> Partition:
    """Groups as sets of experts."""
    listed = list(labels)
    return {frozenset(i for i, x in enumerate(listed) if x == label) for label in listed}


def partitions(num_experts: int, num_groups: int) -> list[list[int]]:
    """Lists every partition into so many groups, numbered by first appearance."""
    found = [[0]]
    for _ in range(num_experts - 1):
        found = [[*labels, label] for labels in found for label in range(max(labels) + 2)]
    return [labels for labels in found if max(labels) + 1 == num_groups]


def greedy(
    num_experts: int, num_groups: int, cost: Callable[[list[int], list[int]], float]
) -> Partition:
    """Merges the cheapest two groups until few enough are left."""
    groups = [[expert] for expert in range(num_experts)]
    while len(groups) > num_groups:
        a, b = min(combinations(groups, 2), key=lambda pair: cost(*pair))
        groups = [group for group in groups if group not in (a, b)] + [a + b]
    return {frozenset(group) for group in groups}
