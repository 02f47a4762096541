"""How a compressed model is trained against its original: what a person may set."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_smoe.training.layer_objectives import LayerObjective
from lightning_smoe.training.layerwise import Layerwise
from lightning_smoe.training.lora import Lora
from lightning_smoe.training.objectives import ForwardKL, TokenObjective
from lightning_smoe.training.teacher import TeacherOptions
from lightning_smoe.training.trainable import Trainable, check_trainable

Objective = TokenObjective | LayerObjective


@dataclass(frozen=True)
class Recovery:
    """How the compressed model is trained against the original.

    Args:
        trainable: What changes: names of parts (router, norm, shared, down_proj, experts,
            attention, all; several joined by +) or regular expressions for full parameter names, as
            a list, or each with its own learning rate; null is the router, or nothing beside lora.
        lora: Adapters that are trained beside it; null trains none.
        objectives: What is minimised: the weighted sum of these.
        learning_rate: Peak step size of Adam where none is named, above 0.
        schedule: How it falls to zero after the warm-up: cosine or linear.
        warmup_steps: Steps over which it rises from zero, 0 or more.
        layerwise: How each layer is first trained by itself, which is kept if it lowers the KL on
            the validation text; left out where the original is not whole in each process. Null
            leaves it out.
        teacher: How the original is held, or what is kept of its answers in its stead.
        checkpoint_every: Steps between two checkpoints, 1 or more; each validation writes one too.
        patience: Validations without a lower KL after which training stops, 1 or more; null never
            stops.
        gradient_checkpointing: Keep of each decoder layer only what it read, and compute it again
            for the gradient: less memory for a third more work.
    """

    trainable: Trainable | None = None
    lora: Lora | None = None
    # From a factory: jsonargparse 4.49 cannot write an instance within a list back as YAML.
    objectives: Sequence[Objective] = field(default_factory=lambda: [ForwardKL()])
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear"] = "linear"
    warmup_steps: int = 10
    layerwise: Layerwise | None = Layerwise()
    teacher: TeacherOptions = TeacherOptions()
    checkpoint_every: int = 50
    patience: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_trainable(self.parts, is_needed=self.lora is None)
        if not self.objectives:
            raise ValueError("objectives is empty; name one, such as ForwardKL")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be 0 or more")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} must be 1 or more")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience} must be 1 or more")

    @property
    def parts(self) -> Trainable:
        """What is trained in full."""
        if self.trainable is not None:
            return self.trainable
        return ("router",) if self.lora is None else ()

    @property
    def deciding(self) -> "Recovery":
        """The same, but for what decides only memory and how often a training is kept."""
        # Without it whole, no layer is trained by itself first.
        is_whole = self.teacher.placement != "sharded"
        teacher = replace(self.teacher, placement="device") if is_whole else self.teacher
        return replace(self, checkpoint_every=1, gradient_checkpointing=False, teacher=teacher)
