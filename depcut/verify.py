"""Check a smaller model against the dense one with the consumer-side slices zeroed.

The reference runs the captured dense graph. Where an operator contracts a narrowed axis, the
removed slices of one operand (the weight, where there is one) are zeroed; where an operator's
statistics run over a narrowed axis, it is computed on the kept indices only. Zeroing producers
instead would be wrong, as a bias of BatchNorm leaks through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from depcut.capture import attribute, modes
from depcut.errors import VerificationError
from depcut.inputs import Inputs, normalize
from depcut.keep import Keep
from depcut.ops.registry import Output
from depcut.program import ModuleCall, where
from depcut.rewrite.build import Slim
from depcut.rewrite.graph import stack_entries

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
Watched = dict[fx.Node, Any]

_MODE_FLAGS = ("train", "training")
_RANDOM = ("rand", "bernoulli", "normal", "exponential", "uniform", "multinomial", "randperm")


def _index(tensor: torch.Tensor, keep: Keep, output: Output) -> torch.Tensor:
    """The kept part of a dense activation."""
    if isinstance(output, tuple):
        for dim, term in enumerate(output):
            kept = keep.indices(term)
            if kept is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))
    return tensor


def _spread(small: torch.Tensor, keep: Keep, output: Output) -> torch.Tensor:
    """A kept part back in the dense shape, zeros elsewhere."""
    if isinstance(output, tuple):
        for dim, term in enumerate(output):
            kept = keep.indices(term)
            if kept is not None:
                shape = list(small.shape)
                shape[dim] = term.size
                at = torch.from_numpy(kept).to(small.device)
                small = small.new_zeros(shape).index_copy(dim, at, small)
    return small


def _zeroed(tensor: torch.Tensor, dim: int, kept: Any) -> torch.Tensor:
    gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
    gone[torch.from_numpy(kept)] = False
    at = gone.nonzero().flatten().to(tensor.device)
    return tensor.index_fill(dim, at, 0)


class Reference:
    """Runs the captured graph: dense with consumer-side zeros, or sliced.

    Args:
        keep: What stays.
        model: The dense model, whose tensors are read.
        sliced: Run with narrowed tensors and new size literals instead of zeros.
    """

    def __init__(self, keep: Keep, model: nn.Module, sliced: bool = False) -> None:
        self.keep, self.model, self.sliced = keep, model, sliced
        self.program = keep.coupling.program

    def run(
        self, inputs: list[Any], dtype: torch.dtype | None = None, watch: set[fx.Node] | None = None
    ) -> tuple[list[Any], dict[fx.Node, Any]]:
        """Flat outputs for flat inputs, and the values of the nodes to watch."""
        env: dict[fx.Node, Any] = {}
        watched: dict[fx.Node, Any] = {}
        last = self._last_uses()
        given = iter(inputs)
        outputs: list[Any] = []
        for node in self.program.graph.graph.nodes:
            if node.op == "placeholder":
                env[node] = self._tensor(node, dtype) if node in self.program.tensors else next(given)
            elif node.op == "get_attr":
                env[node] = getattr(self.program.graph, str(node.target))
            elif node.op == "call_function":
                env[node] = self._call(node, env)
            else:
                outputs = [env[a] if isinstance(a, fx.Node) else a for a in node.args[0]]
            if watch and node in watch:
                value = env.get(node)
                watched[node] = value.clone() if isinstance(value, torch.Tensor) else value
            for done in last.get(node, ()):
                env.pop(done, None)
        return outputs, watched

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.program.graph.graph.nodes:
            for source in node.all_input_nodes:
                last[source] = node
        out: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            out.setdefault(node, []).append(source)
        return out

    def _tensor(self, node: fx.Node, dtype: torch.dtype | None) -> torch.Tensor:
        name = self.program.tensors[node]
        if name in self.program.anonymous:
            tensor = self.program.constants[name]
        else:
            tensor = attribute(self.model, name)
        tensor = tensor.detach()
        if self.sliced:
            tensor = _index(tensor, self.keep, self.keep.coupling.env[node])
        elif name not in self.program.parameters:
            # Buffers may be written to in place.
            tensor = tensor.clone()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        return tensor

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        effects = self.keep.coupling.effects.get(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        args, kwargs = list(args), dict(kwargs)
        if effects is None:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        _silence(node, args)
        if self.sliced:
            args, kwargs = self._literals(node, args, kwargs, env)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if any(self.keep.narrows(t) for t in effects.statistics):
            return self._on_kept(node, env, effects.out)
        masked: dict[fx.Node, torch.Tensor] = {}
        for source, dim in effects.contracts:
            dims = self.keep.coupling.env[source]
            kept = self.keep.indices(dims[dim]) if isinstance(dims, tuple) else None
            if kept is not None:
                masked[source] = _zeroed(masked.get(source, env[source]), dim, kept)
        if masked:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda n: masked[n] if n in masked else env[n]
            )
            args, kwargs = list(args), dict(kwargs)
            _silence(node, args)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _on_kept(self, node: fx.Node, env: dict[fx.Node, Any], output: Output) -> Any:
        """Statistics over the kept indices only: gather, compute, put back."""
        small = {
            n: _index(env[n], self.keep, self.keep.coupling.env[n])
            if isinstance(env[n], torch.Tensor)
            else env[n]
            for n in node.all_input_nodes
        }
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: small[n])
        args, kwargs = self._literals(node, list(args), dict(kwargs), env)
        _silence(node, args)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(result, tuple | list):
            assert isinstance(output, list)
            return [_spread(r, self.keep, o) for r, o in zip(result, output, strict=True)]
        return _spread(result, self.keep, output)

    def _literals(
        self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], env: dict[fx.Node, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        for literal, value, dense, count in self.keep.literals(node):
            new = literal.sign * count
            if isinstance(value, fx.Node):
                new = env[value] * count // dense
            head, rest = literal.path[0], literal.path[1:]
            if isinstance(head, int):
                args[head] = _with(args[head], rest, new)
            else:
                kwargs[head] = _with(kwargs[head], rest, new)
        return args, {**kwargs, **self.keep.pins(node)}


def _with(container: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    items = list(container)
    items[path[0]] = _with(items[path[0]], path[1:], value)
    return items


def _silence(node: fx.Node, args: list[Any]) -> None:
    """Eval semantics of dropout, also where containers were captured in training mode."""
    if "dropout" not in str(node.target):
        return
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema else ()):
        if argument.name in _MODE_FLAGS and i < len(args):
            args[i] = False


def flat_inputs(keep: Keep) -> list[Any]:
    """The example inputs, flat, as fresh tensors."""
    program = keep.coupling.program
    leaves = pytree.tree_leaves((program.args, program.kwargs))
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _is_random(keep: Keep) -> bool:
    return any(
        any(word in str(n.target) for word in _RANDOM)
        for n in keep.coupling.effects
        if "_like" not in str(n.target) or "rand" in str(n.target)
    )


def masked_outputs(
    keep: Keep, model: nn.Module, inputs: Inputs = None, *, dtype: torch.dtype | None = None
) -> list[Any]:
    """Flat outputs of the dense model with the consumer-side slices zeroed.

    Args:
        keep: What stays.
        model: The dense model.
        inputs: Of the structure it was captured with; left out, the captured ones.
        dtype: Compute in this precision instead of the model's.
    """
    leaves = flat_inputs(keep)
    if inputs is not None:
        leaves = pytree.tree_leaves(normalize(model, inputs))
    leaves = [_cast(leaf, dtype) for leaf in leaves]
    with torch.no_grad():
        return Reference(keep, model).run(leaves, dtype)[0]


def _cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    if dtype is not None and isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return leaf.to(dtype)
    return leaf


@dataclass
class Observed:
    """One run of a smaller model.

    Attributes:
        outputs: Its flat outputs.
        values: Results of its top-level children, by the graph node that computes them.
        shape: The first module result whose shape is not the predicted one, "" if there is none.
    """

    outputs: list[Any]
    values: dict[fx.Node, torch.Tensor]
    shape: str = ""


def observe(slim: nn.Module, keep: Keep, dtype: torch.dtype | None = None) -> Observed:
    """Run a smaller model on the example inputs, and look at what its modules return.

    Args:
        slim: The smaller model; its mode and hooks are as before afterwards.
        keep: What stays of the dense one.
        dtype: Precision of the inputs instead of the captured ones.
    """
    program = keep.coupling.program
    args, kwargs = pytree.tree_map(
        lambda leaf: _cast(leaf.clone(), dtype) if isinstance(leaf, torch.Tensor) else leaf,
        (program.args, program.kwargs),
    )
    seen = Observed([], {})
    calls: dict[str, list[ModuleCall]] = {}
    for call in program.calls:
        calls.setdefault(call.module, []).append(call)
    handles = [
        module.register_forward_hook(_look(name, calls[name], keep, seen))
        for name, module in slim.named_modules()
        if name in calls
    ]
    try:
        with modes(slim, program.training), torch.no_grad():
            seen.outputs = list(pytree.tree_leaves(slim(*args, **kwargs)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _look(name: str, calls: list[ModuleCall], keep: Keep, seen: Observed) -> Callable[..., None]:
    order = iter(calls)

    def hook(module: nn.Module, args: Any, result: Any) -> None:
        call = next(order, None)
        if call is None:
            return
        leaves = pytree.tree_leaves(result)
        for node, leaf in zip(call.out_leaves, leaves, strict=False):
            dims = keep.coupling.env.get(node) if isinstance(node, fx.Node) else None
            if not isinstance(dims, tuple) or not isinstance(leaf, torch.Tensor):
                continue
            predicted = tuple(keep.count(t) for t in dims)
            if tuple(leaf.shape) != predicted and not seen.shape:
                seen.shape = f"{name!r} returns shape {tuple(leaf.shape)} instead of {predicted}"
            if "." not in name:
                seen.values[node] = leaf.detach().clone()

    return hook


def _compare(slim: Slim, expected: tuple[list[Any], Watched], dtype: Any = None) -> tuple[float, str]:
    """Largest relative difference of outputs and top-level children, and what is wrong besides."""
    keep = slim.keep
    seen = observe(slim.model, keep, dtype)
    outputs, watched = expected
    nodes = [n for n in seen.values if isinstance(watched.get(n), torch.Tensor)]
    inner = [_index(watched[n], keep, keep.coupling.env[n]) for n in nodes]
    size, message = error([*outputs, *inner], [*seen.outputs, *(seen.values[n] for n in nodes)])
    return size, message or seen.shape


def _expected(keep: Keep, model: nn.Module, dtype: Any = None) -> tuple[list[Any], Watched]:
    """The reference's outputs, and its values where top-level children return."""
    top = {
        leaf
        for call in keep.coupling.program.calls
        if "." not in call.module
        for leaf in call.out_leaves
        if isinstance(leaf, fx.Node)
    }
    inputs = [_cast(leaf, dtype) for leaf in flat_inputs(keep)]
    with torch.no_grad():
        return Reference(keep, model).run(inputs, dtype, watch=top)


def error(expected: list[Any], got: list[Any]) -> tuple[float, str]:
    """Largest difference relative to the output's scale, and what is wrong besides ("" if nothing)."""
    worst = 0.0
    tensors = [(e, g) for e, g in zip(expected, got, strict=False) if isinstance(e, torch.Tensor)]
    if len(expected) != len(got):
        return float("inf"), f"{len(got)} outputs instead of {len(expected)}"
    for want, have in tensors:
        if not isinstance(have, torch.Tensor) or want.shape != have.shape:
            return float("inf"), (
                f"an output of shape {tuple(getattr(have, 'shape', ()))} instead of "
                f"{tuple(want.shape)}"
            )
        if want.is_meta or not want.numel():
            continue
        if not want.is_floating_point():
            continue
        same = torch.isfinite(want) == torch.isfinite(have)
        if not bool(same.all()):
            return float("inf"), "an output that is not finite where the dense model's is"
        want, have = want.double().nan_to_num(0, 0, 0), have.double().nan_to_num(0, 0, 0)
        scale = float(want.abs().max()) or 1.0
        worst = max(worst, float((want - have).abs().max()) / scale)
    return worst, ""


def verify(slim: Slim, model: nn.Module) -> float:
    """Check the smaller model, generating the modules that turn out not to express their sizes.

    Args:
        slim: The rewritten model; its `model` and `generated` may change.
        model: The dense model.

    Returns:
        The largest difference from the reference, relative to the output's scale.

    Raises:
        VerificationError: The smaller model computes something else.
    """
    keep = slim.keep
    random = _is_random(keep)
    expected = _expected(keep, model)
    limit = _tolerance(keep)
    while True:
        problem: Exception | None = None
        try:
            size, message = _compare(slim, expected)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError) as e:
            problem, size, message = e, float("inf"), f"{type(e).__name__}: {e}"[:300]
        if random and not message:
            return 0.0
        if size <= limit or (not message and size < 0.05 and _exact(slim, model)):
            return size
        culprit = _culprit(slim, model, limit)
        if culprit is None or "" in slim.generated:
            raise VerificationError(
                message or f"outputs differ by {size:.3g} of their scale",
                where=_place(keep, culprit),
                remedy="keep the layers concerned with keep=; please report the model",
            ) from problem
        slim.replace(culprit, message or "its code computes other values at the new sizes")


def _tolerance(keep: Keep) -> float:
    """The allowed relative error: that of the coarsest precision in the graph."""
    values = (n.meta.get("val") for n in keep.coupling.program.graph.graph.nodes)
    dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor)}
    return max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=1e-4)


def _exact(slim: Slim, model: nn.Module) -> bool:
    """Whether the difference vanishes in double precision, i.e. was rounding."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors):
        return False
    try:
        double = Slim(copy.deepcopy(slim.model).double(), slim.keep)
        expected = _expected(slim.keep, model, torch.float64)
        return _compare(double, expected, torch.float64)[0] < 1e-5
    except RuntimeError:
        return False  # the code insists on a precision: judge by the native one


def _place(keep: Keep, name: str | None) -> str:
    nodes = [n for n in keep.coupling.effects if name is not None and name in stack_entries(n)]
    return where(nodes[0]) if nodes else "the whole model"


def _culprit(slim: Slim, model: nn.Module, limit: float) -> str | None:
    """The innermost module that raises or turns right inputs into wrong outputs."""
    keep, program = slim.keep, slim.keep.coupling.program
    calls = {c.module: c for c in program.calls}
    watch = {
        leaf
        for c in calls.values()
        for leaf in (*c.out_leaves, *c.leaves)
        if isinstance(leaf, fx.Node)
    }
    with torch.no_grad():
        _, values = Reference(keep, model, sliced=True).run(flat_inputs(keep), watch=watch)
    wrong: list[str] = []
    running: list[str] = []
    handles = []
    for name, module in slim.model.named_modules():
        if name not in calls:
            continue
        before, after = _watchers(name, calls[name], values, limit, wrong, running)
        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
    try:
        observe(slim.model, keep)
    except Exception:  # the innermost call still open is the one that raised
        raised = next((n for n in reversed(running) if n not in slim.generated), "")
        return wrong[0] if wrong else raised
    finally:
        for handle in handles:
            handle.remove()
    return wrong[0] if wrong else ""


def _watchers(
    name: str,
    call: Any,
    values: dict[fx.Node, Any],
    limit: float,
    wrong: list[str],
    running: list[str],
) -> tuple[Callable[..., None], Callable[..., None]]:
    good: list[bool] = []

    def matches(leaves: Any, tree: Any) -> bool:
        pairs = zip(leaves, pytree.tree_leaves(tree), strict=False)
        known = [(values[n], v) for n, v in pairs if isinstance(n, fx.Node) and n in values]
        size, message = error([k for k, _ in known], [v for _, v in known])
        return not message and size <= limit

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(name)
        good.append(matches(call.leaves, (args, kwargs)))

    def after(module: nn.Module, args: Any, result: Any) -> None:
        running.pop()
        if good.pop() and not matches(call.out_leaves, result):
            wrong.append(name)

    return before, after

