"""Spreading the weights of one model over several devices (FSDP2)."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_smoe.errors import InputError
from lightning_smoe.models.walk import decoder_layers


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each process a slice of every parameter, on its own device; in place.

    A decoder layer is whole only while it runs. What lies outside the layers (embeddings, final
    norm, head) is whole from a forward pass to the end of its backward pass, so that the head can
    be applied by itself in between. Gradients are means over the processes.

    The first call of the model has to be a whole one, and a loss has to depend on the states of the
    last layer, if only with weight zero: their gradient makes a layer whole for its backward pass.

    On a model that is sharded already, it takes back what a forward pass without a backward pass
    left whole. From then on parameters are the slices, which an optimizer has to hold.

    Args:
        model: The model, with adapters or without; what is to be trained is decided, and trainable
            parameters are of one type.
        mesh: The processes that share the model, along one axis.

    Raises:
        InputError: Parameters are trained, but none of a decoder layer.
    """
    if not is_sharded(model):
        layers = decoder_layers(model)
        _refuse_head_alone(model, layers)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a slice of every parameter."""
    return isinstance(model, FSDPModule)


def _refuse_head_alone(model: nn.Module, layers: nn.ModuleList) -> None:
    # Gradients are summed once those towards the output of some layer are there.
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if trained and not any(p.requires_grad for p in layers.parameters()):
        raise InputError(
            f"{trained[0]} would be trained, but nothing of a decoder layer, which a model in "
            "slices does not do; train something of a layer too, or use ddp or one device"
        )
