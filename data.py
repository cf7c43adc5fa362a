"""Images, from wherever they are to batches of uint8 crops (everything after happens on the device).

A *source* is a list of images: `source[i] -> (uint8 (3, H, W), label)`, `len(source)`, `source.labels` (an array; −1 is
none), `source.classes` (their names). A new kind of source is one function and one row of SOURCES. `Views` cuts the
crops, `Batches` says which, in which order.
All randomness of a sample is keyed by (seed, epoch, position in the epoch): the stream of samples is the same
however many workers, processes or accumulation steps produce it.
"""
import hashlib
import math
import os

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                    # ImageNet's, for images in 0..1
FILL = [124, 116, 104]                                                      # the same mean, of bytes
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class BadImage(ValueError):
    """An image file that cannot be decoded."""


# ------------------------------------------------------------------------------------------------ random streams

def key(*numbers):
    """A seed for each tuple of integers: their hash (of which PyTorch's CPU generator takes in the low 32 bits)."""
    text = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def generator(*numbers):
    return torch.Generator().manual_seed(key(*numbers))


class Batches:
    """This process's share of the stream of micro-batches, as lists of (epoch, position, index).

    Each epoch is a permutation of `images` indices, cut into batches of `batch_size` (what is left over is dropped)
    and these into micro-batches, dealt to the `world` processes in turn. Steps run from `start` to `stop`, across
    epochs, so that a run can continue anywhere without replaying what came before. With repeats = r, an epoch as long
    takes an r-th of the images, each r times, spread over a batch (repeated augmentation, Hoffer et al., arXiv
    1901.09335). Raises ValueError.
    """

    def __init__(self, images, batch_size, micro_batch, start, stop, seed=0, rank=0, world=1, repeats=1):
        if images < batch_size:
            raise ValueError(f"{images} training images make no batch of {batch_size}: give more, or a smaller --batch-size")
        if batch_size % (micro_batch * world):
            raise ValueError(f"batch size {batch_size} is not a multiple of micro-batch {micro_batch} × {world} process(es)")
        self.images, self.batch_size, self.micro_batch, self.seed = images, batch_size, micro_batch, seed
        self.start, self.stop, self.rank, self.world, self.repeats = start, stop, rank, world, repeats
        self.steps_per_epoch = images // batch_size

    def __iter__(self):
        shuffled = None
        for step in range(self.start, self.stop):
            epoch, first = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                order, shuffled = torch.randperm(self.images, generator=generator(self.seed, epoch)), epoch
            first *= self.batch_size
            batch = order[torch.arange(first, first + self.batch_size) // self.repeats]
            batch = torch.cat([batch[i::self.repeats] for i in range(self.repeats)]).tolist()   # neighbours differ
            for micro in range(self.rank, self.batch_size // self.micro_batch, self.world):
                at = micro * self.micro_batch
                yield [(epoch, first + p, batch[p]) for p in range(at, at + self.micro_batch)]


class Views(torch.utils.data.Dataset):
    """What training sees of a source: `view(source[index], generator)`, for each (epoch, position, index)."""

    def __init__(self, source, view, seed=0):
        self.source, self.view, self.seed = source, view, seed

    def __getitem__(self, sample):
        epoch, position, index = sample
        return self.view(self.source[index], generator(self.seed, epoch, position))


def loader(views, batches, workers=0, pin=False):
    """The batches, made by `workers` processes ahead of time. Yields what the view returns, stacked."""
    return torch.utils.data.DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=pin)


# ------------------------------------------------------------------------------------------------ transforms

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


def random_resized_crop(image, size, scale, generator, ratio=(3 / 4, 4 / 3), interpolation=BILINEAR):
    """A crop with a share `scale` (low, high) of the area and an aspect in `ratio`, at `size` px, flipped half the time.

    image: uint8 (3, H, W). Returns uint8 (3, size, size); antialiased. The distribution is that of
    torchvision's RandomResizedCrop, which takes no generator: ten tries, then the largest centred crop that fits.
    """
    H, W = image.shape[-2:]
    draws = torch.rand(10, 4, generator=generator).tolist()
    flip = torch.rand((), generator=generator) < 0.5
    for area, aspect, y, x in draws:
        area = H * W * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            top, left = int(y * (H - h + 1)), int(x * (W - w + 1))
            break
    else:
        h, w = min(H, round(W / ratio[0])), min(W, round(H * ratio[1]))
        top, left = (H - h) // 2, (W - w) // 2
    crop = TF.resized_crop(image, top, left, h, w, [size, size], interpolation, antialias=True)
    return TF.horizontal_flip(crop) if flip else crop


def center_crop(image, size):
    """The largest centred square of a uint8 image (3, H, W), at `size` px."""
    side = min(image.shape[-2:])
    return TF.resize(TF.center_crop(image, [side, side]), [size, size], antialias=True)


def evaluation_crop(image, resize, size):
    """What models are tested on: the short side of a uint8 image (3, H, W) at `resize` px, the central `size` × `size`."""
    return TF.center_crop(TF.resize(image, [resize], BICUBIC, antialias=True), [size, size])


def augment(image, generator, randaugment=None, erasing=None):
    """RandAugment and random erasing of a uint8 image (3, H, W), both as in timm, with torchvision's operations.

    randaugment: magnitude m in 0..10; two operations (arXiv 1909.13719), each done half the time, at m + N(0, 0.5).
    erasing: how often a box is filled with N(0, 1) in normalised space (arXiv 1708.04896).
    """
    shared = torch.default_generator                                        # these transforms take no other
    before = shared.get_state()
    shared.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)))
    for _ in range(2 if randaugment is not None else 0):
        magnitude = (randaugment + 0.5 * torch.randn(())).clamp(0, 10)
        if torch.rand(()) < 0.5:                                            # 31 levels, of 0..10
            image = v2.RandAugment(1, round(3 * float(magnitude)), 31, BILINEAR, FILL)(image)
    if erasing and torch.rand(()) < erasing:
        image = denormalize(v2.RandomErasing(1.0, (0.02, 1 / 3), value="random")(normalize(image[None])[0])[None])[0]
    shared.set_state(before)
    return image


def normalize(image):
    """uint8 (B, 3, H, W) -> float32 with the data set's mean 0 and deviation 1, on the image's device."""
    mean, std = (torch.tensor(c, device=image.device).view(-1, 1, 1) for c in (MEAN, STD))
    return (image.float() / 255 - mean) / std


def denormalize(image):
    """The way back: float (B, 3, H, W) -> uint8."""
    mean, std = (torch.tensor(c, device=image.device).view(-1, 1, 1) for c in (MEAN, STD))
    return ((image.float() * std + mean) * 255).round().clamp(0, 255).byte()


def write_picture(path, images, columns):
    """Normalised images (B, 3, H, W) as a PNG, row by row; small ones are shown larger."""
    grid = torchvision.utils.make_grid(denormalize(images).cpu(), nrow=columns, padding=2)
    times = max(1, 128 // images.shape[-1])
    torchvision.io.write_png(grid.repeat_interleave(times, 1).repeat_interleave(times, 2), path + ".tmp")
    os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------------------------ folders, downloads

def read_image(path):
    """An image file as uint8 (3, H, W), upright, first frame. Raises BadImage."""
    try:
        image = decode_image(path, ImageReadMode.RGB, apply_exif_orientation=True)
        return image[0] if image.ndim == 4 else image                       # a GIF comes with its frames
    except RuntimeError:                                                    # BMP, TIFF, 16 bits: Pillow can
        pass
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)
    except Exception as error:                                              # decoders fail in many ways
        raise BadImage(f"{path} is no readable image ({type(error).__name__}): remove or replace it") from None


class Folder:
    """The images in a folder: of class folders, with or without train/ and val/ above them, or flat.

    The class of an image is the first folder below the root (−1 where there is none); `empty` are folders there without
    an image. Where there are not both train/ and val/ (or valid/, test/), a hundredth of the images, at least 8 if there
    are 32, is held out, evenly spaced by name. split: "train"; "val"; or "test", the same as val, but all images of a
    folder without train/. Raises ValueError if there is no such folder, or no image in it.
    """

    def __init__(self, root, split):
        if not os.path.isdir(root):
            raise ValueError(f"no folder {root}: --data takes {', '.join(SOURCES)} or a folder of images")
        parts = {name: os.path.join(root, name) for name in ("train", "val", "valid", "test")}
        parts = {name: path for name, path in parts.items() if os.path.isdir(path)}
        test = next((parts[name] for name in ("val", "valid", "test") if name in parts), None)
        if "train" in parts and test:
            self.root, hold_out = parts["train"] if split == "train" else test, False
        elif "train" not in parts and split == "test":
            self.root, hold_out = test or root, False
        else:
            self.root, hold_out = parts.get("train", root), True
        found = sorted(os.path.join(folder, name).removeprefix(os.path.join(self.root, ""))
                       for folder, _, names in os.walk(self.root, followlinks=True)
                       for name in names if name.lower().endswith(EXTENSIONS))
        if not found:
            raise ValueError(f"no images ({' '.join(EXTENSIONS)}) in {self.root}")
        self.classes = sorted({path.split(os.sep)[0] for path in found if os.sep in path})
        self.empty = sorted({entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != "."} - set(self.classes))
        if hold_out:
            held = set(range(0, len(found), len(found) // max(len(found) // 100, min(8, len(found) // 4), 1)))
            found = [path for i, path in enumerate(found) if (i in held) == (split != "train")]
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([number.get(path.split(os.sep)[0], -1) for path in found])
        # one array of bytes, not a list of strings: forked workers then share it instead of copying it
        self.paths = np.array([os.fsencode(path) for path in found])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return read_image(os.path.join(self.root, os.fsdecode(self.paths[index]))), int(self.labels[index])


class Download:
    """A torchvision data set of uint8 arrays, fetched to `root` when first asked for. Raises ValueError if it can't be."""

    def __init__(self, cls, root="downloads", **split):
        try:
            self.set = cls(root, download=True, **split)
        except Exception as error:                                          # network, disk and archive errors alike
            raise ValueError(f"{cls.__name__} cannot be downloaded to {root}/: {(str(error) or type(error).__name__).splitlines()[0]}") from None
        self.channels_last, self.classes = self.set.data.shape[-1] == 3, self.set.classes
        self.labels = np.array(getattr(self.set, "targets", getattr(self.set, "labels", None)))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = torch.from_numpy(self.set.data[index])
        return image.permute(2, 0, 1) if self.channels_last else image, int(self.labels[index])


# ------------------------------------------------------------------------------------------------ a built-in world

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


# ------------------------------------------------------------------------------------------------ what --data takes

SOURCES = {  # name -> source of a split ("train", or "val" or "test") for a model that takes images of `size` px
    "shapes": lambda split, size: Shapes(size, split),
    "cifar10": lambda split, size: Download(torchvision.datasets.CIFAR10, train=split == "train"),
    "cifar100": lambda split, size: Download(torchvision.datasets.CIFAR100, train=split == "train"),
    "stl10": lambda split, size: Download(torchvision.datasets.STL10, split="train+unlabeled" if split == "train" else "test"),
}


def open_source(data, split, size):
    """The source behind --data: a row of SOURCES, or a folder (write ./shapes for a folder of that name)."""
    return SOURCES[data](split, size) if data in SOURCES else Folder(data, split)
