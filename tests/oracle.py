"""Brute force: what a narrower model must be, found without any of depcut's own reasoning.

`check` cuts a model at random and demands everything that a user may rely on: the same class, the
same keys, the kept slices and nothing else, outputs equal to those of the dense model with the
removed indices zeroed where they are read, gradients, train mode, other batch sizes, and a caller's
model that nobody touched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import depcut

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
# Magnitudes of weight norm, which change so that the weights computed from them do not.
RESCALED = ("weight.original0", "weight_g")

MakeInputs = Callable[[int], Inputs]
Keep = dict[str, list[int]]


def check(
    model: nn.Module,
    make_inputs: MakeInputs,
    *,
    seeds: Iterable[int] = (0,),
    alone: bool = False,
    held: Collection[int] = (),
    independent: bool = True,
    same_class: bool = True,
    tolerance: float = 1e-5,
) -> Any:
    """Cut `model` at random and compare it with the dense one in every way.

    Args:
        model: the model to cut; it must come out of this untouched.
        make_inputs: makes the inputs for a batch size.
        seeds: one random plan each.
        alone: also cut every group on its own, the rest left whole.
        held: sizes of groups that the independent comparison leaves whole.
        independent: compare with zeroed consumers as well.
        same_class: demand the caller's own class.
        tolerance: largest error of an output, relative to the largest output.

    Returns:
        The analysis.
    """
    before = snapshot(model)
    analysis = depcut.analyze(model, make_inputs(2))
    check_groups(analysis, model)
    keeps = [random_keep(analysis, np.random.default_rng(seed)) for seed in seeds]
    if alone:
        keeps += one_at_a_time(analysis, np.random.default_rng(0))
    for number, keep in enumerate(keeps):
        slim, plan = cut(analysis, model, make_inputs(2), keep, tolerance)
        assert type(slim) is type(model) or not same_class
        check_tensors(slim, model, plan)
        if number == 0:
            check_use(slim, model, make_inputs)
    if independent:
        check_independently(analysis, model, make_inputs, held, tolerance)
    assert_untouched(model, before)
    return analysis


# Choosing what to keep ----------------------------------------------------------------------------


def random_keep(analysis: Any, rng: np.random.Generator) -> Keep:
    """A random non-empty strict subset of every group that has two units or more.

    Groups that are tied keep equally many units each.
    """
    return {
        group.name: some_units(group.size, count, rng)
        for family in families(analysis)
        for count in [random_count(family, rng)]
        for group in family
        if count
    }


def by_row(analysis: Any, rng: np.random.Generator) -> dict[str, Any]:
    """A random plan; wherever there is an outer axis, other units in every row."""
    keep: dict[str, Any] = {}
    for family in families(analysis):
        count = random_count(family, rng)
        for group in family if count else []:
            if group.row_axis is not None:
                keep[group.name] = [some_units(group.size, count, rng) for _ in range(group.rows)]
            else:
                keep[group.name] = some_units(group.size, count, rng)
    return keep


def one_at_a_time(analysis: Any, rng: np.random.Generator) -> list[Keep]:
    """One choice a family of tied groups, all other groups left whole."""
    return [
        {group.name: some_units(group.size, count, rng) for group in family}
        for family in families(analysis)
        if (count := random_count(family, rng))
    ]


def families(analysis: Any) -> list[list[Any]]:
    """Groups that must keep equal counts together, every other group by itself."""
    tied: dict[object, list[Any]] = defaultdict(list)
    for group in analysis.groups:
        tied[group.name if group.tied is None else ("tied", group.tied)].append(group)
    return list(tied.values())


def random_count(family: list[Any], rng: np.random.Generator) -> int:
    """How many units each member of the family keeps; 0 where nothing can go."""
    smallest = min(group.size for group in family)
    floor = max(group.floor for group in family)
    return int(rng.integers(floor, smallest)) if smallest > floor else 0


def some_units(size: int, count: int, rng: np.random.Generator) -> list[int]:
    return sorted(rng.choice(size, count, replace=False).tolist())


# The comparisons ----------------------------------------------------------------------------------


def check_groups(analysis: Any, model: nn.Module) -> None:
    """Names are unique, members exist, and a tie never joins groups of unequal size."""
    names = [group.name for group in analysis.groups]
    assert len(names) == len(set(names))
    tensors = all_tensors(model)
    for group in analysis.groups:
        assert group.members
        for member in group.members:
            assert member.role in ("producer", "consumer")
            assert 0 <= member.dim < tensors[member.tensor].dim()
    for family in families(analysis):
        assert len({group.size for group in family}) == 1


def cut(
    analysis: Any, model: nn.Module, inputs: Inputs, keep: Keep, tolerance: float
) -> tuple[nn.Module, Any]:
    """Apply a plan and compare with the masked dense model."""
    plan = analysis.plan_keeping(keep)
    slim = plan.apply(model)
    reference = depcut.verify.verify.masked_outputs(plan.keep(analysis.coupling), model, inputs)
    assert_close(outputs(slim, inputs), list(reference), tolerance, keep)
    return slim, plan


def check_tensors(slim: nn.Module, model: nn.Module, plan: Any) -> None:
    """Every tensor is the kept slice of the dense one, with its old name and flags."""
    assert list(slim.state_dict()) == list(model.state_dict())
    indices, narrow = plan.tensor_indices(), all_tensors(slim)
    assert set(dict(model.named_parameters())) <= set(indices)
    for name, tensor in all_tensors(model).items():
        assert narrow[name].dtype == tensor.dtype
        assert narrow[name].requires_grad == tensor.requires_grad
        assert narrow[name].data_ptr() != tensor.data_ptr() or not tensor.numel()
        if name in indices and not name.endswith(RESCALED):
            torch.testing.assert_close(
                narrow[name].detach(), sliced(tensor, indices[name]), rtol=0, atol=0
            )
    assert ties(slim) == ties(model)


def check_use(slim: nn.Module, model: nn.Module, make_inputs: MakeInputs) -> None:
    """Shapes, other batch sizes, gradients, train mode, and a second copy of the weights."""
    assert slim.training == model.training
    for batch in (2, 3):
        made, expected = outputs(slim, make_inputs(batch)), outputs(model, make_inputs(batch))
        assert [t.shape for t in made] == [t.shape for t in expected]
        assert [t.dtype for t in made] == [t.dtype for t in expected]
    expected_gradients = gradients(deepcopy(model), make_inputs(2))
    made_gradients = gradients(deepcopy(slim), make_inputs(2))
    assert set(made_gradients) == set(expected_gradients)
    assert all(g.isfinite().all() for g in made_gradients.values())
    trained = deepcopy(slim).train()
    assert all(t.isfinite().all() for t in outputs(trained, make_inputs(2)))
    assert all(module.training for module in trained.modules())
    copy = deepcopy(slim)
    copy.load_state_dict(slim.state_dict())
    assert_close(outputs(copy, make_inputs(2)), outputs(slim, make_inputs(2)), 1e-6, {})


def check_independently(
    analysis: Any,
    model: nn.Module,
    make_inputs: MakeInputs,
    held: Collection[int],
    tolerance: float,
) -> None:
    """Zero the removed indices wherever they are read, run the dense model, and compare.

    Groups that no parameter reads, and those whose size is in `held`, stay whole.
    """
    whole = {
        group.name
        for family in families(analysis)
        if any(g.size in held or not reads(g) for g in family)
        for group in family
    }
    keep = random_keep(analysis, np.random.default_rng(1))
    keep = {name: units for name, units in keep.items() if name not in whole}
    plan = analysis.plan_keeping(keep)
    slim, masked = plan.apply(model), deepcopy(model)
    indices, tensors = plan.tensor_indices(), all_tensors(masked)
    for tensor, dim in {(m.tensor, m.dim) for g in analysis.groups for m in reads(g)}:
        kept = indices[tensor][dim]
        if kept is not None:
            zero_all_but(tensors[tensor], dim, kept)
    for batch in (2, 3):
        made, expected = outputs(slim, make_inputs(batch)), outputs(masked, make_inputs(batch))
        assert_close(made, expected, tolerance, keep)


def reads(group: Any) -> list[Any]:
    return [member for member in group.members if member.role == "consumer"]


@torch.no_grad()
def zero_all_but(tensor: Tensor, dim: int, kept: np.ndarray) -> None:
    gone = np.setdiff1d(np.arange(tensor.shape[dim]), kept)
    tensor.index_fill_(dim, torch.as_tensor(gone, dtype=torch.long), 0)


def sliced(tensor: Tensor, kept: Iterable[np.ndarray | None]) -> Tensor:
    tensor = tensor.detach()
    for dim, indices in enumerate(kept):
        if indices is not None:
            tensor = tensor.index_select(dim, torch.as_tensor(np.asarray(indices)))
    return tensor


def assert_close(
    made: list[Tensor], expected: list[Tensor], tolerance: float, context: object
) -> None:
    """Equal shapes, and equal values relative to the largest expected one."""
    assert len(made) == len(expected)
    for a, b in zip(made, expected, strict=True):
        assert a.shape == b.shape
        scale = float(b.detach().abs().max()) if b.is_floating_point() and b.numel() else 0.0
        torch.testing.assert_close(
            a.detach(),
            b.detach(),
            rtol=0,
            atol=tolerance * max(scale, 1e-2),
            msg=lambda text: f"{text}\nkept: {context}",
        )


# Models -------------------------------------------------------------------------------------------


def call(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor)]


def gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of the mean square of all outputs, of the parameters that get one."""
    model.zero_grad()
    leaves = [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor)]
    sum(leaf.square().mean() for leaf in leaves if leaf.requires_grad).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def read_tensors(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Parameters and buffers that a call in the present mode reads, a tied one once."""
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    keywords = inputs if isinstance(inputs, dict) else {}
    with torch.no_grad():
        program = torch.export.export(model, args, keywords, strict=False)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    read = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
    found = [
        program.state_dict.get(names[n], program.constants.get(names[n])) for n in read & {*names}
    ]
    return list({id(t): t for t in found if t is not None}.values())


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Sets of names that are one and the same tensor."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, tensor in all_tensors(model).items():
        names[id(tensor)].add(name)
    return {frozenset(shared) for shared in names.values() if len(shared) > 1}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a caller could see change: values, identities, flags, attributes, hooks."""
    state: dict[str, Any] = {}
    for name, tensor in all_tensors(model).items():
        state[f"tensor {name}"] = (id(tensor), tensor.requires_grad, tensor.detach().clone())
        state[f"grad {name}"] = None if tensor.grad is None else tensor.grad.clone()
    for path, module in model.named_modules():
        state[f"class {path}"] = type(module)
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                state[f"attribute {path}.{key}"] = (type(value), repr(value))
    return state


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is bit for bit what `snapshot` saw, attribute types included."""
    after = snapshot(model)
    assert list(after) == list(before)
    for what, value in before.items():
        assert same(value, after[what]), f"{what}: was {value}, is {after[what]}"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
