# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What has it learned?
#
# Two papers look inside models that were pre-trained to reconstruct masked images: A²MIM (Li et
# al., arXiv 2205.13943) and *Revealing the Dark Secrets of Masked Image Modeling* (Xie et al.,
# arXiv 2205.13543). Here their questions are asked of the small checkpoints in `checkpoints/`: a
# ViT and a ResNet, each trained *supervised*, by *SimMIM*, and by *A²MIM*, on the same built-in
# images of 32 px. An *arm* is one of these three ways to train.
#
# Each part has the claim, a picture, the repository's function, mostly an exercise, and what these
# models say. It is one training run each, so "±", a standard error **over images**, says nothing of
# other runs. The last part but one is about that.

# %%
import importlib.util
import os
import sys
from pathlib import Path

here = Path(globals().get("__file__", "notebook")).resolve().parent
near = [here, *here.parents, *here.glob("*")]
roots = [folder for folder in near if (folder / "notebooks" / "checks.py").exists()]
if not roots:
    raise FileNotFoundError("clone the repository (git clone ...) and open this notebook in it")
packages = ["torch", "torchvision", "numpy", "tqdm", "matplotlib"]
if None in [importlib.util.find_spec(name) for name in packages]:
    raise ModuleNotFoundError(f"pip install {' '.join(packages)}    (in a cell: %pip install ...)")
sys.path[:0] = [str(roots[0]), str(roots[0] / "notebooks")]
QUICK = bool(os.environ.get("QUICK"))                   # fewer steps, for the tests

# %%
import contextlib
import io
import json
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch

import analyze
import data
import finetune
import masking
import weights
from checks import ROOT, check, source
from extras import sweep
from shapes import Shapes

plt.rcParams["figure.dpi"] = 70
ARMS = ["supervised", "simmim", "a2mim"]
IMAGES = 16 if QUICK else 256                           # held-out images for each analysis
folder = Path(tempfile.mkdtemp())
vits = {arm: ROOT / f"checkpoints/vit_nano-{arm}.pt" for arm in ARMS}
resnets = {arm: ROOT / f"checkpoints/resnet_nano-{arm}.pt" for arm in ARMS}


def analysis(name, files, *options):
    """One analysis of analyze.py, of {name: checkpoint}: its numbers, which are also in a file."""
    out = folder / f"{name}-{len(list(folder.iterdir()))}"
    models = [f"{arm}={path}" for arm, path in files.items()]
    usual = ["--only", name, "--images", str(IMAGES), "--workers", "0", "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()):     # its table is long
        analyze.main([*models, *usual, *options])
    return json.loads((out / f"{name}.json").read_text())


def show_numbers(result, curve, digits):
    """A line a model: its numbers ± standard errors."""
    for name, (places, means, errors, *_) in result["curves"][curve].items():
        points = zip(places, means, errors)
        cells = [f"{place} {mean:{digits}} ± {error:{digits}}" for place, mean, error in points]
        print(f"{name:11}" + "   ".join(cells))


ledger = []


def say(claim, result, curve, arm, reference, place, sign=1):
    """Print whether a difference of two models at one place is above two standard errors."""
    points = []
    for name in (arm, reference):
        places, means, errors, *_ = result["curves"][curve][name]
        points.append((means[places.index(place)], errors[places.index(place)]))
    difference = points[0][0] - points[1][0]
    error = np.hypot(points[0][1], points[1][1])        # too large if images affect both alike
    shows = "shows" if sign * difference > 2 * error else "does not show"
    shows = "the opposite" if sign * difference < -2 * error else shows
    line = f"{claim}: {arm} − {reference} = {difference:+.3g} ± {error:.2g}: {shows}"
    ledger.append(line)
    print(line)


# %% [markdown]
# First, do they do what they were trained for? Rows: images, what the model sees, what it paints,
# both together. The supervised model has no decoder. `analyze.reconstruct` measures the error of
# masked pixels, beside that of each image's mean colour.

# %%
result = analysis("reconstruct", {"simmim": vits["simmim"], "a2mim": vits["a2mim"]})
pictures = [plt.imread(path) for path in folder.glob("reconstruct-*/reconstruct.png")]
figure, ax = plt.subplots(figsize=(6, 6))
ax.imshow(pictures[0])
ax.set(xticks=[], yticks=[], ylabel="A²MIM                    SimMIM")
plt.show()
show_numbers(result, "|error| of masked pixels", ".3f")

# %% [markdown]
# ## Attention: how far do heads look, and do they differ?
#
# **Claim** (Dark Secrets): after masked image modeling there are heads that look near in *all*
# blocks, and heads differ from each other; the last blocks of a supervised ViT look far, with heads
# that are alike.
#
# See it: below, where the patch in the red square looks, head by head, in the last block.

# %%
image = torch.stack([Shapes(32, "val")[i][0] for i in range(3)])
x = data.normalize(image, data.MEAN, data.STD)
query = 8 * 3 + 4                                       # row 3, column 4 of 8 × 8 patches


@torch.no_grad()
def log_attention_of(path, x):
    """Of each block, log-attention among patches (B, heads, N, N): as in analyze.attention."""
    encoder = weights.open_model(path)[0].eval().encoder
    z = encoder.embed(encoder.stem(x))
    maps = []
    for block in encoder.blocks:
        log_p = analyze.log_attention(block.attn, block.norm1(z))
        maps.append(log_p[..., 1:, 1:].log_softmax(-1))  # without the class token
        z = block(z)
    return maps


figure, axes = plt.subplots(3, 5, figsize=(6.5, 4), layout="constrained")
for row, arm in zip(axes, ARMS):
    p = log_attention_of(vits[arm], x)[-1].exp()
    row[0].imshow(image[0].permute(1, 2, 0))
    row[0].add_patch(plt.Rectangle((15.5, 11.5), 4, 4, fill=False, color="r"))
    row[0].set_ylabel(arm)
    for head, ax in enumerate(row[1:]):
        ax.imshow(p[0, head, query].view(8, 8), cmap="magma")
        ax.set_title(f"head {head + 1}", fontsize=8)
    for ax in row:
        ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Build it. With p(q, k) the attention of query q to key k, for each head h:
#
# | | formula | line below |
# |---|---|---|
# | distance | mean over q of Σₖ p(q, k)·‖q − k‖, in pixels | `distance = …` |
# | entropy | mean over q of −Σₖ p·log p | `entropy = …` |
# | divergence | mean over other heads g, and q, of Σₖ p_h·log(p_h / p_g) | `divergence = …` |

# %%
source(analyze.attention_measures)

# %% [markdown]
# **Exercise.** Write the distance without looking: from attention (B, heads, N, N) among n × n
# patches, row after row, and the side of a patch in pixels, to (B, heads).

# %%
def attention_distance(p, patch):
    ...  # your turn


check("attention_distance", attention_distance)

# %% [markdown]
# **Exercise.** And the divergence of each head from the others: from log-attention (B, heads, N, N)
# to (B, heads), the mean over the other heads and over queries.

# %%
def head_divergence(log_p):
    ...  # your turn


check("head_divergence", head_divergence)

# %% [markdown]
# Measure it: lines are means over images and heads, dots are heads. Uniform attention looks as far
# as the dotted line.

# %%
result = analysis("attention", vits)
figure = plt.figure(layout="constrained", dpi=60)
analyze.draw_curves(figure, result["curves"], {})
N = torch.zeros(1, 1, 64, 64).log_softmax(-1)
for ax, uniform in zip(figure.axes, analyze.attention_measures(N, patch=4).flatten().tolist()):
    ax.axhline(uniform, color="k", ls=":")
    ax.set_xticks([1, 2, 3, 4])
plt.show()

last = 4
for arm in ("simmim", "a2mim"):
    for block in (1, last):
        say(f"MIM looks nearer, block {block}, px", result, "attention distance, px, by block",
            arm, "supervised", block, sign=-1)
    say("MIM's heads differ more, last block, nats", result,
        "KL divergence between heads, nats, by block", arm, "supervised", last)

# %% [markdown]
# The errors over images are small, since each image is a mean over 64 queries. They are no reason
# to trust a difference between two *methods*: another seed gives other heads. And compare the
# supervised line with the claim: does it look far in the first blocks, or in the last?

# %% [markdown]
# ## CKA: are the layers alike?
#
# **Claim** (Dark Secrets): layers of a masked image model represent images alike, those of a
# supervised model change from layer to layer.
#
# See it: the images are compared by each layer. If two layers agree which images are alike, their
# kernels look the same. Here are kernels K = X·Xᵀ of sixteen images, centred.

# %%
x = torch.stack([Shapes(32, "val")[i][0] for i in range(16)])
x = data.normalize(x, data.MEAN, data.STD)
figure, axes = plt.subplots(3, 5, figsize=(6.5, 4.2), layout="constrained")
for row, arm in zip(axes, ARMS):
    with torch.no_grad():
        layers = list(analyze.walk(weights.open_model(vits[arm])[0].eval().encoder, x))
    for ax, (name, z) in zip(row, layers):
        K = analyze.centred_gram(z).view(16, 16)
        ax.imshow(K, cmap="RdBu", vmin=-K.abs().max(), vmax=K.abs().max())
        ax.set_title(name if name == "stem" else f"block {name}", fontsize=8)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(arm)
plt.show()

# %% [markdown]
# Build it: HSIC(K, L) = ⟨K, L⟩ / n(n − 3), CKA = HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)). HSIC, the
# Hilbert-Schmidt independence criterion, says how far two kernels agree on which images are alike;
# U-centred kernels, whose rows sum to 0 without the diagonal, keep few images from biasing it.

# %%
source(analyze.centred_gram)
source(analyze.cka_of)

# %% [markdown]
# **Exercise.** CKA of two layers' features (n, C₁) and (n, C₂), a number. `analyze.centred_gram(x)`
# may be used: it is the centred kernel, flattened.

# %%
def cka(x, y):
    ...  # your turn


check("cka", cka)

# %% [markdown]
# Measure it: each cell compares two layers, stem to last block, of the three models; bright is
# alike. ± is over minibatches of images.

# %%
result = analysis("cka", vits)
figure = plt.figure(layout="constrained", dpi=50)
analyze.draw_matrix(figure, result["curves"], result["more"])
plt.show()

curve = "mean CKA of its layers with those of"
show_numbers(result, curve, ".2f")
for arm, (places, means, errors) in list(result["curves"][curve].items()):
    own = (["own"], [means[places.index(arm)]], [errors[places.index(arm)]])
    result["curves"].setdefault("own", {})[arm] = own
for arm in ("simmim", "a2mim"):
    say("MIM's layers are more alike, CKA", result, "own", arm, "supervised", "own")

# %% [markdown]
# Alike is not the same as good. A layer that copies its input has CKA 1 with it, and a masked image
# model has to stay near the image, which its decoder paints again: look at the stem's row.

# %% [markdown]
# ## Frequencies: what do layers pass on?
#
# **Claim** (Park and Kim, arXiv 2202.06709, whose measure A²MIM uses): attention lowers high
# frequencies and the variance over positions, convolutions raise them.
#
# A CNN first needs a repair. In pre-training its batch norms saw masked images, so their statistics
# are wrong for whole ones. They are estimated again, on whole training images; no weight changes.

# %%
def with_statistics_of_whole_images(path, count):
    """The checkpoint with batch statistics of unmasked images, in a file."""
    world = Shapes(32, "train")
    x = torch.stack([world[i][0] for i in range(count)])
    x = data.normalize(x, data.MEAN, data.STD)
    model, about = weights.open_model(path)
    before = model.encoder.bn1.running_var.clone()
    torch.optim.swa_utils.update_bn(x.split(64), model.encoder)     # a mean over batches
    ratio = (model.encoder.bn1.running_var / before).log().abs().mean().exp()
    print(f"{path.stem}: the first batch norm's variances change by a factor of {ratio:.2f}")
    to = folder / path.name
    torch.save(dict(config=about["run"], model=model.state_dict()), to)
    return to


repaired = dict(supervised=resnets["supervised"])
for arm in ("simmim", "a2mim"):
    repaired[arm] = with_statistics_of_whole_images(resnets[arm], 128 if QUICK else 1024)

# %% [markdown]
# See it: a feature map and the amplitudes of its transform, log, zero frequency in the middle. The
# measure is the change along the half diagonal, from the middle to a corner.

# %%
figure, axes = plt.subplots(2, 5, figsize=(6.5, 3), layout="constrained")
with torch.no_grad():
    layers = list(analyze.walk(weights.open_model(vits["a2mim"])[0].eval().encoder, x))
for (above, below), (name, z) in zip(axes.T, layers):
    above.imshow(z[0, 0])
    amplitude = torch.fft.fftshift(torch.fft.fft2(z).abs(), (-2, -1)) + 1e-6
    below.imshow(amplitude.log().mean((0, 1)), cmap="magma")
    above.set_title(name if name == "stem" else f"block {name}", fontsize=8)
    for ax in (above, below):
        ax.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("channel 0")
axes[1, 0].set_ylabel("log |F|")
plt.show()

# %%
source(analyze.spectrum)

# %% [markdown]
# Measure it. For the ViTs each block has two points: after its attention, and after its MLP. The
# first row is the ViTs, the second the ResNets.

# %%
results = {}
for arch, files in dict(vit_nano=vits, resnet_nano=repaired).items():
    results[arch] = analysis("fourier", files)
    figure = plt.figure(layout="constrained", dpi=60)
    analyze.draw_curves(figure, results[arch]["curves"], {})
    figure.suptitle(arch)
    plt.show()

highest = "Δ log amplitude at the highest frequency by layer"
for arch, result in results.items():
    for arm, (places, means, errors) in result["curves"][highest].items():
        change = means[-1] - means[0]
        error = np.hypot(errors[0], errors[-1])
        line = f"{arch}/{arm}: from stem to end {change:+.2f} ± {error:.2f}"
        after = [i for i, name in enumerate(places) if name.endswith("a")]
        if after:
            line += f"; by all attentions {sum(means[i] - means[i - 1] for i in after):+.2f}"
        print(line)

# %% [markdown]
# Whole blocks and attentions do not have the same sign everywhere: what the MLPs add may outweigh
# what an attention smooths. The ResNets' maps shrink from stage to stage, and the highest frequency
# of a small map is a lower one of the image, so that their curve is not only what convolutions do.

# %% [markdown]
# ## Fine-tuned for a moment: classifiers
#
# The next two questions need classifiers. The ten classes of the built-in images take longer than a
# minute to learn, and the supervised model knows them already. So the images get other labels,
# which no model has seen: how much of the image does the object cover? A data set is a class and a
# row of `data.SOURCES`. Each encoder is then fine-tuned by the same short recipe, with the same
# images in the same order.

# %%
class Sizes:
    """The built-in images; the class is the share of pixels that are the object's, in thirds."""
    classes = ["small", "middle", "large"]

    def __init__(self, split, size):
        count = 64 if QUICK else 1024 if split == "train" else 512
        self.world = Shapes(size, split, count)
        shares = [self.world.sample(i)["mask"].float().mean() for i in range(count)]
        self.labels = np.digitize(shares, [0.15, 0.22])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.world[index][0], int(self.labels[index])


data.SOURCES["sizes"] = Sizes
EPOCHS = 1 if QUICK else 6
classifiers = {}
for arm in ARMS:
    out = folder / f"sizes-{arm}"
    options = "--protocol small --layer-decay none --data sizes --img-size 32 --workers 0 "
    options += f"--crop-scale 1 1 --epochs {EPOCHS} --warmup-epochs 1 --eval-every {EPOCHS}"
    with contextlib.redirect_stdout(io.StringIO()):
        finetune.main(["--init", str(vits[arm]), "--out", str(out), *options.split()])
    classifiers[arm] = out / "last.pt"
    result = json.loads((out / "result.json").read_text())
    share = result["top1"] / 100
    error = 100 * (share * (1 - share) / result["n"]) ** 0.5
    print(f"{arm}: top-1 {100 * share:.1f} ± {error:.1f} % of {result['n']} images; chance is 33")

# %% [markdown]
# ## Occlusion: what if patches are missing?
#
# **Claim** (A²MIM): masked image models bear it better. See it: a growing share of patches shows
# the data set's mean colour.

# %%
image = torch.stack([Shapes(32, "val")[i][0] for i in range(5)])
x = data.normalize(image, data.MEAN, data.STD)
rows = [x]
for share in (0.25, 0.5, 0.75):
    mask = masking.random_mask(len(x), 8, share, [data.generator(0, i) for i in range(len(x))])
    rows.append(masking.fill(x, mask, "zero"))
pixels = data.visible(data.denormalize(torch.cat(rows), data.MEAN, data.STD))
figure, axes = plt.subplots(4, 5, figsize=(4.5, 3.6), layout="constrained")
for ax, picture in zip(axes.flat, pixels):
    ax.imshow(picture.permute(1, 2, 0))
    ax.axis("off")
plt.show()

# %% [markdown]
# **Exercise.** Drop patches: images (B, 3, S, S), normalised, and a mask (B, n, n), 1 = dropped, to
# images in which they show the data set's mean colour. What number is that colour in a normalised
# image?

# %%
def drop_patches(image, mask):
    ...  # your turn


check("drop_patches", drop_patches)

# %%
source(analyze.occlusion)

# %% [markdown]
# Measure it. The right panel divides by the top-1 on whole images; its errors take into account
# that both are of the same images. Dotted: chance. Where most patches are gone every model guesses,
# and a poor one then keeps a larger share: chance over its own top-1. Trust the left half of the
# curve. And a label about size is hard on all of them: who counts only what can be seen calls a
# large object small.

# %%
result = analysis("occlusion", classifiers, "--data", "sizes")
figure = plt.figure(layout="constrained", dpi=60)
analyze.draw_curves(figure, result["curves"], {})
figure.axes[0].axhline(100 / 3, color="k", ls=":")
plt.show()
kept = "% of top-1 on whole images by share of patches dropped"
for arm in ("simmim", "a2mim"):
    # an analysis leaves this curve out where top-1 is near zero
    if {arm, "supervised"} <= set(result["curves"].get(kept, {})):
        for share in (0.2, 0.5):                        # half: as in docs/evidence.md
            say(f"MIM keeps more of its top-1, {share:.0%} dropped, %", result, kept, arm,
                "supervised", share)

# %% [markdown]
# ## Interactions: how many patches does it take?
#
# **Claim** (A²MIM, after Deng et al., arXiv 2111.06236): masked image models use *middle-order*
# interactions, what two patches do together when many others are visible, but not all.
#
# With v(S) = log(p / (1 − p)) of the true class while only the patches S are visible, and i, j two
# neighbours: I⁽ᵐ⁾(i, j) = mean over S of m patches of v(S∪{i,j}) − v(S∪{i}) − v(S∪{j}) + v(S). J⁽ᵐ⁾
# is the mean of |I⁽ᵐ⁾|, over its mean over all m.

# %%
source(analyze.interactions)

# %% [markdown]
# See it in a game of which we know the answer: v(S) = |S|² of six players. Any two have 2 in
# common, whatever the others do: (m + 2)² − 2(m + 1)² + m² = 2.

# %%
pairs = np.array([(0, 1), (2, 3)])
rng = np.random.default_rng(0)
orders = analyze.interactions(lambda S: S.sum(1) ** 2.0, 6, pairs, [0, 2, 4], 5, rng)
print("orders 0, 2, 4 of two pairs:", orders.tolist())

# %% [markdown]
# Measure it. A model needs thousands of forward passes an image, so there are few images: look at
# the error bars.

# %%
few = "--images 8 --pairs 1 --contexts 1" if QUICK else "--images 10 --pairs 5 --contexts 5"
result = analysis("interaction", classifiers, "--data", "sizes", *few.split())
figure = plt.figure(layout="constrained", dpi=60)
analyze.draw_curves(figure, result["curves"], {})
figure.set_size_inches(6.5, 4.6)
plt.show()
strength = "interaction strength J by order m / (n² − 2)"
for arm in ("simmim", "a2mim"):
    say("MIM has more of the middle order, J", result, strength, arm, "supervised", 0.5)

# %% [markdown]
# ## Over training seeds
#
# All of the above was one run a model. `results/` has some of these numbers for several runs:
# `extras/sweep.py` trains them. Where there are two or more pairs, the interval below is one **over
# training seeds**; it is what a claim about a method needs, and mostly wider.

# %%
stored = sweep.read_results(ROOT / "results")
for part, (_, _, metric, curve, place) in sweep.ANALYSES.items():
    for arch in sweep.ARCHS:
        for arm in ("simmim", "a2mim"):
            names = [f"world/{arch}/{name}" for name in (arm, "supervised")]
            numbers = [sweep.values(stored, name, part, metric) for name in names]
            if not all(numbers):
                continue
            lists = [[round(number, 2) for number in each.values()] for each in numbers]
            line = f"{part}, {metric}, {arch}: {arm} {lists[0]}, supervised {lists[1]}"
            change = sweep.gain(stored, *names, part, metric)
            if change:
                line += f"; difference {change[0]:+.2f} ± {change[1]:.2f} ({change[3]} pairs)"
            print(line)
if not any(run.split("/")[3] in sweep.ANALYSES for run in stored):
    print("none there yet: python extras/sweep.py world/vit_nano cka")

# %% [markdown]
# ## What showed
#
# Every comparison of this notebook, over images, of one run a model. Where papers and these models
# disagree, do not conclude that the papers are wrong: their models have a hundred times the
# weights, and saw photographs. [docs/analyses.md](../docs/analyses.md) has the same for CIFAR-10.

# %%
print("\n".join(ledger))
