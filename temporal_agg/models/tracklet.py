"""Clips -> embeddings: a frame encoder, then an aggregator."""

import dataclasses

from torch import Tensor, nn

from .. import masked
from ..aggregators.base import Aggregator, Details
from ..aggregators.registry import ClipConfig, registry_entry
from .encoder import check_images
from .hub import HubMixin

__all__ = ["TrackletModel"]


class TrackletModel(HubMixin, nn.Module):
    """A frame encoder and an aggregator: clips ``[B, T, 3, H, W]`` -> embeddings ``[B, D]``.

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
    """

    def __init__(self, encoder: nn.Module, aggregator: Aggregator, clip: ClipConfig | None = None):
        super().__init__()
        if encoder.num_features != aggregator.in_features:
            raise ValueError(
                f"the encoder gives {encoder.num_features} channels and the aggregator takes {aggregator.in_features}: "
                f"build it with in_features={encoder.num_features}."
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
    def data_config(self) -> dict:
        return self.encoder.data_config

    def encode_frames(self, frames: Tensor, flow: Tensor | None = None) -> Tensor:
        """Frames ``[N, 3, H, W]`` (and flow ``[N, 2, H, W]``) -> feature maps ``[N, C, h, w]``."""
        return self.encoder(frames, flow)

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
        if mask is not None:
            masked.check(mask, clips.shape[:2])
            # NaN in padding would pass the backbone and, by 0 x NaN, reach its gradients.
            clips = masked.zero(clips, mask)
            flow = flow if flow is None else masked.zero(flow, mask)
        maps = self.encode_frames(clips.flatten(0, 1), flow if flow is None else flow.flatten(0, 1))
        frames = clips if self.aggregator.needs_frames else None
        return self.aggregator(maps.unflatten(0, clips.shape[:2]), mask, frames=frames, return_details=return_details)
