"""The evaluate step: every model on the same held-out text, beside plain baselines."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from transformers import PreTrainedModel

from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.carry_out import carry_out
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.planner import make_plan
from lightning_smoe.compression.recipe import Recipe, check_router
from lightning_smoe.data.packing import load_tokenizer
from lightning_smoe.errors import InputError
from lightning_smoe.evaluation.report import (
    TEACHER,
    Judged,
    beaten_by_plain,
    to_table,
    to_task_table,
    write_report,
)
from lightning_smoe.evaluation.tasks import TaskSuite
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.measure import BASELINES, Yardstick, held
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.expert_count import text_config
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.progress import parts_of
from lightning_smoe.models.residence import Residence
from lightning_smoe.models.streamed import Streamed
from lightning_smoe.pipeline import calibrate, read_seconds
from lightning_smoe.results import stream_result
from lightning_smoe.workspace import Workspace, found_manifest

logger = logging.getLogger(__name__)

_STEPS_OF = {"compressed": ("calibrate", "plan", "compress"), "recovered": ("fit",)}
_NAMES = (TEACHER, *_STEPS_OF, *BASELINES)


def check_others(work: Workspace, others: Sequence[Path] = ()) -> None:
    """Checks further checkpoint folders, and the names of recipes beside, before any work.

    Raises:
        InputError: A folder is no checkpoint with experts, has another vocabulary than the
            original, or it or a recipe has the name of another model of the report.
    """
    taken = sorted(work.experiment.beside.keys() & {*_NAMES, *_name(others)})
    if taken:
        raise InputError(f"model.beside: another model of the report is named {taken[0]}; rename")
    vocab_size = text_config(outline(work.source).config).vocab_size
    for name, path in _name(others).items():
        model = outline(open_checkpoint(path))
        find_moe_layers(model)
        found = text_config(model.config).vocab_size
        if found != vocab_size:
            raise InputError(
                f"--others: {name} has a vocabulary of {found} tokens and the original of "
                f"{vocab_size}; only models of one vocabulary can be compared"
            )


def check_whole(work: Workspace) -> None:
    """Checks that models can be asked task by task.

    Raises:
        InputError: They come from their files layer by layer.
    """
    if work.streams:
        raise InputError(
            "--tasks: a model that comes from its files one decoder layer at a time (model.stream) "
            "would be read anew for every question; judge it on tasks where it fits in memory"
        )


def _name(others: Sequence[Path]) -> dict[str, Path]:
    """Names folders by their last part."""
    folders: dict[str, Path] = {}
    for path in others:
        name = path.resolve().name
        if name in (*folders, *_NAMES):
            raise InputError(f"--others: two models would be named {name}; rename the folder")
        folders[name] = open_checkpoint(path).path
    return folders


def evaluate(
    trainer: Trainer, work: Workspace, others: Sequence[Path] = (), suite: TaskSuite | None = None
) -> None:
    """Writes report.json and report.md, and shows the table.

    Args:
        trainer: Runs the test loop.
        work: The experiment.
        others: Further checkpoint folders to judge, named by their last part.
        suite: Tasks to judge every model on; none keeps what the report has of them.
    """
    own = {"compressed": work.compressed_path, "recovered": work.recovered_path}
    folders = {name: path for name, path in own.items() if path.exists()} | _name(others)
    if "recovered" in folders and not _belongs(work):
        logger.warning("evaluate: recovered/ was trained from another compressed/ and is left out")
        del folders["recovered"]
    wanted = work.report_manifest(folders)
    if suite is not None:
        wanted = Manifest(wanted.step, {**wanted.inputs, "tasks": suite.inputs})
    found = _read(work.report_path)
    manifest = Manifest.from_json(found.get("manifest"))
    # A report of this experiment that lacks a model is out of date, not another run's result.
    if manifest is not None and not _is_current(manifest, wanted):
        manifest = None
    if manifest is None or work.experiment.overwrite:
        asks = work.experiment.baselines or work.experiment.beside
        if asks and not work.has_statistics:
            calibrate(trainer, work)
        teacher, models = _judge_all(trainer, work, folders, suite)
        if trainer.is_global_zero:
            write_report(work.folder, teacher, models, wanted)
        found = {"teacher": teacher, "models": models}
    else:
        logger.info("evaluate: %s is there already, made from the same inputs", work.report_path)
    if trainer.is_global_zero:
        _show(work, found, folders)


def _is_current(found: Manifest, wanted: Manifest) -> bool:
    """Whether a report has what is wanted; tasks that nobody asked for do no harm."""
    left_out = {"tasks"} - wanted.inputs.keys()
    inputs = {name: value for name, value in found.inputs.items() if name not in left_out}
    return replace(found, inputs=inputs).digest == wanted.digest


def _belongs(work: Workspace) -> bool:
    """Whether recovered/ was trained from the compressed/ that is there."""
    compressed, recovered = map(found_manifest, (work.compressed_path, work.recovered_path))
    if compressed is None or recovered is None:
        return False
    return bool(recovered.inputs.get("compressed") == compressed.digest)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _judge_all(
    trainer: Trainer, work: Workspace, folders: dict[str, Path], suite: TaskSuite | None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    yardstick = Yardstick.load(work, "test")
    seconds = read_seconds(work)

    def judge(model: Residence, path: Path | None, took: dict[str, float]) -> dict[str, Any]:
        judged = yardstick.judge(trainer, model, path, took)
        return _on_tasks(trainer, work, model.model, judged, suite=suite).to_json()

    original = judge(yardstick.residence, work.source.path, {})
    found = {}
    for name, path in folders.items():
        took = {step: seconds[step] for step in _STEPS_OF.get(name, ()) if step in seconds}
        found[name] = judge(work.residence(open_checkpoint(path)), path, took)
    for name, residence in _others_at_this_size(trainer, work):
        found[name] = judge(residence, None, {})
    return original, found


def _on_tasks(
    trainer: Trainer,
    work: Workspace,
    model: PreTrainedModel,
    judged: Judged,
    *,
    suite: TaskSuite | None,
) -> Judged:
    """Adds what a model scores on tasks, if any are asked for."""
    if suite is None:
        return judged
    model.to(trainer.strategy.root_device)  # type: ignore[arg-type] # wrong in 5.23
    with trainer.precision_plugin.forward_context():
        return replace(judged, tasks=suite.run(model, load_tokenizer(work.source.path)))


def _others_at_this_size(trainer: Trainer, work: Workspace) -> Iterator[tuple[str, Residence]]:
    """Other recipes, and plain pruning, with as many experts as the plan keeps in each layer."""
    recipes = work.experiment.beside | (BASELINES if work.experiment.baselines else {})
    if not recipes:
        return
    plans = work.read_plan().by_name()
    counts = {name: len(plan.groups) for name, plan in plans.items()}
    statistics = Statistics.load(work.statistics_path)
    for name, recipe in recipes.items():
        residence = work.residence()
        hold = partial(held, residence, trainer.strategy.root_device)
        try:
            layers = _layers(trainer, residence, recipe, counts)
            plan = make_plan(statistics, layers, recipe, counts, hold=hold)
            plan.check(layers, work.source.fingerprint)
        except ValueError as error:  # Such as fewer experts than a router of one row each selects.
            logger.warning("evaluate: %s is left out: %s", name, error)
            continue
        samples = statistics.samples
        with _compressed(trainer, work, residence, plan, samples=samples) as compressed:
            yield name, compressed


def _layers(
    trainer: Trainer, residence: Residence, recipe: Recipe, counts: Mapping[str, int]
) -> list[MoELayer]:
    """The layers of the original that a recipe is to change, where they are worked on."""
    model = residence.model
    if not residence.streams:
        model.to(trainer.strategy.root_device)  # type: ignore[arg-type] # wrong in 5.23
    layers = [layer for layer in find_moe_layers(model) if layer.name in counts]
    check_router(recipe.execution.router, model, layers)
    return layers


@contextmanager
def _compressed(
    trainer: Trainer,
    work: Workspace,
    residence: Residence,
    plan: CompressionPlan,
    *,
    samples: Mapping[str, TokenSample],
) -> Iterator[Residence]:
    """The original compressed by a plan: in memory, or in a folder for a while."""
    if not isinstance(residence, Streamed):
        carry_out(trainer, work.data, residence.model, plan, samples=samples)
        yield residence
        return
    path = work.trial_path
    _remove(trainer, path)
    try:
        manifest = Manifest("evaluate", {})
        stream_result(trainer, work, residence, plan, path=path, manifest=manifest, samples=samples)
        trainer.strategy.barrier()
        yield work.residence(open_checkpoint(path))
    finally:
        _remove(trainer, path)


def _remove(trainer: Trainer, path: Path) -> None:
    """Takes away what a trial, maybe of a run that was killed, left."""
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        for folder in (path, parts_of(path)):
            shutil.rmtree(folder, ignore_errors=True)
    trainer.strategy.barrier()


def _show(work: Workspace, report: dict[str, Any], folders: dict[str, Path]) -> None:
    console = Console()
    console.print(to_table(report["teacher"], report["models"]))
    if report["teacher"]["tasks"]:
        console.print(to_task_table(report["teacher"], report["models"]))
    for line in beaten_by_plain(report["models"]):
        logger.warning("evaluate: %s", line)
    best = "recovered" if "recovered" in folders else "compressed"
    if best in folders:
        folder = open_checkpoint(folders[best])
        loader, options = "AutoModelForCausalLM.from_pretrained", ""
        if folder.experts_per_layer:
            loader = "lightning_smoe.models.checkpoint.load"
        if folder.is_mapped:
            options = ", trust_remote_code=True"
        call = f"{loader}({str(folder.path)!r}{options})"
        console.print(f"The {best} model: {call}", soft_wrap=True)
    console.print(f"Report: {work.folder / 'report.md'}", soft_wrap=True)
