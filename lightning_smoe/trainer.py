"""A Lightning Trainer with the verbs of this project."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    ModelParallelStrategy,
)

from lightning_smoe import fit_checks, judge, pipeline, recover, sweep, teaching
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.evaluation.tasks import TaskSuite
from lightning_smoe.experiment import Experiment
from lightning_smoe.export import Export, Form, fitted_by
from lightning_smoe.folder_verbs import FolderVerbs
from lightning_smoe.measure import Split
from lightning_smoe.models.artifact import locked
from lightning_smoe.recipe_files import find_recipe, read_recipes
from lightning_smoe.trainer_checks import check_devices, check_loops
from lightning_smoe.workspace import Workspace


class SMoETrainer(FolderVerbs, Trainer):
    """Runs the steps of an experiment; every verb brings the steps before it."""

    @contextmanager
    def _working(
        self,
        model: Experiment,
        datamodule: TextDataModule,
        splits: Sequence[str],
        *checks: Callable[[Workspace], None],
        in_slices: bool = False,
    ) -> Iterator[Workspace]:
        """Checks everything, brings up all processes, then holds the output folder."""
        check_loops(self)
        check_devices(self, in_slices)
        work = Workspace(
            model,
            datamodule,
            str(self.precision),
            device=self.strategy.root_device,
            num_local_processes=self.num_devices,
        )
        datamodule.check(splits)
        for check in checks:
            check(work)
        launcher = self.strategy.launcher
        # ModelParallelStrategy (Lightning 2.6) gives its devices to a module; loops bring theirs.
        self.strategy.connect(LightningModule())
        # Before the first look at results: a barrier does nothing until processes are joined.
        if launcher is None:
            self.strategy.setup_environment()
        else:
            launcher.launch(self.strategy.setup_environment, trainer=self)
        try:
            # Free memory changes from moment to moment, and all processes must decide alike.
            work.streams = self.strategy.broadcast(work.streams)
            with locked(work.folder) if self.is_global_zero else nullcontext():
                yield work
        except BaseException:
            if launcher is not None:
                # The others would wait for this one until they time out.
                launcher.kill(signal.SIGTERM)
            raise

    @contextmanager
    def _settling(
        self,
        model: Experiment,
        datamodule: TextDataModule,
        splits: Sequence[str],
        *checks: Callable[[Workspace], None],
        in_slices: bool = False,
    ) -> Iterator[Workspace]:
        """The same, for steps that need the recipe, which `auto` leaves open until then."""
        splits = (*splits, "valid") if model.recipe == "auto" else splits
        checks = (partial(sweep.check_auto, self), *checks)
        with self._working(model, datamodule, splits, *checks, in_slices=in_slices) as work:
            yield sweep.settle(self, work)

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
        with self._settling(model, datamodule, ("calib",)) as work:
            pipeline.plan(self, work)

    def compress(self, model: Experiment, datamodule: TextDataModule) -> None:
        """Carries out the plan and writes a smaller checkpoint.

        Args:
            model: The experiment.
            datamodule: The text.
        """
        with self._settling(
            model, datamodule, ("calib",), lambda work: work.check_space(work.compressed_path)
        ) as work:
            pipeline.compress(self, work)

    def cache(self, model: Experiment, datamodule: TextDataModule) -> None:
        """Keeps the original's answers on the training text, so that fit need not hold it.

        Args:
            model: The experiment; model.recovery.teacher.cache says what is kept.
            datamodule: The text.
        """
        with self._working(model, datamodule, ("train", "valid"), teaching.check) as work:
            teaching.make_cache(self, work)

    def recover(
        self,
        model: Experiment,
        datamodule: TextDataModule,
        ckpt_path: Literal["last"] | None = None,
    ) -> None:
        """Takes a model from original to compressed, recovered and evaluated.

        Args:
            model: The experiment.
            datamodule: The text.
            ckpt_path: 'last' goes on from the newest checkpoint of this experiment with other
                settings, such as more steps; null goes on only where a run with the same inputs
                was cut off.
        """
        splits = ("train", "calib", "valid", "test")
        check = partial(fit_checks.check_training, self)
        checks = (judge.check_others, check)
        with self._settling(model, datamodule, splits, *checks, in_slices=True) as work:
            recover.recover(self, work, goes_on=ckpt_path is not None)
            if not isinstance(self.strategy, ModelParallelStrategy):
                judge.evaluate(self, work)

    def evaluate(
        self,
        model: Experiment,
        datamodule: TextDataModule,
        *,
        others: Sequence[Path] = (),
        tasks: Sequence[str] = (),
        limit: int | None = None,
        num_fewshot: int = 0,
        task_batch_size: int = 8,
        task_path: Path | None = None,
    ) -> None:
        """Judges the results on held-out text beside plain baselines, and writes the report.

        Args:
            model: The experiment.
            datamodule: The text.
            others: Further checkpoint folders to judge.
            tasks: Tasks, groups or tags of lm-evaluation-harness to judge every model on; none
                leaves what the report has of them. Needs the extra `eval`.
            limit: Questions of each task, from its beginning; null takes all.
            num_fewshot: Solved examples before each question, 0 or more.
            task_batch_size: Answers that a model reads at a time, 1 or more.
            task_path: Folder with task files (YAML) of your own.
        """
        suite = None
        if tasks:
            suite = TaskSuite(tuple(tasks), limit, num_fewshot, task_batch_size, task_path)
        elif limit is not None or num_fewshot or task_path is not None:
            raise InputError(
                "--limit, --num_fewshot and --task_path change nothing without --tasks; name tasks"
            )

        def check(work: Workspace) -> None:
            judge.check_others(work, others)
            others_stream = work.streams and (model.baselines or model.beside)
            work.check_space(work.compressed_path, *([work.trial_path] if others_stream else []))
            if suite is not None:
                judge.check_whole(work)
                suite.check()

        with self._settling(model, datamodule, ("calib", "test"), check) as work:
            pipeline.compress(self, work)
            judge.evaluate(self, work, others, suite)

    def sweep(
        self,
        model: Experiment,
        datamodule: TextDataModule,
        *,
        recipes: list[str],
        keep: list[int | float],
        seeds: list[int] | None = None,
        split: Split = "valid",
    ) -> None:
        """Tries recipes at several sizes in memory, beside plain pruning, and tables what is kept.

        Args:
            model: The experiment; its recipe and keep are not used.
            datamodule: The text.
            recipes: Files that hold what model.recipe takes, or bare names of files in the folder
                recipe beside the experiment file, else in configs/recipe.
            keep: Sizes, each as model.keep.
            seeds: Seeds that choose the calibration text and what recipes draw at random; null
                leaves both as they are.
            split: Held-out text to measure on, valid or test; choosing a recipe on test would tune
                it to the text of the final report.
        """
        grid = sweep.Grid(read_recipes([find_recipe(r) for r in recipes]), keep, seeds, split)
        check = partial(sweep.check, self, grid=grid)
        with self._working(model, datamodule, ("calib", split), check) as work:
            sweep.sweep(self, work, grid)

    def export(
        self,
        model: Experiment,
        datamodule: TextDataModule,
        *,
        to: Form,
        output: Path,
        checkpoint: Path | None = None,
        strength: float = 1e-3,
    ) -> None:
        """Writes a result in a form that other programs read.

        Args:
            model: The experiment.
            datamodule: The text.
            to: `stock` fits rows of the router to experts that several rows share, so that the
                checkpoint needs no code of its own; `experts` lists as JSON which experts of the
                original each layer keeps.
            output: Folder for stock, file for experts.
            checkpoint: Folder to export to stock: compressed/ if null, or such as recovered/.
            strength: Pull of the fitted rows toward the mean of those that they stand for, at
                least 1e-6.
        """
        made: list[Export] = []
        router = fitted_by(strength)

        def check(work: Workspace) -> None:
            made.append(Export(work, to, output, checkpoint, router=router))

        with self._settling(model, datamodule, ("calib",), check) as work:
            made[0](self, work)
