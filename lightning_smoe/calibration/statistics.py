"""Sums over calibration tokens: added up by batch, reduced over processes once, kept in a file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_smoe.calibration.observer import RoutedTokens
from lightning_smoe.errors import InputError
from lightning_smoe.functional.sums import ExpertSums
from lightning_smoe.models.artifact import Manifest, replacing
from lightning_smoe.models.layer import MoELayer

# Outputs of all experts for a block of tokens: 2**24 float32 numbers are 64 MB.
_BLOCK_NUMBERS = 1 << 24
_HEADER = "statistics"
# Norm below which an output has no direction; far under any float32 activation that matters.
_SMALLEST_NORM = 1e-20


def empty_sums(
    layer: MoELayer, num_domains: int, all_experts: bool, device: torch.device
) -> ExpertSums:
    """Zeros for one layer.

    Args:
        layer: The layer, which gives the number of experts and the width.
        num_domains: Domains, on the first axis of every sum.
        all_experts: Also make room for the sums over outputs of all experts on all tokens.
        device: Where the sums are kept.
    """
    experts, hidden = layer.num_experts, layer.hidden_size

    def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(num_domains, *shape, dtype=dtype, device=device)

    return ExpertSums(
        num_tokens=zeros(dtype=torch.int64),
        count=zeros(experts, dtype=torch.int64),
        gate_sum=zeros(experts),
        output_norm_sum=zeros(experts),
        gated_norm_sum=zeros(experts),
        logit_gram=zeros(experts, experts),
        output_sum=zeros(experts, hidden) if all_experts else None,
        output_gram=zeros(experts, experts) if all_experts else None,
        output_cosine=zeros(experts, experts) if all_experts else None,
    )


def add_routed(sums: ExpertSums, tokens: RoutedTokens) -> None:
    """Adds what the selected experts did, in place; one row of `sums` a domain."""
    if tokens.outputs is None:
        raise ValueError("the sums need the selected experts' outputs; observe with outputs")
    num_domains, num_experts = sums.count.shape
    slot = (tokens.domain[:, None] * num_experts + tokens.expert_indices).reshape(-1)

    def by_expert(values: Tensor) -> Tensor:
        flat = torch.zeros(sums.count.numel(), dtype=torch.float64, device=values.device)
        return flat.index_add_(0, slot, values.double().reshape(-1)).view_as(sums.count)

    gates = tokens.routing_weights.float()
    norms = torch.linalg.vector_norm(tokens.outputs.float(), dim=-1)
    sums.num_tokens.add_(torch.bincount(tokens.domain, minlength=num_domains))
    sums.count.add_(torch.bincount(slot, minlength=sums.count.numel()).view_as(sums.count))
    sums.gate_sum.add_(by_expert(gates))
    sums.output_norm_sum.add_(by_expert(norms))
    sums.gated_norm_sum.add_(by_expert(gates * norms))
    for domain in tokens.domain.unique().tolist():
        logits = tokens.router_logits[tokens.domain == domain].double()
        sums.logit_gram[domain].addmm_(logits.T, logits)


def add_all(sums: ExpertSums, layer: MoELayer, tokens: RoutedTokens) -> None:
    """Adds what every expert would have done with every token, in place, in bounded memory."""
    block = max(1, _BLOCK_NUMBERS // (layer.num_experts * layer.hidden_size))
    for domain in tokens.domain.unique().tolist():
        for states in tokens.states[tokens.domain == domain].split(block):
            _add_block(sums, domain, _outputs_of_all(layer, states))


def _outputs_of_all(
    layer: MoELayer, states: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "experts tokens hidden"]:
    weights = layer.weights()
    outputs = torch.stack(
        [
            layer.activations(states, expert) @ weights.down_proj[expert].T
            for expert in range(layer.num_experts)
        ]
    )
    if weights.down_bias is not None:
        outputs += weights.down_bias[:, None]
    return outputs.float()


def _add_block(
    sums: ExpertSums, domain: int, outputs: Float[Tensor, "experts tokens hidden"]
) -> None:
    if sums.output_sum is None or sums.output_gram is None or sums.output_cosine is None:
        raise ValueError("there is no room for the sums over all experts")
    flat = outputs.flatten(1)
    norms = torch.linalg.vector_norm(outputs, dim=-1, keepdim=True).clamp_min(_SMALLEST_NORM)
    directions = (outputs / norms).flatten(1)
    sums.output_sum[domain].add_(outputs.sum(1, dtype=torch.float64))
    sums.output_gram[domain].add_(flat @ flat.T)
    sums.output_cosine[domain].add_(directions @ directions.T)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The sums of every layer of a model.

    Args:
        layers: Sums by the layer's name; the first axis of each is the domain.
        domains: Names of the domains.
        manifest: What made them.
    """

    layers: dict[str, ExpertSums]
    domains: tuple[str, ...]
    manifest: Manifest

    @property
    def has_all_experts(self) -> bool:
        """Whether every expert was run on every token."""
        return all(sums.output_gram is not None for sums in self.layers.values())

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> "Statistics":
        """Adds up the sums of all processes.

        Args:
            reduce: Sum of a tensor over processes.
        """
        layers = {
            name: ExpertSums(**{k: reduce(t) for k, t in sums.tensors().items()})
            for name, sums in self.layers.items()
        }
        return Statistics(layers, self.domains, self.manifest)

    def save(self, path: Path) -> None:
        """Writes one safetensors file; the manifest and the domains stand in its header."""
        tensors = {
            f"{name}:{key}": tensor.cpu().contiguous()
            for name, sums in self.layers.items()
            for key, tensor in sums.tensors().items()
        }
        header = {"manifest": self.manifest.to_json(), "domains": self.domains}
        with replacing(path) as partial:
            # One entry: safetensors writes several in an order that differs from run to run.
            save_file(tensors, partial, metadata={_HEADER: json.dumps(header)})

    @staticmethod
    def load(path: Path) -> "Statistics":
        """Reads what `save` wrote.

        Raises:
            InputError: The file is damaged, or is not one of ours.
        """
        layers: dict[str, dict[str, Tensor]] = {}
        manifest, domains = read_header(path)
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                name, _, field = key.rpartition(":")
                layers.setdefault(name, {})[field] = file.get_tensor(key)
        try:
            sums = {n: ExpertSums(**fields) for n, fields in sorted(layers.items(), key=_by_layer)}
        except TypeError as error:
            raise InputError(
                f"{path} holds other sums than this version reads; delete it and calibrate again"
            ) from error
        return Statistics(sums, domains, manifest)


def _by_layer(item: tuple[str, Any]) -> list[Any]:
    return [(len(part), part) for part in item[0].split(".")]


def read_header(path: Path) -> tuple[Manifest, tuple[str, ...]]:
    """Reads what made a statistics file, and its domains, without its tensors.

    Raises:
        InputError: The file is damaged, or is not one of ours.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and calibrate again") from error
    manifest = Manifest.from_json(stored.get("manifest"))
    if manifest is None:
        raise InputError(f"{path} holds no statistics; delete it and calibrate again")
    return manifest, tuple(stored["domains"])


def domain_of_positions(domain: Int[Tensor, " batch"], sequence: int) -> Int[Tensor, " positions"]:
    """Repeats each sequence's domain for its positions."""
    return domain.repeat_interleave(sequence)
