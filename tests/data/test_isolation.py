"""Packed rows do not see each other, in real models."""

import pytest
import torch
from torch import Tensor

from lightning_smoe.data.packing import load_tokenizer
from lightning_smoe.data.row_packing import window_rows
from lightning_smoe.data.rows import Completion
from tests.data.test_packing import CHECKPOINT
from tests.families import FAMILIES, build

ROWS = [Completion(f"Sort {n} 3 1: " * (1 + n % 3), f"1 3 {n}") for n in range(5)]
VOCAB_SIZE = 4096
# Logits are of order 1 and sums of float32 differ by the order of their terms.
TOLERANCE = 1e-5
# transformers 5.23 makes its masks without looking at positions.
LEAKING = "gpt_oss"


def differences(family: str) -> list[float]:
    """How far the logits of each packed row are from those of the row alone."""
    model = build(family, vocab_size=VOCAB_SIZE)
    tokenizer = load_tokenizer(CHECKPOINT)
    packed = window_rows(ROWS, tokenizer, 96, domain="a").tensors()

    def logits(**inputs: Tensor) -> Tensor:
        found: Tensor = model(**inputs, use_cache=False).logits
        return found

    with torch.no_grad():
        together = logits(input_ids=packed["input_ids"], position_ids=packed["position_ids"])
        distances = []
        for number in range(len(ROWS)):
            here = packed["document"] == number
            alone = logits(input_ids=packed["input_ids"][here][None])[0]
            distances.append(float((together[here] - alone).abs().max()))
    return distances


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != LEAKING])
def test_packed_rows_have_the_logits_of_the_rows_alone(family: str) -> None:
    assert max(differences(family)) < TOLERANCE


def test_the_family_that_does_not_isolate_is_known() -> None:
    first, *others = differences(LEAKING)
    assert first < TOLERANCE
    assert max(others) > 1000 * TOLERANCE
