"""Plans that are fitted on tokens, over whole models."""

import copy
import logging

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_smoe.compression.module import _MOST_FEATURES, CompressionModule
from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.functional.refit import Refit
from lightning_smoe.functional.router import LogSumExp, RouterRepair, Slice
from lightning_smoe.models.layer import find_moe_layers
from tests.calibration.batches import num_hooks, predict
from tests.compression.plans import KEPT, MANY, MERGED, blocks_of, compressed, plan_for
from tests.conftest import SHIPPED_CHECKPOINT, TOKENIZER_VOCAB_SIZE
from tests.families import FAMILIES, build


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
    for refit in (None, Refit()):
        model = build(family)
        compressed(model, plan_for(find_moe_layers(model), groups, refit=refit, router=router))
        layers = find_moe_layers(model)
        assert [layer.num_experts for layer in layers] == [8, 8]
        with torch.no_grad():
            assert model(tokens).logits.isfinite().all()
        errors.append(
            [
                (blocks_of(model, i)[1].output - blocks_of(original, i)[1].output).square().mean()
                for i in range(2)
            ]
        )
    assert all(after < before for before, after in zip(*errors, strict=True))


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


def test_a_layer_that_is_too_wide_for_one_system_of_equations_is_refitted_too() -> None:
    config = FAMILIES["mixtral"]()
    config.intermediate_size = 1100
    original, errors = AutoModelForCausalLM.from_config(config), []
    assert 8 * config.intermediate_size > _MOST_FEATURES
    layers = find_moe_layers(original)[:1]
    for refit in (None, Refit()):
        model = compressed(copy.deepcopy(original), plan_for(layers, refit=refit))
        output = blocks_of(model, 0)[1].output
        errors.append((output - blocks_of(original, 0)[1].output).square().mean())
    assert errors[1] < errors[0]


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
        compressed(model, plan_for(find_moe_layers(model), refit=Refit()))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("lightning_smoe")]
    assert [line.split(";")[0].split(", layer error")[0] for line in lines] == [
        "compress: layer 0, 12 -> 8 experts",
        "compress: layer 2, 12 -> 8 experts",
    ]
    for line in lines:
        before, after = line.split("layer error ")[1].split(" of the")[0].split(" -> ")
        assert 0 < float(after) < float(before)


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
