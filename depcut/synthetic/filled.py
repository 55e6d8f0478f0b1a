"""Texts that a masked language model fills in itself, some tokens at a time.

Wang and Cho 2019, "BERT has a mouth, and it must speak": Gibbs sampling from a Markov random field.
"""

from __future__ import annotations

import time

import torch

from depcut.capture.convention import convention_of
from depcut.capture.random_state import preserved
from depcut.synthetic.prediction import Prediction, draw, prediction
from depcut.synthetic.subject import Leaves, Made, Subject
from depcut.synthetic.texts import Texts, fixed_tokens, token_inputs

STEPS = 24  # calls that fill a text
SHARE = 0.15  # of the tokens: what masked language models learn to predict, and read in use

Ids = torch.Tensor


@preserved()
def filled(subject: Subject) -> Made | None:
    """Texts by a model that predicts the tokens of the only text that it reads.

    Args:
        subject: The model, how many, by when.

    Returns:
        None where it does not, and where no text can be filled in time.
    """
    inputs = token_inputs(subject)
    if len(inputs) != 1:
        return None
    texts = Texts(subject, subject.own_model(), inputs)
    found = prediction(texts)
    if found is None or found.causal:
        return None
    filler = Filler(texts, found)
    items: list[Leaves] = []
    for rows in subject.chunks():
        ids = filler.fill(rows)
        if ids is None:
            break
        leaves = texts.leaves({found.tokens.leaf: filler.masked(ids)})
        assert leaves is not None
        items.append(leaves)
        subject.advance(min(1.0, filler.count / subject.examples))
        if filler.spent > subject.left:
            break
    if not items:
        return None
    how = f"filled in by the model, {filler.count} sequences of {filler.length} tokens"
    return Made(tuple(items), how, f"its own loss on them is {filler.nats:.2f} nats a token")


class Filler:
    """Fills texts with a model that predicts tokens from both sides.

    All tokens start masked, or as any, and ever fewer of them are drawn anew at once.

    Attributes:
        mask: The token that stands for one to be predicted; None where it is not known.
        length: Tokens of a text.
        count: Texts that were filled.
        spent: Seconds that the last call of `fill` took.
        nats: The mean surprise of the tokens that were drawn last.
    """

    def __init__(self, texts: Texts, found: Prediction) -> None:
        self.texts, self.found = texts, found
        self.generator = texts.subject.generator(3)
        convention = convention_of(texts.subject.model)
        mask = None if convention is None else convention.mask_token(texts.subject.model)
        self.mask = mask if mask is not None and 0 <= mask < found.tokens.size else None
        self.length, self.count, self.spent, self.nats = 0, 0, 0.0, 0.0

    def fill(self, rows: int) -> Ids | None:
        """Texts (rows, length); fewer where time does not suffice.

        Args:
            rows: How many.

        Returns:
            None where there is no time for any.
        """
        began, seconds = time.monotonic(), self.texts.subject.left
        rows = self._affordable(rows, seconds)
        if not rows:
            return None
        ids = self._any(rows, self.length)
        open_to = torch.ones(self.length, dtype=torch.bool, device=ids.device)
        for place, token in fixed_tokens(self.texts, self.found.tokens).items():
            ids[:, place], open_to[place] = token, False
        for step in range(STEPS):
            share = max(1 - step / (STEPS / 2), SHARE)
            chosen = torch.rand(ids.shape, generator=self.generator).to(ids.device) < share
            ids, nats = self._drawn(ids, chosen & open_to)
        self.count, self.nats = self.count + rows, nats
        self.spent = time.monotonic() - began
        return ids

    def masked(self, ids: Ids) -> Ids:
        """Texts as the model reads them in use: a share of their tokens is masked.

        Args:
            ids: (rows, length), whole.
        """
        if self.mask is None:
            return ids
        chosen = torch.rand(ids.shape, generator=self.generator).to(ids.device) < SHARE
        return torch.where(chosen, self.mask, ids)

    def _drawn(self, ids: Ids, chosen: torch.Tensor) -> tuple[Ids, float]:
        given = ids if self.mask is None else torch.where(chosen, self.mask, ids)
        logits = self._logits(given)
        assert logits is not None
        new, surprise = draw(logits, self.generator)
        return torch.where(chosen, new, ids), float(surprise[chosen].mean())

    def _affordable(self, rows: int, seconds: float) -> int:
        """How many texts can be filled in time, of a length that the model takes."""
        lengths = [self.length] if self.length else self.texts.lengths(self.found.tokens)
        for length in lengths:
            began = time.monotonic()
            logits = self._logits(self._any(self.texts.rows(2), length))
            if logits is None:
                continue
            float(logits.flatten()[0])  # what a device has not computed yet is waited for
            fits = int(2 * seconds / STEPS / max(time.monotonic() - began, 1e-9))
            self.length = length
            return self.texts.rows(min(rows, fits)) if fits else 0
        return 0

    def _any(self, rows: int, length: int) -> Ids:
        size = self.found.tokens.size
        return torch.randint(size, (rows, length), generator=self.generator).to(self.texts.device)

    def _logits(self, ids: Ids) -> torch.Tensor | None:
        outputs = self.texts.call({self.found.tokens.leaf: ids})
        return None if outputs is None else outputs[self.found.output]
