"""The model card says what the checkpoint is, under which licence, and how it loads."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.card import model_card
from lightning_smoe.models.folder import CheckpointFolder

MANIFEST = Manifest("compress", {}, {"torch": "2.13.0"})
BEFORE = {"model.layers.0.mlp": 12, "model.layers.2.mlp": 12}
EVEN = dict.fromkeys(BEFORE, 8)
UNEVEN = {"model.layers.0.mlp": 12, "model.layers.2.mlp": 6}


def card_of(source: Path, after: dict[str, int], before: dict[str, int] = BEFORE) -> str:
    return model_card(
        "tiny, compressed",
        CheckpointFolder(source),
        before=before,
        after=after,
        steps=["Experts pruned.", "Router repaired by Slice()."],
        manifest=MANIFEST,
    )


def front_matter(card: str) -> dict[str, Any]:
    _, fields, text = card.split("---\n", 2)
    assert text.startswith("# tiny, compressed\n")
    found: dict[str, Any] = yaml.safe_load(fields)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    folder.mkdir()
    return folder


def test_the_licence_and_languages_of_the_original_stay(source: Path) -> None:
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: qwen-r\u00e9search\nlicense_link: LICENSE\n"
        "language: [en, es]\nlibrary_name: mlx\nmodel-index: [x]\n---\n# Original\n---\n",
        encoding="utf-8",
    )
    assert front_matter(card_of(source, EVEN)) == {
        "license": "other",
        "license_name": "qwen-r\u00e9search",
        "license_link": "LICENSE",
        "language": ["en", "es"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "original",
    }


@pytest.mark.parametrize("text", [None, "", "# No front matter\n", "---\n---\n# Empty\n"])
def test_an_original_without_fields_gives_a_card_without_licence(
    source: Path, text: str | None
) -> None:
    if text is not None:
        (source / "README.md").write_text(text)
    assert front_matter(card_of(source, EVEN)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "original",
    }


@pytest.mark.parametrize(
    "text",
    [b"---\nlicense: [\n---\n", b"---\n- 1\n---\n", b"---\nlicense: caf\xe9: x\n---\n"],
)
def test_a_card_that_cannot_be_read_costs_a_warning_and_not_the_model(
    source: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "README.md").write_bytes(text)
    with caplog.at_level(logging.WARNING, logger="lightning_smoe"):
        fields = front_matter(card_of(source, EVEN))
    assert "license" not in fields
    assert f"{source}/README.md" in caplog.text
    assert "licence" in caplog.text


def test_even_counts_load_in_stock_transformers(source: Path) -> None:
    card = card_of(source, EVEN)
    assert "Every mixture-of-experts layer has 8 routed experts where the original has 12." in card
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card
    assert "lightning_smoe" not in card


def test_uneven_counts_are_told_layer_by_layer_with_the_loader_they_need(source: Path) -> None:
    card = card_of(source, UNEVEN)
    assert "* model.layers.0.mlp: 12 -> 12 experts\n" in card
    assert "* model.layers.2.mlp: 12 -> 6 experts\n" in card
    assert "The layers have different numbers of experts." in card
    assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in card


def test_shared_experts_load_with_the_code_beside_them(source: Path) -> None:
    card = model_card(
        "tiny, compressed",
        CheckpointFolder(source),
        before=BEFORE,
        after=UNEVEN,
        steps=[],
        manifest=MANIFEST,
        mapped=True,
    )
    assert "* model.layers.2.mlp: 12 -> 6 experts\n" in card
    assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in card
    assert "checkpoint import load" not in card


def test_uneven_layers_that_become_even_load_in_stock_transformers(source: Path) -> None:
    card = card_of(source, EVEN, before=UNEVEN | {"model.layers.0.mlp": 9})
    assert "* model.layers.0.mlp: 9 -> 8 experts\n" in card
    assert "AutoModelForCausalLM" in card


def test_steps_and_versions_are_listed(source: Path) -> None:
    card = card_of(source, EVEN)
    assert "compressed from `original`" in card
    assert "\n* Experts pruned.\n* Router repaired by Slice().\n" in card
    assert "\n* torch 2.13.0\n" in card
