"""Write images, made small, into one tar, which loads much faster than photographs in files.

  python extras/prepare.py path/to/imagenet imagenet.tar      then: train.py --data imagenet.tar

The tar holds what SRC holds, in the same order: labels and held-out images stay the same. `tar xf`
makes a plain folder of it. Images of up to 64 × 64 pixels or of one channel are PNG, of other than
1 or 3 channels .npy, all others JPEG. Those that cannot be read are left out, and named. OUT
appears when all of it is on the disk, not before.
"""
import io
import os
import pathlib
import sys
import tarfile

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))    # where data.py is

import data
import runtime


class Shrunk(torch.utils.data.Dataset):
    """Images as a tar holds them: (name, bytes as a tensor); (None, why) where one cannot be read."""

    def __init__(self, source, size):
        self.source = source
        self.size = size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            image = self.source[index][0]
        except data.BadImage as error:
            return None, str(error)
        if 0 < self.size < min(image.shape[-2:]):
            image = data.TF.resize(image, [self.size], data.BICUBIC, antialias=True)
        channels, height, width = image.shape
        file = io.BytesIO()
        if channels not in (1, 3):
            extension = ".npy"
            np.save(file, image.permute(1, 2, 0).numpy())
        # small images would suffer as JPEG, which has at most 65,535 pixels a side
        elif channels == 1 or height * width <= 64 * 64 or max(height, width) > 65500:
            extension = ".png"
            data.TF.to_pil_image(image).save(file, "PNG")
        else:
            extension = ".jpg"
            data.TF.to_pil_image(image).save(file, "JPEG", quality=92)
        stem = os.path.splitext(os.fsdecode(self.source.paths[index]))[0]
        # a tensor travels in shared memory; bytes in a pipe would keep a process that lost its parent
        return stem + extension, torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def prepare(source, out, size=256, workers=0):
    """Write the images of a folder or tar `source` as a tar `out`, short sides of at most `size`
    pixels (0: as they are). Returns (how many images, lines on those left out)."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: choose another")
    images = Shrunk(data.Folder(source, "all"), size)
    loader = torch.utils.data.DataLoader(images, batch_size=None, num_workers=workers,
                                         worker_init_fn=data.ignore_signals)
    names = set()
    left_out = []
    partial = out + ".partial"
    file = open(partial, "xb")                          # fails where another writes the same tar
    try:
        with file, tarfile.open(fileobj=file, mode="w") as tar:
            for name, content in tqdm(loader, unit="image", disable=None):
                if name is None:
                    left_out.append(content)
                    continue
                if name in names:                       # 1.jpg, where 1.png has become 1.jpg
                    stem, extension = os.path.splitext(name)
                    name = f"{stem}-{len(names)}{extension}"
                names.add(name)
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content.numpy()))
                tar.members.clear()                     # or a kilobyte of each would stay in memory
            if not names:
                raise ValueError(f"{source}: no image can be read: {left_out[0]}")
            tar.close()                                 # writes the mark at the end
            file.flush()
            os.fsync(file.fileno())                     # on the disk before it gets its name
        os.rename(partial, out)
    except BaseException:                               # Ctrl-C, too
        os.remove(partial)
        raise
    return len(names), left_out


def main(argv=None):
    parser = runtime.Parser("prepare.py", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="a folder of images, or a tar")
    parser.add_argument("out", metavar="OUT", help="the tar, which must not exist")
    parser.add_argument("--size", type=int, default=256, help="short side, at most; 0: any (256)")
    parser.add_argument("--workers", type=int, default=data.cores(), help="processes (the cores)")
    args = parser.parse_args(argv)
    count, left_out = prepare(args.source, args.out, args.size, args.workers)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{args.out}: {count:,} images, {os.path.getsize(args.out) / 1e6:,.1f} MB. "
          f"Now --data {args.out}")


if __name__ == "__main__":
    runtime.run(main)
