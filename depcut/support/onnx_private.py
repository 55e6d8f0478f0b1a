"""Every private name of torch.onnx and onnxscript that depcut uses, with why.

All were read in torch 2.13 and onnxscript 0.7. They save time and change no result: where one is
gone, nothing is replaced, and the conversion takes longer.

| name | why |
|---|---|
| `torch.onnx._internal._lazy_import` | its `onnxscript_apis` list the translations of operators |
| `torch.onnx._internal.exporter._schemas` | annotations of translations, read for every model |
| `_pt_onnx_signature` | what was read, noted on the translation |
| `torch._export.utils._materialize_cpp_cia_ops` | composite operators, looked up again and again |
"""

from __future__ import annotations

from typing import Any

# Where torch.onnx notes what the annotations of a translation say.
SIGNATURE = "_pt_onnx_signature"


def replaced_to_translate() -> dict[str, tuple[Any, str]]:
    """Functions by which torch.onnx gathers what is the same for every model: (owner, name)."""
    try:
        from torch._export import utils
        from torch.onnx._internal import _lazy_import
        from torch.onnx._internal.exporter import _schemas

        lazy: Any = _lazy_import
        apis = lazy.onnxscript_apis
        found = {
            "translations": (apis, "get_torchlib_ops"),
            "signature": (_schemas, "op_signature_from_function"),
            "composites": (utils, "_materialize_cpp_cia_ops"),
        }
        known = all(callable(getattr(owner, name)) for owner, name in found.values())
        # The first attribute that is read imports what the names are of.
        found["translations"] = (apis._module, "get_torchlib_ops")
        return found if known and translations() else {}
    except (ImportError, AttributeError):
        return {}


def translations() -> tuple[Any, ...]:
    """The functions that are registered with onnxscript to translate operators."""
    from onnxscript.function_libs.torch_lib import ops, registration

    assert ops  # which registers those of onnxscript
    known = registration.default_registry.values()
    return tuple(f for several in known for f in (*several.overloads, *several.complex))
