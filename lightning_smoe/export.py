"""The export verb: results in forms that other programs read."""

import logging
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer

from lightning_smoe.compression.carry_out import carry_out
from lightning_smoe.compression.layer_plan import LayerPlan
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.strategy import to_spec
from lightning_smoe.errors import InputError
from lightning_smoe.functional.merging import Dominant
from lightning_smoe.functional.router import LogSumExp
from lightning_smoe.models.artifact import Manifest, require_space, write_json
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import CheckpointFolder, open_checkpoint
from lightning_smoe.models.modeling_smoe import TYPE_PREFIX
from lightning_smoe.models.unmapped import give_each_row_its_own, stored_maps
from lightning_smoe.pipeline import plan, running_step
from lightning_smoe.results import save_result
from lightning_smoe.workspace import Workspace, found_manifest

logger = logging.getLogger(__name__)

Form = Literal["stock", "experts"]
_SCHEMA = 1


class Export:
    """One export, checked before any work.

    Args:
        work: The experiment.
        form: What to write: a `stock` checkpoint, or the list of `experts` that were kept.
        output: Where.
        checkpoint: Folder whose router rows share experts; none for the experiment's compressed/.
        router: How rows are fitted to the experts that they share.

    Raises:
        InputError: The export makes no sense, or would replace something.
        OSError: It does not fit on the disk.
    """

    def __init__(
        self,
        work: Workspace,
        form: Form,
        output: Path,
        checkpoint: Path | None,
        *,
        router: LogSumExp,
    ) -> None:
        self._form, self._output, self._router = form, output, router
        if form == "experts":
            self._check_file(work, checkpoint)
            return
        self._folder = _open_mapped(work, checkpoint)
        self._check_folder(work)
        self._plan = _plan_of(self._folder, work, router)
        if len({len(layer.groups) for layer in self._plan.layers}) > 1:
            logger.warning(
                "export: layers of %s have different numbers of experts, so that --output %s needs "
                "modeling_smoe.py all the same (trust_remote_code=True)",
                self._folder.path,
                output,
            )

    def __call__(self, trainer: Trainer, work: Workspace) -> None:
        """Writes it.

        Args:
            trainer: Runs the predict loop.
            work: The experiment, its recipe settled.
        """
        if self._form == "experts":
            plan(trainer, work)
            if trainer.is_global_zero:
                write_json(self._output, retained(work))
                logger.info("export: wrote %s", self._output)
            return
        found, wanted = found_manifest(self._output), self._manifest(work)
        with running_step(trainer, work, self._output, found=found, wanted=wanted) as needed:
            if needed:
                self._write_stock(trainer, work, wanted)

    def _write_stock(self, trainer: Trainer, work: Workspace, manifest: Manifest) -> None:
        model = load(self._folder.path, work.dtype)
        give_each_row_its_own(model)
        carry_out(trainer, work.data, model, self._plan, samples={})
        if trainer.is_global_zero:
            steps = [
                f"Experts as in {self._folder.name}, where router rows share them.",
                f"Router rows fitted to those that share an expert, by {self._router}.",
            ]
            save_result(work, model, self._output, manifest=manifest, steps=steps)

    def _manifest(self, work: Workspace) -> Manifest:
        inputs = {
            "checkpoint": self._folder.fingerprint,
            "router": to_spec(self._router),
            "calibration text": work.data.fingerprint("calib"),
            "dtype": work.numbers,
        }
        return Manifest("export", inputs)

    def _check_file(self, work: Workspace, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            raise InputError(
                "--checkpoint changes nothing under --to experts, which reads plan.json of "
                "model.output_dir; leave it out"
            )
        if self._output.exists() and (self._output.is_dir() or not work.experiment.overwrite):
            raise InputError(
                f"--output {self._output} is there already; name another file, or set "
                "model.overwrite to true to replace a file"
            )

    def _check_folder(self, work: Workspace) -> None:
        target = self._output.resolve()
        for folder in (self._folder.path.resolve(), work.source.path.resolve()):
            if target == folder or folder in target.parents or target in folder.parents:
                raise InputError(
                    f"--output {self._output} would lie in {folder} or replace it; name another "
                    "folder"
                )
        require_space(self._output, self._folder.num_bytes)


def fitted_by(strength: float) -> LogSumExp:
    """How rows are fitted to the experts that they share.

    Args:
        strength: Pull toward the mean of the rows that they stand for.

    Raises:
        InputError: It is too weak to hold the fit together.
    """
    try:
        return LogSumExp(strength)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def _open_mapped(work: Workspace, checkpoint: Path | None) -> CheckpointFolder:
    if checkpoint is None and not work.compressed_path.exists():
        raise InputError(f"{work.compressed_path} is not there; run compress, or give --checkpoint")
    folder = open_checkpoint(checkpoint or work.compressed_path)
    if not stored_maps(folder):
        raise InputError(
            f"{folder.path}: each router row has an expert of its own, as transformers knows it; "
            "there is nothing to export"
        )
    family = folder.model_type.removeprefix(TYPE_PREFIX)
    if family != work.source.model_type:
        raise InputError(
            f"{folder.path} is a {family} and model.checkpoint a {work.source.model_type}; name "
            "its original"
        )
    return folder


def _plan_of(folder: CheckpointFolder, work: Workspace, router: LogSumExp) -> CompressionPlan:
    """What turns the model with a copy for each row into one with a row for each expert."""
    maps = stored_maps(folder)
    plans = []
    for layer in work.layers:
        sent = maps.get(layer.index, list(range(layer.num_experts)))
        groups = tuple(
            tuple(row for row, expert in enumerate(sent) if expert == slot)
            for slot in range(max(sent) + 1)
        )
        plans.append(LayerPlan(layer.name, len(sent), groups))
    made = CompressionPlan(tuple(plans), router, Dominant())
    try:
        made.check(work.layers, "")
    except InputError as error:
        raise InputError(f"{folder.path} has no stock form: {error}") from error
    return made


def retained(work: Workspace) -> dict[str, Any]:
    """Which experts of the original each layer keeps, as JSON.

    `{"schema": 1, "original": name, "fingerprint": hash, "layers": [...]}`, a layer for each one of
    the original that has experts: `{"index": 3, "name": "model.layers.3.mlp", "num_experts": 60,
    "kept": [0, 4, ...]}`, where expert i of the result is `kept[i]` of the original. Where experts
    were merged, `groups` stands in the place of `kept`, one for each expert of the result:
    `[{"experts": [0, 7], "weights": [0.8, 0.2]}, ...]` with weights that sum to one.
    """
    plans = {layer.name: layer for layer in work.read_plan().layers}
    layers = []
    for layer in work.layers:
        entry = {"index": layer.index, "name": layer.name, "num_experts": layer.num_experts}
        found = plans.get(layer.name)
        layers.append(entry | _slots(layer.num_experts, found))
    source = work.source
    return {
        "schema": _SCHEMA,
        "original": source.name,
        "fingerprint": source.fingerprint,
        "layers": layers,
    }


def _slots(num_experts: int, found: LayerPlan | None) -> dict[str, Any]:
    if found is None:
        return {"kept": list(range(num_experts))}
    if all(len(group) == 1 for group in found.groups):
        return {"kept": [group[0] for group in found.groups]}
    mixing = found.grouping.mixing()
    groups = [
        {"experts": list(group), "weights": mixing[slot, list(group)].tolist()}
        for slot, group in enumerate(found.groups)
    ]
    return {"groups": groups}
