"""Trains a small model of another family than the shipped one, from scratch on the shipped text.

    python scripts/train_tiny.py --minutes 20

A qwen3_moe: no shared expert, the weights of the chosen experts renormalised. A run that was
stopped goes on from its last checkpoint when started again, a finished one with more minutes.
"""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lightning_smoe.data.text import TextDataModule
from lightning_smoe.errors import InputError
from lightning_smoe.functional.divergence import token_nll
from lightning_smoe.models.artifact import locked, replacing
from lightning_smoe.models.layer import find_moe_layers
from lightning_smoe.models.saving import verify
from lightning_smoe.show import set_up_screen
from lightning_smoe.training.monitor import RouterMonitor

TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "qwen2moe-tiny-8dom"
WARMUP = 0.04  # share of the training
STEPS_A_LINE, STEPS_A_CHECKPOINT, STEPS_A_VALIDATION = 50, 200, 500


class LanguageModule(LightningModule):
    """Trains a random model on the next token, its experts in balance, until time is up.

    Args:
        config: The config.json of a qwen3_moe.
        learning_rate: Peak step size.
        minutes: Wall-clock time of the training.
        steps: Steps after which it ends if that is sooner; infinity for none.
    """

    def __init__(self, config: Path, learning_rate: float, minutes: float, steps: float) -> None:
        super().__init__()
        try:
            sizes = AutoConfig.from_pretrained(config.resolve(strict=True))
        except (OSError, ValueError, KeyError, StrictDataclassError) as error:
            raise InputError(f"config={config} cannot be read: {error}") from error
        if not isinstance(sizes, Qwen3MoeConfig):
            raise InputError(f"config={config} is of a {sizes.model_type}; name a qwen3_moe's")
        self.model: PreTrainedModel = AutoModelForCausalLM.from_config(sizes, dtype=torch.float32)
        self._learning_rate, self._limit, self._steps = learning_rate, 60 * minutes, steps
        self._seconds = self._started = self._loss = 0.0

    def _done(self) -> float:
        return min(1.0, max(self.global_step / self._steps, self._seconds / self._limit))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._started = self._started or time.monotonic() - self._seconds
        self._seconds = time.monotonic() - self._started
        done = self._done()
        fall = (1 + math.cos(math.pi * max(0.0, done - WARMUP) / (1 - WARMUP))) / 2
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self._learning_rate * min(1.0, done / WARMUP) * fall

    def _nll(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, " tokens"], tuple[Tensor, ...]]:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        found = self.model(**inputs, use_cache=False, output_router_logits=True)
        real = batch["attention_mask"].bool() & batch["valid"][:, None]
        nll = token_nll(found.logits[:, :-1], batch["input_ids"][:, 1:])
        return nll[real[:, 1:] & real[:, :-1]], found.router_logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Float[Tensor, ""]:
        nll, router_logits = self._nll(batch)
        loss: Tensor = nll.mean()
        self._loss = 0.98 * (self._loss or loss.item()) + 0.02 * loss.item()
        # Layer by layer: the model's own loss pools them, where an idle expert hides behind others.
        config = self.model.config
        sizes = config.num_experts, config.num_experts_per_tok, batch["attention_mask"]
        for logits in router_logits:
            loss = loss + config.router_aux_loss_coef * load_balancing_loss_func((logits,), *sizes)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step % STEPS_A_LINE == 0:
            valid = self.trainer.callback_metrics.get("valid/nll", math.nan)
            when = f"step {self.global_step}, {self._seconds:.0f} s ({self._done():.1%})"
            print(f"{when}: {self._loss:.3f} nats a token, last validation {valid:.3f}", flush=True)
        self.trainer.should_stop = self._done() >= 1

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        nll, _ = self._nll(batch)
        self.log("valid/nll", nll.mean(), batch_size=len(nll))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        norms = {"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0}
        matrices = {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": 0.1}
        return torch.optim.AdamW([matrices, norms], betas=(0.9, 0.95), fused=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self._seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states = checkpoint["state_dict"], self.state_dict()
        before, now = ([tensor.shape for tensor in state.values()] for state in states)
        if before != now:
            raise InputError("the training in --output is of another config; name another --output")
        self._seconds = checkpoint["seconds"]


def train(
    *,
    output: Path = Path("checkpoints/qwen3moe-tiny"),
    config: Path = Path(__file__).with_name("qwen3moe_tiny.json"),
    path: Path | None = None,
    minutes: PositiveFloat = 20.0,
    steps: PositiveInt | None = None,
    seed: NonNegativeInt = 0,
    batch_size: PositiveInt = 4,
    learning_rate: PositiveFloat = 3e-3,
) -> None:
    """Trains, writes the model as a checkpoint folder, and prints its validation perplexity.

    Args:
        output: Folder for the model; the training keeps its checkpoint beside it, OUTPUT-training.
        config: The config.json of a qwen3_moe; its context is the length of the sequences.
        path: Folder of text, as `data.path` of an experiment; null takes the shipped corpus.
        minutes: Wall-clock time of the training, all its runs together.
        steps: Steps after which it ends if that is sooner; steps can be repeated, minutes cannot.
        seed: Seed of the weights and of the order of the text, 0 or more.
        batch_size: Sequences a step.
        learning_rate: Peak step size of AdamW.
    """
    last = output.with_name(f"{output.name}-training") / "last.ckpt"
    if output.exists() and not last.exists():
        raise InputError(f"{output} is no model of this script; name another --output")
    seed_everything(seed, verbose=False)
    module = LanguageModule(config, learning_rate, minutes, steps or math.inf)
    data = TextDataModule(
        tokenizer=TOKENIZER,
        path=path,
        sequence_length=module.model.config.max_position_embeddings,
        valid_tokens=None,
        # It is saved in checkpoints, where the parser's own type would not load.
        batch_size=int(batch_size),
        seed=seed,
    )
    data.check(("train", "valid"))
    keep = ModelCheckpoint(
        last.parent, last.stem, every_n_train_steps=STEPS_A_CHECKPOINT, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps or -1,
        max_epochs=-1,
        gradient_clip_val=1.0,
        val_check_interval=STEPS_A_VALIDATION,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[keep, RouterMonitor(find_moe_layers(module))],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with locked(last.parent):
        trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
        trainer.save_checkpoint(last)
        found = trainer.validate(module, data, verbose=False, weights_only=True)[0]
        with replacing(output) as partial:
            module.model.save_pretrained(partial)
            for file in sorted(TOKENIZER.glob("tokenizer*")):
                shutil.copyfile(file, partial / file.name)
            verify(partial, module.model)
    idle = sum(count for name, count in found.items() if "unused_experts" in name)
    print(f"{output}: {module.model.num_parameters()} parameters, step {trainer.global_step}")
    print(f"validation perplexity {math.exp(found['valid/nll']):.2f}, {idle:.0f} idle experts")


def main(words: Sequence[str] | None = None) -> None:
    """Trains one model; a setting that cannot be used ends with exit code 2."""
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(train)
    options = parser.parse_args(words)
    set_up_screen()
    try:
        train(**options.as_dict())
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
