"""What aggregators and retrieval cost: milliseconds and peak memory, against the papers' formulas taken literally.

    python recipes/benchmarks/benchmark.py aggregators                                      # all of them; maps of 256x128 frames
    python recipes/benchmarks/benchmark.py aggregators --names gsta,grl --device cuda --dtype bfloat16 --out bench.json
    python recipes/benchmarks/benchmark.py aggregators --names fgra --frames 6 --options num_regions=8 --backbone none
    python recipes/benchmarks/benchmark.py aggregators --names "" --systems star_resnet50   # whole models against mean_resnet50
    python recipes/benchmarks/benchmark.py aggregators --compile --no-memory                # what torch.compile gains
    python recipes/benchmarks/benchmark.py aggregators --names "" --systems gltr_resnet50 --batch 1 --export --no-memory
    python recipes/benchmarks/benchmark.py retrieval                                        # at the sizes of MARS and LS-VID
    python recipes/benchmarks/benchmark.py retrieval --structure random --skip-dense --device cuda

aggregators: forward is in evaluation mode without gradients; forward + backward in training mode, with gradients for
the maps and all parameters. Times are medians; the runs of an aggregator, of its literal form (recipes/benchmarks/literal.py) and
of mean pooling alternate, so that a busy machine is busy for all of them. Half precision is autocast, on maps of that
type. --export times forward alone, also of the module that torch.export makes ("exported"), and of the ONNX file that
export_onnx writes, run by onnxruntime on the CPU; both for clips of one length, without a mask.

The backbone runs on one batch of --batch x --frames frames, and the share compares time per frame: LOGA takes clips of
ten frames whatever --frames says. Where the maps asked for need it, the stride of a ResNet's last stage is removed.
Systems are compared with mean pooling behind the same backbone at the same stride; STAR gets optical flow.

retrieval: Euclidean distances, evaluation, and re-ranking from the embeddings on, against plain numpy on the CPU
(recipes/benchmarks/literal_retrieval.py), the runs of one form after those of the other. "argsort" is np.argsort of all rows,
with which a plain evaluation begins; "published" is the re-ranking in the steps of its authors' code. Embeddings
are random: clustered, an identity's centre with noise of 3 times its spread (at 2048 dimensions and the sizes of MARS
mAP is near 75%); or without any structure, where rankings have hubs, items that are near to very many.

Peak memory is what a call adds to what was there before it (parameters, inputs); gradients count. On a GPU it is what
torch allocates; on a CPU (Linux only) how much the resident memory of a fresh process grows, to about 1 MB.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import literal
import literal_retrieval
import numpy as np
import torch
import yaml
from torch import Tensor, nn

import temporal_agg
from temporal_agg import retrieval
from temporal_agg.aggregators import create_aggregator, list_aggregators

MODES = {"forward": False, "forward + backward": True}
Case = tuple[str, str, argparse.Namespace]  # what, name and settings, as build() takes them


class Work:
    """A module on inputs that are there already; each run is one forward pass, in training with a backward pass.

    Args:
        module: whose mode and gradients are managed.
        call: the forward pass.
        inputs: its arguments, by name.
        leaves: tensors that get gradients in training, beside the module's parameters.
        frames: how many one run processes.
        args: the command's.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        leaves: list[Tensor],
        frames: int,
        args: argparse.Namespace,
    ):
        self.module, self.call, self.inputs = module, call, inputs
        self.leaves, self.frames, self.args = leaves, frames, args

    def prepare(self, train: bool) -> None:
        self.module.train(train)
        for tensor in [*self.leaves, *self.module.parameters()]:
            tensor.grad = None

    def run(self) -> Tensor:
        train = self.module.training
        autocast = torch.autocast(self.args.device, getattr(torch, self.args.dtype), enabled=is_half(self.args))
        with torch.set_grad_enabled(train), autocast:
            output = self.call(**self.inputs)
        if train:
            output.backward(torch.ones_like(output))
        return output


class Call:
    """Work without a module."""

    def __init__(self, call: Callable):
        self.run = call

    def prepare(self, train: bool) -> None:
        pass


def build(what: str, name: str, args: argparse.Namespace) -> Work | Call:
    """``what``: an aggregator, its literal form, a backbone, a whole model, or a step of retrieval."""
    if what == "retrieval":
        return build_retrieval(name, args)
    torch.manual_seed(0)
    size = image_size(args)
    inputs = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    weights = {"device": args.device, "dtype": torch.float32 if is_half(args) else inputs["dtype"]}

    if what in ("aggregator", "literal"):
        aggregator = create_aggregator(name, args.channels, **args.options).to(**weights)
        T = aggregator.clip_length or args.frames
        features = torch.rand(args.batch, T, args.channels, args.height, args.width, **inputs).requires_grad_()
        frames = torch.randn(args.batch, T, 3, *size, **inputs) if aggregator.needs_frames else None
        call, leaves = literal.prepared(aggregator) if what == "literal" else (aggregator, [])
        arguments = {"features": features, **({} if frames is None else {"frames": frames})}
        return Work(aggregator, call, arguments, [features, *leaves], args.batch * T, args)

    if what == "backbone":
        encoder = temporal_agg.FrameEncoder(name, img_size=size).to(**weights)
        if encoder.has_last_stride and args.height * encoder.backbone.feature_info[-1]["reduction"] > size[0]:
            encoder.remove_last_stride()
        frames = torch.randn(args.batch * args.frames, 3, *size, **inputs)
        return Work(encoder, encoder, {"frames": frames}, [], len(frames), args)

    model = temporal_agg.create_model(name, img_size=size, **args.options).to(**weights)
    T = model.aggregator.clip_length or args.frames
    clips = torch.randn(args.batch, T, 3, *size, **inputs)
    flow = {"flow": torch.randn(args.batch, T, 2, *size, **inputs)} if model.encoder.uses_flow else {}
    return Work(model, model, {"clips": clips, **flow}, [], args.batch * T, args)


def is_half(args: argparse.Namespace) -> bool:
    return args.dtype in ("bfloat16", "float16")


def image_size(args: argparse.Namespace) -> tuple[int, int]:
    height, width = map(int, args.size.lower().split("x"))
    return height, width


def changed(args: argparse.Namespace, **values) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **values})


# ----------------------------------------------------------------------------------------------------------------------
# Time and memory


def milliseconds(works: dict[str, Work | Call], train: bool, args: argparse.Namespace) -> dict[str, list[float]]:
    """Every work ``repeats`` times, in turns, after one run of each to warm up."""
    times = {key: [] for key in works}
    for repeat in range(args.repeats + 1):
        for key, work in works.items():
            work.prepare(train)
            synchronize(args)
            start = time.perf_counter()
            work.run()
            synchronize(args)
            if repeat > 0:
                times[key].append(1000 * (time.perf_counter() - start))
    return times


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def peak_memory(cases: list[Case], modes: dict[str, bool] = MODES) -> list[dict[str, float | None]]:
    """The peak in MB of each case by mode; None where it could not be measured."""
    runs = [(what, name, vars(args), train) for what, name, args in cases for train in modes.values()]
    if cases[0][2].device == "cuda":
        peaks = [peak_on_gpu(*run) for run in runs]
    elif sys.platform == "linux":
        # With a fixed threshold, large tensors go back to the system when they are freed.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "_peak", json.dumps(runs)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        peaks = [json.loads(line) for line in done.stdout.splitlines()]
    else:
        peaks = [None] * len(runs)
    return [dict(zip(modes, peaks[i : i + len(modes)], strict=True)) for i in range(0, len(peaks), len(modes))]


def peak_on_gpu(what: str, name: str, args: dict, train: bool) -> float:
    work = build(what, name, argparse.Namespace(**args))
    for _ in range(2):  # the first brings in what stays: kernels, workspaces
        work.prepare(train)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.run()
        torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_on_cpu(what: str, name: str, args: dict, train: bool) -> float:
    args = argparse.Namespace(**args)
    torch.set_num_threads(args.threads)
    small = build(what, name, changed(args, batch=2, frames=1, queries=8, gallery=32, identities=4))
    small.prepare(train)
    small.run()  # brings in what stays: kernels, threads
    del small
    work = build(what, name, args)
    work.prepare(train)
    gc.collect()
    # The high-water mark of getrusage is inherited from the process that started this one; this one starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    work.run()
    return high_water() - before


def high_water() -> float:
    """The largest resident memory so far, in MB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def peak_command(args: argparse.Namespace) -> None:
    """Measures each case in a process of its own and prints one JSON value a line.

    The processes are forked from this one, which has imported everything and computed nothing.
    """
    for case in json.loads(args.cases):
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(peak_on_cpu(*case)), flush=True)
                os._exit(0)
            except BaseException as error:
                print(f"{case[0]} {case[1]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1] != 0:  # out of memory, for instance
            print("null", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Aggregators and systems


def measure(what: str, name: str, args: argparse.Namespace, backbone: dict | None) -> tuple[dict, dict[str, Case]]:
    """One row of the table, but for the memory; and the cases that it compares."""
    print(f"time: {name}", file=sys.stderr, flush=True)
    cases = {"ours": (what, name, args)}
    works = {"ours": build(*cases["ours"])}
    module, frames = works["ours"].module, works["ours"].frames
    T = frames // args.batch
    if what == "aggregator":
        if literal.exists(module):
            cases["literal"] = ("literal", name, args)
        cases["mean"] = (what, "mean", changed(args, frames=T, options={}))
    else:
        encoder = module.encoder.config
        same = {"last_stride": encoder["last_stride"]}
        cases["mean"] = (what, f"mean_{encoder['backbone']}", changed(args, frames=T, options=same))
    works |= {key: build(*case) for key, case in cases.items() if key != "ours"}
    if args.compile:
        ours = works["ours"]
        works["compiled"] = Work(module, torch.compile(ours.call), ours.inputs, ours.leaves, frames, args)
    if args.export:
        works |= exported(works["ours"])

    row = {"name": name, "what": what, "frames": T, "options": args.options}
    row["parameters"] = sum(p.numel() for p in module.parameters())
    for mode, train in modes_of(args).items():
        times = milliseconds(works, train, args)
        median = {key: statistics.median(values) for key, values in times.items()}
        row[mode] = {"ms": median, "all_ms": times, "times_mean": median["ours"] / median["mean"]}
        if "literal" in median:
            row[mode]["speedup"] = median["literal"] / median["ours"]
        if backbone is not None and what == "aggregator":
            row[mode]["backbone_share"] = median["ours"] / frames / backbone[mode]["ms_per_frame"]
    return row, cases


def exported(ours: Work) -> dict[str, Work]:
    """What torch.export makes of an aggregator or model, and its ONNX file in onnxruntime."""
    import onnxruntime

    module, inputs, args = ours.module.eval(), ours.inputs, ours.args
    program = torch.export.export(module, (), inputs, strict=False).module()
    sizes = {}
    if "features" in inputs:
        sizes = {"map_size": (args.height, args.width), "frame_size": image_size(args) if "frames" in inputs else None}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        temporal_agg.export_onnx(module, path, clip_length=ours.frames // args.batch, mask=False, **sizes)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays = {name: tensor.detach().numpy() for name, tensor in inputs.items()}
    return {
        "exported": Work(module, program, inputs, [], ours.frames, args),
        "onnx": Work(module, lambda **arrays: session.run(None, arrays)[0], arrays, [], ours.frames, args),
    }


def modes_of(args: argparse.Namespace) -> dict[str, bool]:
    return {"forward": False} if args.export else MODES


def measure_backbone(args: argparse.Namespace) -> dict:
    print(f"time: {args.backbone}", file=sys.stderr, flush=True)
    work = build("backbone", args.backbone, args)
    work.prepare(False)
    maps = list(work.run().shape[1:])
    if maps != [args.channels, args.height, args.width]:
        print(f"note: the maps of {args.backbone} are {maps}, the aggregators get others", file=sys.stderr)
    result = {"name": args.backbone, "maps": maps, "frames": work.frames}
    for mode, train in modes_of(args).items():
        times = milliseconds({"backbone": work}, train, args)["backbone"]
        median = statistics.median(times)
        result[mode] = {"ms": median, "all_ms": times, "ms_per_frame": median / work.frames}
    return result


def environment(args: argparse.Namespace) -> dict:
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
        device = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.machine())
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "tf32": args.device == "cuda" and torch.backends.cudnn.allow_tf32,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "temporal_agg": temporal_agg.__version__,
        "python": platform.python_version(),
    }


def table(rows: list[dict], mode: str) -> str:
    columns = (
        ("", "T", ""),
        ("ours", "ms", ".2f"),
        ("literal", "ms", ".2f"),
        ("literal", "/ ours", ".2f"),
        ("mean", "ms", ".2f"),
        ("ours", "/ mean", ".1f"),
        ("ours /", "backbone", ".1%"),
        ("ours", "MB", ".1f"),
        ("literal", "MB", ".1f"),
        ("literal", "/ ours", ".2f"),
        ("mean", "MB", ".1f"),
    )
    others = [key for key in ("compiled", "exported", "onnx") if key in rows[0][mode]["ms"]]
    for key in others:
        columns += ((key, "ms", ".2f"), ("ours /", key, ".2f"))
    width = max(len(mode), *(len(row["name"]) for row in rows))
    lines = [" " * width + "".join(f"{c[0]:>10}" for c in columns), f"{mode:{width}}"]
    lines[1] += "".join(f"{c[1]:>10}" for c in columns)
    for row in rows:
        of = row[mode]
        ms, mb = of["ms"], of.get("peak_mb", {})
        ratio = mb["literal"] / mb["ours"] if mb.get("literal") and mb.get("ours") else None
        values = (row["frames"], ms["ours"], ms.get("literal"), of.get("speedup"), ms["mean"], of["times_mean"])
        values += (of.get("backbone_share"), mb.get("ours"), mb.get("literal"), ratio, mb.get("mean"))
        for key in others:
            values += (ms[key], ms["ours"] / ms[key])
        cells = ("-" if v is None else format(v, c[2]) for v, c in zip(values, columns, strict=True))
        lines.append(f"{row['name']:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def aggregators_command(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    backbone = measure_backbone(args) if args.backbone != "none" and args.names else None
    measured = [measure("aggregator", name, args, backbone) for name in args.names]
    measured += [measure("model", name, changed(args, options={}), None) for name in args.systems]
    rows = [row for row, _ in measured]
    if args.memory:
        peaks = iter(peak_memory([case for _, cases in measured for case in cases.values()], modes_of(args)))
        for row, cases in measured:
            for key in cases:
                for mode, peak in next(peaks).items():
                    row[mode].setdefault("peak_mb", {})[key] = peak

    about = environment(args)
    print(
        f"{about['device']}, {about['threads']} threads, {about['dtype']}{' (TF32 convolutions)' * about['tf32']}, "
        f"torch {about['torch']}; B = {args.batch}, median of {args.repeats}"
    )
    if args.names:
        print(f"aggregators on maps {args.channels} x {args.height} x {args.width}")
    if args.systems:
        print(f"systems on frames {args.size}")
    if backbone is not None:
        maps = " x ".join(map(str, backbone["maps"]))
        ms = ", ".join(f"{mode} {backbone[mode]['ms']:.1f} ms" for mode in modes_of(args))
        print(f"backbone {backbone['name']}, {backbone['frames']} frames {args.size} to maps {maps}: {ms}")
    for mode in modes_of(args):
        print("\n" + table(rows, mode))
    result = {"environment": about, "settings": vars(args), "backbone": backbone, "rows": rows}
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Retrieval

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


def build_retrieval(name: str, args: argparse.Namespace) -> Call:
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


def measure_retrieval(step: str, args: argparse.Namespace) -> tuple[dict, dict[str, Case]]:
    """One step at one size, but for the memory; and the cases that it compares."""
    print(f"time: {step} at {args.queries} x {args.gallery}", file=sys.stderr, flush=True)
    forms = ("ours",) if step == "rerank" and args.skip_dense else FORMS[step]
    cases = {form: ("retrieval", f"{step}:{form}", args) for form in forms}
    works = {form: build(*case) for form, case in cases.items()}
    times = {}
    for form, work in works.items():  # not in turns: the gigabytes that numpy's forms give back slow down what follows
        times |= milliseconds({form: work}, False, args)
    median = {form: statistics.median(values) for form, values in times.items()}
    row = {"name": step, "queries": args.queries, "gallery": args.gallery, "ms": median, "all_ms": times}
    row["speedup"] = {form: ms / median["ours"] for form, ms in median.items() if form != "ours"}
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

    about = environment(args)
    print(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, numpy {about['numpy']}; "
        f"median of {args.repeats}"
    )
    maps = ", ".join(f"{row['map']:.1%}" for row in rows if "map" in row)
    print(f"{args.structure} embeddings [N, {args.dims}], {args.identities} identities, mAP {maps}")
    print("\n" + retrieval_table(rows))
    result = {"environment": about, "settings": vars(args), "rows": rows}
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    return result


# ----------------------------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> tuple[Callable, argparse.Namespace]:
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="aggregators | retrieval")

    text = "time and memory of aggregators, and of whole models"
    sub = commands.add_parser(
        "aggregators", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    every = ",".join(list_aggregators())
    sub.add_argument("--names", default=every, help="aggregators, by comma; an empty string for none")
    sub.add_argument("--systems", default="", help="whole models, by comma, such as star_resnet50")
    sub.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="of the aggregators")
    sub.add_argument("--batch", type=int, default=8, help="clips in a batch")
    sub.add_argument("--frames", type=int, default=8, help="frames of a clip")
    sub.add_argument("--channels", type=int, default=2048, help="of the maps")
    sub.add_argument("--height", type=int, default=16, help="of the maps")
    sub.add_argument("--width", type=int, default=8, help="of the maps")
    sub.add_argument("--size", default="256x128", help="height x width of a frame in pixels")
    sub.add_argument("--backbone", default="resnet50", help="a timm model, or none")
    sub.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"), help="type")
    sub.add_argument("--compile", action="store_true", help="time what torch.compile makes of each, too")
    text = "time forward only, also as torch.export's module and as an ONNX file (on the CPU, in float32)"
    sub.add_argument("--export", action="store_true", help=text)
    add_common(sub, repeats=5)
    sub.set_defaults(command=aggregators_command)

    text = "time and memory of distances, evaluation and re-ranking"
    ranked = commands.add_parser(
        "retrieval", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ranked.add_argument("--sizes", default="1980x11310,3504x11333", help="queries x gallery, by comma")
    ranked.add_argument("--dims", type=int, default=2048, help="of the embeddings")
    ranked.add_argument("--identities", type=int, default=626, help="persons among queries and gallery")
    ranked.add_argument("--structure", default="clustered", choices=("clustered", "random"), help="of the embeddings")
    ranked.add_argument("--skip-dense", action="store_true", help="leave out re-ranking in numpy, which takes longest")
    add_common(ranked, repeats=3)
    ranked.set_defaults(command=retrieval_command, dtype="float32")

    hidden = commands.add_parser("_peak")
    hidden.add_argument("cases")
    hidden.set_defaults(command=peak_command)

    args = parser.parse_args(argv)
    command = vars(args).pop("command")
    if command is retrieval_command:
        try:
            args.sizes = [(int(q), int(g)) for q, g in (size.lower().split("x") for size in args.sizes.split(","))]
        except ValueError:
            ranked.error(f"--sizes must be QUERIESxGALLERY, by comma, such as 1980x11310, got {args.sizes!r}")
    if command is aggregators_command:
        args.names, args.systems = ([n for n in names.split(",") if n] for names in (args.names, args.systems))
        if not args.names + args.systems:
            sub.error("nothing to measure: pass --names or --systems")
        if any("=" not in item for item in args.options):
            sub.error(f"--options takes KEY=VALUE, got {' '.join(args.options)}")
        if args.export and (args.device != "cpu" or args.dtype != "float32"):
            sub.error(f"--export is for the CPU and float32, got {args.device} and {args.dtype}")
        args.options = {k: yaml.safe_load(v) for k, v in (item.split("=", 1) for item in args.options)}
        try:
            image_size(args)
        except ValueError:
            sub.error(f"--size must be HEIGHTxWIDTH, such as 256x128, got {args.size!r}")
        for name in args.names:
            try:
                create_aggregator(name, 32, **args.options)
            except (TypeError, ValueError) as error:
                sub.error(str(error))
    return command, args


def add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    parser.add_argument("--out", help="a JSON file for all numbers, every single time included")


def main(argv: list[str] | None = None):
    command, args = parse(sys.argv[1:] if argv is None else argv)
    if command is retrieval_command and argv is None and os.environ.get("OPENBLAS_NUM_THREADS") != str(args.threads):
        # numpy asks for its number of threads once, when it is imported: start anew.
        os.execve(sys.executable, sys.orig_argv, os.environ | {"OPENBLAS_NUM_THREADS": str(args.threads)})
    return command(args)


if __name__ == "__main__":
    main()
