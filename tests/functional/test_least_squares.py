"""Fitted merging against loops over tokens and members, and against what it must minimise."""

import pytest
import torch
from torch import Tensor

from lightning_smoe.functional.affine import input_map, output_map
from lightning_smoe.functional.experts import ExpertWeights
from lightning_smoe.functional.least_squares import LeastSquares, RegMean, RoutedLeastSquares
from lightning_smoe.functional.merging import Average, Dominant, GroupTokens
from tests.functional.groups import KINDS, SHARES, group_of, tokens_of
from tests.functional.layers import swiglu

every_kind = pytest.mark.parametrize("kind", KINDS)
WIDE = torch.float64


def with_one(vector: Tensor, biased: bool) -> Tensor:
    return torch.cat([vector, torch.ones(1, dtype=vector.dtype)]) if biased else vector


def hidden_of(experts: ExpertWeights, member: int, state: Tensor) -> Tensor:
    return experts.activations(state.unsqueeze(0), member, swiglu)[0]


def ridge(gram: Tensor, cross: Tensor, start: Tensor, strength: float) -> Tensor:
    """The formula as it is written, `(cross + lam W_0) (gram + lam I)^-1`."""
    lam = strength * gram.diagonal().mean()
    inverse: Tensor = torch.linalg.inv(gram + lam * torch.eye(len(gram), dtype=WIDE))
    return (cross + lam * start) @ inverse


@every_kind
def test_regression_mean_is_the_formula_of_the_paper(kind: str) -> None:
    members, tokens = group_of(kind, dtype=WIDE), tokens_of(dtype=WIDE)
    start, biased = Average()(members, SHARES), members.up_bias is not None
    reads, writes = input_map(members), output_map(members)
    read_gram, read_cross = torch.zeros(8 + biased, 8 + biased, dtype=WIDE), 0 * reads[0]
    write_gram, write_cross = torch.zeros(5 + biased, 5 + biased, dtype=WIDE), 0 * writes[0]
    for member in range(3):
        for state, gates in zip(tokens.states, tokens.gates, strict=True):
            if gates[member] == 0:
                continue
            read = with_one(state, biased)
            written = gates[member] * with_one(hidden_of(members, member, state), biased)
            read_gram += read.outer(read)
            read_cross += reads[member] @ read.outer(read)
            write_gram += written.outer(written)
            write_cross += writes[member] @ written.outer(written)
    merged = RegMean(strength=0.2)(members, SHARES, tokens)
    expected = ridge(read_gram, read_cross, input_map(start)[0], 0.2)
    torch.testing.assert_close(input_map(merged)[0], expected, rtol=0, atol=1e-6)
    expected = ridge(write_gram, write_cross, output_map(start)[0], 0.2)
    torch.testing.assert_close(output_map(merged)[0], expected, rtol=0, atol=1e-6)


@every_kind
def test_least_squares_is_the_ridge_fit_of_the_mean_output_on_all_tokens(kind: str) -> None:
    members, tokens = group_of(kind, dtype=WIDE), tokens_of(dtype=WIDE)
    start, biased = Average()(members, SHARES), members.up_bias is not None
    first = output_map(start)[0]
    gram, cross = torch.zeros(5 + biased, 5 + biased, dtype=WIDE), 0 * first
    for state in tokens.states:
        hidden = with_one(hidden_of(start, 0, state), biased)
        target = torch.zeros(8, dtype=WIDE)
        for member, share in enumerate(SHARES.double() / SHARES.double().sum()):
            target += share * members.outputs(state.unsqueeze(0), member, swiglu)[0]
        gram += hidden.outer(hidden)
        cross += target.outer(hidden)
    merged = LeastSquares(strength=0.05)(members, SHARES, tokens)
    expected = ridge(gram, cross, first, 0.05)
    torch.testing.assert_close(output_map(merged)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(input_map(merged), input_map(start))


@every_kind
def test_routed_least_squares_is_the_ridge_fit_of_what_the_group_added(kind: str) -> None:
    members, tokens = group_of(kind, dtype=WIDE), tokens_of(dtype=WIDE)
    start, biased = Dominant()(members, SHARES), members.up_bias is not None
    first = output_map(start)[0]
    gram, cross = torch.zeros(5 + biased, 5 + biased, dtype=WIDE), 0 * first
    for state, gates in zip(tokens.states, tokens.gates, strict=True):
        hidden = with_one(hidden_of(start, 0, state), biased)
        target = torch.zeros(8, dtype=WIDE)
        for member, gate in enumerate(gates):
            target += gate * members.outputs(state.unsqueeze(0), member, swiglu)[0]
        gram += gates.sum() ** 2 * hidden.outer(hidden)
        cross += gates.sum() * target.outer(hidden)
    merged = RoutedLeastSquares(Dominant(), strength=0.05)(members, SHARES, tokens)
    expected = ridge(gram, cross, first, 0.05)
    torch.testing.assert_close(output_map(merged)[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(merged.up_proj, start.up_proj)


def routed_error(expert: ExpertWeights, members: ExpertWeights, tokens: GroupTokens) -> float:
    """Squared error of the group's contribution under the summed routing weight."""
    gates = tokens.gates
    error = -gates.sum(1, keepdim=True) * expert.outputs(tokens.states, 0, swiglu)
    for member in range(gates.shape[1]):
        error += gates[:, member, None] * members.outputs(tokens.states, member, swiglu)
    return float(error.square().sum())


@every_kind
def test_no_other_output_map_than_that_of_routed_least_squares_errs_less(kind: str) -> None:
    members, tokens = group_of(kind), tokens_of()
    fitted = RoutedLeastSquares(strength=1e-6)(members, SHARES, tokens)
    least = routed_error(fitted, members, tokens)
    assert least < 0.9 * routed_error(Average()(members, SHARES), members, tokens)
    assert least < 0.9 * routed_error(LeastSquares()(members, SHARES, tokens), members, tokens)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        change = 0.05 * torch.randn(1, 8, 5, generator=generator)
        other = fitted.with_down(fitted.down_proj + change)
        assert routed_error(other, members, tokens) > least


def test_members_that_differ_in_their_output_matrix_alone_mix_without_error() -> None:
    expert = group_of("gated", 1)
    members = expert.select(torch.tensor([0, 0, 0])).with_down(group_of("gated").down_proj)
    merged = LeastSquares(strength=1e-6)(members, SHARES, tokens_of())
    expected = Average()(members, SHARES)
    torch.testing.assert_close(merged.down_proj, expected.down_proj, rtol=0, atol=1e-5)


@pytest.mark.parametrize("merger", [RegMean(), RoutedLeastSquares()], ids=str)
def test_a_group_that_no_token_visits_becomes_the_average(
    merger: RegMean | RoutedLeastSquares,
) -> None:
    members, tokens = group_of(), tokens_of()
    tokens.gates.zero_()
    merged, mean = merger(members, SHARES, tokens), Average()(members, SHARES)
    assert torch.equal(merged.down_proj, mean.down_proj)
    assert torch.equal(merged.up_proj, mean.up_proj)


def test_regression_mean_takes_the_member_that_alone_has_traffic_where_it_has() -> None:
    members, tokens = group_of(dtype=WIDE), tokens_of(dtype=WIDE)
    tokens.gates[:, [0, 2]] = 0
    merged = RegMean(strength=1e-6)(members, torch.ones(3), tokens)
    torch.testing.assert_close(merged.up_proj[0], members.up_proj[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(merged.down_proj[0], members.down_proj[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("merger", [RegMean(), LeastSquares(), RoutedLeastSquares()], ids=str)
def test_tokens_in_many_blocks_give_what_they_give_in_one(
    merger: RegMean | LeastSquares | RoutedLeastSquares, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merger(group_of(), SHARES, tokens_of())
    monkeypatch.setattr("lightning_smoe.functional.merging._BLOCK_TOKENS", 7)
    actual = merger(group_of(), SHARES, tokens_of())
    torch.testing.assert_close(actual.down_proj, expected.down_proj, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.up_proj, expected.up_proj, rtol=0, atol=1e-5)


@pytest.mark.parametrize("merger", [RegMean, LeastSquares, RoutedLeastSquares])
@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_a_shrinkage_that_cannot_hold_is_refused(
    merger: type[RegMean | LeastSquares | RoutedLeastSquares], strength: float
) -> None:
    with pytest.raises(ValueError, match="must be at least 1e-06"):
        merger(strength=strength)
