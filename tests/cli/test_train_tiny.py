"""The script that trains a small model from scratch: what it writes, and what it refuses."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.cli.command import Outcome, Workplace, check_refusal, run_in, snapshot
from tests.conftest import SHIPPED_CHECKPOINT, TOKENIZER_FILES
from tests.families import EOS_TOKEN_ID

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = {
    "hidden_size": 16,
    "head_dim": 4,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "max_position_embeddings": 32,
}

Train = Callable[..., Outcome]


@pytest.fixture
def train(text: Path, tmp_path: Path) -> Train:
    """Runs the script on a minute configuration and a little text."""
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPTS / "train_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shipped = json.loads((SCRIPTS / "qwen3moe_tiny.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps(shipped | SMALL))

    def run(*words: str | Path) -> Outcome:
        options = (
            "--output",
            "out",
            "--config",
            "small.json",
            "--path",
            text,
            "--batch_size",
            "16",
        )
        return run_in(tmp_path, script.main, *options, *words)

    return run


def test_a_few_steps_give_a_folder_that_stock_transformers_loads(
    train: Train, work: Workplace, tmp_path: Path
) -> None:
    outcome = train("--steps", "3")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "out"
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    assert model.config.model_type == "qwen3_moe"
    assert model.config.norm_topk_prob
    assert f"out: {model.num_parameters()} parameters, step 3\n" in outcome.out
    tokens = AutoTokenizer.from_pretrained(folder)("Half of 8 is", return_tensors="pt")
    assert model(**tokens).logits.shape[-1] == model.config.vocab_size
    assert GenerationConfig.from_pretrained(folder).eos_token_id == EOS_TOKEN_ID
    for name in TOKENIZER_FILES:
        assert (folder / name).read_bytes() == (SHIPPED_CHECKPOINT / name).read_bytes()
    shown = work.run("inspect", folder).out
    assert "Layer 1: 8 experts of width 8, top-4, no shared expert" in shown


@pytest.mark.slow
def test_training_lowers_the_perplexity_and_goes_on_where_it_stopped(
    train: Train, tmp_path: Path
) -> None:
    def perplexity(outcome: Outcome, step: int) -> float:
        assert outcome.code == 0, outcome.err
        assert f"parameters, step {step}\n" in outcome.out
        return float(outcome.out.split("validation perplexity ")[-1].split(",")[0])

    first = perplexity(train("--steps", "2"), 2)
    before = snapshot(tmp_path / "out")
    assert perplexity(train("--steps", "2"), 2) == first
    assert snapshot(tmp_path / "out") == before
    assert perplexity(train("--steps", "60"), 60) < first / 2
    checkpoint = torch.load(tmp_path / "out-training" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 60


@pytest.mark.slow
def test_time_ends_the_training(train: Train) -> None:
    outcome = train("--minutes", "0.01", "--steps", "100000")
    assert outcome.code == 0, outcome.err
    step = int(outcome.out.split("parameters, step ")[1].split()[0])
    assert 1 <= step < 1000


@pytest.mark.slow
def test_a_training_of_another_configuration_is_refused(train: Train, tmp_path: Path) -> None:
    assert train("--steps", "1").code == 0
    other = json.loads((tmp_path / "small.json").read_text()) | {"num_experts": 12}
    (tmp_path / "other.json").write_text(json.dumps(other))
    check_refusal(train("--steps", "2", "--config", "other.json"), "is of another config")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--steps", "0"), "steps"),
        (("--minutes", "-1"), "minutes"),
        (("--batch_size", "none"), "batch_size"),
        (("--config", "missing.json"), "config=missing.json cannot be read"),
        (("--config", SHIPPED_CHECKPOINT), "is of a qwen2_moe; name a qwen3_moe's"),
        (("--path", "missing"), "missing: no such folder"),
        (("--output", SHIPPED_CHECKPOINT), "is no model of this script; name another --output"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    words: tuple[str | Path, ...], match: str, train: Train, tmp_path: Path
) -> None:
    before = snapshot(tmp_path), snapshot(SHIPPED_CHECKPOINT)
    check_refusal(train(*words), match)
    assert (snapshot(tmp_path), snapshot(SHIPPED_CHECKPOINT)) == before
