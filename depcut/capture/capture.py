"""Model and example inputs to a `Program`, by one torch.export in the training IR."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind
from torch.fx import traceback

from depcut.capture import provenance
from depcut.capture.batches import (
    Batch,
    batch_of,
    dynamic_shapes,
    share_batch,
    ways,
)
from depcut.capture.calls import Recorder, TorchCall
from depcut.capture.clone import clone, cloned_arguments
from depcut.capture.eager import refuse_failing_call, user_line
from depcut.capture.held import aliases, attribute, held_tensors, memory
from depcut.capture.inputs import Call, Inputs, example_calls, infer_inputs, made_note
from depcut.capture.part import inside
from depcut.capture.plain import refuse_spread
from depcut.capture.process_state import capturing
from depcut.capture.program import ModuleCall, Program
from depcut.capture.proposal import with_proposal
from depcut.capture.random_state import python_states, same_states
from depcut.capture.refusals import check_inputs, check_model
from depcut.capture.results import (
    EVERY,
    Names,
    Outputs,
    Results,
    Viewer,
    check_outputs,
    settled_outputs,
)
from depcut.capture.signature import name_keywords
from depcut.capture.structure import structure_of
from depcut.capture.wrappers import inline_wrappers
from depcut.errors import CaptureError, in_call
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import pytree


def capture(model: nn.Module, inputs: Inputs = None, outputs: Outputs = None) -> Program:
    """Capture what a model computes, on a clone: the model is only read.

    Args:
        model: Any module that torch.export can capture.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments, or a list of several
            such example calls; inferred if None.
        outputs: Names, globs over names or positions of the outputs that count; None: all but
            those that the model's library calls auxiliary, see `depcut.capture.convention`.

    Returns:
        The first example call, with the others beside it.

    Raises:
        CaptureError: The model is scripted or quantized, or cannot be exported.
        InputError: The inputs are of the wrong kind, or the model does not take them.
    """
    check_model(model)
    refuse_spread(model)
    names, made = settled_outputs(outputs), ""
    if inputs is None:
        inputs = infer_inputs(model)
        made = made_note(inputs)
    calls = example_calls(model, inputs, widen=False)
    for number, call in enumerate(calls):
        with in_call(number, len(calls)):
            check_inputs(model, *call)
    marks: list[fx.Node] = []
    programs = []
    for number, call in enumerate(calls):
        with in_call(number, len(calls)):
            programs.append(_freest(model, call, marks, number, names))
    check_outputs(names, [program.results for program in programs])
    unused = frozenset.intersection(*(p.unused for p in programs))
    for number, program in enumerate(programs):
        if inside(model, unused):
            training = _in_training(model, program, marks, inside(model, unused), number, names)
            if training is not None:
                unused &= training.unused
                programs[number] = replace(program, training=training)
    return replace(_merged(programs, unused), made=made)


def captured_again(model: nn.Module, call: Call, program: Program) -> Program:
    """One graph of another call, captured as a program was.

    Args:
        model: The model that the program was captured of; it is only read.
        call: Of the same structure, with other sizes.
        program: The program.

    Raises:
        CaptureError: The model cannot be exported with it.
    """
    return _capture(model, call, [], frozenset(), 0, program.batching, program.results.names)


def _in_training(
    model: nn.Module,
    program: Program,
    marks: list[fx.Node],
    unused: frozenset[str],
    number: int,
    names: Names | None,
) -> Program | None:
    """A call in training, if it uses some of the unused parameters.

    Parts that only run then (auxiliary heads, mask tokens) must shrink along.
    """
    call = (program.args, program.kwargs)
    try:
        gates = _gates(model, unused)
        training = _capture(model, call, marks, gates, number, program.batching, names)
    except CaptureError:
        return None
    return None if unused <= training.unused else training


def _merged(programs: list[Program], unused: frozenset[str]) -> Program:
    """The example calls as one program: the first, with what all graphs know and the others."""
    graphs = [g for p in programs for g in (p, p.training) if g is not None]
    marks = {number: node for g in graphs for number, node in g.marks.items()}
    anonymous = frozenset(name for g in graphs for name in g.anonymous)
    first, *others = (replace(p, marks=marks, anonymous=anonymous, unused=unused) for p in programs)
    return replace(first, others=tuple(others))


def _freest(
    model: nn.Module, call: Call, marks: list[fx.Node], number: int, names: Names | None
) -> Program:
    """The program with its batch as free as the model's code lets it be."""
    refused: CaptureError | None = None
    for batching, wide in ways(model, *call):
        try:
            return _capture(model, wide, marks, frozenset(), number, batching, names)
        except CaptureError as error:  # noqa: PERF203  each attempt may be refused
            refused = refused or error
    assert refused is not None
    refuse_failing_call(model, ("", *call))
    raise with_proposal(
        refused, model, call, lambda m, c: _capture(m, c, [], frozenset(), 0, Batch.FIXED, EVERY)
    )


def _gates(model: nn.Module, unused: frozenset[str]) -> frozenset[str]:
    """Modules whose mode may decide whether these parameters are used: their owners and ancestors.

    Everything else stays in eval mode, so that no batch norm or layer drop runs as in training.
    """
    names = {""}
    for parameter in unused:
        parts = parameter.split(".")[:-1]
        names |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return frozenset(n for n in names if any(True for _ in model.get_submodule(n).children()))


def _record_calls(
    model: nn.Module, marks: list[fx.Node], calls: list[ModuleCall], recorder: Recorder
) -> None:
    """Note for every module call which nodes are its arguments and results, by hooks that stay."""
    open_calls: list[tuple[tuple[Any, ...], pytree.TreeSpec]] = []

    def reference(leaf: Any) -> Any:
        node = provenance.node_of(leaf)
        return _Mark(provenance.mark(node, marks)) if node is not None else leaf

    def flat(tree: Any) -> tuple[tuple[Any, ...], pytree.TreeSpec]:
        leaves, spec = pytree.tree_flatten(tree)
        return tuple(map(reference, leaves)), spec

    def listen(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            open_calls.append(flat((args, kwargs)))
            recorder.enter(name)

        def after(_: nn.Module, _args: Any, _kwargs: Any, result: Any) -> None:
            leaves, spec = open_calls.pop()
            recorder.modules.pop()
            calls.append(ModuleCall(name, leaves, spec, *flat(result)))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)

    recorder.follow(model)
    for name, module in model.named_modules():
        if name:
            listen(name, module)


class _Mark(int):
    """A module call's reference to a node, until the final graph is known."""


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch
) -> torch.export.ExportedProgram:
    name_keywords(model, kwargs)
    shapes = dynamic_shapes(model, args, kwargs, batch)
    if batch is Batch.SHARED:
        share_batch(model)
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        reraise_fatal(error)
        raise CaptureError(
            f"torch.export cannot capture the model: {first_line(error)}",
            where=user_line(error, model),
            remedy="make that line traceable (no branches on tensor values, no .item()), "
            "or pass other inputs=; torch.export.export(model, args, strict=False) reproduces it",
        ) from error


def _capture(
    model: nn.Module,
    call: Call,
    marks: list[fx.Node],
    training: frozenset[str],
    number: int,
    batching: Batch,
    names: Names | None,
) -> Program:
    """One graph of one example call, with some modules in training mode."""
    calls: list[ModuleCall] = []
    seen = clone(model, training=training)
    recorder = Recorder()
    viewer = Viewer(seen, names)
    exported, states = _traced(seen, call, batching, marks, calls, recorder)
    program = _program(model, exported, calls, *call)
    suffix = (f"_call{number}" if number else "") + ("_training" if training else "")
    for node in program.graph.graph.nodes if suffix else ():
        node.name += suffix  # messages name nodes, so no two graphs share a name
    return replace(
        program,
        torch_calls=tuple(recorder.calls),
        comparisons=tuple(recorder.comparisons),
        lines=frozenset(recorder.lines),
        states=states,
        batching=batching,
        batch=batch_of(*call) if batching is Batch.FIXED else program.batch,
        results=viewer.results or Results(),
    )


def _traced(
    seen: nn.Module,
    call: Call,
    batching: Batch,
    marks: list[fx.Node],
    calls: list[ModuleCall],
    recorder: Recorder,
    correct: provenance.Corrector | None = None,
) -> tuple[torch.export.ExportedProgram, tuple[Any, ...] | None]:
    """Export a clone and record its calls on the way; random states where its code drew."""
    provenance.trace_attributes(seen)
    _record_calls(seen, marks, calls, recorder)
    with (
        capturing(root=provenance.root),
        provenance.ProvenanceMode(marks, recorder, correct),
        traceback.preserve_node_meta(),
    ):
        states = python_states()
        given, keywords = cloned_arguments(call)
        exported = _export(seen, given, keywords, batching)
        return exported, None if same_states(states, python_states()) else states


def corrected_calls(
    model: nn.Module, call: Call, batching: Batch, correct: provenance.Corrector
) -> tuple[TorchCall, ...]:
    """The calls that a model makes when it is captured, some with other arguments.

    Args:
        model: Any module; it is only read.
        call: The example call.
        batching: How the first dimensions of the inputs are captured.
        correct: Gives the arguments that a call gets in place of those it was made with.

    Returns:
        All calls, or those up to the one that raised.
    """
    recorder = Recorder()
    with contextlib.suppress(CaptureError):  # what ran until then was seen
        seen = clone(model)
        Viewer(seen, None)
        _traced(seen, call, batching, [], [], recorder, correct)
    return tuple(recorder.calls)


def _program(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    calls: list[ModuleCall],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Program:
    graph_module = exported.graph_module
    inline_wrappers(graph_module)
    graph = graph_module.graph
    named = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    tensors, parameters, anonymous, around = {}, set(), set(), set()
    own = held_tensors(model)
    held, places = {id(t) for t in own.values()}, {memory(t): n for n, t in own.items()}
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.target is None:
            continue
        tensors[named[spec.arg.name]] = spec.target
        if spec.kind == InputKind.PARAMETER:
            parameters.add(spec.target)
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            constant = exported.constants.get(spec.target)
            owned = None if constant is None else places.get(memory(constant))
            if owned is not None and attribute(model, spec.target) is None:
                # A function that closes over it, say: export sees no attribute that holds it.
                tensors[named[spec.arg.name]] = owned
                around.add(owned)
                if isinstance(own[owned], nn.Parameter):
                    parameters.add(owned)
            elif id(constant) not in held and attribute(model, spec.target) is None:
                anonymous.add(spec.target)
    marks = {n.meta[provenance.MARK]: n for n in graph.nodes if provenance.MARK in n.meta}
    symbolic = [
        n
        for n in graph.nodes
        if n.op == "placeholder" and n not in tensors and is_symbolic(n.meta.get("val"))
    ]
    batch = _sizes(symbolic[0].meta["val"])[0] if symbolic else 1
    program = Program(
        graph=graph_module,
        tensors=tensors,
        parameters=frozenset(parameters),
        anonymous=frozenset(anonymous),
        sizes={n: _sizes(n.meta.get("val")) for n in graph.nodes},
        marks=marks,
        calls=tuple(_resolved(call, marks) for call in calls),
        args=args,
        kwargs=kwargs,
        batch=batch,
        dynamic=bool(symbolic),
        aliases=aliases(model),
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        constants={n: exported.constants[n] for n in anonymous},
        around=frozenset(around),
        structure=structure_of(model),
    )
    return replace(program, unused=program.parameters - program.read)


def _resolved(call: ModuleCall, marks: dict[int, fx.Node]) -> ModuleCall:
    def leaf(value: Any) -> Any:
        return marks.get(int(value)) if isinstance(value, _Mark) else value

    return ModuleCall(
        call.module,
        tuple(map(leaf, call.leaves)),
        call.spec,
        tuple(map(leaf, call.out_leaves)),
        call.out_spec,
    )


def is_symbolic(value: Any) -> bool:
    """Whether the first dimension of a traced tensor is dynamic."""
    return (
        isinstance(value, torch.Tensor)
        and value.ndim > 0
        and isinstance(value.shape[0], torch.SymInt)
    )


def _sizes(value: Any) -> Any:
    """Sizes of a tensor, or of each tensor of a list; symbolic ones as hints."""
    if isinstance(value, torch.Tensor):
        return tuple(s if type(s) is int else hint(s) for s in value.shape)
    if isinstance(value, list | tuple):
        return [_sizes(v) for v in value] if not value or _has_tensor(value) else None
    return None


def hint(size: Any) -> int:
    """The value of a size, symbolic or not, in the example."""
    if isinstance(size, int):
        return int(size)
    return int(size.node.hint) if size.node.hint is not None else 1


def _has_tensor(values: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in values)
