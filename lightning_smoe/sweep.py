"""The sweep verb: many recipes at many sizes on several seeds, each planned, tried and measured."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console

from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.budget import Uniform
from lightning_smoe.compression.recipe import Recipe
from lightning_smoe.errors import InputError
from lightning_smoe.evaluation.report import Judged
from lightning_smoe.evaluation.spread import rows_of, to_table
from lightning_smoe.evaluation.sweep_file import (
    NAME,
    SweepFile,
    describe,
    warnings_of,
    write_page,
)
from lightning_smoe.experiment import AUTO
from lightning_smoe.measure import BASELINES, Split, Yardstick, measure, reseeded, variant
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.pipeline import calibrate
from lightning_smoe.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """What is tried: every recipe, and plain pruning, at every size on every seed.

    Args:
        recipes: Recipes by name.
        keep: Fractions or counts of experts, as `model.keep`.
        seeds: Seeds of the calibration text and of recipes' own draws; none leaves both as the
            experiment has them.
        split: Held-out text to measure on.
    """

    recipes: Mapping[str, Recipe]
    keep: Sequence[int | float]
    seeds: Sequence[int] | None = None
    split: Split = "valid"


@dataclass(frozen=True, eq=False)
class _Run:
    """One recipe at one size on one seed, as an experiment, or why the model refuses it."""

    key: dict[str, Any]
    work: Workspace | str

    @property
    def manifest(self) -> Manifest | None:
        return None if isinstance(self.work, str) else self.work.plan_manifest


def check(trainer: Trainer, work: Workspace, grid: Grid) -> None:
    """Checks what is to be tried, before any work.

    Raises:
        InputError: Nothing is to be tried, or twice the same, several processes are asked for, a
            name is taken, or there is a size that no recipe can use.
    """
    if trainer.world_size > 1:
        raise InputError(
            f"sweep works in one process, and trainer.devices asks for {trainer.world_size}; set "
            "it to 1, and start one sweep a device, each with its own model.output_dir and --seeds"
        )
    if work.streams:
        raise InputError(
            "sweep, and recipe: auto, hold whole models in memory, and here decoder layers come "
            "one at a time (model.stream); name one recipe"
        )
    for name, values in (("recipes", grid.recipes), ("keep", grid.keep), ("seeds", grid.seeds)):
        if values is not None and (not values or len({*map(str, values)}) < len(values)):
            raise InputError(f"--{name} {list(values)}: name at least one, and none twice")
    taken = sorted(BASELINES.keys() & grid.recipes.keys())
    if taken:
        raise InputError(f"--recipes {taken[0]} is in every sweep as it is; rename the file")
    for keep in grid.keep:
        tried = [_variant(trainer, work, recipe=r, keep=keep) for r in grid.recipes.values()]
        refusals = [found for found in tried if isinstance(found, str)]
        if len(refusals) == len(tried):
            raise InputError(refusals[0].replace("model.keep", "--keep"))


def _variant(trainer: Trainer, work: Workspace, **changes: Any) -> Workspace | str:
    try:
        return variant(trainer, work, **changes)
    except InputError as error:
        return str(error)


def sweep(trainer: Trainer, work: Workspace, grid: Grid) -> None:
    """Writes sweep.json after every run, in the end sweep.md and sweep.png, and shows the table.

    Args:
        trainer: Runs the loops.
        work: The experiment.
        grid: What is tried.
    """
    overwrite, path = work.experiment.overwrite, work.folder / NAME
    inputs = {
        "checkpoint": work.source.fingerprint,
        "split": grid.split,
        "held-out text": work.data.fingerprint(grid.split),
        "dtype": work.numbers,
    }
    file = SweepFile.open(path, Manifest("sweep", inputs), overwrite)
    runs = _runs(trainer, work, grid)
    waiting = [r for r in runs if not (m := r.manifest) or not file.has(r.key, m, overwrite)]
    if len(waiting) < len(runs):
        done = len(runs) - len(waiting)
        logger.info("sweep: %d of %d runs are in %s already", done, len(runs), path)
    if waiting:
        _run_all(trainer, file, waiting, Yardstick.load(work, grid.split))
    write_page(file)
    rows = rows_of(file.runs)
    console = Console()
    console.print(to_table(rows, f"what is kept, on the {grid.split} text"))
    for line in warnings_of(rows):
        logger.warning("sweep: %s", line)
    for entry in file.runs:
        if "error" in entry:
            logger.warning("sweep: failed: %s: %s", describe(entry), entry["error"])
    console.print(f"Sweep: {path.with_suffix('.md')}", soft_wrap=True)


def check_auto(trainer: Trainer, work: Workspace) -> None:
    """Checks, before any work, that what `recipe: auto` chooses from can be tried.

    Raises:
        InputError: Several processes are asked for, or no recipe fits the model.
    """
    if work.experiment.recipe == "auto":
        check(trainer, work, Grid(AUTO, [work.experiment.keep]))


def settle(trainer: Trainer, work: Workspace) -> Workspace:
    """Replaces `recipe: auto` by the recipe of the short list that loses least.

    All are tried on the validation text at the experiment's size, and stand in sweep.json.

    Raises:
        InputError: No recipe can be used on the model.
    """
    wanted = work.experiment
    if wanted.recipe != "auto":
        return work
    sweep(trainer, work, Grid(AUTO, [wanted.keep]))
    stored = json.loads((work.folder / NAME).read_text())["runs"]
    tried = {
        entry["recipe"]: entry["kl"]["mean"]
        for entry in stored
        if entry["recipe"] in AUTO
        and (str(entry["keep"]), entry["seed"]) == (str(wanted.keep), work.data.seed)
        and "kl" in entry
    }
    if not tried:
        raise InputError("recipe auto: no recipe of its list can be used on this model")
    best = min(tried, key=lambda name: tried[name])
    logger.info("recipe auto: %s is taken, with a KL of %.4f on valid text", best, tried[best])
    return variant(trainer, work, recipe=AUTO[best])


def _runs(trainer: Trainer, work: Workspace, grid: Grid) -> list[_Run]:
    runs = []
    for seed in [None] if grid.seeds is None else grid.seeds:
        seeded = work if seed in (None, work.data.seed) else _on_seed(trainer, work, int(seed or 0))
        for keep in grid.keep:
            for name, recipe in {**grid.recipes, **BASELINES}.items():
                own = recipe if seed is None else reseeded(recipe, seed)
                changes: dict[str, Any] = {"recipe": own, "keep": keep}
                if name in BASELINES:
                    changes["budget"] = Uniform()
                key = {"recipe": name, "keep": keep, "seed": seeded.data.seed}
                runs.append(_Run(key, _variant(trainer, seeded, **changes)))
    return runs


def _on_seed(trainer: Trainer, work: Workspace, seed: int) -> Workspace:
    """The experiment on calibration text that another seed chooses, in a folder of its own."""
    experiment = replace(work.experiment, output_dir=work.folder / f"seed-{seed}")
    other = work.like(experiment, work.data.reseeded(seed), str(trainer.precision))
    other.source = work.source
    return other


def _run_all(trainer: Trainer, file: SweepFile, runs: Sequence[_Run], yardstick: Yardstick) -> None:
    if file.teacher is None:
        original = yardstick.judge(trainer, yardstick.residence, yardstick.source.path)
        file.content["teacher"] = original.to_json()
    statistics, calibrated, start = None, None, time.monotonic()
    for number, run in enumerate(runs, start=1):
        logger.info("sweep: run %d of %d: %s", number, len(runs), describe(run.key))
        result: Judged | str = str(run.work)
        if isinstance(run.work, Workspace):
            if statistics is None or calibrated != run.work.statistics_path:
                statistics = None  # before the next is read
                calibrate(trainer, run.work)
                calibrated = run.work.statistics_path
                statistics = Statistics.load(calibrated)
            result = _measure(trainer, run.work, statistics, yardstick)
        file.add(run.key, result, run.manifest)
        left = (time.monotonic() - start) / number * (len(runs) - number)
        logger.info(
            "sweep: run %d of %d: %s; about %.0f s left", number, len(runs), _told(result), left
        )


def _measure(
    trainer: Trainer, work: Workspace, statistics: Statistics, yardstick: Yardstick
) -> Judged | str:
    try:
        return measure(trainer, work, statistics, yardstick)
    except ValueError as error:
        # What one recipe cannot do on this model says nothing of the others.
        logger.debug("the run failed", exc_info=True)
        return str(error)


def _told(result: Judged | str) -> str:
    if isinstance(result, str):
        return f"failed ({result})"
    quality = result.quality
    seconds = sum(result.seconds.values())
    return f"KL {quality.mean_kl:.4f}, perplexity {quality.perplexity:.2f} in {seconds:.1f} s"
