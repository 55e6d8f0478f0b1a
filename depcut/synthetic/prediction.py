"""How a model predicts tokens that it reads: the next ones, those that it reads, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from depcut.synthetic.texts import Texts, TokenInput

_TOLERANCE = 1e-3  # of the logits' spread: what other kernels for other lengths may change


@dataclass(frozen=True)
class Prediction:
    """An output that holds logits of the tokens of one input.

    Attributes:
        output: Its position among the flat outputs that count.
        tokens: The input.
        causal: Whether those at a position depend on no later token: they are of the next one.
    """

    output: int
    tokens: TokenInput
    causal: bool


def prediction(texts: Texts) -> Prediction | None:
    """The output that predicts tokens, found by its shape, and by changing a token.

    Args:
        texts: The model's inputs.

    Returns:
        None where no output is as long as an input, and as wide as its table.
    """
    ids = {t.leaf: texts.example[t.leaf] for t in texts.inputs}
    outputs = texts.call(ids)
    if outputs is None:
        return None
    for tokens in reversed(texts.inputs):
        wanted = (*ids[tokens.leaf].shape, tokens.size)
        for number, output in enumerate(outputs):
            fits = isinstance(output, torch.Tensor) and tuple(output.shape) == wanted
            if fits and output.is_floating_point():
                return Prediction(number, tokens, _is_causal(texts, ids, tokens, number, output))
    return None


def _is_causal(
    texts: Texts,
    ids: Mapping[int, torch.Tensor],
    tokens: TokenInput,
    number: int,
    logits: torch.Tensor,
) -> bool:
    """Whether other tokens in the second half leave the logits of the first half as they are."""
    half = texts.length(tokens) // 2
    changed = ids[tokens.leaf].clone()
    changed[:, half:] = (changed[:, half:] + 1 + tokens.size // 3) % tokens.size
    outputs = texts.call({**ids, tokens.leaf: changed})
    if outputs is None or not half:
        return False
    before, after = logits[:, :half].float(), outputs[number][:, :half].float()
    spread = float(before.std())
    return float((before - after).abs().max()) <= _TOLERANCE * max(spread, 1e-12)


def draw(logits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids as likely as the logits say.

    Args:
        logits: (..., vocabulary).
        generator: Of one uniform number for each id, on the CPU.

    Returns:
        Ids (...), and the surprise of each in nats.
    """
    likely = logits.float().log_softmax(-1)
    sums = likely.exp().cumsum(-1)
    drawn = torch.rand(*logits.shape[:-1], 1, generator=generator).to(logits.device)
    ids = torch.searchsorted(sums, drawn * sums[..., -1:]).clamp(max=logits.shape[-1] - 1)
    return ids[..., 0], -likely.gather(-1, ids)[..., 0]
