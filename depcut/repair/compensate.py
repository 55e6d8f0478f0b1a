"""Repair a narrowed model: re-solve the weights that read removed units for the dense outputs.

Layer by layer in the order of execution, the kept columns of each weight are solved by least
squares for the dense layer's outputs, from the inputs that the layers before, repaired already,
deliver. Sources: He et al., Channel Pruning, ICCV 2017, eq. 1 (reconstruction, in sequence);
Frantar & Alistarh, Optimal Brain Compression, NeurIPS 2022 (closed form from second moments); Nagel
et al., Data-Free Quantization, ICCV 2019, section 4.2 (biases take the mean).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

from depcut import axes
from depcut.calibration.cuts import joined
from depcut.calibration.data import Calibration
from depcut.calibration.progress import bar
from depcut.calibration.shelf import Shelf
from depcut.calibration.sites import find_sites
from depcut.calibration.store import Store
from depcut.calibration.trail import Part
from depcut.calibration.walk import Graph, Walk
from depcut.capture.clone import clone
from depcut.capture.eager import user_line
from depcut.capture.held import held_tensors
from depcut.capture.process_state import as_captured
from depcut.capture.program import layer_of
from depcut.capture.random_state import preserved
from depcut.errors import VerificationError
from depcut.graph.ancestry import Weights
from depcut.ops.normalization import is_batch_norm
from depcut.ops.site import Site
from depcut.plan.keep import Keep
from depcut.reference.run import Reference
from depcut.repair.norms import NormRepair, statistics
from depcut.repair.shared_inputs import SharedInputs
from depcut.repair.sites import Repair, SiteRepair, touched_anywhere
from depcut.repair.streams import stream
from depcut.support.closeness import relative_error
from depcut.support.failures import first_line, reraise_fatal

__all__ = ["Compensation", "Repair", "compensate", "re_solve"]

_TOLERANCE = 1e-2  # relative, between the repaired graph and model: rounding alone
_ELSEWHERE = "only other example calls than that of the data run it"
_COMPUTED = "its weight or bias is computed, or is part of a larger tensor"


@dataclass(frozen=True)
class Compensation:
    """What compensation did.

    Attributes:
        repairs: Layer by layer, in the order of execution.
        left: Layers that read narrowed or changed inputs and were left as they are, with the
            reason.
    """

    repairs: tuple[Repair, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.repairs)} layers re-solved; share of the outputs that is missing:"]
        lines += [f"  {r.layer}: {r.before:.3g} -> {r.after:.3g}" for r in self.repairs]
        lines += [f"  {layer} was left as it is: {why}" for layer, why in self.left.items()]
        return "\n".join(lines)


@preserved()
def compensate(
    slim: nn.Module, model: nn.Module, keep: Keep, calibration: Calibration
) -> Compensation:
    """Re-solve the weights of a narrowed model in place.

    Every batch runs once through the dense and once through the narrowed graph, at any depth, and
    the first one once more through the repaired model as a check.

    Args:
        slim: The narrowed model, verified; its parameters and running statistics change.
        model: The dense model.
        keep: What stays.
        calibration: Batches to reproduce the dense outputs on.
    """
    program = keep.coupling.program
    held, names = held_tensors(slim), set(program.tensors.values()) - program.anonymous
    tensors = {n: held[n].detach().clone() for n in names if n in held}
    with torch.no_grad():
        narrowed = Shelf(tensors)
        done, expected = re_solve(Shelf(held_tensors(model)), narrowed, keep, calibration)
        for name in narrowed.changed:
            held[name].data.copy_(tensors[name])
        for number, outputs in expected.items():
            _verify(slim, calibration, number, outputs)
    return done


def re_solve(
    dense: Shelf, tensors: Shelf, keep: Keep, calibration: Calibration
) -> tuple[Compensation, dict[int, list[Any]]]:
    """Re-solve narrowed weights, wherever they and the dense ones live.

    Args:
        dense: The dense tensors.
        tensors: The narrowed ones, to which those that were changed are handed back.
        keep: What stays.
        calibration: Batches to reproduce the dense outputs on.

    Returns:
        What was done, and the flat outputs of the narrowed graph for the first batch of each
        length, by its number.
    """
    return _Repairer(dense, tensors, keep, calibration).run()


class _Repairer:
    def __init__(self, dense: Shelf, tensors: Shelf, keep: Keep, calibration: Calibration) -> None:
        self.dense, self.tensors, self.keep, self.calibration = dense, tensors, keep, calibration
        self.program = keep.coupling.program
        self.sites: dict[fx.Node, list[Site]] = {}
        for site in find_sites(keep.coupling):
            self.sites.setdefault(site.node, []).append(site)
        self.repairs: list[Repair] = []
        self.left: dict[str, str] = {}
        self.together: dict[fx.Node, list[fx.Node]] = {}

    def run(self) -> tuple[Compensation, dict[int, list[Any]]]:
        whole = Reference(Keep(self.keep.coupling, {}), self.dense)
        narrow = Reference(self.keep, self.dense, sliced=True)
        self.together = self._joined()
        trail = self.calibration.trail
        with Store(self.calibration.memory, trail) as store:
            walk = Walk(
                self.calibration,
                [Graph(whole), Graph(narrow, self.tensors)],
                [[first] for first in self.together],
                store,
                [self.dense, self.tensors],
                self.together,
            )
            ended = None
            if trail is not None:
                parts: dict[str, Part] = {"walk": walk, "repairs": self}
                ended = trail.following("compensate", self.program, [store], parts)
            with bar(self.calibration) as progress:
                stretches, left = walk.stretches(), len(walk.pauses) - walk.done
                for nodes in progress.track(stretches, left, description="compensate"):
                    self._stretch(nodes, walk)
                    if ended is not None:
                        ended()
            expected = {n: walk.outputs(n, 1) for n in self._one_a_length()}
        return Compensation(tuple(self.repairs), {**self.left, **self._unread()}), expected

    def state(self) -> Any:
        """What was done so far."""
        return [asdict(repair) for repair in self.repairs], dict(self.left)

    def restore(self, state: Any) -> bool:
        """Have what an earlier process has done."""
        repairs, self.left = state
        self.repairs = [Repair(**repair) for repair in repairs]
        return True

    def _joined(self) -> dict[fx.Node, list[fx.Node]]:
        """Sites and batch norms to stop at; with each, those that read what is there already."""
        nodes = self.program.graph.graph.nodes
        gone = self.keep.gone.nodes
        norms = {n for n in nodes if is_batch_norm(n) and statistics(n, self.keep, self.tensors)}
        stops = [n for n in nodes if (n in self.sites or n in norms) and n not in gone]

        def needs(node: fx.Node) -> list[fx.Node]:
            streams = [stream(s, self.program.sizes) for s in self.sites.get(node, ())]
            return [*node.all_input_nodes, *(s for s in streams if s is not None)]

        return {found[0]: found for found in joined(self.program, stops, needs)}

    def _stretch(self, nodes: tuple[fx.Node, ...], walk: Walk) -> None:
        """Repair what is seen where all batches pause."""
        seen = self.together[nodes[0]]
        # Sites of one node (the layers of an LSTM) read what the ones before give.
        rounds = zip_longest(*(self._repairs(node) for node in seen))
        for each in rounds:
            waiting = repairs = [repair for repair in each if repair is not None]
            _share_inputs(repairs, self.calibration)
            while waiting:
                for number, _, (dense, slim) in walk.batches():
                    for repair in waiting:
                        repair.see(number, dense.paused(repair.node), slim.paused(repair.node))
                if waiting is repairs:
                    touched_anywhere(repairs, self.calibration.everyone)
                waiting = [repair for repair in waiting if repair.again]
            for repair in repairs:
                done = repair.finish(dense.paused(repair.node), slim.paused(repair.node))
                if done is not None:
                    self.repairs.append(done)
                if isinstance(repair, SiteRepair) and repair.left:
                    self.left[repair.site.name] = repair.left

    def _repairs(self, node: fx.Node) -> list[SiteRepair | NormRepair]:
        if node not in self.sites:
            return [NormRepair(node, self.keep, self.tensors, self.calibration.everyone)]
        return [
            SiteRepair(site, self.keep, self.dense, self.tensors, self.calibration)
            for site in self.sites[node]
        ]

    def _unread(self) -> dict[str, str]:
        """Layers that contract narrowed axes and have no calibration site, with the reason."""
        unread = self._elsewhere()
        weights = Weights(self.program)
        for node, effects in self.keep.coupling.effects.items():
            if node.graph is not self.program.graph.graph or node in self.sites:
                continue
            for source, dim in effects.contracts:
                dims = self.keep.coupling.env[source]
                narrowed = isinstance(dims, tuple) and self.keep.narrows(dims[dim])
                name = next(iter(weights.behind(source)), "")
                if narrowed and name:
                    unread[layer_of(name)] = _COMPUTED
        return unread

    def _elsewhere(self) -> dict[str, str]:
        """Layers whose narrowed weights only other example calls read, with the reason."""
        return {
            layer_of(member.tensor): _ELSEWHERE
            for number in self.keep.units
            for member in self.keep.coupling.groups[number].members
            if member.role == "consumer" and member.tensor in self.program.parameters
            if self.program.others and member.tensor not in self.program.read
        }

    def _one_a_length(self) -> list[int]:
        """The first batch of the captured length, and of any other."""
        numbers = {
            b.resized is None: i for i, b in reversed([*enumerate(self.calibration.batches)])
        }
        return sorted(numbers.values())


def _share_inputs(repairs: Sequence[object], calibration: Calibration) -> None:
    """Have sites that multiply the same vectors see these once, where that is less to look at.

    Args:
        repairs: What is repaired in one pause.
        calibration: The batches.
    """
    together: dict[Hashable, list[SiteRepair]] = {}
    for repair in repairs:
        key = repair.reads() if isinstance(repair, SiteRepair) else None
        if key is not None and isinstance(repair, SiteRepair):
            together.setdefault(key, []).append(repair)
    for found in together.values():
        outputs = sum(axes.resolve(repair.site.rows).size for repair in found)
        if outputs >= axes.resolve(found[0].site.term).size:
            shared = SharedInputs(calibration)
            for repair in found:
                repair.shared = shared


def _verify(slim: nn.Module, calibration: Calibration, number: int, expected: list[Any]) -> None:
    """Refuse a model that gives other outputs for a batch than the graph that was repaired."""
    args, kwargs = calibration.arguments(calibration.batches[number])
    try:
        with as_captured():
            result = clone(slim, buffers=True)(*args, **kwargs)
        outputs = calibration.program.results.flat(result)
    except Exception as error:
        reraise_fatal(error)
        raise VerificationError(
            f"the smaller model raises {first_line(error)} on item "
            f"{calibration.numbers[number]} of the data",
            where=user_line(error, slim),
            remedy="pass data of the shapes of inputs=, or hold the layers with ignore=",
        ) from error
    size, message = relative_error(expected, outputs)
    if message or not size <= _TOLERANCE:
        raise VerificationError(
            message or f"after compensation, outputs differ by {size:.3g} of their scale",
            where=type(slim).__name__,
            remedy="pass compensate=False, and please report the model",
        )
