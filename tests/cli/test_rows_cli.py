"""Training on answers to prompts, on weighted domains, and on text that stands in two splits."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import Workplace, check_refusal
from tests.cli.trainings import SHORT, changed, held_out, to_train

NUM_ROWS = {"train": 60, "valid": 20, "test": 20}


def write_rows(folder: Path) -> dict[str, str]:
    """Sums and orders as rows of prompt and completion, two domains for each split but calib."""
    for place, (split, count) in enumerate(NUM_ROWS.items()):
        (folder / split).mkdir(parents=True)
        for domain, verb in (("sort", "Sort"), ("reverse", "Turn around")):
            rows = [
                {
                    "prompt": f"{verb} {n} {place} {n * 7 % 10}: " * (1 + n % 3),
                    "completion": f"{place} {n}",
                }
                for n in range(count)
            ]
            lines = "\n".join(json.dumps(row) for row in rows)
            (folder / split / f"{domain}.jsonl").write_text(lines)
    return {f"data.{split}": str(folder / split) for split in NUM_ROWS}


@pytest.mark.parametrize("pack", [True, False])
def test_answers_are_learned_from_rows(pack: bool, work: Workplace, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    work.write({**SHORT, **rows, "data.train_tokens": None, "data.pack": pack})
    told = work.done("fit", "--model.recovery.trainable=[router,experts]").err
    (count,) = re.findall(r"train: \d+ tokens in (\d+) x 64", told)
    assert int(count) < 120 if pack else int(count) == 120
    start, *later = held_out(work)
    assert min(later) < start
    assert "model.layers.0.mlp.gate.weight" in changed(work)
    judged = json.loads((work.out / "report.json").read_text())["models"]
    assert judged["recovered"]["kl"]["domains"].keys() == {"sort", "reverse"}


def test_rows_that_would_see_each_other_are_refused(
    new_workplace: Callable[[Path, str], Workplace], tmp_path: Path
) -> None:
    work = new_workplace(tmp_path / "work", "gpt_oss")
    work.write({**write_rows(tmp_path / "rows"), "model.baselines": False})
    match = r"a gpt_oss lets documents .* see each other; .* data\.pack=false"
    cache = "--model.recovery.teacher.cache={top_k: 4}"
    for verb, *words in (("cache", cache), ("fit",), ("evaluate",)):
        check_refusal(work.do(verb, *words), match)
    assert not (work.out / "recovered").exists()
    assert not list(work.out.glob("teacher/*.safetensors"))
    work.done("compress", "--data.pack=false", "--model.output_dir=apart")


def test_domains_are_drawn_by_weight(finished: Workplace) -> None:
    work = to_train(finished)
    logging = ("--trainer.logger=true", "--trainer.log_every_n_steps=1")
    work.refused("domain_weights leaves out lit", "fit", "--data.domain_weights={arith: 1}")
    work.done("fit", "--data.domain_weights={arith: 1, lit: 0}", *logging)
    points = json.loads((work.out / "training/curve.json").read_text())
    assert {"valid/kl/arith", "valid/kl/lit"} <= points[0].keys()
    weighted = changed(work)
    assert weighted
    match = r"recovered holds the result of another run \(different: order\)"
    check_refusal(work.do("fit"), match)


def test_text_that_stands_in_two_splits_is_refused(work: Workplace) -> None:
    match = r"the train and valid text share \d+ documents of 200 characters .*domain 'lit'"
    source = work.folder / "text/valid/lit.txt"
    (work.folder / "text/train/lit.txt").write_text(source.read_text())
    work.refused(match, "fit")
    work.refused(r"data\.train and data\.valid both read .*arith", "fit", "--data.valid=text/train")
