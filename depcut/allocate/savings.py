"""What dropping residual branches saves of a budget, with all that only they use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from depcut.axes import Dims
from depcut.branches.branch import Residuals, bypass
from depcut.coupling.groups import Coupling
from depcut.graph.liveness import Losses, calls_of, enclosing
from depcut.plan.cost import channel_families
from depcut.plan.keep import Keep


class Savings:
    """The part of a budgeted quantity that goes with some branches.

    Args:
        coupling: The analysed model.
        residuals: Its branches.
        of: "macs", "params" or "channels".
        keep: The widths at which it goes; None: the dense ones.
    """

    def __init__(
        self, coupling: Coupling, residuals: Residuals, of: str, keep: Keep | None = None
    ) -> None:
        self.keep = keep or Keep(coupling, {})
        self.coupling, self.program, self.of = coupling, coupling.program, of
        self.branches = {b.name: b for b in residuals.branches}
        self.losses = Losses(self.program)
        self.nodes: dict[str, list[fx.Node]] = {}
        for node, tensor in self.program.tensors.items():
            self.nodes.setdefault(tensor, []).append(node)
        self.computing = Counter(m for n in self.losses.live for m in _modules(n))
        self.idle: dict[str, list[str]] = {}  # tensors that nothing reads, by enclosing module
        for name in coupling.dims:
            if not any(n in self.losses.live for n in self._reads(name)):
                for module in enclosing(name):
                    self.idle.setdefault(module, []).append(name)
        self.families = channel_families(coupling)
        self.groups: dict[str, list[int]] = {}
        for group in coupling.groups:
            for tensor in {m.tensor for m in group.members}:
                self.groups.setdefault(tensor, []).append(group.index)

    def __call__(self, names: Sequence[str]) -> float:
        """What dropping these branches together saves."""
        lost = self.losses(bypass(self.branches[n] for n in names))
        if self.of == "macs":
            effects = [self.coupling.effects[n] for n in lost if n in self.coupling.effects]
            return (
                sum(self._size(times, d) for e in effects for times, d in e.macs)
                / self.program.batch
            )
        tensors = self._tensors(lost)
        if self.of == "params":
            aliases = self.program.aliases
            own = [n for n in tensors & self.program.parameters if aliases.get(n, (n,))[0] == n]
            return sum(self._size(1, self.coupling.dims[n]) for n in own)
        whole, counts = set(self._whole(tensors)), self.keep.counts
        families = (f for f in self.families if not whole.isdisjoint(f))
        return float(sum(math.prod(int(counts[i]) for i in f) for f in families))

    def tensors(self, names: Sequence[str]) -> set[str]:
        """Parameters and buffers that nothing uses once these branches are dropped together."""
        return self._tensors(self.losses(bypass(self.branches[n] for n in names)))

    def own_groups(self, names: Sequence[str]) -> list[int]:
        """Numbers of the groups that are there for these branches alone."""
        return self._whole(self.tensors(names))

    def _size(self, times: float, dims: Dims) -> float:
        return times * math.prod(self.keep.count(term) for term in dims)

    def _reads(self, name: str) -> Iterator[fx.Node]:
        """Nodes that stand for a tensor, under any of its names."""
        for alias in self.program.aliases.get(name, (name,)):
            yield from self.nodes.get(alias, ())

    def _tensors(self, lost: set[fx.Node]) -> set[str]:
        """Tensors that only lost nodes read, or that are idle in a module that is lost."""
        unread = {self.program.tensors[n] for n in lost if n in self.program.tensors}
        counts = Counter(m for n in lost for m in _modules(n))
        modules = [m for m, count in counts.items() if count == self.computing[m]]
        held = {name for m in modules for name in self.idle.get(m, ())}
        live = self.losses.live
        alive = {n for n in unread if any(r in live and r not in lost for r in self._reads(n))}
        return ((unread | held) - alive) & self.coupling.dims.keys()

    def _whole(self, tensors: Iterable[str]) -> list[int]:
        """Groups all of whose tensors are among these."""
        counts = Counter(i for name in tensors for i in self.groups.get(name, ()))
        members = self.coupling.groups
        return [i for i, n in counts.items() if n == len({m.tensor for m in members[i].members})]


def _modules(node: fx.Node) -> set[str]:
    """Modules that a node does something in."""
    return {entry.partition("@")[0] for entry in calls_of(node)}
