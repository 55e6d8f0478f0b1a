"""A model sharded by fully_shard: shrunk, trained on, stored, and restored in other processes.

    python benchmarks/sharded.py    # two processes over gloo, each for itself, and then three

A small Llama is sharded and trained, and shrunk with its optimizer. The result is sharded as the
dense model is, module by module, and so is the state that goes on; it trains, is stored by
`depcut.save` and torch.distributed.checkpoint, and trains on. The losses must be those of one
process that does the same without shards, and of one and three that restore what two have stored.
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


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """One step on all tokens, the same in every process; the loss."""
    optimizer.zero_grad()
    loss: Any = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def sharded(model: nn.Module) -> nn.Module:
    """The model, its layers and then the rest sharded where there are several processes."""
    if distributed.is_initialized():
        from torch.distributed.fsdp import fully_shard

        inner: Any = model
        for layer in inner.model.layers:
            fully_shard(layer, reshard_after_forward=False)
        fully_shard(model)
    return model


def layout(model: nn.Module) -> dict[str, str]:
    """How each parameter is sharded, and how each call of fully_shard was made."""
    from depcut.support.sharded import sharding_of

    placed = {
        name: f"{p.device_mesh} {p.placements}" if hasattr(p, "placements") else "plain"
        for name, p in model.named_parameters()
    }
    sharding = sharding_of(model)
    calls = {" and ".join(u.modules): str(u.arguments) for u in sharding.units} if sharding else {}
    return {**placed, **calls}


def moments(optimizer: torch.optim.Optimizer) -> list[str]:
    """How the optimizer's state is sharded, each way once."""
    held = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return sorted({str(getattr(t, "placements", "plain")) for t in held})


def whole(model: nn.Module) -> dict[str, list[float]]:
    """All values of a model's state, put together."""
    state = model.state_dict()
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
    return {n: t.double().flatten().tolist() for n, t in full.items()}


def stored(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the weights and the optimizer's state, each process its part."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": state}
    checkpoint.save(held, checkpoint_id=folder, no_dist=not distributed.is_initialized())


def restored(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read them, each process its part, however many have written them."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, state = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": state}
    checkpoint.load(held, checkpoint_id=folder, no_dist=not distributed.is_initialized())
    set_state_dict(
        model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
    )


def run(folder: Path) -> dict[str, Any]:
    """Shrink, train, store and train on in this process, with the others if there are any."""
    dense, data = llama()
    tokens = torch.cat([item["input_ids"] for item in data])
    dense = sharded(dense)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3)
    step(dense, optimizer, tokens)
    chosen = {"align": 1, "rebuildable": False, "progress": False}
    slim = depcut.shrink(dense, 0.4, data=data, optimizer=optimizer, **chosen)
    as_dense = layout(slim) == layout(dense)
    losses = [step(slim, optimizer, tokens) for _ in range(STEPS)]
    depcut.save(slim, folder / "slim")
    stored(slim, optimizer, folder / "state")
    before = whole(slim)
    losses += [step(slim, optimizer, tokens) for _ in range(STEPS)]
    return {
        "plan": depcut.report(slim).digest,
        "sharded as the dense one": as_dense,
        "moments": moments(optimizer),
        "losses": losses,
        "weights": whole(slim),
        "moved since the checkpoint": difference(whole(slim), before),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Restore what other processes have stored, and train on."""
    _, data = llama()
    tokens = torch.cat([item["input_ids"] for item in data])
    slim = sharded(depcut.load(folder / "slim"))
    optimizer = torch.optim.AdamW(slim.parameters(), lr=1e-3)
    restored(slim, optimizer, folder / "state")
    losses = [step(slim, optimizer, tokens) for _ in range(STEPS)]
    return {"losses": losses, "weights": whole(slim)}


def worker(path: Path, resume: Path | None) -> None:
    """Run with the other processes; each writes what it got.

    Afterwards the first process restores what was stored, and the second does all of it without
    shards, each for itself.
    """
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo")
    folder = path.parent
    found = {f"{size} processes": run(folder) if resume is None else resumed(resume)}
    distributed.barrier()
    distributed.destroy_process_group()
    if resume is None and rank == 0:
        found["restored by one"] = resumed(folder)
    elif resume is None:
        alone = folder / "alone"
        alone.mkdir()
        found["one process"] = run(alone)
    path.with_suffix(f".{size}.{rank}").write_text(json.dumps(found))


def results(folder: Path, sizes: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """What the processes got.

    Args:
        folder: To write to.
        sizes: How many processes: first those that shrink and store, then such that go on.
    """
    path, found, more = folder / "found.json", {}, []
    for size in sizes:
        command = [sys.executable, __file__, "--worker", str(path), *more]
        for code, error in launched(size, command, timeout=300):
            if code:
                raise SystemExit(error)
        for rank in range(size):
            found |= json.loads(path.with_suffix(f".{size}.{rank}").read_text())
        more = ["--resume", str(folder)]
    return found


def apart(one: list[float], other: list[float]) -> float:
    """The largest relative difference of losses."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, help="of a launch: where to write what was got")
    parser.add_argument("--resume", type=Path, help="of a launch: go on from this folder")
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, given.resume)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = results(Path(folder), (2, 3))
    one, two = found["one process"], found["2 processes"]
    same, alike = one["plan"] == two["plan"], two["sharded as the dense one"]
    print(f"same plan in one process and in two, sharded: {same}")
    print(f"the smaller model is sharded as the dense one: {alike}")
    print(f"moments of Adam, in two processes: {', '.join(two['moments'])}")
    losses = [apart(one["losses"], two["losses"])]
    weights = [difference(one["weights"], two["weights"])]
    print(f"{2 * STEPS} steps: losses differ by {losses[0]:.1e}, weights by {weights[0]:.1e}")
    for who in ("restored by one", "3 processes"):
        losses.append(apart(two["losses"][STEPS:], found[who]["losses"]))
        weights.append(difference(two["weights"], found[who]["weights"]))
        print(f"{who}: losses differ by {losses[-1]:.1e}, weights by {weights[-1]:.1e}")
    print(f"the steps after the checkpoint moved them by {two['moved since the checkpoint']:.1e}")
    if not same or not alike or max(losses + weights) > 1e-4:
        raise SystemExit("they are not the same")


if __name__ == "__main__":
    main()
