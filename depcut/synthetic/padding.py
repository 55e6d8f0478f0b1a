"""Texts of other lengths than the batch's, as tokenizers pad them."""

from __future__ import annotations

import torch

from depcut.synthetic.subject import Leaves
from depcut.synthetic.texts import Texts, fixed_tokens

_SHORTEST = 0.25  # of the length: what no text is shorter than


def padded(texts: Texts, leaves: Leaves, generator: torch.Generator) -> Leaves:
    """Flat inputs of which half of the rows end early, by the mask of the call.

    Args:
        texts: The model's inputs.
        leaves: Flat inputs of one text; they are not changed.
        generator: Draws the lengths, on the CPU.

    Returns:
        The inputs as they are where the call has no mask of ones, one number for each token.
    """
    out = list(leaves)
    tokens = texts.inputs[0]
    ids = leaves[tokens.leaf]
    masks = [i for i in texts.masks if out[i].shape == ids.shape]
    if len(texts.inputs) != 1 or len(masks) != 1:
        return out
    rows, length = ids.shape
    least = max(2, int(_SHORTEST * length))
    if least >= length:
        return out
    ends = torch.randint(least, length, (rows,), generator=generator)
    ends[::2] = length
    inside = torch.arange(length) < ends[:, None]
    last = fixed_tokens(texts, tokens).get(-1)
    if last is not None:
        out[tokens.leaf] = ids.clone()
        out[tokens.leaf][torch.arange(rows), ends - 1] = last
    out[masks[0]] = out[masks[0]] * inside.to(ids.device)
    return out
