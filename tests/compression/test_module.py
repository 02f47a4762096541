"""Plans that are fitted on tokens, over whole models."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_smoe.compression import module
from lightning_smoe.compression.module import CompressionModule
from lightning_smoe.compression.record import output_weights
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, RouterRepair, Slice
from lightning_smoe.models.layer import find_moe_layers
from tests.calibration.batches import num_hooks, predict, random_windows
from tests.compression.plans import (
    KEPT,
    MANY,
    MERGED,
    blocks_of,
    compressed,
    plan_for,
    refitted,
)
from tests.conftest import SHIPPED_CHECKPOINT, TOKENIZER_VOCAB_SIZE
from tests.families import FAMILIES, build

# More tokens than features, or a fit would not help the sequences that are held out.
TEXT = random_windows(80)


@pytest.mark.parametrize("family", MANY)
@pytest.mark.parametrize(
    ("groups", "router"),
    [(KEPT, Slice()), (MERGED, LogSumExp())],
    ids=["pruned", "merged"],
)
def test_a_whole_model_is_compressed_and_the_refit_lowers_every_layers_error(
    family: str, groups: list[list[int]], router: RouterRepair, tokens: Tensor
) -> None:
    original, errors = build(family), []
    for refit in (None, Refit(correct_drift=False)):
        plan = plan_for(find_moe_layers(original), groups, refit=refit, router=router)
        model, outcomes = refitted(build(family), plan, TEXT)
        layers = find_moe_layers(model)
        assert [layer.num_experts for layer in layers] == [8, 8]
        assert list(outcomes) == ([] if refit is None else [layer.name for layer in layers])
        assert all(outcome.applied for outcome in outcomes.values())
        with torch.no_grad():
            assert model(tokens).logits.isfinite().all()
        outputs = (
            [blocks_of(each, i, TEXT)[1].output for each in (model, original)] for i in range(2)
        )
        errors.append([(ours - theirs).square().mean() for ours, theirs in outputs])
    assert all(after < before for before, after in zip(*errors, strict=True))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_refit_that_would_not_help_is_left_out_and_says_so(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    layers, few = find_moe_layers(build(family)), random_windows(8)
    plain = compressed(build(family), plan_for(layers), few).state_dict()
    with caplog.at_level(logging.INFO, logger="lightning_smoe"):
        # So weak that it learns the few tokens by heart.
        model, outcomes = refitted(build(family), plan_for(layers, refit=Refit(1e-5)), few)
    assert not any(outcome.applied for outcome in outcomes.values())
    assert all(torch.equal(plain[name], tensor) for name, tensor in model.state_dict().items())
    lines = [r.getMessage() for r in caplog.records if "compress:" in r.getMessage()]
    for line, outcome in zip(lines, outcomes.values(), strict=True):
        assert outcome.after >= outcome.before
        assert f"-> {outcome.after:.4f}: the refit is left out;" in line


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_merged_refitted_and_can_be_trained(family: str, tokens: Tensor) -> None:
    model = build(family)
    names = model.state_dict().keys()
    compressed(model, plan_for(find_moe_layers(model), MERGED, refit=Refit(), router=LogSumExp()))
    assert model.state_dict().keys() == names
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not any(tensor.is_inference() for tensor in named.values())
    model(tokens, labels=tokens).loss.backward()
    for layer in find_moe_layers(model):
        gradient = layer.experts.down_proj.grad
        assert gradient is not None
        assert gradient.shape[0] == 8
        assert gradient.any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)


@pytest.mark.parametrize("precision", ["bf16-true", "model"])
def test_bfloat16_models_stay_bfloat16(precision: str, tokens: Tensor) -> None:
    model = build("gpt_oss")
    plan = plan_for(find_moe_layers(model), MERGED, refit=Refit(), router=LogSumExp())
    if precision == "model":
        compressed(model.bfloat16(), plan)
    else:
        compressed(model, plan, precision=precision)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_layers_that_are_too_wide_for_one_system_of_equations_get_the_same_fit(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, found = plan_for(find_moe_layers(build(family))[:1], refit=Refit(3.0)), []
    for most in (1000, 100):
        monkeypatch.setattr(module, "_MOST_FEATURES", most)
        model, outcomes = refitted(build(family), plan, TEXT)
        assert all(outcome.applied for outcome in outcomes.values())
        found.append(output_weights(find_moe_layers(model)[0]))
    plain = compressed(build(family), replace(plan, refit=None))
    start = output_weights(find_moe_layers(plain)[0])
    assert (found[1] - found[0]).norm() < 1e-2 * (found[0] - start).norm()


def test_a_block_that_the_refit_does_not_understand_is_refused_only_by_the_refit() -> None:
    for refit in (None, Refit()):
        model = build("mixtral")
        layer = find_moe_layers(model)[0]
        layer.block.register_forward_hook(lambda _module, _args, output: 2 * output)
        plan = plan_for([layer], refit=refit)
        if refit is None:
            compressed(model, plan)
            continue
        with pytest.raises(InputError, match=r"set model\.recipe\.init_args\.refit to null"):
            compressed(model, plan)


def test_no_hook_is_left_behind() -> None:
    model = build("qwen2_moe")
    hooks = num_hooks(model)
    compressed(model, plan_for(find_moe_layers(model), MERGED, refit=Refit(), router=LogSumExp()))
    assert num_hooks(model) == hooks


def test_each_layer_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = build("qwen2_moe")
    with caplog.at_level(logging.INFO, logger="lightning_smoe"):
        _, outcomes = refitted(model, plan_for(find_moe_layers(model), refit=Refit()), TEXT)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("lightning_smoe")]
    assert [line.split(", held-out layer error")[0] for line in lines] == [
        "compress: layer 0, 12 -> 8 experts",
        "compress: layer 2, 12 -> 8 experts",
    ]
    for line, outcome in zip(lines, outcomes.values(), strict=True):
        assert f", {outcome}; " in line
        assert 0 < outcome.after < outcome.before
        assert outcome.strength in Refit().strengths


def test_shipped_text_compresses_a_model_with_its_vocabulary() -> None:
    data = TextDataModule(
        tokenizer=SHIPPED_CHECKPOINT, sequence_length=32, calib_tokens=8 * 64, batch_size=3
    )
    model = build("qwen3_moe", vocab_size=TOKENIZER_VOCAB_SIZE)
    plan = plan_for(find_moe_layers(model), refit=Refit())
    predict(CompressionModule(model, plan), data)
    assert [layer.num_experts for layer in find_moe_layers(model)] == [8, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", MANY)
def test_a_gpu_gives_the_weights_of_the_cpu(family: str) -> None:
    model = build(family)
    plan = plan_for(find_moe_layers(model), MERGED, refit=Refit(), router=LogSumExp())
    compressed(model, plan, accelerator="gpu")
    for name, tensor in compressed(build(family), plan).state_dict().items():
        found = model.state_dict()[name].cpu()
        torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-3)
