"""Prunes a checkpoint with llm-compressor's REAP, in its own environment, and says what it cost.

    /work/venv_llmc/bin/python scripts/bench_llmcompressor.py CHECKPOINT TOKENS.json TARGET false

The last argument is `moe_calibrate_all_experts`. Of this project it takes only `bench_cost`.
"""

import json
import sys
from pathlib import Path

import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401 - part of starting
from bench_cost import Cost
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Loads, prunes half of the experts, and saves."""
    checkpoint, tokens, target, all_experts = sys.argv[1:]
    rows = json.loads(Path(tokens).read_text())
    cost = Cost()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    cost.note("load")
    masks = [[1] * len(row) for row in rows]
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": masks}),
        recipe=REAPPruningModifier(sparsity=0.5),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        moe_calibrate_all_experts=all_experts == "true",
    )
    cost.note("calibrate and prune")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    cost.note("save")
    cost.tell()


if __name__ == "__main__":
    main()
