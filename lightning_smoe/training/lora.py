"""Which weights small adapters are trained beside (LoRA, https://arxiv.org/abs/2106.09685)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.parts import linear_modules, matrices
from lightning_smoe.training.trainable import TrainedGroup

Target = Literal["attention", "shared", "experts", "router"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, through peft; the matrices that they adapt stay as they are.

    Args:
        rank: Rank of the change of each matrix (of each expert), 1 or more.
        alpha: The change is scaled by alpha / rank, above 0.
        targets: What is adapted: attention, shared (shared expert and its gate), experts, router;
            none for attention, experts and the shared expert if the model has one.
        dropout: Fraction of an adapter's inputs that is dropped in training, in [0, 1); only with
            attention alone, as peft adapts the other targets without a look at inputs.
        learning_rate: Peak step size of adapters, above 0; none for that of the recovery.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[Target] | None = None
    dropout: float = 0.0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank={self.rank} must be 1 or more, and alpha={self.alpha} above 0")
        if self.targets is not None and not self.targets:
            raise ValueError("lora.targets is empty; name attention, shared, experts or router")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.dropout and set(self.targets or ()) != {"attention"}:
            raise ValueError(
                f"dropout={self.dropout}: peft can drop inputs of attention alone, as it adds the "
                "other changes to weights; set lora.dropout to 0, or lora.targets to [attention]"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")


def find_targets(model: PreTrainedModel, lora: Lora) -> dict[Target, list[str]]:
    """Full names of the weights that each target adapts, without a look at them.

    Raises:
        InputError: The model lacks a target that is named.
    """
    wanted: Sequence[Target] = lora.targets or ("attention", "shared", "experts")
    found: dict[Target, list[str]] = {}
    for target in wanted:
        linear = [f"{name}.weight" for name in linear_modules(model, target)]
        names = linear if target == "attention" else matrices(model, target)
        if names:
            found[target] = names
        elif lora.targets is not None:
            raise InputError(f"lora.targets names {target}, which the model does not have")
    return found


def check_lora(model: PreTrainedModel, lora: Lora, groups: Sequence[TrainedGroup]) -> None:
    """Checks on a model or its outline that adapters go with what is trained in full.

    Raises:
        InputError: The model lacks a target, a matrix would be trained in full and adapted, or a
            layer has a single expert.
    """
    in_full = {name: group.name for group in groups for name in group.parameters}
    for target, names in find_targets(model, lora).items():
        both = [name for name in names if name in in_full]
        if both:
            raise InputError(
                f"model.recovery.trainable trains {both[0]} in full ({in_full[both[0]]}), and "
                f"lora.targets adapts it too ({target}); name it in one of them"
            )
        # peft 0.21 takes a stack of one matrix for a matrix, and forgets how it is laid out.
        alone = [name for name in names if model.get_parameter(name).shape[0] == 1]
        if alone and target == "experts":
            raise InputError(
                f"{alone[0]} is of one expert, which peft cannot adapt; leave experts out of "
                "lora.targets, or keep more experts"
            )


def lora_config(model: PreTrainedModel, lora: Lora) -> Any:
    """What peft is told: every adapted weight by its full name."""
    from peft import LoraConfig

    targets = find_targets(model, lora)
    attention = targets.pop("attention", [])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        # peft divides whatever number it is given, and saves it.
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=[name.removesuffix(".weight") for name in attention],
        # Not by modules: peft would take `shared_expert.gate_proj` for an expert's matrix in the
        # layout of transformers 4 (peft 0.21).
        target_parameters=[name for names in targets.values() for name in names],
    )
