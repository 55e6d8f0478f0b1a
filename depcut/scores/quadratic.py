"""The two matrices of greedy elimination, each in the smaller of two forms.

H^-1, the inverse of a damped covariance of inputs, and G = W^T W over the outputs; both are
(blocks, in, in). Where the columns S go, with T = ((H^-1)_SS)^-1 (H^-1)_S and E picking S, H^-1
loses (H^-1)_S^T T and G becomes (I - E T)^T G (I - E T). Rows and columns of what is gone hold
nothing of use until they are dropped. Thin factors are held turned, one row an input: rows can be
picked fast.

Either may be in single precision (u = 6e-8), in units in which nothing leaves its range. H^-1 is at
most 1 / c, c being the damping, and only shrinks, so that each update adds an error of about u / c;
a block (H^-1)_SS is at least 1 / e, e being the largest eigenvalue of H_SS. The error of what
removing S costs is hence about u e / c of it times the number of updates, at most 64; with errors
of random signs, its square root. The factorisation adds u sqrt(in) times the mean variance over c.
Measured on 3 x 3 patches of images, 1152 to 4608 columns, c a hundredth of the mean variance: costs
differ by less than 1e-4, by 6e-4 where means are ten times the deviations and count, and units go
in the same order.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Inverse(Protocol):
    """H^-1."""

    def own(self, at: torch.Tensor) -> torch.Tensor:
        """Blocks on the diagonal (blocks, units, wide, wide), for columns (blocks, units, wide)."""

    def rows(self, gone: torch.Tensor) -> torch.Tensor:
        """Rows (blocks, gone, in), for columns (blocks, gone)."""

    def remove(self, gone: torch.Tensor, across: torch.Tensor, through: torch.Tensor) -> None:
        """Lose across^T through: `rows` of what is gone, and T."""

    def compact(self, left: torch.Tensor) -> None:
        """Keep the columns (blocks, left) alone."""


class Gram(Protocol):
    """G."""

    def own(self, at: torch.Tensor) -> torch.Tensor:
        """Blocks on the diagonal (blocks, units, wide, wide), for columns (blocks, units, wide)."""

    def remove(self, gone: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
        """Re-solve without columns (blocks, gone) by T; the block of G that they were."""

    def compact(self, left: torch.Tensor) -> None:
        """Keep the columns (blocks, left) alone."""


class FullInverse:
    """H^-1 as it is.

    Args:
        matrix: (blocks, in, in); written to.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def own(self, at: torch.Tensor) -> torch.Tensor:
        """See `Inverse`."""
        return _own(self.matrix, at)

    def rows(self, gone: torch.Tensor) -> torch.Tensor:
        """See `Inverse`."""
        return _picked(self.matrix, gone)

    def remove(self, gone: torch.Tensor, across: torch.Tensor, through: torch.Tensor) -> None:  # noqa: ARG002  (of `Inverse`)
        """See `Inverse`."""
        self.matrix.baddbmm_(across.transpose(1, 2), through, alpha=-1)

    def compact(self, left: torch.Tensor) -> None:
        """See `Inverse`."""
        self.matrix = _compacted(self.matrix, left)


class ThinInverse:
    """H^-1 = (I - V^T V) / c, where fewer vectors X were read than they are long.

    H = X^T X + c I, hence V = L^-1 X with L L^T = X X^T + c I (Woodbury). What is left of V without
    S is (I - V_S V_S^T)^-1/2 V.

    Args:
        vectors: X, (blocks, vectors, in).
        damping: c by block, positive; about 1e-16 of the largest eigenvalue over c is lost of
            what differs from I.
        lowered: Whether to go on with c H^-1, in single precision.
    """

    def __init__(
        self, vectors: torch.Tensor, damping: torch.Tensor, *, lowered: bool = False
    ) -> None:
        system = vectors @ vectors.transpose(1, 2)
        system.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        torch.linalg.cholesky(system, out=system)
        thin = torch.linalg.solve_triangular(system, vectors, upper=False)
        kind, self.damping = thin.dtype, damping[:, None, None]
        if lowered:
            kind = torch.float32
            self.damping = torch.ones_like(self.damping, dtype=kind)
        turned = thin.transpose(1, 2)
        self.turned = turned.to(kind, memory_format=torch.contiguous_format).contiguous()

    def own(self, at: torch.Tensor) -> torch.Tensor:
        """See `Inverse`."""
        product = _own_product(self.turned, at)
        own: torch.Tensor = torch.eye(at.shape[2]).to(product) - product
        return own / self.damping[..., None]

    def rows(self, gone: torch.Tensor) -> torch.Tensor:
        """See `Inverse`."""
        rows: torch.Tensor = -(_picked(self.turned, gone) @ self.turned.transpose(1, 2))
        rows.scatter_add_(2, gone[..., None], torch.ones_like(rows[..., :1]))
        return rows.div_(self.damping)

    def remove(self, gone: torch.Tensor, across: torch.Tensor, through: torch.Tensor) -> None:  # noqa: ARG002  (of `Inverse`)
        """See `Inverse`: with P = V_S^T V_S, V becomes V + V_S M V_S^T V.

        (I - V_S V_S^T)^-1/2 = I + V_S M V_S^T, M = ((I - P)^-1/2 - I) P^-1 by eigenvalues.
        """
        picked = _picked(self.turned, gone)
        inner = -self.damping * across  # V_S^T V, but for the identity
        inner.scatter_add_(2, gone[..., None], torch.ones_like(inner[..., :1]))
        left, directions = torch.linalg.eigh(self.damping * columns_of(across, gone))
        root = left.clamp_min(1e-30).sqrt()  # of I - P, which the damping keeps positive
        scale = 1 / (root * (1 + root))
        middle = directions * scale[:, None, :] @ directions.transpose(1, 2)
        self.turned.baddbmm_((middle @ inner).transpose(1, 2), picked)

    def compact(self, left: torch.Tensor) -> None:
        """See `Inverse`."""
        self.turned = _picked(self.turned, left)


class FullGram:
    """G as it is.

    Args:
        matrix: (blocks, in, in); written to.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def own(self, at: torch.Tensor) -> torch.Tensor:
        """See `Gram`."""
        return _own(self.matrix, at)

    def remove(self, gone: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
        """See `Gram`."""
        square, turned = block(self.matrix, gone, gone), through.transpose(1, 2)
        half = _picked(self.matrix, gone).transpose(1, 2) - 0.5 * turned @ square
        self.matrix.baddbmm_(half, through, alpha=-1)
        self.matrix.baddbmm_(turned, half.transpose(1, 2), alpha=-1)
        return square

    def compact(self, left: torch.Tensor) -> None:
        """See `Gram`."""
        self.matrix = _compacted(self.matrix, left)


class ThinGram:
    """G = W^T W, where there are fewer outputs than inputs.

    Args:
        weight: W, (blocks, out, in).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.turned = weight.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def own(self, at: torch.Tensor) -> torch.Tensor:
        """See `Gram`."""
        return _own_product(self.turned, at)

    def remove(self, gone: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
        """See `Gram`."""
        picked = _picked(self.turned, gone)
        self.turned.baddbmm_(through.transpose(1, 2), picked, alpha=-1)
        return picked @ picked.transpose(1, 2)

    def compact(self, left: torch.Tensor) -> None:
        """See `Gram`."""
        self.turned = _picked(self.turned, left)


def inverted(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of positive definite matrices, which are overwritten on the CPU.

    Args:
        matrix: (blocks, in, in), contiguous.

    Raises:
        torch.linalg.LinAlgError: One is not positive definite.
    """
    if matrix.device.type != "cpu":
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    # LAPACK counts by columns; a symmetric matrix turned is the same one.
    turned = matrix.transpose(1, 2)
    torch.linalg.cholesky(turned, out=turned)
    torch.cholesky_inverse(turned, out=turned)
    return matrix


def block(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Rows and columns (batch, any number each) of a batch of matrices."""
    batch = torch.arange(len(matrix))[:, None, None]
    return matrix[batch, rows[:, :, None], columns[:, None, :]]


def _picked(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows (batch, any number) of a batch of matrices."""
    if len(matrix) == 1:
        return matrix[0].index_select(0, rows[0])[None]
    return matrix[torch.arange(len(matrix))[:, None], rows]


def columns_of(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns (batch, any number) of a batch of matrices."""
    return matrix.gather(2, columns[:, None, :].expand(-1, matrix.shape[1], -1))


def _compacted(matrix: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Rows and columns (batch, left) of a batch of symmetric matrices."""
    if len(matrix) == 1:
        return matrix[0].index_select(0, left[0]).index_select(1, left[0])[None]
    return block(matrix, left, left)


def _own(matrix: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    if at.shape[2] == 1:
        return matrix.diagonal(dim1=1, dim2=2).gather(1, at[..., 0])[..., None, None]
    batch = torch.arange(len(matrix))[:, None, None, None]
    return matrix[batch, at[..., :, None], at[..., None, :]]


def _own_product(turned: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Blocks on the diagonal of F F^T (blocks, units, wide, wide), F (blocks, in, any)."""
    blocks, units, wide = at.shape
    if wide == 1:
        squares: torch.Tensor = torch.linalg.vector_norm(turned, dim=2).square()
        return squares.gather(1, at[..., 0])[..., None, None]
    picked = _picked(turned, at.reshape(blocks, -1)).unflatten(1, (units, wide))
    product: torch.Tensor = picked @ picked.transpose(2, 3)
    return product
