"""How a reconstruction is judged: over masked pixels, and over frequencies (A²MIM's two losses). At the end, how
predictions of downstream tasks are.

d = x̂ − x is the error of the reconstruction, M the mask, F the orthonormal 2-D DFT of each channel, sg(·) stops
gradients. A new loss is one function and one row of a table.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


def l1(d):
    """ρ(d) = |d|."""
    return d.abs()


def focal_l1(d, alpha=0.2, gamma=1.0):
    """ρ(d) = |d| · (2σ(α|d|) − 1)^γ: small errors count less. Source: the official code's loss for ResNets."""
    return d.abs() * (2 * torch.sigmoid(alpha * d.abs()) - 1) ** gamma


ELEMENTWISE = {"l1": l1, "focal_l1": focal_l1}

# r − x, where r stands in for x̂ at visible pixels and carries no gradient: error d, target x -> r − x. "mixed" is the
# official code's, "prediction" the paper's equation.
STANDINS = {
    "mixed": lambda d, x: d.detach() / 2,                                  # r = ½ sg(x̂) + ½ x: r − x = ½ sg(d)
    "prediction": lambda d, x: d.detach(),                                 # r = sg(x̂)
    "target": lambda d, x: torch.zeros_like(x),                            # r = x
    "mean": lambda d, x: x.mean((2, 3), keepdim=True) - x,                 # r = the image's mean
}


def spatial_loss(d, mask, rho=l1):
    """Σ M·ρ(d) / (3 · (ΣM + 1e-5)). d: (B, 3, H, W); mask: (B, 1, H, W), 1 = masked. Source: SimMIM's loss."""
    return (mask * rho(d).sum(1, keepdim=True)).sum() / (d.shape[1] * (mask.sum() + 1e-5))      # channels first: less to multiply


def spectrum(d):
    """D = F(d), the half that a real signal needs, and how often each of its columns counts in the whole.

    d: (B, C, H, W) real. Returns D (B, C, H, W//2 + 1) complex and a weight (W//2 + 1,) of which the mean over
    all of D, times D's values, is the mean over the full spectrum: |D(u, v)| = |D(−u, −v)|, so interior columns
    count twice and the zero (and, of an even width, the Nyquist) column once.
    """
    width = d.shape[-1]
    D = torch.fft.rfft2(d, norm="ortho")
    columns = torch.full(D.shape[-1:], 2.0, dtype=d.dtype, device=d.device)
    columns[0] = 1
    if width % 2 == 0:
        columns[-1] = 1
    return D, columns * (D.shape[-1] / width)


def focal_frequency(d, average=True, log=True, alpha=1.0, maximum="batch"):
    """mean_{u,v} w(u,v)·|D(u,v)|² of an error image d (B, C, H, W): the frequency loss, given pred − target."""
    if maximum not in ("batch", "image", None):
        raise ValueError(f"unknown maximum {maximum!r}: choose 'batch', 'image' or None")
    if average:
        d = d.sum(0, keepdim=True) / len(d)             # the mean of spectra is the spectrum of the mean
    D, columns = spectrum(d)
    power = D.real.square() + D.imag.square()           # |D|²
    with torch.no_grad():                               # w is a weight, not a way to lower the loss
        w = power ** (alpha / 2)                        # |D|^α
        if log:
            w = w.log1p()
        if maximum is not None:                         # the maximum of half a spectrum is that of the whole
            top = w.amax() if maximum == "batch" else w.amax((2, 3), keepdim=True)
            w = (w / top.clamp_min(torch.finfo(w.dtype).tiny)).clamp(0, 1)
    return (columns * w * power).mean()


def frequency_loss(pred, target, average=True, log=True, alpha=1.0, maximum="batch"):
    """The amplitude-weighted Fourier loss of two batches of images, (B, C, H, W) each; a scalar.

    The paper's form (L_freq of A²MIM, per image): average=False, log=False, maximum=None. Focal Frequency Loss
    (arXiv 2012.12821): the same with maximum="image". The official code's form is the default: the spectra of
    the batch are averaged first, w = log(1 + |D|^α), divided by its maximum over the tensor.

    F is linear, so D = F(pred) − F(target) = F(pred − target), one transform instead of two; of the batch's mean
    image alone where spectra are averaged; and half a spectrum, since images are real. Raises ValueError.
    """
    return focal_frequency(at_least_float32(pred - target), average, log, alpha, maximum)


def frequency_elementwise(d, rho):
    """ρ(|D|), averaged over frequencies, channels and images. d: (B, C, H, W)."""
    D, columns = spectrum(d)
    return (columns * rho(D.abs())).mean()


# A loss over frequencies: error image (B, C, H, W) -> scalar.
FREQUENCY = {
    "focal": focal_frequency,                                               # the official code's: spectra of the batch averaged
    "focal_per_image": lambda d: focal_frequency(d, average=False, maximum="image"),
    "l1": lambda d: frequency_elementwise(d, l1),
    "focal_l1": lambda d: frequency_elementwise(d, focal_l1),
}


def at_least_float32(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x      # there is no FFT of half precision


class A2MIMLoss:
    """L = L_spatial + λ·L_freq, A²MIM's training objective (arXiv 2205.13943).

    spatial: a row of ELEMENTWISE. frequency: a row of FREQUENCY, or a function like those, or None (off).
    frequency_weight: λ. standin: what replaces visible pixels before the DFT, a row of STANDINS. visible: u, the
    gradient's share there. Raises ValueError.

    Calling it with reconstruction x̂ and target x (B, 3, H, W) and a mask (B, h, w), 1 = masked, of any dtype and
    any resolution that divides the images', returns a dictionary of scalars: `loss`, `spatial`, `frequency` (before
    weighting, 0 when off). Half precision is raised to float32, float64 stays.
    """

    def __init__(self, spatial="l1", frequency="focal", frequency_weight=0.1, standin="mixed", visible=0.0):
        for what, name, table in (("spatial loss", spatial, ELEMENTWISE), ("stand-in", standin, STANDINS),
                                  ("frequency loss", frequency, FREQUENCY | {None: None})):
            if name not in table and not callable(name):
                raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(map(str, table))}")
        self.rho, self.standin, self.visible = ELEMENTWISE[spatial], STANDINS[standin], visible
        self.frequency, self.weight = FREQUENCY.get(frequency, frequency), frequency_weight

    def __call__(self, reconstruction, target, mask):
        d = at_least_float32(reconstruction) - at_least_float32(target)                 # d = x̂ − x
        x = target.to(d.dtype)
        if any(side % blocks for side, blocks in zip(d.shape[-2:], mask.shape[-2:])):
            raise ValueError(f"a mask of {tuple(mask.shape[-2:])} does not divide images of {tuple(d.shape[-2:])}")
        M = F.interpolate(mask[:, None].to(d.dtype), size=d.shape[-2:], mode="nearest-exact")   # (B, 1, H, W)
        frequency = torch.zeros_like(d[0, 0, 0, 0])
        if self.frequency is not None:
            M_f = M + (1 - M) * self.visible if self.visible else M
            # x̃ = M_f·x̂ + (1−M_f)·r, so x̃ − x = M_f·d + (1−M_f)·(r − x); and as F is linear, F(x̃) − F(x) = F(x̃ − x)
            error = torch.lerp(self.standin(d, x), d, M_f)
            frequency = self.frequency(error)
            del error                                   # an image's worth of memory a sample, before the next
        spatial = spatial_loss(d, M, self.rho)          # last, so that backward starts here and frees d before the rest
        return {"loss": spatial + self.weight * frequency if self.frequency else spatial, "spatial": spatial, "frequency": frequency}


# ------------------------------------------------------------------------------------------------ downstream tasks

def class_loss(logits, target, kind="ce", smoothing=0.0):
    """logits, soft targets: (B, K). kind: "ce", cross entropy; "bce", binary cross entropy, summed over classes and
    averaged over images (not over both: it matters where gradients are clipped)."""
    if kind == "ce":
        return F.cross_entropy(logits, target, label_smoothing=smoothing)
    target = target * (1 - smoothing) + smoothing / target.shape[1]
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(target)


def class_sums(logits, label, size=None):
    """Of a batch: how often the label (B,) is the first, and one of the first five."""
    hits = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
    return hits[:, 0].sum(), hits.sum()


def encode_pose(pose):
    """(B, 4): centre x and y and radius as shares of the side, angle -> (B, 5), each of variance 1 or so: x, y, radius,
    cos and sin of the angle."""
    x, y, radius, angle = pose.unbind(1)
    return torch.stack([8 * (x - 0.5), 8 * (y - 0.5), 16 * (radius - 0.35), angle.cos(), angle.sin()], 1)


def pose_sums(output, pose, size):
    """Of a batch: errors of centre and radius in pixels, of the angle in degrees."""
    error = output - encode_pose(pose)
    turn = torch.atan2(output[:, 4], output[:, 3]) - pose[:, 3]
    turn = torch.atan2(turn.sin(), turn.cos()).abs()                        # the shorter way round
    return error[:, :2].norm(dim=1).sum() / 8 * size, error[:, 2].abs().sum() / 16 * size, turn.rad2deg().sum()


def mask_sums(logits, mask, size=None):
    """Of a batch: pixels that both, and either, call object; and background. (B, 1, H, W), (B, H, W) bool."""
    found = logits[:, 0] > 0
    return (found & mask).sum(), (found | mask).sum(), (~found & ~mask).sum(), (~found | ~mask).sum()


class Task(NamedTuple):
    """What a head is to predict, and how it is judged."""
    pool: str               # of model.Predictor
    outputs: int | None     # None: one for each class
    loss: Callable          # (output, target, configuration) -> scalar
    sums: Callable          # (output, target, image size) -> sums over a batch
    metrics: Callable       # (these, summed over all batches; number of images) -> {name: value}
    best: tuple             # the metric that counts, and its sign


TASKS = {
    "class": Task("mean", None, lambda o, t, c: class_loss(o, t, c["loss"], c["label_smoothing"] or 0.0),
                  class_sums, lambda s, n: dict(top1=100 * s[0] / n, top5=100 * s[1] / n), ("top1", 1)),
    "pose": Task("flatten", 5, lambda o, t, c: F.mse_loss(o, encode_pose(t)), pose_sums,
                 lambda s, n: dict(centre_px=s[0] / n, scale_px=s[1] / n, angle_deg=s[2] / n), ("angle_deg", -1)),
    "mask": Task("none", 1, lambda o, t, c: F.binary_cross_entropy_with_logits(o[:, 0], t.float()),
                 mask_sums, lambda s, n: dict(miou=50 * (s[0] / s[1] + s[2] / s[3])), ("miou", 1)),
}
