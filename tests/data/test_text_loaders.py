"""Batches of the data module, in one process and in two."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_smoe.data.packing import load_tokenizer
from lightning_smoe.data.samplers import ResumableLoader
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from tests.data.shipped_text import CHECKPOINT, shipped, short_text

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def test_a_batch_names_its_tensors_and_shapes() -> None:
    data = shipped(domains=["lit"], batch_size=4)
    for loader in (data.train_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        of_tokens = ("input_ids", "attention_mask", "document", "is_answer")
        expected = dict.fromkeys(of_tokens, (4, 32)) | dict.fromkeys(("domain", "window"), (4,))
        assert shapes == expected | {"valid": (4,)}
        dtypes = {name: tensor.dtype for name, tensor in batch.items()}
        assert dtypes.pop("valid") == dtypes.pop("is_answer") == torch.bool
        assert set(dtypes.values()) == {torch.int64}
        assert batch["valid"].all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_of_fixed_order_give_every_window_in_order(num_workers: int) -> None:
    data = shipped(batch_size=5, num_workers=num_workers)
    for split, loader in (
        ("calib", data.predict_dataloader()),
        ("valid", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        batches = list(loader)
        for name, tensor in data.windows(split).tensors().items():
            joined = torch.cat([batch[name] for batch in batches])
            torch.testing.assert_close(joined, tensor, rtol=0, atol=0)


def test_training_batches_are_full_and_shuffled() -> None:
    data = shipped(domains=["bible", "lit"], batch_size=7, train_tokens=32 * 40)
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    batches = [batch["input_ids"] for batch in loader]
    assert [len(batch) for batch in batches] == [7] * 5
    windows = {tuple(row) for row in data.windows("train").input_ids.tolist()}
    seen = [tuple(row) for batch in batches for row in batch.tolist()]
    assert len(set(seen)) == 35
    assert set(seen) < windows
    assert seen != [tuple(row) for row in data.windows("train").input_ids.tolist()][:35]


def test_training_text_of_less_than_one_step_is_refused() -> None:
    data = shipped(domains=["lit"], train_tokens=256, batch_size=9)
    with pytest.raises(InputError, match="gives 8 sequences but one step takes 9 -> give more"):
        data.train_dataloader()


def test_accumulated_batches_count_in_a_step() -> None:
    data = shipped(domains=["lit"], train_tokens=256, batch_size=2)
    data.check_fills_a_step(2, 2)
    message = r"one step takes 10 -> .* data\.batch_size or trainer\.accumulate_grad_batches"
    with pytest.raises(InputError, match=message):
        data.check_fills_a_step(1, 5)


def test_an_epoch_of_training_ends_with_a_step(tmp_path: Path) -> None:
    data = shipped(domains=["lit"], train_tokens=32 * 11, batch_size=2)
    (share,) = run("fit", tmp_path / "fit", data, 1, limit_val_batches=0, accumulate_grad_batches=2)
    assert len(share) == 8


def test_domains_are_mixed_by_weight() -> None:
    weights = {"arith": 3.0, "lit": 1.0}
    data = shipped(
        domains=["lit", "arith"], train_tokens=32 * 16, batch_size=4, domain_weights=weights
    )
    data.check(("train",))
    seen = torch.cat([batch["domain"] for batch in data.train_dataloader()])
    assert seen.bincount().tolist() == [12, 4]
    assert data.order == {"seed": 42, "domain_weights": weights}
    assert shipped().order == 42


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lit": 1.0}, "leaves out arith -> give every domain"),
        ({"lit": 1.0, "arith": 0.01}, r"gives 'arith' 0\.01, which is none of the 16 sequences"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights: dict[str, float], message: str) -> None:
    data = shipped(domains=["lit", "arith"], train_tokens=32 * 16, domain_weights=weights)
    data.check(("valid",))
    with pytest.raises(InputError, match=message):
        data.check_fills_a_step(1)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_become_batches_with_their_answers_marked(tmp_path: Path, pack: bool) -> None:
    rows = [{"input": f"{n} + 1 = ", "output": str(n + 1)} for n in range(9)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = shipped(calib=str(tmp_path / "sums.jsonl"), pack=pack, batch_size=2)
    batch = next(iter(data.predict_dataloader()))
    windows = data.windows("calib")
    assert torch.equal(batch["input_ids"], windows.input_ids[batch["window"]])
    assert ("position_ids" in batch) == pack
    text = str(load_tokenizer(CHECKPOINT).decode(batch["input_ids"][batch["is_answer"]]))
    expected = {str(n + 1) for n in range(9)}
    assert set(text.removesuffix("<|endoftext|>").split("<|endoftext|>")) <= expected


def test_text_and_rows_in_one_domain_are_refused(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    (tmp_path / "law/a.txt").write_text("text")
    (tmp_path / "law/b.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(InputError, match="'law' of the calib split has plain text and rows of"):
        shipped(calib=str(tmp_path)).check(("calib",))


def test_loaders_are_plain_data_loaders_of_torch() -> None:
    data = shipped()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert type(loader) is DataLoader


class Counter(LightningModule):
    """Writes which windows a process saw, and which of them count."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder
        self.seen: list[tuple[list[int], bool]] = []

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        self.seen += zip(batch["input_ids"].tolist(), batch["valid"].tolist(), strict=True)
        return {}

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.predict_step(batch, batch_idx)

    validation_step = test_step

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.predict_step(batch, batch_idx)
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def write(self) -> None:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.seen))

    on_predict_end = on_test_end = on_train_end = write


def run(
    verb: str, folder: Path, data: TextDataModule, devices: int, **options: Any
) -> list[list[Any]]:
    """What each process saw."""
    folder.mkdir()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=1,
        **options,
    )
    getattr(trainer, verb)(Counter(folder), datamodule=data)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@pytest.mark.parametrize(("verb", "split"), [("predict", "calib"), ("test", "test")])
@pytest.mark.parametrize("devices", [1, 2])
def test_processes_together_see_every_window_once(
    tmp_path: Path, verb: str, split: str, devices: int
) -> None:
    data = shipped(domains=["arith", "lit", "js"], calib_tokens=480, test_tokens=480, batch_size=2)
    shares = run(verb, tmp_path / verb, data, devices)
    assert [len(share) for share in shares] == [15] if devices == 1 else [8, 8]
    counted = sorted(ids for share in shares for ids, is_real in share if is_real)
    assert counted == sorted(data.windows(split).input_ids.tolist())


def test_processes_train_on_different_windows_and_fit_needs_no_valid_text(tmp_path: Path) -> None:
    shutil.copytree(short_text() / "valid", tmp_path / "text/train")
    data = shipped(path=tmp_path / "text", train_tokens=32 * 10, batch_size=2)
    shares = run("fit", tmp_path / "fit", data, 2, limit_val_batches=0)
    assert [len(share) for share in shares] == [4, 4]
    assert len({tuple(ids) for share in shares for ids, _ in share}) == 8
