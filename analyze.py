"""What a model has learned: the analyses of two papers, on anyone's checkpoints, side by side.

  python analyze.py runs/vit_nano-a2mim-shapes/last.pt                     one model, on the built-in images
  python analyze.py SUPERVISED SIMMIM A2MIM --data path/to/images --images 512
  python analyze.py CHECKPOINT --only attention,fourier                    some of them

From A²MIM (arXiv 2205.13943): reconstruct, interaction, occlusion, fourier. From Dark Secrets (arXiv 2205.13543): attention,
cka, layers. CHECKPOINT is ours or another project's (see weights.py). Each writes its numbers, NAME.json, and with matplotlib
a figure, NAME.png; index.html shows them all and says how to read them. "±" is a standard error over images.
"""
import argparse
import base64
import contextlib
import datetime
import functools
import html
import io
import itertools
import json
import math
import os
import re
import sys
import time
import zlib

import numpy as np
import torch
import torch.nn.functional as F

import data
import finetune
import harness
import masking
import model as models
import train
import weights
from harness import say
from train import count, number

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

ORDERS = [0, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, 1]               # of interactions: m as shares of the other players
SHARES = [0, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95]                       # of patches dropped


class NotFor(Exception):
    """Why an analysis does not apply to a checkpoint."""


# ------------------------------------------------------------------------------------------------ A²MIM: reconstructions
# An analysis takes a study and a subject (below) and returns its curves, {quantity: (places, means, standard errors)}, a note,
# and what else the figure needs. Its docstring says how to read it, on index.html too.

def reconstruct(study, s):
    """Held-out images, what a model sees of them, what it paints, and both together. Look at the borders of blocks: shades that go on
    are low frequencies, edges that go on are the middle ones that A²MIM is after."""
    if not s.mim:
        raise NotFor("there is no decoder, or no mask token, in its file")
    pictures = []

    def measure(image, _, first):
        generators = [data.generator(study.args.seed, "mask", first + i) for i in range(len(image))]
        mask = masking.random_mask(len(image), s.mask_grid, s.mask_ratio, generators).to(image.device)
        rows, M = train.reconstruct(s.mim, image, mask), masking.resize(mask, image.shape[-2:])
        pictures.extend((label, row[:8].cpu()) for label, row in zip(("image", "masked", "reconstruction", "composite"), rows) if not first)
        guesses = rows[2], masking.fill(image, mask, "mean")
        return torch.stack([((guess - image).abs() * M).sum((1, 2, 3)) / (3 * M.sum((1, 2, 3))) for guess in guesses], 1),

    errors, = study.collect(s, measure)
    return {"|error| of masked pixels": (["reconstruction", "mean colour"], *average(errors))}, "in the data set's standard deviations", pictures


# ------------------------------------------------------------------------------------------------ A²MIM: interactions

def draw_pairs(grid, most, rng):
    """(P, 2) players (row · grid + column): i uniform, j of its up to 24 neighbours within two rows and columns, no pair twice."""
    at = np.arange(grid * grid)
    steps = np.maximum(abs(at // grid - at[:, None] // grid), abs(at % grid - at[:, None] % grid))
    near, pairs = (steps <= 2) & (steps > 0), set()
    while len(pairs) < min(most, near.sum() // 2):
        i = rng.choice(at)
        pairs.add(tuple(sorted((i, rng.choice(at[near[i]])))))
    return np.array(sorted(pairs))


def contexts(players, pairs, size, most, rng):
    """(P, C, players) bool: for each pair, C uniform contexts of `size` other players; all there are, if no more than `most`. Drawn
    ones are the first of a permutation, without the pair: with the same permutations for all, pairs share coalitions."""
    at, i, j = np.arange(players), *pairs.T[:, :, None, None]               # i < j, (P, 1, 1)
    if math.comb(players - 2, size) <= most:
        subsets = list(itertools.combinations(range(players - 2), size))
        inside = np.array([np.isin(range(players), subset) for subset in subsets])             # (C, players), the last two unused
        context = np.moveaxis(inside[:, (at - (at > i) - (at > j))[:, 0]], 1, 0)               # numbered without the pair
    else:
        rank = rng.permuted(np.tile(at, (most, 1)), axis=1)                 # (C, players): place in a permutation
        behind_i, behind_j = (rank > rank.T[k[:, 0, 0]][:, :, None] for k in (i, j))           # (P, C, players)
        context = rank - behind_i - behind_j < size
    return context & (at != i) & (at != j)


def interactions(value, players, pairs, sizes, most, rng):
    """I⁽ᵐ⁾(i,j) = mean over contexts S of m players of v(S∪{i,j}) − v(S∪{i}) − v(S∪{j}) + v(S), (len(sizes), P). (Deng et al., arXiv
    2111.06236.) value: coalitions (n, players) bool -> v (n,) float64, called once, with each coalition once. Also returns how many
    these are, and how many four a context would be."""
    i, j = (np.arange(players) == k[:, None, None] for k in pairs.T)        # (P, 1, players): this player alone
    sets = [np.stack([S | i | j, S | i, S | j, S]) for S in (contexts(players, pairs, size, most, rng) for size in sizes)]
    packed = np.packbits(np.concatenate([S.reshape(-1, players) for S in sets]), axis=1)
    distinct, inverse = np.unique(packed, axis=0, return_inverse=True)
    v = np.asarray(value(np.unpackbits(distinct, axis=1, count=players).astype(bool)))[inverse.reshape(-1)]
    parts = np.split(v, np.cumsum([S[..., 0].size for S in sets])[:-1])
    found = [(np.array([1, -1, -1, 1]) @ part.reshape(4, -1)).reshape(len(pairs), -1).mean(1) for part in parts]
    return np.stack(found), len(distinct), len(v)


def interaction(study, s):
    """What two neighbouring patches do for a class together and not apart, while m others are visible; each model's mean is 1. On the left the
    two are almost alone, on the right the image is nearly whole. A²MIM's plots of interaction strength: masked image modeling strengthens
    the middle orders. Contexts are drawn (but at both ends), and the fewer, the larger the mean of their noise's absolute value there."""
    if not s.logits:
        raise NotFor("it has no classifier; finetune.py gives it one")
    players = s.grid ** 2

    def play(value, index):                                                 # the same game for all subjects
        rng = np.random.default_rng((abs(study.args.seed), index))
        sizes = [int((players - 2) * r) for r in ORDERS]
        return interactions(value, players, draw_pairs(s.grid, study.args.pairs, rng), sizes, study.args.contexts, rng)

    def value(coalitions, image, target):                                   # v = log p/(1 − p), absent patches showing the mean colour
        found = []
        for part in torch.from_numpy(coalitions).split(s.batch):
            logits = s.logits(image * masking.resize(part.view(-1, s.grid, s.grid).to(image.device), image.shape[-2:])).double()
            found.append(logits[:, target] - logits.index_fill(1, target, -math.inf).logsumexp(1))     # = z_t − log Σ_{k≠t} exp z_k
        return torch.cat(found).cpu().numpy()

    def strengths(image, label, first):
        target = torch.where(label >= 0, label, s.logits(image).argmax(1)) if s.known else s.logits(image).argmax(1)
        games = [play(functools.partial(value, image=x, target=t), first + i) for i, (x, t) in enumerate(zip(image, target))]
        return torch.tensor(np.array([np.abs(found).mean(1) for found, _, _ in games])), torch.tensor([game[1:] for game in games])

    found, passes = study.collect(s, strengths, passes=play(lambda coalitions: np.zeros(len(coalitions)), 0)[1])
    note = (f"{passes[:, 0].sum():,} forward passes where four a context would be {passes[:, 1].sum():,}; {study.args.pairs} pairs, "
            f"{study.args.contexts} contexts; for the {'true' if s.known else 'predicted'} class")
    return {"interaction strength J by order m / (n² − 2)": (ORDERS, *jackknife(found, lambda strength: strength / strength.mean().clamp(min=1e-300)))}, note


# ------------------------------------------------------------------------------------------------ A²MIM: occlusion and Fourier

def pooled(s, image):
    """Features of the stem and each block, [(B, C)]: means over positions."""
    return [z.mean((2, 3)) for _, z in s.encoder.walk(image)]


def fit_probe(features, labels, classes, ridge=0.01):
    """A linear classifier of features (N, C): ridge regression of one-hot labels on standardised features. Returns (B, C) -> (B, K)."""
    mean, deviation = features.double().mean(0), features.double().std(0) + 1e-6
    x, y = (features - mean) / deviation, F.one_hot(labels, classes).double()
    W = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1]).to(x), x.T @ (y - y.mean(0)))
    return lambda features: (features - mean) / deviation @ W + y.mean(0)


def fit_probes(study, s):
    """A probe for the stem and each block."""
    labels, *columns = study.collect(s, lambda image, label, _: [label, *pooled(s, image)], split="train", labelled=True)
    return [fit_probe(column.to(study.device), labels.to(study.device), len(study.classes)) for column in columns]


def occlude(image, share, grid, generators):
    """A share of the grid² patches, drawn at random, shows the data set's mean colour (Naseer et al., arXiv 2105.10497)."""
    return masking.fill(image, masking.random_mask(len(image), grid, share, generators).to(image.device), "zero") if share else image


def accuracy(study, s, guesses, passes=1):
    """Whether each guess, of guesses(images, position of the first) -> some (B, K), has the label first: (images, guesses), 0 or 100."""
    return study.collect(s, lambda image, label, first: [100.0 * torch.stack([(guess.argmax(1) == label).double() for guess in guesses(image, first)], 1)],
                         passes=passes, labelled=True)[0]


def occlusion(study, s):
    """Top-1 while more and more patches are dropped. A²MIM's plots of robustness against occlusion: after masked image modeling it falls
    later. Compare the right panel where models differ on whole images."""
    probe = None if s.known else fit_probes(study, s)[-1]

    def guesses(image, first):
        for share in SHARES:
            x = occlude(image, share, s.grid, [data.generator(study.args.seed, "drop", first + i) for i in range(len(image))])
            yield s.logits(x) if s.known else probe(pooled(s, x)[-1])

    hits = accuracy(study, s, guesses, len(SHARES))
    curves = {"top-1, %, by share of patches dropped": (SHARES, *average(hits))}
    if hits[:, 0].mean() > 3 * hits[:, 0].std() / len(hits) ** 0.5:  # three standard errors: there is something to lose
        curves["% of top-1 on whole images by share of patches dropped"] = (SHARES, *jackknife(hits, lambda hits: 100 * hits / hits[0]))
    return curves, "its classifier" if s.known else f"a linear probe of the last features, fitted on {study.probe_images:,} images"


def spectrum(z):
    """Of a map (B, C, h, h): log(|F| + 1e-6), averaged over channels, along the half diagonal, relative to zero frequency, (B, h//2 + 1); and
    the variance over positions, averaged over channels, (B,). (Park and Kim, arXiv 2202.06709.)"""
    k = torch.arange(z.shape[-1] // 2 + 1, device=z.device)
    amplitude = (torch.fft.rfft2(z.float())[..., k, k].abs() + 1e-6).log().mean(1)
    return amplitude - amplitude[:, :1], z.float().var((2, 3), correction=0).mean(1)


def fourier(study, s):
    """How much of each feature map is high frequency, and how much it varies from place to place, from the stem to the last block. A²MIM's
    Fourier analysis, after Park and Kim: attention lowers high frequencies and variance, convolutions and MLPs raise them."""
    vit = isinstance(s.encoder, models.ViT)

    def maps(image):                                                        # where there is something to see
        return {name: z for name, z in s.encoder.walk(image, *[True] * vit) if z.shape[-1] >= 4}

    names = list(maps(s.example))
    found = study.collect(s, lambda image, *_: sum(map(spectrum, maps(image).values()), ()))
    high, variance = torch.stack([amplitude[:, -1] for amplitude in found[0::2]], 1), torch.stack(found[1::2], 1).clamp(min=1e-12).log10()
    return {"Δ log amplitude at the highest frequency by layer": (names, *average(high)), "log10 of the variance over positions by layer": (
        names, *average(variance))}, "1a: after the attention of block 1" * vit, {name: average(amplitude)[0] for name, amplitude in zip(names, found[0::2])}


# ------------------------------------------------------------------------------------------------ Dark Secrets: attention

def attention_measures(log_p, patch):
    """Of log-attention (B, heads, N, N), as means over queries: distance to the keys in pixels, with patches of `patch` px, and entropy in nats,
    (B, heads) each; KL divergence in nats, mean over ordered pairs of different heads, (B, 1). (Dark Secrets, arXiv 2205.13543.)"""
    p, (_, heads, N, _) = log_p.exp(), log_p.shape
    at = torch.cartesian_prod(*2 * [torch.arange(math.isqrt(N)).to(p)])
    distance = (p * (patch * torch.cdist(at, at))).sum(-1).mean(-1)         # Σ_k p(q,k)·|q − k|
    entropy = torch.special.entr(p).sum(-1).mean(-1)                        # −Σ_k p·log p
    crossed = -torch.einsum("bhqk,bgqk->bhg", p, log_p) / N                 # −Σ_k p_h·log p_g
    return distance, entropy, (crossed - entropy[:, :, None]).sum((1, 2))[:, None] / max(1, heads * (heads - 1))   # a head from itself: 0


def attention(study, s):
    """How far heads look (a dot a head, the line their mean), how spread their attention is, and how much heads of a block differ. Dark Secrets'
    plots of these: masked image modeling keeps near and far heads in all blocks, and keeps them different; in the last blocks of a
    supervised model all look far and alike."""
    if not isinstance(s.encoder, models.ViT):
        raise NotFor(f"a {s.arch} has no attention")

    def measures(image, *_):
        z, found = s.encoder.embed(s.encoder.stem(image)), []
        for block in s.encoder.blocks:
            log_p = block.attn.log_attention(block.norm1(z))[..., 1:, 1:].log_softmax(-1)      # among patches, to a sum of 1
            found.append(attention_measures(log_p, s.size / s.grid))
            z = block(z)
        return [torch.stack(parts, 1) for parts in zip(*found)]             # (B, blocks, heads), the last (B, blocks, 1)

    found = study.collect(s, measures)
    uniform = attention_measures(torch.zeros(1, 1, s.grid ** 2, s.grid ** 2).log_softmax(-1), s.size / s.grid)
    return {quantity: (list(range(1, values.shape[1] + 1)), *average(values.mean(2)), *[average(values)[0]] * (values.shape[2] > 1))
            for quantity, values in zip(("attention distance, px, by block", "entropy, nats, by block", "KL divergence between heads, nats, by block"), found)}, \
        f"patches only, the class token is left out; were attention uniform, distance would be {uniform[0].item():.1f} and entropy {uniform[1].item():.2f}"


# ------------------------------------------------------------------------------------------------ Dark Secrets: CKA, dropping layers

def centred_gram(z):
    """Linear kernel of the features (n, ...) of n images, U-centred (Székely and Rizzo, Annals of Statistics 2014), (n·n,) float64. The inner
    product of two, over n(n − 3), is their unbiased HSIC (Song et al., JMLR 2012)."""
    x, n = z.flatten(1).double(), len(z)
    K = ((x - x.mean(0)) @ (x - x.mean(0)).T).fill_diagonal_(0)
    sums = K.sum(0)
    return (K - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0).flatten()


def cka_of(hsic):
    """HSIC of all pairs of layers (L, L), summed over minibatches -> CKA (Nguyen et al., arXiv 2010.15327)."""
    scale = hsic.diag().clamp(min=1e-300).sqrt()
    return hsic / scale.outer(scale)


@functools.cache
def hsic_of(study):
    """HSIC of all layers of all subjects, (groups, L, L), each a sum over a tenth of the minibatches (memory does not grow with the
    images); where each subject's layers end; images in a minibatch."""
    sums, batch = {}, max(4, min(*(s.batch for s in study.subjects), study.images // 10))
    for i, parts in enumerate(zip(*(study.batches(s, batch=batch) for s in study.subjects))):
        if (n := len(parts[0][0])) == batch:                                # what is left over would weigh too much
            grams = torch.stack([centred_gram(z) for s, part in zip(study.subjects, parts) for _, z in s.encoder.walk(part[0])])
            sums[i % 10] = sums.get(i % 10, 0) + (grams @ grams.T).cpu() / (n * (n - 3))
    return torch.stack(list(sums.values())), np.cumsum([0, *(len(list(s.encoder.walk(s.example))) for s in study.subjects)]).tolist(), batch


def cka(study, s):
    """How alike two layers represent images (1: up to rotation and scale), from the stem, bottom left, to the last block. Dark Secrets' similarity
    maps: layers of a masked image model are alike, those of a supervised one drift."""
    sums, ends, batch = hsic_of(study)
    mine = slice(*ends[(at := study.subjects.index(s)):at + 2])

    def means(hsic):                                                        # with each model; a layer with itself does not count
        return torch.stack([part.nanmean() for part in cka_of(hsic).fill_diagonal_(math.nan)[mine].split(np.diff(ends).tolist(), 1)])

    return {"mean CKA of its layers with those of": ([other.name for other in study.subjects], *jackknife(sums, means))}, \
        f"all pairs of different layers; minibatches of {batch} images, ± over {len(sums)} groups of them", dict(matrix=cka_of(sums.sum(0))[mine].tolist(), ends=ends)


def layers(study, s):
    """What a linear classifier gets from the features of the first blocks: where in the model is what tells classes apart? After Dark Secrets'
    experiment of dropping the last layers, with a probe in place of fine-tuning."""
    probes, own = fit_probes(study, s), [s.logits] if s.known else []
    mean, error = average(accuracy(study, s, lambda image, _: [probe(z) for probe, z in zip(probes, pooled(s, image))] + [f(image) for f in own]))
    names = [name for name, _ in s.encoder.walk(s.example)]
    return {"top-1 of a linear probe, %, by layer": (names, mean[:len(names)], error[:len(names)])}, \
        f"fitted on {study.probe_images:,} images" + f"; its classifier, on all blocks: {mean[-1]:.1f} ± {error[-1]:.1f}" * bool(own)


# ------------------------------------------------------------------------------------------------ models, images, results

class Subject:
    """A checkpoint under study: `encoder`; `mim`, the A2MIM around it, None if the file lacks its decoder or token; `logits`, images
    (B, 3, S, S) -> (B, K), None without a classifier; `grid`, patches a side; `batch`, images at once. Raises ValueError."""

    def __init__(self, path, name, device):
        model, about = weights.open_model(path)
        model, run = train.place(model, device, 1).eval().requires_grad_(False), about["run"]
        self.name, self.arch, self.size, self.classes, self.data = name, about["arch"], about["size"], about["classes"], run.get("data")
        self.encoder, self.logits, self.mim = model.encoder, model if isinstance(model, models.Predictor) else None, None
        if not self.logits and not any(name.startswith(("decoder.", "mask_token.")) for name in about["missing"]):
            self.mim = model
        resize, usual = run.get("test_resize", 0), self.size if "nano" in self.arch else round(self.size * 256 / 224)
        self.resize = resize if self.size <= resize <= 4 * self.size else usual
        self.grid = getattr(self.encoder, "grid", self.size // 16 if self.size >= 128 else 8)
        block, ratio = run.get("mask_size", 0), run.get("mask_ratio", 0.6)
        self.mask_grid = self.size // block if block > 0 and self.size % block == 0 else self.size // 32 if self.size >= 128 else 4
        self.mask_ratio = ratio if 0 < ratio < 1 else 0.6
        self.example = torch.randn(4, 3, self.size, self.size, generator=data.generator(0)).to(device)
        with torch.no_grad():
            largest = max(z.numel() for _, z in self.encoder.walk(self.example))               # what makes it is some four times as large
            room = torch.cuda.mem_get_info()[0] / 4 if device.type == "cuda" else 1e9
            self.batch, began = max(4, min(64, int(room / (16 * largest)))), time.time()
            example = self.example[:1].expand(min(16, self.batch), -1, -1, -1)
            output = self.logits(example) if self.logits else self.mim(example, torch.ones(1, 1, 1).to(device)) if self.mim else self.encoder(example)
            if not output.sum().isfinite().item():
                raise ValueError(f"what {path} makes of images is no finite number: it is broken")
            self.rate = len(example) / (time.time() - began)                # images a second


def digest(path):
    with open(path, "rb") as file:
        return functools.reduce(lambda crc, block: zlib.crc32(block, crc), iter(lambda: file.read(2 ** 22), b""), 0)


class Study:
    """Checkpoints, images, and where the results go. Whatever can be wrong is found here. Raises ValueError and OSError."""

    def __init__(self, args):
        self.args, self.device = args, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        names = [re.sub(r"[^\w ().,=+-]|^_", "-", finetune.name_of(path)) for path in args.checkpoints]      # as figures can show them
        names = [name + f" ({i})" * (names.count(name) > 1) for i, name in enumerate(names, 1)]
        self.subjects = [Subject(path, name, self.device) for path, name in zip(args.checkpoints, names)]
        self.data = args.data or self.subjects[0].data or "shapes"
        self.sources = {split: data.open_source(self.data, split, max(s.size for s in self.subjects)) for split in ("train", "val")}
        self.classes, self.images = list(self.sources["val"].classes), min(args.images, len(self.sources["val"]))
        for s in self.subjects:                                             # is its classifier for these classes?
            s.known = bool(s.logits) and s.logits.head.out_features == len(self.classes) and s.classes in (None, self.classes)
        self.probe_images = min(args.probe_images, np.count_nonzero(self.sources["train"].labels >= 0))
        if self.images < 8:
            raise ValueError(f"{self.data} holds out {self.images} images only: the analyses need 8 or more")
        self.about = dict(checkpoints=dict(zip(names, map(digest, args.checkpoints))), data=self.data, images=self.images, seed=args.seed)
        self.out = args.out or os.path.join("runs", "analysis-" + "-".join(names)[:150])
        files = [os.path.join(self.out, name) for name in ("index.html", *(name + end for name in ANALYSES for end in (".json", ".png")))]
        if any(map(os.path.exists, files)) and not self.results() and not args.overwrite:
            raise ValueError(f"{self.out} holds the analysis of something else: choose another --out, or --overwrite")
        os.makedirs(self.out, exist_ok=True)
        if not os.access(self.out, os.W_OK):
            raise ValueError(f"{self.out} cannot be written to: choose another --out")

    def results(self):
        """{analysis: what its file holds}, of those there are of these checkpoints and images."""
        found = {}
        for name in ANALYSES:
            with contextlib.suppress(OSError, ValueError, RecursionError), open(os.path.join(self.out, name + ".json")) as file:
                found[name] = json.load(file)
        return {name: each for name, each in found.items() if isinstance(each, dict) and each.get("about") == self.about}

    def batches(self, s, split="val", labelled=False, passes=1, batch=None):
        """Yields (images (B, 3, S, S), labels (B,), position of the first), the same ones for all subjects."""
        source, most, batch = self.sources[split], self.images if split == "val" else self.probe_images, batch or s.batch
        if labelled:
            source = torch.utils.data.Subset(source, np.flatnonzero(source.labels >= 0))
        if len(source) < 8 or labelled and len(self.classes) < 2:
            raise NotFor(f"the images of {self.data} have no labels")
        chosen = torch.randperm(len(source), generator=data.generator(self.args.seed, split))[:most].tolist()
        views = data.Views(source, functools.partial(finetune.test_view, config=dict(test_resize=s.resize, test_crop=s.size)), self.args.seed)
        batches = [[(0, i, chosen[i]) for i in range(at, min(at + batch, len(chosen)))] for at in range(0, len(chosen), batch)]
        say(f"  {s.name}: {passes * len(chosen):,} forward passes, about {datetime.timedelta(seconds=round(passes * len(chosen) / s.rate))}")
        loader, first = data.loader(views, batches, train.loader_workers(self.args), self.device.type == "cuda"), 0
        for (image, label), problems in data.progress(loader, len(chosen), s.name, lambda batch: len(batch[0][0])):
            for line in problems:
                say(f"  replaced by another: {line}")
            yield data.normalize(image.to(self.device)), label.to(self.device), first
            first += len(image)

    def collect(self, s, function, **options):
        """function(images, labels, position of the first) -> some (B, …), of all images."""
        found = [[part.cpu() for part in function(*batch)] for batch in self.batches(s, **options)]
        return [torch.cat(parts) for parts in zip(*found)]

    def perform(self, name):
        """One analysis, of all checkpoints that it applies to: table, numbers, figure."""
        (analysis, draw), curves, notes, more = ANALYSES[name], {}, {}, {}
        say(f"\n{name}")
        for s in self.subjects:
            try:
                with torch.no_grad():
                    found, notes[s.name], *more[s.name] = analysis(self, s)
                if not all(np.isfinite(means).all() for _, means, *_ in found.values()):
                    raise NotFor("its numbers are not finite")
                for quantity, curve in found.items():
                    curves.setdefault(quantity, {})[s.name] = curve
            except NotFor as reason:
                notes.pop(s.name, None), more.pop(s.name, None)
                say(f"  not for {s.name}: {reason}")
        if not curves:
            return
        table, notes = tabulate(curves), [", ".join(who for who in notes if notes[who] == note) + f": {note}" for note in dict.fromkeys(notes.values()) if note]
        say("\n".join(table + notes))
        result = dict(about=self.about, notes=notes, table=table, curves=curves, more=more if draw is not draw_pictures else None)
        data.write_file(os.path.join(self.out, name + ".json"), json.dumps(result).encode())
        if Figure:
            figure, picture = Figure(layout="constrained", dpi=120), io.BytesIO()
            draw(figure, curves, more)
            figure.savefig(picture, format="png")
            data.write_file(os.path.join(self.out, name + ".png"), picture.getvalue())

    def write_index(self):
        """index.html: all results in the folder that belong together."""
        page = ['<!doctype html><html lang="en"><meta charset="utf-8"><title>nanoA2MIM</title><style>body{font:16px/1.5 sans-serif;max-width:60em;'
                'margin:2em auto}img{max-width:100%}pre{overflow-x:auto;font-size:12px}</style>'
                f"<h1>{html.escape(', '.join(s.name for s in self.subjects))}</h1><p>{self.images} held-out images of {html.escape(self.data)}, "
                f"seed {self.args.seed}. ± is a standard error over images."]
        for name, found in self.results().items():
            page.append(f"<h2>{name}</h2><p>{ANALYSES[name][0].__doc__}")
            if os.path.exists(path := os.path.join(self.out, name + ".png")):
                with open(path, "rb") as file:
                    page.append(f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(file.read()).decode()}">')
            page.append("<pre>" + html.escape("\n".join(found["table"] + found["notes"])) + "</pre>")
        data.write_file(os.path.join(self.out, "index.html"), "\n".join(page).encode())


# ------------------------------------------------------------------------------------------------ numbers, tables, figures

def average(samples):
    """(mean, standard error) over images, the first axis."""
    return samples.double().mean(0).tolist(), (samples.double().std(0) / len(samples) ** 0.5).tolist()


def jackknife(samples, statistic):
    """(statistic of the samples' sum, its standard error by leaving out one after the other)."""
    samples, n = samples.double(), len(samples)
    without = torch.stack([statistic(samples.sum(0) - sample) for sample in samples])
    return statistic(samples.sum(0)).tolist(), (without.var(0, correction=0) * (n - 1)).sqrt().tolist()


def tabulate(curves):
    lines = []
    for quantity, each in curves.items():
        rows, shown = [], None
        for name, (places, means, errors, *_) in each.items():
            digits = max(0, min(3, 2 - math.floor(math.log10(max(map(abs, means)) or 1))))
            rows += [[quantity, *map(str, places)]] * (places != shown) + [[name, *(f"{m:.{digits}f} ± {e:.{digits}f}" for m, e in zip(means, errors))]]
            shown = places
        widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return lines


def draw_curves(figure, curves, more):
    """A panel a quantity, a line a checkpoint; places with names, the layers, over their share of the depth."""
    figure.set_size_inches(1.5 + 4.5 * len(curves), 4.6)
    for ax, (quantity, each) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for i, (name, (places, means, errors, *heads)) in enumerate(each.items()):
            x = np.linspace(0, 1, len(places)) if isinstance(places[0], str) else places
            ax.errorbar(x, means, errors, marker=".", capsize=2, color=f"C{i}", label=name)
            for dots in heads:
                ax.plot(np.repeat(x, len(dots[0])), np.ravel(dots), "o", ms=4, color=f"C{i}", alpha=0.5)
        title, _, where = quantity.rpartition(" by ")
        ax.set(title=title.strip(","), xlabel=where)
        if isinstance(places[0], (str, int)) and all(other == places for other, *_ in each.values()):
            ax.set_xticks(x, places)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)


def draw_pictures(figure, curves, more):
    rows = [(f"{name}\n{label}" if label == "masked" else label, row) for i, (name, (rows,)) in enumerate(more.items()) for label, row in rows[bool(i):]]
    figure.set_size_inches(9, 1.15 * len(rows))
    for ax, (label, row) in zip(figure.subplots(len(rows)), rows):
        ax.imshow(data.denormalize(row).permute(2, 0, 3, 1).flatten(1, 2))
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
        ax.set(xticks=[], yticks=[])


def draw_map(figure, curves, more):
    ends, names = next(iter(more.values()))[0]["ends"], list(more)
    figure.set_size_inches(3.5 + 2 * len(names), 2.5 + 2 * len(names))
    ax, middles = figure.subplots(), np.add(ends[1:], ends[:-1]) / 2 - 0.5
    image = ax.imshow(np.concatenate([each["matrix"] for each, in more.values()]), vmin=0, vmax=1, origin="lower", cmap="magma")
    figure.colorbar(image, ax=ax, shrink=0.8, label="CKA")
    for line, end in itertools.product((ax.axhline, ax.axvline), ends[1:-1]):
        line(end - 0.5, color="w")
    ax.set_xticks(middles, names, fontsize=7)
    ax.set_yticks(middles, names, fontsize=7, rotation=90, va="center")


ANALYSES = {
    "reconstruct": (reconstruct, draw_pictures), "interaction": (interaction, draw_curves), "occlusion": (occlusion, draw_curves),
    "fourier": (fourier, draw_curves), "attention": (attention, draw_curves), "cka": (cka, draw_map), "layers": (layers, draw_curves)}


# ------------------------------------------------------------------------------------------------ command line

def chosen(text):
    if odd := set(text.split(",")) - set(ANALYSES):
        raise argparse.ArgumentTypeError(f"no analysis {min(odd)!r}: choose from {', '.join(ANALYSES)}")
    return text.split(",")


def parse(argv):
    harness.PROGRAM = "analyze.py"
    parser = argparse.ArgumentParser("analyze.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = harness.fail
    option = parser.add_argument
    option("checkpoints", nargs="+", metavar="CHECKPOINT", help="what to look at; several are drawn in one figure")
    option("--only", type=chosen, default=list(ANALYSES), metavar="NAME[,NAME …]", help=f"of {', '.join(ANALYSES)} (all)")
    option("--data", help="as for train.py; its held-out images are used (the first checkpoint's, or the built-in ones)")
    option("--images", type=number(int, 8), default=64, help="how many of them, drawn by --seed (64)")
    option("--probe-images", type=number(int, 4), default=2000, help="labelled training images for a probe (2000)")
    option("--pairs", type=count, default=10, help="interaction: pairs of patches an image; the authors' is 50 (10)")
    option("--contexts", type=count, default=10, help="interaction: contexts a pair and order; the authors' is 50 (10)")
    option("--seed", type=int, default=0, help="of images, masks, dropped patches and games (0)")
    option("--workers", type=number(int, 0), help="loader processes (the cores there are, at most 8)")
    option("--out", help="folder of the results (one below runs/, named after the checkpoints)")
    option("--overwrite", action="store_true", help="also where the analysis of something else lies")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)

    def work():
        study = Study(args)
        say(f"{study.images} held-out images of {study.data}{'' if args.data else ' (no --data given)'}, on {study.device}: "
            + ", ".join(f"{s.name} ({s.arch}, {s.size} px)" for s in study.subjects)
            + ("" if Figure else "; no figures, only numbers: pip install matplotlib for them"))
        for name in args.only:
            study.perform(name)
            study.write_index()
        say(f"\nLook at {os.path.join(study.out, 'index.html')}")

    try:
        harness.together(work)                                              # errors in one line
    except KeyboardInterrupt:
        say("interrupted; what is finished is kept")
        sys.exit(130)


if __name__ == "__main__":
    main()
