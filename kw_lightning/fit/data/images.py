"""Image files as RGB of 8 bits a channel, and one line that names the file where that cannot be."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from kw_lightning.errors import RunError, first_line

SIXTEEN_BITS = {"PNG", "PPM"}
"""Formats whose grey values fill 16 bits where PIL hands them out in 32."""


def read_image(path: str, content: bytes | None = None) -> Image.Image:
    """Return an image file as RGB of 8 bits a channel; 16 bits are scaled by their range, as no bits are cut off.

    Args:
        path: of the file; with `content` its name for messages only.
        content: what is in it, where it is at hand.

    Raises:
        RunError: the file cannot be read, is damaged, is larger than PIL reads (`PIL.Image.MAX_IMAGE_PIXELS`), **or**
            holds numbers of 32 bits, which have no range to be scaled by.
    """
    try:
        with open(path, "rb") if content is None else BytesIO(content) as file:
            image = Image.open(file)
            image.load()
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise RunError(f"{path}: not an image of a known format, or a damaged one") from None
    except Exception as error:  # whatever a decoder makes of a stranger's bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise RunError(f"{path}: the image cannot be read: {reason}") from None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        grey = np.asarray(image).astype(np.float32) / 257  # 65,535 becomes 255
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise RunError(
            f"{path}: an image of 32-bit numbers ({image.format}, mode {image.mode}), which do not say how much is "
            "white; convert it to 8 or 16 bits"
        )
    return image.convert("RGB")
