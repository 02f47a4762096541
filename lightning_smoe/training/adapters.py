"""Attaching adapters to a model, saving them in peft's format, and merging them into it."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import replacing
from lightning_smoe.training.lora import Lora, check_lora, find_targets, lora_config
from lightning_smoe.training.trainable import (
    Trainable,
    TrainedGroup,
    find_trained,
    hold_trainable,
)

logger = logging.getLogger(__name__)

# peft's own name of the only adapter of a model.
_ADAPTER = "default"
_ADAPTER_PARAMETER = ".lora_"


def prepare_training(
    model: PreTrainedModel,
    trainable: Trainable,
    lora: Lora | None,
    *,
    learning_rate: float,
    seed: int = 0,
) -> list[TrainedGroup]:
    """Lets only what is named change, in place, and attaches adapters that change no logit yet.

    Trained tensors are float32. Objects of `MoELayer` have to be found before: adapters wrap what
    they hold. Their modules, and hooks on them, stay.

    Args:
        model: A plain model of transformers.
        trainable: What is trained in full.
        lora: What is adapted; none adapts nothing.
        learning_rate: Step size where none is named.
        seed: Of the adapters' first values.

    Returns:
        What is trained, adapters as `lora <target>`.

    Raises:
        InputError: See `find_trained` and `check_lora`.
    """
    groups = find_trained(model, trainable, learning_rate)
    if lora is not None:
        check_lora(model, lora, groups)
        groups += _attach(model, lora, learning_rate, seed)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [
            TrainedGroup(g.name, {names[id(p)]: p for p in g.parameters.values()}, g.learning_rate)
            for g in groups
        ]
    hold_trainable(model, groups)
    return groups


def _attach(
    model: PreTrainedModel, lora: Lora, learning_rate: float, seed: int
) -> list[TrainedGroup]:
    from peft import inject_adapter_in_model

    target_of = {n: target for target, names in find_targets(model, lora).items() for n in names}
    config = lora_config(model, lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    found: dict[str, dict[str, nn.Parameter]] = {target: {} for target in target_of.values()}
    for name, module in model.named_modules():
        weight = _adapted_weight(name, module)
        if weight is not None:
            adapters = dict(module.named_parameters(prefix=name))
            own = {n: p for n, p in adapters.items() if n.startswith(f"{name}.lora_")}
            found[target_of[weight]].update(own)
    rate = lora.learning_rate or learning_rate
    return [TrainedGroup(f"lora {target}", own, rate) for target, own in found.items()]


def _adapted_weight(name: str, module: nn.Module) -> str | None:
    """Full name that the weight of an adapter had before; none for any other module."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return None
    # Only what adapts a parameter of any module says which.
    attribute = getattr(module, "parameter_name", "weight")
    return f"{name}.{attribute}".replace(".base_layer", "")


def merge_trained(
    model: PreTrainedModel,
    lora: Lora,
    state: Mapping[str, Tensor],
    *,
    adapter: Path | None = None,
    adapted: str = "",
) -> str | None:
    """Puts what was trained into a model as it was before, in place; it stays a plain model.

    Sums are formed in float32; weights keep their types.

    Args:
        model: The model as training began with it.
        lora: How it was adapted.
        state: Trained tensors, by their names in the model that was trained.
        adapter: Folder for the adapter in peft's format; none writes none.
        adapted: Folder of the model as it was before, which the adapter names.

    Returns:
        Why no adapter was written although a folder is named; none if it was.

    Raises:
        InputError: The state is not of a model adapted in this way.
    """
    types = [(parameter, parameter.dtype) for parameter in model.parameters()]
    changed = {n: p for n, p in model.named_parameters() if n in _weights_of(model, lora, state)}
    for parameter in changed.values():
        parameter.data = parameter.data.float()
    wrapped = _wrap(model, lora)
    _load(model, state)
    refusal = None
    in_full = sorted(name for name in state if _ADAPTER_PARAMETER not in name)
    if adapter is not None and in_full:
        refusal = (
            f"no adapter is written: {len(in_full)} tensors were trained in full beside it, such "
            f"as {in_full[0]}, and it would not give the trained model without them"
        )
        logger.warning(refusal)
    elif adapter is not None:
        _save(wrapped, adapter, adapted)
    wrapped.merge_and_unload()
    for parameter, dtype in types:
        parameter.data = parameter.data.to(dtype)
    return refusal


def _wrap(model: PreTrainedModel, lora: Lora) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by a name that transformers 6 will not have.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, lora_config(model, lora), adapter_name=_ADAPTER)


def _weights_of(model: PreTrainedModel, lora: Lora, state: Mapping[str, Tensor]) -> set[str]:
    adapted = {name for names in find_targets(model, lora).values() for name in names}
    return adapted | {name.replace(".base_layer", "") for name in state}


@torch.no_grad()
def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    adapters = {name for name in parameters if _ADAPTER_PARAMETER in name}
    differ = (adapters - state.keys()) | (state.keys() - parameters.keys())
    if differ:
        raise InputError(
            f"the trained tensors are of a model that was adapted otherwise (such as "
            f"{min(differ)}); name the settings of model.recovery.lora that it was trained with"
        )
    for name, value in state.items():
        parameters[name].copy_(value)


def _save(wrapped: Any, folder: Path, adapted: str) -> None:
    wrapped.peft_config[_ADAPTER].base_model_name_or_path = adapted
    with replacing(folder) as partial:
        # Embeddings are never adapted; asked to find out, peft would look for the model's folder.
        wrapped.save_pretrained(partial, save_embedding_layers=False)
