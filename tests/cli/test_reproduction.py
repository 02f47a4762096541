"""What was published about the seed's model, beside what this project's reports say."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "lightning_smoe" / "compression" / "REPRODUCTION.md"
CHAT = "qwen1.5-moe-a2.7b-chat"

Tables = Callable[[Path], str]


@pytest.fixture
def tables() -> Tables:
    """The script's function that prints the tables of a checkout."""
    spec = importlib.util.spec_from_file_location(
        "reproduction", ROOT / "scripts" / "reproduction.py"
    )
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found: Tables = script.tables
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The shipped experiments, without results."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def scored(accuracy: float) -> dict[str, Any]:
    return {"tasks": {"mmlu": {"acc": accuracy, "acc_stderr": 0.004}}}


def test_the_page_shows_what_the_script_prints(tables: Tables, checkout: Path) -> None:
    assert tables(checkout) in PAGE.read_text(encoding="utf-8")


def test_a_report_fills_its_row_and_that_of_the_original(tables: Tables, checkout: Path) -> None:
    folder = checkout / "checkpoints" / f"{CHAT}_sub_moe_45"
    folder.mkdir(parents=True)
    report = {"teacher": scored(0.601), "models": {"compressed": scored(0.529)}}
    (folder / "report.json").write_text(json.dumps(report))
    chat, base = tables(checkout).split("\n### ")
    assert "| ours | original | 60 | not run | not run | 0.601 | not run |" in chat
    assert "| ours | `sub_moe` | 45 | not run | not run | 0.529 | not run |" in chat
    assert "| ours | `sub_moe` | 30 | not run | not run | not run | not run |" in chat
    assert "| paper | Sub-MoE | 45 | 0.370 | 0.690 | 0.530 | 0.660 |" in chat
    assert "0.601" not in base


def test_every_published_number_has_a_source_with_a_link() -> None:
    for path in (ROOT / "configs" / "published").glob("*.json"):
        published = json.loads(path.read_text())
        links = {source["name"]: source["link"] for source in published["sources"]}
        assert all(link.startswith("https://") for link in links.values())
        for row in published["rows"]:
            assert row["source"] in links
            assert all(0 < task["acc"] < 1 for task in row["tasks"].values())
