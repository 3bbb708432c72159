"""What the recipes share: data and protocol, embeddings by several processes, the files of a run, errors in a line."""

import argparse
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

# Before torch is imported: threads that spin while they wait take the processor from the loader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import accelerate
import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

import temporal_agg
from temporal_agg import data, retrieval
from temporal_agg.files import Busy, locked, print_any_name, read_json, replace_file, sweep, utf8_name

RANKS = (1, 5, 10, 20)
# What accelerate calls them -> what embed_tracklets does.
PRECISIONS: dict[str, Any] = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
METRICS = ("map", *(f"rank{k}" for k in RANKS), "minp")


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def parser_of(doc: str, **options) -> argparse.ArgumentParser:
    """A parser that explains the command by the docstring of its script."""
    about, _, details = doc.partition("\n\n")
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=about, epilog=details, formatter_class=kind, **options)


def run(main: Callable[[], object], goes_on: str = "the same command goes on") -> None:
    """Runs a script's main function; Ctrl-C ends it with one line, and every name can be printed."""
    print_any_name()
    try:
        code = main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped; {goes_on}.", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def keep_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is glibc (Linux).

    It otherwise gives every large block back to the system, and the next step of a training gets it page by page again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: so much may lie idle before some of it goes back


@contextmanager
def own_defaults() -> Iterator[None]:
    """float32 on the CPU is what torch makes, whatever the caller's defaults are; then they hold again."""
    dtype, device = torch.get_default_dtype(), torch.empty(0).device
    torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def one_line(script: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns what is wrong with a person's files, settings or machine into one line, without a traceback.

    Args:
        script: what the line begins with.
        *kinds: of errors, beside OSError and ValueError.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        raise SystemExit(
            f"{script}: {first} What is saved stays; use smaller batches (--frames-per-batch in an evaluation)."
        ) from error
    except (OSError, ValueError, *kinds) as error:
        raise SystemExit(f"{script}: {error}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(
            f"{script}: a process that reads frames was killed, mostly for want of memory ({error}) What is saved "
            "stays, the same command goes on; --workers 0 needs least memory."
        ) from error


def start_workers(loader: DataLoader) -> Iterator[Any]:
    """What a loader loads, once.

    Raises:
        OSError: the system has no room for the worker processes; says what to do.
    """
    try:
        return iter(loader)
    except OSError as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            half: Any = frame.f_locals.get("self")
            if hasattr(half, "_shutdown_workers"):
                half._shutdown = True  # it would do this when it goes, and end in a traceback of its own
                for worker in vars(half).get("_workers", ()):
                    worker.terminate()
        raise OSError(
            f"{loader.num_workers} processes that read frames cannot be started ({error}): pass --workers 0, or give a "
            "container more shared memory (docker run --shm-size 1g)."
        ) from error


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everywhere else; by itself it wants 1.0e-3. What it would silently take for
    something else is refused: 010 (it says 8), 1:30 (90), 1_0 (10), and a key that comes twice, of which the last would
    count."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key[1] for key in keys if keys.count(key) > 1]:
            raise yaml.composer.ComposerError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return node

    def construct_number(self, node):
        text = self.construct_scalar(node)
        if ":" in text or "_" in text or re.match("[-+]?0[0-9_]", text) or len(text) > 100:
            what = f"{text[:100]!r} is no number that everybody reads alike: write it in decimals, or in quotes"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """What YAML says.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, _Loader)


def key_values(items: Sequence[str]) -> dict:
    """KEY=VALUE ... -> dict, the values read as YAML.

    Raises:
        ValueError: an item without "=", or a value that is no YAML.
    """
    if any("=" not in item for item in items):
        raise ValueError(f"takes KEY=VALUE, got {' '.join(items)}")
    try:
        return {key: read_yaml(value) for key, value in (item.split("=", 1) for item in items)}
    except yaml.YAMLError as error:
        raise ValueError(f"takes KEY=VALUE, the values in YAML: {one_line_of(error)}") from error


def one_line_of(error: Exception) -> str:
    return " ".join(str(error).split())


def image_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels.

    Raises:
        ValueError: another form.
    """
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f"--size must be HEIGHTxWIDTH, such as 256x128, got {text!r}")
    return height, width


def check_split(text: str) -> None:
    if text not in ("", "all") and not (text.isascii() and text.isdigit()):
        raise ValueError(f"split must be a number or all, got {text!r}")


def check_device(device: str) -> None:
    """Raises a ValueError unless there is such a device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<number>``."""
    kind, colon, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isascii() and number.isdigit()):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:<number>, got {device!r}")
    if kind != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= int(number or 0):
        raise ValueError(f"there is no device {device}: torch sees {count} GPUs. Use --device cpu or auto")
    if colon and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"several processes take one GPU each: use --device cuda or auto, got {device}")


def accelerator_of(device: str, mixed_precision: str = "no", **options) -> accelerate.Accelerator:
    """Where a command runs.

    Raises:
        ValueError: no such device.
    """
    check_device(device)
    if ":" in device:
        torch.cuda.set_device(device)
    return accelerate.Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Data, embeddings, figures


def open_splits(spec: str, options: dict, split: str, identity_splits: int, seed: int) -> dict[int, data.TrackletData]:
    """The splits that were asked for, by number.

    Args:
        spec: name or name:<root>.
        options: of the data set.
        split: a number, or all (or nothing, for all); of a benchmark that comes with several, or of the random identity
            splits.
        identity_splits: how many random identity splits to make; 0: the data set's own.
        seed: draws those.
    """
    name, _, root = spec.partition(":")
    if identity_splits:
        splits = data.identity_splits(data.open_dataset(name, root or None, **options), identity_splits, seed)
    elif data.num_splits(name) > 1:
        wanted = "all" if split in ("", "all") else int(split)
        splits = data.open_splits(name, root or None, split=wanted, **options)
        return dict(enumerate(splits)) if wanted == "all" else {int(wanted): splits[0]}
    else:
        splits = [data.open_dataset(name, root or None, **options)]
    if split in ("", "all"):
        return dict(enumerate(splits))
    if not 0 <= int(split) < len(splits):
        raise ValueError(f"split must be 0 to {len(splits) - 1} or all, got {split}.")
    return {int(split): splits[int(split)]}


def embed(
    model: temporal_agg.TrackletModel,
    tracklets: Sequence[data.Tracklet],
    accelerator: accelerate.Accelerator,
    frames_per_batch: int = 256,
    progress: bool = True,
    reject_outliers: bool = False,
    mixed_precision: str = "no",
) -> Tensor:
    """Every process embeds its share of the tracklets; all of them get all embeddings ``[N, D]``, in order."""
    rank, world = accelerator.process_index, accelerator.num_processes
    rows = torch.zeros(-(-len(tracklets) // world), model.num_features)
    share = tracklets[rank::world]
    if share:
        progress = progress and accelerator.is_main_process
        rows[: len(share)] = temporal_agg.embed_tracklets(
            model,
            share,
            frames_per_batch=frames_per_batch,
            device=accelerator.device,
            progress=progress,
            reject_outliers=reject_outliers,
            precision=PRECISIONS[mixed_precision],
        )
    if world == 1:
        return rows
    rows = accelerator.gather(rows.to(accelerator.device)).cpu()
    return rows.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[: len(tracklets)]


def embed_test(model, dataset: data.TrackletData, accelerator, *options, **named) -> tuple[Tensor, Tensor]:
    """The embeddings of queries and gallery; what is in both is embedded once. Options are those of :func:`embed`."""
    own = dataset.query_index
    alone = [query for query, i in zip(dataset.query, own, strict=True) if i < 0]
    embeddings = embed(model, [*dataset.gallery, *alone], accelerator, *options, **named)
    place = iter(range(len(dataset.gallery), len(embeddings)))
    return embeddings[[next(place) if i < 0 else i for i in own]], embeddings[: len(dataset.gallery)]


def score(distances, dataset: data.TrackletData, ap: str = "step", ranks=RANKS) -> retrieval.RetrievalMetrics:
    """The data set's protocol."""
    return retrieval.evaluate_tracklets(distances, dataset.query, dataset.gallery, ranks=ranks, ap=ap)


def summary(metrics: retrieval.RetrievalMetrics) -> dict:
    """What is written down of an evaluation."""
    result: dict = {"map": float(metrics.map), "minp": float(metrics.minp)}
    result |= {f"rank{k}": float(metrics.rank(k)) for k in RANKS}
    result["queries_without_match"] = metrics.queries_without_match
    result["cmc"] = [round(float(value), 6) for value in metrics.cmc]
    return result


def tested(model, dataset: data.TrackletData, accelerator, *options, **named) -> tuple[dict, Tensor]:
    """What a model reaches by the data set's protocol and its own distance; and the gallery's embeddings. Options are
    those of :func:`embed`."""
    queries, gallery = embed_test(model, dataset, accelerator, *options, **named)
    return summary(score(retrieval.distances(queries, gallery, model.clip.distance), dataset)), gallery


def cell(values: Sequence[float]) -> str:
    """Per cent; several values as mean and standard deviation."""
    percent = 100 * np.array(values)
    return f"{percent.mean():.1f}" + (f" ± {percent.std(ddof=1):.1f}" if len(percent) > 1 else "")


def layout(rows: list[list[str]]) -> str:
    """Rows of text as a table with its first column on the left; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(path: Path, figure: Callable[[], Any]) -> None:
    """Saves a figure, or says what it needs."""
    try:
        drawing = figure()
    except ImportError as error:
        print(f"No {path.name}: {error}")
        return
    replace_file(path, lambda temporary: drawing.savefig(temporary, dpi=150, format="png"))


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_text(path: Path, content: str) -> None:
    """UTF-8; a file's name that is no text comes with backslashes."""
    replace_file(path, lambda temporary: temporary.write_text(content, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} ".encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file with a checksum of what it holds."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(tensors, {"sha256": _checksum(tensors)})
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What :func:`write_tensors` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    with open(path, "rb"):  # safetensors gives errors of its own for what the system refuses
        pass
    try:
        with utf8_name(path) as name, safetensors.safe_open(name, "pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}).") from error
    if expected not in (None, _checksum(tensors)):
        raise ValueError(f"{path} is damaged: what it holds has another checksum than it says.")
    return tensors


@contextmanager
def held(directory: Path, accelerator: accelerate.Accelerator) -> Iterator[None]:
    """Makes a directory and holds it for the processes of one command; sweeps what killed ones left in it.

    One process waits while another command is at work there; several cannot, whose waiting for each other has an end.

    Raises:
        Busy: another command is at work there.
    """
    with ExitStack() as stack:
        if accelerator.is_main_process:
            directory.mkdir(parents=True, exist_ok=True)
            told = False
            while True:
                try:
                    stack.enter_context(locked(directory / ".lock", str(directory)))
                    break
                except Busy:
                    if accelerator.num_processes > 1:
                        raise
                if not told:
                    print(f"{directory}: another command is at work there; this one waits until it ends.", flush=True)
                told = True
                time.sleep(0.5)
            sweep(directory)
        accelerator.wait_for_everyone()
        yield


def sweep_lock(directory: Path) -> None:
    """Removes the lock of a command that was killed after its last file, unless another one is at work there."""
    lock = directory / ".lock"
    if lock.exists():
        with suppress(OSError), locked(lock, str(directory)):
            pass


SETTINGS = {
    "data": str,
    "root": str,
    "data_options": dict,
    "split": str,
    "identity_splits": int,
    "split_seed": int,
    "flow_root": str,
}


def read_run(run: str | os.PathLike) -> tuple[dict, dict]:
    """Settings and environment of a run of train.py, from its settings.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not hold what train.py writes there.
    """
    file = Path(run) / "settings.json"
    content = read_json(file)
    for key in ("settings", "environment"):
        if not isinstance(content.get(key), dict):
            raise ValueError(f"{file}: {key!r} is missing or no object: it is no settings.json of train.py.")
    settings = {"split_seed": 0, "flow_root": "", **content["settings"]}
    check_kinds(file, "setting", settings, SETTINGS)
    try:
        check_split(settings["split"])
        if min(settings["identity_splits"], settings["split_seed"]) < 0:
            raise ValueError("identity_splits and split_seed must be at least 0")
    except ValueError as error:
        raise ValueError(f"{file}: {error}: restore the file.") from error
    return settings, content["environment"]


def check_kinds(file: Path, what: str, values: dict, kinds: dict[str, type]) -> None:
    """Raises a ValueError unless a file has values of these kinds."""
    for key, kind in kinds.items():
        if type(values.get(key)) is not kind:
            raise ValueError(f"{file}: the {what} {key!r} is missing or no {kind.__name__}: restore the file.")


def own_data(run: str | os.PathLike) -> dict:
    """The data that a run was trained for, as :func:`open_splits` takes it.

    Raises:
        ValueError: the run does not say.
    """
    try:
        settings, _ = read_run(run)
    except FileNotFoundError:
        raise ValueError(f"{run} does not say what to evaluate on: pass --data.") from None
    return {
        "spec": f"{settings['data']}:{settings['root']}" if settings["root"] else settings["data"],
        "options": settings["data_options"],
        "split": settings["split"],
        "identity_splits": settings["identity_splits"],
        "seed": settings["split_seed"],
    }


def read_metrics(file: Path) -> dict:
    """The metrics.json of a finished run.

    Raises:
        ValueError: it is not whole; the message names it.
    """
    metrics = read_json(file)
    bad = [key for key in METRICS if not (is_number(metrics.get(key)) and 0 <= metrics[key] <= 1)]
    bad += [key for key in ("seconds", "train_seconds", "queries", "gallery") if not is_number(metrics.get(key))]
    bad += [key for key, kind in (("cmc", list), ("untrained", dict)) if not isinstance(metrics.get(key), kind)]
    bad += [] if bad or all(map(is_number, metrics["cmc"])) else ["cmc"]
    bad += [] if bad else [f"untrained {key}" for key in METRICS if not is_number(metrics["untrained"].get(key, 0))]
    if bad:
        raise ValueError(
            f"{file}: {', '.join(bad)} is missing or not between 0 and 1. Restore the file, or delete it: "
            "the command that trained the run then writes it again."
        )
    return metrics


def check_form(file: Path, value: Any, form: Any, what: str = "it") -> None:
    """Raises a ValueError that names the file and the place unless a value of its JSON has a form.

    Args:
        form: a kind, a function of the value that says whether it is right (its name says what it wants), a list of one
            form for all elements, or a dictionary of forms by key: all keys must be there; one for all keys is given
            under ``str``.
    """
    if isinstance(form, (dict, list)):
        check_form(file, value, type(form), what)
    if isinstance(form, dict):
        for key, of in form.items():
            if key is not str and key not in value:
                raise ValueError(f"{file}: {what} has no {key!r}: restore the file, or measure it again.")
            for one in value if key is str else (key,):
                check_form(file, value[one], of, f"{what}[{one!r}]")
    elif isinstance(form, list):
        for i, element in enumerate(value):
            check_form(file, element, form[0], f"{what}[{i}]")
    elif not (type(value) is form if isinstance(form, type) else form(value)):
        name = form.__name__.removeprefix("is_").replace("_", " ")
        text = repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
        raise ValueError(f"{file}: {what} should be {name}, got {text}: restore the file, or measure it again.")


def is_share(value: object) -> bool:
    """Whether it is a number from 0 to 1."""
    return is_number(value) and 0 <= float(value) <= 1  # type: ignore[arg-type]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def load_model(name: str, clip: dict) -> temporal_agg.TrackletModel:
    """A saved model, or released weights by name, cut into clips as it wants but for ``clip``.

    Raises:
        FileNotFoundError: weights that are planned, not released.
        ValueError: no such field of a clip, and as ``create_model``.
    """
    name = f"local-dir:{name}" if os.path.isdir(name) else name
    saved = name.startswith(("local-dir:", "hf-hub:"))  # others would come without weights, and give figures anyway
    model = temporal_agg.create_model(name) if saved else temporal_agg.create_model(name, pretrained=True)
    if clip:
        known = [field.name for field in fields(model.clip)]
        unknown = sorted(set(clip) - set(known))
        if unknown:
            raise ValueError(f"--clip has no {', '.join(unknown)}; it has {', '.join(known)}")
        model.clip = replace(model.clip, **clip)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """Its name, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "cpu"


def environment(device: str | torch.device, processes: int = 1) -> dict:
    """What results depend on beside settings."""
    device = torch.device(device)
    return {
        "command": shlex.join(sys.argv),
        "git": git_revision(),
        "temporal_agg": temporal_agg.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }
