"""A video and the boxes of its people -> tracklets in the folder layout of temporal-agg.

    python examples/tracklets_from_video.py door.mp4 door.csv --out people

The CSV file has the columns frame,id,left,top,width,height (or right,bottom), and may have confidence, class and
visibility: one row a box, in pixels from the upper left corner, frames counted from 0 in the order in which the video
shows them. A text file of a tracker, as tracklets_from_mot.py reads it, will do as well; it counts frames from 1.
Several cameras: video and boxes in turns, `door.mp4 door.csv hall.mp4 hall.csv --shared-ids --cameras 1`.

It needs OpenCV: pip install temporal-agg[flow]. The rest is as in tracklets_from_mot.py, which lies beside this file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tracklets_from_mot import box_filters, common_arguments, make

from temporal_agg.data.boxes import read_boxes
from temporal_agg.files import print_any_name

try:
    import cv2
except ImportError as error:
    raise SystemExit(f"tracklets_from_video.py: needs OpenCV ({error}): pip install temporal-agg[flow]") from error


class Video:
    """Frames by their numbers, and boxes."""

    def __init__(self, file: Path, boxes: Path, args: argparse.Namespace):
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: expected a video.")
        self.file, self.name = file, file.stem
        video = cv2.VideoCapture(str(file))
        ok, image = video.read()
        video.release()
        if not ok:
            raise OSError(f"OpenCV cannot read {file}: it is no video, or of a kind that this OpenCV does not know.")
        self.size = image.shape[1], image.shape[0]
        self.found = read_boxes(boxes, args.columns, **box_filters(args))
        self.first = self.found.first_frame if args.first_frame is None else args.first_frame
        numbers = [box.frame for box in self.found.boxes]
        self.span = self.first, max(numbers)
        if min(numbers) < self.first:
            raise ValueError(f"{boxes} has boxes before frame {self.first}: pass --first-frame.")

    def frames(self, numbers: list[int]) -> Iterator[tuple[int, Image.Image | OSError]]:
        # One after the other: to jump to a frame is off by some in many files.
        video = cv2.VideoCapture(str(self.file))
        at = self.first
        try:
            for number in numbers:
                while at < number and video.grab():
                    at += 1
                ok, image = video.read()
                if at < number or not ok:
                    ended = OSError(
                        f"{self.file} ends before frame {number}, which has boxes. Its first frame is taken for number "
                        f"{self.first}: --first-frame says another."
                    )
                    yield from ((later, ended) for later in numbers if later >= number)
                    return
                at += 1
                yield number, Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        finally:
            video.release()


def main(argv: list[str] | None = None) -> None:
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="video and boxes, in turns")
    parser.add_argument("--first-frame", type=int, help="the number of the video's first frame (CSV: 0, text: 1)")
    common_arguments(parser)
    args = parser.parse_args(argv)
    try:
        if len(args.files) % 2:
            raise ValueError(f"expected a video and its boxes, in turns, got {len(args.files)} files.")
        pairs = zip(args.files[::2], args.files[1::2], strict=True)
        make([Video(video.expanduser(), boxes, args) for video, boxes in pairs], args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error


if __name__ == "__main__":
    print_any_name()
    main()
