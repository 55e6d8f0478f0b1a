"""Plan to smaller model: slice, set attributes, generate what the code cannot express."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx, nn

from depcut.capture.modes import modes
from depcut.capture.program import module_of, parent_of
from depcut.errors import VerificationError
from depcut.graph.liveness import enclosing, rewritten
from depcut.plan.attributes import solve
from depcut.plan.keep import Keep
from depcut.rewrite.alike import generate_alike
from depcut.rewrite.attention_heads import in_attention, narrow_attention
from depcut.rewrite.dropout import attention_dropout
from depcut.rewrite.functions import NoSourceError
from depcut.rewrite.graph import CannotGenerateError
from depcut.rewrite.module import set_attributes
from depcut.rewrite.not_run import Branches, changed_sizes, guard_patch
from depcut.rewrite.observe import observe
from depcut.rewrite.patches import apply_patch, difference, unpatch
from depcut.rewrite.patching import patches
from depcut.rewrite.removal import remove_dead
from depcut.rewrite.tensors import narrowed_copy
from depcut.support.torch_private import children_of


@dataclass
class Slim:
    """A smaller model while it is rewritten and verified.

    Attributes:
        model: The module.
        keep: What stays of the dense one.
        dense: The dense model.
        generated: Modules that were generated, with the reason.
        patched: Modules whose class was patched, with what changed.
        fitted: Modules with a class of depcut's that computes the new sizes.
        guarded: Modules of which only branches that did not run are dealt with, with what changed.
        unpatchable: Modules whose class could not be patched, with the reason.
        inlined: Modules whose lines went into an enclosing generated one, with what forced it.
    """

    model: nn.Module
    keep: Keep
    dense: nn.Module
    generated: dict[str, str] = field(default_factory=dict)
    patched: dict[str, str] = field(default_factory=dict)
    inlined: dict[str, str] = field(default_factory=dict)
    fitted: dict[str, str] = field(default_factory=dict)
    guarded: dict[str, str] = field(default_factory=dict)
    unpatchable: dict[str, str] = field(default_factory=dict)

    def replace(self, name: str, why: str) -> str:
        """Patch a module's class, or generate it or the closest enclosing one that is closed.

        Returns:
            The name of the module that was patched or generated.

        Raises:
            VerificationError: Not even the whole model could be generated.
        """
        if name not in self.patched and name not in self.generated and not self.patch({name: why}):
            return name
        while True:
            problem = "its generated code differs, too"
            if name not in self.generated:
                try:
                    module = generate_alike(
                        self.model, self.keep, name, self.inlined, self._dropouts
                    )
                    self._put(name, module)
                    self.generated[name] = why
                    self.patched.pop(name, None)
                    return name
                except CannotGenerateError as error:
                    problem = str(error)
            if not name:
                break
            self.generated.pop(name, None)
            self.patched.pop(name, None)
            self.inlined[name] = problem
            name = parent_of(name)
        raise VerificationError(
            f"no module could be generated from the graph: {problem}",
            where="the whole model",
            remedy="keep the layers concerned with ignore=; please report the model",
        )

    def patch(self, stuck: Mapping[str, str]) -> dict[str, str]:
        """Patch the classes whose code gets numbers wrong.

        Args:
            stuck: Modules of which that is known, with the reason.

        Returns:
            Those of them that could not be patched, with the reason.
        """
        if {*stuck} <= {*self.unpatchable}:
            return dict(stuck)
        for name in self.guarded:
            unpatch(self.model.get_submodule(name))
        others = {*self.generated, *self.inlined, *self.fitted}
        wrong = observe(self.model, self.keep, others)
        found, failed = patches(self.model, self.keep, wrong, self.branches)
        for name, patch in found.items():
            module = self.model.get_submodule(name)
            kind = type(module)
            try:
                apply_patch(module, patch)
            except (NoSourceError, TypeError) as error:
                failed[name] = str(error)
                continue
            self.patched[name] = difference(kind, patch)
        self.guard()
        left = {name: why for name, why in stuck.items() if name not in self.patched}
        self.unpatchable.update(left)
        return {
            name: "; ".join(filter(None, (why, failed.get(name)))) for name, why in left.items()
        }

    @cached_property
    def _changed(self) -> dict[str, set[int]]:
        return changed_sizes(self.keep)

    def branches(self, name: str) -> Branches:
        """What deals with the branches of a module that the example calls do not run."""
        dense, slim = self.dense.get_submodule(name), self.model.get_submodule(name)
        return Branches(self.keep, name, dense, slim, self._changed.get(name, ()))

    def guard(self) -> None:
        """Deal with the branches that did not run where nothing else is patched."""
        self.guarded.clear()
        others = {*self.generated, *self.inlined, *self.fitted, *self.patched}
        for name, sizes in self._changed.items():
            if not sizes or {name, *enclosing(name)} & {*self.generated, *self.inlined}:
                continue
            if name in others or not _has(self.model, name):
                continue
            module = self.model.get_submodule(name)
            kind = type(module)
            if kind.__module__.startswith("torch."):
                continue
            patch = guard_patch(kind, self.branches(name))
            with contextlib.suppress(NoSourceError, TypeError):  # its branches are left alone
                if patch:
                    apply_patch(module, patch)
                    self.guarded[name] = difference(kind, patch)

    @cached_property
    def _dropouts(self) -> dict[fx.Node, float]:
        programs = self.keep.coupling.program.examples
        return {n: p for each in programs for n, p in attention_dropout(self.dense, each).items()}

    def _put(self, name: str, module: nn.Module) -> None:
        if not name:
            self.model = module
            return
        parent = self.model.get_submodule(parent_of(name))
        children_of(parent)[name.rpartition(".")[2]] = module


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def rewrite(model: nn.Module, keep: Keep) -> Slim:
    """The smaller model, not verified yet.

    Args:
        model: The dense model; it is not changed.
        keep: What stays.
    """
    solution = solve(keep, model)
    slim = Slim(narrowed_copy(model, keep), keep, model)
    owners = {name.rpartition(".")[0] for name in keep.tensors}
    owners |= {name.partition(".parametrizations.")[0] for name in keep.tensors}
    with modes(slim.model):  # a parametrization may change its buffers when it is read in training
        set_attributes(slim.model, solution.values, owners)
    slim.fitted = narrow_attention(slim.model, model, keep)
    slim.patched |= {name: change for name, change in slim.fitted.items() if change}
    stuck_nodes = {
        node: why
        for node, why in solution.stuck.items()
        if not (in_attention(node) and module_of(node) in slim.fitted)
    }
    solution = replace(solution, stuck=stuck_nodes)
    dropped = rewritten(keep.coupling.program, keep.gone)
    stuck = {name: why for name, why in solution.modules.items() if name not in dropped}
    slim.unpatchable.update(dropped)
    wanted = {**(slim.patch(stuck) if stuck else {}), **dropped}
    for name in sorted(wanted, key=lambda n: -n.count(".") - bool(n)):
        if name not in slim.generated and name not in slim.inlined:
            slim.replace(name, wanted[name])
    if not slim.guarded:
        slim.guard()
    remove_dead(slim.model, keep, {*slim.generated, *slim.inlined})
    return slim
