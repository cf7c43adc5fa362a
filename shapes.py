"""A built-in world of images, for runs that need no data: one textured object of ten kinds on a background, at any size.

Each image is made when it is asked for, from a seed and its index; its class, pose and mask are known.
"""
import math

import numpy as np
import torch


def disk(u, v, x, y, r):
    return r - np.hypot(u - x, v - y)


def convex(u, v, *corners):
    """Signed distance to the nearest edge of a convex polygon, corners counter-clockwise; positive inside."""
    edges = zip(corners, corners[1:] + corners[:1])
    return np.minimum.reduce([((x1 - x0) * (v - y0) - (y1 - y0) * (u - x0)) / math.hypot(x1 - x0, y1 - y0)
                              for (x0, y0), (x1, y1) in edges])


def box(u, v, x0, x1, y0, y1):
    return np.minimum.reduce([u - x0, x1 - u, v - y0, y1 - v])


# Objects in the unit circle, u to the right, v up; positive inside. None looks the same when turned, so that each has
# an angle. A union is a maximum, an intersection a minimum, a complement a minus.
KINDS = {
    "arrow": lambda u, v: np.maximum(box(u, v, -.25, .25, -1, .2), convex(u, v, (-.8, .1), (.8, .1), (0, 1))),
    "house": lambda u, v: np.maximum(box(u, v, -.6, .6, -.8, .2), convex(u, v, (-.9, .1), (.9, .1), (0, .95))),
    "heart": lambda u, v: np.maximum.reduce([disk(u, v, -.42, .35, .5), disk(u, v, .42, .35, .5),
                                             convex(u, v, (0, -.95), (.85, .1), (0, .5), (-.85, .1))]),
    "drop": lambda u, v: np.maximum(disk(u, v, 0, -.35, .6), convex(u, v, (-.56, -.15), (.56, -.15), (0, 1))),
    "crescent": lambda u, v: np.minimum(disk(u, v, 0, 0, 1), -disk(u, v, .45, 0, .75)),
    "wedge": lambda u, v: np.minimum(disk(u, v, 0, 0, .95), -np.minimum(.5 * u - .85 * v, .5 * u + .85 * v)),
    "chevron": lambda u, v: np.minimum(convex(u, v, (-.95, -.55), (.95, -.55), (0, .95)),
                                       -convex(u, v, (-.95, -.95), (.95, -.95), (0, .3))),
    "tee": lambda u, v: np.maximum(box(u, v, -.85, .85, .25, .75), box(u, v, -.25, .25, -.95, .3)),
    "ell": lambda u, v: np.maximum(box(u, v, -.6, -.1, -.8, .9), box(u, v, -.6, .75, -.8, -.3)),
    "fish": lambda u, v: np.maximum(np.minimum(disk(u, v, .15, .55, .95), disk(u, v, .15, -.55, .95)),
                                    convex(u, v, (-.95, -.5), (-.3, 0), (-.95, .5))),
}


def pink_noise(count, size, rng):
    """`count` periodic textures (size, size) whose amplitude falls as 1/f, as in photographs; about 0..1, float32."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    f[0, 0] = np.inf                                                        # no mean
    spectrum = (rng.standard_normal((count, *f.shape)) + 1j * rng.standard_normal((count, *f.shape))) / f
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return (0.5 + 0.22 * noise / noise.std((1, 2), keepdims=True)).clip(0, 1).astype(np.float32)


class Shapes:
    """A procedural world: one textured object of ten kinds on a 1/f background, made by seed and index at any size.

    `source[i]` is (image uint8 (3, size, size), kind); `source.sample(i)` knows the pose and the object's mask too, and
    target = "pose" or "mask" gives these in place of the kind.
    """
    classes = list(KINDS)

    def __init__(self, size, split="train", count=None, seed=0, target="label"):
        self.size, self.count, self.seed = size, count or (4096 if split == "train" else 512), (seed, split != "train")
        self.labels, self.target = np.arange(self.count) % len(KINDS), target
        self.textures = pink_noise(16, 2 * size, np.random.default_rng((*self.seed, 1)))
        self.y, self.x = np.mgrid[:size, :size].astype(np.float32) + 0.5

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        sample = self.sample(index)
        return sample["image"], sample[self.target]

    def sample(self, index):
        """image: uint8 (3, S, S). label: int. pose: float32 (4,): centre x and y and radius as shares of the side,
        angle in radians, clockwise, in 0..2π. mask: bool (S, S), the object's pixels. Raises IndexError."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng, S = np.random.default_rng((*self.seed, 2, index)), self.size
        label = index % len(KINDS)
        radius = rng.uniform(0.25, 0.45)
        cx, cy = rng.uniform(radius, 1 - radius, 2)
        angle = rng.uniform(0, 2 * math.pi)
        dx, dy, r = self.x - np.float32(cx * S), self.y - np.float32(cy * S), np.float32(radius * S)
        cos, sin = np.float32(math.cos(angle) / r), np.float32(math.sin(angle) / r)
        u, v = cos * dx + sin * dy, sin * dx - cos * dy                     # the object's own axes, v up
        cover = (KINDS[self.classes[label]](u, v) * r + 0.5).clip(0, 1)     # share of each pixel that it covers
        towards = rng.uniform(0, 2 * math.pi)                               # the background's light falls off in a direction
        ramp = 0.5 + 0.7 * (math.cos(towards) * (self.x / S - 0.5) + math.sin(towards) * (self.y / S - 0.5))
        image = self.paint(rng, 0.7 * ramp + 0.3 * self.noise(rng), contrast=0.8)
        image += cover * (self.paint(rng, self.pattern(rng, u, v), contrast=0.8) - image)
        return {"image": torch.from_numpy((image * 255).astype(np.uint8)), "label": label,
                "pose": torch.tensor([cx, cy, radius, angle]).float(), "mask": torch.from_numpy(cover > 0.5)}

    def noise(self, rng):
        """A window of one of the textures, (S, S) in 0..1."""
        y, x = rng.integers(0, self.size, 2)
        window = self.textures[rng.integers(len(self.textures)), y:y + self.size, x:x + self.size]
        return window[:, ::-1] if rng.random() < 0.5 else window

    def pattern(self, rng, u, v):
        """The object's texture, turned with it: noise, stripes, checks or dots; (S, S) in 0..1."""
        kind, frequency = rng.integers(4), np.float32(rng.uniform(4, 9))
        if kind == 0:
            return self.noise(rng)
        if kind == 1:
            return 0.5 + 0.5 * np.sin(frequency * u)
        checks = np.sin(frequency * u) * np.sin(frequency * v)
        return (0.5 + 2 * checks).clip(0, 1) if kind == 2 else (4 * checks - 1).clip(0, 1)

    @staticmethod
    def paint(rng, texture, contrast):
        """A texture between two colours: (S, S) in 0..1 -> (3, S, S) in 0..1."""
        low = rng.uniform(0, 1, (3, 1, 1)).astype(np.float32)
        high = (low + rng.uniform(-contrast, contrast, (3, 1, 1)).astype(np.float32)).clip(0, 1)
        return low + (high - low) * texture
