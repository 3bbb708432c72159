"""The authors' networks, written again under the names that their code gives to the parts, against ours."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from versions import needs_torch

from temporal_agg.models import convert_gltr, convert_grl, create_model, read_checkpoint

SIZE = (64, 32)
SMALL = {"img_size": SIZE, "backbone_kwargs": {"layers": [1, 1, 1, 1]}}


def resnet(block, layers):
    net = ResNet(block, layers)
    first = net.layer4[0]
    for conv in (first.conv1 if block is BasicBlock else first.conv2, first.downsample[0]):
        conv.stride = (1, 1)
    return net


def residual_memory(C):
    return nn.ModuleDict(
        {
            "conv1": nn.Conv2d(C, C // 4, 1, bias=False),
            "bn1": nn.BatchNorm2d(C // 4),
            "conv2": nn.Conv2d(C // 4, C // 4, 1, bias=False),
            "bn2": nn.BatchNorm2d(C // 4),
            "conv3": nn.Conv2d(C // 4, C, 1, bias=False),
            "bn3": nn.BatchNorm2d(C),
        }
    )


def remember(net, memory, low):
    x = memory + low
    y = F.relu(net["bn1"](net["conv1"](x)))
    y = F.relu(net["bn2"](net["conv2"](y)))
    return F.relu(net["bn3"](net["conv3"](y)) + x)


def conv_relu(C):
    return nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU())


def channel_attention(C):
    return nn.Sequential(nn.Linear(C, C // 16, bias=False), nn.ReLU(), nn.Linear(C // 16, C, bias=False), nn.Sigmoid())


class AuthorsGRL(nn.Module):
    """cnn_model of mars_train.py."""

    def __init__(self, block, layers):
        super().__init__()
        net = resnet(block, layers)
        C = 512 * block.expansion
        stem = (net.conv1, net.bn1, nn.ReLU(), net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4)
        self.backbone = nn.ModuleDict(
            {
                "base": nn.Sequential(*stem),
                "glo_fc": nn.Sequential(nn.Linear(C, C // 2), nn.BatchNorm1d(C // 2), nn.ReLU()),
                "corr_atte": nn.Sequential(
                    nn.Conv2d(C + C // 2, C // 2, 1, bias=False),
                    nn.BatchNorm2d(C // 2),
                    nn.Conv2d(C // 2, C // 8, 1, bias=False),
                    nn.BatchNorm2d(C // 8),
                    nn.ReLU(),
                    nn.Conv2d(C // 8, 1, 1, bias=False),
                    nn.BatchNorm2d(1),
                ),
            }
        )
        self.temporal_learning_block = nn.ModuleDict(
            {
                "uncorr_memo_forward": residual_memory(C),
                "forward_f1": conv_relu(C),
                "forward_f2": conv_relu(C),
                "channel_atte_foreward_corr": channel_attention(C),
                "uncorr_memo_backward": residual_memory(C),
                "backward_f1": conv_relu(C),
                "backward_f2": conv_relu(C),
                "channel_atte_backward_corr": channel_attention(C),
            }
        )
        self.corr_bn = nn.BatchNorm1d(C)
        self.uncorr_bn = nn.BatchNorm1d(C)

    def forward(self, clips):
        B, T = clips.shape[:2]
        x = self.backbone["base"](clips.flatten(0, 1))
        glo = self.backbone["glo_fc"](x.unflatten(0, (B, T)).mean((1, 3, 4)))
        glo = glo.repeat_interleave(T, 0)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        R = torch.sigmoid(self.backbone["corr_atte"](torch.cat([x, glo], 1)))
        high, low = ((x * gate).unflatten(0, (B, T)) for gate in (R, 1 - R))
        block = self.temporal_learning_block
        frames, memory = torch.zeros(B, T, x.shape[1]), 0
        for way, spelling in (("forward", "foreward"), ("backward", "backward")):
            state = low.mean(1)
            for t in range(T) if way == "forward" else reversed(range(T)):
                difference = block[f"{way}_f1"](state) - block[f"{way}_f2"](high[:, t])
                a = block[f"channel_atte_{spelling}_corr"]((difference**2).mean((2, 3)))
                frames[:, t] += ((1 + a)[..., None, None] * high[:, t]).mean((2, 3))
                state = remember(block[f"uncorr_memo_{way}"], state, low[:, t])
            memory = memory + state.mean((2, 3))
        frames = F.normalize(self.corr_bn(frames.flatten(0, 1)), dim=1).unflatten(0, (B, T))
        return F.normalize(self.uncorr_bn(memory), dim=1), frames


class AuthorsSiamese(nn.Module):
    def __init__(self, C):
        super().__init__()
        for name in ("featQ", "featK", "featV"):
            self.add_module(name, nn.Linear(C, 512))
            self.add_module(f"{name}_bn", nn.BatchNorm1d(512))
        self.classifierBN = nn.BatchNorm1d(C)
        self.classifierlinear = nn.Linear(C, 2)

    def forward(self, frames):
        flat = frames.flatten(0, 1)
        Q = F.normalize(self.featQ_bn(self.featQ(flat)), dim=1).view(*frames.shape[:2], -1)
        K = F.normalize(self.featK_bn(self.featK(flat)), dim=1).view(*frames.shape[:2], -1)
        return F.normalize(((Q @ K.mT).softmax(-1) @ frames).sum(1), dim=1)


class AuthorsGLTR(ResNet):
    """resnet.ResNet with train=True, all of it in one class."""

    def __init__(self, block, layers):
        super().__init__(block, layers)
        self.layer4 = resnet(block, layers).layer4
        del self.fc
        C, d = 512 * block.expansion, 128
        self.feat = nn.Linear(C, d)
        self.feat_bn = nn.BatchNorm1d(4 * d)
        self.classifier = nn.Linear(4 * d, 625)
        for n in (1, 2, 3):
            conv = nn.Conv2d(1, d, (3, d), dilation=(n, 1), padding=(n, 0), bias=False)
            self.add_module(f"feat{n}", conv)
        self.Nonlocal_block0 = nn.ModuleDict(
            {name: nn.Conv1d(4 * d, 2 * d, 1) for name in ("g", "theta", "phi")}
            | {"W": nn.Sequential(nn.Conv1d(2 * d, 4 * d, 1), nn.BatchNorm1d(4 * d))}
        )

    def forward(self, clips):
        x = self.maxpool(self.relu(self.bn1(self.conv1(clips.flatten(0, 1)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))
        x = self.feat(x).unflatten(0, clips.shape[:2])
        x = torch.cat([x.mT, *(conv(x[:, None])[..., 0] for conv in (self.feat1, self.feat2, self.feat3))], 1)
        net = self.Nonlocal_block0
        f = (net["theta"](x).mT @ net["phi"](x)).softmax(-1)
        return (net["W"]((f @ net["g"](x).mT).mT) + x).mean(2)


def as_trained(net):
    """Statistics and scales that make every tensor count."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in net.state_dict().items():
        if "running" in name or tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return net.eval()


@needs_torch("2.4", "NumPy's numbers in checkpoints")
@torch.no_grad()
def test_grl_gives_the_authors_embedding(tmp_path):
    torch.manual_seed(0)
    cnn, siamese = as_trained(AuthorsGRL(BasicBlock, [1, 1, 1, 1])), as_trained(AuthorsSiamese(512))
    # As they save them: in a DataParallel, with a NumPy number beside the weights.
    files = tmp_path / "cnnmodel_best.pth.tar", tmp_path / "siamesemodel_best.pth.tar"
    for net, file in zip((nn.DataParallel(cnn), siamese), files, strict=True):
        torch.save({"state_dict": net.state_dict(), "epoch": 60, "best_top1": np.float64(0.9)}, file)
    model = create_model("grl_released_resnet18", **SMALL).eval()
    model.load_state_dict(convert_grl(*map(read_checkpoint, files)))
    clips = torch.randn(2, 4, 3, *SIZE)
    memory, frames = cnn(clips)
    want = torch.cat([memory, siamese(frames), frames.mean(1)], 1)
    torch.testing.assert_close(model(clips), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_gltr_gives_the_authors_embedding(tmp_path):
    torch.manual_seed(0)
    theirs = as_trained(AuthorsGLTR(BasicBlock, [1, 1, 1, 1]))
    file = tmp_path / "resnet50_mars_00499.pth"
    torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=False)  # as PyTorch 1.0 did
    model = create_model("gltr_released_resnet18", **SMALL).eval()
    model.load_state_dict(convert_gltr(read_checkpoint(file)))
    clips = torch.randn(2, 7, 3, *SIZE)
    torch.testing.assert_close(model(clips), theirs(clips), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["grl_released", "gltr_released"])
def test_every_tensor_has_its_place_at_full_size(name):
    with torch.device("meta"):
        model = create_model(f"{name}_resnet50.tv_in1k")
        if name == "grl_released":
            cnn = AuthorsGRL(Bottleneck, [3, 4, 6, 3])
            block = sum(p.numel() for p in cnn.temporal_learning_block.parameters())
            assert block == sum(p.numel() for p in model.aggregator.trl.parameters()) == 22_564_864
            state = convert_grl(cnn.state_dict(), AuthorsSiamese(2048).state_dict())
        else:
            state = convert_gltr(AuthorsGLTR(Bottleneck, [3, 4, 6, 3]).state_dict())
    want = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in state.items()} == want
    assert model.data_config["interpolation"] == "bilinear"


def test_other_names_are_refused():
    with torch.device("meta"):
        cnn, siamese = AuthorsGRL(BasicBlock, [1, 1, 1, 1]).state_dict(), AuthorsSiamese(512).state_dict()
        gltr = AuthorsGLTR(BasicBlock, [1, 1, 1, 1]).state_dict()
    with pytest.raises(ValueError, match=r"start with 'backbone\.base\.0\.'"):
        convert_grl(gltr, siamese)
    se = "temporal_learning_block.uncorr_memo_forward.se.fc.0.weight"  # of another version in the authors' repository
    with pytest.raises(ValueError, match=rf"not GRL's .*{se}"):
        convert_grl({**cnn, se: torch.zeros(1)}, siamese)
    with pytest.raises(ValueError, match=r"start with 'feat\.'"):
        convert_gltr({key: value for key, value in gltr.items() if not key.startswith("feat.")})
