"""What a model has learned: the analyses of two papers, on anyone's checkpoints, side by side.

  python analyze.py runs/vit_nano-a2mim-shapes/last.pt                     one model, on the built-in images
  python analyze.py SUPERVISED SIMMIM A2MIM --data path/to/images --images 512
  python analyze.py CHECKPOINT --only attention,fourier                    some of them

From A²MIM (arXiv 2205.13943): reconstruct, interaction, occlusion, fourier. From Dark Secrets (arXiv 2205.13543): attention,
cka, layers. CHECKPOINT is ours or another project's (see weights.py). Each writes its numbers, NAME.json, and with matplotlib
a figure, NAME.png; index.html shows them all and says how to read them. "±" is a standard error over images.
"""
import argparse
import functools
import itertools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F

import data
import harness
import masking
import model as models
import train
from study import NotFor, Study, average, draw_curves, draw_map, draw_pictures, jackknife
from train import count, number

ORDERS = [0, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, 1]               # of interactions: m as shares of the other players
SHARES = [0, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95]                       # of patches dropped

# An analysis takes a study and a subject (see study.py). Its docstring says how to read it, on index.html too.

# ------------------------------------------------------------------------------------------------ A²MIM: reconstructions

def reconstruct(study, s):
    """Held-out images, what a model sees of them, what it paints, and both together. Look at the borders of blocks: shades that go on
    are low frequencies, edges that go on are the middle ones that A²MIM is after."""
    if not s.mim:
        raise NotFor("there is no decoder, or no mask token, in its file")
    pictures = []

    def measure(image, _, first):
        generators = [data.generator(study.args.seed, "mask", first + i) for i in range(len(image))]
        mask = s.mask(len(image), s.mask_grid, s.mask_ratio, generators).to(image.device)
        rows, M = train.reconstruct(s.mim, image, mask), masking.resize(mask, image.shape[-2:])
        if not first:
            shown = [data.visible(data.denormalize(row[:8], s.mean, s.std)).cpu() for row in rows]
            pictures.extend(zip(("image", "masked", "reconstruction", "composite"), shown))
        guesses = rows[2], masking.fill(image, mask, "mean")
        return torch.stack([((guess - image).abs() * M).sum((1, 2, 3)) / (s.channels * M.sum((1, 2, 3))) for guess in guesses], 1),

    errors, = study.collect(s, measure)
    return {"|error| of masked pixels": (["reconstruction", "mean colour"], *average(errors))}, \
        f"in the data set's standard deviations; {s.mask_ratio:.0%} masked, in blocks of {s.size // s.mask_grid} px", pictures


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
    two are almost alone, on the right the image is nearly whole. A²MIM's plots of interaction strength find that masked image modeling strengthens
    the middle orders. Between the ends contexts are samples, whose noise adds to |I|, the more the fewer they are: compare models at the
    same number of contexts only."""
    if not s.logits:
        raise NotFor("it has no classifier; finetune.py gives it one")
    players = s.grid ** 2

    def play(value, index):                                                 # the same game for all subjects
        rng = np.random.default_rng((study.args.seed % 2 ** 63, index))
        sizes = [int((players - 2) * r) for r in ORDERS]
        return interactions(value, players, draw_pairs(s.grid, study.args.pairs, rng), sizes, study.args.contexts, rng)

    def value(coalitions, image, target):                                   # v = log p/(1 − p), absent patches showing the mean colour
        found = []
        for part in torch.from_numpy(coalitions).split(s.batch):
            logits = s.logits(image * masking.resize(part.view(-1, s.grid, s.grid).to(image.device), image.shape[-2:])).double()
            found.append(logits[:, target] - logits.index_fill(1, target, -math.inf).logsumexp(1))     # = z_t − log Σ_{k≠t} exp z_k
        return torch.cat(found).cpu().numpy()

    def strengths(image, label, first):
        guess = s.logits(image).argmax(1)
        target = torch.where(label >= 0, label, guess) if s.known else guess
        games = [play(functools.partial(value, image=x, target=t), first + i) for i, (x, t) in enumerate(zip(image, target))]
        return torch.tensor(np.array([np.abs(found).mean(1) for found, _, _ in games])), torch.tensor([game[1:] for game in games])

    found, passes = study.collect(s, strengths, passes=play(lambda coalitions: np.zeros(len(coalitions)), 0)[1])
    note = (f"{passes[:, 0].sum():,} forward passes where four a context would be {passes[:, 1].sum():,}; {study.args.pairs} pairs, "
            f"{study.args.contexts} contexts; for the {'true' if s.known else 'predicted'} class")
    J = jackknife(found, lambda strength: strength / strength.mean().clamp(min=1e-300))        # J⁽ᵐ⁾ = mean |I⁽ᵐ⁾| / its mean over orders
    return {"interaction strength J by order m / (n² − 2)": (ORDERS, *J)}, note


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


@functools.cache
def fit_probes(study, s):
    """A probe for the stem and each block; occlusion and layers share them."""
    labels, *columns = study.collect(s, lambda image, label, _: [label, *pooled(s, image)], split="train", labelled=True)
    return [fit_probe(column.to(study.device), labels.to(study.device), len(study.classes)) for column in columns]


def occlude(image, share, grid, generators):
    """A share of the grid² patches, drawn at random, shows the data set's mean colour (Naseer et al., arXiv 2105.10497)."""
    return masking.fill(image, masking.random_mask(len(image), grid, share, generators).to(image.device), "zero") if share else image


def accuracy(study, s, guesses, passes=1):
    """Whether each guess, of guesses(images, position of the first) -> some (B, K), has the label first: (images, guesses), 0 or 100."""
    def right(image, label, first):
        return 100.0 * torch.stack([guess.argmax(1) == label for guess in guesses(image, first)], 1),

    return study.collect(s, right, passes=passes, labelled=True)[0]


def occlusion(study, s):
    """Top-1 while more and more patches are dropped. A²MIM's plots of robustness against occlusion find that after masked image modeling it
    falls later. Compare the right panel where models differ on whole images."""
    probe = None if s.known else fit_probes(study, s)[-1]

    def guesses(image, first):
        for share in SHARES:
            x = occlude(image, share, s.grid, [data.generator(study.args.seed, "drop", first + i) for i in range(len(image))])
            yield s.logits(x) if s.known else probe(pooled(s, x)[-1])

    hits = accuracy(study, s, guesses, len(SHARES))
    curves = {"top-1, %, by share of patches dropped": (SHARES, *average(hits))}
    if hits[:, 0].mean() > 3 * hits[:, 0].std() / len(hits) ** 0.5:         # three standard errors: there is something to lose
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
    Fourier analysis, after Park and Kim, who find that attention lowers high frequencies and variance, and convolutions and MLPs raise them.
    (fourier.json has the whole half diagonal of each layer.)"""
    vit = isinstance(s.encoder, models.ViT)

    def maps(image):                                                        # where there is something to see
        return {name: z for name, z in s.encoder.walk(image, *[True] * vit) if z.shape[-1] >= 4}

    names = list(maps(s.example))
    found = study.collect(s, lambda image, *_: sum(map(spectrum, maps(image).values()), ()))
    amplitudes, variances = found[0::2], torch.stack(found[1::2], 1)
    curves = {"Δ log amplitude at the highest frequency by layer": (names, *average(torch.stack([a[:, -1] for a in amplitudes], 1))),
              "log10 of the variance over positions by layer": (names, *average(variances.clamp(min=1e-12).log10()))}
    whole = {name: average(amplitude)[0] for name, amplitude in zip(names, amplitudes)}        # of each layer, all of the half diagonal
    return curves, "1a: after the attention of block 1" * vit, whole


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
    plots of these find that masked image modeling keeps near and far heads in all blocks, and keeps them different, while in the last blocks
    of a supervised model all look far and alike."""
    if not isinstance(s.encoder, models.ViT):
        raise NotFor(f"a {s.arch} has no attention")

    def measures(image, *_):
        z, found = s.encoder.embed(s.encoder.stem(image)), []
        for block in s.encoder.blocks:
            log_p = block.attn.log_attention(block.norm1(z))[..., 1:, 1:].log_softmax(-1)      # among patches, to a sum of 1
            found.append(attention_measures(log_p, s.size / s.grid))
            z = block(z)
        return [torch.stack(parts, 1) for parts in zip(*found)]             # (B, blocks, heads), the last (B, blocks, 1)

    curves = {}
    for quantity, values in zip(("attention distance, px", "entropy, nats", "KL divergence between heads, nats"), study.collect(s, measures)):
        blocks, heads = list(range(1, values.shape[1] + 1)), [average(values)[0]] if values.shape[2] > 1 else []
        curves[f"{quantity}, by block"] = blocks, *average(values.mean(2)), *heads
    far, even, _ = attention_measures(torch.zeros(1, 1, s.grid ** 2, s.grid ** 2).log_softmax(-1), s.size / s.grid)
    return curves, f"patches only, without the class token; uniform attention would have distance {far.item():.1f} and entropy {even.item():.2f}"


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
    for i, parts in enumerate(zip(*(study.batches(s, batch=batch, bar=s is study.subjects[0]) for s in study.subjects))):
        if len(parts[0][0]) == batch:                                       # what is left over would weigh too much
            grams = torch.stack([centred_gram(z) for s, part in zip(study.subjects, parts) for _, z in s.encoder.walk(part[0])])
            sums[i % 10] = sums.get(i % 10, 0) + (grams @ grams.T).cpu() / (batch * (batch - 3))
    return torch.stack(list(sums.values())), np.cumsum([0, *(len(s.points) for s in study.subjects)]).tolist(), batch


def cka(study, s):
    """How alike two layers represent images (1: up to rotation and scale), from the stem, bottom left, to the last block. Dark Secrets' similarity
    maps find the layers of a masked image model alike, while those of a supervised one drift."""
    sums, ends, batch = hsic_of(study)
    mine = slice(*ends[(at := study.subjects.index(s)):at + 2])

    def means(hsic):                                                        # with each model; a layer with itself does not count
        return torch.stack([part.nanmean() for part in cka_of(hsic).fill_diagonal_(math.nan)[mine].split(np.diff(ends).tolist(), 1)])

    curve = [other.name for other in study.subjects], *jackknife(sums, means)
    note = f"all pairs of different layers; minibatches of {batch} images, ± over {len(sums)} groups of them"
    return {"mean CKA of its layers with those of": curve}, note, dict(matrix=cka_of(sums.sum(0))[mine].tolist(), ends=ends)


def layers(study, s):
    """What a linear classifier gets from the features of the first blocks: where in the model is what tells classes apart? After Dark Secrets'
    experiment of dropping the last layers, with a probe in place of fine-tuning."""
    probes, own = fit_probes(study, s), [s.logits] if s.known else []

    def guesses(image, _):
        return [probe(z) for probe, z in zip(probes, pooled(s, image))] + [logits(image) for logits in own]

    means, errors = average(accuracy(study, s, guesses))
    curve, note = (s.points, means[:len(probes)], errors[:len(probes)]), f"fitted on {study.probe_images:,} images"
    return {"top-1 of a linear probe, %, by layer": curve}, note + f"; its classifier, on all blocks: {means[-1]:.1f} ± {errors[-1]:.1f}" * bool(own)


ANALYSES = {  # name: (analysis, how to draw it)
    "reconstruct": (reconstruct, draw_pictures), "interaction": (interaction, draw_curves), "occlusion": (occlusion, draw_curves),
    "fourier": (fourier, draw_curves), "attention": (attention, draw_curves), "cka": (cka, draw_map), "layers": (layers, draw_curves)}


# ------------------------------------------------------------------------------------------------ command line

def chosen(text):
    if odd := set(text.split(",")) - set(ANALYSES):
        raise argparse.ArgumentTypeError(f"no analysis {min(odd)!r}: choose from {', '.join(ANALYSES)}")
    return list(dict.fromkeys(text.split(",")))


def parse(argv):
    harness.PROGRAM = "analyze.py"
    parser = argparse.ArgumentParser("analyze.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = harness.fail
    option = parser.add_argument
    option("checkpoints", nargs="+", metavar="CHECKPOINT", help="what to look at; several are drawn in one figure")
    option("--only", type=chosen, default=list(ANALYSES), metavar="NAME[,NAME …]", help=f"of {', '.join(ANALYSES)} (all)")
    option("--data", help="as for train.py; its held-out images are used (the first checkpoint's, or the built-in ones)")
    option("--images", type=number(int, 8), default=64, help="how many of them, drawn by --seed (64)")
    option("--probe-images", type=number(int, 8), default=2000, help="labelled training images for a probe (2000)")
    option("--pairs", type=count, default=10, help="interaction: pairs of patches an image; the authors' is 50 (10)")
    option("--contexts", type=count, default=10, help="interaction: contexts a pair and order; the authors' is 50 (10)")
    option("--seed", type=int, default=0, help="of images, masks, dropped patches and games (0)")
    option("--workers", type=number(int, 0), help="loader processes (the cores there are, at most 8)")
    option("--out", help="folder of the results (one below runs/, named after the checkpoints)")
    option("--overwrite", action="store_true", help="also where the analysis of something else lies")
    return parser.parse_args(argv)


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):                                 # a terminal may know no ± or ²
        getattr(stream, "reconfigure", dict)(errors="replace")
    args = parse(argv)

    def work():
        study = Study(args, ANALYSES)
        for name in args.only:
            study.perform(name)
            study.write_index()
        harness.say(f"\nLook at {study.out}/index.html")

    try:
        harness.together(work)                                              # errors in one line
    except KeyboardInterrupt:
        harness.say("interrupted; what is finished is kept")
        sys.exit(130)


if __name__ == "__main__":
    main()
