"""A folder of tracklets, embedded by one process or many: what is finished stays, however they end."""

import argparse
import base64
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._files import Busy, locked
from ._version import __version__
from .data import Tracklet
from .data.flow import flow_file
from .data.readers import IMAGE_SUFFIXES, NOT_DATA, frame_order, is_image
from .data.tracklet import file_names
from .inference import embed_tracklets, frames_bar
from .models import TrackletModel, create_model
from .retrieval.store import Embeddings

OPTIONS = ("precision", "reject_outliers")  # that change embeddings, but not what they can be compared with
SAVE_EVERY = 10  # seconds, about
LAYOUT = re.compile(r"(?:.*/)?(-?\d{1,18})/(-?\d{1,18})_[^/]+")  # <pid>/<camera>_<tracklet>, as data.read_folder has it


def say(text: str) -> None:
    print(f"temporal-agg: {' '.join(text.splitlines())}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Tracklets and models


def find_tracklets(folder: Path) -> tuple[list[Tracklet], bool]:
    """The innermost folders that hold images, in natural order, and whether their names say identities and cameras.

    They do if every one is named ``<pid>/<camera>_<tracklet>``, below whatever.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected a folder of tracklets, each a folder of images.")
    found, empty = images_below(folder)
    kinds = ", ".join(IMAGE_SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"no image in {folder} or in any folder below it ({kinds}): a tracklet is a folder of images."
        )
    if empty:
        say(f"left out {empty} folders that hold files, but no image ({kinds}).")
    for outer in {parent for path in found for parent in path.parents} & set(found):
        say(f"left out {len(found.pop(outer))} images in {outer}: they lie beside tracklets (a contact sheet?).")
    names = [folder.resolve().name if p == folder else p.relative_to(folder).as_posix() for p in found]
    parts = [LAYOUT.fullmatch(name) for name in names]
    known = all(parts)
    return [
        Tracklet(images, *((int(part[1]), int(part[2])) if known and part else (0, -1)), name)
        for images, part, name in zip(found.values(), parts, names, strict=True)
    ], known


def images_below(folder: Path) -> tuple[dict[Path, list[str]], int]:
    """The images in each folder from ``folder`` down, in natural order, and how many folders have other files only."""
    found: dict[Path, list[str]] = {}
    above: dict[str, frozenset[str]] = {}  # the real paths of a folder and of those that it lies in
    empty = 0

    def fail(error: OSError) -> None:
        raise error

    for path, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real, outer = os.path.realpath(path), above.get(os.path.dirname(path), frozenset())
        if real in outer:  # links can go round in circles
            folders.clear()
            continue
        above[path] = outer | {real}
        folders[:] = sorted((f for f in folders if not f.startswith(NOT_DATA)), key=frame_order)
        if images := sorted(filter(is_image, files), key=frame_order):
            found[Path(path)] = [os.path.join(path, image) for image in images]
        elif files and not folders:
            empty += 1
    return found, empty


def load_model(name: str, backbone_pretrained: bool) -> TrackletModel:
    name = expanded(name)
    if os.path.isdir(name):
        name = f"local-dir:{name}"
    if name.startswith(("hf-hub:", "local-dir:")):
        if backbone_pretrained:
            raise ValueError(f"{name} comes with its own weights: leave --backbone-pretrained out.")
        return create_model(name)
    if not backbone_pretrained:
        try:
            return create_model(name, pretrained=True)
        except (FileNotFoundError, ValueError) as error:
            hint = "Here: --model <directory of a trained model>; for mean_* and max_* also --backbone-pretrained."
            raise ValueError(f"{error} {hint}") from error
    if any(True for _ in create_model(name).aggregator.parameters()):
        raise ValueError(
            f"the aggregator of {name} has weights of its own, which nobody has trained: --backbone-pretrained is for "
            "mean_* and max_*. Train the model and pass its directory."
        )
    return create_model(name, backbone_pretrained=True)


def expanded(name: str) -> str:
    """A model's name, ``~`` in it expanded where it is a place on the disk."""
    prefix = "local-dir:" if name.startswith("local-dir:") else ""
    return prefix + os.path.expanduser(name.removeprefix(prefix))


def settings_of(model: TrackletModel) -> dict[str, Any]:
    """What the embeddings depend on, beside the frames."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    settings = {
        "aggregator": model.aggregator.config,
        "clip": dataclasses.asdict(model.clip),
        "encoder": model.encoder.config,
        "input": model.data_config,
        "temporal-agg": __version__,
        "weights": digest.hexdigest()[:16],
    }
    return json.loads(json.dumps(settings, default=str))


def fingerprint(settings: dict[str, Any]) -> str:
    """Equal for models whose embeddings can be compared."""
    compared = {key: value for key, value in settings.items() if key not in ("temporal-agg", *OPTIONS)}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        tensor = torch.zeros(1, device=name)
        tensor.cpu()  # nothing comes back from "meta"
    except (AssertionError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]  # torch lists all that it has
        raise ValueError(f"--device {name!r} cannot be used here ({why}); try cpu.") from error
    return tensor.device


def frames_key(tracklet: Tracklet, flow: bool = True) -> str:
    """Changes with the names, sizes and times of a tracklet's files; also of its optical flow, if there is one."""
    digest = hashlib.sha256()
    files = [os.fspath(frame) for frame in tracklet.frames if not hasattr(frame, "shape")]
    if flow and files and (beside := flow_file(files)).is_file():
        files.append(os.fspath(beside))
    for file in files:
        try:
            status = os.stat(file)
        except OSError:  # a link to nowhere, or a loop: what reads the frame says so
            continue
        digest.update(os.fsencode(f"{os.path.basename(file)} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]


def frame_marks(tracklet: Tracklet) -> bytes:
    """8 bytes for each frame, equal where the file's content is: a copy of some of the frames can be told by them."""
    files = file_names(tracklet) or ()  # in memory: nothing is known of them
    return b"".join(hashlib.blake2b(Path(file).read_bytes(), digest_size=8).digest() for file in files)


# ----------------------------------------------------------------------------------------------------------------------
# A run that is not finished


class Row(NamedTuple):
    """What is known of an embedded tracklet."""

    embedding: Tensor  # [D]
    marks: bytes = b""
    purity: float | None = None
    change: int | None = None


Rows = dict[tuple[str, str], Row]  # by name, and what the files look like


class Finished:
    """The embeddings of finished tracklets: one line of JSON each, in a file beside the output.

    A line is whole or it counts for nothing, so that a killed process loses only what it had not finished. Whoever adds
    to a file holds its lock; anybody may read it meanwhile.

    Args:
        path: of the file; made with the first embedding. None = kept in memory alone.
        settings: what the embeddings depend on.
        restart: drop what is there if it was made with other settings.

    Attributes:
        rows: of each tracklet, by its name and what its files look like.

    Raises:
        ValueError: the file is damaged, or was made with other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], restart: bool):
        self.rows: Rows = {}
        self.path = path
        self.head = json.dumps(settings).encode() + b"\n"
        if path is None or not path.is_file():
            return
        before, self.rows, whole = _read_part(path)
        if before != settings:
            if self.rows and before is not None and not restart:
                raise ValueError(_other_settings(path, before, settings))
            self.rows, whole = {}, 0
        try:
            os.truncate(path, whole)
        except OSError as error:
            raise _naming(error, path) from error

    def add(self, new: Rows) -> None:
        """Keeps what is known of some tracklets."""
        self.rows.update(new)
        if self.path is None:
            return
        rows = (
            {
                "name": name,
                "frames": frames,
                **{key: value for key in ("purity", "change") if (value := getattr(row, key)) is not None},
                "embedding": base64.b64encode(row.embedding.numpy().astype("<f4").tobytes()).decode(),
                "marks": base64.b64encode(row.marks).decode(),
            }
            for (name, frames), row in new.items()
        )
        try:
            with open(self.path, "ab") as file:
                head = b"" if file.tell() else self.head
                file.write(head + b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        except OSError as error:
            raise _naming(error, self.path) from error


def read_finished(paths: Iterable[Path], settings: Mapping[str, Any], foreign: bool) -> Rows:
    """What all the processes of a run have finished.

    Args:
        paths: of their files.
        settings: what the embeddings depend on.
        foreign: leave files out that were made with other settings, which raise a ValueError otherwise.
    """
    rows: Rows = {}
    for path in paths:
        before, found, _ = _read_part(path)
        if before == settings:
            rows |= found
        elif before is not None and found and not foreign:
            raise ValueError(_other_settings(path, before, settings))
    return rows


def _read_part(path: Path) -> tuple[dict[str, Any] | None, Rows, int]:
    """The settings in a file's first line, the rows in the others, and how many bytes are whole lines."""
    rows: Rows = {}
    before, whole, width = None, 0, 0
    if not path.is_file():
        return before, rows, whole
    try:
        with open(path, "rb") as file:
            if not _starts_like_json(file):
                raise ValueError("it does not begin with {")
            for line in file:
                if not line.endswith(b"\n"):
                    break  # its process was killed here, or is writing
                content = json.loads(line.decode())
                if before is None:
                    if not isinstance(content, dict) or "temporal-agg" not in content:
                        raise ValueError("it says nothing of temporal-agg")
                    before = content
                else:
                    embedding = np.frombuffer(base64.b64decode(content["embedding"], validate=True), "<f4")
                    width = width or len(embedding)
                    if len(embedding) != width or not width or not np.isfinite(embedding).all():
                        raise ValueError(
                            f"an embedding of {len(embedding)} numbers after one of {width}, or not finite"
                        )
                    key = str(content["name"]), str(content["frames"])
                    marks = base64.b64decode(content.get("marks", ""), validate=True)
                    if len(marks) % 8:
                        raise ValueError(f"marks of {len(marks)} bytes")
                    purity, change = content.get("purity"), content.get("change")
                    if purity is not None and (type(purity) not in (int, float) or abs(purity) > 1):  # it may be NaN
                        raise ValueError(f"a purity of {purity!r}")
                    if change is not None and (type(change) is not int or not -1 <= change < 2**31):
                        raise ValueError(f"a change at frame {change!r}")
                    rows[key] = Row(torch.from_numpy(embedding.astype(np.float32)), marks, purity, change)
                whole += len(line)
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # of json and base64, too
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no file of temporal-agg, or it is damaged ({what}): remove it.") from error
    return before, rows, whole


def _starts_like_json(file: IO[bytes]) -> bool:
    start = file.read(1)
    file.seek(0)
    return start in (b"", b"{")


def _other_settings(path: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    changed = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
    was = "; ".join(f"{k}: was {before.get(k)}, is {settings.get(k)}" for k in changed)
    return (
        f"{path} holds embeddings of an unfinished run with other settings ({was}). Repeat that run's command to "
        "finish it, choose another output, or pass --overwrite to start afresh."
    )


def _naming(error: OSError, path: Path) -> OSError:
    if error.filename is None:
        error.filename = os.fspath(path)
    return error


# ----------------------------------------------------------------------------------------------------------------------
# Embedding, by one process or many


class Job(NamedTuple):
    """A folder to embed, and the model that does."""

    tracklets: list[Tracklet]
    known: bool  # whether their names say identities and cameras
    keys: list[tuple[str, str]]  # name, and what the files look like
    model: TrackletModel
    source: str  # of the model
    backbone_pretrained: bool
    settings: dict[str, Any]
    options: dict[str, Any]  # of embed_tracklets

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings)

    def embed(self, which: Sequence[int], finished: Finished, frames_per_batch: int) -> None:
        """Embeds some of the tracklets, and keeps what is finished every few seconds."""
        with frames_bar(sum(len(self.tracklets[i]) for i in which), True) as bar:
            budget, done = frames_per_batch, 0  # frames between two times of saving
            while done < len(which):
                group: list[int] = []
                frames = 0
                while done < len(which) and (not group or frames + len(self.tracklets[which[done]]) <= budget):
                    group.append(which[done])
                    frames += len(self.tracklets[which[done]])
                    done += 1
                start = time.monotonic()
                tracklets = [self.tracklets[i] for i in group]
                made = embed_tracklets(
                    self.model, tracklets, frames_per_batch=frames_per_batch, progress=False, **self.options
                )
                embeddings, purity = made if isinstance(made, tuple) else (made, None)
                if wrong := [t.name for t, row in zip(tracklets, embeddings, strict=True) if not row.isfinite().all()]:
                    raise ValueError(
                        f"the embedding of {wrong[0]!r} is not finite: the model's weights or the precision do not fit."
                    )
                columns = [embeddings, map(frame_marks, tracklets)]
                columns += (purity.score.tolist(), purity.start.tolist()) if purity else ()
                keys = (self.keys[i] for i in group)
                finished.add(dict(zip(keys, map(Row, *columns), strict=True)))
                if bar is not None:
                    bar.update(frames)
                speed = frames / max(time.monotonic() - start, 1e-3)
                budget = max(frames_per_batch, int(SAVE_EVERY * speed))

    def collect(self, found: Rows, which: Sequence[int]) -> Embeddings:
        """The embeddings of some of the tracklets, in order."""
        tracklets, rows = [self.tracklets[i] for i in which], [found[self.keys[i]] for i in which]
        purity = [row.purity for row in rows if row.purity is not None]
        change = [row.change for row in rows if row.change is not None]
        directory = self.source.removeprefix("local-dir:")
        return Embeddings(
            torch.stack([row.embedding for row in rows]),
            [t.name for t in tracklets],
            [t.pid for t in tracklets] if self.known else None,
            [t.camera for t in tracklets] if self.known else None,
            self.model.clip.distance,
            os.path.abspath(directory) if os.path.isdir(directory) else self.source,
            self.backbone_pretrained,
            self.fingerprint,
            False,
            [self.keys[i][1] for i in which],
            [number(t.frames[0]) for t in tracklets],
            [number(t.frames[-1]) for t in tracklets],
            purity if len(purity) == len(rows) else None,
            change if len(change) == len(rows) else None,
            [row.marks for row in rows],
        )


def prepare(folder: Path, model_name: str, args: argparse.Namespace) -> Job:
    tracklets, known = find_tracklets(folder)
    options = {"device": pick_device(args.device), "num_workers": args.workers}
    if args.precision != "float32":
        options["precision"] = args.precision
    if args.reject_outliers:
        options |= {"reject_outliers": True, "return_purity": True}
    model = load_model(model_name, args.backbone_pretrained)
    settings = settings_of(model) | {"precision": args.precision, "reject_outliers": args.reject_outliers}
    uses_flow = getattr(model.encoder, "uses_flow", False)
    keys = [(t.name, frames_key(t, uses_flow)) for t in tracklets]
    return Job(tracklets, known, keys, model, expanded(model_name), args.backbone_pretrained, settings, options)


def number(frame: object) -> int:
    """The last number in the name of a frame's file, -1 if there is none."""
    found = re.findall(r"\d{1,18}", Path(str(frame)).stem)
    return int(found[-1]) if found else -1


def processes() -> tuple[int, int]:
    """The number of this process among those that torchrun or accelerate started, and how many they are."""
    texts = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if None in texts:
        return 0, 1
    try:
        rank, world = (int(str(text)) for text in texts)
    except ValueError:
        rank, world = -1, -1
    if not 0 <= rank < world:
        raise ValueError(f"RANK={texts[0]} and WORLD_SIZE={texts[1]} in the environment do not fit: unset them.")
    return rank, world


class Parts:
    """The files in which the processes of an embed keep what is finished, beside the output; each has a lock."""

    def __init__(self, output: Path, rank: int, world: int):
        self.output, self.rank, self.world = output, rank, world
        self.own = output.with_name(f"{output.name}.part" if world == 1 else f"{output.name}.{rank}.part")

    def all(self) -> list[Path]:
        form = re.compile(re.escape(self.output.name) + r"(\.\d+)?\.part")
        return sorted(path for path in self.output.parent.iterdir() if form.fullmatch(path.name))

    def lock_of(self, part: Path) -> Path:
        return part.with_name(f".{part.name}.lock")

    def locked(self, part: Path) -> Any:
        return locked(self.lock_of(part), str(self.output))

    def refuse_others(self) -> None:
        """Raises Busy if a process of another run is at work; the locks of those that have ended go."""
        form = re.compile(r"\." + re.escape(self.output.name) + r"(?:\.(\d+))?\.part\.lock")
        for path in sorted(self.output.parent.iterdir()):
            match = form.fullmatch(path.name)
            beside = match and self.world > 1 and match[1] and int(match[1]) < self.world  # of this run
            if match and not beside and path.name != f".{self.own.name}.lock":
                with locked(path, str(self.output)):
                    pass

    def remove(self) -> None:
        for path in self.all():
            path.unlink(missing_ok=True)
        self.sweep()

    def sweep(self) -> None:
        """Removes the locks that nobody holds."""
        form = re.compile(r"\." + re.escape(self.output.name) + r"((\.\d+)?\.part)?\.lock")
        for path in sorted(self.output.parent.iterdir()):
            if form.fullmatch(path.name):
                with suppress(Busy), locked(path, str(self.output)):
                    pass


def stamp(path: Path) -> tuple[int, int] | None:
    """Changes when a file is replaced."""
    with suppress(FileNotFoundError):
        return path.stat().st_ino, path.stat().st_mtime_ns
    return None
