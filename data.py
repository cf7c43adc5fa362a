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
import posixpath
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

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:                                     # deprecated in torchvision 0.29
    decode_image = None

MEAN = (0.485, 0.456, 0.406)                            # ImageNet's, pixels in 0..1
STD = (0.229, 0.224, 0.225)
BICUBIC = InterpolationMode.BICUBIC
BILINEAR = InterpolationMode.BILINEAR
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")     # no EPS: Pillow would start a program
LARGEST = 8 * Image.MAX_IMAGE_PIXELS                    # of a file: 716 MB, 8 bytes a pixel


# ---- random streams

def key(*numbers):
    """A seed for each tuple of integers: their hash (PyTorch's generator takes its low 32 bits)."""
    text = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def generator(*numbers):
    return torch.Generator().manual_seed(key(*numbers))


# ---- sources: one image

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
                if decode_image and image.format in ("JPEG", "MPO", "PNG"):
                    # faster than Pillow, which may still read what this refuses
                    with contextlib.suppress(RuntimeError, AttributeError, ImportError):
                        pixels = decode_image(torch.frombuffer(content, dtype=torch.uint8),
                                              ImageReadMode.RGB, apply_exif_orientation=True)
                        if pixels.dtype == torch.uint8:
                            return pixels
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):          # 16 bits, which Pillow would cut off at 255
                    array = np.array(image) // 257
                    image = Image.fromarray(array.clip(0, 255).astype(np.uint8))
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:                          # decoders fail in many ways
        reason = error if isinstance(error, BadImage) else type(error).__name__
        raise BadImage(f"{name} is no readable image ({reason})") from None


def read_image(path):
    """The image in a file, see `decode`. Raises BadImage."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > LARGEST:
            raise BadImage(f"{path} is no readable image (no regular file, or too large)")
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise BadImage(f"{path} is no readable image ({error.strerror})") from None
    return decode(content, path)


# ---- sources: folders

class Files:
    """What images in a folder or a tar have in common: what their names say.

    The class of an image is its first folder (−1: none), below train/ and val/ (or valid/, test/)
    if both are there. Otherwise a hundredth of the images, at least 8 of 32, is held out, evenly
    spaced. split: "train"; "val"; "test", the same as val, but all images where there is no train/;
    "all", with train/ and val/ as folders like others. `paths`: the images' names (bytes) below
    `root`; `empty`: the folders there without an image.
    """

    def arrange(self, root, names, folders, split):
        """Sets the attributes, from the names below root of all images, in order, and of folders.
        Returns the positions of the split's images. Raises ValueError if there are no images."""
        tops = {name.split("/")[0] for name in folders}
        train = "train" if "train" in tops else ""
        test = next((name for name in ("val", "valid", "test") if name in tops), "")
        hold_out = False
        if split == "all":
            part = ""
        elif train and test:
            part = train if split == "train" else test
        elif split == "test" and not train:
            part = test
        else:
            part = train
            hold_out = True
        self.root = os.path.join(root, part) if part else root
        prefix = part + "/" if part else ""

        # classes are numbered before images are held out: both splits agree on them
        chosen = [i for i, name in enumerate(names) if name.startswith(prefix)]
        if not chosen:
            raise ValueError(f"no images in {self.root} ({' '.join(EXTENSIONS)})")
        paths = [names[i][len(prefix):] for i in chosen]
        classes = [path.split("/")[0] if "/" in path else "" for path in paths]
        self.classes = sorted(set(classes) - {""})
        number = {name: label for label, name in enumerate(["", *self.classes], -1)}
        there = {name[len(prefix):].split("/")[0] for name in folders if name.startswith(prefix)}
        self.empty = sorted(name for name in there - set(classes) if name and name[0] != ".")

        kept = np.arange(len(chosen))
        if hold_out:
            every = len(kept) // max(len(kept) // 100, min(8, len(kept) // 4), 1)
            held_out = kept % every == 0
            kept = kept[~held_out if split == "train" else held_out]
        # arrays, no lists of Python's objects: forked workers share them instead of copying them
        self.labels = np.array([number[name] for name in classes])[kept]
        self.paths = np.array([os.fsencode(paths[i]) for i in kept], np.bytes_)
        return np.array(chosen)[kept]

    def where(self, index):
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def __len__(self):
        return len(self.paths)


class Folder(Files):
    """The images in a folder, by name; see Files. Raises ValueError."""

    def __init__(self, root, split):
        if not os.path.isdir(root):
            raise ValueError(f"no folder {root}: --data takes a folder of images, a .tar of one, "
                             f"a folder of .tar shards, or one of {', '.join(SOURCES)}")
        names = []
        folders = []
        ancestors = {root: {os.path.realpath(root)}}    # and the folder itself
        for folder, subfolders, files in os.walk(root, followlinks=True):
            prefix = "" if folder == root else os.path.relpath(folder, root) + "/"
            names += [prefix + name for name in files if name.lower().endswith(EXTENSIONS)]
            for name in list(subfolders):
                path = os.path.join(folder, name)
                ancestors[path] = ancestors[folder] | {os.path.realpath(path)}
                if os.path.realpath(path) in ancestors[folder]:
                    subfolders.remove(name)             # a link that leads back to itself
            folders += [prefix + name for name in subfolders]
        self.arrange(root, sorted(names), folders, split)

    def __getitem__(self, index):
        return read_image(self.where(index)), int(self.labels[index])


# ---- sources: tars

def find_tars(path):
    """A tar file; or those in a folder, by name, but none where images lie there, too."""
    if os.path.isfile(path):
        return [path]
    tars = []
    for folder, _, names in os.walk(path):
        if any(name.lower().endswith(EXTENSIONS) for name in names):
            return []
        tars += [os.path.join(folder, name) for name in names if name.endswith(".tar")]
    return sorted(tars)


def scan_tar(path):
    """Names in a tar, and (offset, size) of each image; a folder's size is −1. Raises ValueError."""
    entries = {"": (0, -1)}
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in iter(tar.next, None):
                tar.members.clear()                     # or a kilobyte of each would stay in memory
                name = posixpath.normpath(member.name).lstrip("/")
                entries.pop(name, None)                 # of duplicate names, the last counts
                if name.lower().endswith(EXTENSIONS) and member.isreg() and not member.issparse():
                    entries[name] = (member.offset_data, member.size)
                entries.setdefault(name if member.isdir() else posixpath.dirname(name), (0, -1))
            tar.fileobj.seek(tar.offset)
            complete = tar.fileobj.read(512) == bytes(512)          # the mark at the end
    except tarfile.TarError:
        complete = False
    if not complete:
        raise ValueError(f"{path} is no plain tar, or was cut: if it is compressed, unpack it "
                         "first (gunzip, unxz, zstd -d), else copy it again")
    names = "\0".join(entries).encode("utf-8", "surrogateescape")
    return np.frombuffer(names, np.uint8), np.array(list(entries.values()), np.int64)


@functools.cache
def tar_index(path, size, mtime_ns):
    """What scan_tar returns, kept beside the tar while its size and time stay as they are."""
    beside = path + ".index.npz"
    with contextlib.suppress(Exception):                # there is none yet, or it is damaged
        with np.load(beside) as file:
            if file["stamp"].tolist() == [size, mtime_ns]:
                return file["names"], file["places"]
    names, places = scan_tar(path)
    try:
        temporary = f"{beside}.{os.getpid()}"
        with open(temporary, "wb") as file:
            np.savez(file, stamp=[size, mtime_ns], names=names, places=places)
        os.replace(temporary, beside)
    except OSError as error:
        print(f"{beside} cannot be written ({error.strerror}): each start will read all of the tar",
              file=sys.stderr)
    return names, places


@functools.lru_cache(200)                               # systems limit how many may be open
def open_tar(path, size, mtime_ns):
    return open(path, "rb", buffering=0)


class Tar(Files):
    """The images in a tar, in the order of its members, or in a folder of tars; see Files.

    Raises ValueError if one is no plain tar, was cut, changes later, or there are no images.
    """

    def __init__(self, path, split):
        self.tars = []                                  # (path, size, time of change)
        names = []
        places = []
        for number, tar in enumerate(find_tars(path)):
            status = os.stat(tar)
            self.tars.append((tar, status.st_size, status.st_mtime_ns))
            text, place = tar_index(*self.tars[number])
            inside = text.tobytes().decode("utf-8", "surrogateescape").split("\0")
            folder = os.path.dirname(tar.removeprefix(path).lstrip("/"))
            if folder:                                  # a tar in train/ holds images of train/
                inside = [f"{folder}/{name}" for name in inside]
            names += inside
            places.append(np.insert(place, 0, number, axis=1))
        names = np.array(names, object)
        places = np.concatenate(places)                 # (number of the tar, offset, size)
        is_image = places[:, 2] >= 0
        chosen = self.arrange(path, names[is_image].tolist(), names[~is_image].tolist(), split)
        self.places = places[is_image][chosen]

    def __getitem__(self, index):
        number, offset, size = self.places[index].tolist()
        tar = self.tars[number]
        file = open_tar(*tar).fileno()
        content = os.pread(file, size, offset)          # workers share the file, but no position
        status = os.fstat(file)
        if len(content) < size or (status.st_size, status.st_mtime_ns) != tar[1:]:
            raise ValueError(f"{tar[0]}: the archive changed; start again")
        return decode(content, self.where(index)), int(self.labels[index])


# ---- sources: what else --data takes

class Download:
    """A torchvision data set of bytes, (N, H, W), (N, H, W, 3) or (N, 3, H, W), fetched to `root`
    when first asked for. Raises ValueError if it cannot be."""

    def __init__(self, cls, root="downloads", **split):
        try:
            self.set = cls(root, download=True, **split)
        except Exception as error:                      # network, disk and archive errors alike
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{cls.__name__} cannot be downloaded to {root}/: {reason}") from None
        self.classes = list(self.set.classes)
        self.labels = np.array(getattr(self.set, "targets", getattr(self.set, "labels", None)))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = np.asarray(self.set.data[index])
        if image.shape[0] != 3:
            image = np.atleast_3d(image).transpose(2, 0, 1)
        return torch.from_numpy(image), int(self.labels[index])


class Channels:
    """A source all of whose images have so many channels: colours become grey, grey ones get three
    equal channels, others are a BadImage. Everything else is the source's own."""
    source = None                                       # or __getattr__ would recurse in unpickling

    def __init__(self, source, channels):
        self.source = source
        self.channels = channels

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.source[index]
        if self.channels == 1 and len(image) == 3:      # luma, ITU-R 601
            luma = (torch.tensor([299, 587, 114])[:, None, None] * image).sum(0, keepdim=True)
            image = luma.add(500).div(1000, rounding_mode="floor").byte()
        elif self.channels == 3 and len(image) == 1:
            image = image.expand(3, -1, -1)
        if len(image) != self.channels:
            name = self.where(index) if isinstance(self.source, Files) else f"image {index}"
            raise BadImage(f"{name} has {len(image)} channels, not {self.channels}: see --channels")
        return image, label


SOURCES = {  # name: source of a split ("train", "val", "test") for a model of `size` pixels
    "shapes": lambda split, size: Shapes(size, split),
    "cifar10": lambda split, size: Download(torchvision.datasets.CIFAR10, train=split == "train"),
    "cifar100": lambda split, size: Download(torchvision.datasets.CIFAR100, train=split == "train"),
    "stl10": lambda split, size: Download(
        torchvision.datasets.STL10, split="train+unlabeled" if split == "train" else "test"),
}


def open_source(data, split, size, channels=None, shapes_count=None):
    """The source behind --data: a row of SOURCES, a tar or a folder of tars, or a folder of images
    (./shapes for one of that name). channels: of all images; None: as they are. shapes_count: how
    many built-in images to train on; None: 4,096."""
    if data == "shapes" and split == "train":
        source = Shapes(size, split, shapes_count)
    elif data in SOURCES:
        source = SOURCES[data](split, size)
    elif find_tars(data):
        source = Tar(data, split)
    else:
        source = Folder(data, split)
    if channels is None or channels == 3 and isinstance(source, Shapes):
        return source
    return Channels(source, channels)


def name_of(data):
    """What to call --data in the name of a run."""
    return os.path.basename(os.path.normpath(data)).removesuffix(".tar")


# ---- crops

def crop_box(height, width, scale, generator, ratio=(3 / 4, 4 / 3)):
    """((top, left, height, width), flip): a box with a share `scale` (low, high) of the area and an
    aspect in `ratio`, and a coin. The distribution is that of torchvision's RandomResizedCrop,
    which takes no generator: ten tries, then the largest centred box that fits."""
    *draws, coin = torch.rand(41, generator=generator).tolist()
    low = math.log(ratio[0])
    high = math.log(ratio[1])
    for i in range(0, 40, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[i])
        aspect = math.exp(low + (high - low) * draws[i + 1])
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[i + 2] * (height - h + 1))
            left = int(draws[i + 3] * (width - w + 1))
            return (top, left, h, w), coin < 0.5
    h = min(height, round(width / ratio[0]))
    w = min(width, round(height * ratio[1]))
    return ((height - h) // 2, (width - w) // 2, h, w), coin < 0.5


def random_resized_crop(image, size, scale, generator, ratio=(3 / 4, 4 / 3),
                        interpolation=BILINEAR):
    """A random box (see `crop_box`) of a uint8 image (C, H, W) → (C, size, size), antialiased,
    flipped half the time."""
    (top, left, h, w), flip = crop_box(*image.shape[-2:], scale, generator, ratio)
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
    height, width = image.shape[-2:]
    short = min(height, width)
    if max(height, width) > 4 * short:                  # a long strip, resized, might fill memory
        image = TF.center_crop(image, [min(height, 4 * short), min(width, 4 * short)])
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
        if batch_size % (micro_batch * world):
            raise ValueError(f"batch size {batch_size} is not a multiple of "
                             f"micro-batch {micro_batch} × {world} process(es)")
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
        shuffled = None
        positions = torch.arange(self.batch_size)
        # with 2 repeats, images a a b b become a b a b: neighbours are different ones
        spread = (positions % self.repeats).argsort(stable=True)
        for step in self.steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            first *= self.batch_size
            if epoch != shuffled:
                order = torch.randperm(self.images, generator=generator(self.seed, epoch))
                shuffled = epoch
            batch = order[(first + positions) // self.repeats][spread].tolist()
            samples = list(zip([epoch] * len(batch), range(first, first + len(batch)), batch))
            for micro in range(self.rank, self.batch_size // self.micro_batch, self.world):
                yield samples[micro * self.micro_batch:(micro + 1) * self.micro_batch]


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
    grid = torchvision.utils.make_grid(visible(images).cpu(), nrow=columns, padding=2)
    times = max(1, 128 // images.shape[-1])
    grid = grid.repeat_interleave(times, 1).repeat_interleave(times, 2)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path, "PNG")


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
