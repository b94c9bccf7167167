"""Images of every mode as RGB of eight bits, upright and opaque."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base

# What is white where the file does not say: 32-bit integers and floating numbers.
_WHITES = (1, 255, 65535, 2**31 - 1, 2**32 - 1)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_SIGNED = 2


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image in mode RGB, turned as its EXIF data says.

    - Of 16 or 32 bits and floating numbers the range of the file becomes 0 to 255, and does not
      saturate. Where the file does not state its range, white is the least of 1, 255, 65535,
      2^31 - 1 and 2^32 - 1 that no pixel exceeds by more than a tenth.
    - What is transparent is laid on black, so that hidden colors stay hidden.
    - EXIF data that cannot be parsed counts for nothing.

    Raises:
        Exception: of any type; decoders differ in what they raise.
    """
    # Of a color of 16 bits, eight are kept, which do not tell the transparent one from its
    # neighbors.
    if image.mode == "RGB" and any("RGB;16" in str(tile) for tile in image.tile):
        image.info.pop("transparency", None)
    image.load()
    turn = _turn(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _narrow(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def cut(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image, scaled to a size."""
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height))


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(Base.Orientation))
    except Exception:
        return None


def _narrow(image: Image.Image) -> Image.Image:
    """Mode L or LA of an image with one channel of 16 or 32 bits."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "I" and tags and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)
    white = _white(image, values, tags)
    key = image.info.get("transparency")
    hidden = values == key if isinstance(key, int) else np.zeros_like(values, bool)
    scaled = np.nan_to_num(values.astype(np.float64), posinf=white, neginf=0) * (255 / white)
    gray = scaled.clip(0, 255).round().astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        gray = 255 - gray
    if not hidden.any():
        return Image.fromarray(gray)
    return Image.fromarray(np.stack([gray, np.where(hidden, 0, 255).astype(np.uint8)], -1))


def _white(image: Image.Image, values: np.ndarray, tags: dict) -> float:
    bits = tags.get(_BITS, (32 if image.mode in "IF" and image.format != "PPM" else 16,))[0]
    if image.mode != "F" and bits <= 16:
        return 2.0 ** (bits - (tags.get(_SAMPLE_FORMAT) == (_SIGNED,))) - 1
    finite = values[np.isfinite(values)]
    highest = float(finite.max(initial=0))
    return next((float(white) for white in _WHITES if highest <= 1.1 * white), highest)
