"""What timm's functions expect of its models beside their forward."""

from __future__ import annotations

from torch import nn

from depcut.plan.keep import Keep


def finish(slim: nn.Module, dense: nn.Module, keep: Keep) -> list[str]:
    """Bring the attributes that timm's functions read up to date, see `depcut.rewrite.finish`."""
    del slim, dense, keep
    return []
