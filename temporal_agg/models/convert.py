"""Weights of the code that the authors of GRL and GLTR released -> those of the models here.

    model = create_model("grl_released_resnet50.tv_in1k")
    cnn, siamese = read_checkpoint("cnnmodel_best.pth.tar"), read_checkpoint("siamesemodel_best.pth.tar")
    model.load_state_dict(convert_grl(cnn, siamese))

    model = create_model("gltr_released_resnet50.tv_in1k")
    model.load_state_dict(convert_gltr(read_checkpoint("resnet50_mars_00499.pth")))

``tv_in1k`` brings the authors' preprocessing (bilinear resizing); it downloads nothing. Names are those of
github.com/flysnowtiger/GRL (``grl_model.py``, ``Siamese.py``) and github.com/ljn114514/GLTR (``resnet.py``).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["convert_gltr", "convert_grl"]

_BACKBONE = "encoder.backbone."
_STEM = ("conv1", "bn1", None, None, "layer1", "layer2", "layer3", "layer4")  # GRL: a sequence; None: no parameters


def convert_grl(cnn: Mapping[str, Tensor], siamese: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ``grl_released_<resnet>`` from the two that GRL's training writes.

    The authors' f1 reads the memory and their f2 the frame; here the names are the paper's, the other way round. The
    two directions become one module with channel groups. The verification head and the value layer, which nothing
    uses, are left out.

    Args:
        cnn: of ``cnnmodel_best.pth.tar``.
        siamese: of ``siamesemodel_best.pth.tar``.

    Raises:
        ValueError: names that this code does not have.
    """
    cnn, ours = dict(cnn), dict[str, Tensor]()
    for i, name in enumerate(_STEM):
        if name:
            _move(cnn, f"backbone.base.{i}.", ours, f"{_BACKBONE}{name}.")
    gce, trl = "aggregator.gce.", "aggregator.trl.emu."
    for theirs, name in (
        ("glo_fc.0", "embed.0"),
        ("glo_fc.1", "embed.1"),
        *((f"corr_atte.{i}", f"correlate.{i - 1}") for i in (1, 2, 3, 5, 6)),
    ):
        _move(cnn, f"backbone.{theirs}.", ours, f"{gce}{name}.")
    _move(cnn, "backbone.corr_atte.0.", ours, f"{gce}join.")  # over [map, clip], which are two layers here
    joined, C = ours[f"{gce}join.weight"], ours[f"{gce}embed.0.weight"].shape[1]
    ours[f"{gce}join.weight"], ours[f"{gce}join_clip.weight"] = (
        joined[:, :C].contiguous(),
        joined[:, C:, 0, 0].contiguous(),
    )
    block = "temporal_learning_block."
    # The authors write "foreward" here.
    for g, (way, attention) in enumerate((("forward", "foreward"), ("backward", "backward"))):
        _move(cnn, f"{block}{way}_f1.0.", ours, f"{trl}f2.{g}.")
        _move(cnn, f"{block}{way}_f2.0.", ours, f"{trl}f1.{g}.")
        _move(cnn, f"{block}channel_atte_{attention}_corr.", ours, f"{trl}mlp.{g}.")
    for i, layer in enumerate(("conv1", "bn1", "", "conv2", "bn2", "", "conv3", "bn3")):
        if layer:
            ways: list[dict[str, Tensor]] = [{}, {}]
            for way, parts in zip(("forward", "backward"), ways, strict=True):
                _move(cnn, f"{block}uncorr_memo_{way}.{layer}.", parts, f"{trl}res.{i}.")
            for name, value in ways[0].items():
                ours[name] = torch.cat([value, ways[1][name]]) if value.dim() else value
    _move(cnn, "corr_bn.", ours, "aggregator.frame_norm.")
    _move(cnn, "uncorr_bn.", ours, "aggregator.memory_norm.")
    siamese = dict(siamese)
    for theirs, name in (("featQ", "query"), ("featQ_bn", "query_norm"), ("featK", "key"), ("featK_bn", "key_norm")):
        _move(siamese, f"{theirs}.", ours, f"aggregator.{name}.")
    _check_rest("GRL's", [*cnn, *siamese], ("featV.", "featV_bn.", "classifierBN.", "classifierlinear."))
    return ours


def convert_gltr(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ``gltr_released_<resnet>`` from the one that GLTR's training writes.

    Its temporal convolutions are written as 2-D ones over (frame, feature), whose kernels are as wide as the features.
    The training head is left out.

    Raises:
        ValueError: names that this code does not have.
    """
    theirs, ours = dict(weights), dict[str, Tensor]()
    for name in _STEM:
        if name:
            _move(theirs, f"{name}.", ours, f"{_BACKBONE}{name}.")
    _move(theirs, "feat.", ours, "aggregator.embed.")
    kernels: dict[str, Tensor] = {}
    for i in range(3):
        _move(theirs, f"feat{i + 1}.", kernels, f"aggregator.dtp.branches.{i}.")
    ours |= {name: kernel.squeeze(1).mT for name, kernel in kernels.items()}  # [d, 1, 3, d] -> [d, d, 3]
    names = {"theta": "theta", "phi": "phi", "g": "g", "W.0": "restore", "W.1": "restore_norm"}
    for name, here in names.items():
        _move(theirs, f"Nonlocal_block0.{name}.", ours, f"aggregator.tsa.{here}.")
    for name in ("theta", "phi", "g", "restore"):
        key = f"aggregator.tsa.{name}.weight"
        ours[key] = ours[key].squeeze(2)  # a convolution over time of one frame
    _check_rest("GLTR's", theirs, ("feat_bn.", "classifier."))
    return ours


def _move(theirs: dict[str, Tensor], before: str, ours: dict[str, Tensor], after: str) -> None:
    """Moves what starts with one prefix, and gives it another."""
    names = [name for name in theirs if name.startswith(before)]
    if not names:
        raise ValueError(
            f"expected weights of the authors' code, with names that start with {before!r}: there are none."
        )
    for name in names:
        ours[after + name.removeprefix(before)] = theirs.pop(name)


def _check_rest(whose: str, names: Iterable[str], unused: tuple[str, ...]) -> None:
    rest = [name for name in names if not name.startswith(("fc.", *unused))]
    if rest:
        raise ValueError(f"names that are not {whose} released code's: {', '.join(rest[:5])}; is it another version?")
