"""DICOM headers: files opened safely, refused by name where they hold no image, values wherever they stand."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from conversion.volume import BadFile, reason

ANNOTATIONS = {"SEG", "RTSTRUCT"}  # modalities of label maps, see conversion.dicom_labels
NOT_IMAGES = ANNOTATIONS | {"RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC"}
NEED_POSITIONS = {"CT", "MR", "PT", "NM"}  # modalities of slices, never of single radiographs
RADIOGRAPHS = {"CR", "DX", "MG", "IO", "PX", "RG"}  # projections, also where a header gives them a place in space
PLANAR = {"STATIC", "WHOLE BODY", "DYNAMIC", "GATED"}  # third value of the image type of NM that are pictures
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
DEFLATED = b"1.2.840.10008.1.2.1.99"
SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
MOST_INFLATED = 100  # times its size may a compressed file grow: images do by 2 to 20, zip bombs by 1,000
FRAME_BYTES = 8  # any frame takes at least as many
SMALL = 2**26  # bytes that a file or frame may claim to hold, however small it is


@contextlib.contextmanager
def in_file(path: Path, count: int = 1) -> Iterator[None]:
    """BadFile for whatever goes wrong with one of `count` files, with its name where it is not the only one."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # libraries fail in many ways on arbitrary bytes
        said = error if isinstance(error, BadFile) else f"cannot be read ({reason(error)}); copy or export it again"
        raise BadFile(f"{path.name}: {said}" if count > 1 else f"{said}") from None


def data_set(path: Path, pixels: bool = False) -> Any:
    """The pydicom data set of a file, plain, gzipped or deflated; values that nobody asks for are not checked."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about headers, which pydicom mends; they name no file
        head = file.read(512)
        file.seek(0)
        source: BinaryIO = file
        if head.startswith(b"\x1f\x8b"):
            source = io.BytesIO(_limited(gzip.GzipFile(fileobj=file).read, path))
            head = source.getvalue()[:512]
        if DEFLATED in head and head[128:132] == b"DICM":
            source.seek(144 + struct.unpack("<I", head[140:144])[0])
            inflated, rest = zlib.decompressobj(-zlib.MAX_WBITS), source.read()
            _limited(lambda limit: inflated.decompress(rest, limit), path)
            source.seek(0)
        try:
            header = pydicom.dcmread(source, stop_before_pixels=not pixels, force=True)
        except MemoryError:
            raise BadFile("claims to hold more than fits into memory; copy it again or remove it") from None
    if "NumberOfFrames" in header and frame_count(header) * FRAME_BYTES > path.stat().st_size:
        raise BadFile(f"claims {header.NumberOfFrames} frames, more than it can hold; copy it again")
    return header


def _limited(inflate: Callable[[int], bytes], path: Path) -> bytes:
    limit = max(SMALL, MOST_INFLATED * path.stat().st_size)
    content = inflate(limit + 1)
    if len(content) > limit:
        raise BadFile(f"is compressed more than {MOST_INFLATED} times, as no image is; decompress it, or remove it")
    return content


def is_dicom(path: Path) -> bool:
    """Whether a file of any name holds DICOM, with or without its preamble."""
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":
        return True
    # The first element of a file without preamble is of group 2 or 8, and short.
    group, length = head[:2], head[6:8] if head[4:6].isalpha() else head[4:8]
    if group not in (b"\x02\x00", b"\x08\x00", b"\x00\x08") or len(head) < 132:
        return False
    if int.from_bytes(length, "little" if group[0] else "big") > 1024:
        return False
    try:
        header = data_set(path)
        return "SOPClassUID" in header or ("Modality" in header and "Rows" in header)
    except Exception:  # arbitrary bytes
        return False


def dicom_header(path: Path) -> Any:
    """The data set of a file without its pixels. Raises BadFile where it holds no image to convert."""
    with in_file(path):
        header = data_set(path)
        require_image(header)
        return header


def require_image(header: Any) -> bool:
    """Whether it is of slices, not a picture. Raises BadFile where a header is of neither."""
    modality, rows, kind = (header.get(name) for name in ("Modality", "Rows", "SOPClassUID"))
    if kind is None and rows is None:
        raise BadFile("is not a DICOM file, whatever its name says; remove it or rename it")
    if rows is None or modality in NOT_IMAGES:
        what = getattr(kind, "name", kind) or modality
        raise BadFile(f"is DICOM without an image ({what}); remove it or leave it out with --on_error skip")
    if kind == WHOLE_SLIDE or modality == "SM":
        raise BadFile("is a whole-slide image, tiles of a microscope slide; export a level of it as PNG or TIFF")
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax and syntax.is_transfer_syntax and any(video in syntax.name for video in ("MPEG", "HEVC")):
        raise BadFile(f"is a video ({syntax.name}); export the frames you want as PNG")
    if is_placed(header):
        return True
    if modality not in NEED_POSITIONS or is_planar(header):
        return False
    if str(kind or "").startswith(SECONDARY_CAPTURE):
        raise BadFile("is a screenshot or a report saved as image (secondary capture), no slice; leave it out")
    if modality == "NM" and image_type(header)[2:3] == ("TOMO",):
        raise BadFile("holds projections, from which slices are yet to be reconstructed; leave it out")
    return True  # what it lacks is told when it is read


def is_placed(header: Any) -> bool:
    """Whether a header gives its frames places in space: as slice, as frames, or as those of a gamma camera."""
    if PER_FRAME in header:
        return bool(value(header, 0, "PlanePositionSequence", "ImagePositionPatient"))
    camera = detector(header)
    for name, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6)):
        if len(header.get(name) or camera.get(name) or ()) != count:
            return False
    single = frame_count(header) == 1 or bool(camera) or is_mosaic(header)
    return single and header.get("Modality") not in RADIOGRAPHS


def is_planar(header: Any) -> bool:
    """Whether it is a gamma camera's picture, such as a bone scan."""
    return header.get("Modality") == "NM" and image_type(header)[2:3] != () and image_type(header)[2] in PLANAR


def is_mosaic(header: Any) -> bool:
    return "MOSAIC" in image_type(header)


def detector(header: Any) -> Any:
    """The part of an NM header that places a reconstructed volume; {} where it has none."""
    if "DetectorInformationSequence" not in header:
        return {}
    found = header.get("DetectorInformationSequence") or [{}]
    return found[0] if image_type(header)[2:3] in ((), ("RECON TOMO",), ("RECON GATED TOMO",)) else {}


def image_type(header: Any) -> tuple[str, ...]:
    found = header.get("ImageType") or ()
    return (found,) if isinstance(found, str) else tuple(map(str, found))


def frame_count(header: Any) -> int:
    """The number of frames. Raises BadFile where a header claims what no file can hold."""
    count = int(header.get("NumberOfFrames") or 1)
    listed = len(header[PER_FRAME].value) if PER_FRAME in header else count
    if count < 1 or listed < count:
        raise BadFile(f"claims {count} frames but describes {listed}; export it again")
    return count


def value(header: Any, frame: int, sequence: str, name: str, own_name: str = "") -> Any:
    """A value of a header; in multi-frame files it stands in a sequence of the frame, or of all frames.

    own_name: of the same thing in a header of one frame, if it is another.
    """
    for groups, at in ((PER_FRAME, frame), (SHARED, 0)) if PER_FRAME in header else ():
        items = header[groups].value if groups in header else []
        found = items[at].get(sequence) if at < len(items) else None
        if found and found[0].get(name) is not None:
            return found[0].get(name)
    return header.get(own_name or name)


def numbers(found: Any) -> tuple[float, ...]:
    """The numbers of a value that holds one, several or none."""
    if found is None or found == "":
        return ()
    return tuple(map(float, found)) if isinstance(found, Sequence) and not isinstance(found, str) else (float(found),)
