"""What a student is trained for, on what its decoder layers do."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_smoe.functional.router_losses import (
    load_balance,
    router_divergence,
    router_log_probs,
    router_z,
    sum_by_group,
)
from lightning_smoe.training.objective_names import logged_name
from lightning_smoe.training.objectives import check_positive
from lightning_smoe.training.signals import LayerSignals, Signal

Layers = Literal["all"] | Sequence[int]


@dataclass(frozen=True, eq=False)
class LayerPair:
    """What one decoder layer did in the student, and the same layer in the teacher.

    Args:
        student: The student's signals; `expert_counts` are summed over all processes.
        teacher: The teacher's signals, none of them where it was not asked.
        assignment: The student's expert in the place of each of the teacher's, -1 where there is
            none; known of compressed layers only. On the CPU.
    """

    student: LayerSignals
    teacher: LayerSignals
    assignment: Int[Tensor, " experts"] | None = None


class LayerObjective(ABC):
    """A loss on what layers do; subclasses are frozen dataclasses with `weight` and `layers`.

    It is averaged over the layers that it is taken at: those of `layers` that have its signals.
    """

    weight: float
    layers: Layers
    # What has to be recorded, in the student and, if it is compared with it, in the teacher.
    signals: ClassVar[frozenset[Signal]]

    @property
    def name(self) -> str:
        """What it is called in logs."""
        return logged_name(type(self))

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with the teacher."""
        return True

    @property
    def needs_assignment(self) -> bool:
        """Whether it has to know where the teacher's experts went."""
        return False

    def concerns(self, signals: LayerSignals) -> bool:
        """Whether it is taken at a layer, by the signals that the layer has."""
        is_named = self.layers == "all" or signals.facts.index in self.layers
        return is_named and self.signals <= signals.recorded.keys()

    @abstractmethod
    def __call__(self, layer: LayerPair) -> Float[Tensor, " tokens"]:
        """The loss of one layer at each counted position, with gradients towards the student."""


def _wide(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class HiddenMSE(LayerObjective):
    """Mean squared difference of hidden states behind decoder layers.

    Args:
        weight: Factor in the sum of objectives, above 0.
        layers: Numbers of the decoder layers, counted from 0, or all.
    """

    weight: float = 1.0
    layers: Layers = "all"
    signals = frozenset({"hidden"})

    def __post_init__(self) -> None:
        check_positive(weight=self.weight)

    def __call__(self, layer: LayerPair) -> Float[Tensor, " tokens"]:
        difference = _wide(layer.student["hidden"]) - _wide(layer.teacher["hidden"])
        return difference.square().mean(-1)


@dataclass(frozen=True)
class HiddenCosine(LayerObjective):
    """One minus the cosine between hidden states behind decoder layers.

    Args:
        weight: Factor in the sum of objectives, above 0.
        layers: Numbers of the decoder layers, counted from 0, or all.
    """

    weight: float = 1.0
    layers: Layers = "all"
    signals = frozenset({"hidden"})

    def __post_init__(self) -> None:
        check_positive(weight=self.weight)

    def __call__(self, layer: LayerPair) -> Float[Tensor, " tokens"]:
        student, teacher = _wide(layer.student["hidden"]), _wide(layer.teacher["hidden"])
        return 1 - cosine_similarity(student, teacher, dim=-1)


@dataclass(frozen=True)
class BranchMSE(LayerObjective):
    """Mean squared difference of what the routed experts of a layer give together.

    A shared expert's output, which is added later, is left out.

    Args:
        weight: Factor in the sum of objectives, above 0.
        layers: Numbers of the decoder layers, counted from 0, or all that have experts.
    """

    weight: float = 1.0
    layers: Layers = "all"
    signals = frozenset({"branch"})

    def __post_init__(self) -> None:
        check_positive(weight=self.weight)

    def __call__(self, layer: LayerPair) -> Float[Tensor, " tokens"]:
        difference = _wide(layer.student["branch"]) - _wide(layer.teacher["branch"])
        return difference.square().mean(-1)


@dataclass(frozen=True)
class RouterKL(LayerObjective):
    """KL(teacher || student) of routing probabilities, the teacher's summed over each group.

    The mass of experts that have no successor is left out and the rest scaled to sum to one. Rows
    of the student's router that share an expert are summed too.

    Args:
        weight: Factor in the sum of objectives, above 0.
        layers: Numbers of the decoder layers, counted from 0, or all that have experts.
    """

    weight: float = 1.0
    layers: Layers = "all"
    signals = frozenset({"router_logits"})

    def __post_init__(self) -> None:
        check_positive(weight=self.weight)

    @property
    def needs_assignment(self) -> bool:
        """Whether it has to know where the teacher's experts went: it does."""
        return True

    def __call__(self, layer: LayerPair) -> Float[Tensor, " tokens"]:
        if layer.assignment is None:
            raise ValueError(f"it is not known where the experts of {layer.student.facts.moe} went")
        found = expert_log_probs(layer.student)
        rows = router_log_probs(layer.teacher["router_logits"], layer.teacher.score)
        wanted = sum_by_group(rows, layer.assignment, layer.student.facts.num_experts)
        return router_divergence(wanted, found)


@dataclass(frozen=True)
class LoadBalance(LayerObjective):
    """Evens out the loads of experts (Switch, https://arxiv.org/abs/2101.03961), layer by layer.

    `E * sum_e f_e * P_e`: `f` is the fraction of all selections that fall on an expert, over the
    tokens of one batch on all processes, and `P` the mean of its routing probability. Padding does
    not count. Even loads give 1 for every top_k, where transformers gives top_k. Rows of a router
    that share an expert count together.

    Args:
        weight: Factor in the sum of objectives, above 0; usually 0.001 to 0.01.
        layers: Numbers of the decoder layers, counted from 0, or all that have experts.
    """

    weight: float = 0.01
    layers: Layers = "all"
    signals = frozenset({"router_logits", "expert_counts"})

    def __post_init__(self) -> None:
        check_positive(weight=self.weight)

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with the teacher: it does not."""
        return False

    def __call__(self, layer: LayerPair) -> Float[Tensor, " tokens"]:
        counts = layer.student["expert_counts"]
        # No process may have a token that counts.
        load = counts.double() / counts.sum().clamp_min(1)
        return load_balance(expert_log_probs(layer.student).exp(), load)


@dataclass(frozen=True)
class RouterZ(LayerObjective):
    """Mean squared log-sum-exp of router logits (ST-MoE, https://arxiv.org/abs/2202.08906).

    Args:
        weight: Factor in the sum of objectives, above 0; 0.001 in the paper.
        layers: Numbers of the decoder layers, counted from 0, or all that have experts.
    """

    weight: float = 0.001
    layers: Layers = "all"
    signals = frozenset({"router_logits"})

    def __post_init__(self) -> None:
        check_positive(weight=self.weight)

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with the teacher: it does not."""
        return False

    def __call__(self, layer: LayerPair) -> Float[Tensor, " tokens"]:
        return router_z(layer.student["router_logits"])


def expert_log_probs(signals: LayerSignals) -> Float[Tensor, "tokens experts"]:
    """Log of a layer's routing probability of each expert; rows that share one are summed."""
    rows = router_log_probs(signals["router_logits"], signals.score)
    facts = signals.facts
    if facts.expert_map is None:
        return rows
    return sum_by_group(rows, facts.expert_map, facts.num_experts)
