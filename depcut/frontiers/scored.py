"""Scores that were computed before, as a criterion."""

from __future__ import annotations

from depcut.scores import Scores


class Scored:
    """A criterion that hands back the scores of one model.

    Args:
        scores: For each group, as a criterion returned them.
        name: Of that criterion.
        additive: Whether they are losses that add up, also over groups.
    """

    def __init__(self, scores: Scores, name: str, *, additive: bool) -> None:
        self.scores, self.additive = scores, additive
        self.__name__ = name

    def __call__(self, *_: object) -> Scores:
        """The scores, whatever a criterion is called with."""
        return self.scores
