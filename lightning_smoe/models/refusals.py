"""Families of transformers that cannot be compressed, with the reason for each."""

from typing import Final

from lightning_smoe.errors import InputError

_BORROWS = "it runs the model of another family under a configuration of its own"
_SEES = "it sees or hears, and its language model is one part; save that part alone as a checkpoint"

# By model type; the reason ends a sentence that begins "<family> cannot be compressed:".
REFUSED: Final[dict[str, str]] = {
    "dbrx": "its experts lie in two-dimensional matrices that are cut by their number at run time",
    "deepseek_v4": (
        "its first layers look experts up in a table by the number of the token, so a router row "
        "does not say which tokens an expert serves"
    ),
    "doge": "its experts are single vectors that are found by products of keys, not by router rows",
    "dots3_note": _SEES,
    "gemma4": _SEES,
    "inkling2_loop_text": (
        "its decoder layers run several times in one pass, so what stands behind one is not what "
        "the next one reads"
    ),
    "jetmoe": (
        "its attention has experts, too, whose number stands in the same field of config.json"
    ),
    "llama4": _SEES,
    "llama4_text": "its experts multiply every token, and its router scales what they read",
    "longcat_flash": (
        "its router also selects experts that compute nothing, whose rows lie in the same matrix"
    ),
    "qwen3_5_moe": _SEES,
    "qwen4_exp": _SEES,
    "sarvam_mla": _BORROWS,
    "sarvam_moe": _BORROWS,
    "zaya": "its router is a network of several layers that hands its states to the next router",
}


def refuse_family(family: str) -> None:
    """Refuses a family that is known to be out of reach.

    Args:
        family: Its model type, as config.json has it.

    Raises:
        InputError: With the reason; nothing happens for any other family.
    """
    if family in REFUSED:
        raise InputError(
            f"{family} cannot be compressed: {REFUSED[family]} "
            "(lightning_smoe/models/README.md lists the families that can)"
        )
