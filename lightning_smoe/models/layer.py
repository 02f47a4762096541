"""One typed view on every mixture-of-experts block of transformers.

Only this file, `router.py` and `expert_count.py` know the names and layouts of transformers.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_smoe.errors import InputError
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.models.expert_count import COUNT_FIELDS, text_config
from lightning_smoe.models.router import RouterTensor, assign, find_router_tensors

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
        if router is None or not _is_understood(self.experts):
            raise InputError(
                f"{name}: the experts ({type(self.experts).__name__}) are laid out in a way that "
                "is not understood; lightning_smoe/models/README.md lists the families that are"
            )
        self.router: Any = router
        self.router_tensors = find_router_tensors(router, block, self.num_experts)
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
    def top_k(self) -> int:
        """Experts that the router selects for a token."""
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
        experts = self.experts

        def stored(name: str) -> Tensor | None:
            tensor: Tensor | None = getattr(experts, name, None)
            if tensor is None or not experts.is_transposed or tensor.dim() == 2:
                return tensor
            return tensor.transpose(1, 2)

        up = stored("gate_up_proj" if experts.has_gate else "up_proj")
        up_bias = stored("gate_up_proj_bias" if experts.has_gate else "up_proj_bias")
        down = stored("down_proj")
        if up is None or down is None:
            raise InputError(f"{self.name}: the experts have no up or down projection")
        gate = gate_bias = None
        if experts.has_gate:
            gate, up = self._split(up)
            gate_bias, up_bias = (None, None) if up_bias is None else self._split(up_bias)
        return ExpertWeights(up, down, gate, gate_bias, up_bias, stored("down_proj_bias"))

    def _split(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if self.experts.is_concatenated:
            gate, up = gate_up.chunk(2, dim=1)
            return gate, up
        return gate_up[:, ::2], gate_up[:, 1::2]

    def _join(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.experts.is_concatenated:
            return torch.cat([gate, up], dim=1)
        return torch.stack([gate, up], dim=2).flatten(1, 2)

    @torch.no_grad()
    def replace(
        self, weights: ExpertWeights, router_rows: Callable[[RouterTensor], Tensor]
    ) -> None:
        """Puts other experts in the block's place, and other router rows, in place.

        Args:
            weights: The new experts; their number may differ from the old one.
            router_rows: The rows (new experts first) of each tensor of the router.
        """
        rows = [(tensor, router_rows(tensor)) for tensor in self.router_tensors]
        old_count = self.num_experts
        experts = self.experts

        def store(name: str, tensor: Tensor) -> None:
            flip = experts.is_transposed and tensor.dim() > 2  # biases have two axes
            assign(experts, name, tensor.transpose(1, 2) if flip else tensor)

        prefix = "up"
        up, up_bias = weights.up_proj, weights.up_bias
        if weights.gate_proj is not None:
            prefix, up = "gate_up", self._join(weights.gate_proj, weights.up_proj)
        if weights.gate_bias is not None and weights.up_bias is not None:
            up_bias = self._join(weights.gate_bias, weights.up_bias)
        store(f"{prefix}_proj", up)
        store("down_proj", weights.down_proj)
        if up_bias is not None:
            store(f"{prefix}_proj_bias", up_bias)
        if weights.down_bias is not None:
            store("down_proj_bias", weights.down_bias)
        for tensor, values in rows:
            tensor.set(values)
        for module in (self.block, *self.router.modules(), self.experts):
            for attribute in _COUNT_ATTRIBUTES:
                if module.__dict__.get(attribute) == old_count:
                    module.__dict__[attribute] = self.num_experts

    def select(self, experts: Int[Tensor, " groups"]) -> None:
        """Keeps the named experts, in that order, with their router rows, in place."""
        self.replace(self.weights().select(experts), lambda tensor: tensor.rows[experts])

    def router_logits(self, output: Any) -> Float[Tensor, "tokens experts"]:
        """Finds the raw logits in what the router returned."""
        # transformers < 5.21 differs in the order: the logits have one column an expert.
        found = output if isinstance(output, tuple) else (output,)
        logits: Tensor = next(
            t for t in found if t.is_floating_point() and t.shape[-1] == self.num_experts
        )
        return logits.reshape(-1, self.num_experts)

    def activations(
        self, states: Float[Tensor, "tokens hidden"], expert: int
    ) -> Float[Tensor, "tokens intermediate"]:
        """What an expert's output matrix is applied to."""
        experts = self.experts
        prefix = "gate_up_proj" if experts.has_gate else "up_proj"
        matrix = getattr(experts, prefix)[expert]
        hidden = states @ (matrix if experts.is_transposed else matrix.T)
        if experts.has_bias:
            hidden = hidden + getattr(experts, f"{prefix}_bias")[expert]
        activate = experts._apply_gate if experts.has_gate else experts.act_fn
        activated: Tensor = activate(hidden)
        return activated

    def _refuse_unknown_router(self) -> None:
        weights = [t for t in self.router_tensors if t.kind == "weight"]
        lookup = [n for n, b in self.router.named_buffers() if not b.is_floating_point()]
        says_top_k = hasattr(self.router, "top_k") or hasattr(self.block, "top_k")
        if len(weights) != 1 or lookup or not says_top_k:
            raise InputError(
                f"{self.name}: the router ({type(self.router).__name__}) is not one matrix with a "
                f"row for each of {self.num_experts} experts; this family cannot be compressed"
            )


def _is_understood(experts: Any) -> bool:
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")
    has_norm = getattr(experts, "has_post_expert_norm", False)
    return all(hasattr(experts, flag) for flag in flags) and not has_norm


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
