"""Models that must come out without a generated module, beside those of `zoo.ZOO`.

A UNet as diffusers writes one, torch's own transformers at several widths, and ModernBERT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    half_dim = dim // 2
    exponent = -math.log(max_period) * torch.arange(
        start=0, end=half_dim, dtype=torch.float32, device=timesteps.device
    )
    emb = timesteps[:, None].float() * torch.exp(exponent / half_dim)[None, :]
    emb = torch.cat([torch.sin(emb), torch.cos(emb)], dim=-1)
    emb = torch.cat([emb[:, half_dim:], emb[:, :half_dim]], dim=-1)
    if dim % 2 == 1:
        emb = F.pad(emb, (0, 1, 0, 0))
    return emb


class Timesteps(nn.Module):
    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels

    def forward(self, timesteps: Tensor) -> Tensor:
        return timestep_embedding(timesteps, self.num_channels)


class TimestepEmbedding(nn.Module):
    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(sample)))


class ResnetBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, temb_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.output_scale_factor = 1.0

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        hidden_states = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        temb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden_states = hidden_states + temb
        hidden_states = self.nonlinearity(self.norm2(hidden_states))
        hidden_states = self.conv2(self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + hidden_states) / self.output_scale_factor


class AttnProcessor2_0:  # noqa: N801
    """Computes an `Attention`; an object of no module, which the module holds and calls."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        input_ndim = hidden_states.ndim
        if input_ndim == 4:
            batch_size, channel, height, width = hidden_states.shape
            hidden_states = hidden_states.view(batch_size, channel, height * width).transpose(1, 2)
        batch_size, _, _ = (
            hidden_states.shape if encoder_hidden_states is None else encoder_hidden_states.shape
        )
        if attention_mask is not None:
            attention_mask = attention_mask.view(batch_size, 1, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        key = attn.to_k(encoder_hidden_states)
        value = attn.to_v(encoder_hidden_states)
        inner_dim = key.shape[-1]
        head_dim = inner_dim // attn.heads
        query = query.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)
        key = key.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)
        value = value.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)
        hidden_states = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=0.0, is_causal=False
        )
        hidden_states = hidden_states.transpose(1, 2).reshape(batch_size, -1, attn.heads * head_dim)
        hidden_states = hidden_states.to(query.dtype)
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if input_ndim == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(
                batch_size, channel, height, width
            )
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


class AttnProcessor:
    """The same by matrix products, with the heads folded into the batch."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        key = attn.to_k(encoder_hidden_states)
        value = attn.to_v(encoder_hidden_states)
        query = attn.head_to_batch_dim(query)
        key = attn.head_to_batch_dim(key)
        value = attn.head_to_batch_dim(value)
        attention_probs = attn.get_attention_scores(query, key, attention_mask)
        hidden_states = torch.bmm(attention_probs, value)
        hidden_states = attn.batch_to_head_dim(hidden_states)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


class Attention(nn.Module):
    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 4,
        dim_head: int = 8,
        norm_num_groups: int | None = None,
        residual_connection: bool = False,
        processor: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.heads, self.scale = heads, dim_head**-0.5
        self.residual_connection, self.rescale_output_factor = residual_connection, 1.0
        self.group_norm = None
        if norm_num_groups is not None:
            self.group_norm = nn.GroupNorm(norm_num_groups, query_dim)
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(cross_attention_dim or query_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(cross_attention_dim or query_dim, inner_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim), nn.Dropout(0.0)])
        self.processor = processor if processor is not None else AttnProcessor2_0()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **cross_attention_kwargs,
        )

    def head_to_batch_dim(self, tensor: Tensor) -> Tensor:
        head_size = self.heads
        batch_size, seq_len, dim = tensor.shape
        tensor = tensor.reshape(batch_size, seq_len, head_size, dim // head_size)
        return tensor.permute(0, 2, 1, 3).reshape(batch_size * head_size, seq_len, dim // head_size)

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        head_size = self.heads
        batch_size, seq_len, dim = tensor.shape
        tensor = tensor.reshape(batch_size // head_size, head_size, seq_len, dim)
        return tensor.permute(0, 2, 1, 3).reshape(batch_size // head_size, seq_len, dim * head_size)

    def get_attention_scores(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        if attention_mask is None:
            baddbmm_input = torch.empty(
                query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype
            )
            beta = 0
        else:
            baddbmm_input, beta = attention_mask, 1
        scores = torch.baddbmm(
            baddbmm_input, query, key.transpose(-1, -2), beta=beta, alpha=self.scale
        )
        return scores.softmax(dim=-1).to(query.dtype)


class GEGLU(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return hidden_states * F.gelu(gate)


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, cross_dim: int, processor: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = Attention(dim, None, heads, dim // heads, processor=processor)
        self.attn2 = Attention(dim, cross_dim, heads, dim // heads, processor=processor)
        self.ff = nn.Sequential(GEGLU(dim, dim * 4), nn.Dropout(0.0), nn.Linear(dim * 4, dim))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
        hidden_states = self.attn1(self.norm1(hidden_states)) + hidden_states
        hidden_states = (
            self.attn2(self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states)
            + hidden_states
        )
        return self.ff(self.norm3(hidden_states)) + hidden_states


class Transformer2DModel(nn.Module):
    def __init__(self, channels: int, heads: int, cross_dim: int, processor: Any) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = BasicTransformerBlock(channels, heads, cross_dim, processor)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
        batch, _, height, width = hidden_states.shape
        residual = hidden_states
        hidden_states = self.proj_in(self.norm(hidden_states))
        inner_dim = hidden_states.shape[1]
        hidden_states = hidden_states.permute(0, 2, 3, 1).reshape(batch, height * width, inner_dim)
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, encoder_hidden_states)
        hidden_states = (
            hidden_states.reshape(batch, height, width, inner_dim).permute(0, 3, 1, 2).contiguous()
        )
        return self.proj_out(hidden_states) + residual


class UNet2DConditionModel(nn.Module):
    """Input [B, 3, H, W], t [B], context [B, L, cross_dim]; H and W divide by 4."""

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64),
        cross_dim: int = 24,
        heads: int = 4,
        processor: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        first, temb = widths[0], widths[0] * 4
        self.time_proj = Timesteps(first)
        self.time_embedding = TimestepEmbedding(first, temb)
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        self.down_resnets, self.down_attentions = nn.ModuleList(), nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        before, skips = first, [first]
        for width in widths:
            self.down_resnets.append(ResnetBlock2D(before, width, temb))
            self.down_attentions.append(Transformer2DModel(width, heads, cross_dim, processor))
            self.downsamplers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            skips += [width, width]
            before = width
        self.mid_resnets = nn.ModuleList(
            [ResnetBlock2D(before, before, temb), ResnetBlock2D(before, before, temb)]
        )
        self.mid_attention = Attention(
            before, None, heads, before // heads, 8, residual_connection=True
        )
        self.up_resnets, self.up_attentions = nn.ModuleList(), nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        for width in reversed(widths):
            self.upsamplers.append(nn.Conv2d(before, width, 3, padding=1))
            blocks = nn.ModuleList()
            before = width
            for _ in range(2):
                blocks.append(ResnetBlock2D(before + skips.pop(-2), width, temb))
                before = width
            self.up_resnets.append(blocks)
            self.up_attentions.append(Transformer2DModel(width, heads, cross_dim, processor))
        self.conv_norm_out, self.conv_act = nn.GroupNorm(8, first), nn.SiLU()
        self.conv_out = nn.Conv2d(first, 3, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None
    ) -> Tensor:
        emb = self.time_embedding(self.time_proj(timestep).to(dtype=sample.dtype))
        sample = self.conv_in(sample)
        down_block_res_samples: tuple[Tensor, ...] = (sample,)
        for resnet, attention, downsampler in zip(
            self.down_resnets, self.down_attentions, self.downsamplers, strict=True
        ):
            sample = attention(resnet(sample, emb), encoder_hidden_states)
            down_block_res_samples += (sample,)
            sample = downsampler(sample)
            down_block_res_samples += (sample,)
        sample = self.mid_resnets[0](sample, emb)
        sample = self.mid_attention(sample)
        sample = self.mid_resnets[1](sample, emb)
        down_block_res_samples = down_block_res_samples[:-1]
        for upsampler, resnets, attention in zip(
            self.upsamplers, self.up_resnets, self.up_attentions, strict=True
        ):
            sample = upsampler(F.interpolate(sample, scale_factor=2.0, mode="nearest"))
            for resnet in resnets:
                res_hidden_states = down_block_res_samples[-1]
                down_block_res_samples = down_block_res_samples[:-1]
                sample = torch.cat([sample, res_hidden_states], dim=1)
                sample = resnet(sample, emb)
            sample = attention(sample, encoder_hidden_states)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


class Place(NamedTuple):
    """A model and its inputs for a batch of some size."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], zoo.Inputs]


def unet_inputs(batch: int, size: int = 16, length: int = 7) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 3, size, size, generator=draw),
        torch.arange(batch, dtype=torch.float32) * 10 + 1,
        torch.randn(batch, length, 24, generator=draw),
    )


def _sequence(width: int, lengths: tuple[int, ...], batch: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, n, width, generator=draw) for n in lengths)


def _encoder(width: int, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _decoder(width: int, norm_first: bool) -> nn.Module:
    layer = nn.TransformerDecoderLayer(width, 4, 2 * width, batch_first=True, norm_first=norm_first)
    return nn.TransformerDecoder(layer, 2, nn.LayerNorm(width))


def _transformer(width: int, norm_first: bool) -> nn.Module:
    return nn.Transformer(width, 4, 2, 2, 2 * width, batch_first=True, norm_first=norm_first)


def _modernbert() -> nn.Module:
    import transformers

    config = transformers.ModernBertConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        local_attention=8,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        reference_compile=False,
        attn_implementation="eager",
    )
    return transformers.ModernBertModel(config)


PLACES: dict[str, Place] = {
    "unet": Place(UNet2DConditionModel, unet_inputs),
    "unet, older processor": Place(
        lambda: UNet2DConditionModel(processor=AttnProcessor()), unet_inputs
    ),
    "modernbert": Place(
        _modernbert, lambda batch: {"input_ids": torch.arange(batch * 12).reshape(batch, 12) % 190}
    ),
}
for _kind, _make, _lengths in (
    ("encoder", _encoder, (9,)),
    ("decoder", _decoder, (9, 7)),
    ("transformer", _transformer, (7, 9)),
):
    for _width in (64, 128, 256):
        for _norm_first in (False, True):
            PLACES[f"{_kind} {_width}{', pre-norm' if _norm_first else ''}"] = Place(
                partial(_make, _width, _norm_first), partial(_sequence, _width, _lengths)
            )


def build(name: str) -> nn.Module:
    """A newly drawn model of that name in eval mode."""
    torch.manual_seed(0)
    if name in zoo.ZOO:
        return zoo.build(name)
    if name == "modernbert":
        zoo.libraries()
    return PLACES[name].make().eval()


def inputs(name: str, batch: int) -> zoo.Inputs:
    """The inputs of a model of that name."""
    return zoo.ZOO[name].inputs(batch) if name in zoo.ZOO else PLACES[name].inputs(batch)
