"""Entries of a sweep: found, replaced, and held against plain pruning."""

from pathlib import Path
from typing import Any

import pytest

from lightning_smoe.errors import InputError
from lightning_smoe.evaluation.perplexity import Quality
from lightning_smoe.evaluation.report import Judged, beaten_by_plain
from lightning_smoe.evaluation.spread import rows_of
from lightning_smoe.evaluation.sweep_file import SweepFile, warnings_of
from lightning_smoe.models.artifact import Manifest

ORIGINAL = Manifest("sweep", {"checkpoint": "a"})
INPUTS = Manifest("plan", {"recipe": "r"})


def judged(kl: float) -> Judged:
    return Judged(None, 4, 8, [6, 6], Quality({"lit": 1.0}, {"lit": kl}, 0.5), {"plan": 0.5})


def key(name: str = "mine", keep: float = 6, seed: int = 0) -> dict[str, Any]:
    return {"recipe": name, "keep": keep, "seed": seed}


def test_a_run_is_found_again_by_key_and_inputs(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    SweepFile.open(path, ORIGINAL, overwrite=False).add(key(), judged(0.1), INPUTS)
    file = SweepFile.open(path, ORIGINAL, overwrite=False)
    assert file.has(key(), INPUTS, overwrite=False)
    assert not file.has(key(), INPUTS, overwrite=True)
    assert not file.has(key(seed=1), INPUTS, overwrite=False)
    other = Manifest("plan", {"recipe": "s"})
    with pytest.raises(InputError, match=r"^mine, keep 6, seed 0: .*different: recipe"):
        file.has(key(), other, overwrite=False)
    assert not file.has(key(), other, overwrite=True)
    file.add(key(), judged(0.2), other)
    assert [run["kl"]["mean"] for run in file.runs] == [0.2]


def test_one_expert_is_not_all_of_them(tmp_path: Path) -> None:
    file = SweepFile.open(tmp_path / "sweep.json", ORIGINAL, overwrite=False)
    file.add(key(keep=1), judged(0.1), INPUTS)
    assert not file.has(key(keep=1.0), INPUTS, overwrite=False)


def test_what_failed_is_tried_again_and_its_reason_goes(tmp_path: Path) -> None:
    file = SweepFile.open(tmp_path / "sweep.json", ORIGINAL, overwrite=False)
    file.add(key(), "too few", None)
    assert file.runs == [{**key(), "error": "too few"}]
    assert not file.has(key(), INPUTS, overwrite=False)
    file.add(key(), judged(0.1), INPUTS)
    assert ["error" in run for run in file.runs] == [False]


def test_a_sweep_of_another_original_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    SweepFile.open(path, ORIGINAL, overwrite=False).add(key(), judged(0.1), INPUTS)
    other = Manifest("sweep", {"checkpoint": "b"})
    with pytest.raises(InputError, match=r"different: checkpoint"):
        SweepFile.open(path, other, overwrite=False)
    assert SweepFile.open(path, other, overwrite=True).runs == []


def model(kl: float, experts: int = 6) -> dict[str, Any]:
    return {"kl": {"mean": kl}, "experts_per_layer": [experts, experts]}


def test_a_model_that_plain_pruning_beats_is_named_with_both_numbers() -> None:
    plain = {"prune-reap": model(0.2), "prune-frequency": model(0.3)}
    assert beaten_by_plain({"mine": model(0.1), **plain}) == []
    assert beaten_by_plain({"mine": model(0.25, experts=7), **plain}) == []
    (line,) = beaten_by_plain({"mine": model(0.25), **plain})
    assert line == (
        "mine (KL 0.2500) is no better than plain pruning at the same number of experts: "
        "prune-reap (KL 0.2000)"
    )
    assert len(beaten_by_plain({"mine": model(float("nan")), **plain})) == 1


def test_warnings_are_of_means_over_seeds_at_one_size(tmp_path: Path) -> None:
    file = SweepFile.open(tmp_path / "sweep.json", ORIGINAL, overwrite=False)
    for name, seed, kl in (("mine", 0, 0.1), ("mine", 1, 0.4), ("prune-reap", 0, 0.2)):
        file.add(key(name, seed=seed), judged(kl), INPUTS)
    (line,) = warnings_of(rows_of(file.runs))
    assert line.startswith("keep 6: mine (KL 0.2500) is no better")
