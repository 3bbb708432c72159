"""Clips -> embeddings: a frame encoder, then an aggregator."""

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, overload

from torch import Tensor, nn

from .. import masked
from ..aggregators.base import Aggregator, Details
from ..aggregators.registry import ClipConfig, registry_entry
from .inputs import check_images
from .weights import unwrap

__all__ = ["TrackletModel"]


class Encoder(Protocol):
    """What a model asks of its frame encoder."""

    num_features: int
    data_config: dict[str, Any]

    def __call__(self, frames: Tensor, flow: Tensor | None = None) -> Tensor: ...


class TrackletModel(nn.Module):
    """A frame encoder and an aggregator: clips ``[B, T, 3, H, W]`` -> embeddings ``[B, D]``.

    The one way from frames to embeddings has two halves, :meth:`frame_features` and :meth:`aggregate`; a call is the
    one and then the other. Whoever keeps features between them (whole tracklets, streams, figures) calls them singly.

    In evaluation mode a masked clip gives the result of the clip made of its real frames alone. In training mode the
    BatchNorm layers of a backbone see padded frames too, as black ones: fill short tracklets by repetition there.

    Args:
        encoder: frames -> maps: a :class:`FrameEncoder`, or a module with its ``num_features`` and ``data_config``.
        aggregator: built for the encoder's ``num_features``.
        clip: how the model wants tracklets cut; None = as the aggregator's paper does.

    Attributes:
        num_features: D.
        data_config: the encoder's: size, mean, std and interpolation of the frames.
        clip: the :class:`ClipConfig`.

    Raises:
        ValueError: encoder and aggregator, or aggregator and clip, do not fit.

    Example:
        >>> import torch
        >>> from temporal_agg import FrameEncoder, TrackletModel, create_aggregator
        >>> encoder = FrameEncoder("resnet10t", img_size=(64, 32))
        >>> model = TrackletModel(encoder, create_aggregator("attention", encoder.num_features)).eval()
        >>> clips, mask = torch.randn(2, 3, 3, 64, 32), torch.tensor([[True, True, True], [True, True, False]])
        >>> details = model(clips, mask, return_details=True)
        >>> details.embedding.shape, details.frame_weights.shape
        (torch.Size([2, 512]), torch.Size([2, 3]))
    """

    encoder: nn.Module
    aggregator: Aggregator

    def __init__(self, encoder: nn.Module, aggregator: Aggregator, clip: ClipConfig | None = None):
        super().__init__()
        if (channels := cast(Encoder, unwrap(encoder)).num_features) != aggregator.in_features:
            raise ValueError(
                f"the encoder gives {channels} channels and the aggregator takes {aggregator.in_features}: "
                f"build it with in_features={channels}."
            )
        length = aggregator.clip_length
        if clip is None:
            clip = registry_entry(aggregator.config["name"]).clip if aggregator.config else ClipConfig()
            if length is not None:
                clip = dataclasses.replace(clip, length=length)
        elif length is not None and clip.length != length:
            raise ValueError(
                f"the aggregator takes clips of exactly {length} frames, but clip.length is {clip.length}: build the "
                f"aggregator with clip_length={clip.length}, or leave the length out."
            )
        self.encoder = encoder
        self.aggregator = aggregator
        self.clip = clip

    @property
    def num_features(self) -> int:
        return self.aggregator.num_features

    @property
    def data_config(self) -> dict[str, Any]:
        return cast(Encoder, unwrap(self.encoder)).data_config

    def encode_frames(self, frames: Tensor, flow: Tensor | None = None) -> Tensor:
        """Frames ``[N, 3, H, W]`` (and flow ``[N, 2, H, W]``) -> feature maps ``[N, C, h, w]``."""
        return self.encoder(frames, flow)

    def frame_features(self, frames: Tensor, flow: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """All that the aggregator reads of frames, each by itself: the first half of :meth:`forward`.

        Args:
            frames: ``[N, 3, H, W]``, normalised as ``data_config`` says.
            flow: ``[N, 2, H, W]``, the optical flow in pixels, for encoders with a stem for it.

        Returns:
            Maps ``[N, C, h, w]``, or their means over space ``[N, C]`` where the aggregator does not need maps, and
            the images ``[N, 3, H, W]``, None where it does not read them.
        """
        features = self.encode_frames(frames, flow)
        if features.dim() == 4 and not self.aggregator.needs_maps:
            features = features.mean((2, 3))
        return features, frames if self.aggregator.needs_frames else None

    @overload
    def aggregate(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        images: Tensor | None = None,
        return_details: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def aggregate(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        images: Tensor | None = None,
        return_details: Literal[True],
    ) -> Details: ...

    @overload
    def aggregate(
        self, features: Tensor, mask: Tensor | None = None, *, images: Tensor | None = None, return_details: bool
    ) -> Tensor | Details: ...

    def aggregate(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        images: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | Details:
        """Embeds clips of frames whose features are there: the second half of :meth:`forward`.

        Args:
            features: what :meth:`frame_features` gave, by clip: ``[B, T, C, h, w]`` or ``[B, T, C]``.
            mask: bool ``[B, T]``, True = a real frame; None = all are real.
            images: ``[B, T, 3, H, W]``, the images that :meth:`frame_features` gave, if it gave any.
            return_details: return :class:`Details` instead of the embedding alone.

        Returns:
            The embedding ``[B, D]``, or :class:`Details` when asked.
        """
        if return_details:
            return self.aggregator(features, mask, frames=images, return_details=True)
        return self.aggregator(features, mask, frames=images)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            clips: Tensor,
            mask: Tensor | None = None,
            *,
            flow: Tensor | None = None,
            return_details: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            clips: Tensor,
            mask: Tensor | None = None,
            *,
            flow: Tensor | None = None,
            return_details: Literal[True],
        ) -> Details: ...

        @overload
        def __call__(
            self, clips: Tensor, mask: Tensor | None = None, *, flow: Tensor | None = None, return_details: bool
        ) -> Tensor | Details: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(
        self,
        clips: Tensor,
        mask: Tensor | None = None,
        *,
        flow: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | Details:
        """Embeds clips.

        Args:
            clips: ``[B, T, 3, H, W]``, normalised as ``data_config`` says.
            mask: bool ``[B, T]``, True = a real frame; None = all are real. What padded frames hold does not matter.
            flow: ``[B, T, 2, H, W]``, the optical flow in pixels, for encoders with a stem for it.
            return_details: return :class:`Details` instead of the embedding alone.

        Returns:
            The embedding ``[B, D]``, or :class:`Details` when asked.

        Raises:
            TypeError: a tensor of the wrong kind.
            ValueError: a wrong shape, a flow for an encoder without a stem for it, or a clip without any real frame
                (checked in eager mode only).
        """
        check_images("clips", clips, 3, "B, T")
        if flow is not None:
            check_images("flow", flow, 2, "B, T")
            if flow.shape[:2] != clips.shape[:2] or flow.shape[3:] != clips.shape[3:]:
                raise ValueError(f"flow must fit the clips {list(clips.shape)}, got {list(flow.shape)}.")
        B, T = clips.shape[:2]
        if mask is not None:
            masked.check(mask, (B, T))
            # NaN in padding would pass the backbone and, by 0 x NaN, reach its gradients.
            clips = masked.zero(clips, mask)
            flow = flow if flow is None else masked.zero(flow, mask)
        features, images = self.frame_features(clips.flatten(0, 1), flow if flow is None else flow.flatten(0, 1))
        return self.aggregate(
            features.unflatten(0, (B, T)),
            mask,
            images=images if images is None else images.unflatten(0, (B, T)),
            return_details=return_details,
        )

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes ``config.json`` and ``model.safetensors``.

        Both are whole before either takes the place of what was there, and they know each other: whenever a call is
        killed, the directory holds the old model or the new one.

        Args:
            directory: made if it does not exist; files of an earlier call are replaced.

        Raises:
            ValueError: the encoder or the aggregator was built by hand, so that nothing says how to build it again.
            OSError: a file that cannot be written, by its name.
        """
        from . import hub

        hub.save(self, directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes, in one commit: all of it arrives or nothing does.

        A failed call can be repeated: what has arrived is not sent again.

        Args:
            repo_id: ``<owner>/<repository>``; made if it does not exist.
            revision: a branch, made if it does not exist; None = ``main``.
            private: of a new repository.
            token: None = the one that huggingface_hub has (``hf auth login``, ``HF_TOKEN``).
            commit_message: the first line of the commit's message.

        Returns:
            The commit. ``create_model("hf-hub:<repo_id>@<commit>")`` gets this model whatever is pushed later.

        Raises:
            ValueError: as :meth:`save_pretrained`.
        """
        from . import hub

        return hub.push(self, repo_id, revision, private, token, commit_message)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> "TrackletModel":
        """Builds a saved model and loads its weights, in evaluation mode.

        Access to the Hub is huggingface_hub's own: ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_HUB_OFFLINE``
        work as everywhere.

        Args:
            source: a directory (also as ``local-dir:<path>``), or ``hf-hub:<owner>/<repo>[@<revision>]``.
            revision: the branch, tag or commit of the Hub repository.
            cache_dir: where downloads are kept; None = where huggingface_hub keeps them.

        Returns:
            The model, on the CPU.

        Raises:
            FileNotFoundError: no such directory, repository or revision, or a file is missing in it.
            PermissionError: a gated repository.
            ConnectionError: offline, and not in the cache.
            ValueError: ``config.json`` describes no model that this version can build, the weights do not fit, they do
                not belong to the config, or they are not those that the manifest has for this commit.
        """
        from . import hub

        return hub.load(source, revision, cache_dir, cls=cls)
