"""Candidates in onnxruntime, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from depcut.deploy.export import export
from depcut.deploy.runtime import (
    Array,
    batch_size,
    bind_inputs,
    open_session,
    resized,
    session_feeds,
)
from depcut.errors import ExportError, InputError, LatencyError
from depcut.support.failures import first_line, reraise_fatal
from depcut.timing.backends import Candidate, Setup, channel_block, gpu_name, runtime
from depcut.timing.clock import Call, Stopwatch, host_seconds
from depcut.timing.kernels import Kernel
from depcut.timing.memory import session_memory
from depcut.timing.onnx_files import existing, file_arguments, file_bytes
from depcut.timing.session_profile import profile

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# onnxruntime's names for its providers; nodes that one has no kernel for go to the next.
CHAINS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


@runtime("onnxruntime")
class OnnxRuntime:
    """ONNX files, and models that are exported first."""

    providers: tuple[str, ...] = tuple(CHAINS)
    in_place = False
    alignment = channel_block()

    def check(self, provider: str) -> None:
        """Raise InputError if the installed build has no such provider."""
        import onnxruntime as ort

        wanted, available = CHAINS[provider][0], ort.get_available_providers()
        if wanted not in available:
            raise InputError(
                f"onnxruntime {ort.__version__} has no {wanted}; it has {', '.join(available)}",
                where=f"provider={provider!r}",
                remedy='install onnxruntime-gpu in place of onnxruntime, or use provider="cpu"',
            )

    def version(self) -> str:
        """Its name and version."""
        import onnxruntime as ort

        return f"onnxruntime {ort.__version__}"

    def enter(self, stack: contextlib.ExitStack, threads: int) -> None:
        """Nothing: threads are an option of each session."""

    def runner(self, name: str, candidate: Candidate, setup: Setup) -> SessionRunner:
        """The candidate's session; see `SessionRunner` for what it raises."""
        return SessionRunner(
            name,
            candidate,
            setup.inputs,
            folder=setup.folder,
            threads=setup.threads,
            provider=setup.provider or "cpu",
        )


class SessionRunner:
    """An ONNX file in onnxruntime; on a GPU, its inputs and outputs stay there.

    Args:
        name: The candidate's name.
        candidate: A file, or a model to be exported.
        inputs: Its inputs.
        folder: Where to write what is exported; empty.
        threads: Threads that one operator may use.
        provider: What runs the operators.

    Raises:
        InputError: There is no such file, or the provider does not start.
        ExportError: The model cannot be exported, or the file does not load.
    """

    def __init__(
        self,
        name: str,
        candidate: Candidate,
        inputs: Any,
        *,
        folder: Path,
        threads: int,
        provider: str,
    ) -> None:
        self._name, self._threads, self._provider = name, threads, provider
        if isinstance(candidate, nn.Module):
            self._arguments = bind_inputs(candidate, inputs)
            self._path = export(candidate, folder / "model.onnx", inputs).path
        else:
            self._path = existing(Path(candidate), name)
            self._arguments = file_arguments(inputs)
        self._session = open_session(self._path, threads, providers=CHAINS[provider])
        _refuse_fallback(self._session, provider)
        self.batch = batch_size(self._arguments)
        self.device = CHAINS[provider][0] + ("" if provider == "cpu" else f" on {gpu_name()}")
        self.stopwatch: Stopwatch = host_seconds

    @cached_property
    def file_bytes(self) -> int | None:
        """Size of its file with external data."""
        return file_bytes(self._path)

    def kernels(self, batch: int) -> tuple[Kernel, ...]:
        """What a run spends its time on, as onnxruntime's profile tells it.

        Args:
            batch: The batch size.

        Raises:
            LatencyError: It runs on a GPU, or its kernels change from run to run.
        """
        if self._provider != "cpu":
            raise LatencyError(
                f"onnxruntime's profile tells when kernels on {self.device} start, not how long "
                "they take",
                where=f"candidate {self._name!r}",
                remedy='model the time with provider="cpu"',
            )
        return profile(self._path, resized(self._arguments, batch).arguments, self._threads)

    def call(self, batch: int) -> Call:
        """A function that runs it once at a batch size; it has been seen to run.

        Args:
            batch: The batch size.

        Returns:
            The function.

        Raises:
            InputError: The graph's batch size is another one and fixed.
            ExportError: The runtime stops.
        """
        feeds = self._feeds(batch)
        try:
            run = self._on_host(feeds) if self._provider == "cpu" else self._on_device(feeds)
            run()
        except Exception as error:
            reraise_fatal(error)
            raise ExportError(
                f"onnxruntime stops at batch size {batch}: {first_line(error)}",
                where=f"candidate {self._name!r}",
                remedy="pass inputs of the sizes that the file was exported with",
            ) from error
        return run

    def peak_memory(self, batch: int) -> int | None:
        """Bytes of resident memory that it needs at a batch size.

        Args:
            batch: The batch size.

        Returns:
            Weights and workspace together; None on a GPU, where onnxruntime does not tell.
        """
        if self._provider != "cpu":
            return None
        return session_memory(self._path, self._feeds(batch), self._threads)

    def _on_host(self, feeds: Mapping[str, Array]) -> Call:
        """A call with arrays."""
        return lambda: self._session.run(None, feeds)

    def _on_device(self, feeds: Mapping[str, Array], device: str = "cuda") -> Call:
        """A call whose inputs and outputs lie where the session computes."""
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array, device, 0))
        for entry in self._session.get_outputs():
            binding.bind_output(entry.name, device)
        return lambda: self._session.run_with_iobinding(binding)

    def _feeds(self, batch: int) -> dict[str, Array]:
        """The inputs at a batch size, if the graph takes it."""
        feeds = session_feeds(self._session, resized(self._arguments, batch).arguments)
        for entry in self._session.get_inputs():
            size, given = (entry.shape or [None])[0], feeds[entry.name].shape[:1]
            if isinstance(size, int) and given == (batch,) and size != batch:
                raise InputError(
                    f"the graph takes batch size {size} only, not {batch}",
                    where=f"candidate {self._name!r}, input {entry.name!r}",
                    remedy=f"use batch size {size}; a model whose code takes any batch size "
                    "is exported for any",
                )
        return feeds


def _refuse_fallback(session: InferenceSession, provider: str) -> None:
    """Refuse a session that does not run on the provider asked for."""
    wanted, used = CHAINS[provider][0], session.get_providers()[0]
    if used != wanted:
        raise InputError(
            f"onnxruntime could not start {wanted} and fell back to {used}",
            where=f"provider={provider!r}",
            remedy="its log above names the library that does not load; install that, "
            'or use provider="cpu"',
        )
