"""Where a model that is only asked keeps its weights, and in how many bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.resting import RestingTensor, RoundedTensor, WholeTensor
from lightning_smoe.models.walk import decoder_layers


class PlacedModel:
    """A frozen model whose decoder layers rest in main memory, or in 8 bits, or both.

    A layer gets its weights when it is called and gives them up when it returns, so the device
    holds what rests there and one layer. Rounding is one way: the weights are not given back.

    Args:
        model: The model, changed in place; it is not to be trained or saved afterwards.
        offload: Leave the decoder layers in main memory; logits keep every bit.
        rounded: Hold the matrices of decoder layers in 8 bits, but for routers and for the gates
            of shared experts.
    """

    def __init__(self, model: nn.Module, *, offload: bool = False, rounded: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self._offload = offload
        self._layers: list[_RestingLayer] = []
        if not offload and not rounded:
            return
        kept = _routing_tensors(model)
        for layer in decoder_layers(model):
            resting = _RestingLayer(layer)
            if rounded:
                resting.round(kept)
            self._layers.append(resting)

    def place(self, device: torch.device) -> None:
        """Moves the model to where it is asked; what is offloaded stays and is brought there."""
        if not self._layers:
            self.model.to(device)
            return
        inside = {id(m) for layer in self._layers for m in layer.layer.modules()}
        moved: dict[int, Tensor] = {}
        for module in self.model.modules():
            for _, name, tensor in _tensors_of(module) if id(module) not in inside else ():
                # Tied weights stay one tensor.
                there = moved.setdefault(id(tensor), _like(tensor, tensor.detach().to(device)))
                _put(module, name, there)
        for layer in self._layers:
            layer.place(device, rest=torch.device("cpu") if self._offload else device)

    @property
    def num_bytes(self) -> int:
        """Memory that all weights take while no layer runs."""
        inside = {id(m) for layer in self._layers for m in layer.layer.modules()}
        outside = {
            id(tensor): tensor.numel() * tensor.element_size()
            for module in self.model.modules()
            if id(module) not in inside
            for _, _, tensor in _tensors_of(module)
        }
        return sum(outside.values()) + sum(layer.num_bytes for layer in self._layers)


class _RestingLayer:
    """One decoder layer, which has its weights only while it runs."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._own = [held for module in layer.modules() for held in _tensors_of(module)]
        self._resting: list[RestingTensor] = [WholeTensor(t.detach()) for _, _, t in self._own]
        self._device = torch.device("cpu")
        layer.register_forward_pre_hook(self._enter, prepend=True)
        # Also where a pass is cut short: what runs next must not find two layers on the device.
        layer.register_forward_hook(self._leave, always_call=True)

    def round(self, kept: set[int]) -> None:
        for number, (module, name, tensor) in enumerate(self._own):
            if id(tensor) in kept or not _is_matrix(name, tensor):
                continue
            self._resting[number] = RoundedTensor.of(tensor.detach(), _inputs_of(module, tensor))
            # Nothing else may hold the numbers: the memory is to be free. The shape stays known.
            outline = _like(tensor, tensor.detach().to("meta"))
            self._own[number] = (module, name, outline)
            _put(module, name, outline)

    def place(self, device: torch.device, rest: torch.device) -> None:
        self.bring(device)
        self._resting = [tensor.moved(rest) for tensor in self._resting]

    def bring(self, device: torch.device) -> None:
        self._device = device

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self._resting)

    def _enter(self, *_: Any) -> None:
        for (module, name, own), resting in zip(self._own, self._resting, strict=True):
            _put(module, name, _like(own, resting.fetch(self._device)))

    def _leave(self, *_: Any) -> None:
        for module, name, own in self._own:
            _put(module, name, own)


@contextmanager
def brought(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Lets a decoder layer run on a device for a while, whether or not it rests; then on the CPU.

    Args:
        layer: The layer, on the CPU.
        device: Where it runs.
    """
    owners = (getattr(hook, "__self__", None) for hook in layer._forward_pre_hooks.values())
    resting = next((owner for owner in owners if isinstance(owner, _RestingLayer)), None)
    move = layer.to if resting is None else resting.bring
    move(device)
    try:
        yield
    finally:
        move(torch.device("cpu"))


def _is_matrix(name: str, tensor: Tensor) -> bool:
    """Says whether a tensor is a weight that is worth rounding; an expert's bias has two axes."""
    is_weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return is_weight and tensor.dim() in (2, 3) and not name.endswith("bias")


def _inputs_of(module: Any, tensor: Tensor) -> tuple[int, ...]:
    """The axes of a matrix that are summed over: all but outputs, and experts where there are."""
    if hasattr(module, "is_transposed") and tensor.dim() > 2:
        return (1,) if module.is_transposed else (2,)
    return tuple(range(1, tensor.dim()))


def _routing_tensors(model: nn.Module) -> set[int]:
    """Identities of the tensors that decide which experts run, and how much a shared one adds."""
    found: set[int] = set()
    for layer in find_moe_layers(model):
        shared_gate = (layer.shared_expert or (None, None))[1]
        gates = [layer.router, *([] if shared_gate is None else [shared_gate])]
        found |= {id(parameter) for gate in gates for parameter in gate.parameters()}
    return found


def _tensors_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The tensors that a module holds itself, with the module and their names."""
    for name, parameter in module.named_parameters(recurse=False):
        yield module, name, parameter
    for name, buffer in module.named_buffers(recurse=False):
        yield module, name, buffer


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    # Not setattr: transformers and torch check and count what is set that way, for every call.
    place = module._parameters if name in module._parameters else module._buffers
    place[name] = tensor  # type: ignore[assignment]  # a parameter in the place of one


def _like(own: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=False) if isinstance(own, nn.Parameter) else values
