"""What aggregators and whole models cost, against the papers' formulas taken literally and mean pooling."""

import argparse
import statistics
import sys
import tempfile

import common
import literal
import torch
from measuring import (
    BUILDERS,
    MODES,
    Case,
    Work,
    build,
    changed,
    heading,
    is_half,
    milliseconds,
    peak_memory,
    result_of,
)

import temporal_agg
from temporal_agg.aggregators import create_aggregator


def build_work(what: str, name: str, args: argparse.Namespace) -> Work:
    """``what``: an aggregator, its literal form, a backbone, or a whole model."""
    torch.manual_seed(0)
    size = common.image_size(args.size)
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


BUILDERS.update(dict.fromkeys(("aggregator", "literal", "backbone", "model"), build_work))


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
        frame_size = common.image_size(args.size) if "frames" in inputs else None
        sizes = {"map_size": (args.height, args.width), "frame_size": frame_size}
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

    result = result_of("aggregators", args, rows, backbone=backbone)
    print(f"{heading(result)}; B = {args.batch}, median of {args.repeats}")
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
    return result
