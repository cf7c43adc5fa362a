"""Which parts of an image are hidden, and what stands in their place (A²MIM, arXiv 2205.13943).

A mask is a tensor (B, h, w) with 1 = masked, at the resolution of its blocks. Whoever needs it finer or coarser
calls `resize`. A new way of masking is one function and one row of MASKS, a new fill one of FILLS.
"""
import math

import torch
import torch.nn.functional as F


def random_mask(batch, grid, ratio, generator=None):
    """M: per image, ceil(ratio · grid²) of the grid² blocks, drawn uniformly without replacement.

    batch: B. grid: blocks a side, n. ratio: share of masked blocks, in (0, 1); the papers' is 0.6.
    generator: one torch.Generator (or None, PyTorch's own) for the batch, or a list of B, one an image.
    Returns (B, grid, grid) float32, 1 = masked. Raises ValueError.
    Source: SimMIM, arXiv 2111.09886 (random masking of large patches).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the mask ratio must lie between 0 and 1, both excluded, not {ratio}")
    if grid < 1:
        raise ValueError(f"the mask needs at least one block a side, not {grid}")
    n = grid * grid
    masked = math.ceil(round(ratio * n, 6))             # rounded first: 0.7 · 10 is 7.000000000000001
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for a batch of {batch}: give one, or one an image")
        score = torch.stack([torch.rand(n, generator=g) for g in generator])
    else:
        score = torch.rand(batch, n, generator=generator)
    chosen = score.argsort(dim=1)[:, :masked]           # (B, k): the k blocks with the lowest scores
    return torch.zeros(batch, n).scatter_(1, chosen, 1).view(batch, grid, grid)


MASKS = {"random": random_mask}                         # (batch, grid, ratio, generators) -> (B, grid, grid)


def resize(mask, size):
    """The mask (B, h, w) at another resolution, blocks repeated: (B, 1, *size), float32.

    size: (height, width), a multiple or a divisor of the mask's own. Raises ValueError if it is neither.
    """
    if any(a % b and b % a for a, b in zip(size, mask.shape[-2:])):
        raise ValueError(f"a mask of {tuple(mask.shape[-2:])} blocks does not divide a map of {tuple(size)}")
    return F.interpolate(mask[:, None].float(), size=tuple(size), mode="nearest-exact")


# What stands at masked pixels: image (B, C, H, W), normalised -> anything that broadcasts to it.
FILLS = {
    "mean": lambda image: image.mean((2, 3), keepdim=True),     # A²MIM: the image's own mean colour, its DC component
    "zero": lambda image: torch.zeros_like(image),              # the data set's mean colour
    "none": lambda image: image,                                # SimMIM: the mask token does all the hiding
}


def fill(image, mask, how="mean"):
    """x_in = x where M = 0, else the fill. A²MIM: the mean over *all* pixels, per image and channel.

    image: (B, C, H, W), normalised. mask: (B, h, w), 1 = masked. how: a row of FILLS.
    Returns (B, C, H, W) of the image's dtype. Raises ValueError.
    """
    if how not in FILLS:
        raise ValueError(f"unknown fill {how!r}: choose from {', '.join(FILLS)}")
    return torch.where(resize(mask, image.shape[-2:]) > 0, FILLS[how](image), image)
