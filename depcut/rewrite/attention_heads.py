"""Narrowed `nn.MultiheadAttention`: which heads are left and how wide, and the class that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn
from torch.nn.utils import parametrize

from depcut.plan.keep import Keep
from depcut.rewrite.attention import SlimMultiheadAttention, become_slim, slim_class

_STOCK = nn.MultiheadAttention
# Dimensions that run over heads, and what is laid end to end along them: queries, keys, values.
_LAID_OUT = (
    ("in_proj_weight", 0, "qkv"), ("in_proj_bias", 0, "qkv"), ("q_proj_weight", 0, "q"),
    ("k_proj_weight", 0, "k"), ("v_proj_weight", 0, "v"), ("bias_k", 2, "k"), ("bias_v", 2, "v"),
    ("out_proj.weight", 1, "v"),
)  # fmt: skip
# In the stack traces of their nodes.
_STOCK_LINES = (_STOCK.forward.__code__.co_filename, "F.multi_head_attention_forward(")
_SLIM_LINES = (SlimMultiheadAttention.forward.__code__.co_filename,)


@dataclass(frozen=True)
class _Heads:
    """Heads that are left, ascending, and the sizes of one: of queries and keys, of values."""

    kept: tuple[int, ...]
    head_dim: int
    value_head_dim: int

    def __str__(self) -> str:
        many = len(self.kept)
        text = f"{many} head{'s' if many > 1 else ''} of {self.head_dim}"
        same = self.head_dim == self.value_head_dim
        return text if same else f"{text} (values of {self.value_head_dim})"


def narrow_attention(slim: nn.Module, dense: nn.Module, keep: Keep) -> dict[str, str]:
    """Fit every `nn.MultiheadAttention` to its narrowed tensors: its attributes, or its class.

    The stock class stays where heads and widths fit it. A module whose class computes attention in
    a way of its own is left as it is, and so is one whose heads are not all of one size.

    Args:
        slim: The narrowed copy, whose modules are changed.
        dense: The dense model.
        keep: What stays.

    Returns:
        By name of the modules that compute the new sizes now: what was done to those that have the
        slim class, "" for the others.
    """
    done: dict[str, str] = {}
    seen: set[nn.Module] = set()
    names = _tensors_by_name(keep)
    for name, module in slim.named_modules(remove_duplicate=False):
        if not isinstance(module, _STOCK) or not _attends_as_stock(module, name, keep):
            continue
        whole = dense.get_submodule(name)
        assert isinstance(whole, _STOCK)
        heads = _heads_left(whole, f"{name}.".lstrip("."), names, keep)
        if heads is None:
            continue
        done[name] = ""
        if module in seen or not _is_narrowed(module, whole):
            continue
        seen.add(module)
        if not _fits_stock(module, whole, heads):
            make_slim(module, whole)
            done[name] = _change(module, whole, heads)
        _settle(module, whole, heads)
    _settle_transformers(slim, dense)
    return done


def in_attention(node: fx.Node) -> bool:
    """Whether a node comes from the forward of the stock class or of the slim one.

    Args:
        node: Of the captured graph.
    """
    trace = node.meta.get("stack_trace") or ""
    return any(all(text in trace for text in texts) for texts in (_STOCK_LINES, _SLIM_LINES))


def _change(module: nn.MultiheadAttention, dense: nn.MultiheadAttention, left: _Heads) -> str:
    before, after = _widths(dense), _widths(module)
    widths = "" if before == after else f" at width {after[0]} of {before[0]}"
    return f"{_sizes(dense)} -> {left}{widths}, a slim torch.nn.MultiheadAttention"


def _attends_as_stock(module: nn.Module, name: str, keep: Keep) -> bool:
    """Whether the forward is torch's, or one of a subclass that calls it."""
    if "forward" in vars(module):
        return False
    if type(module).forward in (_STOCK.forward, SlimMultiheadAttention.forward):
        return True
    return any(map(in_attention, keep.coupling.program.inside.get(name, ())))


def _is_narrowed(module: nn.Module, dense: nn.Module) -> bool:
    pairs = zip(module.parameters(), dense.parameters(), strict=True)
    return any(new.shape != old.shape for new, old in pairs)


def _tensors_by_name(keep: Keep) -> dict[str, list[str]]:
    """Names of the captured tensors that hold, share or parametrize a tensor, by its name."""
    out: dict[str, list[str]] = {}
    for captured in keep.coupling.dims:
        for name in keep.coupling.program.aliases.get(captured, (captured,)):
            layer, _, parameter = name.partition(".parametrizations.")
            plain = f"{layer}.{parameter.partition('.')[0]}" if parameter else name
            out.setdefault(plain.removeprefix("."), []).append(captured)
    return out


def _heads_left(
    module: nn.MultiheadAttention, prefix: str, names: dict[str, list[str]], keep: Keep
) -> _Heads | None:
    """The heads that all of a module's narrowed tensors agree on; None where they do not."""
    whole = _sizes(module)
    left: set[tuple[int, ...]] = set()
    counts: dict[bool, set[int]] = {False: set(), True: set()}  # of queries and keys, of values
    for parameter, dim, parts in _LAID_OUT:
        sizes = [whole.value_head_dim if part == "v" else whole.head_dim for part in parts]
        starts = np.cumsum([0, *(len(whole.kept) * size for size in sizes)])
        for tensor in names.get(prefix + parameter, ()):
            kept = _kept(tensor, dim, int(starts[-1]), keep)
            if kept is None:
                continue
            for i, size in enumerate(sizes):
                rows = kept[(kept >= starts[i]) & (kept < starts[i + 1])] - starts[i]
                heads, many = np.unique(rows // size, return_counts=True)
                left.add(tuple(heads.tolist()))
                counts[parts[i] == "v"].update(many.tolist())
    if len(left) != 1 or any(len(found) != 1 for found in counts.values()):
        return None
    return _Heads(left.pop(), counts[False].pop(), counts[True].pop())


def _kept(tensor: str, dim: int, size: int, keep: Keep) -> NDArray[np.int64] | None:
    """Kept indices of a dimension; none, which fits no heads, where they vary along another.

    None where there is no such dimension: what parametrizes a tensor may have another shape.
    """
    dims = keep.coupling.dims[tensor]
    if len(dims) <= dim or dims[dim].size != size:
        return None
    picked = keep.tensors[tensor][dim] if tensor in keep.tensors else None
    if picked is None:
        return np.arange(size)
    return picked if picked.ndim == 1 else picked.reshape(-1)[:0]


def _widths(module: nn.MultiheadAttention) -> tuple[int, int, int]:
    """Widths of query, key and value."""
    packed: Any = module.in_proj_weight  # one of the two is None
    q, k, v = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if packed is not None:
        q = k = v = packed
    return q.shape[1], k.shape[1], v.shape[1]


def _fits_stock(module: nn.MultiheadAttention, dense: nn.MultiheadAttention, left: _Heads) -> bool:
    """Whether the stock class, with its one width and its scale, computes the same.

    It takes nested tensors, which `nn.TransformerEncoder` makes, only where heads are even.
    """
    width = _widths(module)[0]
    return (
        not isinstance(dense, SlimMultiheadAttention)
        and (len(left.kept) % 2 == 0 or dense.num_heads % 2 == 1)
        and left.head_dim == left.value_head_dim == dense.head_dim
        and len(left.kept) * left.head_dim == width == module.out_proj.weight.shape[0]
    )


def _settle(module: nn.MultiheadAttention, dense: nn.MultiheadAttention, left: _Heads) -> None:
    """Set the attributes that name widths and heads."""
    if isinstance(module, SlimMultiheadAttention):
        was = dense.kept_heads if isinstance(dense, SlimMultiheadAttention) else None
        module.kept_heads = left.kept if was is None else tuple(was[i] for i in left.kept)
        module.value_head_dim = left.value_head_dim
    module.embed_dim, module.kdim, module.vdim = _widths(module)
    module.num_heads, module.head_dim = len(left.kept), left.head_dim


def _settle_transformers(slim: nn.Module, dense: nn.Module) -> None:
    """Set the width that `nn.Transformer` compares its inputs with to that of its attention."""
    for name, whole in dense.named_modules():
        if not isinstance(whole, nn.Transformer):
            continue
        inside = (n for n, m in whole.named_modules() if isinstance(m, _STOCK))
        inner = next(inside, None)
        if inner is not None and whole.get_submodule(inner).embed_dim == whole.d_model:
            module: Any = slim.get_submodule(name)
            module.d_model = module.get_submodule(inner).embed_dim


def _sizes(module: nn.MultiheadAttention) -> _Heads:
    """All heads of a module."""
    size = module.head_dim
    return _Heads(tuple(range(module.num_heads)), size, getattr(module, "value_head_dim", size))


# Classes ------------------------------------------------------------------------------------------


def make_slim(module: nn.MultiheadAttention, dense: nn.MultiheadAttention) -> None:
    """Give a module the slim class, or one of its own class and that; its state stays."""
    if isinstance(module, SlimMultiheadAttention):
        return
    kind: Any = type(module)
    if parametrize.is_parametrized(module):
        # The class above the one that torch made for this module, which has its properties.
        own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, (slim_class(kind.__bases__[0]),), own)
    else:
        module.__class__ = slim_class(kind)
    module.num_heads, module.head_dim = dense.num_heads, dense.head_dim
    become_slim(module)
