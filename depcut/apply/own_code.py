"""Plans that the model's own code can carry out, without a module generated from the graph."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch import nn

from depcut import axes
from depcut.capture.program import stack_entries
from depcut.coupling.groups import Coupling
from depcut.errors import PlanError, listed
from depcut.plan import cost
from depcut.plan.data import PlanData
from depcut.plan.keep import Keep
from depcut.rewrite.build import rewrite
from depcut.verify.calls import verify_calls

KEPT_WHOLE = "kept_whole"


def with_own_code(
    choose: Callable[[frozenset[int]], PlanData], coupling: Coupling, model: nn.Module
) -> PlanData:
    """The best plan that needs no generated module.

    A plan is carried out and verified; the groups whose new widths made a module generated are
    kept whole, and the next plan is chosen, until none is.

    Args:
        choose: Makes the plan, given numbers of groups that stay whole.
        coupling: The analysed architecture.
        model: The model.

    Returns:
        The plan; its settings list the groups that were kept whole for this under "kept_whole",
        with the share of the MACs that their widths decide.

    Raises:
        PlanError: A module is generated and no group is to blame.
        BudgetError: What is left does not meet the budget.
    """
    whole: frozenset[int] = frozenset()
    while True:
        plan = choose(whole)
        keep = plan.keep(coupling)
        slim = rewrite(model, keep)
        verify_calls(slim, model)
        if not slim.generated:
            return _noted(plan, coupling, whole)
        more = _involved(keep, slim.generated) - whole
        if not more:
            raise PlanError(
                f"{listed([n or 'the whole model' for n in slim.generated])} would be generated "
                "from the graph whatever is kept whole",
                where='generated="never"',
                remedy="leave the layers concerned out with ignore=",
            )
        whole |= more


def _involved(keep: Keep, generated: Collection[str]) -> frozenset[int]:
    """The narrowed groups that sizes in the code of these modules depend on, and their ties."""
    coupling = keep.coupling
    found: set[int] = set()
    for node, effects in coupling.effects.items():
        inside = "" in generated or any(
            e.partition("@")[0] in generated for e in stack_entries(node)
        )
        if inside:
            terms = [literal.term for literal in effects.literals]
            terms += [coupling.env[n][d] for n, d in effects.contracts if effects.pins]  # type: ignore
            found |= _groups(terms, keep)
    if not found:
        tensors = {
            name
            for name in coupling.dims
            if "" in generated or any(name.startswith(f"{m}.") for m in generated)
        }
        found = {
            i for i in keep.units if any(m.tensor in tensors for m in coupling.groups[i].members)
        }
    ties = {coupling.groups[i].tied for i in found} - {None}
    return frozenset(found | {g.index for g in coupling.groups if g.tied in ties})


def _groups(terms: list[Any], keep: Keep) -> set[int]:
    index = keep.coupling.group_of
    leaves = (leaf for term in terms for leaf in axes.leaves(axes.resolve(term)) if leaf in index)
    return {index[leaf].index for leaf in leaves} & set(keep.units)


def _noted(plan: PlanData, coupling: Coupling, whole: frozenset[int]) -> PlanData:
    if not whole:
        return plan
    dense = Keep(coupling, {})
    counts = dense.counts.copy()
    for i in whole:
        counts[i] = min(1, counts[i])
    macs = cost.macs(coupling)
    share = 1 - float(macs(counts)) / float(macs(dense.counts))
    names = sorted(coupling.groups[i].name for i in whole)
    kept = {"groups": names, "share_of_macs": round(share, 4)}
    return replace(plan, settings={**plan.settings, KEPT_WHOLE: kept})
