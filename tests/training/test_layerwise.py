"""Training each layer by itself, without the layers behind it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.models.walk import decoder_layers
from lightning_smoe.training.layerwise import Layerwise, LayerwiseModule
from tests.training.students import QUIET, hashes, pair, select, text, trainer

pytestmark = QUIET
OPTIONS = Layerwise(tokens=8 * 32, passes=4, learning_rate=3e-3)


def run(student: PreTrainedModel, teacher: PreTrainedModel, **options: Any) -> LayerwiseModule:
    data = text()
    module = LayerwiseModule(student, teacher, options.pop("options", OPTIONS))
    trainer(1, **options).predict(module, data.train_dataloader(), return_predictions=False)
    return module


@torch.no_grad()
def errors(student: PreTrainedModel, teacher: PreTrainedModel) -> list[float]:
    """Mean squared difference of hidden states behind each decoder layer, on the text."""
    differences: list[Tensor] = []
    for batch in text().train_dataloader():
        states = [
            model(batch["input_ids"], output_hidden_states=True).hidden_states[1:-1]
            for model in (student, teacher)
        ]
        differences.append(
            torch.stack([(a - b).square().mean() for a, b in zip(*states, strict=True)])
        )
    return torch.stack(differences).mean(0).tolist()


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_hidden_states_come_nearer_to_the_teachers(family: str) -> None:
    student, teacher = pair(family)
    before = errors(student, teacher)
    select(student, ["router", "experts"])
    run(student, teacher)
    after = errors(student, teacher)
    assert all(a < 0.9 * b for a, b in zip(after, before, strict=True) if b > 0)


def test_only_what_is_trained_changes_and_the_teacher_does_not() -> None:
    student, teacher = pair("qwen2_moe")
    select(student, ["router", "down_proj"])
    before, taught = hashes(student), hashes(teacher)
    run(student, teacher)
    after = hashes(student)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {n for n, p in student.named_parameters() if p.requires_grad}
    assert hashes(teacher) == taught
    assert all(p.grad is None for p in [*student.parameters(), *teacher.parameters()])
    assert not any(module.training for module in student.modules())


def test_a_student_that_is_the_teacher_stays_as_it_is() -> None:
    _, teacher = pair("qwen2_moe")
    student = copy.deepcopy(teacher)
    select(student, ["router", "experts"])
    before = hashes(student)
    run(student, teacher)
    assert hashes(student) == before


def test_one_step_follows_the_gradient_of_the_mean_squared_error() -> None:
    student, teacher = pair("qwen2_moe")
    select(student, ["down_proj"])
    expected = copy.deepcopy(student)
    data = text(train_tokens=2 * 32)
    (batch,) = data.train_dataloader()
    states = [
        model(batch["input_ids"], output_hidden_states=True).hidden_states[1]
        for model in (expected, teacher)
    ]
    (states[0] - states[1]).square().mean().backward()
    layer: Any = decoder_layers(expected)[0]
    optimizer = torch.optim.Adam([layer.mlp.experts.down_proj], lr=OPTIONS.learning_rate)
    optimizer.step()
    module = LayerwiseModule(student, teacher, Layerwise(64, 1, OPTIONS.learning_rate))
    trainer(1).predict(module, data.train_dataloader(), return_predictions=False)
    found: Any = decoder_layers(student)[0]
    torch.testing.assert_close(
        found.mlp.experts.down_proj, layer.mlp.experts.down_proj, rtol=0, atol=1e-5
    )


class TrainingText(LightningDataModule):
    """The training text under the predict loop, of which each process has its share."""

    def predict_dataloader(self) -> Any:
        data = text()
        data.trainer = self.trainer
        return data.train_dataloader()


class Written(LayerwiseModule):
    """Writes the weights of each process: what forked processes hold is lost."""

    folder: Path

    def on_predict_end(self) -> None:
        weights = {n: p.detach() for n, p in self._student.named_parameters()}
        torch.save(weights, self.folder / f"{self.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(tmp_path: Path) -> None:
    alone, teacher = pair("qwen2_moe")
    select(alone, ["router", "experts"])
    loader = text(batch_size=4).train_dataloader()
    module = LayerwiseModule(alone, teacher, OPTIONS)
    trainer(1).predict(module, loader, return_predictions=False)
    student, teacher = pair("qwen2_moe")
    select(student, ["router", "experts"])
    both = Written(student, teacher, OPTIONS)
    both.folder = tmp_path
    trainer(1, devices=2, strategy="ddp_fork").predict(
        both, datamodule=TrainingText(), return_predictions=False
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], parameter.detach(), rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"passes": 0}, {"learning_rate": 0.0}, {"learning_rate": -1.0}]
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of layerwise must be above 0"):
        Layerwise(**options)
