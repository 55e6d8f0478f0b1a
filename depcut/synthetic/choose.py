"""Which recipe makes the inputs of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from depcut.synthetic.batch_norm import batch_norm
from depcut.synthetic.filled import filled
from depcut.synthetic.float_inputs import float_inputs
from depcut.synthetic.sampled import sampled
from depcut.synthetic.subject import Made, Subject
from depcut.synthetic.tokens import tokens

# A recipe makes inputs, or says None: it does not fit the model.
Recipe = Callable[[Subject], Made | None]

RECIPES: Sequence[Recipe] = (
    batch_norm,  # nets that keep statistics of their inputs
    sampled,  # decoders and recurrent nets that predict the next token
    filled,  # masked language models
    float_inputs,  # images, waves and tables of nets without statistics
    tokens,  # readers of tokens that predict none
)


def make(subject: Subject) -> Made | None:
    """Inputs by the first recipe that fits the model.

    Args:
        subject: The model, how many, by when.

    Returns:
        None where no recipe fits.
    """
    for recipe in RECIPES:
        made = recipe(subject)
        if made is not None:
            return made
    return None
