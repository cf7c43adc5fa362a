"""A built-in world of images, for runs that need no data: one textured object on a background.
Each is made when it is asked for, at any size, from its index; class, pose and mask are known."""
import math

import numpy as np
import torch


def disk(u, v, x, y, r):
    """How far the points (u, v) lie inside a disk: positive inside, as below."""
    return r - np.hypot(u - x, v - y)


def box(u, v, x0, x1, y0, y1):
    return np.minimum.reduce([u - x0, x1 - u, v - y0, y1 - v])


def convex(u, v, *corners):
    """A convex polygon: the distance to its nearest edge. Corners are counter-clockwise."""
    inside = np.inf
    for i, (x1, y1) in enumerate(corners):
        x0, y0 = corners[i - 1]
        edge = (x1 - x0) * (v - y0) - (y1 - y0) * (u - x0)
        inside = np.minimum(inside, edge / math.hypot(x1 - x0, y1 - y0))
    return inside


# Objects in the unit circle, u to the right, v up. None looks the same when turned, so that each
# has an angle. A union is a maximum, an intersection a minimum, a complement a minus.
KINDS = {
    "arrow": lambda u, v: np.maximum(
        box(u, v, -.25, .25, -1, .2), convex(u, v, (-.8, .1), (.8, .1), (0, 1))),
    "house": lambda u, v: np.maximum(
        box(u, v, -.6, .6, -.8, .2), convex(u, v, (-.9, .1), (.9, .1), (0, .95))),
    "heart": lambda u, v: np.maximum.reduce([
        disk(u, v, -.42, .35, .5), disk(u, v, .42, .35, .5),
        convex(u, v, (0, -.95), (.85, .1), (0, .5), (-.85, .1))]),
    "drop": lambda u, v: np.maximum(
        disk(u, v, 0, -.35, .6), convex(u, v, (-.56, -.15), (.56, -.15), (0, 1))),
    "crescent": lambda u, v: np.minimum(disk(u, v, 0, 0, 1), -disk(u, v, .45, 0, .75)),
    "wedge": lambda u, v: np.minimum(
        disk(u, v, 0, 0, .95), -np.minimum(.5 * u - .85 * v, .5 * u + .85 * v)),
    "chevron": lambda u, v: np.minimum(
        convex(u, v, (-.95, -.55), (.95, -.55), (0, .95)),
        -convex(u, v, (-.95, -.95), (.95, -.95), (0, .3))),
    "tee": lambda u, v: np.maximum(
        box(u, v, -.85, .85, .25, .75), box(u, v, -.25, .25, -.95, .3)),
    "ell": lambda u, v: np.maximum(
        box(u, v, -.6, -.1, -.8, .9), box(u, v, -.6, .75, -.8, -.3)),
    "fish": lambda u, v: np.maximum(
        np.minimum(disk(u, v, .15, .55, .95), disk(u, v, .15, -.55, .95)),
        convex(u, v, (-.95, -.5), (-.3, 0), (-.95, .5))),
}


def pink_noise(count, size, rng):
    """Periodic textures whose amplitude falls as 1/f, as in photographs: (count, size, size)
    float32 in 0..1."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    f[0, 0] = np.inf                                            # no mean
    shape = (count, *f.shape)
    spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / f
    noise = np.fft.irfft2(spectrum, s=(size, size))
    noise = 0.5 + 0.22 * noise / noise.std((1, 2), keepdims=True)
    return noise.clip(0, 1).astype(np.float32)


class Shapes:
    """`shapes[i]` is (image uint8 (3, size, size), label), or with target "pose" or "mask" that in
    place of the label; `shapes.sample(i)` is all of them."""
    classes = list(KINDS)

    def __init__(self, size, split="train", count=None, seed=0, target="label"):
        self.size = size
        self.seed = (seed, split != "train")
        self.target = target
        self.labels = np.arange(count or (4096 if split == "train" else 512)) % len(KINDS)
        self.textures = pink_noise(16, 2 * size, np.random.default_rng((*self.seed, 1)))
        self.y, self.x = np.mgrid[:size, :size].astype(np.float32) + 0.5

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        sample = self.sample(index)
        return sample["image"], sample[self.target]

    def sample(self, index):
        """A dictionary: image, uint8 (3, S, S); label, int; pose, float32 (4,): centre x and y and
        radius as shares of the side, angle in radians, clockwise, in 0..2π; mask, bool (S, S), the
        object's pixels. Raises IndexError."""
        label = int(self.labels[index])
        rng = np.random.default_rng((*self.seed, 2, index))
        S = self.size
        radius = rng.uniform(0.25, 0.45)
        cx, cy = rng.uniform(radius, 1 - radius, 2)
        angle = rng.uniform(0, 2 * math.pi)

        # every pixel along the object's own axes, in radii, v up
        r = np.float32(radius * S)
        dx = self.x - np.float32(cx * S)
        dy = self.y - np.float32(cy * S)
        cos = np.float32(math.cos(angle) / r)
        sin = np.float32(math.sin(angle) / r)
        u = cos * dx + sin * dy
        v = sin * dx - cos * dy
        distance = KINDS[self.classes[label]](u, v) * r         # to the object's edge, in pixels
        cover = (distance + 0.5).clip(0, 1)                     # share of each pixel that it covers

        # the background, whose light falls off in some direction; then the object
        towards = rng.uniform(0, 2 * math.pi)
        slope = math.cos(towards) * (self.x / S - 0.5) + math.sin(towards) * (self.y / S - 0.5)
        light = 0.5 + 0.7 * slope                               # (S, S)
        image = self.paint(rng, 0.7 * light + 0.3 * self.noise(rng))
        painted = self.paint(rng, self.pattern(rng, u, v))
        image += cover * (painted - image)
        return {"image": torch.from_numpy((image * 255).astype(np.uint8)), "label": label,
                "pose": torch.tensor([cx, cy, radius, angle]).float(),
                "mask": torch.from_numpy(cover > 0.5)}

    def noise(self, rng):
        """A window of one of the textures, (S, S) in 0..1."""
        y, x = rng.integers(0, self.size, 2)
        texture = self.textures[rng.integers(len(self.textures))]
        window = texture[y:y + self.size, x:x + self.size]
        return window[:, ::-1] if rng.random() < 0.5 else window

    def pattern(self, rng, u, v):
        """The object's texture, turned with it: noise, stripes, checks or dots; (S, S) in 0..1."""
        kind = rng.integers(4)
        frequency = np.float32(rng.uniform(4, 9))
        if kind == 0:
            return self.noise(rng)
        if kind == 1:
            return 0.5 + 0.5 * np.sin(frequency * u)
        checks = np.sin(frequency * u) * np.sin(frequency * v)
        if kind == 2:
            return (0.5 + 2 * checks).clip(0, 1)
        return (4 * checks - 1).clip(0, 1)

    @staticmethod
    def paint(rng, texture):
        """A texture (S, S) between two colours: (3, S, S) in 0..1."""
        low = rng.uniform(0, 1, (3, 1, 1)).astype(np.float32)
        change = rng.uniform(-0.8, 0.8, (3, 1, 1)).astype(np.float32)
        high = (low + change).clip(0, 1)
        return low + (high - low) * texture
