"""The command line: LightningCLI whose subcommands are the verbs of `SMoETrainer`."""

import difflib
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_smoe import __version__
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.exits import exiting_on_bad_input
from lightning_smoe.experiment import Experiment
from lightning_smoe.recipe_files import find_recipe
from lightning_smoe.show import StepBar, set_up_screen
from lightning_smoe.trainer import SMoETrainer
from lightning_smoe.training.checkpoint_io import AtomicCheckpointIO
from lightning_smoe.words import check_kinds, spelled_out

# Verb -> method of the trainer, and whether it works on an experiment or looks at a folder.
_VERBS = {
    "calibrate": ("calibrate", True),
    "plan": ("plan", True),
    "compress": ("compress", True),
    "cache": ("cache", True),
    "fit": ("recover", True),
    "evaluate": ("evaluate", True),
    "sweep": ("sweep", True),
    "export": ("export", True),
    "compare": ("compare", False),
    "inspect": ("inspect", False),
    "generate": ("generate", False),
    "verify": ("verify", False),
    "reshard": ("reshard", False),
}

_FOLDERS = {"compare": "RUN [RUN ...] "} | dict.fromkeys(
    ("inspect", "generate", "verify", "reshard"), "CHECKPOINT "
)

_TRAINER_DEFAULTS = {
    "max_steps": 200,
    # No end but max_steps; with any other number the bar would count to the end of the epoch.
    "max_epochs": -1,
    "gradient_clip_val": 1.0,
    "val_check_interval": 50,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


class SMoEParser(LightningArgumentParser):
    """A parser that guesses what a misspelt key was meant to be."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message with a guess, and exits with code 2."""
        if message.startswith("the following arguments are required"):
            message = re.sub(rf"\b({'|'.join(_VERBS)})\.", "--", message)
        wrong = re.search(r"(?:option|arguments?:?|key) [\"'`]?-*([\w.]+)", message)
        hint = self._closest(wrong.group(1)) if wrong else None
        super().error(f"{message}\n  Did you mean {hint}?" if hint else message, ex)

    def _closest(self, wrong: str) -> str | None:
        keys = self._keys()
        short = {key.rsplit(".", maxsplit=1)[-1]: key for key in keys}
        near = difflib.get_close_matches(wrong, keys, 1)
        near = near or difflib.get_close_matches(wrong.rsplit(".", maxsplit=1)[-1], short, 1)
        return None if wrong in keys or not near else short.get(near[0], near[0])

    def _keys(self) -> list[str]:
        """Keys of this parser, or of its verbs' parsers, which it also reads files for."""
        verbs = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        if verbs:
            return [key for parser in verbs[0].values() for key in parser._keys()]
        return [a.dest for a in self._actions if not a.dest.endswith("help")]


class SMoECLI(LightningCLI):
    """LightningCLI with the verbs of `SMoETrainer` in the place of Lightning's.

    Args:
        words: Command line without the program's name.
        kwargs: As for LightningCLI.
    """

    def __init__(self, words: Sequence[str], **kwargs: Any) -> None:
        # Only the parser that will be used is filled: each costs a third of a second.
        self._verb = next((word for word in words if word in _VERBS), None)
        super().__init__(args=list(words), **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line, in which `inspect X` means `inspect --checkpoint X`."""
        self.config = parser.parse_args(spelled_out(args, self._verb))

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser that guesses."""
        parser = SMoEParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action="config",
            help="Experiment file in YAML; later options override it.",
        )
        return parser

    # Private in Lightning 2.6, which offers no other way to give verbs their own groups and names.
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        self._subcommand_parsers = {}
        subcommands = parser.add_subcommands()
        for verb, (method, on_experiment) in _VERBS.items():
            doc = getattr(SMoETrainer, method).__doc__ or ""
            line = doc.split("\n", maxsplit=1)[0]
            # Without a usage of its own every error would print a page of it.
            usage = f"%(prog)s {_FOLDERS.get(verb, '')}[options]"
            verb_parser = self.init_parser(description=line, usage=usage)
            self._subcommand_parsers[verb] = verb_parser
            if verb == self._verb:
                added = self._add_verb(verb_parser, method, on_experiment)
                self._subcommand_method_arguments[verb] = added
            subcommands.add_subcommand(verb, verb_parser, help=line)

    def _add_verb(
        self, parser: LightningArgumentParser, method: str, on_experiment: bool
    ) -> list[str]:
        self.add_default_arguments_to_parser(parser)
        if on_experiment:
            parser.add_lightning_class_args(SMoETrainer, "trainer")
            parser.set_defaults({f"trainer.{k}": v for k, v in _TRAINER_DEFAULTS.items()})
            parser.add_class_arguments(Experiment, "model", sub_configs=True)
            parser.add_class_arguments(TextDataModule, "data", skip={"tokenizer"})
        skip: set[str | int] = {"model", "datamodule"}
        added: list[str] = parser.add_method_arguments(SMoETrainer, method, skip=skip)
        return added

    def _parse_ckpt_path(self) -> None:
        """Keeps the experiment file's settings: a checkpoint's must not override them."""

    def instantiate_trainer(self, **kwargs: Any) -> SMoETrainer:
        """Builds the trainer; only fit logs."""
        verb = str(self.subcommand)
        if not _VERBS[verb][1]:
            return SMoETrainer(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False
            )
        settings = dict(self._get(self.config_init, "trainer"))
        if verb != "fit":
            settings["logger"] = False
        elif settings["logger"] in (None, True):
            name = Path(self._get(self.config_init, "model").output_dir).name
            settings["logger"] = TensorBoardLogger("logs", name=name)
        settings["plugins"] = [*_as_list(settings["plugins"]), AtomicCheckpointIO()]
        if isinstance(settings["strategy"], ModelParallelStrategy):
            # What validation leaves whole is trained on.
            settings["inference_mode"] = False
        callbacks = settings["callbacks"] or []
        if settings["enable_progress_bar"] is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            settings["callbacks"] = [*callbacks, StepBar()]
        return SMoETrainer(**settings)

    def instantiate_classes(self) -> None:
        """Builds experiment, text and trainer.

        Raises:
            InputError: One of them refuses a setting.
        """
        verb = str(self.subcommand)
        check_kinds(self.config[verb], self._parser(verb)._actions)
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
            self.trainer = self.instantiate_trainer()
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise InputError(str(error)) from error

    def _run_subcommand(self, subcommand: str) -> None:
        method, on_experiment = _VERBS[subcommand]
        options = {
            k: self._get(self.config_init, k) for k in self._subcommand_method_arguments[subcommand]
        }
        if not on_experiment:
            getattr(self.trainer, method)(**options)
            return
        if "recipes" in options:
            # Bare names are looked up beside the experiment file first.
            files = [Path(file) for file in self.config[subcommand].config or []]
            options["recipes"] = [str(find_recipe(r, files)) for r in options["recipes"]]
        getattr(self.trainer, method)(model=self.model, datamodule=self.datamodule, **options)
        if self.trainer.is_global_zero:
            path = Path(self.model.output_dir) / "config.yaml"
            config = self.config[subcommand].clone()
            for name in options:  # what only this verb takes, other verbs would refuse
                del config[name]
            # Not checked: of the options that were taken out, some are required.
            self._parser(subcommand).save(
                config, path, overwrite=True, skip_none=False, skip_validation=True, multifile=False
            )


def main(args: Sequence[str] | None = None) -> None:
    """Runs a verb.

    Exits with code 2 and one message where what was asked for cannot be done.

    Args:
        args: Command line without the program's name; that of the process if none.
    """
    set_up_screen()
    # As Ctrl-C: Lightning's own handler would let a step end, or end training with code 0.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with exiting_on_bad_input():
        SMoECLI(
            sys.argv[1:] if args is None else args,
            trainer_class=SMoETrainer,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_callback=None,
            parser_kwargs={
                "prog": "lightning_smoe",
                "version": __version__,
                "description": "Compresses mixture-of-experts language models.",
            },
        )


def _as_list(plugins: Any) -> list[Any]:
    return plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
