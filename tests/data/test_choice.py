"""Which windows of each domain are taken, and in which order."""

from dataclasses import replace

import torch

from lightning_smoe.data.choice import choose, interleave, keyed_generator
from lightning_smoe.data.packing import TokenWindows


def numbered(domain: str, num_windows: int, length: int = 4) -> TokenWindows:
    """Full windows whose tokens are the number of the window."""
    ids = torch.arange(num_windows)[:, None].expand(-1, length).contiguous()
    return TokenWindows(
        ids, torch.ones_like(ids), ids, torch.zeros(num_windows, dtype=torch.int64), (domain,)
    )


def test_a_budget_takes_whole_windows_and_a_prefix_of_a_larger_one() -> None:
    windows = numbered("a", 10)
    drawn = {
        budget: choose(windows, budget, torch.Generator().manual_seed(3)).input_ids[:, 0].tolist()
        for budget in (None, 100, 23, 3)
    }
    everything = drawn[None]
    assert sorted(everything) == list(range(10))
    assert everything != list(range(10))
    assert drawn[100] == everything
    assert drawn[23] == everything[:5]
    assert drawn[3] == everything[:1]


def test_a_budget_does_not_count_padding() -> None:
    windows = numbered("a", 10)
    windows.attention_mask[:, 2:] = 0
    assert len(choose(windows, 8, torch.Generator())) == 4


def test_windows_are_dealt_in_turn() -> None:
    dealt = interleave([numbered("a", 3), numbered("b", 1), numbered("c", 2)])
    assert dealt.domain.tolist() == [0, 1, 2, 0, 2, 0]
    assert dealt.input_ids[:, 0].tolist() == [0, 0, 0, 1, 1, 2]
    assert dealt.domain_names == ("a", "b", "c")


def test_domains_with_and_without_answers_and_isolation_are_joined() -> None:
    plain, rows = numbered("a", 2), numbered("b", 2)
    mask = torch.tensor([[False, True, False, True]]).expand(2, -1)
    positions = torch.tensor([[0, 1, 0, 1]]).expand(2, -1)
    rows = replace(rows, is_answer=mask, position_ids=positions)
    dealt = interleave([plain, rows])
    assert dealt.isolated
    assert dealt.tensors()["is_answer"].tolist() == [[True] * 4, mask[0].tolist()] * 2
    assert dealt.tensors()["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]] * 2
    assert not interleave([plain, plain]).isolated


def test_generators_of_neighbouring_keys_differ() -> None:
    keys = [(1, "ab"), (1, "a"), (2, "a"), (12,), (1, 2)]
    assert len({keyed_generator(*key).initial_seed() for key in keys}) == len(keys)
    assert keyed_generator(1, "a").initial_seed() == keyed_generator(1, "a").initial_seed()
