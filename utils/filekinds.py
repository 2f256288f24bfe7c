"""What a file is that was given as weights and holds none that could be read, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError

HEAD = 512  # bytes that tell the kind
RESAVE = "where it was made, save the network's own tensors: torch.save(model.state_dict(), 'new.pth')"
UNPACK = "unpack it and name the file inside"
DOWNLOAD = "download the file itself, by the page's download or raw link"
FROM_PYTORCH = "take the PyTorch file (.pth, .safetensors) of the same weights"

STARTS = (  # pattern of the first bytes, what the file is, what to do
    (rb"version https://git-lfs", "a Git LFS pointer, a text that stands for the file", "run git lfs pull there"),
    (rb"(?i)\s*<(!doctype )?html", "a web page", DOWNLOAD),
    (rb"\s*<", "an XML or HTML text, such as a server's error message", DOWNLOAD),
    (rb"\x89HDF", "HDF5, as Keras and TensorFlow write", FROM_PYTORCH),
    (rb"\x08\x01\x12", "a TensorFlow SavedModel", FROM_PYTORCH),
    (rb"\x08[\x02-\x20][\x12\x3a]", "an ONNX graph, whose layers are fused", RESAVE),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "compressed", UNPACK),
    (rb"(?s).{257}ustar", "a tar archive", f"{UNPACK}; written by torch before 0.2, it needs a torch of that time"),
    (rb"GGUF", "a GGUF language model", "take a ResNet"),
    (rb"\x93NUMPY", "a NumPy array", FROM_PYTORCH),
    (rb"\x80[\x02-\x05]", "a plain pickle (detectron2, JAX, NumPy), which torch.save has not written", FROM_PYTORCH),
    (rb"\s*[\[{]", "a JSON text, such as an index of parts or a configuration", "name the file of the tensors"),
    (rb"\x00{64}", "empty at its start: zeros, as an interrupted download leaves", "copy or download it again"),
)


def require_file(path: Path) -> None:
    """Raises UserError unless there is an ordinary file, and not an empty one."""
    if path.is_dir():
        inside = sorted(file.name for kind in ("*.safetensors", "*.bin", "*.pt*") for file in path.glob(kind))[:3]
        raise UserError(f"{path}: is a folder; name the file in it" + f" ({', '.join(inside)})" * bool(inside))
    if not path.exists():
        raise UserError(f"{path}: no such weights file; correct the name")
    if not path.is_file():
        raise UserError(f"{path}: is a pipe or device, not a file; copy it into a file first")
    if not path.stat().st_size:
        raise UserError(f"{path}: is empty; copy or download it again")


def refusal(path: Path, head: bytes) -> UserError:
    """For a file that starts in this way, which is none of torch.save's or safetensors'."""
    text = head.isascii() and head.decode().isprintable()
    other = ("a text", DOWNLOAD) if text else ("of no kind that is known here", FROM_PYTORCH)
    what, remedy = next((row[1:] for row in STARTS if re.match(row[0], head)), other)
    return UserError(f"{path}: is {what}, not weights; {remedy}")


def zip_refusal(path: Path, names: Sequence[str]) -> UserError:
    """For a zip archive of these files, which is none of torch.save's."""
    last = {name.rsplit("/", 1)[-1] for name in names}
    weights = [name for name in names if name.endswith((".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".tar"))]
    if "constants.pkl" in last:
        module = f"torch.save(torch.jit.load('{path.name}', map_location='cpu').state_dict(), 'new.pth')"
        return UserError(f"{path}: is TorchScript, a program, which is not run here; if you trust its source: {module}")
    if last & {"archive_format", "serialized_exported_program.json"}:
        return UserError(f"{path}: is an exported program (torch.export), not weights; {RESAVE}")
    if weights:
        return UserError(f"{path}: is a zip archive that holds {weights[0]}; {UNPACK}")
    what = "NumPy arrays" if names and all(name.endswith(".npy") for name in names) else "other things"
    return UserError(f"{path}: is a zip archive of {what}, not weights; {FROM_PYTORCH}")
