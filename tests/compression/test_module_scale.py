"""The scale repair of a layer against the scale that its routed output needs."""

from typing import Any

import pytest
import torch

from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.record import shared_output
from lightning_smoe.functional.router_rows import Map
from lightning_smoe.functional.scale import ScaleRepair
from lightning_smoe.models.layer import find_moe_layers
from tests.compression.plans import MANY, MERGED, blocks_of, compressed, plan_for
from tests.families import build


@torch.no_grad()
@pytest.mark.parametrize("family", MANY)
@pytest.mark.parametrize("router", [None, Map()], ids=["sliced", "map"])
def test_the_routed_output_gets_the_size_that_fits_best(family: str, router: Map | None) -> None:
    original = build(family)
    first = find_moe_layers(original)[:1]
    settings: dict[str, Any] = {} if router is None else {"groups": MERGED, "router": router}
    plain = compressed(build(family), plan_for(first, **settings))
    scaled = compressed(build(family), plan_for(first, scale=ScaleRepair(), **settings))
    layer, block = blocks_of(plain, 0)
    beside = shared_output(layer, block).double()
    wanted = blocks_of(original, 0)[1].output.double() - beside
    given = block.output.double() - beside
    scale = float((wanted * given).sum() / given.square().sum())
    assert abs(scale - 1) > 1e-3
    found = find_moe_layers(scaled)[0].weights()
    before = layer.weights()
    torch.testing.assert_close(found.down_proj, before.down_proj * scale, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.up_proj, before.up_proj)


@torch.no_grad()
def test_a_shared_expert_gives_what_the_block_gives_without_its_experts() -> None:
    model = build("qwen2_moe")
    find_moe_layers(model)[0].weights().down_proj.zero_()
    layer, block = blocks_of(model, 0)
    torch.testing.assert_close(shared_output(layer, block), block.output)


def test_a_plan_with_a_scale_reads_tokens() -> None:
    assert CompressionPlan((), scale=ScaleRepair()).reads_tokens
    assert not CompressionPlan(()).reads_tokens
