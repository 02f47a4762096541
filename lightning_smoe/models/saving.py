"""Writing a checkpoint folder that stock transformers loads, and proving that it does."""

import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models.artifact import Manifest, replacing, require_space
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.description import described
from lightning_smoe.models.folder import MANIFEST, CheckpointFolder
from lightning_smoe.models.stored import TORCH_TYPES, type_in_folder

_SHARD_SIZE = "5GB"
_VERIFY_TOKENS = 32


def save(
    model: PreTrainedModel,
    source: CheckpointFolder,
    target: Path,
    *,
    manifest: Manifest,
    card: str,
) -> None:
    """Writes a compressed model beside the files of its original, and proves that it reloads.

    The weights of `model` are rounded in place to the type in which they are stored, and it is put
    in evaluation mode; if router rows share experts, it becomes a mapped model. The folder appears
    only after it was reloaded and gave the same weights and logits bit for bit.

    Args:
        model: The model, in memory.
        source: Folder of the original: its config.json is copied but for the number of experts (or
            how they are shared), its tokenizer and generation settings byte for byte.
        target: Folder to write.
        manifest: What made it.
        card: Text of the model card.

    Raises:
        OSError: No space is left on the disk; nothing is written.
        InputError: The reloaded folder does not give the model's weights or logits.
    """
    config, uneven = described(model, source)
    state = _round_in_place(model, source)
    require_space(target, sum(t.numel() * t.element_size() for t in state.values()))
    with replacing(target) as partial:
        model.save_pretrained(partial, state_dict=state, max_shard_size=_SHARD_SIZE)
        for file in partial.glob("*.json"):
            if file.name != "model.safetensors.index.json":
                file.unlink()
        for file in source.other_files:
            shutil.copyfile(file, partial / file.name)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text, "utf-8")
        (partial / "README.md").write_text(card, "utf-8")
        stored = {"schema": 1, "experts_per_layer": uneven, "manifest": manifest.to_json()}
        (partial / MANIFEST).write_text(json.dumps(stored, indent=1) + "\n")
        verify(partial, model)


@torch.no_grad()
def _round_in_place(model: PreTrainedModel, source: CheckpointFolder) -> dict[str, torch.Tensor]:
    """Rounds every weight to the type it has in the source, and returns the state to store."""
    state: dict[str, torch.Tensor] = {}
    by_address: dict[int, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            state[key] = tensor
        elif tensor.data_ptr() in by_address:
            # Tied weights stay one tensor, so that they are stored once.
            state[key] = by_address[tensor.data_ptr()]
        else:
            stored = type_in_folder(model, source, key, tensor)
            state[key] = tensor.to(TORCH_TYPES.get(stored, tensor.dtype))
            tensor.copy_(state[key])
            by_address[tensor.data_ptr()] = state[key]
    return state


@torch.no_grad()
def verify(folder: Path, model: PreTrainedModel) -> None:
    """Reloads a folder; compares its weights and logits with the model's, in evaluation mode.

    Raises:
        InputError: They differ in a single bit, or a tensor is missing.
    """
    # A router may draw at random while it is trained.
    model.eval()
    device = next(model.parameters()).device
    reloaded = load(folder, next(model.parameters()).dtype)
    reloaded.to(device)  # type: ignore[arg-type]  # declared wrongly in transformers 5.23
    stored = reloaded.state_dict()
    changed = [k for k, t in model.state_dict().items() if not torch.equal(t, stored[k])]
    if changed:
        raise InputError(
            f"{folder} does not give the model's weights when reloaded ({', '.join(changed)}); "
            "please report this with the family of the model"
        )
    size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]  # Any module
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size, (1, _VERIFY_TOKENS), generator=generator).to(device)
    expected, found = model(tokens).logits, reloaded(tokens).logits
    if not torch.equal(expected, found):
        difference = (expected - found).abs().max().item()
        raise InputError(
            f"{folder} does not give the model's logits when reloaded (they differ by "
            f"{difference:.1e}); please report this with the family of the model"
        )
