"""Walking figures, drawn on the fly: tracklets without a file, with faults of chosen strength.

An identity is its clothes (garment, pattern, colours), hair, bag, build and gait; a camera its colour cast, contrast,
light, framing, background, sharpness and noise. All clothes come from one small wardrobe, so that no single attribute
tells identities apart.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tracklet import TrackletData

__all__ = ["FAULTS", "SyntheticTracklet", "synthetic_data"]

FAULTS = ("occlusion", "bad_boxes", "identity_switch", "blur")

# What the first number of a random key stands for.
_PERSON, _CAMERA, _BACKGROUND, _TRACKLET, _FRAME, _EVENTS, _LENGTH = range(7)

_WARDROBE = np.array(
    [
        (24, 24, 28), (62, 62, 66), (128, 130, 132), (222, 220, 214), (34, 44, 84), (52, 92, 158), (122, 164, 204),
        (134, 34, 38), (196, 58, 50), (40, 84, 54), (110, 120, 70), (222, 184, 74), (104, 72, 48), (186, 156, 120),
        (98, 60, 112), (212, 128, 150),
    ],
    np.float32,
)  # fmt: skip
_SKIN = np.array([(236, 196, 170), (210, 160, 128), (160, 110, 80), (98, 66, 48)], np.float32)
_HAIR = np.array([(28, 22, 20), (66, 44, 30), (126, 88, 52), (196, 162, 104), (150, 148, 146)], np.float32)


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


@dataclass(frozen=True, eq=False)
class SyntheticTracklet:
    """A tracklet whose frames are drawn when they are loaded; a stand-in for :class:`~temporal_agg.data.Tracklet`.

    Frame i is a function of the fields and i alone, whichever other frames are asked for.

    Args:
        seed: of the world: the same seed has the same people and cameras.
        index: the tracklet's number in that world (direction, place, light, faults).
        length: frames.
        pid: identity.
        camera: camera.
        size: (height, width) in pixels.
        others: identities that walk in front of the person or are taken for it.
        faults: strength of each of ``FAULTS``, 0 to 1.
    """

    seed: int
    index: int
    length: int
    pid: int
    camera: int
    size: tuple[int, int] = (128, 64)
    others: tuple[int, ...] = ()
    faults: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"synthetic {self.index} (identity {self.pid}, camera {self.camera})"

    def __len__(self) -> int:
        return self.length

    def load(self, indices: Iterable[int]) -> list[Tensor]:
        """Draws frames: one uint8 tensor ``[3, height, width]`` each."""
        story = _Story(self)
        return [torch.from_numpy(story.draw(int(i))).permute(2, 0, 1) for i in indices]

    def struck(self, fault: str) -> list[bool]:
        """Which of the frames one of ``FAULTS`` strikes."""
        return list(_Story(self).events[fault]["hit"])


def synthetic_data(
    num_identities: int = 40,
    num_cameras: int = 3,
    tracklets_per_camera: int = 2,
    length: tuple[int, int] = (16, 48),
    faults: Mapping[str, float] | None = None,
    seed: int = 0,
    size: tuple[int, int] = (128, 64),
) -> TrackletData:
    """Makes up a data set: one half of the identities to train on, the other to test on.

    A test identity's first tracklet in each camera is a query, the others are the gallery.

    Args:
        num_identities: in all, at least 4.
        num_cameras: at least 2; every identity walks through each.
        tracklets_per_camera: of each identity, at least 2.
        length: least and greatest number of frames of a tracklet.
        faults: strength 0 to 1 by name: ``occlusion`` (a passer-by or a thing in front), ``bad_boxes`` (shifted, of the
            wrong scale, cut off), ``identity_switch`` (a stretch shows somebody else), ``blur`` (motion blur, noise).
            None = each 0.3; names that are left out = 0.
        seed: >= 0; of everything.
        size: (height, width) of the frames in pixels.

    Raises:
        ValueError: a number out of range, or an unknown fault.
    """
    faults = dict.fromkeys(FAULTS, 0.3) if faults is None else dict(faults)
    for name, strength in faults.items():
        if name not in FAULTS or not 0 <= strength <= 1:
            raise ValueError(f"faults are {', '.join(FAULTS)}, each from 0 to 1; got {name!r}: {strength}.")
    for name, value, least in (
        ("num_identities", num_identities, 4),
        ("num_cameras", num_cameras, 2),
        ("tracklets_per_camera", tracklets_per_camera, 2),
        ("seed", seed, 0),
        ("the height of size", size[0], 16),
        ("the width of size", size[1], 8),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if not 1 <= length[0] <= length[1]:
        raise ValueError(f"length must be (least, greatest) number of frames, at least 1, got {length}.")
    people = range(1, num_identities + 1)
    halves = tuple(people[: num_identities // 2]), tuple(people[num_identities // 2 :])
    lengths = iter(
        _rng(_LENGTH, seed)
        .integers(length[0], length[1] + 1, num_identities * num_cameras * tracklets_per_camera)
        .tolist()
    )
    splits: tuple[list, list, list] = ([], [], [])
    index = 0
    for test, half in enumerate(halves):
        for pid in half:
            others = tuple(p for p in half if p != pid)
            for camera in range(1, num_cameras + 1):
                for turn in range(tracklets_per_camera):
                    t = SyntheticTracklet(seed, index, next(lengths), pid, camera, (size[0], size[1]), others, faults)
                    splits[test * (1 + (turn > 0))].append(t)
                    index += 1
    return TrackletData(*splits, name="synthetic")


class _Person:
    """What an identity looks like; the same in every camera."""

    def __init__(self, seed: int, pid: int):
        rng = _rng(_PERSON, seed, pid)

        def clothes() -> np.ndarray:
            return (_WARDROBE[rng.integers(len(_WARDROBE))] + rng.normal(0, 8, 3)).clip(8, 240)

        self.top, self.accent, self.bottom, self.bag_colour, self.shoes = (clothes() for _ in range(5))
        if np.abs(self.accent - self.top).sum() < 120:
            self.accent = 255 - self.top if rng.random() < 0.5 else np.full(3, 225.0 if self.top.mean() < 128 else 30.0)
        self.pattern = ("plain", "plain", "stripes", "pinstripes", "halves", "checks", "band", "open")[rng.integers(8)]
        self.garment = ("trousers", "trousers", "trousers", "shorts", "skirt", "coat")[rng.integers(6)]
        self.sleeves = rng.random() < 0.65
        self.skin = _SKIN[rng.integers(len(_SKIN))]
        self.hair = _HAIR[rng.integers(len(_HAIR))]
        self.hair_style = ("short", "short", "long", "bun", "bald", "cap", "hood")[rng.integers(7)]
        self.cap = clothes()
        self.bag = ("none", "none", "backpack", "shoulder", "hand", "trolley")[rng.integers(6)]
        self.side = 1 if rng.random() < 0.5 else -1  # of the body that carries the bag
        self.height = rng.uniform(0.9, 1.06)
        self.width = rng.uniform(0.82, 1.3)
        self.stride = rng.uniform(0.32, 0.6)  # greatest angle of the thigh
        self.swing = rng.uniform(0.25, 0.8)  # of the arm
        self.pace = rng.uniform(0.34, 0.62)  # phase per frame
        self.lean = rng.uniform(-0.01, 0.04)


class _Camera:
    """How a camera sees: colours are put through it before anything is drawn."""

    def __init__(self, seed: int, camera: int):
        rng = _rng(_CAMERA, seed, camera)
        cast = rng.uniform(-1, 1, 3)
        self.gain = 1 + 0.12 * (cast - cast.mean())
        self.gamma = rng.uniform(0.8, 1.25)
        self.contrast = rng.uniform(0.75, 1.0)
        self.base = rng.uniform(0, 25)
        self.scale = rng.uniform(0.8, 0.93)
        self.top = rng.uniform(0.03, 0.09)
        self.slope = rng.uniform(-0.3, 0.3)  # of the light, top to bottom
        self.noise = rng.uniform(2, 9)
        self.soft = rng.random() < 0.5

    def colours(self, rgb: np.ndarray) -> np.ndarray:
        seen = 255 * (np.asarray(rgb, np.float32).clip(0, 255) / 255) ** self.gamma * self.gain
        return (self.base + self.contrast * seen).clip(0, 255).astype(np.float32)


def _background(seed: int, camera: int, height: int, width: int) -> np.ndarray:
    """What a camera looks at: a wall with structure and a ground, ``[height, 6 width, 3]``."""
    rng = _rng(_BACKGROUND, seed, camera)
    wide = 6 * width
    y, x = np.mgrid[:height, :wide].astype(np.float32) / height

    def smooth(cells: float) -> np.ndarray:
        grid = rng.random((int(cells) + 2, int(cells * wide / height) + 2)).astype(np.float32)
        r, c = y * cells, x * cells
        i, j = r.astype(int), c.astype(int)
        fr, fc = r - i, c - j
        upper = grid[i, j] * (1 - fc) + grid[i, j + 1] * fc
        lower = grid[i + 1, j] * (1 - fc) + grid[i + 1, j + 1] * fc
        return upper * (1 - fr) + lower * fr

    wall, ground, detail = (rng.uniform(50, 210, 3) * 0.5 + rng.uniform(40, 110) for _ in range(3))
    horizon = rng.uniform(0.45, 0.85)
    period = rng.uniform(0.12, 0.5)
    kind = rng.integers(4)
    if kind == 0:  # posts
        marks = (x % period) < 0.25 * period
    elif kind == 1:  # bricks
        row = np.floor(y / (0.4 * period))
        marks = ((y % (0.4 * period)) < 0.03) | (((x + 0.5 * period * (row % 2)) % period) < 0.03)
    elif kind == 2:  # windows
        marks = ((x % (1.6 * period)) < period) & ((y % 0.3) < 0.2)
    else:  # bushes
        marks = smooth(9) > 0.55
    colour = np.where(marks[..., None], detail, wall)
    colour = np.where((y > horizon)[..., None], ground, colour)
    return (colour * (0.7 + 0.4 * smooth(5) + 0.2 * smooth(24))[..., None]).clip(0, 255).astype(np.float32)


@lru_cache(maxsize=64)
def _seen_background(seed: int, camera: int, height: int, width: int) -> np.ndarray:
    seen = _Camera(seed, camera).colours(_background(seed, camera, height, width))
    return np.concatenate([seen, seen[:, :width]], 1)  # so that every window of it is a slice


@lru_cache(maxsize=4)
def _noise(height: int, width: int) -> np.ndarray:
    return _rng(_FRAME, height, width).standard_normal((2 * height, 2 * width, 3), np.float32)


class _Story:
    """What happens in one tracklet; draws its frames."""

    def __init__(self, tracklet: SyntheticTracklet):
        self.tracklet = t = tracklet
        self.camera = _Camera(t.seed, t.camera)
        self.background = _seen_background(t.seed, t.camera, *t.size)
        self.noise = _noise(*t.size)
        rng = _rng(_TRACKLET, t.seed, t.index)
        self.direction = 1 if rng.random() < 0.5 else -1
        self.phase = rng.uniform(0, 2 * math.pi)
        self.start = rng.uniform(0, 5)
        self.speed = rng.uniform(0.01, 0.04)  # of the background, in frame heights
        self.light = rng.uniform(0.8, 1.15)
        self.zoom = rng.uniform(0.94, 1.04)
        self.sway = rng.uniform(0, 2 * math.pi, 2).tolist()
        height = t.size[0]
        ramp = 1 + self.camera.slope * (np.arange(height, dtype=np.float32) / height - 0.5)
        self.shade = (self.light * ramp)[:, None, None].astype(np.float32)
        self.people: dict[int, tuple[_Person, dict]] = {}
        self.events = {name: self._event(k, name) for k, name in enumerate(FAULTS)}

    def _event(self, k: int, name: str) -> dict:
        """When and how a fault strikes; nothing here depends on the other faults."""
        t = self.tracklet
        n, s = t.length, t.faults.get(name, 0.0)
        rng = _rng(_EVENTS, t.seed, t.index, k)
        event: dict[str, Any] = {"hit": [False] * n, "strength": s, "at": [0.0] * n}
        other = t.others[rng.integers(len(t.others))] if t.others else t.pid
        event["other"] = other
        event["thing"] = rng.random() < 0.4 or not t.others
        event["from"] = 1 if rng.random() < 0.5 else -1
        event["value"] = rng.uniform(-1, 1, 3).tolist()
        if name == "blur":  # frames of their own
            event["hit"] = (rng.random(n) < 0.6 * s).tolist()
            event["at"] = rng.uniform(0.3, 1, n).tolist()
            return event
        if rng.random() >= 0.3 + 0.7 * s:  # not in every tracklet, unless the fault is strong
            s = 0.0
        share = s * rng.uniform(0.4, 0.8)  # of the frames
        count = round(share * n)
        earliest = 0.3 if name == "identity_switch" else 0.0  # a tracklet starts with its own person
        first = round(rng.uniform(earliest, 1) * (n - count))
        event["hit"][first : first + count] = [True] * count
        event["at"][first : first + count] = [(j + 0.5) / count for j in range(count)]
        return event

    def _person(self, pid: int) -> tuple[_Person, dict]:
        if pid not in self.people:
            person = _Person(self.tracklet.seed, pid)
            parts = ("top", "accent", "bottom", "bag_colour", "shoes", "skin", "hair", "cap")
            self.people[pid] = person, {p: self.camera.colours(getattr(person, p)) for p in parts}
        return self.people[pid]

    def draw(self, i: int) -> np.ndarray:
        t, camera = self.tracklet, self.camera
        if not 0 <= i < t.length:
            raise IndexError(f"{t.name} has the frames 0 to {t.length - 1}, got {i}.")
        height, width = t.size
        rng = _rng(_FRAME, t.seed, t.index, i)
        jitter = rng.normal(0, 0.008, 2).tolist()
        # The box: person height and the place of its head, in frame heights; centre in frame heights from the left.
        scale = camera.scale * self.zoom * (1 + 0.03 * math.sin(0.15 * i + self.sway[0]))
        top = camera.top + jitter[0]
        centre = 0.5 * width / height + 0.02 * math.sin(0.2 * i + self.sway[1]) + jitter[1]
        box = self.events["bad_boxes"]
        if box["hit"][i]:
            force = box["strength"] * min(1.0, 6 * min(box["at"][i], 1 - box["at"][i]) + 0.3)
            v = box["value"]
            scale *= 1 + force * (0.9 * v[0] if v[0] > 0 else 0.5 * v[0])
            top += force * 0.3 * v[1] - (0.25 * force if v[0] > 0 else 0)
            centre += force * 0.2 * v[2]

        scroll = (self.start + self.direction * self.speed * i) * height
        image = self._scene(scroll - centre * height, round(top * height))
        switch = self.events["identity_switch"]
        pid = switch["other"] if switch["hit"][i] else t.pid
        self._figure(image, pid, i, centre, top, scale, self.direction, self.phase)

        occlusion = self.events["occlusion"]
        if occlusion["hit"][i]:
            # In from one side, over the person for most of the time, out on the other.
            u = 2 * occlusion["at"][i] - 1
            aspect = width / height
            where = 0.5 * aspect + occlusion["from"] * (0.25 * u + 0.75 * u**5) * 0.9 * aspect
            if occlusion["thing"]:
                self._thing(image, where, occlusion)
            else:
                facing = occlusion["from"]
                self._figure(image, occlusion["other"], i, where, 0.05, 1.05 * scale, facing, self.phase + 2)

        image *= self.shade
        if camera.soft:
            image[1:-1] = 0.5 * image[1:-1] + 0.25 * (image[:-2] + image[2:])
            image[:, 1:-1] = 0.5 * image[:, 1:-1] + 0.25 * (image[:, :-2] + image[:, 2:])
        noise = camera.noise
        blur = self.events["blur"]
        if blur["hit"][i]:
            force = blur["strength"] * blur["at"][i]
            image = _motion_blur(image, round(force * 0.3 * width))
            noise += 30 * force
        r, c = rng.integers(height), rng.integers(width)
        image += np.float32(noise) * self.noise[r : r + height, c : c + width]
        return image.clip(0, 255, out=image).astype(np.uint8)

    def _scene(self, left: float, down: int) -> np.ndarray:
        height, width = self.tracklet.size
        wide = self.background.shape[1]
        first = int(left) % (wide - width)
        rows = (np.arange(height) - down + round(0.06 * height)).clip(0, height - 1)
        return self.background[rows, first : first + width]

    def _thing(self, image: np.ndarray, where: float, event: dict) -> None:
        """A parked car, a post, a bush: a box with a darker rim, from the ground up."""
        height, width = image.shape[:2]
        v = event["value"]
        half = (0.14 + 0.08 * v[0]) * height
        top = int((0.3 + 0.25 * v[1]) * height)
        left, right = (int(np.clip(where * height + side * half, 0, width)) for side in (-1, 1))
        colour = self.camera.colours(_WARDROBE[int((v[2] + 1) / 2 * (len(_WARDROBE) - 1))])
        image[top:, left:right] = colour
        image[top : top + 3, left:right] = 0.5 * colour
        image[top + 12 :: 14, left:right] = 0.75 * colour

    def _figure(
        self, image: np.ndarray, pid: int, i: int, centre: float, top: float, scale: float, facing: int, phase: float
    ) -> None:
        """Draws a person, back to front; in person heights, y down from the head, x towards where it faces."""
        person, colour = self._person(pid)
        scale = scale * person.height
        pen = _Pen(image, centre, top + (1.06 - person.height) * 0.5, scale, facing)
        w = person.width
        phi = phase + person.pace * i
        bob = 0.008 * math.cos(2 * phi)
        hip, neck = (0.0, 0.5 + bob), (person.lean, 0.19 + bob)
        near_bag = person.side == facing
        far = 0.72  # the far limbs are darker

        def leg(angle: float, bend: float, shade: float) -> None:
            knee = hip[0] + 0.24 * math.sin(angle), hip[1] + 0.24 * math.cos(angle)
            foot = knee[0] + 0.23 * math.sin(angle - bend), knee[1] + 0.23 * math.cos(angle - bend)
            bare = person.garment in ("shorts", "skirt")
            pen.limb(hip, knee, 0.055 * w, 0.045 * w, shade * colour["bottom" if person.garment != "skirt" else "skin"])
            pen.limb(knee, foot, 0.04 * w, 0.03 * w, shade * colour["skin" if bare else "bottom"])
            pen.limb(foot, (foot[0] + 0.06, foot[1] + 0.005), 0.024, 0.02, shade * colour["shoes"])

        def arm(angle: float, shade: float) -> tuple[float, float]:
            shoulder = neck[0] - 0.005, neck[1] + 0.03
            elbow = shoulder[0] + 0.15 * math.sin(angle), shoulder[1] + 0.15 * math.cos(angle)
            hand = elbow[0] + 0.14 * math.sin(angle + 0.35), elbow[1] + 0.14 * math.cos(angle + 0.35)
            pen.limb(shoulder, elbow, 0.035 * w, 0.03 * w, shade * colour["top"])
            pen.limb(elbow, hand, 0.028 * w, 0.022 * w, shade * colour["top" if person.sleeves else "skin"])
            return hand

        s = math.sin(phi)
        swing = person.swing * s
        hand = arm(swing, far)
        if person.bag in ("hand", "trolley") and not near_bag:
            self._carry(pen, person, colour, hand, far)
        bends = 0.25 + 0.45 * max(0.0, math.cos(phi)), 0.25 + 0.45 * max(0.0, -math.cos(phi))
        leg(-person.stride * s, bends[0], far)
        leg(person.stride * s, bends[1], 1.0)
        if person.bag == "backpack":
            pen.limb((neck[0] - 0.11 * w, neck[1] + 0.07), (-0.1 * w, hip[1] - 0.09), 0.065, 0.07, colour["bag_colour"])
        if person.hair_style == "long":
            pen.limb((neck[0] - 0.035, 0.07 + bob), (neck[0] - 0.055, 0.24 + bob), 0.05, 0.03, colour["hair"])

        low = 0.7 if person.garment == "coat" else 0.5
        if person.garment == "skirt":
            pen.limb(hip, (0.0, 0.68 + bob), 0.075 * w, 0.13 * w, colour["bottom"])
        bottom = (0.0, low + bob)
        pen.limb(
            (neck[0], neck[1] + 0.05), bottom, 0.08 * w, 0.075 * w, colour["top"], person.pattern, colour["accent"]
        )
        head = neck[0] + 0.015, 0.075 + bob
        pen.limb(neck, head, 0.03, 0.03, colour["skin"])
        pen.limb(head, (head[0], head[1] + 0.015), 0.05, 0.045, colour["skin"])
        back = head[0] - 0.016, head[1] - 0.014
        if person.hair_style in ("short", "long", "bun"):
            pen.limb(back, (back[0] + 0.025, back[1] - 0.01), 0.05, 0.045, colour["hair"])
        if person.hair_style == "bun":
            pen.limb((back[0] - 0.045, back[1] - 0.02), (back[0] - 0.05, back[1] - 0.025), 0.028, 0.028, colour["hair"])
        if person.hair_style in ("cap", "hood"):
            pen.limb((back[0], back[1] - 0.01), (back[0] + 0.03, back[1] - 0.015), 0.052, 0.045, colour["cap"])
        if person.hair_style == "cap":
            pen.limb((head[0] + 0.03, head[1] - 0.015), (head[0] + 0.08, head[1] - 0.01), 0.012, 0.01, colour["cap"])
        if person.hair_style == "hood":
            pen.limb(back, (neck[0] - 0.03, neck[1] + 0.03), 0.045, 0.05, colour["cap"])

        if person.bag == "shoulder" and near_bag:
            pen.limb((neck[0], neck[1] + 0.02), (-0.03, 0.46), 0.01, 0.01, colour["bag_colour"])
            pen.limb((-0.06, 0.47), (0.03, 0.47), 0.06, 0.06, colour["bag_colour"])
        hand = arm(-swing, 0.9)
        pen.limb(hand, (hand[0], hand[1] + 0.015), 0.022, 0.02, colour["skin"])
        if person.bag in ("hand", "trolley") and near_bag:
            self._carry(pen, person, colour, hand, 1.0)

    @staticmethod
    def _carry(pen: "_Pen", person: _Person, colour: dict, hand: tuple[float, float], shade: float) -> None:
        bag = shade * colour["bag_colour"]
        if person.bag == "hand":
            pen.limb((hand[0] - 0.03, hand[1] + 0.09), (hand[0] + 0.03, hand[1] + 0.09), 0.055, 0.055, bag)
        else:
            pen.limb(hand, (-0.18, 0.72), 0.008, 0.008, bag)
            pen.limb((-0.19, 0.76), (-0.19, 0.92), 0.065, 0.065, bag)


class _Pen:
    """Paints shapes given in a person's coordinates onto an image, with smooth edges."""

    def __init__(self, image: np.ndarray, centre: float, top: float, scale: float, facing: int):
        height, width = image.shape[:2]
        self.image = image
        self.unit = scale * height  # pixels
        self.x = ((np.arange(width, dtype=np.float32) + 0.5 - centre * height) * (facing / self.unit)).astype(
            np.float32
        )
        self.y = ((np.arange(height, dtype=np.float32) + 0.5 - top * height) / self.unit).astype(np.float32)
        self.x0, self.y0, self.facing = centre * height, top * height, facing

    def limb(
        self,
        a: tuple[float, float],
        b: tuple[float, float],
        ra: float,
        rb: float,
        colour: np.ndarray,
        pattern: str = "plain",
        accent: np.ndarray | None = None,
    ) -> None:
        """A tapered capsule from ``a`` (radius ``ra``) to ``b`` (radius ``rb``)."""
        height, width = self.image.shape[:2]
        ends = (self.x0 + self.facing * self.unit * a[0], self.x0 + self.facing * self.unit * b[0])
        reach = self.unit * max(ra, rb) + 1
        c0, c1 = max(int(min(ends) - reach), 0), min(int(max(ends) + reach) + 1, width)
        r0 = max(int(self.y0 + self.unit * min(a[1], b[1]) - reach), 0)
        r1 = min(int(self.y0 + self.unit * max(a[1], b[1]) + reach) + 1, height)
        if c0 >= c1 or r0 >= r1:
            return
        x, y = self.x[c0:c1] - a[0], (self.y[r0:r1] - a[1])[:, None]
        dx, dy = b[0] - a[0], b[1] - a[1]
        along = ((x * dx + y * dy) / (dx * dx + dy * dy)).clip(0, 1)
        distance = np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2) - (ra + (rb - ra) * along)
        alpha = (0.5 - self.unit * distance).clip(0, 1)[..., None]
        if pattern != "plain" and accent is not None:
            colour = np.where(_pattern(pattern, x, y)[..., None], accent, colour)
        patch = self.image[r0:r1, c0:c1]
        patch += alpha * (colour - patch)


def _pattern(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the second colour is, in a torso's coordinates."""
    if name == "stripes":
        where = (y % 0.09) < 0.04
    elif name == "pinstripes":
        where = (x % 0.055) < 0.02
    elif name == "halves":
        where = y > 0.13
    elif name == "checks":
        where = ((x % 0.1) < 0.05) ^ ((y % 0.1) < 0.05)
    elif name == "band":
        where = (y > 0.06) & (y < 0.14)
    else:  # open: a jacket, and what is worn below it
        where = x > 0.03
    return np.broadcast_to(where, np.broadcast_shapes(x.shape, y.shape))


def _motion_blur(image: np.ndarray, reach: int) -> np.ndarray:
    """The mean over ``2 reach + 1`` pixels of each row."""
    if reach < 1:
        return image
    total = np.pad(image, ((0, 0), (reach + 1, reach), (0, 0)), mode="edge").cumsum(1)
    return (total[:, 2 * reach + 1 :] - total[:, : -2 * reach - 1]) / np.float32(2 * reach + 1)
