"""Texts that a model writes itself, token by token, where it predicts the next one.

Liu et al. 2023, "LLM-QAT: Data-free quantization aware training for large language models".
"""

from __future__ import annotations

import torch

from depcut.capture.random_state import preserved
from depcut.synthetic.prediction import prediction
from depcut.synthetic.subject import Leaves, Made, Subject
from depcut.synthetic.texts import Texts, TokenInput, token_inputs
from depcut.synthetic.writer import Writer

Ids = torch.Tensor


@preserved()
def sampled(subject: Subject) -> Made | None:
    """Texts by a model that predicts the next token of what it, or its decoder, reads.

    What an encoder reads is written by its own decoder, which at first reads any tokens.

    Args:
        subject: The model, how many, by when.

    Returns:
        None where it does not, and where no text can be written in time.
    """
    inputs = token_inputs(subject)
    if not inputs:
        return None
    texts = Texts(subject, subject.own_model(), inputs)
    found = prediction(texts)
    if found is None or not found.causal:
        return None
    writer, leaf = Writer(texts, found), found.tokens.leaf
    items: list[Leaves] = []
    encoded = [t for t in inputs if t != found.tokens]
    generator = subject.generator(2)
    for rows in subject.chunks():
        # What cannot be written in half of the time leaves none for another text.
        seconds = subject.left / (1 if items else 2)
        others: dict[int, Ids] = {}
        if encoded:
            seconds /= 2
            others = {t.leaf: _any(texts, t, rows, generator) for t in encoded}
            draft = writer.write(rows, others, seconds)
            if draft is None:
                break
            others = {t.leaf: _as_read(texts, t, draft) for t in encoded}
        ids = writer.write(len(next(iter(others.values()), range(rows))), others, seconds)
        if ids is None:
            break
        leaves = texts.leaves({**{i: o[: len(ids)] for i, o in others.items()}, leaf: ids})
        if leaves is None:
            break
        items.append(leaves)
        subject.advance(min(1.0, sum(len(i[leaf]) for i in items) / subject.examples))
    if not items:
        return None
    count = sum(len(item[leaf]) for item in items)
    lengths = sorted({item[leaf].shape[1] for item in items})
    how = f"sampled from the model, {count} sequences of {'-'.join(map(str, lengths))} tokens"
    return Made(tuple(items), how, f"its own loss on them is {writer.nats:.2f} nats a token")


def _any(texts: Texts, tokens: TokenInput, rows: int, generator: torch.Generator) -> Ids:
    """Ids (rows, length), each as likely as all others."""
    shape = (texts.rows(rows), texts.length(tokens))
    return torch.randint(tokens.size, shape, generator=generator).to(texts.device)


def _as_read(texts: Texts, tokens: TokenInput, written: Ids) -> Ids:
    """What a decoder wrote, at the length of what the encoder reads, and from its vocabulary."""
    length = texts.length(tokens)
    places = torch.arange(length, device=written.device) % written.shape[1]
    return written[:, places] % tokens.size
