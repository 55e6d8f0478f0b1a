"""Operators, one family a file: axis rule, literals, MACs, taint, product form, calibration site.

Importing the package fills the tables.
"""

from depcut.ops import (  # noqa: F401  (imported for what they register)
    attention,
    contraction,
    convolution,
    einsum,
    indexing,
    join,
    normalization,
    pointwise,
    recurrent,
    reduction,
    shape,
    windows,
)
