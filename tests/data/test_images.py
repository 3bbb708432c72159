"""One function opens every image: what comes out is what people see."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from temporal_agg.data import ImageError, Tracklet, open_image

RNG = np.random.default_rng(0)


def picture(height=6, width=4):
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


# How a picture has to be stored so that the orientation puts it upright: the inverse of what the EXIF standard says.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_orientation(tmp_path, orientation, suffix):
    upright = picture()
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(path, exif=exif(orientation), **options)
    image = open_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), upright)
    np.testing.assert_array_equal(Tracklet([path], 1).load([0])[0].permute(1, 2, 0), upright)


def test_orientation_as_opencv_has_it(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed (pip install temporal-agg[flow])")
    for orientation in range(1, 9):
        path = tmp_path / f"{orientation}.jpg"
        pixels = np.repeat(np.repeat(picture(4, 3), 16, 0), 16, 1)
        Image.fromarray(pixels).save(path, exif=exif(orientation), quality=100, subsampling=0)
        np.testing.assert_allclose(
            np.asarray(open_image(path), int), cv2.imread(str(path))[..., ::-1].astype(int), atol=6
        )


@pytest.mark.parametrize("content", [b"Exif\0\0II*\0" + b"\xff" * 40, b"Exif\0\0", b"\0" * 20])
def test_damaged_exif_says_nothing(tmp_path, content):
    Image.fromarray(picture(32, 16)).save(tmp_path / "a.jpg", exif=content)
    assert open_image(tmp_path / "a.jpg").size == (16, 32)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_the_upper_eight(tmp_path, suffix):
    values = np.array([[0, 255, 256, 40000], [65280, 65535, 12345, 32767]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    pixels = np.asarray(open_image(tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(pixels, np.repeat((values >> 8)[..., None], 3, 2))


def test_sixteen_bits_of_a_netpbm_file(tmp_path):
    values = np.array([[0, 300], [65535, 40000]], ">u2")
    (tmp_path / "a.png").write_bytes(b"P5 2 2 65535 " + values.tobytes())  # the content decides, not the name
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png"))[..., 0], values >> 8)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_more_than_sixteen_bits_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((4, 4), 70000, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="more than 16 bits") as error:
        open_image(tmp_path / "a.tif")
    assert str(tmp_path / "a.tif") in str(error.value)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_pictures(tmp_path, suffix):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    red, _, blue = np.asarray(open_image(tmp_path / f"a.{suffix}"))[4, 4]
    assert red > 200
    assert blue < 50


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_is_left_out(tmp_path, mode):
    pixels = np.dstack([picture(), np.zeros((6, 4), np.uint8)])
    image = Image.fromarray(pixels)
    want = image.convert("RGB")
    if mode != "RGBA":
        image, want = image.convert(mode), image.convert(mode).convert("RGBA").convert("RGB")
    image.save(tmp_path / ("a.png" if mode != "PA" else "a.tif"))
    np.testing.assert_array_equal(np.asarray(open_image(next(tmp_path.iterdir()))), np.asarray(want))


def test_a_palette_with_transparency(tmp_path, recwarn):
    image = Image.fromarray(picture()).convert("P", palette=Image.Palette.ADAPTIVE)
    want = np.asarray(image.convert("RGB"))
    image.save(tmp_path / "a.png", transparency=bytes(range(0, 240, 10)))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png")), want)
    assert not recwarn.list


def test_cmyk_as_printers_have_it(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = np.asarray(open_image(tmp_path / "a.jpg"))[8, 8]
    assert red > 200
    assert max(green, blue) < 60


def test_no_program_is_started(tmp_path, monkeypatch):
    """A PostScript file under any name: an interpreter in the path is not run."""
    mark, program = tmp_path / "was run", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 10.0\ntouch '{mark}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%id) (r) file\n"
    dos = struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(script), 0, 0, 0, 0, 0xFFFF) + script
    for name, content in (("1.jpg", script), ("2.png", dos), ("3.eps", script)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match="no image, or of a kind that is not read") as error:
            open_image(tmp_path / name)
        assert name in str(error.value)
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_devices_and_folders_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "1.jpg")
    (tmp_path / "2.jpg").mkdir()
    (tmp_path / "3.jpg").symlink_to("/dev/zero")
    (tmp_path / "4.jpg").symlink_to(tmp_path / "1.jpg")
    (tmp_path / "5.jpg").symlink_to(tmp_path / "5.jpg")
    code = "import sys; from temporal_agg.data import open_image, ImageError\n"
    code += "for path in sys.argv[1:]:\n try: open_image(path)\n except ImageError as error: print(error)"
    paths = [str(tmp_path / f"{i}.jpg") for i in range(1, 6)]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=100)
    said = done.stdout.splitlines()
    assert len(said) == 5
    assert all(path in line for path, line in zip(paths, said, strict=True))
    assert sum("no regular file" in line for line in said) == 4


def test_a_decompression_bomb_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"a\.png"):
        open_image(tmp_path / "a.png")
