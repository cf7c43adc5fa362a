"""Where images come from: folders, downloads, packs, and the built-in world.

A *source* is a list of images: `source[i] -> (uint8 (C, H, W), label)`, `len(source)`, `source.labels` (an array; −1 is
none), `source.classes` (their names). A new kind of source is one function and one row of SOURCES, and then a value of --data.
"""
import contextlib
import json
import os
import struct
import warnings
import zlib

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image, decode_jpeg

from shapes import Shapes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")                     # not EPS, for which Pillow would start a program
LARGEST = 2 * Image.MAX_IMAGE_PIXELS                                        # 179 megapixels, half a gigabyte: Pillow's limit too


class BadImage(ValueError):
    """An image that cannot be read."""


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
    """An image file as uint8 (3, H, W), upright, first frame; an array of bytes (H, W, C) or (H, W), .npy, as (C, H, W). Raises
    BadImage, and that before it decodes an image of more than LARGEST pixels, which a small file may well hold."""
    def limit(height, width):
        if height * width > LARGEST:
            raise ValueError(f"{height} × {width} pixels are too many")

    try:
        if not os.path.isfile(path) or os.path.getsize(path) > 4 * LARGEST:
            raise ValueError("no regular file, or too large")
        if path.lower().endswith(".npy"):
            array = np.load(path, allow_pickle=False)
            if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
                raise ValueError(f"an array of {array.dtype} {array.shape}, not of bytes (height, width, channels)")
            if array.ndim == 3 and array.shape[0] < min(array.shape[1:]) and array.shape[1] == array.shape[2]:
                raise ValueError(f"an array {array.shape}, as if channels came first: save it as (height, width, channels)")
            return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)
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


class Channels:
    """A source all of whose images have so many channels: colours become grey, grey ones get three equal channels. An image that
    has another number is a BadImage. Everything else is the source's own."""

    def __init__(self, source, channels):
        self.source, self.channels = source, channels

    def __getattr__(self, name):
        if name == "source":                                                # while a copy of this is made
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.source[index]
        if self.channels == 1 and len(image) == 3:                          # luma, ITU-R 601
            image = (torch.tensor([299, 587, 114])[:, None, None] * image).sum(0, keepdim=True).add_(500).div_(1000, rounding_mode="floor").byte()
        elif self.channels == 3 and len(image) == 1:
            image = image.expand(3, -1, -1)
        if len(image) != self.channels:
            name = os.path.join(self.root, os.fsdecode(self.paths[index])) if isinstance(self.source, Folder) else f"image {index}"
            raise BadImage(f"{name} has {len(image)} channels, not {self.channels}: see --channels")
        return image, label


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
    """A torchvision data set of bytes, (N, H, W), (N, H, W, 3) or (N, 3, H, W), fetched to `root` when first asked for. Raises
    ValueError if it can't be."""

    def __init__(self, cls, root="downloads", **split):
        try:
            self.set = cls(root, download=True, **split)
        except Exception as error:                                          # network, disk and archive errors alike
            raise ValueError(f"{cls.__name__} cannot be downloaded to {root}/: {(str(error) or type(error).__name__).splitlines()[0]}") from None
        self.classes = list(self.set.classes)
        self.labels = np.array(getattr(self.set, "targets", getattr(self.set, "labels", None)))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = np.asarray(self.set.data[index])
        image = torch.from_numpy(image if image.shape[0] == 3 else np.atleast_3d(image).transpose(2, 0, 1))
        return image, int(self.labels[index])


# ------------------------------------------------------------------------------------------------ packed images

NAMES = "images.bin", "index.bin", "pack.json"
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("height", "<u4"), ("width", "<u4"), ("check", "<u4")])
FORMAT = "nanoA2MIM pack 2"


def is_pack(path):
    return sum(os.path.exists(os.path.join(path, name)) for name in NAMES) > 1          # what is left of one, too


class Packed:
    """What `pack` wrote: images.bin, their bytes one after another; index.bin, a RECORD each; pack.json, the rest.

    An image is a JPEG, or raw pixels (height, width, channels) if its record has a height. Bytes are read when asked for, at
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
            if not (offset + length <= self.size and -1 <= label < len(self.classes) and length % max(1, height * width) == 0 < length):
                raise ValueError("its record leads nowhere")
            payload = np.empty(length, np.uint8)                            # no mapped memory: a failing disk would kill the process
            if os.preadv(self.file.fileno(), [payload], offset) != length or checksum(record, payload) != check:
                raise ValueError("its checksum differs")
            image = torch.from_numpy(payload)
            return image.view(height, width, -1).permute(2, 0, 1) if height else decode_jpeg(image, ImageReadMode.RGB), label
        except (OSError, RuntimeError, ValueError) as error:
            raise BadImage(f"{self.root}: image {index} of {self.split} is damaged ({error}): pack the images again") from None


def checksum(record, payload):
    return zlib.crc32(payload, zlib.crc32(record.tobytes()[:-4]))           # of all of the record but itself


# ------------------------------------------------------------------------------------------------ what --data takes

SOURCES = {  # name -> source of a split ("train", or "val" or "test") for a model that takes images of `size` px
    "shapes": lambda split, size: Shapes(size, split),
    "cifar10": lambda split, size: Download(torchvision.datasets.CIFAR10, train=split == "train"),
    "cifar100": lambda split, size: Download(torchvision.datasets.CIFAR100, train=split == "train"),
    "stl10": lambda split, size: Download(torchvision.datasets.STL10, split="train+unlabeled" if split == "train" else "test"),
}


def open_source(data, split, size, channels=None):
    """The source behind --data: a row of SOURCES, a pack, or a folder (write ./shapes for a folder of that name). channels: of all its
    images; None: as they are."""
    source = SOURCES[data](split, size) if data in SOURCES else Packed(data, split) if is_pack(data) else Folder(data, split)
    return source if channels is None else Channels(source, channels)
