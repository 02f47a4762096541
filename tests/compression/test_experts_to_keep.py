"""How many experts a layer keeps: what is asked for, and what its router allows."""

import math

import pytest
import torch

from lightning_smoe.compression.planner import experts_to_keep
from lightning_smoe.errors import InputError
from lightning_smoe.functional.router import LogSumExp, Slice
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from tests.families import build


def layer_of(family: str, top_k: int | None = None) -> MoELayer:
    layer = find_moe_layers(build(family))[0]
    if top_k is not None:
        layer.router.top_k = top_k
    return layer


@pytest.mark.parametrize(
    ("keep", "count"),
    [(0.5, 6), (0.25, 3), (0.999, 12), (2 / 12, 2), (1.0, 12), (12, 12), (7, 7), (7.0, 7), (2, 2)],
)
def test_a_fraction_or_a_count_is_so_many_experts(keep: int | float, count: int) -> None:
    assert experts_to_keep(keep, layer_of("mixtral"), Slice()) == count


@pytest.mark.parametrize("keep", [math.nan, math.inf, -math.inf, 0, 0.0, -1, -0.5])
def test_a_budget_that_is_no_number_above_zero_is_refused(keep: float) -> None:
    with pytest.raises(InputError, match=f"model.keep is {keep}; give a fraction in .0, 1. or a"):
        experts_to_keep(keep, layer_of("mixtral"), Slice())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (13, r"asks for 13 experts but model\.layers\.0\.mlp has 12"),
        (61, r"asks for 61 experts but model\.layers\.0\.mlp has 12"),
        (7.5, "is 7.5; a number of experts must be whole"),
        (1.5, "is 1.5; a number of experts must be whole"),
        (1, "keeps 1 experts .* needs 2; raise model.keep to 2 or more"),
        (0.1, "keeps 1 experts .* needs 2; raise model.keep to 2 or more"),
        (0.01, "keeps 0 experts .* needs 2; raise model.keep to 2 or more"),
    ],
)
def test_a_budget_that_the_layer_cannot_have_is_refused(keep: int | float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        experts_to_keep(keep, layer_of("mixtral"), Slice())


def test_sixty_one_of_sixty_experts_are_refused() -> None:
    layer = layer_of("mixtral")
    layer.select(torch.arange(60) % 12)
    assert experts_to_keep(60, layer, Slice()) == 60
    assert experts_to_keep(0.5, layer, Slice()) == 30
    with pytest.raises(InputError, match=r"asks for 61 experts but .* has 60"):
        experts_to_keep(61, layer, Slice())


def test_a_router_with_blocks_keeps_equally_many_in_each() -> None:
    layer = layer_of("deepseek_v3")
    assert [experts_to_keep(keep, layer, Slice()) for keep in (8, 10, 12, 1.0)] == [8, 10, 12, 12]
    with pytest.raises(InputError, match="keep a multiple of 2, such as 8"):
        experts_to_keep(9, layer, Slice())
    with pytest.raises(InputError, match=r"top_k=4, 2 groups.* needs 8; raise model.keep to 8"):
        experts_to_keep(6, layer, Slice())


@pytest.mark.parametrize("top_k", range(1, 7))
def test_the_number_that_an_error_suggests_is_accepted(top_k: int) -> None:
    layer = layer_of("deepseek_v3", top_k)
    for keep in range(1, 13):
        try:
            experts_to_keep(keep, layer, Slice())
        except InputError as error:
            suggested = int(str(error).removesuffix(" or more").split()[-1])
            assert experts_to_keep(suggested, layer, Slice()) == suggested


def test_a_router_that_keeps_all_rows_allows_any_number() -> None:
    layer = layer_of("deepseek_v3")
    assert [experts_to_keep(keep, layer, Map()) for keep in (1, 3, 9, 12, 0.01)] == [1, 3, 9, 12, 1]
    for router in (Slice(), LogSumExp()):
        with pytest.raises(InputError, match=r"raise model\.keep to 8 or more"):
            experts_to_keep(3, layer, router)
    with pytest.raises(InputError, match="asks for 13 experts"):
        experts_to_keep(13, layer, Map())
    with pytest.raises(InputError, match="give a fraction in"):
        experts_to_keep(0, layer, Map())
