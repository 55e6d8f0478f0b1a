"""What can run candidates, one library a file; importing the package fills the table."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules

from depcut.errors import InputError
from depcut.support.failures import shown
from depcut.timing.backends import RUNTIMES

__all__ = ["RUNTIMES", "check_known", "check_runtime", "providers"]

# Each file of this folder registers its runtimes.
for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")


def providers() -> list[str]:
    """The providers of all runtimes."""
    return sorted({provider for one in RUNTIMES.values() for provider in one.providers})


def check_known(runtime: str) -> None:
    """Refuse a runtime that there is none of.

    Args:
        runtime: Name of the runtime.

    Raises:
        InputError: There is no such runtime.
    """
    if not isinstance(runtime, str) or runtime not in RUNTIMES:
        raise _unknown("runtime", runtime, sorted(RUNTIMES))


def check_runtime(runtime: str, provider: str | None) -> None:
    """Refuse what is unknown or absent here, before anything is built for it.

    Args:
        runtime: Name of the runtime.
        provider: Name of the provider, or None for the runtime's own choice.

    Raises:
        InputError: There is no such runtime or provider, or this machine lacks it.
    """
    check_known(runtime)
    chosen = RUNTIMES[runtime]
    if provider is None:
        chosen.check(chosen.providers[0])
        return
    if not isinstance(provider, str) or provider not in providers():
        raise _unknown("provider", provider, providers())
    if provider not in chosen.providers:
        owners = sorted(name for name, one in RUNTIMES.items() if provider in one.providers)
        raise InputError(
            f"{provider} is a provider of {', '.join(owners)}, not of {runtime}, which has "
            f"{' and '.join(chosen.providers)}",
            where=f"runtime={runtime!r}",
            remedy=f'use runtime="{owners[0]}"',
        )
    chosen.check(provider)


def _unknown(kind: str, given: object, known: Iterable[str]) -> InputError:
    """No such runtime or provider."""
    names = ", ".join(f'"{name}"' for name in known)
    return InputError(
        f"unknown {kind} {shown(given)}", where=f"{kind}=", remedy=f"use one of {names}"
    )
