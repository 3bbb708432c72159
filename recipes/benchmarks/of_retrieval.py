"""What distances, evaluation, search and re-ranking cost, against plain numpy."""

import argparse
import contextlib
import csv
import io
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import common
import literal_retrieval
import numpy as np
import torch
from measuring import BUILDERS, Call, Case, build, changed, heading, milliseconds, peak_memory, result_of, row_of

from temporal_agg import cli, retrieval
from temporal_agg.retrieval.store import Embeddings, write_embeddings

NOISE = 3.0
FORMS = {
    "distances": ("ours", "numpy"),
    "evaluate": ("ours", "numpy", "argsort"),
    "rerank": ("ours", "numpy", "published"),
}


def embeddings(args: argparse.Namespace) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Queries and gallery; and their persons and cameras, in the order of ``evaluate``."""
    rng = np.random.default_rng(0)
    N = args.queries + args.gallery
    pids, cams = rng.integers(0, args.identities, N), rng.integers(0, 6, N)
    features = rng.standard_normal((N, args.dims), dtype=np.float32)
    if args.structure == "clustered":
        features *= NOISE
        features += rng.standard_normal((args.identities, args.dims), dtype=np.float32)[pids]
    sides = slice(args.queries), slice(args.queries, N)
    return [features[s] for s in sides], [x[s] for s in sides for x in (pids, cams)]


def build_retrieval(what: str, name: str, args: argparse.Namespace) -> Call:
    """``name``: a step and its form, such as rerank:ours."""
    step, form = name.split(":")
    (queries, gallery), ids = embeddings(args)
    library = literal_retrieval
    if form == "ours":
        library = retrieval
        queries, gallery = (torch.from_numpy(x).to(args.device) for x in (queries, gallery))
    if step == "distances":
        return Call(partial(library.distances, queries, gallery, *["euclidean"] * (form == "ours")))
    if step == "rerank":
        return Call(partial(library.rerank, queries, gallery, **{"as_published": True} if form == "published" else {}))
    distances = retrieval.distances(queries, gallery, "euclidean")
    if form == "argsort":
        return Call(partial(np.argsort, distances, axis=1))
    return Call(partial(library.evaluate, distances, *ids))


BUILDERS["retrieval"] = build_retrieval


def measure_retrieval(step: str, args: argparse.Namespace) -> tuple[dict, dict[str, Case]]:
    """One step at one size, but for the memory; and the cases that it compares."""
    print(f"time: {step} at {args.queries} x {args.gallery}", file=sys.stderr, flush=True)
    forms = ("ours",) if step == "rerank" and args.skip_dense else FORMS[step]
    cases = {form: ("retrieval", f"{step}:{form}", args) for form in forms}
    works = {form: build(*case) for form, case in cases.items()}
    times = {}
    for form, work in works.items():  # not in turns: the gigabytes that numpy's forms give back slow down what follows
        times |= milliseconds({form: work}, False, args)
    row = row_of(step, times, queries=args.queries, gallery=args.gallery)
    if step == "evaluate":
        row["map"] = works["ours"].run().map
    return row, cases


def retrieval_table(rows: list[dict]) -> str:
    lines = [
        f"{'':24}" + "".join(f"{c:>10}" for c in ("ours", "numpy", "numpy", "ours", "numpy", "numpy")),
        f"{'queries x gallery':24}" + "".join(f"{c:>10}" for c in ("ms", "ms", "/ ours", "MB", "MB", "/ ours")),
    ]
    for row in rows:
        size, mb = f"{row['queries']} x {row['gallery']}", row.get("peak_mb", {})
        for form in list(row["ms"])[1:] or [None]:
            first = form in ("numpy", None)
            values = [row["ms"]["ours"] if first else None, row["ms"].get(form), row["speedup"].get(form)]
            values += [mb.get("ours") if first else None, mb.get(form), row.get("memory_ratio", {}).get(form)]
            cells = ("-" if v is None else f"{v:.{n}f}" for v, n in zip(values, (1, 1, 2) * 2, strict=True))
            lines.append(f"{row['name'] if first else form:10} {size:13}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def retrieval_command(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    sizes = [dict(zip(("queries", "gallery"), size, strict=True)) for size in args.sizes]
    measured = [measure_retrieval(step, changed(args, **size)) for size in sizes for step in FORMS]
    rows = [row for row, _ in measured]
    if args.memory:
        ours_only = args.device == "cuda"  # numpy's forms run on the CPU
        wanted = [(row, form, case) for row, cases in measured for form, case in cases.items()]
        wanted = [x for x in wanted if x[1] == "ours" or not ours_only]
        for (row, form, _), peak in zip(wanted, peak_memory([x[2] for x in wanted], {"run": False}), strict=True):
            row.setdefault("peak_mb", {})[form] = peak["run"]
        for row in rows:
            ours = row["peak_mb"]["ours"]
            others = {form: mb for form, mb in row["peak_mb"].items() if form != "ours"}
            row["memory_ratio"] = {form: mb / ours if mb and ours else None for form, mb in others.items()}

    result = result_of("retrieval", args, rows)
    print(f"{heading(result)}; median of {args.repeats}")
    maps = ", ".join(f"{row['map']:.1%}" for row in rows if "map" in row)
    print(f"{args.structure} embeddings [N, {args.dims}], {args.identities} identities, mAP {maps}")
    print("\n" + retrieval_table(rows))
    return result


def build_files(names: Sequence[str], sides: Sequence[torch.Tensor], folder: Path) -> list[str]:
    """A file of embeddings for each side."""
    files = [str(folder / f"{name}.npz") for name in names]
    for name, side, file in zip(names, sides, files, strict=True):
        numbered = [f"{name}/{i}" for i in range(len(side))]
        found = Embeddings(side.cpu(), numbered, None, None, "cosine", "noise", False, "noise")
        write_embeddings(file, found)
    return files


def search_files(files: Sequence[str], k: int, output: Path) -> None:
    """``temporal-agg search`` without the start of Python: it reads both files and writes a third."""
    command = ["search", *files, "-k", str(k), "--format", "csv", "-o", str(output), "--overwrite"]
    with contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(command)
    if code:
        raise ValueError(f"temporal-agg search ended with {code}.")


def sort_files(files: Sequence[str], k: int, output: Path) -> None:
    """The same in plain numpy, which sorts whole rows."""
    (names, queries), (others, gallery) = ((x["names"], x["embeddings"]) for x in map(np.load, files))
    found = literal_retrieval.search(queries, gallery, k)
    with open(output, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "rank", "gallery", "distance"])
        for name, distances, places in zip(names, *found, strict=True):
            rows = enumerate(zip(others[places], distances, strict=True), 1)
            writer.writerows([name, rank, other, f"{distance:.6f}"] for rank, (other, distance) in rows)


FROM_FILES = {"ours": search_files, "sorted": sort_files}


def search_command(args: argparse.Namespace) -> dict:
    """The k nearest, against the matrix product of all queries and the gallery alone; and from file to file, against
    plain numpy that sorts whole rows, too."""
    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    rows = []
    for queries, gallery in args.sizes:
        print(f"time: search {queries} x {gallery}", file=sys.stderr, flush=True)
        Q, G = (torch.randn(n, args.dims, generator=g).to(args.device) for n in (queries, gallery))
        product, about = Call(partial(torch.mm, Q, G.T)), {"queries": queries, "gallery": gallery, "k": args.k}
        with tempfile.TemporaryDirectory() as folder:
            files = build_files(("queries", "gallery"), (Q, G), Path(folder))
            for name, calls in (
                ("search", {"ours": partial(retrieval.search, Q, G, args.k)}),
                (
                    "the command",
                    {form: partial(run, files, args.k, Path(folder, "found.csv")) for form, run in FROM_FILES.items()},
                ),
            ):
                works = {form: Call(call) for form, call in calls.items()}
                rows.append(row_of(name, milliseconds({**works, "product": product}, False, args), **about))
    result = result_of("search", args, rows)
    print(heading(result))
    lines = [["", "queries x gallery", "ms", "a query, ms", "the product alone, ms", "times the product", "sorted, ms"]]
    for row in rows:
        ms, queries = row["ms"], row["queries"]
        cells = [f"{ms['ours']:.1f}", f"{ms['ours'] / queries:.2f}", f"{ms['product']:.1f}"]
        cells += [f"{1 / row['speedup']['product']:.2f}", f"{ms['sorted']:.1f}" if "sorted" in ms else "-"]
        lines.append([row["name"], f"{queries} x {row['gallery']}", *cells])
    print(common.layout(lines))
    return result
