"""Which blocks of an image are hidden, and what stands in their place (A²MIM, arXiv 2205.13943).

A mask is a tensor (B, h, w), 1 = masked, at the resolution of its blocks; `resize` brings it to
any other. A new way of masking is a function and a row of MASKS, a new fill a row of FILLS.
"""
import math

import torch
import torch.nn.functional as F


def random_mask(batch, grid, ratio, generator=None):
    """M: per image, ceil(ratio · grid²) of the grid² blocks, drawn uniformly without replacement.

    batch: B. grid: blocks a side. ratio: share of masked blocks, in (0, 1); the papers' is 0.6.
    generator: one torch.Generator (None: PyTorch's own) for all images, or a list of B of them.
    Returns (B, grid, grid) float32, 1 = masked. Raises ValueError.
    Source: SimMIM, arXiv 2111.09886 (random masking of large patches).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the mask ratio must lie between 0 and 1, both excluded, not {ratio}")
    if grid < 1:
        raise ValueError(f"the mask needs at least one block a side, not {grid}")
    n = grid * grid
    masked = math.ceil(round(ratio * n, 6))         # rounded, since 0.07 · 100 is 7.000000000000001
    if isinstance(generator, (list, tuple)):
        score = torch.empty(batch, n)
        for i in range(batch):
            score[i] = torch.rand(n, generator=generator[i])
    else:
        score = torch.rand(batch, n, generator=generator)
    chosen = score.argsort(dim=1)[:, :masked]       # (B, masked): the blocks of the lowest scores
    return torch.zeros(batch, n).scatter_(1, chosen, 1).view(batch, grid, grid)


# (B, blocks a side, ratio, generator or list of generators) -> mask (B, blocks, blocks)
MASKS = {"random": random_mask}


def resize(mask, size):
    """The mask (B, h, w) at another resolution, blocks repeated: (B, 1, H, W), float32.

    size: (H, W), a multiple or a divisor of the mask's own. Raises ValueError if it is neither.
    """
    h, w = mask.shape[-2:]
    H, W = size
    if (H % h and h % H) or (W % w and w % W):
        raise ValueError(f"a mask of {(h, w)} blocks does not divide a map of {(H, W)}")
    return F.interpolate(mask[:, None].float(), size=(H, W), mode="nearest-exact")


# What stands at masked pixels: image (B, C, H, W), normalised -> anything that broadcasts to it.
FILLS = {
    "mean": lambda image: image.mean((2, 3), keepdim=True),     # A²MIM: the image's mean colour
    "zero": lambda image: torch.zeros_like(image),              # the mean colour of the data set
    "none": lambda image: image,                                # SimMIM: only the token hides
}


def fill(image, mask, how="mean"):
    """x_in = x where M = 0, else the fill. A²MIM: the mean over *all* pixels of the image.

    image: (B, C, H, W), normalised. mask: (B, h, w), 1 = masked. how: a row of FILLS.
    Returns (B, C, H, W) of the image's dtype. Raises ValueError.
    """
    if how not in FILLS:
        raise ValueError(f"unknown fill {how!r}: choose from {', '.join(FILLS)}")
    masked = resize(mask, image.shape[-2:]) > 0                 # (B, 1, H, W)
    return torch.where(masked, FILLS[how](image), image)
