"""Figures of results, and of what a model sees in a tracklet. They need matplotlib (``temporal-agg[plot]``).

Each function returns a ``matplotlib.figure.Figure``, for a notebook to show or ``savefig`` to write. Those that look
into a model cut the tracklet as ``model.clip`` says, and run the model in evaluation mode.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .aggregators import Aggregator, Details
from .data import ClipTransform, Tracklet, check_flow, cut_tracklet
from .inference import embed_tracklets
from .retrieval.evaluate import ranked_gallery

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

    from .models import TrackletModel

__all__ = [
    "cmc",
    "correlation_maps",
    "embedding_map",
    "fgra_regions",
    "frame_weights",
    "laq_parts",
    "ranked_lists",
    "tsa_mask",
]

HIT, WRONG, QUERY = "#1a9850", "#d73027", "#4d4d4d"
SHOWN, OTHER = "#2b5c8a", "#a9c6e0"  # the bars of frames that are drawn, and of the others
ENCODE = 64  # frames in one pass of the backbone
FOR = {  # the figures that not every aggregator can fill
    "correlation_maps": "grl and grl_released",
    "fgra_regions": "fgra with a local branch",
    "laq_parts": "loga with any assembly but gcq",
    "tsa_mask": "gltr with tsa=True and gltr_released",
}


def _figure(layout: str = "constrained", **options) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install temporal-agg[plot]") from error
    return Figure(layout=layout, **options)


def cmc(curves: Mapping[str, Sequence[float] | np.ndarray], title: str = "") -> "Figure":
    """Draws cumulative matching characteristics.

    Args:
        curves: the label of each curve, and its values by rank, as fractions (``RetrievalMetrics.cmc``).
        title: above the axes.

    Raises:
        ImportError: no matplotlib.
    """
    figure = _figure(figsize=(5, 3.5))
    axes = figure.subplots()
    longest = 1
    for label, curve in curves.items():
        longest = max(longest, len(curve))
        axes.plot(range(1, len(curve) + 1), 100 * np.asarray(curve), marker="o", markersize=3, label=label)
    axes.set(xlabel="rank", ylabel="queries with a match up to this rank, %", title=title)
    axes.set_xticks([rank for rank in (1, 5, 10, 15, 20, 30, 40, 50) if rank <= longest])
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def ranked_lists(
    distances: np.ndarray,
    queries: Sequence[Tracklet],
    gallery: Sequence[Tracklet],
    rows: Sequence[int],
    *,
    query_index: Sequence[int] | None = None,
    ranks: int = 10,
    titles: Sequence[str] | None = None,
) -> "Figure":
    """Draws what some queries found: the middle frame of each tracklet, matches framed green and wrong ones red.

    What an evaluation ignores (junk, the query itself, the same person in the same camera) is left out.

    Args:
        distances: ``[Q, G]``.
        queries: the Q query tracklets.
        gallery: the G gallery tracklets.
        rows: the queries to draw, one in a row.
        query_index: as in :func:`temporal_agg.evaluate`.
        ranks: how many of the list to draw.
        titles: at the left, one for each of ``rows``; None = the query's name.

    Raises:
        ImportError: no matplotlib.
    """
    figure = _figure(figsize=(0.75 * (ranks + 1) + 0.3, 1.75 * len(rows)))
    grid = figure.subplots(len(rows), ranks + 1, squeeze=False)
    pids, cams = (np.array([getattr(t, key) for t in gallery]) for key in ("pid", "camera"))
    for axes, q, i in zip(grid, rows, range(len(rows)), strict=True):
        query = queries[q]
        own = -1 if query_index is None else query_index[q]
        order = ranked_gallery(np.asarray(distances[q]), query.pid, query.camera, pids, cams, own)[:ranks]
        _draw(axes[0], _middle(query), QUERY)
        axes[0].set_ylabel(textwrap.fill(titles[i] if titles else query.name, 26), fontsize=6)
        for rank, (place, g) in enumerate(zip(axes[1:], order, strict=False), 1):
            _draw(place, _middle(gallery[g]), HIT if pids[g] == query.pid else WRONG)
            place.set_title(f"{rank}: {distances[q][g]:.3f}", fontsize=6)
        for place in axes[1 + len(order) :]:
            place.axis("off")
    return figure


def embedding_map(
    embeddings: "Tensor | np.ndarray | TrackletModel", pids: Sequence[int] | Sequence[Tracklet], title: str = ""
) -> "Figure":
    """Draws embeddings in the plane of their two greatest principal components, a colour and marker per identity.

    Args:
        embeddings: ``[N, D]``; or a model that embeds the tracklets, L2-normalised if it compares them by cosine.
        pids: the N identities, negative = junk; or the tracklets to embed.
        title: above the axes.

    Raises:
        ImportError: no matplotlib.
        ValueError: not one identity for each embedding, or none at all.
    """
    if isinstance(embeddings, nn.Module):
        model, tracklets = _model(embeddings), pids
        embeddings, pids = embed_tracklets(model, tracklets, progress=False), [t.pid for t in tracklets]
        if model.clip.distance == "cosine":
            embeddings = F.normalize(embeddings)
    x = torch.as_tensor(embeddings).detach().cpu().double()
    pids = np.asarray(pids)
    if x.dim() != 2 or x.numel() == 0 or pids.shape != x.shape[:1]:
        raise ValueError(f"expected embeddings [N, D] and N identities, got {list(x.shape)} and {list(pids.shape)}.")
    points, shares = _principal_components(x)
    figure = _figure(figsize=(6, 4.5))
    axes = figure.subplots()
    for i, pid in enumerate(np.unique(pids[pids >= 0])):
        axes.scatter(*points[pids == pid].T, s=24, color=f"C{i % 10}", marker="os^Dv*PX<>"[i // 10 % 10], label=pid)
    if (pids < 0).any():
        axes.scatter(*points[pids < 0].T, s=12, color="0.7", marker=".", label="junk", zorder=0)
    if len(axes.collections) <= 20:
        axes.legend(title="identity", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    labels = [f"component {i}, {100 * share:.0f} % of the variance" for i, share in enumerate(shares, 1)]
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    return figure


def frame_weights(
    model: "TrackletModel | Details", tracklet: Tracklet | Sequence[Tensor], *, clip: int | None = None, shown: int = 12
) -> "Figure":
    """Draws the frames of a tracklet and how much each one counted; every aggregator has these weights.

    A tracklet's embedding is the mean of its clips' embeddings, so a frame's weight is the mean of what it has in them,
    nothing where it is in none, and more where a clip is filled up with it. The dashed line is where all the frames
    that were read would count the same.

    Args:
        model: a model; or the :class:`~temporal_agg.Details` of clips that went through an aggregator.
        tracklet: its frames. For ``Details``, the T of the clip: a tracklet, or uint8 ``[3, h, w]`` each; what stands
            for padding is not drawn.
        clip: one of the clips that the tracklet is cut into, alone. For ``Details``, which one of the batch (None = 0).
        shown: the most frames to draw: evenly chosen, but the one that counts most is among them. The bars have all.

    Raises:
        ImportError: no matplotlib.
        TypeError: neither a model nor ``Details``.
        ValueError: no such clip, frames that do not fit ``Details``, or ``shown`` below 1.
    """
    parts = _clips(model, tracklet, clip)
    weights = np.zeros(len(tracklet))
    for part in parts:
        np.add.at(weights, part.numbers, _numpy(part.details.frame_weights[0]) / len(parts))
    read = np.unique(np.concatenate([part.numbers[part.real] for part in parts]))
    chosen = read[_spread(len(read), shown, weights[read])]
    figure = _figure(figsize=(max(4, 0.8 * len(chosen)), 3.6))
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    _strip(above, tracklet, chosen, [f"{number}\n{weights[number]:.3f}" for number in chosen])
    axes = below.subplots()
    axes.bar(read, weights[read], color=[SHOWN if number in chosen else OTHER for number in read])
    axes.axhline(1 / len(read), color="0.3", linestyle="--", linewidth=0.8)
    axes.set_xticks(chosen, chosen, fontsize=7)
    axes.set(xlabel="frame", ylabel="weight", xlim=(-0.7, len(tracklet) - 0.3))
    return figure


def laq_parts(model: "TrackletModel", tracklet: Tracklet, *, clip: int = 0, shown: int = 12) -> "Figure":
    """Draws LAQ's parts (LOGA): the importance of each part of each frame, Eq. 5, and the frames' weights w_l.

    Grey is what makes no whole part, and LAQ does not read.

    Args:
        model: one with LAQ.
        tracklet: its frames.
        clip: which of its clips.
        shown: the most frames to draw, evenly chosen.

    Raises:
        ImportError: no matplotlib.
        TypeError: no model.
        ValueError: no such clip, a model without LAQ, or ``shown`` below 1.
    """
    laq = getattr(_model(model).aggregator, "laq", None)
    if laq is None:
        raise ValueError(_without("laq_parts", model))
    (part,) = _clips(model, tracklet, clip)
    read = part.features if model.aggregator.quality == "features" else part.inputs
    with torch.inference_mode():
        pixels = laq.part_scores(read, part.details.mask)[0].repeat_interleave(laq.part_size, 1)
    H, W = read.shape[3:]
    pixels = F.pad(pixels, (0, H * W - pixels.shape[1]), value=float("nan"))  # LAQ drops what makes no whole part
    scores, weights = _numpy(pixels.unflatten(1, (H, W))), _numpy(part.details.maps["laq"][0])
    limit = np.nanmax(np.abs(scores[part.real]))
    rows = {"LAQ's parts": (scores, {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"})}
    return _map_rows(tracklet, part, shown, rows, [f"w_l {weight:.3f}" for weight in weights])


def correlation_maps(
    model: "TrackletModel | Details", tracklet: Tracklet | Sequence[Tensor], *, clip: int = 0, shown: int = 12
) -> "Figure":
    """Draws GCE's correlation maps (GRL) over the frames: R, of the high-correlation part, and 1 - R, of the low one.

    Args:
        model: a model with GCE, or ``Details``, as in :func:`frame_weights`.
        tracklet: its frames, as in :func:`frame_weights`.
        clip: which of its clips.
        shown: the most frames to draw, evenly chosen.

    Raises:
        ImportError: no matplotlib.
        TypeError: neither a model nor ``Details``.
        ValueError: no such clip, frames that do not fit, a model without GCE, or ``shown`` below 1.
    """
    part, R = _clip_with("correlation", "correlation_maps", model, tracklet, clip)
    low, high = R[part.real].min(), R[part.real].max()
    rows = {
        "high, R": (R, {"vmin": low, "vmax": high, "alpha": 0.6}),
        "low, 1 - R": (1 - R, {"vmin": 1 - high, "vmax": 1 - low, "alpha": 0.6}),
    }
    return _map_rows(tracklet, part, shown, rows, [f"{weight:.3f}" for weight in _numpy(part.details.frame_weights[0])])


def tsa_mask(
    model: "TrackletModel | Details", tracklet: Tracklet | Sequence[Tensor], *, clip: int = 0, shown: int = 12
) -> "Figure":
    """Draws TSA's T x T mask (GLTR): what each frame (column) takes from each frame (row).

    Args:
        model: a model with TSA, or ``Details``, as in :func:`frame_weights`.
        tracklet: its frames, as in :func:`frame_weights`.
        clip: which of its clips.
        shown: the most frames to draw: evenly chosen, but the one that counts most is among them.

    Raises:
        ImportError: no matplotlib.
        TypeError: neither a model nor ``Details``.
        ValueError: no such clip, frames that do not fit, a model without TSA, or ``shown`` below 1.
    """
    part, M = _clip_with("tsa", "tsa_mask", model, tracklet, clip)
    M, numbers = M[part.real][:, part.real], part.numbers[part.real]
    chosen = _spread(len(M), shown, M.sum(1))
    figure = _figure(figsize=(max(6.5, 0.8 * len(chosen)), 6.8))
    above, below = figure.subfigures(2, 1, height_ratios=[1, 3.4])
    _strip(above, tracklet, numbers[chosen], numbers[chosen])
    axes = below.subplots()
    below.colorbar(axes.imshow(M, vmin=0, interpolation="nearest"), cax=axes.inset_axes((1.04, 0, 0.05, 1)), label="M")
    ticks = {"ticks": chosen, "labels": numbers[chosen], "fontsize": 7}
    axes.set_xticks(**ticks)
    axes.set_yticks(**ticks)
    axes.set(xlabel="to frame", ylabel="from frame")
    return figure


def fgra_regions(model: "TrackletModel", tracklet: Tracklet, *, clip: int = 0, shown: int = 12) -> "Figure":
    """Draws FGRA's regions: the template stripes, where they are found in each frame, and their scores over time.

    Each region has a row: its stripe is framed in the first frame, the template, and over all frames lies the mean of
    its gates over the channels (M of Eq. 2). Plain stripes have no gates, and are framed in every frame. The scores,
    also above the frames, say how much a frame counts in a region; at the row's head is the region's own weight.

    Args:
        model: one with FGRA's local branch.
        tracklet: its frames.
        clip: which of its clips.
        shown: the most frames to draw, evenly chosen.

    Raises:
        ImportError: no matplotlib.
        TypeError: no model.
        ValueError: no such clip, a model without regions, or ``shown`` below 1.
    """
    aggregator = _model(model).aggregator
    if getattr(aggregator, "local_branch", None) is None:
        raise ValueError(_without("fgra_regions", model))
    (part,) = _clips(model, tracklet, clip)
    places = np.flatnonzero(part.real)
    chosen = places[_spread(len(places), shown)]
    images = _images(tracklet, part.numbers[chosen])
    scores = _numpy(part.details.maps["region_scores"][0])
    weights = part.details.maps.get("region_weights")
    gates = None if aggregator.gam is None else _gates(aggregator.gam, part)
    N, H = scores.shape[1], part.features.shape[3]

    figure = _figure(figsize=(max(4, 0.8 * len(chosen) + 1.2), 1.6 * N + 2))
    above, below = figure.subfigures(2, 1, height_ratios=[1.6 * N, 2])
    for n, row in enumerate(above.subplots(N, len(chosen), squeeze=False)):
        for axes, t, image in zip(row, chosen, images, strict=True):
            _draw(axes, image)
            axes.set_title(f"{part.numbers[t]}: {scores[t, n]:.3f}", fontsize=7)
            if gates is not None:
                least, most = gates[n][places].min(), gates[n][places].max()
                drawn = _overlay(axes, image, gates[n, t], vmin=least, vmax=most, alpha=0.6)
            if gates is None or t == chosen[0]:
                top, bottom = n * H // N, -(-(n + 1) * H // N)  # adaptive pooling's rows of the map
                axes.axhspan(*(image.shape[0] * y / H - 0.5 for y in (top, bottom)), fill=False, color=f"C{n}", lw=2)
        weight = "" if weights is None else f"\nweight {weights[0, n]:.3f}"
        row[0].set_ylabel(f"region {n + 1}{weight}", fontsize=7, color=f"C{n}")
        if gates is not None:
            above.colorbar(drawn, ax=list(row)).solids.set(alpha=1)
    axes = below.subplots()
    for n in range(N):
        axes.plot(part.numbers[places], scores[places, n], color=f"C{n}", marker="o", markersize=3, label=n + 1)
    axes.set_xticks(part.numbers[chosen], part.numbers[chosen], fontsize=7)
    axes.set(xlabel="frame", ylabel="score")
    axes.legend(title="region", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# What a model says of a tracklet


class _Clip(NamedTuple):
    """One clip of L frames, padding included."""

    numbers: np.ndarray  # [L], the frames' places in the tracklet
    details: Details  # of this clip alone
    inputs: Tensor | None = None  # [1, L, 3, H, W]
    features: Tensor | None = None  # [1, L, C, h, w]

    @property
    def real(self) -> np.ndarray:
        return self.details.mask[0].cpu().numpy()


def _clips(model: "TrackletModel | Details", tracklet: Tracklet | Sequence[Tensor], clip: int | None) -> list[_Clip]:
    """The one asked for, or all that the tracklet is cut into, these without inputs and features."""
    if isinstance(model, Details):
        B, T = model.mask.shape
        if len(tracklet) != T:
            raise ValueError(f"these details are of clips of {T} frames, padding included; got {len(tracklet)} frames.")
        row = slice(_within(clip or 0, B), (clip or 0) + 1)
        maps = {name: value[row] for name, value in model.maps.items()}
        return [_Clip(np.arange(T), Details(*(value[row] for value in model[:3]), maps, {}))]
    cut = _model(model).clip
    indices, mask = cut_tracklet(
        len(tracklet), cut.length, cut.test_sampling, stride=cut.stride, fill=cut.fill, tail=cut.tail
    )
    if clip is not None:
        row = slice(_within(clip, len(indices)), clip + 1)
        indices, mask = indices[row], mask[row]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            clips = (_run(model, tracklet, *one) for one in zip(indices, mask, strict=True))
            return list(clips) if clip is not None else [_Clip(*one[:2]) for one in clips]
    finally:
        for module, training in modes:
            module.training = training


def _run(model: "TrackletModel", tracklet: Tracklet, indices: Tensor, mask: Tensor) -> _Clip:
    config, device = model.data_config, next(model.parameters()).device
    transform = ClipTransform(config["input_size"][1:], config["mean"], config["std"], config["interpolation"])
    frames, flow = tracklet.load(indices), None
    if getattr(model.encoder, "uses_flow", False):
        check_flow([tracklet])
        inputs, flow = transform(frames, flow=tracklet.load_flow(indices))
    else:
        inputs = transform(frames)
    inputs = inputs.to(device)
    batches = [x.split(ENCODE) for x in ((inputs,) if flow is None else (inputs, flow.to(device)))]
    encoded = [model.encode_frames(*batch) for batch in zip(*batches, strict=True)]
    inputs, features = inputs[None], torch.cat(encoded)[None]
    frames = inputs if model.aggregator.needs_frames else None
    details = model.aggregator(features, mask[None].to(device), frames=frames, return_details=True)
    return _Clip(indices.numpy(), details, inputs, features)


def _model(model: "TrackletModel") -> "TrackletModel":
    if hasattr(model, "encode_frames"):
        return model
    hint = ""
    if isinstance(model, Aggregator):
        hint = " An aggregator alone sees no images: put a model around it, or pass what return_details=True gives."
    raise TypeError(f"expected a TrackletModel (or Details, where they are taken), got {type(model).__name__}.{hint}")


def _clip_with(
    name: str, figure: str, model: "TrackletModel | Details", tracklet: Tracklet | Sequence[Tensor], clip: int
) -> tuple[_Clip, np.ndarray]:
    (part,) = _clips(model, tracklet, clip)
    if name not in part.details.maps:
        raise ValueError(_without(figure, model))
    return part, _numpy(part.details.maps[name][0])


def _without(figure: str, model: "TrackletModel | Details") -> str:
    what = "these details have" if isinstance(model, Details) else f"{type(model.aggregator).__name__}, this model has"
    return f"{figure}: {what} nothing to draw here. It is there with {FOR[figure]}; every model has frame_weights."


def _gates(gam: nn.Module, part: _Clip) -> np.ndarray:
    """The mean of the gates M (Eqs. 1, 2) over the channels, ``[N_s, L, h, w]``."""
    norm = gam.norm
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    offset = (norm.bias - norm.running_mean * scale)[:, None, None]
    with torch.inference_mode():
        slopes = part.details.supervised["templates"][0] * scale
        gates = [torch.sigmoid(slope[:, None, None] * part.features[0] + offset).mean(1) for slope in slopes]
    return _numpy(torch.stack(gates))


def _within(clip: int, count: int) -> int:
    if not 0 <= clip < count:
        raise ValueError(f"there are {count} clips: clip must be 0 to {count - 1}, got {clip}.")
    return clip


def _principal_components(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates ``[N, 2]`` along the two greatest components, and their shares of the variance."""
    n, wide = len(x), len(x) < x.shape[1]
    x = x - x.mean(0)
    x = F.pad(x, (0, max(0, 2 - x.shape[1]), 0, max(0, 2 - n)))  # at least two of each
    variances, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)  # ascending
    variances, vectors = variances.clamp(min=0).flip(0), vectors.flip(1)[:, :2]
    points = vectors * variances[:2].sqrt() if wide else x @ vectors
    shares = variances[:2] / variances.sum().clamp(min=torch.finfo(x.dtype).tiny)
    return points[:n].numpy(), shares.numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def _map_rows(
    tracklet: Tracklet | Sequence[Tensor],
    part: _Clip,
    shown: int,
    rows: Mapping[str, tuple[np.ndarray, dict]],
    titles: Sequence[str],
) -> "Figure":
    """The frames, and under them rows of maps ``[L, h, w]`` over the frames, with ``imshow``'s options for each row."""
    places = np.flatnonzero(part.real)
    chosen = places[_spread(len(places), shown)]
    images = _images(tracklet, part.numbers[chosen])
    figure = _figure("compressed", figsize=(max(4, 0.8 * len(chosen) + 1.2), 1.65 * (1 + len(rows)) + 0.3))
    grid = figure.subplots(1 + len(rows), len(chosen), squeeze=False)
    for axes, t, image in zip(grid[0], chosen, images, strict=True):
        _draw(axes, image)
        axes.set_title(f"{part.numbers[t]}\n{titles[t]}", fontsize=7)
    for line, (label, (maps, options)) in zip(grid[1:], rows.items(), strict=True):
        for axes, t, image in zip(line, chosen, images, strict=True):
            _draw(axes, image)
            drawn = _overlay(axes, image, maps[t], **options)
        line[0].set_ylabel(label, fontsize=8)
        figure.colorbar(drawn, ax=list(line)).solids.set(alpha=1)
    return figure


def _strip(
    figure: "SubFigure", tracklet: Tracklet | Sequence[Tensor], numbers: np.ndarray, titles: Sequence[str]
) -> None:
    row = figure.subplots(1, len(numbers), squeeze=False)[0]
    for axes, image, title in zip(row, _images(tracklet, numbers), titles, strict=True):
        _draw(axes, image)
        axes.set_title(title, fontsize=7)


def _draw(axes: "Axes", image: np.ndarray, colour: str | None = None) -> None:
    axes.imshow(image, aspect="equal")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(**{"visible": False} if colour is None else {"color": colour, "linewidth": 2.5})


def _overlay(axes: "Axes", image: np.ndarray, values: np.ndarray, **options) -> "AxesImage":
    h, w = image.shape[:2]
    extent = (-0.5, w - 0.5, h - 0.5, -0.5)
    drawn = axes.imshow(values, extent=extent, **{"cmap": "magma", "interpolation": "bilinear", **options})
    drawn.set_cmap(drawn.get_cmap().with_extremes(bad="0.5"))  # NaN
    return drawn


def _images(tracklet: Tracklet | Sequence[Tensor], numbers: Iterable[int]) -> list[np.ndarray]:
    numbers = [int(number) for number in numbers]
    frames = tracklet.load(numbers) if hasattr(tracklet, "load") else [tracklet[number] for number in numbers]
    return [frame.permute(1, 2, 0).cpu().numpy() for frame in frames]


def _middle(tracklet: Tracklet) -> np.ndarray:
    return _images(tracklet, [len(tracklet) // 2])[0]


def _spread(count: int, shown: int, weights: np.ndarray | None = None) -> np.ndarray:
    """At most ``shown`` of ``count`` places, first and last among them; the heaviest takes the nearest one's place."""
    if shown < 1:
        raise ValueError(f"shown must be at least 1 frame, got {shown}.")
    places = np.linspace(0, count - 1, min(count, shown)).round().astype(int)
    if weights is not None:
        heaviest = weights.argmax()
        places[np.abs(places - heaviest).argmin()] = heaviest
    return places


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
