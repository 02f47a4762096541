"""A Lightning Trainer with the verbs of this project."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_smoe import judge, pipeline, recover, show
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.experiment import Experiment, Workspace
from lightning_smoe.models.artifact import locked

_LOOPS = ("train", "val", "test", "predict")


class SMoETrainer(Trainer):
    """Runs the steps of an experiment; every verb brings the steps before it."""

    @contextmanager
    def _working(
        self,
        model: Experiment,
        datamodule: TextDataModule,
        splits: Sequence[str],
        check: Callable[[Workspace], None] | None = None,
    ) -> Iterator[Workspace]:
        """Checks everything, then holds the output folder."""
        self._check_loops()
        work = Workspace(model, datamodule)
        work.check_text(splits)
        if check is not None:
            check(work)
        if not self.is_global_zero:
            yield work
            return
        with locked(work.folder):
            yield work

    def _check_loops(self) -> None:
        if isinstance(self.strategy.launcher, _MultiProcessingLauncher):
            raise InputError(
                "trainer.strategy forks or spawns processes, which take their results with them; "
                "use ddp, whose processes each run the whole command"
            )
        limits = {name: getattr(self, f"limit_{name}_batches") for name in _LOOPS}
        overfit = self.overfit_batches  # type: ignore[attr-defined]  # set by Lightning
        # One batch is written 1, all of them 1.0.
        if any(isinstance(v, int) or v != 1.0 for v in limits.values()) or overfit:
            raise InputError(
                "trainer.limit_*_batches, overfit_batches and fast_dev_run leave text out, and the "
                "results would not tell; limit data.*_tokens, and steps by trainer.max_steps"
            )

    def calibrate(self, model: Experiment, datamodule: TextDataModule) -> None:
        """Gathers what every expert does on calibration text.

        Args:
            model: The experiment.
            datamodule: The text.
        """
        with self._working(model, datamodule, ("calib",)) as work:
            pipeline.calibrate(self, work)

    def plan(self, model: Experiment, datamodule: TextDataModule) -> None:
        """Decides what becomes of every expert, as a plan to read and edit.

        Args:
            model: The experiment.
            datamodule: The text.
        """
        with self._working(model, datamodule, ("calib",)) as work:
            pipeline.plan(self, work)

    def compress(self, model: Experiment, datamodule: TextDataModule) -> None:
        """Carries out the plan and writes a smaller checkpoint.

        Args:
            model: The experiment.
            datamodule: The text.
        """
        with self._working(model, datamodule, ("calib",)) as work:
            pipeline.compress(self, work)

    def recover(
        self, model: Experiment, datamodule: TextDataModule, ckpt_path: str | None = None
    ) -> None:
        """Takes a model from original to compressed, recovered and evaluated.

        Args:
            model: The experiment.
            datamodule: The text.
            ckpt_path: Training checkpoint to continue: a file, or 'last' for the newest of this
                experiment; null starts training at the beginning.
        """
        splits = ("train", "calib", "valid", "test")
        check = partial(recover.check_training, self, ckpt_path=ckpt_path)
        with self._working(model, datamodule, splits, check) as work:
            recover.recover(self, work, ckpt_path)
            judge.evaluate(self, work)

    def evaluate(
        self, model: Experiment, datamodule: TextDataModule, others: Sequence[Path] = ()
    ) -> None:
        """Judges the results on held-out text beside plain baselines, and writes the report.

        Args:
            model: The experiment.
            datamodule: The text.
            others: Further checkpoint folders to judge.
        """
        check = partial(judge.check_others, others=others)
        with self._working(model, datamodule, ("calib", "test"), check) as work:
            pipeline.compress(self, work)
            judge.evaluate(self, work, others)

    def inspect(self, checkpoint: str) -> None:
        """Prints what is in a checkpoint: family, layers, experts, parameters, bytes.

        Args:
            checkpoint: Checkpoint folder, or organisation/name on the Hugging Face hub.
        """
        show.inspect(checkpoint)

    def generate(
        self, checkpoint: str, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0
    ) -> None:
        """Continues a prompt with any checkpoint.

        Args:
            checkpoint: Checkpoint folder, or organisation/name on the Hugging Face hub.
            prompt: Text to continue.
            max_new_tokens: Tokens to write, at least 1.
            temperature: Randomness of the choice, 0 or more; 0 takes the likeliest token.
        """
        show.generate(checkpoint, prompt, max_new_tokens, temperature)
