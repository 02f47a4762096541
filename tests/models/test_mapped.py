"""Router rows that share experts: the same function, in a checkpoint that transformers loads."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_smoe.errors import InputError
from lightning_smoe.models import modeling_smoe
from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.mapped import become_mapped, check_mappable
from lightning_smoe.models.saving import save
from tests.families import NUM_EXPERTS, build
from tests.models.pruning import (
    CARD,
    MANIFEST,
    contents,
    load_stock,
    store_tensors,
    stored_tensors,
)
from tests.models.sharing import KEPT, assignment_of, copies, save_shared, share

CONFIG = build("qwen2_moe").config.to_dict()
# Equal experts are multiplied in other groups of tokens.
ROUNDING = 1e-6


@pytest.fixture
def mapped(built_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder of qwen2_moe whose router rows share experts."""
    save_shared(built_checkpoint("qwen2_moe"), tmp_path / "mapped")
    return tmp_path / "mapped"


@torch.no_grad()
def test_a_map_of_each_row_to_its_own_expert_keeps_every_logit(
    tiny_moe: PreTrainedModel, tokens: Tensor
) -> None:
    before = tiny_moe(tokens).logits
    for layer in find_moe_layers(tiny_moe):
        layer.share(layer.weights(), torch.arange(NUM_EXPERTS))
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=0, atol=0)
    become_mapped(tiny_moe)
    torch.testing.assert_close(tiny_moe(tokens).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_rows_that_share_an_expert_are_rows_with_a_copy_each(
    family: str, tokens: Tensor, implementation: str
) -> None:
    shared, full = share(build(family)), copies(build(family))
    become_mapped(shared)
    for model in (shared, full):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
    for layer in find_moe_layers(shared):
        assert layer.experts.config is shared.config
    torch.testing.assert_close(
        shared(tokens).logits, full(tokens).logits, rtol=ROUNDING, atol=ROUNDING
    )


@torch.no_grad()
def test_a_saved_model_gives_every_weight_and_logit_when_reloaded(
    family: str, built_checkpoint: Callable[[str], Path], tmp_path: Path, tokens: Tensor
) -> None:
    source, target = built_checkpoint(family), tmp_path / "out"
    model = save_shared(source, target)
    # As anybody would, after `import lightning_smoe`: the code in the folder does not run.
    stock = load_stock(target)
    assert type(stock) is type(model)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(stock.state_dict()[key], tensor, rtol=0, atol=0)
    reloaded = load(target)
    torch.testing.assert_close(reloaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    layers = [*find_moe_layers(reloaded), *find_moe_layers(outline(open_checkpoint(target)))]
    assert [layer.num_experts for layer in layers] == 2 * [KEPT, KEPT + 1]
    assert {layer.num_router_rows for layer in layers} == {NUM_EXPERTS}
    # What is neither expert nor map is the original's; experts have the original's names.
    before, after = stored_tensors(source), stored_tensors(target)
    new = {key for key in after if key not in before}
    assert {key.rpartition(".")[2] for key in new} == {"expert_map"}
    for key, tensor in after.items():
        if ".experts." not in key and key not in new and tensor.shape == before[key].shape:
            torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)


def test_the_configuration_is_the_originals_but_for_how_experts_are_shared(
    mapped: Path, built_checkpoint: Callable[[str], Path]
) -> None:
    old = json.loads((built_checkpoint("qwen2_moe") / "config.json").read_text())
    new = json.loads((mapped / "config.json").read_text())
    assert new == old | {
        "architectures": ["MappedQwen2MoeForCausalLM"],
        "model_type": "mapped_qwen2_moe",
        "auto_map": {
            "AutoConfig": "modeling_smoe.MappedQwen2MoeConfig",
            "AutoModelForCausalLM": "modeling_smoe.MappedQwen2MoeForCausalLM",
            "AutoModel": "modeling_smoe.MappedQwen2MoeModel",
        },
        "num_experts_per_layer": {"0": KEPT, "2": KEPT + 1},
        "original_fields": {
            "model_type": "qwen2_moe",
            "architectures": ["Qwen2MoeForCausalLM"],
        },
    }
    assert json.loads((mapped / "smoe.json").read_text())["experts_per_layer"] == {}
    assert (mapped / "modeling_smoe.py").read_text() == Path(modeling_smoe.__file__).read_text()


@torch.no_grad()
def test_a_reloaded_model_is_saved_again_by_transformers_and_by_this_project(
    mapped: Path, tmp_path: Path, tokens: Tensor
) -> None:
    model = load(mapped)
    logits = model(tokens).logits
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again")(tokens).logits, logits, rtol=0, atol=0)
    names = contents(tmp_path / "again").keys()
    assert names >= {"modeling_smoe.py", "config.json", "model.safetensors"}
    # A stale file in the source is not copied over the new one.
    (mapped / "modeling_smoe.py").write_text("raise SystemExit")
    save(model, open_checkpoint(mapped), tmp_path / "third", manifest=MANIFEST, card=CARD)
    assert (tmp_path / "third/modeling_smoe.py").read_text() != "raise SystemExit"
    config = open_checkpoint(tmp_path / "third").config
    assert config == open_checkpoint(mapped).config
    torch.testing.assert_close(load(tmp_path / "third")(tokens).logits, logits, rtol=0, atol=0)


def test_gradients_reach_every_expert_and_router(family: str, tokens: Tensor) -> None:
    model = share(build(family))
    become_mapped(model)
    model.train()(tokens, labels=tokens).loss.backward()
    for layer in find_moe_layers(model):
        for parameter in [*layer.parameters_of("experts"), *layer.parameters_of("router")]:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def continued(model: Any, tokens: Tensor) -> Tensor:
    written: Tensor = model.generate(tokens, max_new_tokens=8, do_sample=False)
    return written


@torch.no_grad()
def test_a_mapped_model_generates_what_its_copies_do(tokens: Tensor) -> None:
    shared, full = share(build("qwen3_moe")), copies(build("qwen3_moe"))
    become_mapped(shared)
    torch.testing.assert_close(continued(shared, tokens), continued(full, tokens), rtol=0, atol=0)


@torch.no_grad()
def test_a_mapped_model_is_copied_and_pickled_whole(mapped: Path, tokens: Tensor) -> None:
    model = load(mapped)
    # As strategies that spawn processes do.
    pickled = pickle.loads(pickle.dumps(model))  # noqa: S301 (just written)
    for other in (copy.deepcopy(model), pickled):
        assert type(other) is type(model)
        torch.testing.assert_close(other(tokens).logits, model(tokens).logits, rtol=0, atol=0)


@torch.no_grad()
def test_layers_that_were_left_alone_get_a_map_to_their_own_experts(
    built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = built_checkpoint("mixtral")
    model = load(source)
    layer = find_moe_layers(model)[1]
    layer.share(layer.weights().select(torch.arange(KEPT)), assignment_of(0))
    save(model, open_checkpoint(source), tmp_path / "out", manifest=MANIFEST, card=CARD)
    first, second = find_moe_layers(load(tmp_path / "out"))
    assert [first.num_experts, second.num_experts] == [NUM_EXPERTS, KEPT]
    assert first.expert_map is not None
    assert first.expert_map.tolist() == list(range(NUM_EXPERTS))


Numbers = list[int] | dict[str, int] | None


@pytest.mark.parametrize("counts", [[4, 6], {"0": 4, "2": 6}, None])
@pytest.mark.parametrize("rows", [[8, 12], {"0": 8, "2": 12}, None])
def test_a_configuration_alone_builds_a_model(counts: Numbers, rows: Numbers) -> None:
    told = {"num_experts_per_layer": counts, "num_router_rows_per_layer": rows}
    config = modeling_smoe.MappedQwen2MoeConfig(**CONFIG | told)
    layers = find_moe_layers(AutoModelForCausalLM.from_config(config))
    wanted = [8, 12] if rows else [NUM_EXPERTS, NUM_EXPERTS]
    assert [layer.num_router_rows for layer in layers] == wanted
    assert [len(layer.router.weight) for layer in layers] == wanted
    assert [layer.num_experts for layer in layers] == ([4, 6] if counts else wanted)
    for layer in layers:
        sent = None if layer.expert_map is None else layer.expert_map.tolist()
        places = [row % layer.num_experts for row in range(layer.num_router_rows)]
        assert sent == (places if counts else None)


@pytest.mark.parametrize("field", ["num_experts_per_layer", "num_router_rows_per_layer"])
@pytest.mark.parametrize("numbers", [{"0": 4}, {"0": 4, "2": 13}, {"0": 0, "2": 4}, [4, 4, 4]])
def test_numbers_that_do_not_fit_the_layers_are_refused(field: str, numbers: Numbers) -> None:
    config = modeling_smoe.MappedQwen2MoeConfig(**CONFIG | {field: numbers})
    with pytest.raises(ValueError, match=rf"{field}=.* does not fit MappedQwen2MoeForCausalLM"):
        AutoModelForCausalLM.from_config(config)


def test_no_layer_shares_fewer_rows_than_its_router_has() -> None:
    told = {"num_experts_per_layer": [9, 6], "num_router_rows_per_layer": [8, 12]}
    config = modeling_smoe.MappedQwen2MoeConfig(**CONFIG | told)
    with pytest.raises(ValueError, match=r"these numbers of router rows: \{0: 8, 2: 12\}"):
        AutoModelForCausalLM.from_config(config)


def test_only_classes_of_transformers_have_a_mapped_twin() -> None:
    assert modeling_smoe.MappedQwen2MoeConfig is modeling_smoe.MappedQwen2MoeConfig
    for name in ("MappedNothing", "Qwen2MoeConfig", "MappedAutoConfig"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_smoe, name)


def test_a_mapped_model_is_not_mapped_again(mapped: Path) -> None:
    with pytest.raises(InputError, match="share experts already; compress the original"):
        check_mappable(outline(open_checkpoint(mapped)))
    layer = find_moe_layers(load(mapped))[0]
    with pytest.raises(InputError, match="its router rows share experts; change the original"):
        layer.select(torch.arange(4))


def test_a_configuration_that_is_not_the_language_models_alone_is_refused() -> None:
    model = build("mixtral")
    inner = copy.copy(model.config)
    with mock.patch.object(type(inner), "get_text_config", return_value=inner):
        with pytest.raises(
            InputError, match="rows of mixtral cannot share experts, nor its layers"
        ):
            check_mappable(model)
        with pytest.raises(InputError, match="not that of a language model alone"):
            become_mapped(share(model))


def test_a_file_without_a_map_is_refused(mapped: Path) -> None:
    tensors = {k: t for k, t in stored_tensors(mapped).items() if not k.endswith("expert_map")}
    store_tensors(mapped, tensors)
    with pytest.raises(InputError, match=r"lacks 2 tensors .*expert_map"):
        load(mapped)
