import errno
import json
import math
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from temporal_agg.retrieval import store
from temporal_agg.retrieval.store import Embeddings, append_embeddings, merge_embeddings, read_embeddings

NAMES = ["0001/1_a", "0002/张", "bytes \udce9", "a\nb"]  # the third as Python has a name that is no UTF-8

NOTHING = dict.fromkeys(("pids", "cameras", "frames", "start", "end", "purity", "change", "marks"))


def embeddings(names=tuple(NAMES), seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    N = len(names)
    found = Embeddings(
        torch.randn(N, 8, generator=generator),
        list(names),
        list(range(N)),
        [-1] * N,
        "cosine",
        "/runs/mine",
        False,
        "f00d",
        frames=[f"key {i}" for i in range(N)],
        start=[0] * N,
        end=[2**40 + i for i in range(N)],
        purity=[1 / (i + 3) for i in range(N)],
        change=[i - 1 for i in range(N)],
        marks=[bytes(range(8 * i)) for i in range(N)],  # as many frames as its number
    )
    return found._replace(**changes)


def assert_equal(got, want):
    assert torch.equal(got.embeddings, want.embeddings)
    assert got._replace(embeddings=None) == want._replace(embeddings=None)


@pytest.fixture(params=[".npz", ".parquet"])
def kind(request):
    if request.param == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    return request.param


def test_what_is_written_is_read(kind, odd_folder):
    path = odd_folder / f"a[1]{kind}"  # a name that means something to glob
    for found in (
        embeddings(),
        embeddings(
            **NOTHING,
            normalized=True,
            distance="dot",
        ),
        embeddings(names=["one"], backbone_pretrained=True, model="hf-hub:o/r@\udce9"),
    ):
        store.write_embeddings(path, found)
        assert_equal(read_embeddings(path), found)
        assert_equal(read_embeddings(path, mmap=True), found)
        assert [p.name for p in odd_folder.iterdir()] == [path.name]
    half = embeddings()._replace(embeddings=embeddings().embeddings.bfloat16().requires_grad_())
    store.write_embeddings(path, half)
    assert torch.equal(read_embeddings(path).embeddings, half.embeddings.detach().float())


def test_the_keys_of_an_npz_file(tmp_path):
    """As the documentation has them, read without this package."""
    store.write_embeddings(tmp_path / "a.npz", embeddings())
    with np.load(tmp_path / "a.npz") as stored:
        assert set(stored.files) == {*Embeddings._fields, "num_marks"}
        assert stored["marks"].tobytes() == b"".join(embeddings().marks)
        assert stored["num_marks"].tolist() == [0, 1, 2, 3]
        assert (stored["embeddings"].dtype, stored["embeddings"].shape) == (np.float32, (4, 8))
        assert stored["names"].tolist() == NAMES
        assert not stored["normalized"]


def test_the_columns_of_a_parquet_file(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra parquet)")
    found = embeddings(names=["a", "b"])
    store.write_embeddings(tmp_path / "a.parquet", found)
    table = parquet.read_table(tmp_path / "a.parquet")
    columns = ["embedding", "name", "pid", "camera", "frames", "start", "end", "purity", "change", "marks"]
    assert table.column_names == columns
    assert table["name"].to_pylist() == ["a", "b"]
    assert table["embedding"].to_pylist() == found.embeddings.tolist()
    about = json.loads(table.schema.metadata[b"temporal-agg"])
    assert about == {
        "distance": "cosine",
        "model": "/runs/mine",
        "backbone_pretrained": False,
        "fingerprint": "f00d",
        "normalized": False,
    }


def test_lists_of_any_kind_are_read_from_parquet(tmp_path):
    """Other engines write lists of variable length, 64-bit floats and many row groups."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    import pyarrow.parquet as pq

    found = embeddings(names=["a", "b", "c"], **NOTHING)
    about = {key: getattr(found, key) for key in store.ONCE if key != "normalized"}
    for kind in (pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 8)):
        rows = pa.array(found.embeddings.tolist(), kind)
        table = pa.table({"name": ["a", "b", "c"], "more": [1, 2, 3], "embedding": rows})
        table = table.replace_schema_metadata({b"temporal-agg": json.dumps(about)})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        assert_equal(read_embeddings(tmp_path / "a.parquet"), found)


def test_merge_and_append(kind, tmp_path):
    first, second = embeddings(), embeddings(names=["x", "y"], seed=1)
    path = tmp_path / f"a{kind}"
    store.write_embeddings(path, first)
    append_embeddings(path, second)
    merged = read_embeddings(path)
    assert_equal(merged, merge_embeddings(first, second))
    assert merged.names == [*NAMES, "x", "y"]
    assert torch.equal(merged.embeddings, torch.cat([first.embeddings, second.embeddings]))
    assert merged.pids == [0, 1, 2, 3, 0, 1]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_merge_with_what_has_no_identities():
    bare = embeddings(names=["x"], pids=None, cameras=None, frames=None, purity=None, change=None, marks=None)
    merged = merge_embeddings(embeddings(), bare)
    assert merged.pids == [0, 1, 2, 3, -1]
    assert merged.cameras == [-1] * 5
    assert merged.frames == ["key 0", "key 1", "key 2", "key 3", ""]
    assert merged.purity[:4] == embeddings().purity
    assert math.isnan(merged.purity[4])
    assert merged.change == [-1, 0, 1, 2, -1]
    assert merged.marks == [*embeddings().marks, b""]
    assert merge_embeddings(bare).pids is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"fingerprint": "beef", "model": "theirs"}, "fingerprint is 'f00d' .*mine.*'beef' .*theirs"),
        ({"distance": "dot"}, "distance is 'cosine'"),
        ({"normalized": True}, "normalized is False"),
        ({"names": ["0001/1_a", "z"]}, "two tracklets are named '0001/1_a'"),
        ({"embeddings": torch.zeros(2, 3)}, "8 and 3 numbers"),
        ({"embeddings": torch.full((2, 8), float("nan"))}, "2 tracklets are not finite numbers, the first that of 'x'"),
        ({"pids": [1]}, "2 embeddings and 1 pids"),
    ],
)
def test_what_does_not_go_together(other, message, tmp_path):
    more = embeddings(names=["x", "y"])._replace(**other)
    with pytest.raises(ValueError, match=message):
        merge_embeddings(embeddings(), more)
    store.write_embeddings(tmp_path / "a.npz", embeddings())
    with pytest.raises(ValueError, match=message):
        append_embeddings(tmp_path / "a.npz", more)
    assert_equal(read_embeddings(tmp_path / "a.npz"), embeddings())


GOOD = {
    "embeddings": np.eye(2, dtype=np.float32),
    "names": np.array(["a", "b"]),
    "distance": np.array("cosine"),
    "model": np.array("m"),
    "backbone_pretrained": np.array(False),
    "fingerprint": np.array("f"),
}
BAD = {
    "no embeddings": ("embeddings", None),
    "no name": ("names", None),
    "names of numbers": ("names", np.arange(2)),
    "names of bytes": ("names", np.array([b"a", b"b"])),
    "names of objects": ("names", np.array(["a", None], dtype=object)),
    "a table of names": ("names", np.array([["a", "b"]])),
    "one name": ("names", np.array(["a"])),
    "one name without dimensions": ("names", np.array("a")),
    "integer embeddings": ("embeddings", np.eye(2, dtype=int)),
    "complex embeddings": ("embeddings", np.eye(2, dtype=complex)),
    "text for embeddings": ("embeddings", np.array([["a", "b"]] * 2)),
    "one vector": ("embeddings", np.ones(2, np.float32)),
    "no row": ("embeddings", np.ones((0, 2), np.float32)),
    "no column": ("embeddings", np.ones((2, 0), np.float32)),
    "NaN": ("embeddings", np.full((2, 2), np.nan, np.float32)),
    "infinity": ("embeddings", np.full((2, 2), np.inf, np.float16)),
    "beyond float32": ("embeddings", np.full((2, 2), 1e300)),
    "a name that comes twice": ("names", np.array(["a", "a"])),
    "identities below -1": ("pids", np.array([0, -2])),
    "cameras below -1": ("cameras", np.array([-1, -3])),
    "identities beyond int64": ("pids", np.array([0, 2**63], np.uint64)),
    "a first frame below -1": ("start", np.array([0, -2])),
    "a last frame below -1": ("end", np.array([-(2**62), 3])),
    "a change below -1": ("change", np.array([-1, -2])),
    "a purity above 1": ("purity", np.array([np.nan, 1.001])),
    "an infinite purity": ("purity", np.array([-np.inf, 1], np.float32)),
    "purities of integers": ("purity", np.array([0, 1])),
    "identities of floats": ("pids", np.array([1.0, 2.0])),
    "identities of flags": ("pids", np.array([True, False])),
    "too many identities": ("pids", np.arange(3)),
    "cameras of text": ("cameras", np.array(["1", "2"])),
    "a distance unknown": ("distance", np.array("cosinus")),
    "a distance of numbers": ("distance", np.array(3)),
    "a flag of text": ("backbone_pretrained", np.array("no")),
    "many models": ("model", np.array(["m", "n"])),
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_wrong_fields_of_npz_are_named(what, mmap, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **GOOD)
    assert read_embeddings(path, mmap=mmap).names == ["a", "b"]
    key, value = BAD[what]
    fields = {**GOOD, key: value} if value is not None else {k: v for k, v in GOOD.items() if k != key}
    np.savez(path, **fields, allow_pickle=True) if value is not None and value.dtype == object else np.savez(
        path, **fields
    )
    with pytest.raises(
        ValueError, match=r"a\.npz is no file that `temporal-agg embed` wrote, or it is damaged: "
    ) as got:
        read_embeddings(path, mmap=mmap)
    assert any(text in str(got.value) for text in ("Object arrays", "are named", key))


@pytest.mark.parametrize(
    "counts", [None, [3], [3, 1], [-1, 4], [2**63, 2**63], [2**63 - 1, 4], [1.0, 2.0], [[1, 2]]], ids=str
)
def test_marks_that_are_not_those_of_the_tracklets_are_named(counts, tmp_path):
    """Sums that overflow, too: the marks of all tracklets would come out empty, and tell no copy from another."""
    path, marks = tmp_path / "a.npz", np.arange(3, dtype=np.uint64)
    np.savez(path, **GOOD, marks=marks, num_marks=np.array([1, 2]))
    assert [len(mark) // 8 for mark in read_embeddings(path).marks] == [1, 2]
    if counts and counts[0] == 2**63:
        marks = marks[:0]
    np.savez(path, **GOOD, marks=marks, **({} if counts is None else {"num_marks": np.array(counts)}))
    with pytest.raises(ValueError, match=r"a\.npz is no file that .*marks"):
        read_embeddings(path)


def test_no_file_fills_the_memory(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embeddings.npy", bytes(100 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=r"bomb\.npz .* bytes would become 104857600"):
        read_embeddings(path)
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 512), }".ljust(117)
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("embeddings.npy", header + b"\n")
    with pytest.raises(ValueError, match=r"bomb\.npz"):
        read_embeddings(path)


def assert_right_or_named(path, want, mmap=False):
    try:
        got = read_embeddings(path, mmap=mmap)
    except ValueError as error:
        if f"{path.name} is no file" not in str(error):
            raise
    else:
        assert torch.equal(got.embeddings, want.embeddings)


def test_damaged_files_are_named(kind, tmp_path):
    """Whatever byte is wrong: the right content, or an error that names the file."""
    path, want = tmp_path / f"a{kind}", embeddings()
    store.write_embeddings(path, want)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for i in range(120):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        if i % 3 == 0:
            del damaged[rng.integers(len(content)) :]
        path.write_bytes(damaged)
        assert_right_or_named(path, want)
        assert_right_or_named(path, want, mmap=True)
    for other in (b"", b"PK\3\4 no", b"PAR1", b"\x80\x04."):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="is no file that"):
            read_embeddings(path)


def test_a_mapped_gallery_takes_no_memory_and_its_file_stays_as_it_is(tmp_path):
    path, N = tmp_path / "a.npz", 4000
    found = embeddings(**NOTHING)._replace(embeddings=torch.randn(N, 512), names=[str(i) for i in range(N)])
    store.write_embeddings(path, found)
    content = path.read_bytes()
    tracemalloc.start()
    try:
        got = read_embeddings(path, mmap=True)
        mapped = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        read_embeddings(path)
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = found.embeddings.numpy().nbytes
    assert mapped < size / 4 < size < read
    assert torch.equal(got.embeddings, found.embeddings)
    got.embeddings.zero_()
    store.write_embeddings(path, found._replace(embeddings=-found.embeddings))
    assert not got.embeddings.any()
    store.write_embeddings(path, found)
    assert path.read_bytes() == content


def test_any_bit_of_a_mapped_gallery_may_be_wrong(tmp_path):
    """Numbers that are numbers still, and not in the part that is read for the header: only the checksum tells."""
    path, want = tmp_path / "a.npz", embeddings()._replace(embeddings=torch.randn(len(NAMES), 4096))
    store.write_embeddings(path, want)
    content, numbers = path.read_bytes(), want.embeddings.numpy().tobytes()
    for place, bit in ((0, 0), (30_000, 5), (len(numbers) - 4, 0)):
        damaged = bytearray(content)
        damaged[content.index(numbers) + place] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.npz is no file that .* Bad CRC-32 for file 'embeddings\.npy'"):
            read_embeddings(path, mmap=True)


def shifted(path, **fields):
    """Numbers that do not begin at a multiple of their size."""
    np.savez(path, n=np.zeros(1, np.uint8), **fields)


def with_long_header(path, **fields):
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in fields.items():
            with archive.open(f"{key}.npy", "w") as file:
                np.lib.format.write_array(file, value, version=(2, 0))


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed, shifted, with_long_header], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_cannot_be_mapped_is_read(write, kind, order, tmp_path):
    want = np.arange(6).reshape(2, 3)
    write(tmp_path / "a.npz", **{**GOOD, "embeddings": np.asarray(want, kind, order)})
    got = read_embeddings(tmp_path / "a.npz", mmap=True).embeddings
    assert got.dtype == torch.float32
    assert np.array_equal(got, want)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_field_whose_name_is_damaged_is_not_left_out(mmap, tmp_path):
    path = tmp_path / "a.npz"
    store.write_embeddings(path, embeddings())
    content = path.read_bytes()
    place = content.rindex(b"change.npy")  # in the directory at the end
    path.write_bytes(content[:place] + b"d" + content[place + 1 :])
    with pytest.raises(ValueError, match=r"a\.npz is no file that .* differ"):
        read_embeddings(path, mmap=mmap)
    start = content.index(b"PK\1\2")
    path.write_bytes(content[: start - 40] + content[start:])  # zipfile seeks to a place before the file
    with pytest.raises(ValueError, match=r"a\.npz is no file that "):
        read_embeddings(path, mmap=mmap)


def test_mapped_is_what_is_read_whatever_the_header_says(tmp_path):
    numbers = np.arange(6, dtype="<f4")
    for shape, more in (("(2, 3)", b""), ("(2, 3)", bytes(8)), ("(-1, 3)", b""), ("(-2, -3)", b""), ("(6,)", b"")):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        np.savez(tmp_path / "a.npz", **{key: value for key, value in GOOD.items() if key != "embeddings"})
        with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
            archive.writestr("embeddings.npy", b"\x93NUMPY\1\0v\0" + header + numbers.tobytes() + more)
        found = []
        for mmap in (False, True):
            try:
                found.append(read_embeddings(tmp_path / "a.npz", mmap=mmap).embeddings.tolist())
            except ValueError as error:
                found.append(str(error))
        assert found[0] == found[1]
        assert isinstance(found[0], list) == (shape == "(2, 3)")


def test_a_disk_that_maps_nothing_is_read(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENODEV, "No such device")

    store.write_embeddings(tmp_path / "a.npz", embeddings())
    monkeypatch.setattr(np, "memmap", refuse)
    assert_equal(read_embeddings(tmp_path / "a.npz", mmap=True), embeddings())


def test_other_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.npz"):
        read_embeddings(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"named \*\.npz or \*\.parquet, got .*a\.txt"):
        store.write_embeddings(tmp_path / "a.txt", embeddings())
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_embeddings()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install temporal-agg\[parquet\]"):
        store.write_embeddings(tmp_path / "a.parquet", embeddings())
    with pytest.raises(ValueError, match=r"a purity of 2, which is from -1 to 1, or NaN"):
        store.write_embeddings(tmp_path / "a.npz", embeddings(names=["x", "y"], purity=[0.5, 2]))
    with pytest.raises(ValueError, match="2 embeddings and 3 names"):
        store.write_embeddings(tmp_path / "a.npz", embeddings(names=["x", "y"])._replace(names=["x", "y", "z"]))
    assert list(tmp_path.iterdir()) == []


def test_what_a_number_of_a_frame_and_a_purity_may_be(kind, tmp_path):
    """The ends of their ranges, and frames whose names count downwards."""
    found = embeddings(names=["a", "b", "c"], start=[-1, 0, 9], end=[-1, 0, 2], purity=[-1.0, 1.0, 0.0])
    store.write_embeddings(tmp_path / f"a{kind}", found)
    assert_equal(read_embeddings(tmp_path / f"a{kind}"), found)
