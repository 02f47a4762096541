"""A Lightning Trainer with the verbs of this project."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_smoe import judge, pipeline, show
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.experiment import Experiment, Workspace
from lightning_smoe.models.artifact import locked


class SMoETrainer(Trainer):
    """Runs the steps of an experiment; every verb brings the steps before it."""

    @contextmanager
    def _working(
        self, model: Experiment, datamodule: TextDataModule, splits: Sequence[str]
    ) -> Iterator[Workspace]:
        """Checks everything, then holds the output folder."""
        work = Workspace(model, datamodule)
        work.check_text(splits)
        if not self.is_global_zero:
            yield work
            return
        with locked(work.folder):
            yield work

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
        with self._working(model, datamodule, splits) as work:
            pipeline.recover(self, work, ckpt_path)
            judge.evaluate(self, work, [])

    def evaluate(
        self, model: Experiment, datamodule: TextDataModule, others: Sequence[Path] = ()
    ) -> None:
        """Judges the results on held-out text beside plain baselines, and writes the report.

        Args:
            model: The experiment.
            datamodule: The text.
            others: Further checkpoint folders to judge.
        """
        with self._working(model, datamodule, ("calib", "test")) as work:
            pipeline.compress(self, work)
            judge.evaluate(self, work, list(others))

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
