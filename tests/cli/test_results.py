"""What belongs together stays together: reports, baselines and processes that start at once."""

import json

import pytest

from tests.cli.command import Workplace
from tests.cli.two_processes import do_in_two


def models(work: Workplace) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((work.out / "report.json").read_text())
    return found["models"]  # type: ignore[return-value]  # of names


def test_a_recovered_model_of_another_compression_is_left_out(finished: Workplace) -> None:
    words = ("--model.keep=8", "--model.overwrite=true")
    told = finished.done("evaluate", *words).err
    assert "recovered/ was trained from another compressed/ and is left out" in told
    assert "recovered" not in models(finished)
    assert models(finished)["compressed"]["experts_per_layer"] == [8, 8]


def test_a_plan_written_by_hand_is_judged_beside_baselines_of_its_counts(work: Workplace) -> None:
    work.out.mkdir()
    layers = [
        {
            "name": f"model.layers.{index}.mlp",
            "num_experts": 12,
            "groups": [[e] for e in range(count)],
            "dropped": list(range(count, 12)),
        }
        for index, count in ((0, 6), (2, 6))
    ]
    (work.out / "plan.json").write_text(json.dumps({"layers": layers}))
    work.done("evaluate")
    assert models(work).keys() == {"compressed", "prune-frequency", "prune-reap"}
    assert models(work)["prune-reap"]["experts_per_layer"] == [6, 6]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--trainer.precision=bf16-true"], r"precision=bf16-true converts .* set model\.dtype"),
        (["--trainer.strategy=fsdp"], r"."),
        (["--model.dtype=float16"], r"set trainer\.precision to 16-mixed"),
    ],
)
def test_settings_that_would_change_the_model_unseen_are_refused(
    words: list[str], match: str, work: Workplace
) -> None:
    work.refused(match, "fit", *words)


@pytest.mark.slow
def test_processes_that_are_started_together_wait_for_each_other(work: Workplace) -> None:
    work.done("calibrate")
    first, second = do_in_two(work, "compress", "--trainer.strategy=ddp")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (first.err + second.err).count("compress: wrote") == 1
