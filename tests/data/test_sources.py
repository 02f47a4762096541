"""Finding text."""

from pathlib import Path

import pytest

from lightning_smoe.data.sources import HubText, Source, find_sources, select_domains
from lightning_smoe.errors import InputError


def test_a_folder_has_one_domain_a_file_or_sub_folder(tmp_path: Path) -> None:
    (tmp_path / "law" / "old").mkdir(parents=True)
    files = ["zoo.txt", "code.txt", "code.jsonl", "law/b.txt", "law/old/a.parquet"]
    for name in [*files, "README.md", ".hidden", "law/.keep"]:
        (tmp_path / name).touch()
    found = find_sources(tmp_path, "train")
    assert list(found) == ["code", "law", "zoo"]
    assert found["code"] == [tmp_path / "code.jsonl", tmp_path / "code.txt"]
    assert found["law"] == [tmp_path / "law/b.txt", tmp_path / "law/old/a.parquet"]


def test_one_file_is_one_domain_named_after_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a")
    assert find_sources(tmp_path / "notes.txt", "calib") == {"notes": [tmp_path / "notes.txt"]}


@pytest.mark.parametrize(
    ("location", "split", "domain", "expected"),
    [
        ("hf://wikitext", "valid", "wikitext", HubText("wikitext", None, "validation")),
        ("hf://wikitext", "calib", "wikitext", HubText("wikitext", None, "train")),
        ("hf://a/c4:en@test[:9]", "valid", "c4", HubText("a/c4", "en", "test[:9]")),
        ("hf://a/c4@train[5%:10%]", "train", "c4", HubText("a/c4", None, "train[5%:10%]")),
        ("hf://a/c4@train", "test", "c4", HubText("a/c4", None, "train")),
    ],
)
def test_a_hub_name_is_taken_apart(
    location: str, split: str, domain: str, expected: HubText
) -> None:
    assert find_sources(location, split) == {domain: [expected]}


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: no such file or folder -> correct data\.valid"):
        find_sources(tmp_path / "none", "valid")


def test_a_malformed_hub_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.train=hf:/x -> write hf://NAME"):
        find_sources("hf:/x", "train")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no text -> add one file a domain"):
        find_sources(tmp_path, "train")
    (tmp_path / "law").mkdir()
    with pytest.raises(InputError, match="law: holds no text files -> add"):
        find_sources(tmp_path, "train")


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    message = r"a\.csv: unknown kind of file '\.csv' -> convert it to \.txt, \.jsonl, \.parquet"
    for location in (tmp_path, tmp_path / "a.csv"):
        with pytest.raises(InputError, match=message):
            find_sources(location, "train")


def test_named_domains_are_kept_in_alphabetical_order(tmp_path: Path) -> None:
    sources = find_sources(Path(__file__).parents[2] / "lightning_smoe/data/corpus/test", "test")
    assert list(select_domains(sources, ["python", "arith"], "test")) == ["arith", "python"]
    assert select_domains(sources, None, "test") == sources


def test_an_unknown_domain_is_refused_with_the_nearest_name() -> None:
    sources: dict[str, list[Source]] = {"arith": [Path("a")], "python": [Path("p")]}
    message = "'pyhton', which the calib split does not have -> did you mean 'python'.*: arith, pyt"
    with pytest.raises(InputError, match=message):
        select_domains(sources, ["pyhton"], "calib")
    with pytest.raises(InputError, match="does not have -> it has: arith, python"):
        select_domains(sources, ["zzz"], "calib")
    with pytest.raises(InputError, match="empty list -> name a domain"):
        select_domains(sources, [], "calib")
