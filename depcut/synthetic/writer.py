"""Writes texts with a model that predicts the next token, within the time there is."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from depcut.capture.convention import convention_of
from depcut.capture.process_state import quiet
from depcut.support.failures import reraise_fatal
from depcut.synthetic.prediction import Prediction, draw
from depcut.synthetic.texts import Texts, first_token

SHORT = 8  # tokens: shorter texts are not worth having
_FEW = 8  # texts: sooner than fewer of them, shorter ones are written
_CACHED = 8  # calls over whole texts that a text with a cache costs at most
_BURNED = 8  # tokens that are written and dropped, to start amid a text

Ids = torch.Tensor


@dataclass(eq=False)
class Writer:
    """Writes texts with a model that predicts the next token.

    Texts start with the special token that all do; where there is none, amid a text: with what the
    model goes on with after some tokens.

    Attributes:
        texts: The model's inputs.
        found: What it predicts.
    """

    texts: Texts
    found: Prediction
    _nats: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = self.texts.subject.generator(1)

    @property
    def nats(self) -> float:
        """The mean surprise of the tokens that were written."""
        return sum(self._nats) / max(len(self._nats), 1)

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
        start = self._start(rows, others, length)
        ids, nats = self._by_library(start, length, until) or self._steps(
            start, others, length, until
        )
        if ids.shape[1] < min(SHORT, length) or (self._nats and ids.shape[1] < length / 2):
            return None
        self._nats.append(nats)
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
            steps = _CACHED if self._cached else length / 2 if self.grows else length
            fits = int(seconds / max(spent / 2 * steps, 1e-9))
            last = length == self._lengths[-1] and not self._nats
            least = 1 if last else min(rows, _FEW)
            if fits >= least:
                self._lengths = self._lengths[self._lengths.index(length) :]
                return self.texts.rows(min(rows, fits)), length
        return None

    def _seconds(self, rows: int, others: Mapping[int, Ids], length: int) -> float | None:
        """That one call takes; None where the model does not take the length."""
        count = min([self.texts.rows(rows), *map(len, others.values())])
        ids = torch.zeros(count, length, dtype=torch.int64, device=self.texts.device)
        began = time.monotonic()
        logits = self._logits(ids, {leaf: i[: len(ids)] for leaf, i in others.items()})
        if logits is None:
            return None
        float(logits.flatten()[0])  # what a device has not computed yet is waited for
        return time.monotonic() - began

    @cached_property
    def _lengths(self) -> list[int]:
        """Lengths of texts to try, by preference."""
        tokens = self.found.tokens
        return self.texts.lengths(tokens) if self.grows else [self.texts.length(tokens)]

    @cached_property
    def grows(self) -> bool:
        """Whether the model takes texts of other lengths than the captured one."""
        example = {t.leaf: self.texts.example[t.leaf] for t in self.texts.inputs}
        short = {self.found.tokens.leaf: example[self.found.tokens.leaf][:, :1]}
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

    def _by_library(self, start: Ids, length: int, until: float) -> tuple[Ids, float] | None:
        """As `_steps`, by what the model's library has for it; None where that is nothing."""
        if not self._cached:
            return None
        model = self.texts.model
        convention = convention_of(model)
        assert convention is not None
        torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator)))
        try:
            with torch.no_grad(), quiet():
                ids = convention.written(model, start, length, until - time.monotonic())
        except Exception as error:  # noqa: BLE001  what a library has for its models may not work
            reraise_fatal(error)
            ids = None
        logits = None if ids is None else self._logits(ids, {})
        if ids is None or logits is None:
            self._cached = False
            return None
        likely = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])
        return ids, -float(likely.mean())

    @cached_property
    def _cached(self) -> bool:
        """Whether the model's library may write: where ids, and masks of ones, are all it reads."""
        only = all(
            number == self.found.tokens.leaf or bool((leaf == 1).all())
            for number, leaf in enumerate(self.texts.example)
            if isinstance(leaf, torch.Tensor)
        )
        return only and self.grows and convention_of(self.texts.model) is not None

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
