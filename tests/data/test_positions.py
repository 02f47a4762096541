"""Which positions count, against a loop over tokens."""

import torch

from lightning_smoe.data.positions import counted_positions, flat_positions, next_tokens
from tests.training.token_batches import batch


def test_a_position_counts_if_the_next_token_is_to_be_learned() -> None:
    found = batch()
    found["valid"][2] = False
    counted = counted_positions(found)
    for row in range(3):
        for place in range(12):
            follows = place + 1 < (8 if row == 1 else 12)
            is_learned = place + 1 >= 3 if row == 0 else row == 1
            assert bool(counted[row, place]) == (follows and is_learned)


def test_the_first_token_of_an_isolated_document_is_not_predicted() -> None:
    found = batch()
    starts = [0, 4, 9]
    positions = [place - max(s for s in starts if s <= place) for place in range(12)]
    found["position_ids"] = torch.tensor(positions).expand(3, -1)
    counted = counted_positions(found)
    assert [place for place in range(12) if not counted[2, place]] == [3, 8, 11]


def test_targets_are_the_tokens_behind_counted_positions() -> None:
    found = batch()
    counted = counted_positions(found)
    wanted = [
        int(found["input_ids"][row, place + 1])
        for row in range(3)
        for place in range(12)
        if counted[row, place]
    ]
    assert next_tokens(found, flat_positions(counted)).tolist() == wanted


def test_where_nothing_counts_there_are_no_targets() -> None:
    found = batch()
    found["valid"][:] = False
    assert next_tokens(found, flat_positions(counted_positions(found))).tolist() == []
