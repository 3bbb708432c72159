"""Publishes a run of recipes/train.py on the Hugging Face Hub, with a model card and an entry for the manifest.

    python hub/publish.py runs/mine --dry-run                            # writes runs/mine/release, uploads nothing
    python hub/publish.py runs/mine --repo owner/name --licence cc-by-nc-4.0
    python hub/publish.py runs/mine --manifest temporal_agg/models/manifest.json        # and writes its entry there

It refuses a run that is not finished, and one whose saved model does not give the embeddings that the trained one gave
(reference.safetensors). Everything is uploaded in one commit: the same command repeats an interrupted upload, and what
has arrived is not sent again. Log in before: hf auth login, or the environment variable HF_TOKEN.

The release is a directory that create_model("local-dir:...") loads: config.json, model.safetensors, README.md (the
card), metrics.json and settings.json, in which <root> and <out> stand for places on the machine that trained it.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from string import Template

import safetensors.torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from evaluate import open_splits, own_data

import temporal_agg
from temporal_agg.models import hub, manifest
from temporal_agg.models.weights import sha256_of

RUN_FILES = ("settings.json", "metrics.json", "config.json", "model.safetensors", "reference.safetensors")
METRICS = ("map", "rank1", "rank5", "rank10", "rank20", "minp")

OWN_TERMS = "set by its owners; ask them"
DATA = {  # what it is, and its terms
    "csv": ("a data set of the publisher's own", OWN_TERMS),
    "duke": ("DukeMTMC-VideoReID (Wu et al., CVPR 2018)", "withdrawn by its authors; get no copy for this"),
    "duke-si": ("DukeMTMC-SI-Tracklet (Li et al.)", "of DukeMTMC, which its authors withdrew; get no copy for this"),
    "folder": ("a data set of the publisher's own", OWN_TERMS),
    "ilids-vid": ("iLIDS-VID (Wang et al., ECCV 2014)", OWN_TERMS),
    "ls-vid": ("LS-VID (Li et al., ICCV 2019)", OWN_TERMS),
    "mars": ("MARS (Zheng et al., ECCV 2016)", OWN_TERMS),
    "prid-2011": ("PRID-2011 (Hirzer et al., SCIA 2011)", OWN_TERMS),
    "synthetic": ("walking figures that temporal-agg draws itself; nobody was filmed", "Apache-2.0, as temporal-agg"),
}

DEMONSTRATION = "This model shows how the library works; on real people it is worth nothing."

PAPERS = {  # authors, title, venue, year; and what it reports: rank-1 and mAP by data set
    "loga": (
        "Local-Global Associative Frame Assemble in Video Re-ID",
        "Qilei Li and Jiabo Huang and Shaogang Gong",
        "British Machine Vision Conference (BMVC)",
        2021,
        {
            "mars": (89.5, 84.1),
            "duke": (97.0, 96.6),
            "duke-si": (81.0, 76.6),
            "ilids-vid": (91.3, None),
            "prid-2011": (95.9, None),
        },
    ),
    "star": (
        "Spatio-Temporal Associative Representation for Video Person Re-Identification",
        "Guile Wu and Xiatian Zhu and Shaogang Gong",
        "British Machine Vision Conference (BMVC)",
        2019,
        {"mars": (85.4, 76.0), "duke": (94.0, 93.4), "ilids-vid": (85.9, None), "prid-2011": (93.4, None)},
    ),
    "gltr": (
        "Global-Local Temporal Representations For Video Person Re-Identification",
        "Jianing Li and Jingdong Wang and Qi Tian and Wen Gao and Shiliang Zhang",
        "IEEE/CVF International Conference on Computer Vision (ICCV)",
        2019,
        {
            "mars": (87.02, 78.47),
            "duke": (96.29, 93.74),
            "ilids-vid": (86.0, None),
            "prid-2011": (95.5, None),
            "ls-vid": (63.07, 44.32),
        },
    ),
    "fgra": (
        "Frame-Guided Region-Aligned Representation for Video Person Re-Identification",
        "Zengqun Chen and Zhiheng Zhou and Junchu Huang and Pengyu Zhang and Bo Li",
        "AAAI Conference on Artificial Intelligence",
        2020,
        {"mars": (87.3, 81.2), "ilids-vid": (88.0, 91.9), "prid-2011": (95.5, 97.3)},
    ),
    "grl": (
        "Watching You: Global-guided Reciprocal Learning for Video-based Person Re-identification",
        "Xuehu Liu and Pingping Zhang and Chenyang Yu and Huchuan Lu and Xiaoyun Yang",
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
        2021,
        {"mars": (91.0, 84.8), "ilids-vid": (90.4, None), "prid-2011": (96.2, None)},
    ),
}
PAPERS["gsta"] = PAPERS["star"]


FLOW = " It reads optical flow, too: temporal-agg's `recipes/compute_flow.py` puts it beside the frames of a data set."


def read_run(run: Path) -> tuple[dict, dict, dict]:
    """Settings, metrics and config of a finished run.

    Raises:
        ValueError: it is not finished, or its metrics are not whole.
    """
    missing = [name for name in RUN_FILES if not (run / name).is_file()]
    if missing:
        raise ValueError(
            f"{run} is no finished run of recipes/train.py: {', '.join(missing)} is missing. The command that started "
            "it goes on with it."
        )
    metrics = json.loads((run / "metrics.json").read_text())
    bad = [key for key in METRICS if not 0 <= metrics.get(key, -1) <= 1]
    if bad:
        raise ValueError(f"{run / 'metrics.json'}: {', '.join(bad)} is missing or not between 0 and 1.")
    return json.loads((run / "settings.json").read_text()), metrics, hub.read_config(run / "config.json")


def check_embeddings(model: temporal_agg.TrackletModel, run: Path) -> int:
    """Embeds the first gallery tracklets of the run again, and returns how many.

    Raises:
        ValueError: they are not what the trained model gave.
    """
    expected = safetensors.torch.load_file(run / "reference.safetensors")["gallery"]
    splits = open_splits(**own_data(str(run)))
    if len(splits) > 1:
        raise ValueError(f"{run} does not say which of its {len(splits)} splits it was trained on.")
    (dataset,) = splits.values()
    got = temporal_agg.embed_tracklets(model, dataset.gallery[: len(expected)], device="cpu", progress=False)
    error = float((got - expected).abs().max() / expected.abs().max()) if got.shape == expected.shape else float("inf")
    if not error <= 1e-4:
        raise ValueError(
            f"the model in {run} does not give the embeddings of reference.safetensors: they differ by {error:.1e} of "
            "the largest value, 1e-4 is allowed. The weights, the data or the frames have changed since the run."
        )
    return len(expected)


def card(
    weights: manifest.Weights, settings: dict, metrics: dict, config: dict, model: temporal_agg.TrackletModel
) -> str:
    """The model card."""
    encoder, name = config["encoder"], config["aggregator"]["name"]
    system = "star" if encoder["type"] == "star" else name.removesuffix("_released")
    paper, data = PAPERS.get(system), settings["settings"]["data"].partition(":")[0]

    def row(title: str, values: dict) -> str:
        cells = [f"{100 * values[key]:.1f}" if values.get(key) is not None else "" for key in METRICS]
        return f"| {title} | {' | '.join(cells)} |"

    rows = [row("this model", metrics)]
    if metrics.get("untrained"):
        rows.append(row("the same before training", metrics["untrained"]))
    if paper and data in paper[4]:
        rank1, mean = (value and value / 100 for value in paper[4][data])
        rows.append(row("the paper reports (not measured here)", {"rank1": rank1, "map": mean}))
    what = f"The temporal aggregator `{name}` on timm's {encoder['backbone']}"
    what += " with STAR's blocks" if system == "star" else ""
    what += f", of the paper *{paper[0]}* ({paper[2]}, {paper[3]})" if paper else ", a baseline"
    what += ", as in the code that its authors released" if name.endswith("_released") else ""
    keys = ("title", "author", "booktitle", "year")
    bibtex = "\n".join(f"  {key} = {{{value}}}," for key, value in zip(keys, paper or (), strict=False))
    _, height, width = model.data_config["input_size"]
    return Template((Path(__file__).parent / "card.md").read_text(encoding="utf-8")).substitute(
        {key: value for key, value in dataclasses.asdict(weights).items() if value is not None},
        system=system,
        what=f"{what}.",
        features=model.num_features,
        distance=model.clip.distance,
        height=height,
        width=width,
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        version=settings["environment"]["temporal_agg"],
        git=settings["environment"]["git"] or "(not recorded)",
        results="\n".join(rows),
        flow=FLOW if model.encoder.uses_flow else "",
        worth=DEMONSTRATION if data == "synthetic" else "",
        citation=f"```bibtex\n@inproceedings{{{system}{paper[3]},\n{bibtex}\n}}\n```" if paper else "None: a baseline.",
    )


def protocol_of(metrics: dict, model: temporal_agg.TrackletModel, settings: dict) -> str:
    clip, split = model.clip, f"split {settings['split'] or 0}"
    if settings["identity_splits"]:
        split += f" of {settings['identity_splits']} random halves, drawn with seed {settings['split_seed']}"
    return (
        f"{metrics['data']}, {split}: {metrics['queries']:,} queries, {metrics['gallery']:,} gallery tracklets; the "
        f"same person in the same camera is ignored; average precision in step form; {clip.distance} distance; "
        f"tracklets cut by {clip.test_sampling!r} into clips of {clip.length} frames; seed {metrics['seed']}"
    )


def without_paths(found: dict, settings: dict, run: Path) -> dict:
    """What a run recorded, with <root> for the place of its data and <out> for that of the runs; what else is an
    absolute path keeps its last part. Places are nobody's business."""
    values = settings["settings"]
    places = {values["root"] or values["data"].partition(":")[2]: "<root>", values["out"]: "<out>"}
    places[str(run.resolve().parent)] = "<out>"

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(of) for key, of in value.items()}
        if isinstance(value, list):
            return [clean(of) for of in value]
        if not isinstance(value, str):
            return value
        for place in sorted(filter(None, places), key=len, reverse=True):
            value = re.sub(rf"(?<![\w./-]){re.escape(place)}(?![\w.-])", places[place], value)
        return re.sub(r"(?<![\w.<>/-])/(?!/)(?:[^\s/]+/)*([^\s/]+)", r"<path>/\1", value)

    return clean(found)


def command_of(environment: dict) -> str:
    script, _, arguments = environment["command"].partition(" ")
    several = environment["processes"] > 1
    start = f"torchrun --nproc_per_node {environment['processes']}" if several else "python"
    return f"{start} recipes/{Path(script).name} {arguments}".strip()


def prepare(run: Path, out: Path, name: str | None, repo: str | None, licence: str | None) -> manifest.Weights:
    """Checks a run, writes its release, and returns its entry for the manifest."""
    settings, metrics, config = read_run(run)
    data = settings["settings"]["data"].partition(":")[0]
    name = name or f"{config['architecture'].partition('.')[0]}.{data}"
    plan = manifest.read().get(name)
    licence = licence or (plan and plan.licence) or ("apache-2.0" if data == "synthetic" else None)
    if licence is None:
        raise ValueError("say by --licence under which licence the weights may be used, such as cc-by-nc-4.0.")
    out.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(run / file, out / file)
    model = temporal_agg.create_model(f"local-dir:{out}")
    print(f"{check_embeddings(model, run)} embeddings are reproduced.")

    metrics, settings = (without_paths(found, settings, run) for found in (metrics, settings))
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    what, terms = DATA.get(data, DATA["folder"])
    start = f"; the backbone started from timm's {config['encoder']['backbone']}"
    weights = manifest.Weights(
        name=name,
        released=False,
        repo=repo or (plan.repo if plan else f"{manifest.owner()}/{name}"),
        revision=None,
        sha256=sha256_of(out / "model.safetensors"),
        size=(out / "model.safetensors").stat().st_size,
        training_data=what + (start if settings["settings"]["pretrained"] else ""),
        training_data_licence=terms,
        licence=licence,
        metrics={key: round(metrics[key], 4) for key in METRICS},
        protocol=protocol_of(metrics, model, settings["settings"]),
        command=command_of(settings["environment"]),
    )
    (out / "README.md").write_text(card(weights, settings, metrics, config, model), encoding="utf-8")
    return weights


def main(argv: list[str] | None = None) -> manifest.Weights:
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run directory of recipes/train.py")
    parser.add_argument("--repo", help="owner/name on the Hub; default: what the manifest plans, or <its owner>/<name>")
    parser.add_argument("--name", help="of the weights; default: <model>.<data>, such as loga_resnet50.mars")
    parser.add_argument("--licence", help="of the weights, as the Hub calls it; synthetic data: apache-2.0")
    parser.add_argument("--out", type=Path, help="where the release is written; default: <run>/release")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="upload nothing")
    parser.add_argument("--manifest", type=Path, help="also write the entry into this manifest")
    args = parser.parse_args(argv)
    out = args.out or args.run / "release"
    try:
        weights = prepare(args.run, out, args.name, args.repo, args.licence)
        if not args.dry_run:
            files = ["README.md", "config.json", "metrics.json", "model.safetensors", "settings.json"]
            commit = hub.upload(out, weights.repo, None, args.private, None, f"Release {weights.name}", files)
            weights = dataclasses.replace(weights, released=True, revision=commit)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"publish.py: {error}") from error
    print(
        f"{out} " + ("holds the release; nothing is uploaded." if args.dry_run else f"is at {weights.repo}@{commit}.")
    )
    print(json.dumps({weights.name: {k: v for k, v in dataclasses.asdict(weights).items() if k != "name"}}, indent=2))
    if args.manifest:
        manifest.write(weights, args.manifest)
    return weights


if __name__ == "__main__":
    main()
