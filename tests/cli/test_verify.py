"""The verify verb: what is wrong with a folder is named, and where its experts came from."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_smoe import verify
from lightning_smoe.models.memory import available_memory
from tests.cli.command import Workplace, check_refusal, snapshot
from tests.models.pruning import save_pruned, store_tensors, stored_tensors

EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


def test_a_whole_checkpoint_is_told_to_be_whole_and_stays_as_it_is(work: Workplace) -> None:
    before = snapshot(work.folder)
    outcome = work.run("verify", "model", "--prompt=The sea")
    assert outcome.code == 0, outcome.err
    count = len(stored_tensors(work.folder / "model"))
    assert f"{count} of {count} that are needed" in outcome.out
    assert f"{count} of {count} tensors are finite" in outcome.out
    assert "Qwen2MoeForCausalLM of" in outcome.out
    assert "The sea" in outcome.out
    assert outcome.out.endswith("model is whole.\n")
    assert snapshot(work.folder) == before


def test_a_checkpoint_is_compared_with_its_original(work: Workplace) -> None:
    save_pruned(work.folder / "model", work.folder / "pruned", 8)
    outcome = work.run("verify", "pruned", "--original", "model")
    assert outcome.code == 0, outcome.err
    for line in (
        "model.layers.0.mlp: 12 -> 8 experts; 8 of 8 router rows are the original's",
        "  equal to the original's: 4, 5, 6, 7, 8, 9, 10, 11",
        "config.json: num_experts: 12 -> 8",
        "tokenizer.json: equal",
    ):
        assert line in outcome.out.splitlines()
    same = work.run("verify", "model", "--original=model").out
    assert "model.layers.2.mlp: untouched" in same.splitlines()


def test_what_is_wrong_is_shown_and_ends_with_code_2(work: Workplace) -> None:
    tensors = stored_tensors(work.folder / "model")
    tensors[EXPERT][0, :3] = torch.nan
    bad = {k: t for k, t in tensors.items() if "experts.5." not in k}
    store_tensors(work.folder / "model", bad)
    (work.folder / "model" / "smoe.json").write_text(json.dumps({"files": {"config.json": "0"}}))
    outcome = work.run("verify", "model", "--original", "model")
    message = check_refusal(outcome, r"model is not whole: .* is missing \(and 7 more\); copy or")
    assert "experts.5." in message
    assert f"{EXPERT} holds 3 NaN" in " ".join(outcome.out.replace("│", " ").split())
    assert "config.json is not the file that was written" in outcome.out
    # It is neither loaded nor compared.
    assert "reload" not in outcome.out
    assert "Role" not in outcome.out


def test_a_model_that_does_not_fit_in_memory_is_not_loaded(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = available_memory()
    assert found is None or found > 1 << 20
    monkeypatch.setattr(verify, "available_memory", lambda: 1000)
    outcome = work.run("verify", "model")
    assert outcome.code == 0
    assert "left out: the weights take" in outcome.out
    assert "Once upon" not in outcome.out


def test_a_folder_without_a_tokenizer_is_loaded_and_writes_nothing(work: Workplace) -> None:
    for file in (work.folder / "model").glob("tokenizer*"):
        file.unlink()
    outcome = work.run("verify", "model")
    assert outcome.code == 0
    assert "left out: the folder holds no tokenizer" in outcome.out


def test_what_cannot_be_verified_is_refused(
    work: Workplace, built_checkpoint: Callable[[str], Path]
) -> None:
    mixtral = str(built_checkpoint("mixtral"))
    for words, match in (
        (["nowhere"], "there is no checkpoint folder nowhere"),
        (["model", "--original=nowhere"], "there is no checkpoint folder nowhere"),
        (["model", "--prompt="], "the prompt is empty; give --prompt some text"),
        (["model", f"--original={mixtral}"], r"--original .*mixtral.* is not what model"),
    ):
        check_refusal(work.run("verify", *words), match)
