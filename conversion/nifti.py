"""NIfTI and what else nibabel reads: Analyze, MGH, MINC and PAR/REC.

Through nibabel, as it reads one channel of a 4D file alone and accepts affines that ITK refuses.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np

from conversion.claims import require_room
from conversion.volume import BadFile, Options, Volume, luminance, rescaled, with_channels

MM = {1: 1e3, 3: 1e-3}  # of NIfTI's codes for metres and micrometres; 2 is millimetres, 0 unknown
GZIP = b"\x1f\x8b"
COMPRESSED = {".gz", ".mgz"}


def read_nibabel(path: Path, options: Options) -> Volume:
    """A volume, or a picture where there are two axes; colours become their luminance.

    Axes and spacing of NIfTI are from the sform, or else the qform.
    """
    import nibabel

    _require_true_name(path)
    try:
        image = nibabel.load(path, mmap=False)  # a file cut short under a map would kill the process
    except nibabel.filebasedimages.ImageFileError:
        raise BadFile("is not what its name says, or its header is damaged; copy it again or remove it") from None
    if not isinstance(image, nibabel.spatialimages.SpatialImage):
        raise BadFile(f"is no volume ({type(image).__name__}: data on surfaces or of regions); remove it")
    file = Path(image.file_map["image"].filename)
    if not file.is_file():
        raise BadFile(f"its data file {file.name} is missing; copy it into the same folder")
    squeezed = _is_compressed(file) or path.suffix.lower() == ".mnc"
    claimed = math.prod(image.shape) * image.get_data_dtype().itemsize
    require_room(claimed, file.stat().st_size, squeezed)
    notes, mm = _header_says(image)
    array, flat = _intensities(image, file, options), len(image.shape) == 2
    affine = np.diag([mm, mm, mm, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
    array = array[:, :, None] if flat else array
    if array.dtype.fields:
        array = np.stack([array[colour] for colour in "RGB"], axis=-1)
        notes += ["colours, taken as their luminance"] if options.channel is None else []
        array = luminance(array) if options.channel is None else with_channels(array, options.channel)
    return Volume(array, affine, notes, flat=flat)


def _intensities(image: Any, file: Path, options: Options) -> np.ndarray:
    from nibabel.arrayproxy import ArrayProxy

    proxy = image.dataobj
    if type(proxy) is not ArrayProxy:  # MINC, PAR/REC: every slice has its own scale
        return with_channels(proxy, options.channel).astype(np.float32)
    if not _is_compressed(file) and len(proxy.shape) <= 3:
        stored = np.fromfile(file, proxy.dtype, math.prod(proxy.shape), offset=proxy.offset)
        return rescaled(stored.reshape(proxy.shape, order="F"), float(proxy.slope), float(proxy.inter))
    with gzip.open(file) if _is_compressed(file) else open(file, "rb") as stream:
        unscaled = ArrayProxy(stream, (proxy.shape, proxy.dtype, proxy.offset), mmap=False)
        array = with_channels(unscaled, options.channel)
        if _is_compressed(file) and array.size == math.prod(proxy.shape):
            while stream.read(2**16):  # to the checksum at the end, which shows damage
                pass
    return rescaled(array, float(proxy.slope), float(proxy.inter))


def _header_says(image: Any) -> tuple[list[str], float]:
    """(what a person should know of the geometry, millimetres of a unit)."""
    import nibabel

    header, notes, mm = image.header, [], 1.0
    if isinstance(header, nibabel.Nifti1Header):
        if not any(int(header[f"{kind}_code"]) for kind in ("qform", "sform")):
            notes.append("no orientation in the NIfTI header (qform and sform code 0): taken as its affine says")
        mm = MM.get(int(header["xyzt_units"]) & 7, 1.0)
        if mm != 1:
            notes.append(f"lengths in units of {mm:g} mm")
    elif isinstance(header, nibabel.AnalyzeHeader):
        notes.append("Analyze headers do not tell left from right: taken as nibabel does; see --orientation")
    return notes, mm


def _is_compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def _require_true_name(path: Path) -> None:
    """Raises BadFile where a file is compressed and not called so, or the other way round."""
    with open(path, "rb") as file:
        gzipped = file.read(2) == GZIP
    if gzipped and not _is_compressed(path):
        raise BadFile(f"is compressed (gzip), which its name does not say; rename it to {path.name}.gz")
    if not gzipped and _is_compressed(path):
        name = path.stem if path.suffix.lower() == ".gz" else f"{path.stem}.mgh"
        raise BadFile(f"is not compressed, whatever its name says; rename it to {name}, or copy it again")
