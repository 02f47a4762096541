"""Training each layer by itself before all together, through the command line."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

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
    for name in ("recovered", "training"):
        shutil.rmtree(work.out / name)
    stage = "--model.recovery.layerwise={tokens: 1024, learning_rate: 30}"
    told = work.done("fit", TRAINED, stage).err
    assert "training each layer by itself did not help, and is taken back" in told
    # From there on as if it had not been.
    for name, tensor in weights(work.out / "recovered").items():
        torch.testing.assert_close(tensor, without[name], rtol=0, atol=0)


def test_what_layers_learned_stays_where_training_them_together_hurts(
    finished: Workplace,
) -> None:
    work = to_train(finished)
    stage = "--model.recovery.layerwise={tokens: 1024, passes: 4}"
    words = (TRAINED, stage, "--model.recovery.learning_rate=100")
    told = work.done("fit", *words).err
    assert "training all layers together did not lower the KL, and is left" in told
    kept = load_file(work.out / "training/layerwise.safetensors")
    found = weights(work.out / "recovered")
    name = "model.layers.0.mlp.gate.weight"
    torch.testing.assert_close(found[name], kept[name], rtol=0, atol=0)
    card = (work.out / "recovered/README.md").read_text()
    assert "Each layer trained by itself" in card
    assert "Trained against the original on" not in card


def test_a_run_cut_off_behind_the_stage_does_not_train_layers_again(finished: Workplace) -> None:
    work = to_train(finished)
    stage = "--model.recovery.layerwise={tokens: 1024}"
    work.done("fit", TRAINED, stage)
    whole = weights(work.out / "recovered")
    shutil.rmtree(work.out / "recovered")
    for name in ("last.ckpt", "best.ckpt"):
        (work.out / "training" / name).unlink()
    told = work.done("fit", TRAINED, stage).err
    assert "trained by itself, relative" not in told
    assert "each layer by itself: validation KL" in told
    for name, tensor in weights(work.out / "recovered").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=0)


def test_the_stage_is_left_out_where_the_original_is_not_in_memory(finished: Workplace) -> None:
    work = to_train(finished)
    words = ("--model.recovery.layerwise={}", "--model.recovery.teacher.cache={top_k: 8}")
    told = work.done("fit", *words).err
    assert "no layer is trained by itself first: a cache does not hold what layers do" in told
