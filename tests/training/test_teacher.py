"""What a student hears of its teacher, whether it is there or only its answers are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_smoe.data.positions import counted_positions
from lightning_smoe.errors import InputError
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.training.objectives import ForwardKL, TopKKL
from lightning_smoe.training.teacher import CachedTeacher, LiveTeacher, TeacherOptions
from tests.families import build
from tests.training.caches import (
    batch_of,
    classes_of_student,
    fill,
    plan,
    student_logits,
    teacher_model,
    text,
    tokens_of,
)
from tests.training.students import VOCAB_SIZE, hashes


def test_a_live_teacher_says_what_the_model_says_at_the_counted_positions(family: str) -> None:
    model = build(family, 0, VOCAB_SIZE)
    batch = batch_of(text(), "train", 0, 5)
    batch["attention_mask"][1, 10:] = 0
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.cat([logits[0, :15], logits[1, :9]]).log_softmax(-1)
    before = hashes(model)
    found = tokens_of(LiveTeacher(model), batch, "train", slice(3, 20)).log_probs(1.0)
    torch.testing.assert_close(found, expected[3:20], rtol=0, atol=1e-5)
    assert not found.requires_grad
    assert hashes(model) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_says_what_its_layers_did_only_if_it_was_told_to_watch() -> None:
    batch = batch_of(text(), "train", 0)
    counted = counted_positions(batch)
    model = teacher_model()
    teacher = LiveTeacher(model, signals=["router_logits"])
    signals = teacher.answer(batch, counted, "train", True).signals
    assert signals is not None
    for layer in find_moe_layers(model):
        assert signals[layer.name]["router_logits"].shape == (15, layer.num_experts)
    assert teacher.answer(batch, counted, "train", False).signals is None
    with pytest.raises(ValueError, match="no signals"):
        LiveTeacher(model).answer(batch, counted, "train", True)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_teacher_in_main_memory_answers_as_one_on_the_device(quantize: Any) -> None:
    here = LiveTeacher(teacher_model(), TeacherOptions(quantize=quantize))
    options = TeacherOptions(quantize=quantize, placement="offload")
    there = LiveTeacher(teacher_model(), options, signals=["hidden", "router_logits"])
    batch = batch_of(text(), "train", 0)
    for teacher in (here, there):
        teacher.place(torch.device("cpu"))
    found, expected = (tokens_of(t, batch, "train").log_probs(1.0) for t in (there, here))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert there.answer(batch, counted_positions(batch), "train", True).signals


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_was_kept_is_exactly_what_was_said_where_every_token_is_kept(
    temperature: float, tmp_path: Path
) -> None:
    data = text()
    cache = plan(tmp_path / "teacher", data, top_k=VOCAB_SIZE, temperature=temperature)
    fill(cache, data)
    live, cached = LiveTeacher(teacher_model()), CachedTeacher(cache.path, cache.manifest)
    objective = ForwardKL(temperature=temperature)
    for rows in (slice(None), slice(4, 21)):
        # The two windows that were asked together, so that sums are taken in one order.
        batch = batch_of(data, "train", 2, 3)
        wanted, found = (tokens_of(teacher, batch, "train", rows) for teacher in (live, cached))
        logits = student_logits(30)[rows]
        targets = torch.zeros(len(logits), dtype=torch.int64)
        losses = [objective(tokens, logits, targets) for tokens in (wanted, found)]
        torch.testing.assert_close(*losses, rtol=0, atol=0 if rows == slice(None) else 1e-5)
    held_out = batch_of(data, "valid", 0, 1)
    wanted, found = (tokens_of(teacher, held_out, "valid") for teacher in (live, cached))
    torch.testing.assert_close(found.log_probs(1.0), wanted.log_probs(1.0), rtol=0, atol=0)


def test_what_was_kept_of_the_likeliest_tokens_is_exactly_the_coarse_distribution(
    tmp_path: Path,
) -> None:
    data = text()
    cache = plan(tmp_path / "teacher", data, top_k=5)
    fill(cache, data)
    live, cached = LiveTeacher(teacher_model()), CachedTeacher(cache.path, cache.manifest)
    batch = batch_of(data, "train", 2, 3)
    said, found = tokens_of(live, batch, "train"), tokens_of(cached, batch, "train")
    wanted = said.top(5, 1.0)
    torch.testing.assert_close(found.log_probs(1.0), wanted.log_probs(1.0), rtol=0, atol=0)
    torch.testing.assert_close(
        classes_of_student(found), classes_of_student(wanted), rtol=0, atol=0
    )
    targets = torch.zeros(30, dtype=torch.int64)
    coarse, full = (TopKKL(top_k=5)(t, student_logits(30), targets) for t in (found, said))
    torch.testing.assert_close(coarse, full, rtol=0, atol=0)
    assert bool((coarse <= ForwardKL()(said, student_logits(30), targets)).all())


def test_answers_are_found_for_windows_in_any_order_and_for_fewer_positions(
    tmp_path: Path,
) -> None:
    data = text()
    cache = plan(tmp_path / "teacher", data, top_k=5)
    fill(cache, data)
    cached = CachedTeacher(cache.path, cache.manifest)
    alone = {i: tokens_of(cached, batch_of(data, "train", i), "train") for i in (6, 1, 3)}
    batch = batch_of(data, "train", 6, 1, 3)
    batch["is_answer"][1, :9] = False
    batch["valid"][2] = False
    found = tokens_of(cached, batch, "train").log_probs(1.0)
    expected = torch.cat([alone[6].log_probs(1.0), alone[1].log_probs(1.0)[8:]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(tokens_of(cached, batch, "train", slice(0, 0)).log_probs(1.0)) == 0


def test_half_precision_is_close(tmp_path: Path) -> None:
    data = text()
    found = []
    for precision in ("float32", "float16"):
        cache = plan(tmp_path / precision, data, top_k=5, precision=precision)
        fill(cache, data)
        cached = CachedTeacher(cache.path, cache.manifest)
        found.append(tokens_of(cached, batch_of(data, "train", 0), "train").log_probs(1.0))
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)
    assert found[1].dtype == torch.float32


def test_what_was_kept_is_refused_where_it_does_not_suffice(tmp_path: Path) -> None:
    data = text()
    cache = plan(tmp_path / "teacher", data, top_k=5)
    fill(cache, data)
    cached = CachedTeacher(cache.path, cache.manifest)
    batch = batch_of(data, "train", 0)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    everywhere = torch.ones_like(batch["is_answer"])
    with pytest.raises(ValueError, match="has no answer at some positions of window 0"):
        cached.answer(batch, everywhere, "train", False)
    with pytest.raises(InputError, match="needs the teacher itself"):
        cached.answer(batch, counted_positions(batch), "train", True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "another"),
        ("train text", "another"),
        ("valid text", "another"),
        ("packing", {"sequence_length": 32, "pack": True}),
        ("temperature", 2.0),
        ("teacher", "another"),
        ("top_k", 9),
        ("precision", "float16"),
    ],
)
def test_answers_of_another_experiment_are_refused_by_what_differs(
    key: str, value: Any, tmp_path: Path
) -> None:
    data = text()
    cache = plan(tmp_path / "teacher", data, top_k=5)
    cache.prepare()
    wanted = replace(cache.manifest, inputs={**cache.manifest.inputs, key: value})
    with pytest.raises(InputError, match=rf"\(different: {key}[^,]*.*\).*lightning_smoe cache"):
        CachedTeacher(cache.path, wanted)


def test_the_type_of_the_weights_that_answered_may_differ(tmp_path: Path) -> None:
    data = text()
    cache = plan(tmp_path / "teacher", data, top_k=5)
    fill(cache, data)
    other = replace(cache.manifest, inputs={**cache.manifest.inputs, "numbers": "bfloat16"})
    CachedTeacher(cache.path, other)
