"""The original as a teacher: held in memory, or what is kept of its answers in its stead."""

import logging
import time
from collections.abc import Collection

from lightning.pytorch import Trainer

from lightning_smoe.errors import InputError
from lightning_smoe.experiment import DTYPES
from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.head import check_isolates, vocab_size_of
from lightning_smoe.training.cache_module import write_cache
from lightning_smoe.training.cache_plan import SPLITS, TeacherCache, planned_cache
from lightning_smoe.training.layer_objectives import LayerObjective
from lightning_smoe.training.objectives import TopKKL
from lightning_smoe.training.options import Recovery
from lightning_smoe.training.signals import Signal
from lightning_smoe.training.teacher import CachedTeacher, LiveTeacher, Teacher
from lightning_smoe.training.teacher_cache import CacheFolder
from lightning_smoe.workspace import Workspace

logger = logging.getLogger(__name__)

_CACHE = "model.recovery.teacher.cache"


def check(work: Workspace) -> None:
    """Checks what only cache needs, before any work.

    Raises:
        InputError: The experiment keeps no answers.
    """
    if work.experiment.recovery.teacher.cache is None:
        raise InputError(
            "model.recovery.teacher.cache is null, so fit would not use a cache; set it, such as "
            "--model.recovery.teacher.cache '{top_k: 64}'"
        )
    check_cached(work.experiment.recovery, vocab_size_of(outline(work.source)))


def check_cached(recovery: Recovery, vocab_size: int) -> None:
    """Checks that the answers that are kept, if any are, say what is asked of them.

    Args:
        recovery: What is kept, and what is learned from it.
        vocab_size: Tokens that the teacher tells apart.

    Raises:
        InputError: Something compares what layers do, or wants another temperature or more tokens.
    """
    cache = recovery.teacher.cache
    if cache is None:
        return
    asking = []
    for objective in (o for o in recovery.objectives if o.needs_teacher):
        if isinstance(objective, LayerObjective):
            asking.append(objective.name)
        elif objective.temperature != cache.temperature:
            raise InputError(
                f"{objective.name} has temperature {objective.temperature} and {_CACHE}.temperature"
                f" is {cache.temperature}; make them the same, or set {_CACHE} to null"
            )
        elif isinstance(objective, TopKKL) and cache.top_k < min(objective.top_k, vocab_size):
            raise InputError(
                f"{objective.name} tells {objective.top_k} tokens apart and {_CACHE}.top_k is "
                f"{cache.top_k}; lower the one, or raise the other"
            )
    if asking:
        raise InputError(
            f"{asking[0]} compares what layers do, which a cache of the teacher does not hold; set "
            f"{_CACHE} to null, or take it away"
        )


def plan_cache(work: Workspace) -> CacheFolder:
    """The teacher's answers that an experiment keeps; tokenises the texts."""
    held = work.experiment.recovery.teacher
    return planned_cache(
        work.teacher_path,
        work.data,
        held.cache or TeacherCache(),
        teacher=work.source.fingerprint,
        vocab_size=vocab_size_of(outline(work.source)),
        numbers=f"{held.dtype}, {held.quantize}, {work.numbers}",
    )


def make_cache(trainer: Trainer, work: Workspace) -> None:
    """Writes teacher/, or what of it is missing."""
    cache = plan_cache(work)
    overwrite = work.experiment.overwrite
    trainer.strategy.barrier()
    is_complete = cache.is_complete(overwrite)
    trainer.strategy.barrier()
    if is_complete:
        logger.info("cache: %s is there already, made from the same inputs", cache.path)
        return
    start = time.monotonic()
    teacher = live_teacher(work)
    if any(work.data.windows(split).isolated for split in SPLITS):
        check_isolates(teacher.model)
    write_cache(trainer, teacher, work.data, cache, overwrite=overwrite)
    logger.info("cache: wrote %s in %.1f s", cache.path, time.monotonic() - start)


def live_teacher(work: Workspace, signals: Collection[Signal] = ()) -> LiveTeacher:
    """The original, loaded, and held as the experiment says.

    Args:
        work: The experiment.
        signals: What of its layers is compared.
    """
    options = work.experiment.recovery.teacher
    dtype = work.dtype if options.dtype == "same" else DTYPES[options.dtype]
    return LiveTeacher(load(work.source.path, dtype), options, signals)


def open_teacher(work: Workspace, signals: Collection[Signal]) -> Teacher:
    """What a student of the experiment learns from.

    Args:
        work: The experiment.
        signals: What of the teacher's layers is compared.

    Raises:
        InputError: The answers that are kept do not fit the experiment.
    """
    if work.experiment.recovery.teacher.cache is None:
        return live_teacher(work, signals)
    return CachedTeacher(work.teacher_path, plan_cache(work).manifest)
