import pytest
from benchmarks_on_disk import make_ilids_vid, make_mars, make_prid2011

from temporal_agg.data import num_splits, open_dataset, open_splits, parse_data_spec, synthetic_data


def test_data_sets_open_by_name(tmp_path):
    assert len(open_dataset("synthetic", num_identities=6).train) == 3 * 3 * 2
    assert len(parse_data_spec("synthetic", seed=3).query) == len(synthetic_data().query)
    with pytest.raises(ValueError, match="no data set is named 'foldr'; did you mean 'folder'"):
        parse_data_spec(f"foldr:{tmp_path}")
    with pytest.raises(ValueError, match="needs the path"):
        parse_data_spec("folder")
    with pytest.raises(ValueError, match="lies in no file"):
        parse_data_spec("synthetic:5")
    with pytest.raises(TypeError, match="'synthetic' has no option people; it has: num_identities, "):
        open_dataset("synthetic", people=5)
    for option, value in (("seed", "1"), ("seed", True), ("length", 5), ("length", [3]), ("size", [64, "32"])):
        with pytest.raises(TypeError, match=f"'synthetic': {option} must be like "):
            open_dataset("synthetic", **{option: value})
    with pytest.raises(TypeError, match="'mars': cache must be like True, got 'no'"):
        open_dataset("mars", "anywhere", cache="no")
    with pytest.raises(TypeError, match="'folder' has no option seed; it has: none"):
        open_dataset("folder", tmp_path, seed=1)
    with pytest.raises(ValueError, match="no data set is named 'ilids'; did you mean 'ilids-vid'"):
        num_splits("ilids")


def test_splits_open_one_by_one_or_all(tmp_path, caplog):
    names = ("csv", "duke", "duke-si", "folder", "ilids-vid", "ls-vid", "mars", "prid-2011", "synthetic", "ward")
    assert {name for name in names if num_splits(name) == 10} == {"ilids-vid", "prid-2011", "ward"}
    assert {num_splits(name) for name in names} == {1, 10}
    root = make_ilids_vid(tmp_path / "ilids")
    splits = open_splits("ilids-vid", root, check_counts=False)
    assert len(splits) == 10
    assert len({frozenset(t.pid for t in split.query) for split in splits}) > 5
    (fourth,) = open_splits("ilids-vid", root, 4, check_counts=False)
    assert [t.pid for t in fourth.query] == [t.pid for t in splits[4].query]
    assert fourth.name.endswith("split 4")
    assert len(open_splits("prid-2011", make_prid2011(tmp_path / "prid"), "all")) == 10
    (mars,) = open_splits("mars", make_mars(tmp_path / "mars"), check_counts=False)
    assert len(mars.query) == 4
    assert len(open_splits("synthetic", num_identities=6)[0].train) == len(
        open_splits("synthetic", split=0, num_identities=6)[0].train
    )
    for name, split in (("ilids-vid", 10), ("ilids-vid", -1), ("ilids-vid", "some"), ("mars", 1)):
        with pytest.raises(ValueError, match=f"{name}.*split must be 'all' or 0 to"):
            open_splits(name, tmp_path, split)
