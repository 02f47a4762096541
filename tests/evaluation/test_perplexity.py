"""Quality on held-out text, against a loop over tokens that a child could read."""

import copy
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.evaluation.perplexity import EvaluationModule, Quality
from tests.families import PAD_TOKEN_ID, build

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "qwen2moe-tiny-8dom"
VOCAB_SIZE = 4096
DOMAINS = ("arith", "facts", "lit")
# Logits in float32 are off by 1e-7, and so is a divergence, which is a difference of logarithms.
CLOSE = 1e-6


def text(**options: Any) -> TextDataModule:
    small: dict[str, Any] = {
        "sequence_length": 24,
        "test_tokens": 3 * 3 * 24,
        "domains": list(DOMAINS),
        "batch_size": 4,
    }
    return TextDataModule(tokenizer=CHECKPOINT, **(small | options))


def judge(model: PreTrainedModel, teacher: PreTrainedModel, data: Any, **options: Any) -> Quality:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    module = EvaluationModule(model, teacher, DOMAINS)
    trainer = Trainer(**(settings | options))
    if isinstance(data, TextDataModule):
        trainer.test(module, datamodule=data, verbose=False)
    else:
        trainer.test(module, dataloaders=data, verbose=False)
    return module.quality


def pair(family: str = "mixtral") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose likeliest tokens are often those of a second one, its teacher."""
    teacher = build(family, 0, VOCAB_SIZE)
    student = copy.deepcopy(teacher)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.002 * torch.randn(parameter.shape, generator=noise))
    return student, teacher


@torch.no_grad()
def looped(student: PreTrainedModel, teacher: PreTrainedModel, data: TextDataModule) -> Quality:
    """One sequence at a time, without its padding; one token at a time."""
    windows = data.windows("test")
    nll, kl = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    agreements = []
    for ids, mask, domain in zip(
        windows.input_ids, windows.attention_mask, windows.domain.tolist(), strict=True
    ):
        tokens = ids[mask.bool()]
        found = student(tokens[None]).logits[0].double().log_softmax(-1)
        wanted = teacher(tokens[None]).logits[0].double().log_softmax(-1)
        for i in range(len(tokens) - 1):
            nll[DOMAINS[domain]].append(-found[i, tokens[i + 1]].item())
            kl[DOMAINS[domain]].append((wanted[i].exp() * (wanted[i] - found[i])).sum().item())
            agreements.append(float(found[i].argmax() == wanted[i].argmax()))
    return Quality(
        {name: sum(values) / len(values) for name, values in nll.items()},
        {name: sum(values) / len(values) for name, values in kl.items()},
        sum(agreements) / len(agreements),
    )


def check_equal(found: Quality, expected: Quality) -> None:
    assert found.nll == pytest.approx(expected.nll, rel=CLOSE, abs=CLOSE)
    assert found.kl == pytest.approx(expected.kl, rel=CLOSE, abs=CLOSE)
    assert found.top1_agreement == pytest.approx(expected.top1_agreement)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=CLOSE)
    assert found.mean_kl == pytest.approx(expected.mean_kl, rel=CLOSE, abs=CLOSE)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
def test_student_equal_to_teacher_has_no_divergence_at_all(family: str) -> None:
    teacher = build(family, 0, VOCAB_SIZE)
    for student in (teacher, copy.deepcopy(teacher)):
        quality = judge(student, teacher, text())
        assert quality.kl == dict.fromkeys(DOMAINS, 0.0)
        assert quality.mean_kl == 0
        assert quality.top1_agreement == 1
        assert all(nll > 0 for nll in quality.nll.values())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_every_number_equals_a_loop_over_tokens_without_padding(
    family: str, packed: bool, tmp_path: Path
) -> None:
    write_documents(tmp_path)
    student, teacher = pair(family)
    data = text(path=tmp_path, pack=packed, test_tokens=None)
    padding = data.windows("test").attention_mask == 0
    assert bool(padding.any()) != packed
    quality = judge(student, teacher, data)
    check_equal(quality, looped(student, teacher, data))
    assert quality.mean_kl > 100 * CLOSE
    assert 0.1 < quality.top1_agreement < 0.9


def write_documents(folder: Path) -> None:
    """Documents of unequal lengths, and unequal numbers of them in each domain."""
    words = ["the", "ship", "went", "down", "at", "night", "and", "nobody", "saw", "the", "light"]
    (folder / "test").mkdir()
    for number, domain in enumerate(DOMAINS, start=1):
        lines = [" ".join(words[: 3 + (5 * i) % 9]) for i in range(9 * number)]
        rows = [json.dumps({"text": line}) for line in lines]
        (folder / "test" / f"{domain}.jsonl").write_text("\n".join(rows))


def test_batch_size_does_not_matter() -> None:
    student, teacher = pair()
    by_size = [judge(student, teacher, text(batch_size=size)) for size in (1, 4, 9)]
    for quality in by_size[1:]:
        check_equal(quality, by_size[0])


def rows(batch: dict[str, Tensor]) -> DataLoader[Any]:
    """A loader of one batch."""
    batches: Any = [batch]
    return DataLoader(batches, batch_size=None)


def test_repeats_and_what_stands_in_padding_do_not_count() -> None:
    student, teacher = pair()
    data = text(pack=False, batch_size=9)
    (batch,) = list(data.test_dataloader())
    expected = judge(student, teacher, rows(batch))
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    twice["valid"][9:] = False
    padding = twice["attention_mask"] == 0
    twice["input_ids"] = torch.where(padding, PAD_TOKEN_ID + 77, twice["input_ids"])
    check_equal(judge(student, teacher, rows(twice)), expected)
    everything = {**twice, "valid": torch.ones_like(twice["valid"])}
    check_equal(judge(student, teacher, rows(everything)), expected)  # each counted twice
    half = {**batch, "valid": torch.arange(9) % 2 == 0}
    assert judge(student, teacher, rows(half)).kl != expected.kl


class Write(Callback):
    """Writes what each process found: attributes of forked processes are lost."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, EvaluationModule):
            raise TypeError
        quality = pl_module.quality
        found = {"nll": quality.nll, "kl": quality.kl, "top1_agreement": quality.top1_agreement}
        (self._folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    student, teacher = pair()
    data = text(batch_size=2)
    assert len(data.windows("test")) % 2 == 1
    expected = judge(student, teacher, data)
    module = EvaluationModule(student, teacher, DOMAINS)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Write(tmp_path)],
    )
    trainer.test(module, datamodule=text(batch_size=2), verbose=False)
    for rank in range(2):
        check_equal(Quality(**json.loads((tmp_path / f"{rank}.json").read_text())), expected)


def test_means_are_over_domains_and_perplexity_is_the_exponential_of_mean_nats() -> None:
    quality = Quality({"a": 1.0, "b": 4.0}, {"a": 0.5, "b": 0.1}, 0.25)
    assert quality.perplexity == pytest.approx(math.exp(2.5))
    assert quality.mean_kl == pytest.approx(0.3)
    assert quality.to_json() == {
        "perplexity": {
            "mean": pytest.approx(math.exp(2.5)),
            "domains": pytest.approx({"a": math.e, "b": math.exp(4.0)}),
        },
        "kl": {"mean": pytest.approx(0.3), "domains": {"a": 0.5, "b": 0.1}},
        "top1_agreement": 0.25,
    }


def test_the_perplexity_of_a_hopeless_model_is_infinite_not_an_error() -> None:
    quality = Quality({"a": 1e4}, {"a": 1e4}, 0.0)
    assert quality.perplexity == math.inf
    assert quality.to_json()["perplexity"] == {"mean": math.inf, "domains": {"a": math.inf}}


def test_a_domain_without_a_token_to_predict_is_refused(tmp_path: Path) -> None:
    write_documents(tmp_path)
    (tmp_path / "test/facts.jsonl").write_text('{"text": "a"}')
    student, teacher = pair()
    with pytest.raises(InputError, match="the text of facts has no token that follows another"):
        judge(student, teacher, text(path=tmp_path, test_tokens=None))


def test_the_teacher_is_no_part_of_the_module() -> None:
    student, teacher = pair()
    module = EvaluationModule(student, teacher, DOMAINS)
    numbers = sum(p.numel() for p in student.parameters())
    assert sum(p.numel() for p in module.parameters()) == numbers
    assert all(name.startswith("model.") for name in module.state_dict())


def test_judging_changes_neither_model() -> None:
    student, teacher = pair()
    before = [copy.deepcopy(model.state_dict()) for model in (student, teacher)]
    judge(student, teacher, text())
    for model, state in zip((student, teacher), before, strict=True):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
