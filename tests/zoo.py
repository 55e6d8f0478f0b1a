"""Public architectures with random weights: torchvision, timm, transformers.

Needs `pip install --no-deps torchvision==0.28.0 timm huggingface_hub` and
`pip install transformers pyyaml`. The libraries are imported on first use; nothing is downloaded.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Member:
    """One architecture: `inputs` takes a batch size; a dict holds keyword arguments."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]


ZOO: dict[str, Member] = {}


@functools.cache
def libraries() -> dict[str, ModuleType]:
    """Torchvision, timm and transformers, beside a torch that may be built for the CPU only.

    Torchvision's compiled operators cannot load beside such a torch and its import stops at their
    registration, which no model definition needs.
    """
    register = torch.library.register_fake

    def register_others(operator: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(operator, str) and operator.startswith("torchvision::"):
            return lambda function: function
        return register(operator, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.register_fake = register_others
        try:
            import torchvision
        finally:
            torch.library.register_fake = register
        import timm
        import transformers
    return {"torchvision": torchvision, "timm": timm, "transformers": transformers}


def build(name: str) -> nn.Module:
    """The model, seeded, in eval mode."""
    libraries()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return ZOO[name].build().eval()


# Inputs -------------------------------------------------------------------------------------------


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(batch: int, channels: int = 3, size: int = 224) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=generator())


def ids(batch: int, length: int = 32) -> Tensor:
    return torch.randint(5, 995, (batch, length), generator=generator())


def text(batch: int) -> Inputs:
    return {"input_ids": ids(batch)}


def pixels(batch: int) -> Inputs:
    return {"pixel_values": images(batch)}


def translation(batch: int) -> Inputs:
    return {"input_ids": ids(batch), "decoder_input_ids": ids(batch, 8)}


def speech(batch: int) -> Inputs:
    spectrogram = torch.randn(batch, 80, 100, generator=generator())
    return {"input_features": spectrogram, "decoder_input_ids": ids(batch, 8)}


# Members ------------------------------------------------------------------------------------------


def torchvision_member(name: str) -> None:
    ZOO[f"tv/{name}"] = Member(
        lambda: libraries()["torchvision"].models.get_model(name, weights=None),
        lambda batch: (images(batch),),
    )


def timm_member(name: str) -> None:
    def inputs(batch: int) -> Inputs:
        config = libraries()["timm"].get_pretrained_cfg(name, allow_unregistered=True)
        channels, size, _ = config.input_size
        return (images(batch, channels, size),)

    ZOO[f"timm/{name}"] = Member(
        lambda: libraries()["timm"].create_model(name, pretrained=False), inputs
    )


def transformers_member(
    name: str, kind: str, inputs: Callable[[int], Inputs], **options: Any
) -> None:
    """`kind` is the model's class; its configuration class is found through it."""

    def make() -> nn.Module:
        model_class = getattr(libraries()["transformers"], kind)
        config = model_class.config_class(**options)
        config.use_cache = False
        return model_class(config)

    ZOO[f"hf/{name}"] = Member(make, inputs)


_TORCHVISION = (
    "alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d densenet121 googlenet squeezenet1_1 "
    "mobilenet_v2 mobilenet_v3_small mnasnet0_5 shufflenet_v2_x1_0 efficientnet_b0 "
    "efficientnet_v2_s regnet_y_400mf convnext_tiny vit_b_16 swin_t swin_v2_t"
)
for _name in _TORCHVISION.split():
    torchvision_member(_name)

_TIMM = (
    "botnet26t_256 cait_xxs24_224 convmixer_768_32 convnextv2_atto cspdarknet53 davit_tiny "
    "deit_tiny_patch16_224 edgenext_xx_small efficientnet_lite0 ghostnet_100 hrnet_w18_small "
    "inception_next_tiny levit_128s mixer_s32_224 mobilevit_xxs nf_resnet50 poolformer_s12 "
    "res2net50_26w_4s seresnet50 skresnet18 swin_tiny_patch4_window7_224 "
    "vit_tiny_patch16_224 xcit_nano_12_p16_224"
)
for _name in _TIMM.split():
    timm_member(_name)

_VOCABULARY = {"vocab_size": 1000}
_SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
_DECODER = _SMALL | _VOCABULARY | {"num_key_value_heads": 2, "max_position_embeddings": 128}

transformers_member("bert", "BertForSequenceClassification", text, **_SMALL, **_VOCABULARY)
transformers_member(
    "deberta_v2",
    "DebertaV2ForSequenceClassification",
    text,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    **_SMALL,
    **_VOCABULARY,
)
transformers_member("gpt2", "GPT2LMHeadModel", text, n_embd=128, n_layer=3, n_head=4, **_VOCABULARY)
transformers_member("llama", "LlamaForCausalLM", text, **_DECODER)
transformers_member("qwen2", "Qwen2ForCausalLM", text, **_DECODER)
transformers_member(
    "mamba",
    "MambaForCausalLM",
    text,
    hidden_size=64,
    num_hidden_layers=2,
    state_size=8,
    **_VOCABULARY,
)
transformers_member(
    "t5",
    "T5ForConditionalGeneration",
    translation,
    d_model=128,
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
    **_VOCABULARY,
)
transformers_member(
    "whisper",
    "WhisperForConditionalGeneration",
    speech,
    d_model=128,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=256,
    decoder_ffn_dim=256,
    max_source_positions=50,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    **_VOCABULARY,
)
transformers_member("vit", "ViTForImageClassification", pixels, **_SMALL)
transformers_member(
    "swin", "SwinForImageClassification", pixels, embed_dim=32, depths=[2, 2], num_heads=[2, 4]
)
transformers_member(
    "convnext",
    "ConvNextForImageClassification",
    pixels,
    hidden_sizes=[32, 64, 128, 256],
    depths=[1, 1, 1, 1],
)
transformers_member(
    "segformer",
    "SegformerForSemanticSegmentation",
    pixels,
    hidden_sizes=[32, 64, 96, 128],
    decoder_hidden_size=64,
)
