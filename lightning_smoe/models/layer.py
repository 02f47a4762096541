"""One typed view on every mixture-of-experts block of transformers.

Only this file, `routing.py`, `router.py`, `expert_weights.py` and `expert_count.py` know the names
and layouts of transformers; `modeling_smoe.py` goes by itself.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_smoe.errors import InputError
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.models import expert_weights
from lightning_smoe.models.expert_count import claims_experts, recount, text_config
from lightning_smoe.models.modeling_smoe import MAP, share_experts
from lightning_smoe.models.refusals import refuse_family
from lightning_smoe.models.router import RouterTensor
from lightning_smoe.models.routing import Routing

_ROUTER_CHILDREN = ("gate", "router")


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
        routing = next((children[k] for k in _ROUTER_CHILDREN if k in children), None)
        if routing is None or not expert_weights.is_understood(self.experts):
            raise InputError(
                f"{name}: the experts ({type(self.experts).__name__}) are laid out in a way that "
                "is not understood; lightning_smoe/models/README.md lists the families that are"
            )
        self._routing = Routing(name, routing, block, self.num_router_rows)

    @property
    def router_tensors(self) -> list[RouterTensor]:
        """Tensors of the router that have an expert axis."""
        return self._routing.tensors

    @property
    def router(self) -> Any:
        """The module that multiplies hidden states with the router's rows; it returns logits."""
        return self._routing.weight.owner

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
        return self._routing.top_k

    @property
    def hidden_size(self) -> int:
        """Width of an expert's output."""
        return int(self.experts.down_proj.shape[2 if self.experts.is_transposed else 1])

    @property
    def intermediate_size(self) -> int:
        """Neurons of an expert."""
        return int(self.experts.down_proj.shape[1 if self.experts.is_transposed else 2])

    @property
    def router_reads_apart(self) -> bool:
        """Whether the router reads other hidden states than its experts do."""
        # Both stand in the decoder layer itself, each behind its own norm (Gemma 4), or experts
        # work in a space of their own (Nemotron with a latent size).
        width = self._routing.weight.rows.shape[1]
        is_decoder_layer = ".".join(map(str, decoder_layer_of(self.name))) == self.name
        return is_decoder_layer or width != self.weights().up_proj.shape[2]

    @property
    def num_router_groups(self) -> int:
        """Equal contiguous groups of experts among which the router first chooses (1 = none)."""
        return self._routing.num_groups

    @property
    def min_experts_per_router_group(self) -> int:
        """Experts that a router group must keep: two score it, and a token's groups hold top_k."""
        return self._routing.min_per_group

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
            return [p for p in self._routing.module.parameters() if id(p) not in fixed]
        if part == "experts":
            return list(self.experts.parameters())
        children = self.block.named_children()
        return [p for n, c in children if n.startswith("shared") for p in c.parameters()]

    def selection_tensors(self) -> list[Tensor]:
        """Tensors that only decide which experts are selected: no gradient reaches them."""
        found = (t for t in self.router_tensors if t.kind == "selection")
        return [getattr(tensor.owner, tensor.attribute) for tensor in found]

    def weights(self) -> ExpertWeights:
        """The experts' weights in one layout: gate apart from up, outputs on the second axis."""
        return expert_weights.read_weights(self.experts)

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
        modules = (self.block, *self._routing.module.modules(), self.experts)
        recount(modules, old_count, self.num_experts)

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
        recount((self.experts,), old_count, self.num_experts)

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
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    says_so = claims_experts(text_config(config))
    blocks = [(n, m) for n, m in model.named_modules() if "experts" in dict(m.named_children())]
    if blocks or says_so:
        refuse_family(family)
    if blocks:
        return [MoELayer(name, block) for name, block in blocks]
    if says_so:
        raise InputError(f"the experts of {family} are laid out in a way that is not understood")
    raise InputError(
        f"the model ({family}) has no mixture-of-experts layer; name a checkpoint that has experts"
    )
