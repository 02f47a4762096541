"""The model card that goes with a compressed checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.folder import CheckpointFolder

logger = logging.getLogger(__name__)

_KEPT_FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")


def model_card(
    title: str,
    source: CheckpointFolder,
    *,
    before: Mapping[str, int],
    after: Mapping[str, int],
    steps: Sequence[str],
    manifest: Manifest,
    mapped: bool = False,
) -> str:
    """Writes what a checkpoint is, what made it, and how it loads.

    Args:
        title: First heading.
        source: The original; the licence on its card is kept.
        before: Routed experts of each layer in the original.
        after: Routed experts of each layer now.
        steps: What was done, a sentence each.
        manifest: What made it.
        mapped: Router rows share experts.
    """
    uneven = len(set(after.values())) > 1
    loading: Sequence[str] = _LOAD_UNEVEN if uneven else _LOAD_STOCK
    if mapped:
        loading = _LOAD_MAPPED
    counts = [f"* {name}: {before[name]} -> {after[name]} experts" for name in after]
    if len(set(before.values())) == 1 and not uneven:
        old, new = next(iter(before.values())), next(iter(after.values()))
        counts = [
            f"Every mixture-of-experts layer has {new} routed experts where the original has {old}."
        ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_front_matter(source), sort_keys=True, allow_unicode=True).strip(),
            "---",
            f"# {title}",
            "",
            f"A mixture-of-experts language model compressed from `{source.name}`.",
            "",
            *counts,
            "",
            *(f"* {step}" for step in steps),
            "",
            "## Loading",
            "",
            *loading,
            "",
            "## Made by",
            "",
            *(f"* {name} {version}" for name, version in manifest.versions.items()),
            "",
        ]
    )


_LOAD_STOCK = (
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    "model = AutoModelForCausalLM.from_pretrained(folder)",
    "tokenizer = AutoTokenizer.from_pretrained(folder)",
    "```",
)

_LOAD_BY_CODE = (
    "",
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
    "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
    "```",
    "",
    "After `import lightning_smoe` it loads without `trust_remote_code`; where that package is "
    "installed, vLLM serves it, too (for the families that its documentation names).",
)

_LOAD_MAPPED = (
    "The router tells apart as many experts as in the original, and several of its rows share one. "
    "The file `modeling_smoe.py` says so to transformers:",
    *_LOAD_BY_CODE,
)

_LOAD_UNEVEN = (
    "The layers have different numbers of experts. The file `modeling_smoe.py` says so to "
    "transformers:",
    *_LOAD_BY_CODE,
)


def _front_matter(source: CheckpointFolder) -> dict[str, Any]:
    """The fields of the original's card that hold for the compressed model too."""
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    card = source.path / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        found = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
        original = dict(found or {})
    except (TypeError, ValueError, yaml.YAMLError) as error:
        # The card comes after the work: it must not cost the compressed model.
        logger.warning("%s cannot be read, add its licence by hand (%s)", card, error)
        original = {}
    fields |= {k: v for k, v in original.items() if k in _KEPT_FIELDS}
    return fields | {"base_model": source.name}
