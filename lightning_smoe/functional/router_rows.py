"""Router repairs that look at the original rows alone, or leave them all as they are."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_smoe.errors import InputError
from lightning_smoe.functional.router import (
    Grouping,
    MeanRows,
    RouterRepair,
    RouterRows,
    RouterTokens,
)


@dataclass(frozen=True)
class WeightedMeanRows(RouterRepair):
    """Averages the members' rows and biases by their shares, `sum_i a_i w_i`.

    With shares by frequency this is the usual average of router rows by usage. As with `MeanRows`,
    the slot lacks the log of its number of members.
    """

    needs_tokens: ClassVar[bool] = False

    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
        return rows.mixed(grouping.mixing())


@dataclass(frozen=True)
class MeanRowsPlusLogCount(RouterRepair):
    """Averages the members' rows and adds the log of their number, `mean_i l_i(x) + ln n`.

    That is the log-sum-exp of the members' logits where these are equal, and too little by about
    half their variance elsewhere. The number needs a bias in the checkpoint: no row can give the
    same to every state, and a selection bias does not enter the gates. Families without one
    (all but gpt_oss) are refused; there `LogSumExp` fits the row that comes closest.
    """

    needs_tokens: ClassVar[bool] = False
    needs_bias: ClassVar[bool] = True

    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
        mean = MeanRows()(rows, grouping, None)
        if mean.bias is not None:
            count = grouping.sizes.to(mean.bias.device).double()
            bias = (mean.bias.double() + count.log()).to(mean.bias.dtype)
            return RouterRows(mean.weight, bias)
        if bool((grouping.sizes > 1).any()):
            raise InputError(
                "MeanRowsPlusLogCount adds ln(number of members) to a slot's logit but this "
                "family's router has no bias to store it; set router to "
                "lightning_smoe.functional.router.LogSumExp"
            )
        return mean


@dataclass(frozen=True)
class Map(RouterRepair):
    """Keeps every row: several rows share a slot, which answers to the sum of their gates.

    The router stays as it was, bit for bit, selection biases included: it scores all experts and
    selects `top_k` of them, and an index map of the experts sends each to its slot. A slot whose
    members are selected together runs with their summed gates, `sum_{j in slot} g_j(x) f_slot(x)`,
    so a token may visit fewer than `top_k` slots. Right for every router, softmax or sigmoid: this
    is how M-SMoE (https://arxiv.org/abs/2310.01334) and HC-SMoE (https://arxiv.org/abs/2410.08589)
    route. Stock checkpoints have one row an expert, so the model needs the map checkpoint format.
    An expert that was dropped has no slot to go to, so plans that drop experts do not fit.
    """

    needs_tokens: ClassVar[bool] = False
    keeps_all_rows: ClassVar[bool] = True

    def __call__(
        self, rows: RouterRows, grouping: Grouping, tokens: RouterTokens | None
    ) -> RouterRows:
        raise ValueError(
            "Map leaves the router's rows as they are and has no row a slot; "
            "write the slots of its experts beside them (keeps_all_rows)"
        )
