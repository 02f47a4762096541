"""Fixtures of every test: a clean process, tiny models of each family, a checkpoint on disk."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Before transformers is imported, which reads them then.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What modules of the package import while jaxtyping's hook is at work, Python compiles anew in
# every process, as the hook looks for bytecode of its own: imported before, it is read.
import beartype.door  # noqa: F401
import lightning.pytorch.cli  # noqa: F401
import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from transformers import PreTrainedModel

from tests.families import EOS_TOKEN_ID, FAMILIES, PAD_TOKEN_ID, VOCAB_SIZE, build

SHIPPED_CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "qwen2moe-tiny-8dom"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_VOCAB_SIZE = 4096
# The signals that Lightning's Trainer takes over while it runs.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keeps torch to one thread.

    A forked process (strategy ddp_fork) hangs in a pool of OpenMP threads that its parent
    started, and tiny models are no faster on more.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def collected_once() -> None:
    """Keeps the garbage collector from walking through modules, which stay to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_process(one_thread: None) -> Iterator[None]:
    """Undoes what Lightning leaves in the process: environment, rank, signals, process group."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    # Lightning keeps the rank of a process on this function, whose type does not say so.
    rank_zero_only.rank = 0  # type: ignore[attr-defined]
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _restore_environment(environment)


def _restore_environment(before: dict[str, str]) -> None:
    # pytest keeps its own variable, which names the phase of the test that runs.
    before["PYTEST_CURRENT_TEST"] = os.environ["PYTEST_CURRENT_TEST"]
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn, by its name in transformers."""
    return str(request.param)


@pytest.fixture
def tiny_moe(family: str) -> PreTrainedModel:
    """A random model of every family in turn, free to be changed."""
    return build(family)


@pytest.fixture
def tokens() -> Tensor:
    """Two sequences of sixteen token ids, without special tokens."""
    first = 1 + max(EOS_TOKEN_ID, PAD_TOKEN_ID)
    return torch.randint(first, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def built_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a family's model and a real tokenizer once a session, not to be changed by tests."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save(family: str) -> Path:
        checkpoint = folder / family
        if not checkpoint.exists():
            build(family, vocab_size=TOKENIZER_VOCAB_SIZE).save_pretrained(checkpoint)
            for name in TOKENIZER_FILES:
                shutil.copy(SHIPPED_CHECKPOINT / name, checkpoint)
        return checkpoint

    return save


@pytest.fixture
def saved_checkpoint(
    built_checkpoint: Callable[[str], Path], tmp_path: Path
) -> Callable[[str], Path]:
    """Gives a test its own copy, `tmp_path / family`, of a checkpoint whose vocabulary is 4096."""

    def copy(family: str) -> Path:
        checkpoint = tmp_path / family
        shutil.copytree(built_checkpoint(family), checkpoint, dirs_exist_ok=True)
        return checkpoint

    return copy
