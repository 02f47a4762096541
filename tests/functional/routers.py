"""A small random router with a grouping of its experts, and tokens for what is fitted."""

import torch
from torch import Tensor

from lightning_smoe.functional.router import (
    Grouping,
    RouterBatch,
    RouterRepair,
    RouterRows,
    RouterTokens,
)

# Experts 1 and 4 share slot 0, expert 5 was dropped, slot 2 has one member.
ASSIGNMENT = torch.tensor([1, 0, 1, 2, 0, -1, 1])
SHARES = torch.tensor([1.0, 2.0, 5.0, 3.0, 6.0, 9.0, 4.0], dtype=torch.float64)
GROUPING = Grouping(ASSIGNMENT, SHARES)
MEMBERS = [[1, 4], [0, 2, 6], [3]]
HEAVIEST = [4, 2, 3]
_GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(7, 8, generator=_GENERATOR)
BIAS = torch.randn(7, generator=_GENERATOR)
STATES = torch.randn(200, 8, generator=_GENERATOR)
# What the same tokens' states are in the original model.
TEACHER_STATES = STATES + 0.3 * torch.randn(200, 8, generator=_GENERATOR)
ROWS = RouterRows(WEIGHT, BIAS)
WITHOUT_BIAS = RouterRows(WEIGHT, None)


def logits_of(rows: RouterRows, states: Tensor = STATES) -> Tensor:
    """What a router says."""
    return torch.nn.functional.linear(states.to(rows.weight.dtype), rows.weight, rows.bias)


def tokens_of(
    rows: RouterRows,
    states: Tensor = STATES,
    teacher_states: Tensor = TEACHER_STATES,
    sizes: tuple[int, ...] = (200,),
) -> RouterTokens:
    """Tokens in batches of the given sizes, read once, of one process alone."""
    batches = zip(states.split(list(sizes)), teacher_states.split(list(sizes)), strict=True)
    made = (RouterBatch(s, logits_of(rows, s), logits_of(rows, t)) for s, t in batches)
    return RouterTokens(made, lambda tensor: tensor)


def repaired(
    repair: RouterRepair, rows: RouterRows = ROWS, grouping: Grouping = GROUPING
) -> RouterRows:
    """Rows after a repair, with tokens if it needs them."""
    return repair(rows, grouping, tokens_of(rows) if repair.needs_tokens else None)


def log_sum_exp(logits: Tensor) -> Tensor:
    """What each slot's logit should be, token by token and member by member."""
    rows = [
        [sum(logit[m].exp() for m in members) for members in MEMBERS] for logit in logits.double()
    ]
    return torch.tensor(rows, dtype=torch.float64).log()


def features_of(rows: RouterRows, states: Tensor = STATES) -> Tensor:
    """The states, and a one where there is a bias."""
    ones = torch.ones(len(states), 1)
    return (states if rows.bias is None else torch.cat([states, ones], dim=1)).double()


def joined(rows: RouterRows) -> Tensor:
    """Rows with their bias as the last column."""
    if rows.bias is None:
        return rows.weight.double()
    return torch.cat([rows.weight, rows.bias[:, None]], dim=1).double()
