"""Texts of tokens drawn one by one, for models that read tokens and predict none."""

from __future__ import annotations

import time

import torch

from depcut.capture.random_state import preserved
from depcut.synthetic.padding import padded
from depcut.synthetic.subject import Leaves, Made, Subject
from depcut.synthetic.texts import Texts, TokenInput, fixed_tokens, token_inputs

_UNUSED = 0.5  # of the median distance of embeddings from their mean: what training moved little

Ids = torch.Tensor


@preserved()
def tokens(subject: Subject) -> Made | None:
    """Texts of tokens that the training has met, each as likely as all others.

    A row of a table that no text of the training chose stays near where it was at the start, or is
    drawn to nothing by weight decay: it is near the mean of all rows.

    Args:
        subject: The model, how many, by when.

    Returns:
        None where no input is of tokens, or where no text can be had in time.
    """
    inputs = token_inputs(subject)
    if not inputs:
        return None
    texts = Texts(subject, subject.own_model(), inputs)
    lengths = _lengths(texts)
    if lengths is None:
        return None
    generator = subject.generator(4)
    known = {t.leaf: known_tokens(texts, t) for t in inputs}
    items: list[Leaves] = []
    for rows in subject.chunks():
        began, count = time.monotonic(), texts.rows(rows)
        ids = {
            t.leaf: _drawn(texts, t, known[t.leaf], (count, lengths[t.leaf]), generator)
            for t in inputs
        }
        leaves = texts.leaves(ids)
        assert leaves is not None
        items.append(padded(texts, leaves, generator))
        if time.monotonic() - began > subject.left:
            break
    first = inputs[0]
    count = sum(len(item[first.leaf]) for item in items)
    used = len(known[first.leaf])
    return Made(
        tuple(items),
        f"tokens drawn one by one, {count} sequences of {lengths[first.leaf]} tokens",
        f"of {used} of the {first.size} tokens, those that training moved",
    )


def known_tokens(texts: Texts, tokens: TokenInput) -> Ids:
    """Ids of the tokens that the training has met, but for special ones, by their embeddings.

    Args:
        texts: The model's inputs.
        tokens: The input.
    """
    table = texts.table(tokens)[: tokens.size].float()
    far = (table - table.mean(0)).norm(dim=1)
    met = far >= _UNUSED * far.median()
    met[list(fixed_tokens(texts, tokens).values())] = False
    ids = met.nonzero()[:, 0]
    return ids if len(ids) else torch.arange(tokens.size, device=table.device)


def _lengths(texts: Texts) -> dict[int, int] | None:
    """Length of each token input: one text alone is made longer where the model takes it."""
    captured = {t.leaf: texts.length(t) for t in texts.inputs}
    longer = texts.lengths(texts.inputs[0]) if len(captured) == 1 else []
    for length in [*longer, 0]:
        tried = {leaf: length or own for leaf, own in captured.items()}
        example = {
            t.leaf: torch.zeros(
                texts.rows(2), tried[t.leaf], dtype=torch.int64, device=texts.device
            )
            for t in texts.inputs
        }
        if texts.call(example) is not None:
            return tried
    return None


def _drawn(
    texts: Texts,
    tokens: TokenInput,
    known: Ids,
    shape: tuple[int, int],
    generator: torch.Generator,
) -> Ids:
    drawn = torch.randint(len(known), shape, generator=generator).to(known.device)
    ids = known[drawn].to(texts.device)
    for place, token in fixed_tokens(texts, tokens).items():
        ids[:, place] = token
    return ids
