"""A plan carried out on a whole model: in memory, or from one folder of files to another."""

from collections.abc import Mapping

from lightning.pytorch import LightningDataModule, Trainer
from transformers import PreTrainedModel

from lightning_smoe.compression.apply import apply_plan
from lightning_smoe.compression.module import CompressionModule
from lightning_smoe.compression.plan import CompressionPlan
from lightning_smoe.compression.refit import RefitOutcome
from lightning_smoe.compression.streams import LayerSink
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.models.streamed import Streamed


def carry_out(
    trainer: Trainer,
    data: LightningDataModule,
    model: PreTrainedModel,
    plan: CompressionPlan,
    *,
    samples: Mapping[str, TokenSample],
) -> dict[str, RefitOutcome]:
    """Compresses a model in place, on calibration text where the plan is fitted on it.

    Args:
        trainer: Runs the predict loop.
        data: Gives the calibration text under it.
        model: The original; it is the compressed model afterwards.
        plan: What becomes of its experts.
        samples: Samples of tokens by the layer's name; empty if the plan needs none.

    Returns:
        What the refit of each layer did, by the layer's name.
    """
    if not plan.reads_tokens:
        apply_plan(model, plan, samples)
        return {}
    module = CompressionModule(model, plan, samples)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return module.refits


def carry_out_streamed(
    trainer: Trainer,
    data: LightningDataModule,
    residence: Streamed,
    plan: CompressionPlan,
    *,
    samples: Mapping[str, TokenSample],
    sink: LayerSink,
) -> dict[str, RefitOutcome]:
    """Compresses a model of which one decoder layer is in memory at a time.

    Args:
        trainer: Runs the predict loop.
        data: Gives the calibration text under it.
        residence: The original.
        plan: What becomes of its experts.
        samples: Samples of tokens by the layer's name; empty if the plan needs none.
        sink: Takes the layers that are done.

    Returns:
        What the refit of each layer did, by the layer's name.
    """
    module = CompressionModule(residence, plan, samples, sink=sink)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return module.refits
