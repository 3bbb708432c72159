from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from temporal_agg.data import ClipTransform

MEAN, STD = (0.401, 0.501, 0.601), (0.2, 0.25, 0.3)


def frames(count=5, height=40, width=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=g) for _ in range(count)]


def normalised(clip):
    return (clip.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def identical(count=6, **size):
    """One frame, many times: a clip on which the same draw shows as the same frame."""
    return frames(1, **size) * count


def test_evaluation_resizes_and_normalises():
    own = frames(2) + frames(1, 64, 32) + frames(1, 32, 16)
    clip = ClipTransform((32, 16), MEAN, STD)(own)
    assert clip.shape == (4, 3, 32, 16)
    assert clip.dtype == torch.float32
    torch.testing.assert_close(clip[3].double(), normalised(own[3]), rtol=1e-5, atol=1e-5)
    for i, mode in enumerate(("bilinear", "bicubic")):
        clip = ClipTransform((32, 16), MEAN, STD, mode)(own)
        oracle = F.interpolate(own[2][None].double(), (32, 16), mode=mode, antialias=True).clamp(0, 255).round()
        difference = (clip[2] * torch.tensor(STD).view(3, 1, 1) * 255).double() - (
            normalised(oracle[0]) * torch.tensor(STD).view(3, 1, 1) * 255
        )
        assert difference.abs().max() < 1.5 + i, "uint8 rounding only"


def test_no_augmentation_is_evaluation():
    plain = ClipTransform((32, 16), MEAN, STD, train=True, flip=0)
    assert torch.equal(plain(frames()), ClipTransform((32, 16), MEAN, STD)(frames()))


def test_flip_turns_the_whole_clip():
    transform = ClipTransform((40, 20), MEAN, STD, train=True, flip=0.5)
    straight = ClipTransform((40, 20), MEAN, STD)(frames())
    flips = 0
    for seed in range(40):
        clip = transform(frames(), seeded(seed))
        flipped = torch.equal(clip, straight.flip(3))
        assert flipped or torch.equal(clip, straight)
        flips += flipped
    assert 8 <= flips <= 32
    assert torch.equal(ClipTransform((40, 20), MEAN, STD, train=True, flip=1.0)(frames()), straight.flip(3))


def test_pad_and_crop_shifts_the_whole_clip():
    transform = ClipTransform((40, 20), MEAN, STD, train=True, flip=0, pad=3)
    padded = normalised(F.pad(torch.stack(frames()), (3, 3, 3, 3)))
    places = set()
    for seed in range(30):
        clip = transform(frames(), seeded(seed)).double()
        found = [
            (y, x)
            for y in range(7)
            for x in range(7)
            if torch.allclose(clip, padded[..., y : y + 40, x : x + 20], atol=1e-5)
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 12


def test_random_crop_cuts_from_an_enlarged_clip():
    transform = ClipTransform((32, 16), MEAN, STD, train=True, flip=0, random_crop=9 / 8)
    enlarged = ClipTransform((36, 18), MEAN, STD)(frames())
    places = set()
    for seed in range(20):
        clip = transform(frames(), seeded(seed))
        found = [(y, x) for y in range(5) for x in range(3) if torch.equal(clip, enlarged[..., y : y + 32, x : x + 16])]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 6


def test_erasing_takes_one_rectangle_out_of_every_frame():
    transform = ClipTransform((40, 20), MEAN, STD, train=True, flip=0, erasing=1.0)
    straight = ClipTransform((40, 20), MEAN, STD)(frames())
    assert straight.ne(0).all()
    for seed in range(10):
        clip = transform(frames(), seeded(seed))
        erased = clip[0, 0] == 0
        rows, columns = erased.any(1), erased.any(0)
        assert erased.any()
        assert torch.equal(erased, rows[:, None] & columns), "a rectangle"
        assert torch.equal(clip, straight.masked_fill(erased, 0)), "the same in every frame and channel"


def test_randomness_follows_the_generator_only():
    transform = ClipTransform((32, 16), train=True, pad=4, random_crop=1.2, erasing=0.7)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    clips = [transform(frames(), seeded(seed)) for seed in (0, 0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])
    assert not torch.equal(clips[2], clips[3])
    torch.manual_seed(4)
    assert torch.equal(transform(frames(), seeded(0)), clips[0])
    same = transform(identical(), seeded(5))
    assert all(torch.equal(frame, same[0]) for frame in same)


def test_erasing_each_frame_for_itself():
    transform = ClipTransform((40, 20), MEAN, STD, train=True, flip=0, erasing=0.5, erasing_per_frame=True)
    straight = ClipTransform((40, 20), MEAN, STD)(frames(40))
    clip = transform(frames(40), seeded(0))
    rectangles = set()
    for frame, own in zip(clip, straight, strict=True):
        erased = frame[0] == 0
        assert torch.equal(erased, erased.any(1)[:, None] & erased.any(0)), "a rectangle"
        assert torch.equal(frame, own.masked_fill(erased, 0)), "the same in every channel"
        rectangles.add(tuple(erased.flatten().tolist()))
    untouched = int((clip == straight).flatten(1).all(1).sum())
    assert 10 <= untouched <= 30
    assert len(rectangles) == 1 + 40 - untouched, "every erased frame has a rectangle of its own"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_the_two_halves_of_a_test(interpolation):
    own = frames(2) + frames(1, 64, 32)
    transform = ClipTransform((32, 16), MEAN, STD, interpolation)
    small = transform.resize(own)
    assert small.dtype == torch.uint8
    assert small.shape == (3, 3, 32, 16)
    clip = transform.normalize(small)
    assert clip.dtype == torch.float32
    assert torch.equal(clip, transform(own))
    torch.testing.assert_close(clip.double(), normalised(small), rtol=1e-6, atol=1e-6)
    assert torch.equal(transform.normalize(small[0]), clip[0])
    real = small.float()
    kept = real.clone()
    assert torch.equal(transform.normalize(real), clip)
    assert torch.equal(real, kept), "what is normalised is left as it was"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_normalising_on_a_gpu():
    transform = ClipTransform((32, 16), MEAN, STD)
    small = transform.resize(frames())
    torch.testing.assert_close(transform.normalize(small.cuda()).cpu(), transform.normalize(small), rtol=0, atol=1e-6)


def test_the_transform_of_a_model():
    class Model:
        data_config: ClassVar = {"input_size": (3, 40, 20), "mean": MEAN, "std": STD, "interpolation": "bicubic"}

    assert torch.equal(
        ClipTransform.for_model(Model())(frames(1, 50, 30)),
        ClipTransform((40, 20), MEAN, STD, "bicubic")(frames(1, 50, 30)),
    )
    train = ClipTransform.for_model(Model(), train=True, flip=1.0, pad=2)
    want = ClipTransform((40, 20), MEAN, STD, "bicubic", train=True, flip=1.0, pad=2)
    assert torch.equal(train(frames(), seeded(1)), want(frames(), seeded(1)))


def test_random_erasing_as_its_paper_has_it():
    """A rectangle of 2 to 40 %, of 0.3 to 3.3 times its width in height, anywhere inside, of random colours."""
    transform = ClipTransform((60, 30), MEAN, STD, train=True, flip=0, erasing=1.0, erasing_fill="random")
    own = [torch.full((3, 60, 30), value, dtype=torch.uint8) for value in (100, 200)]
    straight = ClipTransform((60, 30), MEAN, STD)(own)
    areas, aspects, colours, tops = [], [], [], []
    for seed in range(300):
        clip = transform(own, seeded(seed))
        erased = (clip != straight).any(0).any(0)
        rows, columns = erased.any(1).nonzero().flatten(), erased.any(0).nonzero().flatten()
        box = (..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        assert torch.equal(clip[0][box], clip[1][box]), "the same colours in every frame"
        outside = clip.clone()
        outside[box] = straight[box]
        assert torch.equal(outside, straight), "a rectangle"
        areas.append(erased[box].numel() / 1800)
        aspects.append(float(rows[-1] - rows[0] + 1) / float(columns[-1] - columns[0] + 1))
        tops.append(int(rows[0]))
        values = (clip[0][box] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
        colours += values.flatten().round().int().tolist()
    assert 0.01 < min(areas) < 0.04
    assert 0.33 < max(areas) < 0.42
    assert 0.25 < min(aspects) < 0.5
    assert 2.5 < max(aspects) < 4
    assert min(tops) == 0
    assert set(colours) == set(range(256))
    counts = torch.bincount(torch.tensor(colours), minlength=256).double()
    assert counts.std() / counts.mean() < 0.1, "every value equally likely"


def vectors(count=5, height=20, width=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, height, width, generator=g) for _ in range(count)]


def test_resizing_scales_the_vectors_of_flow():
    """One pixel to the right and two down at 20 x 10 are three and four at 40 x 30."""
    flow = [torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 20, 10)]
    clip, resized = ClipTransform((40, 30), MEAN, STD)(frames(1), flow=flow)
    assert torch.equal(clip, ClipTransform((40, 30), MEAN, STD)(frames(1)))
    assert resized.dtype == torch.float32
    assert torch.allclose(resized, torch.tensor([3.0, 4.0]).view(2, 1, 1).expand(1, 2, 40, 30))
    own = vectors()
    _, resized = ClipTransform((40, 30), MEAN, STD)(frames(), flow=own)
    want = F.interpolate(torch.stack(own), (40, 30), mode="bilinear") * torch.tensor([3.0, 2.0]).view(2, 1, 1)
    torch.testing.assert_close(resized, want, rtol=1e-5, atol=1e-5)
    mixed = [own[0], vectors(1, 40, 30)[0]]  # flow of any sizes
    _, resized = ClipTransform((40, 30), MEAN, STD)(frames(2), flow=mixed)
    torch.testing.assert_close(resized[1], mixed[1])
    enlarged = ClipTransform((32, 16), train=True, flip=0, random_crop=1.25)  # the crop leaves the vectors alone
    _, resized = enlarged(frames(1), flow=flow)
    assert torch.allclose(resized, torch.tensor([2.0, 4.0]).view(2, 1, 1).expand(1, 2, 32, 16))


@pytest.mark.parametrize("kwargs", [{"flip": 0.5}, {"flip": 0.5, "pad": 4}, {"random_crop": 9 / 8, "pad": 2}])
def test_flow_goes_where_its_pixels_go(kwargs):
    """Frames that hold the absolute flow as their colours show what flip and crop did to them."""
    flow = [torch.randint(0, 50, (2, 40, 20), generator=seeded(9)).float().add(1) for _ in range(3)]
    images = [torch.cat([f, f[:1]]).to(torch.uint8) for f in flow]
    transform = ClipTransform((40, 20), (0, 0, 0), (1 / 255,) * 3, train=True, **kwargs)
    signs = set()
    for seed in range(20):
        clip, moved = transform(images, seeded(seed), flow)
        exact = "random_crop" not in kwargs  # else both were resized, the frames with rounding in each direction
        scale = torch.tensor([1.0, 1.0] if exact else [22 / 20, 45 / 40]).view(2, 1, 1)
        atol = 1e-4 if exact else 1.1
        torch.testing.assert_close((moved / scale).abs(), clip[:, :2], rtol=0, atol=atol)
        assert (moved[:, 1] >= 0).all()
        real = clip[:, 0] > 0
        (sign,) = moved[:, 0][real].sign().unique().tolist()
        signs.add(sign)
        assert torch.equal(transform(images, seeded(seed)), clip), "flow changes no draw"
    assert signs == {1.0, -1.0}


def test_flow_is_neither_erased_nor_normalised():
    for per_frame in (False, True):
        transform = ClipTransform((20, 10), train=True, flip=0, erasing=1.0, erasing_per_frame=per_frame)
        _, flow = transform(frames(), seeded(0), vectors())
        torch.testing.assert_close(flow, torch.stack(vectors()))


def test_errors():
    with pytest.raises(ValueError, match="height, width"):
        ClipTransform((32,))
    with pytest.raises(ValueError, match="random_crop must be at least 1"):
        ClipTransform((32, 16), random_crop=0.9)
    with pytest.raises(ValueError, match="probabilities"):
        ClipTransform((32, 16), flip=2)
    for size in (256, "256x128", None, (True, True), (64.5, 32), (float("inf"), 32)):
        with pytest.raises(ValueError, match="height, width"):
            ClipTransform(size)
    for name, value in (("pad", 1.5), ("pad", float("nan")), ("pad", True), ("random_crop", float("inf"))):
        with pytest.raises(ValueError, match="pad a whole number"):
            ClipTransform((32, 16), **{name: value})
    for name, value in (("flip", "0.5"), ("flip", float("nan")), ("erasing", True)):
        with pytest.raises(ValueError, match="probabilities"):
            ClipTransform((32, 16), **{name: value})
    for mean, std in ((0, 1), ((0, 0, 0), 0), ("abc", (1, 1, 1)), (None, None)):
        with pytest.raises(ValueError, match="mean and std must be three numbers each"):
            ClipTransform((32, 16), mean, std)
    for mean, std in (((0, 0), (1, 1, 1)), ((0, 0, 0), (1, 0, 1)), ((0, 0, float("nan")), (1, 1, 1))):
        with pytest.raises(ValueError, match="mean and std must be three numbers each"):
            ClipTransform((32, 16), mean, std)
    with pytest.raises(ValueError, match=r"interpolation must be one of nearest, .*bilinear.*got 'area'"):
        ClipTransform((32, 16), interpolation="area")
    with pytest.raises(ValueError, match="erasing_fill must be one of zero, random"):
        ClipTransform((32, 16), erasing_fill="mean")
    with pytest.raises(ValueError, match="flow of 5 frames, got 4"):
        ClipTransform((32, 16))(frames(), flow=vectors(4))
