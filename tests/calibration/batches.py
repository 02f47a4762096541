"""Random text with padding and domains, a Trainer that reads it, and statistics of it."""

from typing import Any, Final

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.data.packing import TokenWindows
from lightning_smoe.data.samplers import PaddedSampler, WindowDataset
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.functional.sums import ExpertSums
from lightning_smoe.models.artifact import Manifest
from tests.families import EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE

DOMAINS: Final = ("prose", "code")
# Odd, so that two processes share them unevenly.
NUM_SEQUENCES: Final = 13
CPU: Final = torch.device("cpu")
MANIFEST: Final = Manifest("calibrate", {"checkpoint": "abc"})
# Of the largest entry of a sum: products are formed in float32, whose unit is 6e-8.
RELATIVE: Final = 1e-6


def random_windows(num_sequences: int = NUM_SEQUENCES, length: int = 9) -> TokenWindows:
    """Sequences of random lengths, padded at the right, of two domains in turn."""
    generator = torch.Generator().manual_seed(3)
    first = 1 + max(EOS_TOKEN_ID, PAD_TOKEN_ID)
    ids = torch.randint(first, VOCAB_SIZE, (num_sequences, length), generator=generator)
    lengths = torch.randint(2, length + 1, (num_sequences, 1), generator=generator)
    is_token = torch.arange(length) < lengths
    row = torch.arange(num_sequences)
    return TokenWindows(
        torch.where(is_token, ids, PAD_TOKEN_ID),
        is_token.long(),
        torch.where(is_token, row[:, None], -1),
        row % len(DOMAINS),
        DOMAINS,
    )


def padded_left(windows: TokenWindows) -> TokenWindows:
    """The same sequences with their padding moved to the left end."""
    gap = (1 - windows.attention_mask).sum(1, keepdim=True)
    order = (torch.arange(windows.input_ids.shape[1]) - gap) % windows.input_ids.shape[1]
    names = ("input_ids", "attention_mask", "document")
    moved = {name: getattr(windows, name).gather(1, order) for name in names}
    return TokenWindows(domain=windows.domain, domain_names=windows.domain_names, **moved)


class WindowData(LightningDataModule):
    """Gives windows to the predict loop in their order, as `TextDataModule` does.

    Args:
        windows: The text.
        batch_size: Sequences a batch.
    """

    def __init__(self, windows: TokenWindows, batch_size: int = 4) -> None:
        super().__init__()
        self.windows, self.batch_size = windows, batch_size

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        dataset = WindowDataset(self.windows)
        assert self.trainer is not None
        replicas = self.trainer.distributed_sampler_kwargs or {}
        sampler = PaddedSampler(dataset, **replicas)
        return DataLoader(dataset, batch_size=self.batch_size, sampler=sampler)


def predict(
    module: LightningModule, data: LightningDataModule, *callbacks: Callback, **options: Any
) -> Trainer:
    """Runs the predict loop on the CPU; options go to the Trainer."""
    trainer = Trainer(
        **{"accelerator": "cpu", "devices": 1, **options},
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    return trainer


def num_hooks(model: PreTrainedModel) -> int:
    """Forward hooks on all modules of a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same_sums(actual: ExpertSums, expected: ExpertSums, relative: float) -> None:
    """Counts agree exactly, other sums relative to their largest entry."""
    ours, theirs = actual.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        wanted = theirs[name]
        assert tensor.dtype == wanted.dtype
        if tensor.dtype == torch.int64:
            assert torch.equal(tensor, wanted), name
        else:
            atol = relative * float(wanted.abs().max())
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=atol, msg=name)


def assert_same_sample(
    actual: TokenSample, expected: TokenSample, relative: float = RELATIVE
) -> None:
    """The same tokens, in whatever order; states and scores relative to their largest entry."""
    assert actual.num_tokens == expected.num_tokens
    found, wanted = (sample.states.double() for sample in (actual, expected))
    nearest = torch.cdist(wanted, found).argmin(1)
    assert sorted(nearest.tolist()) == [*range(len(found))]
    for name in ("states", "router_logits", "gates"):
        ours, theirs = getattr(actual, name)[nearest], getattr(expected, name)
        assert ours.dtype == theirs.dtype
        atol = relative * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=name)


def gather(
    model: PreTrainedModel, windows: TokenWindows, batch_size: int = 4, stride: int = 1
) -> Statistics:
    """Statistics of the windows, as the calibrate step gathers them."""
    watch = ExpertStatistics(windows.domain_names, MANIFEST, stride)
    predict(CalibrationModule(model), WindowData(windows, batch_size), watch)
    return watch.statistics
