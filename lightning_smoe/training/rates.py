"""Step sizes: one for each group of parameters, which rise and fall together."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from lightning_smoe.training.trainable import TrainedGroup


def share_of_peak(
    step: int, num_steps: int, warmup_steps: int, schedule: Literal["cosine", "linear"]
) -> float:
    """Share of the peak learning rate after some steps: up over the warm-up, then down to zero.

    Args:
        step: Steps taken, 0 or more.
        num_steps: All steps of the training.
        warmup_steps: Steps of the rise, 0 or more.
        schedule: How it falls.
    """
    if step <= warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def set_peaks(schedule: Any, groups: Sequence[TrainedGroup]) -> None:
    """Lets peak learning rates hold that were changed since a checkpoint, in place.

    Args:
        schedule: The schedule, restored, of an optimizer with these groups.
        groups: What is trained, with the rates that are to hold.
    """
    for number, group in enumerate(schedule.optimizer.param_groups):
        wanted = groups[number].learning_rate
        if group["initial_lr"] != wanted:
            group["lr"] *= wanted / group["initial_lr"]
            group["initial_lr"] = schedule.base_lrs[number] = wanted
