"""Budgets from the command line: checked before any work, told, stored, and what loads."""

import json

import pytest

from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from tests.cli.command import Workplace

COMPRESSION = "lightning_smoe.compression"
RANKED = {
    "class_path": f"{COMPRESSION}.budget.GlobalRank",
    "init_args": {"saliency": "lightning_smoe.functional.saliency.ReapSum", "normalize": False},
}
SEARCHED = {
    "class_path": f"{COMPRESSION}.measured_budget.LocalSearch",
    "init_args": {"start": RANKED, "num_trials": 2, "num_tokens": 256},
}
POOLED = {
    "class_path": f"{COMPRESSION}.recipe.Merge",
    "init_args": {
        "groups": "lightning_smoe.functional.pooled_matching.PooledMatching",
        "weights": None,
        "merger": "lightning_smoe.functional.pooling.NeuronPool",
        "alignment": None,
        "router": "lightning_smoe.functional.router_rows.Map",
        "refit": None,
    },
}


def test_counts_by_layer_are_told_stored_and_loaded(work: Workplace) -> None:
    work.write({"model.budget": SEARCHED, "model.recipe.init_args.refit": None})
    told = work.done("compress").err
    plan = json.loads((work.out / "plan.json").read_text())
    counts = [len(layer["groups"]) for layer in plan["layers"]]
    assert sum(counts) == 12
    assert f"12 of 24 experts stay, by layer 0: {counts[0]}, 2: {counts[1]}" in told
    assert plan["manifest"]["inputs"]["budget"]["init_args"]["num_tokens"] == 256
    model = load(work.out / "compressed")
    assert [layer.num_experts for layer in find_moe_layers(model)] == counts
    # Another budget is another plan, which does not replace what is there without being told to.
    assert work.do("plan", "--model.budget", f"{COMPRESSION}.budget.Uniform").code == 2


def test_where_router_rows_share_experts_the_configuration_says_so(work: Workplace) -> None:
    # An odd total of two layers.
    work.write({"model.budget": RANKED, "model.recipe": POOLED, "model.keep": 0.55})
    work.done("compress")
    folder = open_checkpoint(work.out / "compressed")
    counts = folder.config["num_experts_per_layer"]
    assert sum(counts.values()) == 13
    assert folder.is_mapped
    assert not folder.experts_per_layer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.keep": 2}, "layers need 8 experts at least, and 4 are to stay; raise model.keep"),
        ({"model.keep": 13}, "asks for 13 experts but model.layers.0.mlp has 12"),
    ],
)
def test_a_budget_is_refused_before_any_work(
    work: Workplace, changes: dict[str, int], message: str
) -> None:
    work.write({"model.budget": SEARCHED, **changes})
    work.refused(message, "plan")
