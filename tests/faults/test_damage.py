"""Damaged checkpoints and artifacts: found, named, and nothing lost that was there."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_smoe.calibration.statistics import Statistics
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.residence import InMemory, Residence
from lightning_smoe.models.streamed import Streamed
from lightning_smoe.models.trial_run import check_runs
from tests.calibration.batches import gather, random_windows
from tests.cli.command import Workplace, check_refusal, snapshot
from tests.compression.plans import whole_plan
from tests.families import build
from tests.models.pruning import save_pruned, store_tensors, stored_tensors

NOT_AS_WRITTEN = r"is not as it was written: its hash is another"


def flip(path: Path, place: int) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def places_of_data(path: Path, count: int) -> list[int]:
    """Places all over the tensors of a safetensors file, the first and the last among them."""
    size = path.stat().st_size
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return [start + (size - 1 - start) * i // (count - 1) for i in range(count)]


def test_a_flipped_bit_in_statistics_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    gather(build("mixtral"), random_windows(2)).save(path)
    whole = path.read_bytes()
    header = range(8, whole.index(b'"sha256') if b'"sha256' in whole else 400, 37)
    for place in (*places_of_data(path, 8), *header):
        flip(path, place)
        with pytest.raises(InputError, match=r"statistics\.safetensors (is|holds) .*calibrate"):
            Statistics.load(path)
        path.write_bytes(whole)
    Statistics.load(path)


def test_a_flipped_bit_in_the_shares_of_a_plan_is_found(tmp_path: Path) -> None:
    path, beside = tmp_path / "plan.json", tmp_path / "plan.safetensors"
    whole_plan().save(path)
    whole = beside.read_bytes()
    for place in places_of_data(beside, 6):
        flip(beside, place)
        with pytest.raises(InputError, match=rf"plan\.safetensors {NOT_AS_WRITTEN}; delete plan"):
            CompressionPlan.load(path)
        beside.write_bytes(whole)
    CompressionPlan.load(path)


def test_shares_that_a_person_wrote_need_no_hash(tmp_path: Path) -> None:
    path, beside = tmp_path / "plan.json", tmp_path / "plan.safetensors"
    whole_plan().save(path)
    changed = {name: shares * 2 for name, shares in load_file(beside).items()}
    save_file(changed, beside)
    for layer in CompressionPlan.load(path).layers:
        if layer.weights is not None:
            torch.testing.assert_close(layer.weights, changed[layer.name].double())


def test_a_flipped_bit_in_a_compressed_folder_is_found(
    saved_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "compressed"
    save_pruned(saved_checkpoint("qwen3_moe"), folder, 8)
    fingerprint = open_checkpoint(folder).fingerprint
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for place in places_of_data(weights, 4):
        flip(weights, place)
        with pytest.raises(InputError, match=rf"model\.safetensors {NOT_AS_WRITTEN}; copy the fol"):
            _ = open_checkpoint(folder).fingerprint
        weights.write_bytes(whole)
    assert open_checkpoint(folder).fingerprint == fingerprint


@pytest.mark.parametrize(
    "content",
    [
        {"experts_per_layer": [1]},
        {"experts_per_layer": {"a": 3}},
        {"experts_per_layer": {"0": None}},
        {"experts_per_layer": {"0": -3}},
        {"manifest": 3},
        {"manifest": {"step": "compress"}},
        {"manifest": {"step": 1, "inputs": [], "versions": None}},
    ],
)
def test_junk_in_smoe_json_is_named(
    content: object, saved_checkpoint: Callable[[str], Path]
) -> None:
    folder = saved_checkpoint("qwen3_moe")
    (folder / "smoe.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"smoe\.json (is damaged|names layers without experts)"):
        load(folder)


def test_brackets_without_end_are_no_configuration(saved_checkpoint: Callable[[str], Path]) -> None:
    folder = saved_checkpoint("qwen3_moe")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"config\.json is not JSON \(.*\); copy the file again"):
        load(folder)


def streamed(folder: Path) -> Residence:
    return Streamed(open_checkpoint(folder), torch.float32)


def in_memory(folder: Path) -> Residence:
    return InMemory(load(folder))


def read_all(residence: Residence) -> None:
    """Brings every weight once."""
    cpu = torch.device("cpu")
    with residence.outside(cpu):
        pass
    for index in range(residence.num_layers):
        with residence.layer(index, cpu):
            pass


ROUTER, EXPERT = "model.layers.2.mlp.gate.weight", "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize("residence", [in_memory, streamed])
@pytest.mark.parametrize(
    ("key", "bad", "named"),
    [
        ("lm_head.weight", math.nan, r"lm_head\.weight"),
        ("model.norm.weight", math.inf, r"model\.norm\.weight"),
        (ROUTER, math.nan, r"model\.layers\.2\.mlp\.gate\.weight"),
        (EXPERT, -math.inf, r"model\.layers\.2\.mlp\.experts\.gate_up_proj"),
    ],
)
def test_weights_that_are_no_numbers_are_named_when_they_are_read(
    residence: Callable[[Path], Residence],
    key: str,
    bad: float,
    named: str,
    saved_checkpoint: Callable[[str], Path],
) -> None:
    folder = saved_checkpoint("qwen3_moe")
    tensors = stored_tensors(folder)
    tensors[key].view(-1)[-1] = bad
    store_tensors(folder, tensors)
    with pytest.raises(InputError, match=rf"qwen3_moe: {named} holds NaN or infinite numbers"):
        read_all(residence(folder))


def test_sums_that_overflow_are_no_damage(saved_checkpoint: Callable[[str], Path]) -> None:
    folder = saved_checkpoint("qwen3_moe")
    tensors = stored_tensors(folder)
    tensors["model.norm.weight"].fill_(2e38)
    store_tensors(folder, tensors)
    load(folder)


@pytest.mark.parametrize("residence", [in_memory, streamed])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("deepseek_v3", {"topk_group": 4}),
        ("deepseek_v3", {"num_key_value_heads": 1}),
        ("mixtral", {"num_experts_per_tok": 13}),
    ],
)
def test_a_config_that_only_the_forward_pass_refutes_is_refused(
    residence: Callable[[Path], Residence],
    family: str,
    fields: dict[str, int],
    saved_checkpoint: Callable[[str], Path],
) -> None:
    folder = saved_checkpoint(family)
    check_runs(residence(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(InputError, match=r"cannot run as its config\.json says \(\w+Error: .*copy"):
        check_runs(residence(folder))


@pytest.mark.parametrize("residence", [in_memory, streamed])
@pytest.mark.parametrize("count", [8, 11, 13, 40])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_config_that_lies_about_the_number_of_experts_is_refused(
    residence: Callable[[Path], Residence],
    count: int,
    family: str,
    saved_checkpoint: Callable[[str], Path],
) -> None:
    folder = saved_checkpoint(family)
    path = folder / "config.json"
    fields = ("num_experts", "num_local_experts", "n_routed_experts")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {f: count for f in fields if f in config}))
    with pytest.raises(InputError, match=r"cannot be loaded|lacks \d+ tensors|shape|cannot be rea"):
        read_all(residence(folder))


@pytest.mark.parametrize("layers", [4, 10**9])
def test_a_config_that_lies_about_the_number_of_layers_is_refused(
    layers: int, saved_checkpoint: Callable[[str], Path]
) -> None:
    folder = saved_checkpoint("mixtral")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(
        InputError, match=r"lacks \d+ tensors|says num_hidden_layers=1000000000, and"
    ):
        load(folder)


@pytest.mark.parametrize("residence", [in_memory, streamed])
def test_a_tensor_of_another_shape_is_refused(
    residence: Callable[[Path], Residence], saved_checkpoint: Callable[[str], Path]
) -> None:
    folder = saved_checkpoint("qwen3_moe")
    whole = stored_tensors(folder)
    for key in (ROUTER, EXPERT, "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        store_tensors(folder, whole | {key: whole[key][:-1].clone()})
        with pytest.raises(InputError, match=r"cannot be loaded|shape|cannot be read"):
            read_all(residence(folder))


def test_states_that_are_no_numbers_are_named_before_they_spoil_the_sums() -> None:
    model = build("qwen3_moe")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(math.inf)
    match = (
        r"model\.layers\.2\.mlp: NaN or infinite numbers reach the router, so the states overflo"
    )
    with pytest.raises(InputError, match=match):
        gather(model, random_windows(2))


def test_states_that_overflow_in_float16_are_refused(work: Workplace) -> None:
    tensors = stored_tensors(work.folder / "model")
    # Numbers, but their products are too large.
    for name in ("v", "o"):
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"].mul_(1e6).clamp_(-6e4, 6e4)
    store_tensors(work.folder / "model", tensors)
    work.done("calibrate", "--model.output_dir=wide")
    match = r"gives states that are NaN or infinite, in torch\.float16; set model\.dtype=float32"
    check_refusal(work.do("calibrate", "--model.dtype=float16"), match)
    assert not (work.out / "statistics.safetensors").exists()


def test_damage_to_results_is_found_and_overwrite_repairs_it(work: Workplace) -> None:
    words = ("--model.baselines=false", "--model.recipe.refit=null")
    work.done("compress", *words)
    before = snapshot(work.out / "compressed")
    with safe_open(work.out / "statistics.safetensors", "pt") as file:
        assert file.metadata()
    flip(work.out / "statistics.safetensors", -1)
    (work.out / "plan.json").unlink()
    shutil.rmtree(work.out / "compressed")
    match = rf"statistics\.safetensors {NOT_AS_WRITTEN}; run calibrate again with model\.overwrite"
    work.refused(match, "compress", *words)
    work.done("compress", *words, "--model.overwrite=true")
    assert snapshot(work.out / "compressed") == before
    flip(work.out / "compressed/model.safetensors", -1)
    match = rf"compressed/model\.safetensors {NOT_AS_WRITTEN}"
    work.refused(match, "evaluate", *words)
