"""Operator rules, one family a file; importing the package fills the table."""

from depcut.ops import (  # noqa: F401  (imported for the rules they register)
    attention,
    contraction,
    convolution,
    indexing,
    join,
    normalization,
    pointwise,
    recurrent,
    reduction,
    shape,
)
