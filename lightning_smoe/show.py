"""What a person sees: progress of a run, what is in a checkpoint folder, and what it writes."""

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

from lightning_smoe.data.packing import load_tokenizer
from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.expert_count import text_config
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import MoELayer, find_moe_layers
from lightning_smoe.models.stored import stored_type

# Lightning's advice where it is wrong here: all tokens are in memory, so loaders need no workers;
# training and validation share a folder of checkpoints on purpose.
_NOISE = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The `srun` command is available.*",
    ".*in eval mode at the start of training.*",
    ".*instantiate_classes.*",
    ".*LeafSpec.* is deprecated.*",
)


class _ScreenHandler(logging.Handler):
    """Writes messages of the first process above a progress bar that may be on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one message."""
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # set by Lightning
            console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
            console.print(self.format(record))


class StepBar(RichProgressBar):
    """Lightning's progress bar, without epochs: training here is counted in steps."""

    # Private in Lightning 2.6, which would write `Epoch 0/-2` where only max_steps ends training.
    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


def set_up_screen() -> None:
    """Shows this project's progress, and of the libraries what a person can act on."""
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", pattern)
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    log = logging.getLogger("lightning_smoe")
    if not log.handlers:
        log.addHandler(_ScreenHandler())
        log.setLevel(logging.INFO)
        log.propagate = False


def inspect(checkpoint: str) -> None:
    """Prints family, layers, experts and size; reads no weight.

    Raises:
        InputError: The folder is not a checkpoint, or a model that is not supported, and why.
    """
    folder = open_checkpoint(checkpoint)
    model = outline(folder)
    layers = {layer.index: layer for layer in find_moe_layers(model)}
    config = text_config(model.config)
    lines = [
        f"Checkpoint: {folder.path}",
        f"Family: {config.model_type} ({type(model).__name__})",
        f"Total parameters: {sum(p.numel() for p in model.parameters())}",
        f"Bytes: {folder.num_bytes} ({folder.num_bytes / 1e6:.1f} MB, {len(folder.shards)} files)",
    ]
    lines += [_describe(i, layers.get(i)) for i in range(config.num_hidden_layers)]
    if folder.is_mapped:
        shared = any(layer.expert_map is not None for layer in layers.values())
        lines.append(
            "Loads with: transformers.AutoModelForCausalLM.from_pretrained, trust_remote_code=True "
            f"({'router rows share experts' if shared else 'numbers of experts differ by layer'})"
        )
    elif folder.experts_per_layer:
        lines.append("Loads with: lightning_smoe.models.checkpoint.load (counts differ by layer)")
    else:
        lines.append("Loads with: transformers.AutoModelForCausalLM.from_pretrained")
    console = Console()
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _describe(index: int, layer: MoELayer | None) -> str:
    if layer is None:
        return f"Layer {index}: no experts"
    shared = layer.shared_expert
    beside = (
        "no shared expert" if shared is None else f"shared expert of width {shared[0].in_features}"
    )
    groups = f", {layer.num_router_groups} router groups" if layer.num_router_groups > 1 else ""
    rows = "" if layer.expert_map is None else f"{layer.num_router_rows} router rows, "
    return (
        f"Layer {index}: {layer.num_experts} experts of width {layer.intermediate_size}, "
        f"{rows}top-{layer.top_k}{groups}, {beside}"
    )


def generate(checkpoint: str, prompt: str, max_new_tokens: int, temperature: float) -> None:
    """Prints a continuation of a prompt, token by token.

    Raises:
        InputError: The folder cannot be loaded, or a setting is out of range.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise InputError("max_new_tokens must be 1 or more, and temperature 0 or more")
    folder = open_checkpoint(checkpoint)
    tokenizer: Any = load_tokenizer(folder.path)
    model: Any = load(folder.path, stored_type(folder))
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise InputError("the prompt is empty; give --prompt some text")
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    with torch.inference_mode():
        model.generate(
            **inputs,
            **settings,
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
