"""Which modules of a smaller model turn right inputs into wrong outputs, all in one run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from depcut.capture.clone import clone
from depcut.capture.program import ModuleCall
from depcut.reference.run import Reference
from depcut.rewrite.build import Slim
from depcut.support.closeness import relative_error
from depcut.support.failures import reraise_fatal
from depcut.support.torch_private import pytree
from depcut.verify.module_results import Trial, module_results_of_clone
from depcut.verify.replay import Recording, Replay, is_drawing

# The model's own code may raise anything at new widths; see also `reraise_fatal`.
RUNTIME_ERRORS = (Exception,)


def culprits(slim: Slim, model: nn.Module, limit: float, trial: Trial) -> list[str]:
    """Modules that raise or compute wrong outputs from right inputs, the innermost ones first.

    What such a module should have returned goes on in its place, so that those after it are judged
    in the same run.

    Args:
        slim: The smaller model.
        model: The dense model.
        limit: Relative difference that counts as none.
        trial: On which inputs.

    Returns:
        At least one name; "" for the whole model.
    """
    keep, program = slim.keep, slim.keep.coupling.program
    calls = {c.module: c for c in program.calls}
    watch = {
        leaf
        for c in calls.values()
        for leaf in (*c.out_leaves, *c.leaves)
        if isinstance(leaf, fx.Node)
    }
    recording = Recording()
    draws = is_drawing(program)
    with torch.no_grad():
        _, values = Reference(keep, model, sliced=True).run(
            pytree.tree_leaves(trial.inputs(keep)),
            trial.dtype,
            watch,
            around=recording.of if draws else None,
        )
    run = _Run(values, limit, frozenset(slim.generated))
    watched = clone(slim.model, buffers=True)
    for name, module in watched.named_modules():
        if name in calls:
            run.watch(name, module, calls[name])
    try:
        replay = Replay(keep, recording, sliced=True) if draws else None
        module_results_of_clone(watched, keep, trial, replay)
    except Exception as error:  # noqa: BLE001  the innermost call still open has raised
        reraise_fatal(error)
        raised = next((n for n in reversed(run.running) if n not in slim.generated), "")
        return run.wrong or [raised]
    return run.wrong or [""]


@dataclass
class _Run:
    """One run of the smaller model, whose modules are compared with the reference.

    Attributes:
        values: What each node should be.
        limit: Relative difference that counts as none.
        generated: Modules that were generated; what raises in one is not its own code.
        wrong: Names of modules that are wrong, as they were found.
        running: Names of the calls that have not returned.
        good: Whether their inputs are right.
        lost: Whether a module raised on inputs that were wrong already.
    """

    values: dict[fx.Node, Any]
    limit: float
    generated: frozenset[str]
    wrong: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    good: list[bool] = field(default_factory=list)
    lost: bool = False

    def watch(self, name: str, module: nn.Module, call: ModuleCall) -> None:
        """Watch one module of a clone."""

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(name)
            self.good.append(self._matches(call.leaves, (args, kwargs)))

        def after(_module: nn.Module, _args: Any, result: Any) -> Any:
            self.running.pop()
            if not self.good.pop() or self._matches(call.out_leaves, result):
                return None
            self.wrong.append(name)
            return self._right(call)

        plain = module.forward

        def guarded(*args: Any, **kwargs: Any) -> Any:
            deep = len(self.running)
            try:
                return plain(*args, **kwargs)
            except RUNTIME_ERRORS as error:
                reraise_fatal(error)
                right = self._right(call) if deep and self.good[deep - 1] else None
                self.lost = self.lost or (name not in self.generated and right is None)
                if self.lost or right is None or name in self.generated:
                    raise
                del self.running[deep:], self.good[deep:]
                self.wrong.append(name)
                return right

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
        vars(module)["forward"] = guarded

    def _matches(self, leaves: Any, tree: Any) -> bool:
        pairs = zip(leaves, pytree.tree_leaves(tree), strict=False)
        known = [
            (self.values[n], v) for n, v in pairs if isinstance(n, fx.Node) and n in self.values
        ]
        size, message = relative_error([k for k, _ in known], [v for _, v in known])
        return not message and size <= self.limit

    def _right(self, call: ModuleCall) -> Any:
        """What a call should have returned; None where the graph does not know."""
        known = [self.values.get(n) if isinstance(n, fx.Node) else n for n in call.out_leaves]
        if not any(isinstance(n, fx.Node) for n in call.out_leaves) or any(
            value is None and isinstance(leaf, fx.Node)
            for leaf, value in zip(call.out_leaves, known, strict=True)
        ):
            return None
        copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in known]
        return pytree.tree_unflatten(copies, call.out_spec)
