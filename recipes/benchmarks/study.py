"""The noise study: every system on synthetic tracklets that carry one fault at a time, other losses, and parts.

    python recipes/benchmarks/study.py --out runs/study --jobs 2        # small frames and backbone, for a CPU
    python recipes/benchmarks/study.py --full --out runs/study-full     # ResNet-50 on 256x128 frames, for a GPU
    python recipes/benchmarks/study.py --only mean,gltr --seeds 3       # some of it
    python recipes/benchmarks/study.py --parts --jobs 2                 # each system with a part left out, too

What is measured: mAP on tracklets with occlusion, bad boxes, identity switches or blur, each alone and at several
strengths, and on tracklets with all four; and whether the weights that a system gives its frames know those that a
fault has struck. What is equal for everybody: people and tracklets, backbone (the last stage's
stride is 1), its weights at the start (trained on single frames, which favours no aggregator; STAR's LSTA blocks come
fresh; GLTR has a first stage on top, for the embedding of its frames), optimiser, steps, clips per step, frames per
clip. What is each system's own: the aggregator, the losses, how a tracklet is cut into clips in training and in test,
and the distance. A seed draws everything anew, people included; intervals are over seeds.

Every training is a run directory of recipes/train.py under --out. The same command goes on where a killed one stopped,
and reads what is finished. Results: study.json, study.md and study.png, in --results.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import comparison
import numpy as np
import torch
import train
from common import draw, load_model, tested, write_json, write_text
from comparison import T_975, Variant, gap, interval, loss_table, markdown, signed, with_half
from settings import Settings

import temporal_agg
from temporal_agg import data
from temporal_agg.data.synthetic import FAULTS
from temporal_agg.files import read_json


@dataclass(frozen=True)
class Size:
    """How large the study is; the same for all of its trainings."""

    backbone: str = "resnet10t"
    channels: tuple[int, ...] = (32, 64, 128, 256)  # of its stages, half of what it has, as its stem; (): as it is
    size: tuple[int, int] = (64, 32)  # of a frame
    people: int = 80  # half of them to train on, half to test on
    cameras: int = 2
    length: tuple[int, int] = (6, 14)  # of a tracklet
    frames: int = 6  # of a clip
    identities: int = 5  # in a batch, two clips each
    encoder_steps: int = 1600  # of the common start, batches of as many frames as a batch of clips has
    steps: int = 320
    # The first layers stay those of the common start (their BatchNorm goes on counting): a step is a third shorter.
    frozen: tuple[str, ...] = ("conv1", "bn1", "layer1", "layer2")
    lr: float = 1e-3
    hidden: int = 128  # of GSTA's ConvLSTM
    strengths: tuple[float, ...] = (0.3, 0.6, 1.0)  # of the single faults in test
    mixed: float = 0.3  # of all four, in training
    in_memory: bool = True  # draw every frame once
    settings: tuple[tuple[str, object], ...] = (("save_every", 10**6),)  # more of recipes/train.py


FULL = Size(
    backbone="resnet50",
    channels=(),
    size=(256, 128),
    people=400,
    cameras=3,
    length=(16, 48),
    identities=16,
    encoder_steps=4000,
    steps=4000,
    frames=8,
    frozen=(),
    lr=3e-4,
    hidden=512,
    in_memory=False,
    settings=(("workers", 12), ("mixed_precision", "bf16")),
)


RELEASED = ("gltr_released", "grl_released")  # are WARD's alone
SYSTEMS = {
    **comparison.POOLINGS,
    **{name: variant for name, variant in comparison.SYSTEMS.items() if name not in RELEASED},
    "star": Variant("star", {"flow": False, "start": "zero"}, "gsta"),  # GSTA with LSTA blocks in the backbone
}
OTHERS = {  # other losses, and mean pooling with each paper's
    name: variant
    for name, variant in {**comparison.SAME_LOSS, **comparison.CONTROLS}.items()
    if variant.model not in RELEASED and variant.criterion not in RELEASED
}


def part(whole: str, options: dict | None = None, **criterion_options: object) -> Variant:
    """A system with something left out of it."""
    of = SYSTEMS[whole]
    return dataclasses.replace(
        of, options=of.options | (options or {}), criterion_options=of.criterion_options | criterion_options
    )


PARTS = {
    "loga: as printed": part("loga", {"scale": None}),
    "loga: LAQ alone": part("loga", {"assembly": "laq"}),
    "loga: GCQ alone": part("loga", {"assembly": "gcq"}),
    "gsta: no pyramid loss": part("gsta", pyramid_weight=0.0),
    "gltr: neither DTP nor TSA": part("gltr", {"dtp": False, "tsa": False}),
    "gltr: DTP alone": part("gltr", {"tsa": False}),
    "gltr: TSA alone": part("gltr", {"dtp": False}),
    "fgra: no alignment score": part("fgra", {"temporal": "average"}),
    "fgra: no spatial attention": part("fgra", {"spatial": "concatenation"}),
    "fgra: no consistency loss": part("fgra", consistency_weight=0.0),
    "grl: GCE without TRL": part("grl", {"enhancement": False, "memory": False}),
}
REFERENCE = comparison.REFERENCE
CURVE = {"1/4": 0.25, "1/2": 0.5, "2": 2.0}  # times the steps: is the curve of the mean flat?
LENGTHS = {f"{REFERENCE}: {label} of the steps": times for label, times in CURVE.items()}
VARIANTS = {**SYSTEMS, **OTHERS, **PARTS, **dict.fromkeys(LENGTHS, SYSTEMS[REFERENCE])}
ENCODER, STAGE = "encoder", "gltr: stage 1"
STARTS = {  # what is trained first; GLTR's first stage trains the embedding of its frames (Sec. 4.2)
    ENCODER: Variant("mean", {}, "baseline"),
    STAGE: PARTS["gltr: neither DTP nor TSA"],
}


# ----------------------------------------------------------------------------------------------------------------------
# One training and its evaluations


def world(size: Size, seed: int, faults: dict[str, float]) -> dict:
    """The options of a synthetic data set: the seed says who walks there, whatever befalls them."""
    return {
        "num_identities": size.people,
        "num_cameras": size.cameras,
        "length": list(size.length),
        "faults": faults,
        "seed": seed,
        "size": list(size.size),
    }


@functools.lru_cache(maxsize=64)
def tracklets(size: Size, seed: int, fault: str, strength: float) -> data.TrackletData:
    """All faults (``mixed``) or one."""
    faults = dict.fromkeys(FAULTS, strength) if fault == "mixed" else {fault: strength}
    dataset = data.open_dataset("synthetic", **world(size, seed, faults))
    if not size.in_memory:
        return dataset

    def drawn(some):
        return [
            data.Tracklet([f.permute(1, 2, 0).numpy() for f in t.load(range(len(t)))], t.pid, t.camera, t.name)
            for t in some
        ]

    sides = (dataset.train if fault == "mixed" else [], dataset.query, dataset.gallery)
    return data.TrackletData(*map(drawn, sides), name=dataset.name)


def start_of(name: str) -> str:
    return STAGE if name != STAGE and VARIANTS[name].model == STARTS[STAGE].model else ENCODER


def settings_of(size: Size, name: str, seed: int, out: Path) -> Settings:
    """A training of clips, or, for what is trained first, of single frames."""
    variant, single = {**VARIANTS, **STARTS}[name], name in STARTS
    options = {"last_stride": 1, **variant.options}
    if size.channels:
        options["backbone_kwargs"] = {"channels": list(size.channels), "stem_width": size.channels[0] // 2}
    if variant.model in ("gsta", "star"):
        options["hidden_features"] = size.hidden
    people = size.people // 2
    identities = min(2 * size.identities if single else size.identities, people)
    steps = size.encoder_steps if name == ENCODER else round(LENGTHS.get(name, 1) * size.steps)
    return Settings(
        data_options=world(size, seed, dict.fromkeys(FAULTS, size.mixed)),
        model=f"{variant.model}_{size.backbone}",
        model_options=options,
        criterion=variant.criterion,
        criterion_options=variant.criterion_options,
        init="" if name == ENCODER else str(place(out, start_of(name), seed)),
        size="x".join(map(str, size.size)),
        clip_length=1 if single else size.frames,
        identities=identities,
        clips=size.frames if single else 2,
        epochs=math.ceil(steps / math.ceil(people / identities)),
        lr=size.lr,
        lr_factors={} if name == ENCODER else {f"encoder.backbone.{part}": 0.0 for part in size.frozen},
        seed=seed,
        eval_untrained=False,
        keep=1,
        **{"workers": 0, **dict(size.settings)},
    )


def key_of(fault: str, strength: float) -> str:
    return f"{fault} {strength}" if strength else "clean"


def place(out: Path, name: str, seed: int) -> Path:
    label = name.replace(": ", "-").replace(" ", "_").replace("'", "").replace("/", "_of_")
    return out / f"{label}-seed{seed}"


def knowledge(model: temporal_agg.TrackletModel, size: Size, seed: int, fault: str, strength: float) -> float:
    """The area under the ROC curve of the frames' weights against the frames that a fault has struck.

    0.5 knows nothing, 1 gives each frame that it has struck a lower weight than each other frame; of the queries. A
    weight is held against the clip's even share, and is the mean over the clips that the frame is in.
    """
    drawn = tracklets(size, seed, fault, strength).query
    sources = data.open_dataset("synthetic", **world(size, seed, {fault: strength})).query
    device, transform = next(model.parameters()).device, data.ClipTransform.for_model(model)
    scores, struck = [], []
    with torch.inference_mode():
        for tracklet, source in zip(drawn, sources, strict=True):
            weights, counts = torch.zeros(2, len(tracklet))
            for indices, mask in zip(*model.clip.cut(len(tracklet)), strict=True):
                clip = transform(tracklet.load(indices))[None].to(device)
                details = model(clip, mask=mask[None].to(device), return_details=True)
                weights.index_add_(0, indices, mask.sum() * details.frame_weights[0].float().cpu())
                counts.index_add_(0, indices, mask.float())
            scores += (-weights / counts).tolist()
            struck += source.struck(fault)
    return comparison.area(scores, struck)


def run(out: Path, size: Size, name: str, seed: int, device: str = "auto", bars: bool = True) -> dict:
    """Trains and evaluates a variant, or what it starts from; what is finished is read. Returns what is reported."""
    accelerator = common.accelerator_of(device, str(dict(size.settings).get("mixed_precision", "no")))
    settings, directory = settings_of(size, name, seed, out), place(out, name, seed)
    mixed = tracklets(size, seed, "mixed", size.mixed)
    metrics = train.train(directory, mixed, settings, {"split_seed": seed}, accelerator, bars)
    keys = ("map", "rank1", "criterion", "distance", "aggregator_parameters", "train_seconds", "seconds")
    result = {"variant": name, "seed": seed, **{key: metrics[key] for key in keys}}
    if name not in SYSTEMS:
        return result

    file = directory / "faults.json"
    done = read_faults(file) if file.exists() else {}
    model = None
    for fault, strength in [(FAULTS[0], 0.0), *((f, s) for f in FAULTS for s in size.strengths)]:
        key = key_of(fault, strength)
        if key not in done:
            model = model or load_model(str(directory), {}).to(accelerator.device)
            test = tracklets(size, seed, fault, strength)
            metrics, _ = tested(model, test, accelerator, 256, bars, mixed_precision=accelerator.mixed_precision)
            done[key] = {"map": metrics["map"], "rank1": metrics["rank1"]}
            if strength == middle(size.strengths):
                done[key]["area"] = knowledge(model, size, seed, fault, strength)
            write_json(file, done)
    return {**result, "faults": done}


def middle(strengths: Sequence[float]) -> float:
    """The strength of the tables."""
    return strengths[len(strengths) // 2]


def read_faults(file: Path) -> dict:
    """What was measured before.

    Raises:
        ValueError: the file is no such record.
    """
    done = read_json(file)
    for key, measures in done.items():
        if not isinstance(measures, dict) or not all(common.is_number(measures.get(name)) for name in ("map", "rank1")):
            raise ValueError(f"{file}: {key!r} has no map and rank1. Delete the file: it is then measured again.")
        if not common.is_share(measures.get("area", 0.5)):
            raise ValueError(f"{file}: the area of {key!r} is no share. Delete the file: it is then measured again.")
    return done


def run_all(out: Path, size: Size, names: Sequence[str], seeds: Sequence[int], device: str, jobs: int) -> list[dict]:
    """What comes first first, then the systems, then the rest; seed by seed, so that a process draws a world once."""
    encoders, stages = ([(name, seed) for seed in seeds] for name in STARTS)
    stages = stages if any(start_of(name) == STAGE for name in names) else []
    groups = [[name for name in names if (name in SYSTEMS) == shown] for shown in (True, False)]
    results = []
    for phase in (encoders, stages, [(name, seed) for group in groups for seed in seeds for name in group]):
        work = [(out, size, *job, device, jobs == 1) for job in phase]  # the bars of several would mix
        done = comparison.run_jobs(run, work, jobs)
        results += [report(result, k, len(phase)) for k, result in enumerate(done, 1)]
    return [result for result in results if result["variant"] in VARIANTS]


def report(result: dict, k: int, total: int) -> dict:
    what = f"{result['variant']}, seed {result['seed']}: mAP {100 * result['map']:.1f}"
    print(f"[{k}/{total}] {what}, trained in {result['train_seconds']:.0f} s", flush=True)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# What a person reads


def gather(results: Sequence[dict], names: Sequence[str], seeds: Sequence[int]) -> dict:
    """By variant: what it is, and every measure as a list over the seeds."""
    variants = {}
    for name in names:
        runs = {result["seed"]: result for result in results if result["variant"] == name}
        runs = [runs[seed] for seed in seeds]
        values = {"mixed": runs, **{key: [r["faults"][key] for r in runs] for key in runs[0].get("faults", ())}}
        variants[name] = {key: runs[0][key] for key in ("criterion", "distance", "aggregator_parameters")}
        variants[name]["train_seconds"] = [run["train_seconds"] for run in runs]
        for metric in ("map", "rank1", "area"):
            has = {key: some for key, some in values.items() if all(metric in v for v in some)}
            variants[name][metric] = {key: [round(v[metric], 6) for v in some] for key, some in has.items()}
    return variants


def difference(variants: dict, name: str, other: str, key: str = "mixed") -> tuple[float, float]:
    return comparison.difference(variants, name, other, key)


def measured(variants: dict, name: str, key: str = "mixed") -> str:
    return comparison.measured(variants, name, key)


def systems_table(study: dict) -> str:
    variants, keys = study["variants"], ["clean", *middle_keys(study)]
    rows = []
    for name in [name for name in SYSTEMS if name in variants]:
        cells = [measured(variants, name, key) for key in keys]
        rows.append(
            [
                name,
                measured(variants, name),
                gap(variants, name, REFERENCE, "mixed"),
                *cells,
                variants[name]["criterion"],
            ]
        )
    head = ["", f"all four {study['size']['mixed']}", f"minus {REFERENCE}", *(key.replace("_", " ") for key in keys)]
    return markdown([*head, "loss"], rows)


def middle_keys(study: dict) -> list[str]:
    return [key_of(fault, middle(study["size"]["strengths"])) for fault in FAULTS]


def areas_table(study: dict) -> str:
    """Whether the weights of frames know the struck ones; empty without any."""
    variants, keys = study["variants"], middle_keys(study)
    rows = []
    for name in [name for name in SYSTEMS if name in variants]:
        found = [interval(variants[name]["area"][key]) for key in keys]
        clear = ["**" * (abs(mean - 50) > half) for mean, half in found]
        rows.append([name, *(f"{b}{with_half(f'{m:.1f}', h)}{b}" for b, (m, h) in zip(clear, found, strict=True))])
    return markdown(["", *(key.replace("_", " ") for key in keys)], rows) if rows else ""


def curve_table(study: dict) -> str:
    """The reference with fewer and with more steps; empty without those."""
    variants, rows = study["variants"], []
    lengths = sorted({**LENGTHS, REFERENCE: 1.0}.items(), key=lambda item: item[1])
    for name, times in [(name, times) for name, times in lengths if name in variants]:
        rows.append(
            [
                f"{round(times * study['size']['steps'])}",
                measured(variants, name),
                gap(variants, name, REFERENCE, "mixed"),
            ]
        )
    head = [f"steps of {REFERENCE}", f"all four {study['size']['mixed']}", f"minus {study['size']['steps']} steps"]
    return markdown(head, rows) if len(rows) > 1 else ""


def parts_table(study: dict) -> str:
    """Each paper's parts against the whole; empty without any."""
    variants, rows = study["variants"], []
    others = {name: name.partition(": ") for name in PARTS if name in variants}
    others |= {"gsta": ("star", "", "no LSTA blocks (gsta)")} if "gsta" in variants else {}
    for whole in [name for name in SYSTEMS if name in variants]:
        own = {name: label for name, (paper, _, label) in others.items() if paper == whole}
        rows += [[f"**{whole}**", measured(variants, whole), ""]] if own else []
        rows += [[own[n], measured(variants, n), signed(*difference(variants, n, whole))] for n in own]
    return markdown(["", f"all four {study['size']['mixed']}", "minus the whole"], rows) if rows else ""


def supported(study: dict) -> str:
    """What may be said about systems and the reference, and no more."""
    verdicts = comparison.supported(study["variants"], list(SYSTEMS), REFERENCE, "mixed")
    return verdicts and f"With all four faults, by the intervals of the paired differences. {verdicts}"


def text(study: dict) -> str:
    size, environment, n = study["size"], study["environment"], len(study["seeds"])
    people, (height, width), clips = size["people"] // 2, size["size"], 2 * size["identities"]
    frozen = f" and whose {', '.join(size['frozen'])} stay as they are" if size["frozen"] else ""
    titles = {
        "Is the training long enough? The same with fewer and with more steps:": curve_table(study),
        "Whether a frame's weight knows the frames that a fault has struck: area under the ROC curve in %; 50 knows\n"
        "nothing, and bold is where the interval leaves that out.": areas_table(study),
        "Aggregator and loss apart, on tracklets with all four faults:": loss_table(
            study["variants"], list(SYSTEMS), "mixed"
        ),
        "Parts, on tracklets with all four faults:": parts_table(study),
    }
    parts = "\n".join(f"{title}\n\n{table}\n" for title, table in titles.items() if table.count("\n") > 1)
    return f"""# Noise study on synthetic tracklets

mAP in %, mean ± half of the 95 % confidence interval over n = {n} seeds (Student's t). Each seed draws its own people,
start and batches. Bold: the interval of a paired difference leaves out zero; of twenty such differences one does so by
chance. {size["backbone"]} on {height}x{width} frames, {people} people to train on and {people} others to test on,
{size["steps"]} steps of {clips} clips of {size["frames"]} frames from a common start, which has had
{size["encoder_steps"]} steps of as many single frames{frozen}. What is not called otherwise has the common loss:
cross-entropy and batch-hard triplet (cosine) behind a BatchNorm. These are drawn figures and a small backbone: nothing
here is a result on a benchmark.

Test tracklets carry all four faults at the strength of training, none (clean), or one alone.

{systems_table(study)}

{supported(study)}

{parts}
{environment["device"]}, torch {environment["torch"]}; {study["hours"]:.1f} hours of training in {study["jobs"]} jobs of
{environment["threads"]} threads. `python {environment["command"]}`
"""


STYLES = {
    "mean": ("#000000", "o"), "max": ("#0072b2", "s"), "gem": ("#56b4e9", "P"), "attention": ("#d55e00", "^"),
    "nan": ("#cc79a7", "X"), "lstm": ("#009e73", "D"), "robust": ("#e69f00", "v"),
    "loga": ("#0072b2", "s"), "gsta": ("#e69f00", "^"), "star": ("#d55e00", "v"),
    "gltr": ("#009e73", "D"), "fgra": ("#cc79a7", "X"), "grl": ("#7a4fbf", "*"),
}  # fmt: skip


def curve(study: dict, name: str, fault: str) -> tuple[list[float], list[float], list[float]]:
    """Strengths, means and half widths of the intervals."""
    strengths = [0.0, *study["size"]["strengths"]]
    points = [interval(study["variants"][name]["map"][key_of(fault, s)]) for s in strengths]
    return strengths, [mean for mean, _ in points], [half for _, half in points]


def figure(study: dict):
    """mAP against strength, a column for each fault; baselines above, the papers' systems below."""
    from matplotlib.figure import Figure

    names = [name for name in SYSTEMS if name in study["variants"]]
    simple = comparison.POOLINGS
    rows = [[n for n in names if n in simple], [n for n in names if n not in simple or n == REFERENCE]]
    rows = [row for row in rows if set(row) - {REFERENCE}] or [names]
    drawing = Figure(figsize=(12, 3.2 * len(rows) + 0.6), layout="constrained")
    grid = drawing.subplots(len(rows), len(FAULTS), sharex=True, sharey=True, squeeze=False)
    for i, (row, axes) in enumerate(zip(rows, grid, strict=True)):
        for ax, fault in zip(axes, FAULTS, strict=True):
            for name in row:
                colour, marker = STYLES[name]
                x, mean, half = map(np.array, curve(study, name, fault))
                dashed = "--" if name == REFERENCE and i else "-"
                ax.plot(x, mean, dashed, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=name)
                ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.1, linewidth=0)
            ax.grid(alpha=0.25)
            ax.set_ylim(0, 100)
            if i == 0:
                ax.set_title(fault.replace("_", " "))
            if i == len(rows) - 1:
                ax.set_xlabel("strength of the fault")
        axes[0].set_ylabel("mAP, %")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    drawing.suptitle(
        f"Synthetic tracklets; bands: 95 % confidence intervals over {len(study['seeds'])} seeds", fontsize=10
    )
    return drawing


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = common.parser_of(__doc__ or "")
    comparison.add_arguments(parser, "study", list(VARIANTS))
    parser.add_argument("--full", action="store_true", help="ResNet-50, 256x128, for a GPU")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on, 2 to 10 (5)")
    parser.add_argument("--parts", action="store_true", help="train systems without one of their parts, too")
    args = parser.parse_args(argv)
    some = bool(args.only.strip(", "))
    comparison.check_arguments(parser, args, list(VARIANTS))
    if not some and not args.parts:
        args.only = [name for name in args.only if name not in PARTS]
    if not 2 <= args.seeds <= len(T_975) + 1:
        parser.error(f"--seeds must be 2 to {len(T_975) + 1}, for an interval; got {args.seeds}")
    return args


@common.own_defaults()
def main(argv: list[str] | None = None, size: Size | None = None) -> dict:
    args = parse(sys.argv[1:] if argv is None else argv)
    size = size or (FULL if args.full else Size())
    names, seeds = args.only, list(range(args.seeds))
    with common.one_line("study.py"):
        results = run_all(args.out, size, names, seeds, args.device, args.jobs)
        return write_results(args, size, names, seeds, results)


def write_results(
    args: argparse.Namespace, size: Size, names: list[str], seeds: list[int], results: list[dict]
) -> dict:
    environment = common.environment(common.accelerator_of(args.device).device)
    environment["threads"] = comparison.threads(args.jobs)
    options = [
        f"--jobs {args.jobs} --seeds {len(seeds)}",
        *(["--full"] if args.full else []),
        *(["--parts"] if args.parts else []),
    ]
    environment["command"] = " ".join(["recipes/benchmarks/study.py", *options])  # without the places of this machine
    study = {
        "size": dataclasses.asdict(size),
        "seeds": seeds,
        "jobs": args.jobs,
        "hours": sum(result["seconds"] for result in results) / 3600,
        "environment": environment,
        "variants": gather(results, names, seeds),
    }
    folder = args.results
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "study.json", study)
    write_text(folder / "study.md", text(study))
    if any(name in SYSTEMS for name in names):
        draw(folder / "study.png", lambda: figure(study))
    print("\n" + text(study))
    return study


if __name__ == "__main__":
    common.run(main)
