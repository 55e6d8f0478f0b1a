"""A model sharded by fully_shard: shrunk, sharded again, trained, stored and restored.

    torchrun --nproc-per-node 2 benchmarks/sharded.py    # or: python benchmarks/sharded.py

In two processes over gloo, a small Llama is sharded and trained, and shrunk with its optimizer. The
result is sharded again with the sliced state, trains two steps, is stored by
torch.distributed.checkpoint, and trains two more: with a run that is restored from the checkpoint,
and with one process that does the same without shards, it must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from processes import difference, launched, llama
from torch import distributed, nn

import depcut

STEPS = 2


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """One step on all tokens, the same in every process."""
    optimizer.zero_grad()
    loss: Any = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()


def sharded(model: nn.Module) -> nn.Module:
    """The model, its layers and then the rest sharded where there are several processes."""
    if distributed.is_initialized():
        from torch.distributed.fsdp import fully_shard

        inner: Any = model
        for layer in inner.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def whole(model: nn.Module) -> dict[str, list[float]]:
    """All values of a model's state, put together."""
    state = model.state_dict()
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
    return {n: t.double().flatten().tolist() for n, t in full.items()}


def optimizer_of(model: nn.Module, state: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer that goes on from a whole state, by parameter names; sharded like the model."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_optimizer_state_dict,
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    return optimizer


def run(folder: Path) -> dict[str, Any]:
    """All of it in this process, with the others if there are any."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        get_state_dict,
        set_state_dict,
    )

    dense, data = llama()
    tokens = torch.cat([item["input_ids"] for item in data])
    dense = sharded(dense)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3)
    step(dense, optimizer, tokens)
    chosen = {"align": 1, "rebuildable": False, "progress": False}
    slim = depcut.shrink(dense, 0.4, data=data, optimizer=optimizer, **chosen)
    report = depcut.report(slim)
    full = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(slim, optimizer, options=full)
    slim = sharded(slim)
    optimizer = optimizer_of(slim, state)
    for _ in range(STEPS):
        step(slim, optimizer, tokens)
    model_state, optimizer_state = get_state_dict(slim, optimizer)
    held = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.save(held, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    for _ in range(STEPS):
        step(slim, optimizer, tokens)
    went_on = whole(slim)
    # Back to the checkpoint, and the same steps again.
    model_state, optimizer_state = get_state_dict(slim, optimizer)
    held = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(held, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    set_state_dict(
        slim, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
    )
    restored = whole(slim)
    for _ in range(STEPS):
        step(slim, optimizer, tokens)
    return {
        "plan": report.digest,
        "weights": went_on,
        "restored and trained": whole(slim),
        "moved since the checkpoint": difference(went_on, restored),
    }


def worker(path: Path) -> None:
    """Run in this process; the first one writes what it got."""
    torch.set_num_threads(1)
    several = int(os.environ["WORLD_SIZE"]) > 1
    if several:
        distributed.init_process_group("gloo")
    found = run(path.parent / f"checkpoint{os.environ['WORLD_SIZE']}")
    if os.environ["RANK"] == "0":
        path.with_suffix(f".{os.environ['WORLD_SIZE']}").write_text(json.dumps(found))
    if several:
        distributed.barrier()
        distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, help="of a launch: where to write what was got")
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        for size in (1, 2):
            for code, error in launched(size, [sys.executable, __file__, "--worker", str(path)]):
                if code:
                    raise SystemExit(error)
            found[size] = json.loads(path.with_suffix(f".{size}").read_text())
    one, two = found[1], found[2]
    restored = difference(two["weights"], two["restored and trained"])
    print(f"same plan in one process and in two, sharded: {one['plan'] == two['plan']}")
    apart = difference(one["weights"], two["weights"])
    print(f"weights after {2 * STEPS} steps differ by {apart:.1e}")
    print(f"restored from the checkpoint and trained, they differ by {restored:.1e}")
    print(f"the steps after the checkpoint moved them by {two['moved since the checkpoint']:.1e}")
    if one["plan"] != two["plan"] or apart > 1e-4 or restored > 1e-6:
        raise SystemExit("they are not the same")


if __name__ == "__main__":
    main()
