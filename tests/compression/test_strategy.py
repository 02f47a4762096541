"""Strategies as data: there and back, and what is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_smoe.compression.recipe import Merge, Prune, Recipe
from lightning_smoe.compression.strategy import from_spec, to_spec
from lightning_smoe.errors import InputError
from lightning_smoe.functional.alignment import Alignment, ByActivations
from lightning_smoe.functional.clustering import Agglomerative
from lightning_smoe.functional.distance import MeanOutput
from lightning_smoe.functional.grouping import Clustered
from lightning_smoe.functional.kmeans import KMeans
from lightning_smoe.functional.merging import Average, Merger, UnionSVD
from lightning_smoe.functional.pooled_matching import PooledMatching
from lightning_smoe.functional.pooling import NeuronPool
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, MeanRows, RouterRepair, Slice
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.functional.saliency import Frequency, Reap

STRATEGIES = [
    (Slice(), RouterRepair),
    (MeanRows(), RouterRepair),
    (LogSumExp(0.25), RouterRepair),
    (Average(), Merger),
    (UnionSVD(), Merger),
    (UnionSVD(rank=7), Merger),
    (Refit(0.5), Refit),
    (Prune(Frequency(), refit=None), Recipe),
    (Prune(), Recipe),
    (Refit(correct_drift=False), Refit),
    (ByActivations(), Alignment),
    (Merge(Clustered(MeanOutput("cosine"), KMeans(num_starts=3)), None, refit=Refit(2.0)), Recipe),
    (Merge(PooledMatching(), merger=NeuronPool(), alignment=None, router=Map()), Recipe),
]
# An abstract kind is fine here, but mypy wants type[T] to be concrete.
MERGER: type[Any] = Merger
REPAIR: type[Any] = RouterRepair
FUNCTIONAL = "lightning_smoe.functional"


@dataclass(frozen=True)
class Mine(Average):
    """A merger of a user's own module."""

    power: int = 2


@pytest.mark.parametrize(("strategy", "kind"), STRATEGIES, ids=lambda value: str(value)[:60])
def test_a_strategy_survives_being_written_as_json(strategy: Any, kind: type[Any]) -> None:
    spec = json.loads(json.dumps(to_spec(strategy)))
    assert from_spec(spec, kind) == strategy


def test_no_strategy_stays_none() -> None:
    assert to_spec(None) is None


def test_a_class_of_a_user_is_named_by_its_path() -> None:
    spec = to_spec(Mine(power=3))
    assert spec == {"class_path": f"{__name__}.Mine", "init_args": {"power": 3}}
    assert from_spec(spec, MERGER) == Mine(3)


def test_settings_left_out_take_their_defaults() -> None:
    assert from_spec({"class_path": f"{FUNCTIONAL}.router.LogSumExp"}, REPAIR) == LogSumExp()


def test_recipes_that_differ_within_are_written_differently() -> None:
    assert to_spec(Prune(Reap())) != to_spec(Prune(Frequency()))
    assert to_spec(Merge(Clustered(clusterer=Agglomerative()))) != to_spec(
        Merge(Clustered(clusterer=KMeans()))
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": "no_such_module.Average"},
        {"class_path": f"{FUNCTIONAL}.merging.NoSuchMerger"},
        {"class_path": "Average"},
        {"class_path": 3},
        {},
        "Average",
        {"class_path": f"{FUNCTIONAL}.merging.Average", "init_args": {"rank": 3}},
        {"class_path": f"{FUNCTIONAL}.merging.Average", "init_args": [3]},
        {"class_path": f"{FUNCTIONAL}.merging.UnionSVD", "init_args": {"rank": 0}},
    ],
    ids=str,
)
def test_what_describes_no_strategy_is_refused(spec: Any) -> None:
    with pytest.raises(InputError, match="does not describe a Merger"):
        from_spec(spec, MERGER)


def test_the_refusal_gives_the_reason_of_the_strategy() -> None:
    spec = {"class_path": f"{FUNCTIONAL}.merging.UnionSVD", "init_args": {"rank": 0}}
    with pytest.raises(InputError, match="rank=0 keeps nothing of a matrix"):
        from_spec(spec, MERGER)


@pytest.mark.parametrize(
    "path",
    [f"{FUNCTIONAL}.router.Slice", f"{FUNCTIONAL}.merging.Merger", "builtins.dict", "os.getcwd"],
)
def test_a_strategy_of_another_kind_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=f"{path} is not a Merger"):
        from_spec({"class_path": path}, MERGER)


def test_a_class_path_never_runs_a_function(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    spec = {"class_path": "os.mkdir", "init_args": {"path": str(folder)}}
    nested = {"class_path": f"{FUNCTIONAL}.merging.UnionSVD", "init_args": {"rank": spec}}
    for given in (spec, nested):
        with pytest.raises(InputError, match=r"os\.mkdir is not a"):
            from_spec(given, MERGER)
        assert not folder.exists()
