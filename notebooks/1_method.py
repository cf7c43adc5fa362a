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
# # The method: from an image to the loss
#
# The first of three notebooks. A²MIM (arXiv 2205.13943) hides 60 % of an image, and a model
# learns by reconstructing the hidden pixels. We follow an image through mask, encoder, decoder
# and loss, take one training step, and then some hundreds. Each part is looked at, measured, and
# written by you: a cell with dots is an exercise, and `check` compares your answer with the
# repository's own function, which a cell after it shows.
#
# B, C, H, W: images, channels, rows, columns. x: an image. M: its mask, 1 = masked. x̂: the
# reconstruction. No GPU is needed, and nothing is downloaded.

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
import inspect
import json
import math
import tempfile
import time

import matplotlib.pyplot as plt
import torch
import torchvision

import data
import losses
import masking
import model as models
import shapes
import train
import weights
from checks import check, source, two_transforms

plt.rcParams["figure.dpi"] = 70


def show(rows, labels):
    """A picture of several rows of images, (B, 3, H, W) each, normalised; each has a label."""
    B, _, H, W = rows[0].shape
    pixels = data.denormalize(torch.cat(rows))
    picture = torchvision.utils.make_grid(pixels, B, padding=2, pad_value=255)
    plt.figure(figsize=(1.1 * B + 1.5, 1.1 * len(rows)))
    plt.imshow(picture.permute(1, 2, 0))
    plt.yticks([(H + 2) * (i + 0.5) for i in range(len(rows))], labels)
    plt.xticks([])
    plt.tick_params(length=0)
    plt.box(False)
    plt.show()


# %% [markdown]
# ## 1 · Images
#
# The repository has a world of its own, `shapes.py`: one textured object on a background, made
# from its index at any size. A source is a list of (image, label); an image is bytes, (3, H, W).
# Training sees random crops, so that one image gives many. Labels are not used in this notebook.

# %%
world = shapes.Shapes(32, "val")
image, label = world[0]
print(f"{len(world)} images, {image.dtype}, {tuple(image.shape)}; here: {world.classes[label]}")

large, _ = shapes.Shapes(96, "val")[0]
crops = [data.random_resized_crop(large, 32, (0.2, 0.6), data.generator(0, i)) for i in range(5)]
show([data.normalize(torch.stack([image, *crops]))], ["image, five crops"])

# %% [markdown]
# Models see numbers of mean 0 and deviation 1, in so far as the images are like ImageNet's: `(x −
# mean) / std` of each channel. Ours are more colourful than photographs. What counts here is the
# third line: the *mean colours* of two images differ nearly as much as two pixels.

# %%
count = 64 if QUICK else 256
x = data.normalize(torch.stack([world[i][0] for i in range(count)]))         # (B, 3, 32, 32)
print("mean of each channel               ", x.mean((0, 2, 3)).numpy().round(2))
print("standard deviation of pixels       ", x.std((0, 2, 3)).numpy().round(2))
print("standard deviation of images' means", x.mean((2, 3)).std(0).numpy().round(2))

# %% [markdown]
# ## 2 · Masks
#
# M is drawn in blocks: ⌈0.6·n²⌉ of the n × n blocks, uniformly and without replacement. With n =
# 4 these are 10 of 16. Blocks are large, here 8 × 8 pixels: a hidden pixel must not be guessed
# from the pixel beside it.
#
# **Exercise 1.** Give each block a random score, and mask those with the lowest.

# %%
def random_mask(batch, grid, ratio, generator):
    """(batch, grid, grid), 1 = masked. All randomness comes from the torch.Generator.

    Blocks to mask: math.ceil(round(ratio * grid ** 2, 6)). In floats 0.07·100 is a bit above 7.
    """
    ...  # your turn


check("random_mask", random_mask)

# %%
source(masking.random_mask)

# %%
mask = masking.random_mask(len(x), 4, 0.6, torch.Generator().manual_seed(0))  # (B, 4, 4)
print("masked blocks of the first eight images:", mask[:8].sum((1, 2)).int().tolist())
share = mask.mean(0)                                                          # of each block
print(f"a block is masked in {share.min():.0%} to {share.max():.0%} of {len(x)} images")
pixels = masking.resize(mask, (32, 32))                                       # (B, 1, 32, 32)
show([x[:8], 2 - 4 * pixels[:8].expand(-1, 3, -1, -1)], ["x", "M (dark)"])

# %% [markdown]
# ## 3 · What stands at masked pixels
#
# `x_in = x·(1 − M) + fill·M`. Three fills: the image's own mean colour (A²MIM), zero, which is
# the mean colour of the data set, or nothing (SimMIM: the pixels stay, and a token hides them
# later).
#
# **Exercise 2.** The mean is over *all* pixels of the image, for each image and channel.

# %%
def fill(image, mask):
    """image (B, 3, H, W), mask (B, h, w) of blocks -> the image with its mean where masked.

    masking.resize(mask, (H, W)) is the mask of pixels, (B, 1, H, W).
    """
    ...  # your turn


check("fill", fill)

# %%
source(masking.fill)
fills = {how: masking.fill(x, mask, how) for how in ("mean", "zero", "none")}
show([rows[:8] for rows in fills.values()], list(fills))

# %% [markdown]
# What does a network make of them? A ResNet begins with a convolution without bias and a batch
# norm. Zeros through that convolution are zero, whatever the image, and the batch norm then
# measures less variance than the images have. The mean colour is one of each image's own: less
# variance is lost. We compare statistics of the convolution's output with those of unmasked images.
#
# Predict first: with each of the two fills, what is σ at hidden positions? The images' own is 1.

# %%
resnet, about = weights.open_model(roots[0] / "checkpoints" / "resnet_nano-a2mim.pt")
resnet.eval()
conv = resnet.encoder.conv1                                                   # 3×3, 32 channels
with torch.no_grad():
    z_image = conv(x)                                                         # (B, 32, 32, 32)
    z = {how: conv(fills[how]) for how in ("mean", "zero")}
# positions that see masked pixels only: all nine of their 3×3 are masked
deep = 1 - torch.nn.functional.max_pool2d(1 - pixels, 3, 1, 1)

mu = z_image.mean((0, 2, 3))
sigma = z_image.std((0, 2, 3))
print("after conv1, mean over channels, in units of the images' own σ:")
print("         shift of the batch's mean   σ of the batch   σ at hidden positions")
for how, map_ in z.items():
    shift = (map_.mean((0, 2, 3)) - mu).abs() / sigma
    spread = map_.std((0, 2, 3)) / sigma
    hidden = map_.movedim(1, -1)[deep[:, 0] > 0].std(0) / sigma                # of (positions, 32)
    print(f"{how:9}{shift.mean():25.3f}{spread.mean():17.3f}{hidden.mean():24.3f}")

# %%
# the channel in which a mean colour shows most
channel = (conv.weight.sum((2, 3)).norm(dim=1) / conv.weight.flatten(1).norm(dim=1)).argmax()
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharex=True)
bins = torch.linspace(-4, 4, 60).tolist()
places = {"visible positions": pixels == 0, "hidden positions": deep > 0}
maps = {"image": z_image, "mean fill": z["mean"], "zero fill": z["zero"]}
for ax, (title, where) in zip(axes, places.items()):
    for name, map_ in maps.items():
        values = (map_[:, channel] / sigma[channel])[where[:, 0]]
        ax.hist(values.numpy(), bins, density=True, histtype="step", label=name)
    ax.set_ylim(0, 1.2)
    ax.set_title(title)
    ax.set_xlabel(f"channel {channel} after conv1, in σ")
axes[1].legend()
plt.show()

# %% [markdown]
# At hidden positions zeros are one value for all images (the bar at 0 leaves the picture), the
# mean fill keeps the spread of colours. Whether that makes better features is another question:
# at this size a model reconstructs even better from zeros (docs/exercises.md, 2).
#
# ## 4 · The encoder and the mask token
#
# The encoder is a stem and a list of layers, counted from 0. Just before layer `mask_layer`, a
# learned vector t says "masked" to all hidden positions at once: `z·(1 − M) + γ·z·M + t·M`. In the
# ViT it enters before layer 0, right after the patches are embedded, with γ = 1. In the ResNet it
# enters before layer 3, the last of four stages, with one learned γ for each channel.

# %%
source(models.A2MIM.encode)

# %% [markdown]
# **Exercise 3.** The token of a CNN, for a map z.

# %%
def mask_token(z, mask, t, gamma):
    """z (B, C, h, w), mask (B, m, n) of blocks, t and gamma (C,) -> (B, C, h, w).

    masking.resize(mask, (h, w)) is the mask of positions, (B, 1, h, w).
    """
    ...  # your turn


check("mask_token", mask_token)

# %%
source(models.MaskToken.forward)

# %%
vit, about = weights.open_model(roots[0] / "checkpoints" / "vit_nano-a2mim.pt")
vit.eval()


@torch.no_grad()
def around_the_token(model, image, mask):
    """A2MIM.encode, step by step: the map before the token, after it, and at the end."""
    z = model.encoder.stem(masking.fill(image, mask, model.fill))
    for i, layer in enumerate(model.encoder.layers):
        if i == model.mask_layer:
            before = z
            z = model.mask_token(z, mask)
            after = z
        z = layer(z)
    assert torch.equal(z, model.encode(image, mask))
    return before, after, z


for name, model in {"ViT": vit, "ResNet": resnet}.items():
    before, after, z = around_the_token(model, x, mask)
    hidden = masking.resize(mask, before.shape[-2:])[:, 0] > 0
    token = model.mask_token.token.detach()
    gamma = torch.as_tensor(model.mask_token.gamma).detach()
    print(f"{name}, before layer {model.mask_layer}: a map of {tuple(before.shape[1:])}; "
          f"at the end {tuple(z.shape[1:])}\n"
          f"  |z|: visible {before.norm(dim=1)[~hidden].mean():.2f}, hidden "
          f"{before.norm(dim=1)[hidden].mean():.2f}, hidden after the token "
          f"{after.norm(dim=1)[hidden].mean():.2f}\n"
          f"  |t| = {token.norm():.2f}; γ from {gamma.min():.2f} to {gamma.max():.2f}")

# %%
figure, axes = plt.subplots(2, 5, figsize=(9, 3.8))
for row, (name, model) in zip(axes, {"ViT": vit, "ResNet": resnet}.items()):
    before, after, z = around_the_token(model, x[:1], mask[:1])
    panels = {"x_in": data.denormalize(fills["mean"][:1])[0].permute(1, 2, 0),
              "|z| before t": before.norm(dim=1)[0], "|z| after": after.norm(dim=1)[0],
              "|change|": (after - before).norm(dim=1)[0], "|z| at the end": z.norm(dim=1)[0]}
    high = before.norm(dim=1).max().item()
    for ax, (title, panel) in zip(row, panels.items()):
        scale = dict(vmin=0, vmax=high) if title != "|z| at the end" else {}
        ax.imshow(panel, **scale)
        ax.set_title(title)
        ax.set_xticks([])
        ax.set_yticks([])
    row[0].set_ylabel(name)
plt.show()

# %% [markdown]
# In the ResNet, three stages of convolutions ran before the token: what is visible has already
# spread into the hidden blocks. Its small γ removes most of that at hidden positions, and t takes
# the place. ("|z| at the end" has a colour scale of its own.)
#
# How much does each trained model rely on t? We take it away (t = 0) and measure the error of
# masked pixels, in standard deviations. Predict first: which of the two needs it more?

# %%
def masked_error(reconstruction):
    """Mean |x̂ − x| over masked pixels."""
    return losses.spatial_loss(reconstruction - x, pixels).item()


print(f"each image's mean colour: {masked_error(fills['mean']):.3f}")
for name, model in {"ViT": vit, "ResNet": resnet}.items():
    token = model.mask_token.token
    learned = token.detach().clone()
    with torch.no_grad():
        with_token = masked_error(model(x, mask))
        token.zero_()
        without = masked_error(model(x, mask))
        token.copy_(learned)
    print(f"{name}: with the token {with_token:.3f}, without {without:.3f}")

# %% [markdown]
# The ViT relies on t. The ResNet hardly does: its γ marks the place already. This is what a trained
# model depends on; one that is trained without t may do as well (docs/exercises.md, 3).
#
# ## 5 · The decoder
#
# One linear map from a feature vector to the s × s pixels at its place: `x̂ =
# PixelShuffle(Conv1×1(z))`. It is weak on purpose: what is to be painted must be in z. Channel k
# of z paints pattern k, and the block at a place is the sum of all patterns, weighted by z, plus a
# bias.

# %%
source(models.decoder)
with torch.no_grad():
    z = resnet.encode(x[:1], mask[:1])                                        # (1, 256, 4, 4)
    whole = resnet.decoder(z)                                                 # (1, 3, 32, 32)
    one = torch.zeros_like(z)
    one[:, :, 1, 2] = z[:, :, 1, 2]                                           # one place of 4 × 4
    block = resnet.decoder(one)
    patterns = resnet.decoder[0].weight[:, :, 0, 0].T.reshape(256, 3, 8, 8)   # one a channel of z
strongest = patterns.flatten(1).norm(dim=1).argsort(descending=True)[:24]
patterns = torchvision.utils.make_grid(patterns[strongest], 6, padding=1, normalize=True,
                                       scale_each=True)

figure, axes = plt.subplots(1, 4, figsize=(10, 2.6))
panels = {"x": x[0], "x̂": whole[0], "x̂ of one place": block[0]}
for ax, (title, panel) in zip(axes, panels.items()):
    ax.imshow(data.denormalize(panel[None])[0].permute(1, 2, 0))
    ax.set_title(title)
axes[3].imshow(patterns.permute(1, 2, 0))
axes[3].set_title("24 patterns of 256")
for ax in axes:
    ax.axis("off")
plt.show()

# %% [markdown]
# **Exercise 4.** PixelShuffle without `pixel_shuffle`: the 3·s·s numbers at a place become s × s
# pixels. They are in the order colour, row, column.

# %%
def rearrange(z, s):
    """(B, 3·s·s, h, w) -> (B, 3, h·s, w·s)."""
    ...  # your turn


check("rearrange", rearrange)

# %% [markdown]
# ## 6 · The loss over pixels and the loss over frequencies
#
# The error is d = x̂ − x. The first term is the mean of |d| over masked pixels,
# `losses.spatial_loss`. The second looks at the spectrum D = F(d) and weights large errors more:
# the mean over frequencies of `w·|D|²`, with `w = log(1 + |D|)` over its maximum. w gets no
# gradient. Visible pixels are not the model's task: before F, x̂ becomes ½·x̂ + ½·x there, without
# a gradient, as in the official code (`losses.STANDINS`). So "what the loss sees" is d where
# masked, half of d elsewhere.
#
# For the picture and the numbers below it each image has its own spectrum, and w its maximum in
# each image and channel. The official code averages the spectra of a batch first; that comes soon.
#
# Predict first: is the share of long waves larger in |D|² or in w·|D|²?

# %%
with torch.no_grad():
    reconstruction = vit(x, mask)
d = reconstruction - x
seen = torch.lerp(losses.STANDINS["mixed"](d, x), d, pixels)


def full_spectrum(d):
    """|D| of error images (B, 3, H, W), the mean frequency in the middle."""
    return torch.fft.fftshift(torch.fft.fft2(d, norm="ortho").abs(), dim=(-2, -1))


amplitude = full_spectrum(seen[2])
w = amplitude.log1p() / amplitude.log1p().amax((1, 2), keepdim=True)
figure, axes = plt.subplots(1, 6, figsize=(12, 2.4))
panels = {"x": x[2], "x̂": reconstruction[2], "d": d[2], "what the loss sees": seen[2]}
for ax, (title, panel) in zip(axes, panels.items()):
    ax.imshow(data.denormalize(panel[None])[0].permute(1, 2, 0))
    ax.set_title(title)
axes[4].imshow(amplitude.mean(0).log())
axes[4].set_title("log |D(u,v)|")
axes[5].imshow(w.mean(0), vmin=0)
axes[5].set_title("w(u,v)")
for ax in axes:
    ax.axis("off")
plt.show()

# u² + v² ≤ 4²: waves of eight pixels and longer
u = torch.arange(-16, 16)
low = (u[:, None] ** 2 + u ** 2 <= 16).float()
amplitude = full_spectrum(seen)
w = amplitude.log1p() / amplitude.log1p().amax((2, 3), keepdim=True)
for name, part in {"|D|²": amplitude ** 2, "w·|D|²": w * amplitude ** 2}.items():
    print(f"waves of 8 px and longer: {low.mean():.0%} of frequencies, "
          f"{(part * low).sum() / part.sum():.0%} of {name}, spectra of single images")

# %% [markdown]
# Three errors, all with the same mean of |d|: a blur, noise, and a wrong shade. The first term
# cannot tell them apart. What does the second say, for each image by itself ("focal_per_image"),
# and with the spectra of the batch averaged first, as the official code does ("focal")?
#
# Predict first: which of the three costs most, and which share of its d² does w leave?

# %%
target = x[:32]
blur = torchvision.transforms.functional.gaussian_blur(target, [9, 9], [2, 2]) - target
noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
shade = torch.ones_like(target)
everything = torch.ones(len(target), 4, 4)                                    # all is masked
per_image = losses.A2MIMLoss(frequency="focal_per_image")
averaged = losses.A2MIMLoss(frequency="focal")
errors = {}
print("        spatial   mean d²   frequency: per image   share of d²   spectra averaged")
for name, d in {"blur": blur, "noise": noise, "shade": shade}.items():
    d = d * blur.abs().mean() / d.abs().mean()
    errors[name] = d
    power = d.square().mean()
    terms = per_image(target + d, target, everything)
    mean = averaged(target + d, target, everything)["frequency"]
    print(f"{name:6}{terms['spatial']:9.3f}{power:10.4f}{terms['frequency']:23.4f}"
          f"{terms['frequency'] / power:14.0%}{mean:19.4f}")

# %%
figure, axes = plt.subplots(2, 4, figsize=(8, 4.2))
axes[0, 0].imshow(data.denormalize(target[2:3])[0].permute(1, 2, 0))
axes[0, 0].set_title("x")
for column, (name, d) in zip(axes.T[1:], errors.items()):
    column[0].imshow(data.denormalize((target + d)[2:3])[0].permute(1, 2, 0))
    column[0].set_title(name)
    column[1].imshow((full_spectrum(d).mean((0, 1)) + 1e-3).log(), vmin=-4, vmax=2)
    column[1].set_title("log |D|")
for ax in axes.flat:
    ax.axis("off")
plt.show()

# %% [markdown]
# F keeps energy: the mean of |D|² is the mean of d² (Parseval). So w says which share of d²
# counts: all of it where the error is one frequency, as a shade, little more than half for blur
# and noise alike. The term mostly follows d²: blur costs most since its d² is largest. Averaging
# over a batch changes the picture: errors of different images cancel, blur and noise nearly vanish,
# and only what all share, such as our shade, keeps its price. In training λ times the term is a
# small part of the loss, and leaving it out changes the reconstruction within the noise
# (docs/exercises.md, 4).
#
# **Exercise 5.** The loss with the spectra of the batch averaged, as the formula reads: D = mean
# over the batch of F(x̂) − F(x), all frequencies, orthonormal (`torch.fft.fft2`). The maximum in w
# is one number over all channels and frequencies. The result is the mean over both.

# %%
def frequency_two(prediction, target):
    """Images (B, 3, H, W) twice -> a scalar, with a gradient for the prediction."""
    ...  # your turn: a transform of the prediction, one of the target


check("frequency_two", frequency_two)

# %% [markdown]
# **Exercise 6.** F is linear, and so is the mean over the batch. Write the same loss with a
# single transform. How small can its input be? Both are timed below, beside the repository's.

# %%
def frequency_one(prediction, target):
    ...  # your turn


check("frequency_one", frequency_one)

# %%
def milliseconds(loss, prediction, target):
    """Of one forward and backward pass, the fastest of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        value = loss(prediction, target)
        if value is None:
            return None
        value.backward()
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


size = 32 if QUICK else 224
prediction = torch.randn(32, 3, size, size, requires_grad=True)
target = torch.randn(32, 3, size, size)
candidates = {"two transforms": two_transforms, "losses.frequency_loss": losses.frequency_loss,
              "your exercise 5": frequency_two, "your exercise 6": frequency_one}
for name, loss in candidates.items():
    ms = milliseconds(loss, prediction, target)
    print(f"{name:22}", "not written yet" if ms is None else f"{ms:8.1f} ms")

# %%
source(losses.focal_frequency)

# %% [markdown]
# ## 7 · One training step, then some hundreds
#
# All parts are there. A step is: mask, reconstruct, loss, gradient, clip, step. `train.py` has
# the same lines in its training loop, beside what a long run needs (several processes,
# checkpoints, a log).

# %%
torch.manual_seed(0)
model = models.build("vit_nano", 32)
criterion = losses.A2MIMLoss("l1", "focal", frequency_weight=0.1)             # L = L_s + λ·L_f
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
batch = x[:32]


def step():
    mask = masking.random_mask(len(batch), 4, 0.6)                            # new masks each time
    reconstruction = model(batch, mask)
    terms = criterion(reconstruction, batch, mask)
    terms["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()
    return terms


for i in range(3 if QUICK else 101):
    terms = step()
    if i % 20 == 0:
        spatial, frequency = terms["spatial"].item(), terms["frequency"].item()
        print(f"step {i:3}: loss {terms['loss']:.4f} = {spatial:.4f} + 0.1 · {frequency:.4f}")

code = inspect.getsource(train).splitlines()
print("the same in train.py, from line", code.index("    for step in range(start, stop):") + 1)

# %% [markdown]
# The loss of these 32 images falls; λ times the second term is a small part of it. Now `train.py`
# itself: the smallest run, shortened to four epochs at 32 px. A folder gets its checkpoint and
# its log. It takes a minute or two on an idle core, more on a busy one.

# %%
options = ["--img-size", "32", "--epochs", "4", "--workers", "0", "--log-every", "32"]
if QUICK:
    options += ["--shapes-count", "64", "--epochs", "1", "--steps", "2"]
with tempfile.TemporaryDirectory() as folder:
    train.main([*options, "--out", folder])
    small, about = weights.open_model(f"{folder}/last.pt")
    with open(f"{folder}/log.jsonl") as file:
        log = [json.loads(line) for line in file]

entries = [entry for entry in log if "loss" in entry]
plt.figure(figsize=(6, 2.6))
plt.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries], marker=".")
plt.xlabel("step")
plt.ylabel("loss of a batch")
plt.ylim(bottom=0)
plt.show()

# %% [markdown]
# Images that no model was trained on, reconstructed by three: the one above, which saw 32 others
# a hundred times; the short run; and the checkpoint in `checkpoints/`, the same model after 6,144
# steps. The last row is what one would show: the checkpoint's reconstruction where masked, else
# the image.
#
# Predict first: do a hundred steps on 32 images beat each image's mean colour on others?

# %%
small.eval()
model.eval()
columns = slice(40, 48)
with torch.no_grad():
    rows = {"x": x, "seen": fills["mean"], "100 steps": model(x, mask), "short run": small(x, mask),
            "checkpoint": vit(x, mask)}
    rows["composite"] = vit.reconstruct(x, mask)[3]
show([row[columns] for row in rows.values()], list(rows))
print("mean |error| of masked pixels, of images that no model was trained on")
for name in ("seen", "100 steps", "short run", "checkpoint"):
    error = losses.spatial_loss(rows[name][32:] - x[32:], pixels[32:]).item()
    print(f"  {'mean colour' if name == 'seen' else name:12}{error:.3f}")

# %% [markdown]
# A hundred steps on 32 images do worse on others than the mean colour. The short run paints
# shades that go on from block to block. The checkpoint also knows that objects go on behind the
# mask. Textures stay blurred: where many are possible, the mean of |d| is smallest for their
# median. The flat squares of 4 px are the ViT's patches: it paints hardly any detail within one.
#
# What to do next: put `--mask-ratio 0.3`, `--fill zero` or `--frequency-loss none` among the
# options, and run the cell with `train.main`, then the one after it.
# [docs/exercises.md](../docs/exercises.md) has longer runs of these: expect the direction, not the
# numbers. The second notebook asks what such a model has learned.
