"""REAP of this project beside llm-compressor's, from checkpoint to pruned checkpoint."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import bench_machine
from bench_cost import told

from lightning_smoe.experiment import Experiment

SCRIPTS = Path(__file__).parent
TOKENIZER = SCRIPTS.parent / "checkpoints" / "qwen2moe-tiny-8dom"
DOMAINS = ["arith", "docs", "lit", "python"]
SEQUENCE, TOKENS = 512, 2048

# Written in processes of their own, so that this one stays small.
_MODEL = """
import shutil, sys, torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=8192, hidden_size=512, num_hidden_layers={layers}, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, intermediate_size=192, moe_intermediate_size=192,
    num_experts={experts}, num_experts_per_tok=8, norm_topk_prob=True, tie_word_embeddings=False,
    max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, pad_token_id=1,
)
Qwen3MoeForCausalLM(config).save_pretrained(sys.argv[1])
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(f"{{sys.argv[2]}}/{{name}}", sys.argv[1])
"""
_TOKENS = """
import json, sys
from lightning_smoe.data.text import TextDataModule
data = TextDataModule(tokenizer=sys.argv[1], **json.load(open(sys.argv[2])))
rows = [row for batch in data.predict_dataloader() for row in batch["input_ids"].tolist()]
json.dump(rows, open(sys.argv[3], "w"))
"""


@dataclass(frozen=True)
class Candidate:
    """A way to prune a checkpoint.

    Args:
        name: What the table calls it.
        command: The process, before its target folder.
        settings: What follows the target folder.
    """

    name: str
    command: list[str]
    settings: list[str] = field(default_factory=list)


def peers(environment: Path, rounds: int) -> None:
    """Prints CPU-seconds and peak memory of all, round by round in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model", layers=8, experts=128)
        data = write_data(folder, TOKENS)
        run([sys.executable, "-c", _TOKENS, str(model), str(data), str(folder / "tokens.json")])
        theirs = [str(environment / "bin" / "python"), str(SCRIPTS / "bench_llmcompressor.py")]
        theirs += [str(model), str(folder / "tokens.json")]
        ours = [sys.executable, str(SCRIPTS / "bench_own.py"), str(model), str(data)]
        candidates = [
            Candidate("llm-compressor, fastest", theirs, ["false"]),
            Candidate("llm-compressor, default", theirs, ["true"]),
            *own_candidates(ours),
        ]
        costs = {candidate.name: [] for candidate in candidates}
        for number in range(rounds):
            for candidate in candidates:
                target = folder / f"{candidate.name}-{number}"
                costs[candidate.name].append(cost_of(candidate, target))
                run(["rm", "-r", str(target)])
        show(costs)
        bench_machine.tell(("torch", "transformers"), environment)


def own_candidates(command: list[str]) -> Iterator[Candidate]:
    """This project's settings."""
    if "stream" not in {field.name for field in fields(Experiment)}:
        yield Candidate("lightning_smoe", command)
        return
    for name, stream in (("in memory", "false"), ("layer by layer", "true")):
        yield Candidate(f"lightning_smoe, {name}", command, [f"stream={stream}"])


def write_model(target: Path, *, layers: int, experts: int) -> Path:
    """Writes a random qwen3_moe in float32, with experts of 512 x 192."""
    text = _MODEL.format(layers=layers, experts=experts)
    run([sys.executable, "-c", text, str(target), str(TOKENIZER)])
    return target


def text_of(tokens: int) -> dict[str, object]:
    """Settings of the text: one sequence a batch, as llm-compressor takes them."""
    settings = {"sequence_length": SEQUENCE, "calib_tokens": tokens, "batch_size": 1}
    return {**settings, "domains": DOMAINS}


def write_data(folder: Path, tokens: int) -> Path:
    """Writes the settings of the text."""
    path = folder / f"data-{tokens}.json"
    path.write_text(json.dumps(text_of(tokens)))
    return path


def cost_of(candidate: Candidate, target: Path) -> dict[str, object]:
    """Runs a candidate in a process of its own, on one thread."""
    return told(run([*candidate.command, str(target), *candidate.settings]))


def run(command: list[str]) -> str:
    """What a process printed.

    Raises:
        RuntimeError: It failed.
    """
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    paths = {"PYTHONPATH": str(SCRIPTS.parent)} if "llmcompressor" not in command[1] else {}
    environment = {**os.environ, **settings, **paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - commands of this file
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr[-2000:]}")
    return done.stdout


def show(costs: dict[str, list[dict[str, object]]]) -> None:
    """Prints medians and their ratios to the first, as Markdown."""
    rows = {name: bench_machine.medians(found) for name, found in costs.items()}
    first = next(iter(rows.values()))
    print("\n| | CPU-seconds | ratio | peak memory, MB | ratio | of the seconds |")
    print("|---|---|---|---|---|---|")
    for name, (seconds, megabytes, parts) in rows.items():
        time_ratio, memory_ratio = seconds / first[0], megabytes / first[1]
        print(
            f"| {name} | {seconds:.1f} | {time_ratio:.2f} | {megabytes:,.0f} | {memory_ratio:.2f} "
            f"| {parts} |"
        )
