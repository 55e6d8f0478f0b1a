"""Get the accuracy back: one call, and beside it the same architecture trained from scratch."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import depcut

torch.manual_seed(0)
x = torch.randn(2048, 16)
y = (x[:, :8].pow(2).sum(1) > x[:, 8:].pow(2).sum(1)).long()
train = DataLoader(TensorDataset(x[:1536], y[:1536]), batch_size=64, shuffle=True)
valid = DataLoader(TensorDataset(x[1536:], y[1536:]), batch_size=256)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of the examples named right."""
    return (output.argmax(1) == target).float().mean()


def judged(model: nn.Module) -> float:
    """Accuracy on the validation examples."""
    with torch.no_grad():
        return float(accuracy(model(x[1536:]), y[1536:]))


net = nn.Sequential(
    nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)
)
common = {"loss": cross_entropy, "lr": 5e-3, "metric": accuracy}
dense = depcut.training.retrain(net, train, valid, epochs=10, **common).model

plan = depcut.analyze(dense, x[:2]).plan(0.8)
slim = plan.apply(dense)
print(f"dense {judged(dense):.1%}, slim {judged(slim):.1%}")

with depcut.training.Distillation(dense, slim, plan) as distill:
    made = depcut.training.retrain(
        slim, train, valid, epochs=4, plan=plan, distillation=distill, **common
    )
d = made.settings["distance"]
print(f"retrained {judged(made.model):.1%}: epoch {made.best_epoch}, relative distance {d:.2f}")

epochs = depcut.training.scratch_epochs(plan, 10, "B")
scratch = depcut.training.retrain(
    depcut.training.fresh(dense, plan), train, valid, epochs=epochs, **common
).model
print(f"from scratch, {epochs} epochs: {judged(scratch):.1%}")
