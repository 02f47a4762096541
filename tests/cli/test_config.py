"""What an experiment file may say: every key, from every place, to every verb."""

from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_smoe.data.text import TextDataModule
from lightning_smoe.experiment import Experiment
from lightning_smoe.training.options import Recovery
from tests.cli.command import EXPERIMENT_VERBS, LOOKING_VERBS, VERBS, Workplace, check_refusal

SHIPPED = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(SHIPPED.glob("*.yaml"))
KEYS = [
    *(f"model.{field.name}" for field in fields(Experiment)),
    *(f"model.recovery.{field.name}" for field in fields(Recovery)),
    *(f"data.{name}" for name in signature(TextDataModule).parameters if name != "tokenizer"),
    *(f"trainer.{name}" for name in ("accelerator", "devices", "strategy", "max_steps", "logger")),
    "config",
    "print_config",
    "seed_everything",
]
OWN = {
    "fit": ["ckpt_path"],
    "evaluate": ["others", "tasks", "limit", "num_fewshot", "task_batch_size", "task_path"],
    "sweep": ["recipes", "keep", "seeds", "split"],
    "compare": ["runs", "output"],
    "inspect": ["checkpoint"],
    "generate": ["checkpoint", "prompt", "max_new_tokens", "temperature"],
}


def printed(work: Workplace, verb: str, *words: str | Path) -> dict[str, Any]:
    outcome = work.run(verb, *words, "--print_config")
    assert outcome.code == 0, outcome.err
    config: dict[str, Any] = yaml.safe_load(outcome.out)
    return config


@pytest.mark.parametrize("verb", VERBS)
def test_help_mentions_every_key_of_a_verb(verb: str, work: Workplace) -> None:
    outcome = work.run(verb, "--help")
    assert outcome.code == 0
    keys = [*([] if verb in LOOKING_VERBS else KEYS), *OWN.get(verb, [])]
    assert [key for key in keys if f"--{key} " not in outcome.out] == []
    assert outcome.err == ""


def test_help_names_every_verb(work: Workplace) -> None:
    outcome = work.run("--help")
    assert outcome.code == 0
    assert [verb for verb in VERBS if f" {verb} " not in outcome.out] == []


# Verbs read the same keys: one of them is enough for each file, and one file for the others.
@pytest.mark.parametrize(
    ("verb", "config"),
    [
        pytest.param(verb, config, id=f"{verb}-{config.stem}")
        for verb in EXPERIMENT_VERBS
        for config in CONFIGS
        if verb == "fit" or config.stem == "quickstart"
    ],
)
def test_every_shipped_experiment_is_taken_by_every_verb_and_comes_back_when_printed(
    verb: str, config: Path, work: Workplace
) -> None:
    asked = read(config)
    whole = printed(work, verb, "--config", config)
    for section, values in asked.items():
        for key, value in values.items():
            assert contains(whole[section][key], value), f"{section}.{key}"
    (work.folder / "printed.yaml").write_text(yaml.safe_dump(whole))
    assert printed(work, verb, "--config", "printed.yaml") == whole


def read(config: Path) -> dict[str, Any]:
    """An experiment, with the files it names in their place."""
    asked: dict[str, Any] = yaml.safe_load(config.read_text())
    for section in (asked, *filter(lambda part: isinstance(part, dict), asked.values())):
        for key, value in section.items():
            if isinstance(value, str) and value.endswith(".yaml"):
                section[key] = yaml.safe_load((SHIPPED / value).read_text())
    return asked


def contains(found: Any, asked: Any) -> bool:
    """Whether all that was asked for is there; defaults stand beside it."""
    if isinstance(asked, dict):
        return all(contains(found[key], value) for key, value in asked.items())
    if isinstance(found, dict):
        # Where only one class is possible it goes without saying.
        return bool(found.get("class_path", asked) == asked)
    return bool(found == asked)


@pytest.mark.parametrize("verb", ["inspect", "generate"])
def test_options_of_looking_verbs_come_back_when_printed(verb: str, work: Workplace) -> None:
    words = ["model", *(["--prompt=a", "--temperature=0.5"] if verb == "generate" else [])]
    whole = printed(work, verb, *words)
    (work.folder / "printed.yaml").write_text(yaml.safe_dump(whole))
    assert printed(work, verb, "--config", "printed.yaml") == whole
    assert whole["checkpoint"] == "model"
    assert whole.get("temperature", 0.5) == 0.5


def test_later_words_override_the_file_and_later_files_override_earlier_ones(
    work: Workplace,
) -> None:
    (work.folder / "more.yaml").write_text("model: {keep: 7}\ndata: {seed: 5}\n")
    files = ["--config", "experiment.yaml", "--config", "more.yaml"]
    config = printed(work, "plan", *files)
    assert config["model"]["keep"] == 7
    assert config["model"]["checkpoint"] == "model"
    assert config["data"]["seed"] == 5
    assert config["data"]["batch_size"] == 4
    words = [
        "--model.keep=8",
        "--model.layers=[0,2]",
        "--model.recovery.trainable=[experts,shared]",
        "--model.recovery.schedule=cosine",
        "--model.recipe=Merge",
        "--model.recipe.groups=Clustered",
        "--model.recipe.groups.clusterer=KMeans",
        "--model.recipe.groups.clusterer.seed=3",
        "--model.recipe.refit=null",
        "--data.domains=[lit]",
        "--trainer.max_steps=9",
    ]
    config = printed(work, "fit", *files, *words)
    assert config["model"]["keep"] == 8
    assert config["model"]["layers"] == [0, 2]
    assert config["model"]["recovery"]["trainable"] == ["experts", "shared"]
    assert config["model"]["recovery"]["schedule"] == "cosine"
    recipe = config["model"]["recipe"]
    assert recipe["class_path"] == "lightning_smoe.compression.recipe.Merge"
    clusterer = recipe["init_args"]["groups"]["init_args"]["clusterer"]
    assert clusterer["class_path"] == "lightning_smoe.functional.kmeans.KMeans"
    assert clusterer["init_args"]["seed"] == 3
    assert recipe["init_args"]["refit"] is None
    assert config["data"]["domains"] == ["lit"]
    assert config["trainer"]["max_steps"] == 9


def test_a_part_of_an_experiment_may_be_a_file_of_its_own(work: Workplace) -> None:
    (work.folder / "trainer").mkdir()
    (work.folder / "trainer/short.yaml").write_text("max_steps: 3\naccelerator: cpu\n")
    experiment = yaml.safe_load((work.folder / "experiment.yaml").read_text())
    experiment["trainer"] = "trainer/short.yaml"
    (work.folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    assert printed(work, "fit", "-c", "experiment.yaml")["trainer"]["max_steps"] == 3


@pytest.mark.parametrize("verb", EXPERIMENT_VERBS)
def test_the_saved_configuration_is_taken_by_every_verb(verb: str, finished: Workplace) -> None:
    whole = printed(finished, verb, "--config", "out/config.yaml")
    saved = yaml.safe_load((finished.out / "config.yaml").read_text())
    own = OWN.get(verb, [])
    assert {k: v for k, v in whole.items() if k not in own} == saved


def test_a_saved_configuration_repeats_the_run(finished: Workplace) -> None:
    outcome = finished.run("fit", "--config", "out/config.yaml")
    assert outcome.code == 0, outcome.err
    assert "wrote" not in outcome.err


def test_the_seed_of_the_file_is_kept(work: Workplace) -> None:
    assert printed(work, "plan", "-c", "experiment.yaml")["seed_everything"] == 42
    config = printed(work, "plan", "-c", "experiment.yaml", "--seed_everything=7")
    assert config["seed_everything"] == 7


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--model.kep=6", "model.keep"),
        ("--keep=6", "model.keep"),
        ("--data.sequence_lenght=6", "data.sequence_length"),
        ("--trainer.maxsteps=6", "trainer.max_steps"),
        ("--model.recovery.learningrate=1", "model.recovery.learning_rate"),
        ("--modle.checkpoint=x", "model.checkpoint"),
    ],
)
def test_a_misspelt_option_is_refused_with_a_guess(word: str, hint: str, work: Workplace) -> None:
    message = work.refused(rf"unrecognized arguments: {word[:6]}", "plan", word)
    assert message.rstrip().endswith(f"Did you mean {hint}?")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.kep", "model.keep"),
        ("data.calib_token", "data.calib_tokens"),
        ("trainer.max_step", "trainer.max_steps"),
        ("modle.checkpoint", "model.checkpoint"),
        ("model.recovery.learningrate", "model.recovery.learning_rate"),
        ("keep", "model.keep"),
    ],
)
def test_a_misspelt_key_in_a_file_is_refused_with_a_guess(
    key: str, hint: str, work: Workplace
) -> None:
    work.write({key: 6})
    message = work.refused(rf"does not accept option '{key}'|Option '\w+'", "plan")
    assert message.rstrip().endswith(f"Did you mean {hint}?")


def test_a_misspelt_option_of_a_strategy_is_refused(work: Workplace) -> None:
    path = "lightning_smoe.compression.recipe.Prune"
    work.write({"model.recipe": {"class_path": path, "init_args": {"salience": "Reap"}}})
    work.refused(r"model\.recipe[\s\S]*Option 'salience' is not accepted", "plan")
    work.write({})
    work.refused(r"saliency[\s\S]*Reep", "plan", "--model.recipe.saliency=Reep")


def test_a_misspelt_option_of_a_looking_verb_is_refused_with_a_guess(work: Workplace) -> None:
    outcome = work.run("generate", "model", "--promt", "x")
    check_refusal(outcome, r"unrecognized arguments: --promt x\n +Did you mean prompt\?")


def test_files_that_are_none_are_refused(work: Workplace) -> None:
    (work.folder / "broken.yaml").write_text("model: [")
    for words, match in (
        (["plan", "--config", "none.yaml"], r"File does not exist: .*none\.yaml"),
        (["plan", "--config", "broken.yaml"], r"Problems parsing config"),
        (["plan"], r"arguments are required: --model\.checkpoint, --model\.output_dir"),
        (["generate", "model"], r"arguments are required: --prompt"),
        (["inspect"], r"arguments are required: --checkpoint"),
        (["calibrat"], r"invalid choice: 'calibrat' \(choose from 'calibrate', "),
        ([], r"expected \"subcommand\" to be one of {calibrate,"),
    ):
        check_refusal(work.run(*words), match)
