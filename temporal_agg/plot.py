"""Figures of results, and of what a model sees in a tracklet. They need matplotlib (``temporal-agg[plot]``).

Each function returns a ``matplotlib.figure.Figure``, for a notebook to show or ``savefig`` to write. Those that look
into a model cut the tracklet as ``model.clip`` says, and run the model in evaluation mode.
"""

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .aggregators import Aggregator, Details, MapKind
from .data import ClipTransform, Tracklet, check_flow
from .inference import embed_tracklets
from .retrieval.evaluate import ranked_gallery

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .models import TrackletModel

__all__ = ["cmc", "embedding_map", "frame_weights", "maps", "ranked_lists"]

HIT, WRONG, QUERY = "#1a9850", "#d73027", "#4d4d4d"
SHOWN, OTHER = "#2b5c8a", "#a9c6e0"  # the bars of frames that are drawn, and of the others
SERIES = (SHOWN, "#e08214", "#542788", "#1b7837", "#b2182b", "#80cdc1")  # what stands side by side
ENCODE = 64  # frames in one pass of the backbone
UNIFORM = 0.05  # what varies less has no structure: of the uniform share, of the scale
CAP = 4  # shares: from 1 / CAP of the uniform one to CAP times that
ROWS = 8  # of one map, at most
COLOURS = {"unit": "viridis", "share": "RdBu_r", "signed": "PuOr_r", "amount": "magma"}
NOTHING = 1e-6  # what is smaller is 0
FORMS = (  # of the axes that a panel takes; others have a row for each entry
    ("frames", "height", "width"),
    ("frames", "parts"),
    ("sources", "frames"),
    ("frames", "regions"),
    ("features", "frames"),
)
WEIGHTS = MapKind(("frames",), "share", "frame weights", over="frames")


def _figure(layout: Any = "constrained", **options: Any) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install temporal-agg[plot]") from error
    return Figure(layout=layout, **options)


def _text(name: str) -> str:
    """A name as it stands: no formula between two $, and with backslashes what is no text."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


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
        axes.plot(range(1, len(curve) + 1), 100 * np.asarray(curve), marker="o", markersize=3, label=_text(label))
    axes.set(xlabel="rank", ylabel="queries with a match up to this rank, %", title=_text(title))
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
        axes[0].set_ylabel(_text(textwrap.fill(titles[i] if titles else query.name, 26)), fontsize=6)
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
        model, tracklets = _model(embeddings), cast("Sequence[Tracklet]", pids)
        x, ids = embed_tracklets(model, tracklets, progress=False), np.array([t.pid for t in tracklets])
        x = F.normalize(x) if model.clip.distance == "cosine" else x
    else:
        x, ids = torch.as_tensor(embeddings), np.asarray(pids)
    x = x.detach().cpu().double()
    if x.dim() != 2 or x.numel() == 0 or ids.shape != x.shape[:1]:
        raise ValueError(f"expected embeddings [N, D] and N identities, got {list(x.shape)} and {list(ids.shape)}.")
    points, shares = _principal_components(x)
    figure = _figure(figsize=(6, 4.5))
    axes = figure.subplots()
    for i, pid in enumerate(np.unique(ids[ids >= 0])):
        across, up = points[ids == pid].T
        axes.scatter(across, up, s=24, color=f"C{i % 10}", marker="os^Dv*P"[i % 7], label=pid)
    if (ids < 0).any():
        across, up = points[ids < 0].T
        axes.scatter(across, up, s=12, color="0.7", marker=".", label="junk", zorder=0)
    if len(axes.collections) <= 20:
        axes.legend(title="identity", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    labels = [f"component {i}, {100 * share:.0f} % of the variance" for i, share in enumerate(shares, 1)]
    axes.set(xlabel=labels[0], ylabel=labels[1], title=_text(title))
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

    Example:
        >>> from temporal_agg import create_model
        >>> from temporal_agg.data import open_dataset
        >>> from temporal_agg.plot import frame_weights
        >>> tracklet = open_dataset("synthetic", num_identities=4, size=(64, 32)).query[0]
        >>> model = create_model("attention_resnet10t", img_size=(64, 32))
        >>> frame_weights(model, tracklet).savefig("weights.png")
    """
    parts = _clips(model, tracklet, clip)
    weights = np.zeros(len(tracklet))
    for part in parts:
        np.add.at(weights, part.numbers, _numpy(part.details.frame_weights[0]) / len(parts))
    read = np.unique(np.concatenate([part.numbers[part.real] for part in parts]))
    chosen = read[_spread(len(read), shown, weights[read])]
    page = _Page(tracklet, chosen, chosen, len(tracklet))
    page.frames([f"{weights[number]:.3f}" for number in chosen])
    colours = [SHOWN if number in chosen else OTHER for number in read]
    page.series(read, {"weight": weights[read]}, WEIGHTS, len(read), colours)
    return page.finished()


def maps(
    model: "TrackletModel | Details",
    tracklet: Tracklet | Sequence[Tensor],
    names: Sequence[str] | None = None,
    *,
    kinds: Mapping[str, MapKind] | None = None,
    clip: int = 0,
    shown: int = 12,
) -> "Figure":
    """Draws what an aggregator tells about a clip: the frames, their weights, and any of its maps, by their axes.

    Frames by space, by parts or by regions lie over the frames (regions as stripes, with their curves); what each frame
    takes from each frame is a matrix; frames by features an image over time, with the frames' first principal
    component below. Other axes, as the directions of time, have a row for each of their entries.

    A colour always means the same: values of the kind ``unit`` go from 0 to 1, shares are compared with the uniform one
    (from a quarter of it, or less, to four times, or more), signed values are around 0 and amounts from 0, up to the
    largest one. The heading says what range they have, and that there is no structure where they vary by 5 % or less.

    Args:
        model: a model; or the :class:`~temporal_agg.Details` of clips that went through an aggregator.
        tracklet: its frames, as in :func:`frame_weights`.
        names: of the maps, in this order; None = the frame weights and all that are there (of a model, those of
            :meth:`~temporal_agg.Aggregator.inspect`).
        kinds: for ``Details``: the aggregator's ``maps``.
        clip: which of the clips.
        shown: the most frames to draw: evenly chosen, but the one that counts most is among them.

    Raises:
        ImportError: no matplotlib.
        TypeError: neither a model nor ``Details``.
        ValueError: no such map or clip, a map that is not of its kind, frames that do not fit ``Details``, or ``shown``
            below 1.

    Example:
        >>> from temporal_agg import create_model
        >>> from temporal_agg.data import open_dataset
        >>> from temporal_agg.plot import maps
        >>> tracklet = open_dataset("synthetic", num_identities=4, size=(64, 32)).query[0]
        >>> model = create_model("grl_resnet10t", img_size=(64, 32))
        >>> sorted(model.aggregator.maps)
        ['attention', 'correlation', 'memory']
        >>> maps(model, tracklet, ["correlation"]).savefig("correlation.png")
    """
    (part,) = _clips(model, tracklet, clip)
    if not isinstance(model, Details):
        kinds = model.aggregator.maps
    found = {"frame_weights": part.details.frame_weights, **part.details.maps}
    known = {"frame_weights": WEIGHTS, **(kinds or {})}
    if undeclared := [name for name in names or found if name in found and name not in known]:
        raise ValueError(f"no MapKind says what {', '.join(undeclared)} means: pass kinds=aggregator.maps.")
    if missing := [name for name in names or () if name not in found]:
        raise ValueError(f"no map {', '.join(missing)} here; there are {', '.join(found)}.")
    drawn = [_Map(known[name], name, found[name][0], part.real) for name in names or known if name in found]
    places = np.flatnonzero(part.real)
    weights = _numpy(part.details.frame_weights[0])[places]
    chosen = _spread(len(places), shown, weights)
    page = _Page(tracklet, part.numbers[places][chosen], chosen, len(places))
    page.frames([f"{weight:.3f}" for weight in weights[chosen]])
    for (axes, _), group in itertools.groupby(drawn, lambda m: (m.kind.axes, m.kind.values)):
        if axes == ("frames",):  # side by side
            together = list(group)
            page.heading("; ".join(m.heading for m in together))
            page.series(
                np.arange(len(places)), {m.kind.title: m.values for m in together}, together[0].kind, len(places)
            )
        else:
            for m in group:
                _draw_map(page, m, part.grid)
    return page.finished()


# ----------------------------------------------------------------------------------------------------------------------
# What a model says of a tracklet


class _Clip(NamedTuple):
    """One clip of L frames, padding included."""

    numbers: np.ndarray  # [L], the frames' places in the tracklet
    details: Details  # of this clip alone
    grid: tuple[int, int] | None = None  # height, width of what the model reads

    @property
    def real(self) -> np.ndarray:
        return self.details.mask[0].cpu().numpy()


def _clips(model: "TrackletModel | Details", tracklet: Tracklet | Sequence[Tensor], clip: int | None) -> list[_Clip]:
    """The one asked for, with every map, or all that the tracklet is cut into."""
    if isinstance(model, Details):
        B, T = model.mask.shape
        if len(tracklet) != T:
            raise ValueError(f"these details are of clips of {T} frames, padding included; got {len(tracklet)} frames.")
        row = slice(_within(clip or 0, B), (clip or 0) + 1)
        maps = {name: value[row] for name, value in model.maps.items()}
        return [_Clip(np.arange(T), Details(model.embedding[row], model.mask[row], model.frame_weights[row], maps, {}))]
    indices, mask = _model(model).clip.cut(len(tracklet))
    if clip is not None:
        row = slice(_within(clip, len(indices)), clip + 1)
        indices, mask = indices[row], mask[row]
    tracklet = cast("Tracklet", tracklet)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            return [_run(model, tracklet, *one, clip is not None) for one in zip(indices, mask, strict=True)]
    finally:
        for module, training in modes:
            module.training = training


def _run(model: "TrackletModel", tracklet: Tracklet, indices: Tensor, mask: Tensor, finer: bool) -> _Clip:
    device = next(model.parameters()).device
    transform = ClipTransform.for_model(model)
    frames = tracklet.load(indices)
    flow = None
    if getattr(model.encoder, "uses_flow", False):
        check_flow([tracklet])
        flow = tracklet.load_flow(indices)
    made = transform(frames, flow=flow)
    inputs = (made,) if isinstance(made, Tensor) else made
    batches = zip(*(x.to(device).split(ENCODE) for x in inputs), strict=True)
    features, images = zip(*(model.frame_features(*batch) for batch in batches), strict=True)
    clip = (torch.cat(features)[None], mask[None].to(device))
    clip_images = None if images[0] is None else torch.cat(images)[None]
    if finer:
        details = model.aggregator.inspect(*clip, frames=clip_images)
    else:
        details = model.aggregate(*clip, images=clip_images, return_details=True)
    return _Clip(indices.numpy(), details._replace(supervised={}), tuple(model.data_config["input_size"][1:]))


def _model(model: "TrackletModel") -> "TrackletModel":
    if hasattr(model, "encode_frames"):
        return model
    hint = ""
    if isinstance(model, Aggregator):
        hint = " An aggregator alone sees no images: put a model around it, or pass what return_details=True gives."
    raise TypeError(f"expected a TrackletModel (or Details, where they are taken), got {type(model).__name__}.{hint}")


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


class _Map:
    """A map of one clip without its padding.

    Attributes:
        values: as they are.
        relative: shares as powers of two of the uniform one, as they are drawn; other values as they are.
        options: the fixed meaning of its colours, for ``imshow``, with the ``ticks`` and the ``label`` of their bar.
        heading: what it is, and what range its values have.
    """

    def __init__(self, kind: MapKind, name: str, values: Tensor, real: np.ndarray):
        x = _numpy(values)
        if x.ndim != len(kind.axes):
            raise ValueError(f"map {name} must have the axes {kind.axes} behind the batch, got {list(values.shape)}.")
        for i, axis in enumerate(kind.axes):
            if axis in ("frames", "sources"):
                x = x.compress(real, i)
        self.kind, self.values, self.relative, self.label = kind, x, x, ""
        if kind.values == "share":
            self.count = x.shape[kind.axes.index(str(kind.over))]
            low, high = self.count * float(x.min()), self.count * float(x.max())
            off = max(1 - low, high - 1)
            says = (
                f"uniform to within {100 * off:.2g} %" if off <= UNIFORM else f"{low:.2f} to {high:.2f} times uniform"
            )
            self.relative = np.log2((self.count * x).clip(1 / CAP, CAP))
            bottom, top = -np.log2(CAP), np.log2(CAP)
            self.ticks = {bottom: f"≤ 1/{CAP}", -1.0: "1/2", 0.0: "1", 1.0: "2", top: f"≥ {CAP}"}
            self.label = f"times 1/{self.count}"
        else:
            low, high = float(x.min()), float(x.max())
            top = max(-low, high)
            top = 1.0 if kind.values == "unit" or top < NOTHING else top
            bottom = -top if kind.values == "signed" else 0.0
            says = f"{low:.2g} to {high:.2g}"
            if high - low <= UNIFORM * top:
                says = f"no structure, {(low + high) / 2:.2g} to within {(high - low) / 2:.1g}"
            self.ticks = {value: f"{value:.2g}" for value in (bottom, (bottom + top) / 2, top)}
        self.options = {"cmap": COLOURS[kind.values], "vmin": bottom, "vmax": top}
        self.heading = f"{kind.title}: {says}"


def _draw_map(page: "_Page", m: _Map, grid: tuple[int, int] | None) -> None:
    """Draws a map by its axes. ``grid``: height and width of what the model reads."""
    axes = m.kind.axes
    plain = (*[axis for axis in axes if axis != "frames"][-1:], "frames") if "frames" in axes else axes[-2:]
    form = next((form for form in FORMS if set(form) <= set(axes)), plain)
    rest = tuple(axis for axis in axes if axis not in form)
    x = m.relative.transpose([axes.index(axis) for axis in rest + form])
    lead, x = x.shape[: len(rest)], x.reshape(-1, *x.shape[len(rest) :])
    rows = _spread(len(x), ROWS)
    page.heading(m.heading + (f" ({len(rows)} of {len(x)} drawn)" if len(rows) < len(x) else ""))
    labels = [" ".join(map(_entry, rest, np.unravel_index(row, lead))) for row in rows] if rest else [""]
    if form[0] != "frames":
        for picture, label in zip(x[rows], labels, strict=True):
            page.image(np.atleast_2d(picture), label, m, form)
            if form == ("features", "frames") and m.kind.values != "share":
                page.component(picture.T)
        return
    pictures = x[rows][:, page.places]
    if form == ("frames", "parts"):
        pictures = _laid_out(pictures, grid or page.images[0].shape[:2])
    if form == ("frames", "regions"):
        pictures = pictures[..., None]
    page.overlays(pictures, labels, m, stripes=lead[0] if rest == ("regions",) else 0)
    if form == ("frames", "regions") and not rest:
        curves = m.values if axes == form else m.values.T
        series = {_entry("regions", n): curve for n, curve in enumerate(curves.T)}
        page.series(np.arange(len(curves)), series, m.kind, getattr(m, "count", 0), lines=True)


def _entry(axis: str, i: int) -> str:
    return ("forward", "backward")[i] if axis == "directions" and i < 2 else f"{axis.removesuffix('s')} {i + 1}"


def _laid_out(parts: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Parts ``[..., M]``, runs of equal length over a frame's pixels in reading order: ``[..., height, width]``.

    NaN is what makes no whole part.
    """
    M, pixels = parts.shape[-1], grid[0] * grid[1]
    part = np.arange(pixels) // (pixels // M) if pixels >= M else np.arange(pixels) * M // pixels
    return np.where(part < M, parts[..., part.clip(max=M - 1)], np.nan).reshape(*parts.shape[:-1], *grid)


class _Page:
    """Panels below each other, over the columns of the frames that are drawn. All lengths are in inches.

    Args:
        tracklet: the frames.
        numbers: of the frames that are drawn.
        places: where these stand on axes over time.
        span: the length of such axes.
    """

    left, right, gap = 1.0, 1.15, 0.05

    def __init__(self, tracklet: Tracklet | Sequence[Tensor], numbers: np.ndarray, places: np.ndarray, span: int):
        self.images = _images(tracklet, numbers)
        self.numbers, self.places, self.span = [str(number) for number in numbers], places, span
        self.cell = min(1.2, max(0.75, 3.6 / len(numbers)))
        self.width = self.cell * len(numbers)
        self.tall = self.cell * min(3.0, max(image.shape[0] / image.shape[1] for image in self.images))
        self.centres = self.cell * (np.arange(len(numbers)) + 0.5)
        self.page = _figure(layout=None)
        self.y = 0.1  # from the top
        self.boxes: list[tuple[Axes, float, float, float, float]] = []

    def axes(self, height: float, x: float = 0.0, width: float | None = None, y: float = 0.0) -> "Axes":
        """Axes at the place reached; ``x`` to the right, ``y`` down."""
        axes = self.page.add_axes((0, 0, 1, 1))
        self.boxes.append((axes, x, self.y + y, self.width if width is None else width, height))
        return axes

    def finished(self) -> "Figure":
        W, H = self.left + self.width + self.right, self.y + 0.05
        self.page.set_size_inches(W, H)
        for axes, x, y, width, height in self.boxes:
            axes.set_position(((self.left + x) / W, 1 - (y + height) / H, width / W, height / H))
        return self.page

    def heading(self, text: str) -> None:
        wide = self.left + self.width + self.right
        lines = textwrap.wrap(text, int(14.5 * wide))
        height = 0.15 * len(lines)
        axes = self.axes(height, -self.left, wide, 0.15)
        axes.axis("off")
        axes.text(0.01, 0, _text("\n".join(lines)), fontsize=8, va="bottom")
        self.y += height + 0.22

    def frames(self, titles: Sequence[str]) -> None:
        self.y += 0.3
        axes = self._row(self.images)
        labels = [f"{number}\n{title}" for number, title in zip(self.numbers, titles, strict=True)]
        axes.set_xticks(self.centres, labels, fontsize=7)
        axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, pad=1)
        self.y += self.tall

    def overlays(self, pictures: np.ndarray, labels: Sequence[str], m: _Map, stripes: int = 0) -> None:
        """Maps ``[rows, frames, h, w]`` over the frames in grey. ``stripes``: the rows are that many regions."""
        grey = [np.broadcast_to(image.mean(2, keepdims=True), image.shape).astype(np.uint8) for image in self.images]
        smooth = "bilinear" if "height" in m.kind.axes else "nearest"
        self._bar(m, len(labels) * self.tall)
        for n, (row, label) in enumerate(zip(pictures, labels, strict=True)):
            axes = self._row(grey)
            axes.set_xticks([])
            axes.set_ylabel(label, fontsize=8)
            boxes = [image.get_extent() for image in axes.images]
            for box, picture in zip(boxes, row, strict=True):
                self._image(axes, picture, m, extent=box, alpha=0.6, interpolation=smooth)
            if stripes:
                x0, x1, y0, y1 = boxes[0]
                top, bottom = (y1 - (y1 - y0) * k / stripes for k in (n, n + 1))
                axes.plot([x0, x1, x1, x0, x0], [top, top, bottom, bottom, top], color="#ff3b30", linewidth=1.5)
            axes.set(xlim=(0, self.width), ylim=(0, self.tall))
            self.y += self.tall

    def image(self, picture: np.ndarray, label: str, m: _Map, form: tuple[str, ...]) -> None:
        """A map ``[..., frames]`` or ``[..., places]``; the rows of sources have their pictures."""
        rows, columns = picture.shape
        sources = form[0] == "sources"
        height = 0.32 * len(self.places) + 0.3 if sources else 1.2 if rows > 12 else 0.25 * rows
        axes = self.axes(height)
        self._image(axes, picture, m)
        self._bar(m, height)
        axes.set_ylabel(label or (f"{rows} {form[0]}" if rows > 12 else ""), fontsize=7)
        axes.tick_params(labelsize=7, length=2, pad=2)
        axes.set_yticks([])
        if form[-1] == "frames":
            axes.set_xticks(self.places, self.numbers)
        elif columns <= 12:
            axes.set_xticks(range(columns), [_entry(form[-1], i) for i in range(columns)])
        if sources:
            axes.set_yticks(self.places, self.numbers)
            axes.set_ylabel("from frame", fontsize=7, labelpad=32)
            axes.set_xlabel("to frame", fontsize=7, labelpad=1)
            step = height / len(self.images)
            wide = min(0.4, 0.95 * step * self.cell / self.tall)
            tall = wide * self.tall / self.cell
            for i, image in enumerate(self.images):
                _draw(self.axes(tall, -0.22 - wide, wide, (i + 0.5) * step - tall / 2), image)
            self.y += 0.12
        self.y += height + 0.2

    def component(self, x: np.ndarray) -> None:
        """A strip of the frames ``[T, C]`` along their first principal component, in lengths of the mean frame."""
        points, shares = _principal_components(torch.as_tensor(x).double())
        along = points[:, 0] / max(float(np.linalg.norm(x, axis=1).mean()), NOTHING)
        axes = self.axes(0.2)
        axes.imshow(along[None], aspect="auto", cmap=COLOURS["signed"], vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
        text = f"PC 1, {100 * shares[0]:.0f} % of variance"
        axes.text(
            1.01,
            0.5,
            f"{along.min():.2f} to {along.max():.2f} of\nthe mean length",
            fontsize=6,
            va="center",
            transform=axes.transAxes,
        )
        axes.set_ylabel(textwrap.fill(text, 12), fontsize=6, rotation=0, ha="right", va="center")
        self.y += 0.25

    def series(
        self,
        x: np.ndarray,
        series: Mapping[str, np.ndarray],
        kind: MapKind,
        count: int,
        colours: Sequence[str] | None = None,
        lines: bool = False,
    ) -> None:
        """Values over time: bars side by side, or lines. ``count``: of the entries that share."""
        self.y += 0.08
        axes = self.axes(0.9)
        wide = 0.8 / len(series)
        for i, (label, values) in enumerate(series.items()):
            name = textwrap.fill(label, 17)
            if lines:
                axes.plot(x, values, color=f"C{i}", marker="o", markersize=3, linewidth=1, label=name)
            else:
                offset = wide * (i - (len(series) - 1) / 2)
                axes.bar(x + offset, values, wide, color=colours or SERIES[i % len(SERIES)], label=name)
        low, high = (
            float(f(values)) for f, values in ((np.min, list(series.values())), (np.max, list(series.values())))
        )
        top = 1.0 if kind.values == "unit" else 1.05 * max(-low, high, NOTHING)
        if kind.values == "share":
            top = max(top, 2 / count)
            axes.axhline(1 / count, color="0.3", linestyle="--", linewidth=0.8)
        axes.set(xlim=(-0.5, self.span - 0.5), ylim=(-top if kind.values == "signed" else 0, top))
        axes.set_xticks(self.places, self.numbers)
        axes.tick_params(labelsize=7, length=2, pad=2)
        axes.set_xlabel("frame", fontsize=7, labelpad=1)
        if len(series) > 1:
            axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.05), frameon=False, handlelength=1)
        else:
            axes.set_ylabel(next(iter(series)), fontsize=7)
        self.y += 1.25

    def _row(self, images: Sequence[np.ndarray]) -> "Axes":
        axes = self.axes(self.tall)
        for centre, image in zip(self.centres, images, strict=True):
            h, w = image.shape[:2]
            size = min((self.cell - self.gap) / w, (self.tall - self.gap) / h) / 2
            box = (centre - w * size, centre + w * size, self.tall / 2 - h * size, self.tall / 2 + h * size)
            axes.imshow(image, extent=box)
        axes.set(xlim=(0, self.width), ylim=(0, self.tall), yticks=[], aspect="auto")
        axes.spines[:].set_visible(False)
        return axes

    def _image(self, axes: "Axes", picture: np.ndarray, m: _Map, **options: Any) -> None:
        drawn = axes.imshow(picture, **{"aspect": "auto", "interpolation": "nearest", **m.options, **options})
        drawn.set_cmap(drawn.get_cmap().with_extremes(bad="0.5"))  # NaN

    def _bar(self, m: _Map, height: float) -> None:
        """A bar of the colours, that many ticks that they fit."""
        tall = min(1.2, max(0.2, height - 0.1))
        axes = self.axes(tall, self.width + 0.1, 0.1, 0.02)
        axes.imshow(
            np.linspace(1, 0, 256)[:, None],
            aspect="auto",
            cmap=m.options["cmap"],
            extent=(0, 1, m.options["vmin"], m.options["vmax"]),
        )
        ticks = list(m.ticks) if tall > 0.5 else sorted(m.ticks)[:: len(m.ticks) - 1]
        axes.set(xticks=[])
        axes.set_yticks(ticks, [m.ticks[tick] for tick in ticks], fontsize=7)
        axes.tick_params(left=False, labelleft=False, right=True, labelright=True, length=2, pad=2)
        if tall > 0.5:
            axes.set_ylabel(m.label, fontsize=7)
            axes.yaxis.set_label_position("right")


def _draw(axes: "Axes", image: np.ndarray, colour: str | None = None) -> None:
    axes.imshow(image, aspect="equal")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(**{"visible": False} if colour is None else {"color": colour, "linewidth": 2.5})


def _images(tracklet: Tracklet | Sequence[Tensor], numbers: Iterable[int]) -> list[np.ndarray]:
    numbers = [int(number) for number in numbers]
    load = getattr(tracklet, "load", None)
    frames = load(numbers) if load else [cast("Sequence[Tensor]", tracklet)[number] for number in numbers]
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
