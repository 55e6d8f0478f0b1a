"""What a plan is: which units stay. Integers only, so it can be saved, diffed and replayed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from depcut.axes import Indices
from depcut.branches.branch import Residuals, bypass
from depcut.branches.find import residuals as find_residuals
from depcut.capture.program import Program
from depcut.coupling.groups import Coupling
from depcut.errors import PlanError, listed
from depcut.graph.liveness import Bypass
from depcut.plan.fingerprint import described, difference, fingerprint
from depcut.plan.keep import Keep
from depcut.plan.units import check_rows, check_ties, units_of
from depcut.support import files
from depcut.support.torch_private import pytree

FORMAT = 1

OTHER = "the plan was made for another architecture"
ANEW = "make a plan for this model with depcut.analyze(model, inputs).plan(...)"

DataT = TypeVar("DataT", bound="PlanData")


@dataclass(frozen=True, eq=False)
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
            several calls those of the first, and a list of the others under "others".
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
        check_rows(coupling, self.kept)
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
        data = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "inputs": self.inputs,
            "sizes": dict(self.sizes),
            "shapes": {n: list(shape) for n, shape in self.shapes.items()},
            "kept": {name: kept.tolist() for name, kept in self.kept.items()},
            "dropped": list(self.dropped),
        }
        files.write_json(path, data, "plan", indent=1)

    @classmethod
    def load(cls: type[DataT], path: str | os.PathLike[str]) -> DataT:
        """Read a plan.

        Raises:
            PlanError: The file is missing, or no plan.
        """
        try:
            data = json.loads(Path(path).read_text())
            if data["format"] != FORMAT:
                raise PlanError(
                    f"the plan has format {data['format']}, this depcut reads {FORMAT}",
                    where=str(path),
                    remedy="make it anew, or use the depcut that wrote it",
                )
            sizes = {str(n): int(s) for n, s in data["sizes"].items()}
            kept = {n: units_of(n, sizes, k) for n, k in data["kept"].items()}
            shapes = {str(n): [int(i) for i in s] for n, s in data["shapes"].items()}
            for call in (data["inputs"], *data["inputs"].get("others", [])):
                if not isinstance(call["args"], list) or not isinstance(call["kwargs"], dict):
                    raise TypeError("inputs= is no list and dict")
            rest = (str(data["fingerprint"]), dict(data["settings"]), data["inputs"])
            dropped = data.get("dropped", [])  # plans of before there were any have none
            if not isinstance(dropped, list) or not all(isinstance(n, str) for n in dropped):
                raise TypeError("dropped= is no list of names")
            return cls(kept, sizes, shapes, *rest, dropped=tuple(sorted(dropped)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                f"no plan can be read: {error}",
                where=str(path),
                remedy="pass a file that plan.save wrote",
            ) from error

    @property
    def digest(self) -> str:
        """A short hash of what is kept."""
        text = json.dumps({n: k.tolist() for n, k in sorted(self.kept.items())})
        text += json.dumps(self.dropped) if self.dropped else ""
        return hashlib.sha256((self.fingerprint + text).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        rows = [
            f"{n}: {k.shape[-1]} of {self.sizes[n]}" + (f" in each of {len(k)} rows" * (k.ndim - 1))
            for n, k in self.kept.items()
        ]
        head = f"Plan {self.digest} ({len(rows)} of {len(self.sizes)} groups)"
        rows += [f"without {name}" for name in self.dropped]
        return "\n  ".join([head, *rows])


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
    unknown = [n for n in kept if n not in sizes]
    if unknown:
        raise PlanError(
            f"unknown groups: {listed(unknown)}",
            where="kept units",
            remedy=f"name groups of the analysis: {listed(list(sizes))}",
        )
    units = {n: units_of(n, sizes, k) for n, k in kept.items()}
    check_rows(coupling, units)
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
    units = {n: u for n, u in units.items() if u.shape[-1] < sizes[n]}
    first, *others = map(_call, coupling.program.examples)
    inputs = {**first, "others": others} if others else first
    shapes = {n: list(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    digest = fingerprint(coupling)
    names = [dropped] if isinstance(dropped, str) else list(dropped)
    removed = find_residuals(coupling).named(names) if names else ()
    branches = tuple(sorted(b.name for b in removed))
    return PlanData(units, sizes, shapes, digest, dict(settings), inputs, branches)


def _call(program: Program) -> dict[str, Any]:
    """An example call as plain data."""
    call = {"args": list(program.args), "kwargs": program.kwargs}
    return dict(pytree.tree_map(described, call))
