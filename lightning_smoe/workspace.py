"""An experiment checked against what is there, with the places and origins of its results."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightning_smoe.calibration.statistics import read_header
from lightning_smoe.compression.plan import CompressionPlan, decisions
from lightning_smoe.compression.planner import select_layers
from lightning_smoe.compression.recipe import Recipe, check_router
from lightning_smoe.compression.strategy import to_spec
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.experiment import AUTO, DTYPES, Experiment
from lightning_smoe.functional.allocation import even_counts
from lightning_smoe.models.artifact import Manifest, require_space, sha256_of, sha256_of_file
from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.description import counted_config
from lightning_smoe.models.folder import CheckpointFolder, open_checkpoint
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.residence import InMemory, Residence
from lightning_smoe.models.room import lacks_room
from lightning_smoe.models.stored import stored_type
from lightning_smoe.models.streamed import Streamed

_CPU = torch.device("cpu")


class Workspace:
    """An experiment whose inputs were checked, with the places and origins of its results.

    Args:
        experiment: What is asked for.
        data: The text.
        precision: The trainer's.
        device: Where models are worked on.
        num_local_processes: Processes that share the machine's memory.

    Raises:
        InputError: The checkpoint, `keep` or `layers` cannot be used; nothing was written.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: TextDataModule,
        precision: str = "32-true",
        *,
        device: torch.device = _CPU,
        num_local_processes: int = 1,
    ) -> None:
        self.experiment, self._device = experiment, device
        self._num_local_processes = num_local_processes
        self.data = data
        self.source: CheckpointFolder = open_checkpoint(experiment.checkpoint)
        # What rounding every number of every step goes through.
        self.numbers = f"{str(self.dtype).removeprefix('torch.')}, {precision}"
        data.tokenizer = self.source.path
        model = outline(self.source)
        self.layers: list[MoELayer] = find_moe_layers(model)
        self.chosen = select_layers(self.layers, experiment.layers)
        if experiment.sample_tokens < 1:
            raise InputError(f"model.sample_tokens={experiment.sample_tokens} must be 1 or more")
        router = self.recipe.execution.router
        limits = experiment.budget.limits(self.chosen, experiment.keep, router)
        evenly = even_counts([layer.num_experts for layer in self.chosen], limits)
        kept = dict(zip((layer.index for layer in self.chosen), evenly, strict=True))
        check_router(router, model, self.chosen)
        if not router.keeps_all_rows:
            counted_config(
                self.source, {layer.index: layer.num_experts for layer in self.layers} | kept
            )
        dropped = sum(
            sum(p.numel() for p in layer.parameters_of("experts"))
            * (1 - kept[layer.index] / layer.num_experts)
            for layer in self.chosen
        )
        self._num_parameters = sum(p.numel() for p in model.parameters())
        self._result_bytes = int(self.source.num_bytes * (1 - dropped / self._num_parameters))
        self.folder = Path(experiment.output_dir)
        self._check_folder()

    def _check_folder(self) -> None:
        source, target = self.source.path.resolve(), self.folder.resolve()
        there = next(path for path in (target, *target.parents) if path.exists())
        if not there.is_dir():
            raise InputError(f"model.output_dir={self.folder}: {there} is a file; name a folder")
        if source == target or source in target.parents:
            raise InputError(
                f"model.output_dir={self.folder} lies in the original; name another folder"
            )
        if source in (target / "compressed", target / "recovered"):
            raise InputError(
                f"model.output_dir={self.folder} would replace the original, {self.source.path}; "
                "name another folder"
            )

    @property
    def recipe(self) -> Recipe:
        """The recipe; while `auto` is not settled, the one of the list with most demands."""
        recipe = self.experiment.recipe
        return recipe if isinstance(recipe, Recipe) else AUTO["stock"]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights in memory."""
        if self.experiment.dtype != "auto":
            return DTYPES[self.experiment.dtype]
        return torch.float32 if self._device.type == "cpu" else stored_type(self.source)

    @cached_property
    def streams(self) -> bool:
        """Whether one decoder layer at a time is in memory, rather than the whole model."""
        if self.experiment.stream != "auto":
            return self.experiment.stream
        size = self._num_parameters * self.dtype.itemsize
        return lacks_room(size, self._device, self._num_local_processes)

    def residence(self, folder: CheckpointFolder | None = None) -> Residence:
        """A model of which as much is in memory as fits.

        Args:
            folder: Its folder; none for the original.
        """
        folder = folder or self.source
        return (
            Streamed(folder, self.dtype)
            if self.streams
            else InMemory(load(folder.path, self.dtype))
        )

    def like(self, experiment: Experiment, data: TextDataModule, precision: str) -> "Workspace":
        """Checks another experiment in the same place."""
        other = Workspace(
            experiment,
            data,
            precision,
            device=self._device,
            num_local_processes=self._num_local_processes,
        )
        # Decided once: what is loaded by now takes memory itself.
        other.streams = self.streams
        return other

    @property
    def statistics_path(self) -> Path:
        """What calibrate writes."""
        return self.folder / "statistics.safetensors"

    @property
    def plan_path(self) -> Path:
        """What plan writes, or a person wrote."""
        return self.folder / "plan.json"

    @property
    def compressed_path(self) -> Path:
        """What compress writes."""
        return self.folder / "compressed"

    @property
    def recovered_path(self) -> Path:
        """What fit writes."""
        return self.folder / "recovered"

    @property
    def teacher_path(self) -> Path:
        """What cache writes."""
        return self.folder / "teacher"

    @property
    def training_path(self) -> Path:
        """Where fit keeps checkpoints."""
        return self.folder / "training"

    @property
    def trial_path(self) -> Path:
        """Where another recipe's result lies while evaluate judges it, if it is not in memory."""
        return self.folder / ".trial"

    @property
    def report_path(self) -> Path:
        """What evaluate writes, beside report.md."""
        return self.folder / "report.json"

    @cached_property
    def statistics_manifest(self) -> Manifest:
        """What the statistics are made from."""
        inputs = {
            "checkpoint": self.source.fingerprint,
            "calibration text": self.data.fingerprint("calib"),
            "sample_tokens": self.experiment.sample_tokens,
            "dtype": self.numbers,
        }
        return Manifest("calibrate", inputs)

    @property
    def sample_stride(self) -> int:
        """Of so many calibration tokens one is kept whole."""
        return max(1, -(-self.data.windows("calib").num_tokens // self.experiment.sample_tokens))

    def found_statistics(self) -> Manifest | None:
        """What the statistics that are there, and are to stay, were made from."""
        if not self.statistics_path.exists() or self.experiment.overwrite:
            return None
        return read_header(self.statistics_path)[0]

    @property
    def has_statistics(self) -> bool:
        """Whether the statistics of this experiment are there."""
        if not self.statistics_path.exists():
            return False
        return read_header(self.statistics_path)[0].digest == self.statistics_manifest.digest

    @property
    def plan_manifest(self) -> Manifest:
        """What the plan is made from."""
        inputs = {
            "statistics": self.statistics_manifest.digest,
            "recipe": to_spec(self.recipe),
            "keep": self.experiment.keep,
            "budget": to_spec(self.experiment.budget),
            "layers": self.experiment.layers,
        }
        return Manifest("plan", inputs)

    def read_plan(self) -> CompressionPlan:
        """Reads and checks the plan that is there."""
        plan = CompressionPlan.load(self.plan_path)
        plan.check(self.layers, self.source.fingerprint)
        return plan

    def compressed_manifest(self, plan: CompressionPlan) -> Manifest:
        """What the compressed model is made from."""
        beside = self.plan_path.with_suffix(".safetensors")
        inputs = {
            "checkpoint": self.source.fingerprint,
            "plan": sha256_of(decisions(self.plan_path)),
            "plan weights": sha256_of_file(beside) if beside.exists() else "",
            "dtype": self.numbers,
        }
        if plan.reads_tokens:
            inputs["calibration text"] = self.data.fingerprint("calib")
        if plan.needs_sample:
            inputs["statistics"] = self.statistics_manifest.digest
        return Manifest("compress", inputs)

    def recovered_manifest(self, trainer_settings: dict[str, Any]) -> Manifest:
        """What the recovered model is made from.

        Args:
            trainer_settings: Settings of the loop that decide the result.
        """
        compressed = found_manifest(self.compressed_path)
        inputs = {
            "compressed": "" if compressed is None else compressed.digest,
            "recovery": to_spec(self.experiment.recovery.deciding),
            "training text": self.data.fingerprint("train"),
            "validation text": self.data.fingerprint("valid"),
            "batch_size": self.data.batch_size,
            "order": self.data.order,
            "dtype": self.numbers,
            "trainer": trainer_settings,
        }
        return Manifest("fit", inputs)

    def report_manifest(self, folders: dict[str, Path]) -> Manifest:
        """What the report is made from."""
        inputs = {
            "checkpoint": self.source.fingerprint,
            "models": {name: open_checkpoint(path).fingerprint for name, path in folders.items()},
            "test text": self.data.fingerprint("test"),
            "baselines": self.plan_manifest.digest if self.experiment.baselines else "",
            "statistics": self.statistics_manifest.digest if self.experiment.beside else "",
            "beside": {k: to_spec(r) for k, r in self.experiment.beside.items()},
            "dtype": self.numbers,
        }
        return Manifest("evaluate", inputs)

    def check_space(self, *results: Path, more: int = 0) -> None:
        """Checks that the checkpoint folders that are still to come fit on the disk.

        Args:
            results: The folders.
            more: Bytes of what else is to come.

        Raises:
            OSError: They do not; nothing was written.
        """
        missing = sum(not path.exists() for path in results)
        require_space(self.folder, missing * self._result_bytes + more)


def found_manifest(folder: Path) -> Manifest | None:
    """What a checkpoint folder that is there was made from; none if it is not ours."""
    manifest = CheckpointFolder(folder).manifest.get("manifest")
    return Manifest.from_json(manifest)
