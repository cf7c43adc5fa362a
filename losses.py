"""How a reconstruction is judged: over masked pixels, and over frequencies (A²MIM's two losses).

d = x̂ − x is the error of the reconstruction, M the mask, F the orthonormal 2-D DFT of each channel, sg(·) stops
gradients. A new loss is one function and one row of a table.
"""
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
    return (mask * rho(d)).sum() / (d.shape[1] * (mask.sum() + 1e-5))


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
        d = d.mean(0, keepdim=True)                     # the mean of spectra is the spectrum of the mean
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


def at_least_float32(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x      # there is no FFT of half precision


class A2MIMLoss:
    """L = L_spatial + λ·L_freq, A²MIM's training objective (arXiv 2205.13943).

    spatial: "l1" or "focal_l1". frequency: "focal", "l1", "focal_l1" or None (off). frequency_weight: λ.
    standin: what replaces visible pixels before the DFT, a row of STANDINS. visible: u, the gradient's share there.
    average, log, alpha, maximum: of the focal frequency loss, see `frequency_loss`. Raises ValueError.

    Calling it with reconstruction x̂ and target x (B, 3, H, W) and a mask (B, h, w), 1 = masked, of any dtype and
    any resolution that divides the images', returns a dictionary of scalars: `loss`, `spatial`, `frequency` (before
    weighting, 0 when off). Half precision is raised to float32, float64 stays.
    """

    def __init__(self, spatial="l1", frequency="focal", frequency_weight=0.1, standin="mixed", visible=0.0,
                 average=True, log=True, alpha=1.0, maximum="batch"):
        for what, name, table in (("spatial loss", spatial, ELEMENTWISE), ("stand-in", standin, STANDINS),
                                  ("frequency loss", frequency, ("focal", *ELEMENTWISE, None))):
            if name not in table:
                raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(map(str, table))}")
        self.rho, self.standin, self.visible = ELEMENTWISE[spatial], STANDINS[standin], visible
        self.frequency, self.weight = frequency, frequency_weight
        self.focal = dict(average=average, log=log, alpha=alpha, maximum=maximum)

    def __call__(self, reconstruction, target, mask):
        x = at_least_float32(target)
        d = at_least_float32(reconstruction) - x                                        # d = x̂ − x
        if any(side % blocks for side, blocks in zip(d.shape[-2:], mask.shape[-2:])):
            raise ValueError(f"a mask of {tuple(mask.shape[-2:])} does not divide images of {tuple(d.shape[-2:])}")
        M = F.interpolate(mask[:, None].to(d.dtype), size=d.shape[-2:], mode="nearest-exact")   # (B, 1, H, W)
        spatial = spatial_loss(d, M, self.rho)
        if self.frequency is None:
            return {"loss": spatial, "spatial": spatial, "frequency": torch.zeros_like(spatial)}
        M_f = M + (1 - M) * self.visible
        # x̃ = M_f·x̂ + (1−M_f)·r, so x̃ − x = M_f·d + (1−M_f)·(r − x); and as F is linear, F(x̃) − F(x) = F(x̃ − x)
        error = M_f * d + (1 - M_f) * self.standin(d, x)
        if self.frequency == "focal":
            frequency = focal_frequency(error, **self.focal)
        else:
            frequency = frequency_elementwise(error, ELEMENTWISE[self.frequency])
        return {"loss": spatial + self.weight * frequency, "spatial": spatial, "frequency": frequency}
