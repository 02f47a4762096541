"""Runs the tests of every family, and writes the table of what they showed into the rooms' README.

`python scripts/families.py` takes one to two minutes on a CPU core.
"""

import datetime
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers
from transformers import PreTrainedModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lightning_smoe.calibration.observer import Batch, observing  # noqa: E402  # found by the path
from lightning_smoe.errors import InputError  # noqa: E402
from lightning_smoe.functional.evidence import TokenSample  # noqa: E402
from lightning_smoe.functional.routing import infer_routing_rule  # noqa: E402
from lightning_smoe.models.folder import open_checkpoint  # noqa: E402
from lightning_smoe.models.layer import MoELayer, find_moe_layers  # noqa: E402
from lightning_smoe.models.refusals import REFUSED  # noqa: E402
from tests.families import ALL_FAMILIES, VOCAB_SIZE, build  # noqa: E402

TESTS = ROOT / "tests" / "models" / "test_families.py"
README = ROOT / "lightning_smoe" / "models" / "README.md"
BEGIN, END = "<!-- written by scripts/families.py -->", "<!-- end -->"
WAYS = ("prune", "lse", "map")


@dataclass
class Results:
    """What the tests showed.

    Args:
        ways: What became of a family in a way of compressing it.
        refused: Families that were refused with their reasons.
        passed: Whether every test did.
    """

    ways: dict[tuple[str, str], str]
    refused: set[str]
    passed: bool


def run_tests() -> Results:
    """Runs the tests in a process of their own, whose modules are checked as they are imported."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
        # Another kind of report leaves out what a test notes of itself.
        command += ["-o", "junit_family=xunit1"]
        ended = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False)  # noqa: S603  # our own
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314  # just written
    results = Results({}, set(), ended.returncode == 0)
    for case in cases:
        match = re.search(r"\[(\w+)(?:-(\w+))?\]$", case.get("name", ""))
        fails = case.find("failure") is not None or case.find("error") is not None
        if match is None or (match.group(2) is None and fails):
            continue
        family, way = match.groups()
        reasons = [p.get("value") for p in case.iter("property") if p.get("name") == "refused"]
        if way is None:
            results.refused.add(family)
        elif way in WAYS:
            says = f"refused: {reasons[0]}" if reasons else "yes"
            results.ways[family, way] = "FAILS" if fails else says
    return results


def scoring(model: PreTrainedModel, layer: MoELayer) -> str:
    """How the router weighs what it selects, found out from what it does."""
    found: list[TokenSample] = []
    tokens = torch.randint(2, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.ones(tokens.numel()).bool(), torch.zeros(tokens.numel()).long())

    def note(_: MoELayer, routed: object) -> None:
        names = ("states", "router_logits", "routing_weights", "expert_indices")
        found.append(TokenSample(*(getattr(routed, name) for name in names)))

    with torch.no_grad(), observing([layer], lambda: batch, note):
        model(tokens)
    try:
        rule = infer_routing_rule(found[0])
    except InputError:
        return "a rule of its own"
    return f"{rule.score}, {'renormalised' if rule.normalize_weights else 'as it is'}"


def router_of(model: PreTrainedModel) -> str:
    """What is special about the routers of a family."""
    layer = find_moe_layers(model)[0]
    kinds = [tensor.kind for tensor in layer.router_tensors]
    special = {
        "bias": "bias" in kinds,
        "selection bias or scale": "selection" in kinds,
        "groups": layer.num_router_groups > 1,
        "rows of shared experts": any(t.num_shared for t in layer.router_tensors),
    }
    return ", ".join([scoring(model, layer), *(name for name, is_so in special.items() if is_so)])


def layout_of(model: PreTrainedModel) -> str:
    """How a family's experts lie in its files and in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        keys = list(open_checkpoint(folder).tensors)
    layers = find_moe_layers(model)
    experts = layers[0].experts
    weights = layers[0].weights()
    special = {
        "a key an expert": any(re.search(r"\.experts\.\d+\.", key) for key in keys),
        "transposed": experts.is_transposed,
        "interleaved": not experts.is_concatenated,
        "biases": weights.up_bias is not None,
        "no gate": weights.gate_proj is None,
        "shared expert": any(layer.parameters_of("shared") for layer in layers),
        "other layers between": len(layers) < model.config.get_text_config().num_hidden_layers,
    }
    named = [name for name, is_so in special.items() if is_so]
    return ", ".join(named if special["a key an expert"] else ["stacked", *named])


def table(results: Results) -> list[str]:
    """The lines of the table."""
    lines = [
        "| family | router | experts | prune | merge + lse | map |",
        "|---|---|---|---|---|---|",
    ]
    for family in sorted(ALL_FAMILIES):
        model = build(family)
        ways = (results.ways.get((family, way), "not run") for way in WAYS)
        lines.append(f"| {family} | {router_of(model)} | {layout_of(model)} | {' | '.join(ways)} |")
    lines += ["", "| refused family | reason |", "|---|---|"]
    return lines + [f"| {name} | {REFUSED[name]} |" for name in sorted(results.refused)]


def main() -> int:
    """Runs the tests and writes the table; 0 if every test passed."""
    transformers.utils.logging.disable_progress_bar()
    results = run_tests()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607  # whichever git is there
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    head = (
        f"{len(ALL_FAMILIES)} families, {datetime.date.today()}, commit {commit}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}: 12 experts to 8, saved, reloaded "
        "with the same bits, keys and types as in the original."
    )
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    written = "\n".join([BEGIN, "", head, "", *table(results), "", END])
    README.write_text(before + written + after)
    return 0 if results.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
