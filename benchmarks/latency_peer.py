"""Prune one model with Torch-Pruning to a share of its MACs and write it as ONNX.

Run by latency.py in a process of its own, since it may not return:

    python latency_peer.py MODEL FILE MACS_KEPT ROUND_TO
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import measure
import torch
import torch_pruning
from latency import MODELS
from torch import nn

import depcut
from depcut.coupling.groups import layer_of
from depcut.deploy.convert import draft

STEPS = 6  # of the search for the ratio that comes to the MACs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("file", type=Path)
    parser.add_argument("macs_kept", type=float)
    parser.add_argument("round_to", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = MODELS[options.model]()
    model.eval()
    analysis = depcut.analyze(model, inputs)
    fixed = sorted({layer_of(f.tensor) for f in analysis.frozen if f.reason == "model output"})
    dense = sum(measure.counted_macs(model, (inputs,)).values())
    low, high, best = 0.0, 0.95, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        slim = pruned(copy.deepcopy(model), inputs, fixed, middle, options.round_to)
        kept = sum(measure.counted_macs(slim, (inputs,)).values()) / dense
        if best is None or abs(kept - options.macs_kept) < abs(best[0] - options.macs_kept):
            best = (kept, slim)
        low, high = (middle, high) if kept > options.macs_kept else (low, middle)
    assert best is not None
    kept, slim = best
    if measure.shapes(slim, (inputs,)) != measure.shapes(model, (inputs,)):
        raise RuntimeError("the pruned model has other output shapes")
    draft(slim, inputs, options.file)
    print(json.dumps({"macs_kept": kept}))
    return 0


def pruned(
    model: nn.Module, inputs: Any, fixed: list[str], ratio: float, round_to: int
) -> nn.Module:
    modules = dict(model.named_modules())
    torch_pruning.pruner.BasePruner(
        model,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        round_to=round_to if round_to > 1 else None,
        ignored_layers=[modules[name] for name in fixed if name in modules],
        in_channel_groups={},  # its defaults are shared between pruners
        out_channel_groups={},
        num_heads={},
    ).step()
    return model


if __name__ == "__main__":
    sys.exit(main())
