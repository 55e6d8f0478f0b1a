"""Models that refuse to be saved by functions whose files would not bring them back."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from depcut.errors import DepcutError

# Methods of a model that leave files for `from_pretrained`. `push_to_hub` makes a repository before
# it saves anything.
_METHODS = ("save_pretrained", "push_to_hub")


class Refusal:
    """Stands in a model where a method of its class does; calling it raises.

    It holds text alone, so that copies and pickles of the model take it along.

    Args:
        method: What it stands for.
        kind: Name of the model's class.
        why: What `from_pretrained` would get wrong.
        remedy: What to do beside `depcut.save`.
    """

    def __init__(self, method: str, kind: str, why: str, remedy: str) -> None:
        self.method, self.kind, self.why, self.remedy = method, kind, why, remedy

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse the call.

        Raises:
            DepcutError: Always.
        """
        raise DepcutError(
            f"{self.kind}.from_pretrained could not rebuild this model: {self.why}",
            where=f"{self.kind}.{self.method}",
            remedy=f"depcut.save(slim, folder) keeps it as it is; {self.remedy}. "
            "ignore_mismatched_sizes=True would load random weights",
        )


def refuse_saving(model: nn.Module, why: str, remedy: str) -> None:
    """Have a model refuse to be saved as what `from_pretrained` takes.

    Args:
        model: The model; its class stays what it is.
        why: What `from_pretrained` would get wrong.
        remedy: What to do beside `depcut.save`.
    """
    for method in _METHODS:
        if hasattr(type(model), method):
            vars(model)[method] = Refusal(method, type(model).__name__, why, remedy)


def allow_saving(model: nn.Module) -> None:
    """Take back what `refuse_saving` did.

    Args:
        model: The model.
    """
    for method in _METHODS:
        if isinstance(vars(model).get(method), Refusal):
            del vars(model)[method]


def refuses_saving(model: nn.Module) -> bool:
    """Whether a model refuses to be saved as what `from_pretrained` takes.

    Args:
        model: The model.
    """
    return any(isinstance(vars(model).get(method), Refusal) for method in _METHODS)
