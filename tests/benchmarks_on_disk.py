"""Miniature benchmarks in their authors' layouts, with real images: make_mars(folder) and so on return their root.

People are coloured by identity and tinted by camera. The first ``people`` identities are to train on, the next
``people`` to test on; every one has a tracklet in each camera.
"""

import json
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

SIZE = (16, 8)


def picture(path: Path, pid: int, camera: int, frame: int, size: tuple[int, int] = SIZE) -> Path:
    rng = np.random.default_rng([abs(pid), camera, frame])
    colour = np.random.default_rng(abs(pid)).integers(40, 216, 3) * (1 - 0.1 * (camera % 3))
    pixels = colour + rng.normal(0, 10, (*size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def make_mars(
    root: Path, people: int = 4, cameras: int = 2, frames: int = 4, size: tuple[int, int] = SIZE, nested: bool = False
) -> Path:
    """The queries are the test people's tracklets of camera 1; a junk and a distractor tracklet in each camera."""
    train, test = range(1, people + 1), range(people + 1, 2 * people + 1)
    for part, pids in (("train", train), ("test", [-1, 0, *test])):
        images = root / f"bbox_{part}" / (f"bbox_{part}" if nested else "")
        names, rows, query = [], [], []
        for pid in pids:
            person = "00-1" if pid == -1 else f"{pid:04d}"
            for camera in range(1, cameras + 1):
                rows.append([len(names) + 1, len(names) + frames, pid, camera])
                if pid > 0 and camera == 1:
                    query.append(len(rows))
                for frame in range(1, frames + 1):
                    names.append(f"{person}C{camera}T0001F{frame:03d}.jpg")
                    picture(images / person / names[-1], pid, camera, frame, size)
        info = root / "info"
        info.mkdir(exist_ok=True)
        (info / f"{part}_name.txt").write_text("\n".join(names) + "\n")
        savemat(info / f"tracks_{part}_info.mat", {f"track_{part}_info": np.array(rows, np.int32)})
        if part == "test":
            savemat(info / "query_IDX.mat", {"query_IDX": np.array([query], np.uint16)})
    return root


def make_duke(
    root: Path,
    people: int = 4,
    cameras: int = 2,
    frames: int = 4,
    size: tuple[int, int] = SIZE,
    distractors: int = 1,
    old_names: bool = False,
) -> Path:
    """The queries are the test people's tracklets of the first camera, and are in the gallery, too."""
    for person in range(1, 2 * people + distractors + 1):
        parts = ["train"] if person <= people else ["gallery"]
        for camera in range(1, cameras + 1):
            if camera == 1 and people < person <= 2 * people:
                parts = ["gallery", "query"]
            for part in parts if camera == 1 else parts[:1]:
                for frame in range(frames):
                    letter = "D" if person > 2 * people else "X"
                    name = f"{person:04d}_C{camera}_F{8 * frame + 1:04d}_{letter}{30823 + 8 * frame}.jpg"
                    name = name.replace("_", "") if old_names else name
                    picture(root / part / f"{person:04d}" / f"{camera:04d}" / name, person, camera, frame, size)
    return root


def make_duke_si(
    root: Path, people: int = 4, cameras: int = 2, frames: int = 4, size: tuple[int, int] = SIZE, distractors: int = 1
) -> Path:
    """The queries are the test people's tracklets of the first camera, and are not in the gallery."""
    for person in range(1, 2 * people + distractors + 1):
        for camera in range(1, cameras + 1):
            query = camera == 1 and people < person <= 2 * people
            part = "train" if person <= people else "query" if query else "gallery"
            name = f"any name {camera}" if part == "train" else f"s0{camera}{camera}42"
            folder = root / part / f"{person:04d}" / name
            for frame in range(frames):
                picture(folder / f"c{camera}_{9998 + frame}.jpg", person, camera, frame, size)
    return root


def make_ward(
    root: Path, people: int = 6, frames: int = 3, size: tuple[int, int] = SIZE, nested: bool = True, suffix: str = "png"
) -> Path:
    """Every person in three cameras, numbered with gaps."""
    folder = root / "toolbox" / "Datasets" / "WARD" if nested else root
    for pid in range(1, 2 * people, 2):
        for camera in (1, 2, 3):
            for frame in range(1, frames + camera):
                picture(folder / f"{pid:04d}{camera:04d}{frame:04d}.{suffix}", pid, camera, frame, size)
    return root


def make_ilids_vid(root: Path, people: int = 4, frames: int = 4, size: tuple[int, int] = SIZE) -> Path:
    """2 x ``people`` persons, numbered with gaps; ten splits."""
    rng = np.random.default_rng(0)
    for number in range(1, 4 * people, 2):
        for camera in (1, 2):
            for frame in range(frames):
                name = f"cam{camera}_person{number:03d}_{310 + frame:05d}.png"
                folder = root / "i-LIDS-VID" / "sequences" / f"cam{camera}" / f"person{number:03d}"
                picture(folder / name, number, camera, frame, size)
    splits = np.array([rng.permutation(2 * people) + 1 for _ in range(10)], float)
    (root / "train-test people splits").mkdir()
    savemat(root / "train-test people splits" / "train_test_splits_ilidsvid.mat", {"ls_set": splits})
    return root


def make_prid2011(
    root: Path,
    people: int = 2,
    frames: int = 22,
    size: tuple[int, int] = SIZE,
    nested: bool = True,
    json_splits: bool = False,
) -> Path:
    """2 x ``people`` persons in both cameras, one more who is too short in cam_b, and strangers from 201 on."""
    shots = root / ("prid_2011" if nested else "") / "multi_shot"
    persons = [f"person_{pid:04d}" for pid in range(1, 2 * people + 1)]
    for camera, last in (("cam_a", 202), ("cam_b", 203)):
        for pid in (*range(1, 2 * people + 2), *range(201, last + 1)):
            short = pid == 2 * people + 1 and camera == "cam_b"
            for frame in range(1, frames + 1 - short):
                file = shots / camera / f"person_{pid:04d}" / f"{frame:04d}.png"
                picture(file, pid + 1000 * (pid > 200 and camera == "cam_b"), 1 + (camera == "cam_b"), frame, size)
    if json_splits:
        orders = [np.random.default_rng(i).permutation(persons).tolist() for i in range(10)]
        splits = [{"train": order[:people], "test": order[people:]} for order in orders]
        (root / "splits_prid2011.json").write_text(json.dumps(splits))
    return root


def make_ls_vid(
    root: Path, people: int = 4, cameras: int = 2, frames: int = 4, size: tuple[int, int] = SIZE, info: bool = False
) -> Path:
    """The queries are the test people's tracklets of camera 1; as many people again to validate on."""
    lists, data = (root / "info" if info else root) / "list_sequence", root / ("info" if info else "test") / "data"
    lists.mkdir(parents=True)
    data.mkdir(parents=True)
    for i, part in enumerate(("train", "test", "val")):
        lines, query = [], []
        for pid in range(i * people + 1, (i + 1) * people + 1):
            for camera in range(1, cameras + 1):
                prefix = f"tracklet_{part}/{pid:04d}/{pid:04d}_{camera:03d}_{camera:02d}_"
                lines.append(f"{prefix} {pid}")
                if camera == 1:
                    query.append(len(lines))
                for frame in range(frames):
                    picture(root / f"{prefix}{frame:07d}.jpg", pid, camera, frame, size)
        (lists / f"list_seq_{part}.txt").write_text("\n".join(lines) + "\n")
        if part == "test":
            with h5py.File(data / "info_test.mat", "w") as file:
                file["query"] = np.array([query], float)
    return root
