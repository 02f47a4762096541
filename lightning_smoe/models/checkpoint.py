"""Loading a checkpoint, saving one that stock transformers loads, and proving that it does."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import Manifest, replacing, require_space
from lightning_smoe.models.expert_count import patch_expert_count
from lightning_smoe.models.folder import MANIFEST, CheckpointFolder, open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.mapped import become_mapped, is_mapped, mapped_fields
from lightning_smoe.models.registration import register
from lightning_smoe.models.stored import TORCH_TYPES, type_in_folder

logger = logging.getLogger(__name__)

_SHARD_SIZE = "5GB"
_VERIFY_TOKENS = 32
_ALIGNMENT = 64  # bytes, as torch allocates


def load(checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a causal language model for use, in evaluation mode, on the CPU.

    Folders that this project wrote with another expert count in each layer load too, as do those
    whose router rows share experts, by this project's code and not by what lies in the folder.

    Args:
        checkpoint: Folder, or name on the Hugging Face hub.
        dtype: Type of the weights in memory.

    Raises:
        InputError: The folder is missing, damaged, or lacks tensors that its configuration needs.
    """
    folder = open_checkpoint(checkpoint)
    config, model_class = _understood(folder)
    try:
        # Any: transformers declares no type for the pair that it returns here.
        loaded: Any = _sized(model_class, folder.experts_per_layer).from_pretrained(
            folder.path, config=config, dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{folder.path} cannot be loaded: {error}") from error
    model: PreTrainedModel = loaded[0].eval()
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"] or report["mismatched_keys"]:
        lost = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))
        raise InputError(
            f"{folder.path} lacks {len(lost)} tensors that its config.json needs, such as "
            f"{lost[0]}; copy the checkpoint again"
        )
    if report["unexpected_keys"]:
        extra = sorted(map(str, report["unexpected_keys"]))
        logger.warning("%s: %d tensors are not used, such as %s", folder.path, len(extra), extra[0])
    _align(model)
    return model


def _align(model: nn.Module) -> None:
    """Moves weights to where torch would have put them.

    Where a tensor lies in its file decides which kernel multiplies it, and so the last bits of the
    product: without this, equal weights from two files give logits that differ by 1e-7.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def outline(folder: CheckpointFolder) -> PreTrainedModel:
    """Builds the model of a folder without any weight (on the meta device), to look at."""
    return _outline(folder, folder.experts_per_layer)


def _outline(folder: CheckpointFolder, counts: Mapping[int, int]) -> PreTrainedModel:
    config, model_class = _understood(folder)
    with torch.device("meta"):
        model: PreTrainedModel = _sized(model_class, counts)._from_config(config)
    return model


def _understood(folder: CheckpointFolder) -> tuple[Any, type[PreTrainedModel]]:
    """The configuration of a folder and the class of transformers for it."""
    if folder.is_mapped:
        register(folder.model_type)
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    except (KeyError, ValueError, StrictDataclassError) as error:
        raise InputError(f"{folder.path}/config.json is not understood: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{folder.path} is no causal language model but a {config.model_type}")
    # Any: the mapping is declared for pairs of classes too, which this one never holds.
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, found.config_class):
        raise InputError(
            f"{folder.path} is a {config.model_type}, of which the language model is one part; "
            "save that part alone as a checkpoint"
        )
    return config, found


def _sized(model_class: type[PreTrainedModel], counts: Mapping[int, int]) -> type[PreTrainedModel]:
    """Subclasses a model so that it is built with its own number of experts in some layers."""
    if not counts:
        return model_class

    def init(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(model, config, *args, **kwargs)
        resize_layers(model, counts)

    # Name and module stay the stock class's: transformers finds the layout of the files by them.
    body = {"__init__": init, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), body)


def resize_layers(model: nn.Module, counts: Mapping[int, int]) -> None:
    """Cuts the named decoder layers down to their first experts, as places for weights to come."""
    for layer in find_moe_layers(model):
        if layer.index in counts:
            layer.select(torch.arange(counts[layer.index], device=layer.experts.down_proj.device))


def save(
    model: PreTrainedModel,
    source: CheckpointFolder,
    target: Path,
    *,
    manifest: Manifest,
    card: str,
) -> None:
    """Writes a compressed model beside the files of its original, and proves that it reloads.

    The weights of `model` are rounded in place to the type in which they are stored, and it is put
    in evaluation mode; if router rows share experts, it becomes a mapped model. The folder appears
    only after it was reloaded and gave the same weights and logits bit for bit.

    Args:
        model: The model, in memory.
        source: Folder of the original: its config.json is copied but for the number of experts (or
            how they are shared), its tokenizer and generation settings byte for byte.
        target: Folder to write.
        manifest: What made it.
        card: Text of the model card.

    Raises:
        OSError: No space is left on the disk; nothing is written.
        InputError: The reloaded folder does not give the model's weights or logits.
    """
    config, uneven = _described(model, source)
    state = _round_in_place(model, source)
    require_space(target, sum(t.numel() * t.element_size() for t in state.values()))
    with replacing(target) as partial:
        model.save_pretrained(partial, state_dict=state, max_shard_size=_SHARD_SIZE)
        for file in partial.glob("*.json"):
            if file.name != "model.safetensors.index.json":
                file.unlink()
        for file in source.other_files:
            shutil.copyfile(file, partial / file.name)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text, "utf-8")
        (partial / "README.md").write_text(card, "utf-8")
        stored = {"schema": 1, "experts_per_layer": uneven, "manifest": manifest.to_json()}
        (partial / MANIFEST).write_text(json.dumps(stored, indent=1) + "\n")
        verify(partial, model)


def _described(
    model: PreTrainedModel, source: CheckpointFolder
) -> tuple[dict[str, Any], dict[str, int]]:
    """The configuration of a model, and the layers whose count it cannot say."""
    if is_mapped(model):
        become_mapped(model)
        return mapped_fields(model, source.config), {}
    return counted_config(source, {x.index: x.num_experts for x in find_moe_layers(model)})


def counted_config(
    source: CheckpointFolder, counts: dict[int, int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The configuration for these counts, and the layers whose count it cannot say."""
    # What config.json says, also where the layers of the source differ from it.
    stated = {layer.num_experts for layer in find_moe_layers(_outline(source, {}))}
    if len(set(counts.values())) == 1 == len(stated):
        old, new = stated.pop(), next(iter(counts.values()))
        config = source.config if old == new else patch_expert_count(source.config, old, new)
        return config, {}
    return source.config, {str(index): count for index, count in counts.items()}


@torch.no_grad()
def _round_in_place(model: PreTrainedModel, source: CheckpointFolder) -> dict[str, torch.Tensor]:
    """Rounds every weight to the type it has in the source, and returns the state to store."""
    state: dict[str, torch.Tensor] = {}
    by_address: dict[int, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            state[key] = tensor
        elif tensor.data_ptr() in by_address:
            # Tied weights stay one tensor, so that they are stored once.
            state[key] = by_address[tensor.data_ptr()]
        else:
            stored = type_in_folder(model, source, key, tensor)
            state[key] = tensor.to(TORCH_TYPES.get(stored, tensor.dtype))
            tensor.copy_(state[key])
            by_address[tensor.data_ptr()] = state[key]
    return state


@torch.no_grad()
def verify(folder: Path, model: PreTrainedModel) -> None:
    """Reloads a folder; compares its weights and logits with the model's, in evaluation mode.

    Raises:
        InputError: They differ in a single bit, or a tensor is missing.
    """
    # A router may draw at random while it is trained.
    model.eval()
    device = next(model.parameters()).device
    reloaded = load(folder, next(model.parameters()).dtype)
    reloaded.to(device)  # type: ignore[arg-type]  # declared wrongly in transformers 5.23
    stored = reloaded.state_dict()
    changed = [k for k, t in model.state_dict().items() if not torch.equal(t, stored[k])]
    if changed:
        raise InputError(
            f"{folder} does not give the model's weights when reloaded ({', '.join(changed)}); "
            "please report this with the family of the model"
        )
    size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]  # Any module
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size, (1, _VERIFY_TOKENS), generator=generator).to(device)
    expected, found = model(tokens).logits, reloaded(tokens).logits
    if not torch.equal(expected, found):
        difference = (expected - found).abs().max().item()
        raise InputError(
            f"{folder} does not give the model's logits when reloaded (they differ by "
            f"{difference:.1e}); please report this with the family of the model"
        )
