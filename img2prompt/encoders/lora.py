"""Low-rank adaptation (Hu et al., 2021) of an encoder's blocks, by peft (extra `lora`)."""

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from img2prompt.encoders.encoder import Encoder


def linear_layers(encoder: Encoder) -> list[str]:
    """The names of the linear layers in the blocks that are called as layers.

    Of others the model reads the weight alone, and an adapter would be without effect: the attention of open_clip's
    own transformers, queries and keys of EVA.
    """
    called: list[int] = []
    layers = [layer for block in encoder.block_modules() for layer in block.modules() if type(layer) is nn.Linear]
    hooks = [layer.register_forward_pre_hook(lambda layer, args: called.append(id(layer))) for layer in layers]
    encoder.dry_run()
    for hook in hooks:
        hook.remove()
    return [name for name, layer in encoder.named_modules() if id(layer) in called]


def largest_rank(encoder: Encoder) -> int:
    """The highest rank that a weight of these layers has; 0 without one."""
    layers = [encoder.get_submodule(name) for name in linear_layers(encoder)]
    return max((min(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear)), default=0)


def add_adapters(encoder: Encoder, rank: int, alpha: int) -> None:
    """Freezes the encoder and lets each linear layer of its blocks learn what is added to its weight: alpha / rank
    times a product of two matrices of this rank, which is nothing at first.
    """
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear_layers(encoder)), encoder)


def remove_adapters(encoder: Encoder) -> None:
    """Puts the layers back as they were."""
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, LoraLayer):
            encoder.set_submodule(name, layer.get_base_layer())
    # What peft notes of its adapters, which would make others a second kind beside them.
    del encoder.peft_config
