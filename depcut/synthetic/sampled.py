"""Texts that a model writes itself, token by token, where it predicts the next one.

Liu et al. 2023, "LLM-QAT: Data-free quantization aware training for large language models".
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from depcut.capture.random_state import preserved
from depcut.synthetic.prediction import Prediction, draw, prediction
from depcut.synthetic.subject import Leaves, Made, Subject
from depcut.synthetic.texts import Texts, first_token, token_inputs

LENGTH = 128  # tokens of a text, where the captured ones are shorter and the model takes it
SHORT = 8  # tokens: shorter texts are not worth having
_FEW = 8  # texts: sooner than fewer of them, shorter ones are written
_BURNED = 8  # tokens that are written and dropped, to start amid a text

Ids = torch.Tensor


@preserved()
def sampled(subject: Subject) -> Made | None:
    """Texts by a model that predicts the next token of the only text that it reads.

    Args:
        subject: The model, how many, by when.

    Returns:
        None where it does not, and where no text can be written in time.
    """
    inputs = token_inputs(subject)
    if len(inputs) != 1:
        return None
    texts = Texts(subject, subject.own_model(), inputs)
    found = prediction(texts)
    if found is None or not found.causal:
        return None
    writer = Writer(texts, found)
    items: list[Leaves] = []
    for rows in subject.chunks():
        ids = writer.write(rows, {}, subject.left if items else subject.left / 2)
        if ids is None:
            break
        leaves = texts.leaves({found.tokens.leaf: ids})
        assert leaves is not None
        items.append(leaves)
        subject.advance(min(1.0, writer.written / subject.examples))
    return (
        Made(tuple(items), f"sampled from the model, {writer.count}", writer.match)
        if items
        else None
    )


@dataclass(eq=False)
class Writer:
    """Writes texts with a model that predicts the next token.

    Texts start as those of the example do, where these all start with one special token; else with
    a token of a text that was written before, so that they start amid a text.

    Attributes:
        texts: The model's inputs.
        found: What it predicts.
    """

    texts: Texts
    found: Prediction
    _nats: list[float] = field(default_factory=list)
    _written: list[Ids] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = self.texts.subject.generator(1)

    @property
    def written(self) -> int:
        """How many texts were written."""
        return sum(map(len, self._written))

    @property
    def count(self) -> str:
        """How many texts of how many tokens, in words."""
        lengths = {ids.shape[1] for ids in self._written}
        return f"{self.written} sequences of {'-'.join(map(str, sorted(lengths)))} tokens"

    @property
    def match(self) -> str:
        """The model's own loss on what it wrote, in words."""
        return (
            f"its own loss on them is {sum(self._nats) / max(len(self._nats), 1):.2f} nats a token"
        )

    def write(self, rows: int, others: Mapping[int, Ids], seconds: float) -> Ids | None:
        """Texts (rows, length); fewer or shorter ones where time does not suffice.

        Args:
            rows: How many.
            others: Ids (rows, length) of the other token inputs, by leaf.
            seconds: That it may take.

        Returns:
            None where there is no time for any.
        """
        until = time.monotonic() + seconds
        size = self._affordable(rows, others, seconds)
        if size is None:
            return None
        rows, length = size
        others = {leaf: ids[:rows] for leaf, ids in others.items()}
        ids, nats = self._steps(self._start(rows, others, length), others, length, until)
        if ids.shape[1] < min(SHORT, length):
            return None
        self._nats.append(nats)
        self._written.append(ids)
        return ids

    def _affordable(
        self, rows: int, others: Mapping[int, Ids], seconds: float
    ) -> tuple[int, int] | None:
        """How many texts of how many tokens can be written in time."""
        for length in self._lengths:
            spent = self._seconds(2, others, length)
            if spent is None:
                continue
            if spent * rows / 2 < seconds / 10:
                spent = (self._seconds(rows, others, length) or 0.0) * 2 / rows
            steps = length / 2 if self.grows else length
            fits = int(seconds / max(spent / 2 * steps, 1e-9))
            least = 1 if length == self._lengths[-1] else min(rows, _FEW)
            if fits >= least:
                self._lengths = self._lengths[self._lengths.index(length) :]
                return self.texts.rows(min(rows, fits)), length
        return None

    def _seconds(self, rows: int, others: Mapping[int, Ids], length: int) -> float | None:
        """That one call takes; None where the model does not take the length."""
        ids = self._any(self.texts.rows(rows)).expand(-1, length)
        began = time.monotonic()
        logits = self._logits(ids, {leaf: i[: len(ids)] for leaf, i in others.items()})
        if logits is None:
            return None
        float(logits.flatten()[0])  # what a device has not computed yet is waited for
        return time.monotonic() - began

    @cached_property
    def _lengths(self) -> list[int]:
        """Lengths of texts to try, by preference."""
        captured = self.texts.length(self.found.tokens)
        longer = [LENGTH, LENGTH // 2] if self.grows and captured < LENGTH // 2 else []
        shorter = [n for n in (LENGTH, LENGTH // 4) if n < captured] if self.grows else []
        return [*longer, captured, *shorter]

    @cached_property
    def grows(self) -> bool:
        """Whether the model takes texts of other lengths than the captured one."""
        short = {self.found.tokens.leaf: self._any(self.texts.rows(2))}
        example = {t.leaf: self.texts.example[t.leaf] for t in self.texts.inputs}
        return self.texts.call({**example, **short}) is not None

    def _any(self, rows: int) -> Ids:
        """(rows, 1) of ids, each as likely as all others."""
        drawn = torch.randint(self.found.tokens.size, (rows, 1), generator=self.generator)
        return drawn.to(self.texts.device)

    def _logits(self, ids: Ids, others: Mapping[int, Ids]) -> torch.Tensor | None:
        outputs = self.texts.call({**others, self.found.tokens.leaf: ids})
        return None if outputs is None else outputs[self.found.output]

    def _start(self, rows: int, others: Mapping[int, Ids], length: int) -> Ids:
        """First tokens (rows, 1)."""
        first = first_token(self.texts, self.found.tokens)
        if first is not None:
            return torch.full((rows, 1), first, device=self.texts.device)
        drawn = self._any(rows)
        if length <= _BURNED:
            return drawn
        burned = self._steps(
            drawn, others, length if not self.grows else _BURNED, math.inf, _BURNED
        )
        return burned[0][:, -1:]

    def _steps(
        self,
        start: Ids,
        others: Mapping[int, Ids],
        length: int,
        until: float,
        stop: int | None = None,
    ) -> tuple[Ids, float]:
        """Go on with texts, a token at a time, until they are so long or time is up.

        Args:
            start: (rows, tokens) to go on with.
            others: Ids of the other token inputs, by leaf.
            length: Of the calls' texts, where the model takes one length alone.
            until: When to stop, by `time.monotonic`, where the model takes other lengths.
            stop: Tokens to write, if not all.

        Returns:
            The texts, and the mean surprise in nats of what was written.
        """
        rows, known = start.shape
        stop = stop or length
        ids = torch.zeros(rows, length, dtype=torch.int64, device=start.device)
        ids[:, :known] = start
        nats = 0.0
        while known < stop and (not self.grows or time.monotonic() < until):
            logits = self._logits(ids[:, :known] if self.grows else ids, others)
            assert logits is not None
            ids[:, known], surprise = draw(logits[:, known - 1], self.generator)
            nats += float(surprise.mean())
            known += 1
        return ids[:, :known], nats / max(known - start.shape[1], 1)
