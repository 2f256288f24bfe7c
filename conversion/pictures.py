"""Image files: single pictures, which training reads as they are or as PNG, and TIFF stacks, which are volumes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from conversion.claims import require_memory
from conversion.volume import BadFile, Options, Volume, by, reason, with_channels
from datasets.index import IMAGE_FORMATS, IMAGE_SUFFIXES, MAX_IMAGE_PIXELS, holds_labels, image_layout
from datasets.render import grey_of

FORMATS = (*IMAGE_FORMATS, "GIF", "WEBP", "JPEG2000", "PPM")  # PPM: also PGM
SUFFIXES = IMAGE_SUFFIXES | {".gif", ".webp", ".jp2", ".j2k", ".pgm", ".ppm", ".pnm"}


def read_picture(path: Path, options: Options) -> Volume:
    """Grey values of a picture [H, W, 1], or of a TIFF stack [H, W, pages] without geometry."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            layout = image_layout(image)
            if layout["height"] * layout["width"] > MAX_IMAGE_PIXELS:
                raise BadFile(f"has more than {MAX_IMAGE_PIXELS} pixels; reduce it or remove it")
            if layout["slices"] > 1:
                return _stack(image, layout["slices"], options)
            as_file = path.suffix.lower() in IMAGE_SUFFIXES and image.format in (*IMAGE_FORMATS, "MPO")
            return Volume(grey_of(image)[:, :, None], flat=True, as_file=as_file)
    except (BadFile, MemoryError):
        raise
    except UnidentifiedImageError:
        *others, last = FORMATS
        raise BadFile(f"is not a readable {', '.join(others)} or {last} image; export it again or remove it") from None
    except Exception as error:  # decoders fail in many ways on damaged data
        raise BadFile(f"broken image data ({reason(error)}); export it again or remove it") from None


def require_labels(path: Path, copied: bool) -> None:
    """Raises BadFile where pixels are no label values. copied: a palette stays, whose indices are values, too."""
    with Image.open(path, formats=FORMATS) as image:
        if image.format in ("JPEG", "MPO"):
            raise BadFile("is JPEG, whose compression changes label values; save the mask as PNG")
        if not holds_labels(image.mode) or (image.mode == "P" and not copied):
            raise BadFile(f"has colours (mode {image.mode}), which are no label values; save them as numbers, in PNG")


def grey_png(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities in 8 or 16 bits: whole ones as they are, from 0 up where they are negative; others stretched."""
    if pixels.dtype.kind == "f" or high - low > 65535:
        return np.rint((pixels.astype(np.float64) - low) * (65535 / (high - low))).astype(np.uint16)
    dtype = np.uint8 if low >= 0 and high < 256 else np.uint16
    return (pixels.astype(np.int64) - min(0, int(low))).astype(dtype)


def _stack(image: Image.Image, pages: int, options: Options) -> Volume:
    if image.format != "TIFF":
        raise BadFile(f"is a film of {pages} frames; export the frames you want as PNG")
    about = str(image.tag_v2.get(270, ""))
    counts = {key: int(n) for key, n in re.findall(r"\b(channels|frames|SizeC|SizeT)=\"?(\d{1,6})", about)}
    require_memory(pages * image.width * image.height * 4)
    slices = []
    for page in range(pages):
        image.seek(page)
        slices.append(grey_of(image))
        if slices[-1].shape != slices[0].shape or slices[-1].dtype != slices[0].dtype:
            raise BadFile("is a stack of pages of several sizes or types; keep those of one, as a volume")
    several = [count for count in counts.values() if count > 1]
    if not several:
        return Volume(np.stack(slices, axis=2))
    if len(several) > 1 or "SizeC" in counts or pages % several[0]:
        raise BadFile(f"is a stack of several channels or times ({by(several)}); save one volume per file")
    channels = np.stack(slices).reshape(-1, several[0], *slices[0].shape)  # as ImageJ writes: channels in turn
    if "frames" in counts and counts["frames"] > 1:
        channels = np.stack(slices).reshape(several[0], -1, *slices[0].shape).swapaxes(0, 1)
    return Volume(with_channels(channels.transpose(2, 3, 0, 1), options.channel))
