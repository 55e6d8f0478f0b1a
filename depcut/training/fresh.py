"""The scratch control: the small architecture with new weights, trained as long as the large one.

Source: Liu et al., Rethinking the Value of Network Pruning, ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import nn
from torch.nn.utils import parametrize

from depcut.apply.plan import Plan
from depcut.capture.held import attribute
from depcut.capture.inputs import Inputs
from depcut.capture.plain import refuse_spread
from depcut.errors import InputError, PlanError, listed
from depcut.plan import cost
from depcut.plan.stacks import Stack, name_then, stacks_of
from depcut.rewrite.generated import GeneratedModule
from depcut.support.checks import LARGEST, check_integer, check_kind
from depcut.support.failures import first_line, reraise_fatal, shown
from depcut.support.torch_private import RESET_METHODS
from depcut.support.unwrap import unwrapped

Init = Callable[[nn.Module], object]

_LONGEST = 2.0


def fresh(
    model: nn.Module,
    plan: Plan,
    *,
    inputs: Inputs = None,
    init: Init | str | None = None,
    seed: int = 0,
) -> nn.Module:
    """The small architecture with new weights: the control of every pruning result.

    Every module draws its own (`reset_parameters`, innermost first), which resets running
    statistics too; a generated module draws as the class that it stands for. Before that, all
    weights are NaN, so that none can stay what it was. Trainable parameters that no module draws
    (raw ones: position embeddings, scales) are an error unless `init` says what to do. Buffers and
    parameters that do not train and that nothing draws are constants: they stay as the plan cuts
    them.

    Args:
        plan: Which units stay.
        model: The model it was made for, or another instance; it is not changed.
        inputs: Example inputs; left out, those of the plan.
        init: A function that is called with every module after it has drawn its own, innermost
            first, as with `nn.Module.apply`; or "moments": what nothing draws is drawn from a
            normal distribution with its present mean and standard deviation, two numbers that the
            control then does take over. What the function raises is not caught.
        seed: Of the weights. The caller's random state stays.

    Returns:
        A model of the same class as `plan.apply(model)`.

    Raises:
        InputError: Parameters are left that nothing draws.
        PlanError: The model has another architecture.
    """
    check_kind(plan, Plan, "plan", "pass what analysis.plan(...) returned")
    seed, model = check_integer(seed, "seed", 0, LARGEST), unwrapped(model)
    refuse_spread(model)
    if (
        init is not None
        and not callable(init)
        and not (isinstance(init, str) and init == "moments")
    ):
        raise InputError(
            f"init is {shown(init)}",
            where="init=",
            remedy='pass a function of a module or "moments"',
        )
    slim = plan.apply(model, inputs, progress=False)
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        left = _draw(slim, model, init, stacks_of(plan.settings))
    if left:
        raise InputError(
            f"nothing draws new values for {listed(left)}",
            where="fresh",
            remedy="pass init=, a function of a module that fills its parameters (transformers "
            'models have one: model._init_weights), or init="moments" for normal draws of the '
            "present mean and deviation",
        )
    return slim


def _draw(
    slim: nn.Module, model: nn.Module, init: Init | str | None, stacks: tuple[Stack, ...]
) -> list[str]:
    """Draw all weights anew; names of the parameters that nothing draws."""
    trained = dict(slim.named_parameters())
    moments = {
        n: (float(p.detach().float().mean()), float(p.detach().float().std(correction=0)))
        for n, p in trained.items()
        if p.is_floating_point()
    }
    constants = {n: p.detach().clone() for n, p in trained.items() if not p.requires_grad}
    for parameter in trained.values():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.fill_(torch.nan)
    for name, module in reversed(list(slim.named_modules())):
        try:
            _reset(module, attribute(model, name_then(name, stacks)) if name else model)
        except Exception as error:
            reraise_fatal(error)
            raise InputError(
                f"its parameters cannot be drawn anew: {first_line(error)}",
                where=name or type(model).__name__,
                remedy="let its reset method read the sizes of its parameters",
            ) from error
        if callable(init):
            init(module)
    left = []
    for name, parameter in trained.items():
        if not bool(torch.isnan(parameter).any()):
            continue
        if name in constants:
            parameter.copy_(constants[name])
        elif init == "moments" and name in moments:
            parameter.normal_(*moments[name])
        else:
            left.append(name)
    return left


def _reset(module: nn.Module, dense: object) -> None:
    """Have a module draw its own parameters, in the way of the class it is or stands for."""
    kind = type(dense) if isinstance(module, GeneratedModule) else type(module)
    draw = next(filter(callable, (getattr(kind, name, None) for name in RESET_METHODS)), None)
    if draw is None:
        return
    if not parametrize.is_parametrized(module):
        draw(module)
        return
    # The weight is computed: what is drawn into the cached value goes back through its inverse.
    with parametrize.cached():
        names = list(_parametrized(module))
        draw(module)
        drawn = {name: getattr(module, name).detach().clone() for name in names}
    for name, value in drawn.items():
        if not bool(torch.isnan(value).any()):
            setattr(module, name, value)


def _parametrized(module: nn.Module) -> Iterator[str]:
    holders = module.parametrizations
    assert isinstance(holders, nn.ModuleDict)
    yield from holders


def scratch_epochs(plan: Plan, epochs: int, control: str = "B") -> int:
    """How long to train the scratch control.

    Args:
        plan: Bound to a model.
        epochs: Of the dense model's training.
        control: "E": as many epochs; "B": as much compute, epochs * MACs_dense / MACs_slim, at most
            twice as many epochs (Liu et al. 2019, section 3).

    Returns:
        The number of epochs.

    Raises:
        InputError: There is no such control.
        PlanError: The plan was loaded from a file and is not bound to a model.
    """
    check_kind(plan, Plan, "plan", "pass what analysis.plan(...) returned")
    epochs = check_integer(epochs, "epochs", 1)
    if not isinstance(control, str) or control not in ("E", "B"):
        raise InputError(
            f"there is no scratch control {shown(control)}",
            where="control=",
            remedy='use "E" (equal epochs) or "B" (equal budget of compute)',
        )
    if control == "E":
        return epochs
    if plan.coupling is None:
        raise PlanError(
            "the plan was loaded from a file and knows no model yet",
            remedy="use plan.bind(model) first",
        )
    ratio = cost.macs(plan.coupling).total / max(plan.macs, 1.0)
    return round(epochs * Fraction(min(ratio, _LONGEST)))
