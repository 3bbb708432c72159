import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from temporal_agg import Tracklet, create_model, embed_tracklets

pytest.importorskip("pyarrow", reason="needs pyarrow")
pytest.importorskip("ray.data", reason="needs ray[data]")

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed_on_ray.py"


@pytest.mark.slow
def test_embeds_what_is_missing(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    spec = importlib.util.spec_from_file_location("examples_embed_on_ray", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    create_model("attention_test_resnet", img_size=(32, 32)).save_pretrained(tmp_path / "model")
    name = f"local-dir:{tmp_path / 'model'}"
    rng = np.random.default_rng(0)
    rows, tracklets = [], {}
    for tracklet in ("a", "b", "c", "7"):
        paths = []
        for frame in range(5):
            paths.append(str(tmp_path / f"{tracklet}-{frame}.png"))
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(paths[-1])
            rows.append({"tracklet": tracklet, "frame": frame, "path": paths[-1]})
        tracklets[tracklet] = Tracklet(paths, 1)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    pq.write_table(pa.Table.from_pylist([row for row in rows if row["tracklet"] in "ab"]), tmp_path / "some.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    out = tmp_path / "out"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert example.embed(str(tmp_path / "some.parquet"), str(out), name, tracklets_per_block=1) == 2
        before = {file: file.read_bytes() for file in out.iterdir()}
        (out / ".unfinished-x").write_bytes(b"killed")
        assert example.embed(str(tmp_path / "all.parquet"), str(out), name) == 2
        assert example.embed(str(tmp_path / "all.parquet"), str(out), name) == 0
    finally:
        ray.shutdown()
    assert all(file.read_bytes() == content for file, content in before.items()), "nothing is embedded twice"
    assert not list(out.glob(".unfinished*"))
    found = pa.concat_tables([pq.read_table(file) for file in out.glob("*.parquet")]).to_pylist()
    assert sorted(row["tracklet"] for row in found) == sorted(tracklets)
    want = embed_tracklets(create_model(name), [tracklets[row["tracklet"]] for row in found], progress=False)
    got = torch.tensor([row["embedding"] for row in found])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
