"""Points found from distances lie at these distances."""

import pytest
import torch

from lightning_smoe.functional.scaling import classical_scaling, unit_vectors
from tests.functional.partitions import cosine_distances, distances, points


def test_classical_scaling_reproduces_distances_of_points() -> None:
    distance = distances(points())
    found = distances(classical_scaling(distance))
    torch.testing.assert_close(found, distance, rtol=0, atol=1e-7)


def test_classical_scaling_of_other_distances_is_finite() -> None:
    assert classical_scaling(distances(points()).square()).isfinite().all()


def test_unit_vectors_have_the_cosines_of_the_points() -> None:
    distance = cosine_distances(points())
    found = unit_vectors(distance)
    torch.testing.assert_close(cosine_distances(found), distance, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12, dtype=torch.float64))


def test_distances_above_two_have_no_cosine() -> None:
    with pytest.raises(ValueError, match="not one minus a cosine, which is 0 to 2"):
        unit_vectors(3 * (1 - torch.eye(3, dtype=torch.float64)))
