"""K-means against the best of all partitions."""

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.kmeans import KMeans, SphericalKMeans
from tests.functional.partitions import (
    cosine_distances,
    distances,
    ones,
    partition,
    partitions,
    points,
)


def spread(at: Tensor, labels: list[int]) -> float:
    """Squared distance of every point to the mean of its group."""
    groups = [at[list(group)] for group in partition(labels)]
    return sum(float((group - group.mean(0)).square().sum()) for group in groups)


def alignment(at: Tensor, labels: list[int]) -> float:
    """Cosine of every point and the center of its group, which is the sum of unit vectors."""
    total = 0.0
    for group in partition(labels):
        directions = [at[expert] / at[expert].norm() for expert in group]
        center = torch.stack(directions).sum(0)
        total += sum(float(direction @ center / center.norm()) for direction in directions)
    return total


@pytest.mark.parametrize("num_groups", [2, 3])
def test_kmeans_finds_the_tightest_of_all_partitions(num_groups: int) -> None:
    at = points(7)
    found = KMeans(num_starts=50)(distances(at), ones(7), num_groups).tolist()
    best = min(spread(at, labels) for labels in partitions(7, num_groups))
    assert spread(at, found) == pytest.approx(best)


def test_kmeans_on_similarity_rows_finds_the_tightest_groups_of_rows() -> None:
    similarity = 1 - cosine_distances(points(7))
    clusterer = KMeans(num_starts=50, points="similarity_rows")
    found = clusterer(1 - similarity, ones(7), 3).tolist()
    best = min(spread(similarity, labels) for labels in partitions(7, 3))
    assert spread(similarity, found) == pytest.approx(best)


@pytest.mark.parametrize("num_groups", [2, 3])
def test_spherical_kmeans_finds_the_best_aligned_of_all_partitions(num_groups: int) -> None:
    at = points(7)
    found = SphericalKMeans(num_starts=50)(cosine_distances(at), ones(7), num_groups).tolist()
    best = max(alignment(at, labels) for labels in partitions(7, num_groups))
    assert alignment(at, found) == pytest.approx(best)


def test_spherical_kmeans_does_not_see_scale() -> None:
    at = points(12)
    scaled = at * torch.arange(1, 13, dtype=torch.float64).unsqueeze(1)
    first = SphericalKMeans()(cosine_distances(at), ones(12), 5)
    assert torch.equal(first, SphericalKMeans()(cosine_distances(scaled), ones(12), 5))


def test_spherical_kmeans_refuses_what_is_no_cosine() -> None:
    with pytest.raises(ValueError, match=r"a distance of 4\.\d+ is not one minus a cosine"):
        SphericalKMeans()(distances(points()), ones(12), 5)


@pytest.mark.parametrize("kind", [KMeans, SphericalKMeans])
def test_the_same_seed_gives_the_same_groups(kind: type[KMeans | SphericalKMeans]) -> None:
    distance = cosine_distances(points(20))
    first = kind(num_starts=1, seed=3)(distance, ones(20), 7)
    assert torch.equal(first, kind(num_starts=1, seed=3)(distance, ones(20), 7))


@pytest.mark.parametrize("kind", [KMeans, SphericalKMeans])
def test_no_starts_are_refused(kind: type[KMeans | SphericalKMeans]) -> None:
    with pytest.raises(ValueError, match="num_starts=0 tries nothing"):
        kind(num_starts=0)
