"""The exercises of the notebooks check themselves.

An answer is compared with the repository's own function on seeded inputs. What is wrong is said in
words.
"""
import inspect
import itertools
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import analyze
import losses
import masking
import model as models
from extras import sweep

CHECKS = {}                                     # name: (how to check, the repository's function)
# what to say where an exercise's tensors do not fit each other
HINTS = {
    "fill": "resize M first, rows before columns: masking.resize(mask, (H, W))",
    "mask_token": "resize M first, masking.resize(mask, (h, w)), and t and gamma need "
                  "[:, None, None]",
}


class Remark(str):
    """What can be said of a right answer."""


def exercise(solution):
    """A decorator of a function that takes an answer, and returns what is wrong with it, or None.

    solution: the repository's function.
    """
    def register(how):
        CHECKS[how.__name__] = (how, solution)
        return how
    return register


def check(name, answer):
    """Say whether an answer is right, and where the repository has its own. Never raises."""
    how, solution = CHECKS[name]
    try:
        problem = how(answer)
    except Exception as error:
        problem = f"it raises {type(error).__name__}: {error}"
        if isinstance(error, (RuntimeError, ValueError)) and name in HINTS:
            problem += f"; {HINTS[name]}"
    lines, first = inspect.getsourcelines(solution)
    place = f"{Path(inspect.getsourcefile(solution)).name}, line {first}"
    if problem and not isinstance(problem, Remark):
        print(f"{name}: {problem}")
    else:
        remark = f"; {problem}" if problem else ""
        print(f"{name}: right{remark}. Ours: {place}, {len(lines)} lines")


def unfinished(result):
    """A stub's body is `...`, so it returns None."""
    return "not written yet: replace the dots" if result is None else None


def not_a_tensor(result, shape):
    """What is wrong with the kind of an answer, or None."""
    if result is None:
        return unfinished(result)
    if not torch.is_tensor(result):
        return f"it returns a {type(result).__name__}, not a tensor"
    if result.shape != shape:
        return f"its shape is {tuple(result.shape)}, not {tuple(shape)}"


def differs(result, expected, mistakes={}):
    """What is wrong with a tensor, or None: its kind, shape or values.

    mistakes: {what to say: what comes of this mistake, or a list}. The first that fits is said.
    """
    problem = not_a_tensor(result, expected.shape)
    if problem:
        return problem
    result = result.to(expected.dtype)
    if torch.allclose(result, expected, rtol=1e-4, atol=1e-6):
        return None
    for words, wrongs in mistakes.items():
        for wrong in wrongs if isinstance(wrongs, list) else [wrongs]:
            if torch.allclose(result, wrong.to(expected.dtype), rtol=1e-4, atol=1e-6):
                return words
    return f"its values differ from ours by up to {(result - expected).abs().max():.3g}"


def lost_gradient(result, expected, inputs):
    """What is wrong with the gradients of a right value, or None. inputs: {name: tensor}."""
    weight = torch.linspace(1, 2, result.numel()).view(result.shape)
    for name, tensor in inputs.items():
        ours = torch.autograd.grad((weight * expected).sum(), tensor, retain_graph=True)[0]
        theirs = None
        if result.requires_grad:
            theirs = torch.autograd.grad((weight * result).sum(), tensor, retain_graph=True,
                                         allow_unused=True)[0]
        if theirs is None or not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-6):
            return (f"the value is right, the gradient of {name} is not: "
                    "no detach, no torch.no_grad")


class Calls(TorchFunctionMode):
    """While it is on, it notes the PyTorch functions that run, and their first tensor's size."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.transforms = []                    # the size of what each Fourier transform takes

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        self.names.append(name)
        if "fft" in name and not name.endswith(("freq", "shift")):
            self.transforms.append((args or tuple(kwargs.values()))[0].numel())
        return function(*args, **kwargs)


def source(function):
    """Print a function of the repository, with its file and line."""
    lines, first = inspect.getsourcelines(function)
    print(f"# {Path(inspect.getsourcefile(function)).name}, line {first}")
    print(textwrap.dedent("".join(lines)), end="")


# ---- 1_method.py

@exercise(masking.random_mask)
def random_mask(answer):
    for grid, ratio in (4, 0.6), (3, 0.6), (4, 0.5), (10, 0.07):
        blocks = grid ** 2
        mask = answer(8, grid, ratio, torch.Generator().manual_seed(0))
        problem = not_a_tensor(mask, (8, grid, grid))
        if problem:
            return problem
        mask = mask.float()
        if not ((mask == 0) | (mask == 1)).all():
            return "a mask holds 0 and 1 only"
        ours = int(masking.random_mask(1, grid, ratio).sum())
        counts = mask.sum((1, 2)).int().tolist()
        if len(set(counts)) > 1:
            return (f"the number of masked blocks changes from image to image, {min(counts)} to "
                    f"{max(counts)} of {blocks}: draw without replacement, not block by block")
        if counts[0] != ours:
            problem = (f"the share of masked blocks is {counts[0] / blocks:g}, not ⌈{ratio}·n²⌉/n² "
                       f"= {ours / blocks:g} (n = {grid})")
            if (grid, ratio) == (4, 0.6) and counts[0] == blocks - ours:
                problem += ": 1 is masked, 0 visible"
            elif (grid, ratio) == (4, 0.6) and counts[0] == ours - 1:
                problem += ": it is rounded down, not up"
            elif grid == 3 and counts[0] == ours - 1:
                problem += ": it is rounded to the nearest number, ⌈ ⌉ always rounds up"
            elif (grid, ratio) == (4, 0.5) and counts[0] == ours + 1:
                problem += f": {ours} is a whole number, ⌈{ours}⌉ is not {ours} + 1"
            elif grid == 10 and counts[0] == 8:
                problem += f": {ratio} · {blocks} is {ratio * blocks!r} here; round it before ⌈ ⌉"
            return problem
        if (mask == mask[0]).all():
            return "all images of the batch have the same mask"
        if not torch.equal(mask, answer(8, grid, ratio, torch.Generator().manual_seed(0)).float()):
            return "the same seed gives another mask: draw from the generator"
        if torch.equal(mask, answer(8, grid, ratio, torch.Generator().manual_seed(1)).float()):
            return "another seed gives the same mask: draw from the generator"

    # uniform: of 4096 masks with 10 of 16, each block and each pair is masked equally often
    mask = answer(4096, 4, 0.6, torch.Generator().manual_seed(0)).float().flatten(1)
    alone = mask.mean(0)
    if (alone - 10 / 16).abs().max() > 0.05:
        return (f"it is not uniform: one block is masked in {alone.max():.0%} of images, "
                f"another in {alone.min():.0%}")
    together = mask.T @ mask / len(mask)
    together.fill_diagonal_(10 * 9 / (16 * 15))
    if (together - 10 * 9 / (16 * 15)).abs().max() > 0.05:
        return (f"it is not uniform: one pair of blocks is masked together in "
                f"{together.max():.0%} of images, another in {together.min():.0%}")


@exercise(masking.fill)
def fill(answer):
    g = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 8, 12, generator=g) + torch.randn(2, 3, 1, 1, generator=g)
    image.requires_grad_()
    mask = torch.tensor([[[1., 1., 0.], [0., 0., 1.]], [[1., 0., 0.], [0., 1., 0.]]])
    given = image.clone()
    result = answer(given, mask)
    if not torch.equal(given, image):
        return "the image itself was changed: make a new tensor, torch.where does"
    M = masking.resize(mask, (8, 12))
    tiled = mask[:, None].repeat(1, 1, 4, 4)
    mean = image.mean((2, 3), keepdim=True)
    visible = (image * (1 - M)).sum((2, 3), keepdim=True) / (1 - M).sum((2, 3), keepdim=True)
    masked = (image * M).sum((2, 3), keepdim=True) / M.sum((2, 3), keepdim=True)
    mistakes = {
        "the mean is over the masked image's visible pixels, ours over all pixels":
            torch.where(M > 0, visible, image),
        "the mean is over the image's masked pixels, ours over all pixels":
            torch.where(M > 0, masked, image),
        "the mean is over the masked image, with zeros for masked pixels, ours over all pixels of "
        "the image": torch.where(M > 0, (image * (1 - M)).mean((2, 3), keepdim=True), image),
        "the mean is over the batch, too: each image has its own":
            torch.where(M > 0, image.mean((0, 2, 3), keepdim=True), image),
        "the mean is over the channels, too: each has its own, or the fill is grey":
            torch.where(M > 0, image.mean((1, 2, 3), keepdim=True), image),
        "the mean is over the batch and the channels, too: each image and channel has its own":
            torch.where(M > 0, image.mean(), image),
        "the mean is over the channels of each pixel, ours over the pixels of each channel":
            torch.where(M > 0, image.mean(1, keepdim=True), image),
        "masked pixels are 0, not the image's mean": image * (1 - M),
        "visible pixels were filled, masked ones kept: 1 is masked":
            torch.where(M > 0, image, mean),
        "all pixels were filled, not only masked ones": mean.expand_as(image),
        "nothing was filled": image,
        "the mask was tiled: each of its blocks covers 4×4 pixels (masking.resize)":
            torch.where(tiled > 0, mean, image),
        "the fill was added to what is there: x·(1 − M) is missing": image + mean * M,
    }
    expected = masking.fill(image, mask, "mean")
    problem = differs(result, expected, mistakes)
    if problem and torch.is_tensor(result) and result.shape == image.shape:
        if problem not in mistakes and not torch.equal(result[(M == 0).expand_as(image)],
                                                       image[(M == 0).expand_as(image)]):
            return f"visible pixels were changed; {problem}"
    return problem or lost_gradient(result, expected, {"the image": image})


@exercise(models.MaskToken.forward)
def mask_token(answer):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 4, 6, generator=g, requires_grad=True)
    t = torch.randn(5, generator=g, requires_grad=True)
    gamma = (torch.rand(5, generator=g) + 0.25).requires_grad_()
    mask = torch.tensor([[[1., 1., 0.], [0., 0., 1.]], [[1., 0., 0.], [0., 1., 0.]]])
    M = masking.resize(mask, (4, 6))
    tiled = mask[:, None].repeat(1, 1, 2, 2)
    T = t.view(-1, 1, 1)
    G = gamma.view(-1, 1, 1)
    layer = models.MaskToken(5, gamma=0.0)
    expected = torch.func.functional_call(layer, dict(token=t, gamma=gamma), (z, mask))
    given = z.clone()
    result = answer(given, mask, t, gamma)
    if not torch.equal(given, z):
        return "z itself was changed: make a new tensor"
    mistakes = {
        "masked positions lost their feature: γ·z·M is missing": z * (1 - M) + T * M,
        "masked positions keep all of their feature: γ is missing from γ·z·M": z + T * M,
        "visible positions changed: t was added everywhere, not times M":
            z * (1 - M) + G * z * M + T,
        "visible positions changed: γ scales them, too": G * z + T * M,
        "visible positions were lost: z·(1 − M) is missing": G * z * M + T * M,
        "t was not added: t·M is missing": z * (1 - M) + G * z * M,
        "visible positions got the token, masked ones kept their feature: 1 is masked":
            z * M + G * z * (1 - M) + T * (1 - M),
        "t and γ are exchanged: γ scales z, t is added": z * (1 - M) + T * z * M + G * M,
        "γ scales the token, ours only the feature": z * (1 - M) + G * z * M + G * T * M,
        "the mask was tiled: each of its blocks covers 2×2 positions (masking.resize)":
            z * (1 - tiled) + G * z * tiled + T * tiled,
    }
    problem = differs(result, expected, mistakes)
    return problem or lost_gradient(result, expected, {"t": t, "γ": gamma, "z": z})


@exercise(models.decoder)
def rearrange(answer):
    """F.pixel_shuffle is the end of our decoder."""
    z = torch.arange(2 * 12 * 3 * 5).float().view(2, 12, 3, 5)      # 3 colours, s = 2, 3×5 places
    z.requires_grad_()
    expected = F.pixel_shuffle(z, 2)
    split = z.view(2, 3, 2, 2, 3, 5)                                # (B, C, s, s, h, w)
    colours_last = z.view(2, 2, 2, 3, 3, 5).permute(0, 3, 4, 1, 5, 2)
    mistakes = {
        "a plain reshape: pixels of one position do not end up in one block; permute before it":
            z.reshape(2, 3, 6, 10),
        "rows and columns are swapped within each block":
            split.permute(0, 1, 4, 3, 5, 2).reshape(2, 3, 6, 10),
        "the blocks are interleaved: a row is h, then s, not s, then h":
            split.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 6, 10),
        "colours are mixed up: z holds all s·s channels of the first colour first":
            colours_last.reshape(2, 3, 6, 10),
        "h and w are exchanged: a picture is h·s rows of w·s pixels": [
            split.permute(0, 1, 5, 2, 4, 3).reshape(2, 3, 6, 10),
            split.permute(0, 1, 5, 3, 4, 2).reshape(2, 3, 6, 10)],
    }
    with Calls() as calls:
        result = answer(z, 2)
    problem = differs(result, expected, mistakes)
    if torch.is_tensor(result) and result.shape == (2, 3, 10, 6):
        return f"{problem}: h and w are exchanged, a picture is h·s rows of w·s pixels"
    if problem:
        return problem
    if "pixel_shuffle" in calls.names:
        return "the value is right, but by pixel_shuffle itself: do without it"
    larger = torch.arange(27 * 2 * 4).float().view(1, 27, 2, 4)     # s = 3
    try:
        problem = differs(answer(larger, 3), F.pixel_shuffle(larger, 3))
    except RuntimeError as error:
        problem = f"it raises {error}"
    if problem:
        return f"it is right for s = 2, not for s = 3: {problem}"
    return lost_gradient(result, expected, {"z": z})


def two_transforms(prediction, target):
    """A²MIM's frequency loss as the formula reads: both batches are transformed."""
    D = torch.fft.fft2(prediction, norm="ortho") - torch.fft.fft2(target, norm="ortho")
    power = D.mean(0).abs() ** 2                        # the batch's mean spectrum, (C, H, W)
    w = power.detach().sqrt().log1p()
    return (w / w.max() * power).mean()


def frequency_mistakes(prediction, target):
    """{what to say: value} of all combinations of mistakes, those with the fewest first."""
    def transform(d, norm="ortho"):
        return torch.fft.fft2(d, norm=norm)

    d = prediction - target
    each = transform(d).abs()                           # |D| of each image
    D = transform(d.mean(0)).abs()                       # |D| of the mean spectrum
    spectra = {
        "": D,
        "spectra of the batch were not averaged: the mean over images comes before |·|": each,
        "amplitudes were averaged: the mean over images is one of complex spectra, before |·|":
            each.mean(0),
        "power was averaged: the mean over images is one of complex spectra, before |·|²":
            each.square().mean(0).sqrt(),
        "spectra were summed over the batch, not averaged": D * len(d),
        'the transform is not orthonormal: norm="ortho"': transform(d.mean(0), None).abs(),
        "the amplitudes' difference |F(x̂)| − |F(x)| forgets the phases: D = F(x̂) − F(x)":
            (transform(prediction).abs() - transform(target).abs()).mean(0).abs(),
        "|d| was taken before F: errors of both signs belong to d":
            transform(d.abs().mean(0)).abs(),
        "|d| was taken before F, of the mean d: errors of both signs belong to d":
            transform(d.mean(0).abs()).abs(),
        "each column of rfft2 counts once; all but the first and last stand for two":
            D[..., :D.shape[-1] // 2 + 1],
    }
    weights = {
        "": torch.log1p,
        "w is |D|, not log(1 + |D|)": torch.abs,
        "w is log(1 + |D|²), not log(1 + |D|)": lambda D: D.square().log1p(),
        "w is missing": torch.ones_like,
    }
    maxima = {
        "": lambda w: w.amax(),
        "w is divided by the maximum of each channel, ours by one over all channels and "
        "frequencies": lambda w: w.amax((-2, -1), keepdim=True),
        "w is divided by the maximum of each image": lambda w: w.amax((-3, -2, -1), keepdim=True),
        "w is not divided by its maximum": lambda w: 1,
    }
    powers = {"": torch.square, "|D| is not squared: w·|D|²": torch.abs}
    totals = {"": torch.mean, "it is the sum over frequencies, not the mean": torch.sum}
    mistakes = {}
    tables = [table.items() for table in (spectra, weights, maxima, powers, totals)]
    for combination in itertools.product(*tables):
        (_, D), (_, weight), (_, maximum), (_, power), (_, total) = combination
        said = tuple(words for words, _ in combination if words)
        w = weight(D)
        mistakes[said] = total(w / maximum(w) * power(D))
    return {"; ".join(said): mistakes[said] for said in sorted(mistakes, key=len) if said}


def frequency(answer):
    """(What is wrong with a frequency loss, or None; the sizes of its transforms' inputs)."""
    g = torch.Generator().manual_seed(0)
    target = torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64)
    prediction = torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64) + target / 2
    prediction.requires_grad_()
    with Calls() as calls:
        result = answer(prediction, target)
    sizes = calls.transforms
    problem = not_a_tensor(result, ())
    if problem:
        return problem, sizes
    if result.is_complex():
        return "it is complex: |D| is real", sizes
    expected = losses.frequency_loss(prediction, target)
    mistakes = frequency_mistakes(prediction.detach(), target)
    problem = differs(result.detach(), expected.detach(), mistakes)
    if problem:
        return problem, sizes
    if not result.requires_grad:
        return "the value is right, but has no gradient", sizes
    ours = torch.autograd.grad(expected, prediction)[0]
    gradient = torch.autograd.grad(result, prediction)[0]
    if not torch.allclose(gradient, ours, rtol=1e-4, atol=1e-8):
        return "the value is right, the gradient not: w is a weight, detach it", sizes
    return None, sizes


@exercise(two_transforms)
def frequency_two(answer):
    problem, sizes = frequency(answer)
    return problem


@exercise(losses.focal_frequency)
def frequency_one(answer):
    problem, sizes = frequency(answer)
    if problem is None and len(sizes) != 1:
        return (f"the value is right, with {len(sizes)} transforms: F(x̂) − F(x) = F(x̂ − x) "
                "needs one")
    if problem is None and sizes[0] > 3 * 8 * 8:                # more than one image
        return Remark("the mean over the batch can come before F, too")
    return problem


# ---- 2_what_it_learned.py

def some_attention():
    """Logarithm of attention (2 images, 3 heads, 9 queries, 9 keys) among 3 × 3 patches."""
    logits = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return (2 * logits).log_softmax(-1)


@exercise(analyze.attention_measures)
def attention_distance(answer):
    """answer(attention (B, heads, N, N), side of a patch in px) -> (B, heads), in px."""
    log_p = some_attention()
    patch = 4
    expected = analyze.attention_measures(log_p, patch)[0]
    result = answer(log_p.exp(), patch)
    if torch.is_tensor(result) and result.shape == (2, 3, 9):
        return "it has one number a query: take the mean over queries"
    side = torch.arange(3.0)
    place = torch.cartesian_prod(side, side)
    longer = torch.cdist(place, place, p=1)                 # along rows, then along columns
    uniform = torch.full((1, 1, 9, 9), 1 / 9).log()
    return differs(result, expected, {
        "it is in patches: `patch` pixels are the side of one": expected / patch,
        "it sums over queries: take their mean": expected * 9,
        "it divides by the number of keys: a query's attention sums to 1 over them": expected / 9,
        "each key counts the same: weigh the distance with the attention to the key":
            analyze.attention_measures(uniform, patch)[0].expand_as(expected),
        "it adds rows and columns: take the straight line between patches":
            (log_p.exp() * patch * longer).sum(-1).mean(-1),
    })


@exercise(analyze.attention_measures)
def head_divergence(answer):
    """answer(log-attention (B, heads, N, N)) -> (B, heads), mean KL from the other heads."""
    log_p = some_attention()
    _, entropy, expected = analyze.attention_measures(log_p, 4)
    result = answer(log_p)
    # KL(p_h‖p_g) for all heads h and g, (B, h, g)
    kl = [(log_p.exp() * (log_p - log_p[:, [g]])).sum(-1).mean(-1) for g in range(3)]
    return differs(result, expected, {
        "a head's divergence from itself, 0, counts in the mean: divide by heads − 1":
            expected * 2 / 3,
        "it sums over the other heads: take their mean": expected * 2,
        "it sums over queries: take their mean": expected * 9,
        "it is the cross entropy −Σ p_h·log p_g: the entropy of p_h is still in it":
            expected + entropy,
        "it is the other way round, KL(p_g‖p_h): weigh with the head's own attention p_h":
            torch.stack(kl, 2).sum(1) / 2,
    })


@exercise(analyze.cka_of)
def cka(answer):
    """answer(x (n, C₁), y (n, C₂)) -> a number; two layers' features of the same n images."""
    draw = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(12, 6, generator=draw)
    y = x[:, :4] @ torch.randn(4, 5, generator=draw)
    y = y + torch.randn(12, 5, generator=draw)
    K = torch.stack([analyze.centred_gram(x), analyze.centred_gram(y)])
    hsic = K @ K.T
    expected = analyze.cka_of(hsic)[0, 1]
    result = answer(x, y)
    if isinstance(result, float):
        result = torch.tensor(result)

    def similarity(x, y):                                   # from kernels that are not U-centred
        K = torch.stack([(z @ z.T).flatten() for z in (x.double(), y.double())])
        return analyze.cka_of(K @ K.T)[0, 1]

    return differs(result, expected, {
        "features are not centred: take their mean over images away": similarity(x, y),
        "it is the biased estimate, too large for few images: of K the diagonal must be left out, "
        "as in analyze.centred_gram": similarity(x - x.mean(0), y - y.mean(0)),
        "it is HSIC, without a scale: divide so that cka(x, x) is 1": hsic[0, 1],
        "it is HSIC, without a scale: divide so that cka(x, x) is 1, not by n(n − 3) only":
            hsic[0, 1] / (12 * 9),
        "cka(x, x) is not 1: divide by the root of HSIC(x, x)·HSIC(y, y)":
            hsic[0, 1] / (hsic[0, 0] * hsic[1, 1]),
    })


@exercise(masking.fill)
def drop_patches(answer):
    """answer(normalised image (B, 3, S, S), mask (B, n, n), 1 = dropped) -> (B, 3, S, S)."""
    draw = torch.Generator().manual_seed(0)
    image = 1 + torch.randn(2, 3, 12, 12, generator=draw)
    mask = masking.random_mask(2, 3, 0.5, draw)
    before = image.clone()
    expected = masking.fill(image, mask, "zero")
    result = answer(image, mask)
    if not image.equal(before):
        return "it changes the images themselves: the next share of patches needs them whole"
    return differs(result, expected, {
        "nothing is dropped: it returns the image": image,
        "it drops what is to stay: in a mask 1 is dropped": masking.fill(image, 1 - mask, "zero"),
        "rows and columns of the mask are exchanged": masking.fill(image, mask.mT, "zero"),
        "it fills in each image's own mean, as A²MIM does: here it is the data set's, which is 0 "
        "in normalised images": masking.fill(image, mask, "mean"),
    })


# ---- 3_is_it_worth_it.py

OURS = [91.2, 88.4, 90.9, 85.3, 89.7]                       # of five seeds, and the other arm's
THEIRS = [88.0, 85.9, 88.8, 80.9, 87.1]


def our_gain(ours, theirs):
    """(mean difference, half of its interval, smallest detectable difference) by sweep.gain."""
    results = {}
    for arm, numbers in dict(ours=ours, theirs=theirs).items():
        for seed, number in enumerate(numbers):
            results[f"{arm}/mask-256/seed{seed}"] = dict(miou=number)
    return sweep.gain(results, "ours", "theirs", "mask-256", "miou")[:3]


def spreads(ours, theirs):
    """s of the differences; with n in place of n − 1; and of the difference of unpaired arms."""
    ours, theirs = torch.tensor(ours).double(), torch.tensor(theirs).double()
    d = ours - theirs
    return d.std(), d.std(correction=0), (ours.var() + theirs.var()).sqrt()


@exercise(sweep.gain)
def paired_interval(answer):
    """answer(numbers, the other arm's, of the same seeds) -> (mean gain, half of its interval)."""
    mean, half, _ = our_gain(OURS, THEIRS)
    result = answer(OURS, THEIRS)
    if result is None:
        return not_a_tensor(result, ())
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        return "it does not return two numbers, (mean, half of the interval)"
    result = torch.tensor([float(number) for number in result]).double()
    root = 5 ** 0.5
    t, t_power = sweep.STUDENT[4]
    s, s_n, s_unpaired = spreads(OURS, THEIRS)

    def with_half(half):
        return torch.tensor([mean, float(half)]).double()

    return differs(result, with_half(half), {
        "the sign is wrong: a gain is ours − theirs": torch.tensor([-mean, half]).double(),
        "these are the ends of the interval: return its middle and half of its length":
            torch.tensor([mean - half, mean + half]).double(),
        "it is unpaired: take the differences first, then their standard deviation":
            with_half(t * s_unpaired / root),
        "it is the standard deviation of one difference: that of a mean is s / √n":
            with_half(t * s),
        "s divides by n: with the mean taken from the same numbers it is n − 1":
            with_half(t * s_n / root),
        "1.96 is for many seeds: with n pairs take sweep.STUDENT[n − 1][0]":
            with_half(1.96 * s / root),
        "STUDENT has rows by degrees of freedom, n − 1, not by n":
            with_half(sweep.STUDENT[5][0] * s / root),
        "it is the standard error: times t it is half of the interval": with_half(s / root),
        "it is the whole length of the interval: return half of it": with_half(2 * half),
    })


@exercise(sweep.gain)
def smallest_difference(answer):
    """answer(paired differences) -> what 80 % of such experiments would show."""
    d = [ours - theirs for ours, theirs in zip(OURS, THEIRS)]
    _, half, least = our_gain(OURS, THEIRS)
    result = answer(d)
    if result is None:
        return not_a_tensor(result, ())
    if isinstance(result, (tuple, list)):
        return f"it returns a {type(result).__name__}, not a number"
    result = torch.tensor(float(result)).double()
    root = 5 ** 0.5
    t, t_power = sweep.STUDENT[4]
    s, s_n, _ = spreads(OURS, THEIRS)
    return differs(result, torch.tensor(least).double(), {
        "it is half of the interval: only half of the experiments would show such a difference; "
        "add the 80 % quantile of t": torch.tensor(half).double(),
        "the 97.5 % quantile of t is missing: the interval must leave out 0": t_power * s / root,
        "it does not know of the number of seeds: divide by √n": (t + t_power) * s,
        "s divides by n: take n − 1": (t + t_power) * s_n / root,
        "1.96 and 0.84 are for many seeds: with n pairs take sweep.STUDENT[n − 1]":
            (1.96 + 0.84) * s / root,
    })


@exercise(masking.random_mask)
def own_mask(answer):
    """answer(batch, grid, ratio, generators) -> (B, grid, grid), 1 = masked.

    Any mask is right that training can use: its share may differ from the ratio.
    """
    def draw(batch, grid, seed):
        draws = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
        return answer(batch, grid, 0.5, draws)

    for batch, grid in ((6, 4), (3, 5), (1, 2)):
        mask = draw(batch, grid, 0)
        wanted = (batch, grid, grid)
        problem = not_a_tensor(mask, wanted)
        if torch.is_tensor(mask) and mask.shape == wanted[1:]:
            problem = f"it is one mask for the whole batch: each image has its own, {wanted}"
        elif torch.is_tensor(mask) and problem:
            problem += ": blocks, without channels; masking.resize makes pixels of them"
        if problem:
            return problem
        if not ((mask == 0) | (mask == 1)).all():
            return f"it holds {mask[(mask != 0) & (mask != 1)][0]:.3g}: 1 is masked, 0 is visible"
        share = mask.double().mean((1, 2))
        if (share == 0).any():
            return "an image has no masked block: there is nothing to reconstruct"
        if (share == 1).any():
            return "an image has no visible block: there is nothing to reconstruct from"
        if not mask.equal(draw(batch, grid, 0)):
            return ("the same generators gave another mask: draw from them only, or a run that "
                    "was interrupted goes on with other masks")
    image = torch.zeros(6, 3, 32, 32)
    models.build("resnet_nano", 32)(image, draw(6, 4, 0))


@exercise(models.ResNet)
def own_encoder(answer):
    """answer: a class of encoders, see model.Encoder."""
    encoder = answer(64)
    parts = ["stem", "layers", "widths", "strides"]
    if encoder is None or not any(hasattr(encoder, part) for part in parts):
        return not_a_tensor(None, ())
    if not isinstance(encoder, models.Encoder):
        return "it is no model.Encoder: write class Name(model.Encoder)"
    for part in [*parts, "img_size"]:
        if not hasattr(encoder, part):
            return f"it has no {part}: see the docstring of model.Encoder"
    layers = list(encoder.layers)
    for part in ("widths", "strides"):
        if len(getattr(encoder, part)) != len(layers) + 1:
            return (f"{part} has {len(getattr(encoder, part))} entries for {len(layers)} layers: "
                    "it needs one for what enters each layer, and one for what leaves the last")
    known = {id(parameter) for parameter in encoder.parameters()}
    modules = [layer for layer in layers if isinstance(layer, torch.nn.Module)]
    if any(id(parameter) not in known for layer in modules for parameter in layer.parameters()):
        return "PyTorch does not see the weights of its layers: put them in an nn.ModuleList"
    encoder.eval()
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    z = encoder.stem(image)
    for i, (width, stride) in enumerate(zip(encoder.widths, encoder.strides)):
        where = f"what enters layers[{i}]" if i < len(layers) else "what leaves the last layer"
        if z.ndim == 4:                                     # a ViT has sequences between its layers
            if z.shape[1] != width:
                return f"{where} has {z.shape[1]} channels, and widths[{i}] says {width}"
            if z.shape[2:] != (64 // stride, 64 // stride):
                return (f"{where} is a map of {z.shape[2]} × {z.shape[3]} for 64 px; strides[{i}] "
                        f"= {stride} says {64 // stride} × {64 // stride}")
        if i < len(layers):
            z = layers[i](z)
    mask = masking.random_mask(2, 2, 0.5, torch.Generator().manual_seed(0))
    painted = models.A2MIM(encoder, len(layers) - 1)(image, mask)
    return differs(painted, image) if painted.shape != image.shape else None
