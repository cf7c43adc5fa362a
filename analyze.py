"""What a model has learned: the analyses of two papers, on anyone's checkpoints, side by side.

  python analyze.py runs/vit_nano-a2mim-shapes/last.pt --only attention,fourier
  python analyze.py SUPERVISED SIMMIM A2MIM --data path/to/images --images 512
  python analyze.py BEIT=beit_base.pth:vit_b                     another project's weights, named

CHECKPOINT is [NAME=]PATH[:ARCH], with ARCH where the file does not say which architecture it
holds. From A²MIM (arXiv 2205.13943): reconstruct, interaction, occlusion, fourier. From Dark
Secrets (arXiv 2205.13543): attention, cka, layers. Each writes NAME.json, its numbers, and with
matplotlib NAME.png; index.html shows all. "±" is a standard error over images.
"""
import functools
import html
import itertools
import json
import math
import os
import pathlib
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

import data
import finetune
import masking
import model as models
import runtime
import weights

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

ORDERS = [0, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, 1]  # of interactions, shares of players
SHARES = [0, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95]  # of patches that are dropped

# An analysis takes a Checkpoint. It returns curves, {"quantity by place": (places, means, standard
# errors[, means of each head])}, or none where it does not apply; a note; what its figure needs
# beside. Its docstring, on index.html, says how to read the figure.

# ---- A²MIM: reconstructions

def reconstruct(c):
    """Rows of held-out images, what a model sees of them, what it paints, and both together. Shades
    that go on across borders of blocks are low frequencies, edges the middle ones."""
    if not c.mim:
        return {}, "not applicable: no decoder, or no mask token, in its file", None
    errors = []
    for image, _, first in batches(c):
        draws = [data.generator(c.args.seed, "mask", first + i) for i in range(len(image))]
        mask = c.random_mask(len(image), c.size // c.mask_size, c.mask_ratio, draws)
        mask = mask.to(image.device)
        rows = c.mim.reconstruct(image, mask)
        if first == 0:
            pictures = torch.cat([row[:8] for row in rows])
            pictures = data.visible(data.denormalize(pictures, c.mean, c.std)).cpu()
        # mean of |x̂ − x| over masked pixels, of the reconstruction and of the image's mean colour
        M = masking.resize(mask, image.shape[-2:])
        pixels = image.shape[1] * M.sum((1, 2, 3))
        guesses = [rows[2], masking.fill(image, mask, "mean")]
        means = [((guess - image).abs() * M).sum((1, 2, 3)) / pixels for guess in guesses]
        errors.append(torch.stack(means, 1).cpu())
    curve = (["reconstruction", "mean colour"], *average(torch.cat(errors)))
    note = f"in standard deviations; {c.mask_ratio:.0%} masked, in blocks of {c.mask_size} px"
    return {"|error| of masked pixels": curve}, note, pictures


# ---- A²MIM: interactions

def draw_pairs(grid, count, rng):
    """(P, 2) players (row · grid + column), no pair twice: i uniform, j one of its up to 24
    neighbours within two rows and columns. P is count, or all there are."""
    player = np.arange(grid * grid)
    row, column = np.divmod(player, grid)
    distance = np.maximum(abs(row - row[:, None]), abs(column - column[:, None]))
    near = (distance > 0) & (distance <= 2)
    pairs = set()
    while len(pairs) < min(count, near.sum() // 2):
        i = rng.choice(player)
        j = rng.choice(player[near[i]])
        pairs.add((min(i, j), max(i, j)))
    return np.array(sorted(pairs))


def contexts(players, pairs, size, count, rng):
    """(P, C, players) bool: for each pair C contexts S, `size` other players; all, if these are
    no more than `count`, else drawn: each starts a permutation that serves all pairs."""
    player = np.arange(players)
    if math.comb(players - 2, size) <= count:
        every = []
        for pair in pairs:
            subsets = itertools.combinations(np.delete(player, pair), size)
            every.append([np.isin(player, subset) for subset in subsets])
        return np.array(every)

    # a player's rank in a permutation, less one for i and for j if they come before
    i = pairs[:, 0, None, None]
    j = pairs[:, 1, None, None]
    rank = rng.permuted(np.tile(player, (count, 1)), axis=1)  # (C, players)
    behind_i = rank > rank.T[pairs[:, 0], :, None]  # (P, C, players)
    behind_j = rank > rank.T[pairs[:, 1], :, None]
    context = rank - behind_i - behind_j < size
    return context & (player != i) & (player != j)


def interactions(value, players, pairs, sizes, count, rng):
    """I⁽ᵐ⁾(i,j) = mean over contexts S of m players of v(S∪{i,j}) − v(S∪{i}) − v(S∪{j}) + v(S),
    (len(sizes), P) (Deng et al., arXiv 2111.06236). value: coalitions (n, players) bool → v (n,)
    float64; it is called once, with each coalition once."""
    player = np.arange(players)
    i = player == pairs[:, 0, None, None]  # (P, 1, players): this player alone
    j = player == pairs[:, 1, None, None]
    games = []
    for size in sizes:
        S = contexts(players, pairs, size, count, rng)
        games.append(np.stack([S | i | j, S | i, S | j, S]))  # (4, P, C, players)

    # pairs and contexts share coalitions: about half of the forward passes are saved
    coalitions = np.concatenate([game.reshape(-1, players) for game in games])
    distinct, inverse = np.unique(coalitions, axis=0, return_inverse=True)
    v = value(distinct)[inverse.reshape(-1)]

    means = []
    ends = np.cumsum([game[..., 0].size for game in games])
    for game, part in zip(games, np.split(v, ends[:-1])):
        v_ij, v_i, v_j, v_none = part.reshape(game.shape[:3])
        means.append((v_ij - v_i - v_j + v_none).mean(1))
    return np.stack(means)


def interaction(c):
    """What two neighbouring patches do for a class together and not apart, while m others are
    visible; a model's mean is 1. Compare models at the same number of contexts: few add noise."""
    if not c.logits:
        return {}, "not applicable: no classifier; finetune.py gives it one", None
    sizes = [int((c.grid ** 2 - 2) * order) for order in ORDERS]
    strengths = []
    for image, label, index in batches(c, batch=1):
        target = label if c.known and label >= 0 else c.logits(image).argmax(1)

        def value(coalitions):  # v = log p/(1 − p); absent patches show the mean colour
            v = []
            for part in torch.from_numpy(coalitions).split(c.args.batch):
                present = part.view(-1, c.grid, c.grid).to(image.device)
                logits = c.logits(image * masking.resize(present, image.shape[-2:])).double()
                others = logits.index_fill(1, target, -math.inf)
                v.append(logits[:, target[0]] - others.logsumexp(1))  # = z_t − log Σ_{k≠t} exp z_k
            return torch.cat(v).cpu().numpy()

        rng = np.random.default_rng((c.args.seed % 2 ** 63, index))  # the same game for all models
        pairs = draw_pairs(c.grid, c.args.pairs, rng)
        I = interactions(value, c.grid ** 2, pairs, sizes, c.args.contexts, rng)
        strengths.append(torch.from_numpy(np.abs(I).mean(1)))
    # J⁽ᵐ⁾ = mean |I⁽ᵐ⁾| / its mean over orders
    J = jackknife(torch.stack(strengths), lambda total: total / total.mean().clamp(min=1e-300))
    note = f"for the {'true' if c.known else 'predicted'} class"
    return {"interaction strength J by order m / (n² − 2)": (ORDERS, *J)}, note, None


# ---- A²MIM: occlusion, Fourier analysis

def fit_probe(features, labels, classes, ridge=0.01):
    """A linear classifier, features (B, C) → scores (B, classes): ridge regression of one-hot
    labels (N,) on standardised features (N, C)."""
    mean = features.double().mean(0)
    deviation = features.double().std(0) + 1e-6
    x = (features - mean) / deviation
    y = F.one_hot(labels, classes).double()
    penalty = ridge * len(x) * torch.eye(x.shape[1]).to(x)
    W = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean(0)))

    def probe(features):
        return (features - mean) / deviation @ W + y.mean(0)

    return probe


@functools.cache
def fit_probes(c):
    """A probe for the stem and each block, which occlusion and layers share."""
    parts = [(label, *c.pooled(image)) for image, label, _ in batches(c, "train", labels=True)]
    labels, *features = [torch.cat(column) for column in zip(*parts)]
    return [fit_probe(z, labels, len(c.images["val"].classes)) for z in features]


def occlusion(c):
    """Top-1 while patches, drawn at random, show the data set's mean colour (Naseer et al., arXiv
    2105.10497). Compare the right panel where models differ on whole images."""
    probe = None if c.known else fit_probes(c)[-1]
    hits = []
    for image, label, first in batches(c, labels=True):
        right = []
        for share in SHARES:
            draws = [data.generator(c.args.seed, "drop", first + i) for i in range(len(image))]
            x = image
            if share > 0:
                mask = masking.random_mask(len(image), c.grid, share, draws).to(image.device)
                x = masking.fill(image, mask, "zero")
            scores = c.logits(x) if c.known else probe(c.pooled(x)[-1])
            right.append(scores.argmax(1) == label)
        hits.append(torch.stack(right, 1).cpu())
    hits = 100.0 * torch.cat(hits)
    curves = {"top-1, %, by share of patches dropped": (SHARES, *average(hits))}
    # with less than three standard errors there is nothing to lose
    if hits[:, 0].mean() > 3 * hits[:, 0].std() / len(hits) ** 0.5:
        relative = (SHARES, *jackknife(hits, lambda total: 100 * total / total[0]))
        curves["% of top-1 on whole images by share of patches dropped"] = relative
    note = f"a linear probe of the last features, fitted on {c.args.probe_images:,} images"
    return curves, "its classifier" if c.known else note, None


def spectrum(z):
    """Of a map (B, C, h, h): log(|F| + 1e-6) along the half diagonal, relative to zero frequency,
    (B, h//2 + 1), and the variance over positions, (B,), both averaged over channels. (Park and
    Kim, arXiv 2202.06709.)"""
    k = torch.arange(z.shape[-1] // 2 + 1, device=z.device)
    amplitude = torch.fft.rfft2(z.float())[..., k, k].abs()
    amplitude = (amplitude + 1e-6).log().mean(1)
    variance = z.float().var((2, 3), correction=0).mean(1)
    return amplitude - amplitude[:, :1], variance


def fourier(c):
    """High frequencies of each feature map, and its variance over positions: attention lowers both
    (Park and Kim). 1a: after the attention of block 1; 1.2: after block 2 of stage 1."""
    amplitudes = []
    variances = []
    for image, _, _ in batches(c):
        maps = walk(c.encoder, image, halves=True)
        spectra = {name: spectrum(z) for name, z in maps if z.shape[-1] >= 4}
        amplitude, variance = zip(*spectra.values())
        amplitudes.append(torch.stack([diagonal[:, -1] for diagonal in amplitude], 1).cpu())
        variances.append(torch.stack(variance, 1).cpu())
    names = list(spectra)
    highest = average(torch.cat(amplitudes))
    spread = average(torch.cat(variances).clamp(min=1e-12).log10())
    curves = {"Δ log amplitude at the highest frequency by layer": (names, *highest),
              "log10 of the variance over positions by layer": (names, *spread)}
    return curves, "its maps of 4 × 4 and more", None


# ---- Dark Secrets: attention

def log_attention(attention, x):
    """Logarithm of each query's attention to each key: (B, N, D) → (B, heads, N, N)."""
    q, k, _ = attention.project(x)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    bias = attention.position_bias(q.dtype)
    if bias is not None:
        logits = logits + bias
    return logits.log_softmax(-1)


def attention_measures(log_p, patch):
    """Of log-attention (B, heads, N, N) among patches of `patch` px, as means over queries:
    distance to the keys in pixels and entropy in nats, (B, heads) each; KL divergence in nats,
    mean over ordered pairs of different heads, (B, 1). (Dark Secrets, arXiv 2205.13543.)"""
    p = log_p.exp()
    heads, N = log_p.shape[1:3]
    side = torch.arange(math.isqrt(N)).to(p)
    place = torch.cartesian_prod(side, side)
    distance = (p * (patch * torch.cdist(place, place))).sum(-1).mean(-1)  # Σ_k p(q,k)·|q − k|
    entropy = torch.special.entr(p).sum(-1).mean(-1)  # −Σ_k p·log p
    crossed = -torch.einsum("bhqk,bgqk->bhg", p, log_p) / N  # −Σ_k p_h·log p_g
    divergence = (crossed - entropy[:, :, None]).sum((1, 2))  # of a head from itself: 0
    return distance, entropy, divergence[:, None] / max(1, heads * (heads - 1))


def attention(c):
    """How far heads look (a dot a head), how spread their attention is, how much they differ. Dark
    Secrets finds near and far heads in all blocks after masked image modeling."""
    if not isinstance(c.encoder, models.ViT):
        return {}, f"not applicable: a {c.arch} has no attention", None
    patch = c.size / c.grid
    measures = []
    for image, _, _ in batches(c):
        z = c.encoder.embed(c.encoder.stem(image))
        blocks = []
        for block in c.encoder.blocks:
            log_p = log_attention(block.attn, block.norm1(z))
            log_p = log_p[..., 1:, 1:].log_softmax(-1)  # among patches, to a sum of 1
            blocks.append(attention_measures(log_p, patch))
            z = block(z)
        measures.append([torch.stack(parts, 1).cpu() for parts in zip(*blocks)])
    curves = {}
    quantities = ["attention distance, px", "entropy, nats", "KL divergence between heads, nats"]
    for quantity, parts in zip(quantities, zip(*measures)):
        values = torch.cat(parts)  # (images, blocks, heads or 1)
        heads = [average(values)[0]] if values.shape[2] > 1 else []
        places = list(range(1, values.shape[1] + 1))
        curves[f"{quantity}, by block"] = (places, *average(values.mean(2)), *heads)
    uniform = torch.zeros(1, 1, c.grid ** 2, c.grid ** 2).log_softmax(-1)
    distance, entropy, _ = attention_measures(uniform, patch)
    note = f"uniform attention: {distance.item():.1f} px, {entropy.item():.2f} nats"
    return curves, note, None


# ---- Dark Secrets: similarity of layers, dropping layers

def centred_gram(z):
    """U-centred linear kernel of n features, (n, ...) → (n·n,) float64. The inner product of two,
    over n(n − 3), is their unbiased HSIC (Song et al., JMLR 2012)."""
    n = len(z)
    x = z.flatten(1).double()
    x = x - x.mean(0)
    K = (x @ x.T).fill_diagonal_(0)
    sums = K.sum(0)
    K = K - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return K.fill_diagonal_(0).flatten()


def cka_of(hsic):
    """HSIC of all pairs of layers, (L, L) → CKA (Nguyen et al., arXiv 2010.15327)."""
    scale = hsic.diag().clamp(min=1e-300).sqrt()
    return hsic / scale.outer(scale)


@functools.cache
def hsic_of(checkpoints, batch):
    """HSIC of all layers of all models, (groups, L, L), summed over a tenth of the minibatches."""
    sums = {}
    streams = [batches(c, batch=batch) for c in checkpoints]
    for i, parts in enumerate(zip(*streams)):
        if len(parts[0][0]) < batch:  # what is left over would weigh too much
            continue
        grams = []
        for c, (image, _, _) in zip(checkpoints, parts):
            grams += [centred_gram(z) for _, z in walk(c.encoder, image)]
        grams = torch.stack(grams)
        hsic = (grams @ grams.T).cpu() / (batch * (batch - 3))
        sums[i % 10] = sums.get(i % 10, 0) + hsic
    return torch.stack(list(sums.values()))


def cka(c):
    """How alike two layers represent images (1: up to rotation and scale), from the stem, bottom
    left, to the last block. Dark Secrets finds a masked image model's layers alike."""
    batch = max(4, min(c.args.batch, c.args.images // 10))
    sums = hsic_of(tuple(c.all), batch)
    sizes = [len(other.layers) for other in c.all]
    ends = np.cumsum([0, *sizes]).tolist()
    at = c.all.index(c)
    rows = slice(ends[at], ends[at + 1])

    def means(hsic):  # with each model; a layer with itself does not count
        similarity = cka_of(hsic).fill_diagonal_(math.nan)[rows]
        return torch.stack([part.nanmean() for part in similarity.split(sizes, 1)])

    curve = ([other.name for other in c.all], *jackknife(sums, means))
    note = f"of different layers; ± over {len(sums)} groups of minibatches of {batch} images"
    matrix = cka_of(sums.sum(0))[rows].tolist()
    return {"mean CKA of its layers with those of": curve}, note, dict(matrix=matrix, ends=ends)


def layers(c):
    """What a linear classifier gets from the features of the first blocks: where in the model is
    what tells classes apart? After Dark Secrets' experiment of dropping the last layers."""
    hits = []
    for image, label, _ in batches(c, labels=True):
        scores = [probe(z) for probe, z in zip(fit_probes(c), c.pooled(image))]
        hits.append(torch.stack([each.argmax(1) == label for each in scores], 1).cpu())
    curve = (c.layers, *average(100.0 * torch.cat(hits)))
    note = f"fitted on {c.args.probe_images:,} images"
    return {"top-1 of a linear probe, %, by layer": curve}, note, None


# ---- checkpoints and images

def walk(encoder, image, halves=False):
    """Yields (name, feature map (B, C, h, w)) after the stem and every block, for normalised images
    (B, C, S, S); with halves, after a ViT's attentions, too. No class token, no final norm."""
    z = encoder.stem(image)
    yield "stem", z
    if isinstance(encoder, models.ViT):
        z = encoder.embed(z)
        for i, block in enumerate(encoder.blocks, 1):
            z = block.attend(z)
            if halves:
                yield f"{i}a", z[:, 1:].transpose(1, 2).unflatten(2, (encoder.grid, -1))
            z = block.feed(z)
            yield f"{i}", z[:, 1:].transpose(1, 2).unflatten(2, (encoder.grid, -1))
    else:
        for i, layer in enumerate(encoder.layers, 1):
            blocks = layer if isinstance(layer, torch.nn.Sequential) else [layer]
            for j, block in enumerate(blocks, 1):
                z = block(z)
                yield f"{i}.{j}", z


class Checkpoint:
    """A model under study: encoder; logits, its Predictor, or None; mim, its A2MIM, or None if the
    file lacks decoder or token; layers, names of stem and blocks; grid, patches a side. main adds
    all checkpoints, their images, and whether its head is known to be for these."""

    def __init__(self, text, args):
        # [NAME=]PATH[:ARCH]; a run is called after its folder
        name, path, arch = re.fullmatch(r"(?:([^=/]+)=)?(.*?)(?::(\w+))?", text).groups()
        file = pathlib.Path(path).absolute()
        run = file.name in ("last.pt", "best.pt")
        self.name = name or (file.parent.name if run else file.stem)

        model, about = weights.open_model(path, arch)
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = runtime.place(model, self.device).eval().requires_grad_(False)
        missing = [name for name in about["missing"] if name.startswith(("decoder", "mask_token"))]
        self.encoder = model.encoder
        self.logits = model if isinstance(model, models.Predictor) else None
        self.mim = None if self.logits or missing else model
        vars(self).update(about)  # arch, size, channels, mean, std, classes, run
        self.grid = getattr(self.encoder, "grid", self.size // 16 if self.size >= 128 else 8)
        example = torch.zeros(1, self.channels, self.size, self.size, device=self.device)
        self.layers = [name for name, _ in walk(self.encoder, example)]

        # images as in its evaluation, masks as in its pre-training, or the usual ones
        usual = self.size if "nano" in models.like(self.arch) else round(self.size * 256 / 224)
        self.resize = self.run.get("test_resize") or usual
        self.random_mask = masking.MASKS[self.run.get("mask", "random")]
        self.mask_size = self.run.get("mask_size", 32)
        self.mask_ratio = self.run.get("mask_ratio", 0.6)

    def pooled(self, image):
        """Features of the stem and each block, means over positions: [(B, C)]."""
        return [z.mean((2, 3)) for _, z in walk(self.encoder, image)]


def batches(c, split="val", labels=False, batch=None):
    """Yields (images (B, C, S, S), labels (B,), position of the first), the same images for all
    checkpoints. labels: only images that have one."""
    args = c.args
    batch = batch or args.batch
    source = c.images[split]
    if labels:
        source = Subset(source, np.flatnonzero(source.labels >= 0).tolist())
    count = args.images if split == "val" else args.probe_images
    chosen = torch.randperm(len(source), generator=data.generator(args.seed, split))[:count]
    views = finetune.TestViews(source, dict(test_resize=c.resize, test_crop=c.size))
    parts = [part.tolist() for part in chosen.split(batch)]
    loader = data.loader(views, parts, runtime.workers(args.workers))
    first = 0
    for image, label, _ in tqdm(loader, desc=c.name, leave=False, disable=None):
        image = data.normalize(image.to(c.device), c.mean, c.std)
        yield image, label.to(c.device), first
        first += len(image)


# ---- numbers and figures

def average(samples):
    """(mean, standard error) over images, the first axis."""
    samples = samples.double()
    return samples.mean(0).tolist(), (samples.std(0) / len(samples) ** 0.5).tolist()


def jackknife(samples, statistic):
    """(statistic of the samples' sum, its standard error by leaving out one after the other)."""
    samples = samples.double()
    total = samples.sum(0)
    without = torch.stack([statistic(total - sample) for sample in samples])
    error = (without.var(0, correction=0) * (len(samples) - 1)).sqrt()
    return statistic(total).tolist(), error.tolist()


def draw_curves(figure, curves, more):
    """A panel a quantity, a line a checkpoint; of layers (names), over the share of the depth."""
    figure.set_size_inches(1.5 + 4.5 * len(curves), 4.6)
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (quantity, each) in zip(axes, curves.items()):
        title, _, where = quantity.rpartition(" by ")
        for i, (name, (places, means, errors, *heads)) in enumerate(each.items()):
            x = np.linspace(0, 1, len(places)) if where == "layer" else places
            ax.errorbar(x, means, errors, marker=".", capsize=2, color=f"C{i}", label=name)
            for dots in heads:
                ax.plot(x, dots, "o", ms=4, color=f"C{i}", alpha=0.5)
        ax.set(title=title.strip(","), xlabel=where.replace("layer", "depth: stem … last block"))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_map(figure, curves, more):
    """more: {checkpoint: its rows of the matrix of all layers; where those of each end}."""
    figure.set_size_inches(3.5 + 2 * len(more), 2.5 + 2 * len(more))
    ax = figure.subplots()
    matrix = np.concatenate([each["matrix"] for each in more.values()])
    image = ax.imshow(matrix, vmin=0, vmax=1, origin="lower", cmap="magma")
    figure.colorbar(image, ax=ax, shrink=0.8, label="CKA")
    starts = np.array(list(more.values())[0]["ends"][:-1]) - 0.5
    ax.set_xticks(starts, list(more), ha="left")
    ax.set_yticks(starts, list(more), rotation=90, va="bottom")
    ax.grid(color="w")


ANALYSES = dict(reconstruct=reconstruct, interaction=interaction, occlusion=occlusion,
                fourier=fourier, attention=attention, cka=cka, layers=layers)


# ---- command line

def main(argv=None):
    parser = runtime.Parser("analyze.py", description=__doc__)
    option = parser.add_argument
    option("checkpoints", nargs="+", metavar="CHECKPOINT", help="several are drawn in one figure")
    option("--only", default=",".join(ANALYSES), help="analyses, with commas between them (all)")
    option("--data", help="as for train.py; its held-out images are used (the first checkpoint's)")
    option("--images", type=int, default=64, help="how many of them, drawn by --seed (64)")
    option("--probe-images", type=int, default=2000, help="training images for a probe (2000)")
    option("--pairs", type=int, default=10, help="interaction: pairs an image (10; authors' 50)")
    option("--contexts", type=int, default=10, help="interaction: contexts a pair (10; as above)")
    option("--batch", type=int, default=64, help="images at once (64)")
    option("--seed", type=int, default=0, help="of images, masks, dropped patches and games (0)")
    option("--workers", type=int, help="loader processes (the cores there are, at most 8)")
    option("--out", help="folder of the results (one below runs/, named after the checkpoints)")
    args = parser.parse_args(argv)
    analyses = args.only.split(",")
    for name in analyses:
        if name not in ANALYSES:
            raise ValueError(f"no analysis {name!r}: choose from {', '.join(ANALYSES)}")

    # the checkpoints, and the images that all of them are shown
    checkpoints = [Checkpoint(text, args) for text in args.checkpoints]
    names = [c.name for c in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError("give checkpoints different names: NAME=PATH")
    source = args.data or checkpoints[0].run.get("data", "shapes")
    size = max(c.size for c in checkpoints)
    train = data.open_source(source, "train", size)
    val = data.open_source(source, "val", size)
    classes = list(val.classes)
    args.images = min(args.images, len(val))
    args.probe_images = min(args.probe_images, int((train.labels >= 0).sum()))
    for key, least in dict(images=8, pairs=1, contexts=1, batch=4).items():
        if getattr(args, key) < least:
            raise ValueError(f"{key}: {getattr(args, key)}, where {least} or more are needed")
    if min(args.probe_images, (val.labels >= 0).sum()) < 8 or len(classes) < 2:
        print("no occlusion, no layers: they need images with labels, of two classes or more")
        analyses = [name for name in analyses if name not in ("occlusion", "layers")]
    for c in checkpoints:
        c.all = checkpoints
        c.images = dict(train=data.Channels(train, c.channels), val=data.Channels(val, c.channels))
        same = c.classes is None or c.classes == classes
        c.known = bool(c.logits) and c.logits.head.out_features == len(classes) and same

    out = args.out or os.path.join("runs", f"analysis-{'-'.join(names)}"[:160])
    os.makedirs(out, exist_ok=True)
    shown = ", ".join(f"{c.name} ({c.arch}, {c.size} px)" for c in checkpoints)
    shown += f": {args.images} held-out images of {source}, seed {args.seed}"
    page = f"<!doctype html><meta charset=utf-8><h1>nanoA2MIM</h1><p>{html.escape(shown)}"
    print(shown if Figure else f"{shown}; no figures: pip install matplotlib for them")

    # one after the other: table, numbers, figure, and their section of the page
    for name in analyses:
        print(f"\n{name}", flush=True)
        curves = {}
        more = {}
        lines = []
        for c in checkpoints:
            each, note, beside = ANALYSES[name](c)
            lines.append(f"{c.name}: {note}")
            if beside is not None:
                more[c.name] = beside
            for quantity, curve in each.items():
                curves.setdefault(quantity, {})[c.name] = curve
                cells = [f"{x}: {mean:.4g} ± {error:.2g}" for x, mean, error in zip(*curve[:3])]
                lines.append(f"  {quantity}\n    {'   '.join(cells)}")
        text = "\n".join(lines)
        print(text, flush=True)
        page += f"\n<h2>{name}</h2><p>{ANALYSES[name].__doc__}<pre>{html.escape(text)}</pre>"
        more_numbers = more if name == "cka" else None
        results = vars(args) | dict(data=source, notes=lines, curves=curves, more=more_numbers)
        with open(os.path.join(out, f"{name}.json"), "w") as file:
            json.dump(results, file, allow_nan=False)

        picture = os.path.join(out, f"{name}.png")
        if name == "reconstruct" and curves:
            rows = [F.interpolate(pictures, size) for pictures in more.values()]
            data.write_picture(picture, torch.cat(rows), 8)
        elif curves and Figure:
            figure = Figure(layout="constrained", dpi=120)
            draw = draw_map if name == "cka" else draw_curves
            draw(figure, curves, more)
            figure.savefig(picture)
        if curves:
            page += f'<img src="{name}.png" alt="" style="max-width:100%">'
        with open(os.path.join(out, "index.html"), "w") as file:
            file.write(page)
    print(f"\nLook at {out}/index.html")


if __name__ == "__main__":
    runtime.run(main)
