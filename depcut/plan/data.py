"""What a plan is: which units stay. Integers only, so it can be saved, diffed and replayed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from depcut.axes import Indices
from depcut.branches.branch import Residuals, bypass
from depcut.branches.find import residuals as find_residuals
from depcut.capture.part import part_of
from depcut.capture.program import Program
from depcut.capture.refusals import check_module
from depcut.capture.results import names_of
from depcut.coupling.groups import Coupling
from depcut.errors import PlanError, listed
from depcut.graph.liveness import Bypass
from depcut.plan.fingerprint import (
    check_described,
    described,
    difference,
    fingerprint,
    sizes_of,
)
from depcut.plan.keep import Keep
from depcut.plan.stacks import stacks_of
from depcut.plan.units import check_rows, check_ties, units_of
from depcut.support import files
from depcut.support.checks import check_names, check_path
from depcut.support.failures import first_line, shown
from depcut.support.torch_private import pytree

FORMAT = 1
# What a file of a plan holds.
_ENTRIES = "format fingerprint settings inputs sizes shapes kept dropped".split()

OTHER = "the plan was made for another architecture"
ANEW = "make a plan for this model with depcut.analyze(model, inputs).plan(...)"

DataT = TypeVar("DataT", bound="PlanData")


@dataclass(frozen=True, eq=False, repr=False)
class PlanData:
    """Kept units of every narrowed group, for one architecture.

    Attributes:
        kept: Ascending kept indices by group name, a list or one for each row of the group's outer
            axis; groups not in it keep everything.
        sizes: Dense size of every group of the architecture.
        shapes: Dense shape of every parameter and buffer.
        fingerprint: Of the architecture's tensors and groups.
        settings: How it was made (ratio, of, score, ...).
        inputs: Shapes and dtypes of the example call it was made with, by "args" and "kwargs"; of
            several calls those of the first, and a list of the others under "others". Where not all
            outputs count, names of those that do, under "outputs".
        dropped: Names of the residual branches that go, sorted.
    """

    kept: Mapping[str, Indices]
    sizes: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]]
    fingerprint: str
    settings: Mapping[str, Any]
    inputs: Any
    dropped: tuple[str, ...] = ()

    def keep(self, coupling: Coupling, residuals: Residuals | None = None) -> Keep:
        """The kept units as an evaluation over an analysed architecture.

        Args:
            coupling: The architecture.
            residuals: Its branches, where they are known.

        Raises:
            PlanError: The architecture is another one, or has other rows.
        """
        if fingerprint(coupling) != self.fingerprint:
            raise PlanError(
                OTHER,
                where=difference(self.sizes, {g.name: g.size for g in coupling.groups}),
                remedy=ANEW,
            )
        if dict(self.sizes) != {g.name: g.size for g in coupling.groups}:
            raise PlanError(
                "the plan's groups have other sizes than its architecture's",
                where=difference(self.sizes, {g.name: g.size for g in coupling.groups}),
                remedy=ANEW,
            )
        check_rows(coupling, self.kept)
        _check_counts(coupling, self.kept)
        numbers = {g.name: g.index for g in coupling.groups}
        through: Bypass = {}
        if self.dropped:
            through = bypass((residuals or find_residuals(coupling)).named(self.dropped))
        return Keep(coupling, {numbers[n]: k for n, k in self.kept.items()}, bypass=through)

    def check(self, model: nn.Module) -> None:
        """Refuse a model with other tensors before any work is done on it.

        Args:
            model: What the plan is to be applied to.

        Raises:
            PlanError: It is no module, or has other tensors than the plan was made for.
        """
        if not isinstance(model, nn.Module):
            raise PlanError(
                f"a plan applies to a torch.nn.Module, not to a {type(model).__name__}",
                remedy="pass the model itself",
            )
        model = check_module(model)
        theirs = {n: list(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
        for name, shape in self.shapes.items():
            if name in theirs and theirs[name] != list(shape):
                different = f"{name} has shape {theirs[name]}, the plan expects {list(shape)}"
            elif name not in theirs:
                different = f"{name} does not exist in the model"
            else:
                continue
            raise PlanError(OTHER, where=different, remedy=ANEW)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears complete or not at all.

        Raises:
            DepcutError: It cannot be written.
        """
        files.write_json(path, self.to_dict(), "plan", indent=1)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data: what `save` writes."""
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "inputs": self.inputs,
            "sizes": dict(self.sizes),
            "shapes": {n: list(shape) for n, shape in self.shapes.items()},
            "kept": {name: kept.tolist() for name, kept in self.kept.items()},
            "dropped": list(self.dropped),
        }

    @classmethod
    def load(cls: type[DataT], path: str | os.PathLike[str]) -> DataT:
        """Read a plan.

        Raises:
            PlanError: The file is missing, or no plan.
        """
        file = check_path(path, "path", PlanError)
        try:
            data = files.read_json(file)
            if data["format"] != FORMAT:
                raise PlanError(
                    f"the plan has format {data['format']}, this depcut reads {FORMAT}",
                    where=str(path),
                    remedy="make it anew, or use the depcut that wrote it",
                )
            unknown = [name for name in data if name not in _ENTRIES]
            if unknown:
                raise ValueError(f"unknown entries: {listed(unknown)}")
            sizes = {n: _size(s, f"sizes of {n!r}") for n, s in data["sizes"].items()}
            kept = {n: units_of(n, sizes, k) for n, k in data["kept"].items()}
            shapes = {n: sizes_of(s, f"shapes of {n!r}") for n, s in data["shapes"].items()}
            check_described(data["inputs"])
            rest = (str(data["fingerprint"]), _settings(data["settings"]), data["inputs"])
            dropped = data.get("dropped", [])  # plans of before there were any have none
            if not isinstance(dropped, list) or not all(isinstance(n, str) for n in dropped):
                raise TypeError("dropped= is no list of names")
            return cls(kept, sizes, shapes, *rest, dropped=tuple(sorted(dropped)))
        except PlanError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"no plan can be read: {first_line(error)}",
                where=str(path),
                remedy="pass a file that plan.save wrote",
            ) from error

    @property
    def part(self) -> str:
        """Name of the module that was captured alone; empty where the model was as a whole."""
        return str(self.settings.get("part", ""))

    @property
    def digest(self) -> str:
        """A short hash of what is kept."""
        text = json.dumps({n: k.tolist() for n, k in sorted(self.kept.items())})
        text += json.dumps(self.dropped) if self.dropped else ""
        return hashlib.sha256((self.fingerprint + text).encode()).hexdigest()[:16]

    @property
    def without(self) -> list[str]:
        """What goes as a whole, in words: layers where whole ones do, else branches."""
        layers = [stack.line for stack in stacks_of(self.settings)]
        return layers or [f"without {name}" for name in self.dropped]

    @property
    def headline(self) -> str:
        """One line that says what it is."""
        made = "".join(f", {n} {self.settings[n]}" for n in ("ratio", "of") if n in self.settings)
        gone = f", {len(self.dropped)} branches dropped" if self.dropped else ""
        gone = "".join(f", {stack.line}" for stack in stacks_of(self.settings)) or gone
        return f"Plan {self.digest}: {len(self.kept)} of {len(self.sizes)} groups{made}{gone}"

    def __repr__(self) -> str:
        return f"<{self.headline}>"

    def __str__(self) -> str:
        rows = [
            f"{n}: {k.shape[-1]} of {self.sizes[n]}" + (f" in each of {len(k)} rows" * (k.ndim - 1))
            for n, k in self.kept.items()
        ]
        head = f"Plan {self.digest} ({len(rows)} of {len(self.sizes)} groups)"
        rows += self.without
        return "\n  ".join([head, *rows])


def _settings(saved: Any) -> dict[str, Any]:
    """How a plan was made, as a file says it."""
    if not isinstance(saved, dict) or not isinstance(saved.get("options", {}), dict):
        raise TypeError("the settings are no names with values")
    stacks_of(saved)
    return saved


def _size(value: Any, what: str) -> int:
    """A number of units, as a file says it."""
    (size,) = sizes_of([value], what)
    return size


def _check_counts(coupling: Coupling, units: Mapping[str, Indices]) -> None:
    """Refuse unequal counts where they are tied, and fewer units than the model needs."""
    counts = {
        g.name: units[g.name].shape[-1] if g.name in units else g.size for g in coupling.groups
    }
    check_ties(coupling, counts)
    for group in coupling.groups:
        if counts[group.name] < group.floor:
            raise PlanError(
                f"{counts[group.name]} units are kept, and the model needs {group.floor}",
                where=f"group {group.name!r}",
                remedy="keep more: its code squeezes a dimension of size 1 away",
            )
        if counts[group.name] % group.multiple:
            raise PlanError(
                f"{counts[group.name]} units are kept, no multiple of {group.multiple}",
                where=f"group {group.name!r}",
                remedy=f"keep a multiple of {group.multiple}: an operator takes no other widths",
            )


def make_plan(
    coupling: Coupling,
    model: nn.Module,
    kept: Mapping[str, Sequence[int] | Indices],
    settings: Mapping[str, Any],
    dropped: Iterable[str] = (),
) -> PlanData:
    """A plan from kept units by group name.

    Args:
        coupling: The analysed architecture.
        model: The model it was analysed from.
        kept: Kept indices of some groups, or one list for each row of a group's outer axis; the
            other groups keep everything.
        settings: How it was made.
        dropped: Names of residual branches, or of blocks of them, that go.

    Raises:
        PlanError: Unknown group or branch, indices out of range or repeated, none left, rows that
            are none of the group's, or groups (or rows) that must keep equally many do not.
    """
    sizes = {g.name: g.size for g in coupling.groups}
    if not isinstance(kept, Mapping):
        raise PlanError(
            f"the kept units are {shown(kept)}, no mapping",
            where="kept=",
            remedy='pass indices by group name, such as {"layer1": [0, 2, 3]}',
        )
    unknown = [n for n in kept if not isinstance(n, str) or n not in sizes]
    if unknown:
        raise PlanError(
            f"unknown groups: {listed([shown(n) for n in unknown])}",
            where="kept units",
            remedy=f"name groups of the analysis: {listed(list(sizes))}",
        )
    units = {n: units_of(n, sizes, k) for n, k in kept.items()}
    check_rows(coupling, units)
    _check_counts(coupling, units)
    units = {n: u for n, u in units.items() if u.shape[-1] < sizes[n]}
    first, *others = map(_call, coupling.program.examples)
    inputs = {**first, "others": others} if others else first
    results = [program.results for program in coupling.program.examples]
    if any(each.uncounted for each in results):
        inputs["outputs"] = list(names_of(results))
    shapes = {n: list(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    digest = fingerprint(coupling)
    names = check_names(
        dropped, "dropped", "pass names of residual branches: see analysis.branches"
    )
    removed = find_residuals(coupling).named(names) if names else ()
    branches = tuple(sorted(b.name for b in removed))
    made = {**settings, **({"part": part_of(model)} if part_of(model) else {})}
    return PlanData(units, sizes, shapes, digest, made, inputs, branches)


def _call(program: Program) -> dict[str, Any]:
    """An example call as plain data."""
    call = {"args": list(program.args), "kwargs": program.kwargs}
    return dict(pytree.tree_map(described, call))
