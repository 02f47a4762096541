"""How a block selects experts: its router's tensors, how many it selects, and from what groups."""

from typing import Any

from torch import nn

from lightning_smoe.errors import InputError
from lightning_smoe.models.expert_count import TOP_K_FIELDS
from lightning_smoe.models.router import RouterTensor, find_router_tensors

# The names in DeepSeek-V3 and in DeepSeek-V2, and what copies them.
_GROUPS = ("n_group", "num_group")
_CHOSEN_GROUPS = "topk_group"
# Best experts of a group whose choice scores are summed up to the group's.
_SCORING = 2


class Routing:
    """The module that selects the experts of a block, understood.

    Args:
        name: Path of the block in its model.
        module: The module.
        block: The block, which may hold a part of it.
        num_rows: Experts that it tells apart.

    Raises:
        InputError: It is not one matrix with a row for each expert, or does not say how many it
            selects.
    """

    def __init__(self, name: str, module: nn.Module, block: nn.Module, num_rows: int) -> None:
        self.module, self._block = module, block
        self.tensors = find_router_tensors(module, block, num_rows)
        self._weights = [tensor for tensor in self.tensors if tensor.kind == "weight"]
        lookup = [n for n, b in module.named_buffers() if not b.is_floating_point()]
        if len(self._weights) != 1 or lookup:
            raise InputError(
                f"{name}: the router ({type(module).__name__}) is not one matrix with a row for "
                f"each of {num_rows} experts; this family cannot be compressed"
            )
        if self._selected() is None:
            raise InputError(
                f"{name}: the router ({type(module).__name__}) does not say how many experts it "
                "selects; this family cannot be compressed"
            )

    @property
    def weight(self) -> RouterTensor:
        """The matrix that maps hidden states to logits."""
        return self._weights[0]

    @property
    def top_k(self) -> int:
        """Rows that are selected for a token."""
        return int(self._selected() or 0)

    def _selected(self) -> int | None:
        for module in (self.module, self._block):
            if hasattr(module, "top_k"):
                # Any: whatever a module of transformers holds under this name.
                found: Any = module.top_k
                return int(found)
        config = getattr(self.module, "config", None)
        stated = (getattr(config, field, None) for field in TOP_K_FIELDS)
        return next((number for number in stated if isinstance(number, int)), None)

    @property
    def num_groups(self) -> int:
        """Equal contiguous groups of experts among which it first chooses (1 = none)."""
        return max(int(getattr(self.module, name, None) or 1) for name in _GROUPS)

    @property
    def min_per_group(self) -> int:
        """Experts that a group must keep: two score it, and the chosen groups hold top_k."""
        if self.num_groups == 1:
            return 1
        chosen = int(getattr(self.module, _CHOSEN_GROUPS, None) or 1)
        return max(_SCORING, -(-self.top_k // chosen))
