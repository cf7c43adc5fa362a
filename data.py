"""Images, from wherever they are to batches of uint8 crops (everything after happens on the device).

  python data.py stats path/to/photos                      sizes, classes, mean and deviation: what to give train.py
  python data.py pack path/to/imagenet imagenet.pack       once; then train with --data imagenet.pack, more than twice as fast to load

`Views` cuts crops from a source of images (see sources.py), `Batches` says from which images, in which order.
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
import shlex
import signal
import sys
import time
import zlib

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.io import encode_jpeg
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from sources import FORMAT, NAMES, RECORD, SOURCES, BadImage, checksum, open_source

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                    # ImageNet's, for images in 0..1


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
    raise BadImage(f"{problems[0]}; nor was any of a hundred more, drawn from {len(source):,}")


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
    """What evaluation sees: of an image that cannot be read a black one, whose label is none. channels: of it."""

    def __init__(self, source, view, channels=3):
        super().__init__(source, view)
        self.channels = channels

    def __getitem__(self, sample):
        try:
            return self.view(self.source[sample[2]], None), None
        except BadImage as error:
            return self.view((torch.zeros(self.channels, 8, 8, dtype=torch.uint8), -1), None), str(error)


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


def augment(image, generator, randaugment=None, erasing=None, mean=MEAN, std=STD):
    """RandAugment and random erasing of a uint8 image (C, H, W), both as in timm, with torchvision's operations.

    randaugment: magnitude m in 0..10; two operations (arXiv 1909.13719), each done half the time, at m + N(0, 0.5).
    erasing: how often a box is filled with N(0, 1) in normalised space (arXiv 1708.04896).
    """
    shared = torch.default_generator                                        # these transforms take no other
    before = shared.get_state()
    shared.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)))
    for _ in range(2 if randaugment is not None else 0):
        magnitude = (randaugment + 0.5 * torch.randn(())).clamp(0, 10)
        if torch.rand(()) < 0.5:                                            # 31 levels, of 0..10
            image = v2.RandAugment(1, round(3 * float(magnitude)), 31, BILINEAR, [round(255 * m) for m in mean])(image)
    if erasing and torch.rand(()) < erasing:
        erase = v2.RandomErasing(1.0, (0.02, 1 / 3), value="random")
        image = denormalize(erase(normalize(image[None], mean, std)[0])[None], mean, std)[0]
    shared.set_state(before)
    return image


def colours(given, known={}):
    """channels, mean and std (pixels in 0..1) of a configuration: as given, else as a checkpoint knows, else 3 and ImageNet's.
    Raises ValueError."""
    found = dict(channels=3, mean=MEAN, std=STD) | {k: v[k] for v in (known, given) for k in ("channels", "mean", "std") if k in v}
    if "mean" in given and "channels" not in given:
        found["channels"] = len(found["mean"])
    if not len(found["mean"]) == len(found["std"]) == found["channels"]:
        raise ValueError(f"{found['channels']} channel(s) need --mean and --std of as many numbers: python data.py stats SRC measures them")
    if not all(0 <= m <= 1 for m in found["mean"]) or not all(0 < s <= 1 for s in found["std"]):
        raise ValueError("--mean lies in 0..1, and --std above 0: pixels are counted from 0 (black) to 1")
    return found | dict(mean=list(found["mean"]), std=list(found["std"]))


@functools.cache
def constants(device, mean, std):
    """Mean and deviation of bytes, (C, 1, 1) each, made once for a device: each copy to it would stop the host."""
    return tuple(255 * torch.tensor(c, device=device).view(-1, 1, 1) for c in (mean, std))


def normalize(image, mean=MEAN, std=STD):
    """uint8 (B, C, H, W) -> float32, on the image's device: of mean 0 and deviation 1, if the data set has those of C channels."""
    mean, std = constants(image.device, tuple(mean), tuple(std))
    return (image - mean) / std


def denormalize(image, mean=MEAN, std=STD):
    """The way back: float (B, C, H, W) -> uint8."""
    mean, std = constants(image.device, tuple(mean), tuple(std))
    return (image.float() * std + mean).round().clamp(0, 255).byte()


def visible(image):
    """Of (B, C, H, W) what can be shown, (B, 3, H, W): the first three channels, or the first as grey."""
    return image[:, :3] if image.shape[1] >= 3 else image[:, :1].expand(-1, 3, -1, -1)


def write_picture(path, images, columns):
    """uint8 images (B, C, H, W) as a PNG, row by row; small ones are shown larger."""
    grid = torchvision.utils.make_grid(visible(images).cpu(), nrow=columns, padding=2)
    times = max(1, 128 // images.shape[-1])
    png = torchvision.io.encode_png(grid.repeat_interleave(times, 1).repeat_interleave(times, 2))
    write_file(path, png.numpy().tobytes())


# ------------------------------------------------------------------------------------------------ packs and statistics

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
        if self.quality == "raw" or len(image) != 3 or height * width <= 64 * 64 or max(height, width) > 65500:    # as large as a JPEG can be
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


def stats(data, channels=None, most=2000):
    """Yields lines on the images of --data: how many, of which classes and sizes; and of up to `most` training images (evenly spaced)
    mean and standard deviation of each channel, every image counting as much, pixels in 0..1. Raises ValueError and OSError."""
    for split in ("train", "val"):
        source = open_source(data, split, 64)
        labels = source.labels[source.labels >= 0]
        counts = np.bincount(labels, minlength=len(source.classes)) if len(labels) else []
        yield f"{split}: {len(source):,} images, " + (f"{len(counts)} classes of {min(counts):,} to {max(counts):,}" if len(counts) else "no classes")
    source, sizes, sums, grey, problems = open_source(data, "train", 64, channels), [], {}, True, []
    chosen = np.linspace(0, len(source) - 1, min(most, len(source))).astype(int).tolist()
    for index in progress(chosen, len(chosen), "reading", images=lambda index: 1):
        try:
            image = source[index][0].double() / 255
        except BadImage as error:
            problems.append(str(error))
            continue
        sizes.append(image.shape[-2:])
        sums.setdefault(len(image), []).append(torch.stack([image.mean((1, 2)), image.square().mean((1, 2))]))
        grey &= len(image) != 3 or bool((image == image[:1]).all())
    if not sums:
        raise ValueError(f"{data}: not one of {len(chosen)} images can be read: {problems[0]}")
    heights, widths = zip(*sizes)
    yield (f"sizes: {min(heights)} to {max(heights)} px high, {min(widths)} to {max(widths)} wide; short side: "
           f"{min(map(min, sizes))} px at least, {int(np.median([min(size) for size in sizes]))} in the middle")
    yield from (f"cannot be read: {line}" for line in problems)
    for found, each in sorted(sums.items()):
        mean, square = torch.stack(each).mean(0)
        text = [" ".join(f"{value:.3f}" for value in values.tolist()) for values in (mean, (square - mean ** 2).clamp(min=0).sqrt())]
        yield f"{len(each):,} images of {found} channel(s): mean {text[0]}, standard deviation {text[1]}"
        yield f"  python train.py --data {shlex.quote(data)} --channels {found} --mean {text[0]} --std {text[1]}"
    if grey and 3 in sums:
        yield f"All are grey: python data.py stats {shlex.quote(data)} --channels 1 says how to train on one channel."


def quality(text):
    """The type of --quality."""
    if text != "raw" and not (text.isdecimal() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"{text} is neither in 1..100 nor raw")
    return text if text == "raw" else int(text)


def main(argv=None):
    parser = argparse.ArgumentParser("data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("stats", help="measure images: sizes, classes, mean and deviation", description=
                                  "Measure images, and print what to give train.py for them. (train.py keeps it in its checkpoints, so that "
                                  "finetune.py and analyze.py know.)")
    takes = f"what --data takes: a folder of images, a pack, or one of {', '.join(SOURCES)}"
    command.add_argument("source", metavar="SRC", help=takes)
    command.add_argument("--channels", type=int, help="measure them with so many channels; 1: grey (as they are)")
    command.add_argument("--images", type=int, default=2000, help="measure at most so many (2000)")
    command = commands.add_parser("pack", help="write all images into three files that load faster", description=
                                  "Store images small, one after another, so that loading them takes less than half of the time. OUT is a folder "
                                  "that train.py and finetune.py take as --data; it appears when it is complete.")
    command.add_argument("source", metavar="SRC", help=takes)
    command.add_argument("out", metavar="OUT", help="the pack, a folder that does not exist yet")
    command.add_argument("--size", type=int, default=256, help="largest short side, pixels; 0: as they are (256)")
    command.add_argument("--quality", type=quality, default=92, help="of JPEG, 1 to 100, or raw: pixels, no loss (92); images of up to 64 × 64 px, "
                         "or not of 3 channels, are always raw")
    command.add_argument("--workers", type=int, default=cores(), help="processes (the cores there are)")
    for each in (parser, *commands.choices.values()):
        each.error = lambda message: parser.exit(2, f"data.py: {message}\n")
    args, began = parser.parse_args(argv), time.time()
    try:
        for name, least in (("size", 0), ("workers", 0), ("images", 1), ("channels", 1)):
            if (value := getattr(args, name, None)) is not None and value < least:
                raise ValueError(f"--{name} {value} is not {least} or more")
        if args.command == "stats":
            for line in stats(args.source, args.channels, args.images):
                print(line)
            return
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
