"""Constants at other sizes: what a sum over positions makes of a constant grows with the image.

The graph holds the sizes of the example as numbers, so what it computes of them looks constant. The
model is captured once more with longer inputs, if it takes any, and what comes out as another
number there is not taken to be a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from depcut.capture.capture import capture, is_symbolic
from depcut.capture.dry_run import result_shapes
from depcut.capture.program import Program
from depcut.coupling.groups import Coupling
from depcut.coupling.infer import infer_coupling
from depcut.errors import CaptureError, InputError
from depcut.graph.operators import base_name, is_item, is_operator, is_size
from depcut.repair.contractions import Contraction, find_contractions
from depcut.support.torch_private import pytree

# Of values that are the same at every position, these make values that are, too, and that do not
# tell how many positions there are. What a convolution pads is tainted at the borders.
_UNIFORM = frozenset(
    """conv1d conv2d conv3d linear addmm batch_norm layer_norm group_norm instance_norm rms_norm
    relu relu6 hardtanh gelu silu sigmoid tanh hardswish hardsigmoid leaky_relu elu softplus
    mish prelu mean amax amin adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d
    max_pool2d max_pool3d view reshape flatten unflatten permute transpose t squeeze unsqueeze
    contiguous clone dropout feature_dropout add mul sub split chunk unbind
    scaled_dot_product_attention""".split()
)
_TWO_TENSORS = frozenset(("add", "mul", "sub"))

Place = tuple[int, int]  # (number of a flat input, dimension)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_CHANGES = "that changes with the size of the inputs"


def lasting(
    program: Program,
    model: nn.Module,
    contractions: Sequence[Contraction],
    find: Callable[[Coupling], tuple[Contraction, ...]] | None = None,
) -> tuple[Contraction, ...]:
    """Contractions without the zeros and constants that inputs of other sizes change.

    Args:
        program: The captured model.
        model: The model whose tensors count; it is captured anew.
        contractions: What reads its groups, at the sizes of the example.
        find: What reads the groups of the model as captured at other sizes, where its tensors are
            not in it.
    """
    out = tuple(contractions)
    if find is None:
        find = partial(find_contractions, model=model)
    if _is_uniform(program):
        return out
    for args, kwargs in _examples(program, model):
        try:
            other = infer_coupling(capture(model, kwargs or args, program.results.names))
        except (CaptureError, InputError):
            out = tuple(_unknown(c) for c in out)
            continue
        out = _merged(out, find(other))
    return out


def _is_uniform(program: Program) -> bool:
    """Whether nothing in a graph can tell how large the inputs are: no other size need be tried."""
    for node in program.graph.graph.nodes:
        if node.op != "call_function" or is_item(node) or is_size(node):
            continue
        name = base_name(node)
        numbers = name in _TWO_TENSORS and (node.kwargs or not all(map(_is_tensor, node.args)))
        if name not in _UNIFORM or not is_operator(node) or numbers:
            return False
    return True


def _is_tensor(argument: object) -> bool:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def _merged(
    here: tuple[Contraction, ...], there: tuple[Contraction, ...]
) -> tuple[Contraction, ...]:
    """Contractions of one size with what those of another one contradict taken away."""
    if len(here) != len(there):
        return tuple(map(_unknown, here))
    return tuple(_common(a, b) for a, b in zip(here, there, strict=True))


def _common(here: Contraction, there: Contraction) -> Contraction:
    """What a contraction holds at both sizes."""
    same = (here.node.target, here.layer, here.places, here.form.labels) == (
        there.node.target,
        there.layer,
        there.places,
        there.form.labels,
    )
    if not same or [t.shape for t in here.live] != [t.shape for t in there.live]:
        return _unknown(here)
    live = tuple(torch.maximum(a, b) for a, b in zip(here.live, there.live, strict=True))
    out = replace(here, live=live, wild=here.wild or there.wild)
    if here.fixed is None or here.numbers is None:
        return out
    if there.fixed is None or there.numbers is None or here.fixed.shape != there.fixed.shape:
        return replace(out, absorber=None, why=_CHANGES)
    assert here.weight is not None
    rtol = torch.finfo(here.weight.dtype).eps ** 0.5  # means over other counts round otherwise
    kept = there.fixed & torch.isclose(here.numbers, there.numbers, rtol=rtol, atol=0)
    if bool((here.fixed & ~kept).any()):
        return replace(out, absorber=None, why=_CHANGES)
    return out


def _unknown(contraction: Contraction) -> Contraction:
    """A contraction of which nothing is known to be zero or constant."""
    live = tuple(map(torch.ones_like, contraction.live))
    return replace(contraction, live=live, fixed=None, numbers=None, absorber=None)


def _examples(program: Program, model: nn.Module) -> Iterator[Arguments]:
    """Inputs of other sizes that the model takes, so that every size that may change does.

    Each size is tried alone, then together with those that equal it (the sides of a square image,
    the lengths of ids and mask). All that can change is changed at once by factors of their own,
    where the model takes that, else one after the other.
    """
    leaves, spec = pytree.tree_flatten((program.args, program.kwargs))
    batch = _batch(program, leaves)

    def taken(factors: dict[Place, float]) -> Arguments | None:
        given: Arguments = pytree.tree_unflatten(_resized(leaves, {**batch, **factors}), spec)
        return given if result_shapes(model, *given) is not None else None

    def changed(places: tuple[Place, ...]) -> Arguments | None:
        return taken(dict.fromkeys(places, 2.0)) or taken(dict.fromkeys(places, 0.5))

    found: dict[tuple[Place, ...], Arguments] = {}
    left: dict[int, tuple[Place, ...]] = {}
    for place, size in _free_places(leaves, batch):
        if (given := changed((place,))) is not None:
            found[(place,)] = given
        else:
            left[size] = (*left.get(size, ()), place)
    for places in left.values():
        if len(places) > 1 and (given := changed(places)) is not None:
            found[places] = given
    whole = {place: float(n) for n, places in enumerate(found, 2) for place in places}
    together = taken(whole) if len(found) > 1 or (batch and not found) else None
    yield from found.values() if together is None else (together,)


def _batch(program: Program, leaves: list[Any]) -> dict[Place, float]:
    """The batch dimensions that the program takes in any size, doubled."""
    nodes = program.inputs
    if len(nodes) != len(leaves):
        return {}
    return {(i, 0): 2.0 for i, n in enumerate(nodes) if is_symbolic(n.meta.get("val"))}


def _free_places(leaves: list[Any], batch: dict[Place, float]) -> list[tuple[Place, int]]:
    """Dimensions that are no batch, with their sizes."""
    return [
        ((i, dim), size)
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor)
        for dim, size in enumerate(leaf.shape)
        if (i, dim) not in batch
    ]


def _resized(leaves: list[Any], factors: dict[Place, float]) -> list[Any]:
    """Flat inputs with some dimensions repeated, or cut short."""
    out = list(leaves)
    for (i, dim), factor in factors.items():
        size = max(int(leaves[i].shape[dim] * factor), 1)
        out[i] = torch.cat([out[i]] * math.ceil(factor), dim).narrow(dim, 0, size)
    return out
