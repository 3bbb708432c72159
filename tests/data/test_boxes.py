"""Boxes as tools write them."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from temporal_agg.data.boxes import LAYOUTS, Box, crop, people_in, read_boxes


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="boxes.txt", encoding="utf-8"):
        file = tmp_path / name
        file.write_bytes(("\n".join(rows) + "\n").encode(encoding))
        return file

    return write


def ids(found):
    return sorted({box.id for box in found.boxes})


# Two people, 1 and 2, who stand still, as each tool writes them; {f}: the frame.
TOOLS = {
    "mot-gt": ["{f},1,20,60,40,120,1,1,0.75", "{f},2,90,60,40,120,1,1,1", "{f},3,9,9,9,9,0,1,1", "{f},4,9,9,9,9,1,3,1"],
    "mot": ["{f},1,20,60,40,120,0.9,-1,-1,-1", "{f},2,90,60,40,120,1,-1,-1,-1"],
    "mot with coordinates": ["{f},1,20,60,40,120,0.9,3.5,-7.2,0", "{f},2,90,60,40,120,1,2.5,-7.2,0"],
    "mot of unknown confidence": ["{f},1,20,60,40,120,-1,-1,-1,-1", "{f},2,90,60,40,120,-1,-1,-1,-1"],
    "mot of nine": ["{f},1,20,60,40,120,0.9,-1,-1", "{f},2,90,60,40,120,1,-1,-1"],
    "seven": ["{f} 1 20 60 40 120 0.9", "{f} 2 90 60 40 120 0.8"],
    "six": ["{f},1,20,60,40,120", "{f},2,90,60,40,120"],
    "boxmot": ["{f},1,20,60,40,120,0.93,1,0", "{f},2,90,60,40,120,0.81,1,1"],
    "boxmot, certain": ["{f},1,20,60,40,120,1,1,0", "{f},2,90,60,40,120,1,1,1", "{f},-1,90,60,40,120,1,1,2"],
    "boxmot, alone": ["{f},1,20,60,40,120,0.93,0,0"],
    "boxmot, quoted": [
        '"{f}","1","20","60","40","120","0.93","1","0"',
        '"{f}","2","90","60","40","120","0.81","1","1"',
    ],
    "boxmot of eight": ["{f},1,20,60,40,120,0.93,0", "{f},2,90,60,40,120,0.9,0"],
    "visdrone": [
        "{f},0,0,0,60,60,0,0,0,0",
        "{f},1,20,60,40,120,1,1,0,0",
        "{f},2,90,60,40,120,1,2,0,1",
        "{f},3,9,9,9,9,1,4,0,0",
    ],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_known_tools_are_told_from_the_content(write, tool):
    found = read_boxes(write(*(row.format(f=f) for f in (1, 2, 3) for row in TOOLS[tool])))
    people = [1] if "alone" in tool else [1, 2]
    assert ids(found) == people
    assert len(found.boxes) == 3 * len(people), "every box of theirs"
    origin = 0 if tool.startswith(("boxmot", "visdrone")) else 1
    assert found.boxes[0][:6] == (1, 1, 20 - origin, 60 - origin, 40, 120)
    assert found.first_frame == 1
    assert found.rows == 3 * len(TOOLS[tool])
    assert sum(found.dropped.values()) == found.rows - len(found.boxes)
    name = {"seven": "mot", "six": "mot"}.get(tool, tool.split(",")[0].split(" ")[0])
    assert found.layout.split(" ")[0] == name


def test_what_the_columns_say(write):
    found = read_boxes(write(*(row.format(f=1) for row in TOOLS["mot-gt"])))
    assert [box.visibility for box in found.boxes] == [0.75, 1]
    assert found.dropped == {"to be ignored (flag 0)": 1, "of other classes than 1": 1}
    assert "left out: 1 to be ignored (flag 0)" in found.report()
    found = read_boxes(write(*(row.format(f=1) for row in TOOLS["visdrone"])))
    assert [box.visibility for box in found.boxes] == [1, 0.75]
    assert ids(read_boxes(write(*(row.format(f=1) for row in TOOLS["visdrone"])), classes=[4])) == [3]
    found = read_boxes(write(*(row.format(f=1) for row in TOOLS["mot"])), confidence=0.95)
    assert ids(found) == [2]
    assert found.dropped == {"of a confidence below 0.95": 1}


def test_unknown_is_said_by_minus_one(write):
    found = read_boxes(write("1,1,20,60,40,120,-1,-1,-1,-1"), confidence=0.5)
    assert found.boxes[0].confidence is None
    (box,) = read_boxes(write("1,1,20,60,40,120,1,-1,-1"), "mot-gt").boxes
    assert box.visibility is None
    found = read_boxes(write("1,1,20,60,40,120,0.9", "1,-1,90,60,40,120,0.9", "1,-7,99,60,40,120,0.9"))
    assert ids(found) == [1]
    assert found.dropped == {"without an identity (id below 0)": 2}
    with pytest.raises(ValueError, match=r"(?s)no box of a person.*run a tracker first"):
        read_boxes(write("1,-1,20,60,40,120,0.9"))
    header, rows = "frame,id,left,top,width,height", ["1,2,20,60,40,120", "1,,90,60,40,120", "2,nan,90,60,40,120"]
    for lines in (rows, [header, *rows]):  # pandas leaves an empty cell where there is no number
        found = read_boxes(write(*lines))
        assert ids(found) == [2]
        assert found.dropped == {"without an identity (id below 0)": 2}


def test_a_line_that_breaks_off_takes_no_column_from_the_others(write):
    lines = ["1,1,20,60,40,120,0.9,-1,-1,-1", "2,1,20,60,40,120,0.2,-1,-1,-1", "3,1,20,60,40,120"]
    found = read_boxes(write(*lines), "mot", confidence=0.5)
    assert [(box.frame, box.confidence) for box in found.boxes] == [(1, 0.9), (3, None)]
    assert found.dropped == {"of a confidence below 0.5": 1}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["1,1,20,60,40,120,1,1,0", "2,1,20,60,40,120,1,1,0"], "its 9 columns can be mot-gt or boxmot. Say"),
        (["1,1,20,60,40,120,1,1,0,0", "2,1,20,60,40,120,1,1,0,0"], "its 10 columns can be mot or visdrone"),
        (["1,1,20,60,40,120,1,2,3,4,5"], "its 11 columns are of no known layout"),
        (["1,1,20,60,40,120,0.5,1,0.5"], "its 9 columns are of no known layout"),
        (["1,1,2,6,4,12,0.5,0,0", "1,2,2,6,4,12,0.5,2,1"], r"boxes of the classes 0, 2: say .* --classes"),
        (
            ["1,1,20,60,40,120,1,0,0.93", "1,2,90,60,40,120,1,0,0.41"],
            "can be mot-gt or frame,.*,-,class,confidence. Say",
        ),
        (["1,1,20,60,40,120,1,2,1"], r"left out: 1 of other classes than 1.* --classes says which are people"),
        (
            [*["1,1,20,60,40,120,0.5"] * 2, "1,2,20,60,40,120"],
            "line 3 has 6 columns, the lines of the file have 6 to 7",
        ),
        (["inf,1,1,1,30,60"], "line 1: frame and id must be integers, and the box finite"),
        (["nan,1,1,1,30,60"], "line 1: frame and id must be integers"),
        (["1.5,1,1,1,30,60"], "line 1: frame and id must be integers"),
        (["1,2.5,1,1,30,60"], "id 2.5"),
        (["1,1,1,1,inf,60"], "line 1: .*box finite"),
        (["1,1,1,1,30"], "line 1: expected frame,id,left"),
        (["1,1,1,x,30,60"], "line 1: expected frame,id,left"),
        (["1,1_0,1,1,30,60"], r"line 1: expected frame,id,left.* got '1,1_0,"),
        (["1,1,1,1,٣٠,60"], "line 1: expected frame,id,left"),
        (["1_0,1,1,1,30,60"], "missing frame"),
        (["1,1,1,1,0,60"], "left out: 1 without an area"),
        (["1,1,0.1,0.1,0.04,0.2,0.9"], "left out: 1 of less than a pixel"),
        ([""], "is empty, missing frame, id"),
        (["left,top"], "missing frame, id, width, height"),
        (["frame,id,left,top,width,height", "1,1,1,x,1,1"], "line 2: expected numbers"),
        (["frame,id,left,top,width,height", "1,1,1_0,1,1,1"], "line 2: expected numbers, got '1,1,1_0,1,1,1'"),
        (["frame,id,left,top,width,height"], "has no box of a person"),
        (["frame,id,left,top,right", "1,1,1,1,1"], "missing bottom"),
    ],
)
def test_what_cannot_be_told_is_asked_for(write, rows, says):
    file = write(*rows)
    with pytest.raises(ValueError, match=says) as error:
        read_boxes(file)
    assert str(file) in str(error.value)


def test_columns_in_another_order_are_not_taken_for_the_usual_ones(write):
    """AI City's results of several cameras: camera, identity, frame and a box, then the world."""
    rows = [f"41 {person} {frame} {10 + frame} 20 60 160 -1 -1" for person in (1, 2) for frame in range(1, 5)]
    file = write(*rows)
    with pytest.raises(ValueError, match=r"boxes\.txt: read as mot .*, 6 of 8 boxes are .* what the columns are by"):
        read_boxes(file)
    found = read_boxes(file, "-,id,frame,left,top,width,height")
    assert (ids(found), len(found.boxes)) == ([1, 2], 8)
    assert found.boxes[-1] == Box(4, 2, 13, 19, 60, 160)  # pixels from 1 on
    assert len(read_boxes(file, "mot").boxes) == 2  # who says so is believed
    usual = [f"{frame},{person},10,20,60,160,0.9,-1,-1,-1" for person in (1, 2) for frame in range(1, 5)]
    assert len(read_boxes(write(*usual * 3)).boxes) == 8  # copies are no other boxes


def test_columns_by_name(write):
    nine = write(*(f"{f},1,20,60,40,120,1,1,0" for f in (1, 2)))
    assert len(read_boxes(nine, "boxmot").boxes) == 2
    assert read_boxes(nine, "mot-gt").boxes[0].visibility == 0
    assert read_boxes(nine, truth=True).boxes[0].visibility == 0, "a gt/gt.txt is a ground truth"
    named = read_boxes(nine, "frame,id,left,top,width,height,-,-,-")
    assert named.boxes[0][:6] == (1, 1, 19, 59, 40, 120)
    with pytest.raises(ValueError, match="a line has 9 columns, and 10 were named"):
        read_boxes(nine, "frame,id,left,top,width,height,-,-,-,-")
    for wrong in ("yolo", "frame,id,left,top", "frame,id,left,top,width,height,depth", "frame,frame,id,left,top,width"):
        with pytest.raises(ValueError, match="columns must be one of mot-gt, mot15-gt, mot, boxmot, visdrone"):
            read_boxes(nine, wrong)
    headed = write("f,i,a,b,w,h", "1,1,20,60,40,120")
    assert len(read_boxes(headed, "frame,id,left,top,width,height").boxes) == 1
    gap = read_boxes(write("1,1,20,60,40,120,,1,0.5", "2,1,20,60,40,120,1,1,"), "mot-gt")
    assert [box.visibility for box in gap.boxes] == [0.5, None], "what is left out moves nothing"
    assert read_boxes(write("1,1,20,60,40,120,0.5,", "2,1,20,60,40,120,0.5,")).layout.startswith("mot "), "a comma more"
    corners = read_boxes(write("7,3,20,60,50,160,0.5,1"), "id,frame,left,top,right,bottom,conf,-").boxes[0]
    assert corners == Box(3, 7, 19, 59, 30, 100, 0.5)
    with pytest.raises(ValueError, match="no column that is a class"):
        read_boxes(write("1,1,20,60,40,120,0.9"), classes=[1])
    assert all(layout.columns[:2] == ("frame", "id") for layout in LAYOUTS.values())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_and_text_as_editors_write_them(write, encoding):
    rows = ["Frame;ID;left;top;Width;height;score;note", "0;1;20;60;40;120;0.5;caf\u00e9", "1;1;20;60;40;120;;"]
    found = read_boxes(write(*rows, name="boxes.csv", encoding=encoding))
    assert found.boxes == [Box(0, 1, 20, 60, 40, 120, 0.5), Box(1, 1, 20, 60, 40, 120)]
    assert found.first_frame == 0
    found = read_boxes(write("# a comment", "", "1,1,20,60,40,120,0.5", encoding=encoding))
    assert found.boxes == [Box(1, 1, 19, 59, 40, 120, 0.5)]
    corners = ["frame,track_id,left,top,right,bottom", "0,1,20,60,60,180"]
    assert read_boxes(write(*corners)).boxes == [Box(0, 1, 20, 60, 40, 120)]
    for names in ("frame_idx,track_id,x1,y1,x2,y2", "frame_number,tracker_id,x_min,y_min,x_max,y_max"):  # of detectors
        assert read_boxes(write("# a comment", names, corners[1])).boxes == [Box(0, 1, 20, 60, 40, 120)]


def test_another_encoding_names_the_file(write):
    file = write("frame,id,left,top,width,height,note", "0,1,1,1,1,1,caf\u00e9", encoding="cp1252")
    with pytest.raises(ValueError, match=rf"{file} is not UTF-8"):
        read_boxes(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_boxes(file.with_name("nowhere"))


def test_somebody_has_one_box_in_a_frame(write):
    found = read_boxes(write("1,1,10,1,30,60,0.5", "1,1,20,1,30,60,0.9", "1,1,30,1,30,60,0.7", "2,1,40,1,30,60,0.1"))
    assert [(box.frame, box.left) for box in found.boxes] == [(1, 19), (2, 39)]
    assert found.dropped == {"of somebody who has another box in that frame": 2}


def test_people_who_can_be_seen():
    dropped = Counter()
    boxes = [
        Box(1, 1, 0, 0, 40, 100),
        Box(1, 2, 30, 1, 40, 100),  # in front of a quarter of 1
        Box(1, 3, 100, 0, 40, 40),  # too low
        Box(1, 4, -30, 0, 40, 100),  # a quarter is inside
        Box(1, 5, 400, 0, 40, 100),  # outside
        Box(1, 6, 150, 0, 40, 100, visibility=0.4),
        Box(2, 1, 0, 0, 40, 100),
        Box(2, 2, 10, 1, 40, 100),  # in front of three quarters of 1
    ]
    kept = people_in(boxes, (300, 200), dropped, visibility=0.5, min_height=48, occlusion=0.5)
    assert [(box.frame, box.id) for box in kept] == [(1, 1), (1, 2), (2, 2)]
    assert sorted(dropped.values()) == [1, 1, 1, 2]
    kept = people_in(boxes, (300, 200), Counter(), visibility=0, min_height=0, occlusion=1)
    assert len(kept) == 7, "what is outside of the frame has no pixel"


def test_crops_end_where_the_image_ends():
    pixels = np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8)
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(np.asarray(crop(image, Box(0, 0, 5, 6, 10, 20))), pixels[6:26, 5:15])
    np.testing.assert_array_equal(np.asarray(crop(image, Box(0, 0, 5, 6, 10, 20), 0.1)), pixels[4:28, 4:16])
    np.testing.assert_array_equal(np.asarray(crop(image, Box(0, 0, -5, 20, 10, 20))), pixels[20:, :5])
    np.testing.assert_array_equal(np.asarray(crop(image, Box(0, 0, 19.9, 29.9, 10, 20))), pixels[29:, 19:])
    np.testing.assert_array_equal(np.asarray(crop(image, Box(0, 0, 3, 4, 0.2, 0.2))), pixels[4:5, 3:4])
