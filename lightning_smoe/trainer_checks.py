"""Settings of Lightning's Trainer that would spoil results, refused before any work."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_smoe import fit_checks
from lightning_smoe.errors import InputError

_LOOPS = ("train", "val", "test", "predict")


def check_devices(trainer: Trainer, in_slices: bool) -> None:
    """Checks that models can be worked on where the trainer puts them.

    Args:
        trainer: The trainer.
        in_slices: Whether the verb takes models that are shared out over processes.

    Raises:
        InputError: They cannot.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy) and in_slices:
        fit_checks.check_slices(trainer.strategy)
    elif not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"trainer.strategy={type(trainer.strategy).__name__} shares out single weights, which "
            "compression needs whole; use ddp, or one device"
        )
    if trainer.strategy.root_device.type == "mps":
        raise InputError(
            "sums over tokens are kept in float64, which Apple's GPU does not have; "
            "set trainer.accelerator to cpu"
        )
    if str(trainer.precision) in ("bf16-true", "16-true", "64-true", "transformer-engine"):
        raise InputError(
            f"trainer.precision={trainer.precision} converts the model behind the recipe's back; "
            "set model.dtype for the weights, and trainer.precision to bf16-mixed or 32-true"
        )


def check_loops(trainer: Trainer) -> None:
    """Checks that loops go through all of the text, in processes that keep what they find.

    Raises:
        InputError: They do not.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "trainer.strategy forks or spawns processes, which take their results with them; "
            "use ddp, whose processes each run the whole command"
        )
    limits = {name: getattr(trainer, f"limit_{name}_batches") for name in _LOOPS}
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]  # set by Lightning
    # One batch is written 1, all of them 1.0.
    if any(isinstance(v, int) or v != 1.0 for v in limits.values()) or overfit:
        raise InputError(
            "trainer.limit_*_batches, overfit_batches and fast_dev_run leave text out, and the "
            "results would not tell; limit data.*_tokens, and steps by trainer.max_steps"
        )
