"""Sums over outputs and pairs of them against loops over single tokens."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_smoe.functional import pairs
from lightning_smoe.functional.pairs import OutputSums, PairSums

NUM_EXPERTS, NUM_TOKENS, HIDDEN_SIZE = 5, 12, 3
CPU = torch.device("cpu")


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Outputs, and routing weights of two experts a token."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(NUM_EXPERTS, NUM_TOKENS, HIDDEN_SIZE, generator=generator)
    gates = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    gates[gates < gates.topk(2).values[:, 1:]] = 0
    return outputs.to(dtype), gates.to(dtype)


def pair_sums(outputs: Tensor, gates: Tensor) -> PairSums:
    sums = PairSums.zeros(len(outputs), CPU)
    sums.add(outputs, gates)
    return sums


def test_pair_sums_are_those_of_a_loop_over_pairs_and_tokens() -> None:
    outputs, gates = draw()
    expected = PairSums.zeros(NUM_EXPERTS, CPU)
    for i in range(NUM_EXPERTS):
        for j in range(NUM_EXPERTS):
            for t in range(NUM_TOKENS):
                product = outputs[i, t] @ outputs[j, t]
                distance = (outputs[i, t] - outputs[j, t]).square().sum()
                expected.gram[i, j] += product
                expected.cosine[i, j] += cosine_similarity(outputs[i, t], outputs[j, t], dim=0)
                expected.gated_gram[i, j] += gates[t, i] * gates[t, j] * product
                expected.own_distance[i, j] += gates[t, i] ** 2 * distance
                expected.joint_distance[i, j] += gates[t, i] * gates[t, j] * distance
    torch.testing.assert_close(vars(pair_sums(outputs, gates)), vars(expected))


def test_output_sums_are_those_of_a_loop_over_tokens() -> None:
    outputs, probs = draw()
    expected = OutputSums.zeros(NUM_EXPERTS, HIDDEN_SIZE, CPU)
    for i in range(NUM_EXPERTS):
        for t in range(NUM_TOKENS):
            expected.plain[i] += outputs[i, t]
            expected.weighted[i] += probs[t, i] * outputs[i, t]
    sums = OutputSums.zeros(NUM_EXPERTS, HIDDEN_SIZE, CPU)
    sums.add(outputs, probs)
    torch.testing.assert_close(vars(sums), vars(expected))


def test_sums_do_not_depend_on_how_tokens_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, gates = draw()
    whole, single = pair_sums(outputs, gates), OutputSums.zeros(NUM_EXPERTS, HIDDEN_SIZE, CPU)
    single.add(outputs, gates)
    monkeypatch.setattr(pairs, "_TABLE_NUMBERS", 5 * NUM_EXPERTS**2)
    monkeypatch.setattr(pairs, "_FEW_TOKENS", 5)
    parts = PairSums.zeros(NUM_EXPERTS, CPU)
    parts_single = OutputSums.zeros(NUM_EXPERTS, HIDDEN_SIZE, CPU)
    for tokens in (slice(0, 7), slice(7, NUM_TOKENS)):
        parts.add(outputs[:, tokens], gates[tokens])
        parts_single.add(outputs[:, tokens], gates[tokens])
    torch.testing.assert_close(vars(parts), vars(whole))
    torch.testing.assert_close(vars(parts_single), vars(single))


def test_tables_of_pairs_stay_small_however_many_tokens_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outputs, gates = draw()
    monkeypatch.setattr(pairs, "_TABLE_NUMBERS", 2 * NUM_EXPERTS**2)
    sizes = []

    def record(outer: Tensor) -> Tensor:
        sizes.append(len(outer))
        return outer.unsqueeze(2) * outer.unsqueeze(1)

    monkeypatch.setattr(pairs, "_outer", record)
    pair_sums(outputs, gates)
    assert max(sizes) == 2


def test_a_zero_output_has_cosine_zero_and_no_sum_is_nan() -> None:
    outputs, gates = draw(torch.float32)
    outputs[1] = 0
    sums = pair_sums(outputs, gates)
    assert sums.cosine[1].tolist() == [0] * NUM_EXPERTS
    assert all(total.isfinite().all() for total in vars(sums).values())


def test_float32_outputs_hold_distances_to_a_millionth_of_their_energy() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(2, 64, 2048, generator=generator)
    outputs[1] = outputs[0] + 0.01 * torch.randn(64, 2048, generator=generator)
    sums = pair_sums(outputs, torch.ones(64, 2))
    exact = (outputs[0].double() - outputs[1].double()).square().sum()
    assert (sums.own_distance[0, 1] - exact).abs() < 1e-6 * sums.gram[0, 0]
