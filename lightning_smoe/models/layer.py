"""One typed view on every mixture-of-experts block of transformers.

Only this file, `router.py`, `expert_weights.py` and `expert_count.py` know the names and layouts of
transformers; `modeling_smoe.py` goes by itself.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_smoe.errors import InputError
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.models import expert_weights
from lightning_smoe.models.expert_count import COUNT_FIELDS, text_config
from lightning_smoe.models.modeling_smoe import MAP, share_experts
from lightning_smoe.models.router import RouterTensor, find_router_tensors

_ROUTER_CHILDREN = ("gate", "router")
_COUNT_ATTRIBUTES = ("num_experts", "num_local_experts", "n_routed_experts", "out_features")


class MoELayer:
    """A mixture-of-experts block: a router beside experts, in whatever memory layout.

    Args:
        name: Path of the block in its model, such as `model.layers.3.mlp`.
        block: The module that holds router and experts.

    Raises:
        InputError: The block has experts but is not built as this class understands.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        children = dict(block.named_children())
        self.name = name
        self.block = block
        self.experts: Any = children["experts"]
        router = next((children[k] for k in _ROUTER_CHILDREN if k in children), None)
        if router is None or not expert_weights.is_understood(self.experts):
            raise InputError(
                f"{name}: the experts ({type(self.experts).__name__}) are laid out in a way that "
                "is not understood; lightning_smoe/models/README.md lists the families that are"
            )
        self.router: Any = router
        self.router_tensors = find_router_tensors(router, block, self.num_router_rows)
        self._refuse_unknown_router()

    @property
    def index(self) -> int:
        """Number of the decoder layer that the block belongs to, counted from zero."""
        return decoder_layer_of(self.name)[1]

    @property
    def num_experts(self) -> int:
        """Routed experts, without shared ones."""
        return int(self.experts.down_proj.shape[0])

    @property
    def expert_map(self) -> Int[Tensor, " rows"] | None:
        """The expert of each router row, where rows share experts; none where each has its own."""
        found: Tensor | None = getattr(self.experts, MAP, None)
        return found

    @property
    def num_router_rows(self) -> int:
        """Experts that the router tells apart: more than there are, where rows share one."""
        return self.num_experts if self.expert_map is None else len(self.expert_map)

    @property
    def top_k(self) -> int:
        """Router rows that are selected for a token."""
        owner: Any = self.router if hasattr(self.router, "top_k") else self.block
        return int(owner.top_k)

    @property
    def hidden_size(self) -> int:
        """Width of an expert's output."""
        return int(self.experts.down_proj.shape[2 if self.experts.is_transposed else 1])

    @property
    def intermediate_size(self) -> int:
        """Neurons of an expert."""
        return int(self.experts.down_proj.shape[1 if self.experts.is_transposed else 2])

    @property
    def num_router_groups(self) -> int:
        """Equal contiguous groups of experts among which the router first chooses (1 = none)."""
        return max(int(getattr(self.router, n, None) or 1) for n in ("n_group", "num_group"))

    @property
    def min_experts_per_router_group(self) -> int:
        """Experts that a router group must keep: two score it, and a token's groups hold top_k."""
        chosen = int(getattr(self.router, "topk_group", None) or 1)
        return max(2, -(-self.top_k // chosen)) if self.num_router_groups > 1 else 1

    @property
    def shared_expert(self) -> tuple[nn.Linear, nn.Module | None] | None:
        """The shared expert's output matrix and the module whose sigmoid scales it, if any."""
        for name, child in self.block.named_children():
            down_proj = getattr(child, "down_proj", None)
            if name.startswith("shared") and isinstance(down_proj, nn.Linear):
                return down_proj, getattr(self.block, f"{name}_gate", None)
        return None

    def parameters_of(self, part: Literal["router", "experts", "shared"]) -> list[nn.Parameter]:
        """Parameters of one part of the block; `shared` counts the shared expert and its gate."""
        if part == "router":
            fixed = {id(tensor) for tensor in self.selection_tensors()}
            return [p for p in self.router.parameters() if id(p) not in fixed]
        if part == "experts":
            return list(self.experts.parameters())
        children = self.block.named_children()
        return [p for n, c in children if n.startswith("shared") for p in c.parameters()]

    def selection_tensors(self) -> list[Tensor]:
        """Tensors that only decide which experts are selected: no gradient reaches them."""
        found = [t for t in self.router_tensors if t.kind == "selection"]
        return [getattr(tensor.owner, tensor.attribute) for tensor in found]

    def weights(self) -> ExpertWeights:
        """The experts' weights in one layout: gate apart from up, outputs on the second axis."""
        found = expert_weights.read_weights(self.experts)
        if found is None:
            raise InputError(f"{self.name}: the experts have no up or down projection")
        return found

    @torch.no_grad()
    def replace(self, weights: ExpertWeights, rows_of: Callable[[RouterTensor], Tensor]) -> None:
        """Puts other experts in the block's place, and other router rows, in place.

        Args:
            weights: The new experts; their number may differ from the old one.
            rows_of: The rows (new experts first) of each tensor of the router.

        Raises:
            InputError: Router rows share experts, so a new number of rows would not say which.
        """
        if self.expert_map is not None:
            raise InputError(f"{self.name}: its router rows share experts; change the original")
        rows = [(tensor, rows_of(tensor)) for tensor in self.router_tensors]
        old_count = self.num_experts
        expert_weights.store_weights(self.experts, weights)
        for tensor, values in rows:
            tensor.set(values)
        self._recount((self.block, *self.router.modules(), self.experts), old_count)

    @torch.no_grad()
    def store(self, weights: ExpertWeights) -> None:
        """Puts as many other experts in the place of those there are, in place."""
        expert_weights.store_weights(self.experts, weights)

    @torch.no_grad()
    def share(self, weights: ExpertWeights, assignment: Int[Tensor, " rows"]) -> None:
        """Puts other experts in the block's place, which router rows share; in place.

        The router keeps every bit. Gates of selected rows that share an expert add up.

        Args:
            weights: The new experts.
            assignment: For each router row, the number of its expert.

        Raises:
            InputError: The assignment lacks a row or names an expert that is not there.
        """
        count = len(weights.down_proj)
        sent = assignment.tolist()
        if len(sent) != self.num_router_rows or not set(sent) <= {*range(count)}:
            raise InputError(
                f"{self.name}: an assignment must send each of {self.num_router_rows} router rows "
                f"to one of {count} experts, and this one is {sent}"
            )
        old_count = self.num_experts
        expert_weights.store_weights(self.experts, weights)
        share_experts(self.experts, assignment.to(self.experts.down_proj.device, torch.int64))
        self._recount((self.experts,), old_count)

    def _recount(self, modules: Iterable[nn.Module], old_count: int) -> None:
        for module in modules:
            for attribute in _COUNT_ATTRIBUTES:
                if module.__dict__.get(attribute) == old_count:
                    module.__dict__[attribute] = self.num_experts

    def select(self, experts: Int[Tensor, " groups"]) -> None:
        """Keeps the named experts, in that order, with their router rows, in place."""
        self.replace(self.weights().select(experts), lambda tensor: tensor.rows[experts])

    def experts_of(self, rows: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The experts behind router rows; rows that share one give it as often."""
        return rows if self.expert_map is None else self.expert_map[rows]

    def router_logits(self, output: Any) -> Float[Tensor, "tokens rows"]:
        """Finds the raw logits in what the router returned."""
        # transformers < 5.21 differs in the order: the logits have one column a row.
        found = output if isinstance(output, tuple) else (output,)
        count = self.num_router_rows
        logits: Tensor = next(t for t in found if t.is_floating_point() and t.shape[-1] == count)
        return logits.reshape(-1, count)

    def activations(
        self, states: Float[Tensor, "tokens hidden"], expert: int
    ) -> Float[Tensor, "tokens intermediate"]:
        """What an expert's output matrix is applied to."""
        return expert_weights.activations_of(self.experts, states, expert)

    def activate(
        self, gate: Float[Tensor, "tokens intermediate"] | None, up: Float[Tensor, "..."]
    ) -> Float[Tensor, "tokens intermediate"]:
        """The experts' activation, from what `gate_proj` and `up_proj` give."""
        return expert_weights.activate(self.experts, gate, up)

    def _refuse_unknown_router(self) -> None:
        weights = [t for t in self.router_tensors if t.kind == "weight"]
        lookup = [n for n, b in self.router.named_buffers() if not b.is_floating_point()]
        says_top_k = hasattr(self.router, "top_k") or hasattr(self.block, "top_k")
        if len(weights) != 1 or lookup or not says_top_k:
            raise InputError(
                f"{self.name}: the router ({type(self.router).__name__}) is not one matrix with a "
                f"row for each of {self.num_router_rows} experts; this family cannot be compressed"
            )


def decoder_layer_of(name: str) -> tuple[str, int]:
    """Splits `model.layers.3.mlp` into the path of the decoder layers and the number, 3."""
    match = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", name)
    if match is None:
        raise InputError(f"{name}: an expert layer outside the decoder layers is not understood")
    return match.group(1) or "", int(match.group(2))


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Finds every mixture-of-experts block of a model, first layer first.

    Raises:
        InputError: The model has none, or one that is not understood; nothing is skipped silently.
    """
    blocks = [(n, m) for n, m in model.named_modules() if "experts" in dict(m.named_children())]
    layers = [MoELayer(name, block) for name, block in blocks]
    if layers:
        return layers
    config = text_config(getattr(model, "config", None))
    family = getattr(config, "model_type", type(model).__name__)
    if any(getattr(config, f, None) for f in COUNT_FIELDS):
        raise InputError(f"the experts of {family} are laid out in a way that is not understood")
    raise InputError(
        f"the model ({family}) has no mixture-of-experts layer; name a checkpoint that has experts"
    )
