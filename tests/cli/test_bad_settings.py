"""Settings that cannot be: one message, code 2, nothing written."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Workplace


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        ("3", r"model\.keep=3 keeps 3 experts in model\.layers\.0\.mlp .*raise model\.keep to 4"),
        ("0.2", r"model\.keep=0\.2 keeps 2 experts .*raise model\.keep to 4 or more"),
        ("1", r"model\.keep=1 keeps 1 experts .*raise model\.keep to 4 or more"),
        ("13", r"model\.keep asks for 13 experts but model\.layers\.0\.mlp has 12"),
        ("0", r"model\.keep is 0; give a fraction in \(0, 1\] or a number of experts"),
        ("6.5", r"model\.keep is 6\.5; a number of experts must be whole"),
        (".inf", r"model\.keep"),
        ("abc", r'key "model\.keep"[\s\S]*Given value: abc'),
        ("null", r'key "model\.keep"'),
    ],
)
def test_impossible_numbers_of_experts_are_refused(keep: str, match: str, work: Workplace) -> None:
    work.refused(match, "plan", f"--model.keep={keep}")


@pytest.mark.parametrize("verb", ["calibrate", "compress", "evaluate"])
def test_every_verb_refuses_before_it_writes(verb: str, work: Workplace) -> None:
    work.refused(r"raise model\.keep to 4 or more", verb, "--model.keep=2", "--trainer.logger=true")


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ("[1]", r"model\.layers names \[1\], which have no experts; these have: \[0, 2\]"),
        ("[0, 7]", r"model\.layers names \[7\], which have no experts; these have: \[0, 2\]"),
        ("[-1]", r"model\.layers names \[-1\], which have no experts"),
        ("[]", r"model\.layers is \[\]; give 'all' or a list"),
        ("2", r'key "model\.layers"'),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: str, match: str, work: Workplace) -> None:
    work.refused(match, "plan", f"--model.layers={layers}")


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("--model.recovery.learning_rate=-1", r"learning_rate=-1.0 must be above 0"),
        (
            "--model.recovery.objectives=[{class_path: lightning_smoe.training.objectives."
            "ForwardKL, init_args: {temperature: 0}}]",
            r"weight and temperature must be above 0",
        ),
        ("--model.recovery.warmup_steps=-2", r"warmup_steps=-2 must be 0 or more"),
        ("--model.recovery.trainable=[]", r"trainable is empty; name router, norm, shared"),
        ("--model.recovery.trainable=[(gate]", r"no regular expression either"),
        ("--model.recovery.trainable=router", r"model\.recovery\.trainable"),
        ("--model.recovery.schedule=step", r"model\.recovery\.schedule[\s\S]*step"),
        ("--model.recipe.refit.strength=0", r"strength=0\.0 must be"),
        ("--model.recipe=Prume", r'key "model\.recipe"[\s\S]*Prume'),
        ("--model.recipe=os.system", r'key "model\.recipe"[\s\S]*os\.system'),
        ("--model.dtype=int8", r"model\.dtype[\s\S]*int8"),
        ("--model.overwrite=maybe", r"model\.overwrite[\s\S]*maybe"),
        ("--trainer.accelerator=gpu", r"gpu"),
        ("--trainer.devices=0", r"devices"),
        ("--trainer.precision=7", r"trainer\.precision[\s\S]*7"),
        ("--trainer.max_steps=-2", r"max_steps"),
        ("--data.batch_size=0", r"data\.batch_size=0 is too small -> set it to 1 or more"),
        ("--data.sequence_length=1", r"data\.sequence_length=1 is too small"),
        ("--data.calib_tokens=63", r"data\.calib_tokens=63 is less than one sequence"),
        ("--data.num_workers=-1", r"data\.num_workers=-1 is too small"),
        ("--seed_everything=x", r"seed_everything[\s\S]*x"),
    ],
)
def test_settings_out_of_range_are_refused(word: str, match: str, work: Workplace) -> None:
    if word == "--trainer.accelerator=gpu":
        gpu_or_skip()
    work.refused(match, "plan", word)


def gpu_or_skip() -> None:
    """Skips where there is a GPU, with which it is no bad setting."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_processes_that_keep_their_results_are_refused(strategy: str, work: Workplace) -> None:
    words = [f"--trainer.strategy={strategy}", "--trainer.devices=2"]
    work.refused(r"trainer\.strategy forks or spawns processes.*; use ddp", "plan", *words)


def test_limits_that_the_results_would_not_tell_are_refused(work: Workplace) -> None:
    for word in (
        "--trainer.limit_predict_batches=1",
        "--trainer.limit_val_batches=0",
        "--trainer.overfit_batches=2",
        "--trainer.fast_dev_run=true",
    ):
        work.refused(r"leave text out.*limit data\.\*_tokens, and steps by", "fit", word)


def test_strategies_out_of_range_are_refused(work: Workplace) -> None:
    functional = "lightning_smoe.functional"

    def spec(path: str, **settings: Any) -> dict[str, Any]:
        return {"class_path": f"{functional}.{path}", "init_args": settings}

    def clustered(path: str, **settings: Any) -> dict[str, Any]:
        return {"groups": spec("grouping.Clustered", clusterer=spec(path, **settings))}

    for settings, match in (
        ({"merger": spec("merging.UnionSVD", rank=0)}, r"rank=0 keeps nothing of a matrix; take 1"),
        (clustered("kmeans.KMeans", num_starts=0), r"num_starts=0 tries nothing"),
        ({"router": spec("router.LogSumExp", strength=0.0)}, r"strength=0\.0 must be"),
        ({"groups": spec("merging.Average")}, r"merging\.Average"),
        (clustered("kmeans.Kmeans"), r"Kmeans"),
    ):
        merge = {"class_path": "lightning_smoe.compression.recipe.Merge", "init_args": settings}
        work.write({"model.recipe": merge})
        work.refused(match, "plan")


def test_models_that_cannot_stand_in_the_report_are_refused(
    finished: Workplace, dense: Path
) -> None:
    (finished.out / "recovered").rename(finished.folder / "original")
    shutil.copytree(finished.folder / "model", finished.folder / "wide")
    config = finished.folder / "wide/config.json"
    config.write_text(config.read_text().replace('"vocab_size": 4096', '"vocab_size": 5000'))
    for others, match in (
        (f'["{dense}"]', r"\(qwen2\) has no mixture-of-experts layer"),
        ('["wide"]', r"wide has a vocabulary of 5000 tokens and the original of 4096"),
        ('["out/compressed"]', r"two models would be named compressed; rename the folder"),
        ('["original"]', r"two models would be named original; rename the folder"),
        ('["model", "model/"]', r"two models would be named model; rename the folder"),
        ('["nowhere"]', r"there is no checkpoint folder nowhere"),
        ('["text"]', r"text is not a checkpoint"),
    ):
        finished.refused(match, "evaluate", "--others", others)
