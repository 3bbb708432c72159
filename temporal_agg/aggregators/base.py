"""The contract that every aggregator keeps: frame features and a mask in, one embedding per clip out.

Conventions shared by all aggregators:

* ``features`` are maps ``[B, T, C, H, W]``; aggregators with ``needs_maps = False`` also take vectors ``[B, T, C]``.
* ``mask`` is bool ``[B, T]``, True = a real frame (:mod:`temporal_agg.masked`).
* Where it can be exact (``supports_streaming``), tracklets may grow: ``begin``, ``update`` with their next frames,
  ``read`` at any time. States of several tracklets are split and put together by :func:`take` and :func:`join`.
* What a paper's losses need beside the embedding is in ``Details.supervised``, and its :class:`Criterion` stands in the
  paper's file. Classifiers, lookup tables and centres live there and not in the models, so that weights are free of
  any data set.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from .. import masked
from .._options import checked
from ..losses._checks import check_labels

__all__ = ["Aggregator", "Criterion", "Details", "MapKind", "join", "take"]

AXES = ("frames", "sources", "height", "width", "regions", "parts", "directions", "features")
VALUES = ("unit", "share", "signed", "amount")


@dataclass(frozen=True)
class MapKind:
    """What the axes of a map in :class:`Details` mean, behind the batch, and what its values are.

    Any figure of any aggregator is drawn from this (``temporal_agg.plot``).

    Attributes:
        axes: in order, of ``frames``, ``sources`` (the frames that a frame takes from), ``height`` and ``width``
            (places of the feature map), ``regions`` (of the frame, from top to bottom), ``parts`` (of the frame, in
            reading order), ``directions`` (of time, forward and backward) and ``features``.
        values: ``unit``: from 0 to 1, each by itself; ``share``: from 0, with the sum 1 over the axis ``over``;
            ``signed``: around 0; ``amount``: from 0.
        title: what a figure calls it, with the paper's letter and equation.
        over: the axis over which shares sum to 1.

    Raises:
        ValueError: an unknown axis or kind of values, or shares over no axis.
    """

    axes: tuple[str, ...]
    values: str
    title: str
    over: str | None = None

    def __post_init__(self):
        if not self.axes or not set(self.axes) <= set(AXES):
            raise ValueError(f"axes must be one or several of {', '.join(AXES)}, got {self.axes!r}.")
        if self.values not in VALUES:
            raise ValueError(f"values must be one of {', '.join(VALUES)}, got {self.values!r}.")
        if (self.values == "share") != (self.over in self.axes):
            raise ValueError(f"over must name one of the axes for shares and nothing else, got {self.over!r}.")


class Details(NamedTuple):
    """What an aggregator can tell about a clip.

    Attributes:
        embedding: ``[B, D]``.
        mask: ``[B, T]``, True = a real frame.
        frame_weights: ``[B, T]``, how much each frame counted; 0 for padding, a row sums to 1.
        maps: finer forms of the weights, by name; ``aggregator.maps`` says what their axes are.
        supervised: extra tensors that the paper's losses need, by name (see the aggregator).

    Example:
        >>> import torch
        >>> from temporal_agg import create_aggregator
        >>> aggregator = create_aggregator("mean", in_features=16)
        >>> details = aggregator(torch.randn(1, 3, 16), torch.tensor([[True, True, False]]), return_details=True)
        >>> details.frame_weights
        tensor([[0.5000, 0.5000, 0.0000]])
    """

    embedding: Tensor
    mask: Tensor
    frame_weights: Tensor
    maps: dict[str, Tensor]
    supervised: dict[str, Tensor]


# torch.export.save needs a name for a NamedTuple that it meets in a model's output.
if hasattr(_pytree, "_register_namedtuple"):  # since torch 2.4
    _pytree._register_namedtuple(Details, serialized_type_name="temporal_agg.Details")


class Aggregator(nn.Module):
    """Base class: checks the input once, then hands clean tensors to :meth:`aggregate`.

    A subclass implements :meth:`aggregate`, says what it needs by the class attributes, and registers itself with
    :func:`~temporal_agg.aggregators.registry.register_aggregator`.

    Args:
        in_features: C, the channels of a frame's features.
        num_features: D, the width of the embedding.

    Attributes:
        clip_length: the only T it takes, or None for any T >= 1.
        needs_maps: False: also takes vectors ``[B, T, C]``.
        needs_frames: True: forward wants ``frames=[B, T, 3, H, W]``.
        is_recurrent: True: loops over the frames, so that compiled and exported graphs serve one T each.
        maps: what each entry of ``Details.maps`` is. Those of :meth:`finer_maps` only :meth:`inspect` gives.

    Example:
        >>> import torch
        >>> from temporal_agg import create_aggregator
        >>> aggregator = create_aggregator("robust", in_features=64).eval()
        >>> aggregator.num_features, aggregator.needs_maps, aggregator.supports_streaming
        (64, False, True)
        >>> features, mask = torch.randn(1, 3, 64), torch.tensor([[True, False, True]])
        >>> features[0, 1] = float("nan")  # padding
        >>> torch.allclose(aggregator(features, mask), aggregator(features[:, [0, 2]]))
        True
    """

    clip_length: int | None = None
    needs_maps: bool = False
    needs_frames: bool = False
    is_recurrent: bool = False
    maps: Mapping[str, MapKind] = MappingProxyType({})
    config: dict[str, Any] | None = None  # how create_aggregator built it; None when built by hand

    def __init__(self, in_features: int, num_features: int):
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be the number of feature channels (>= 1), got {in_features}.")
        self.in_features = in_features
        self.num_features = num_features

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            features: Tensor,
            mask: Tensor | None = None,
            *,
            frames: Tensor | None = None,
            return_details: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            features: Tensor,
            mask: Tensor | None = None,
            *,
            frames: Tensor | None = None,
            return_details: Literal[True],
        ) -> Details: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        frames: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | Details:
        """Aggregates the frames of each clip.

        Args:
            features: ``[B, T, C, H, W]`` (or ``[B, T, C]`` unless ``needs_maps``), floating point.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.
            frames: ``[B, T, 3, H', W']``, the normalised images, for aggregators with ``needs_frames``.
            return_details: return :class:`Details` instead of the embedding alone.

        Returns:
            The embedding ``[B, D]``, or :class:`Details` when asked.

        Raises:
            TypeError: a tensor of the wrong kind.
            ValueError: a wrong shape, or a clip without any real frame (checked in eager mode only).
        """
        details = self.aggregate(*self._cleaned(features, mask, frames))
        return details if return_details else details.embedding

    def inspect(self, features: Tensor, mask: Tensor | None = None, *, frames: Tensor | None = None) -> Details:
        """:meth:`forward`'s details with every map that the aggregator declares, also those that cost too much for each
        call: what figures are drawn from. Arguments and errors as in :meth:`forward`."""
        details = self(features, mask, frames=frames, return_details=True)
        features, mask, frames = self._cleaned(features, mask, frames)
        counted = [(buffer, buffer.clone()) for buffer in self.buffers()] if self.training else []
        finer = self.finer_maps(features, mask, frames, details)
        for buffer, before in counted:  # BatchNorm counts the frames once; .data: a backward may still need the buffer
            buffer.data.copy_(before)
        return details._replace(maps={**details.maps, **finer})

    def finer_maps(self, features: Tensor, mask: Tensor, frames: Tensor | None, details: Details) -> dict[str, Tensor]:
        """Maps by name that only figures need, on checked input whose padded entries are 0."""
        return {}

    def aggregate(self, features: Tensor, mask: Tensor, frames: Tensor | None) -> Details:
        """The paper's formulas, on checked input whose padded entries are 0. To be implemented by the subclass."""
        raise NotImplementedError

    # Streaming. A subclass that can says so by an empty streaming_reason and has _begin, _update and _read.

    @property
    def supports_streaming(self) -> bool:
        """Whether :meth:`begin`, :meth:`update` and :meth:`read` are there, and exact with its options and its mode."""
        return not self.streaming_reason

    @property
    def streaming_reason(self) -> str:
        """Why streaming is not supported; "" where it is."""
        return "it has no streaming form"

    def begin(self, batch: int, like: Tensor | None = None) -> Any:
        """The state of ``batch`` tracklets without any frame yet.

        Args:
            batch: the number of tracklets.
            like: a tensor of the device and type that their features have; None = as the aggregator's parameters.

        Returns:
            A NamedTuple of tensors whose first dimension are the tracklets; :func:`~temporal_agg.aggregators.take`
            and :func:`~temporal_agg.aggregators.join` work on it.

        Raises:
            ValueError: an aggregator that does not support streaming (the message says why).
        """
        self._check_streaming()
        if like is None:
            like = next(self.parameters(), torch.empty(0))
        return self._begin(batch, masked.at_least_float32(like.detach().new_empty(0)))

    def update(self, state: Any, features: Tensor, mask: Tensor | None = None) -> Any:
        """Takes up the next frames of each tracklet.

        Args:
            state: of :meth:`begin` or of the update before; it stays as it is.
            features: ``[B, t, C, H, W]`` (or ``[B, t, C]`` unless ``needs_maps``), any t >= 1.
            mask: bool ``[B, t]``, True = a real frame; None = all are real. A tracklet without a real frame here stays
                what it was.

        Returns:
            The new state. The frames may be cut into updates anywhere.

        Raises:
            TypeError: a tensor of the wrong kind.
            ValueError: a wrong shape, or no streaming.
        """
        self._check_streaming()
        self._check(features, None, None)
        if len(features) != len(state[0]):
            raise ValueError(
                f"{type(self).__name__}: expected features of the state's {len(state[0])} tracklets, got "
                f"{list(features.shape)}."
            )
        if mask is None:
            return self._update(state, features, masked.all_real(features))
        masked.check(mask, (features.shape[0], features.shape[1]))
        return self._update(state, masked.zero(features, mask), mask)

    def read(self, state: Any) -> Details:
        """Details of all frames so far: the embedding that :meth:`forward` gives for them.

        ``mask`` and ``frame_weights`` have a column for each frame that the state remembers, the real ones first and in
        order, and none where it forgets them. There are no maps.

        Raises:
            ValueError: a tracklet that has no frame yet (checked in eager mode only), or no streaming.
        """
        self._check_streaming()
        empty = self._count(state) == 0
        if not masked.is_compiling() and empty.any():
            raise ValueError(
                f"{type(self).__name__}: tracklets {empty.nonzero().flatten().tolist()} of the state have no frame yet."
            )
        details = self._read(state)
        if not isinstance(details, Details):
            none = details.new_zeros(len(details), 0)
            return Details(details, none.bool(), masked.at_least_float32(none), {}, {})
        return details

    def _count(self, state: Any) -> Tensor:
        """The number of real frames of each tracklet, ``[B]``."""
        return state.mask.sum(1) if isinstance(state, Frames) else state.seen

    def _begin(self, batch: int, like: Tensor) -> Any:
        """:meth:`begin`, with ``like`` an empty tensor of at least float32."""
        raise NotImplementedError

    def _update(self, state: Any, features: Tensor, mask: Tensor) -> Any:
        """:meth:`update`, on checked input whose padded entries are 0."""
        raise NotImplementedError

    def _read(self, state: Any) -> Tensor | Details:
        """:meth:`read`, or the embedding alone where the state forgets its frames."""
        raise NotImplementedError

    def _like_parameters(self, x: Tensor) -> Tensor:
        """``x`` in the type of the parameters, after ``.half()`` too; a state is kept in at least float32."""
        parameter = next((p for p in self.parameters() if p.is_floating_point()), x)  # quantised layers have none
        return x.to(parameter.dtype)

    def _check_streaming(self) -> None:
        if self.streaming_reason:
            raise ValueError(f"{type(self).__name__} does not support streaming: {self.streaming_reason}.")

    def _cleaned(
        self, features: Tensor, mask: Tensor | None, frames: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Checked input, the mask there, padding 0."""
        self._check(features, mask, frames)
        if mask is None:
            return features, masked.all_real(features), frames
        return masked.zero(features, mask), mask, frames if frames is None else masked.zero(frames, mask)

    def _check(self, features: Tensor, mask: Tensor | None, frames: Tensor | None) -> None:
        name = type(self).__name__
        wanted = "[B, T, C, H, W]" if self.needs_maps else "[B, T, C, H, W] or [B, T, C]"
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name}: features must be a floating-point tensor {wanted}, got {got}.")
        if features.dim() not in ((5,) if self.needs_maps else (3, 5)):
            raise ValueError(f"{name}: features must have the shape {wanted}, got {list(features.shape)}.")
        B, T, C = features.shape[:3]
        if self.in_features != C:
            raise ValueError(
                f"{name}: expected C = in_features = {self.in_features} channels in dimension 2 of {wanted}, got {C} "
                f"in {list(features.shape)}. Build the aggregator with in_features={C}, or move the channels there."
            )
        if B < 1 or T < 1:
            raise ValueError(f"{name}: expected at least one clip of at least one frame, got {list(features.shape)}.")
        if self.clip_length is not None and self.clip_length != T:
            raise ValueError(
                f"{name}: takes clips of exactly {self.clip_length} frames, got {T}. Cut the tracklet into clips of "
                f"{self.clip_length} frames (repeat or pad with a mask), or build it with clip_length={T}."
            )
        if mask is not None:
            masked.check(mask, (B, T))
            if not masked.is_compiling() and not mask.any(1).all():
                empty = (~mask.any(1)).nonzero().flatten().tolist()
                raise ValueError(f"{name}: every clip needs a real frame, but the mask has none for clips {empty}.")
        if self.needs_frames and frames is None:
            raise ValueError(f"{name}: reads the images too: pass frames=[B, T, 3, H, W], the normalised clip.")
        if frames is not None and (frames.dim() != 5 or frames.shape[:2] != (B, T) or frames.shape[2] != 3):
            raise ValueError(f"{name}: frames must have the shape {[B, T, 3]} + [H, W], got {list(frames.shape)}.")

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.num_features}"


def check_range(low: int, high: float = math.inf, **options: float) -> None:
    """Raises a ValueError that names the option which is out of range."""
    for name, value in options.items():
        if not low <= value <= high:
            wanted = f"from {low} to {high}" if high < math.inf else f"at least {low}"
            raise ValueError(f"{name} must be {wanted}, got {value}.")


class Criterion(nn.Module):
    """Base class of a training criterion: what an aggregator hands out, plus identities -> loss terms by name.

    A subclass implements :meth:`terms` and says how the terms are weighted. It stands in its paper's file, and is
    registered with the aggregator. Terms are computed in at least float32, whatever the autocast type and the type of
    the parameters, and in float64 where the details or the parameters have it.

    Args:
        num_classes: identities in the training set; labels are 0 to ``num_classes - 1``.
        model: the model or aggregator that is trained. Details of another width are refused; None: taken as they are.

    Attributes:
        weights: the factor of each term in the total, by name; a term that is not named counts once.
        wants_pairs: True: samples 2j and 2j + 1 of a batch must be two clips of one person.
    """

    weights: Mapping[str, float] = MappingProxyType({})
    wants_pairs: bool = False
    _num_features: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = checked(cls.__init__, but=("model",))  # type: ignore[method-assign]

    @partial(checked, but=("model",))
    def __init__(self, num_classes: int, model: nn.Module | None = None):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be the number of training identities (>= 1), got {num_classes}.")
        self.num_classes = num_classes
        if model is not None:
            self._num_features = aggregator_of(model).num_features

    def forward(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        """Computes every term.

        Args:
            details: what the model returned with ``return_details=True`` for B clips.
            labels: int64 ``[B]``, class indices from 0 to ``num_classes - 1``.

        Returns:
            Each term by name, unweighted, and ``"loss"``, their weighted sum.

        Raises:
            TypeError: an embedding in place of the details, or labels that are no whole numbers.
            ValueError: not one label for each clip, or labels out of range (checked in eager mode only); details of
                another model than the criterion was made for.
        """
        labels = self._check(details, labels)
        own = dict(chain(self.named_parameters(), self.named_buffers()))
        own = {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}
        dtype = torch.float32
        for tensor in (details.embedding, *details.supervised.values(), *own.values()):
            dtype = torch.promote_types(dtype, tensor.dtype)
        if other := {name: tensor.to(dtype) for name, tensor in own.items() if tensor.dtype != dtype}:
            terms = torch.func.functional_call(self, other, (details, labels))
            with torch.no_grad():  # what a norm has learned
                for name, buffer in self.named_buffers():
                    if name in other:
                        buffer.copy_(other[name])
            return terms
        supervised = _Supervised({name: tensor.to(dtype) for name, tensor in details.supervised.items()})
        details = details._replace(embedding=details.embedding.to(dtype), supervised=supervised)
        with torch.autocast(details.embedding.device.type, enabled=False):
            terms = self.terms(details, labels)
        total = sum(
            (self.weights.get(name, 1.0) * term for name, term in terms.items()), details.embedding.new_zeros(())
        )
        return {**terms, "loss": total}

    def terms(self, details: Details, labels: Tensor) -> dict[str, Tensor]:
        """The terms by name, unweighted. To be implemented by the subclass."""
        raise NotImplementedError

    def after_step(self) -> None:
        """To be called after each optimizer step: what is updated outside autograd (lookup tables) is updated now."""
        for module in self.modules():
            step = getattr(module, "after_step", None)
            if module is not self and callable(step):
                step()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters for an optimizer; a group has options of its own where the paper trains it by other ones."""
        return [{"params": list(self.parameters())}]

    def _check(self, details: Details, labels: Tensor) -> Tensor:
        """The labels in int64."""
        name = type(self).__name__
        if not isinstance(details, Details):
            raise TypeError(
                f"{name}: expected the model's Details, got {type(details).__name__}: call the model with "
                "return_details=True."
            )
        labels = check_labels(name, labels, self.num_classes)
        if labels.shape != details.embedding.shape[:1]:
            raise ValueError(
                f"{name}: expected one label for each of the {len(details.embedding)} clips, got labels "
                f"{list(labels.shape)}."
            )
        width = details.embedding.shape[1]
        if self._num_features not in (None, width):
            raise ValueError(
                f"{name}: expected embeddings of {self._num_features} numbers, got {width}: make the criterion with "
                "the model that is trained."
            )
        return labels


class _Missing(KeyError, ValueError):
    __str__ = ValueError.__str__  # a KeyError's is a repr


class _Supervised(dict[str, Tensor]):
    """What a model hands out for its own criterion; another's is told what it misses."""

    def __missing__(self, key: str) -> Tensor:
        raise _Missing(
            f"expected supervised[{key!r}] among the details, got {', '.join(self) or 'none'}: they come from another "
            "aggregator than this criterion is for."
        )


def initial_classifier(in_features: int, num_classes: int, bias: bool = True) -> nn.Linear:
    """A linear classifier with small normal weights (standard deviation 1e-3), so that training starts at uniform."""
    classifier = nn.Linear(in_features, num_classes, bias=bias)
    nn.init.normal_(classifier.weight, std=1e-3)
    if bias:
        nn.init.zeros_(classifier.bias)
    return classifier


def aggregator_of(model: nn.Module) -> Aggregator:
    """The aggregator of a model, or the aggregator itself.

    Raises:
        TypeError: neither.
    """
    aggregator = getattr(model, "aggregator", model)
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"expected a TrackletModel or an Aggregator, got {type(model).__name__}.")
    return aggregator


def frame_vectors(features: Tensor) -> Tensor:
    """Average-pools maps ``[B, T, C, H, W]`` to ``[B, T, C]``; vectors pass through."""
    return features.mean((3, 4)) if features.dim() == 5 else features


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """``sum_t weights[b, t] x[b, t, :]``: ``[B, T, C]`` -> ``[B, C]``."""
    return torch.einsum("bt,btc->bc", weights.to(x.dtype), x)


State = TypeVar("State", bound=tuple)


def take(state: State, rows: Tensor | slice | list[int]) -> State:
    """The rows (tracklets) of a streaming state, in the order given."""
    return type(state)(*(tensor[rows] for tensor in state))


def join(states: "list[State]") -> State:
    """One streaming state of all the states' tracklets, in order. What is shorter, or has no size yet, is filled up."""
    columns = []
    for tensors in zip(*states, strict=True):
        shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        columns.append(torch.cat([_filled(tensor, shape) for tensor in tensors]))
    return type(states[0])(*columns)


def _filled(x: Tensor, shape: "list[int]") -> Tensor:
    """``x`` ``[B, *]`` with zeros behind in each dimension, to ``[B, *shape]``."""
    short = [n for size, old in zip(reversed(shape), reversed(x.shape), strict=False) for n in (0, size - old)]
    return F.pad(x, short) if any(short) else x


class Frames(NamedTuple):
    """A streaming state that remembers a vector for each frame, the real ones first and in order."""

    vectors: Tensor  # [B, t, d]
    mask: Tensor  # [B, t]

    @classmethod
    def begin(cls, batch: int, width: int, like: Tensor) -> "Frames":
        return cls(like.new_zeros(batch, 0, width), like.new_zeros(batch, 0, dtype=torch.bool))

    def add(self, vectors: Tensor, mask: Tensor) -> "Frames":
        all_vectors, all_real = torch.cat([self.vectors, vectors], 1), torch.cat([self.mask, mask], 1)
        if bool(all_real.all()):
            return Frames(all_vectors, all_real)
        order = masked.order(all_real)[:, : int(all_real.sum(1).amax())]
        return Frames(masked.take(masked.zero(all_vectors, all_real), order), all_real.gather(1, order))


class Softmaxed(NamedTuple):
    """A running softmax over the frames and the sum that it weighs, for any number of scores a frame.

    The largest score so far is taken out of the sums, so that none overflows.
    """

    highest: Tensor  # [B, *scores]
    weight: Tensor  # [B, *scores]
    total: Tensor  # [B, *scores, *rest]

    @classmethod
    def begin(cls, batch: int, scores: tuple[int, ...], rest: tuple[int, ...], like: Tensor) -> "Softmaxed":
        highest = like.new_full((batch, *scores), float("-inf"))
        return cls(highest, torch.zeros_like(highest), like.new_zeros(batch, *scores, *rest))

    def add(self, scores: Tensor, values: Tensor, mask: Tensor) -> "Softmaxed":
        """``scores`` ``[B, t, *scores]``, ``values`` ``[B, t, *scores, *rest]``, ``mask`` ``[B, t]``."""
        mask = mask.view(mask.shape + (1,) * (scores.dim() - 2))
        scores = masked.at_least_float32(scores).masked_fill(~mask, float("-inf"))
        highest = torch.maximum(self.highest, scores.amax(1))
        none = highest == float("-inf")
        base = highest.masked_fill(none, 0)
        old, new = (self.highest - base).exp(), (scores - base[:, None]).exp()
        rest = self.total.dim() - old.dim()
        weighed = new.view(new.shape + (1,) * rest) * values
        return Softmaxed(
            highest, self.weight * old + new.sum(1), self.total * old.view(old.shape + (1,) * rest) + weighed.sum(1)
        )

    def read(self) -> Tensor:
        """The weighted mean, ``[B, *scores, *rest]``."""
        return self.total / self.weight.view(self.weight.shape + (1,) * (self.total.dim() - self.weight.dim()))
