"""Candidates in OpenVINO on the CPU."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from torch import nn

from depcut.deploy.convert import OLDER_OPSET
from depcut.deploy.export import export
from depcut.deploy.runtime import (
    Array,
    as_array,
    batch_size,
    bind_inputs,
    named_tensors,
    resized,
)
from depcut.errors import ExportError, InputError, LatencyError
from depcut.support.failures import first_line, reraise_fatal
from depcut.timing.backends import Candidate, Setup, channel_block, runtime
from depcut.timing.clock import Call, Stopwatch, host_seconds
from depcut.timing.kernels import PROFILED, WARM, Kernel, Shape, runs_to_fill
from depcut.timing.onnx_files import existing, file_arguments, file_bytes

_DEVICES = {"cpu": "CPU"}


@runtime("openvino")
class OpenVino:
    """ONNX files, and models that are exported first, compiled anew for each batch size."""

    providers: tuple[str, ...] = tuple(_DEVICES)
    in_place = False
    alignment = channel_block()  # its CPU plugin runs oneDNN's kernels

    def check(self, provider: str) -> None:
        """Raise InputError if OpenVINO is not installed, or sees no such device."""
        if importlib.util.find_spec("openvino") is None:
            raise InputError(
                "OpenVINO is not installed",
                where='runtime="openvino"',
                remedy="pip install 'depcut[openvino]', or pip install openvino",
            )
        import openvino

        wanted, available = _DEVICES[provider], _core().available_devices
        if wanted not in available:
            raise InputError(
                f"OpenVINO {openvino.__version__} finds no {wanted}; it has "
                f"{', '.join(available) or 'no device'}",
                where=f"provider={provider!r}",
                remedy="install the plugin of that device, or use another runtime",
            )

    def version(self) -> str:
        """Its name and version, and how it runs models."""
        return f"openvino {version_of('openvino')} in float32, compiled for each batch size"

    def enter(self, stack: contextlib.ExitStack, threads: int) -> None:
        """Nothing: threads are a property of each compiled model."""

    def runner(self, name: str, candidate: Candidate, setup: Setup) -> VinoRunner:
        """The candidate, ready to be compiled; see `VinoRunner` for what it raises."""
        return VinoRunner(name, candidate, setup)


class VinoRunner:
    """An ONNX file in OpenVINO.

    Args:
        name: The candidate's name.
        candidate: A file, or a model to be exported.
        setup: Its inputs, the provider, the threads, and an empty folder.

    Raises:
        InputError: There is no such file.
        ExportError: The model cannot be exported, or the file does not load.
    """

    def __init__(self, name: str, candidate: Candidate, setup: Setup) -> None:
        self._name, self._threads = name, setup.threads
        self._target = _DEVICES[setup.provider or "cpu"]
        if isinstance(candidate, nn.Module):
            self._arguments = bind_inputs(candidate, setup.inputs)
            self._path, self._model = _exported(candidate, setup)
        else:
            self._path = existing(Path(candidate), name)
            self._arguments = file_arguments(setup.inputs)
            self._model = _read(self._path)
        self.batch = batch_size(self._arguments)
        self.device = f"OpenVINO {self._target}"
        self.stopwatch: Stopwatch = host_seconds

    @cached_property
    def file_bytes(self) -> int | None:
        """Size of its file with external data."""
        return file_bytes(self._path)

    def call(self, batch: int) -> Call:
        """A function that runs it once at a batch size; it has been seen to run.

        Args:
            batch: The batch size.

        Returns:
            The function.

        Raises:
            InputError: The graph's batch size is another one and fixed.
            ExportError: OpenVINO does not compile the graph, or stops.
        """
        _, run = self._compiled(batch, profiled=False)
        return run

    def peak_memory(self, batch: int) -> int | None:  # noqa: ARG002  (the interface has it)
        """None: OpenVINO does not tell, and its kernels are kept beyond a model's life."""
        return None

    def kernels(self, batch: int) -> tuple[Kernel, ...]:
        """What a run spends its time on, as OpenVINO's own counters tell it.

        Args:
            batch: The batch size.

        Raises:
            LatencyError: The counters name no kernel.
        """
        request, run = self._compiled(batch, profiled=True)
        for _ in range(WARM):
            run()
        runs = runs_to_fill(PROFILED, run)
        before, done = _means(request), 2 + WARM  # one run in `_compiled`, one to measure
        for _ in range(runs):
            run()
        seconds = since(before, done, _means(request), done + runs)
        kernels = tuple(_kernels(request.get_compiled_model().get_runtime_model(), seconds))
        if not kernels:
            raise LatencyError(
                "OpenVINO's counters name no kernel",
                where=f"candidate {self._name!r}",
                remedy="shrink by of='macs' instead",
            )
        return kernels

    def _compiled(self, batch: int, *, profiled: bool) -> tuple[Any, Call]:
        """A request of the graph at a batch size, and a function that runs it; it was run once."""
        feeds = self._feeds(batch)
        model = self._model.clone()
        where = f"candidate {self._name!r}"
        try:
            model.reshape({name: list(array.shape) for name, array in feeds.items()})
            compiled = _core().compile_model(
                model,
                self._target,
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    "NUM_STREAMS": 1,
                    "INFERENCE_NUM_THREADS": self._threads,
                    # As the file says; the default is bfloat16 where the processor has it.
                    "INFERENCE_PRECISION_HINT": "f32",
                    "ENABLE_CPU_PINNING": False,  # `pin=` says where to run
                    "PERF_COUNT": profiled,
                },
            )
            request = compiled.create_infer_request()
            request.infer(feeds)
        except Exception as error:
            reraise_fatal(error)
            raise ExportError(
                f"OpenVINO stops at batch size {batch}: {_reason(error)}",
                where=where,
                remedy="pass inputs of the sizes that the file was exported with, or use "
                'runtime="onnxruntime"',
            ) from error
        used = compiled.get_property("EXECUTION_DEVICES")
        if list(used) != [self._target]:
            raise InputError(
                f"OpenVINO was to run on {self._target} and fell back to {', '.join(used)}",
                where=where,
                remedy="install the plugin of that device, or use another runtime",
            )
        return request, lambda: request.infer(feeds, share_inputs=True)

    def _feeds(self, batch: int) -> dict[str, Array]:
        """The inputs at a batch size, if the graph takes it."""
        ports = {port.get_any_name(): port.get_partial_shape() for port in self._model.inputs}
        tensors = named_tensors(list(ports), resized(self._arguments, batch).arguments)
        feeds = {name: as_array(tensor) for name, tensor in tensors.items()}
        for name, shape in ports.items():
            fixed = shape.rank.is_static and len(shape) and shape[0].is_static
            size = shape[0].get_length() if fixed else batch
            if feeds[name].shape[:1] == (batch,) and size != batch:
                raise InputError(
                    f"the graph takes batch size {size} only, not {batch}",
                    where=f"candidate {self._name!r}, input {name!r}",
                    remedy=f"use batch size {size}; a model whose code takes any batch size "
                    "is exported for any",
                )
        return feeds


def since(
    before: Mapping[str, float], done: int, after: Mapping[str, float], in_all: int
) -> dict[str, float]:
    """Means of the later runs alone, of counters that hold means since a model was compiled.

    The first runs prepare kernels, and take many times as long.

    Args:
        before: Means by kernel after the runs that are not to count.
        done: How many these were.
        after: Means after all of them.
        in_all: How many there were in all.
    """
    return {
        name: max(0.0, (in_all * mean - done * before.get(name, 0.0)) / (in_all - done))
        for name, mean in after.items()
    }


def _exported(model: nn.Module, setup: Setup) -> tuple[Path, Any]:
    """The model's file and graph; the older operator set where OpenVINO lacks the newer one."""
    refusals = []
    for version in (None, OLDER_OPSET):
        path = export(model, setup.folder / "model.onnx", setup.inputs, opset=version).path
        try:
            return path, _read(path)
        except ExportError as error:
            refusals.append(error)
    raise refusals[0]


@cache
def _core() -> Any:
    """OpenVINO's core, one for all candidates.

    Its CPU plugin gives the thread an alternate stack for signals, and puts back the one before
    when the core goes. Of two cores that do not go in the reverse order, the second puts back the
    stack of the first, which is freed: the next signal ends the process.
    """
    import openvino

    return openvino.Core()


def _read(path: Path) -> Any:
    """OpenVINO's graph of a file."""
    import openvino

    try:
        return _core().read_model(str(path))
    except Exception as error:
        reraise_fatal(error)
        raise ExportError(
            f"OpenVINO {openvino.__version__} does not load the file: {_reason(error)}",
            where=path.name,
            remedy='export with a lower opset=, or use runtime="onnxruntime"',
        ) from error


def _reason(error: BaseException) -> str:
    """The line of a message that says what is wrong; those before say where OpenVINO was built."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return said[0] if said else first_line(error)


def _means(request: Any) -> dict[str, float]:
    """Mean seconds of each kernel that was executed, in order."""
    return {
        info.node_name: info.real_time.total_seconds()
        for info in request.get_profiling_info()
        if info.status == info.Status.EXECUTED
    }


def _kernels(graph: Any, seconds: dict[str, float]) -> Iterator[Kernel]:
    """The kernels of the graph as it runs, in the order in which it runs them."""
    nodes = {node.get_friendly_name(): node for node in graph.get_ordered_ops()}
    for name, own in seconds.items():
        node = nodes.get(name)
        if node is not None:
            facts = node.get_rt_info()
            yield Kernel(
                op=str(facts["layerType"].astype(str)),
                inputs=tuple(_shapes(port.get_source_output() for port in node.inputs())),
                outputs=tuple(_shapes(node.outputs())),
                seconds=own,
            )


def _shapes(ports: Any) -> Iterator[Shape]:
    """Shapes of the tensors of real numbers."""
    for port in ports:
        if port.get_element_type().is_real():
            yield tuple(int(size) for size in port.get_shape())
