"""One experiment: what a person asks for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from lightning_smoe.compression.budget import Budget, Uniform
from lightning_smoe.compression.recipe import Merge, Prune, Recipe
from lightning_smoe.functional.saliency import MoNE, ReapSum
from lightning_smoe.training.options import Recovery

# Float32 on processors, which are slower in shorter types; elsewhere the checkpoint's own type.
DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What `recipe: auto` chooses from: pooling needs the map format; pruning is stock.
AUTO: dict[str, Recipe] = {
    "default": Merge(),
    "stock": Prune(),
    "stock-reap-sum": Prune(ReapSum()),
    "stock-mone": Prune(MoNE()),
}


@dataclass(frozen=True)
class Experiment:
    """What to compress, how, and where to write.

    Args:
        checkpoint: The original: a Hugging Face checkpoint folder with safetensors weights, or
            organisation/name on the hub.
        output_dir: Folder for all results: statistics.safetensors, plan.json, compressed/,
            recovered/, report.json and report.md.
        keep: Routed experts that each layer keeps, on average over the layers: a fraction in
            (0, 1], or a whole number; at least what the router selects, unless it keeps all rows.
        budget: How many of them each layer keeps. Where counts differ by layer, the result loads
            with `trust_remote_code=True`.
        layers: Decoder layers to change, counted from 0, or all. Counts then differ by layer: see
            budget.
        recipe: How experts are chosen and what becomes of the others: a class with its settings, a
            file that holds them, or `auto`, which tries a short list and keeps what loses least on
            the validation text.
        recovery: How the compressed model is trained against the original by fit.
        sample_tokens: Calibration tokens, spread over all of the text, that are kept whole for
            decisions that compare experts on the same tokens; at least 1.
        baselines: Whether the report shows plain frequency and REAP pruning at the same number of
            experts beside the results.
        beside: Further recipes by name, which the report shows at the same number of experts.
        dtype: Type of the weights while they are worked on; results have the original's type.
            `auto` is float32 on a CPU, where shorter types are slower, and the original's on a GPU.
        stream: Whether calibrate, plan, compress and evaluate hold one decoder layer at a time,
            read from the checkpoint, with the same results bit for bit. `auto` does so where the
            model does not fit in memory twice.
        overwrite: Run steps again whose results are there, and replace results of other runs.
    """

    checkpoint: str
    output_dir: Path
    keep: int | float = 0.5
    budget: Budget = Uniform()
    layers: Literal["all"] | list[int] = "all"
    recipe: Recipe | Literal["auto"] = Merge()
    recovery: Recovery = field(default_factory=Recovery)
    sample_tokens: int = 16384
    baselines: bool = True
    beside: dict[str, Recipe] = field(default_factory=dict)
    dtype: DType = "auto"
    stream: bool | Literal["auto"] = "auto"
    overwrite: bool = False
