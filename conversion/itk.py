"""NRRD and MetaImage through SimpleITK; their headers are read here first, as ITK trusts whatever they claim."""

from __future__ import annotations

import io
import math
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from conversion.claims import beside, require_room
from conversion.volume import TO_RAS, BadFile, Options, Volume, luminance, reason, with_channels

HEADER_BYTES = 2**20
PREFIXES = {"": 1e3, "centi": 10.0, "milli": 1.0, "micro": 1e-3, "nano": 1e-6}
MM = {"nm": 1e-6, "um": 1e-3, "mm": 1.0, "cm": 10.0, "m": 1e3}
MM |= dict.fromkeys(("\u00b5m", "\u03bcm", "micron", "microns"), 1e-3)
MM |= {f"{a}{b}": mm for a, mm in PREFIXES.items() for b in ("meter", "meters", "metre", "metres")}


def read_itk(path: Path, options: Options) -> Volume:
    """A volume, or a picture where there are two axes; colours in 8 bits become their luminance."""
    import SimpleITK

    header = Header(path)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    try:
        reader.ReadImageInformation()
        voxel = SimpleITK.Image([1] * reader.GetDimension(), reader.GetPixelID(), reader.GetNumberOfComponents())
        bytes_each = voxel.GetSizeOfPixelComponent() * voxel.GetNumberOfComponentsPerPixel()
        require_room(bytes_each * math.prod(reader.GetSize()), header.stored, header.compressed)
        image = reader.Execute()
    except RuntimeError as error:
        raise _explained(error) from None
    axes, array = image.GetDimension(), SimpleITK.GetArrayFromImage(image)
    header.require_whole(array)
    array = array.transpose(*range(axes)[::-1], *range(axes, array.ndim))
    colours = array.dtype == np.uint8 and array.ndim > axes and array.shape[-1] in (3, 4) and options.channel is None
    notes = ["colours, taken as their luminance"] if colours else []
    array = luminance(array) if colours else array
    affine, flat = np.eye(4), axes == 2
    steps = np.array(image.GetDirection()).reshape(axes, axes) * image.GetSpacing() * header.mm
    size = min(axes, 3)
    affine[:size, :size], affine[:size, 3] = steps[:size, :size], np.array(image.GetOrigin()[:size]) * header.mm
    if flat:
        array = array[:, :, None]
    if header.mm != 1:
        notes.append(f"lengths in units of {header.mm:g} mm")
    return Volume(with_channels(array, options.channel), TO_RAS @ affine, notes, flat=flat)


def _explained(error: RuntimeError) -> BadFile:
    """What to do about an error of ITK."""
    text = reason(error)
    if "change spacing" in text:
        return BadFile(f"has no usable geometry (spacing {text.rpartition(' to ')[2]}); correct its header")
    if "domain axes" in text:
        return BadFile(
            "has four axes in a space of three, all called space or time; in its header, set the kind of the one that "
            "counts channels to list (kinds: domain domain domain list)"
        )
    if "No such file" in text:  # which ITK says of everything that goes wrong with the data
        return BadFile("is damaged: its voxels cannot be read; copy it again or export it again")
    return BadFile(f"cannot be read ({text}); copy it again or export it again")


class Header:
    """What the text at the beginning of a NRRD or MetaImage file says about its data.

    Has mm (that a unit of length is), files (with the voxels), stored (their bytes) and compressed.
    Raises BadFile for data outside the folder, for files that are missing, and for units that are no lengths.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            head = io.BytesIO(file.read(HEADER_BYTES))
        nrrd = head.getvalue().startswith(b"NRRD")
        self.fields: dict[str, str] = {}
        for line in head:
            key, _, value = line.decode("latin-1").partition(":" if nrrd else "=")
            key, value = key.strip().lower().replace(" ", ""), value.strip()
            if not value.startswith("="):  # NRRD's key:=value is for remarks
                self.fields[key] = value
            if key == ("" if nrrd else "elementdatafile") or (key == "datafile" and value.startswith("LIST")):
                break
        self.mm = self._unit()
        names = self._names(self.fields.get("datafile" if nrrd else "elementdatafile", "LOCAL"), head)
        self.files = [beside(path, name) for name in names] or [path]
        self.begin = 0 if names else head.tell()
        self.stored = sum(file.stat().st_size for file in self.files) - self.begin
        self.zlib = self.fields.get("compresseddata", "").lower() == "true"
        if self.zlib and (size := int(self.fields.get("compresseddatasize") or 0)) > self.stored:
            raise BadFile(f"is truncated: {self.stored} of {size} compressed bytes are there; copy it again")
        self.gzip = self.fields.get("encoding", "").lower() in ("gzip", "gz")
        text = self.fields.get("binarydata", "").lower() == "false"
        self.compressed = self.zlib or text or self.fields.get("encoding", "raw").lower() != "raw"

    @staticmethod
    def _names(value: str, rest: Iterable[bytes]) -> list[str]:
        """The data files; none where the voxels stand in the header's own."""
        if value.upper() in ("LOCAL", "LOCALFILE"):
            return []
        if value.upper().startswith("LIST"):
            return [name for line in rest if (name := line.decode("latin-1").strip())]
        series = re.fullmatch(r"([^%]*%0?\d?d[^%\s]*) +(\d{1,6}) +(\d{1,6}) +([1-9]\d{0,5})(?: +\d+)?", value)
        if series:  # a.%03d.raw, the first number, the last, the step
            return [series[1] % number for number in range(int(series[2]), int(series[3]) + 1, int(series[4]))]
        return [value]

    def _unit(self) -> float:
        """Millimetres of the unit in which spacings are written."""
        units = [name for key in ("spaceunits", "units") for name in re.findall(r'"([^"]*)"', self.fields.get(key, ""))]
        units = {name.strip().lower() for name in (*units, self.fields.get("distanceunits", ""))} - {"", "?", "none"}
        if len(units) > 1 or not units <= MM.keys():
            raise BadFile(f"has units that are not one of length ({', '.join(sorted(units))}); write mm in its header")
        return MM[units.pop()] if units else 1.0

    def require_whole(self, array: np.ndarray) -> None:
        """Raises BadFile where compressed voxels end early or are damaged: ITK fills up with zeros and says nothing.

        The stream ends with a checksum of what it holds; only where that differs is it decompressed again.
        """
        if not (self.zlib or self.gzip):
            return
        names = ("endian", "binarydatabyteordermsb", "elementbyteordermsb")
        swapped = any(self.fields.get(name, "").lower() in ("big", "true") for name in names)
        voxels = array.byteswap() if swapped else array
        size = int(self.fields.get("compresseddatasize") or self.stored)
        stream, count = zlib.decompressobj(wbits=47), 0  # of zlib or of gzip
        with open(self.files[0], "rb") as file:
            file.seek(self.begin + max(size - 8, 0))
            end = file.read(8)
            if end[4:] == zlib.adler32(voxels).to_bytes(4, "big") if self.zlib else end[:4] == _crc(voxels):
                return
            file.seek(self.begin)
            while not stream.eof and count <= array.nbytes and (piece := stream.unconsumed_tail or file.read(2**20)):
                count += len(stream.decompress(piece, 2**24))
        if not stream.eof or count != array.nbytes:
            raise BadFile(
                f"is truncated or damaged: its compressed data end after {count} of {array.nbytes} bytes; copy it again"
            )


def _crc(voxels: np.ndarray) -> bytes:
    return zlib.crc32(voxels).to_bytes(4, "little")
