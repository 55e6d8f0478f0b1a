"""Candidates in PyTorch: eager or compiled, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from depcut.capture.clone import clone, cloned_arguments
from depcut.deploy.runtime import batch_size, bind_inputs, resized
from depcut.errors import InputError, LatencyError
from depcut.support.failures import first_line, reraise_fatal
from depcut.support.torch_private import compile_settings, pytree
from depcut.timing.backends import Candidate, Setup, channel_block, gpu_name, runtime
from depcut.timing.clock import Call, Stopwatch, host_seconds
from depcut.timing.kernels import Kernel
from depcut.timing.memory import cuda_memory
from depcut.timing.module_profile import operators

# Every candidate and batch size is one more specialisation of the same code.
_SPECIALISATIONS = 1024


@runtime("torch")
class Eager:
    """Models in PyTorch's eager mode."""

    providers: tuple[str, ...] = ("cpu", "cuda")
    in_place = True
    alignment = channel_block()  # it runs oneDNN's convolutions
    compiled = False

    def check(self, provider: str) -> None:
        """Raise InputError if PyTorch sees no such device."""
        if provider == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"PyTorch {torch.__version__} finds no CUDA device; it has cpu",
                where=f"provider={provider!r}",
                remedy='install a CUDA build of torch and the driver, or use provider="cpu"',
            )

    def version(self) -> str:
        """PyTorch's version, and how it runs models."""
        return f"torch {torch.__version__} eager"

    def enter(self, stack: contextlib.ExitStack, threads: int) -> None:
        """Give PyTorch so many threads."""
        stack.enter_context(torch_threads(threads))

    def runner(self, name: str, candidate: Candidate, setup: Setup) -> ModuleRunner:
        """The model, ready to run; see `ModuleRunner` for what it raises."""
        return ModuleRunner(
            name,
            candidate,
            setup.inputs,
            compiled=self.compiled,
            provider=setup.provider,
        )


@runtime("torch.compile")
class Compiled(Eager):
    """Models compiled anew for each batch size."""

    compiled = True

    def version(self) -> str:
        """PyTorch's version, and how it runs models."""
        return f"torch {torch.__version__} compiled for each batch size"

    def enter(self, stack: contextlib.ExitStack, threads: int) -> None:
        """Give PyTorch so many threads, and make an error of what it cannot compile."""
        super().enter(stack, threads)
        stack.enter_context(no_fallback())


class ModuleRunner:
    """A clone of a model in PyTorch, in evaluation mode, on the device where the model is.

    Args:
        name: The candidate's name.
        candidate: The model.
        inputs: Its inputs, on any device.
        compiled: Whether to compile it, for each batch size.
        provider: Where the model must be; None for wherever it is.

    Raises:
        InputError: The candidate is no model, or is on a device that cannot be timed.
    """

    def __init__(
        self,
        name: str,
        candidate: Candidate,
        inputs: Any,
        *,
        compiled: bool,
        provider: str | None,
    ) -> None:
        if not isinstance(candidate, nn.Module):
            raise InputError(
                f"{candidate} is a file",
                where=f"candidate {name!r}",
                remedy='use runtime="onnxruntime"',
            )
        self._name, self._model = name, clone(candidate, buffers=True)
        self._device = _device(candidate, name, provider)
        self._arguments = _moved(bind_inputs(candidate, inputs), self._device)
        self._compiled: Any = None
        if compiled:
            with _compiling(f"candidate {name!r}"):
                self._compiled = torch.compile(self._model, dynamic=False)
        self.batch = batch_size(self._arguments)
        self.file_bytes: int | None = None
        self.device = "cpu"
        self.stopwatch: Stopwatch = host_seconds
        if self._device.type == "cuda":
            self.device = f"{self._device} ({gpu_name(self._device.index)})"
            self.stopwatch = _event_stopwatch(self._device)

    def call(self, batch: int) -> Call:
        """A function that runs it once at a batch size; it has been seen to run.

        Args:
            batch: The batch size.

        Returns:
            The function. On a GPU it only starts the work.

        Raises:
            InputError: The model does not run at this batch size, or does not compile.
        """
        arguments = resized(self._arguments, batch)
        run = _forward(self._model, arguments)
        try:
            run()
        except Exception as error:
            reraise_fatal(error)
            raise InputError(
                f"the model does not run at batch size {batch}: {first_line(error)}",
                where=f"candidate {self._name!r}",
                remedy="its code may fix the batch size; use that one",
            ) from error
        if self._compiled is None:
            return run
        run = _forward(self._compiled, arguments)
        with _compiling(f"candidate {self._name!r}, batch size {batch}"):
            run()
        return run

    def kernels(self, batch: int) -> tuple[Kernel, ...]:
        """What a run spends its time on: the operators of the eager model.

        Those of a compiled one are fused and do not tell what they work on; its operators' times
        are brought to the time of the whole where the model of time is fitted.

        Args:
            batch: The batch size.

        Raises:
            LatencyError: It runs on a GPU, or its operators change from run to run.
        """
        where = f"candidate {self._name!r}"
        if self._device.type != "cpu":
            raise LatencyError(
                f"operators on {self.device} run behind the call, and are not timed one by one",
                where=where,
                remedy='model the time of the model on the CPU: model.to("cpu")',
            )
        return operators(_forward(self._model, resized(self._arguments, batch)), where)

    def peak_memory(self, batch: int) -> int | None:
        """Bytes of GPU memory that it needs at a batch size.

        Args:
            batch: The batch size.

        Returns:
            Weights, inputs and workspace together; None on the CPU, where the process holds much
            else.
        """
        if self._device.type != "cuda":
            return None
        arguments = resized(self._arguments, batch)
        leaves = pytree.tree_leaves(dict(arguments.arguments))
        held = (*self._model.parameters(), *self._model.buffers(), *leaves)
        own = {id(tensor): tensor.nbytes for tensor in held if isinstance(tensor, Tensor)}
        run = _forward(self._model if self._compiled is None else self._compiled, arguments)
        run()
        return cuda_memory(run, self._device, sum(own.values()))


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Give PyTorch so many threads for a while.

    Args:
        threads: Threads that one operator may use.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def no_fallback() -> AbstractContextManager[None]:
    """Settings under which what torch.compile cannot do is an error, not an eager run.

    Returns:
        Something to enter; the settings are the former ones afterwards.
    """
    return compile_settings(
        recompile_limit=_SPECIALISATIONS,
        accumulated_recompile_limit=_SPECIALISATIONS,
        fail_on_recompile_limit_hit=True,
        suppress_errors=False,
        disable=False,
    )


def _forward(model: Any, arguments: inspect.BoundArguments) -> Call:
    """A call of the model."""

    def run() -> None:
        # no_grad rather than inference_mode: a model may cache tensors that later need gradients
        with torch.no_grad():
            model(*arguments.args, **arguments.kwargs)

    return run


def _device(model: nn.Module, name: str, provider: str | None) -> torch.device:
    """The one device that the model is on, if its clock can be read."""
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({str(tensor.device) for tensor in tensors}) or ["cpu"]
    where = f"candidate {name!r}"
    if len(devices) > 1:
        raise InputError(
            f"the model is spread over {', '.join(devices)}",
            where=where,
            remedy="move it to one device",
        )
    device = torch.device(devices[0])
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"no way to time a model on {device}", where=where, remedy="move it to cpu or cuda"
        )
    if provider not in (None, device.type):
        raise InputError(
            f"the model is on {device}, not on {provider}",
            where=where,
            remedy=f'pass model.to("{provider}")',
        )
    return device


def _moved(arguments: inspect.BoundArguments, device: torch.device) -> inspect.BoundArguments:
    """The same arguments on a device."""

    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    values = pytree.tree_map(move, cloned_arguments(dict(arguments.arguments)))
    return inspect.BoundArguments(arguments.signature, values)


def _event_stopwatch(device: torch.device) -> Stopwatch:
    """Seconds between events on the GPU's stream; each call ends before the next one begins."""

    def seconds(call: Call, count: int) -> float:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        total = 0.0
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            for _ in range(count):
                started.record()
                call()
                ended.record()
                ended.synchronize()
                total += started.elapsed_time(ended)
        return total / 1e3

    return seconds


@contextlib.contextmanager
def _compiling(where: str) -> Iterator[None]:
    """Turn an error of the compiler into an InputError with its first cause."""
    try:
        yield
    except Exception as error:
        reraise_fatal(error)
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(
            f"torch.compile fails: {first_line(cause)}",
            where=where,
            remedy='on the CPU it needs a working C++ compiler; or use runtime="torch"',
        ) from error
