"""Writing a checkpoint folder that stock transformers loads, and proving that it does."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models import modeling_smoe
from lightning_smoe.models.artifact import Manifest, replacing, require_space, sha256_of_file
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.description import described
from lightning_smoe.models.folder import MANIFEST, CheckpointFolder
from lightning_smoe.models.modeling_smoe import TYPE_PREFIX
from lightning_smoe.models.shard_writer import ShardWriter
from lightning_smoe.models.shards import MAX_SHARD_SIZE
from lightning_smoe.models.stored import round_in_place, state_parts, stored_layout, stored_state

_CARD = "README.md"
_VERIFY_TOKENS = 32


def save(
    model: PreTrainedModel,
    source: CheckpointFolder,
    target: Path,
    *,
    manifest: Manifest,
    card: str,
    max_shard_size: int = MAX_SHARD_SIZE,
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
        max_shard_size: Weights in one file at most, in bytes.

    Raises:
        OSError: No space is left on the disk; nothing is written.
        InputError: The reloaded folder does not give the model's weights or logits.
    """
    config = described(model, source)
    round_in_place(model, source)
    layout = stored_layout(model, source, max_shard_size)
    require_space(target, layout.num_bytes)
    with replacing(target) as partial:
        writer = ShardWriter(partial, layout)
        for part in state_parts(model):
            writer.write(stored_state(model, source, part))
        writer.finish()
        write_beside(partial, source, config=config, manifest=manifest, card=card)
        verify(partial, model)


def write_beside(
    folder: Path,
    source: CheckpointFolder,
    *,
    config: Mapping[str, Any],
    manifest: Manifest,
    card: str,
) -> None:
    """Writes all of a checkpoint folder but its weights, which are there already.

    Args:
        folder: The folder; smoe.json notes the hash of every file in it but the card's.
        source: Folder of the original, whose tokenizer and generation settings are copied.
        config: Content of config.json.
        manifest: What made the folder.
        card: Text of the model card.
    """
    is_mapped = str(config["model_type"]).startswith(TYPE_PREFIX)
    code = [Path(modeling_smoe.__file__)] if is_mapped else []
    for file in (*source.other_files, *code):
        shutil.copyfile(file, folder / file.name)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    (folder / _CARD).write_text(card, "utf-8")
    # A card is there to be edited.
    files = sorted(p for p in folder.iterdir() if p.name not in (_CARD, MANIFEST))
    stored = {
        "schema": 1,
        # Counts that earlier versions could not say in config.json.
        "experts_per_layer": {},
        "files": {file.name: sha256_of_file(file) for file in files},
        "manifest": manifest.to_json(),
    }
    (folder / MANIFEST).write_text(json.dumps(stored, indent=1) + "\n")


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
