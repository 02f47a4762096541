"""The data module: text of several domains as batches of tokens."""

import logging
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_smoe.data.packing import TokenWindows, choose, interleave, load_tokenizer, pack, pad
from lightning_smoe.data.samplers import (
    EpochSampler,
    PaddedSampler,
    ResumableLoader,
    WindowDataset,
    keyed_generator,
)
from lightning_smoe.data.sources import Source, find_sources, read_documents, select_domains
from lightning_smoe.errors import InputError

logger = logging.getLogger(__name__)

CORPUS = Path(__file__).parent / "corpus"
SPLITS = ("train", "calib", "valid", "test")
STAGES = {
    "fit": ("train", "valid"),
    "validate": ("valid",),
    "test": ("test",),
    "predict": ("calib",),
}


class TextDataModule(LightningDataModule):
    """Text of several domains as batches of tokens.

    A batch is a dictionary: `input_ids`, `attention_mask` and `document` (batch, sequence);
    `domain` (batch), the index of each sequence's domain in `domains_of(split)`; `valid` (batch),
    false for a sequence that is repeated only so that all processes have equally many.

    Domain ids count within a split, whose names are sorted: splits with the same domains agree.
    Every process tokenises the whole text of a split and keeps the windows asked for.

    Args:
        tokenizer: Folder with the tokenizer; on the command line, that of the model.
        path: Folder with sub-folders train, calib, valid and test of one file a domain (.txt,
            .jsonl, .parquet) or one sub-folder a domain; null takes the shipped corpus.
        train: Where the training text comes from instead: a folder, a file, or
            hf://NAME[:CONFIG][@SPLIT]; null takes it from `path`.
        calib: The same for the calibration text.
        valid: The same for the text that watches training.
        test: The same for the text of the final report.
        domains: Names of the domains to use; null uses all.
        text_field: Field with the text in rows of .jsonl, .parquet and the Hub.
        sequence_length: Tokens a sequence, 2 or more.
        calib_tokens: Tokens of calibration text, shared evenly among the domains in whole
            sequences, at least one each; null takes all.
        valid_tokens: The same for the text that watches training.
        test_tokens: The same for the text of the final report.
        train_tokens: The same for the training text.
        batch_size: Sequences a process takes at a step, 1 or more.
        pack: Whether to join documents and cut them into full sequences; otherwise each document
            is one sequence, truncated or padded.
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
        self.path = path
        self.locations = {"train": train, "calib": calib, "valid": valid, "test": test}
        self.domains = domains
        self.text_field = text_field
        self.sequence_length = sequence_length
        budgets = (train_tokens, calib_tokens, valid_tokens, test_tokens)
        self.budgets = dict(zip(SPLITS, budgets, strict=True))
        self.batch_size = batch_size
        self.pack = pack
        self.num_workers = num_workers
        self.seed = seed
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._documents: dict[str, dict[str, list[str]]] = {}
        self._windows: dict[str, TokenWindows] = {}

    def check(self, splits: Sequence[str]) -> None:
        """Checks all that can be known without tokenising; what was read is kept for later.

        Args:
            splits: Splits that will be used, of train, calib, valid, test.

        Raises:
            InputError: A size, path, domain, tokenizer or file cannot be used.
        """
        self._check_sizes(splits)
        self._load_tokenizer()
        for split in splits:
            if split not in self._windows and split not in self._documents:
                self._documents[split] = {
                    domain: [d for s in sources for d in read_documents(s, self.text_field)]
                    for domain, sources in self._sources(split).items()
                }

    def reseeded(self, seed: int) -> "TextDataModule":
        """The same text, of which another seed chooses and orders the sequences."""
        other = copy(self)
        other.seed, other._documents, other._windows = seed, {}, {}
        return other

    def domains_of(self, split: str) -> tuple[str, ...]:
        """Names of the domains of a split, sorted; a batch's `domain` is an index into them."""
        return tuple(self._sources(split))

    def windows(self, split: str) -> TokenWindows:
        """Windows of a split in balanced order, tokenised at the first call.

        Args:
            split: One of train, calib, valid, test.

        Raises:
            InputError: As in `check`.
        """
        if split not in self._windows:
            self.check((split,))
            windows = self._tokenize(split)
            del self._documents[split]
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

    def train_dataloader(self) -> DataLoader[Any]:
        """Loads the training text, shuffled each epoch; the last, partial batch is dropped."""
        replicas = self._replicas()
        self.check_fills_a_step(replicas["num_replicas"])
        dataset = WindowDataset(self.windows("train"))
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(dataset, **replicas, seed=self.seed),
            num_workers=self.num_workers,
            drop_last=True,
        )

    def check_fills_a_step(self, num_processes: int) -> None:
        """Checks that the training text has a sequence for each place of one step.

        Raises:
            InputError: It has fewer.
        """
        found, needed = len(self.windows("train")), self.batch_size * num_processes
        if found < needed:
            raise InputError(
                f"the train split gives {found} sequences but one step takes {needed} -> give "
                f"more text or a larger data.train_tokens, or a smaller data.batch_size"
            )

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

    def _tokenize(self, split: str) -> TokenWindows:
        documents, budget = self._documents[split], self.budgets[split]
        share = None if budget is None else budget // len(documents)
        tokenizer, make_windows = self._load_tokenizer(), pack if self.pack else pad
        parts, first = [], 0
        for domain, texts in documents.items():
            windows = make_windows(
                texts, tokenizer, self.sequence_length, domain=domain, first_document=first
            )
            parts.append(choose(windows, share, keyed_generator(self.seed, domain)))
            first += len(texts)
        return interleave(parts)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            if self.tokenizer is None:
                raise InputError("data.tokenizer is not set -> name the folder of a tokenizer")
            self._tokenizer = load_tokenizer(Path(self.tokenizer).expanduser())
        return self._tokenizer

    def _sources(self, split: str) -> dict[str, list[Source]]:
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r} -> use one of {', '.join(SPLITS)}")
        location = self.locations[split] or self._folder(split)
        return select_domains(find_sources(location, split), self.domains, split)

    def _folder(self, split: str) -> Path:
        root = CORPUS if self.path is None else Path(self.path).expanduser()
        if not root.is_dir():
            raise InputError(f"data.path={root}: no such folder -> name one that exists")
        if not (root / split).is_dir():
            raise InputError(
                f"data.path={root}: has no sub-folder {split!r} "
                f"-> add it, or name the {split} text by data.{split}"
            )
        return root / split

    def _check_sizes(self, splits: Sequence[str]) -> None:
        smallest = {"sequence_length": 2, "batch_size": 1, "num_workers": 0}
        for name, least in smallest.items():
            if (value := getattr(self, name)) < least:
                raise InputError(f"data.{name}={value} is too small -> set it to {least} or more")
        for split in splits:
            budget = self.budgets.get(split)
            if budget is not None and budget < self.sequence_length:
                raise InputError(
                    f"data.{split}_tokens={budget} is less than one sequence of "
                    f"data.sequence_length={self.sequence_length} -> raise it or shorten sequences"
                )
