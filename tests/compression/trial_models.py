"""Tiny models with their statistics, ready to be tried with fewer experts."""

from functools import cache

from transformers import PreTrainedModel

from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.recipe import Merge, Prune, Recipe
from lightning_smoe.compression.trials import Trials
from lightning_smoe.functional.pooled_matching import PooledMatching
from lightning_smoe.functional.pooling import NeuronPool
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.models.layer import find_moe_layers
from tests.calibration.batches import gather, random_windows
from tests.families import build

# The second chooses among two groups of experts, its first decoder layer has none.
FAMILIES = ["mixtral", "deepseek_v3"]
PRUNE = Prune(refit=None)
POOL = Merge(
    PooledMatching(), weights=None, merger=NeuronPool(), alignment=None, router=Map(), refit=None
)
# Its router is fitted on tokens.
MERGE = Merge(refit=None)


@cache
def known(family: str) -> tuple[PreTrainedModel, Statistics]:
    """A model and its statistics, not to be changed."""
    model = build(family)
    return model, gather(model, random_windows())


def trials_of(family: str, recipe: Recipe = PRUNE, keep: int | float = 0.75) -> Trials:
    """All layers of a model, which nothing changes."""
    model, statistics = known(family)
    return Trials(
        model,
        statistics,
        recipe,
        layers=find_moe_layers(model),
        keep=keep,
        text=random_windows().tensors(),
        batch_size=4,
    )
