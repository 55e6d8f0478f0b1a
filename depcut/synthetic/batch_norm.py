"""Inputs that reproduce what the batch norms of a model have stored about its training data.

From gaussian noise, inputs are optimised until the input of every batch norm has the running mean
and variance that the norm holds, channel by channel (ZeroQ: Cai et al., CVPR 2020, equations 2 and
3; DeepInversion: Yin et al., CVPR 2020, equation 4).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from depcut.capture.held import held_tensors
from depcut.capture.program import Program
from depcut.graph.arguments import argument, bound
from depcut.graph.interpreter import Interpreter
from depcut.ops.normalization import is_batch_norm
from depcut.synthetic.floats import Layout, layout
from depcut.synthetic.subject import Leaves, Made, Subject

STEPS = 200
RATE = 0.1
GROUP = 32
LOSS = "norm"


def norms_of(program: Program) -> list[fx.Node]:
    """The batch norms of a graph that read running statistics, in its order."""
    return [
        n
        for n in program.graph.graph.nodes
        if is_batch_norm(n)
        and not argument(n, "training")
        and isinstance(argument(n, "running_mean"), fx.Node)
    ]


class Run(Interpreter):
    """One run of the captured graph on the tensors of a model, for autograd to follow."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        super().__init__(program)
        self.held: Mapping[str, Tensor] = held_tensors(model)

    def tensor(self, node: fx.Node, name: str) -> Any:
        held = self.program.constants if name in self.program.anonymous else self.held
        source = held[name].detach()
        return source if name in self.program.parameters else source.clone()


def terms(run, leaves, norms):
    out = []
    steps = run.steps(leaves, frozenset(norms))
    for paused in steps:
        call = bound(paused.node, paused.args, paused.kwargs)
        x = call["input"].float()
        dims = [d for d in range(x.ndim) if d != 1]
        mean, var = x.mean(dims), x.var(dims, unbiased=False)
        out.append((mean, var, call["running_mean"].float(), call["running_var"].float(), call["eps"], call["weight"]))
        if paused.node is norms[-1]:
            steps.close()
            break
    return out


def loss_of(found):
    total = 0.0
    for mean, var, m, v, eps, w in found:
        if LOSS == "raw":
            total = total + ((mean - m) ** 2).mean() + ((( var+eps).sqrt() - (v+eps).sqrt()) ** 2).mean()
        elif LOSS == "di":
            total = total + (mean - m).norm() + (var - v).norm()
        else:
            s = (v + eps).sqrt()
            e = ((mean - m) / s) ** 2 + ((var + eps).sqrt() / s - 1) ** 2
            if LOSS == "gamma":
                g = w.float() ** 2
                e = e * g / g.mean()
            total = total + e.mean()
    return total / len(found)


def batch_norm(subject: Subject) -> Made | None:
    norms, plan = norms_of(subject.program), layout(subject)
    if not norms or not plan.made:
        return None
    run = Run(subject.program, subject.own_model())
    gen = subject.generator()
    items = []
    first = last = 0.0
    for g in range(0, subject.examples, GROUP):
        start = plan.noise(min(GROUP, subject.examples - g), gen)
        made = {p: t.requires_grad_() for p, t in start.items()}
        opt = torch.optim.Adam(list(made.values()), RATE)
        sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
        for step in range(STEPS):
            leaves = plan.leaves(made, gen)
            loss = loss_of(terms(run, leaves, norms))
            opt.zero_grad()
            loss.backward()
            opt.step(); sched.step()
            if step == 0: f0 = float(loss)
        first += f0; last += float(loss)
        leaves = plan.leaves({p: t.detach() for p, t in made.items()}, gen)
        items.append(leaves)
    k = len(items)
    return Made(tuple(items), "gaussian noise optimised", f"off by {(first/k)**.5:.3g} at first, {(last/k)**.5:.3g} at the end")
