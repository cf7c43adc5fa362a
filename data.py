"""Images, from wherever they are to batches of uint8 crops (everything after happens on the device).

  python data.py pack path/to/imagenet imagenet.pack       once; then train with --data imagenet.pack, twice as fast to load

A *source* is a list of images: `source[i] -> (uint8 (3, H, W), label)`, `len(source)`, `source.labels` (an array; −1 is
none), `source.classes` (their names). A new kind of source is one function and one row of SOURCES. `Views` cuts the
crops, `Batches` says which, in which order.
All randomness of a sample is keyed by (seed, epoch, position in the epoch): the stream of samples is the same
however many workers, processes or accumulation steps produce it.
"""
import argparse
import atexit
import contextlib
import errno
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import struct
import sys
import time
import warnings
import zlib

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, encode_jpeg
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                    # ImageNet's, for images in 0..1
FILL = [124, 116, 104]                                                      # the same mean, of bytes
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")                     # not EPS, for which Pillow would start a program
LARGEST = 2 * Image.MAX_IMAGE_PIXELS                                        # 179 megapixels, half a gigabyte: Pillow's limit too


class BadImage(ValueError):
    """An image that cannot be read."""


def sync_folder(folder):
    """Have the names in a folder on the disk: until then, losing power may undo a renaming. Raises OSError."""
    at = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(at)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):                # some file systems know no such thing
            raise
    finally:
        os.close(at)


def write_file(path, content):
    """Bytes into a file, all or nothing. Raises OSError, with the path in its text."""
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(content)
        os.replace(path + ".tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from None


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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


def readable(source, index, *numbers):
    """(source[index], None). If that image cannot be read: (another, drawn by these numbers; a line on what is wrong).
    Raises BadImage if a hundred more cannot be read either."""
    draw, problems = None, []
    while len(problems) <= 100:
        try:
            return source[index], problems[0] if problems else None
        except BadImage as error:
            problems.append(str(error))
        draw = draw or generator(*numbers, "instead")
        index = int(torch.randint(len(source), (), generator=draw))
    raise BadImage(f"{problems[0]}; nor are a hundred others")


class Views(torch.utils.data.Dataset):
    """What training sees of a source: `view(source[index], generator)`, for each (epoch, position, index), and None; or
    if that image cannot be read, of another in its place, and a line on it."""

    def __init__(self, source, view, seed=0):
        self.source, self.view, self.seed = source, view, seed

    def __getitem__(self, sample):
        epoch, position, index = sample
        found, problem = readable(self.source, index, self.seed, epoch, position)
        return self.view(found, generator(self.seed, epoch, position)), problem


class TestViews(Views):
    """What evaluation sees: of an image that cannot be read a black one, whose label is none."""

    def __getitem__(self, sample):
        try:
            return self.view(self.source[sample[2]], None), None
        except BadImage as error:
            return self.view((torch.zeros(3, 8, 8, dtype=torch.uint8), -1), None), str(error)


def collated(samples, collate):
    views, problems = zip(*samples)
    return collate(views), [problem for problem in problems if problem]


def kill_workers():
    """Before multiprocessing waits for those that a failure left, and that ignore its request to end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)                           # or PyTorch would complain that they died
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


atexit.register(kill_workers)


def ignore_signals(worker=None):
    """Those that stop a run are for its main process; without its workers it could not finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def loader(views, batches, workers=0, pin=False, collate=None):
    """The batches, made by `workers` processes ahead of time: what is at their indices, stacked (or collated); of Views,
    (this, the lines on images that could not be read)."""
    if isinstance(views, Views):
        collate = functools.partial(collated, collate=collate or torch.utils.data.default_collate)
    return torch.utils.data.DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=pin, collate_fn=collate,
                                       worker_init_fn=ignore_signals)


def progress(batches, total, what, images=len):
    """The batches, and how far they are: in a bar or, without a terminal, in a line every ten seconds."""
    done, told = 0, time.time()
    with tqdm(total=total, desc=what, unit="image", leave=False, disable=not sys.stderr.isatty()) as bar:
        for batch in batches:
            yield batch
            bar.update(images(batch))
            done += images(batch)
            if bar.disable and time.time() - told > 10:
                print(f"{what}: {done:,} of {total:,} images", file=sys.stderr)
                told = time.time()


# ------------------------------------------------------------------------------------------------ transforms

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


def crop_box(height, width, scale, generator, ratio=(3 / 4, 4 / 3)):
    """((top, left, height, width), flip): a box with a share `scale` (low, high) of the area and an aspect in `ratio`,
    and a coin. The distribution is that of torchvision's RandomResizedCrop, which takes no generator: ten tries, then
    the largest centred box that fits."""
    *draws, coin = torch.rand(41, generator=generator).tolist()
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 40, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[i])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draws[i + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return (int(draws[i + 2] * (height - h + 1)), int(draws[i + 3] * (width - w + 1)), h, w), coin < 0.5
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return ((height - h) // 2, (width - w) // 2, h, w), coin < 0.5


def random_resized_crop(image, size, scale, generator, ratio=(3 / 4, 4 / 3), interpolation=BILINEAR):
    """A random box of a uint8 image (3, H, W), see `crop_box`, at `size` px, flipped half the time; antialiased."""
    (top, left, h, w), flip = crop_box(*image.shape[-2:], scale, generator, ratio)
    crop = image[None, :, top:top + h, left:left + w]                       # bytes all the way: PyTorch resizes them as they are
    crop = F.interpolate(crop, (size, size), mode=interpolation.value, antialias=True)[0]
    return crop.flip(-1) if flip else crop


def center_crop(image, size):
    """The largest centred square of a uint8 image (3, H, W), at `size` px."""
    side = min(image.shape[-2:])
    return TF.resize(TF.center_crop(image, [side, side]), [size, size], antialias=True)


def evaluation_crop(image, resize, size):
    """What models are tested on: the short side of a uint8 image (3, H, W) at `resize` px, the central `size` × `size`."""
    if max(image.shape[-2:]) > 4 * (short := min(image.shape[-2:])):        # of a long strip, resized whole, memory is no match
        image = TF.center_crop(image, [min(side, 4 * short) for side in image.shape[-2:]])
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


@functools.cache
def constants(device):
    """Mean and deviation of bytes, (3, 1, 1) each, made once for a device: each copy to it would stop the host."""
    return tuple(255 * torch.tensor(c, device=device).view(-1, 1, 1) for c in (MEAN, STD))


def normalize(image):
    """uint8 (B, 3, H, W) -> float32 with the data set's mean 0 and deviation 1, on the image's device."""
    mean, std = constants(image.device)
    return (image - mean) / std


def denormalize(image):
    """The way back: float (B, 3, H, W) -> uint8."""
    mean, std = constants(image.device)
    return (image.float() * std + mean).round().clamp(0, 255).byte()


def write_picture(path, images, columns):
    """Normalised images (B, 3, H, W) as a PNG, row by row; small ones are shown larger."""
    grid = torchvision.utils.make_grid(denormalize(images).cpu(), nrow=columns, padding=2)
    times = max(1, 128 // images.shape[-1])
    png = torchvision.io.encode_png(grid.repeat_interleave(times, 1).repeat_interleave(times, 2))
    write_file(path, png.numpy().tobytes())


# ------------------------------------------------------------------------------------------------ folders, downloads

def stated_size(file):
    """(height, width) in the header of a JPEG or PNG, an array of bytes; None for anything else."""
    start = file[:24].tobytes()
    if start.startswith(b"\x89PNG\r\n\x1a\n") and len(start) == 24:
        return struct.unpack(">II", start[16:])[::-1]
    at = 2 if start.startswith(b"\xff\xd8") else len(file)
    while at + 9 <= len(file):                                              # segments: a marker, a length, the rest
        mark, kind, length, _, height, width = struct.unpack(">BBHBHH", file[at:at + 9])
        if mark != 0xff:
            break
        if 0xc0 <= kind <= 0xcf and kind not in (0xc4, 0xc8, 0xcc):         # the start of the frame
            return height, width
        at += 2 + length
    return None


def read_image(path):
    """An image file as uint8 (3, H, W), upright, first frame. Raises BadImage, and that before it decodes an image of more
    than LARGEST pixels, which a small file may well hold."""
    def limit(height, width):
        if height * width > LARGEST:
            raise ValueError(f"{height} × {width} pixels are too many")

    try:
        if not os.path.isfile(path) or os.path.getsize(path) > 4 * LARGEST:
            raise ValueError("no regular file, or too large")
        file = np.fromfile(path, np.uint8)
        if size := stated_size(file):
            limit(*size)
            with contextlib.suppress(RuntimeError):                         # of which Pillow may still make something
                image = decode_image(torch.from_numpy(file), ImageReadMode.RGB, apply_exif_orientation=True)
                return image if image.dtype == torch.uint8 else image.view(torch.uint8)[..., 1::2]     # of 16 bits, the upper half
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                limit(image.height, image.width)
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):                              # 16 bits; Pillow's own conversion cuts them off at 255
                    image = Image.fromarray((np.array(image) // 257).clip(0, 255).astype(np.uint8))
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:                                              # decoders fail in many ways
        reason = ("too many pixels" if isinstance(error, Image.DecompressionBombError) else error if type(error) is ValueError
                  else type(error).__name__)
        raise BadImage(f"{path} is no readable image ({reason})") from None


class Folder:
    """The images in a folder: of class folders, with or without train/ and val/ above them, or flat.

    The class of an image is the first folder below the root (−1 where there is none); `empty` are folders there without
    an image. Where there are not both train/ and val/ (or valid/, test/), a hundredth of the images, at least 8 if there
    are 32, is held out, evenly spaced by name. split: "train"; "val"; or "test", the same as val, but all images of a
    folder without train/. Raises ValueError if there is no such folder, or no image in it.
    """

    def __init__(self, root, split):
        if not os.path.isdir(root):
            raise ValueError(f"no folder {root}: --data takes {', '.join(SOURCES)}, or a folder of images, or a pack")
        parts = {name: os.path.join(root, name) for name in ("train", "val", "valid", "test")}
        parts = {name: path for name, path in parts.items() if os.path.isdir(path)}
        test = next((parts[name] for name in ("val", "valid", "test") if name in parts), None)
        if "train" in parts and test:
            self.root, hold_out = parts["train"] if split == "train" else test, False
        elif "train" not in parts and split == "test":
            self.root, hold_out = test or root, False
        else:
            self.root, hold_out = parts.get("train", root), True
        found, above, prefix = [], {os.fspath(self.root): {os.path.realpath(self.root)}}, os.path.join(self.root, "")
        for folder, folders, names in os.walk(self.root, followlinks=True):
            found += [os.path.join(folder, name).removeprefix(prefix) for name in names if name.lower().endswith(EXTENSIONS)]
            for path in [os.path.join(folder, name) for name in folders]:
                if (real := os.path.realpath(path)) in above[folder]:       # a link to where we came from
                    folders.remove(os.path.basename(path))
                above[path] = above[folder] | {real}
        found.sort()
        if not found:
            raise ValueError(f"no images ({' '.join(EXTENSIONS)}) in {self.root}")
        self.classes = sorted({path.split(os.sep)[0] for path in found if os.sep in path})
        self.empty = sorted({entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != "."
                             and not is_pack(entry.path)} - set(self.classes))
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


# ------------------------------------------------------------------------------------------------ packed images

NAMES = "images.bin", "index.bin", "pack.json"
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("height", "<u4"), ("width", "<u4"), ("check", "<u4")])
FORMAT = "nanoA2MIM pack 2"


def is_pack(path):
    return sum(os.path.exists(os.path.join(path, name)) for name in NAMES) > 1          # what is left of one, too


class Packed:
    """What `pack` wrote: images.bin, their bytes one after another; index.bin, a RECORD each; pack.json, the rest.

    An image is a JPEG, or raw pixels (height, width, 3) if its record has a height. Bytes are read when asked for, at
    their place, so that memory stays small and the system's page cache serves all workers and processes; their checksum,
    which covers the record too, is compared each time. split: as in Folder. Raises ValueError, and BadImage.
    """

    def __init__(self, root, split):
        self.root, self.split = root, split
        try:
            with open(os.path.join(root, "pack.json")) as file:
                text = file.read()
            about = json.loads(text)
            if about["format"] == FORMAT:
                check = about.pop("check")
                if text != json.dumps(about | dict(check=check)) or check != zlib.crc32(json.dumps(about).encode()):
                    raise ValueError
                counts, self.size = [about[name]["images"] for name in ("train", "val")], about["bytes"]
                self.classes, self.empty = (about["train" if split == "train" else "val"][key] for key in ("classes", "empty"))
                if (any(type(number) is not int or number < 0 for number in (*counts, self.size)) or not type(self.classes) is type(self.empty) is list
                        or not all(isinstance(name, str) for name in self.classes + self.empty)):
                    raise ValueError
                index = np.asarray(np.memmap(os.path.join(root, "index.bin"), RECORD, "r"))
                self.file = open(os.path.join(root, "images.bin"), "rb", buffering=0)
                there = os.fstat(self.file.fileno()).st_size
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{root} is a half-written or damaged pack ({type(error).__name__}): pack the images again") from None
        if about["format"] != FORMAT:
            raise ValueError(f"{root} is a {str(about['format'])[:40]!r}, this program reads {FORMAT!r}: pack the images again")
        if there != self.size or len(index) != sum(counts):
            raise ValueError(f"{root} is a truncated pack ({there:,} of {self.size:,} bytes, {len(index):,} of {sum(counts):,} records): "
                             "pack the images again")
        parts = dict(train=index[:counts[0]], val=index[counts[0]:], test=index[0 if about.get("test_is_all") else counts[0]:])
        self.index = parts[split]
        self.labels = self.index["label"]

    def __reduce__(self):                                                   # workers that are not forked open it anew
        return Packed, (self.root, self.split)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, index):
        record = self.index[index]
        offset, length, label, height, width, check = record.item()
        try:
            if not (offset + length <= self.size and -1 <= label < len(self.classes) and height * width * 3 in (0, length) and length):
                raise ValueError("its record leads nowhere")
            payload = np.empty(length, np.uint8)                            # no mapped memory: a failing disk would kill the process
            if os.preadv(self.file.fileno(), [payload], offset) != length or checksum(record, payload) != check:
                raise ValueError("its checksum differs")
            image = torch.from_numpy(payload)
            return image.view(height, width, 3).permute(2, 0, 1) if height else decode_jpeg(image, ImageReadMode.RGB), label
        except (OSError, RuntimeError, ValueError) as error:
            raise BadImage(f"{self.root}: image {index} of {self.split} is damaged ({error}): pack the images again") from None


def checksum(record, payload):
    return zlib.crc32(payload, zlib.crc32(record.tobytes()[:-4]))           # of all of the record but itself


class Stored:
    """Images as a pack stores them: `stored[i]` is (label, height, width, bytes), or a line on why there is none."""

    def __init__(self, source, size, quality):
        self.source, self.size, self.quality = source, size, quality

    def __getitem__(self, index):
        try:
            image, label = self.source[index]
        except BadImage as error:
            return str(error)
        if self.size and self.size < min(image.shape[-2:]):
            image = TF.resize(image, [self.size], BICUBIC, antialias=True)
        height, width = image.shape[-2:]
        if self.quality == "raw" or height * width <= 64 * 64 or max(height, width) > 65500:       # as large as a JPEG can be
            return label, height, width, image.permute(1, 2, 0).numpy().tobytes()
        return label, 0, 0, encode_jpeg(image.contiguous(), self.quality).numpy().tobytes()


def everything(source, size, quality, workers, what):
    """All of Stored(…), in order, made by `workers` processes."""
    batches = [range(i, min(i + 8, len(source))) for i in range(0, len(source), 8)]    # few: photographs may be large
    for batch in progress(loader(Stored(source, size, quality), batches, workers, collate=list), len(source), what):
        yield from batch


def pack(data, out, size=256, quality=92, workers=0):
    """Write the images of --data as a pack: short sides of at most `size` px (0: as they are), as JPEGs of `quality`; images of up
    to 64 × 64, or all with quality "raw", as their pixels. `out` appears when all of it is on the disk, and not before.

    Returns (how many images, lines on those that could not be read). Raises ValueError and OSError.
    """
    out = os.path.normpath(out)
    partial = out + ".partial"
    if os.path.lexists(out) or out in SOURCES:
        raise ValueError(f"{out} {'exists' if os.path.lexists(out) else 'is a name that --data knows'}: choose another name, or remove it")
    sources = {split: open_source(data, split, size or 256) for split in ("train", "val")}
    about, offset, problems = dict(format=FORMAT, source=data, size=size, quality=quality), 0, []
    test = open_source(data, "test", size or 256)
    if test.classes != sources["val"].classes:                              # of a folder with val/, but without train/
        raise ValueError(f"{data} has images to test on, but no train/: pack the folder with those images")
    about["test_is_all"] = len(test) == sum(map(len, sources.values()))
    paths = [os.path.join(partial, name) for name in NAMES]
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    try:
        os.mkdir(partial)
    except FileExistsError:
        raise ValueError(f"{partial} exists: another pack is being written, or one was killed and left it; remove it then") from None
    try:
        with open(paths[0], "wb") as images, open(paths[1], "wb") as index, open(paths[2], "w") as rest:
            for split, source in sources.items():
                count = 0
                for item in everything(source, size, quality, workers, split):
                    if isinstance(item, str):
                        problems.append(item)
                        continue
                    label, height, width, payload = item
                    record = np.array((offset, len(payload), label, height, width, 0), RECORD)
                    record["check"] = checksum(record, payload)
                    images.write(payload)
                    index.write(record.tobytes())
                    offset, count = offset + len(payload), count + 1
                if not count:
                    raise ValueError(f"{data} has no image for {split}" + (f" that can be read: {problems[-1]}" if problems else ""))
                about[split] = dict(images=count, classes=source.classes, empty=getattr(source, "empty", []))
            about["bytes"] = offset
            rest.write(json.dumps(about | dict(check=zlib.crc32(json.dumps(about).encode()))))
            for file in (images, index, rest):                              # on the disk before it has its name
                file.flush()
                os.fsync(file.fileno())
        os.rename(partial, out)
        sync_folder(os.path.dirname(out))
    except BaseException:
        for path in paths:
            with contextlib.suppress(OSError):
                os.remove(path)
        with contextlib.suppress(OSError):
            os.rmdir(partial)
        raise
    return about["train"]["images"] + about["val"]["images"], problems


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
    """The source behind --data: a row of SOURCES, a pack, or a folder (write ./shapes for a folder of that name)."""
    if data in SOURCES:
        return SOURCES[data](split, size)
    return Packed(data, split) if is_pack(data) else Folder(data, split)


def quality(text):
    """The type of --quality."""
    if text != "raw" and not (text.isdecimal() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"{text} is neither in 1..100 nor raw")
    return text if text == "raw" else int(text)


def main(argv=None):
    parser = argparse.ArgumentParser("data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("pack", help="write all images into three files that load faster", description=
                                  "Store images small, one after another, so that loading them takes less than half of the time. OUT is a folder "
                                  "that train.py and finetune.py take as --data; it appears when it is complete.")
    command.add_argument("source", metavar="SRC", help=f"what --data takes: a folder of images, a pack, or one of {', '.join(SOURCES)}")
    command.add_argument("out", metavar="OUT", help="the pack, a folder that does not exist yet")
    command.add_argument("--size", type=int, default=256, help="largest short side, pixels; 0: as they are (256)")
    command.add_argument("--quality", type=quality, default=92, help="of JPEG, 1 to 100, or raw: pixels, no loss (92); images of up to 64 × 64 px are always raw")
    command.add_argument("--workers", type=int, default=cores(), help="processes (the cores there are)")
    for each in (parser, command):
        each.error = lambda message: parser.exit(2, f"data.py: {message}\n")
    args, began = parser.parse_args(argv), time.time()
    try:
        if min(args.size, args.workers) < 0:
            raise ValueError(f"--size {args.size} and --workers {args.workers} may not be negative")
        images, problems = pack(args.source, args.out, args.size, args.quality, args.workers)
    except (ValueError, OSError, RuntimeError) as error:                    # of which the last is a worker that was killed
        print(f"data.py: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted, nothing is left behind", file=sys.stderr)
        sys.exit(130)
    for line in problems:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{args.out}: {images:,} images, {sum(e.stat().st_size for e in os.scandir(args.out)) / 1e6:,.1f} MB, {time.time() - began:.0f} s"
          + (f"; {len(problems)} could not be read" if problems else "") + f". Now --data {args.out}")


if __name__ == "__main__":
    main()
