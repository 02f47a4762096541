"""A checkpoint folder written a decoder layer at a time, and proved a layer at a time."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_smoe.errors import InputError
from lightning_smoe.models.folder import CheckpointFolder, open_checkpoint
from lightning_smoe.models.head import vocab_size_of
from lightning_smoe.models.layer import decoder_layer_of, find_moe_layers
from lightning_smoe.models.passes import begin
from lightning_smoe.models.shard_writer import ShardWriter
from lightning_smoe.models.shards import ShardLayout
from lightning_smoe.models.stored import round_in_place, stored_state
from lightning_smoe.models.streamed import Streamed
from lightning_smoe.models.walk import WaitingBatch, run_layer

_PROOF_TOKENS = 32


class StreamedFolder:
    """The weights of a model that is rebuilt while its layers come from the files of its original.

    A few random tokens go through every layer as it is stored, and later through the folder as it
    is read back: hidden states, and every tensor, must be the same.

    Args:
        residence: The model; a layer is put while it is held.
        source: Folder of the original.
        path: Folder to write.
        layout: What lies where.
        device: Where layers are held.
    """

    def __init__(
        self,
        residence: Streamed,
        source: CheckpointFolder,
        path: Path,
        *,
        layout: ShardLayout,
        device: torch.device,
    ) -> None:
        self._residence, self._source, self.path = residence, source, path
        self._writer = ShardWriter(path, layout)
        self._device = device
        self._path, _ = decoder_layer_of(find_moe_layers(residence.model)[0].name)
        self._proof = begin_proof(residence, device)
        self.checksums: dict[str, int] = {}
        self._resumed = False

    @property
    def proof(self) -> Tensor:
        """The hidden states of the proof behind the last layer that was put."""
        return self._proof.states

    def resume(self, proof: Tensor, checksums: Mapping[str, int]) -> None:
        """Goes on behind the layers that an earlier run put here."""
        self._proof = self._proof.moved(proof.to(self._device))
        self._resumed = True
        self.checksums = dict(checksums)

    def put_outside(self) -> None:
        """Writes what is not in decoder layers."""
        with self._residence.outside(self._device) as model:
            state = model.state_dict()
            self._put({k: t for k, t in state.items() if not k.startswith(f"{self._path}.")})

    def put(self, index: int, decoder: nn.Module) -> None:
        """Writes a decoder layer, whose weights are rounded in place to what is stored."""
        self._put({f"{self._path}.{index}.{k}": t for k, t in decoder.state_dict().items()})
        self._proof = self._proof.moved(run_layer(decoder, self._proof, index))

    def _put(self, state: dict[str, Tensor]) -> None:
        model = self._residence.model
        round_in_place(model, self._source, state)
        self._writer.write(stored_state(model, self._source, state))
        self.checksums |= checksums_of(state)

    def finish(self) -> None:
        """Completes the weight files."""
        self._writer.finish()

    def verify(self, dtype: torch.dtype) -> None:
        """Reads the folder back, which has its other files by now.

        Args:
            dtype: Type of the weights in memory.

        Raises:
            InputError: A tensor or a hidden state differs in a single bit, or a tensor is missing.
        """
        again = Streamed(open_checkpoint(self.path), dtype)
        proof = begin_proof(again, self._device)
        found: dict[str, int] = {}
        with again.outside(self._device) as model:
            state = model.state_dict()
            found |= checksums_of({k: t for k, t in state.items() if not t.is_meta})
        for index in range(again.num_layers):
            with again.layer(index, self._device) as decoder:
                state = decoder.state_dict()
                found |= checksums_of({f"{self._path}.{index}.{k}": t for k, t in state.items()})
                proof = proof.moved(run_layer(decoder, proof, index))
        changed = [name for name, value in self.checksums.items() if found.get(name) != value]
        # Another machine, on which a run may go on, rounds otherwise; weights are compared anyway.
        differs = not self._resumed and not torch.equal(proof.states, self.proof)
        if changed or differs:
            raise InputError(
                f"{self.path} does not give the model's weights and hidden states when read back "
                f"({', '.join(changed[:5])}); please report this with the family of the model"
            )


def begin_proof(residence: Streamed, device: torch.device) -> WaitingBatch:
    """A few random tokens in front of the first decoder layer."""
    size = vocab_size_of(residence.model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size, (1, _PROOF_TOKENS), generator=generator).to(device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return begin(residence, batch, device)


def checksums_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of the bytes of each tensor, by name."""
    return {k: zlib.crc32(_bytes(t).numpy().data) for k, t in state.items()}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
