"""How often each domain is drawn."""

from collections import Counter

import pytest
import torch

from lightning_smoe.data.mixing import Mixture, check_weights
from lightning_smoe.errors import InputError

DOMAIN = torch.tensor([0] * 6 + [1] * 3 + [2])


def test_domains_are_drawn_in_proportion() -> None:
    drawn = Mixture(DOMAIN, (1.0, 3.0, 0.0)).draw(0, 20, seed=1)
    assert DOMAIN[drawn].bincount(minlength=3).tolist() == [5, 15, 0]


@pytest.mark.parametrize("total", [1, 7, 10, 33])
def test_counts_are_within_one_of_their_share_and_add_up(total: int) -> None:
    counts = Mixture(DOMAIN, (0.2, 0.5, 0.3)).counts(total)
    assert sum(counts) == total
    for count, weight in zip(counts, (0.2, 0.5, 0.3), strict=True):
        assert abs(count - total * weight) < 1


def test_a_domain_is_drawn_again_only_when_it_is_used_up() -> None:
    mixture = Mixture(DOMAIN, (2.0, 2.0, 1.0))
    epochs = [mixture.draw(epoch, 10, seed=1).tolist() for epoch in range(6)]
    for windows in (range(6), range(6, 9), range(9, 10)):
        sequence = [window for epoch in epochs for window in epoch if window in windows]
        size = len(windows)
        assert all(
            sorted(sequence[start : start + size]) == [*windows]
            for start in range(0, len(sequence) // size * size, size)
        )
    seen = Counter(window for epoch in epochs for window in epoch)
    assert seen[9] == 12
    assert {seen[window] for window in range(6)} == {4}


def test_an_epoch_follows_from_its_number_and_the_seed() -> None:
    def draw(epoch: int, seed: int) -> tuple[int, ...]:
        return tuple(Mixture(DOMAIN, (1.0, 1.0, 0.0)).draw(epoch, 10, seed).tolist())

    assert draw(3, 1) == draw(3, 1)
    assert len({draw(0, 1), draw(1, 1), draw(0, 2)}) == 3


def test_a_weight_that_draws_nothing_is_refused() -> None:
    mixture = Mixture(DOMAIN, (1.0, 0.0, 0.001))
    with pytest.raises(InputError, match=r"gives 'c' 0\.001, which is none of the 10 sequences"):
        mixture.check(10, ("a", "b", "c"))
    mixture.check(1000, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "leaves out b -> give every domain"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "names c, which the training text does not have"),
        ({"a": 1.0, "b": -1.0}, "-> write numbers of 0 or more"),
        ({"a": 1.0, "b": float("nan")}, "-> write numbers of 0 or more"),
        ({"a": 0.0, "b": 0.0}, "-> write numbers of 0 or more, one above 0"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_weights(weights, ("a", "b"))
