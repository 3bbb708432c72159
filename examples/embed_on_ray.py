"""A table of frames -> the embedding of each tracklet, on as many machines as a Ray cluster has.

    python examples/embed_on_ray.py frames.parquet embeddings --model hf-hub:owner/name --actors 8 --gpus 1

Written for ray 2.60 (pip install "ray[data]"). The table (Parquet, CSV) has a row a frame with the columns tracklet
(its name), frame (a number to order by) and path (an image file, where every machine finds it). Ray Data hands blocks
of tracklets to actors that each hold the model; each block becomes one Parquet file in the output folder, with the
columns tracklet, frames and embedding. Stopped and started again, it embeds what is not in the folder yet.
"""

import argparse
import os
import tempfile
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pyarrow import csv

COLUMNS = ("tracklet", "frame", "path")


class Embedder:
    """An actor: holds the model, and writes what it has embedded."""

    def __init__(self, model: str, output: str, precision: str, device: str):
        from temporal_agg import create_model

        self.model = create_model(model).to(device).eval()
        self.output, self.precision = Path(output), precision

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        from temporal_agg import Tracklet, embed_tracklets

        names = [str(name) for name in block["tracklet"]]
        tracklets = [
            Tracklet([str(path) for path in paths], pid=-1, name=name)
            for name, paths in zip(names, block["paths"], strict=True)
        ]
        embeddings = embed_tracklets(self.model, tracklets, precision=self.precision, progress=False)
        table = pa.table(
            {"tracklet": names, "frames": [len(t) for t in tracklets], "embedding": list(embeddings.numpy())}
        )
        # Whole, or not there: a killed actor leaves no file of that name.
        file, aside = tempfile.mkstemp(dir=self.output, prefix=".unfinished-")
        os.close(file)
        pq.write_table(table, aside)
        os.replace(aside, self.output / f"{Path(aside).name.removeprefix('.unfinished-')}.parquet")
        return {"tracklet": names}


def done(output: Path) -> set[str]:
    """The tracklets that are embedded already."""
    return {
        name for file in output.glob("*.parquet") for name in pq.read_table(file, columns=["tracklet"])[0].to_pylist()
    }


def embed(
    table: str,
    output: str,
    model: str,
    *,
    actors: int = 1,
    gpus: float = 0,
    cpus: float = 1,
    tracklets_per_block: int = 64,
    precision: str = "float32",
) -> int:
    """Embeds what is not embedded yet, and returns the number of tracklets that this was."""
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".unfinished-*"):  # of a run that was killed
        left.unlink()
    frames = (csv.read_csv if table.endswith(".csv") else pq.read_table)(table)
    missing = [column for column in COLUMNS if column not in frames.column_names]
    if missing:
        raise ValueError(f"{table} has no column {', '.join(missing)}: expected {', '.join(COLUMNS)}.")
    known = done(folder)
    rows = frames.select(COLUMNS).sort_by([("tracklet", "ascending"), ("frame", "ascending")]).to_pylist()
    items = [
        {"tracklet": str(name), "paths": [row["path"] for row in group]}
        for name, group in groupby(rows, key=itemgetter("tracklet"))
        if str(name) not in known
    ]
    if not items:
        return 0
    tracklets = ray.data.from_items(items, override_num_blocks=-(-len(items) // tracklets_per_block))
    written = tracklets.map_batches(
        Embedder,
        fn_constructor_args=(model, str(folder), precision, "cuda" if gpus else "cpu"),
        batch_size=tracklets_per_block,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus,
        num_cpus=cpus,
    )
    return written.count()


def main(argv: list[str] | None = None) -> None:
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", help="Parquet or CSV, a row a frame")
    parser.add_argument("output", help="a folder, for Parquet files")
    parser.add_argument("--model", required=True, help="what create_model takes")
    parser.add_argument("--actors", type=int, default=1, help="processes that hold the model")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor; 0 = it runs on a CPU")
    parser.add_argument("--cpus", type=float, default=1, help="of each actor")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args(argv)
    print(f"{embed(**vars(args))} tracklets embedded, {len(done(Path(args.output)))} in {args.output}")


if __name__ == "__main__":
    main()
