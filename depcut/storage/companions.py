"""Files beside a model's weights that belong to its smaller version, too."""

from __future__ import annotations

import shutil
from pathlib import Path

from depcut.storage import folder as folders
from depcut.support import files

# Of a folder of transformers: what holds weights or tells of the dense model's training. All else
# (tokenizers, processors, templates, licences) is of the smaller model, too.
_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"),
    *(".data", ".index", ".pkl", ".npz", ".mlmodel", ".tflite"),
}
_OF_THE_DENSE = {"README.md", "trainer_state.json", folders.INDEX, folders.MODEL, folders.REPORT}


def carry_over(source: Path | None, target: Path) -> tuple[str, ...]:
    """Copy what belongs to the smaller model, too, unless it is there.

    Args:
        source: The folder of the dense model, if it has one.
        target: That of the smaller one.

    Returns:
        Names of the folders that stay behind.

    Raises:
        DepcutError: A file cannot be written.
    """
    if source is None:
        return ()
    for file in sorted(source.iterdir()):
        is_new = not (target / file.name).exists() and file.name not in _OF_THE_DENSE
        weights = _WEIGHTS & {*file.suffixes} or file.name.endswith(".index.json")
        if file.is_file() and is_new and not weights and not file.name.startswith("."):
            with files.replacing(target / file.name, file.name) as draft:
                shutil.copyfile(file, draft)
    return tuple(f"{path.name}/" for path in sorted(source.iterdir()) if path.is_dir())
