"""Plan to smaller model: slice, set attributes, generate what the code cannot express."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import fx, nn

from depcut.capture.program import parent_of
from depcut.errors import VerificationError
from depcut.graph.liveness import rewritten
from depcut.plan.attributes import solve
from depcut.plan.keep import Keep
from depcut.rewrite.alike import generate_alike
from depcut.rewrite.dropout import attention_dropout
from depcut.rewrite.graph import CannotGenerateError
from depcut.rewrite.module import set_attributes
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
        inlined: Modules whose lines went into an enclosing generated one, with what forced it.
    """

    model: nn.Module
    keep: Keep
    dense: nn.Module
    generated: dict[str, str] = field(default_factory=dict)
    inlined: dict[str, str] = field(default_factory=dict)

    def replace(self, name: str, why: str) -> str:
        """Generate a module, or the closest enclosing one whose graph is closed.

        Returns:
            The name of the module that was generated.

        Raises:
            VerificationError: Not even the whole model could be generated.
        """
        while True:
            problem = "its generated code differs, too"
            if name not in self.generated:
                try:
                    module = generate_alike(
                        self.model, self.keep, name, self.inlined, self._dropouts
                    )
                    self._put(name, module)
                    self.generated[name] = why
                    return name
                except CannotGenerateError as error:
                    problem = str(error)
            if not name:
                break
            self.generated.pop(name, None)
            self.inlined[name] = problem
            name = parent_of(name)
        raise VerificationError(
            f"no module could be generated from the graph: {problem}",
            where="the whole model",
            remedy="keep the layers concerned with ignore=; please report the model",
        )

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
    set_attributes(slim.model, solution.values, owners)
    wanted = {**solution.modules, **rewritten(keep.coupling.program, keep.gone)}
    for name in sorted(wanted, key=lambda n: -n.count(".") - bool(n)):
        if name not in slim.generated and name not in slim.inlined:
            slim.replace(name, wanted[name])
    remove_dead(slim.model, keep, {*slim.generated, *slim.inlined})
    return slim
