"""Learning from what is kept of the original's answers, through the command line."""

import shutil
from typing import Any, NoReturn

import pytest

from tests.cli.command import Workplace, check_refusal, snapshot
from tests.cli.trainings import SHORT, changed, distance, put_aside, to_train

TRAINED = "--model.recovery.trainable=[router,experts]"
CACHE = "--model.recovery.teacher.cache={top_k: 64}"
WARM = (
    "--model.recovery.objectives=[{class_path: lightning_smoe.training.objectives.ForwardKL, "
    "init_args: {temperature: 2}}]"
)


def refuse(*_: Any) -> NoReturn:
    raise AssertionError("the original was loaded")


def test_a_cache_of_every_token_teaches_like_the_original(
    finished: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = to_train(finished)
    work.done("fit", TRAINED)
    live = put_aside(work, "live")
    whole = "--model.recovery.teacher.cache={top_k: 4096}"
    work.done("cache", whole)
    monkeypatch.setattr("lightning_smoe.teaching.load", refuse)
    told = work.done("fit", TRAINED, whole).err
    assert "teacher is there already" in told
    assert distance(work.out / "compressed", live) > 5e-4
    assert distance(work.out / "recovered", live) < 1e-5


def test_cache_is_refused_where_nothing_is_to_be_kept(work: Workplace) -> None:
    work.refused(r"recovery\.teacher\.cache is null, .* set it, such as", "cache")


@pytest.mark.slow
def test_fit_brings_the_cache_along_and_refuses_another_by_name(finished: Workplace) -> None:
    work = to_train(finished)
    told = work.done("fit", CACHE).err
    assert "cache: wrote out/teacher" in told
    assert len(changed(work)) == 2
    files = snapshot(work.out / "teacher")
    for name in ("recovered", "training"):
        shutil.rmtree(work.out / name)
    for words, match in (
        (["--data.train_tokens=1024"], r"out/teacher.* \(different: train text\)"),
        (["--data.valid_tokens=256"], r"different: valid text"),
        (
            ["--model.recovery.teacher.cache={top_k: 64, temperature: 2}", WARM],
            r"different: temperature\)",
        ),
        (["--model.recovery.teacher.cache={top_k: 32}"], r"different: top_k"),
    ):
        for verb in ("cache", "fit"):
            message = check_refusal(work.do(verb, CACHE, *words), match)
            assert "overwrite" in message
        assert snapshot(work.out / "teacher") == files


def test_a_broken_cache_is_made_whole(finished: Workplace) -> None:
    work = to_train(finished)
    work.done("cache", CACHE)
    files = snapshot(work.out / "teacher")
    (lost, *_) = sorted((work.out / "teacher").glob("*.safetensors"))
    lost.unlink()
    work.done("cache", CACHE)
    assert snapshot(work.out / "teacher") == files


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"objectives": [{"class_path": "lightning_smoe.training.layer_objectives.HiddenMSE"}]},
            r"hidden_mse compares what layers do, which a cache of the teacher does not hold",
        ),
        (
            {
                "objectives": [
                    {
                        "class_path": "lightning_smoe.training.objectives.ForwardKL",
                        "init_args": {"temperature": 2.0},
                    }
                ]
            },
            r"forward_kl has temperature 2\.0 and .*cache\.temperature is 1\.0; make them the same",
        ),
        (
            {
                "objectives": [
                    {
                        "class_path": "lightning_smoe.training.objectives.TopKKL",
                        "init_args": {"top_k": 100},
                    }
                ]
            },
            r"top_k_kl tells 100 tokens apart and .*cache\.top_k is 64",
        ),
    ],
)
def test_what_a_cache_does_not_hold_is_refused_before_any_work(
    settings: dict[str, Any], match: str, work: Workplace
) -> None:
    recovery = {f"model.recovery.{name}": value for name, value in settings.items()}
    work.write({**SHORT, **recovery, "model.recovery.teacher.cache": {"top_k": 64}})
    work.refused(match, "fit")
