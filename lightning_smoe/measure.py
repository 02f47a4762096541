"""A recipe tried out in memory: planned, carried out, and measured on held-out text."""

import time
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.budget import share_out
from lightning_smoe.compression.carry_out import carry_out
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.planner import make_plan
from lightning_smoe.compression.recipe import Prune, Recipe
from lightning_smoe.compression.trials import Trials
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.evaluation.perplexity import EvaluationModule
from lightning_smoe.evaluation.report import Judged
from lightning_smoe.evaluation.walked import WalkedEvaluation
from lightning_smoe.functional.saliency import Frequency, Reap
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.folder import CheckpointFolder, open_checkpoint
from lightning_smoe.models.isolation import check_residence_isolates
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.residence import InMemory, Residence
from lightning_smoe.models.stored import stored_bytes
from lightning_smoe.workspace import Workspace

Split = Literal["valid", "test"]
T = TypeVar("T")

# What every method is held against: plain pruning, without refit or protection.
BASELINES: dict[str, Recipe] = {
    "prune-frequency": Prune(Frequency(), refit=None, protect=False),
    "prune-reap": Prune(Reap(), refit=None, protect=False),
}


@dataclass(frozen=True, eq=False)
class Yardstick:
    """The original, and the held-out text on which others are compared with it.

    Args:
        source: The original's folder.
        residence: The original; its weights are never changed.
        data: The text.
        split: Which part of it: choosing among recipes on `test` would tune them to it.
    """

    source: CheckpointFolder
    residence: Residence
    data: TextDataModule
    split: Split = "valid"
    _states: list[Tensor] = field(default_factory=list)

    @staticmethod
    def load(work: Workspace, split: Split = "valid") -> "Yardstick":
        """Opens an experiment's original."""
        residence = work.residence()
        if work.data.windows(split).isolated:
            check_residence_isolates(residence)
        return Yardstick(work.source, residence, work.data, split)

    def judge(
        self,
        trainer: Trainer,
        residence: Residence,
        path: Path | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Judged:
        """Compares a model with the original.

        Args:
            trainer: Runs the test loop.
            residence: The model.
            path: Its folder; none for one that is in memory only.
            seconds: Wall time of the steps that made it.
        """
        model, domains = residence.model, self.data.domains_of(self.split)
        module: EvaluationModule | WalkedEvaluation
        if residence.streams or self.residence.streams:
            known = self._states or None
            module = WalkedEvaluation(residence, self.residence, domains, known)
        else:
            module = EvaluationModule(model, self.residence.model, domains)
        # The loaders share out the text among the trainer's processes. Of an earlier loop Lightning
        # would set up the text, which may be of a split that is not there.
        self.data.trainer = trainer
        trainer.datamodule = None  # type: ignore[attr-defined]  # set by Lightning
        loaders = {"valid": self.data.val_dataloader, "test": self.data.test_dataloader}
        trainer.test(module, dataloaders=loaders[self.split](), verbose=False)
        if isinstance(module, WalkedEvaluation):
            self._states[:] = module.teacher_states or ()
        size = stored_bytes(model, self.source) if path is None else open_checkpoint(path).num_bytes
        counts = [layer.num_experts for layer in find_moe_layers(model)]
        parameters = sum(p.numel() for p in model.parameters())
        return Judged(path, parameters, size, counts, module.quality, seconds or {})


def variant(trainer: Trainer, work: Workspace, **changes: Any) -> Workspace:
    """The same experiment with other settings, such as recipe and keep, checked as a whole.

    Args:
        trainer: Knows the precision.
        work: The experiment, whose text and folder stay.
        changes: Settings of `Experiment`.

    Raises:
        InputError: They cannot be used on this model.
    """
    experiment = replace(work.experiment, output_dir=work.folder, **changes)
    other = work.like(experiment, work.data, str(trainer.precision))
    # Knows the hash of its weights already.
    other.source = work.source
    return other


def reseeded(strategy: T, seed: int) -> T:
    """A strategy whose fields named `seed`, and those of its parts, are set."""
    if not is_dataclass(strategy) or isinstance(strategy, type):
        return strategy
    values = {field.name: getattr(strategy, field.name) for field in fields(strategy)}
    changed: Any = {k: seed if k == "seed" else reseeded(v, seed) for k, v in values.items()}
    return replace(strategy, **changed)


def decide(
    trainer: Trainer,
    work: Workspace,
    residence: Residence,
    statistics: Statistics,
    *,
    manifest: Manifest | None = None,
) -> CompressionPlan:
    """Plans an experiment; the model works on the trainer's device, and is not changed.

    Args:
        trainer: Knows the device.
        work: The experiment.
        residence: The original.
        statistics: What its experts did on calibration text.
        manifest: What the plan is made from.
    """
    wanted, chosen = work.experiment, {layer.name for layer in work.chosen}
    model, device = residence.model, trainer.strategy.root_device
    if not residence.streams:
        model.to(device)  # type: ignore[arg-type] # wrong in 5.23
    layers = [layer for layer in find_moe_layers(model) if layer.name in chosen]
    text = work.data.windows("calib").tensors()
    hold = partial(held, residence, device)
    trials = Trials(
        model, statistics, work.recipe, layers=layers, keep=wanted.keep, text=text,
        batch_size=work.data.batch_size, hold=hold if residence.streams else None,
    )  # fmt: skip
    counts = share_out(wanted.budget, trials)
    trials.forget()  # It holds copies of layers.
    return make_plan(statistics, layers, work.recipe, counts, manifest=manifest, hold=hold)


def held(
    residence: Residence, device: torch.device, layer: MoELayer
) -> AbstractContextManager[Any]:
    """Gives a layer its weights for a while."""
    return residence.layer(layer.index, device)


def measure(
    trainer: Trainer, work: Workspace, statistics: Statistics, yardstick: Yardstick
) -> Judged:
    """Plans, compresses and measures an experiment's recipe; writes nothing.

    A copy of the original is compressed: two models are in memory, and the statistics.
    The weights have the type they are worked on in, where a checkpoint has the original's.

    Args:
        trainer: Runs the loops.
        work: The experiment, such as `variant` gives.
        statistics: What the original's experts did on calibration text.
        yardstick: The original, and what to measure on.

    Returns:
        What it keeps and what it costs, with the seconds of plan and compress.

    Raises:
        InputError: The recipe does not fit the model.
    """
    start = time.monotonic()
    plan = decide(trainer, work, yardstick.residence, statistics)
    plan.check(work.layers, work.source.fingerprint)
    planned = time.monotonic()
    model = deepcopy(yardstick.residence.model)
    carry_out(trainer, work.data, model, plan, samples=statistics.samples)
    seconds = {"plan": planned - start, "compress": time.monotonic() - planned}
    return yardstick.judge(trainer, InMemory(model), seconds=seconds)
