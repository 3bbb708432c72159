"""A video and the boxes of its people -> tracklets in the folder layout of temporal-agg.

    python examples/tracklets_from_video.py door.mp4 door.csv --out people

The CSV file has the columns frame,id,left,top,width,height, and may have confidence and visibility: one row a box, in
pixels from the upper left corner, frames counted from --first-frame (0) in the order in which the video shows them.
Several cameras: video and boxes in turns, `door.mp4 door.csv hall.mp4 hall.csv --shared-ids --cameras 1`.

It needs OpenCV: pip install temporal-agg[flow]. The rest is as in tracklets_from_mot.py, which lies beside this file.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tracklets_from_mot import Box, common_arguments, make

try:
    import cv2
except ImportError as error:
    raise SystemExit(f"tracklets_from_video.py: needs OpenCV ({error}): pip install temporal-agg[flow]") from error

COLUMNS = ("frame", "id", "left", "top", "width", "height")


class Video:
    """Frames by their numbers, and boxes."""

    def __init__(self, file: Path, boxes: Path, first_frame: int, confidence: float):
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: expected a video.")
        self.file, self.name, self.first = file, file.stem, first_frame
        video = cv2.VideoCapture(str(file))
        ok, image = video.read()
        video.release()
        if not ok:
            raise OSError(f"OpenCV cannot read {file}: it is no video, or of a kind that this OpenCV does not know.")
        self.size = image.shape[1], image.shape[0]
        self.boxes = list(read_boxes(boxes, confidence))
        if not self.boxes:
            raise ValueError(f"{boxes} has no box (of a confidence of at least {confidence}).")
        self.span = first_frame, max(box.frame for box in self.boxes)
        if min(box.frame for box in self.boxes) < first_frame:
            raise ValueError(f"{boxes} has boxes before frame {first_frame}: pass --first-frame.")

    def frames(self, numbers: list[int]) -> Iterator[tuple[int, Image.Image]]:
        # One after the other: to jump to a frame is off by some in many files.
        video = cv2.VideoCapture(str(self.file))
        at = self.first
        try:
            for number in numbers:
                while at < number and video.grab():
                    at += 1
                ok, image = video.read()
                if at < number or not ok:
                    raise ValueError(f"{self.file} ends before frame {number}, which has boxes.")
                at += 1
                yield number, Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        finally:
            video.release()


def read_boxes(file: Path, confidence: float) -> Iterator[Box]:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: expected a CSV file with the columns {','.join(COLUMNS)}.")
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{file}: the first line should name the columns; missing {', '.join(missing)}.")
        for row in reader:
            try:
                numbers = [float(row[column]) for column in COLUMNS]
                sure, visibility = (float(row.get(column) or 1) for column in ("confidence", "visibility"))
            except (TypeError, ValueError):
                found = list(row.values())
                raise ValueError(f"{file}, line {reader.line_num}: expected numbers, got {found}.") from None
            if sure >= confidence and min(numbers[4:]) > 0:
                yield Box(int(numbers[0]), int(numbers[1]), *numbers[2:], visibility)


def main(argv: list[str] | None = None) -> None:
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="video and boxes, in turns")
    parser.add_argument("--first-frame", type=int, default=0, help="the number of the video's first frame (0)")
    common_arguments(parser)
    args = parser.parse_args(argv)
    try:
        if len(args.files) % 2:
            raise ValueError(f"expected a video and its boxes, in turns, got {len(args.files)} files.")
        pairs = zip(args.files[::2], args.files[1::2], strict=True)
        make([Video(video, boxes, args.first_frame, args.confidence) for video, boxes in pairs], args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error


if __name__ == "__main__":
    main()
