"""Floating-point inputs for models that keep no statistics of theirs: the best of several kinds.

White noise, noise that is smooth along the spatial dimensions, and, where a model classifies, noise
optimised until it is sure of its outputs, all classes alike (the class and the total variation term
of DeepInversion: Yin et al., CVPR 2020, equations 1 to 3).

The kinds judge each other: layers that lose half of their inputs and are solved again on one kind
are tried on all others (`depcut.synthetic.held_out`). Of those kinds that come near the best in it,
that is taken whose outputs tell most of the inputs, when these are disturbed: a trained classifier
is sure of its inputs, and not of one class alone (the inception score, Salimans et al. 2016), and
what only an optimisation could see is gone after a disturbance.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from depcut.graph.ancestry import reached
from depcut.synthetic.descent import Draw, Objective, descents, probed
from depcut.synthetic.floats import Layout, Scales, layout
from depcut.synthetic.held_out import Features, error, features, layers_of
from depcut.synthetic.noise import roughness, smooth, spatial
from depcut.synthetic.running import Run, differentiable
from depcut.synthetic.subject import Leaves, Made, Subject

_TOLD = 4  # calls of which the outputs are looked at
STEPS = 60  # of an optimisation
ROUGHNESS = 2.0  # weight of the total variation, of inputs of unit variance
NEAR = 1.5  # times the least error of layers that a kind may have
DISTURBED = 0.2  # standard deviations of an input that are added to it as noise
FAR = 5.0  # times or parts of unit variance at which an example tells of another scale


@dataclass(frozen=True, eq=False)
class _Kind:
    """One set of inputs.

    Attributes:
        name: What it is, a noun phrase.
        scales: Of the noise.
        items: Flat inputs of each call.
        features: What layers read of them.
        told: What outputs tell of inputs, in nats; 0 where they are no scores by class.
    """

    name: str
    scales: Scales
    items: Sequence[Leaves]
    features: Sequence[Features]
    told: float


def float_inputs(subject: Subject) -> Made | None:
    """Noise, or noise that was optimised.

    Args:
        subject: The model.

    Returns:
        None where no input is floating-point data.
    """
    plan = layout(subject)
    if not plan.made:
        return None
    maker = _Maker(subject, plan)
    with differentiable(subject.seed):
        start = time.monotonic()
        kinds = list(maker.noises())
        reserve = 2 * (time.monotonic() - start)
        sure = maker.optimised(_best(kinds).scales, reserve)
    if sure is not None:
        kinds.append(sure)
    best = _best(kinds)
    subject.advance(1.0)
    others = tuple(kind.items[0] for kind in kinds if kind is not best)
    return Made(tuple(best.items), best.name + plan.rest, _match(best, kinds), others)


class _Maker:
    """Makes the kinds.

    Args:
        subject: The model.
        plan: What is made.
    """

    def __init__(self, subject: Subject, plan: Layout) -> None:
        self.subject, self.plan = subject, plan
        self.run = Run(subject.program, subject.own_model())
        self.layers = layers_of(self.run, reached(subject.program, plan.nodes))
        self.scores = _scores(subject, plan)

    def noises(self) -> Iterator[_Kind]:
        """White and smooth noise of unit variance, and as the example where that is far off."""
        unit, *others = self.plan.scales()
        scales = [unit, *(s for s in others[:1] if any(map(_is_far, s.values())))]
        draws: dict[str, Draw] = {"white noise": self.plan.noise}
        if any(spatial(self.plan.example[p].shape) for p in self.plan.made):
            draws["noise of several smoothnesses"] = partial(smooth, self.plan)
        for name, draw in draws.items():
            for number, scale in enumerate(scales):
                generator = self.subject.generator(1000 + number)
                calls = [
                    self.plan.leaves(draw(rows, generator, scale), generator)
                    for rows in self.subject.chunks()
                ]
                named = f"{name} of the example's mean and variance" if number else name
                yield self._kind(named, scale, calls)

    def optimised(self, scales: Scales, reserve: float) -> _Kind | None:
        """Noise optimised to sure outputs.

        Args:
            scales: Of the noise.
            reserve: Seconds to leave.

        Returns:
            None where nothing is classified, or there is no time.
        """
        if self.scores is None:
            return None
        hurried = replace(self.subject, seconds=self.subject.seconds - reserve)
        first = self._objective(0, scales)
        work = probed(hurried, self.plan, first, lambda: self.run.nbytes, [scales], STEPS)
        if work is None:
            return None
        objective_of = partial(self._objective, scales=scales)
        found = descents(hurried, self.plan, objective_of, work, partial(smooth, self.plan))
        calls = self.plan.items(f.leaves for f in found)
        return self._kind("noise optimised until the model is sure of its outputs", scales, calls)

    def _objective(self, number: int, scales: Scales) -> Objective:
        """Of a group: every row has a class to be sure of, and is to be smooth."""
        assert self.scores is not None
        position, classes = self.scores

        def objective(leaves: Leaves) -> Tensor:
            scores = self.run.run(leaves)[position].float()
            rows = len(scores)
            wanted = (torch.arange(rows, device=scores.device) + number * rows) % classes
            unit = {p: (leaves[p].float() - m) / s for p, (m, s) in scales.items()}
            sure: Tensor = functional.cross_entropy(scores, wanted)
            total: Tensor = sure + ROUGHNESS * roughness(unit).to(scores)
            return total

        return objective

    def _kind(self, name: str, scales: Scales, calls: Sequence[Leaves]) -> _Kind:
        read = features(self.run, self.layers, calls)
        return _Kind(name, scales, calls, read, self._told(calls[:_TOLD]))

    def _told(self, calls: Sequence[Leaves]) -> float:
        """Mutual information of row and class, of disturbed inputs."""
        if self.scores is None:
            return 0.0
        generator, shares = self.subject.generator(3), []
        for leaves in calls:
            rows = len(leaves[self.plan.made[0]])
            noise = self.plan.noise(rows, generator, dict.fromkeys(self.plan.made, (0.0, 1.0)))
            disturbed = {
                p: leaves[p] + DISTURBED * leaves[p].float().std() * noise[p]
                for p in self.plan.made
            }
            with torch.no_grad():
                scores = self.run.run(self.plan.replaced(leaves, disturbed))[self.scores[0]]
            shares.append(scores.float().softmax(1).cpu())
        share = torch.cat(shares)
        return float(_entropy(share.mean(0)) - _entropy(share).mean())


def _entropy(shares: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy


def _best(kinds: Sequence[_Kind]) -> _Kind:
    errors = [_mean_error(kind, kinds) for kind in kinds]
    near = [(-k.told, e, i) for i, (k, e) in enumerate(zip(kinds, errors, strict=True))]
    return kinds[min(entry for entry in near if entry[1] <= NEAR * min(errors))[2]]


def _is_far(scale: tuple[float, float]) -> bool:
    mean, std = scale
    return not 1 / FAR <= std <= FAR or abs(mean) > FAR


def _scores(subject: Subject, plan: Layout) -> tuple[int, int] | None:
    """Position and size of the first output that may be scores by class: [rows, classes]."""
    program = subject.program
    made, outputs = reached(subject.program, plan.nodes), program.outputs
    for output in program.counted:
        value: Any = output.meta.get("val") if isinstance(output, fx.Node) else None
        if not isinstance(value, Tensor) or output not in made or value.ndim != 2:
            continue
        classes = value.shape[1]
        if value.is_floating_point() and isinstance(classes, int) and classes > 1:
            return outputs.index(output), classes
    return None


def _mean_error(kind: _Kind, kinds: Sequence[_Kind]) -> float:
    """The geometric mean of a kind's errors on all others."""
    others = [k for k in kinds if k is not kind]
    if not others or not kind.features:
        return math.inf
    errors = [error(kind.features, other.features) for other in others]
    if not all(map(math.isfinite, errors)):
        return math.inf
    return math.exp(sum(map(math.log, errors)) / len(errors))


def _match(best: _Kind, kinds: Sequence[_Kind]) -> str:
    found = _mean_error(best, kinds)
    if not math.isfinite(found):
        return ""
    text = f"layers that lose half of their inputs, solved on it: off by {found:.2g} on other noise"
    first = _mean_error(kinds[0], kinds)
    return text if best is kinds[0] else f"{text}; solved on white noise: by {first:.2g}"
