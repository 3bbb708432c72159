"""Results of speed.py: two of them compared, and the page of the documentation that shows one."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import common

from temporal_agg.files import read_json

# What ours is held against, by part: a ratio in one run says more than a time, as the machine cancels.
AGAINST = ("literal", "numpy", "backbone", "bare", "product", "mean")
CHANGE = 1.05  # a median that grew by less is no news
RESULTS = Path(__file__).parent / "results" / "speed.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "speed.md"


TORCH: dict[str, type] = {"torch": str}
# What the page says.
ABOUT = {"device": str, "command": str, "python": str, **TORCH, "timm": str, "numpy": str, "threads": int}


def read(file: Path, about: dict[str, type] = TORCH) -> dict[str, dict]:
    """The parts of a file that speed.py wrote.

    Args:
        about: what must be known of the environment, and its kinds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file; the message names it.
    """
    content = read_json(file)
    parts = content.get("parts", {content.get("part"): content})
    common.check_form(file, parts, dict)
    if not parts or None in parts:
        raise ValueError(f"{file} is no result of speed.py (--out): it has no part.")
    form = {"environment": about, "settings": dict, "rows": [{"name": str}]}
    for part, result in parts.items():
        common.check_form(file, result, form, part)
        for row in (row for row in result["rows"] if "queries" in row):
            common.check_form(file, row, {"queries": int, "gallery": int}, row["name"])
        common.check_form(file, result["environment"].get("load", 0), common.is_number, f"{part}'s load")
        if part == "embed":
            common.check_form(file, result["settings"], dict.fromkeys(("tracklets", "frames"), int), part)
        for name, of in measured(part, result):
            common.check_form(file, of["all_ms"], {"ours": list, str: is_some_times}, name)
            common.check_form(file, of.get("peak_mb", {}), {str: common.is_number}, f"memory of {name}")
    return parts


def is_some_times(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(common.is_number(ms) and ms > 0 for ms in value)


def measured(part: str, result: dict) -> list[tuple[str, dict]]:
    """All that was measured at once, under a name that says what it is."""
    found = []
    for row in result["rows"]:
        size = f", {row['queries']} x {row['gallery']}" if "queries" in row else ""
        modes = {"": row} if "all_ms" in row else {f", {key}": of for key, of in row.items() if isinstance(of, dict)}
        found += [(f"{part}: {row['name']}{size}{mode}", of) for mode, of in modes.items() if "all_ms" in of]
    return found


def timings(part: str, result: dict) -> list[tuple[str, dict[str, list[float]]]]:
    """All times by form, under a name that says what was measured."""
    return [(name, of["all_ms"]) for name, of in measured(part, result)]


def relative(times: dict[str, list[float]]) -> tuple[str, list[float]]:
    """Our times as multiples of the median of what they are held against."""
    against = next((form for form in AGAINST if form in times), None)
    unit = statistics.median(times[against]) if against else 1.0
    return against or "ms", [ms / unit for ms in times["ours"]]


def compare(old: dict[str, dict], new: dict[str, dict]) -> list[tuple[str, str, float, float, bool]]:
    """What both files measured: its name, what it is held against, both medians, and whether it became slower.

    Slower means beyond the noise: the median grew by more than 5 %, and three quarters of the new runs took longer than
    three quarters of the old ones.
    """
    before = dict(pair for part, result in old.items() for pair in timings(part, result))
    rows = []
    for part, result in new.items():
        for name, times in timings(part, result):
            if name not in before:
                continue
            (unit, a), (other, b) = relative(before[name]), relative(times)
            if unit != other:
                continue
            grew = statistics.median(b) > CHANGE * statistics.median(a)
            slower = grew and quantile(b, 0.25) > quantile(a, 0.75)
            rows.append((name, unit, statistics.median(a), statistics.median(b), slower))
    return rows


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, math.floor(q * len(values)))]


def table(rows: list[tuple[str, str, float, float, bool]]) -> str:
    lines = [["measured", "against", "before", "now", "now / before", ""]]
    for name, unit, a, b, slower in rows:
        lines.append([name, unit, f"{a:.3f}", f"{b:.3f}", f"{b / a:.2f}", "slower" if slower else ""])
    return common.layout(lines)


TITLES = {
    "embed": "Embedding: `embed_tracklets` against the bare backbone, frames a second",
    "stream": "Tracks that grow: `TrackletStream` of 50 tracks against the bare backbone, milliseconds",
    "train": "Training: a step of `recipes/train.py` against a bare loop, milliseconds",
    "long": "One long tracklet: `embed_tracklets` against mean pooling, milliseconds; memory beside model and frames",
    "aggregators": "Aggregators against mean pooling and the papers' formulas taken literally, milliseconds",
    "retrieval": "Distances, evaluation, re-ranking against plain numpy, milliseconds",
    "search": "Search against the matrix product alone, and from files against whole rows sorted, milliseconds",
}


def kept_elsewhere(file: Path) -> list[dict[str, dict]]:
    """What other machines measured: speed_*.json beside the file."""
    return [read(other, ABOUT) for other in sorted(file.parent.glob(f"{file.stem}_*.json"))]


def machine(parts: dict[str, dict]) -> str:
    about = next(iter(parts.values()))["environment"]
    return """{device}, {threads} threads, Python {python}, torch {torch}, timm {timm},
numpy {numpy}.""".format(**about)


def page(parts: dict[str, dict], others: Sequence[dict[str, dict]] = ()) -> str:
    """The page in Markdown."""
    loads = [result["environment"].get("load") for result in parts.values()]
    load = max((load for load in loads if load is not None), default=None)
    busy = "" if load is None else f" Load of the machine before a part began: at most {load:.1f}."
    text = f"""# Speed

Made from `recipes/benchmarks/results/speed.json`, which `python recipes/benchmarks/speed.py all` writes: every number
of one table comes from one run, in which what is compared takes turns. Ratios carry over to other machines, times do
not.

{machine(parts)}{busy}

```bash
python recipes/benchmarks/speed.py all --out mine.json
python recipes/benchmarks/speed.py compare recipes/benchmarks/results/speed.json mine.json      # names what is slower
```
"""
    for part, title in TITLES.items():
        if part in parts:
            text += f"\n## {title}\n\n{markdown(part, parts[part])}\n"
    for i, other in enumerate(others):
        text += ("\n## Other machines\n" if i == 0 else "") + f"\n{machine(other)}\n"
        for part, result in other.items():
            text += f"\n{TITLES[part]}:\n\n{markdown(part, result)}\n\n`{result['environment']['command']}`\n"
    return text


def markdown(part: str, result: dict) -> str:
    rows, settings = measured(part, result), result["settings"]
    forms = list(dict.fromkeys(form for _, of in rows for form in of["all_ms"]))
    memory = [form for form in forms if any(form in of.get("peak_mb", {}) for _, of in rows)]
    lines = [["", *forms, "ours against", *(f"{form}, MB" for form in memory)]]
    for name, of in rows:
        times = of["all_ms"]
        median = {form: statistics.median(values) for form, values in times.items()}
        frames = settings["tracklets"] * settings["frames"] if part == "embed" else 0
        cells = [
            "" if form not in median else f"{1000 * frames / median[form]:.1f}" if frames else f"{median[form]:.2f}"
            for form in forms
        ]
        unit, ours = relative(times)
        ratio = statistics.median(ours)
        how = f"{1 / ratio:.1%} of its speed" if part in ("embed", "train") else f"{ratio:.2f} x"
        peaks = [of.get("peak_mb", {}).get(form) for form in memory]
        cells += [f"{unit}: {how}", *("" if mb is None else f"{mb:.0f}" for mb in peaks)]
        lines.append([name.partition(": ")[2], *cells])
    body = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in body)
