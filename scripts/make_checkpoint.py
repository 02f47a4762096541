"""Writes a random checkpoint of the true shape of a named model, in bounded memory.

    python scripts/make_checkpoint.py qwen1.5-moe-a2.7b /tmp/qwen --layers 4

Keys and shapes are those of the model on the hub; the numbers are drawn, each tensor from a seed of
its own. One tensor at a time is in memory.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_smoe.errors import InputError
from lightning_smoe.exits import exiting_on_bad_input
from lightning_smoe.experiment import DTYPES
from lightning_smoe.models.artifact import replacing, require_space
from lightning_smoe.models.checkpoint import outline
from lightning_smoe.models.folder import CheckpointFolder
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.shard_writer import ShardWriter
from lightning_smoe.models.shards import ShardLayout, StoredTensor
from lightning_smoe.show import set_up_screen

logger = logging.getLogger("lightning_smoe.make_checkpoint")

NAMED = Path(__file__).with_name("named_models.json")
TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "qwen2moe-tiny-8dom"
SPREAD = 0.02  # standard deviation of weights, about that of trained ones
LOGIT_SPREAD = 4.0  # of router logits: the best expert of a token then leads clearly
BLOCK = 1 << 22  # numbers drawn at once: what is held beside the tensor itself
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def configuration(model: str, layers: int | None) -> dict[str, Any]:
    """The config.json of a named model, or of a folder, with as many decoder layers as wanted."""
    named: dict[str, dict[str, Any]] = json.loads(NAMED.read_text(encoding="utf-8"))
    if model in named:
        config = named[model]
    elif Path(model, "config.json").is_file():
        config = CheckpointFolder(Path(model)).config
    else:
        known = ", ".join(named)
        raise InputError(
            f"no model is named {model}; take one of {known}, or a folder with a config.json"
        )
    if layers is None:
        return config
    there = config.get("num_hidden_layers")
    if not isinstance(there, int) or layers > there:
        raise InputError(
            f"--layers={layers} is more than the {there} of {model}; take fewer, or leave the "
            "option out"
        )
    cut = {key: config[key][:layers] for key in config if key.endswith("layer_types")}
    return {**config, **cut, "num_hidden_layers": layers}


def stored(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a model as files name them, without numbers (on the meta device)."""
    # Tied weights are stored once.
    tied = model.all_tied_weights_keys
    state = {name: model.state_dict()[name] for name in names if name not in tied}
    typed = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    found: dict[str, Tensor] = revert_weight_conversion(model, typed)
    return found


def router_keys(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Keys of the routers' weights, as files name them."""
    routers = {id(p) for layer in find_moe_layers(model) for p in layer.parameters_of("router")}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in routers]
    return set(stored(model, names, dtype))


def drawn(key: str, like: Tensor, *, seed: int, spread: float) -> Tensor:
    """Numbers for one tensor, which follow from the seed and the key alone.

    Args:
        key: What the tensor is called.
        like: Its shape and type.
        seed: Seed of the whole checkpoint.
        spread: Standard deviation.
    """
    if like.ndim == 1 and key.endswith("weight"):  # of a norm
        return torch.ones(like.shape, dtype=like.dtype)
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensor = torch.empty(like.shape, dtype=like.dtype)
    block = torch.empty(BLOCK)
    for part in tensor.view(-1).split(BLOCK):
        part.copy_(block[: len(part)].normal_(0, spread, generator=generator))
    return tensor


def make(
    model: str,
    output: Path,
    *,
    layers: PositiveInt | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    seed: NonNegativeInt = 0,
    max_shard_size: str = "4GB",
) -> None:
    """Writes one checkpoint folder, with the tokenizer of the shipped model.

    Args:
        model: A name of scripts/named_models.json, or a folder with a config.json.
        output: Folder to write; it must not be there, or be empty.
        layers: Decoder layers, the first of the model; all if none.
        dtype: Type of the weights.
        seed: Seed of every number, 0 or more.
        max_shard_size: Weights in one file at most, such as 500MB or 4GB.
    """
    config = configuration(model, layers)
    # The key's name depends on the version of transformers that wrote the file.
    config |= {key: dtype for key in ("torch_dtype", "dtype") if key in config}
    size = re.fullmatch(r"([1-9]\d*)\s*(KB|MB|GB|)", max_shard_size.upper())
    if size is None:
        raise InputError(f"--max_shard_size={max_shard_size} is no size; write 500MB or 4GB")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already and holds something; name another folder")
    with tempfile.TemporaryDirectory() as place:
        Path(place, "config.json").write_text(json.dumps(config), "utf-8")
        empty = outline(CheckpointFolder(Path(place), model))
    tensors = stored(empty, empty.state_dict(), DTYPES[dtype])
    layout = ShardLayout.of(
        {key: StoredTensor.of(tensor) for key, tensor in tensors.items()},
        int(size[1]) * UNITS[size[2]],
    )
    require_space(output, layout.num_bytes)
    spreads = dict.fromkeys(
        router_keys(empty, DTYPES[dtype]), LOGIT_SPREAD / empty.config.hidden_size**0.5
    )
    with replacing(output) as partial:
        writer = ShardWriter(partial, layout)
        for shard in layout.shards:
            for key in shard.tensors:
                spread = spreads.get(key, SPREAD)
                writer.write({key: drawn(key, tensors[key], seed=seed, spread=spread)})
            logger.info("%s: wrote %s, %.2f GB", output, shard.name, shard.num_bytes / 1e9)
        writer.finish()
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for file in sorted(TOKENIZER.glob("tokenizer*")):
            shutil.copyfile(file, partial / file.name)


def main(words: Sequence[str] | None = None) -> None:
    """Writes one checkpoint; what cannot be done ends with exit code 2."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", type=str, help="name, or folder with a config.json")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_function_arguments(make, skip={"model", "output"})
    options = parser.parse_args(words)
    set_up_screen()
    with exiting_on_bad_input():
        make(**options.as_dict())


if __name__ == "__main__":
    main()
