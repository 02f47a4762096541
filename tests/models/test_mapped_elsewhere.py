"""Folders with numbers of their own by layer, for people who do not know this project."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from tests.families import FAMILIES
from tests.models.pruning import save_pruned
from tests.models.sharing import save_shared

# Stock transformers leaves weights where they lie in the file, which decides the last bits.
ROUNDING = 1e-5

# Run by itself, with nothing but transformers.
SCRIPT = """
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

tokens = load_file("tokens.safetensors")["tokens"]


def try_all(folder, again, found):
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    body = AutoModel.from_pretrained(folder, trust_remote_code=True)
    found["states"] = body(tokens)[0].detach()
    found["loaded"] = model(tokens).logits.detach()
    found["generated"] = model.generate(tokens, max_new_tokens=4, do_sample=False)
    model.save_pretrained(again)
    model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    found["again"] = model(tokens).logits.detach()
    AutoModel.from_pretrained(again, trust_remote_code=True)
    return model


for folder in map(Path, sys.argv[1:]):
    found = {}
    model = try_all(folder, f"again-{folder.name}", found)
    if folder.name == "shared-qwen2_moe":
        assert model.config._experts_implementation == "grouped_mm"
        for name in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(name)
            found[name] = model(tokens).logits.detach()
        model.train()(tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    save_file(found, f"{folder.name}.safetensors")
assert not [name for name in sys.modules if name.startswith("lightning_smoe")]
"""


@pytest.fixture
def shared(saved_checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """Saves a family's model whose router rows share experts, beside its tokenizer."""

    def make(family: str) -> Path:
        source = saved_checkpoint(family)
        target = source.parent / "elsewhere" / f"shared-{family}"
        save_shared(source, target)
        return target

    return make


@pytest.fixture
def uneven(saved_checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """Saves a family's model whose layers have different numbers of experts."""

    def make(family: str) -> Path:
        source = saved_checkpoint(family)
        target = source.parent / "elsewhere" / f"uneven-{family}"
        first = find_moe_layers(outline(open_checkpoint(source)))[0]
        save_pruned(source, target, {first.index: 8})
        return target

    return make


@pytest.mark.slow
@torch.no_grad()
def test_stock_transformers_loads_runs_trains_and_saves_it(
    shared: Callable[[str], Path], uneven: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    folders = [shared("qwen2_moe"), *(uneven(family) for family in FAMILIES)]
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file({"tokens": tokens}, alone / "tokens.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(alone / "modules")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders],
        cwd=alone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for folder in folders:
        found = load_file(alone / f"{folder.name}.safetensors")
        model: Any = load(folder)
        written = model.generate(tokens, max_new_tokens=4, do_sample=False)
        torch.testing.assert_close(found.pop("generated"), written, rtol=0, atol=0)
        states = model.base_model(tokens)[0]
        torch.testing.assert_close(found.pop("states"), states, rtol=0, atol=ROUNDING)
        logits = model(tokens).logits
        others = {"eager", "batched_mm", "grouped_mm"} if "shared" in folder.name else set()
        assert found.keys() == {"loaded", "again"} | others
        for values in found.values():
            torch.testing.assert_close(values, logits, rtol=0, atol=ROUNDING)
        again = load(alone / f"again-{folder.name}")
        torch.testing.assert_close(again(tokens).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen2_moe", "minimax_m2"])
def test_its_tokenizer_is_the_one_of_the_original(
    family: str, shared: Callable[[str], Path], saved_checkpoint: Callable[[str], Path]
) -> None:
    # transformers overrules what a folder of minimax_m2 says of its tokenizer, by the model's type.
    folders = saved_checkpoint(family), shared(family)
    for folder in folders:
        settings = folder / "tokenizer_config.json"
        text = settings.read_text().replace('"PreTrainedTokenizerFast"', '"GPT2Tokenizer"')
        settings.write_text(text)
    before, after = (type(AutoTokenizer.from_pretrained(folder)) for folder in folders)
    assert after is before
