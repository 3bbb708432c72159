"""The settings of train.py: every one with its reason and range, from YAML files and the command line."""

import argparse
import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import yaml

from temporal_agg import data
from temporal_agg.files import read_text

CONFIGS = Path(__file__).resolve().parent / "configs"


def option(default, help: str, low: float = -math.inf, high: float = math.inf) -> Any:
    kind = {"default_factory": type(default)} if default in ({}, []) else {"default": default}
    return dataclasses.field(**kind, metadata={"help": help, "low": low, "high": high})


@dataclass
class Settings:
    """Every setting with its reason and its range; the YAML keys and the command line have the same names."""

    # What is trained on what.
    data: str = option("synthetic", "synthetic, folder:<root>, csv:<file>, mars:<root>, ... (or the root apart)")
    root: str = option("", "where the data set lies, if --data has its name alone")
    data_options: dict = option({}, "options of that data set, e.g. num_identities=24 seed=1")
    flow_root: str = option("", "where compute_flow.py --out put optical flow (STAR); default: beside the frames")
    split: str = option("", "of a data set with several: a number, or all for one run each (the default)")
    identity_splits: int = option(0, "pool all identities and train on K random halves; 0: the data set's own split", 0)
    model: str = option("mean_resnet10t,attention_resnet10t", "one or several of temporal_agg.list_models(), by comma")
    model_options: dict = option({}, "keyword arguments of create_model, e.g. quality=features")
    criterion: str = option("", "one of temporal_agg.list_criteria(); default: the model's own, else baseline")
    criterion_options: dict = option({}, "keyword arguments of create_criterion, e.g. margin=0.5")
    pretrained: bool = option(False, "start from the whole model's released weights (downloads them)")
    backbone_pretrained: bool = option(False, "start the backbone from timm's weights (downloads them)")
    backbone_weights: str = option("", "start the backbone from this file")
    init: str = option(
        "", "start from the encoder of this run directory, and from its aggregator where it has the same name"
    )
    stages: list = option([], "trainings in a row, as changes to these settings; each starts from the encoder before")

    # Input. 128x64 trains on a CPU; the papers use 256x128.
    size: str = option("128x64", "height x width of a frame in pixels")
    clip_length: int = option(0, "frames per training clip; 0: the model's own", 0)
    flip: float = option(0.5, "chance that a clip is mirrored: people walk both ways", 0, 1)
    pad: int = option(4, "pixels added around a frame before it is cropped back: boxes are never exact", 0)
    random_crop: float = option(1.0, "resize to this multiple of the size before a random crop", 1)
    erasing: float = option(0.0, "chance that a rectangle of a clip is erased (for long trainings)", 0, 1)
    erasing_per_frame: bool = option(False, "erase another rectangle in each frame")
    erasing_fill: str = option("zero", "zero (the mean colour) or random (random colours, as Zhong et al. have it)")

    # Batches; all counts are over all processes.
    sampler: str = option("identity", "identity (P x K), pairs (across cameras), tracklets or frames (each once)")
    identities: int = option(8, "P, identities per batch; fewer when the data set has fewer", 1)
    clips: int = option(2, "K, clips per identity, so that triplets exist", 1)
    batch_size: int = option(8, "of the other samplers: pairs, tracklets or frames", 1)
    accumulate: int = option(1, "batches per optimizer step; each is mined on its own", 1)

    # Optimisation. Adam at 1e-3 suits small backbones from scratch; fine-tuning wants about 3e-4.
    epochs: int = option(
        40, "passes over what the sampler counts: identities, tracklets or frames; 0: evaluate only", 0
    )
    optimizer: str = option("adamw", "adamw, adam or sgd")
    momentum: float = option(0.9, "of sgd", 0, 0.9999)
    nesterov: bool = option(True, "of sgd")
    lr: float = option(1e-3, "peak learning rate", 0)
    head_lr_factor: float = option(1.0, "times the learning rate for all that is new: aggregator and criterion", 0)
    lr_factors: dict = option({}, "the same for single modules of the model, e.g. aggregator.gce=1.0; 0 freezes one")
    weight_decay: float = option(5e-4, "L2; of adamw: decoupled", 0)
    no_decay_norms: bool = option(True, "no weight decay for the model's biases and norms; papers mostly decay all")
    warmup: float = option(0.1, "share of the steps in which the learning rate rises from 0", 0, 1)
    schedule: str = option("cosine", "cosine (to 0), constant, or step (x 0.1 at times)")
    step_epochs: int = option(0, "of step: every so many epochs", 0)
    step_milestones: list = option([], "of step: after these epochs", 1)

    # The run.
    seed: int = option(0, "of initialisation, sampling and augmentation", 0, 2**62)
    out: str = option("runs", "where run directories are made")
    name: str = option("", "of the run; default: made of data, model and seed; several models add theirs")
    eval_untrained: bool = option(True, "evaluate before training, too")
    eval_every: int = option(0, "evaluate every so many epochs; 0: only before and after training", 0)
    save_every: int = option(0, "write a checkpoint every so many batches; 0: after every epoch", 0)
    keep: int = option(2, "the newest checkpoints kept", 1)
    workers: int = option(1, "loader processes", 0)
    frames_per_batch: int = option(256, "frames in one pass of the backbone when evaluating", 1)
    device: str = option("auto", "auto (a GPU when there is one), cpu, cuda or cuda:<number>")
    mixed_precision: str = option("no", "no, bf16 or fp16, in training")
    grad_checkpointing: bool = option(False, "compute the backbone's activations twice instead of keeping them")
    sync_batchnorm: bool = option(False, "BatchNorm of the backbone over all processes (GPUs)")
    find_unused_parameters: bool = option(False, "of several processes, for losses that leave parts without gradients")
    compile: bool = option(False, "torch.compile")
    tensorboard: bool = option(False, "also write TensorBoard events")


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
DEFAULTS = dataclasses.asdict(Settings())
CHOICES = {
    "erasing_fill": ("zero", "random"),
    "sampler": ("identity", "pairs", "tracklets", "frames"),
    "optimizer": ("adamw", "adam", "sgd"),
    "schedule": ("cosine", "constant", "step"),
    "mixed_precision": ("no", "bf16", "fp16"),
}
# What holds for all stages of a run: a stage that says otherwise is refused.
OF_THE_RUN = (
    *("data", "root", "data_options", "flow_root", "split", "identity_splits", "stages", "out", "name", "device"),
    *("mixed_precision", "find_unused_parameters"),
)
# What may differ between a killed run and the command that goes on with it.
NOT_COMPARED = (
    *("root", "flow_root", "out", "name", "model", "stages", "workers", "frames_per_batch", "device", "tensorboard"),
    "keep",
)


# ----------------------------------------------------------------------------------------------------------------------
# Settings from files and the command line


def find_config(name: str) -> Path:
    """A file, or one of those that come with the recipe."""
    path = Path(name).expanduser()
    return CONFIGS / name if not path.exists() and (CONFIGS / name).is_file() else path


def read_config(file: Path, above: tuple[Path, ...] = ()) -> dict:
    """A YAML file; what it says goes over the file that it names as its base, in the same folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML of settings; the message names the file.
    """
    if file.resolve() in above:
        raise ValueError(f"{file} is its own base, by way of {above[-1]}.")
    try:
        content = common.read_yaml(read_text(file))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is no valid YAML: {common.one_line_of(error)}.") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold settings by name, such as 'epochs: 60'; got a {type(content).__name__}.")
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    base, datasets = values.pop("base", None), values.pop("datasets", {})
    try:
        check_types(values)
        if not isinstance(datasets, dict) or not all(isinstance(own, dict) for own in datasets.values()):
            raise ValueError(f"datasets must hold settings by the name of a data set, got {datasets!r}")
        for name, own in datasets.items():
            data.num_splits(str(name))  # knows the names
            check_types(own)
        if base is not None and not isinstance(base, str):
            raise ValueError(f"base must be the name of a file, got {base!r}")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    inherited = read_config(file.parent / base, (*above, file.resolve())) if base else {"datasets": {}}
    return {**inherited, **values, "datasets": {**inherited["datasets"], **datasets}}


def parse(argv: list[str], doc: str) -> Settings:
    """YAML first, what it says of the data set over it, then the command line; unknown keys get the nearest one."""
    parser = common.parser_of(doc, usage="train.py [--config FILE.yaml] [--SETTING VALUE ...]")
    text = "settings by name; the command line overrides them"
    parser.add_argument("--config", metavar="FILE.yaml", help=f"{text}. Here: {', '.join(shipped())}")
    for field in FIELDS.values():
        add_setting(parser, field)
    args = vars(parser.parse_args(argv))
    config = args.pop("config")
    try:
        values = read_config(find_config(config)) if config else {"datasets": {}}
        given = {key: value for key, value in args.items() if value is not None}
        for key in given:
            if isinstance(DEFAULTS[key], dict):
                try:
                    given[key] = common.key_values(given[key])
                except ValueError as error:
                    raise ValueError(f"--{key.replace('_', '-')} {error}") from None
        name = str(given.get("data", values.get("data", ""))).partition(":")[0]
        values |= values.pop("datasets").get(name, {})
        settings = checked({**values, **given})
        for i, stage in enumerate(settings.stages):
            settings.stages[i] = check_stage(f"stages[{i}]", stage, settings)
    except FileNotFoundError as error:
        parser.error(f"--config: there is no file {error.filename}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return settings


def shipped() -> list[str]:
    return sorted(file.name for file in CONFIGS.glob("*.yaml"))


def add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    flag, default = "--" + field.name.replace("_", "-"), DEFAULTS[field.name]
    text = field.metadata["help"].replace("%", "%%")
    if field.name == "stages":
        return  # in YAML only
    if isinstance(default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif isinstance(default, dict):
        parser.add_argument(flag, nargs="+", metavar="KEY=VALUE", help=text)
    elif isinstance(default, list):
        parser.add_argument(flag, nargs="*", type=int, metavar="INT", help=text)
    else:
        shown = f" ({default})" if default not in ("", 0) else ""
        parser.add_argument(flag, type=type(default), metavar=type(default).__name__.upper(), help=text + shown)


def check_types(values: dict) -> None:
    """Raises a ValueError for an unknown name, a wrong type or choice; whole numbers become float or str."""
    for key, value in values.items():
        if key not in DEFAULTS:
            near = difflib.get_close_matches(str(key), DEFAULTS, n=1)
            raise ValueError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        wanted = type(DEFAULTS[key])
        if type(value) is int and wanted in (float, str):
            values[key] = wanted(value)
        elif type(value) is not wanted:
            raise ValueError(f"{key} must be {wanted.__name__}, got {value!r}")
        if values[key] not in CHOICES.get(key, [values[key]]):
            raise ValueError(f"--{key.replace('_', '-')} must be one of {', '.join(CHOICES[key])}, got {value!r}")


def checked(values: dict) -> Settings:
    """Settings of the right names, types, choices and ranges, which fit each other.

    Raises:
        ValueError: what is wrong with one of them.
    """
    values = dict(values)
    check_types(values)
    settings = Settings(**values)
    for key, field in FIELDS.items():
        low, high = field.metadata["low"], field.metadata["high"]
        value = getattr(settings, key)
        for number in value if key == "step_milestones" else [value] if type(value) in (int, float) else []:
            if type(number) not in (int, float) or not (math.isfinite(number) and low <= number <= high):
                wanted = f"at least {low}" + (f" and at most {high}" if high < math.inf else "")
                raise ValueError(f"{key} must be {wanted if low > -math.inf else 'finite'}, got {number!r}")
    for key, value in settings.lr_factors.items():
        if not common.is_number(value) or value < 0:
            raise ValueError(f"lr_factors must be numbers of at least 0, got {key}={value!r}")
    if settings.schedule == "step" and not settings.step_epochs and not settings.step_milestones:
        raise ValueError("schedule 'step' needs step_epochs or step_milestones")
    if settings.optimizer == "sgd" and settings.nesterov and not settings.momentum:
        raise ValueError("nesterov needs a momentum above 0: pass --no-nesterov")
    if settings.pretrained and (settings.backbone_pretrained or settings.backbone_weights or settings.init):
        raise ValueError(
            "pretrained is the whole model's weights: leave out backbone_pretrained, backbone_weights, init"
        )
    if settings.backbone_pretrained and settings.backbone_weights:
        raise ValueError("backbone_pretrained and backbone_weights both name the backbone's weights: pass one of them")
    if settings.root and ":" in settings.data:
        raise ValueError(f"data says where the data set lies, {settings.data}, and root again: {settings.root}")
    if settings.flow_root and not Path(settings.flow_root).expanduser().is_dir():
        raise ValueError(f"flow_root: there is no folder {settings.flow_root}")
    names = names_of(settings)
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"model must be names by comma, each once, got {settings.model!r}")
    common.check_split(settings.split)
    common.check_device(settings.device)
    common.image_size(settings.size)
    return settings


def names_of(settings: Settings) -> list[str]:
    return [name.strip() for name in settings.model.split(",")]


def check_stage(title: str, changes: object, settings: Settings) -> dict:
    """The changes of a stage, if the recipe can do what they say; else a ValueError."""
    if not isinstance(changes, dict):
        raise ValueError(f"{title} must be settings by name, got {changes!r}")
    changes = {str(key).replace("-", "_"): value for key, value in changes.items()}
    for key in changes:
        if key in OF_THE_RUN:
            raise ValueError(f"{title} sets {key}, which holds for the whole run: set it beside stages")
    try:
        checked({**dataclasses.asdict(settings), "stages": [], **changes})
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from error
    if "," in str(changes.get("model", "")):
        raise ValueError(f"{title} takes one model, got {changes['model']!r}")
    return changes


def stages_of(name: str, settings: Settings) -> list[Settings]:
    """The settings of each training in turn."""
    whole = {**dataclasses.asdict(settings), "model": name}
    return [checked({**whole, **changes}) for changes in settings.stages or [{}]]
