"""Whitened low-rank merging against the formula of the paper, Cholesky factor and all."""

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.merging import Average, GroupTokens, UnionSVD
from lightning_smoe.functional.whitening import WhitenedUnionSVD
from tests.functional.groups import KINDS, SHARES, group_of, tokens_of
from tests.functional.layers import swiglu

WIDE = torch.float64
# What the mean energy of an input is multiplied with; the module's, written down again.
SHRINKAGE = 1e-4


def read_by(members: ExpertWeights, name: str, tokens: GroupTokens) -> list[Tensor]:
    """What one matrix of each member reads, token by token."""
    inputs: list[Tensor] = []
    for member in range(3):
        columns = []
        for state, gates in zip(tokens.states, tokens.gates, strict=True):
            if gates[member] > 0 and name == "down_proj":
                hidden = members.activations(state.unsqueeze(0), member, swiglu)[0]
                columns.append(gates[member] * hidden)
            elif gates[member] > 0:
                columns.append(state)
        inputs.append(torch.stack(columns, dim=1))
    return inputs


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_whitened_merging_is_the_formula_of_the_paper(kind: str, rank: int) -> None:
    members, tokens = group_of(kind, dtype=WIDE), tokens_of(dtype=WIDE)
    merged, shares = WhitenedUnionSVD(rank)(members, SHARES, tokens), SHARES / SHARES.sum()
    for name in ("gate_proj", "up_proj", "down_proj"):
        matrices = getattr(members, name)
        if matrices is None:
            continue
        grams = [inputs @ inputs.T for inputs in read_by(members, name, tokens)]
        energy = sum(gram.diagonal().mean() for gram in grams)
        added = SHRINKAGE * energy * torch.eye(matrices.shape[2], dtype=WIDE)
        factors = [torch.linalg.cholesky(gram + added) for gram in grams]
        union = torch.cat([w @ s for w, s in zip(matrices, factors, strict=True)], dim=1)
        u, s, v = torch.linalg.svd(union, full_matrices=False)
        blocks = v[:rank].chunk(3, dim=1)
        mixed = sum(
            share * block @ torch.linalg.inv(factor)
            for share, block, factor in zip(shares, blocks, factors, strict=True)
        )
        expected = u[:, :rank] @ torch.diag(s[:rank]) @ mixed
        torch.testing.assert_close(getattr(merged, name)[0], expected, rtol=0, atol=1e-6)


def test_without_traffic_it_is_the_plain_union() -> None:
    members, tokens = group_of(), tokens_of()
    tokens.gates.zero_()
    merged = WhitenedUnionSVD(2)(members, SHARES, tokens)
    plain = UnionSVD(2)(members, SHARES)
    torch.testing.assert_close(merged.up_proj, plain.up_proj, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged.down_proj, plain.down_proj, rtol=0, atol=1e-6)


def test_it_keeps_more_of_the_average_on_the_tokens_than_the_plain_union() -> None:
    expert = group_of("gated", 1)
    scale = torch.tensor([10.0, 5.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    tokens = GroupTokens(tokens_of(1).states * scale, torch.ones(60, 1), swiglu)
    exact = tokens.states @ Average()(expert, torch.ones(1)).up_proj[0].T

    def error(merged: ExpertWeights) -> float:
        return float((tokens.states @ merged.up_proj[0].T - exact).norm())

    whitened = error(WhitenedUnionSVD(2)(expert, torch.ones(1), tokens))
    assert whitened < 0.2 * error(UnionSVD(2)(expert, torch.ones(1)))


def test_biases_are_averaged() -> None:
    members = group_of()
    merged, mean = WhitenedUnionSVD(2)(members, SHARES, tokens_of()), Average()(members, SHARES)
    assert merged.up_bias is not None
    assert mean.up_bias is not None
    assert torch.equal(merged.up_bias, mean.up_bias)
