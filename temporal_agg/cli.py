"""The command ``temporal-agg``: folders of images -> embeddings -> ranked lists, without writing Python."""

import argparse
import base64
import csv
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._files import replace_file
from ._version import __version__
from .aggregators import list_aggregators
from .data import Tracklet
from .data.readers import IMAGE_SUFFIXES, NOT_DATA, frame_order, is_image
from .inference import _bar, embed_tracklets
from .models import TrackletModel, create_model, list_models
from .retrieval import distances, rerank

SAVE_EVERY = 10  # seconds, about
QUERIES = 512  # that are compared with the gallery at once
LAYOUT = re.compile(r"(?:.*/)?(-?\d+)/(-?\d+)_[^/]+")  # <pid>/<camera>_<tracklet>, as data.read_folder has it
MODEL = "a directory of save_pretrained or recipes/train.py, hf-hub:<owner>/<repo>[@<revision>], or a released name"
EPILOG = """\
temporal-agg embed people -o people.npz --model runs/mine     # a tracklet is an innermost folder with images
temporal-agg search people.npz gallery.npz -k 5               # who in the gallery looks most like each of them
temporal-agg search new_person gallery.npz --format json      # a folder, embedded by the gallery's own model
temporal-agg list 'gltr_*'
"""


# ----------------------------------------------------------------------------------------------------------------------
# Tracklets and models


def find_tracklets(folder: Path) -> tuple[list[Tracklet], bool]:
    """The innermost folders that hold images, in natural order, and whether their names say identities and cameras.

    They do if every one is named ``<pid>/<camera>_<tracklet>``, below whatever.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected a folder of tracklets, each a folder of images.")
    found, above, empty = {}, {}, 0  # above: the real paths of a folder and of those that it lies in

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
        Tracklet(images, *(map(int, part.groups()) if known else (0, -1)), name)
        for images, part, name in zip(found.values(), parts, names, strict=True)
    ], known


def load_model(name: str, backbone_pretrained: bool) -> TrackletModel:
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


def settings_of(model: TrackletModel) -> dict:
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


def fingerprint(settings: dict) -> str:
    """Equal for models whose embeddings can be compared."""
    compared = {key: value for key, value in settings.items() if key != "temporal-agg"}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try cpu.") from error


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings and where they are kept


class Embeddings(NamedTuple):
    """What an npz file of ``temporal-agg embed`` holds."""

    embeddings: Tensor  # float32 [N, D]
    names: list[str]
    pids: list[int] | None
    cameras: list[int] | None
    distance: str
    model: str
    backbone_pretrained: bool
    fingerprint: str


class Finished:
    """The embeddings of finished tracklets: one line of JSON each, in a file beside the output.

    A line is whole or it counts for nothing, so that a killed process loses only what it had not finished.
    """

    def __init__(self, path: Path | None, settings: dict, restart: bool):
        self.rows: dict[tuple[str, str], Tensor] = {}
        self.path = path
        if path is None:
            return
        content = path.read_bytes() if path.is_file() else b""
        try:
            if content and not content.startswith(b"{"):
                raise ValueError(f"it begins with {content[:10]!r}")
            content = content[: content.rfind(b"\n") + 1]
            before, *rows = (json.loads(line) for line in content.splitlines() or [b"null"])
            if before is not None and "temporal-agg" not in before:
                raise ValueError("it says nothing of temporal-agg")
        except ValueError as error:  # of json and of decoding, too
            raise ValueError(f"{path} is no file of temporal-agg, or it is damaged ({error}): remove it.") from error
        if before:
            changed = [k for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
            if changed and not restart:
                was = "; ".join(f"{k}: was {before.get(k)}, is {settings.get(k)}" for k in changed)
                raise ValueError(
                    f"{path} holds embeddings of an unfinished run with other settings ({was}). Repeat that run's "
                    "command to finish it, choose another output, or pass --overwrite to start afresh."
                )
            if changed:
                before, rows, content = None, [], b""
        for row in rows:
            embedding = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
            self.rows[row["name"], row["frames"]] = torch.from_numpy(embedding.astype(np.float32))
        with open(path, "ab") as file:
            file.truncate(len(content))
            if not before:
                file.write(json.dumps(settings).encode() + b"\n")

    def add(self, keys: Sequence[tuple[str, str]], embeddings: Tensor) -> None:
        self.rows.update(zip(keys, embeddings, strict=True))
        if self.path is not None:
            rows = (
                {"name": name, "frames": frames, "embedding": base64.b64encode(row.numpy().astype("<f4")).decode()}
                for (name, frames), row in zip(keys, embeddings, strict=True)
            )
            with open(self.path, "ab") as file:
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def frames_key(tracklet: Tracklet) -> str:
    """Changes with the names, sizes and times of a tracklet's files."""
    digest = hashlib.sha256()
    for frame in tracklet.frames:
        status = os.stat(frame)
        digest.update(os.fsencode(f"{os.path.basename(frame)} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]


def embed_folder(folder: Path, model_name: str, args: argparse.Namespace, output: Path | None = None) -> Embeddings:
    """Embeds the tracklets of a folder, and keeps those that are finished beside ``output`` if there is one."""
    tracklets, known = find_tracklets(folder)
    device = pick_device(args.device)
    model = load_model(model_name, args.backbone_pretrained)
    settings = settings_of(model)
    kept = None if output is None else output.with_name(f"{output.name}.part")
    finished = Finished(kept, settings, output is not None and args.overwrite)
    keys = [(t.name, frames_key(t)) for t in tracklets]
    missing = [i for i, key in enumerate(keys) if key not in finished.rows]
    if len(missing) < len(tracklets):
        say(f"{kept}: {len(tracklets) - len(missing)} of {len(tracklets)} tracklets are embedded already.")
    with _bar(sum(len(tracklets[i]) for i in missing), True) as bar:
        budget, done = args.frames_per_batch, 0  # frames between two times of saving
        while done < len(missing):
            group, frames = [], 0
            while done < len(missing) and (not group or frames + len(tracklets[missing[done]]) <= budget):
                group.append(missing[done])
                frames += len(tracklets[missing[done]])
                done += 1
            start = time.monotonic()
            embeddings = embed_tracklets(
                model,
                [tracklets[i] for i in group],
                frames_per_batch=args.frames_per_batch,
                device=device,
                progress=False,
                num_workers=args.workers,
            )
            finished.add([keys[i] for i in group], embeddings)
            if bar is not None:
                bar.update(frames)
            speed = frames / max(time.monotonic() - start, 1e-3)
            budget = max(args.frames_per_batch, int(SAVE_EVERY * speed))
    directory = model_name.removeprefix("local-dir:")
    return Embeddings(
        torch.stack([finished.rows[key] for key in keys]),
        [t.name for t in tracklets],
        [t.pid for t in tracklets] if known else None,
        [t.camera for t in tracklets] if known else None,
        model.clip.distance,
        os.path.abspath(directory) if os.path.isdir(directory) else model_name,
        args.backbone_pretrained,
        fingerprint(settings),
    )


def write_embeddings(path: Path, found: Embeddings) -> None:
    arrays = {key: np.asarray(value) for key, value in found._asdict().items() if value is not None}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # savez would add .npz to a name
            np.savez(file, **arrays)

    replace_file(path, write)


def read_embeddings(path: Path) -> Embeddings:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected one that `temporal-agg embed` wrote.")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key].tolist() if key != "embeddings" else stored[key] for key in stored.files}
        arrays["embeddings"] = torch.from_numpy(arrays["embeddings"])
        return Embeddings(**{"pids": None, "cameras": None, **arrays})
    except Exception as error:  # numpy, zipfile and zlib raise what they stumble over
        raise ValueError(f"{path} is no file that `temporal-agg embed` wrote ({error}).") from error


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def run_embed(args: argparse.Namespace) -> None:
    output, part = args.output, args.output.with_name(f"{args.output.name}.part")
    if output.suffix != ".npz":
        raise ValueError(f"the output should be named *.npz, got {output}.")
    if output.exists() and not part.exists() and not args.overwrite:
        raise FileExistsError(f"{output} is there already: choose another name, or pass --overwrite.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} into: make it first.")
    found = embed_folder(args.folder, args.model, args, output)
    write_embeddings(output, found)
    part.unlink()
    labels = "with identities and cameras" if found.pids else "without identities"
    say(f"{output}: {len(found.names)} embeddings of {found.embeddings.shape[1]} numbers, {labels}.")


def run_search(args: argparse.Namespace) -> None:
    if args.k < 1:
        raise ValueError(f"-k must be at least 1, got {args.k}.")
    if args.output is not None and args.output.exists() and args.output.samefile(args.gallery):
        raise ValueError(f"the output {args.output} is the gallery: choose another name.")
    gallery = read_embeddings(args.gallery)
    if args.query.is_dir():
        args.backbone_pretrained |= not args.model and gallery.backbone_pretrained
        query = embed_folder(args.query, args.model or gallery.model, args)
    else:
        query = read_embeddings(args.query)
    if query.fingerprint != gallery.fingerprint:
        raise ValueError(
            f"{args.query} was embedded by {query.model} ({query.fingerprint}), {args.gallery} by {gallery.model} "
            f"({gallery.fingerprint}): embeddings of different models cannot be compared. Embed one of them again."
        )
    same = args.query.is_file() and args.query.samefile(args.gallery)
    found = list(ranked(query, gallery, args.k, args.rerank, same))
    if args.output is None:
        show(found, args.format, sys.stdout)
    else:

        def write(temporary: Path) -> None:
            with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                show(found, args.format, file)

        replace_file(args.output, write)


def ranked(query: Embeddings, gallery: Embeddings, k: int, use_rerank: bool, same: bool) -> Iterator[dict]:
    """For each query its k nearest; where both are the same file, no tracklet is its own match."""
    queries, others = query.embeddings, gallery.embeddings
    if use_rerank:
        if gallery.distance == "cosine":
            queries, others = F.normalize(queries), F.normalize(others)
        blocks = rerank(queries, others).split(QUERIES)
    else:
        blocks = (distances(rows, others, gallery.distance) for rows in queries.split(QUERIES))
    for i, row in enumerate(row for block in blocks for row in block):
        order = [j for j in row.argsort(stable=True)[: k + same].tolist() if not (same and i == j)][:k]
        matches = [{"rank": n, "name": gallery.names[j], "distance": float(row[j])} for n, j in enumerate(order, 1)]
        result = {"query": query.names[i], "matches": matches}
        if query.pids and gallery.pids:
            result["pid"] = query.pids[i]
            for match, j in zip(matches, order, strict=True):
                match["pid"] = gallery.pids[j]
        yield result


def show(found: list[dict], style: str, file) -> None:
    if style == "json":
        json.dump(found, file, indent=1)
        file.write("\n")
        return
    labelled = "pid" in found[0]
    if style == "csv":
        writer = csv.writer(file)
        labels = ["query_pid", "gallery_pid"] if labelled else []
        writer.writerow(["query", "rank", "gallery", "distance", *labels])
        for result in found:
            for m in result["matches"]:
                labels = [result["pid"], m["pid"]] if labelled else []
                writer.writerow([result["query"], m["rank"], m["name"], f"{m['distance']:.6f}", *labels])
        return
    for result in found:
        print(result["query"], file=file)
        for m in result["matches"]:
            mark = "  *" if labelled and m["pid"] == result["pid"] else ""
            print(f"{m['rank']:5d}  {m['distance']:8.4f}  {m['name']}{mark}", file=file)
    if labelled:
        print("* the same identity, by the folders' names", file=file)


def run_list(args: argparse.Namespace) -> None:
    models = list_models(args.pattern, pretrained=args.pretrained)
    aggregators = [] if args.pretrained else fnmatch.filter(list_aggregators(), args.pattern)
    if aggregators:
        print("Aggregators; each goes before any timm model, as <aggregator>_<timm model>:")
        print("".join(f"  {name}\n" for name in aggregators), end="")
    if models:
        print("Released weights:" if args.pretrained else "Models that are tested:")
        print("".join(f"  {name}\n" for name in models), end="")
    if not models and not aggregators:
        if args.pretrained and not list_models(pretrained=True):
            raise ValueError("no released weights yet.")
        what = "released weights" if args.pretrained else "model and no aggregator"
        raise ValueError(f"no {what} of a name like {args.pattern!r}.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "temporal-agg", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"temporal-agg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{embed,search,list}")

    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--backbone-pretrained", action="store_true", help="timm's weights; mean_* and max_* only")
    running.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    running.add_argument("--frames-per-batch", type=int, default=256, help="bounds memory (256)")
    running.add_argument("--workers", type=int, help="processes that read images; default: by the number of cores")

    embed = commands.add_parser("embed", parents=[running], help="a folder of tracklets -> an npz file of embeddings")
    embed.add_argument("folder", type=Path, help="its innermost folders with images are the tracklets")
    embed.add_argument("-o", "--output", type=Path, required=True, help="*.npz; *.npz.part keeps what is finished")
    embed.add_argument("--model", required=True, help=MODEL)
    embed.add_argument("--overwrite", action="store_true", help="replace an output, or an unfinished run of another")
    embed.set_defaults(run=run_embed)

    search = commands.add_parser("search", parents=[running], help="the nearest tracklets of a gallery")
    search.add_argument("query", type=Path, help="an npz file, or a folder as for embed")
    search.add_argument("gallery", type=Path, help="an npz file")
    search.add_argument("-k", type=int, default=10, help="how many (10)")
    search.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking, over all queries together")
    search.add_argument("--format", choices=("table", "csv", "json"), default="table")
    search.add_argument("-o", "--output", type=Path, help="a file; default: the screen")
    search.add_argument("--model", help=f"for a folder: {MODEL}; default: the gallery's")
    search.set_defaults(run=run_search)

    names = commands.add_parser("list", help="names of models and aggregators")
    names.add_argument("pattern", nargs="?", default="*", help="such as 'gltr_*'")
    names.add_argument("--pretrained", action="store_true", help="only released weights")
    names.set_defaults(run=run_list)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 after a message on stderr (a wrong usage exits with 2, Ctrl-C returns 130)."""
    args = parse(argv)
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        say("stopped" + ("; the same command goes on where it was." if args.command == "embed" else "."))
        return 130
    except torch.OutOfMemoryError:
        say("error: out of GPU memory: pass a smaller --frames-per-batch.")
        return 1
    except (ImportError, OSError, TypeError, ValueError) as error:
        text = str(error)
        if "Original Traceback" in text:  # from a process that reads images
            text = text.strip().splitlines()[-1].partition(": ")[2]
        say(f"error: {text}")
        return 1


def say(text: str) -> None:
    print(f"temporal-agg: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
