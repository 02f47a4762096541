"""A compressed model that is written layer by layer, and goes on where a killed run was."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import finish
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.refit import RefitOutcome
from lightning_smoe.compression.streams import LayerSink
from lightning_smoe.models.artifact import put_in_place, require_space, write_json
from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.description import described
from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.progress import WalkProgress
from lightning_smoe.models.stored import stored_layout
from lightning_smoe.models.streamed import Streamed
from lightning_smoe.models.streamed_folder import StreamedFolder

_PROOF = "proof"


class StreamedResult(LayerSink):
    """Writes each layer of a compressed model to its place in the files of a checkpoint folder.

    Args:
        residence: The original.
        source: Its folder.
        plan: What becomes of its experts.
        target: Folder to write.
        progress: Where layers that are done are noted; the folder grows there.
        device: Where layers are worked on.
        writes: Whether this process is the one that writes.
    """

    def __init__(
        self,
        residence: Streamed,
        source: CheckpointFolder,
        plan: CompressionPlan,
        target: Path,
        *,
        progress: WalkProgress,
        device: torch.device,
        writes: bool = True,
    ) -> None:
        self._residence, self._source, self._target = residence, source, target
        self._progress, self._device, self._writes = progress, device, writes
        self.model = result_outline(source, plan)
        # Under the names that the original's files have.
        self.model.__dict__["_weight_conversions"] = residence.model._weight_conversions
        self.config = described(self.model, source)
        self._wanted = {layer.index: layer for layer in find_moe_layers(self.model)}

    def resume(self) -> tuple[int, dict[str, Tensor], dict[str, RefitOutcome]]:
        """Layers that an earlier run put here, the states behind them, and their refits."""
        layout = stored_layout(self.model, self._source)
        if self._writes and not self._progress.path("folder").is_dir():
            # A run that was killed behind the last step left notes of a folder that has its place.
            self._progress.close()
        begun = self._progress.open()
        states = self._progress.states(begun) if begun else {}
        if not self._writes:
            return begun, states, {}
        if not begun:
            require_space(self._target, layout.num_bytes)
        self._folder = StreamedFolder(
            self._residence, self._source, self._progress.path("folder"),
            layout=layout, device=self._device,
        )  # fmt: skip
        if not begun:
            self._folder.put_outside()
            return 0, states, {}
        noted = json.loads(self._noted(begun).read_text())
        self._folder.resume(states[_PROOF], noted["checksums"])
        return begun, states, {k: RefitOutcome(**v) for k, v in noted["refits"].items()}

    def put(
        self,
        index: int,
        decoder: nn.Module,
        states: Mapping[str, Tensor],
        refits: Mapping[str, RefitOutcome],
    ) -> None:
        """Writes a layer, and notes that it is done."""
        states = dict(states)
        if self._writes:
            self._share_alike(index)
            self._folder.put(index, decoder)
            outcomes = {name: asdict(refit) for name, refit in refits.items()}
            noted = {"checksums": self._folder.checksums, "refits": outcomes}
            write_json(self._noted(index + 1), noted)
            states[_PROOF] = self._folder.proof
        self._progress.note(index + 1, states)

    def _noted(self, done: int) -> Path:
        return self._progress.path(f"layers-{done:05d}.json")

    def _share_alike(self, index: int) -> None:
        """Gives a layer that the plan leaves as it is the map that its neighbours have."""
        wanted = self._wanted.get(index)
        if wanted is None or wanted.expert_map is None:
            return
        layer = MoELayer(wanted.name, self._residence.model.get_submodule(wanted.name))
        if layer.expert_map is None:
            layer.share(layer.weights(), torch.arange(layer.num_router_rows))

    def complete(self, write_beside: Callable[[Path], Any], dtype: torch.dtype) -> None:
        """Adds the other files, reads all back, and puts the folder into its place.

        Args:
            write_beside: Writes all but the weights.
            dtype: Type of the weights in memory.

        Raises:
            InputError: The folder does not give the model's weights or hidden states.
        """
        self._folder.finish()
        write_beside(self._folder.path)
        self._folder.verify(dtype)
        # In one step: a run that is killed finds the folder in the one place or in the other.
        put_in_place(self._folder.path, self._target)
        self._progress.close()


def result_outline(source: CheckpointFolder, plan: CompressionPlan) -> PreTrainedModel:
    """The model that a plan gives, without any weight."""
    model = outline(source)
    plans = plan.by_name()
    for layer in find_moe_layers(model):
        if layer.name not in plans:
            continue
        grouping = plans[layer.name].grouping
        first = torch.arange(grouping.num_groups, device=layer.experts.down_proj.device)
        if plan.router.keeps_all_rows:
            layer.share(layer.weights().select(first), grouping.assignment)
        else:
            layer.select(first)
    finish(model)
    return model
