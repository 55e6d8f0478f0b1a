"""Repair a narrowed model: re-solve the weights that read removed units for the dense outputs.

Layer by layer in the order of execution, the kept columns of each weight are solved by least
squares for the dense layer's outputs, from the inputs that the layers before, repaired already,
deliver. Sources: He et al., Channel Pruning, ICCV 2017, eq. 1 (reconstruction, in sequence);
Frantar & Alistarh, Optimal Brain Compression, NeurIPS 2022 (closed form from second moments); Nagel
et al., Data-Free Quantization, ICCV 2019, section 4.2 (biases take the mean).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from depcut import axes
from depcut.axes import Reason
from depcut.calibration.data import Calibration
from depcut.calibration.lockstep import Lockstep
from depcut.calibration.moments import folded
from depcut.calibration.padding import without_padding
from depcut.calibration.products import mean_and_variance
from depcut.calibration.progress import bar
from depcut.calibration.sites import find_sites
from depcut.calibration.solve import solve
from depcut.calibration.visits import check_finite
from depcut.capture.clone import clone
from depcut.capture.eager import user_line
from depcut.capture.held import held_tensors
from depcut.capture.process_state import as_captured
from depcut.capture.program import layer_of
from depcut.capture.random_state import preserved
from depcut.errors import VerificationError
from depcut.graph.ancestry import Weights, is_shared
from depcut.graph.arguments import Call, bound
from depcut.graph.interpreter import Paused
from depcut.graph.operators import base_name, is_aten
from depcut.ops.contraction import MatrixProduct
from depcut.ops.normalization import is_batch_norm, shared_statistics
from depcut.ops.site import Site
from depcut.plan.keep import Keep
from depcut.reference.run import kept_part
from depcut.support.closeness import relative_error
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree

_TOLERANCE = 1e-2  # relative, between the repaired graph and model: rounding alone
_ELSEWHERE = "only other example calls than that of the data run it"
_COMPUTED = "its weight or bias is computed, or is part of a larger tensor"
_SAME = 1e-6  # relative difference of inputs that counts as rounding


@dataclass(frozen=True)
class Repair:
    """How one layer was re-solved.

    Attributes:
        layer: Its name.
        before: Share of the outputs' variance that is missed without repair, held out.
        after: The same with it.
        ridge: Regularisation, relative to the mean variance of the inputs; infinite: only the
            bias was changed.
    """

    layer: str
    before: float
    after: float
    ridge: float


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
    the first one once more through the repaired model as a check. With little memory, where only
    one batch is held, every layer has the batches run from their start again, a few times.

    Args:
        slim: The narrowed model, verified; its parameters and running statistics change.
        model: The dense model.
        keep: What stays.
        calibration: Batches to reproduce the dense outputs on.
    """
    with torch.no_grad():
        return _Repairer(slim, model, keep, calibration).run()


class _Repairer:
    def __init__(
        self, slim: nn.Module, model: nn.Module, keep: Keep, calibration: Calibration
    ) -> None:
        self.slim, self.model, self.keep, self.calibration = slim, model, keep, calibration
        self.program = keep.coupling.program
        self.sites: dict[fx.Node, list[Site]] = {}
        for site in find_sites(keep.coupling):
            self.sites.setdefault(site.node, []).append(site)
        self.norms = [n for n in self.program.graph.graph.nodes if is_batch_norm(n)]
        self.held = held_tensors(model)
        self.tensors = self._narrowed()
        self.repairs: list[Repair] = []
        self.left: dict[str, str] = {}

    def _narrowed(self) -> dict[str, torch.Tensor]:
        """Copies of the narrowed model's own tensors."""
        held = held_tensors(self.slim)
        names = set(self.program.tensors.values()) - self.program.anonymous
        return {n: held[n].detach().clone() for n in names if n in held}

    def run(self) -> Compensation:
        order = {node: i for i, node in enumerate(self.program.graph.graph.nodes)}
        gone = self.keep.gone.nodes
        stops = [n for n in (*self.sites, *self.norms) if n not in gone]
        stops.sort(key=lambda n: order[n])
        changed = {name for name in self.tensors if name in self.program.parameters}
        changed |= {name for norm in self.norms for name in self._statistics(norm)}
        both = Lockstep(self.keep, self.model, self.tensors, self.calibration, stops, changed)
        with bar(self.calibration) as progress:
            for node in progress.track(stops, description="compensate"):
                both.advance()
                if node in self.sites:
                    for site in self.sites[node]:
                        self._site(site, both)
                else:
                    self._norm(node, both)
        numbers = self._one_a_length()
        expected = [both.outputs(number) for number in numbers]
        held = held_tensors(self.slim)
        for name in changed:
            held[name].data.copy_(self.tensors[name])
        for number, outputs in zip(numbers, expected, strict=True):
            self._verify(number, outputs)
        return Compensation(tuple(self.repairs), {**self.left, **self._unread()})

    def _site(self, site: Site, both: Lockstep) -> None:
        if self._untouched(site, both):
            return
        call = self._call(next(both.steps())[1])
        reason = self._obstacle(site, call)
        if reason:
            self.left[site.name] = reason
            return
        weight = site.family.matrix(call)
        added = [self.tensors[name].reshape(weight.shape[:2]) for name in site.biases]
        start = weight.new_zeros(weight.shape[:2])
        bias = sum(added, start) if site.takes_shift else None
        solution = solve(folded(self._pairs(site, both, weight)), weight, bias)
        site.family.write(call, solution.weight.to(weight.dtype))
        if site.biases:
            for name in site.biases:
                self.tensors[name].zero_()
            first = self.tensors[site.biases[0]]
            first.copy_(solution.bias.reshape(first.shape))
        self.repairs.append(Repair(site.name, solution.before, solution.after, solution.ridge))

    def _pairs(
        self, site: Site, both: Lockstep, weight: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Least-squares problems, one a batch, of the blocks of a site's weight.

        Yields:
            Number of the batch, narrowed inputs [blocks, vectors, in] and the dense layer's outputs
            that stay [blocks, vectors, out].
        """
        rows = self.keep.indices(site.rows)
        stream = _stream(site, self.program.sizes)
        for number, (dense, slim) in enumerate(both.steps()):
            wide, narrow = self._call(dense), self._call(slim)
            x = site.family.inputs(self._along(site, dense))
            dense_weight = site.family.matrix(wide)
            added = [self.held[name].reshape(len(dense_weight), 1, -1) for name in site.biases]
            stay = None if rows is None else torch.from_numpy(rows).to(x.device)
            if stay is not None and len(dense_weight) == 1:
                dense_weight, added = dense_weight[:, stay], [a[..., stay] for a in added]
            exact = torch.promote_types(x.dtype, torch.float32)
            y = x.to(exact) @ dense_weight.to(exact).transpose(1, 2)
            for bias in added:
                y = y + bias
            flat = y.transpose(0, 1).flatten(1)
            if stay is not None and len(dense_weight) > 1:
                flat = flat[:, stay]
            if stream is not None:
                flat = flat + self._drift(dense, slim, stream).reshape(flat.shape)
            target = flat.unflatten(1, weight.shape[:2]).transpose(0, 1)
            given = self._read(site, narrow, x)
            for value in (given, target):
                check_finite(value, number, site.node)
            if isinstance(site.family, MatrixProduct) and site.family.features == -1:
                valid = self.calibration.batches[number].valid
                given, target = without_padding(valid, wide[site.family.source], given, target)
            yield number, given, target

    def _along(self, site: Site, dense: Paused) -> Call:
        """The dense call, its activations sliced along all axes but those of the weight."""
        dims = self.keep.coupling.env
        own = {*axes.leaves(site.term), *axes.leaves(axes.resolve(site.rows))}
        for source in site.node.all_input_nodes:
            for term in self.keep.coupling.dims.get(self.program.tensors.get(source, ""), ()):
                own |= {*axes.leaves(term)}
        values = {}
        for source in site.node.all_input_nodes:
            value, terms = dense.values[source], dims[source]
            if isinstance(terms, tuple) and source not in self.program.tensors:
                held = Reason("of the weight's own", source.name)
                rest = [
                    axes.axis(t.size, held) if own & {*axes.leaves(axes.resolve(t))} else t
                    for t in terms
                ]
                value = kept_part(value, self.keep, tuple(rest))
            values[source] = value
        args = fx.map_arg(site.node.args, values.__getitem__)
        kwargs = fx.map_arg(site.node.kwargs, values.__getitem__)
        return bound(site.node, args, kwargs)

    def _drift(self, dense: Paused, slim: Paused, stream: fx.Node) -> torch.Tensor:
        """Kept part of the dense stream that the result is added to, less the narrowed stream."""
        before, after = dense.values[stream], slim.values[stream]
        kept = kept_part(before, self.keep, self.keep.coupling.env[stream])
        return kept - torch.as_tensor(after)

    def _read(self, site: Site, narrow: Call, dense: torch.Tensor) -> torch.Tensor:
        """Narrowed inputs [blocks, vectors, in]; a cell's own state is that of the dense run."""
        x = site.family.inputs(narrow)
        if site.own:
            kept = self.keep.indices(site.term)
            own = sum(self.keep.count(t) for c in site.columns[-site.own :] for t in c)
            picked = dense if kept is None else dense[..., torch.from_numpy(kept).to(x.device)]
            x = torch.cat([x[..., : x.shape[-1] - own], picked[..., x.shape[-1] - own :]], -1)
        return x

    def _untouched(self, site: Site, both: Lockstep) -> bool:
        """Whether the inputs are the dense ones, so that there is nothing to repair."""
        if self.keep.narrows(site.term):
            return False
        for dense, slim in both.steps():
            for x, given in self._read_by_both(site, self._along(site, dense), self._call(slim)):
                if x.shape != given.shape:
                    return False
                if not float((x - given).abs().max()) <= _SAME * float(x.abs().max()):
                    return False
        return True

    def _read_by_both(
        self, site: Site, wide: Call, narrow: Call
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What decides on the inputs of a site: activations where they do, else the inputs."""
        nodes = bound(site.node, site.node.args, site.node.kwargs)
        leaves = [pytree.tree_leaves(dict(call)) for call in (nodes, wide, narrow)]
        if site.family.reads(nodes, narrow) is None or len({len(part) for part in leaves}) != 1:
            return [(site.family.inputs(wide), site.family.inputs(narrow))]
        return [
            (x, given)
            for node, x, given in zip(*leaves, strict=True)
            if isinstance(node, fx.Node) and node not in self.program.tensors
            if isinstance(x, torch.Tensor)
        ]

    def _obstacle(self, site: Site, call: Call) -> str:
        """Why the weights of a site cannot be changed, "" if they can."""
        for name in (*site.weights, *site.biases):
            if is_shared(name, self.program):
                return f"{name} is used more than once"
            if name not in self.tensors:
                return f"{name} does not exist in the narrowed model"
        leaves = pytree.tree_leaves(dict(call))
        read = {_storage(t) for t in leaves if isinstance(t, torch.Tensor)}
        for name in site.weights:
            if _storage(self.tensors[name]) not in read:
                return f"{name} is converted before it is used"
        return ""

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

    def _statistics(self, norm: fx.Node) -> tuple[str, ...]:
        """Names of a batch norm's running mean and variance, where they can be changed."""
        tensors = [self.program.tensors.get(n) for n in norm.args[3:5] if isinstance(n, fx.Node)]
        names = tuple(n for n in tensors if n is not None and n in self.tensors)
        shared = shared_statistics(norm, self.program)
        return names if len(names) == 2 and shared is None else ()

    def _norm(self, node: fx.Node, both: Lockstep) -> None:
        """Shift and scale running statistics as the calibration batches' own moved."""
        names = self._statistics(node)
        dims = self.keep.coupling.env[node]
        pairs = [(self._call(d), self._call(s)) for d, s in both.steps()]
        if not names or not isinstance(dims, tuple):
            return
        kept = self.keep.indices(dims[1])
        before, after = (mean_and_variance([p[i]["input"] for p in pairs]) for i in (0, 1))
        old = [b if kept is None else b[torch.from_numpy(kept).to(b.device)] for b in before]
        mean, variance = (self.tensors[name] for name in names)
        mean += (after[0] - old[0]).to(mean.dtype)
        # Its epsilon tells noise from variance here too.
        eps = pairs[0][1]["eps"]
        ratio = ((after[1] + eps) / (old[1] + eps)).clamp(1e-2, 1e2)
        variance *= ratio.to(variance.dtype)

    def _one_a_length(self) -> list[int]:
        """The first batch of the captured length, and of any other."""
        numbers = {
            b.resized is None: i for i, b in reversed([*enumerate(self.calibration.batches)])
        }
        return sorted(numbers.values())

    def _verify(self, number: int, expected: list[Any]) -> None:
        """Refuse a model that gives other outputs for a batch than the graph that was repaired."""
        args, kwargs = self.calibration.arguments(self.calibration.batches[number])
        try:
            with as_captured():
                result = clone(self.slim, buffers=True)(*args, **kwargs)
            outputs = self.program.results.flat(result)
        except Exception as error:
            reraise_fatal(error)
            raise VerificationError(
                f"the smaller model raises {first_line(error)} on item {number} of the data",
                where=user_line(error, self.slim),
                remedy="pass data of the shapes of inputs=, or hold the layers with ignore=",
            ) from error
        size, message = relative_error(expected, outputs)
        if message or not size <= _TOLERANCE:
            raise VerificationError(
                message or f"after compensation, outputs differ by {size:.3g} of their scale",
                where=type(self.slim).__name__,
                remedy="pass compensate=False, and please report the model",
            )

    def _call(self, paused: Paused) -> Call:
        return bound(paused.node, paused.args, paused.kwargs)


def _stream(site: Site, sizes: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The node that the result of a linear layer is added to, if it was computed before."""
    if not isinstance(site.family, MatrixProduct) or site.family.features != -1:
        return None
    node = site.node
    while len(node.users) == 1:
        (user,) = node.users
        if "dropout" in base_name(user):
            node = user
            continue
        others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
        plain = len(user.args) == 2 and not user.kwargs
        if is_aten(user, "add") and plain and len(others) == 1:
            alike = others[0].op == "call_function" and sizes[others[0]] == sizes[site.node]
            return others[0] if alike and others[0] < site.node else None
        return None
    return None


def _storage(tensor: torch.Tensor) -> int:
    """Address of a tensor's storage, which its views share and copies do not."""
    return tensor.untyped_storage().data_ptr()
