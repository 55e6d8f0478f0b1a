"""Which inputs of a model are ids of tokens, and which output predicts them: found, not named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from depcut.capture.capture import is_symbolic
from depcut.capture.convention import convention_of
from depcut.capture.held import held_tensors
from depcut.graph.arguments import argument
from depcut.graph.operators import base_name, is_item
from depcut.support.failures import reraise_fatal
from depcut.synthetic.floats import Tensors, layout
from depcut.synthetic.subject import Leaves, Subject

# Operators of which a result holds ids as they were, in another layout or in part.
_CARRIES = frozenset(
    {
        *("view", "reshape", "_unsafe_view", "flatten", "expand", "expand_as", "repeat"),
        *("unsqueeze", "squeeze", "slice", "select", "transpose", "permute", "t", "alias"),
        *("clone", "contiguous", "detach", "to", "_to_copy", "clamp", "masked_fill", "where"),
        *("cat", "copy", "split", "chunk", "unbind"),
    }
)

LENGTH = 128  # tokens of a text, where the captured ones are shorter and the model takes it
_OFFSET = 8  # rows that a table of positions may have in front of the first position


@dataclass(frozen=True)
class TokenInput:
    """A flat input whose ids choose the rows of a table.

    Attributes:
        leaf: Its position among the flat inputs.
        table: Name of the table: a parameter, or a buffer.
        size: Rows of the table: ids are below it.
        dim: Along which the tokens of one example follow one another.
    """

    leaf: int
    table: str
    size: int
    dim: int = 1


class Texts:
    """How inputs of a model that reads tokens are put together.

    Masks, token types, positions and all else stay as in the captured example, row for row; images
    and sounds of an example that was made are drawn anew.

    Args:
        subject: What inputs are made for.
        model: `subject.own_model()`, which runs.
        inputs: The token inputs, `token_inputs(subject)`.
    """

    def __init__(self, subject: Subject, model: nn.Module, inputs: tuple[TokenInput, ...]) -> None:
        self.subject, self.model, self.inputs = subject, model, inputs
        self.example = subject.leaves
        self._batched = batched(subject)

    @cached_property
    def device(self) -> torch.device:
        """Of the token inputs."""
        device: torch.device = self.example[self.inputs[0].leaf].device
        return device

    @cached_property
    def masks(self) -> list[int]:
        """Positions of the inputs that are ones, a whole number for each token, and no ids."""
        own = {t.leaf for t in self.inputs}
        shapes = {self.example[i].shape for i in own}
        return [
            number
            for number, leaf in enumerate(self.example)
            if isinstance(leaf, torch.Tensor)
            and (number not in own and leaf.shape in shapes)
            and leaf.dtype in (torch.int32, torch.int64, torch.bool)
            and bool((leaf == 1).all())
        ]

    def table(self, tokens: TokenInput) -> torch.Tensor:
        """The rows that the ids of an input choose.

        Args:
            tokens: The input.
        """
        return held_tensors(self.model)[tokens.table].detach()

    def length(self, tokens: TokenInput) -> int:
        """Tokens of one example."""
        return int(self.example[tokens.leaf].shape[1])

    def lengths(self, tokens: TokenInput) -> list[int]:
        """Lengths that texts of an input may have, by preference; the model may take fewer.

        Args:
            tokens: The input.
        """
        captured = self.length(tokens)
        longer = [n for n in (LENGTH, LENGTH // 2, LENGTH // 4) if captured <= n // 2]
        longer = longer if captured < LENGTH // 2 else []
        if self.device.type != "cpu":
            # A position behind the end of a table ends all work of a device: none is tried there.
            tables = {size for size in self._other_tables if size >= captured}
            longer = [n for n in longer if all(size >= n + _OFFSET for size in tables)]
        return [*longer, captured, *(n for n in (LENGTH, LENGTH // 4) if n < captured)]

    @cached_property
    def _other_tables(self) -> list[int]:
        """Rows of the tables that ids of something else than tokens are looked up in."""
        program, own = self.subject.program, {t.table for t in self.inputs}
        weights = [
            argument(node, "weight")
            for node in program.graph.graph.nodes
            if base_name(node) == "embedding"
        ]
        return [program.sizes[w][0] for w in weights if program.tensors.get(w) not in own]

    def rows(self, wanted: int) -> int:
        """Examples that one call may have.

        Args:
            wanted: How many there should be.
        """
        return wanted if any(self._batched) else self.subject.program.batch

    def leaves(self, ids: Mapping[int, torch.Tensor]) -> Leaves | None:
        """Flat inputs with these ids; all else as in the example, as long as the ids are.

        Args:
            ids: (rows, length) for each token input, by its leaf.

        Returns:
            None where it is not known how an input would go on.
        """
        count = next(iter(ids.values())).shape[0]
        lengths: dict[int, int] = {}
        unclear = set()
        for i, value in ids.items():
            old = self.example[i].shape[1]
            if lengths.setdefault(old, value.shape[1]) != value.shape[1]:
                unclear.add(old)
        noise = self._noise(count)
        out: Leaves = []
        for number, leaf in enumerate(self.example):
            given = ids.get(number)
            if given is not None:
                out.append(given.to(leaf.dtype))
                continue
            if not isinstance(leaf, torch.Tensor):
                out.append(leaf)
                continue
            drawn = noise.get(number)
            if drawn is not None:
                out.append(drawn.to(leaf.dtype))
                continue
            resized = None if unclear & set(leaf.shape[1:]) else _resized(leaf, lengths)
            if resized is None:
                return None
            out.append(self._repeated(number, resized, count))
        return out

    def call(self, ids: Mapping[int, torch.Tensor]) -> list[Any] | None:
        """The flat outputs for ids; None where the model does not take them.

        Args:
            ids: (rows, length) for each token input, by its leaf.
        """
        leaves = self.leaves(ids)
        if leaves is None:
            return None
        try:
            with torch.no_grad():
                return self.subject.call(self.model, leaves)
        except Exception as error:  # noqa: BLE001  a length that the forward does not take
            reraise_fatal(error)
            return None

    def _noise(self, rows: int) -> Tensors:
        """What stands beside the tokens as data, where no real example of it was given."""
        plan = layout(self.subject)
        if not (self.subject.program.made and plan.made) or plan.rows is not None:
            return {}
        return plan.noise(rows, self.subject.generator(5), plan.scales()[0])

    def _repeated(self, number: int, leaf: torch.Tensor, rows: int) -> torch.Tensor:
        if not self._batched[number] or not leaf.ndim or len(leaf) == rows:
            return leaf
        return leaf[torch.arange(rows, device=leaf.device) % len(leaf)]


def first_token(texts: Texts, tokens: TokenInput) -> int | None:
    """The special token that every text starts with; None where there is none.

    It is one that the example starts with, or, where the example was made for the capture, the one
    that the model's library names.

    Args:
        texts: The model's inputs.
        tokens: The input.
    """
    convention = convention_of(texts.subject.model)
    if convention is None:
        return None
    named = convention.first_tokens(texts.subject.model)
    starts = {int(i) for i in texts.example[tokens.leaf][:, 0]}
    known = named[:1] if texts.subject.program.made else [i for i in named if {i} == starts]
    return next((i for i in known if 0 <= i < tokens.size), None)


def fixed_tokens(texts: Texts, tokens: TokenInput) -> dict[int, int]:
    """Special tokens by their places from the start (or, below zero, from the end) of a text.

    They are those that all rows of a given example begin or end with, where the rows differ.

    Args:
        texts: The model's inputs.
        tokens: The input.
    """
    example = texts.example[tokens.leaf]
    if texts.subject.program.made or bool((example == example[:1]).all()):
        first = first_token(texts, tokens)
        return {} if first is None else {0: first}
    same = (example == example[:1]).all(0).tolist()
    return {place: int(example[0, place]) for place in (0, -1) if same[place]}


def _resized(leaf: torch.Tensor, lengths: Mapping[int, int]) -> torch.Tensor | None:
    """An input that is as long as the tokens, at their new length: cut, or gone on with.

    Args:
        leaf: The input.
        lengths: New lengths by captured ones.

    Returns:
        None where it is neither constant nor counts along a dimension that must become longer.
    """
    for dim in range(1 if leaf.ndim > 1 else 0, leaf.ndim):
        old = leaf.shape[dim]
        new = lengths.get(old, old)
        if new <= old:
            leaf = leaf.narrow(dim, 0, new)
            continue
        last = leaf.narrow(dim, old - 1, 1)
        step = last - leaf.narrow(dim, old - 2, 1) if old > 1 and leaf.dtype != torch.bool else None
        constant = bool((leaf == last).all())
        if not constant and (step is None or bool((leaf.diff(dim=dim) != step).any())):
            return None
        more = last.expand(*leaf.shape[:dim], new - old, *leaf.shape[dim + 1 :])
        if not constant and step is not None:
            shape = [1] * leaf.ndim
            shape[dim] = new - old
            more = more + step * torch.arange(1, new - old + 1, device=leaf.device).view(shape)
        leaf = torch.cat([leaf, more.to(leaf.dtype)], dim)
    return leaf


def batched(subject: Subject) -> list[bool]:
    """For each flat input, whether its first dimension may have any size.

    Args:
        subject: What inputs are made for.
    """
    leaves, nodes = subject.leaves, subject.program.inputs
    if len(nodes) != len(leaves):
        return [False] * len(leaves)
    values = [node.meta.get("val") for node in nodes]
    return [isinstance(v, torch.Tensor) and v.ndim > 0 and is_symbolic(v) for v in values]


def token_inputs(subject: Subject) -> tuple[TokenInput, ...]:
    """The inputs whose ids are of tokens: those of positions and token types are told apart.

    Args:
        subject: What inputs are made for.

    Returns:
        Empty where there is none.
    """
    leaves, nodes = subject.leaves, subject.program.inputs
    if len(nodes) != len(leaves):
        return ()
    found: list[TokenInput] = []
    for number, (leaf, node) in enumerate(zip(leaves, nodes, strict=True)):
        whole = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.int32, torch.int64)
        if not whole or leaf.ndim != 2 or _counts(leaf):
            continue
        table = _table(subject, node)
        if table is not None:
            found.append(TokenInput(number, *table))
    varied = [t for t in found if bool((leaves[t.leaf] != leaves[t.leaf][:, :1]).any())]
    found = varied or found
    # Token types are few where ids are many.
    largest = max((t.size for t in found), default=0)
    return tuple(t for t in found if t.size**2 >= largest)


def _counts(leaf: torch.Tensor) -> bool:
    """Whether each row counts up by one: ids of positions."""
    return leaf.shape[1] > 1 and bool((leaf.diff(dim=1) == 1).all())


def _table(subject: Subject, node: fx.Node) -> tuple[str, int] | None:
    """Name and rows of the table that an input chooses rows of; the smallest of several."""
    program = subject.program
    seen, waiting = {node}, [node]
    found: list[tuple[int, str]] = []
    while waiting:
        current = waiting.pop()
        for user in current.users:
            name = base_name(user)
            if name in ("embedding", "embedding_bag"):
                weight, indices = argument(user, "weight"), argument(user, "indices")
                if indices is current and weight in program.tensors:
                    found.append((program.sizes[weight][0], program.tensors[weight]))
            elif user not in seen and (name in _CARRIES or is_item(user)):
                seen.add(user)
                waiting.append(user)
    if not found:
        return None
    size, table = min(found)  # ids choose rows of all of them
    return table, size
