"""Checkpoint folders of an experiment, with their cards; written from memory or layer by layer."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch import Trainer
from transformers import PreTrainedModel

from lightning_smoe.calibration.processes import over_processes
from lightning_smoe.calibration.walked import WalkedCalibration
from lightning_smoe.compression.carry_out import carry_out_streamed
from lightning_smoe.compression.plan import CompressionPlan, note_refits
from lightning_smoe.compression.refit import RefitOutcome
from lightning_smoe.compression.streamed_result import StreamedResult
from lightning_smoe.functional.evidence import TokenSample
from lightning_smoe.models.artifact import Manifest
from lightning_smoe.models.card import model_card
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.mapped import is_mapped
from lightning_smoe.models.progress import WalkProgress
from lightning_smoe.models.residence import Residence
from lightning_smoe.models.saving import save, write_beside
from lightning_smoe.models.streamed import Streamed
from lightning_smoe.workspace import Workspace


def save_result(
    work: Workspace, model: PreTrainedModel, path: Path, *, manifest: Manifest, steps: list[str]
) -> None:
    """Writes a checkpoint folder of the experiment, with its card.

    Args:
        work: The experiment.
        model: The compressed model.
        path: Where to write.
        manifest: What made it.
        steps: What was done, a sentence each, for the card.
    """
    model.cpu()
    card = _card(work, model, path, manifest=manifest, steps=steps)
    save(model, work.source, path, manifest=manifest, card=card)


def _card(
    work: Workspace, model: PreTrainedModel, path: Path, *, manifest: Manifest, steps: list[str]
) -> str:
    """The text of a model card; weights may be away."""
    return model_card(
        f"{work.source.name}, {path.name}",
        work.source,
        before={layer.name: layer.num_experts for layer in work.layers},
        after={layer.name: layer.num_experts for layer in find_moe_layers(model)},
        steps=steps,
        manifest=manifest,
        mapped=is_mapped(model),
    )


def stream_result(
    trainer: Trainer,
    work: Workspace,
    residence: Streamed,
    plan: CompressionPlan,
    *,
    path: Path,
    manifest: Manifest,
    samples: Mapping[str, TokenSample],
) -> dict[str, RefitOutcome]:
    """Carries out a plan and writes its checkpoint folder, one decoder layer in memory at a time.

    Args:
        trainer: Runs the predict loop.
        work: The experiment.
        residence: The original.
        plan: What becomes of its experts.
        path: Where to write.
        manifest: What makes it.
        samples: Samples of tokens by the layer's name; empty if the plan needs none.

    Returns:
        What the refit of each layer did, by the layer's name.
    """
    sink = StreamedResult(
        residence,
        work.source,
        plan,
        path,
        progress=progress_of(trainer, work, path, manifest),
        device=trainer.strategy.root_device,
        writes=trainer.is_global_zero,
    )
    refits = carry_out_streamed(trainer, work.data, residence, plan, samples=samples, sink=sink)
    if trainer.is_global_zero:
        if path == work.compressed_path:
            note_outcomes(work, refits)
        steps = plan_steps(plan, refits)

        def beside(folder: Path) -> None:
            card = _card(work, sink.model, path, manifest=manifest, steps=steps)
            write_beside(folder, work.source, config=sink.config, manifest=manifest, card=card)

        sink.complete(beside, work.dtype)
    return refits


def note_outcomes(work: Workspace, refits: Mapping[str, RefitOutcome]) -> None:
    """Writes into plan.json what came of the refits; before the result, which may be the last."""
    note_refits(work.plan_path, {name: asdict(refit) for name, refit in refits.items()})


def stream_statistics(
    trainer: Trainer, work: Workspace, residence: Residence, *, path: Path, manifest: Manifest
) -> None:
    """Gathers what every expert does, one decoder layer in memory at a time, and writes it.

    Args:
        trainer: Runs the predict loop.
        work: The experiment.
        residence: The original.
        path: Where to write.
        manifest: What the statistics are made from.
    """
    progress = progress_of(trainer, work, path, manifest)
    domains, stride = work.data.domains_of("calib"), work.sample_stride
    module = WalkedCalibration(residence, domains, manifest, progress=progress, stride=stride)
    trainer.predict(module, datamodule=work.data, return_predictions=False)
    if module.statistics is not None:
        module.statistics.save(path)
    trainer.strategy.barrier()
    progress.close()


def progress_of(trainer: Trainer, work: Workspace, path: Path, manifest: Manifest) -> WalkProgress:
    """Where a walk that makes an artifact notes how far it is."""
    return WalkProgress(
        path,
        manifest.digest,
        rank=trainer.global_rank,
        num_processes=trainer.world_size,
        text=[work.data.fingerprint("calib"), work.data.batch_size],
        reduce=over_processes(trainer.strategy),
    )


def plan_steps(plan: CompressionPlan, refits: Mapping[str, RefitOutcome]) -> list[str]:
    """What a plan does, a sentence each, for the card."""
    merged = any(len(group) > 1 for layer in plan.layers for group in layer.groups)
    steps = [f"Experts merged by {plan.merger}." if merged else "Experts pruned."]
    steps.append(f"Router repaired by {plan.router}.")
    if plan.refit is not None:
        steps.append(f"Output matrices refitted in closed form ({plan.refit}).")
    return steps + [f"{n}: {refit}." for n, refit in refits.items() if not refit.applied]
