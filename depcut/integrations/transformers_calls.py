"""Conventions of Hugging Face transformers: of every `PreTrainedModel`, and of no architecture."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from depcut.integrations.transformers_configs import every
from depcut.integrations.transformers_inputs import candidates

# Of a ModelOutput: caches, states of inner layers, and what belongs to a part of the model.
_INNER = (
    *("past_*", "*cache*", "mems", "state", "states"),
    *("*hidden_states", "*attentions", "extract_features", "encoder_*", "*router_logits"),
    *("intermediate_*", "aux*", "*_model_output", "loss", "*_loss"),
)
# Results where there are no others; beside a head's they are what the head read.
_FEATURES = ("last_hidden_state", "pooler_output")


class Transformers:
    """Conventions of Hugging Face transformers."""

    library = "transformers"

    def follows(self, model: nn.Module) -> bool:
        """Whether it is a `PreTrainedModel`; the library is not imported for it."""
        module = sys.modules.get("transformers.modeling_utils")
        kind = getattr(module, "PreTrainedModel", None)
        return isinstance(kind, type) and isinstance(model, kind)

    def example_inputs(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """From the main input's name, the signature of forward, and the configuration."""
        return candidates(model)

    def settings(self, model: nn.Module, given: Collection[str]) -> dict[str, Any]:
        """No cache is returned, where forward can be told so: torch.export cannot carry one."""
        taken = inspect.signature(model.forward).parameters
        cached = any(name in given for name in ("use_cache", "past_key_values", "cache_params"))
        off = False in every(model, "use_cache") and True not in every(model, "use_cache")
        return {} if cached or off or "use_cache" not in taken else {"use_cache": False}

    def first_tokens(self, model: nn.Module) -> list[int]:
        """Tokens that start a text, a decoder's, or stand for a whole one, if a config has them."""
        said = every(model, "decoder_start_token_id", "bos_token_id", "cls_token_id")
        return [i for i in said if type(i) is int]

    def mask_token(self, model: nn.Module) -> int | None:
        """That of a config; most leave it to the tokenizer."""
        return next((i for i in every(model, "mask_token_id") if type(i) is int), None)

    def written(
        self, model: nn.Module, start: Tensor, length: int, seconds: float
    ) -> Tensor | None:
        """By `generate`, with none of the settings that the model has for it; it keeps its own."""
        able = getattr(model, "can_generate", None)
        if not callable(able) or not able():
            return None
        own: Any = model
        before = own.generation_config
        own.generation_config = type(before)(
            do_sample=True, top_k=0, max_new_tokens=length - start.shape[1], max_time=seconds
        )
        try:
            made = own.generate(start, attention_mask=torch.ones_like(start))
        finally:
            own.generation_config = before
        return made if isinstance(made, Tensor) else None

    def auxiliary(self, result: Any) -> frozenset[str]:
        """Caches, inner states and outputs of parts; features where there is a head's output."""
        if not isinstance(result, Mapping):
            return frozenset()
        inner = {
            name
            for name, value in result.items()
            if isinstance(value, Mapping) or any(fnmatch(name, glob) for glob in _INNER)
        }
        if all(name in inner or name in _FEATURES for name in result):
            return frozenset(inner if len(inner) < len(result) else ())
        return frozenset(inner | {name for name in result if name in _FEATURES})
