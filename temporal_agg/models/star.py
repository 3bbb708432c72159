"""The frame encoder of STAR: LSTA blocks in a ResNet, and a second stem for optical flow.

Wu, Zhu, Gong: Spatio-Temporal Associative Representation for Video Person Re-Identification, BMVC 2019, Sec. 3.1, 3.2.

As a backbone it is called ``lsta_<resnet>`` and goes before any aggregator: ``mean_lsta_resnet50``. The paper's system,
``gsta_lsta_<resnet>``, has the name ``star_<resnet>`` too.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .encoder import FrameEncoder, is_resnet, register_encoder
from .inputs import check_images

__all__ = ["LSTA", "StarEncoder"]

VARIANTS = ("lsta", "7x7", "undilated", "no_spatial", "cbam", "se", "none")


class LSTA(nn.Module):
    """Channel attention, then spatial attention over three receptive fields (Eqs. 4 and 5).

    The two sigmoid gates multiply the maps as printed, without a residual: at the start, with gates near 0.5, the maps
    come out at about a quarter of their size. Eq. 5 prints one W5 for the three dilated convolutions; read as one each.

    The variants are those of the paper's ablation, whose details it does not give (ours):

    * ``lsta``: Eqs. 4 and 5.
    * ``7x7``: the spatial part is one 7x7 convolution to one channel.
    * ``undilated``: the three 3x3 convolutions have dilation 1.
    * ``no_spatial``: Eq. 4 alone.
    * ``cbam``: CBAM (ECCV 2018) as a block: Eq. 4 without biases, then a 7x7 convolution with BatchNorm.
    * ``se``: squeeze and excitation (CVPR 2018): Eq. 4 on the average alone.

    Args:
        in_features: C.
        reduction: r; the channel attention is C / r wide, at least 1.
        width: the channels of each dilated convolution (the paper does not say; ours).
        variant: one of the above.

    Raises:
        ValueError: another variant, or a width or reduction below 1.
    """

    def __init__(self, in_features: int, reduction: int = 16, width: int = 8, variant: str = "lsta"):
        super().__init__()
        if variant not in VARIANTS[:-1]:
            raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS[:-1]))}, got {variant!r}.")
        if reduction < 1 or width < 1:
            raise ValueError(f"reduction and width must be at least 1, got {reduction} and {width}.")
        self.variant = variant
        bias = variant != "cbam"
        hidden = max(1, in_features // reduction)
        self.squeeze = nn.Linear(in_features, hidden, bias=bias)  # W3, b3
        self.excite = nn.Linear(hidden, in_features, bias=bias)  # W4, b4
        if variant in ("lsta", "undilated"):
            dilations = (1, 2, 3) if variant == "lsta" else (1, 1, 1)
            self.context = nn.ModuleList(nn.Conv2d(2, width, 3, padding=d, dilation=d) for d in dilations)  # W5, b5
            self.fuse = nn.Conv2d(3 * width, 1, 1)  # W6, b6
        elif variant == "7x7":
            self.spatial: nn.Module = nn.Conv2d(2, 1, 7, padding=3)
        elif variant == "cbam":
            self.spatial = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, C, H, W]`` to maps of the same shape."""
        hidden = F.relu(self.squeeze(x.mean((2, 3))))
        if self.variant != "se":
            hidden = hidden + F.relu(self.squeeze(x.amax((2, 3))))
        x = x * self.excite(hidden).sigmoid()[..., None, None]  # Eq. 4
        if self.variant in ("se", "no_spatial"):
            return x
        pooled = torch.stack([x.mean(1), x.amax(1)], 1)  # M_s
        if self.variant in ("lsta", "undilated"):
            scales = torch.cat([conv(pooled) for conv in self.context], 1)
            return x * self.fuse(F.relu(scales)).sigmoid()  # Eq. 5
        return x * self.spatial(pooled).sigmoid()

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}"


@register_encoder(tested=("resnet18", "resnet34", "resnet50", "resnet101"), aliases={"star": "gsta"})
class StarEncoder(FrameEncoder):
    """A timm ResNet with one LSTA block after each of its four stages, and a stem for optical flow.

    Fresh LSTA gates scale the maps of each stage (see :class:`LSTA`): with pretrained weights, too, the model has to
    be trained before its BatchNorm statistics fit.

    Args:
        backbone: the name of a timm model of the ResNet class, with or without ``lsta_`` before it; or an instance,
            which is then changed in place.
        flow: build the flow stem: a 7x7 convolution of its own, BatchNorm, ReLU and 3x3 max pooling.
        variant: of the LSTA blocks; ``none`` builds none: the plain ResNet, with two stems where ``flow``.
        reduction: of the LSTA blocks.
        width: of the LSTA blocks.
        flow_scale: the pixels of flow that enter as 1; 1 = flow enters in pixels (the paper does not say; ours).
        pretrained: as in :class:`FrameEncoder`, like all that follow.
        last_stride: 1 or 2; None = 2, ours: the paper does not say.
        img_size: height and width of the frames.
        grad_checkpointing: recompute the residual blocks in the backward pass.
        backbone_kwargs: further arguments of ``timm.create_model``.

    Attributes:
        uses_flow: whether there is a flow stem.

    Raises:
        ValueError: a backbone without a ResNet's stem and four stages, another variant, and what :class:`FrameEncoder`
            refuses.
    """

    prefix = "lsta_"

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        flow: bool = True,
        variant: str = "lsta",
        reduction: int = 16,
        width: int = 8,
        flow_scale: float = 1.0,
        pretrained: bool = False,
        last_stride: int | None = None,
        img_size: tuple[int, int] | None = None,
        grad_checkpointing: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
    ):
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}.")
        if not 0 < flow_scale < float("inf"):
            raise ValueError(f"flow_scale must be a positive number of pixels, got {flow_scale!r}.")
        super().__init__(
            backbone,
            pretrained=pretrained,
            last_stride=last_stride,
            img_size=img_size,
            grad_checkpointing=grad_checkpointing,
            backbone_kwargs=backbone_kwargs,
        )
        if not is_resnet(self.backbone):
            raise ValueError(
                f"STAR is built on timm's ResNet class, got {type(self.backbone).__name__}: use resnet18, resnet34, "
                "resnet50, resnet101 or another of that class; any other backbone works as gsta_<timm model>."
            )
        info = cast(Any, self.backbone).feature_info
        if self.config is not None:
            self.config |= {"flow": flow, "variant": variant, "reduction": reduction, "width": width}
            self.config["flow_scale"] = flow_scale
        self.uses_flow = flow
        self.flow_scale = flow_scale
        if flow:
            channels = info[0]["num_chs"]
            conv = nn.Conv2d(2, channels, 7, stride=2, padding=3, bias=False)
            self.flow_stem = nn.Sequential(
                conv,
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.lsta = nn.ModuleList(
            nn.Identity() if variant == "none" else LSTA(stage["num_chs"], reduction, width, variant)
            for stage in info[-4:]
        )

    def forward(self, frames: Tensor, flow: Tensor | None = None) -> Tensor:
        """Encodes frames.

        Args:
            frames: ``[N, 3, H, W]``, floating point, normalised as ``data_config`` says.
            flow: ``[N, 2, H, W]``, dx and dy to the tracklet's next frame. None leaves the second term of Eq. 2 out;
                the flow stem's parameters then get no gradient (build with ``flow=False`` to train without flow).

        Returns:
            Feature maps ``[N, C, h, w]``.

        Raises:
            TypeError: frames or flow that are no floating-point tensor.
            ValueError: a wrong shape, or a flow where there is no stem for it.
        """
        check_images("frames", frames, 3)
        net = cast(Any, self.backbone)
        x = net.maxpool(net.act1(net.bn1(net.conv1(frames))))
        if flow is not None:
            if not self.uses_flow:
                raise ValueError("this encoder was built with flow=False: leave flow out, or build it with flow=True.")
            check_images("flow", flow, 2)
            if flow.shape[0] != frames.shape[0] or flow.shape[2:] != frames.shape[2:]:
                raise ValueError(f"flow must fit the frames {list(frames.shape)}, got {list(flow.shape)}.")
            x = x + self.flow_stem(flow if self.flow_scale == 1 else flow / self.flow_scale)  # Eq. 2
        for stage, lsta in zip((net.layer1, net.layer2, net.layer3, net.layer4), self.lsta, strict=True):
            if net.grad_checkpointing and torch.is_grad_enabled():
                for block in stage:
                    x = checkpoint(block, x, use_reentrant=False)
            else:
                x = stage(x)
            x = lsta(x)
        return x
