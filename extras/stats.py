"""Measure images: how many, their classes and sizes, and mean and deviation to give train.py.

  python extras/stats.py path/to/photos
  python extras/stats.py path/to/photos --channels 1              as grey images
"""
import pathlib
import shlex
import sys

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))    # where data.py is

import data
import runtime


def main(argv=None):
    parser = runtime.Parser("stats.py", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="what --data takes")
    parser.add_argument("--channels", type=int, help="measure with so many channels; 1: grey")
    parser.add_argument("--images", type=int, default=2000, help="measure at most so many (2000)")
    args = parser.parse_args(argv)
    for split in ("train", "val"):
        source = data.open_source(args.source, split, 64)
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        classes = "no classes"
        if len(counts):
            classes = f"{len(counts)} classes of {counts.min():,} to {counts.max():,}"
        print(f"{split}: {len(source):,} images, {classes}")

    # up to --images of them, evenly spaced
    source = data.open_source(args.source, "train", 64, args.channels)
    sizes = []                                          # (H, W) of each image
    sums = {}                                           # channels: [(2, C)], mean and mean square
    grey = True                                         # are all?
    problems = []
    indices = np.linspace(0, len(source) - 1, min(args.images, len(source))).astype(int)
    for index in tqdm(indices.tolist(), unit="image", leave=False, disable=None):
        try:
            image = source[index][0].double() / 255
        except data.BadImage as error:
            problems.append(str(error))
            continue
        sizes.append(tuple(image.shape[-2:]))
        moments = torch.stack([image.mean((1, 2)), image.square().mean((1, 2))])
        sums.setdefault(len(image), []).append(moments)
        grey = grey and len(image) == 3 and bool((image == image[:1]).all())
    if not sums:
        raise ValueError(f"{args.source}: none of {len(source):,} images to train on can be read. "
                         + " ".join(problems[:1]))
    heights, widths = zip(*sizes)
    short = [min(size) for size in sizes]
    print(f"sizes: {min(heights)} to {max(heights)} px high, {min(widths)} to {max(widths)} wide; "
          f"short side: {min(short)} px at least, {int(np.median(short))} in the middle")
    for line in problems:
        print(f"cannot be read: {line}")
    # every image counts as much, whatever its size
    for channels, moments in sorted(sums.items()):
        mean, square = torch.stack(moments).mean(0)
        std = (square - mean ** 2).clamp(min=0).sqrt()
        mean = " ".join(f"{value:.3f}" for value in mean.tolist())
        std = " ".join(f"{value:.3f}" for value in std.tolist())
        print(f"{len(moments):,} images of {channels} channel(s): mean {mean}, deviation {std}")
        print(f"  python train.py --data {shlex.quote(args.source)} --channels {channels} "
              f"--mean {mean} --std {std}")
    if grey:
        print(f"All are grey: python extras/stats.py {shlex.quote(args.source)} --channels 1 "
              "says how to train on one channel.")


if __name__ == "__main__":
    runtime.run(main)
