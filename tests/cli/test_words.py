"""A command line as a person types it becomes one that jsonargparse takes."""

import pytest

from lightning_smoe.words import spelled_out


@pytest.mark.parametrize(
    ("typed", "spelled"),
    [
        ("inspect model", "inspect --checkpoint model"),
        ("inspect --help", "inspect --help"),
        ("generate model --prompt x", "generate --checkpoint model --prompt x"),
        ("compare a b", "compare --runs=[] --runs+=a --runs+=b"),
        ("compare a --output f", "compare --runs=[] --runs+=a --output f"),
        ("compare", "compare"),
        (
            "sweep -c x --recipes a b --keep 0.5 30 --split test",
            "sweep -c x --recipes=[] --recipes+=a --recipes+=b --keep=[] --keep+=0.5 --keep+=30 "
            "--split test",
        ),
        ("sweep --keep -1 --seeds 3", "sweep --keep=[] --keep+=-1 --seeds=[] --seeds+=3"),
        ("sweep --keep=[1,2] --seeds null", "sweep --keep=[1,2] --seeds=null"),
        ("sweep --recipes --keep=7", "sweep --recipes --keep=[] --keep+=7"),
        ("sweep --model.keep 6 --x=y", "sweep --model.keep 6 --x=y"),
        ("evaluate --others m n", "evaluate --others=[] --others+=m --others+=n"),
        ("plan --model.keep 6 --keep 5", "plan --model.keep 6 --keep 5"),
    ],
)
def test_lists_and_folders_are_spelled_out(typed: str, spelled: str) -> None:
    words = typed.split()
    assert spelled_out(words, words[0]) == spelled.split()


def test_a_line_without_a_verb_stays() -> None:
    assert spelled_out(["--help"], None) == ["--help"]
