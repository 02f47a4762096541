"""Adapters through the command line: what becomes of them at the end of a training."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.cli.command import Workplace
from tests.cli.trainings import changed, to_train

LORA = ("--model.recovery.lora={rank: 2, learning_rate: 0.003}", "--trainer.max_steps=8")


# peft 0.21 asks transformers 5.23 by a name that transformers 6 will not have.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_opens_on_the_compressed_model_and_is_the_recovered_one(
    finished: Workplace,
) -> None:
    work = to_train(finished)
    told = work.done("fit", *LORA, "--model.recovery.trainable=[]").err
    for target in ("attention", "shared", "experts"):
        assert f"fit: lora {target} is trained" in told
    assert {name.split(".")[3] for name in changed(work)} == {"self_attn", "mlp"}
    compressed = AutoModelForCausalLM.from_pretrained(work.out / "compressed")
    adapted = PeftModel.from_pretrained(compressed, work.out / "adapter")
    recovered = AutoModelForCausalLM.from_pretrained(work.out / "recovered")
    tokens = torch.randint(2, 4096, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = (m(tokens, use_cache=False).logits for m in (adapted, recovered))
        before = AutoModelForCausalLM.from_pretrained(work.out / "compressed")(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (before - wanted).abs().max() > 1e-4
    checkpoint = torch.load(work.out / "training/last.ckpt", weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"])


@pytest.mark.slow
def test_no_adapter_is_written_where_it_would_not_be_the_whole_change(finished: Workplace) -> None:
    work = to_train(finished)
    told = work.done("fit", *LORA, "--model.recovery.trainable=[router]").err
    assert "no adapter is written: 2 tensors were trained in full beside it" in told
    assert not (work.out / "adapter").exists()
    assert "model.layers.0.mlp.gate.weight" in changed(work)
    assert "model.layers.0.self_attn.q_proj.weight" in changed(work)


def test_an_adapter_of_an_earlier_training_does_not_stay(finished: Workplace) -> None:
    work = to_train(finished)
    (work.out / "adapter").mkdir()
    work.done("fit")
    assert "model.layers.0.mlp.gate.weight" in changed(work)
    assert not (work.out / "adapter").exists()


def test_what_is_adapted_and_trained_in_full_is_refused(work: Workplace) -> None:
    match = r"trainable trains .* in full \(experts\), and lora\.targets adapts it too"
    work.refused(match, "fit", *LORA, "--model.recovery.trainable=[experts]")
