"""Families of transformers with small configs, as `from_config` gives them: weights drawn.

Settings are the library's defaults (`use_cache` among them), sizes differ where they mean different
things, and no weight has its initial value: biases are not zero, norms not the identity.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import Tensor, nn

LENGTH = 12  # of the example texts; decoders generate beyond it
VOCABULARY = 99
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        name: What people call it.
        auto_class: Name of the class that `from_pretrained` is called on.
        kind: "decoder", "encoder-decoder" (both generate), "encoder", "vision", "audio" or
            "two towers".
        model_type: As `AutoConfig.for_model` takes it.
        options: Of the config, beside the defaults.
        inputs: Takes a batch size, gives keyword arguments.
    """

    name: str
    auto_class: str
    kind: str
    model_type: str
    options: Mapping[str, Any]
    inputs: Callable[[int], dict[str, Tensor]]

    @property
    def generates(self) -> bool:
        """Whether `generate` is what it is for."""
        return self.kind in ("decoder", "encoder-decoder")

    def config(self, **changes: Any) -> Any:
        """The config; some of its options can be set to other values."""
        auto = zoo.libraries()["transformers"].AutoConfig
        return auto.for_model(self.model_type, **{**self.options, **changes})

    def build(self, **changes: Any) -> nn.Module:
        """The model in eval mode; the same weights each time, random states are as before."""
        transformers = zoo.libraries()["transformers"]
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = getattr(transformers, self.auto_class).from_config(self.config(**changes))
            perturb(model)
        return model.eval()


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move every parameter and every running statistic away from its initial value.

    Matrices are drawn with the scale that keeps activations of a size, so that attention is not
    uniform and no layer is negligible.
    """
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        parameter.add_(noise(parameter), alpha=(0.8 if parameter.dim() > 1 else 1) / fan_in**0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(noise(buffer), alpha=0.2)
        elif name.endswith("running_var"):
            buffer.mul_(0.5 + noise(buffer).sigmoid())


# Inputs -------------------------------------------------------------------------------------------


def _drawn() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def _tokens(batch: int, length: int = LENGTH) -> Tensor:
    return torch.randint(EOS + 1, VOCABULARY, (batch, length), generator=_drawn())


def text(batch: int) -> dict[str, Tensor]:
    """Texts of one length."""
    return {"input_ids": _tokens(batch), "attention_mask": torch.ones(batch, LENGTH).long()}


def padded(batch: int, side: str = "right") -> dict[str, Tensor]:
    """Texts of which every second one is shorter, with padding tokens on one side."""
    inputs = text(batch)
    gone = slice(0, 3) if side == "left" else slice(-3, None)
    inputs["input_ids"][1::2, gone] = PAD
    inputs["attention_mask"][1::2, gone] = 0
    return inputs


def translation(batch: int) -> dict[str, Tensor]:
    """A text and the beginning of another."""
    return padded(batch) | {"decoder_input_ids": _tokens(batch, 7)}


def speech(batch: int) -> dict[str, Tensor]:
    """A spectrogram of 20 mel bands, and the beginning of a text."""
    features = torch.randn(batch, 20, 60, generator=_drawn())
    return {"input_features": features, "decoder_input_ids": _tokens(batch, 7)}


def sound(batch: int) -> dict[str, Tensor]:
    """A waveform."""
    return {"input_values": torch.randn(batch, 1600, generator=_drawn())}


def _images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=_drawn())


def small_images(batch: int) -> dict[str, Tensor]:
    """32 x 32 pixels."""
    return {"pixel_values": _images(batch, 32)}


def images(batch: int) -> dict[str, Tensor]:
    """64 x 64 pixels."""
    return {"pixel_values": _images(batch, 64)}


def pairs(batch: int) -> dict[str, Tensor]:
    """Images and texts, which end in the token that CLIP pools at."""
    tokens = text(batch)
    tokens["input_ids"][:, -1] = EOS
    return tokens | small_images(batch)


# Results ------------------------------------------------------------------------------------------

# Ways to generate: options of `generate`, and whether the prompts are padded on the left.
GENERATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy": ({}, False),
    "no cache": ({"use_cache": False}, False),
    "static cache": ({"cache_implementation": "static"}, False),
    "beams": ({"num_beams": 3}, False),
    "left padding": ({}, True),
}


def outputs(family: Family, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a call returns by name, those of outputs inside of outputs included."""
    with torch.no_grad():
        return dict(_tensors(model(**family.inputs(2)), ""))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}.{key}".removeprefix("."))


def generated(family: Family, model: nn.Module, way: str, length: int = 8) -> dict[str, Tensor]:
    """What `generate` returns: the tokens, and the logits behind each of them.

    Raises:
        Exception: Whatever the library raises for a way that the architecture does not support.
    """
    options, left = GENERATIONS[way]
    inputs = family.inputs(2)
    inputs.pop("decoder_input_ids", None)
    if left:
        if "input_ids" not in inputs:
            raise ValueError("its inputs are no text")
        inputs = padded(2, "left")
    given = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, **options}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made = model.generate(**inputs, **given, output_logits=True, return_dict_in_generate=True)
    return dict(_tensors({"tokens": made["sequences"], "logits": torch.stack(made["logits"])}, ""))


# Families -----------------------------------------------------------------------------------------

_TOKENS = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_ENCODER = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 88,
}
_TEXT = _ENCODER | _TOKENS | {"max_position_embeddings": 64}
_MHA = _TEXT | {"num_key_value_heads": 4}
_GQA = _TEXT | {"num_attention_heads": 8, "num_key_value_heads": 4}
_HEAD_DIM = _GQA | {"head_dim": 10}  # the config says it, heads x head_dim is not hidden_size
_EXPERTS = {"num_experts_per_tok": 2}

_ALL: list[Family] = []


def _family(
    name: str,
    auto_class: str,
    kind: str,
    model_type: str,
    inputs: Callable[[int], dict[str, Tensor]],
    **options: Any,
) -> None:
    _ALL.append(Family(name, f"AutoModelFor{auto_class}", kind, model_type, options, inputs))


def _decoder(name: str, model_type: str, **options: Any) -> None:
    _family(name, "CausalLM", "decoder", model_type, text, **options)


_decoder("Llama (MHA)", "llama", **_MHA)
_decoder("Llama (GQA)", "llama", **_GQA)
_decoder("Mistral", "mistral", **_GQA, sliding_window=8)
_decoder("Qwen2", "qwen2", **_GQA)
_decoder("Qwen3", "qwen3", **_HEAD_DIM)
_decoder(
    "Qwen3-MoE",
    "qwen3_moe",
    **_HEAD_DIM,
    **_EXPERTS,
    num_experts=5,
    moe_intermediate_size=36,
    norm_topk_prob=True,
)
_decoder("Mixtral", "mixtral", **_GQA, **_EXPERTS, num_local_experts=5)
_decoder("Gemma", "gemma", **_HEAD_DIM)
_decoder("Gemma 2", "gemma2", **_HEAD_DIM, sliding_window=8, query_pre_attn_scalar=14)
_decoder("Gemma 3", "gemma3_text", **_HEAD_DIM, sliding_window=8, query_pre_attn_scalar=14)
_decoder("Phi3", "phi3", **_GQA)
_decoder("GPT-NeoX", "gpt_neox", **_TEXT)
_decoder("GPT-2", "gpt2", n_embd=48, n_layer=3, n_head=4, n_inner=88, n_positions=64, **_TOKENS)
_decoder(
    "OPT",
    "opt",
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    ffn_dim=88,
    word_embed_proj_dim=48,
    max_position_embeddings=64,
    **_TOKENS,
)
_family(
    "T5",
    "Seq2SeqLM",
    "encoder-decoder",
    "t5",
    translation,
    vocab_size=VOCABULARY,
    d_model=48,
    d_kv=10,
    d_ff=88,
    num_layers=3,
    num_heads=4,
    pad_token_id=PAD,
    eos_token_id=EOS,
    decoder_start_token_id=PAD,
)
_BOTH_SIDES = {
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 88,
    "decoder_ffn_dim": 76,
    "decoder_start_token_id": EOS,
}
_family(
    "BART",
    "Seq2SeqLM",
    "encoder-decoder",
    "bart",
    translation,
    max_position_embeddings=64,
    forced_eos_token_id=None,
    **_BOTH_SIDES,
    **_TOKENS,
)
_family(
    "Whisper",
    "SpeechSeq2Seq",
    "encoder-decoder",
    "whisper",
    speech,
    num_mel_bins=20,
    max_source_positions=30,
    max_target_positions=40,
    **(_BOTH_SIDES | {"decoder_start_token_id": BOS}),
    **_TOKENS,
)
_family("BERT", "SequenceClassification", "encoder", "bert", padded, **_TEXT)
_family("RoBERTa", "MaskedLM", "encoder", "roberta", padded, **_TEXT)
_family(
    "DistilBERT",
    "SequenceClassification",
    "encoder",
    "distilbert",
    padded,
    vocab_size=VOCABULARY,
    dim=48,
    n_layers=3,
    n_heads=4,
    hidden_dim=88,
    max_position_embeddings=64,
    pad_token_id=PAD,
)
_family(
    "DeBERTa-v2",
    "SequenceClassification",
    "encoder",
    "deberta-v2",
    padded,
    relative_attention=True,
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type=["p2c", "c2p"],
    type_vocab_size=0,
    position_biased_input=False,
    max_relative_positions=-1,
    **_TEXT,
)
_family(
    "ModernBERT",
    "MaskedLM",
    "encoder",
    "modernbert",
    padded,
    local_attention=8,
    cls_token_id=BOS,
    sep_token_id=EOS,
    **_TEXT,
)
_family(
    "ViT",
    "ImageClassification",
    "vision",
    "vit",
    small_images,
    image_size=32,
    patch_size=8,
    num_labels=7,
    **_ENCODER,
)
_family(
    "Swin",
    "ImageClassification",
    "vision",
    "swin",
    small_images,
    image_size=32,
    patch_size=2,
    window_size=4,
    embed_dim=32,
    depths=[2, 2],
    num_heads=[4, 8],
    mlp_ratio=3.0,
    num_labels=7,
)
_family(
    "CLIP",
    "ZeroShotImageClassification",
    "two towers",
    "clip",
    pairs,
    text_config=_TEXT,
    vision_config=_ENCODER
    | {"hidden_size": 56, "intermediate_size": 100, "image_size": 32, "patch_size": 8},
    projection_dim=36,
)
_family(
    "Wav2Vec2",
    "CTC",
    "audio",
    "wav2vec2",
    sound,
    conv_dim=(16, 24, 20),
    conv_kernel=(10, 4, 3),
    conv_stride=(5, 4, 2),
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    vocab_size=30,
    pad_token_id=PAD,
    **_ENCODER,
)
_family(
    "SegFormer",
    "SemanticSegmentation",
    "vision",
    "segformer",
    images,
    hidden_sizes=[16, 32, 40, 64],
    depths=[2, 2, 2, 2],
    num_attention_heads=[1, 2, 4, 8],
    decoder_hidden_size=44,
    num_labels=7,
)
_family(
    "ConvNeXt",
    "ImageClassification",
    "vision",
    "convnext",
    images,
    hidden_sizes=[16, 24, 40, 56],
    depths=[2, 2, 3, 2],
    num_labels=7,
)

FAMILIES = {family.name: family for family in _ALL}
