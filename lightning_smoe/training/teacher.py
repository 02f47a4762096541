"""What is asked while a student learns: the original itself, or what was kept of its answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from lightning_smoe.data.positions import flat_positions
from lightning_smoe.errors import InputError
from lightning_smoe.functional.targets import FullTokens, TeacherTokens, TopTokens
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.head import final_states, logits_of
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.placement import PlacedModel
from lightning_smoe.models.sharding import shard
from lightning_smoe.training.cache_plan import TeacherCache
from lightning_smoe.training.signals import LayerRecorder, LayerSignals, Signal
from lightning_smoe.training.teacher_cache import CacheFolder
from lightning_smoe.training.teacher_shards import ShardFile

Batch = Mapping[str, Tensor]

_OPTIONS = "model.recovery.teacher.cache"


@dataclass(frozen=True)
class TeacherOptions:
    """How the original is held while the compressed model learns from it.

    Args:
        dtype: Type of its weights; same takes model.dtype.
        placement: Where its decoder layers are: on the device; in main memory, from where one at a
            time is brought to the device (offload); or a slice on each process's device (sharded).
        quantize: int8 holds the matrices of its decoder layers in 8 bits with a scale for each
            output channel: about a quarter of float32's memory.
        cache: What is kept of its answers by the verb cache, which are then learned from in its
            stead; null asks the original itself.
    """

    dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    placement: Literal["device", "offload", "sharded"] = "device"
    quantize: Literal["none", "int8"] = "none"
    cache: TeacherCache | None = None

    def __post_init__(self) -> None:
        if self.placement == "sharded" and self.quantize != "none":
            raise ValueError("a sharded teacher cannot be quantised; set teacher.quantize to none")


@dataclass(frozen=True, eq=False)
class TeacherAnswer:
    """What a teacher says of one batch.

    Args:
        tokens: Its next-token distributions at some of the counted positions, which are numbered
            row by row; worked out when they are asked for, so that no more are in memory.
        signals: What its layers did, by name; none where that was not asked for.
    """

    tokens: Callable[[slice], TeacherTokens]
    signals: dict[str, LayerSignals] | None = None


class Teacher(ABC):
    """The original model, as a student sees it; never a part of the module that is trained."""

    @abstractmethod
    def place(self, device: torch.device) -> None:
        """Makes it ready to be asked on a device; the CPU gives the memory of another back."""

    @abstractmethod
    def answer(
        self, batch: Batch, counted: Bool[Tensor, "batch sequence"], split: str, layers: bool
    ) -> TeacherAnswer:
        """What it says of a batch, without gradients.

        Args:
            batch: Windows of a split.
            counted: Positions that are asked for.
            split: Name of the split, train or valid.
            layers: Whether to say what its layers do.
        """


class LiveTeacher(Teacher):
    """The original itself: frozen, and asked anew for every batch.

    Its logits are computed for as many tokens as are asked for at a time.

    Args:
        model: The original, changed in place; it is not to be used otherwise.
        options: How it is held.
        signals: What of its layers is compared with the student's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: TeacherOptions = TeacherOptions(),
        signals: Collection[Signal] = (),
    ) -> None:
        self.model, self._options = model, options
        self._mesh: DeviceMesh | None = None
        self._recorder = LayerRecorder(model, find_moe_layers(model), signals) if signals else None
        self._placed = PlacedModel(
            model, offload=options.placement == "offload", rounded=options.quantize == "int8"
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the weights while they rest."""
        return self._placed.num_bytes

    def place(self, device: torch.device) -> None:
        """Moves the model; layers that are offloaded stay in main memory."""
        if self._options.placement != "sharded":
            self._placed.place(device)
            return
        if self._mesh is None:
            number = torch.distributed.get_world_size()
            self._mesh = init_device_mesh(device.type, (number,))
        # Each time: being asked leaves what lies outside the layers whole.
        shard(self.model, self._mesh)

    @torch.no_grad()
    def answer(
        self, batch: Batch, counted: Bool[Tensor, "batch sequence"], split: str, layers: bool
    ) -> TeacherAnswer:
        """Runs the model up to its head."""
        # First: it waits for the device.
        positions = flat_positions(counted)
        signals: dict[str, LayerSignals] | None = None
        if layers:
            if self._recorder is None:
                raise ValueError("no signals of the teacher are recorded; name them at its making")
            with self._recorder.recording(counted) as signals:
                states = final_states(self.model, batch)
        else:
            states = final_states(self.model, batch)
        states = states.flatten(0, 1).index_select(0, positions)

        @torch.no_grad()
        def tokens(rows: slice) -> TeacherTokens:
            return FullTokens(logits_of(self.model, states[rows]))

        return TeacherAnswer(tokens, signals)


class CachedTeacher(Teacher):
    """What was kept of the original's answers; the original need not be in memory.

    Every byte is read once when it is opened, about a second a gigabyte.

    Args:
        path: Folder of the answers.
        wanted: What they must be made from.

    Raises:
        InputError: They are made from something else, or incomplete, or damaged.
    """

    def __init__(self, path: Path, wanted: Manifest) -> None:
        self.cache = CacheFolder.read(path)
        self.cache.check_made_from(wanted)
        if missing := self.cache.missing():
            raise InputError(
                f"{path} lacks {len(missing)} files, such as {missing[0].name}; run "
                "`python -m lightning_smoe cache`, which makes only what is missing"
            )
        self._files = {
            split: [ShardFile(path, shard) for shard in self.cache.shards(split)]
            for split in self.cache.num_windows
        }
        for file in (file for files in self._files.values() for file in files):
            file.verify()

    def place(self, device: torch.device) -> None:
        """Leaves the answers on the disk."""

    def answer(
        self, batch: Batch, counted: Bool[Tensor, "batch sequence"], split: str, layers: bool
    ) -> TeacherAnswer:
        """Finds where the answers lie; they are read when they are asked for."""
        if layers:
            raise InputError(
                "an objective compares what layers do, which the cache does not hold: it needs the "
                f"teacher itself; set {_OPTIONS} to null, or take the objective away"
            )
        files, windows, rows = self._files[split], [], []
        for window, asked in zip(batch["window"].tolist(), counted.cpu(), strict=True):
            found = files[window // self.cache.windows_per_shard].rows_of(window, asked)
            windows.append(torch.full_like(found, window))
            rows.append(found)
        places = torch.stack([torch.cat(windows), torch.cat(rows)])
        temperature = self.cache.temperature_of(split)
        return TeacherAnswer(
            lambda asked: self._read(files, places[:, asked], temperature, counted.device)
        )

    def _read(
        self,
        files: list[ShardFile],
        places: Int[Tensor, "2 tokens"],
        temperature: float,
        device: torch.device,
    ) -> TeacherTokens:
        kept = self.cache.format
        windows, counts = places[0].unique_consecutive(return_counts=True)
        parts = [
            files[window // self.cache.windows_per_shard].read(rows)
            for window, rows in zip(windows.tolist(), places[1].split(counts.tolist()), strict=True)
        ]
        known: Float[Tensor, "tokens classes"] = torch.cat(
            [torch.empty(0, kept.num_columns, dtype=kept.dtype), *(p.log_probs for p in parts)]
        )
        if kept.is_whole:
            indices = torch.arange(kept.vocab_size).expand(len(known), -1)
        else:
            empty = torch.empty(0, kept.top_k, dtype=torch.int32)
            indices = torch.cat([empty, *(p.indices for p in parts if p.indices is not None)])
        return TopTokens(indices.to(device), known.to(device).float(), temperature)
