"""How a reconstruction is judged: over masked pixels, and over frequencies (A²MIM, 2205.13943).

x is the target, x̂ the reconstruction, d = x̂ − x its error, M the mask (1 = masked), F the
orthonormal 2-D DFT of each channel; sg(·) stops gradients. B, C, H, W: images, channels, rows,
columns. A new loss is a function and a row of a table.
"""
import torch
import torch.nn.functional as F


# ---- over masked pixels

def l1(d):
    """ρ(d) = |d|."""
    return d.abs()


def focal_l1(d, alpha=0.2, gamma=1.0):
    """ρ(d) = |d| · (2σ(α|d|) − 1)^γ: small errors count less. Source: official code, ResNets."""
    return d.abs() * (2 * torch.sigmoid(alpha * d.abs()) - 1) ** gamma


ELEMENTWISE = {"l1": l1, "focal_l1": focal_l1}


def spatial_loss(d, mask, rho=l1):
    """Σ M·ρ(d) / (C · (ΣM + 1e-5)). d: (B, C, H, W). mask: (B, 1, H, W). Source: SimMIM's loss."""
    channels = d.shape[1]
    error = rho(d).sum(1, keepdim=True)             # (B, 1, H, W): channels first, less to multiply
    return (mask * error).sum() / (channels * (mask.sum() + 1e-5))


# ---- over frequencies

def spectrum(d):
    """D = F(d), the half that a real signal needs, and how often each column of it counts.

    d: (B, C, H, W), real. Returns D, (B, C, H, W//2 + 1), complex, and c, (W//2 + 1,): the mean of
    c·f(|D|) is the mean of f(|D|) over the full spectrum. There |D(u, v)| = |D(−u, −v)|, so each
    column counts twice, but the zero column (and of an even W, the Nyquist column) once.
    """
    W = d.shape[-1]
    D = torch.fft.rfft2(d, norm="ortho")
    c = torch.full(D.shape[-1:], 2.0, dtype=d.dtype, device=d.device)
    c[0] = 1
    if W % 2 == 0:
        c[-1] = 1
    return D, c * (D.shape[-1] / W)


def focal_frequency(d, average=True, log=True, alpha=1.0, maximum="batch"):
    """mean_{u,v} w(u,v)·|D(u,v)|² of an error image d (B, C, H, W): `frequency_loss` of d."""
    if average:
        d = d.sum(0, keepdim=True) / len(d)         # the spectra's mean is the mean's spectrum
    D, c = spectrum(d)
    power = D.real.square() + D.imag.square()       # |D|²
    with torch.no_grad():                           # w is a weight, not a way to lower the loss
        w = power ** (alpha / 2)                    # |D|^α
        if log:
            w = w.log1p()
        if maximum is not None:
            over = {"batch": (0, 1, 2, 3), "image": (2, 3)}[maximum]
            w = w / w.amax(over, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return (c * w * power).mean()


def frequency_loss(pred, target, average=True, log=True, alpha=1.0, maximum="batch"):
    """The amplitude-weighted Fourier loss of two batches of images, (B, C, H, W) each; a scalar.

    average: average the spectra of the batch first. w = |D|^alpha, with log: log(1 + |D|^alpha),
    divided by its maximum over the "batch", over each "image" and channel, or not (None). The
    default is the official code's. The paper's equation: average=False, log=False, maximum=None.
    Focal Frequency Loss (arXiv 2012.12821): the paper's with maximum="image".

    F is linear, so D = F(pred) − F(target) = F(pred − target): one transform instead of two, of
    the batch's mean image alone where spectra are averaged; and half of it, as images are real.
    """
    d = pred - target
    d = d.to(torch.promote_types(d.dtype, torch.float32))       # there is no FFT of half precision
    return focal_frequency(d, average, log, alpha, maximum)


def frequency_elementwise(d, rho):
    """mean_{u,v} ρ(|D(u,v)|) of an error image d (B, C, H, W)."""
    D, c = spectrum(d)
    return (c * rho(D.abs())).mean()


# error image (B, C, H, W) -> scalar
FREQUENCY = {
    "focal": focal_frequency,                                   # the official code's
    "focal_per_image": lambda d: focal_frequency(d, average=False, maximum="image"),
    "l1": lambda d: frequency_elementwise(d, l1),
    "focal_l1": lambda d: frequency_elementwise(d, focal_l1),
}

# r stands in for x̂ at visible pixels, without a gradient: error d, target x -> r − x
STANDINS = {
    "mixed": lambda d, x: d.detach() / 2,                       # r = ½ sg(x̂) + ½ x: official code
    "prediction": lambda d, x: d.detach(),                      # r = sg(x̂): the paper's equation
    "target": lambda d, x: torch.zeros_like(x),                 # r = x
    "mean": lambda d, x: x.mean((2, 3), keepdim=True) - x,      # r = the image's mean
}


# ---- the training objective

def row(table, name, what):
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(table)}")
    return table[name]


class A2MIMLoss:
    """L = L_spatial + λ·L_frequency, A²MIM's training objective (arXiv 2205.13943).

    spatial: a row of ELEMENTWISE. frequency: a row of FREQUENCY, a function like those, or None
    (off). frequency_weight: λ. standin: what replaces visible pixels before the DFT, a row of
    STANDINS. visible: u, their share of the gradient there. Raises ValueError.

    Called with reconstruction x̂ and target x (B, C, H, W), and a mask (B, h, w) of any dtype
    whose blocks divide the images, it returns a dictionary of scalars: loss, spatial, frequency
    (before λ; 0 when off). Half precision is raised to float32, float64 stays.
    """

    def __init__(self, spatial="l1", frequency="focal", frequency_weight=0.1, standin="mixed",
                 visible=0.0):
        self.rho = row(ELEMENTWISE, spatial, "spatial loss")
        self.standin = row(STANDINS, standin, "stand-in")
        if isinstance(frequency, str):
            frequency = row(FREQUENCY, frequency, "frequency loss")
        self.frequency = frequency
        self.frequency_weight = frequency_weight or 0.0         # None where it is off
        self.visible = visible

    def __call__(self, reconstruction, target, mask):
        dtype = torch.result_type(reconstruction, target)
        dtype = torch.promote_types(dtype, torch.float32)       # at least
        x = target.to(dtype)
        d = reconstruction.to(dtype) - x                        # d = x̂ − x
        H, W = d.shape[-2:]
        h, w = mask.shape[-2:]
        if H % h or W % w:
            raise ValueError(f"a mask of {(h, w)} blocks does not divide images of {(H, W)} pixels")
        M = F.interpolate(mask[:, None].to(dtype), size=(H, W), mode="nearest-exact")

        frequency = d.new_zeros(())
        if self.frequency is not None:
            # x̃ = M_f·x̂ + (1 − M_f)·r is x̂ with its visible pixels replaced, as far as u says.
            # F is linear: F(x̃) − F(x) = F(x̃ − x), and x̃ − x = M_f·d + (1 − M_f)·(r − x).
            M_f = M + (1 - M) * self.visible if self.visible else M
            error = torch.lerp(self.standin(d, x), d, M_f)
            frequency = self.frequency(error)
            del error                               # an image's worth of memory a sample

        # The spatial loss is last, so that backward starts here and frees d before the rest.
        spatial = spatial_loss(d, M, self.rho)
        loss = spatial + self.frequency_weight * frequency
        return {"loss": loss, "spatial": spatial, "frequency": frequency}
