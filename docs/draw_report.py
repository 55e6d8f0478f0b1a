"""Draw the screenshots of the report's page: docs/images/report_*.png.

    python docs/draw_report.py

trains a small convolutional network on scikit-learn's digits, shrinks it with data, writes the page
of `Plan.to_html` and takes pictures of it in a headless Chromium (`apt-get install chromium`, `pip
install playwright`).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from sklearn.datasets import load_digits
from torch import Tensor, nn

import depcut

IMAGES = Path(__file__).resolve().parent / "images"
CLASSES = 10


class Block(nn.Module):
    """A residual block of an inverted bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 3 * width, 1)
        self.depthwise = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.norm = nn.BatchNorm2d(3 * width)
        self.project = nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, of the shape of its input."""
        return x + self.project(self.norm(self.depthwise(self.expand(x))).relu())


class Attention(nn.Module):
    """Attention whose code has a number typed in, which the plan patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The attended sequence, of the shape of its input."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 12).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, 48))


class Digits(nn.Module):
    """Convolutions, then attention over the places of the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 48, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(48) for _ in range(4)))
        self.attention = nn.Sequential(*(Attention(48) for _ in range(2)))
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        x = self.blocks(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.attention(x).mean(1))


def trained() -> tuple[nn.Module, Tensor]:
    """The network after some steps, and the pictures."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        rows = torch.arange(64) + 64 * (step % 20)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), x


def write(path: Path) -> None:
    """Write the page.

    Args:
        path: The file.
    """
    model, x = trained()
    data = [x[i : i + 64] for i in range(0, 512, 64)]
    analysis = depcut.analyze(model, x[:8])
    plan = analysis.plan(0.5, align=4)
    slim = plan.apply(model, data=data, progress=False)
    compared = depcut.compare(model, slim, x[:64], runtime="torch")
    plan.to_html(path, depcut.report(slim), compared, title="Digits")


def draw(page: Page) -> None:
    """Take the pictures.

    Args:
        page: The page, opened.
    """
    page.wait_for_selector("#view[transform]")
    page.screenshot(path=IMAGES / "report_light.png")
    page.locator(".box.group", has_text="x4").first.click()
    page.locator("#detail summary").first.click()
    page.add_style_tag(content="header { position: static !important }")
    page.locator("#coupling").screenshot(path=IMAGES / "report_coupling.png")
    page.click("#detail .close")
    page.locator("#patches").screenshot(path=IMAGES / "report_patches.png")
    page.click("#theme")
    page.locator("#repairs").scroll_into_view_if_needed()
    page.screenshot(path=IMAGES / "report_dark.png")


def main() -> None:
    """Write the page, and draw it."""
    IMAGES.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        path = Path(folder) / "report.html"
        write(path)
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        page.goto(path.as_uri())
        draw(page)
        browser.close()
    for image in sorted(IMAGES.glob("report_*.png")):
        print(f"written: {image} ({image.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
