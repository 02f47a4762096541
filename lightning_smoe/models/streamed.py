"""A checkpoint larger than memory: one decoder layer at a time comes from its files.

Calls what transformers keeps for itself about reading weights (tried in 5.23 and 5.24), as there is
no public call that reads one layer.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import align, say_dequantised, skeleton, warn_unused
from lightning_smoe.models.finite import refuse_not_finite
from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.layer import decoder_layer_of, find_moe_layers
from lightning_smoe.models.parameter_places import free, move, place_of
from lightning_smoe.models.plain_tensors import plain_tensors
from lightning_smoe.models.residence import Outside, Residence
from lightning_smoe.models.stored import TORCH_TYPES
from lightning_smoe.models.walk import decoder_layers
from lightning_smoe.models.weight_reading import readable_weights


class Streamed(Residence):
    """A model whose decoder layers are read from the files of a checkpoint, each when it is held.

    Held weights have every bit that `load` would give them.

    Args:
        folder: The checkpoint.
        dtype: Type of the weights in memory.

    Raises:
        InputError: The checkpoint lacks tensors that its configuration needs.
    """

    def __init__(self, folder: CheckpointFolder, dtype: torch.dtype = torch.float32) -> None:
        with init_empty_weights(include_buffers=False):
            model = skeleton(folder, dtype)
        super().__init__(model.eval())
        self._folder, self._dtype = folder, dtype
        self._held: set[int] = set()
        self._path, _ = decoder_layer_of(find_moe_layers(model)[0].name)
        self._plan = model._get_dtype_plan(dtype)
        self._mapping: list[Any] = get_model_conversion_mapping(model)
        say_dequantised(folder)
        readable = readable_weights(folder, model, dtype) if folder.quantisation is None else None
        self._readable = {} if readable is None else readable[0]
        self._sources = self._find_sources()
        self._check_complete()
        # What writes the model again goes by the conversions that were of use.
        self._used = [entry for entry in self._mapping if entry.was_used()]
        self._forget()

    @property
    def streams(self) -> bool:
        """Yes: what was done to a layer is to be written while it is held."""
        return True

    @contextmanager
    def layer(self, index: int, device: torch.device) -> Iterator[nn.Module]:
        """Reads a decoder layer, and frees it behind."""
        layer = decoder_layers(self.model)[index]
        if index in self._held:
            yield layer
            return
        self._held.add(index)
        self._bring(k for k in self._sources if k.startswith(f"{self._path}.{index}."))
        try:
            yield layer.to(device)
        finally:
            self._held.discard(index)
            free(layer.modules())

    @contextmanager
    def outside(self, device: torch.device, part: Outside = "all") -> Iterator[PreTrainedModel]:
        """Reads embedding, norm and head, and frees them behind."""
        left_out = self._left_out(part)
        inside = {id(module) for module in decoder_layers(self.model).modules()}
        modules = [m for m in self.model.modules() if id(m) not in inside]
        names = (k for k in self._sources if not k.startswith(f"{self._path}."))
        self._bring(name for name in names if name not in left_out)
        self.model.tie_weights()
        for module in modules:
            move(module, device)
        self.model.tie_weights()
        try:
            yield self.model
        finally:
            free(modules)
            # What was tied is one tensor without its numbers, too.
            self.model.tie_weights()

    def _left_out(self, part: Outside) -> set[str]:
        inner: Any = self.model.get_input_embeddings()
        outer: Any = self.model.get_output_embeddings()
        if part == "all" or outer is None:
            return set()
        unwanted = outer if part == "inputs" else inner
        tied = self.model.all_tied_weights_keys
        return {
            f"{path}.{name}"
            for path, module in self.model.named_modules()
            if module is unwanted
            for name in module.state_dict()
        } - {*tied, *tied.values()}

    def _find_sources(self) -> dict[str, list[str]]:
        """The tensors of the files that each tensor of the model is made of."""
        renamings = [m for m in self._mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self._mapping if isinstance(m, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        found: dict[str, list[str]] = {}
        unused = []
        for key in self._folder.tensors:
            target, _ = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state:
                # As transformers does: the key may be the model's own already.
                target, _ = rename_source_key(key, [], [], prefix, state)
            if target in state:
                found.setdefault(target, []).append(key)
            else:
                unused.append(key)
        warn_unused(self._folder, self.model, unused)
        return found

    def _check_complete(self) -> None:
        # Of one source pattern several tensors may be made; the first of them stands for all.
        makers = [m.target_patterns for m in self._mapping if isinstance(m, WeightConverter)]
        made_together = {pattern for targets in makers for pattern in targets[1:]}
        tied = self.model.all_tied_weights_keys
        lost = [
            name
            for name in self.model.state_dict()
            if name not in self._sources
            and name not in tied
            and not any(pattern in name for pattern in made_together)
        ]
        if lost:
            raise InputError(
                f"{self._folder.path} lacks {len(lost)} tensors that its config.json needs, such "
                f"as {min(lost)}; copy the checkpoint again"
            )

    def _bring(self, targets: Iterable[str]) -> None:
        """Reads tensors of the model, one at a time, as each may be put together of many."""
        for target in targets:
            if self._read_into_place(target):
                continue
            wanted = self._store_as_in_files(target)
            self._read(self._sources[target])
            if wanted is not None:
                module, name = place_of(self.model, target)
                whole = module._parameters[name].to(wanted)  # type: ignore[union-attr] # is there
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
        # What is away is passed over.
        refuse_not_finite(self._folder.path, self.model.named_parameters())
        align(self.model)
        self._forget()

    def _read_into_place(self, target: str) -> bool:
        """Reads a parameter whose parts are only stacked; says whether it is one."""
        module, name = place_of(self.model, target)
        old, weight = module._parameters.get(name), self._readable.get(target)
        if old is None or weight is None or old.shape != weight.shape:
            return False
        place = torch.empty(old.shape, dtype=old.dtype)
        weight.read_into(place)
        module._parameters[name] = nn.Parameter(place, requires_grad=False)
        return True

    def _store_as_in_files(self, target: str) -> torch.dtype | None:
        """Lets a parameter be put together in its type on disk, which takes half the memory.

        Returns:
            The type to convert it to; none where it is read in that type.
        """
        types = {self._folder.tensors[key]["dtype"] for key in self._sources[target]}
        module, name = place_of(self.model, target)
        old = module._parameters.get(name)
        stored = TORCH_TYPES.get(types.pop()) if len(types) == 1 else None
        if old is None or stored is None or old.dtype != torch.float32 or stored == old.dtype:
            return None
        outline = torch.empty(old.shape, dtype=stored, device="meta")
        module._parameters[name] = nn.Parameter(outline, requires_grad=False)
        return old.dtype

    def _read(self, keys: Iterable[str]) -> None:
        with plain_tensors(self._folder) as tensor:
            slices = {key: tensor(key) for key in keys}
            settings = LoadStateDictConfig(
                weight_mapping=copy.deepcopy(self._mapping),
                device_map={"": "cpu"},
                dtype=self._dtype,
                dtype_plan=self._plan,
            )
            try:
                with _no_progress_bar():
                    info, _ = convert_and_load_state_dict_in_model(self.model, slices, settings)
            except (RuntimeError, SafetensorError) as error:
                raise InputError(f"{self._folder.path} cannot be read: {error}") from error
        wrong = [*info.mismatched_keys, *info.conversion_errors]
        if wrong:
            raise InputError(
                f"{self._folder.path}: {wrong[0]} has not the shape that config.json says; "
                "copy the checkpoint again"
            )

    def _forget(self) -> None:
        """Sets what reading a part notes on the model back to what holds for all of it."""
        # As transformers does; its declaration of modules does not say so.
        self.model.__dict__["_weight_conversions"] = self._used


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keeps transformers from showing a bar for each tensor."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
