"""The tensors of a router that have an expert axis."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class RouterTensor:
    """One tensor of a router that has an expert axis.

    Args:
        owner: Module that holds it.
        attribute: Its name there.
        axis: Which axis counts experts.
        kind: `weight` maps hidden states to logits, `bias` is added to the logits, `selection` is
            added only where experts are chosen (or scales them), as in DeepSeek-V3.
        num_shared: Last rows of the tensor that score shared experts; they stay as they are.
    """

    owner: nn.Module
    attribute: str
    axis: int
    kind: Literal["weight", "bias", "selection"]
    num_shared: int = 0

    @property
    def rows(self) -> Float[Tensor, "experts ..."]:
        """The tensor with its expert axis first."""
        return self._all[: len(self._all) - self.num_shared]

    @property
    def _all(self) -> Float[Tensor, "experts ..."]:
        tensor: Tensor = getattr(self.owner, self.attribute)
        return tensor.movedim(self.axis, 0)

    def set(self, rows: Tensor) -> None:
        """Puts other rows in its place, in the type it had."""
        if self.num_shared:
            shared = self._all[-self.num_shared :]
            rows = torch.cat([rows.to(shared), shared])
        assign(self.owner, self.attribute, rows.movedim(0, self.axis))


def find_router_tensors(
    router: nn.Module, block: nn.Module, num_experts: int
) -> list[RouterTensor]:
    """Finds every tensor of a router that has an expert axis, also those that its block holds."""
    found = []
    modules = [*router.modules(), block]
    for module in modules:
        shared = _num_shared(module)
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for attribute, tensor in named:
            if shared and tensor.dim() > 1 and len(tensor) == num_experts + shared:
                found.append(RouterTensor(module, attribute, 0, "weight", shared))
                continue
            axis = 0 if tensor.shape[:1] == (num_experts,) else -1
            if not tensor.dim() or tensor.shape[axis] != num_experts:
                continue
            if tensor.dim() > 1 and axis == 0:
                found.append(RouterTensor(module, attribute, 0, "weight"))
            elif attribute == "bias":
                found.append(RouterTensor(module, attribute, axis, "bias"))
            elif attribute.endswith("bias") or attribute == "per_expert_scale":
                found.append(RouterTensor(module, attribute, axis, "selection"))
    return found


def _num_shared(router: nn.Module) -> int:
    """Shared experts that a router says it scores beside the routed ones, as Inkling's does."""
    return int(getattr(router, "n_shared_experts", None) or 0)


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts another tensor in the place of a parameter or buffer, in the type it had."""
    old: Tensor = getattr(module, name)
    # A copy even where the layout already fits: a view would keep the old experts in memory.
    new = value.to(old.dtype).clone(memory_format=torch.contiguous_format)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, name, new)
