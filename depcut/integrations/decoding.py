"""One step of a decoder with its cache, with tensors alone: to be timed, exported and served."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from depcut.capture.process_state import quiet
from depcut.errors import InputError
from depcut.support.failures import first_line, reraise_fatal


class DecodingStep(nn.Module):
    """A decoder of transformers behind a prompt: new tokens and the cache in, logits and cache out.

    Its forward takes `input_ids` [batch, new tokens] and of each layer the keys and the values,
    [batch, heads, tokens so far, head size]; it returns the logits and the keys and values with
    those of the new tokens. All of them are tensors, so that `depcut.export` takes it.

    Args:
        model: A causal decoder; it is shared, not copied.
        prompt: Ids of the tokens before the step, [batch, tokens].

    Raises:
        InputError: The model does not run on the prompt, or keeps no cache of keys and values.
    """

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        super().__init__()
        self.model = model
        try:
            with torch.no_grad(), quiet():
                cache = model(input_ids=prompt, use_cache=True).past_key_values
        except Exception as error:
            reraise_fatal(error)
            raise InputError(
                f"the model does not run with a cache: {first_line(error)}",
                where=type(model).__name__,
                remedy="pass a causal decoder of transformers, and a prompt that it takes",
            ) from error
        layers = getattr(cache, "layers", None) or [None]
        if not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
            raise InputError(
                f"its cache is a {type(cache).__name__} that is not keys and values of each layer",
                where=type(model).__name__,
                remedy="time the step by a module of your own, see depcut.plan.workload.Setting",
            )
        self._held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        self._empty = _emptied(cache)
        self._next = prompt[:, -1:]

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits [batch, new tokens, vocabulary], and the cache behind them."""
        cache = _emptied(self._empty)
        for number, layer in enumerate(cache.layers):
            layer.keys, layer.values = past[2 * number : 2 * number + 2]
        logits: Tensor = self.model(
            input_ids=input_ids, past_key_values=cache, use_cache=True
        ).logits
        return (logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))

    def example(self) -> tuple[Tensor, ...]:
        """What its forward takes: one token, and the cache of the prompt."""
        return (self._next, *self._held)


def decoding_step(prompt: Tensor, **setting: Any) -> dict[str, Any]:
    """A setting of a workload: one step of a decoder behind a prompt.

    Args:
        prompt: Ids of the tokens before the step, [batch, tokens]; they say how long the cache is.
        **setting: The other attributes of the setting, see `depcut.plan.workload.Setting`.

    Returns:
        What `workload=` takes under a name.
    """
    return {
        **setting,
        "module": lambda model: DecodingStep(model, prompt),
        "inputs": DecodingStep.example,
    }


def _emptied(cache: Any) -> Any:
    """A copy of a cache whose layers hold no tensors but count the same tokens."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        layer.keys = layer.values = None
    return other
