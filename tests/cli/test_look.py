"""Looking at checkpoints: what inspect counts and what generate writes."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_smoe.models.checkpoint import load
from tests.cli.command import Workplace, check_refusal, snapshot
from tests.families import FAMILIES
from tests.models.sharing import KEPT, save_shared

EXPERTS = re.compile(r"^Layer (\d+): (\d+) experts", re.MULTILINE)
SHIPPED = Path(__file__).parents[2] / "checkpoints" / "qwen2moe-tiny-8dom"


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_counts_parameters_and_experts_of_every_family(
    name: str, built_checkpoint: Callable[[str], Path], work: Workplace
) -> None:
    checkpoint = built_checkpoint(name)
    outcome = work.run("inspect", checkpoint)
    assert outcome.code == 0
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert f"Total parameters: {model.num_parameters()}\n" in outcome.out
    assert f"Family: {name} (" in outcome.out
    layers = [line for line in outcome.out.splitlines() if line.startswith("Layer ")]
    assert len(layers) == model.config.num_hidden_layers
    experts = EXPERTS.findall(outcome.out)
    assert len(experts) >= 1
    assert {count for _, count in experts} == {"12"}
    assert "Loads with: transformers.AutoModelForCausalLM.from_pretrained" in outcome.out


def test_inspect_looks_at_the_shipped_model_and_changes_nothing(work: Workplace) -> None:
    before = snapshot(SHIPPED)
    for words in ([SHIPPED], ["--checkpoint", SHIPPED]):
        shown = work.run("inspect", *map(str, words)).out
        assert EXPERTS.findall(shown) == [(str(index), "60") for index in range(4)]
        assert "top-4, shared expert of width" in shown
        assert f"Bytes: {(SHIPPED / 'model.safetensors').stat().st_size} " in shown
    assert snapshot(SHIPPED) == before


def test_inspect_counts_what_a_compressed_checkpoint_holds(finished_once: Workplace) -> None:
    shown = finished_once.run("inspect", "out/compressed").out
    model = load(finished_once.out / "compressed")
    assert f"Total parameters: {sum(p.numel() for p in model.parameters())}\n" in shown
    assert EXPERTS.findall(shown) == [("0", "6"), ("2", "6")]


def test_shared_experts_are_told_and_generate(work: Workplace) -> None:
    save_shared(work.folder / "model", work.folder / "shared")
    shown = work.run("inspect", "shared").out
    assert "Family: mapped_qwen2_moe (MappedQwen2MoeForCausalLM)\n" in shown
    assert EXPERTS.findall(shown) == [("0", str(KEPT)), ("2", str(KEPT + 1))]
    assert "12 router rows, top-4, shared expert" in shown
    assert "AutoModelForCausalLM.from_pretrained, trust_remote_code=True (router rows" in shown
    written = work.run("generate", "shared", "--prompt=The sea", "--max_new_tokens=2")
    assert written.code == 0
    assert written.out.startswith("The sea")


@pytest.mark.parametrize("folder", ["model", "out/compressed", "out/recovered"])
def test_generate_continues_a_prompt_with_the_likeliest_tokens(
    folder: str, finished_once: Workplace
) -> None:
    words = ["generate", folder, "--prompt", "The old man", "--max_new_tokens", "8"]
    first, second = finished_once.run(*words), finished_once.run(*words)
    assert first.code == 0
    assert first == second
    checkpoint = finished_once.folder / folder
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = load(checkpoint)
    ids = tokenizer("The old man", return_tensors="pt")["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert first.out.strip() == str(tokenizer.decode(ids[0])).strip()


def test_generate_with_temperature_follows_the_seed(work: Workplace) -> None:
    words = ["generate", "model", "--prompt=The sea", "--max_new_tokens=8", "--temperature=1.5"]
    first, second = work.run(*words), work.run(*words)
    other = work.run(*words, "--seed_everything=7")
    assert first.out == second.out != other.out
    assert all(outcome.out.startswith("The sea") for outcome in (first, other))


def test_a_dense_model_generates_too(dense: Path, work: Workplace) -> None:
    outcome = work.run("generate", dense, "--prompt=The sea", "--max_new_tokens=2")
    assert outcome.code == 0
    assert outcome.out.startswith("The sea")


def test_what_cannot_be_looked_at_is_refused(work: Workplace, dense: Path) -> None:
    shutil.copytree(work.folder / "model", work.folder / "blind")
    for file in (work.folder / "blind").glob("tokenizer*"):
        file.unlink()
    for words, match in (
        (["inspect", "nowhere"], r"there is no checkpoint folder nowhere; name a folder"),
        (["inspect", "text"], r"text is not a checkpoint: it has no config\.json"),
        (["inspect", dense], r"\(qwen2\) has no mixture-of-experts layer; name a checkpoint that"),
        (["generate", "nowhere", "--prompt=a"], r"there is no checkpoint folder nowhere"),
        (["generate", "model", "--prompt="], r"the prompt is empty; give --prompt some text"),
        (["generate", "model", "--prompt=a", "--max_new_tokens=0"], r"max_new_tokens must be 1"),
        (["generate", "model", "--prompt=a", "--temperature=-1"], r"temperature 0 or more"),
        (["generate", "model", "--prompt=a", "--temperature=warm"], r"float[\s\S]*warm"),
        (["inspect", "model", "model"], r"unrecognized arguments: model"),
    ):
        check_refusal(work.run(*words), match)
