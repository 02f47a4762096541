"""Which windows each process sees, and going on where a loader stopped."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_smoe.data.mixing import Mixture
from lightning_smoe.data.packing import TokenWindows
from lightning_smoe.data.samplers import (
    EpochSampler,
    PaddedSampler,
    ResumableLoader,
    WindowDataset,
)
from lightning_smoe.errors import InputError

# Lightning recommends worker processes and fresh folders; these tests want neither.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
]


def dataset(num_windows: int) -> WindowDataset:
    """Windows whose tokens are the number of the window."""
    ids = torch.arange(num_windows)[:, None].repeat(1, 2)
    zeros = torch.zeros(num_windows, dtype=torch.int64)
    return WindowDataset(TokenWindows(ids, torch.ones_like(ids), ids, zeros, ("a",)))


def loader(num_windows: int = 22, batch_size: int = 2, num_workers: int = 0) -> ResumableLoader:
    data = dataset(num_windows)
    sampler = EpochSampler(data, seed=5)
    return ResumableLoader(
        data, batch_size=batch_size, sampler=sampler, num_workers=num_workers, drop_last=True
    )


def numbers(batch: dict[str, Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
def test_processes_share_every_sample_exactly_once(num_windows: int, num_replicas: int) -> None:
    data = dataset(num_windows)
    shares = [list(PaddedSampler(data, num_replicas, rank)) for rank in range(num_replicas)]
    assert len({len(share) for share in shares}) == 1
    real = [index for share in shares for index, is_real in share if is_real]
    assert sorted(real) == list(range(num_windows))
    assert all(len(share) == len(PaddedSampler(data, num_replicas)) for share in shares)


def test_a_repeated_sample_is_marked_in_the_batch() -> None:
    data = dataset(3)
    items = [data[item] for item in PaddedSampler(data, 2, 1)]
    assert [int(item["input_ids"][0]) for item in items] == [1, 0]
    assert [bool(item["valid"]) for item in items] == [True, False]
    assert bool(data[2]["valid"])
    assert [int(item["window"]) for item in items] == [1, 0]


def test_training_shares_are_disjoint_equal_and_drop_the_uneven_tail() -> None:
    data = dataset(14)
    shares = [list(EpochSampler(data, 4, rank)) for rank in range(4)]
    assert [len(share) for share in shares] == [3] * 4 == [len(EpochSampler(data, 4))] * 4
    assert len({index for share in shares for index in share}) == 12


@pytest.mark.parametrize(("num_replicas", "samples_a_step"), [(1, 6), (2, 3), (2, 6), (3, 5)])
def test_an_epoch_is_a_whole_number_of_steps(num_replicas: int, samples_a_step: int) -> None:
    data, dropped = dataset(31), set()
    for epoch in range(2):
        seen: list[int] = []
        for rank in range(num_replicas):
            sampler = EpochSampler(data, num_replicas, rank, samples_a_step=samples_a_step)
            sampler.set_epoch(epoch)
            share = list(sampler)
            assert len(share) == len(sampler)
            assert len(share) % samples_a_step == 0
            seen += share
        assert len(seen) == len(set(seen)) > 31 - num_replicas * samples_a_step
        dropped.add(frozenset(range(31)) - frozenset(seen))
    assert len(dropped) == 2


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_processes_share_what_a_mixture_draws(num_replicas: int) -> None:
    data = dataset(20)
    domain = torch.tensor([0, 1] * 10)
    mixture = Mixture(domain, (1.0, 3.0))
    options: dict[str, Any] = {"samples_a_step": 4 // num_replicas, "mixture": mixture}
    shares = [
        list(EpochSampler(data, num_replicas, rank, **options)) for rank in range(num_replicas)
    ]
    together = [index for step in zip(*shares, strict=True) for index in step]
    assert together == list(EpochSampler(data, samples_a_step=4, mixture=mixture))
    assert domain[torch.tensor(together)].bincount().tolist() == [5, 15]
    assert sorted(together) == sorted(mixture.draw(0, 20, seed=42).tolist())
    assert together != mixture.draw(0, 20, seed=42).tolist()


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    data = dataset(50)
    orders = {}
    for seed in (42, 43):
        for epoch in (0, 1):
            sampler = EpochSampler(data, seed=seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = list(sampler)
            torch.manual_seed(epoch)
            assert list(sampler) == orders[seed, epoch]
    # Four: the second epoch of seed 42 is not the first of seed 43.
    assert len({tuple(order) for order in orders.values()}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders.values())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loaded_state_goes_on_at_the_next_batch(num_workers: int) -> None:
    first = loader(num_workers=num_workers)
    first.sampler.set_epoch(3)  # type: ignore[attr-defined]  # torch types it as any sampler
    whole = [numbers(batch) for batch in first]
    batches = iter(first)
    begun = [numbers(next(batches)) for _ in range(4)]
    second = loader(num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    rest = [numbers(batch) for batch in second]
    assert begun + rest == whole
    assert len(second) == 11
    assert [numbers(batch) for batch in second] == whole


def test_a_position_counts_for_its_epoch_only() -> None:
    first = loader()
    next(iter(first))
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(1)  # type: ignore[attr-defined]  # torch types it as any sampler
    assert len(list(second)) == 11
    second.sampler.set_epoch(0)  # type: ignore[attr-defined]  # torch types it as any sampler
    assert len(list(second)) == 11


@pytest.mark.parametrize("other", [loader(batch_size=1), loader(num_windows=30)])
def test_a_state_of_another_layout_is_refused(other: ResumableLoader) -> None:
    with pytest.raises(InputError, match=r"checkpoint was written with .* -> resume with the same"):
        other.load_state_dict(loader().state_dict())


class Recorder(LightningModule):
    """Learns one number and notes the epoch and the windows of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, numbers(batch)))
        return (self.weight - batch["input_ids"].float()).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class StopError(Exception):
    """Stands for a killed process."""


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise StopError


def fit(
    folder: Path,
    *callbacks: Callback,
    checkpoint: Path | None = None,
    num_workers: int = 0,
    **options: Any,
) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=3,
        **options,
    )
    data = loader(num_workers=num_workers)
    trainer.fit(module, data, loader(4), ckpt_path=checkpoint, weights_only=True)
    return module


# Step 11 is the end of an epoch; with a limit of 5 batches, steps 5 and 10 are.
@pytest.mark.parametrize(
    ("step", "num_workers", "options"),
    [
        (4, 0, {}),
        (15, 0, {}),
        (15, 2, {}),
        (11, 0, {}),
        (22, 0, {}),
        (32, 0, {}),
        (5, 0, {"limit_train_batches": 5}),
        (7, 0, {"limit_train_batches": 5}),
        (4, 0, {"val_check_interval": 3}),
        (3, 0, {"val_check_interval": 3}),
        (3, 0, {"accumulate_grad_batches": 2}),
    ],
)
def test_a_stopped_fit_goes_on_with_the_very_next_batch(
    tmp_path: Path, step: int, num_workers: int, options: dict[str, Any]
) -> None:
    whole = fit(tmp_path, **options)
    save = partial(ModelCheckpoint, tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    # Callbacks that save run last: the step after is the one that is lost.
    with pytest.raises(StopError):
        fit(tmp_path, StopAfter(step + 1), save(), **options)
    saved = tmp_path / f"step={step}.ckpt"
    rest = fit(tmp_path, save(), checkpoint=saved, num_workers=num_workers, **options)
    num_seen = step * options.get("accumulate_grad_batches", 1)
    assert rest.seen == whole.seen[num_seen:]
    torch.testing.assert_close(rest.weight, whole.weight, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [1.0, 5])
def test_a_checkpoint_written_after_validation_starts_the_next_epoch(
    tmp_path: Path, limit: float
) -> None:
    whole = fit(tmp_path, limit_train_batches=limit)
    save = partial(ModelCheckpoint, tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(tmp_path, save(), limit_train_batches=limit)
    saved = tmp_path / "epoch=1.ckpt"
    rest = fit(tmp_path, save(), checkpoint=saved, limit_train_batches=limit)
    assert rest.seen == [entry for entry in whole.seen if entry[0] == 2]
