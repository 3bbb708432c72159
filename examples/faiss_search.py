"""A gallery in a FAISS index: exact and approximate, with the share of the true neighbours that each kind finds.

    pip install 'temporal-agg[faiss]'
    python examples/faiss_search.py

The embeddings are made up: noise around 2,000 people, as dense as those of a trained model. With your own, replace
``people()`` by ``embed_tracklets(model, tracklets)``. Recall depends on the embeddings: measure it on yours.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from temporal_agg import retrieval


def people(rows: int, width: int = 128, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    looks = torch.randn(2000, width, generator=torch.Generator().manual_seed(0))
    who = torch.randint(2000, (rows,), generator=generator)
    return looks[who] + 0.8 * torch.randn(rows, width, generator=generator)


def compare(gallery: torch.Tensor, queries: torch.Tensor, k: int = 10) -> dict[str, float]:
    """Recall among the k nearest, by kind of index."""
    exact = retrieval.search(queries, gallery, k)
    recall = {}
    for kind in ("flat", "hnsw", "ivf"):
        start = time.perf_counter()
        index = retrieval.faiss_index(gallery, "cosine", kind)
        built = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "gallery.faiss")
            retrieval.save_index(index, path)
            index, size = retrieval.load_index(path), path.stat().st_size
        start = time.perf_counter()
        found = retrieval.search_index(index, queries, k)
        took = time.perf_counter() - start
        hits = (found.indices[:, :, None] == exact.indices[:, None]).any(2)
        recall[kind] = float(hits.float().mean())
        print(
            f"{kind:4}  recall@{k} {recall[kind]:.4f}  built in {built:5.1f} s, {size / 1e6:.0f} MB, "
            f"{1000 * took / len(queries):.2f} ms a query"
        )
    return recall


if __name__ == "__main__":
    try:
        compare(people(20_000), people(500, seed=1))
    except ImportError as error:
        sys.exit(str(error))
