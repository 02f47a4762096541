"""In which mode a student is trained."""

from transformers import PreTrainedModel

from lightning_smoe.models.walk import decoder_layers


def set_modes(student: PreTrainedModel, gradient_checkpointing: bool) -> None:
    """Puts a student in evaluation mode, but for what has to know that it is trained; in place.

    Routers then draw no noise and nothing of the model is dropped: it learns to answer as it will
    be asked. Dropout of adapters stays on.

    Args:
        student: The student, with its adapters.
        gradient_checkpointing: Keep of each decoder layer only its input, and compute it again for
            the gradient.
    """
    student.eval()
    for name, module in student.named_modules():
        if ".lora_dropout." in name:
            module.train()
    if gradient_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
        # Only reentrant checkpoints need inputs with gradients, which reach the first layer.
        student.disable_input_require_grads()
        for layer in decoder_layers(student):
            # This flag alone, not those of what is in the layer.
            layer.training = True
