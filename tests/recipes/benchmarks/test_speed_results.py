"""Files of results: what became slower is named, noise is not, and the page shows the file that is kept."""

import json

import pytest

ENVIRONMENT = {
    "device": "a",
    "command": "speed.py all",
    "threads": 4,
    "python": "3.12",
    "torch": "2",
    "timm": "1",
    "numpy": "2",
    "load": 0.5,
}


@pytest.fixture
def results(recipe):
    return recipe("results_of_speed")


def part(**rows):
    """A result of retrieval: each row with times of ours and of numpy."""
    made = [
        {"name": name, "queries": 2, "gallery": 3, "all_ms": {"ours": ours, "numpy": numpy}}
        for name, (ours, numpy) in rows.items()
    ]
    return {"part": "retrieval", "environment": {"torch": "2"}, "settings": {}, "rows": made}


def file(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / name


def test_a_page_shows_every_part_of_a_file(results):
    """Ours takes 5 ms where numpy takes 10."""
    text = results.page({"retrieval": {**part(distances=([5.0], [10.0])), "environment": ENVIRONMENT}})
    assert "| distances, 2 x 3 | 5.00 | 10.00 | numpy: 0.50 x |" in text
    assert "4 threads, Python 3.12" in text


def test_a_page_goes_over_no_other_file(recipe, tmp_path):
    kept = {"parts": {"retrieval": {**part(distances=([5.0], [10.0])), "environment": ENVIRONMENT}}}
    kept = file(tmp_path, "kept.json", kept)
    before = kept.read_text()
    main = recipe("speed").main
    with pytest.raises(SystemExit, match=r"--out would be written over, and is no such page: .*kept\.json"):
        main(["page", "--results", str(kept), "--out", str(kept)])
    assert kept.read_text() == before
    for _ in range(2):
        assert main(["page", "--results", str(kept), "--out", str(tmp_path / "page.md")]) == 0
    assert "| distances, 2 x 3 |" in (tmp_path / "page.md").read_text()


def test_what_became_slower_is_named_and_noise_is_not(recipe, tmp_path, capsys):
    numpy = [10.0, 10.0, 10.0]
    old = part(distances=([5.0, 5.1, 5.2], numpy), evaluate=([5.0, 5.1, 5.2], numpy), rerank=([5.0, 6.0, 9.0], numpy))
    # The whole machine is twice as slow; distances are slower beyond that; re-ranking within its noise.
    numpy = [20.0, 20.0, 20.0]
    new = part(
        distances=([14.0, 14.1, 14.2], numpy), evaluate=([10.0, 10.2, 10.4], numpy), rerank=([11, 14, 17], numpy)
    )
    argv = [
        "compare",
        *(str(file(tmp_path, f"{k}.json", x)) for k, x in (("old", old), ("new", {"parts": {"retrieval": new}}))),
    ]
    assert recipe("speed").main(argv) == 1
    out = capsys.readouterr().out
    assert "1 of 3 became slower\n  retrieval: distances, 2 x 3" in out
    assert recipe("speed").main(["compare", argv[1], argv[1]]) == 0
    assert "0 of 3 became slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ([], [{}], "it has no part"),
        (["retrieval"], [5], "retrieval should be dict, got 5"),
        (["retrieval", "settings"], [], "retrieval has no 'settings'"),
        (["retrieval", "environment", "numpy"], [2], r"retrieval\['environment'\]\['numpy'\] should be str, got 2"),
        (["retrieval", "environment", "threads"], [], r"retrieval\['environment'\] has no 'threads'"),
        (["retrieval", "environment", "load"], ["x"], "load should be number, got 'x'"),
        (["retrieval", "rows"], [{}], r"retrieval\['rows'\] should be list, got {}"),
        (["retrieval", "rows", 0], [[1]], r"retrieval\['rows'\]\[0\] should be dict"),
        (["retrieval", "rows", 0, "gallery"], [], "distances has no 'gallery'"),
        (["retrieval", "rows", 0, "all_ms", "ours"], [], "retrieval: distances, 2 x 3 has no 'ours'"),
        (["retrieval", "rows", 0, "all_ms", "numpy"], [[]], r"\['numpy'\] should be some times, got \[\]"),
        (["retrieval", "rows", 0, "all_ms", "numpy"], [[0.0]], r"\['numpy'\] should be some times"),
        (["retrieval", "rows", 0, "all_ms", "numpy"], [[1e999]], r"\['numpy'\] should be some times"),
        (["retrieval", "rows", 0, "peak_mb"], [{"ours": None}], r"\['ours'\] should be number, got None"),
    ],
)
def test_what_is_wrong_in_a_result_is_named(recipe, tmp_path, wrong, place, value, message):
    kept = {"parts": {"retrieval": {**part(distances=([5.0], [10.0])), "environment": ENVIRONMENT}}}
    wrong(tmp_path / "x.json", kept, ["parts", *place], *value)
    with pytest.raises(SystemExit, match=rf"speed\.py: .*x\.json.*{message}"):
        recipe("speed").main(["page", "--results", str(tmp_path / "x.json"), "--out", str(tmp_path / "page.md")])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"parts": {"train": 5}}', '{"parts": {"train": {"rows": []}}}'])
def test_a_file_that_is_no_result_is_named(recipe, tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SystemExit, match=r"x\.json"):
        recipe("speed").main(["compare", str(tmp_path / "x.json"), str(tmp_path / "x.json")])


def test_only_a_result_is_written_over(recipe, tmp_path, capsys):
    (tmp_path / "thesis.json").write_text("{}")
    with pytest.raises(SystemExit):
        recipe("speed").parse(["search", "--out", str(tmp_path / "thesis.json")])
    assert "would be written over" in capsys.readouterr().err
    result = file(tmp_path, "result.json", part(distances=([1.0], [2.0])))
    recipe("speed").parse(["search", "--out", str(result)])


def test_files_without_anything_in_common_are_not_compared(recipe, tmp_path):
    files = [file(tmp_path, f"{name}.json", part(**{name: ([1.0], [2.0])})) for name in ("distances", "rerank")]
    with pytest.raises(SystemExit, match="have measured nothing that is the same"):
        recipe("speed").main(["compare", *map(str, files)])


def test_the_page_is_that_of_the_kept_file(results):
    if not results.RESULTS.exists():
        pytest.skip("nothing is kept yet: on a quiet machine run python recipes/benchmarks/speed.py all, then page")
    page, kept = results.PAGE.read_text(encoding="utf-8"), results.read(results.RESULTS)
    others = results.kept_elsewhere(results.RESULTS)
    assert page == results.page(kept, others), "run: python recipes/benchmarks/speed.py page"
    assert all(page.count(f"\n{results.machine(of)}") for of in others)
    assert all(f"\n## {results.TITLES[part]}\n" in page for part in kept)
    assert {"embed", "train", "long", "retrieval", "search"} <= kept.keys()
