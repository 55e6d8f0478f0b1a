"""Which of many like cases run by default: the others run with `-m sweep`, one analysis a net."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest
from nets import NETS
from oracle import all_tensors

import depcut

# One net of each kind of coupling. Every net is cut by `test_structures.py` by default; a property
# that holds for all of them is shown on these.
SAMPLE = """
plain residual concat halves_swapped grouped transposed_grouped attention_gqa_expand
vision_transformer lstm tied_embedding
""".split()


def sampled(cases: Iterable[str] | Mapping[str, Any], quick: Collection[str] = SAMPLE) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`, all but the quick ones marked as a sweep.

    Args:
        cases: Names, each its own parameter, or parameters by name.
        quick: Names of the cases that run by default; each is one of the cases.
    """
    given = cases if isinstance(cases, Mapping) else {name: name for name in cases}
    assert set(quick) <= set(given), f"no such cases: {set(quick) - set(given)}"
    return [
        pytest.param(value, id=name, marks=() if name in quick else pytest.mark.sweep)
        for name, value in given.items()
    ]


def swept(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters of which the sweep takes every nth; the others run with `-m exhaustive`.

    Args:
        cases: Parameters, or tuples of them.
        every: How many cases there are to one of the sweep.
    """
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=pytest.mark.exhaustive if number % every else pytest.mark.sweep,
        )
        for number, case in enumerate(cases)
    ]


def analysis_of(name: str) -> depcut.Analysis:
    """The analysis of a net for a batch of two, made once a process; it is only read."""
    analysis, before = _analysed(name)
    assert _state(analysis) == before, f"a test changed the shared {name!r}"
    return analysis


@functools.cache
def _analysed(name: str) -> tuple[depcut.Analysis, object]:
    analysis = depcut.analyze(NETS[name].build(), NETS[name].inputs(2))
    return analysis, _state(analysis)


def _state(analysis: depcut.Analysis) -> object:
    """What a test could change of a model: values by their version, gradients, modes, hooks."""
    tensors = all_tensors(analysis.model)
    modules = list(analysis.model.modules())
    return (
        {name: (id(t), t._version, t.requires_grad, t.grad is None) for name, t in tensors.items()},
        [(id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
    )
