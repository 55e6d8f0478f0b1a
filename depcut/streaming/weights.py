"""The tensors of a model by its own names, read from its checkpoint one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from depcut.capture.held import aliases, held_tensors
from depcut.errors import InputError, listed
from depcut.reference.run import cast
from depcut.streaming.source import Source

PRECISION = torch.float32  # in which layers run, whatever their weights are stored in


class Weights(Mapping[str, Tensor]):
    """Parameters and buffers by the names that the model has for them; none is kept.

    Args:
        source: The checkpoint.
        model: Its parameters are on the meta device, buffers that no file holds have values.
    """

    def __init__(self, source: Source, model: nn.Module) -> None:
        self.source = source
        self._aliases = aliases(model)
        held = held_tensors(model)
        self._here = {name: tensor for name, tensor in held.items() if not tensor.is_meta}
        self.names = tuple(name for name in held if self.stored(name) or name in self._here)

    def stored(self, name: str) -> str | None:
        """The name under which the checkpoint holds a tensor; None where it does not.

        Args:
            name: As the model has it.
        """
        known = (name, *self._aliases.get(name, ()))
        return next((other for other in known if other in self.source), None)

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored(name)
        return self._here[name] if stored is None else self.source[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Single(Mapping[str, Tensor]):
    """Tensors in single precision, each converted when it is asked for.

    Args:
        weights: Tensors by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        converted: Tensor = cast(self._weights[name], PRECISION)
        return converted

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights


def check_fits(source: Source, model: nn.Module) -> tuple[str, ...]:
    """Check that a checkpoint holds the tensors that its config builds.

    Args:
        source: The checkpoint.
        model: The class, built from the config.

    Returns:
        The names of what is written of the smaller model: all that the class has. Others are left
        out, as from_pretrained leaves them out.

    Raises:
        InputError: A tensor is missing or has another shape.
    """
    state = model.state_dict(keep_vars=True)
    weights = Weights(source, model)
    known = [name for name in source if name in state]
    missing = [name for name in state if weights.stored(name) is None]
    if missing:
        others = [name for name in source if name not in state]
        more = f"; it holds {listed(others, 3)}, unknown to the class" if others else ""
        raise InputError(
            f"the checkpoint does not fit its config: {listed(missing, 3)} of "
            f"{type(model).__name__} are not in it{more}",
            where=str(source.folder),
            remedy="use depcut.shrink of the loaded model, and save_pretrained",
        )
    for name in known:
        built, there_is = tuple(state[name].shape), source.entries[name].shape
        if built != there_is:
            raise InputError(
                f"a tensor has shape {list(there_is)}, the config builds {list(built)}",
                where=f"{name} in {source.entries[name].file}",
                remedy="use the config that belongs to the weights",
            )
    return tuple(known)
