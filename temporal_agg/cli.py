"""The command ``temporal-agg``: folders of images -> embeddings -> ranked lists and people, without writing Python."""

import argparse
import csv
import filecmp
import fnmatch
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import retrieval
from ._embed import (
    Finished,
    Job,
    Parts,
    expanded,
    find_tracklets,
    prepare,
    processes,
    read_finished,
    say,
    stamp,
)
from ._embed import frames_key as frames_key
from ._files import Busy, locked, replace_file, sweep
from ._version import __version__
from .aggregators import list_aggregators
from .aggregators.registry import registry_entry
from .data import Tracklet
from .models import list_models
from .retrieval._overlap import overlaps
from .retrieval.ann import same_rows
from .retrieval.store import Embeddings, check_kind, merge_embeddings, read_embeddings, write_embeddings

Pairs = tuple[Tensor, Tensor]
STDOUT = "the standard output"
WAIT = 0.2  # seconds between two looks at a lock that another process of the same run has
COSINE_THRESHOLD = 0.3  # of link
SAME = 0.5  # part of a tracklet's frames that another has, from which on both are taken for one
CHECKED = 16  # rows of a gallery that are looked up in an index that keeps them in a smaller form
IMPURE = 3  # tracklets that embed names
MEASURED = 1000  # rows that the recall of an index is measured with
MODEL = "a directory of save_pretrained or recipes/train.py, hf-hub:<owner>/<repo>[@<revision>], or a released name"
OutOfMemory = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError  # torch 2.0 has the latter only
EPILOG = """\
temporal-agg embed people -o people.npz --model runs/mine     # a tracklet is an innermost folder with images
temporal-agg search people.npz gallery.npz -k 5               # who in the gallery looks most like each of them
temporal-agg search new_person gallery.npz --threshold 0.3    # a folder, embedded by the gallery's own model
temporal-agg link gallery.npz -o people.csv                   # tracklets -> people
temporal-agg merge monday.npz tuesday.npz -o week.parquet
temporal-agg list 'gltr_*'
"""


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def run_embed(args: argparse.Namespace) -> None:
    output, (rank, world) = args.output, processes()
    parts, before = Parts(output, rank, world), stamp(output)
    check_kind(output)
    check_folder(output)
    allowed = args.overwrite or args.append or bool(parts.all())
    if output.exists() and not allowed:
        parts.sweep()
    check_output(output, allowed)
    for path in (parts.own, parts.lock_of(parts.own)):
        check_folder(path)
    with parts.locked(parts.own):
        parts.refuse_others()
        job = prepare(args.folder, args.model, args)
        gallery = read_embeddings(output) if args.append and output.is_file() else None
        new = range(len(job.keys)) if gallery is None else not_in(gallery, job, output)
        ended = before is not None and not args.overwrite and not args.append  # and killed before its parts were gone
        if ended and not holds(output, job):
            raise FileExistsError(f"{output} is there already: choose another name, or pass --overwrite.")
        finished = Finished(parts.own, job.settings, args.overwrite)
        done = read_finished(parts.all(), job.settings, args.overwrite)
        if ended:
            parts.remove()
            say(f"{output} is complete already.")
            return
        missing = [i for i in new if job.keys[i] not in done]
        if len(missing) < len(new):
            say(f"{parts.own}: {len(new) - len(missing)} of {len(new)} tracklets are embedded already.")
        if not joined(output, before, job):
            job.embed([i for i in missing if i % world == rank], finished, args.frames_per_batch)
        join(parts, before, job, gallery, new, args)


def not_in(gallery: Embeddings, job: Job, output: Path) -> list[int]:
    """The tracklets that a gallery has not got yet."""
    check_comparable(output, gallery, "the model", job.source, job.fingerprint)
    have = dict(zip(gallery.names, gallery.frames or [""] * len(gallery.names), strict=True))
    for name, frames in job.keys:
        if have.get(name, frames) != frames:
            raise ValueError(
                f"{output} has a tracklet {name!r} already, of other files or of unknown ones: rename the folder, or "
                "embed everything again with --overwrite."
            )
    return [i for i, (name, _) in enumerate(job.keys) if name not in have]


def holds(output: Path, job: Job) -> bool:
    """Whether a file has all tracklets of a folder, embedded by the same model."""
    found = read_embeddings(output)
    have = set(zip(found.names, found.frames or [""] * len(found.names), strict=True))
    return job.fingerprint == found.fingerprint and have.issuperset(job.keys)


def joined(output: Path, before: tuple[int, int] | None, job: Job) -> bool:
    """Whether another process of the same run has written the output since this one began."""
    return stamp(output) not in (before, None) and holds(output, job)


def join(
    parts: Parts, before: Any, job: Job, gallery: Embeddings | None, new: Sequence[int], args: argparse.Namespace
) -> None:
    """Makes one file of what all processes have finished, if nothing is missing: whoever ends last does it."""
    output = parts.output
    while True:
        try:
            with locked(output.with_name(f".{output.name}.lock"), str(output)):
                if joined(output, before, job):
                    parts.own.unlink(missing_ok=True)
                    say(f"{output} has been written by another process.")
                    return
                if stamp(output) != before and not args.overwrite:
                    raise FileExistsError(f"{output} has changed meanwhile: move it away and repeat the command.")
                rows = read_finished(parts.all(), job.settings, args.overwrite)
                if missing := sum(job.keys[i] not in rows for i in new):
                    say(
                        f"process {parts.rank} of {parts.world} has finished its share. {missing} tracklets are "
                        f"missing yet: the process that finishes last writes {output}."
                    )
                    return
                both = gallery, job.collect(rows, new) if new else None
                found = merge_embeddings(*(part for part in both if part is not None))
                write_embeddings(output, found)
                parts.remove()
                break
        except Busy:
            time.sleep(WAIT)
    labels = "with identities and cameras" if found.pids else "without identities"
    say(f"{output}: {len(found.names)} embeddings of {found.embeddings.shape[1]} numbers, {labels}.")
    if found.purity:
        say(least_pure(found))


def least_pure(found: Embeddings) -> str:
    """The tracklets that most look like two people, for somebody to look at."""
    rows = sorted(zip(found.purity or [], found.names, found.change or [], strict=True))
    worst = ", ".join(f"{printable(name)} ({p:.2f}, from frame {k} on)" for p, name, k in rows[:IMPURE] if k >= 0)
    return f"two people in one tracklet? Look first at {worst}." if worst else "no tracklet has frames enough for two."


def run_search(args: argparse.Namespace) -> None:
    if args.k < 1:
        raise ValueError(f"-k must be at least 1, got {args.k}.")
    if args.threshold is not None and math.isnan(args.threshold):
        raise ValueError("--threshold must be a number, got nan.")
    if args.candidates is not None and (args.candidates < 1 or not args.rerank):
        raise ValueError(f"--candidates is a number of at least 1 and goes with --rerank, got {args.candidates}.")
    if args.index is not None and args.rerank:
        raise ValueError("--rerank compares everything with everything: leave --index out.")
    check_output(args.output, args.overwrite, args.query, args.gallery, args.index, args.model)
    before = os.stat(args.gallery) if args.gallery.is_file() else None
    gallery = read_embeddings(args.gallery, mmap=args.query.is_file())  # a folder takes long: until then it may change
    index = None if args.index is None else read_index(args.index, gallery, args.gallery)
    if args.query.is_dir():
        args.backbone_pretrained |= not args.model and gallery.backbone_pretrained
        if not args.model and os.path.isabs(gallery.model) and not os.path.isdir(gallery.model):
            raise FileNotFoundError(f"the gallery's model was {gallery.model}, which is not there: pass --model.")
        check_output(args.output, args.overwrite, args.model or gallery.model)
        job = prepare(args.query, args.model or gallery.model, args)
        finished, everything = Finished(None, {}, False), range(len(job.keys))
        check_comparable(args.gallery, gallery, args.query, job.source, job.fingerprint)
        job.embed(everything, finished, args.frames_per_batch)
        query = job.collect(finished.rows, everything)
    else:
        query = read_embeddings(args.query)
        check_comparable(args.gallery, gallery, args.query, query.model, query.fingerprint)
    found = ranked(query, gallery, args.k, args.rerank, own_places(query, gallery), index, args.candidates)
    if args.query.is_file():
        found = of_same_file(found, args.gallery, before)
    if args.threshold is not None:
        found = identified(found, args.threshold)
    labelled = bool(query.pids and gallery.pids)
    put(args.output, args.overwrite, lambda file: show(found, args.format, file, labelled))


def of_same_file(
    found: Iterator[dict[str, Any]], path: Path, before: os.stat_result | None
) -> Iterator[dict[str, Any]]:
    """Raises before the first result where the gallery, which is mapped, was written into; it may be replaced."""
    for i, result in enumerate(found):
        if i == 0 and before is not None and path.is_file():
            now = os.stat(path)
            same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
            if (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino) and not same:
                raise ValueError(f"{path} was written into while it was searched: search it again.")
        yield result


def own_places(query: Embeddings, gallery: Embeddings) -> Pairs:
    """Rows of queries and of what is the same tracklet in the gallery: one of its name and of the same files, or one
    with which it has half of the shorter one's frames in common. A gallery of which files are not known, or a copy of
    it, is known by its names and embeddings."""
    if query.names == gallery.names and torch.equal(query.embeddings, gallery.embeddings):
        pairs = {(i, i) for i in range(len(query.names))}
    else:
        names = zip(gallery.names, gallery.frames or [], strict=False)
        place = {key: j for j, key in enumerate(names) if key[1]}
        keys = enumerate(zip(query.names, query.frames or [], strict=False))
        pairs = {(i, place[key]) for i, key in keys if key in place}
    if query.marks and gallery.marks:
        rows, columns, parts = overlaps(query.marks, gallery.marks)
        whole = parts >= SAME
        more = set(zip(rows[whole].tolist(), columns[whole].tolist(), strict=True)) - pairs
        if more:
            say(in_common(more, query, gallery, "are never each other's match"))
        few = set(zip(rows[~whole].tolist(), columns[~whole].tolist(), strict=True)) - pairs
        if few:
            say(in_common(few, query, gallery, "are compared all the same, as it is less than half of either"))
        pairs |= more
    places = torch.tensor(sorted(pairs), dtype=torch.long, device="cpu").view(-1, 2)
    return places[:, 0], places[:, 1]


def in_common(pairs: set[tuple[int, int]], query: Embeddings, gallery: Embeddings, what: str) -> str:
    i, j = min(pairs)
    return (
        f"{len({i for i, _ in pairs})} queries have frames in common with tracklets of the gallery and {what}: such as "
        f"{query.names[i]!r} and {gallery.names[j]!r}."
    )


def ranked(
    query: Embeddings,
    gallery: Embeddings,
    k: int,
    use_rerank: bool,
    own: Pairs | bool,
    index: Any = None,
    candidates: int | None = None,
) -> Iterator[dict[str, Any]]:
    """For each query its k nearest; no tracklet is its own match.

    Args:
        own: rows of queries and of what is the same in the gallery, in order. False: nothing is; True: query and
            gallery are the same.
        index: a FAISS index of the gallery to search in.
        candidates: re-rank so many of the nearest, and nothing else.
    """
    if isinstance(own, bool):
        places = torch.arange(len(query.names) if own else 0, device="cpu")
        own = places, places
    rows, columns = nearest(query, gallery, k, use_rerank, own, index, candidates)
    itself: dict[int, set[int]] = {}
    for i, j in zip(*(side.tolist() for side in own), strict=True):
        itself.setdefault(i, set()).add(j)
    for i, (values, places) in enumerate(zip(rows.numpy(), columns.numpy(), strict=True)):  # tensors' rows are slow
        pairs = [(float(d), j) for d, j in zip(values.tolist(), places.tolist(), strict=True) if j >= 0]
        pairs = [(d, j) for d, j in pairs if j not in itself.get(i, ())][:k]
        matches = [{"rank": n, "name": gallery.names[j], "distance": d} for n, (d, j) in enumerate(pairs, 1)]
        result: dict[str, Any] = {"query": query.names[i], "matches": matches}
        if query.pids and gallery.pids:
            result["pid"] = query.pids[i]
            for match, (_, j) in zip(matches, pairs, strict=True):
                match["pid"] = gallery.pids[j]
        yield result


def nearest(
    query: Embeddings, gallery: Embeddings, k: int, use_rerank: bool, own: Pairs, index: Any, candidates: int | None
) -> tuple[Tensor, Tensor]:
    """The distances to the nearest and their places, -1 = none; more than k, where a query's own places may be among
    them."""
    queries, others = query.embeddings, gallery.embeddings
    if index is None and not use_rerank:
        return retrieval.search(queries, others, k, gallery.distance, exclude=own)
    k += int(own[0].bincount().max()) if len(own[0]) else 0
    if index is not None:
        return retrieval.search_index(index, queries, k)
    if gallery.distance == "cosine":
        queries, others = F.normalize(queries), F.normalize(others)
    if candidates is not None:
        return retrieval.rerank(queries, others, candidates=max(candidates, k))
    return retrieval.rerank(queries, others).topk(min(k, len(others)), largest=False)


def identified(found: Iterable[dict[str, Any]], threshold: float) -> Iterator[dict[str, Any]]:
    """Keeps the matches that are nearer than a threshold; a query without any is unknown."""
    for result in found:
        near = [match for match in result["matches"] if match["distance"] < threshold]
        unknown = {} if near else {"unknown": True, "nearest": next(iter(result["matches"]), None)}
        yield {**result, "matches": near, **unknown}


def show(found: Iterable[dict[str, Any]], style: str, file: IO[str], labelled: bool) -> None:
    {"json": show_json, "csv": show_csv, "table": show_table}[style](found, file, labelled)


def show_json(found: Iterable[dict[str, Any]], file: IO[str], labelled: bool) -> None:
    for i, result in enumerate(found):
        file.write(("," if i else "[") + "\n " + json.dumps(result, allow_nan=False))
    file.write("\n]\n")


def show_csv(found: Iterable[dict[str, Any]], file: IO[str], labelled: bool) -> None:
    writer = csv.writer(file)
    writer.writerow(["query", "rank", "gallery", "distance", *(["query_pid", "gallery_pid"] if labelled else [])])
    for result in found:
        for m in result["matches"]:
            labels = [result["pid"], m["pid"]] if labelled else []
            writer.writerow([result["query"], m["rank"], m["name"], f"{m['distance']:.6f}", *labels])
        if result.get("unknown"):  # rank 0 tells it from a folder of that name
            distance = f"{result['nearest']['distance']:.6f}" if result["nearest"] else ""
            writer.writerow([result["query"], 0, "unknown", distance, *([result["pid"], ""] if labelled else [])])


def show_table(found: Iterable[dict[str, Any]], file: IO[str], labelled: bool) -> None:
    for result in found:
        print(printable(result["query"]), file=file)
        for m in result["matches"]:
            mark = "  *" if labelled and m["pid"] == result["pid"] >= 0 else ""
            print(f"{m['rank']:5d}  {m['distance']:8.4f}  {printable(m['name'])}{mark}", file=file)
        if result.get("unknown"):
            near = result["nearest"]
            what = f" (the nearest: {printable(near['name'])}, {near['distance']:.4f})" if near else ""
            print(f"    -            unknown{what}", file=file)
    if labelled:
        print("* the same identity, by the folders' names", file=file)


def printable(name: str) -> str:
    """A name without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def run_index(args: argparse.Namespace) -> None:
    check_output(args.output, args.overwrite, args.gallery)
    gallery = read_embeddings(args.gallery)
    index = retrieval.faiss_index(gallery.embeddings, gallery.distance, args.kind)
    rows = torch.linspace(0, len(gallery.names) - 1, min(MEASURED, len(gallery.names))).long().unique()
    queries, k = gallery.embeddings[rows], min(10, len(gallery.names))
    exact = retrieval.search(queries, gallery.embeddings, k, gallery.distance).indices
    got = retrieval.search_index(index, queries, k).indices
    recall = (exact[:, :, None] == got[:, None]).any(2).float().mean()
    check_output(args.output, args.overwrite, args.gallery)  # again: this may have taken a while
    retrieval.save_index(index, args.output)
    say(f"{args.output}: {len(gallery.names)} tracklets; of the {k} nearest of {len(rows)} it finds {recall:.1%}.")


def read_index(path: Path, gallery: Embeddings, gallery_path: Path) -> Any:
    """A FAISS index, after a check that it is one of this gallery."""
    index = retrieval.load_index(path)
    have, want = (index.ntotal, index.d), tuple(gallery.embeddings.shape)
    same = same_rows(index, gallery.embeddings, gallery.distance)
    if same is None and have == want:
        rows = torch.linspace(0, want[0] - 1, min(CHECKED, want[0])).long()
        queries = gallery.embeddings[rows]
        got, places = retrieval.search_index(index, queries, min(5, want[0]))
        true = retrieval.distances(queries, gallery.embeddings, gallery.distance).gather(1, places.clamp(min=0))
        known = places >= 0
        same = bool(known.any() and (got - true)[known].abs().mean() <= 0.2 * true[known].abs().mean() + 1e-3)
    if same:
        return index
    raise ValueError(
        f"{path} is no index of {gallery_path}: it has {have[0]} rows of {have[1]} numbers, and the gallery {want[0]} "
        f"of {want[1]}, or others. Make it again: temporal-agg index {gallery_path} -o {path}."
    )


def run_merge(args: argparse.Namespace) -> None:
    check_kind(args.output)
    check_output(args.output, args.overwrite, *args.files)
    parts = [read_embeddings(path) for path in args.files]
    for path, part in zip(args.files, parts, strict=True):
        check_comparable(args.files[0], parts[0], path, part.model, part.fingerprint)
    found = merge_embeddings(*parts)
    check_output(args.output, args.overwrite, *args.files)  # again: this may have taken a while
    write_embeddings(args.output, found)
    say(f"{args.output}: {len(found.names)} embeddings of {len(parts)} files.")


def run_link(args: argparse.Namespace) -> None:
    if args.sheet is not None and not args.folder:
        raise ValueError("--sheet shows the frames: pass --folder, the folder that was embedded.")
    inputs = args.gallery, *args.folder
    check_output(args.sheet, True, *inputs)  # another page that is there is looked at when the new one is made
    check_output(args.output, args.overwrite, *inputs)
    if args.sheet is not None and args.sheet.resolve() == args.output.resolve():
        raise ValueError(f"-o and --sheet are both {args.output}: choose another name for one of them.")
    gallery = read_embeddings(args.gallery)
    threshold = args.threshold
    if threshold is None and gallery.distance != "cosine":
        raise ValueError(f"--threshold has no default for the distance of this model ({gallery.distance}): pass one.")
    threshold = COSINE_THRESHOLD if threshold is None else threshold
    times: dict[str, Any] = {}
    if args.numbers_are_times:
        if not gallery.start or min(gallery.start) < 0:
            raise ValueError(
                f"{args.gallery} does not know the number of every tracklet's first frame: embed it again."
            )
        times = {"cameras": gallery.cameras, "start": gallery.start, "end": gallery.end}
    people = retrieval.link(gallery.embeddings, threshold, metric=gallery.distance, **times).tolist()
    if args.sheet is not None:
        tracklets = tracklets_named(gallery.names, args.folder)
        save(args.sheet, args.overwrite, lambda temporary: retrieval.contact_sheet(temporary, tracklets, people))

    def write(file: IO[str]) -> None:
        labels = {"pid": gallery.pids, "camera": gallery.cameras}
        columns = {"name": gallery.names, "person": people, **{key: x for key, x in labels.items() if x}}
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))

    put(args.output, args.overwrite, write)
    quality = ""
    if gallery.pids:
        precision, recall, _ = retrieval.bcubed(people, gallery.pids)
        quality = f"; by the folders' names B-cubed precision {precision:.3f}, recall {recall:.3f}"
    say(f"{len(people)} tracklets, {len(set(people))} people at a threshold of {threshold:g}{quality}.")


def tracklets_named(names: Sequence[str], folders: Sequence[Path]) -> list[Tracklet]:
    found = {t.name: t for folder in folders for t in find_tracklets(folder)[0]}
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"no tracklet {missing[0]!r} in {', '.join(map(str, folders))} ({len(missing)} are missing): pass the "
            "folder that was embedded."
        )
    return [found[name] for name in names]


def run_list(args: argparse.Namespace) -> None:
    models = list_models(args.pattern, pretrained=args.pretrained)
    aggregators = [] if args.pretrained else fnmatch.filter(list_aggregators(), args.pattern)
    with printing() as file:
        if aggregators:
            print("Aggregators; each goes before any timm model, as <aggregator>_<timm model>:", file=file)
        for name in aggregators:
            paper = registry_entry(name).paper
            print(f"  {name:16}  {paper.title} ({paper.venue} {paper.year})" if paper else f"  {name}", file=file)
        if models:
            print("Released weights:" if args.pretrained else "Models that are tested:", file=file)
            print("".join(f"  {name}\n" for name in models), end="", file=file)
    if not models and not aggregators:
        if args.pretrained and not list_models(pretrained=True):
            raise ValueError("no released weights yet.")
        what = "released weights" if args.pretrained else "model and no aggregator"
        raise ValueError(f"no {what} of a name like {args.pattern!r}.")


# ----------------------------------------------------------------------------------------------------------------------
# What is read and written


def check_comparable(gallery_path: Path, gallery: Embeddings, what: object, model: str, mark: str) -> None:
    if mark != gallery.fingerprint:
        raise ValueError(
            f"{what} was embedded by {model} ({mark}), {gallery_path} by {gallery.model} ({gallery.fingerprint}): "
            "embeddings of different models cannot be compared. Embed one of them again."
        )


def check_folder(output: Path | None) -> None:
    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} into: make it first.")
    if output is not None and output.exists() and not output.is_file():
        raise ValueError(f"{output} is there and no file: choose another name.")


def check_output(output: Path | None, overwrite: bool, *inputs: Path | str | None) -> None:
    """Raises if a file would be lost: an input whatever was said, any other one unless ``overwrite``."""
    if output is None:
        return
    check_folder(output)
    sweep(output.parent, output.name)
    if output.exists():
        for source in filter(None, inputs):
            path = Path(expanded(str(source)).removeprefix("local-dir:"))
            if path.exists() and (output.samefile(path) or path.resolve() in output.resolve().parents):
                raise ValueError(f"the output {output} is an input, or part of one ({source}): choose another name.")
        if not overwrite:
            raise FileExistsError(f"{output} is there already: choose another name, or pass --overwrite.")


def save(path: Path, overwrite: bool, write: Callable[[Path], object]) -> None:
    """Puts a file into its place; another one that is there stays, unless ``overwrite``."""

    def write_and_compare(temporary: Path) -> None:
        write(temporary)
        if path.exists() and not overwrite and not filecmp.cmp(temporary, path, shallow=False):
            raise ValueError(f"{path} is there already: choose another name, or pass --overwrite.")

    replace_file(path, write_and_compare)


def put(output: Path | None, overwrite: bool, write: Callable[[IO[str]], object]) -> None:
    """Writes text into a file, UTF-8, or on the screen; a name that is no text comes with backslashes."""
    if output is None:
        with printing() as file:
            write(file)
        return

    def write_text(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            write(file)

    save(output, overwrite, write_text)


@contextmanager
def printing() -> Iterator[IO[str]]:
    """The standard output, which takes every name: what its encoding has not got comes with backslashes."""
    file = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (None: closed, or no console)
    errors, change = file.errors, getattr(file, "reconfigure", None)
    if change is not None:
        change(errors="backslashreplace")
    try:
        yield file
        file.flush()
    except OSError as error:
        if error.filename is None and not isinstance(error, BrokenPipeError):
            error.filename = STDOUT
        raise
    finally:
        if change is not None:
            with suppress(OSError):
                change(errors=errors)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "temporal-agg", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"temporal-agg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{embed,search,link,merge,index,list}")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--backbone-pretrained", action="store_true", help="timm's weights; mean_* and max_* only")
    running.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    running.add_argument("--frames-per-batch", type=int, default=256, help="bounds memory (256)")
    running.add_argument("--workers", type=int, help="threads that read images; default: by the number of cores")
    running.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    running.add_argument("--reject-outliers", action="store_true", help="leave out frames that show somebody else")
    add_embed(commands, running)
    add_search(commands, running)
    add_link(commands)
    add_merge(commands)
    add_index(commands)
    names = commands.add_parser("list", help="names of models and aggregators")
    names.add_argument("pattern", nargs="?", default="*", help="such as 'gltr_*'")
    names.add_argument("--pretrained", action="store_true", help="only released weights")
    names.set_defaults(run=run_list)
    return parser.parse_args(argv)


def add_embed(commands: Any, running: argparse.ArgumentParser) -> None:
    embed = commands.add_parser("embed", parents=[running], help="a folder of tracklets -> a file of embeddings")
    embed.add_argument("folder", type=place, help="its innermost folders with images are the tracklets")
    embed.add_argument("-o", "--output", type=place, required=True, help="*.npz or *.parquet; .part: what is finished")
    embed.add_argument("--model", required=True, help=MODEL)
    either = embed.add_mutually_exclusive_group()
    either.add_argument("--overwrite", action="store_true", help="replace an output, or an unfinished run of another")
    either.add_argument("--append", action="store_true", help="add the tracklets that the output has not got yet")
    embed.set_defaults(run=run_embed)


def add_search(commands: Any, running: argparse.ArgumentParser) -> None:
    search = commands.add_parser("search", parents=[running], help="the nearest tracklets of a gallery")
    search.add_argument("query", type=place, help="a file of embeddings, or a folder as for embed")
    search.add_argument("gallery", type=place, help="a file of embeddings")
    search.add_argument("-k", type=int, default=10, help="how many (10)")
    search.add_argument("--threshold", type=float, help="only what is nearer; a query without a match is 'unknown'")
    search.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking, over all queries together")
    search.add_argument("--candidates", type=int, help="re-rank so many of the nearest (default: the whole gallery)")
    search.add_argument("--index", type=place, help="a FAISS index of the gallery, which is then not scanned")
    search.add_argument("--format", choices=("table", "csv", "json"), default="table")
    search.add_argument("-o", "--output", type=place, help="a file; default: the screen")
    search.add_argument("--overwrite", action="store_true", help="replace the output")
    search.add_argument("--model", help=f"for a folder: {MODEL}; default: the gallery's")
    search.set_defaults(run=run_search)


def add_link(commands: Any) -> None:
    link = commands.add_parser("link", help="tracklets -> people: which of them are one person")
    link.add_argument("gallery", type=place, help="a file of embeddings")
    link.add_argument("-o", "--output", type=place, required=True, help="*.csv")
    link.add_argument("--threshold", type=float, help=f"mean distance within a person (cosine: {COSINE_THRESHOLD})")
    link.add_argument(
        "--numbers-are-times",
        action="store_true",
        help="the numbers in the frames' names are times: who is seen twice at once in a camera is two people",
    )
    link.add_argument("--sheet", type=place, help="*.html: a page on which to look at the people")
    link.add_argument("--folder", type=place, action="append", default=[], help="for --sheet: what was embedded")
    link.add_argument("--overwrite", action="store_true", help="replace the output and the page")
    link.set_defaults(run=run_link)


def add_merge(commands: Any) -> None:
    merge = commands.add_parser("merge", help="files of embeddings -> one")
    merge.add_argument("files", type=place, nargs="+", help="of one model, the names unique")
    merge.add_argument("-o", "--output", type=place, required=True, help="*.npz or *.parquet")
    merge.add_argument("--overwrite", action="store_true", help="replace the output")
    merge.set_defaults(run=run_merge)


def add_index(commands: Any) -> None:
    index = commands.add_parser("index", help="a FAISS index of a gallery, for search --index")
    index.add_argument("gallery", type=place, help="a file of embeddings")
    index.add_argument("-o", "--output", type=place, required=True, help="*.faiss")
    index.add_argument("--kind", choices=("flat", "hnsw", "ivf"), default="flat", help="flat is exact (flat)")
    index.add_argument("--overwrite", action="store_true", help="replace the output")
    index.set_defaults(run=run_index)


def place(text: str) -> Path:
    """A path from the command line; ``~`` is expanded where the shell did not."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 after a message on stderr (a wrong usage exits with 2, Ctrl-C returns 130)."""
    args = parse(argv)
    try:
        args.run(args)
        return 0
    except BrokenPipeError:  # | head
        silence()
        return 1
    except KeyboardInterrupt:
        say("stopped" + ("; the same command goes on where it was." if args.command == "embed" else "."))
        return 130
    except OutOfMemory:
        say("error: out of GPU memory: pass a smaller --frames-per-batch.")
        return 1
    except MemoryError:
        say("error: out of memory.")
        return 1
    except RuntimeError as error:  # torch has no other kinds
        if not re.search("DataLoader worker|DefaultCPUAllocator|shared memory", str(error)):
            raise
        say(f"error: {error} Pass --workers 0, or a smaller --frames-per-batch.")
        return 1
    except (ImportError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.filename == STDOUT:
            silence()
        text = str(error)
        if "Original Traceback" in text:  # from a process that reads images
            text = text.strip().splitlines()[-1].partition(": ")[2]
        say(f"error: {text}")
        return 1


def silence() -> None:
    """What is left in the standard output's buffer goes nowhere, and so raises nothing at the end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
