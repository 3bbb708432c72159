"""The noise study: every system on synthetic tracklets that carry one fault at a time, and each paper's parts.

    python recipes/benchmarks/study.py --out runs/study --jobs 2        # small frames and backbone, for a CPU
    python recipes/benchmarks/study.py --full --out runs/study-full     # ResNet-50 on 256x128 frames, for a GPU
    python recipes/benchmarks/study.py --only mean,gltr --seeds 5       # some of it

What is measured: mAP on tracklets with occlusion, bad boxes, identity switches or blur, each alone and at several
strengths, and on tracklets with all four. What is equal for everybody: people and tracklets, backbone (the last stage's
stride is 1), its weights at the start (trained on single frames, which favours no aggregator; STAR's LSTA blocks come
fresh), optimiser, steps, clips per step, frames per clip. What is each system's own: the aggregator, the losses, how a
tracklet is cut into clips in training and in test, and the distance. A seed draws everything anew, people included;
intervals are over seeds.

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
import train
from common import draw, embed_test, load_model, score, summary, write_json, write_text
from comparison import T_975, Variant, interval, markdown, signed
from settings import Settings

from temporal_agg import data, retrieval
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
    encoder_steps: int = 400  # of the common start, batches of as many frames as a batch of clips has
    steps: int = 160
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
    lr=3e-4,
    hidden=512,
    in_memory=False,
    settings=(("workers", 12), ("mixed_precision", "bf16")),
)


SYSTEMS = {
    "mean": Variant("mean"),
    "max": Variant("max"),
    "attention": Variant("attention"),
    "lstm": Variant("lstm"),
    "loga": Variant("loga"),
    "loga scaled": Variant("loga", {"scale": "sqrt(C)"}),
    "gsta": Variant("gsta"),
    "star": Variant("star", {"flow": False}),  # GSTA with LSTA blocks in the backbone
    "gltr": Variant("gltr"),
    "fgra": Variant("fgra"),
    "grl": Variant("grl"),
}
GCE_ALONE = {"enhancement": False, "memory": False}
PARTS = {
    "loga: LAQ alone": Variant("loga", {"assembly": "laq"}),
    "loga: GCQ alone": Variant("loga", {"assembly": "gcq"}),
    "gsta: no pyramid loss": Variant("gsta", criterion_options={"pyramid_weight": 0.0}),
    "gltr: neither DTP nor TSA": Variant("gltr", {"dtp": False, "tsa": False}),
    "gltr: DTP alone": Variant("gltr", {"tsa": False}),
    "gltr: TSA alone": Variant("gltr", {"dtp": False}),
    "fgra: no alignment score": Variant("fgra", {"temporal": "average"}),
    "fgra: no spatial attention": Variant("fgra", {"spatial": "concatenation"}),
    "fgra: no consistency loss": Variant("fgra", criterion_options={"consistency_weight": 0.0}),
    "grl: GCE without TRL": Variant("grl", GCE_ALONE),
}
SAME_LOSS = {  # not GRL: its embedding has unit length, which a linear classifier alone does not fit
    f"{name}: the baselines' loss": Variant(name, criterion="baseline") for name in ("loga", "gsta", "gltr", "fgra")
}
VARIANTS = {**SYSTEMS, **PARTS, **SAME_LOSS}
REFERENCE = "mean"
ENCODER = "encoder"  # the common start


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


def settings_of(size: Size, variant: Variant, seed: int, init: str) -> Settings:
    """A training of clips that goes on from an encoder, or (``init`` empty) of that encoder on single frames."""
    options = {"last_stride": 1, **variant.options}
    width = 2048
    if size.channels:
        options["backbone_kwargs"] = {"channels": list(size.channels), "stem_width": size.channels[0] // 2}
        width = size.channels[-1]
    if variant.model in ("gsta", "star"):
        options["hidden_features"] = size.hidden
    if options.get("scale") == "sqrt(C)":
        options["scale"] = math.sqrt(width)
    people = size.people // 2
    identities = min(size.identities, people) if init else min(2 * size.identities, people)
    steps = size.steps if init else size.encoder_steps
    return Settings(
        data_options=world(size, seed, dict.fromkeys(FAULTS, size.mixed)),
        model=f"{variant.model}_{size.backbone}",
        model_options=options,
        criterion=variant.criterion if init else "baseline",
        criterion_options=variant.criterion_options,
        init=init,
        size="x".join(map(str, size.size)),
        clip_length=size.frames if init else 1,
        identities=identities,
        clips=2 if init else size.frames,
        epochs=math.ceil(steps / math.ceil(people / identities)),
        lr=size.lr,
        seed=seed,
        eval_untrained=False,
        keep=1,
        **{"workers": 0, **dict(size.settings)},
    )


def key_of(fault: str, strength: float) -> str:
    return f"{fault} {strength}" if strength else "clean"


def place(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(': ', '-').replace(' ', '_')}-seed{seed}"


def run(out: Path, size: Size, name: str, seed: int, device: str = "auto", bars: bool = True) -> dict:
    """Trains one variant, or an encoder, and evaluates it; what is finished is read. Returns what is reported of it."""
    accelerator = common.accelerator_of(device, str(dict(size.settings).get("mixed_precision", "no")))
    if name == ENCODER:
        variant, init = Variant("mean"), ""
    else:
        variant, init = VARIANTS[name], str(place(out, ENCODER, seed))
    settings, directory = settings_of(size, variant, seed, init), place(out, name, seed)
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
            with accelerator.autocast():
                queries, gallery = embed_test(model, test, accelerator, 256, bars)
            metrics = summary(score(retrieval.distances(queries, gallery, model.clip.distance), test))
            done[key] = {"map": metrics["map"], "rank1": metrics["rank1"]}
            write_json(file, done)
    return {**result, "faults": done}


def read_faults(file: Path) -> dict:
    """What was measured before.

    Raises:
        ValueError: the file is no such record.
    """
    done = read_json(file)
    for key, measures in done.items():
        if not isinstance(measures, dict) or not all(common.is_number(measures.get(name)) for name in ("map", "rank1")):
            raise ValueError(f"{file}: {key!r} has no map and rank1. Delete the file: it is then measured again.")
    return done


def run_all(out: Path, size: Size, names: Sequence[str], seeds: Sequence[int], device: str, jobs: int) -> list[dict]:
    """Encoders first, then the systems, then the rest; seed by seed, so that a process draws a world once."""
    encoders = [(ENCODER, seed) for seed in seeds]
    groups = [[name for name in names if name in group] for group in (SYSTEMS, PARTS, SAME_LOSS)]
    results = []
    for phase in (encoders, [(name, seed) for group in groups for seed in seeds for name in group]):
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
        for metric in ("map", "rank1"):
            variants[name][metric] = {key: [round(v[metric], 6) for v in some] for key, some in values.items()}
    return variants


def difference(variants: dict, name: str, other: str, key: str = "mixed") -> tuple[float, float]:
    return comparison.difference(variants, name, other, key)


def measured(variants: dict, name: str, key: str = "mixed") -> str:
    return comparison.measured(variants, name, key)


def systems_table(study: dict) -> str:
    variants, strengths = study["variants"], study["size"]["strengths"]
    keys = ["clean", *(key_of(fault, strengths[len(strengths) // 2]) for fault in FAULTS)]
    rows = []
    for name in [name for name in SYSTEMS if name in variants]:
        gap = signed(*difference(variants, name, REFERENCE)) if name != REFERENCE in variants else ""
        cells = [measured(variants, name, key) for key in keys]
        rows.append([name, measured(variants, name), gap, *cells, variants[name]["criterion"]])
    head = ["", f"all four {study['size']['mixed']}", f"minus {REFERENCE}", *(key.replace("_", " ") for key in keys)]
    return markdown([*head, "loss"], rows)


def parts_table(study: dict) -> str:
    """Each paper's parts, and other losses, against the whole; empty without any."""
    variants, rows = study["variants"], []
    others = {name: name.partition(": ") for name in [*PARTS, *SAME_LOSS] if name in variants}
    own = {"gsta": ("star", "", "no LSTA blocks (gsta)"), "loga scaled": ("loga", "", "logits / sqrt(C) (loga scaled)")}
    others |= {name: row for name, row in own.items() if name in variants}
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
    parts = parts_table(study)
    parts = f"\nParts and losses, on tracklets with all four faults:\n\n{parts}\n" if parts else ""
    return f"""# Noise study on synthetic tracklets

mAP in %, mean ± half of the 95 % confidence interval over n = {n} seeds (Student's t). Each seed draws its own people,
start and batches. Bold: the interval of a paired difference leaves out zero; of twenty such differences one does so by
chance. {size["backbone"]} on {height}x{width} frames, {people} people to train on and {people} others to test on,
{size["steps"]} steps of {clips} clips of {size["frames"]} frames from a common start. These are drawn figures, a small
backbone and short trainings: nothing here is a result on a benchmark.

Test tracklets carry all four faults at the strength of training, none (clean), or one alone.

{systems_table(study)}

{supported(study)}
{parts}
{environment["device"]}, torch {environment["torch"]}; {study["hours"]:.1f} hours of training in {study["jobs"]} jobs of
{environment["threads"]} threads. `python {environment["command"]}`
"""


STYLES = {
    "mean": ("#000000", "o"), "max": ("#0072b2", "s"), "attention": ("#d55e00", "^"), "lstm": ("#009e73", "D"),
    "loga": ("#0072b2", "s"), "loga scaled": ("#56b4e9", "P"), "gsta": ("#e69f00", "^"), "star": ("#d55e00", "v"),
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
    simple = ("mean", "max", "attention", "lstm")
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
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on, 2 to 10 (3)")
    args = parser.parse_args(argv)
    comparison.check_arguments(parser, args, list(VARIANTS))
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
