"""Images, from wherever they are to batches of uint8 crops; everything after happens on the device.

A *source* is a list of images: `source[i]` → (uint8 (C, H, W), label), `len(source)`,
`source.labels` (an array; −1 is none), `source.classes` (names). All randomness of a sample is keyed
by (seed, epoch, position in the epoch): workers, processes and accumulation do not change it.
"""
import atexit
import contextlib
import functools
import hashlib
import io
import math
import multiprocessing
import os
import signal
import sys
import tarfile
import warnings

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import masking
from shapes import Shapes

MEAN = (0.485, 0.456, 0.406)                            # ImageNet's, pixels in 0..1
STD = (0.229, 0.224, 0.225)
BICUBIC = InterpolationMode.BICUBIC
BILINEAR = InterpolationMode.BILINEAR
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")     # no EPS: Pillow would start a program

decode_image = getattr(torchvision.io, "decode_image", None)    # deprecated in torchvision 0.29


# ---- random streams

def key(*numbers):
    """A seed for each tuple of integers: their hash (PyTorch's generator takes its low 32 bits)."""
    text = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def generator(*numbers):
    return torch.Generator().manual_seed(key(*numbers))


# ---- one image

class BadImage(ValueError):
    """An image that cannot be read."""


def decode(content, name):
    """Bytes of an image file → uint8 (3, H, W), upright, first frame. Raises BadImage.

    Those of a .npy file, an array of bytes (H, W, C) or (H, W), → (C, H, W). name: of the file.
    """
    try:
        if name.lower().endswith(".npy"):
            array = np.load(io.BytesIO(content), allow_pickle=False)
            if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
                raise BadImage(f"{array.dtype} {array.shape}, not uint8 (height, width, channels)")
            return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # torchvision's decoders are deprecated
            # Pillow reads the header, and refuses what would decode to gigabytes
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.format in ("JPEG", "MPO", "PNG"):
                    # faster than Pillow, which may still read what this refuses
                    with contextlib.suppress(Exception):
                        pixels = decode_image(torch.frombuffer(content, dtype=torch.uint8),
                                              "RGB", apply_exif_orientation=True)
                        if pixels.dtype == torch.uint8:
                            return pixels
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):          # 16 bits, which Pillow would cut off at 255
                    array = np.array(image) // 257
                    image = Image.fromarray(array.clip(0, 255).astype(np.uint8))
                return TF.pil_to_tensor(image.convert("RGB"))
    except Exception as error:                          # decoders fail in many ways
        reason = error if isinstance(error, BadImage) else type(error).__name__
        raise BadImage(f"{name} is no readable image ({reason})") from None


def read_image(path):
    """The image in a file, see `decode`. Raises BadImage."""
    if not os.path.isfile(path):                        # reading a pipe would take for ever
        raise BadImage(f"{path} is no readable image (no regular file)")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise BadImage(f"{path} is no readable image ({error.strerror})") from None
    return decode(content, path)


# ---- folders and tars

class Folder:
    """The images in a folder, in a tar of one, or in a folder of tars; `paths`: their names (bytes).

    They are in the order of their names, in tars as these have them. The class of an image is its
    first folder (−1: none), below train/ and val/ (or valid/, test/) if both are there. Otherwise a
    hundredth of the images, at least 8 of 32, is held out, evenly spaced. split: "train"; "val";
    "test", the same as val, but all images where there is no train/; "all", with train/ and val/ as
    folders like others. Raises ValueError, also if a tar changes later.
    """

    def __init__(self, path, split):
        self.path = path
        paths, self.tars, members = find_images(path)
        part, hold_out = part_of(split, np.unique(first_folders(paths)).tolist())
        below = np.char.startswith(paths, part)
        paths = paths[below]

        # classes are numbered before images are held out: both splits agree on them
        classes, labels = np.unique(first_folders(paths, len(part)), return_inverse=True)
        if classes[0] == b"":                           # images that are in no folder
            classes = classes[1:]
            labels = labels - 1
        self.classes = [os.fsdecode(name) for name in classes.tolist()]

        kept = np.full(len(paths), True)
        if hold_out:
            every = len(paths) // max(len(paths) // 100, min(8, len(paths) // 4), 1)
            held_out = np.arange(len(paths)) % every == 0
            kept = ~held_out if split == "train" else held_out
        # arrays, no lists of Python's objects: forked workers share them instead of copying them
        self.labels = labels[kept]
        self.paths = paths[kept]
        self.members = members[below][kept]

    def where(self, index):
        return os.path.join(self.path, os.fsdecode(self.paths[index]))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        label = int(self.labels[index])
        if not self.tars:
            return read_image(self.where(index)), label
        number, offset, size = self.members[index].tolist()
        tar = self.tars[number]
        file = open_tar(*tar).fileno()
        content = os.pread(file, size, offset)          # workers share the file, but no position
        if stamp(file)[1:] != tar[1:]:
            raise ValueError(f"{tar[0]}: the archive changed; start again")
        return decode(content, self.where(index)), label


def first_folders(paths, start=0):
    """The first folder of each name, `start` bytes into it: (N,) bytes, b"" where there is none."""
    letters = paths.view(np.uint8).reshape(len(paths), paths.itemsize)[:, start:]
    end = (letters == ord("/")).argmax(1)               # 0 without a slash
    folders = letters[:, :end.max(initial=0) + 1].copy()
    folders[np.arange(folders.shape[1]) >= end[:, None]] = 0
    return folders.view(f"S{folders.shape[1]}")[:, 0]


def part_of(split, folders):
    """(which folder holds a split, "" for all; whether some of its images are held out)."""
    train = b"train/" if b"train" in folders else b""
    test = next((name + b"/" for name in (b"val", b"valid", b"test") if name in folders), b"")
    if split == "all":
        return b"", False
    if train and test:
        return (train if split == "train" else test), False
    if split == "test" and not train:
        return test, False
    return train, True


def walk(folder, prefix="", above=()):
    """The names of all files below a folder."""
    real = os.path.realpath(folder)
    if real in above:                                   # a link leads back to where we came from
        return
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from walk(entry.path, f"{prefix}{entry.name}/", (*above, real))
        else:
            yield prefix + entry.name


def find_images(path):
    """The images below `path`: names, (N,) bytes; the tars that hold them, (path, size, time), or
    none; (number of the tar, offset, size) of each image, (N, 3). Raises ValueError."""
    if os.path.isdir(path):
        files = sorted(walk(path))
        images = [name for name in files if name.lower().endswith(EXTENSIONS)]
        if images:
            # one call for all names: there may be millions
            images = os.fsencode("\0".join(images)).split(b"\0")
            return np.array(images), [], np.empty((len(images), 0))
        tars = [stamp(os.path.join(path, name)) for name in files if name.endswith(".tar")]
    elif os.path.isfile(path):
        tars = [stamp(path)]
    else:
        raise ValueError(f"no folder {path}: --data takes a folder of images, a .tar of one, "
                         f"a folder of .tar shards, or one of {', '.join(SOURCES)}")
    names = []
    members = []
    for number, tar in enumerate(tars):
        inside, places = tar_index(*tar)
        # a tar in train/ holds images of train/
        folder = os.path.join(os.path.dirname(os.path.relpath(tar[0], path)), "")
        names.append(np.char.add(os.fsencode(folder), inside))
        members.append(np.insert(places, 0, number, axis=1))
    if not any(map(len, names)):
        raise ValueError(f"no images in {path} ({' '.join(EXTENSIONS)})")
    return np.concatenate(names), tars, np.concatenate(members)


def stamp(file):
    """(path or descriptor, size, time of the last change) of a file."""
    status = os.stat(file)
    return file, status.st_size, status.st_mtime_ns


@functools.lru_cache(200)                               # systems limit how many may be open
def open_tar(path, size, mtime_ns):
    return open(path, "rb", buffering=0)


@functools.cache
def tar_index(path, size, mtime_ns):
    """The images in a tar: names, (N,) bytes, and (offset, size), (N, 2). Kept beside the tar while
    its size and time stay as they are. Raises ValueError."""
    beside = path + ".index.npz"
    with contextlib.suppress(Exception):                # there is none yet, or it is damaged
        with np.load(beside) as file:
            if file["stamp"].tolist() == [size, mtime_ns]:
                return file["paths"], file["places"]

    # read the headers of all members
    images = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in iter(tar.next, None):
                tar.members.clear()                     # or a kilobyte of each would stay in memory
                name = os.path.normpath(member.name).lstrip("/")
                images.pop(name, None)                  # of duplicate names, the last counts
                if name.lower().endswith(EXTENSIONS) and member.isreg() and not member.issparse():
                    images[name] = (member.offset_data, member.size)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):     # the mark at the end
                raise tarfile.ReadError
    except tarfile.TarError:
        raise ValueError(f"{path} is no plain tar, or was cut: if it is compressed, unpack it first "
                         "(gunzip, unxz, zstd -d), else copy it again") from None
    paths = np.array([os.fsencode(name) for name in images], np.bytes_)
    places = np.array(list(images.values()), np.int64).reshape(-1, 2)

    # an index is there as a whole or not at all, also for other machines
    temporary = f"{beside}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, stamp=[size, mtime_ns], paths=paths, places=places)
        os.replace(temporary, beside)
    except OSError as error:
        print(f"{beside} cannot be written ({error.strerror}): each start will read all of the tar",
              file=sys.stderr)
    return paths, places


# ---- what else --data takes

def download(cls, root="downloads", **split):
    """A data set of torchvision, fetched to `root` when first asked for. Raises ValueError if it
    cannot be."""
    try:
        source = cls(root, download=True, transform=TF.pil_to_tensor, **split)
    except Exception as error:                          # network, disk and archive errors alike
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{cls.__name__} cannot be downloaded to {root}/: {reason}") from None
    source.labels = np.array(source.targets if hasattr(source, "targets") else source.labels)
    return source


class Channels:
    """A source all of whose images have so many channels: colours become grey, grey ones get three
    equal channels, others are a BadImage."""

    def __init__(self, source, channels):
        self.source = source
        self.channels = channels
        self.labels = source.labels
        self.classes = source.classes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.source[index]
        if self.channels == 1 and len(image) == 3:      # luma, ITU-R 601
            r, g, b = image.int()
            image = ((299 * r + 587 * g + 114 * b + 500) // 1000).byte()[None]
        elif self.channels == 3 and len(image) == 1:
            image = image.expand(3, -1, -1)
        if len(image) != self.channels:
            name = self.source.where(index) if hasattr(self.source, "where") else f"image {index}"
            raise BadImage(f"{name} has {len(image)} channels, not {self.channels}: see --channels")
        return image, label


SOURCES = {  # name: source of a split ("train", "val", "test") for a model of `size` pixels
    "shapes": lambda split, size: Shapes(size, split),
    "cifar10": lambda split, size: download(torchvision.datasets.CIFAR10, train=split == "train"),
    "cifar100": lambda split, size: download(torchvision.datasets.CIFAR100, train=split == "train"),
    "stl10": lambda split, size: download(
        torchvision.datasets.STL10, split="train+unlabeled" if split == "train" else "test"),
}


def open_source(data, split, size, channels=None, shapes_count=None):
    """The source behind --data: a row of SOURCES, or a folder or tar (./shapes for one of that name).
    channels: of all images; None: as they are. shapes_count: how many built-in images to train on;
    None: 4,096."""
    if data == "shapes" and split == "train":
        source = Shapes(size, split, shapes_count)
    else:
        source = SOURCES[data](split, size) if data in SOURCES else Folder(data, split)
    if channels is None or channels == 3 and isinstance(source, Shapes):
        return source
    return Channels(source, channels)


def name_of(data):
    """What to call --data in the name of a run."""
    return os.path.basename(os.path.normpath(data)).removesuffix(".tar")


# ---- crops

def crop_box(height, width, scale, generator):
    """((top, left, height, width), flip): a box with a share `scale` (low, high) of the area and an
    aspect of 3/4 to 4/3, and a coin. The distribution is that of torchvision's RandomResizedCrop,
    which takes no generator: ten tries, then the largest centred box that fits."""
    *draws, coin = torch.rand(41, generator=generator).tolist()
    for i in range(0, 40, 4):
        share, shape, y, x = draws[i:i + 4]
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * shape)
        h = round(math.sqrt(area / aspect))
        w = round(math.sqrt(area * aspect))
        if 0 < w <= width and 0 < h <= height:
            return (int(y * (height - h + 1)), int(x * (width - w + 1)), h, w), coin < 0.5
    h = min(height, round(width / (3 / 4)))
    w = min(width, round(height * (4 / 3)))
    return ((height - h) // 2, (width - w) // 2, h, w), coin < 0.5


def random_resized_crop(image, size, scale, generator, interpolation=BILINEAR):
    """A random box (see `crop_box`) of a uint8 image (C, H, W) → (C, size, size), antialiased,
    flipped half the time."""
    (top, left, h, w), flip = crop_box(*image.shape[-2:], scale, generator)
    # bytes are resized as they are, and faster where channels lie together, as decoders put them
    crop = image[None, :, top:top + h, left:left + w].contiguous(memory_format=torch.channels_last)
    crop = F.interpolate(crop, (size, size), mode=interpolation.value, antialias=True)[0]
    return crop.flip(-1) if flip else crop


def center_crop(image, size):
    """The largest centred square of a uint8 image (C, H, W) → (C, size, size)."""
    side = min(image.shape[-2:])
    return TF.resize(TF.center_crop(image, [side, side]), [size, size], antialias=True)


def evaluation_crop(image, resize, size):
    """What models are tested on: the short side of a uint8 image (C, H, W) at `resize` px, then the
    central (C, size, size)."""
    longest = 4 * min(image.shape[-2:])                 # a long strip, resized, might fill memory
    image = TF.center_crop(image, [min(side, longest) for side in image.shape[-2:]])
    return TF.center_crop(TF.resize(image, [resize], BICUBIC, antialias=True), [size, size])


# ---- what a step needs

class Batches:
    """This process's share of the stream of micro-batches, as lists of (epoch, position, index).

    Each epoch is a permutation of `images` indices, cut into batches of `batch_size` (what is left
    over is dropped) and these into micro-batches, dealt to the `world` processes in turn. Steps run
    from `start` to `stop`, across epochs: a run continues anywhere without replaying what came
    before. With repeats = r, an epoch as long takes an r-th of the images, each r times, spread over
    a batch (repeated augmentation, Hoffer et al., arXiv 1901.09335). Raises ValueError.
    """

    def __init__(self, images, batch_size, micro_batch, start, stop, seed=0, rank=0, world=1,
                 repeats=1):
        if images < batch_size:
            raise ValueError(f"{images} training images make no batch of {batch_size}: "
                             "give more, or a smaller --batch-size")
        self.images = images
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.steps = range(start, stop)
        self.steps_per_epoch = images // batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.repeats = repeats

    def __iter__(self):
        size = self.micro_batch
        positions = torch.arange(self.batch_size)
        # with 2 repeats, images a a b b become a b a b: neighbours are different ones
        spread = (positions % self.repeats).argsort(stable=True)
        for step in self.steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            first *= self.batch_size
            if first == 0 or step == self.steps.start:
                order = torch.randperm(self.images, generator=generator(self.seed, epoch))
            batch = order[(first + positions) // self.repeats][spread].tolist()
            samples = list(zip([epoch] * len(batch), range(first, first + len(batch)), batch))
            for i in range(self.rank * size, self.batch_size, self.world * size):
                yield samples[i:i + size]


def readable(source, index, *numbers):
    """(source[index], False); where that cannot be read, a warning and (another image's, True),
    drawn by these numbers. Raises BadImage if none of a hundred others can be read."""
    try:
        return source[index], False
    except BadImage as error:
        problem = error
    draw = generator(*numbers, "instead")
    for _ in range(100):
        with contextlib.suppress(BadImage):
            item = source[int(torch.randint(len(source), (), generator=draw))]
            print(f"warning: {problem}; another image takes its place", file=sys.stderr)
            return item, True
    raise BadImage(f"{problem}; nor was any of a hundred more, drawn from {len(source):,}")


class Crops(torch.utils.data.Dataset):
    """What pre-training sees of a source at (epoch, position, index): a crop, uint8 (C, S, S); a
    mask, float32 (g, g); and whether another image stands in for an unreadable one."""

    def __init__(self, source, config, seed):
        self.source = source
        self.config = config
        self.seed = seed

    def __getitem__(self, sample):
        epoch, position, index = sample
        config = self.config
        (image, _), unreadable = readable(self.source, index, self.seed, epoch, position)
        # one generator draws the crop, then the mask
        draw = generator(self.seed, epoch, position)
        crop = random_resized_crop(image, config["img_size"], config["crop_scale"], draw)
        grid = config["img_size"] // config["mask_size"]
        mask = masking.MASKS[config["mask"]](1, grid, config["mask_ratio"], [draw])
        return crop, mask[0], unreadable


# ---- normalisation and pictures

@functools.cache
def constants(device, mean, std):
    """Mean and deviation of bytes, (C, 1, 1) each, made once: a copy to a GPU would wait."""
    return tuple(255 * torch.tensor(c, device=device).view(-1, 1, 1) for c in (mean, std))


def normalize(image, mean=MEAN, std=STD):
    """uint8 (B, C, H, W) → float32, of mean 0 and deviation 1 where these are the data's."""
    mean, std = constants(image.device, tuple(mean), tuple(std))
    return (image - mean) / std


def denormalize(image, mean=MEAN, std=STD):
    """The way back: float (B, C, H, W) → uint8."""
    mean, std = constants(image.device, tuple(mean), tuple(std))
    return (image.float() * std + mean).round().clamp(0, 255).byte()


def visible(image):
    """(B, C, H, W) → (B, 3, H, W): the first three channels, or the first as grey."""
    return image[:, :3] if image.shape[1] >= 3 else image[:, :1].expand(-1, 3, -1, -1)


def write_picture(path, images, columns):
    """uint8 images (B, C, H, W) as a PNG, row by row; small ones are shown larger."""
    grid = TF.to_pil_image(torchvision.utils.make_grid(visible(images).cpu(), columns))
    times = max(1, 128 // images.shape[-1])
    ImageOps.scale(grid, times, Image.Resampling.NEAREST).save(path, "PNG")


# ---- loader processes

def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ignore_signals(worker=None):
    """What stops a run is for its main process: without workers it could not finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def loader(dataset, batches, workers):
    """The batches, made ahead of time by so many processes; by this one if 0."""
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals)


@atexit.register
def kill_workers():
    """Workers ignore SIGTERM: after a failure, multiprocessing would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # or PyTorch would complain that they died
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
