"""Numbers are of the right kind and in their range, or refused by the name of their argument."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from depcut.errors import InputError
from depcut.support.checks import check_integer, check_number


@pytest.mark.parametrize("value", [2, 3, np.int64(2), np.uint8(7), np.array(5), 10**30])
def test_integers(value: Any) -> None:
    found = check_integer(value, "steps", 2)
    assert type(found) is int
    assert found == value


@pytest.mark.parametrize(
    "value",
    [1, -3, np.int32(1), True, False, np.True_, 2.0, np.float64(3), "2", None, [2], torch.eye(2)],
)
def test_no_integer_in_the_range(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        check_integer(value, "steps", 2)
    assert caught.value.what == f"steps is {value!r}"
    assert caught.value.where == "steps="
    assert caught.value.remedy == "pass an integer of at least 2"


def test_an_integer_has_a_largest_value() -> None:
    assert check_integer(25, "opset", 18, 25) == 25
    with pytest.raises(InputError) as caught:
        check_integer(26, "opset", 18, 25)
    assert caught.value.remedy == "pass an integer from 18 to 25"


def test_the_words_can_be_chosen() -> None:
    with pytest.raises(InputError) as caught:
        check_integer(0, "threads", 1, what="threads=0", where="bench", remedy="pass 1 or more")
    error = caught.value
    assert (error.what, error.where, error.remedy) == ("threads=0", "bench", "pass 1 or more")
    with pytest.raises(InputError) as caught:
        check_number(0, "lr", "pass more", above=0, what="no rate", where="optimizer")
    error = caught.value
    assert (error.what, error.where, error.remedy) == ("no rate", "optimizer", "pass more")


@pytest.mark.parametrize("value", [1, 1.5, np.float32(1.5), np.int64(1), Fraction(3, 2)])
def test_numbers(value: Any) -> None:
    found = check_number(value, "x", "pass", above=0)
    assert type(found) is float
    assert found == float(value)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, True, np.True_, "1", None, [1], 1j, Decimal(1), torch.ones(())],
)
def test_what_is_no_finite_number(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        check_number(value, "x", "pass a number")
    assert caught.value.what == f"x is {value!r}"
    assert (caught.value.where, caught.value.remedy) == ("x=", "pass a number")


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        ({"above": 0}, [1e-300], [0, -0.0, -1]),
        ({"least": 0}, [0, 1], [-1e-300]),
        ({"below": 1}, [0.999], [1, np.float64(1)]),
        ({"most": 1}, [1, -5], [1 + 1e-15]),
        ({"above": 0, "below": 1}, [0.5], [0, 1, math.nan]),
    ],
)
def test_ranges(limits: dict[str, float], inside: list[Any], outside: list[Any]) -> None:
    assert [check_number(value, "x", "pass", **limits) for value in inside] == inside
    for value in outside:
        with pytest.raises(InputError):
            check_number(value, "x", "pass", **limits)
