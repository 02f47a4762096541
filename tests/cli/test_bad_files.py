"""Checkpoints and text that cannot be read: one message, code 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import Workplace


@pytest.mark.parametrize("verb", ["plan", "fit"])
def test_every_verb_refuses_a_checkpoint_that_is_not_there(verb: str, work: Workplace) -> None:
    match = r"there is no checkpoint folder nowhere; name a folder with config\.json"
    work.refused(match, verb, "--model.checkpoint=nowhere", "--trainer.logger=true")


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def without_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def truncated_header(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def empty_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def no_json(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def quantised(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (model / "config.json").write_text(json.dumps(config))


def lost_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def translator(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "t5"}))


def unheard_of(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (without_config, r"model is not a checkpoint: it has no config\.json"),
        (without_weights, r"has no model\.safetensors .*only safetensors weights are read: save"),
        (truncated, r"model\.safetensors is truncated or damaged: .*; copy it again"),
        (truncated_header, r"model\.safetensors is not a safetensors file .*; copy it again"),
        (empty_weights, r"model\.safetensors is not a safetensors file .*; copy it again"),
        (no_json, r"config\.json is not JSON .*; copy the file again"),
        (quantised, r"is quantised; compress the original weights"),
        (translator, r"model is no causal language model but a t5"),
        (unheard_of, r"unheard_of"),
        (lost_shard, r"model-00002-of-00002\.safetensors, named in .*; copy the checkpoint again"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    damage: Callable[[Path], None], match: str, work: Workplace
) -> None:
    damage(work.folder / "model")
    work.refused(match, "fit")


def test_a_checkpoint_without_tokenizer_is_refused(work: Workplace) -> None:
    for file in (work.folder / "model").glob("tokenizer*"):
        file.unlink()
    work.refused(r"tokenizer", "plan")


def test_a_dense_model_is_refused(dense: Path, work: Workplace) -> None:
    for verb in ("calibrate", "fit"):
        match = r"\(qwen2\) has no mixture-of-experts layer; name a checkpoint that has experts"
        work.refused(match, verb, f"--model.checkpoint={dense}")


def empty_file(text: Path) -> None:
    (text / "calib/lit.txt").write_text("")


def white_space(text: Path) -> None:
    (text / "calib/lit.txt").write_text(" \n\x1e\t\n")


def latin(text: Path) -> None:
    (text / "calib/lit.txt").write_bytes("café crème".encode("latin1"))


def unknown_kind(text: Path) -> None:
    (text / "calib/lit.txt").rename(text / "calib/lit.rtf")


def missing_split(text: Path) -> None:
    shutil.rmtree(text / "calib")


def missing_folder(text: Path) -> None:
    shutil.rmtree(text)


def broken_lines(text: Path) -> None:
    (text / "calib/lit.txt").unlink()
    (text / "calib/lit.jsonl").write_text('{"text": "one"}\n{"text": \n')


def other_field(text: Path) -> None:
    (text / "calib/lit.txt").unlink()
    (text / "calib/lit.jsonl").write_text('{"content": "one"}\n')


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (empty_file, r"calib/lit\.txt: holds no text -> fill it or take it away"),
        (white_space, r"calib/lit\.txt: holds no text -> fill it or take it away"),
        (latin, r"calib/lit\.txt: not UTF-8 at byte offset 3 -> convert it"),
        (unknown_kind, r"lit\.rtf: unknown kind of file '\.rtf' -> convert it to \.txt"),
        (missing_split, r"data\.path=text: has no sub-folder 'calib' -> add it"),
        (missing_folder, r"data\.path=text: no such folder -> name one that exists"),
        (broken_lines, r"lit\.jsonl, line 2: not JSON .* -> write one object a line"),
        (other_field, r"has no field 'text' -> set data\.text_field to one of: content"),
    ],
)
def test_text_that_cannot_be_read_is_refused(
    damage: Callable[[Path], None], match: str, work: Workplace
) -> None:
    damage(work.folder / "text")
    work.refused(match, "calibrate")


@pytest.mark.parametrize(
    ("verb", "split"), [("fit", "train"), ("fit", "valid"), ("fit", "test"), ("evaluate", "test")]
)
def test_text_of_later_steps_is_checked_before_the_first(
    verb: str, split: str, work: Workplace
) -> None:
    (work.folder / "text" / split / "lit.txt").write_bytes(b"\xff\xfe")
    work.refused(rf"text/{split}/lit\.txt: not UTF-8 at byte offset 0", verb)


def test_an_unknown_domain_is_refused_with_a_guess(work: Workplace) -> None:
    match = r"names 'lid', which the calib split does not have -> did you mean 'lit'\? it has: ari"
    work.refused(match, "plan", "--data.domains=[arith,lid]")
    work.refused(r"data\.domains is an empty list", "plan", "--data.domains=[]")


def test_text_named_for_one_split_must_be_there(work: Workplace) -> None:
    match = r"none\.txt: no such file or folder -> correct data\.calib or data\.path"
    work.refused(match, "plan", "--data.calib=none.txt")
    # A split that the verb does not read is not asked for.
    work.done("plan", "--data.train=none.txt", "--data.test=none.txt")
