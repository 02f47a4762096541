"""Statistics under the predict loop: what they may not depend on."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.calibration.module import CalibrationModule, ExpertStatistics
from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.data.packing import TokenWindows
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.functional.sums import ExpertSums
from lightning_smoe.models.layer import find_moe_layers
from tests.calibration.batches import (
    DOMAINS,
    MANIFEST,
    RELATIVE,
    WindowData,
    assert_same_sample,
    assert_same_sums,
    gather,
    padded_left,
    predict,
    random_windows,
)
from tests.conftest import SHIPPED_CHECKPOINT, TOKENIZER_VOCAB_SIZE
from tests.families import build


class SaveStatistics(Callback):
    """Writes what every process ended with: attributes set in a forked process are lost."""

    def __init__(self, watch: ExpertStatistics, folder: Path) -> None:
        self._watch, self._folder = watch, folder

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch.statistics.save(self._folder / f"{trainer.global_rank}.safetensors")


def gather_in_processes(
    model: PreTrainedModel, windows: TokenWindows, folder: Path
) -> list[Statistics]:
    """What each of two processes ends with."""
    watch = ExpertStatistics(windows.domain_names, MANIFEST, stride=2)
    save = SaveStatistics(watch, folder)
    processes = {"devices": 2, "strategy": "ddp_fork"}
    predict(CalibrationModule(model), WindowData(windows), watch, save, **processes)
    return [Statistics.load(folder / f"{rank}.safetensors") for rank in range(2)]


def assert_same(actual: Statistics, expected: Statistics, relative: float = RELATIVE) -> None:
    assert list(actual.layers) == list(expected.layers)
    for name, sums in actual.layers.items():
        assert_same_sums(sums, expected.layers[name], relative)
        assert_same_sample(actual.samples[name], expected.samples[name], relative)


def test_statistics_do_not_depend_on_the_batch_size(tiny_moe: PreTrainedModel) -> None:
    windows = random_windows()
    assert_same(gather(tiny_moe, windows, batch_size=1), gather(tiny_moe, windows))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_statistics_do_not_depend_on_the_order_of_sequences(family: str) -> None:
    model, windows = build(family), random_windows()
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    assert_same(gather(model, windows.select(order)), gather(model, windows))


def test_statistics_do_not_depend_on_the_side_of_the_padding(tiny_moe: PreTrainedModel) -> None:
    windows = random_windows()
    moved = padded_left(windows)
    assert not torch.equal(moved.attention_mask, windows.attention_mask)
    assert_same(gather(tiny_moe, moved), gather(tiny_moe, windows), relative=1e-5)


def test_what_stands_at_padding_does_not_matter() -> None:
    model, windows = build("qwen2_moe"), random_windows()
    before = gather(model, windows)
    windows.input_ids[windows.attention_mask == 0] = 77
    after = gather(model, windows)
    assert_same(after, before)
    for sums in after.layers.values():
        assert sums.num_tokens.sum() == windows.attention_mask.sum()
        top_k = find_moe_layers(model)[0].top_k
        assert torch.equal(sums.count.sum(-1), top_k * sums.num_tokens)


class Repeating(WindowData):
    """Gives every batch a second time, marked as a repeat."""

    def on_after_batch_transfer(
        self, batch: dict[str, Tensor], dataloader_idx: int
    ) -> dict[str, Tensor]:
        twice = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
        return twice | {"valid": torch.cat([batch["valid"], ~batch["valid"]])}


def test_sequences_that_are_repeats_do_not_count() -> None:
    model, windows = build("deepseek_v3"), random_windows()
    watch = ExpertStatistics(DOMAINS, MANIFEST)
    predict(CalibrationModule(model), Repeating(windows), watch)
    assert_same(watch.statistics, gather(model, windows))


def test_the_sums_of_a_domain_are_those_of_its_text_alone() -> None:
    model, windows = build("ernie4_5_moe"), random_windows()
    both = gather(model, windows)
    for domain in range(len(DOMAINS)):
        alone = gather(model, windows.select((windows.domain == domain).nonzero().squeeze(1)))
        for name, sums in alone.layers.items():
            rows = ExpertSums(**{k: t[domain] for k, t in both.layers[name].tensors().items()})
            assert_same_sums(rows, sums.pooled(), RELATIVE)
            assert int(sums.num_tokens[1 - domain]) == 0


def test_all_domains_pooled_are_the_sums_without_domains() -> None:
    model, windows = build("mixtral"), random_windows()
    single = TokenWindows(
        windows.input_ids,
        windows.attention_mask,
        windows.document,
        torch.zeros_like(windows.domain),
        ("text",),
    )
    with_domains, without = gather(model, windows), gather(model, single)
    for name, sums in with_domains.layers.items():
        assert_same_sums(sums.pooled(), without.layers[name].pooled(), RELATIVE)


def test_a_callback_can_watch_twice() -> None:
    model, windows = build("mixtral"), random_windows()
    watch = ExpertStatistics(DOMAINS, MANIFEST)
    found = []
    for _ in range(2):
        predict(CalibrationModule(model), WindowData(windows), watch)
        found.append(watch.statistics)
    assert_same(found[1], found[0], relative=0)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("num_sequences", [13, 1])
def test_two_processes_give_the_sums_and_the_sample_of_one(
    family: str, num_sequences: int, tmp_path: Path
) -> None:
    windows = random_windows(num_sequences)
    both = gather_in_processes(build(family), windows, tmp_path)
    alone = gather(build(family), windows, stride=2)
    for statistics in both:
        assert_same(statistics, alone)
        for name, sample in statistics.samples.items():
            assert torch.equal(sample.states, both[0].samples[name].states)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "ernie4_5_moe"])
def test_bfloat16_models_are_summed_in_float64(family: str) -> None:
    model, weights = build(family), []

    class Note(Callback):
        """Keeps the routing weights of the first layer."""

        def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            layer = find_moe_layers(pl_module)[0]
            layer.experts.register_forward_pre_hook(
                lambda _, args, kwargs: weights.append((*args, *kwargs.values())[1:]),
                with_kwargs=True,
            )

    windows = random_windows()
    watch = ExpertStatistics(DOMAINS, MANIFEST)
    predict(CalibrationModule(model), WindowData(windows), Note(), watch, precision="bf16-true")
    assert next(model.parameters()).dtype == torch.bfloat16
    sums = next(iter(watch.statistics.layers.values())).pooled()
    assert {t.dtype for t in sums.tensors().values()} == {torch.int64, torch.float64}
    expected = torch.zeros(12, dtype=torch.float64)
    is_token = windows.attention_mask.reshape(-1).bool()
    indices, gates = (torch.cat(parts)[is_token] for parts in zip(*weights, strict=True))
    for row, column in zip(*torch.where(indices >= 0), strict=True):
        expected[indices[row, column]] += gates[row, column].double()
    # Summed in bfloat16 the error would be 1e-2; float64 sums of the same numbers differ by 1e-16.
    torch.testing.assert_close(sums.gate_sum, expected, rtol=1e-12, atol=0)
    assert torch.equal(sums.count, indices.reshape(-1).bincount(minlength=12))


def test_statistics_of_shipped_text_count_every_token_of_every_domain() -> None:
    data = TextDataModule(
        tokenizer=SHIPPED_CHECKPOINT, sequence_length=32, calib_tokens=8 * 64, batch_size=3
    )
    model = build("qwen3_moe", vocab_size=TOKENIZER_VOCAB_SIZE)
    watch = ExpertStatistics(data.domains_of("calib"), MANIFEST)
    predict(CalibrationModule(model), data, watch)
    assert len(watch.statistics.domains) == 8
    for sums in watch.statistics.layers.values():
        assert sums.num_tokens.tolist() == [64] * 8
        assert sums.count.sum(1).tolist() == [4 * 64] * 8
    assert {sample.num_tokens for sample in watch.statistics.samples.values()} == {8 * 64}
