"""The half of families.py that runs without depcut: load what was saved, compute, compare."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import measure  # it puts the tests on the path, whose families are meant below

# isort: split
import families
import torch
import zoo
from safetensors.torch import load_file
from torch import Tensor


def main() -> None:
    assert "depcut" not in sys.modules
    sys.modules["depcut"] = None  # type: ignore[assignment]  # importing it raises from here on
    torch.set_num_threads(1)
    work = json.loads(sys.argv[1])
    found = {name: compared(name, Path(folder)) for name, folder in work.items()}
    assert not any(name.startswith("depcut.") for name in sys.modules)
    print(json.dumps(found))


def compared(name: str, folder: Path) -> dict[str, Any]:
    """Which results are equal, and the largest difference or the error of those that are not."""
    family = families.FAMILIES[name]
    expected: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "expected.safetensors").items():
        way, _, part = key.partition("/")
        expected.setdefault(way, {})[part] = tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = getattr(zoo.libraries()["transformers"], family.auto_class)
        try:
            model = auto.from_pretrained(folder)
        except Exception as error:  # noqa: BLE001  (a family that does not load is a result)
            return {"error": f"from_pretrained: {measure.first_line(error)}"}
        equal, differs = [], {}
        for way, wanted in expected.items():
            try:
                made = (
                    families.outputs(family, model)
                    if way == "outputs"
                    else families.generated(family, model, way)
                )
            except Exception as error:  # noqa: BLE001  (the same)
                differs[way] = measure.first_line(error)
                continue
            gap = difference(wanted, made)
            if gap:
                differs[way] = gap
            else:
                equal.append(way)
    return {"equal": equal, "differs": differs}


def difference(wanted: dict[str, Tensor], made: dict[str, Tensor]) -> str:
    if {n: t.shape for n, t in wanted.items()} != {n: t.shape for n, t in made.items()}:
        return "other shapes"
    if all(torch.equal(wanted[n], made[n]) for n in wanted):
        return ""
    return f"{max(float((wanted[n] - made[n]).abs().max()) for n in wanted):.2g}"


if __name__ == "__main__":
    main()
