"""The data module: text of several domains as batches of tokens."""

import logging
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_smoe.data.epochs import Epochs
from lightning_smoe.data.mixing import check_weights
from lightning_smoe.data.packing import TokenWindows, load_tokenizer
from lightning_smoe.data.rows import Format
from lightning_smoe.data.samplers import PaddedSampler, WindowDataset
from lightning_smoe.data.splits import SPLITS, SplitTexts
from lightning_smoe.data.windowing import Windowing, check_sizes
from lightning_smoe.errors import InputError

logger = logging.getLogger(__name__)

STAGES = {
    "fit": ("train", "valid"),
    "validate": ("valid",),
    "test": ("test",),
    "predict": ("calib",),
}


class TextDataModule(LightningDataModule):
    """Text of several domains as batches of tokens.

    A batch is a dictionary: `input_ids`, `attention_mask`, `document` and `is_answer`, true for a
    token to be learned (batch, sequence); `window` (batch), the index of each sequence in
    `windows(split)`; `domain` (batch), that of its domain in `domains_of(split)`; `valid` (batch),
    false for a sequence that is repeated only so that all processes have equally many. Where rows
    are packed also `position_ids` (batch, sequence), which start anew with each row: a model
    must then not be given `attention_mask`, and keeps the rows apart by itself.

    Domain ids count within a split, whose names are sorted: splits with the same domains agree.
    Every process tokenises the whole text of a split and keeps the windows asked for.

    Args:
        tokenizer: Folder with the tokenizer; on the command line, that of the model.
        path: Folder with sub-folders train, calib, valid and test of one file a domain (.txt,
            .jsonl, .parquet) or one sub-folder a domain; null takes the shipped corpus.
            Splits that a verb uses must not share documents of 200 characters or more.
        train: Where the training text comes from instead: a folder, a file, or
            hf://NAME[:CONFIG][@SPLIT]; null takes it from `path`.
        calib: The same for the calibration text.
        valid: The same for the text that watches training.
        test: The same for the text of the final report.
        domains: Names of the domains to use; null uses all.
        text_field: Field with the text in rows of .jsonl, .parquet and the Hub.
        format: What rows are: text, in `text_field`; rows of prompt and completion, of input and
            output, or of messages; auto tells them by their fields.
        answers_only: Whether only the answers of rows are learned; otherwise every token is.
        domain_weights: Weight of each domain in an epoch of training, 0 or more; null takes every
            sequence once.
        sequence_length: Tokens a sequence, 2 or more.
        calib_tokens: Tokens of calibration text, shared evenly among the domains in whole
            sequences, at least one each; null takes all.
        valid_tokens: The same for the text that watches training.
        test_tokens: The same for the text of the final report.
        train_tokens: The same for the training text.
        batch_size: Sequences a process takes at a step, 1 or more.
        pack: Whether to join documents and cut them into full sequences, and to place several rows
            of prompts in one; otherwise each document is one sequence, truncated or padded.
        num_workers: Processes that load batches beside each training process, 0 or more; 0 is fast,
            since all tokens are in memory.
        seed: Seed of the choice and the order of sequences.
    """

    def __init__(
        self,
        *,
        tokenizer: str | Path | None = None,
        path: Path | None = None,
        train: str | None = None,
        calib: str | None = None,
        valid: str | None = None,
        test: str | None = None,
        domains: list[str] | None = None,
        text_field: str = "text",
        format: Format = "auto",  # noqa: A002 - the plainest name on the command line
        answers_only: bool = True,
        domain_weights: dict[str, float] | None = None,
        sequence_length: int = 256,
        calib_tokens: int | None = 40960,
        valid_tokens: int | None = 8192,
        test_tokens: int | None = 16384,
        train_tokens: int | None = None,
        batch_size: int = 8,
        pack: bool = True,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._texts = SplitTexts(
            {"train": train, "calib": calib, "valid": valid, "test": test},
            path=path,
            domains=domains,
            text_field=text_field,
            form=format,
        )
        self.answers_only = answers_only
        self.domain_weights = domain_weights
        self.sequence_length = sequence_length
        budgets = (train_tokens, calib_tokens, valid_tokens, test_tokens)
        self.budgets = dict(zip(SPLITS, budgets, strict=True))
        self.batch_size = batch_size
        self.pack = pack
        self.num_workers = num_workers
        self.seed = seed
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._windows: dict[str, TokenWindows] = {}

    def check(self, splits: Sequence[str]) -> None:
        """Checks all that can be known without tokenising; what was read is kept for later.

        Args:
            splits: Splits that will be used, of train, calib, valid, test.

        Raises:
            InputError: A size, path, domain, tokenizer or file cannot be used, or the splits share
                text.
        """
        sizes = {n: getattr(self, n) for n in ("sequence_length", "batch_size", "num_workers")}
        check_sizes(sizes, {split: self.budgets.get(split) for split in splits})
        self._texts.check(splits, self._load_tokenizer())
        if "train" in splits and self.domain_weights is not None:
            check_weights(self.domain_weights, self.domains_of("train"))

    def reseeded(self, seed: int) -> "TextDataModule":
        """The same text, of which another seed chooses and orders the sequences."""
        other = copy(self)
        other.seed, other._windows = seed, {}
        return other

    def predicting(self, split: str, max_tokens: int) -> "TextDataModule":
        """The same text, whose predict loop goes through the beginning of another split."""
        other, windows = copy(self), self.windows(split)
        count = min(max(1, max_tokens // self.sequence_length), len(windows))
        other._windows = {"calib": windows.select(torch.arange(count))}
        return other

    def domains_of(self, split: str) -> tuple[str, ...]:
        """Names of the domains of a split, sorted; a batch's `domain` is an index into them."""
        return tuple(self._texts.sources(split))

    def windows(self, split: str) -> TokenWindows:
        """Windows of a split in balanced order, tokenised at the first call.

        Args:
            split: One of train, calib, valid, test.

        Raises:
            InputError: As in `check`.
        """
        if split not in self._windows:
            self.check((split,))
            windows = Windowing(
                self._load_tokenizer(),
                self.sequence_length,
                pack=self.pack,
                answers_only=self.answers_only,
                seed=self.seed,
            ).windows_of(self._texts.take(split), self.budgets[split])
            logger.info("%s: %s", split, windows.describe())
            self._windows[split] = windows
        return self._windows[split]

    def fingerprint(self, split: str) -> str:
        """SHA-256 of the chosen tokens and their domains: equal for equal text, seed and budget."""
        return self.windows(split).fingerprint()

    def setup(self, stage: str) -> None:
        """Tokenises what a stage of Lightning needs; fit without validation needs no valid text."""
        for split in STAGES[stage]:
            watches = split == "valid" and stage == "fit"
            if not watches or self.trainer is None or self.trainer.enable_validation:
                self.windows(split)

    @property
    def order(self) -> int | dict[str, Any]:
        """What decides the order of the training text, beside the text itself."""
        if self.domain_weights is None:
            return self.seed
        return {"seed": self.seed, "domain_weights": self.domain_weights}

    def train_dataloader(self) -> DataLoader[Any]:
        """Loads the training text, shuffled each epoch, in whole optimizer steps."""
        accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return self._epochs().loader(self._replicas(), accumulated, self.num_workers)

    def check_fills_a_step(self, num_processes: int, num_accumulated: int = 1) -> None:
        """Checks that an epoch of training has a sequence for each place of one optimizer step.

        Args:
            num_processes: Processes that share the text.
            num_accumulated: Batches whose gradients make one step.

        Raises:
            InputError: It has fewer, or none of a domain that has a weight.
        """
        self._epochs().check(num_processes, num_accumulated)

    def _epochs(self) -> Epochs:
        return Epochs(self.windows("train"), self.domain_weights, self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """Loads the text that watches training, in fixed order."""
        return self._fixed_order("valid")

    def test_dataloader(self) -> DataLoader[Any]:
        """Loads the text of the final report, in fixed order."""
        return self._fixed_order("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Loads the calibration text, in fixed order."""
        return self._fixed_order("calib")

    def _fixed_order(self, split: str) -> DataLoader[dict[str, Tensor]]:
        dataset = WindowDataset(self.windows(split))
        sampler = PaddedSampler(dataset, **self._replicas())
        return DataLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers
        )

    def _replicas(self) -> dict[str, int]:
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return kwargs or {"num_replicas": 1, "rank": 0}

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            if self.tokenizer is None:
                raise InputError("data.tokenizer is not set -> name the folder of a tokenizer")
            self._tokenizer = load_tokenizer(Path(self.tokenizer).expanduser())
        return self._tokenizer
