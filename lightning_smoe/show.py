"""Looking at a checkpoint folder: what is in it, and what it writes."""

from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, TextStreamer

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.expert_count import text_config
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import MoELayer, find_moe_layers


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
    if folder.experts_per_layer:
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
    return (
        f"Layer {index}: {layer.num_experts} experts of width {layer.intermediate_size}, "
        f"top-{layer.top_k}{groups}, {beside}"
    )


def generate(checkpoint: str, prompt: str, max_new_tokens: int, temperature: float) -> None:
    """Prints a continuation of a prompt, token by token.

    Raises:
        InputError: The folder cannot be loaded, or a setting is out of range.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise InputError("max_new_tokens must be 1 or more, and temperature 0 or more")
    folder = open_checkpoint(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    model: Any = load(folder.path)
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
