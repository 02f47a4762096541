"""The README's commands run as they stand, with less text so that they end soon."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lightning_smoe.cli import main
from tests.cli.command import Outcome, run_in
from tests.cli.two_processes import in_two

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PREFIX = "python -m lightning_smoe "
CHARACTERS = 20000
LESS = {
    "data.path": "path/to/text",
    "data.sequence_length": 64,
    "data.train_tokens": 8192,
    "data.calib_tokens": 1024,
    "data.valid_tokens": 512,
    "data.test_tokens": 512,
    "model.baselines": "false",
    "model.recovery.layerwise.tokens": 1024,
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 1,
    "trainer.log_every_n_steps": 1,
}


def blocks() -> list[list[str]]:
    """Command lines of each bash block, without the installing ones, which .ci/run runs itself."""
    found = re.findall(r"^```bash\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    lines = [[x for x in block.splitlines() if x.startswith(PREFIX)] for block in found]
    return [[line.removeprefix(PREFIX) for line in block] for block in lines if block]


def shorten(text: Path) -> None:
    """Takes most of every file out of a folder of text."""
    for path in text.rglob("*.txt"):
        path.write_text(path.read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")


def keep_first_layer(checkpoint: Path) -> None:
    """Takes all decoder layers but the first out of a checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not re.search(r"layers\.[1-9]", name)}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})


def in_one(_: Path, command: Callable[[], Outcome]) -> list[Outcome]:
    """What a command ends with in this process."""
    return [command()]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone holds that commands name, and a model and text of one's own.

    Of the shipped model only the first layer, which has as many experts: the commands are the
    same, in a quarter of the time.
    """
    shipped = ROOT / "checkpoints" / "qwen2moe-tiny-8dom"
    model = tmp_path / "checkpoints" / shipped.name
    shutil.copytree(shipped, model)
    keep_first_layer(model)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "path" / "to").mkdir(parents=True)
    shutil.copytree(model, tmp_path / "path" / "to" / "model")
    shutil.copytree(ROOT / "lightning_smoe" / "data" / "corpus", tmp_path / "path" / "to" / "text")
    shorten(tmp_path / "path" / "to" / "text")
    return tmp_path


def test_readme_has_commands_for_its_own_verbs() -> None:
    verbs = {shlex.split(line)[0] for block in blocks() for line in block}
    assert verbs >= {"inspect", "generate", "plan", "cache", "fit", "sweep", "compare"}


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks(), ids=lambda block: block[0][:40])
def test_commands_of_the_readme_run_one_after_the_other(block: list[str], clone: Path) -> None:
    for line in block:
        words = shlex.split(line)
        if "--config" in words:
            words += [f"--{key}={value}" for key, value in LESS.items()]
        # That the program starts its second process itself is shown in test_start.py.
        starts = in_two if "--trainer.devices" in words else in_one
        every = starts(clone, lambda words=words: run_in(clone, main, *words))  # type: ignore[misc]
        # All of them: what one says of the other is not what went wrong there.
        assert all(done.code == 0 for done in every), every
        assert not any("Traceback" in done.err for done in every)


def test_table_of_the_package_names_every_module() -> None:
    tree = README.partition("## The package")[2]
    package = ROOT / "lightning_smoe"
    files = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__", "errors"}
    rooms = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert not [name for name in files | rooms if name not in tree]
