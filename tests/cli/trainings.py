"""An experiment that is compressed and has still to be trained, and what trainings leave."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cli.command import Workplace

# A few windows of text, no models beside the results, and no stage before training: what is trained
# is all that counts here.
SHORT = {"data.train_tokens": 2048, "model.baselines": False, "model.recovery.layerwise": None}


def to_train(finished: Workplace) -> Workplace:
    """A finished experiment with its training taken away."""
    for name in ("recovered", "training"):
        shutil.rmtree(finished.out / name)
    finished.write(SHORT)
    return finished


def put_aside(work: Workplace, name: str) -> Path:
    """Renames what a training led to, so that another can be run; returns the new folder."""
    (work.out / "training").rename(work.out / f"training of {name}")
    return (work.out / "recovered").rename(work.out / name)


def weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a checkpoint folder."""
    return load_file(folder / "model.safetensors")


def distance(first: Path, second: Path) -> float:
    """The largest difference between weights of two checkpoint folders."""
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def changed(work: Workplace) -> set[str]:
    """Names of the weights that training changed."""
    before, after = weights(work.out / "compressed"), weights(work.out / "recovered")
    return {name for name in before if not torch.equal(before[name], after[name])}


def held_out(work: Workplace) -> list[float]:
    """KL to the original at each validation, the one before training first."""
    points = json.loads((work.out / "training/curve.json").read_text())
    return [point["valid/kl"] for point in points]
