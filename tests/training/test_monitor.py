"""What TensorBoard shows of a training: losses, loads of the experts, a picture of them."""

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # no stubs
    EventAccumulator,
)
from torch import Tensor
from transformers import PreTrainedModel

from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.training.monitor import draw_loads
from tests.training.students import NUM_KEPT, QUIET, fit, module, pair, text, trainer

pytestmark = QUIET

LAYERS = ("model.layers.0.mlp", "model.layers.2.mlp")


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """What four steps with two validations leave."""
    folder = tmp_path_factory.mktemp("run")
    logger = TensorBoardLogger(folder, name="logs", version=0)
    fit(module(folder / "training"), text(), 4, logger=logger)
    return EventAccumulator(str(folder / "logs/version_0"), {"images": 0}).Reload()


def test_every_curve_has_its_points(events: EventAccumulator) -> None:
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    kinds = ("entropy", "unused_experts", "drift")
    by_layer = {f"router/{kind}/{name}" for kind in kinds for name in LAYERS}
    judged = {f"valid/{kind}" for kind in ("kl", "perplexity")}
    judged |= {f"{tag}/{domain}" for tag in judged for domain in ("arith", "lit")}
    trained = {"train/loss", "train/forward_kl", "train/learning_rate/router", "tokens/s"}
    for tag in trained:
        assert steps[tag] == [0, 1, 2, 3]
    for tag in judged | by_layer:
        assert steps[tag] == [1, 3]
    assert steps.keys() - {"epoch"} == trained | judged | by_layer
    values = [event.value for tag in steps for event in events.Scalars(tag)]
    assert all(map(math.isfinite, values))


def test_each_validation_leaves_a_picture_of_the_loads(events: EventAccumulator) -> None:
    assert events.Tags()["images"] == ["router/load"]
    images = events.Images("router/load")
    assert [image.step for image in images] == [2, 4]
    for image in images:
        picture = Image.open(io.BytesIO(image.encoded_image_string))
        assert picture.size == (image.width, image.height)
        assert min(picture.size) >= 100
        colours = picture.convert("RGB").getcolors(1 << 20)
        assert colours is not None
        assert len(colours) > NUM_KEPT


@torch.no_grad()
def counted(model: PreTrainedModel, batches: Any) -> dict[str, Counter[int]]:
    """How often each expert was chosen, by asking the experts what they were given."""
    counts = {layer.name: Counter[int]() for layer in find_moe_layers(model)}
    real: list[bool] = []

    def watch(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            for is_token, chosen in zip(real, args[1].tolist(), strict=True):
                if is_token:
                    counts[name].update(chosen)

        return hook

    for layer in find_moe_layers(model):
        layer.experts.register_forward_pre_hook(watch(layer.name))
    for batch in batches:
        real[:] = batch["attention_mask"].bool().flatten().tolist()
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    return counts


def test_entropy_and_unused_experts_are_those_of_real_tokens(tmp_path: Path) -> None:
    documents(tmp_path)
    data = text(path=tmp_path, train=None, pack=False, valid_tokens=None, batch_size=3)
    (found,) = trainer(1).validate(module(tmp_path), datamodule=data, verbose=False)
    assert any(bool((batch["attention_mask"] == 0).any()) for batch in data.val_dataloader())
    student, _ = pair("qwen2_moe")
    for name, counts in counted(student, data.val_dataloader()).items():
        loads = [count / counts.total() for count in counts.values()]
        entropy = -sum(load * math.log(load) for load in loads)
        assert found[f"router/entropy/{name}"] == pytest.approx(entropy, rel=1e-6)
        assert found[f"router/unused_experts/{name}"] == NUM_KEPT - len(counts)
        assert 0 < entropy <= math.log(NUM_KEPT)


def documents(folder: Path) -> None:
    (folder / "valid").mkdir()
    for domain in ("arith", "lit"):
        lines = ["a b", "the house by the sea", "the end of it", "so it was, then, he said"]
        (folder / "valid" / f"{domain}.txt").write_text("\x1e".join(lines))


def test_drift_is_how_far_rows_went_relative_to_their_length(tmp_path: Path) -> None:
    recovery = module(tmp_path, learning_rate=0.01)
    before = [layer.router.weight.detach().clone() for layer in find_moe_layers(recovery.student)]
    engine, _ = fit(recovery, text(), 4)
    for layer, start in zip(find_moe_layers(recovery.student), before, strict=True):
        drift = (layer.router.weight.detach() - start).norm() / start.norm()
        found = engine.callback_metrics[f"router/drift/{layer.name}"]
        assert found.item() == pytest.approx(drift.item(), rel=1e-5)
        assert found > 0


def test_no_hook_stays_behind(tmp_path: Path) -> None:
    recovery = module(tmp_path)
    fit(recovery, text(), 2)
    modules = list(recovery.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_the_picture_has_a_row_a_layer_also_where_counts_differ() -> None:
    even = torch.tensor([1.0, 0.5, 1.5, 1.0], dtype=torch.float64)
    figure = draw_loads([("model.layers.0.mlp", even), ("model.layers.2.mlp", even[:2])])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(LAYERS)
    shown: Any = axes.images[0].get_array()
    assert shown.shape == (2, 4)
    assert shown.mask.tolist() == [[False] * 4, [False, False, True, True]]
    assert shown[1, :2].tolist() == [1.0, 0.5]
