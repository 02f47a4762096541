"""Nothing that lies in a checkpoint is ever run, and no pickle is ever loaded."""

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lightning_smoe
from tests.cli.command import Workplace, check_refusal

PACKAGE = Path(lightning_smoe.__file__).parent
PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self._mark, "it went off")


def plant(model: Path, mark: Path) -> None:
    """Puts code and pickles into a checkpoint folder that leave a mark when they are run."""
    code = f"from pathlib import Path\nPath({str(mark)!r}).write_text('it ran')\n"
    for name in ("configuration_own", "modeling_own", "tokenization_own", "modeling_smoe"):
        (model / f"{name}.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    own = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "modeling_own.OwnModel",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    tokenizer = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    for name, auto_map in (("config.json", own), ("tokenizer_config.json", tokenizer)):
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    torch.save({"a": Bomb(mark)}, model / "pytorch_model.bin")
    for name in ("tokenizer.pkl", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Bomb(mark)))


def test_code_and_pickles_of_a_checkpoint_are_never_run(work: Workplace) -> None:
    mark = work.folder / "mark"
    plant(work.folder / "model", mark)
    work.done("compress", "--model.stream=false", "--model.recipe.refit=null")
    work.done("calibrate", "--model.stream=true", "--model.output_dir=streamed")
    assert work.run("inspect", "model").code == 0
    assert work.run("generate", "model", "--prompt=Half of 8").code == 0
    assert work.run("verify", "out/compressed", "--original=model").code == 0
    assert not mark.exists()


def test_a_family_that_is_code_only_is_refused_without_running_it(work: Workplace) -> None:
    mark = work.folder / "mark"
    plant(work.folder / "model", mark)
    path = work.folder / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own"}))
    for outcome in (work.do("calibrate"), work.run("inspect", "model")):
        check_refusal(outcome, r"config\.json is not understood: ")
    assert not mark.exists()


def test_pickled_weights_alone_are_refused_without_loading_them(work: Workplace) -> None:
    mark = work.folder / "mark"
    plant(work.folder / "model", mark)
    (work.folder / "model/model.safetensors").unlink()
    work.refused(r"only safetensors weights are read", "calibrate")
    assert not mark.exists()


def test_the_bomb_goes_off_when_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))  # noqa: S301  # what must not be done
    assert (tmp_path / "mark").exists()


def calls_and_imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every call, and all that is imported, by dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def findings(code: str) -> list[str]:
    """What a program does that could run what a file says."""
    found = []
    for name, node in calls_and_imports(ast.parse(code)):
        settings = {k.arg: ast.unparse(k.value) for k in getattr(node, "keywords", [])}
        if name.split(".")[0] in PICKLES and not name.endswith("Error"):
            found.append(name)
        if name in ("eval", "exec", "__import__"):
            found.append(name)
        if name.endswith("torch.load") and settings.get("weights_only") != "True":
            found.append(f"{name} without weights_only")
        if settings.get("trust_remote_code") == "True":
            found.append(f"{name} with trust_remote_code")
    return found


def test_the_package_loads_no_pickle_and_trusts_no_code() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    assert {f.name: findings(f.read_text("utf-8")) for f in files if findings(f.read_text())} == {}


@pytest.mark.parametrize(
    "code",
    [
        "pickle.load(file)",
        "import pickle",
        "from pickle import load",
        "import dill",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_what_would_run_code_is_seen(code: str) -> None:
    assert len(findings(code)) == 1
