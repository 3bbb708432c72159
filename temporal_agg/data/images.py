"""Image files as everybody sees them: one function opens them for readers, converters and the command line."""

import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "ImageError", "is_image", "open_image"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # what a folder's frames are called

# What is decoded, whatever a file is called. Others of Pillow's formats run a program (EPS), or no camera writes them.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# EXIF orientation -> how the stored picture is turned to stand upright.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(OSError):
    """A frame that cannot be used; the message names its path."""


def is_image(name: str) -> bool:
    """Whether a file of this name is a frame of a folder of frames."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def open_image(path: str | Path) -> Image.Image:
    """Reads an image file: RGB, 8 bits a channel, upright.

    A picture that says by EXIF that it is turned is turned; 16 bits become the upper 8 of them; of several pictures in
    a file the first one is taken; greyscale, palettes and CMYK become RGB, and transparency is left out (the colours
    below it are shown), all as OpenCV and so all detectors have it. The content decides on the format, not the name:
    BMP, GIF, JPEG, PNG, PPM, TIFF or WebP.

    Args:
        path: of a regular file, or a link to one; pipes and devices are refused and not opened.

    Raises:
        ImageError: a file that is missing, truncated or no image of these; the message names it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            image.load()
            return _rgb(_upright(image))
    except FileNotFoundError as error:
        raise ImageError(f"cannot read the image {path}: there is no such file.") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"cannot read the image {path}: it is no image, or of a kind that is not read ({', '.join(FORMATS)})."
        ) from error
    except Exception as error:  # decoders raise what they stumble over: OSError, SyntaxError, struct.error, ...
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"cannot read the image {path}: {said or type(error).__name__}.") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode[0] in "IF":
        raise ValueError(f"it has more than 16 bits a channel (mode {image.mode}): convert it to 8 or 16 bits")
    elif image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
