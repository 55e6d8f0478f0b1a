"""After the rewrite: re-solve weights where there is data, fold constants where there is none."""

from __future__ import annotations

from torch import nn

from depcut.calibration.data import Calibration
from depcut.calibration.sites import find_sites
from depcut.errors import InputError
from depcut.ops.normalization import is_batch_norm
from depcut.plan.keep import Keep
from depcut.repair.compensate import Compensation, compensate
from depcut.repair.contractions import Contraction
from depcut.repair.folding import absorbed, fold_constants, foldable, may_fold
from depcut.repair.means import correct_means
from depcut.verify.repaired import verify_repaired


def repair(
    slim: nn.Module, model: nn.Module, keep: Keep, data: Calibration | None
) -> tuple[Compensation | None, tuple[str, ...]]:
    """Repair a narrowed model in place: re-solve weights on data, else fold what is known without.

    Args:
        slim: The narrowed model, verified.
        model: The dense model.
        keep: What stays.
        data: To re-solve weights on; None: only removed constant units, and the means of others
            that batch norms know, are folded into biases and running statistics.

    Returns:
        What was re-solved, if there is data, and what else is to be said.

    Raises:
        VerificationError: Something else changed, or the model computes something else.
    """
    if data is not None:
        done = compensate(slim, model, keep, data)
        verify_repaired(slim, keep, model, _re_solved(keep, done))
        return done, ()
    contractions: tuple[Contraction, ...] = ()
    changed: tuple[str, ...] = ()
    if may_fold(keep, model):
        contractions = foldable(keep, model)
        changed = fold_constants(keep, model, slim, contractions)
        if changed:
            spared = absorbed(contractions)
            verify_repaired(slim, keep, model, frozenset(changed), spared=spared)
    moved = correct_means(keep, model, slim, contractions)
    if not moved.tensors:
        return None, ()
    verify_repaired(slim, keep, model, frozenset((*changed, *moved.tensors)))
    return None, (moved.note,)


def _re_solved(keep: Keep, done: Compensation) -> frozenset[str]:
    """Names of the tensors that a compensation says it changed."""
    layers = {r.layer for r in done.repairs}
    sites = (s for s in find_sites(keep.coupling) if s.name in layers)
    names = {name for site in sites for name in (*site.weights, *site.biases)}
    program = keep.coupling.program
    for node in filter(is_batch_norm, program.graph.graph.nodes):
        statistics = (program.tensors.get(n) for n in node.args[3:5])
        names |= {name for name in statistics if name is not None}
    return frozenset(names)


def wants_repair(compensate: bool | str, has_data: bool) -> bool:
    """Whether to compensate.

    Args:
        compensate: What the user asked for: True, False or "auto".
        has_data: Whether there is calibration data.

    Raises:
        InputError: It is something else, or True without data.
    """
    if compensate not in (True, False, "auto"):
        raise InputError(
            f"compensate is {compensate!r}",
            where="compensate=",
            remedy='use "auto" (if there is data), True or False',
        )
    if compensate is True and not has_data:
        raise InputError(
            "compensation needs data: it re-solves weights for the dense layers' outputs",
            where="compensate=True",
            remedy="pass data=, an iterable of what the model takes; without it, removed units "
            'that are constant are folded into biases, which "auto" does',
        )
    return bool(compensate) and has_data
