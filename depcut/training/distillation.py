"""Distillation: the dense model teaches the smaller one, by its outputs and its hidden states.

Sources: Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (outputs); Romero et al.,
FitNets, ICLR 2015 (hidden states). No projection is needed between widths: the plan says which
indices of a dense activation the smaller model computes.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from depcut.apply.plan import Plan
from depcut.axes import Dims
from depcut.calibration.data import moved
from depcut.capture.clone import clone
from depcut.capture.inputs import device_of
from depcut.capture.plain import check_whole
from depcut.errors import InputError, listed
from depcut.plan.stacks import name_now, stacks_of
from depcut.reference.run import kept_part
from depcut.rewrite.copying import copied
from depcut.support.checks import check_function, check_integer, check_names, check_number
from depcut.support.torch_private import pytree
from depcut.training.distance import bound

Logits = Callable[[Any], torch.Tensor]
_EPSILON = 1e-12
_DIMENSIONS = 64  # of a tensor, at most


class Distillation:
    """Losses between a dense model and a smaller one, for any loop.

        with depcut.training.Distillation(dense, slim, plan, hidden=("layer*",)) as distill:
            for x, y in loader:
                output = slim(x)
                loss = 0.5 * cross_entropy(output, y) + 0.5 * distill(output, x)

    The loss is w_out * T^2 * KL(softmax(dense / T) || softmax(slim / T)), the mean over all
    examples, plus w_hid times the mean over layers of |slim - kept part of dense|^2, relative to
    the mean square of that part. A clone of the dense model runs in eval mode without gradients: it
    shares the parameters, and is made anew if the model gets other tensors.

    Args:
        dense: The teacher.
        slim: The student.
        plan: That made the student from the teacher.
        temperature: T of the softmax.
        output_weight: w_out; 0 leaves outputs aside.
        hidden: Globs over the names of the modules whose results are compared.
        hidden_weight: w_hid.
        share: Of this loss in the sum with the task's, where `retrain` adds them up.
        logits: Gets the logits out of what a model returns; left out, the result itself or its
            `logits`.
        dim: Dimension of the classes.

    Raises:
        InputError: An option is out of its range, or a glob matches no layer of both models.
        PlanError: The dense model has another architecture.
    """

    def __init__(
        self,
        dense: nn.Module,
        slim: nn.Module,
        plan: Plan,
        *,
        temperature: float = 2.0,
        output_weight: float = 1.0,
        hidden: Sequence[str] = (),
        hidden_weight: float = 1.0,
        share: float = 0.5,
        logits: Logits | None = None,
        dim: int = -1,
    ) -> None:
        for name, weight in (("output_weight", output_weight), ("hidden_weight", hidden_weight)):
            check_number(weight, name, "pass a number that is not negative", least=0)
        dense, slim = check_whole(dense, "dense"), check_whole(slim, "slim")
        dim = check_integer(dim, "dim", -_DIMENSIONS, _DIMENSIONS)
        if logits is not None:
            check_function(logits, "logits", "pass a function of what a model returns")
        remedy = "temperature is positive, share between 0 and 1"
        temperature = check_number(temperature, "temperature", remedy, above=0)
        share = check_number(share, "share", remedy, least=0, most=1)
        self.dense, self.slim, self.share = dense, slim, share
        self._teacher: tuple[list[Any], nn.Module] | None = None
        self.plan = bound(plan, dense)
        self.temperature, self.dim, self.logits = temperature, dim, logits
        self.output_weight, self.hidden_weight = output_weight, hidden_weight
        self.hidden = check_names(hidden, "hidden", "pass globs over names of modules")
        if not output_weight and not (self.hidden and hidden_weight):
            raise InputError(
                "nothing is compared: output_weight is 0 and there are no hidden layers",
                where="Distillation",
                remedy="pass hidden= names of layers, or an output_weight",
            )
        self.keep = self.plan.keep()
        self._places = self._layers()
        self._seen: list[tuple[str, Any]] = []
        self._handles: list[RemovableHandle] = []
        self.open()

    def _layers(self) -> dict[str, list[tuple[int, Dims]]]:
        """By layer compared, for every call: position of the result's leaf, and its terms."""
        env = self.keep.coupling.env
        layers: dict[str, list[tuple[int, Dims]]] = {}
        for call in self.keep.coupling.program.calls:
            for position, node in enumerate(call.out_leaves):
                dims = env.get(node) if isinstance(node, fx.Node) else None
                if isinstance(dims, tuple):
                    layers.setdefault(call.module, []).append((position, dims))
                    break
        theirs = dict(self.slim.named_modules())
        known = [name for name in layers if name and self._name_in_slim(name) in theirs]
        chosen: dict[str, list[tuple[int, Dims]]] = {}
        for pattern in self.hidden:
            names = fnmatch.filter(known, pattern)
            if not names:
                raise InputError(
                    f"{pattern!r} matches no layer that both models have",
                    where="hidden=",
                    remedy=f"layers are {listed(known)}",
                )
            chosen.update((name, layers[name]) for name in names)
        return chosen

    def _name_in_slim(self, name: str) -> str | None:
        """What a layer of the teacher is called in the student; None where it is gone."""
        return name_now(name, stacks_of(self.plan.settings))

    def open(self) -> None:
        """Register the hooks that record what the student's layers return."""
        if self._handles or not self._places:
            return
        self._seen.clear()
        root = self.slim.register_forward_pre_hook(lambda *_: self._seen.clear())
        names = {name: self._name_in_slim(name) or "" for name in self._places}
        self._handles = [root, *_listen(self.slim, names, self._seen)]

    def close(self) -> None:
        """Remove the hooks; `open` puts them back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without hooks for the time of the context."""
        was_open = bool(self._handles)
        self.close()
        try:
            yield
        finally:
            if was_open:
                self.open()

    def __enter__(self) -> Distillation:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, slim: nn.Module, device: torch.device | None = None) -> Distillation:
        """The same for another instance of the student, with the teacher on its device.

        Args:
            slim: The student.
            device: Where the teacher shall be; it is copied if it is elsewhere.
        """
        new = Distillation(
            self.dense,
            slim,
            self.plan,
            temperature=self.temperature,
            output_weight=self.output_weight,
            hidden=self.hidden,
            hidden_weight=self.hidden_weight,
            share=self.share,
            logits=self.logits,
            dim=self.dim,
        )
        here = device_of(self.dense)
        if device is not None and (here.type, here.index or 0) != (device.type, device.index or 0):
            new.dense = copied(self.dense, {}).to(device)
        return new

    def __call__(self, output: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the student's latest forward.

        Args:
            output: What it returned.
            *args: What it was called with.
            **kwargs: What it was called with.

        Raises:
            InputError: No logits are found, or the student has not run.
        """
        mine, self._seen[:] = list(self._seen), []
        theirs: list[tuple[str, Any]] = []
        args, kwargs = moved((args, kwargs), device_of(self.dense))
        teacher = self._running()
        handles = _listen(teacher, {name: name for name in self._places}, theirs)
        try:
            with torch.no_grad():
                target = teacher(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        losses = []
        if self.output_weight:
            losses.append(self.output_weight * self._outputs(output, target))
        if self._places and self.hidden_weight:
            losses.append(self.hidden_weight * self._hidden(mine, theirs))
        return torch.stack(losses).sum()

    def _running(self) -> nn.Module:
        """The clone of the dense model that runs."""
        tensors = (*self.dense.parameters(), *self.dense.buffers())
        now = [entry for tensor in tensors for entry in (tensor, tensor.device)]
        before, teacher = self._teacher or ([], None)
        same = len(now) == len(before) and all(
            a is b if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(now, before, strict=True)
        )
        if teacher is None or not same:
            teacher = clone(self.dense, buffers=True)
            self._teacher = now, teacher
        return teacher

    def _outputs(self, output: Any, target: Any) -> torch.Tensor:
        student, teacher = self._logits(output), self._logits(target)
        teacher = teacher.to(student.device)
        if student.shape != teacher.shape:
            raise InputError(
                f"the student's logits have shape {tuple(student.shape)}, the teacher's "
                f"{tuple(teacher.shape)}",
                where="Distillation",
                remedy="call distill(output, *inputs) with the inputs of that very output",
            )
        soft = functional.log_softmax(student.float() / self.temperature, self.dim)
        aim = functional.log_softmax(teacher.float() / self.temperature, self.dim)
        apart = functional.kl_div(soft, aim, reduction="none", log_target=True).sum(self.dim)
        return apart.mean() * self.temperature**2

    def _logits(self, output: Any) -> torch.Tensor:
        logits = output if self.logits is None else self.logits(output)
        if isinstance(logits, Mapping) and "logits" in logits:
            logits = logits["logits"]
        logits = logits if isinstance(logits, torch.Tensor) else getattr(logits, "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise InputError(
                f"no logits are found in a {type(output).__name__}",
                where="Distillation",
                remedy="pass logits=, a function that gets them out of what the model returns",
            )
        return logits

    def _hidden(self, mine: list[tuple[str, Any]], theirs: list[tuple[str, Any]]) -> torch.Tensor:
        if [name for name, _ in mine] != [name for name, _ in theirs] or not mine:
            raise InputError(
                f"the student's layers ran {len(mine)} times, the teacher's {len(theirs)} times",
                where="Distillation, hidden=",
                remedy="call distill(output, *inputs) once after each forward of the student, "
                "while it is open",
            )
        calls = {name: iter(places) for name, places in self._places.items()}
        losses = []
        for (name, student), (_, teacher) in zip(mine, theirs, strict=True):
            place = next(calls[name], None)
            if place is None:
                continue  # more calls than when it was captured
            position, dims = place
            got, want = (pytree.tree_leaves(value)[position] for value in (student, teacher))
            want = kept_part(want, self.keep, dims).to(got.device).float()
            scale = want.square().mean().clamp_min(_EPSILON)
            losses.append((got.float() - want).square().mean() / scale)
        return torch.stack(losses).mean()


def _listen(
    model: nn.Module, names: Mapping[str, str], seen: list[tuple[str, Any]]
) -> list[RemovableHandle]:
    """Hooks that note what layers return, by what they are called in the teacher."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, result: seen.append((name, result))

    modules = dict(model.named_modules())
    return [modules[own].register_forward_hook(hook(name)) for name, own in names.items()]
