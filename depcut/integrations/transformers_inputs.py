"""Example inputs of a transformers model, from its signature and its configuration.

The arguments of all models of the library have agreed names and layouts: token ids, pixels, waves,
spectrograms. A configuration says how many of what; where it leaves something open, several
candidates follow one another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from depcut.integrations.transformers_configs import every, number, special_ids
from depcut.support.failures import reraise_fatal

_LENGTHS = (16, 64)  # of texts
_IMAGES = (224, 64, 32, 384)
_FRAMES = 32  # that convolutions make of a wave
_DECODER = "decoder_input_ids"

Shape = tuple[int, ...]


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments that the model may take, likeliest first.

    Args:
        model: A `PreTrainedModel`.
    """
    masked = "attention_mask" in inspect.signature(model.forward).parameters
    for rows in (2, 1):  # some heads take several rows only where a padding token is set
        for names in _sets(model):
            shapes = [_SHAPES[name](model) for name in names]
            for chosen in _diagonal(shapes):
                made = _made(model, dict(zip(names, chosen, strict=True)), rows)
                if masked and "input_ids" in made:  # as a tokenizer gives it
                    yield {**made, "attention_mask": torch.ones_like(made["input_ids"])}
                yield made
    dummy = _own_dummy_inputs(model)
    if dummy:
        yield dummy


def _sets(model: nn.Module) -> list[list[str]]:
    """Names of arguments to try together: the main and the required ones, then more of them."""
    parameters = inspect.signature(model.forward).parameters
    known = [name for name in parameters if name in _SHAPES and name != _DECODER]
    main = getattr(model, "main_input_name", None)
    needed = [n for n in known if n == main or parameters[n].default is inspect.Parameter.empty]
    needed = needed or known[:1]
    # Where a decoder has ids of its own, a call without them is another one.
    decoder = (
        [_DECODER] if _DECODER in parameters and any(every(model, "is_encoder_decoder")) else []
    )
    others = [name for name in known if name not in needed]
    sets = [needed, *([*needed, other] for other in others), known]
    return [[*names, *decoder] for names in sets if names or decoder]


def _diagonal(shapes: list[list[Shape]]) -> Iterator[tuple[Shape, ...]]:
    """Combinations of candidates, those of all firsts first."""
    yield from sorted(
        product(*shapes),
        key=lambda chosen: sum(s.index(c) for s, c in zip(shapes, chosen, strict=True)),
    )


def _made(model: nn.Module, shapes: Mapping[str, Shape], rows: int) -> dict[str, Any]:
    """Tensors of these shapes: ids of ordinary tokens, and noise."""
    generator = torch.Generator().manual_seed(0)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    device, dtype = (tensors[0].device, tensors[0].dtype) if tensors else ("cpu", torch.float32)
    ordinary = _ordinary_ids(model)
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name.endswith("_ids"):
            drawn = torch.randint(0, len(ordinary), (rows, *shape), generator=generator)
            made[name] = ordinary[drawn].to(device)
        else:
            made[name] = torch.randn((rows, *shape), generator=generator).to(device, dtype)
    return made


def _ordinary_ids(model: nn.Module) -> Tensor:
    """Ids that every vocabulary of the model has, but for special ones where others are left."""
    sizes = every(model, "vocab_size", "src_vocab_size", "tgt_vocab_size")
    least = min((n for n in sizes if type(n) is int and n > 0), default=2)
    special = special_ids(model)
    ids = [i for i in range(least) if i not in special]
    return torch.tensor(ids or list(range(least)))


def _own_dummy_inputs(model: nn.Module) -> dict[str, Any] | None:
    """What the model's class itself gives as an example, ids within its vocabulary."""
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except Exception as error:  # noqa: BLE001  a property of any class
        reraise_fatal(error)
        return None
    if not isinstance(dummy, dict):
        return None
    ids, device = _ordinary_ids(model), next((p.device for p in model.parameters()), "cpu")
    named = {k: v % len(ids) if k.endswith("input_ids") else v for k, v in dummy.items()}
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in named.items()}


# Shapes without the batch, by the name of the argument --------------------------------------------


def _texts(model: nn.Module) -> list[Shape]:
    most = number(model, "max_position_embeddings", default=_LENGTHS[-1])
    return [(n,) for n in _LENGTHS if n <= most] or [(most,)]


def _decoded(model: nn.Module) -> list[Shape]:
    most = number(model, "max_target_positions", "max_position_embeddings", default=8)
    return [(min(8, most),)]


def _image_sizes(model: nn.Module) -> list[Shape]:
    """[height, width] as the configuration has it, else the usual ones."""
    sizes: list[Shape] = []
    for said in every(model, "image_size", "img_size", "input_size"):
        pair = [said] * 2 if type(said) is int else said
        if isinstance(said, Mapping):
            pair = [said.get("height"), said.get("width")]
        if isinstance(pair, list | tuple) and [type(n) for n in pair] == [int, int]:
            sizes.append(tuple(pair))
    return sizes[:1] or [(n, n) for n in _IMAGES]


def _images(model: nn.Module) -> list[Shape]:
    channels = number(model, "num_channels", "in_channels", "in_chans", default=3)
    plain = [(channels, *size) for size in _image_sizes(model)]
    frames = every(model, "num_frames")
    videos = [(int(frames[0]), *shape) for shape in plain] if frames else []
    return [*videos, *plain]


def _videos(model: nn.Module) -> list[Shape]:
    frames = number(model, "num_frames", default=8)
    return [(frames, *shape) for shape in _images(model) if len(shape) == 3]


def _waves(model: nn.Module) -> list[Shape]:
    """A wave that is long enough for the convolutions, or a spectrogram."""
    kernels, strides = (every(model, name)[:1] for name in ("conv_kernel", "conv_stride"))
    out: list[Shape] = []
    if kernels and strides:
        length = _FRAMES
        for kernel, stride in zip(kernels[0][::-1], strides[0][::-1], strict=False):
            length = (length - 1) * stride + kernel
        out.append((length,))
    bands = number(model, "num_mel_bins", default=80)
    out.append((number(model, "max_length", default=64), bands))
    channels = number(model, "audio_channels", default=1)
    return [*out, (channels, 4096), (16000,)]


def _spectrograms(model: nn.Module) -> list[Shape]:
    """[bands, frames], twice as many as the encoder has positions, or [frames, bands]."""
    bands = number(
        model,
        *("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel"),
        default=80,
    )
    positions = every(model, "max_source_positions")
    first = [(bands, 2 * int(n)) for n in positions[:1] if type(n) is int]
    frames = number(model, "spec_size", default=256)
    return [*first, (64, bands), (1, 4 * frames, bands), (bands, 64)]


def _series(model: nn.Module) -> list[Shape]:
    length = number(model, "context_length", "prediction_length", default=32)
    return [(length, number(model, "num_input_channels", "input_size", default=1)), (length,)]


_SHAPES: dict[str, Callable[[nn.Module], list[Shape]]] = {
    "input_ids": _texts,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_values": _waves,
    "input_features": _spectrograms,
    "past_values": _series,
    _DECODER: _decoded,
}
