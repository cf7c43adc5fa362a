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
# # Is it worth it?
#
# Pre-training is to make few labels go far. This notebook fine-tunes a small ViT with 64 and 256
# labels, from its A²MIM checkpoint and from scratch. Then it looks at the stored runs of
# `extras/sweep.py`, and asks how many runs it takes before a difference can be believed. At the end
# the method is yours: a mask and an encoder of your own.

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
import math
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch

import data
import finetune
import masking
import model as models
import weights
from checks import ROOT, check, source
from extras import sweep
from shapes import Shapes

plt.rcParams["figure.dpi"] = 70
STEPS = 2 if QUICK else 150
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Few labels, two starts
#
# The task: which pixels are the object's? A label is a mask. The measure is `miou`, intersection
# over union, the mean over object and background, in %. See it:

# %%
samples = [Shapes(32, "val").sample(i) for i in range(8)]
image = torch.stack([sample["image"] for sample in samples])
target = torch.stack([sample["mask"] for sample in samples])


def draw_rows(rows):
    """{name: pictures}, a row each."""
    figure, axes = plt.subplots(len(rows), 8, figsize=(6.4, 0.85 * len(rows)), squeeze=False,
                                layout="constrained")
    for row, (name, pictures) in zip(axes, rows.items()):
        for ax, picture in zip(row, pictures):
            ax.imshow(picture.permute(1, 2, 0) if picture.ndim == 3 else picture, cmap="gray")
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    plt.show()


draw_rows({"image": image, "label": target})
source(finetune.Mask)

# %% [markdown]
# An *arm* is a way to get an encoder, here from scratch or by A²MIM. Both have the same number of
# steps of 64 images, and the same seed: it draws the labels, their order, and the head's first
# weights. So the two runs are a **pair**, which differs in the encoder's start only. `finetune.py`
# writes a hash of each of the three, and they agree.

# %%
START = {
    "scratch": ["--arch", "vit_nano"],
    "a2mim": ["--init", str(ROOT / "checkpoints/vit_nano-a2mim.pt")],
}
runs = {}
for labels in (64,) if QUICK else (64, 256):
    for arm, start in START.items():
        epochs = math.ceil(STEPS / (labels // 64))
        options = "--protocol small --layer-decay none --task mask --img-size 32 --workers 0 "
        options += f"--labels {labels} --epochs {epochs} --warmup-epochs {epochs / 10} "
        options += f"--steps {STEPS} --eval-every {epochs} --seed 0"
        out = folder / f"{arm}-{labels}"
        with contextlib.redirect_stdout(io.StringIO()):
            finetune.main([*start, *options.split(), "--out", str(out)])
        runs[arm, labels] = json.loads((out / "result.json").read_text())
        print(f"{arm:8} {labels:3} labels: miou {runs[arm, labels]['miou']:.2f}")
    assert runs["scratch", labels]["hashes"] == runs["a2mim", labels]["hashes"]

# %%
x = data.normalize(image, data.MEAN, data.STD)
rows = {"image": image, "label": target}
for (arm, labels), result in runs.items():
    # build the model as finetune.py does, then load it: one output at each position ("none": no
    # mean over positions before the head)
    network = models.Predictor(models.build("vit_nano", 32).encoder, 1, "none")
    weights.load(network, folder / f"{arm}-{labels}" / "last.pt")
    with torch.no_grad():
        rows[f"{arm}, {labels}"] = network.eval()(x)[:, 0] > 0
draw_rows(rows)

# %% [markdown]
# One pair is an anecdote. The steps are few, too: a start from scratch may catch up with more of
# them. The stored runs have 500 steps, and several seeds.

# %% [markdown]
# ## The stored runs: label efficiency
#
# `results/` holds a file a run. `sweep.values` finds the numbers of an arm, by seed; `sweep.gain`
# takes the mean difference of pairs and its interval. `world/vit_nano/a2mim` is an arm's name: the
# images (`world` are the built-in ones), the architecture, the pre-training. What was not run yet
# is left out.

# %%
stored = sweep.read_results(ROOT / "results")
print(len(stored), "runs")
source(sweep.gain)

# %%
def draw_labels(task, metric, numbers):
    """Above, each run, and the mean of an arm; below, the gain over scratch, 95 % intervals."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 5), sharex=True, layout="constrained")
    for (above, below), arch in zip(axes.T, sweep.ARCHS):
        for i, arm in enumerate(sweep.FOUR):
            name = f"world/{arch}/{arm}"
            at = []
            means = []
            for place, labels in enumerate(numbers):
                part = f"{task}-{labels}"
                found = list(sweep.values(stored, name, part, metric).values())
                if not found:
                    continue
                at.append(place + 0.08 * (i - 1.5))
                means.append(np.mean(found))
                above.plot([at[-1]] * len(found), found, ".", color=f"C{i}", alpha=0.5)
                change = sweep.gain(stored, name, f"world/{arch}/scratch", part, metric)
                if change and arm != "scratch":
                    below.errorbar(at[-1], change[0], change[1], fmt="o", capsize=3, color=f"C{i}")
            above.plot(at, means, "o-", color=f"C{i}", label=arm)
        below.axhline(0, color="k", lw=0.5)
        above.set(title=arch, ylabel=metric)
        below.set(xlabel="labels", ylabel="gain over scratch", xticks=range(len(numbers)),
                  xticklabels=numbers, xlim=(-0.5, len(numbers) - 0.5))
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    plt.show()


draw_labels("mask", "miou", (64, 256, 1024))
print("\n".join(sweep.make_table(stored, "world", ["mask-64", "mask-256", "mask-1024"])))

# %% [markdown]
# In the table: a mean, then the gain over scratch ± half of its 95 % interval (number of pairs).
# Other tasks:

# %%
print("\n".join(sweep.make_table(stored, "world", ["pose-256", "class-1024"])))
print("\n".join(sweep.make_table(stored, "cifar10", ["class-100", "class-500", "class-5000"])))

# %% [markdown]
# ## Why pairs?
#
# Some seeds draw easy labels, and all arms gain. That is in a and in b, but not in a − b: Var(a −
# b) = Var(a) + Var(b) − 2·Cov(a, b). See it: each line is a seed. Where lines rise and fall
# together, pairs remove what moves them. Arms that have little in common gain little by pairs.

# %%
part = "mask-256"
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for ax, arch in zip(axes, sweep.ARCHS):
    found = {arm: sweep.values(stored, f"world/{arch}/{arm}", part, "miou") for arm in sweep.FOUR}
    for seed in range(6):
        line = [found[arm].get(seed, math.nan) for arm in sweep.FOUR]
        ax.plot(line, "o-", label=f"seed {seed}" if not all(map(math.isnan, line)) else None)
    ax.set(title=f"{arch}, {part}", xticks=range(4), xticklabels=sweep.FOUR, ylabel="miou")
if axes[0].get_legend_handles_labels()[0]:
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
plt.show()

# %% [markdown]
# **Exercise.** The interval of a mean gain, from two lists of the same seeds: (mean of the
# differences, half of the 95 % interval). That half is t(0.975)·s / √n. For n pairs, row n − 1 of
# `sweep.STUDENT` holds the 97.5 % and the 80 % quantile of t.

# %%
def paired_interval(ours, theirs):
    ...  # your turn


check("paired_interval", paired_interval)

# %% [markdown]
# Measure it, on the stored runs: s of the differences, against what it would be if the arms had
# nothing in common, √(Var(a) + Var(b)). A ratio of 2 is worth four times as many seeds. With few
# seeds s itself is rough.

# %%
print(f"{'':34}{'unpaired s':>11}{'paired s':>10}{'mean ± half of the interval (pairs)':>38}")
for arch in sweep.ARCHS:
    for arm, other in [*[(arm, "scratch") for arm in sweep.FOUR[1:]], ("a2mim", "simmim")]:
        names = [f"world/{arch}/{name}" for name in (arm, other)]
        change = sweep.gain(stored, *names, part, "miou")
        if not change:
            continue
        a, b = [sweep.values(stored, name, part, "miou") for name in names]
        both = np.array([(a[seed], b[seed]) for seed in a if seed in b])
        unpaired = math.sqrt(both.var(0, ddof=1).sum())
        paired = (both[:, 0] - both[:, 1]).std(ddof=1)
        interval = f"{change[0]:+.2f} ± {change[1]:.2f} ({change[3]})"
        print(f"{arch + ': ' + arm + ' − ' + other:34}{unpaired:11.2f}{paired:10.2f}{interval:>38}")

# %% [markdown]
# A warning: fine-tuning seeds that begin with the same checkpoint are not independent of each
# other. They say how fine-tuning varies, and little of how *pre-training* does.
# [The design](../docs/evidence.md) says which seed begins where.

# %% [markdown]
# ## How small a difference could be seen?
#
# "Not shown" can mean "no difference" or "too few seeds". The smallest detectable difference tells
# them apart: the true one that 80 % of such experiments would show, (t(0.975) + t(0.8))·s / √n.
#
# **Exercise.** Write it, for a list of paired differences.

# %%
def smallest_difference(differences):
    ...  # your turn


check("smallest_difference", smallest_difference)

# %% [markdown]
# Check it by experiment: ten thousand times, n differences are drawn around exactly that number, s
# is estimated, and we count how many intervals leave out 0. It should be about 80 %. (It is less
# for very few pairs: the formula is an approximation, and two pairs are no experiment.)

# %%
rng = np.random.default_rng(0)
for n in range(2, 7):
    t, t_power = sweep.STUDENT[n - 1]
    least = (t + t_power) / math.sqrt(n)                # for a true s of 1
    d = rng.normal(least, 1, (10_000, n))
    shown = d.mean(1) > t * d.std(1, ddof=1) / math.sqrt(n)
    print(f"{n} pairs: smallest detectable difference {least:5.2f}·s, "
          f"shown in {100 * shown.mean():.0f} %")

# %% [markdown]
# How many seeds to see one point? The lines have the s of the stored pairs (`sweep.gain` gives the
# smallest detectable difference; s follows from it). For more pairs than six, t is near 1.96 and
# 0.84: n ≈ (2.8·s / difference)², and one or two more.

# %%
figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
n = np.arange(3, 7)
factor = np.array([sum(sweep.STUDENT[pairs - 1]) / math.sqrt(pairs) for pairs in n])
for i, arch in enumerate(sweep.ARCHS):
    for arm, other, style in [("a2mim", "scratch", "o-"), ("a2mim", "simmim", "s--")]:
        change = sweep.gain(stored, f"world/{arch}/{arm}", f"world/{arch}/{other}", part, "miou")
        if not change:
            continue
        _, _, least, pairs = change
        s = least * math.sqrt(pairs) / sum(sweep.STUDENT[pairs - 1])
        label = f"{arch}: {arm} − {other}"
        ax.plot(n, factor * s, style, color=f"C{i}", label=label)
        print(f"{label}: s {s:.2f}; 1 point takes about {math.ceil((2.8 * s) ** 2) + 2} pairs")
ax.axhline(1, color="k", ls=":")
ax.set(xlabel="pairs of seeds", ylabel="smallest difference, miou", xticks=n, yscale="log")
if ax.lines[:-1]:
    figure.legend(fontsize=8, loc="outside right")
plt.show()

# %% [markdown]
# Halving the smallest difference takes four times as many seeds, so the cheapest way to see more is
# a smaller s: pairs, a larger test set, a metric that varies less. In this notebook the first runs
# were one pair. What can you say of their difference?

# %% [markdown]
# ## A mask of your own
#
# A mask function takes (batch, grid, ratio, generators), a generator an image, and returns (B,
# grid, grid), 1 = masked. All randomness comes from the generators: then an interrupted run goes on
# with the same masks. Here is the repository's, and what it hides in eight images.

# %%
source(masking.random_mask)


def draw_mask(make_mask):
    draws = [torch.Generator().manual_seed(i) for i in range(8)]
    mask = make_mask(8, 4, 0.6, draws)                  # of 4 × 4 blocks of 8 px
    if mask is None:
        return
    seen = data.denormalize(masking.fill(x, mask), data.MEAN, data.STD)
    draw_rows({"mask": mask, "seen": data.visible(seen)})
    print("masked blocks of 16:", mask.sum((1, 2)).int().tolist())


draw_mask(masking.random_mask)

# %% [markdown]
# **Exercise.** Another one, such as a checkerboard whose colour at the corner is drawn: half of the
# blocks, and all neighbours of a hidden one are visible. The ratio may be ignored. Is that harder
# or easier to fill in?

# %%
def own_mask(batch, grid, ratio, generators):
    ...  # your turn


check("own_mask", own_mask)
draw_mask(own_mask)

# %% [markdown]
# Copied to the end of `masking.py`, with `MASKS["own"] = own_mask` below it, it is an option:
# `python train.py --mask own`. Then compare by fine-tuning: the mask whose gaps are filled in best
# need not be the one that teaches most.

# %% [markdown]
# ## An encoder of your own
#
# A²MIM is for any architecture, and this is what it asks of one: a `stem`, and `layers` between
# which a token can be added. `widths` and `strides` say what a map looks like where it enters each
# layer, and where it leaves the last.

# %%
source(models.Encoder)
encoder = models.build("resnet_nano", 32).encoder.eval()
with torch.no_grad():
    z = encoder.stem(x)
    for i, (width, stride) in enumerate(zip(encoder.widths, encoder.strides)):
        print(f"widths[{i}] {width:3}, strides[{i}] {stride}: map {tuple(z.shape)}")
        if i < len(encoder.layers):
            z = encoder.layers[i](z)

# %% [markdown]
# **Exercise.** Write one: two or three layers of convolutions will do, or ConvMixer's blocks (arXiv
# 2201.09792). The check builds it for 64 px, sends two images through, and compares every map with
# `widths` and `strides`.

# %%
class OwnEncoder(models.Encoder):
    def __init__(self, img_size, *, channels=3):
        super().__init__()
        ...  # your turn


check("own_encoder", OwnEncoder)

# %% [markdown]
# Copied to the end of `model.py` (there it is `Encoder`, not `models.Encoder`), with the row
# `PRESETS["own"] = dict(encoder=OwnEncoder, mask_layer=1, like="resnet_nano")` below it, it is an
# option of all programs, as in *Bring your own* of the README: `python train.py --arch own`. Which
# layer is the middle? Now you know how to find out, and with how many seeds.
