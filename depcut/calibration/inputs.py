"""What a weight reads: the vectors themselves while they are few, else their second moments."""

from __future__ import annotations

import torch

from depcut.calibration.products import Runs
from depcut.calibration.windows import Windows, WindowSums, kept
from depcut.support.processes import Processes


class Inputs:
    """Vectors x of a length, for each of several independent blocks.

    While they are fewer than they are long, they are kept as they are, which takes less memory than
    sums of x x^T and loses nothing; then the sums are, in double precision (see `Runs`).

    Attributes:
        count: Number of vectors.
    """

    def __init__(self) -> None:
        self.count = 0
        self._few: list[torch.Tensor | Windows] | None = []
        self._windows: WindowSums | None = None
        self._xx: torch.Tensor | None = None
        self._x: torch.Tensor | None = None

    def add(self, x: torch.Tensor | Windows) -> None:
        """Take vectors (blocks, vectors, length), or patches, whose sums may be had for less."""
        count, length = (x.count, x.length) if isinstance(x, Windows) else x.shape[1:]
        self.count += count
        if self._few is None:
            self._sum(x)
        else:
            self._few.append(kept(x))
            if self.count >= length:
                self._sum_few()

    def _sum(self, x: torch.Tensor | Windows) -> None:
        if isinstance(x, Windows):
            if self._windows is None:
                self._windows = WindowSums(x.taps)
            self._windows.add(x)
            return
        runs = Runs(x)
        self._add_sums(runs.gram(), runs.total())

    def _settle(self) -> None:
        """Have the sums of patches among the others."""
        if self._windows is not None:
            windows, self._windows = self._windows, None
            self._add_sums(windows.products(), windows.total())

    def _add_sums(self, xx: torch.Tensor, total: torch.Tensor) -> None:
        self._xx = xx if self._xx is None else self._xx.add_(xx)
        self._x = total if self._x is None else self._x.add_(total)

    def _sum_few(self) -> None:
        """Keep the sums of what was kept as it is."""
        few, self._few = self._few or [], None
        for x in few:
            self._sum(x)

    def join_processes(self, label: str, everyone: Processes) -> None:
        """Take the vectors of all processes in place of those of this one.

        Args:
            label: What reads them.
            everyone: The processes.
        """
        (total,) = everyone.total(f"vectors of {label}", self.count)
        if self._few is not None:
            mine = self._together(self._few)
            if total < mine.shape[2]:
                self._few = [everyone.concatenated(f"inputs of {label}", mine, 1)]
                self.count = round(total)
                return
            del mine
            self._sum_few()
        self._settle()
        assert self._xx is not None
        assert self._x is not None
        held = [self._xx, self._x]
        self._xx, self._x = everyone.summed(f"second moments of {label}", held)
        self.count = round(total)

    @staticmethod
    def _together(parts: list[torch.Tensor | Windows]) -> torch.Tensor:
        """Vectors that were kept as they are."""
        return torch.cat([p.vectors() if isinstance(p, Windows) else p for p in parts], 1)

    def vectors(self, centred: bool) -> torch.Tensor | None:
        """(blocks, vectors, length) in double precision, less their mean if asked for; None: many.

        Args:
            centred: Whether to subtract the mean.
        """
        if self._few is None:
            return None
        together = self._together(self._few).double()
        return together - together.mean(1, keepdim=True) if centred else together

    def products(self, centred: bool) -> torch.Tensor:
        """Sum of x x^T (blocks, length, length), of x less the mean if asked for.

        Args:
            centred: Whether to subtract the mean.
        """
        few = self.vectors(centred)
        if few is not None:
            return few.transpose(1, 2) @ few
        self._settle()
        assert self._xx is not None
        assert self._x is not None
        if not centred:
            return self._xx
        return self._xx - self._x[:, :, None] * (self._x / self.count)[:, None, :]

    def squares(self, centred: bool) -> torch.Tensor:
        """Sum of the squares by element (blocks, length), of x less the mean if asked for.

        Args:
            centred: Whether to subtract the mean.
        """
        few = self.vectors(centred)
        if few is not None:
            return few.square().sum(1)
        self._settle()
        assert self._xx is not None
        assert self._x is not None
        own = self._xx.diagonal(dim1=1, dim2=2)
        return own - self._x.square() / self.count if centred else own

    def energy(self, weight: torch.Tensor, centred: bool) -> float:
        """Sum of |W x|^2 over blocks and vectors, of x less the mean if asked for.

        Args:
            weight: W, (blocks, out, length).
            centred: Whether to subtract the mean.
        """
        few = self.vectors(centred)
        if few is not None:
            return float((weight @ few.transpose(1, 2)).square().sum())
        return float(((weight @ self.products(centred)) * weight).sum())
