"""Gradual pruning inside the real training loops of Lightning and transformers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracle import assert_close, outputs
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import depcut
from depcut.errors import DepcutError, InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # what these libraries warn of is theirs


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )


X = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def test_neither_library_is_imported_with_depcut() -> None:
    code = "import sys, depcut; print({'lightning', 'transformers'} & {*sys.modules})"
    root = str(Path(depcut.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_library_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gradual = depcut.training.Gradual(mlp(), 0.5, X[:2], 0, 10, 5)
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DepcutError, match=rf"{name}(.|\n)*pip install {name}"):
        getattr(depcut.integrations, f"{name}_callback")(gradual)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_what_is_no_gradual(name: str) -> None:
    with pytest.raises(
        InputError, match=r"gradual is a Sequential(.|\n)*depcut\.training\.Gradual"
    ):
        getattr(depcut.integrations, f"{name}_callback")(mlp())


# Lightning ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning() -> Any:
    zoo.libraries()  # torchmetrics imports torchvision, which needs this beside a torch for the CPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "lightning.pytorch", reason="lightning is not importable here", exc_type=Exception
        )


def fitted(lightning: Any, folder: Path, epochs: int, resume: Path | None = None) -> Any:
    """(net, gradual, trainer) after training with gradients accumulated over two batches."""

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Classifier()
    gradual = depcut.training.Gradual(module.net, 0.5, X[:2], 2, 10, 2)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accumulate_grad_batches=2,
        callbacks=[depcut.integrations.lightning_callback(gradual)],
    )
    loader = DataLoader(TensorDataset(X, Y), batch_size=16)  # 6 batches, 3 steps an epoch
    trainer.fit(module, loader, ckpt_path=resume)
    return module.net, gradual, trainer


def test_masks_grow_while_lightning_trains(lightning: Any, tmp_path: Path) -> None:
    net, gradual, trainer = fitted(lightning, tmp_path, 4)
    assert trainer.global_step == gradual.steps == 12
    assert gradual.done
    assert gradual.removed == pytest.approx(0.5, abs=0.1)
    want = outputs(net, X)
    slim = gradual.commit(optimizer=trainer.optimizers[0])
    assert_close(outputs(slim, X), want, 1e-5, {})
    held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in slim.parameters()}


def test_masks_are_in_lightnings_checkpoints(lightning: Any, tmp_path: Path) -> None:
    whole, gradual, _ = fitted(lightning, tmp_path / "whole", 4)
    _, _, trainer = fitted(lightning, tmp_path / "half", 2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    net, resumed, _ = fitted(lightning, tmp_path / "rest", 4, path)
    assert resumed.steps == 12
    assert resumed.plan.digest == gradual.plan.digest
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), whole.parameters(), strict=True))


# transformers -------------------------------------------------------------------------------------


def trained(folder: Path, steps: int, resume: bool = False) -> Any:
    """(model, gradual) after training a tiny BERT with the real Trainer."""
    transformers = zoo.libraries()["transformers"]
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 50, (64, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": i, "labels": int(i[0] > 25)} for i in ids]
    gradual = depcut.training.Gradual(model, 0.3, {"input_ids": ids[:2]}, 1, 7, 2, align=1)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        seed=0,
        lr_scheduler_type="constant",
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=[depcut.integrations.transformers_callback(gradual)],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return model, gradual, ids


def test_masks_grow_while_the_trainer_trains(tmp_path: Path) -> None:
    model, gradual, ids = trained(tmp_path, 8)
    assert gradual.steps == 8
    assert gradual.done
    assert gradual.removed == pytest.approx(0.3, abs=0.03)
    assert any("norm" in why.lower() for why in gradual.excluded.values())
    model.eval()
    want = outputs(model, {"input_ids": ids})
    slim = gradual.commit()
    assert type(slim) is type(model)
    assert_close(outputs(slim, {"input_ids": ids}), want, 1e-5, {})
    saved = load_file(tmp_path / "checkpoint-4" / "depcut_gradual.safetensors")
    assert int(saved["step"]) == 4


def test_the_trainer_resumes_with_its_masks(tmp_path: Path) -> None:
    whole, first, _ = trained(tmp_path / "whole", 8)
    trained(tmp_path / "half", 4)
    model, second, _ = trained(tmp_path / "half", 8, resume=True)
    assert second.steps == 8
    assert second.plan.digest == first.plan.digest
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "depcut_gradual.safetensors").unlink()
    with pytest.raises(InputError, match=r"resumes at step 4(.|\n)*no masks"):
        trained(tmp_path, 8, resume=True)
