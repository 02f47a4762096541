"""Whether models fit in memory, or have to come from their files a decoder layer at a time."""

import logging

import torch

from lightning_smoe.models.memory import available_memory

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
# What is written is read back, and what is judged stands beside the original.
_MODELS = 2


def lacks_room(num_bytes: int, device: torch.device, num_local_processes: int) -> bool:
    """Says whether two models are more than main memory, or the device's, has free.

    Args:
        num_bytes: Size of one model in memory.
        device: Where models are worked on.
        num_local_processes: Processes that each hold them in main memory.
    """
    needed = _MODELS * num_bytes
    places = {(_CPU, num_local_processes), (device, 1)}
    rooms = [(available_memory(place), count) for place, count in places]
    short = [room for room, count in rooms if room is not None and room < needed * count]
    if short:
        logger.info(
            "model.stream: two models take %.1f GB and there are %.1f GB, so one decoder layer "
            "at a time is read from the checkpoint", needed / 1e9, min(short) / 1e9,
        )  # fmt: skip
    return bool(short)
