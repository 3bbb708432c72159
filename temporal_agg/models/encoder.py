"""Any timm backbone as a frame encoder: images -> the last feature maps ``[N, C, h, w]``.

Encoders that change a backbone have a prefix of their own before its name (``lsta_resnet50``) and a place in the list
here, by :func:`register_encoder`.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._options import check_sizes, check_types
from .inputs import check_images, fastest_memory_format

__all__ = ["FrameEncoder", "create_encoder", "register_encoder"]

DEFAULT_SIZE = (256, 128)
Size = tuple[int, int]  # height and width
_RESERVED = {"checkpoint_path", "features_only", "img_size", "num_classes", "pretrained"}
_MISFIT = (AssertionError, RuntimeError, ValueError)  # what timm's models raise at a size they do not take


def import_timm() -> ModuleType:
    """timm, which is imported when the first backbone is named: aggregators and criteria do without."""
    try:
        import timm
        import timm.data
        import timm.layers
        import timm.models
    except ImportError as error:
        raise ImportError(
            f"models need timm (pip install 'timm>=1.0.8'), which cannot be imported: {error}."
        ) from error
    return timm


class FrameEncoder(nn.Module):
    """Frames -> feature maps, by any timm model.

    The maps are those of the model's last stage, after its final norm where it has one. The classifier and what else
    the maps do not need is removed; parameters that the maps still do not depend on (unused branches in HRNet, CrossViT
    and CoaT) are frozen, so that every parameter that requires a gradient gets one.

    Frames are 256 x 128 unless ``img_size`` says otherwise, rounded down to whole patches (252 x 126 for patches of
    14). Where a model works at its own input size only, that is kept: ``data_config["input_size"]`` has what came of
    it.

    Args:
        backbone: the name of a timm model; or an instance, which is then changed in place.
        pretrained: load timm's weights into the backbone, downloading them if need be. For a name only.
        last_stride: 1 = the last stage of a ResNet keeps the resolution of the one before it, without dilation;
            2 or None = as timm builds it.
        img_size: height and width of the frames, in pixels, such as ``(256, 128)``.
        grad_checkpointing: compute the activations again in the backward pass instead of keeping them, as far as timm's
            model does.
        backbone_kwargs: further arguments of ``timm.create_model``. For a name only.

    Attributes:
        num_features: C.
        data_config: ``input_size`` (3, H, W), ``mean``, ``std`` and ``interpolation`` of the frames.
        config: the arguments that rebuild it, but for weights and checkpointing; None for an instance.

    Raises:
        TypeError: a model that has no maps to give (the message says why), or arguments that go with a name only.
        ValueError: an unknown name (the message has the nearest ones), a size that the model does not take,
            ``last_stride=1`` outside the ResNet family, or checkpointing where the model has none.

    Example:
        >>> import torch
        >>> from temporal_agg import FrameEncoder
        >>> encoder = FrameEncoder("resnet10t", img_size=(64, 32), last_stride=1)
        >>> encoder(torch.randn(5, 3, 64, 32)).shape  # 5 frames
        torch.Size([5, 512, 4, 2])
    """

    prefix = ""  # of its backbones' names
    uses_flow = False  # True: forward takes optical flow

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        pretrained: bool = False,
        last_stride: int | None = None,
        img_size: tuple[int, int] | None = None,
        grad_checkpointing: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__()
        if last_stride not in (None, 1, 2):
            raise ValueError(f"last_stride must be 1, 2 or None, got {last_stride!r}.")
        backbone_kwargs = dict(backbone_kwargs or {})
        if isinstance(backbone, str):
            backbone = backbone.removeprefix(self.prefix)
            if reserved := sorted(_RESERVED & set(backbone_kwargs)):
                raise TypeError(f"backbone_kwargs cannot have {', '.join(reserved)}: the encoder sees to that itself.")
            if (cls := encoder_class(backbone)) is not FrameEncoder:
                raise ValueError(f"{backbone!r} is built by {cls.__name__}: create_encoder({backbone!r}, ...).")
            check_backbone_name(backbone)
            build = partial(_create, backbone, pretrained, backbone_kwargs)
        else:
            if pretrained or backbone_kwargs:
                raise TypeError("pretrained and backbone_kwargs go with the name of a model, not with an instance.")
            build = partial(_resize, backbone, exact=img_size is not None)

        maps, size = self._fit(build, img_size)
        if maps.dim() != 4:
            raise ValueError(
                f"{type(self.backbone).__name__} gave {list(maps.shape)} where maps [1, C, h, w] were expected: it "
                "cannot be used as a frame encoder."
            )
        _drop_unreached(self.backbone, maps)
        self.num_features = maps.shape[1]
        self.data_config = {**_data_config(self.backbone), "input_size": (3, *size)}
        self.config: dict[str, Any] | None = None
        if isinstance(backbone, str):
            self.config = {
                "backbone": self.prefix + backbone,
                "last_stride": None,
                "img_size": list(size),
                "backbone_kwargs": backbone_kwargs,
            }
        if last_stride == 1:
            self.remove_last_stride()
        elif last_stride == 2 and not self.has_last_stride:
            raise ValueError(_NO_LAST_STRIDE.format(type(self.backbone).__name__, 2))
        if grad_checkpointing:
            try:
                cast(Any, self.backbone).set_grad_checkpointing(True)
            except (AssertionError, AttributeError) as error:
                raise ValueError(
                    f"{type(self.backbone).__name__} has no gradient checkpointing: leave grad_checkpointing out."
                ) from error

    def forward(self, frames: Tensor, flow: Tensor | None = None) -> Tensor:
        """Encodes frames.

        Args:
            frames: ``[N, 3, H, W]``, floating point, normalised as ``data_config`` says.
            flow: must be None: only STAR's encoder has a stem for optical flow.

        Returns:
            Feature maps ``[N, C, h, w]``.

        Raises:
            TypeError: frames that are no floating-point tensor.
            ValueError: a wrong shape, or a flow.
        """
        check_images("frames", frames, 3)
        if flow is not None:
            raise ValueError(
                "this encoder has no stem for optical flow: leave flow out, or build the model as star_<resnet>."
            )
        return self._maps(frames)

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout in which it is fastest, for ``encoder.to(memory_format=...)`` and its frames: ``channels_last``
        for convolutional backbones, ``contiguous_format`` for transformers."""
        return fastest_memory_format(self.backbone)

    @property
    def has_last_stride(self) -> bool:
        """Whether ``last_stride`` applies: the ResNet family, the way timm builds it by default."""
        return is_resnet(self.backbone) and any(_strided(self._last_block()))

    def remove_last_stride(self) -> None:
        """What ``last_stride=1`` does. The weights stay what they are.

        Every operation of the last stage's first block that has stride 2 gets stride 1 and is else unchanged, so that
        the convolutions give at the even positions what they gave before.

        Raises:
            ValueError: not a ResNet, or one whose last stage has no stride any more.
        """
        if not self.has_last_stride:
            raise ValueError(_NO_LAST_STRIDE.format(type(self.backbone).__name__, 1))
        block = self._last_block()
        for parent, name, module in list(_strided(block)):
            if isinstance(module, nn.AvgPool2d) and module.kernel_size in (2, (2, 2)):
                setattr(parent, name, UnstridedAvgPool())
            else:
                module.stride = (1, 1) if isinstance(module, nn.Conv2d) else 1
        if hasattr(block, "stride"):
            block.stride = 1
        info = cast(Any, self.backbone).feature_info[-1]
        info["reduction"] = info["reduction"] // 2
        if self.config is not None:
            self.config["last_stride"] = 1

    def _last_block(self) -> Any:
        """The first residual block of a ResNet's last stage."""
        return cast(Any, self.backbone).layer4[0]

    def _maps(self, frames: Tensor) -> Tensor:
        return cast(Any, self.backbone).forward_intermediates(
            frames, indices=self._indices, output_fmt="NCHW", intermediates_only=True, **self._norm
        )[0]

    def _fit(self, build: Callable[[Size | None], nn.Module], img_size: Size | None) -> tuple[Tensor, Size]:
        """Builds the backbone for the wanted size, or failing the default one for its own; returns maps and size."""
        if img_size is not None:
            size = check_size(img_size)
            try:
                backbone = build(size)
                whole = _whole_patches(backbone, size)
                if whole != size:
                    raise ValueError(f"its patches do not fill that size, but {whole}")
                return self._prepare(backbone, size), size
            except _MISFIT as error:
                raise ValueError(
                    f"the backbone does not work with img_size = {size} ({type(error).__name__}: {error}). Try another "
                    "size, or leave img_size out."
                ) from error
        try:
            backbone = build(DEFAULT_SIZE)
            size = _whole_patches(backbone, DEFAULT_SIZE)
            if size != DEFAULT_SIZE:
                backbone = build(size)
            return self._prepare(backbone, size), size
        except (*_MISFIT, TypeError):
            backbone = build(None)
            size = _own_size(backbone)
            return self._prepare(backbone, size), size

    def _prepare(self, backbone: nn.Module, size: tuple[int, int]) -> Tensor:
        """Cuts the backbone down to what the maps need, and returns those of one black frame, with their graph."""
        timm = import_timm()
        forward = getattr(backbone, "forward_intermediates", None)
        if forward is None:
            raise TypeError(
                f"{type(backbone).__name__} has no forward_intermediates in timm {timm.__version__}: pass the name of "
                "a timm model, or what timm.create_model returns without features_only; or update timm, whose older "
                "versions lack it for some families."
            )
        self.backbone = backbone
        self._indices = [-1]
        if hasattr(backbone, "prune_intermediate_layers"):
            prune = partial(cast(Any, backbone).prune_intermediate_layers, [-1], prune_norm=False)
            try:
                self._indices = prune(prune_head=True)  # these count the layers that are left
            except AssertionError:  # a head that older versions of timm cannot remove; it gets frozen
                self._indices = prune(prune_head=False)
        takes_norm = "norm" in inspect.signature(forward).parameters
        weight = next(backbone.parameters())
        frame = torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype)
        modes = [(module, module.training) for module in backbone.modules()]
        backbone.eval()
        try:
            with torch.enable_grad():
                try:
                    self._norm = {"norm": True} if takes_norm else {}
                    return self._maps(frame)
                except AssertionError:  # hiera refuses the argument
                    self._norm = {}
                    return self._maps(frame)
        finally:
            for module, mode in modes:
                module.training = mode


_NO_LAST_STRIDE = (
    "{0} has no last stride to set: last_stride={1} is for the ResNet family (resnet, resnext, seresnet, res2net, "
    "resnest, ...) without output_stride. Leave last_stride out; where the model has an output_stride, "
    "backbone_kwargs=dict(output_stride=16) keeps the resolution by dilation."
)


class UnstridedAvgPool(nn.Module):
    """The means over 2 x 2 windows at every position; windows are cut off at the lower and right border."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False)[..., 1:, 1:]


@dataclass(frozen=True)
class _Registered:
    cls: type[FrameEncoder]
    tested: tuple[str, ...]
    aliases: Mapping[str, str]


_ENCODERS: dict[str, _Registered] = {}  # by prefix
Class = TypeVar("Class", bound=type[FrameEncoder])


def register_encoder(*, tested: tuple[str, ...], aliases: Mapping[str, str]) -> Callable[[Class], Class]:
    """Registers a :class:`FrameEncoder` subclass by its ``prefix``: backbones of that name are then built by it.

    Args:
        tested: timm models that it is tested with, for ``list_models``.
        aliases: what ``<name>_<timm model>`` stands for: the aggregator that goes with this encoder.
    """

    def register(cls: Class) -> Class:
        _ENCODERS[cls.prefix] = _Registered(cls, tested, aliases)
        return cls

    return register


def encoder_class(backbone: str) -> type[FrameEncoder]:
    """The class that builds a backbone of this name."""
    return next((entry.cls for prefix, entry in _ENCODERS.items() if backbone.startswith(prefix)), FrameEncoder)


def create_encoder(backbone: str, **options: Any) -> FrameEncoder:
    """Builds a frame encoder by the name of its backbone: a timm model's, or one with a prefix, ``lsta_<resnet>``.

    Args:
        backbone: the name.
        **options: of :class:`FrameEncoder`, or of the class that the prefix stands for (:class:`StarEncoder`).

    Raises:
        TypeError: an option that it does not have, or a value of another type than the class declares.
        ValueError: as :class:`FrameEncoder`.
    """
    build = encoder_class(backbone)
    checked_there = ("img_size", "last_stride")  # which say more about what may be meant
    others = {key: value for key, value in options.items() if key not in checked_there}
    check_types(f"encoder of {backbone!r}: ", build, others)
    check_sizes(f"encoder of {backbone!r}: ", others)
    return build(backbone, **options)


def tested_with_prefix() -> list[str]:
    """The backbones with a prefix that are tested."""
    return [prefix + name for prefix, entry in _ENCODERS.items() for name in entry.tested]


def name_aliases() -> dict[str, tuple[str, str]]:
    """Names of systems -> their aggregator and the prefix of their backbones."""
    return {
        alias: (aggregator, prefix)
        for prefix, entry in _ENCODERS.items()
        for alias, aggregator in entry.aliases.items()
    }


def is_backbone(name: str) -> bool:
    """Whether a backbone has that name, whatever stands behind its dot."""
    return import_timm().is_model(name.removeprefix(encoder_class(name).prefix).partition(".")[0])


def check_backbone_name(name: str) -> None:
    """Raises ValueError unless there is a backbone (and weights tag) of that name; the message has the nearest ones."""
    timm = import_timm()
    prefix = encoder_class(name).prefix
    arch, _, tag = name.removeprefix(prefix).partition(".")
    if any(c in name for c in ":/\\"):
        raise ValueError(
            f"{name!r} is not the name of a timm model; build it with timm.create_model({name!r}, num_classes=0) and "
            "pass the instance."
        )
    if not timm.is_model(arch):
        near = [prefix + close for close in difflib.get_close_matches(arch, timm.list_models(), n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"timm {timm.__version__} has no model named {arch!r}; {hint}See timm.list_models().")
    if tag:
        tags = [model.partition(".")[2] for model in timm.list_models(f"{arch}.*", include_tags=True)]
        if tag not in tags:
            raise ValueError(f"{arch!r} has no weights tagged {tag!r}; it has: {', '.join(tags) or 'none'}.")


def check_size(size: Any) -> Size:
    """Height and width, as two whole numbers.

    Raises:
        ValueError: something else, such as one number, or sizes below 1.
    """
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(_is_whole(side) for side in size):
        square = f": for square frames write ({size}, {size})" if _is_whole(size) else ""
        raise ValueError(
            f"img_size must be the height and width of the frames in pixels, such as (256, 128), got {size!r}{square}."
        )
    if min(size) < 1:
        raise ValueError(f"img_size must be the height and width of the frames in pixels, got {tuple(size)}.")
    return int(size[0]), int(size[1])


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def is_resnet(backbone: nn.Module) -> bool:
    """Whether it is of timm's ResNet class."""
    return isinstance(backbone, import_timm().models.resnet.ResNet)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any], size: Size | None) -> nn.Module:
    create = partial(import_timm().create_model, name, pretrained=pretrained, num_classes=0, **kwargs)
    if size is None:
        return create()
    try:
        return create(img_size=size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create()  # its constructor has no such argument: it takes frames of any size


def _resize(backbone: nn.Module, size: Size | None, exact: bool) -> nn.Module:
    if exact and hasattr(backbone, "set_input_size"):
        cast(Any, backbone).set_input_size(img_size=size)
    return backbone


def _patch_embeds(backbone: nn.Module) -> list[Any]:
    kind = import_timm().layers.PatchEmbed
    return [module for module in backbone.modules() if isinstance(module, kind)]


def _whole_patches(backbone: nn.Module, size: Size) -> Size:
    """The size without the rows and columns that make no whole patch, and that the backbone would cut off."""
    patches = [embed.patch_size for embed in _patch_embeds(backbone) if not embed.dynamic_img_pad]
    height, width = (side - side % math.lcm(*(patch[i] for patch in patches)) for i, side in enumerate(size))
    return height, width


def _own_size(backbone: nn.Module) -> Size:
    sizes = [embed.img_size for embed in _patch_embeds(backbone) if embed.img_size is not None]
    height, width = sizes[0] if sizes else _data_config(backbone)["input_size"][1:]
    return height, width


def _data_config(backbone: nn.Module) -> dict[str, Any]:
    config = import_timm().data.resolve_model_data_config(backbone)
    return {key: config[key] for key in ("input_size", "mean", "std", "interpolation")}


def _drop_unreached(backbone: nn.Module, maps: Tensor) -> None:
    """Takes out the modules that the graph of ``maps`` does not lead to, and freezes what else it does not.

    A head that one version of timm leaves where another takes it out would be in the way of weights that travel.
    """
    if maps.grad_fn is None:  # all are frozen already
        return
    reached: set[int] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [maps.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        nodes.extend(parent for parent, _ in node.next_functions)
    for name, child in list(backbone.named_children()):
        parameters = list(child.parameters())
        if parameters and all(p.requires_grad and id(p) not in reached for p in parameters):
            setattr(backbone, name, nn.Identity())
    for parameter in backbone.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def _strided(block: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The operations of stride 2 in a residual block, each with the module that holds it and its name there."""
    kinds = (nn.Conv2d, nn.AvgPool2d, import_timm().layers.BlurPool2d)
    for parent in block.modules():
        for name, module in parent.named_children():
            if isinstance(module, kinds) and module.stride in (2, (2, 2)):
                yield parent, name, module
