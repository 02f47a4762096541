"""Checkpoints in 4 or 8 bits: what is read of them, and what is written of that."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load
from lightning_smoe.models.folder import open_checkpoint
from lightning_smoe.models.quantised import (
    BlockFloat8,
    MicroscaledFloat4,
    Quantisation,
    quantisation_of,
)
from lightning_smoe.models.streamed import Streamed
from tests.families import ALL_FAMILIES
from tests.models.pruning import load_stock, save_pruned, store_tensors, stored_tensors

FLOAT8, MXFP4 = {"quant_method": "fp8", "weight_block_size": [16, 24]}, {"quant_method": "mxfp4"}


def configure(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def in_float8(matrix: Tensor, rows: int = 16, columns: int = 24) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bits, and the scale of each of its blocks, the last of which may be cut."""
    scales = torch.empty(-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns))
    found = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = matrix[place].abs().max() / 448
            found[place] = (matrix[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return found, scales


def float8_checkpoint(path: Path) -> dict[str, Tensor]:
    """Stores the matrices of experts and attention in 8 bits; returns what they are in 16."""
    plain, stored = {}, {}
    for key, tensor in stored_tensors(path).items():
        plain[key] = stored[key] = tensor.bfloat16()
        if ".experts." in key or "_a_proj" in key:
            stored[key], scales = in_float8(tensor)
            stored[f"{key}_scale_inv"] = scales
            # Slowly, number by number.
            wide = scales[torch.arange(tensor.shape[0]) // 16][
                :, torch.arange(tensor.shape[1]) // 24
            ]
            plain[key] = (stored[key].float() * wide).bfloat16()
    store_tensors(path, stored)
    configure(path, quantization_config=FLOAT8, dtype="bfloat16")
    return plain


def mxfp4_checkpoint(path: Path) -> dict[str, Tensor]:
    """Stores the experts' matrices in random 4 bits; returns what transformers makes of them."""
    plain, stored = {}, {}
    generator = torch.Generator().manual_seed(0)
    for key, tensor in stored_tensors(path).items():
        plain[key] = stored[key] = tensor.bfloat16()
        if tensor.dim() == 3:
            count, columns, rows = tensor.shape
            del stored[key]
            size = (count, rows, columns // 32, 16)
            blocks = torch.randint(256, size, generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, size[:-1], generator=generator, dtype=torch.uint8)
            stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks, scales
            plain[key] = convert_moe_packed_tensors(blocks, scales)
    store_tensors(path, stored)
    configure(path, quantization_config=MXFP4, dtype="bfloat16")
    return plain


def original(family: str, folder: Path) -> None:
    config: Any = ALL_FAMILIES[family]()
    if family == "gpt_oss":
        # Groups of 32 numbers in 4 bits share an exponent.
        config.intermediate_size = 32
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@pytest.fixture(scope="module", params=["deepseek_v3", "gpt_oss"])
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A quantised checkpoint, and the same in bfloat16."""
    path, plain = tmp_path_factory.mktemp("quantised"), tmp_path_factory.mktemp("plain")
    original(request.param, path)
    make = float8_checkpoint if request.param == "deepseek_v3" else mxfp4_checkpoint
    original(request.param, plain)
    store_tensors(plain, make(path))
    configure(plain, dtype="bfloat16")
    return path, plain


def test_its_weights_are_those_of_the_same_checkpoint_in_16_bits_and_a_line_says_so(
    quantised: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = load(quantised[0]).state_dict()
    assert "weights are de-quantised to bfloat16" in caplog.text
    expected = load(quantised[1]).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


def test_its_layers_are_read_one_by_one_with_the_same_bits(
    quantised: tuple[Path, Path],
) -> None:
    whole, residence = load(quantised[0]), Streamed(open_checkpoint(quantised[0]))
    with residence.layer(1, torch.device("cpu")) as decoder:
        expected = whole.get_submodule("model.layers.1").state_dict()
        for key, tensor in decoder.state_dict().items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)


def test_what_is_compressed_is_stored_in_16_bits_without_a_word_of_quantisation(
    quantised: tuple[Path, Path], tmp_path: Path
) -> None:
    save_pruned(quantised[0], tmp_path / "of quantised", 8)
    save_pruned(quantised[1], tmp_path / "of plain", 8)
    config = json.loads((tmp_path / "of quantised" / "config.json").read_text())
    assert config == json.loads((tmp_path / "of plain" / "config.json").read_text())
    found, expected = (stored_tensors(tmp_path / name) for name in ("of quantised", "of plain"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
    load_stock(tmp_path / "of quantised")


def test_one_scale_for_a_matrix_is_read() -> None:
    values = torch.tensor([[1.0, -2.0], [0.5, 448.0]]).to(torch.float8_e4m3fn)
    found = BlockFloat8(None).dequantise(values, torch.tensor(0.5))
    assert found.tolist() == [[0.5, -1.0], [0.25, 224.0]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "fp8"}, BlockFloat8((128, 128))),
        ({"quant_method": "fp8", "weight_block_size": None}, BlockFloat8(None)),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, MicroscaledFloat4()),
        ({}, None),
        (None, None),
    ],
)
def test_the_method_is_known_by_its_settings(
    settings: dict[str, Any] | None, expected: Quantisation | None
) -> None:
    assert quantisation_of({"quantization_config": settings}, "here") == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq"},
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"bits": 4},
        "fp8",
    ],
    ids=str,
)
def test_any_other_method_is_refused_with_what_to_do(settings: Any) -> None:
    message = r"here is quantised; compress the original weights, .*again \(.* is not read, fp8"
    with pytest.raises(InputError, match=message):
        quantisation_of({"quantization_config": settings}, "here")


@pytest.mark.parametrize(
    ("quantisation", "entries", "message"),
    [
        (BlockFloat8((128, 128)), {"a.weight": "F8_E4M3"}, "a.weight is stored in 8 bits"),
        (BlockFloat8((128, 128)), {"a": "F8_E4M3", "a_scale_inv": "U8"}, "in U8, which is not"),
        (MicroscaledFloat4(), {"a_blocks": "U8"}, "a_blocks has no a_scales beside it"),
    ],
)
def test_a_tensor_whose_scales_are_not_there_is_refused(
    quantisation: Quantisation, entries: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        quantisation.plain({key: {"dtype": dtype, "shape": []} for key, dtype in entries.items()})
