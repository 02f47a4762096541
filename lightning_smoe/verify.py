"""The verify verb: whether a checkpoint folder is whole, and how it differs from its original."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lightning_smoe.data.packing import load_tokenizer
from lightning_smoe.errors import InputError
from lightning_smoe.models.checkpoint import load, outline
from lightning_smoe.models.comparison import (
    Comparison,
    check_comparable,
    compare_folders,
    config_differences,
    file_differences,
)
from lightning_smoe.models.folder import CheckpointFolder, open_checkpoint
from lightning_smoe.models.inventory import (
    Advance,
    Check,
    check_finite,
    check_hashes,
    check_index,
    check_tensors,
)
from lightning_smoe.models.memory import available_memory
from lightning_smoe.models.origins import LayerOrigin
from lightning_smoe.models.stored import stored_bytes, stored_type
from lightning_smoe.models.tensor_reader import TensorReader

# Lines of one check that are shown.
_MOST_LINES = 10
_NEW_TOKENS = 16


def verify(checkpoint: str, original: str | None, prompt: str) -> None:
    """Prints what was checked and found; writes nothing.

    Args:
        checkpoint: The folder.
        original: What it was made from, to compare with; none compares nothing.
        prompt: Text to continue.

    Raises:
        InputError: Something is wrong with the folder, and what.
    """
    folder = open_checkpoint(checkpoint)
    source = None if original is None else open_checkpoint(original)
    if not prompt:
        raise InputError("the prompt is empty; give --prompt some text")
    if source is not None:
        check_comparable(folder, source)
    console = Console()
    with _bar(_num_bytes(folder, source)) as advance:
        checks = list(_look(folder, advance))
        whole = not any(check.wrong for check in checks)
        comparison = None
        if source is not None and whole:
            comparison = compare_folders(folder, source, advance)
    checks += _try_out(folder, prompt) if whole else []
    _show(console, folder, checks)
    if source is not None and comparison is not None:
        _show_comparison(console, folder, source, comparison)
    wrong = [line for check in checks for line in check.wrong]
    if wrong:
        raise InputError(
            f"{folder.path} is not whole: {wrong[0]}"
            f"{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}; copy or make it again"
        )
    console.print(f"{folder.path} is whole.", soft_wrap=True, highlight=False, markup=False)


def _num_bytes(folder: CheckpointFolder, source: CheckpointFolder | None) -> int:
    """Bytes that will be read: once for the hashes, for the numbers and for a comparison."""
    noted: Any = folder.manifest.get("files")
    names: list[str] = list(noted) if isinstance(noted, dict) else []
    hashed = [folder.path / name for name in names]
    sizes = [path.stat().st_size for path in hashed if path.is_file()]
    return (1 if source is None else 2) * folder.num_bytes + sum(sizes)


@contextmanager
def _bar(num_bytes: int) -> Iterator[Advance]:
    columns = (TextColumn("verify"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verify", total=num_bytes)
        yield lambda count: progress.advance(task, count)


def _look(folder: CheckpointFolder, advance: Advance) -> Iterator[Check]:
    yield check_tensors(folder)
    with TensorReader(folder) as stored:
        yield check_index(folder, stored)
        yield check_hashes(folder, advance)
        yield check_finite(stored, advance)


def _try_out(folder: CheckpointFolder, prompt: str) -> Iterator[Check]:
    """Loads the model and lets it continue the prompt, if it fits in memory."""
    needed, there = stored_bytes(outline(folder), folder), available_memory()
    if there is not None and needed > there:
        yield Check(
            "reload",
            f"left out: the weights take {needed / 1e9:.1f} GB in memory and {there / 1e9:.1f} GB "
            "are free",
        )
        return
    try:
        # Any: transformers declares no type for what a model can generate.
        model: Any = load(folder.path, stored_type(folder))
    except InputError as error:
        yield Check("reload", "failed", (str(error),))
        return
    yield Check("reload", f"{type(model).__name__} of {model.num_parameters()} parameters")
    try:
        tokenizer: Any = load_tokenizer(folder.path)
    except InputError:
        yield Check("prompt", "left out: the folder holds no tokenizer")
        return
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        bad = not bool(torch.isfinite(model(**inputs).logits).all())
        written = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=_NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    wrong = (f"the logits of the prompt {prompt!r} are not finite",) if bad else ()
    yield Check("prompt", str(tokenizer.decode(written[0])), wrong)


def _show(console: Console, folder: CheckpointFolder, checks: Sequence[Check]) -> None:
    table = Table("Check", "Found", title=escape(str(folder.path)))
    for check in checks:
        lines = [check.says, *check.wrong[:_MOST_LINES]]
        if len(check.wrong) > _MOST_LINES:
            lines.append(f"and {len(check.wrong) - _MOST_LINES} more")
        style = "red" if check.wrong else None
        table.add_row(check.name, escape("\n".join(lines)), style=style)
    console.print(table)


def _show_comparison(
    console: Console, folder: CheckpointFolder, source: CheckpointFolder, found: Comparison
) -> None:
    title = f"Tensors beside those of {source.path}"
    table = Table("Role", "Equal", "Changed", "Other shape", title=escape(title))
    table.add_column("Largest difference")
    table.add_column("Relative (Frobenius)")
    for role, difference in sorted(found.roles.items()):
        counts = (difference.equal, difference.changed, difference.other)
        far = ("", "")
        if difference.changed:
            far = (f"{difference.largest:.3g}", f"{difference.relative:.3g}")
        table.add_row(role, *map(str, counts), *far)
    console.print(table)
    lines = [line for layer in found.layers for line in _describe(layer)]
    lines += [f"config.json: {line}" for line in config_differences(folder, source)]
    lines += [f"{name}: {what}" for name, what in file_differences(folder, source).items()]
    if found.left_out:
        lines.append(f"Left out: {len(found.left_out)} tensors, such as {found.left_out[0]}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _describe(layer: LayerOrigin) -> Iterator[str]:
    """What became of one layer's experts, in one line or two."""
    if layer.is_untouched:
        yield f"{layer.name}: untouched"
        return
    pairs = list(zip(layer.origins, layer.changed, strict=True))
    equal = [str(origin) for origin, changed in pairs if origin is not None and not changed]
    partly = [f"{origin} ({', '.join(c)})" for origin, c in pairs if origin is not None and c]
    counts = f"{layer.num_experts} -> {len(pairs)} experts"
    rows = f"{layer.rows_kept} of {layer.num_rows} router rows are the original's"
    yield f"{layer.name}: {counts}; {rows}"
    if equal:
        yield f"  equal to the original's: {', '.join(equal)}"
    if partly:
        yield f"  changed in part: {', '.join(partly)}"
    if len(equal) + len(partly) < len(pairs):
        yield f"  merged or changed throughout: {len(pairs) - len(equal) - len(partly)}"
