"""Training each layer by itself before all together, through the command line."""

import re

import pytest
import torch

from tests.cli.command import Workplace
from tests.cli.trainings import changed, held_out, to_train, weights

TRAINED = "--model.recovery.trainable=[router,experts]"
# Steps so small that what the first stage did is still to be seen.
SLOW = "--model.recovery.learning_rate=1e-7"


def test_a_layer_wise_stage_that_helps_is_kept(finished: Workplace) -> None:
    work = to_train(finished)
    stage = "--model.recovery.layerwise={tokens: 1024, passes: 4}"
    told = work.done("fit", TRAINED, SLOW, stage).err
    assert "layer 0 trained by itself" in told
    assert "layer 2 trained by itself" in told
    assert re.search(r"each layer by itself: validation KL [\d.]+ -> [\d.]+\n", told)
    assert "taken back" not in told
    start, *later = held_out(work)
    assert max(later) < 0.97 * start
    # Two layers: a router, and three matrices of each of six experts.
    assert len(changed(work)) == 2 * (1 + 3 * 6)


@pytest.mark.slow
def test_a_layer_wise_stage_that_does_not_help_is_taken_back(finished: Workplace) -> None:
    work = to_train(finished)
    work.done("fit", TRAINED)
    without = weights(work.out / "recovered")
    (work.out / "recovered").rename(work.out / "without")
    stage = "--model.recovery.layerwise={tokens: 1024, learning_rate: 30}"
    told = work.done("fit", TRAINED, stage).err
    assert "training each layer by itself did not help, and is taken back" in told
    # From there on as if it had not been.
    for name, tensor in weights(work.out / "recovered").items():
        torch.testing.assert_close(tensor, without[name], rtol=0, atol=0)
