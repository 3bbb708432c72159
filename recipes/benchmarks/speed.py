"""What the library costs: milliseconds and peak memory, against what one would write, or the network alone.

    python recipes/benchmarks/speed.py aggregators                               # all of them; maps of 256x128 frames
    python recipes/benchmarks/speed.py aggregators --names gsta,grl --device cuda --dtype bfloat16 --out bench.json
    python recipes/benchmarks/speed.py aggregators --names fgra --frames 6 --options num_regions=8 --backbone none
    python recipes/benchmarks/speed.py aggregators --names "" --systems star_resnet50       # against mean_resnet50
    python recipes/benchmarks/speed.py aggregators --compile --no-memory         # what torch.compile gains
    python recipes/benchmarks/speed.py aggregators --names "" --systems gltr_resnet50 --batch 1 --export --no-memory
    python recipes/benchmarks/speed.py retrieval                                 # at the sizes of MARS and LS-VID
    python recipes/benchmarks/speed.py retrieval --structure random --skip-dense --device cuda
    python recipes/benchmarks/speed.py embed --models resnet50,mobilenetv2_100   # against the bare backbone
    python recipes/benchmarks/speed.py train --models resnet50@256x128           # against a bare loop
    python recipes/benchmarks/speed.py stream                                    # 50 tracks against the bare backbone
    python recipes/benchmarks/speed.py long --names gltr,robust --frames 20000   # one tracklet, time and memory
    python recipes/benchmarks/speed.py search --sizes 1000x200000 --dims 512     # against the matrix product
    python recipes/benchmarks/speed.py all --out mine.json                       # each of them, in one file
    python recipes/benchmarks/speed.py compare old.json new.json                 # what became slower; exit code 1 then
    python recipes/benchmarks/speed.py page                                      # docs/speed.md, of the file kept here

aggregators: forward is in evaluation mode without gradients; forward + backward in training mode, with gradients for
the maps and all parameters. Times are medians; the runs of an aggregator, of its literal form (literal.py) and of mean
pooling alternate, so that a busy machine is busy for all of them. Half precision is autocast, on maps of that type.
--export times forward alone, also of the module that torch.export makes ("exported"), and of the ONNX file that
export_onnx writes, run by onnxruntime on the CPU; both for clips of one length, without a mask.

The backbone runs on one batch of --batch x --frames frames, and the share compares time per frame: LOGA takes clips of
ten frames whatever --frames says. Where the maps asked for need it, the stride of a ResNet's last stage is removed.
Systems are compared with mean pooling behind the same backbone at the same stride; STAR gets optical flow.

retrieval: Euclidean distances, evaluation, and re-ranking from the embeddings on, against plain numpy on the CPU
(literal_retrieval.py), the runs of one form after those of the other. "argsort" is np.argsort of all rows,
with which a plain evaluation begins; "published" is the re-ranking in the steps of its authors' code. Embeddings
are random: clustered, an identity's centre with noise of 3 times its spread (at 2048 dimensions and the sizes of MARS
mAP is near 75%); or without any structure, where rankings have hubs, items that are near to very many.

embed: whole tracklets in memory, against the backbone on frames that are normalised already, its weights in the memory
format that suits it. stream: a crop of each of many tracks, in sizes of their own, at a time, and the embedding of
every track after it, against the same backbone on as many frames. train: steps of train.py without checkpoints, loader
and all, against forward, backward and step on batches that are there. long: one tracklet, against mean pooling; its
memory is what comes on top of model and frames. search: the k nearest by cosine, against the product of both matrices,
in memory, and by the command from file to file; "sorted" is plain numpy from file to file, which sorts whole rows.

compare takes ratios where a run has them, so that files of two machines can be compared; the noise is that of the runs.

Peak memory is what a call adds to what was there before it (parameters, inputs); gradients count. On a GPU it is what
torch allocates; on a CPU (Linux only) how much the resident memory of a fresh process grows, to about 1 MB.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import results_of_speed
import torch
from measuring import peak_command
from of_loops import embed_command, long_command, stream_command, train_command
from of_models import aggregators_command
from of_retrieval import retrieval_command, search_command

from temporal_agg.aggregators import create_aggregator, list_aggregators
from temporal_agg.files import read_text


def parse(argv: list[str]) -> tuple[Callable, argparse.Namespace]:
    parser = common.parser_of(__doc__ or "")
    commands = parser.add_subparsers(required=True, metavar=" | ".join([*PARTS, "all", "compare", "page"]))

    text = "time and memory of aggregators, and of whole models"
    sub = commands.add_parser(
        "aggregators", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    every = ",".join(list_aggregators())
    sub.add_argument("--names", type=listed, default=every, help="aggregators, by comma; an empty string for none")
    sub.add_argument("--systems", type=listed, default="", help="whole models, by comma, such as star_resnet50")
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

    add_others(commands)
    hidden = commands.add_parser("_peak")
    hidden.add_argument("cases")
    hidden.set_defaults(command=peak_command)

    args = parser.parse_args(argv)
    command = vars(args).pop("command")
    if command is not page_command:
        check_place(parser, getattr(args, "out", None))
    if "sizes" in args:
        try:
            args.sizes = [(int(q), int(g)) for q, g in (size.lower().split("x") for size in args.sizes.split(","))]
        except ValueError:
            ranked.error(f"--sizes must be QUERIESxGALLERY, by comma, such as 1980x11310, got {args.sizes!r}")
    if "size" in args:
        try:
            for size in [args.size, *(model.split("@")[1] for model in getattr(args, "models", ()) if "@" in model)]:
                common.image_size(size)
        except ValueError as error:
            parser.error(str(error))
    if command is aggregators_command:
        if not args.names + args.systems:
            sub.error("nothing to measure: pass --names or --systems")
        try:
            args.options = common.key_values(args.options)
        except ValueError as error:
            sub.error(f"--options {error}" if "KEY=VALUE" in str(error) else str(error))
        if args.export and (args.device != "cpu" or args.dtype != "float32"):
            sub.error(f"--export is for the CPU and float32, got {args.device} and {args.dtype}")
        for name in args.names:
            try:
                create_aggregator(name, 32, **args.options)
            except (TypeError, ValueError) as error:
                sub.error(str(error))
    return command, args


def listed(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    parser.add_argument("--out", help="a JSON file for all numbers, every single time included")


def add_others(commands) -> None:
    """embed, train and search; and what is done with files."""
    kind = argparse.ArgumentDefaultsHelpFormatter
    for name, command, models, frames, size in (
        ("embed", embed_command, "resnet50,mobilenetv2_100,vit_small_patch16_224", 16, "256x128"),
        ("train", train_command, "resnet10t@128x64,resnet50@256x128", 4, "128x64"),
    ):
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__, formatter_class=kind)
        sizes = "" if name == "embed" else ", each with its size if it has one of its own (resnet50@256x128)"
        sub.add_argument("--models", type=listed, default=models, help=f"timm models, by comma{sizes}")
        sub.add_argument("--size", default=size, help="height x width of a frame in pixels")
        sub.add_argument("--frames", type=int, default=frames, help="of a tracklet, of a clip")
        if name == "embed":
            sub.add_argument("--tracklets", type=int, default=16, help="how many")
            sub.add_argument("--frames-per-batch", type=int, default=64, help="in one pass of the backbone")
            sub.add_argument("--half", default=fast_half(), help="a precision to time too; empty for none")
        else:
            sub.add_argument("--identities", type=int, default=8, help="in a batch, two clips each")
            sub.add_argument("--steps", type=int, default=4, help="of an epoch, which is one timed run")
            sub.add_argument("--workers", type=int, default=1, help="loader processes")
        add_common(sub, repeats=5)
        sub.set_defaults(command=command, dtype="float32")
    sub = commands.add_parser("long", help=long_command.__doc__, description=long_command.__doc__, formatter_class=kind)
    sub.add_argument("--names", type=listed, default="robust,gltr", help="aggregators, by comma")
    sub.add_argument("--frames", type=int, default=20_000, help="of the tracklet")
    sub.add_argument("--size", default="32x16", help="height x width of a frame in pixels")
    sub.add_argument("--backbone", default="resnet18", help="a timm model")
    sub.add_argument("--frames-per-batch", type=int, default=256, help="in one pass of the backbone")
    add_common(sub, repeats=1)
    sub.set_defaults(command=long_command, dtype="float32")
    sub = commands.add_parser(
        "stream", help=stream_command.__doc__, description=stream_command.__doc__, formatter_class=kind
    )
    sub.add_argument(
        "--models", type=listed, default="mean_resnet18,attention_resnet18,gltr_resnet18", help="models, by comma"
    )
    sub.add_argument("--size", default="256x128", help="height x width of a frame in pixels")
    sub.add_argument("--tracks", type=int, default=50, help="how many")
    sub.add_argument("--steps", type=int, default=1, help="frames of the video in a timed run")
    add_common(sub, repeats=7)
    sub.set_defaults(command=stream_command, dtype="float32")
    sub = commands.add_parser(
        "search", help=search_command.__doc__, description=search_command.__doc__, formatter_class=kind
    )
    sub.add_argument("--sizes", default="1000x200000", help="queries x gallery, by comma")
    sub.add_argument("--dims", type=int, default=512, help="of the embeddings")
    sub.add_argument("--k", type=int, default=20, help="how many nearest")
    add_common(sub, repeats=5)
    sub.set_defaults(command=search_command, dtype="float32")

    sub = commands.add_parser("all", help="every part in one file", formatter_class=kind)
    sub.add_argument("--out", default=str(results_of_speed.RESULTS), help="the JSON file")
    sub.add_argument("--parts", default=",".join(PARTS), help="some of them, by comma; the file keeps the others")
    sub.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    sub.set_defaults(command=all_command)
    sub = commands.add_parser("compare", help="what became slower from one file to another", formatter_class=kind)
    sub.add_argument("old", type=Path, help="a file of --out")
    sub.add_argument("new", type=Path, help="another one")
    sub.set_defaults(command=compare_command)
    sub = commands.add_parser("page", help="the documentation's page of the kept file", formatter_class=kind)
    sub.add_argument("--results", type=Path, default=results_of_speed.RESULTS, help="the file")
    sub.add_argument("--out", type=Path, default=results_of_speed.PAGE, help="the page")
    sub.set_defaults(command=page_command)


def fast_half() -> str:
    """bfloat16 where the processor computes in it; elsewhere it takes many times as long as float32."""
    tests = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return "bfloat16" if torch.cuda.is_available() or any(test and test() for test in tests) else ""


def check_place(parser: argparse.ArgumentParser, out: str | None) -> None:
    """Refuses to write over what is no result of an earlier command, before anything is measured."""
    if out and Path(out).expanduser().exists():
        try:
            results_of_speed.read(Path(out).expanduser())
        except (OSError, ValueError) as error:
            parser.error(f"--out would be written over: {error}")


PARTS = {  # what "all" measures, and what of it in little
    "embed": ("--tracklets 8 --repeats 8", "--models resnet10t --size 64x32 --tracklets 4 --repeats 2"),
    "stream": ("--repeats 15", "--models mean_resnet10t --size 64x32 --tracks 5 --repeats 2"),
    "train": ("--identities 4 --repeats 3", "--models resnet10t --size 64x32 --repeats 2"),
    "long": ("", "--names mean --frames 50 --backbone resnet10t --no-memory"),
    "aggregators": (
        "--batch 4 --repeats 3",
        "--channels 64 --height 4 --width 2 --size 64x32 --backbone none --repeats 2 --no-memory",
    ),
    "retrieval": ("--sizes 1980x11310 --repeats 1", "--sizes 200x1000 --no-memory"),
    "search": ("", "--sizes 100x2000 --repeats 2"),
}


def all_command(args: argparse.Namespace) -> dict:
    path = Path(args.out).expanduser()
    parts = results_of_speed.read(path) if path.exists() else {}
    wanted = args.parts.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        raise ValueError(f"--parts has no {', '.join(map(repr, unknown))}; it has {', '.join(PARTS)}.")
    for name, (options, little) in PARTS.items():
        if name not in wanted:
            continue
        command, own = parse([name, *options.split(), *(little.split() if args.quick else [])])
        print(f"\n{name}", flush=True)
        parts[name] = command(own)
        common.write_json(path, {"parts": parts})  # what is measured stays, if the next one is stopped
    return {"parts": parts}


def compare_command(args: argparse.Namespace) -> int:
    rows = results_of_speed.compare(results_of_speed.read(args.old), results_of_speed.read(args.new))
    if not rows:
        raise ValueError(f"{args.old} and {args.new} have measured nothing that is the same.")
    print(results_of_speed.table(rows))
    slower = [name for name, *_, worse in rows if worse]
    print(f"\n{len(slower)} of {len(rows)} became slower" + "".join(f"\n  {name}" for name in slower))
    return 1 if slower else 0


def page_command(args: argparse.Namespace) -> int:
    parts = results_of_speed.read(args.results, results_of_speed.ABOUT)
    page = results_of_speed.page(parts, results_of_speed.kept_elsewhere(args.results))
    if args.out.exists() and page.partition("\n")[0] != read_text(args.out).partition("\n")[0]:
        raise ValueError(f"--out would be written over, and is no such page: {args.out}.")
    common.write_text(args.out, page)
    return 0


def main(argv: list[str] | None = None):
    command, args = parse(sys.argv[1:] if argv is None else argv)
    if command is retrieval_command and argv is None and os.environ.get("OPENBLAS_NUM_THREADS") != str(args.threads):
        # numpy asks for its number of threads once, when it is imported: start anew.
        os.execve(sys.executable, sys.orig_argv, os.environ | {"OPENBLAS_NUM_THREADS": str(args.threads)})
    with common.one_line("speed.py"):
        return command(args)


if __name__ == "__main__":
    common.run(main, "nothing was written")
