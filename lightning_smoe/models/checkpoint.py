"""Loading a checkpoint, with its weights or without."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lightning_smoe.errors import InputError
from lightning_smoe.models.expert_count import text_config
from lightning_smoe.models.finite import refuse_not_finite
from lightning_smoe.models.folder import CheckpointFolder, open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.plain_tensors import plain_tensors
from lightning_smoe.models.refusals import refuse_family
from lightning_smoe.models.registration import register
from lightning_smoe.models.unused import sayings

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes, as torch allocates
_LONGEST_REASON = 500  # characters
# What transformers raises over fields of a wrong type or size, few of which it checks.
_NOT_UNDERSTOOD = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def load(checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a causal language model for use, in evaluation mode, on the CPU.

    Folders that this project wrote with another expert count in each layer load too, as do those
    whose router rows share experts, by this project's code and not by what lies in the folder.

    Args:
        checkpoint: Folder, or name on the Hugging Face hub.
        dtype: Type of the weights in memory.

    Raises:
        InputError: The folder is missing or damaged, lacks tensors that its configuration needs, or
            holds some that are not finite.
    """
    folder = open_checkpoint(checkpoint)
    config, model_class = _understood(folder)
    try:
        # Any: transformers declares no type for the pair that it returns here.
        loaded: Any = _read(_sized(model_class, folder.experts_per_layer), folder, config, dtype)
    except InputError:
        raise
    except (*_NOT_UNDERSTOOD, SafetensorError) as error:
        raise InputError(f"{folder.path} cannot be loaded: {_reason(error)}") from error
    model: PreTrainedModel = loaded[0].eval()
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"] or report["mismatched_keys"]:
        lost = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))
        raise InputError(
            f"{folder.path} lacks {len(lost)} tensors that its config.json needs, such as "
            f"{lost[0]}; copy the checkpoint again"
        )
    warn_unused(folder, model, map(str, report["unexpected_keys"]))
    refuse_not_finite(folder.path, model.named_parameters())
    align(model)
    return model


def _reason(error: Exception) -> str:
    """What an error of a library says, in one line that is no page."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]


def _read(sized: Any, folder: CheckpointFolder, config: Any, dtype: torch.dtype) -> Any:
    """The model and what transformers says of the tensors that it found."""
    settings = {"config": config, "dtype": dtype, "output_loading_info": True}
    if folder.quantisation is None:
        return sized.from_pretrained(folder.path, **settings)
    say_dequantised(folder)
    with plain_tensors(folder) as tensor:
        state = {key: tensor(key) for key in folder.tensors}
        return sized.from_pretrained(None, state_dict=state, **settings)


def say_dequantised(folder: CheckpointFolder) -> None:
    """Says that a folder's weights are read in another type, if they are."""
    if folder.quantisation is not None:
        method = folder.quantisation.method
        logger.warning("%s: its %s weights are de-quantised to bfloat16", folder.path, method)


def warn_unused(folder: CheckpointFolder, model: nn.Module, keys: Iterable[str]) -> None:
    """Says which tensors of a folder the model has no place for, if there are any."""
    num_layers = text_config(model.config).num_hidden_layers
    for sentence in sayings(folder.tensors, keys, folder.config, num_layers):
        logger.warning("%s: %s", folder.path, sentence)


def align(model: nn.Module) -> None:
    """Moves weights to where torch would have put them.

    Where a tensor lies in its file decides which kernel multiplies it, and so the last bits of the
    product: without this, equal weights from two files give logits that differ by 1e-7.
    """
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def outline(folder: CheckpointFolder) -> PreTrainedModel:
    """Builds the model of a folder without any weight (on the meta device), to look at."""
    return _outline(folder, folder.experts_per_layer)


def stated_outline(folder: CheckpointFolder) -> PreTrainedModel:
    """The same as config.json has it, also where layers of the folder differ from that."""
    return _outline(folder, {})


def _outline(folder: CheckpointFolder, counts: Mapping[int, int]) -> PreTrainedModel:
    config, model_class = _understood(folder)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = _sized(model_class, counts)._from_config(config)
    except InputError:
        raise
    except _NOT_UNDERSTOOD as error:
        raise _not_understood(folder, error) from error
    return model


def _not_understood(folder: CheckpointFolder, error: Exception) -> InputError:
    return InputError(f"{folder.path}/config.json is not understood: {_reason(error)}")


def skeleton(folder: CheckpointFolder, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the model of a folder as `load` does, with weights that are not those of its files.

    Args:
        folder: The checkpoint.
        dtype: Type of the weights.
    """
    config, model_class = _understood(folder)
    model: PreTrainedModel = _sized(model_class, folder.experts_per_layer)._from_config(
        config, dtype=dtype
    )
    return model


def _understood(folder: CheckpointFolder) -> tuple[Any, type[PreTrainedModel]]:
    """The configuration of a folder and the class of transformers for it."""
    if folder.is_mapped:
        register(folder.model_type)
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    except _NOT_UNDERSTOOD as error:
        raise _not_understood(folder, error) from error
    # The weights are read as if they were stored plainly.
    config.__dict__.pop("quantization_config", None)
    refuse_family(config.model_type)
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
