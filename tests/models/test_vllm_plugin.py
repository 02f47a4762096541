"""What vLLM is told of layers with numbers of their own; vLLM itself is not needed here."""

import ast
import configparser
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.mapped import become_mapped
from lightning_smoe.models.vllm_plugin import ARCHITECTURES, layer_number, layers_as_told
from tests.families import NUM_EXPERTS, build
from tests.models.pruning import prune
from tests.models.sharing import KEPT, assignment_of, share

ROOT = Path(__file__).parents[2]
# All that a serving environment is sure to have beside vLLM.
SERVING = {"torch", "transformers", "vllm", "lightning_smoe", *sys.stdlib_module_names}


def vllm_module() -> ModuleType:
    """A module that builds layers as those of vLLM do, of parts that keep what they are told."""
    # Classes outlive a test, and find their module by its name.
    module = ModuleType(f"native_of_vllm_{len(sys.modules)}")
    sys.modules[module.__name__] = module
    module.__dict__["GateLinear"] = lambda hidden, rows, **kwargs: (hidden, rows, kwargs)
    module.__dict__["FusedMoEFactory"] = lambda **kwargs: kwargs

    class Native(nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.built = build_layers(module, vllm_config.model_config.hf_text_config, prefix)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            return {name for name, _ in weights}

    Native.__module__ = module.__name__
    module.__dict__["Native"] = Native
    return module


def build_layers(
    module: Any, config: Any, prefix: str = "", **options: Any
) -> list[tuple[Any, Any]]:
    layers = []
    for index in (0, 2):
        path = f"{prefix}model.layers.{index}.mlp"
        router = module.GateLinear(32, config.num_experts, prefix=f"{path}.gate")
        experts = module.FusedMoEFactory(
            num_experts=config.num_experts, top_k=4, prefix=f"{path}.experts", **options
        )
        layers.append((router, experts))
    return layers


def config_of(rows: dict[str, int] | None, counts: dict[str, int] | None) -> Any:
    return SimpleNamespace(
        num_experts=NUM_EXPERTS, num_router_rows_per_layer=rows, num_experts_per_layer=counts
    )


def routing_of(counts: dict[str, int], maps: dict[int, Tensor], **options: Any) -> list[Any]:
    module = vllm_module()
    with layers_as_told(module, config_of(None, counts), maps):
        layers = build_layers(module, config_of(None, counts), **options)
    return [experts["custom_routing_function"] for _, experts in layers]


@pytest.mark.parametrize("rows", [None, {"0": 8, "2": 10}])
@pytest.mark.parametrize("counts", [None, {"0": 5, "2": 6}])
def test_each_layer_is_built_with_its_own_numbers(
    rows: dict[str, int] | None, counts: dict[str, int] | None
) -> None:
    module, maps = vllm_module(), dict[int, Tensor]()
    before = dict(module.__dict__)
    with layers_as_told(module, config_of(rows, counts), maps):
        layers = build_layers(module, config_of(rows, counts))
    assert module.__dict__ == before
    wanted = list((rows or {"0": NUM_EXPERTS, "2": NUM_EXPERTS}).values())
    assert [router[1] for router, _ in layers] == wanted
    assert [e["num_experts"] for _, e in layers] == (list(counts.values()) if counts else wanted)
    assert [len(maps[index]) for index in maps] == (wanted if counts else [])
    assert all(("custom_routing_function" in e) == bool(counts) for _, e in layers)


@pytest.mark.parametrize("renormalize", [True, False])
def test_gates_go_to_the_experts_of_the_most_probable_rows(renormalize: bool) -> None:
    sent = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2])
    maps: dict[int, Tensor] = {}
    routing, _ = routing_of({"0": 3, "2": 3}, maps)
    # As loading does, after the layers are built.
    maps[0].copy_(sent)
    logits = torch.randn(20, NUM_EXPERTS, generator=torch.Generator().manual_seed(0))
    states = torch.zeros(20, 32)
    weights, experts = routing(
        hidden_states=states, gating_output=logits, topk=4, renormalize=renormalize
    )
    gates = torch.zeros(20, 3).scatter_add_(1, experts, weights)
    for token, row in enumerate(logits):
        probs = row.softmax(-1)
        chosen = sorted(range(NUM_EXPERTS), key=lambda e: -float(row[e]))[:4]
        total = sum(float(probs[e]) for e in chosen) if renormalize else 1.0
        for expert in range(3):
            wanted = sum(float(probs[e]) for e in chosen if sent[e] == expert) / total
            assert float(gates[token, expert]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
@torch.no_grad()
def test_routing_is_that_of_the_mapped_model_of_transformers(family: str) -> None:
    model = share(build(family))
    become_mapped(model)
    layer = find_moe_layers(model)[0]
    maps: dict[int, Tensor] = {}
    routing, _ = routing_of({"0": KEPT, "2": KEPT}, maps)
    maps[0].copy_(assignment_of(0))
    states = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    output = layer.router(states)
    weights, rows = output[-2], output[-1]
    # As each class of vLLM has it written; only these two have it in their configuration.
    renormalize = getattr(model.config, "norm_topk_prob", True)
    found, experts = routing(states, layer.router_logits(output), layer.top_k, renormalize)
    places = torch.zeros(20, KEPT)
    torch.testing.assert_close(
        places.scatter_add(1, experts, found),
        places.scatter_add(1, layer.experts_of(rows), weights),
    )


def test_a_familys_own_routing_is_followed() -> None:
    def own(*_: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor([[0.5, 0.25]]), torch.tensor([[4, 9]], dtype=torch.int32)

    routing, _ = routing_of({"0": 5, "2": 6}, {}, custom_routing_function=own)
    weights, experts = routing(torch.zeros(1, 32), torch.zeros(1, 12), 2, False)
    assert weights.tolist() == [[0.5, 0.25]]
    assert experts.tolist() == [[4, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_grouped_topk": True}, "where routing is by use_grouped_topk"),
        ({"scoring_func": "sigmoid"}, "sigmoid; export the checkpoint to its stock form"),
        ({"e_score_correction_bias": torch.zeros(12)}, "by e_score_correction_bias"),
        ({"enable_eplb": True}, "cannot be balanced by enable_eplb"),
    ],
)
def test_what_vllm_would_get_wrong_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routing_of({"0": 5, "2": 6}, {}, **options)


def test_a_module_built_in_another_way_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="builds the layers of elsewhere in a way"),
        layers_as_told(ModuleType("elsewhere"), config_of(None, None), {}),
    ):
        pass


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """Registers the plugin with a stand-in for vLLM; gives what the registry then holds."""
    native = vllm_module().__dict__["Native"]
    known = dict.fromkeys(ARCHITECTURES, SimpleNamespace(load_model_cls=lambda: native))
    registry = SimpleNamespace(models=dict[str, Any](known))
    registry.get_supported_archs = registry.models.keys
    registry.register_model = registry.models.__setitem__
    vllm = ModuleType("vllm")
    vllm.__dict__["ModelRegistry"] = registry
    monkeypatch.setitem(sys.modules, "vllm", vllm)

    def register() -> dict[str, Any]:
        entry_point().register()
        return dict(registry.models)

    return register


def entry_point() -> Any:
    """The module that setup.cfg names for vLLM."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    _, _, target = setup["options.entry_points"]["vllm.general_plugins"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert function == "register"
    return importlib.import_module(module)


def test_vllm_gets_a_class_for_every_architecture(
    plugin: Callable[[], dict[str, Any]],
) -> None:
    for name, target in plugin().items():
        if not name.startswith("Mapped"):
            continue
        module, _, made = target.partition(":")
        assert made == name
        assert getattr(importlib.import_module(module), made).__name__ == name


def test_maps_go_to_their_layers_and_all_else_to_vllm(
    plugin: Callable[[], dict[str, Any]],
) -> None:
    plugin()
    made = entry_point().MappedOlmoeForCausalLM
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=config_of(None, {"0": 5, "2": 6}))
    )
    model = made(vllm_config=config)
    routing = model.built[0][1]["custom_routing_function"]
    key, sent = "model.layers.{}.mlp.experts.expert_map", torch.arange(NUM_EXPERTS).flip(0) // 4
    weights = [("model.norm.weight", torch.ones(32)), (key.format(0), sent)]
    with pytest.raises(ValueError, match=r"lacks the expert_map of layers \[2\]"):
        model.load_weights(weights)
    assert model.load_weights([*weights, (key.format(2), sent)]) == {"model.norm.weight"}
    logits = torch.zeros(1, NUM_EXPERTS)
    logits[0, 11], logits[0, 0] = 2.0, 1.0
    assert routing(torch.zeros(1, 32), logits, 2, True)[1].tolist() == [[0, 2]]


def test_only_architectures_that_were_tried_have_a_class() -> None:
    for name in ("MappedLlamaForCausalLM", "OlmoeForCausalLM"):
        with pytest.raises(AttributeError, match=name):
            getattr(entry_point(), name)


def test_vllm_alone_would_lose_a_map_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # As vLLM does.
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", sdpa_attention_forward)
    model, uneven = share(build("mixtral")), build("mixtral")
    become_mapped(model)
    prune(uneven, {0: 8})
    become_mapped(uneven)
    for made in (model, uneven):
        made.config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="lose the map; install lightning-smoe beside vLLM"):
        type(model)(model.config)
    type(uneven)(uneven.config)


def test_a_serving_environment_needs_nothing_but_torch_and_transformers() -> None:
    waiting, seen = ["lightning_smoe", "lightning_smoe.models.vllm_plugin"], set[str]()
    while waiting:
        name = waiting.pop()
        path = ROOT.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found = {
            module
            for node in ast.walk(ast.parse(file.read_text()))
            for module in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert {module.partition(".")[0] for module in found} <= SERVING, name
        seen.add(name)
        waiting += [m for m in found - seen if m.startswith("lightning_smoe")]
    assert len(seen) > 3


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.layers.3.mlp", 3), ("layers.12.mlp.experts.7.w1", 12), ("0.mlp", 0)],
)
def test_the_first_number_of_a_name_is_the_decoder_layers(name: str, number: int) -> None:
    assert layer_number(name) == number
