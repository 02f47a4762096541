"""What people who use peft and the Trainer of transformers find in the folders of a recovery."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.saving import save
from lightning_smoe.training.adapters import merge_trained, prepare_training
from lightning_smoe.training.lora import Lora
from tests.models.pruning import CARD, MANIFEST
from tests.models.sharing import save_shared

ROUNDING = 1e-5


@pytest.fixture(params=["kept", "mapped"])
def compressed(
    request: pytest.FixtureRequest, saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> Callable[[str], tuple[Path, Path]]:
    """Saves a family's model with fewer experts; gives the folders of both."""

    def make(family: str) -> tuple[Path, Path]:
        source, target = saved_checkpoint(family), tmp_path / "compressed"
        if request.param == "mapped":
            save_shared(source, target)
        else:
            model = load(source)
            for layer in find_moe_layers(model):
                layer.select(torch.arange(6))
            save(model, open_checkpoint(source), target, manifest=MANIFEST, card=CARD)
        return source, target

    return make


# peft 0.21 asks transformers 5.23 by a name that transformers 6 will not have.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "mixtral"])
def test_peft_opens_the_adapter_on_the_compressed_folder(
    family: str, compressed: Callable[[str], tuple[Path, Path]], tmp_path: Path, tokens: Tensor
) -> None:
    source, folder = compressed(family)
    recovered, adapter = tmp_path / "recovered", tmp_path / "adapter"
    lora = Lora(rank=4)
    model = load(folder)
    groups = prepare_training(model, (), lora, learning_rate=0.01)
    optimizer = torch.optim.Adam(
        [{"params": [*g.parameters.values()], "lr": g.learning_rate} for g in groups]
    )
    for _ in range(2):
        model(tokens).logits.square().mean().backward()
        optimizer.step()
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fresh = load(folder)
    before = fresh(tokens).logits
    assert merge_trained(fresh, lora, state, adapter=adapter, adapted=str(folder)) is None
    save(fresh, open_checkpoint(source), recovered, manifest=MANIFEST, card=CARD)
    merged = load(recovered)(tokens).logits
    assert (merged - before).abs().max() > 1000 * ROUNDING
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder)
    assert {file.name for file in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    torch.testing.assert_close(opened(tokens).logits, merged, rtol=0, atol=ROUNDING)
    again: Any = opened.merge_and_unload()
    torch.testing.assert_close(again(tokens).logits, merged, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", ["qwen2_moe"])
def test_the_trainer_of_transformers_trains_a_compressed_folder_and_saves_it(
    family: str, compressed: Callable[[str], tuple[Path, Path]], tmp_path: Path, tokens: Tensor
) -> None:
    _, folder = compressed(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    again = tmp_path / "again"
    trainer.save_model(str(again))
    expected = model.eval()(tokens).logits
    opened = AutoModelForCausalLM.from_pretrained(again)
    torch.testing.assert_close(opened(tokens).logits, expected, rtol=0, atol=ROUNDING)
