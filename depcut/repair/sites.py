"""One site re-solved: what batches show of it, and the least squares problem that they make."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from depcut import axes
from depcut.axes import Reason
from depcut.calibration.data import Calibration
from depcut.calibration.folds import Folds
from depcut.calibration.gaps import Target
from depcut.calibration.padding import without_padding
from depcut.calibration.shelf import Shelf
from depcut.calibration.solve import of_first_process, solve
from depcut.calibration.visits import check_finite
from depcut.calibration.windows import Windows
from depcut.graph.ancestry import is_shared
from depcut.graph.arguments import Call, bound
from depcut.graph.interpreter import Paused
from depcut.ops.contraction import MatrixProduct
from depcut.ops.site import Site
from depcut.plan.keep import Keep
from depcut.reference.run import kept_part
from depcut.repair.shared_inputs import SharedInputs, change, is_part
from depcut.repair.streams import stream
from depcut.support.processes import Processes
from depcut.support.torch_private import pytree

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


class SiteRepair:
    """Re-solves the weights of one site, once it has seen every batch.

    Args:
        site: The site.
        keep: What stays.
        dense: The dense tensors by name.
        tensors: The narrowed ones, which are changed.
        calibration: The batches.

    Attributes:
        left: Why the weights cannot be changed, "" if they can.
        again: Whether the batches have to be seen once more: the first ones were taken for such
            that leave nothing to repair.
    """

    def __init__(
        self, site: Site, keep: Keep, dense: Shelf, tensors: Shelf, calibration: Calibration
    ) -> None:
        self.site, self.keep, self.dense, self.tensors = site, keep, dense, tensors
        self.calibration, self.program = calibration, keep.coupling.program
        self.left, self.again = "", False
        self.node = site.node
        self.touched = keep.narrows(site.term)
        self.folds: Folds | None = None
        self.shared: SharedInputs | None = None

    def see(self, number: int, dense: Paused, slim: Paused) -> None:
        """Take in one batch.

        Args:
            number: Of the batch.
            dense: The site's node in the dense graph.
            slim: The same in the narrowed one.
        """
        if self.left:
            return
        if not self.touched:
            if self._same(dense, slim):
                return
            self.touched, self.again = True, number > 0
        if self.again and number:
            return
        call = bound(slim.node, slim.args, slim.kwargs)
        if self.folds is None:
            self.folds, self.again = Folds(self.calibration.total), False
            self.left = self._obstacle(call)
            if self.left or not self._joins(dense, call):
                self.shared = None
        if self.shared is not None:
            self.shared.see(self.calibration.numbers[number], *self._both(number, dense, slim))
        elif not self.left:
            pair = self._pair(number, dense, slim, self.site.family.matrix(call))
            self.folds.add(self.calibration.numbers[number], *pair)

    def touched_elsewhere(self) -> None:
        """Another process has a batch that leaves something to repair."""
        if not self.touched:
            self.touched = self.again = True

    def finish(self, dense: Paused, slim: Paused) -> Repair | None:
        """Change the weights; None where there is nothing to repair, or an obstacle.

        Args:
            dense: The site's node in the dense graph, of any batch.
            slim: The site's node in the narrowed graph, of any batch.
        """
        if self.folds is None or self.left:
            return None
        site, call = self.site, bound(slim.node, slim.args, slim.kwargs)
        if self.shared is not None:
            return self._finish_shared(self.shared, dense, call)
        weight = site.family.matrix(call)
        added = [self.tensors[name].reshape(weight.shape[:2]) for name in site.biases]
        start = weight.new_zeros(weight.shape[:2])
        bias = sum(added, start) if site.takes_shift else None
        everyone = self.calibration.everyone
        solution = solve(self.folds.moments(site.name, everyone), weight, bias)
        solution = of_first_process(site.name, solution, everyone)
        site.family.write(call, solution.weight.to(weight.dtype))
        self._hand_back(solution.bias)
        return Repair(site.name, solution.before, solution.after, solution.ridge)

    def _hand_back(self, bias: torch.Tensor | None) -> None:
        """Hand back the weights, which are changed, and biases that are to be another one."""
        site = self.site
        if site.biases and bias is not None:
            for name in site.biases:
                self.tensors[name].zero_()
            first = self.tensors[site.biases[0]]
            first.copy_(bias.reshape(first.shape))
        for name in (*site.weights, *site.biases):
            self.tensors.hand_back(name)

    # Sites that multiply the same vectors -----------------------------------------------------

    def reads(self) -> Hashable | None:
        """Equal where sites multiply the same vectors with a matrix; None: alone, or otherwise."""
        site, family = self.site, self.site.family
        if not isinstance(family, MatrixProduct) or family.features != -1 or site.own:
            return None
        if len(site.weights) > 1 or stream(site, self.program.sizes) is not None:
            return None
        source = bound(site.node, site.node.args, site.node.kwargs)[family.source]
        own, terms = self._own(), self.keep.coupling.env[source]
        if not isinstance(terms, tuple) or (site.biases and not site.takes_shift):
            return None
        held = (bool(own & {*axes.leaves(axes.resolve(t))}) for t in terms)
        return source, site.takes_shift, tuple(held)

    def _joins(self, dense: Paused, call: Call) -> bool:
        """Whether the site is one of those of its shared inputs, and tell these its target."""
        if self.shared is None:
            return False
        (weight,), (matrix,) = self.site.family.matrix(call), self.site.family.matrix(_call(dense))
        rows, kept = self._stay(self.site.rows, weight), self._stay(self.site.term, weight)
        columns = torch.arange(weight.shape[1], device=weight.device) if kept is None else kept
        if columns.ndim > 1 or not is_part(weight, matrix, rows, columns):
            return False
        shift = None
        if self.site.biases:
            shift = self._dense_bias(rows) - self._bias(weight)
        if rows is not None:
            matrix = matrix[rows]
        self.shared.kept, self.shared.free = columns, self.site.takes_shift
        self.shared.targets[self.site.name] = Target.of(matrix, shift)
        return True

    def _stay(self, term: axes.Term, like: torch.Tensor) -> torch.Tensor | None:
        kept = self.keep.indices(term)
        return None if kept is None else torch.from_numpy(kept).to(like.device)

    def _bias(self, weight: torch.Tensor) -> torch.Tensor:
        """What the narrowed graph adds, (out,)."""
        start = weight.new_zeros(len(weight))
        return sum((self.tensors[name].reshape(-1) for name in self.site.biases), start)

    def _dense_bias(self, rows: torch.Tensor | None) -> torch.Tensor:
        """What the dense graph adds to what stays, (out,)."""
        total = torch.stack([self.dense[n].detach().reshape(-1) for n in self.site.biases]).sum(0)
        return total if rows is None else total[rows]

    def _both(self, number: int, dense: Paused, slim: Paused) -> tuple[torch.Tensor, torch.Tensor]:
        """Narrowed and dense inputs (1, vectors, in)."""
        wide, narrow = _call(dense), _call(slim)
        family = self.site.family
        assert isinstance(family, MatrixProduct)
        x, given = family.inputs(self._along(dense)), family.inputs(narrow)
        for value in (given, x):
            check_finite(value, self.calibration.numbers[number], self.site.node)
        valid = self.calibration.batches[number].valid
        x, given = without_padding(valid, wide[family.source], x, given)
        return given, x.to(torch.promote_types(x.dtype, torch.float32))

    def _finish_shared(self, shared: SharedInputs, dense: Paused, call: Call) -> Repair:
        """Change the weights by what was found for all that read the same."""
        site = self.site
        (weight,), (matrix,) = site.family.matrix(call), site.family.matrix(_call(dense))
        found = shared.found(site.name)
        rows = self._stay(site.rows, weight)
        shift = change(weight, matrix, rows, found)
        bias = None
        if site.biases:
            bias = self._dense_bias(rows) + (0 if shift is None else shift)
        self._hand_back(bias)
        return Repair(site.name, found.before, found.after, found.ridge)

    def _own(self) -> set[axes.Axis]:
        """Axes of the weight, along which a dense activation is not sliced."""
        site = self.site
        own = {*axes.leaves(site.term), *axes.leaves(axes.resolve(site.rows))}
        for source in site.node.all_input_nodes:
            for term in self.keep.coupling.dims.get(self.program.tensors.get(source, ""), ()):
                own |= {*axes.leaves(term)}
        return own

    def _pair(
        self, number: int, dense: Paused, slim: Paused, weight: torch.Tensor
    ) -> tuple[torch.Tensor | Windows, torch.Tensor]:
        """Narrowed inputs [blocks, vectors, in] and the dense outputs that stay, alike."""
        site, family = self.site, self.site.family
        wide, narrow = (bound(p.node, p.args, p.kwargs) for p in (dense, slim))
        flat = self._result(dense, family.matrix(wide).dtype)
        x = None
        if flat is None or site.own:
            x = family.inputs(self._along(dense))
        if flat is None:
            assert x is not None
            flat = self._multiplied(x, wide)
        added_to = stream(site, self.program.sizes)
        if added_to is not None:
            flat = flat + self._drift(dense, slim, added_to).reshape(flat.shape)
        target = flat.unflatten(1, weight.shape[:2]).transpose(0, 1)
        given = Windows.of(site, narrow) or self._read(narrow, x)
        for value in (given.images if isinstance(given, Windows) else given, target):
            check_finite(value, self.calibration.numbers[number], site.node)
        if isinstance(family, MatrixProduct) and family.features == -1:
            valid = self.calibration.batches[number].valid
            assert isinstance(given, torch.Tensor)
            given, target = without_padding(valid, wide[family.source], given, target)
        return given, target

    def _result(self, dense: Paused, dtype: torch.dtype) -> torch.Tensor | None:
        """What the dense node computes, (vectors, kept outputs); None where that is another thing.

        Args:
            dense: The site's node in the dense graph.
            dtype: Of its weight.
        """
        site, dim = self.site, self.site.family.result
        if dim is None or torch.promote_types(dtype, torch.float32) != dtype or not self._whole:
            return None
        result = dense.result()
        if not isinstance(result, torch.Tensor) or result.dtype != dtype:
            return None
        flat = result.movedim(dim, -1).reshape(-1, result.shape[dim])
        stay = self._stay(site.rows, flat)
        return flat if stay is None else flat.index_select(1, stay)

    def _multiplied(self, x: torch.Tensor, wide: Call) -> torch.Tensor:
        """Dense outputs of inputs (blocks, vectors, in), in single precision or better."""
        site, dense_weight = self.site, self.site.family.matrix(wide)
        added = [
            self.dense[name].detach().reshape(len(dense_weight), 1, -1) for name in site.biases
        ]
        stay = self._stay(site.rows, x)
        if stay is not None and len(dense_weight) == 1:
            dense_weight, added = dense_weight[:, stay], [a[..., stay] for a in added]
        exact = torch.promote_types(x.dtype, torch.float32)
        y = x.to(exact) @ dense_weight.to(exact).transpose(1, 2)
        for bias in added:
            y = y + bias
        flat = y.transpose(0, 1).flatten(1)
        return flat[:, stay] if stay is not None and len(dense_weight) > 1 else flat

    @cached_property
    def _whole(self) -> bool:
        """Whether no activation is narrowed along another axis than those of the weight."""
        return not any(
            self.keep.narrows(term)
            for source in self.site.node.all_input_nodes
            if source not in self.program.tensors
            for term in self._beside(source) or ()
        )

    def _along(self, dense: Paused) -> Call:
        """The dense call, its activations sliced along all axes but those of the weight."""
        site, values = self.site, {}
        for source in site.node.all_input_nodes:
            value, rest = dense.values[source], self._beside(source)
            if rest is not None and source not in self.program.tensors:
                value = kept_part(value, self.keep, rest)
            values[source] = value
        args = fx.map_arg(site.node.args, values.__getitem__)
        kwargs = fx.map_arg(site.node.kwargs, values.__getitem__)
        return bound(site.node, args, kwargs)

    def _beside(self, source: fx.Node) -> tuple[axes.Term, ...] | None:
        """Terms of what the node reads, those of the weight's own axes held; None: no tensor."""
        own, terms = self._own(), self.keep.coupling.env[source]
        if not isinstance(terms, tuple):
            return None
        held = Reason("of the weight's own", source.name)
        return tuple(
            axes.axis(t.size, held) if own & {*axes.leaves(axes.resolve(t))} else t for t in terms
        )

    def _drift(self, dense: Paused, slim: Paused, added_to: fx.Node) -> torch.Tensor:
        """Kept part of the dense stream that the result is added to, less the narrowed stream."""
        before, after = dense.values[added_to], slim.values[added_to]
        kept = kept_part(before, self.keep, self.keep.coupling.env[added_to])
        return kept - torch.as_tensor(after)

    def _read(self, narrow: Call, dense: torch.Tensor | None) -> torch.Tensor:
        """Narrowed inputs [blocks, vectors, in]; a cell's own state is that of the dense run."""
        site = self.site
        x = site.family.inputs(narrow)
        if dense is not None and site.own:
            kept = self.keep.indices(site.term)
            own = sum(self.keep.count(t) for c in site.columns[-site.own :] for t in c)
            picked = dense if kept is None else dense[..., torch.from_numpy(kept).to(x.device)]
            x = torch.cat([x[..., : x.shape[-1] - own], picked[..., x.shape[-1] - own :]], -1)
        return x

    def _same(self, dense: Paused, slim: Paused) -> bool:
        """Whether the inputs are the dense ones, so that there is nothing to repair."""
        wide, narrow = self._along(dense), bound(slim.node, slim.args, slim.kwargs)
        for x, given in self._read_by_both(wide, narrow):
            if x.shape != given.shape:
                return False
            if not float((x - given).abs().max()) <= _SAME * float(x.abs().max()):
                return False
        return True

    def _read_by_both(self, wide: Call, narrow: Call) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What decides on the inputs: activations where they do, else the inputs themselves."""
        site, family = self.site, self.site.family
        nodes = bound(site.node, site.node.args, site.node.kwargs)
        leaves = [pytree.tree_leaves(dict(call)) for call in (nodes, wide, narrow)]
        if family.reads(nodes, narrow) is None or len({len(part) for part in leaves}) != 1:
            return [(family.inputs(wide), family.inputs(narrow))]
        return [
            (x, given)
            for node, x, given in zip(*leaves, strict=True)
            if isinstance(node, fx.Node) and node not in self.program.tensors
            if isinstance(x, torch.Tensor)
        ]

    def _obstacle(self, call: Call) -> str:
        """Why the weights cannot be changed, "" if they can."""
        for name in (*self.site.weights, *self.site.biases):
            if is_shared(name, self.program):
                return f"{name} is used more than once"
            if name not in self.tensors:
                return f"{name} does not exist in the narrowed model"
        leaves = pytree.tree_leaves(dict(call))
        read = {_address(t) for t in leaves if isinstance(t, torch.Tensor)}
        for name in self.site.weights:
            if _address(self.tensors[name]) not in read:
                return f"{name} is converted before it is used"
        return ""


def touched_anywhere(repairs: Sequence[object], everyone: Processes) -> None:
    """Tell the repairs of sites where another process has something to repair.

    Args:
        repairs: The same in all processes; each has seen every batch of this one.
        everyone: The processes.
    """
    sites = [r for r in repairs if isinstance(r, SiteRepair)]
    found = everyone.any_of("what to repair", [r.touched for r in sites])
    for repair, touched in zip(sites, found, strict=True):
        if touched:
            repair.touched_elsewhere()


def _call(paused: Paused) -> Call:
    return bound(paused.node, paused.args, paused.kwargs)


def _address(tensor: torch.Tensor) -> int:
    """Address of a tensor's storage, which its views share and copies do not."""
    return tensor.untyped_storage().data_ptr()
