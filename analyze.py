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
import json
import math
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
# errors[, means of each head])}, or none where it does not apply; a note; what else its figure or
# file shows. Its docstring, on index.html, says how to read the figure.

# ---- A²MIM: reconstructions

def reconstruct(c):
    """Rows of held-out images, what a model sees of them, what it paints, and both together. Shades
    that go on across borders of blocks are low frequencies, edges the middle ones."""
    if not c.mim:
        return {}, "not applicable: no decoder, or no mask token, in its file", None
    errors = []
    for image, _, index in batches(c):
        draws = [data.generator(c.args.seed, "mask", i) for i in index]
        blocks = c.size // c.mask_size
        mask = c.random_mask(len(image), blocks, c.mask_ratio, draws).to(c.device)
        rows = c.mim.reconstruct(image, mask)
        if not errors:
            pictures = data.denormalize(torch.cat([row[:8] for row in rows]), c.mean, c.std)
        # mean of |x̂ − x| over masked pixels, of the reconstruction and of the image's mean colour
        M = masking.resize(mask, image.shape[-2:]).expand_as(image)
        guesses = [rows[2], masking.fill(image, mask, "mean")]
        means = [((guess - image).abs() * M).sum((1, 2, 3)) / M.sum((1, 2, 3)) for guess in guesses]
        errors.append(torch.stack(means, 1).cpu())
    curve = (["reconstruction", "mean colour"], *estimate(torch.cat(errors)))
    note = f"in standard deviations; {c.mask_ratio:.0%} masked, in blocks of {c.mask_size} px"
    return {"|error| of masked pixels": curve}, note, data.visible(pictures).cpu()


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
    """(P, count, players) bool: for each pair contexts S, drawn from all those of `size` other
    players. Each starts a permutation that serves all pairs: they share many coalitions."""
    player = np.arange(players)
    rank = np.tile(player, (count, 1))
    if 0 < size < players - 2:  # else there is only one context
        rank = rng.permuted(rank, axis=1)
    # ranks without i and j: one less for each of the two that comes before, (P, count, players)
    rank = rank - (rank > rank.T[pairs][..., None]).sum(1)
    other = (player != pairs[..., None]).all(1)  # (P, players)
    return (rank < size) & other[:, None]


def interactions(value, players, pairs, sizes, count, rng):
    """I⁽ᵐ⁾(i,j) = mean over contexts S of m players of v(S∪{i,j}) − v(S∪{i}) − v(S∪{j}) + v(S),
    (len(sizes), P) (Deng et al., arXiv 2111.06236). value: coalitions (n, players) bool → v (n,)
    float64; it is called once, with each coalition once."""
    i, j = np.arange(players) == pairs.T[..., None, None]  # (P, 1, players): this player alone
    S = np.stack([contexts(players, pairs, size, count, rng) for size in sizes])
    games = np.stack([S | i | j, S | i, S | j, S])  # (4, sizes, P, count, players)
    distinct, inverse = np.unique(games.reshape(-1, players), axis=0, return_inverse=True)
    v_ij, v_i, v_j, v_none = value(distinct)[inverse.reshape(games.shape[:-1])]
    return (v_ij - v_i - v_j + v_none).mean(-1)


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
                present = part.view(-1, c.grid, c.grid).to(c.device)
                logits = c.logits(image * masking.resize(present, image.shape[-2:])).double()
                others = logits.index_fill(1, target, -math.inf)
                v.append(logits[:, target[0]] - others.logsumexp(1))  # = z_t − log Σ_{k≠t} exp z_k
            return torch.cat(v).cpu().numpy()

        rng = np.random.default_rng((c.args.seed % 2 ** 63, index[0]))  # the same for all models
        pairs = draw_pairs(c.grid, c.args.pairs, rng)
        I = interactions(value, c.grid ** 2, pairs, sizes, c.args.contexts, rng)
        strengths.append(torch.from_numpy(np.abs(I).mean(1)))
    # J⁽ᵐ⁾ = mean |I⁽ᵐ⁾| / its mean over orders
    J = estimate(torch.stack(strengths), lambda mean: mean / mean.mean().clamp(min=1e-300))
    note = f"for the {'true' if c.known else 'predicted'} class"
    return {"interaction strength J by order m / (n² − 2)": (ORDERS, *J)}, note, None


# ---- A²MIM: occlusion, Fourier analysis

def fit_probe(features, labels, classes):
    """A linear classifier, features (B, C) → scores (B, classes): ridge regression of one-hot
    labels (N,) on standardised features (N, C)."""
    mean = features.double().mean(0)
    deviation = features.double().std(0) + 1e-6
    x = (features - mean) / deviation
    y = F.one_hot(labels, classes).double()
    penalty = 0.01 * len(x) * torch.eye(x.shape[1]).to(x)
    W = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean(0)))
    return lambda features: (features - mean) / deviation @ W + y.mean(0)


@functools.cache
def fit_probes(c):
    """A probe for the stem and each block, which occlusion and layers share."""
    parts = [(label, *pooled(c, image)) for image, label, _ in batches(c, "train", labels=True)]
    labels, *features = [torch.cat(column) for column in zip(*parts)]
    return [fit_probe(z, labels, len(c.images["val"].classes)) for z in features]


def occlusion(c):
    """Top-1 while patches, drawn at random, show the data set's mean colour (Naseer et al., arXiv
    2105.10497). Compare the right panel where models differ on whole images."""
    probe = None if c.known else fit_probes(c)[-1]
    hits = []
    for image, label, index in batches(c, labels=True):
        right = []
        for share in SHARES:
            x = image
            if share > 0:
                draws = [data.generator(c.args.seed, "drop", i) for i in index]
                mask = masking.random_mask(len(image), c.grid, share, draws).to(c.device)
                x = masking.fill(image, mask, "zero")
            scores = probe(pooled(c, x)[-1]) if probe else c.logits(x)
            right.append(scores.argmax(1) == label)
        hits.append(torch.stack(right, 1).cpu())
    hits = 100.0 * torch.cat(hits)
    top1, error = estimate(hits)
    curves = {"top-1, %, by share of patches dropped": (SHARES, top1, error)}
    # with less than three standard errors there is nothing to lose
    if top1[0] > 3 * error[0]:
        relative = (SHARES, *estimate(hits, lambda mean: mean / mean[0] * 100))
        curves["% of top-1 on whole images by share of patches dropped"] = relative
    note = f"a linear probe of the last features, fitted on {c.args.probe_images:,} images"
    return curves, note if probe else "its classifier", None


def spectrum(z):
    """Of a map (B, C, h, h): log(|F| + 1e-6) along the half diagonal, relative to zero frequency,
    (B, h//2 + 1), and the unbiased variance over positions, (B,), both averaged over channels.
    (Park and Kim, arXiv 2202.06709.)"""
    k = torch.arange(z.shape[-1] // 2 + 1, device=z.device)
    amplitude = torch.fft.rfft2(z.float())[..., k, k].abs()
    amplitude = (amplitude + 1e-6).log().mean(1)
    variance = z.float().var((2, 3)).mean(1)
    return amplitude - amplitude[:, :1], variance


def fourier(c):
    """High frequencies of each feature map, and its variance over positions: attention lowers both
    (Park and Kim). 1a: after the attention of block 1; 1.2: after block 2 of stage 1."""
    spectra = {}
    for image, _, _ in batches(c):
        for name, z in walk(c.encoder, image, halves=True):
            if z.shape[-1] >= 4:
                spectra.setdefault(name, []).append(spectrum(z))
    diagonals = {}
    highest = []
    variances = []
    for name, parts in spectra.items():
        amplitude, variance = [torch.cat(part).cpu() for part in zip(*parts)]
        diagonals[name], errors = estimate(amplitude)
        highest.append((diagonals[name][-1], errors[-1]))
        variances.append(estimate(variance))
    names = list(spectra)
    curves = {"Δ log amplitude at the highest frequency by layer": (names, *zip(*highest)),
              "variance over positions by layer": (names, *zip(*variances))}
    return curves, "its maps of 4 × 4 and more", diagonals


# ---- Dark Secrets: attention

def log_attention(attention, x):
    """Logarithm of each query's attention to each key: (B, N, D) → (B, heads, N, N)."""
    q, k, _ = attention.project(x)
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    bias = attention.position_bias(q.dtype)
    return (logits if bias is None else logits + bias).log_softmax(-1)


def attention_measures(log_p, patch):
    """Of log-attention (B, heads, N, N) among patches of `patch` px, (3, B, heads), as means over
    queries: distance to the keys in pixels; entropy in nats; KL divergence from the other heads,
    their mean, in nats. (Dark Secrets, arXiv 2205.13543.)"""
    p = log_p.exp()
    heads, N = log_p.shape[1:3]
    side = torch.arange(math.isqrt(N)).to(p)
    place = torch.cartesian_prod(side, side)
    distance = (p * (patch * torch.cdist(place, place))).sum(-1).mean(-1)  # Σ_k p(q,k)·|q − k|
    entropy = torch.special.entr(p).sum(-1).mean(-1)  # −Σ_k p·log p
    crossed = -torch.einsum("bhqk,bgqk->bhg", p, log_p) / N  # −Σ_k p_h·log p_g
    divergence = (crossed - entropy[:, :, None]).sum(2) / max(1, heads - 1)  # from itself: 0
    return torch.stack([distance, entropy, divergence])


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
        measures.append(torch.stack(blocks, 2).cpu())
    quantities = ["attention distance, px", "entropy, nats", "KL divergence between heads, nats"]
    curves = {}
    for quantity, values in zip(quantities, torch.cat(measures, 1)):  # (images, blocks, heads)
        heads, _ = estimate(values)
        places = list(range(1, 1 + len(heads)))
        curves[f"{quantity}, by block"] = (places, *estimate(values.mean(2)), heads)
    uniform = torch.zeros(1, 1, c.grid ** 2, c.grid ** 2).log_softmax(-1)
    distance, entropy, _ = attention_measures(uniform, patch).flatten().tolist()
    return curves, f"uniform attention: {distance:.1f} px, {entropy:.2f} nats", None


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
def grams(c, batch):
    """Kernels of the stem and each block, (minibatches, layers, batch·batch)."""
    kernels = []
    for image, _, _ in batches(c, batch=batch):
        if len(image) == batch:  # what is left over would weigh too much
            kernels.append(torch.stack([centred_gram(z) for _, z in walk(c.encoder, image)]).cpu())
    return torch.stack(kernels)


def cka(c):
    """How alike two layers represent images (1: up to rotation and scale), from the stem, bottom
    left, to the last block. Dark Secrets finds a masked image model's layers alike."""
    batch = max(4, min(c.args.batch, c.args.images // 10))
    kernels = [grams(other, batch) for other in c.all]
    K = torch.cat(kernels, 1)
    hsic = K @ K.mT / (batch * (batch - 3))  # (minibatches, L, L): of all layers of all models
    sizes = [len(each[0]) for each in kernels]
    rows = torch.arange(len(K[0])).split(sizes)[c.all.index(c)]

    def means(hsic):  # with each model; a layer with itself does not count
        similarity = cka_of(hsic).fill_diagonal_(math.nan)[rows]
        return torch.stack([part.nanmean() for part in similarity.split(sizes, 1)])

    curve = ([other.name for other in c.all], *estimate(hsic, means))
    note = f"of different layers; ± over {len(hsic)} minibatches of {batch} images"
    matrix = cka_of(hsic.mean(0))[rows]
    return {"mean CKA of its layers with those of": curve}, note, matrix.tolist()


def layers(c):
    """What a linear classifier gets from the features of the first blocks: where in the model is
    what tells classes apart? After Dark Secrets' experiment of dropping the last layers."""
    hits = []
    for image, label, _ in batches(c, labels=True):
        scores = [probe(z) for probe, z in zip(fit_probes(c), pooled(c, image))]
        hits.append(torch.stack([each.argmax(1) == label for each in scores], 1).cpu())
    names = [name for name, _ in walk(c.encoder, image)]
    curve = (names, *estimate(100.0 * torch.cat(hits)))
    note = f"fitted on {c.args.probe_images:,} images"
    return {"top-1 of a linear probe, %, by layer": curve}, note, None


# ---- checkpoints and images

def walk(encoder, image, halves=False):
    """Yields (name, feature map (B, C, h, w)) after the stem and every block, for normalised images
    (B, C, S, S); with halves, after a ViT's attentions, too. Without a ViT's class token and final
    norm. A layer that is not Sequential counts as one block."""
    z = encoder.stem(image)
    yield "stem", z
    if isinstance(encoder, models.ViT):
        z = encoder.embed(z)
        for i, block in enumerate(encoder.blocks, 1):
            for name, half in ((f"{i}a", block.attend), (f"{i}", block.feed)):
                z = half(z)
                if halves or half == block.feed:
                    yield name, z[:, 1:].transpose(1, 2).unflatten(2, (encoder.grid, -1))
    else:
        for i, layer in enumerate(encoder.layers, 1):
            blocks = layer if isinstance(layer, torch.nn.Sequential) else [layer]
            for j, block in enumerate(blocks, 1):
                z = block(z)
                yield f"{i}.{j}", z


def pooled(c, image):
    """Features of the stem and each block, means over positions: [(B, C)]."""
    return [z.mean((2, 3)) for _, z in walk(c.encoder, image)]


class Checkpoint:
    """A model under study, [NAME=]PATH[:ARCH]: encoder; logits, its Predictor, or None; mim, its
    A2MIM, or None if the file lacks decoder or token; grid, patches a side. main adds `all`
    checkpoints, their images, and whether its head is `known` to be for these."""

    def __init__(self, text, args):
        name, path, arch = re.fullmatch(r"(?:([^=/]+)=)?(.*?)(?::(\w+))?", text).groups()
        file = pathlib.Path(path).absolute()
        run = file.name in ("last.pt", "best.pt")  # which is called after its folder
        self.name = name or (file.parent.name if run else file.stem)
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, about = weights.open_model(path, arch)
        vars(self).update(about)  # arch, size, channels, mean, std, classes, run, missing
        model = runtime.place(model, self.device).eval().requires_grad_(False)
        lacking = any(name.startswith(("decoder", "mask_token")) for name in self.missing)
        self.encoder = model.encoder
        self.logits = model if isinstance(model, models.Predictor) else None
        self.mim = None if self.logits or lacking else model
        self.grid = getattr(self.encoder, "grid", self.size // 16 if self.size >= 128 else 8)

        # images as in its evaluation, masks as in its pre-training, or the usual ones
        usual = self.size if "nano" in models.like(self.arch) else round(self.size * 256 / 224)
        self.resize = self.run.get("test_resize") or usual
        self.random_mask = masking.MASKS[self.run.get("mask", "random")]
        self.mask_size = self.run.get("mask_size", 32)
        self.mask_ratio = self.run.get("mask_ratio", 0.6)


def batches(c, split="val", labels=False, batch=None):
    """Yields (images (B, C, S, S), labels (B,), their positions), the same images for all
    checkpoints. labels: only images that have one."""
    args = c.args
    source = c.images[split]
    if labels:
        source = Subset(source, np.flatnonzero(source.labels >= 0).tolist())
    count = args.images if split == "val" else args.probe_images
    chosen = torch.randperm(len(source), generator=data.generator(args.seed, split))[:count]
    parts = [part.tolist() for part in chosen.split(batch or args.batch)]
    views = finetune.TestViews(source, dict(test_resize=c.resize, test_crop=c.size))
    loader = data.loader(views, parts, runtime.workers(args.workers))
    first = 0
    for image, label, _ in tqdm(loader, desc=c.name, leave=False, disable=None):
        image = data.normalize(image.to(c.device), c.mean, c.std)
        yield image, label.to(c.device), range(first, first + len(image))
        first += len(image)


# ---- numbers and figures

def estimate(samples, statistic=torch.clone):
    """(statistic of the mean over images, the first axis; its standard error by leaving out one
    image after the other). Of the mean itself, that is the usual s / √n."""
    n = len(samples)
    total = samples.double().sum(0)
    without = torch.stack([statistic((total - sample) / (n - 1)) for sample in samples])
    error = (without.var(0, correction=0) * (n - 1)).sqrt()
    return statistic(total / n).tolist(), error.tolist()


def draw_curves(figure, curves, more):
    """A panel a quantity, a line a checkpoint; of layers (names), over the share of the depth."""
    figure.set_size_inches(1.5 + 4.5 * len(curves), 4.6)
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (quantity, each) in zip(axes, curves.items()):
        title, _, where = quantity.rpartition(" by ")
        ax.set(title=title.strip(","), xlabel=where.replace("layer", "depth: stem … last block"))
        if "variance" in title:
            ax.set_yscale("log")
        for i, (name, (places, means, errors, *heads)) in enumerate(each.items()):
            x = np.linspace(0, 1, len(places)) if where == "layer" else places
            ax.errorbar(x, means, errors, marker=".", capsize=2, color=f"C{i}", label=name)
            for dots in heads:
                ax.plot(x, dots, "o", ms=4, color=f"C{i}", alpha=0.5)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_matrix(figure, curves, more):
    """CKA of all layers. more: {checkpoint: its layers' rows of the matrix}."""
    figure.set_size_inches(3.5 + 2 * len(more), 2.5 + 2 * len(more))
    ax = figure.subplots()
    matrix = np.concatenate(list(more.values()))
    image = ax.imshow(matrix, vmin=0, vmax=1, origin="lower", cmap="magma")
    figure.colorbar(image, ax=ax, shrink=0.8, label="CKA")
    starts = np.cumsum([0, *map(len, more.values())])[:-1] - 0.5
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
    checkpoints = [Checkpoint(text, args) for text in args.checkpoints]
    names = [c.name for c in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError("give checkpoints different names: NAME=PATH")

    # the images that all of them are shown
    args.data = args.data or checkpoints[0].run.get("data", "shapes")
    size = max(c.size for c in checkpoints)
    train = data.open_source(args.data, "train", size)
    val = data.open_source(args.data, "val", size)
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
        its_own = c.classes is None or c.classes == classes
        c.known = bool(c.logits) and c.logits.head.out_features == len(classes) and its_own

    out = pathlib.Path(args.out or "runs/" + f"analysis-{'-'.join(names)}"[:160])
    out.mkdir(parents=True, exist_ok=True)
    shown = f"{args.images} held-out images of {args.data}, seed {args.seed}; "
    shown += ", ".join(f"{c.name} ({c.arch}, {c.size} px)" for c in checkpoints)
    page = f"<!doctype html><meta charset=utf-8><h1>nanoA2MIM</h1><p>{html.escape(shown)}"
    print(shown if Figure else f"{shown}; no figures: pip install matplotlib for them")

    # one after the other: table, figure, numbers, and their section of the page
    for name in analyses:
        print(f"\n{name}", flush=True)
        curves = {}
        more = {}
        text = ""
        for c in checkpoints:
            each, note, beside = ANALYSES[name](c)
            text += f"{c.name}: {note}\n"
            if beside is not None:
                more[c.name] = beside
            for quantity, curve in each.items():
                curves.setdefault(quantity, {})[c.name] = curve
                cells = [f"{x}: {mean:.4g} ± {error:.2g}" for x, mean, error in zip(*curve[:3])]
                text += f"  {quantity}\n    {'   '.join(cells)}\n"
        print(text, end="", flush=True)
        page += f"\n<h2>{name}</h2><p>{ANALYSES[name].__doc__}<pre>{html.escape(text)}</pre>"
        if curves:
            page += f'<img src="{name}.png" alt="" style="max-width:100%">'

        if curves and name == "reconstruct":
            pictures = [F.interpolate(rows, size) for rows in more.values()]
            data.write_picture(out / f"{name}.png", torch.cat(pictures), 8)
            more = {}
        elif curves and Figure:
            figure = Figure(layout="constrained", dpi=120)
            draw = draw_matrix if name == "cka" else draw_curves
            draw(figure, curves, more)
            figure.savefig(out / f"{name}.png")
        results = vars(args) | dict(notes=text, curves=curves, more=more)
        (out / f"{name}.json").write_text(json.dumps(results, allow_nan=False))
        (out / "index.html").write_text(page)
    print(f"\nLook at {out}/index.html")


if __name__ == "__main__":
    runtime.run(main)
