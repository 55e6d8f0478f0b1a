"""The kept parts of a model's tensors, by name, cut out when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch

from depcut.plan.keep import Keep
from depcut.reference.run import Tensors, kept_part


class Narrowed(MutableMapping[str, torch.Tensor]):
    """Kept parts of dense tensors; those that were set stand in their place.

    What is asked for is a copy of its own, which may be written to.

    Args:
        keep: What stays.
        dense: The dense tensors by name.
        changed: Where those that are set are put, and looked for; left out, they are held.
    """

    def __init__(
        self,
        keep: Keep,
        dense: Tensors,
        changed: MutableMapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._keep, self._dense = keep, dense
        self._changed = {} if changed is None else changed
        program = keep.coupling.program
        names = set(program.tensors.values()) - program.anonymous - keep.gone.tensors
        self._names = dict.fromkeys(sorted(name for name in names if name in dense))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._changed:
            return self._changed[name]
        if name not in self:
            raise KeyError(name)
        tensor = self._dense[name].detach()
        part = kept_part(tensor, self._keep, self._keep.coupling.dims[name])
        return part.clone() if part is tensor else part

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._changed[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._changed[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
