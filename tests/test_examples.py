"""Every script under examples/ runs, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from selection import sampled

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("script", sampled({p.stem: p for p in EXAMPLES}, ["plan_and_replay"]))
def test_example_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "an example left files behind"
