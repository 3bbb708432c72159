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

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import common
from common import METRICS, open_splits, own_data, read_metrics, write_json, write_text

import temporal_agg
from temporal_agg.aggregators import registry_entry
from temporal_agg.files import locked, read_json, read_text, replace_file, sweep
from temporal_agg.models import hub, manifest
from temporal_agg.models.weights import sha256_of

RUN_FILES = ("settings.json", "metrics.json", "config.json", "model.safetensors", "reference.safetensors")
RELEASE = ("README.md", "config.json", "metrics.json", "model.safetensors", "settings.json")

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
    "ward": ("WARD (Martinel and Micheloni, CVPR workshops 2012)", "BSD-3-Clause, github.com/iN1k1/CVPR2012"),
    "synthetic": ("walking figures that temporal-agg draws itself; nobody was filmed", "Apache-2.0, as temporal-agg"),
}

DEMONSTRATION = "This model shows how the library works; on real people it is worth nothing."

ONE_RUN = ", of one run with one seed: another seed gives somewhat other numbers"

FLOW = " It reads optical flow, too: temporal-agg's `recipes/compute_flow.py` puts it beside the frames of a data set."


def read_run(run: Path) -> tuple[dict, dict, dict]:
    """Settings, metrics and config of a finished run.

    Raises:
        ValueError: it is not finished, or its metrics are not whole.
    """
    settings, environment = common.read_run(run)
    file = run / "settings.json"
    common.check_kinds(file, "setting", settings, {"out": str})
    common.check_kinds(file, "environment's", environment, {"command": str, "processes": int, "temporal_agg": str})
    config = hub.read_config(run / "config.json")
    return {"settings": settings, "environment": environment}, read_metrics(run / "metrics.json"), config


def check_embeddings(model: temporal_agg.TrackletModel, run: Path) -> int:
    """Embeds the first gallery tracklets of the run again (where it has none, training ones), and returns how many.

    Raises:
        ValueError: they are not what the trained model gave.
    """
    expected = common.read_tensors(run / "reference.safetensors").get("gallery")
    if expected is None:
        raise ValueError(f"{run / 'reference.safetensors'} holds no embeddings of gallery tracklets.")
    splits = open_splits(**own_data(str(run)))
    if len(splits) > 1:
        raise ValueError(f"{run} does not say which of its {len(splits)} splits it was trained on.")
    (dataset,) = splits.values()
    known = (dataset.gallery or dataset.train)[: len(expected)]
    got = temporal_agg.embed_tracklets(model, known, device="cpu", progress=False)
    error = float((got - expected).abs().max() / expected.abs().max()) if got.shape == expected.shape else float("inf")
    if not error <= 1e-4:
        raise ValueError(
            f"the model in {run} does not give the embeddings of reference.safetensors: they differ by {error:.1e} of "
            "the largest value, 1e-4 is allowed. The weights, the data or the frames have changed since the run."
        )
    return len(expected)


def card(
    weights: manifest.Weights,
    settings: dict,
    metrics: dict,
    config: dict,
    model: temporal_agg.TrackletModel,
    source: str,
) -> str:
    """The model card; ``source`` is where create_model finds the model."""
    encoder, name = config["encoder"], config["aggregator"]["name"]
    entry, data = registry_entry(name), settings["settings"]["data"].partition(":")[0]
    paper = entry.paper

    def row(title: str, values: dict) -> str:
        cells = [f"{100 * values[key]:.1f}" if values.get(key) is not None else "" for key in METRICS]
        return f"| {title} | {' | '.join(cells)} |"

    rows = [row(metrics.get("measured", "this model"), metrics)]
    rows += [row(title, values) for title, values in metrics.get("others", {}).items()]
    if metrics.get("untrained"):
        rows.append(row("the same before training", metrics["untrained"]))
    if paper and data in paper.results:
        rank1, mean = (value and value / 100 for value in paper.results[data])
        rows.append(row("the paper reports (not measured here)", {"rank1": rank1, "map": mean}))
    what = f"The temporal aggregator `{name}` on {encoder['backbone']}"
    what += f", of *{paper.title}* ({paper.name}; {paper.venue}, {paper.year})" if paper else ", a baseline"
    what += f": {entry.note}" if entry.note else ""
    _, height, width = model.data_config["input_size"]
    return Template(read_text(Path(__file__).parent / "card.md")).substitute(
        {key: value for key, value in dataclasses.asdict(weights).items() if value is not None},
        system=paper.name.lower() if paper else name,
        what=f"{what}.",
        features=model.num_features,
        distance=model.clip.distance,
        height=height,
        width=width,
        source=source,
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        version=settings["environment"]["temporal_agg"],
        git=settings["environment"].get("git") or "(not recorded)",
        results="\n".join(rows),
        flow=FLOW if model.encoder.uses_flow else "",
        how="" if "measured" in metrics else ONE_RUN,
        worth=DEMONSTRATION + " " if data == "synthetic" else "",
        citation=f"```bibtex\n{paper.bibtex}\n```" if paper else "None: a baseline.",
    )


def protocol_of(metrics: dict, model: temporal_agg.TrackletModel, settings: dict) -> str:
    if "protocol" in metrics:
        return metrics["protocol"]
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
    recipes = Path(common.__file__).parent
    places = sorted(recipes.rglob(Path(script).name)) or [recipes / Path(script).name]
    inside = places[0].relative_to(recipes).as_posix()  # train.py, benchmarks/study.py
    several = environment["processes"] > 1
    start = f"torchrun --nproc_per_node {environment['processes']}" if several else "python"
    return f"{start} recipes/{inside} {arguments}".strip()


def check_place(out: Path, settings: dict) -> None:
    """Raises a ValueError if a release of another run, or something else, is there and would be overwritten."""
    there = [name for name in RELEASE if (out / name).exists()]
    if not there:
        return
    mark = out / "settings.json"  # the first file of a release
    if not mark.exists() or read_json(mark) != json.loads(json.dumps(settings)):
        raise ValueError(f"{out} holds {', '.join(there)} of something else: choose another --out, or take them away.")


def prepare(
    run: Path, out: Path, name: str | None, repo: str | None, licence: str | None, uploads: bool
) -> manifest.Weights:
    """Checks a run, writes its release, and returns its entry for the manifest."""
    settings, metrics, config = read_run(run)
    data = settings["settings"]["data"].partition(":")[0]
    model_name = config["architecture"].partition(".")[0]
    name = name or f"{model_name}.{data}"
    if not re.fullmatch(rf"{re.escape(model_name)}\.[A-Za-z0-9_-]+", name):  # what create_model makes of a name
        raise ValueError(f"--name must be {model_name}.<tag>, a tag of letters, digits, _ and -, got {name!r}.")
    if repo is not None and not hub.is_repository(repo):
        raise ValueError(f"--repo must be owner/name on the Hub, got {repo!r}.")
    plan = manifest.read().get(name)
    licence = licence or (plan.licence if plan else None) or ("apache-2.0" if data == "synthetic" else None)
    if licence is None:
        raise ValueError("say by --licence under which licence the weights may be used, such as cc-by-nc-4.0.")
    checksums = {file: sha256_of(run / file) for file in ("config.json", "model.safetensors")}
    model = temporal_agg.create_model(f"local-dir:{run}")
    print(f"{check_embeddings(model, run)} embeddings are reproduced.")

    metrics, settings = (without_paths(found, settings, run) for found in (metrics, settings))
    check_place(out, settings)
    what, terms = DATA.get(data, (data, OWN_TERMS))
    started = [key for key in ("backbone_pretrained", "backbone_weights") if settings["settings"].get(key)]
    start = f"; the backbone started from weights of {config['encoder']['backbone']}"
    weights = manifest.Weights(
        name=name,
        released=False,
        repo=repo or (plan.repo if plan else f"{manifest.owner()}/{name}"),
        revision=None,
        sha256=checksums["model.safetensors"],
        size=(run / "model.safetensors").stat().st_size,
        training_data=what + (start if started else ""),
        training_data_licence=terms,
        licence=licence,
        metrics={key: round(metrics[key], 4) for key in METRICS},
        protocol=protocol_of(metrics, model, settings["settings"]),
        command=command_of(settings["environment"]),
    )
    # A repository that is only planned may be anybody's by the time that somebody reads the card.
    place = out.name if out.is_absolute() else out.as_posix()
    source = f"hf-hub:{weights.repo}" if repo or uploads else f"local-dir:{place}"
    text = card(weights, settings, metrics, config, model, source)
    write_json(out / "settings.json", settings)
    write_json(out / "metrics.json", metrics)
    for file, checksum in checksums.items():
        replace_file(out / file, copier(run / file))
        if sha256_of(out / file) != checksum:
            raise ValueError(f"{run / file} was changed while it was published: start again.")
    write_text(out / "README.md", text)
    return weights


def copier(source: Path) -> Callable[[Path], object]:
    return lambda temporary: temporary.write_bytes(source.read_bytes())


@common.own_defaults()
def main(argv: list[str] | None = None) -> manifest.Weights:
    parser = common.parser_of(__doc__ or "")
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
    with common.one_line("publish.py", TypeError):
        if args.manifest:
            read_json(args.manifest)  # what is wrong with it shows before anything is uploaded
        missing = [name for name in RUN_FILES if not (args.run / name).is_file()]
        if missing:
            raise ValueError(
                f"{args.run} is no finished run of recipes/train.py: {', '.join(missing)} is missing. The command that "
                "started it goes on with it."
            )
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / ".lock", str(out)):
            sweep(out)
            weights = prepare(args.run, out, args.name, args.repo, args.licence, not args.dry_run)
            if not args.dry_run:
                commit = hub.upload(
                    out, weights.repo, None, args.private, None, f"Release {weights.name}", list(RELEASE)
                )
                weights = dataclasses.replace(weights, released=True, revision=commit)
        if args.manifest:
            manifest.write(weights, args.manifest)
    where = "holds the release; nothing is uploaded" if args.dry_run else f"is at {weights.repo}@{weights.revision}"
    print(f"{out} {where}.")
    print(json.dumps({weights.name: {k: v for k, v in dataclasses.asdict(weights).items() if k != "name"}}, indent=2))
    return weights


if __name__ == "__main__":
    common.run(main, "the same command starts again, and sends nothing twice")
