"""The proof: python -m pytest -q (some minutes on two cores; no network, no GPU, no other file needed).

Golden values come from the authors' official code, run in float64; they are held here as scalars over
inputs and weights that are computed from seeds, and once more tensor by tensor where the full files lie
in ../shared/golden. Dozens of kills, stops and damages are behind SLOW=1:
SLOW=1 python -m pytest -q -s -k survives
"""
import argparse
import copy
import functools
import gzip
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

import analyze
import bench
import data
import finetune
import losses
import masking
import model as models
import optim
import protocols
import recipes
import runtime
import shapes
import train
import weights
from extras import prepare, stats, sweep, tables

SLOW = bool(os.environ.get("SLOW"))
HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "shared" / "golden"
CONFIGURE = {"train.py": recipes.pretraining, "finetune.py": protocols.finetuning}


def relative(a, b):
    """‖a − b‖ / ‖b‖."""
    a = torch.as_tensor(a, dtype=torch.float64).detach()
    b = torch.as_tensor(b, dtype=torch.float64).detach()
    return float((a - b).norm() / b.norm())


def repeat(mask, times):
    """Each block of a mask (B, h, w) repeated: (B, h·times, w·times)."""
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


# ---- golden values

def philox(seed):
    return np.random.Generator(np.random.Philox(seed))


def official_value(name, shape):
    """The weights for which the official outputs were recorded: a function of each one's name."""
    n = philox(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    leaf = name.split(".")[-1]
    if leaf == "running_var":
        return np.abs(n) * np.float32(0.1) + np.float32(1)
    if leaf == "weight" and len(shape) == 1:
        return 1 + n * np.float32(0.1)
    if leaf == "weight":
        return n * np.float32((1 / np.prod(shape[1:])) ** 0.5)
    return n * np.float32(0.1)


TO_OFFICIAL = [
    ("decoder", "neck.decoder_pred"), ("mask_token.", "backbone.mask_"), ("encoder.", "backbone."),
    # ViT
    ("patch_embed", "patch_embed.projection"), ("mlp.fc1", "ffn.layers.0.0"),
    ("mlp.fc2", "ffn.layers.1"), ("blocks.", "layers."), (".norm1", ".ln1"), (".norm2", ".ln2"),
    # ConvNeXt
    *[(f"features.{i}.", f"{('downsample_layers', 'stages')[i % 2]}.{i // 2}.") for i in range(8)],
    ("block.0", "depthwise_conv"), ("block.2", "norm"), ("block.3", "pointwise_conv1"),
    ("block.5", "pointwise_conv2"), ("layer_scale", "gamma")]


def official_name(name, value):
    """Our name and shape -> the official code's, written apart from weights.py, the other way."""
    shape = list(value.shape)
    vit = shape == [48]
    for ours, official in TO_OFFICIAL:
        name = name.replace(ours, official)
    name = name.replace("backbone.norm", "backbone.ln1" if vit else "backbone.norm3")
    if name.startswith("backbone.mask_"):
        shape = [1, 1, *shape] if vit else [1, *shape, 1, 1]
    elif name.endswith("gamma"):
        shape = shape[:1]
    return name, shape


VIT = dict(arch="vit_b", img_size=64, dim=48, depth=3, heads=4, mlp_dim=192, drop_path=0.0)
CASES = {  # model, loss, Philox seed of the target, the visible of 2×2 blocks per image
    "vit_layer0": (VIT | dict(mask_layer=0), dict(spatial="l1", frequency_weight=0.1),
                   11, [1, 0, 3, 2]),
    "vit_layer2": (VIT | dict(mask_layer=2), dict(spatial="l1", frequency_weight=0.1),
                   12, [1, 0, 1, 1]),
    "resnet50_layer3": (dict(arch="resnet50", img_size=64),
                        dict(spatial="focal_l1", frequency_weight=0.5, visible=1e-3), 13, [3, 1]),
    "convnext_tiny_layer3": (dict(arch="convnext_t", img_size=64),
                             dict(spatial="focal_l1", frequency=None), 11, [0, 2]),
}
# The official values, of tensors: their norm, and their product with cos(0), cos(1), …
SCALARS = {
    "vit_layer0": {
        "loss": 1.1827670057, "grad_norm": 0.39265315623,
        "feature": (56.039911437, -33.724410835),
        "reconstruction": (225.88833052, -106.40970866),
        "grad:backbone.mask_token": (0.11316261047, -0.039372722380),
        "grad:backbone.patch_embed.projection.weight": (0.10069973858, 0.011047484445)},
    "vit_layer2": {
        "loss": 1.1788329008, "grad_norm": 0.41017464354,
        "feature": (56.068793153, -24.364419484),
        "reconstruction": (225.81358291, -60.910074493),
        "grad:backbone.mask_token": (0.11674217259, -0.026284246381),
        "grad:backbone.patch_embed.projection.weight": (0.10084563966, 0.049826257095)},
    "resnet50_layer3": {
        "loss": 0.73745417168, "grad_norm": 69.650596857,
        "feature": (200.20006936, 6.7306483601),
        "reconstruction": (244.51560733, -75.013952299),
        "grad:backbone.mask_token": (0.019205156383, -0.00046091163695),
        "grad:backbone.mask_gamma": (0.094990428974, 0.069499397854),
        "grad:backbone.conv1.weight": (28.704793995, -2.0599841974)},
    "convnext_tiny_layer3": {
        "loss": 0.19847564736, "grad_norm": 0.18326311183,
        "feature": (79.594688132, 23.834081886),
        "reconstruction": (159.28069290, -190.44695750),
        "grad:backbone.mask_token": (0.019820316224, -0.011751776690),
        "grad:backbone.mask_gamma": (0.018865171922, 0.0038208955290),
        "grad:backbone.downsample_layers.0.0.weight": (0.0069564569951, -0.0031808721226)},
}


@pytest.mark.parametrize("case", CASES)
def test_golden_models(case):
    options, loss, seed, visible = CASES[case]
    # the official weights, brought in by our own reader
    model = models.build(**options)
    state = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            name, shape = official_name(name, value)
            state[name] = torch.from_numpy(np.asarray(official_value(name, shape)))
    report = weights.load(model, {"state_dict": state, "meta": {}})
    assert report["format"] == "OpenMixup" and not report["missing"] and not report["unused"]
    model.double().train()

    # everything the case's file holds, computed by our code from seeds
    B = len(visible)
    target = philox(seed).standard_normal((B, 3, 64, 64), dtype=np.float32)
    target = torch.from_numpy(target).double()
    mask = torch.ones(B, 4)
    mask[range(B), visible] = 0
    mask = repeat(mask.view(B, 2, 2), 32 // model.encoder.strides[model.mask_layer])
    reconstruction = model(target, mask)
    parts = losses.A2MIMLoss(**loss)(reconstruction, target, mask)
    parts["loss"].backward()
    values = dict(target=target, mask=mask, masked_image=masking.fill(target, mask),
                  feature=model.encode(target, mask), reconstruction=reconstruction,
                  loss=parts["loss"], spatial_loss=parts["spatial"])
    for name, parameter in model.named_parameters():
        name, shape = official_name(name, parameter)
        values["grad:" + name] = parameter.grad.reshape(shape)
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]
    values["grad_norm"] = torch.cat(gradients).norm()

    for name, expected in SCALARS[case].items():
        value = values[name].detach()
        if isinstance(expected, float):
            assert relative(value, expected) < 1e-8, name
        else:
            wave = torch.arange(value.numel(), dtype=torch.float64).cos()
            assert relative(value.norm(), expected[0]) < 1e-8, name
            difference = abs(value.flatten() @ wave - expected[1])
            assert difference < 1e-8 * expected[0] * wave.norm(), name
    path = GOLDEN / f"{case}.npz"
    file = np.load(path) if path.exists() else {}
    for name in file:
        assert relative(values[name], file[name]) < 1e-8, name


# (loss, norm of its gradient in pred): average, log, alpha in the order of itertools.product
FREQUENCY = {
    (21, (4, 3, 48, 48)): [
        (1.271971776, 0.01099146753), (0.8350550216, 0.007538323003),
        (1.491708355, 0.01277612477), (1.209417920, 0.01054701463),
        (0.3346507916, 0.005794120675), (0.2320485194, 0.004203726643),
        (0.3755761630, 0.006452012566), (0.2923320910, 0.005155598391)],
    (22, (3, 3, 33, 47)): [
        (1.336836055, 0.01624795597), (0.9212802963, 0.01168245724),
        (1.537240874, 0.01852274157), (1.269026376, 0.01556344081),
        (0.4763266735, 0.009969852718), (0.3468740422, 0.007562332297),
        (0.5278328399, 0.01096599874), (0.4273101895, 0.009083317869)],
}
# the same of the whole loss, λ = 0.5: spatial loss, stand-in, u, focal or the spatial loss's form
TOTAL = [
    (1.230082913, 0.008473659130), (1.659356369, 0.009698930212), (1.230113325, 0.008473740404),
    (1.659423044, 0.009698659215), (1.270335232, 0.008536258879), (1.751541094, 0.009382773754),
    (1.270335232, 0.008536259018), (1.751541096, 0.009382773923), (1.216298405, 0.008446298207),
    (1.624430792, 0.009847126752), (1.216311099, 0.008446446787), (1.624432805, 0.009847148768),
    (1.244276858, 0.008501410458), (1.692429942, 0.009573364588), (1.244268040, 0.008501322944),
    (1.692431284, 0.009573337655), (0.3011862856, 0.003406209268), (0.2673487825, 0.002709867788),
    (0.3012166978, 0.003406360157), (0.2673667866, 0.002709864663), (0.3414386044, 0.003545422436),
    (0.2942448092, 0.002705206766), (0.3414386052, 0.003545422768), (0.2942448097, 0.002705206813),
    (0.2874017782, 0.003349690573), (0.2583397593, 0.002711429790), (0.2874144719, 0.003349902306),
    (0.2583397984, 0.002711429832), (0.3153802307, 0.003464650557), (0.2764272164, 0.002708332978),
    (0.3153714125, 0.003464523206), (0.2764276262, 0.002708332894)]
SIMMIM = 1.1241691861846663


def golden_images(seed, shape):
    rng = philox(seed)
    pred = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).double()
    target = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).double()
    mask = torch.from_numpy(rng.random((4, 6, 6)) < 0.6)
    return pred.requires_grad_(), target, mask


def assert_loss(value, pred, expected):
    gradient, = torch.autograd.grad(value, pred)
    assert relative(value, expected[0]) < 1e-8
    assert relative(gradient.norm(), expected[1]) < 1e-8


@pytest.mark.parametrize("images", FREQUENCY)
def test_golden_frequency_losses(images):
    pred, target, _ = golden_images(*images)
    options = itertools.product((False, True), (False, True), (0.5, 1.0))
    for expected, (average, log, alpha) in zip(FREQUENCY[images], options, strict=True):
        assert_loss(losses.frequency_loss(pred, target, average, log, alpha), pred, expected)


def test_golden_training_losses():
    pred, target, mask = golden_images(21, (4, 3, 48, 48))
    options = itertools.product(("l1", "focal_l1"), ("mixed", "prediction", "target", "mean"),
                                (0.0, 1e-3), ("focal", None))
    for expected, (spatial, standin, visible, frequency) in zip(TOTAL, options, strict=True):
        loss = losses.A2MIMLoss(spatial, frequency or spatial, 0.5, standin, visible)
        assert_loss(loss(pred, target, mask)["loss"], pred, expected)
    simmim = losses.A2MIMLoss("l1", None)(pred, target, mask)
    assert relative(simmim["loss"], SIMMIM) < 1e-8 and simmim["frequency"] == 0


# ---- losses.py

@pytest.mark.parametrize("size", [(16, 16), (9, 12), (12, 9), (7, 5)])
def test_frequency_losses_of_single_images(size):
    """The forms of the two papers, for which the official code has no switch, by definition."""
    pred, target = torch.randn(2, 3, 3, *size, dtype=torch.float64)
    difference = torch.fft.fft2(pred, norm="ortho") - torch.fft.fft2(target, norm="ortho")
    D = difference.abs()
    paper = losses.frequency_loss(pred, target, average=False, log=False, maximum=None)
    assert relative(paper, (D * D ** 2).mean()) < 1e-12
    w = torch.log(1 + D)
    w = w / w.amax((2, 3), keepdim=True)
    per_image = losses.FREQUENCY["focal_per_image"](pred - target)
    assert relative(per_image, (w * D ** 2).mean()) < 1e-12
    assert losses.frequency_loss(pred, pred) == 0               # no 0/0 where there is no error


# ---- masking.py

def test_random_mask():
    for grid, ratio, masked in ((7, 0.6, 30), (2, 0.6, 3), (10, 0.07, 7), (6, 0.6, 22)):
        mask = masking.random_mask(5, grid, ratio)
        assert mask.shape == (5, grid, grid) and set(mask.unique().tolist()) == {0, 1}
        assert mask.sum((1, 2)).tolist() == [masked] * 5        # ceil(ratio · grid²) of each image
    share = masking.random_mask(20000, 4, 0.5).mean(0)
    assert (share - 0.5).abs().max() < 0.02                     # uniform: 5 standard errors
    # an image's own generator draws it
    masks = masking.random_mask(3, 7, 0.6, [data.generator(i) for i in range(3)])
    assert torch.equal(masks[2:], masking.random_mask(1, 7, 0.6, data.generator(2)))


@pytest.mark.parametrize("blocks,times", [(7, 32), (3, 7), (6, 1)])
def test_resize_repeats_blocks(blocks, times):
    mask = torch.arange(4 * blocks).view(2, 2, blocks)          # not even square
    larger = repeat(mask, times)
    assert torch.equal(masking.resize(mask, larger.shape[1:])[:, 0].long(), larger)
    assert torch.equal(masking.resize(larger, mask.shape[1:])[:, 0].long(), mask)


# ---- model.py

def test_simmims_token_replaces():
    z = torch.randn(2, 5, 4, 4)
    mask = masking.random_mask(2, 2, 0.6)
    token = models.MaskToken(5, "replace")
    masked = repeat(mask, 2)[:, None] > 0
    assert torch.equal(token(z, mask), torch.where(masked, token.token.view(5, 1, 1), z))


def test_reconstruct():
    image = torch.randn(2, 3, 32, 32)
    mask = masking.random_mask(2, 4, 0.6)
    masked = repeat(mask, 8)[:, None] > 0
    model = models.build("vit_nano", 32, token="none", fill="none").eval()
    seen, reconstruction, composite = model.reconstruct(image, mask)[1:]
    assert torch.equal(seen, torch.where(masked, 0, image))
    assert torch.equal(reconstruction, model.decoder(model.encoder(image)))
    assert torch.equal(composite, torch.where(masked, reconstruction, image))


# classifiers of 1000 classes, in millions of parameters, as published (DeiT: with our extras)
SIZES = {"vit_s": 48.8, "vit_b": 86.7, "vit_l": 304.6, "deit_t": 5.7, "deit_s": 22.1,
         "resnet18": 11.7, "resnet34": 21.8, "resnet50": 25.6, "resnet101": 44.5,
         "resnet152": 60.2, "resnet200": 64.7, "convnext_t": 28.6, "convnext_s": 50.2,
         "convnext_b": 88.6, "swin_t": 28.3}


def test_presets_have_the_published_sizes():
    for arch, millions in SIZES.items():
        with torch.device("meta"):
            model = models.Predictor(models.build(arch).encoder, 1000)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.06), arch


def test_initialisation():
    vit = models.build("vit_b", 32, dim=32, depth=3, heads=2, mlp_dim=64)
    blocks = vit.encoder.blocks
    assert blocks[0].gamma_1.unique().item() == pytest.approx(0.1)
    assert [block.drop_path.p for block in blocks] == pytest.approx([0, 0.05, 0.1])
    assert (blocks[0].attn.relative_position_bias_table == 0).all()
    assert vit.mask_token.token.std() < 0.06 and (vit.decoder[0].bias == 0).all()
    resnet = models.build("resnet50", 64, depths=(2, 1, 1, 1), drop_path=0.4)
    blocks = list(itertools.chain(*resnet.encoder.layers))
    assert [block.drop_path.p for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert all((block.bn3.weight == 0).all() for block in blocks)
    std = blocks[0].conv1.weight.std().item()
    assert std == pytest.approx((2 / 64) ** 0.5, rel=0.1)       # fan_out


def test_convnext():
    """torchvision's; the token, from zero, enters before stage 4, after its downsampling."""
    model = models.build("convnext_t", 64, drop_path=0.4).eval()
    encoder = model.encoder
    assert encoder.widths == [96, 192, 384, 768, 768]
    assert encoder.strides == [4, 8, 16, 32, 32] and model.mask_layer == 3
    assert torch.equal(model.mask_token.token, torch.zeros(768))
    assert torch.equal(model.mask_token.gamma, torch.full((768,), 1e-6))
    assert encoder.features[2][1].weight.std().item() == pytest.approx(0.02, rel=0.05)
    drops = [m.p for m in encoder.modules() if isinstance(m, models.StochasticDepth)]
    assert drops == pytest.approx(np.linspace(0, 0.4, len(drops)))
    image = torch.randn(2, 3, 64, 64)
    theirs = encoder.features(image).movedim(1, -1)
    assert torch.equal(encoder(image), encoder.norm(theirs).movedim(-1, 1))


@torch.no_grad()
def test_classifier_on_the_class_token():
    """As the published DeiT-S on ImageNet-100: without biases of q and v, blind to other tokens."""
    encoder = models.build("vit_nano", 32, qv_bias=False).encoder
    assert not any(name.endswith(("q_bias", "v_bias")) for name in encoder.state_dict())
    model = models.Predictor(encoder, 1000, "token", head_std=0.02).eval()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    image = torch.randn(2, 3, 32, 32)
    logits = model(image)
    for token in range(65):
        def change(block, inputs, z):
            z[:, token, 0] += 1
        hook = encoder.blocks[-1].register_forward_hook(change)
        assert torch.equal(model(image), logits) == (token > 0)
        hook.remove()


def test_drop_path_drops_branches_of_single_images():
    vit = models.Block(8, 2, 16, 0.5, None, None)
    encoder = models.ResNet(32, block=models.Basic, depths=(1, 1, 1, 2), width=8, drop_path=0.5)
    resnet = encoder.layer4[1]                                  # the last block
    torch.nn.init.ones_(resnet.bn2.weight)
    # a ViT's block is its input where both branches are dropped, a ResNet's where its one is
    for block, x, share in ((vit, torch.randn(400, 3, 8), 0.25),
                            (resnet, torch.rand(400, 64, 1, 1), 0.5)):
        same = (block.train()(x) == x).flatten(1).all(1)
        assert same.float().mean().item() == pytest.approx(share, abs=0.1)
        assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_dense_predictions():
    """Each position predicts its own s×s pixels."""
    model = models.Predictor(models.build("vit_nano", 32).encoder, 2, "none")
    image = torch.randn(2, 3, 32, 32)
    z = model.fc_norm(model.encoder(image)[1, :, 2, 1])
    assert torch.allclose(model(image)[1, :, 8:12, 4:8], model.head(z).view(2, 4, 4), atol=1e-6)


IMAGE = torch.zeros(2, 3, 40, 40)
MASK = torch.ones(2, 3, 3)
REFUSED = [
    (masking.fill, (IMAGE, MASK), "does not divide"),
    (losses.A2MIMLoss(), (IMAGE, IMAGE, MASK), "does not divide"),
    (models.ViT(32, dim=8, depth=1, heads=1), (IMAGE,), "built for images of 32"),
    (models.build("resnet_nano", 32), (IMAGE[..., :30], MASK), "multiples of 8"),
    (models.Predictor, (models.build("resnet_nano", 32).encoder, 3, "token"), "needs a ViT"),
]


@pytest.mark.parametrize("call,arguments,says", REFUSED)
def test_what_does_not_fit_is_refused(call, arguments, says):
    with pytest.raises(ValueError, match=says):
        call(*arguments)


# ---- shapes.py

def test_shapes_know_pose_and_mask():
    world = shapes.Shapes(48)
    large = shapes.Shapes(96)
    for index in range(40):
        s = world.sample(index)
        assert s["label"] == index % 10 == world.labels[index]
        # the mask lies within the pose's circle, and is the same thing at any size
        x, y, radius, angle = s["pose"].tolist()
        rows, columns = s["mask"].nonzero(as_tuple=True)
        far = torch.hypot(columns + 0.5 - x * 48, rows + 0.5 - y * 48).max()
        assert 0.7 < far / (radius * 48) < 1.15 and 0 <= angle < 2 * math.pi
        mask = F.max_pool2d(large.sample(index)["mask"][None].float(), 2)[0].bool()
        assert (mask ^ s["mask"]).float().mean() < 0.06
    spectrum = np.abs(np.fft.fft2(world.textures))[:, 0].mean(0)
    assert spectrum[2] / spectrum[16] == pytest.approx(8, rel=0.3)          # amplitude falls as 1/f
    assert not torch.equal(world[0][0], shapes.Shapes(48, "val")[0][0])


CROPS = dict(img_size=16, crop_scale=(0.5, 1.0), mask="random", mask_size=4, mask_ratio=0.6)


# ---- the stream of samples

def stream(source, world=1, micro=12, workers=0, start=0, seed=0):
    """Hashes of what a run's first six steps would see, in the order of the batch."""
    crops = data.Crops(source, CROPS, seed)
    ranks = []
    for rank in range(world):
        batches = data.Batches(len(source), 12, micro, start, 6, seed, rank, world)
        ranks.append(data.loader(crops, batches, workers))
    hashes = []
    for micro_batches in zip(*ranks, strict=True):
        for images, masks, _ in micro_batches:
            for image, mask in zip(images, masks):
                hashes.append(zlib.crc32(image.numpy().tobytes() + mask.numpy().tobytes()))
    return hashes


def test_stream_depends_on_nothing_but_the_seed():
    source = shapes.Shapes(16, count=40)
    expected = stream(source)
    assert len(expected) == 72 and len(set(expected)) == 72     # no two crops alike
    for same in (dict(micro=4), dict(world=3, micro=2), dict(world=2, micro=3, workers=1)):
        assert stream(source, **same) == expected, same
    assert stream(source, start=4) == expected[48:]             # continued, in another epoch
    assert set(stream(source, seed=1)).isdisjoint(expected)


def test_the_stream_is_that_of_the_first_version():
    values = []
    for batch in data.Batches(40, 12, 12, 0, 6, 1):
        for epoch, position, index in batch:
            draw = data.generator(1, epoch, position)
            values.append((epoch, position, index, data.crop_box(60, 80, (0.5, 1.0), draw)))
            values.append(masking.random_mask(1, 4, 0.6, [draw]).int().tolist())
    assert zlib.crc32(repr(values).encode()) == 213712808
    # where none of ten boxes fits, the largest
    assert data.crop_box(8, 400, (0.9, 1.0), data.generator(0))[0] == (0, 194, 8, 11)


def test_batches_cover_each_epoch_once():
    epochs, positions, indices = zip(*sum(data.Batches(10, 3, 3, 0, 6), []))
    assert epochs == (0,) * 9 + (1,) * 9 and positions == (*range(9), *range(9))
    assert len(set(indices[:9])) == len(set(indices[9:])) == 9 and indices[:9] != indices[9:]
    batches = list(data.Batches(30, 12, 4, 0, 2, repeats=3))    # repeats are spread over a batch
    assert all(len({index for _, _, index in batch}) == 4 for batch in batches)
    repeated = [index for batch in batches for _, _, index in batch]
    assert sorted(repeated) == sorted([*set(repeated)] * 3) and len(repeated) == 24


# ---- crops and pixels

def test_crops_are_pils():
    """The same boxes cut by PIL differ by rounding only."""
    image = shapes.Shapes(300, count=1)[0][0]
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    for kind, scale in ((data.BILINEAR, (0.67, 1.0)), (data.BICUBIC, (0.08, 0.2))):
        for seed in range(6):
            ours = data.random_resized_crop(image, 112, scale, data.generator(seed), kind)
            box, flip = data.crop_box(300, 300, scale, data.generator(seed))
            expected = data.TF.pil_to_tensor(data.TF.resized_crop(photo, *box, [112, 112], kind))
            expected = expected.flip(-1) if flip else expected
            assert (expected.float() - ours).abs().mean() < 0.3


def test_evaluation_crop_and_normalize():
    image = torch.randint(0, 256, (3, 60, 100), dtype=torch.uint8)
    resized = v2.Resize(48, v2.InterpolationMode.BICUBIC, antialias=True)(image)
    assert torch.equal(data.evaluation_crop(image, 48, 40), v2.CenterCrop(40)(resized))
    strip = torch.randint(0, 256, (3, 2, 4000), dtype=torch.uint8)      # its middle is what it was
    resized = data.TF.resize(strip, [32], data.BICUBIC, antialias=True)
    assert torch.equal(data.evaluation_crop(strip, 32, 32), data.TF.center_crop(resized, [32, 32]))
    # normalised, and back
    batch = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(data.denormalize(data.normalize(batch)), batch)
    torch.testing.assert_close(data.normalize(batch)[:, 1], (batch[:, 1] / 255 - 0.456) / 0.224)


# ---- folders and formats

def write_images(folder, names, size=(40, 30)):
    for i, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(folder)


def tar_of(path, root, names):
    """The files under `root` with these names, as a tar, in this order."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.add(os.path.join(root, name), name, recursive=False)
    return str(path)


SPLIT = ["train/cat/1.jpg", "train/dog/x/2.PNG", "val/cat/3.jpg", "val/dog/4.jpg", "val/dog/5.bmp"]
UNSPLIT = [f"{'cat' if i % 2 else 'dog'}/{i:03}.png" for i in range(40)]
FLAT = [f"é {i}.png" for i in range(5)]


@pytest.mark.parametrize("names,lengths,classes", [
    (SPLIT, [2, 3, 3, 5], ["cat", "dog"]), (UNSPLIT, [32, 8, 40, 40], ["cat", "dog"]),
    (FLAT, [4, 1, 5, 5], [])])
def test_folders_tars_and_what_prepare_makes_of_them(names, lengths, classes, tmp_path):
    root = write_images(tmp_path / "folder", names, size=(120, 90))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(root, ".")                                      # ./train/cat/1.jpg, and folders
    os.symlink(root, Path(root, "again"))                       # round in circles
    prepare.main([root, str(tmp_path / "small.tar"), "--size", "80", "--workers", "2"])
    for split, length in zip(("train", "val", "test", "all"), lengths):
        folder = data.open_source(root, split, 32)
        assert len(folder) == length and (folder.classes == classes or split == "all")
        assert set(folder.labels) == set(range(len(folder.classes)) or [-1])
        tar = data.open_source(str(tmp_path / "t.tar"), split, 32)
        small = data.open_source(str(tmp_path / "small.tar"), split, 32)
        assert tar.paths.tolist() == folder.paths.tolist()
        assert folder.classes == tar.classes == small.classes
        assert folder.labels.tolist() == tar.labels.tolist() == small.labels.tolist()
        for i in range(length):
            image, label = folder[i]
            assert torch.equal(tar[i][0], image) and tar[i][1] == small[i][1] == label
            assert os.path.splitext(small.paths[i])[0] == os.path.splitext(folder.paths[i])[0]
            expected = data.TF.resize(image, [80], data.BICUBIC, antialias=True)
            assert small[i][0].shape == expected.shape == (3, 80, 106)
            assert (small[i][0].float() - expected).mean((1, 2)).abs().max() < 3    # JPEG, of noise
    assert set(data.Folder(root, "train").paths).isdisjoint(data.Folder(root, "val").paths)


@pytest.mark.filterwarnings("error")                            # the decoders' must not reach users
@pytest.mark.parametrize("decoder", [data.decode_image, None, Mock(side_effect=RuntimeError)])
def test_image_formats(decoder, tmp_path, monkeypatch):
    """With torchvision's decoders, as if they had gone, and where they refuse."""
    monkeypatch.setattr(data, "decode_image", decoder)
    squares = np.array([[0, 80], [160, 240]], dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    picture = Image.fromarray(squares)
    expected = torch.from_numpy(squares).expand(3, 32, 32)
    for name in ("L.jpg", "CMYK.jpg", "P.png", "RGBA.png", "P.gif", "RGB.bmp", "L.tif", "RGB.webp"):
        picture.convert(name.split(".")[0]).save(tmp_path / name)
        image = data.read_image(str(tmp_path / name))
        assert image.shape == expected.shape and image.dtype == torch.uint8, name
        assert (image.float() - expected).abs().mean() < 2, name
    # 16 bits, and arrays
    deep = 257 * squares.astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    np.save(tmp_path / "array.npy", squares[..., None].repeat(3, 2))
    for name in ("deep.png", "deep.tif", "array.npy"):
        assert torch.equal(data.read_image(str(tmp_path / name)), expected), name
    exif = Image.Exif()
    exif[0x0112] = 6                                            # shot with the camera turned
    for name in ("turned.jpg", "turned.png"):
        picture.save(tmp_path / name, exif=exif)
        assert data.read_image(str(tmp_path / name))[0, 4, 4] > 140


def odd_images(folder):
    """Images as they are met in the wild. Returns the names of those nobody could read."""
    folder.mkdir(parents=True)
    picture = Image.fromarray(shapes.Shapes(40)[3][0].permute(1, 2, 0).numpy())
    picture.save(folder / "mislabelled.jpg", "PNG")
    file = io.BytesIO()
    picture.save(file, "JPEG")
    whole = file.getvalue()
    bad = {
        "truncated.jpg": whole[:500],
        # its header says 50,000 × 50,000 pixels, not 40 × 40
        "bomb.jpg": whole.replace(bytes([8, 0, 40, 0, 40]), bytes([8, 195, 80, 195, 80])),
        "empty.jpg": b"",
        "text.png": b"<html>404 Not Found</html>",
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    np.save(folder / "floats.npy", np.zeros((4, 4)))
    (folder / "link.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")                              # reading it would take for ever
    return {*bad, "floats.npy", "link.jpg", "pipe.jpg"}


def test_odd_images_are_read_or_replaced_by_the_same_others(tmp_path, monkeypatch, capfd):
    started = Mock()                                            # as Pillow would for the EPS file
    monkeypatch.setattr(subprocess, "Popen", started)
    bad = odd_images(tmp_path / "a")
    for name in bad:
        with pytest.raises(data.BadImage, match=f"{name} is no readable image") as error:
            data.read_image(str(tmp_path / "a" / name))
        assert ("Bomb" in str(error.value)) == ("bomb" in name)
    assert not started.called
    image = data.read_image(str(tmp_path / "a" / "mislabelled.jpg"))
    assert torch.equal(image, shapes.Shapes(40)[3][0])

    write_images(tmp_path / "b", FLAT)
    source = data.Folder(str(tmp_path), "test")
    assert stream(source) == stream(source, world=2, micro=3, workers=2)
    capfd.readouterr()
    for index in range(len(source)):
        name = os.path.basename(source.where(index))
        assert data.readable(source, index, 7)[1] == (name in bad), name
    said = capfd.readouterr().err
    assert said.count("; another image takes its place\n") == len(said.splitlines()) == len(bad)
    source.paths = source.paths[[source.paths.tolist().index(b"a/empty.jpg")]]
    with pytest.raises(data.BadImage, match="empty.jpg is no .*a hundred more, drawn from 1"):
        data.readable(source, 0, 7)

    # prepare leaves them out
    np.save(tmp_path / "b/bands.npy", np.full((99, 99, 13), range(13), np.uint8))
    write_images(tmp_path / "b", ["1.png", "1.jpg"], size=(100, 100))       # both become 1.jpg
    count, left_out = prepare.prepare(str(tmp_path), str(tmp_path / "out.tar"))
    assert {os.path.basename(line.split(" is no readable")[0]) for line in left_out} == bad
    tar = data.Folder(str(tmp_path / "out.tar"), "test")
    assert len(tar) == count == len(FLAT) + 4
    bands = tar[tar.paths.tolist().index(b"b/bands.npy")][0]
    assert bands.shape == (13, 99, 99) and bands[:, 0, 0].tolist() == [*range(13)]
    small = tar[tar.paths.tolist().index("b/é 0.png".encode())][0]          # PNG: no loss
    assert torch.equal(small, data.read_image(str(tmp_path / "b/é 0.png")))


# ---- downloads, channels, statistics

def downloaded(cls, **contents):
    """A data set of torchvision, as if it were on the disk."""
    def init(self, root, download, transform, **split):
        vars(self).update(contents, transform=transform, target_transform=None)
    return type(cls.__name__, (cls,), dict(__init__=init))


def test_downloads(monkeypatch):
    pixels = np.arange(96, dtype=np.uint8).reshape(2, 3, 4, 4)
    cifar = dict(data=pixels.transpose(0, 2, 3, 1), targets=[0, 1])
    stl = dict(data=pixels, labels=np.array([0, -1]))
    for cls, contents in ((torchvision.datasets.CIFAR10, cifar), (torchvision.datasets.STL10, stl)):
        monkeypatch.setattr(torchvision.datasets, cls.__name__, downloaded(cls, **contents))
        source = data.open_source(cls.__name__.lower(), "train", 4)
        image, label = source[1]
        assert torch.equal(image, torch.from_numpy(pixels[1])) and label == source.labels[1]
    unreachable = Mock(side_effect=OSError("no route to host\nmore"), __name__="CIFAR100")
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", unreachable)
    with pytest.raises(ValueError, match="^CIFAR100 cannot be downloaded .*: no route to host$"):
        data.open_source("cifar100", "val", 4)


def test_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    colour.save(tmp_path / "b.png")
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 13), dtype=np.uint8))
    np.save(tmp_path / "c.npy", pixels[..., 0])
    one, three, many = [data.open_source(str(tmp_path), "test", 32, n) for n in (1, 3, 13)]
    luma = torch.from_numpy(np.array(colour.convert("L"))).int()
    assert one[1][0].dtype == torch.uint8 and (one[1][0] - luma).abs().max() <= 1
    assert torch.equal(three[2][0], one[2][0].expand(3, -1, -1))
    assert many[0][0].shape == (13, 8, 8) and many.labels.tolist() == [-1] * 3


def test_stats_by_hand(tmp_path, capsys):
    for i in range(6):                                          # large ones count as much as small
        for name in (f"train/{'ab'[i % 2]}/{i}.png", f"val/a/{i}.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 8 + i), (51 * i, 255, 0)).save(tmp_path / name)
    (tmp_path / "train/a/broken.png").write_bytes(b"no image")
    stats.main([str(tmp_path)])
    said = capsys.readouterr().out
    for words in ("--channels 3 --mean 0.500 1.000 0.000 --std 0.342 0.000 0.000",
                  "train: 7 images, 2 classes of 3 to 4", "val: 6 images", "8 to 13 px high",
                  "broken.png is no readable image"):
        assert words in said


def test_images_in_a_folder_and_beside_it(tmp_path):
    """Names in any bytes; images in no folder have no class."""
    names = ["bird/1.jpg", "a/2.png", "3.jpg", os.fsdecode(b"a/\xff.jpg"), "c/notes.txt"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    folder = data.Folder(str(tmp_path), "all")
    assert folder.paths.tolist() == [b"3.jpg", b"a/2.png", b"a/\xff.jpg", b"bird/1.jpg"]
    assert folder.classes == ["a", "bird"] and folder.labels.tolist() == [-1, 0, 0, 1]
    assert os.path.exists(folder.where(2))


# ---- tars

@pytest.fixture
def unsplit(tmp_path):
    root = write_images(tmp_path / "folder", UNSPLIT)
    return root, tar_of(tmp_path / "t.tar", root, UNSPLIT)


def test_tars_as_others_write_them(tmp_path):
    """Shards as img2dataset names them: in order of their names, other members passed over."""
    shards = tmp_path / "shards"
    for shard, split in ((2, "val"), (0, "train"), (1, "train")):
        names = [f"{shard}{i}.png" for i in (4, 3, 2, 1, 0)]    # not sorted: as the tar has them
        root = write_images(tmp_path / str(shard), names)
        Path(root, "a.json").write_text("{}")
        (shards / split).mkdir(parents=True, exist_ok=True)
        tar_of(shards / split / f"{shard:05}.tar", root, [*names, "a.json"])
    expected = [f"{shard}{i}.png" for shard in (0, 1, 2) for i in (4, 3, 2, 1, 0)]
    for split, names in (("train", expected[:10]), ("val", expected[10:])):
        source = data.open_source(str(shards), split, 32)
        assert [os.path.basename(source.where(i)) for i in range(len(source))] == names
        assert source.classes == [] and source[3][0].shape == (3, 30, 40)

    # long names, links, duplicates
    long = "cat/" + "long name " * 24 + "é.png"                 # more than a plain header holds
    root = write_images(tmp_path / "folder", [long, "dog/a.png", "dog/c.png"])
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(f"{root}/dog/a.png", "./dog/first.png")
        tar.add(f"{root}/{long}", "/" + long)
        for special in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"cat/special{ord(special)}.png")
            member.type = special
            member.linkname = "dog/first.png"
            tar.addfile(member)
        tar.add(f"{root}/dog/c.png", "dog/first.png")           # again: this one counts
    source = data.Folder(str(tmp_path / "t.tar"), "test")
    assert [os.fsdecode(name) for name in source.paths] == [long, "dog/first.png"]
    for i, name in enumerate((long, "dog/c.png")):
        assert torch.equal(source[i][0], data.read_image(os.path.join(root, name)))


def test_the_index_is_kept_and_made_anew(unsplit, monkeypatch, capsys):
    root, path = unsplit

    def scans():
        """Whether all of the tar is read when another process opens it."""
        data.tar_index.cache_clear()
        scan = Mock(wraps=tarfile.open)
        with monkeypatch.context() as patch:
            patch.setattr(tarfile, "open", scan)
            source = data.Folder(path, "test")
        expected = data.read_image(os.path.join(root, os.fsdecode(source.paths[7])))
        assert len(source) == 40 and torch.equal(source[7][0], expected)
        return scan.called

    assert scans() and not scans()
    index = Path(path + ".index.npz")
    content = index.read_bytes()
    flipped = content[:300] + bytes([content[300] ^ 1]) + content[301:]
    for damaged in (b"", content[:-30], b"text", flipped):
        index.write_bytes(damaged)
        assert scans() and not scans()
    tar_of(path, root, UNSPLIT[::-1])                           # other content
    assert scans() and not scans()
    # where the folder cannot be written to (root may write anywhere)
    index.unlink()
    monkeypatch.setattr(np, "savez", Mock(side_effect=PermissionError(13, "not permitted")))
    assert scans()
    assert "t.tar.index.npz cannot be written (not permitted)" in capsys.readouterr().err


def test_a_tar_that_is_none_or_was_cut(unsplit):
    path = unsplit[1]
    content = Path(path).read_bytes()
    offsets = data.Folder(path, "test").members[:, 1].tolist()
    # within a header, at the end of a member, within an image
    cuts = (0, 100, offsets[2] - 300, offsets[2] - 512, offsets[-1] + 10)
    damaged = [content[:cut] for cut in cuts]
    for content in [*damaged, gzip.compress(content), b"no tar " * 1000]:
        Path(path).write_bytes(content)
        with pytest.raises(ValueError, match="t.tar is no plain tar, or was cut: .*gunzip"):
            data.open_source(path, "train", 32)


def test_a_tar_in_loader_processes_and_one_that_changes(unsplit):
    root, path = unsplit
    source = data.Folder(path, "test")
    expected = stream(source)                                   # the file is open now
    assert stream(source, workers=2) == expected
    source = pickle.loads(pickle.dumps(source))                 # what a process started anew gets
    data.open_tar.cache_clear()
    assert stream(source) == expected
    os.replace(tar_of(path + ".other", root, UNSPLIT[20:]), path)
    assert stream(source) == expected                           # the open file is the old one
    data.open_tar.cache_clear()                                 # another process opens the new one
    with pytest.raises(ValueError, match="t.tar: the archive changed; start again"):
        source[3]
    source = data.Folder(path, "test")
    os.truncate(path, 9999)
    with pytest.raises(ValueError, match="the archive changed") as error:
        source[19]
    assert not isinstance(error.value, data.BadImage)           # no other takes its place


# ---- prepare.py

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_prepare_leaves_a_complete_tar_or_none(error, tmp_path, monkeypatch):
    root = write_images(tmp_path / "folder", UNSPLIT)

    def fail_in_the_middle(path):
        if "dog" in path:       # after twenty cats; a power cut would leave as much
            assert sorted(os.listdir(tmp_path)) == ["folder", "out.tar.partial"]
            raise error
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(data, "read_image", fail_in_the_middle)
    with pytest.raises(type(error)):
        prepare.prepare(root, str(tmp_path / "out.tar"))
    assert os.listdir(tmp_path) == ["folder"]


# ---- weights.py

IMAGE = torch.randn(2, 3, 64, 64, generator=data.generator(1))
MASK = masking.random_mask(2, 2, 0.6, data.generator(0))
# small encoders; a test adds one to the presets under the name "peer"
SMALL = dict(dim=48, depth=3, heads=4, mlp_dim=192)
PEER_VIT = SMALL | dict(arch="vit_b", img_size=64, drop_path=0.0)
BASIC = dict(block=models.Basic, depths=(2, 1, 1, 1))
BOTTLENECK = dict(block=models.Bottle, depths=(1, 2, 1, 1))


def random_weights(module, seed=0):
    """Every tensor filled with something of its own, so that no zero or one hides a slip."""
    g = data.generator(seed)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if not t.is_floating_point():
                continue
            matrix = t.ndim in (2, 4) and "table" not in name
            t.copy_(torch.randn(t.shape, generator=g) * (t[0].numel() ** -0.5 if matrix else 0.1))
            if t.ndim == 1 and ("weight" in name or "var" in name or "gamma" in name):
                t.add_(1)
    return module.eval()


@pytest.fixture
def exported(tmp_path, capsys):
    """Runs the export command, then the Python that it prints: the other library's model."""
    def run(state, to, *options):
        source = str(tmp_path / "in.pt")
        out = str(tmp_path / f"{len(os.listdir(tmp_path))}.pt")
        torch.save(state, source)
        capsys.readouterr()
        weights.main(["export", source, "--to", to, out, *options])
        lines = capsys.readouterr().out.splitlines()[1:]
        names = {}
        exec("\n".join(line.strip() for line in lines), names)  # loads with strict=True
        return names["model"].eval()
    return run


def test_load_reports():
    model = models.build("vit_nano", 32)
    state = random_weights(models.build("vit_nano", 32)).state_dict()
    encoder = {name: value for name, value in state.items() if name.startswith("encoder.")}
    report = weights.load(model, encoder | {"head.weight": torch.ones(3)})
    assert report["missing"] == ["mask_token.token", "decoder.0.weight", "decoder.0.bias"]
    assert report["unused"] == ["head.weight"]
    # an average goes before the weights that it is of
    ema = {name: value + 1 for name, value in state.items()}
    weights.load(model, {"model": state, "ema": ema})
    assert all(torch.equal(value, ema[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change,says", [
    (dict(depth=4), "has no encoder.blocks.3.norm1.weight: is it of another architecture?"),
    (dict(rel_pos_bias=False), "has encoder.blocks.0.attn.relative_position_bias_table (52, 4)"),
])
def test_another_encoder_is_refused(change, says):
    """What a file has and a model has not is never dropped silently: the features would differ."""
    model = models.build(**PEER_VIT | change)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="^it.*" + re.escape(says)):
        weights.load(model, models.build(**PEER_VIT).state_dict(), "it")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Harm:
    """What runs code when it is unpickled naively."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_files_is_never_run(zipped, tmp_path, monkeypatch):
    """A checkpoint that would run code, and an honest one with objects in it: one clear line."""
    monkeypatch.chdir(tmp_path)
    for extra in (np.float64(1), Harm()):
        torch.save({"x": extra}, "it.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="objects beside tensors, which are never run"):
            weights.open_model("it.pt", "vit_nano")
    assert os.listdir() == ["it.pt"]
    torch.load("it.pt", weights_only=False)
    assert os.path.isdir("harm")  # it would have


# ---- weights.py: other projects

EXPORTED = {  # library, architecture, what the small one changes in its preset, pooling
    "BEiT": ("timm", "vit_b", SMALL, "mean"),
    "ViT without positions": ("timm", "vit_b", SMALL | dict(abs_pos=False), "mean"),
    "plain ViT": ("timm", "vit_b", SMALL | dict(rel_pos_bias=False, layer_scale=None), "mean"),
    "DeiT-S of ImageNet-100": ("timm", "vit_b", SMALL | dict(qv_bias=False), "token"),
    "BasicBlock": ("timm", "resnet50", BASIC, "mean"),
    "Bottleneck": ("torchvision", "resnet50", BOTTLENECK, "mean"),
    "ConvNeXt": ("torchvision", "convnext_t", {}, "mean"),
    "Swin": ("torchvision", "swin_t", {}, "mean"),
}


def features_of(peer):
    """(B, D): the mean over positions of what another library's model sees in the image."""
    if hasattr(peer, "blocks"):
        return peer.forward_features(IMAGE)[:, 1:].mean(1)
    if isinstance(peer, torchvision.models.SwinTransformer):
        return peer.norm(peer.features(IMAGE)).mean((1, 2))
    if isinstance(peer, torchvision.models.ConvNeXt):
        return peer.classifier[0](peer.features(IMAGE)).mean((2, 3))
    return peer(IMAGE)


@torch.no_grad()
@pytest.mark.parametrize("row", EXPORTED)
@pytest.mark.parametrize("tuned", [False, True])
def test_other_libraries_both_ways(row, tuned, exported, tmp_path, monkeypatch):
    """Out by the command; what its Python built, with other weights, in again."""
    library, arch, changes, pool = EXPORTED[row]
    pytest.importorskip(library)
    monkeypatch.setitem(models.PRESETS, "peer", models.PRESETS[arch] | changes)

    def same(model, peer):
        if tuned and row != "Swin":  # it normalises before the mean over positions, we after
            return relative(model(IMAGE), peer(IMAGE)) < 1e-5
        return relative(model.encoder(IMAGE).mean((2, 3)), features_of(peer)) < 1e-5

    model = models.build("peer", 64)
    if tuned:
        model = random_weights(models.Predictor(model.encoder, 7, pool))
        state = {"model": model.state_dict(), "config": dict(arch="peer", img_size=64)}
        peer = exported(state, library)
    else:  # from a file that does not say what it is
        state = random_weights(model).state_dict()
        peer = exported(state, library, "--arch", "peer", "--img-size", "64")
    assert same(model, peer)
    if tuned and row == "Swin":
        return
    torch.save(random_weights(peer, seed=2).state_dict(), tmp_path / "it.pth")
    model, about = weights.open_model(tmp_path / "it.pth", "peer", 64)
    assert not about["unused"] and about["run"] == {} and same(model.eval(), peer)


@torch.no_grad()
@pytest.mark.parametrize("scales", [None, 0.1])
def test_vits_of_timm_and_mae(scales, tmp_path, monkeypatch):
    """Into a ViT of the same switches, and into one of all. MAE's files hold a decoder, too."""
    timm = pytest.importorskip("timm")
    peer = random_weights(timm.models.VisionTransformer(
        img_size=64, embed_dim=48, depth=3, num_heads=4, num_classes=7, init_values=scales))
    mae = {"mask_token": torch.ones(1, 1, 32), "decoder_embed.weight": torch.ones(32, 48),
           "decoder_blocks.0.attn.qkv.bias": torch.ones(96), "decoder_pred.bias": torch.ones(768)}
    torch.save({"model": mae | peer.state_dict()}, tmp_path / "it.pth")
    for options in (dict(rel_pos_bias=False, layer_scale=scales), {}):
        monkeypatch.setitem(models.PRESETS, "peer", models.PRESETS["vit_b"] | SMALL | options)
        model, about = weights.open_model(tmp_path / "it.pth", "peer")
        assert about["format"] == "ViT of timm, BEiT or MAE" and about["unused"] == list(mae)
        assert bool(about["neutral"]) == (not options)
        assert about["size"] == 64 and model.pool == "token"
        assert relative(model.eval()(IMAGE), peer(IMAGE)) < 1e-5
    # a head on the class token means nothing on the mean over patches, and the other way round
    mean = models.Predictor(models.build("peer", 64).encoder, 7)
    report = weights.load(mean, peer.state_dict())
    assert report["unused"] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert weights.load(model, mean.state_dict())["missing"] == ["head.weight", "head.bias"]
    # another size than the file's, on request
    assert weights.open_model(tmp_path / "it.pth", "peer", 96)[1]["size"] == 96


@torch.no_grad()
def test_simmim(tmp_path, monkeypatch):
    """A file as SimMIM's code writes it: one table for all blocks, no absolute positions."""
    shared = random_weights(models.build(**PEER_VIT, abs_pos=False, token="replace", fill="none"))
    table = shared.encoder.blocks[0].attn.relative_position_bias_table
    simmim = {"encoder.rel_pos_bias.relative_position_bias_table": table.data,
              "encoder.rel_pos_bias.relative_position_index": models.relative_position_index(4),
              "encoder.mask_token": shared.mask_token.token.view(1, 1, -1)}
    for block in shared.encoder.blocks:
        block.attn.relative_position_bias_table.copy_(table)
    for name, value in shared.state_dict().items():
        if "relative" not in name and "mask_token" not in name:
            simmim[name.replace("patch_embed.", "patch_embed.proj.")] = value
    torch.save({"model": simmim, "epoch": 3}, tmp_path / "simmim.pth")
    monkeypatch.setitem(models.PRESETS, "peer", models.PRESETS["vit_b"] | SMALL)
    model, about = weights.open_model(tmp_path / "simmim.pth", "peer", 64)  # replaces tokens
    assert about["format"] == "SimMIM" and not about["unused"] and not about["missing"]
    assert about["neutral"] == ["encoder.pos_embed"]
    assert relative(model.eval()(IMAGE, MASK), shared(IMAGE, MASK)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("arch,changes,head,fc_norm", [
    ("vit_b", SMALL, "head.fc.", "fc_norm"), ("vit_b", SMALL, "head.layers.head.", "fc_norm"),
    ("resnet18", {}, "head.fc.", ""), ("convnext_t", {}, "head.fc.", "norm3")])
def test_fine_tuned_openmixup(arch, changes, head, fc_norm, tmp_path, monkeypatch):
    monkeypatch.setitem(models.PRESETS, "peer", models.PRESETS[arch] | changes)
    tuned = random_weights(models.Predictor(models.build("peer", 64).encoder, 7))
    state = {}
    for name, value in tuned.state_dict().items():
        name, shape = official_name(name, value)
        name = name.replace("fc_norm.", f"backbone.{fc_norm}.").replace("head.", head)
        state[name] = value.view(shape)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "it.pth")
    model, about = weights.open_model(tmp_path / "it.pth", "peer", 64)
    assert about["format"] == "OpenMixup" and not about["missing"] and not about["unused"]
    assert torch.equal(model.eval()(IMAGE), tuned(IMAGE))
    assert "head.weight" not in weights.load(model, {"state_dict": state}, head=False)["loaded"]


def test_a_convnext_classifier_starts_from_the_final_norm():
    pretrained = random_weights(models.build("convnext_t", 64))
    model = models.Predictor(models.build("convnext_t", 64).encoder, 7)
    weights.load(model, pretrained.state_dict())
    assert torch.equal(model.fc_norm.weight, pretrained.encoder.norm.weight)


@pytest.mark.parametrize("old,new", [(14, 16), (16, 14), (8, 16)])
def test_relative_positions_are_resized_right(old, new):
    def ramps(side):  # over the image: what an offset holds must stay
        y, x = torch.meshgrid(*2 * [(torch.arange(side) + 0.5) / side], indexing="ij")
        return torch.stack([x - y, 2 * x, 3 * x + y], -1)

    a = 2 * old - 1
    b = 2 * new - 1
    extra = torch.randn(3, 3)  # of the class token
    table = torch.cat([ramps(a).flatten(0, 1), extra])
    like = torch.empty(b * b + 3, 3)
    resized = weights.resize_positions("attn.relative_position_bias_table", table, like)
    assert torch.equal(resized[-3:], extra)
    # a ramp stays a ramp: exactly when enlarged, else to 2 % of a step, and within half a patch at
    # the edge, where it levels off
    error = (resized[:-3].view(b, b, 3) - ramps(b)).abs()
    edge = -(-2 * b // a) + 1
    assert error[edge:-edge, edge:-edge].max() < (1e-5 if new > old else 0.08 / b)
    assert error.max() < 2 / a


def test_positions_are_resized_or_refused():
    for name, theirs, ours in (("pos_embed", (1, 10, 5), (1, 17, 6)),  # another width
                               ("pos_embed", (1, 11, 5), (1, 17, 5)),  # no square: distilled
                               ("cls_token", (1, 1, 5), (1, 1, 6))):
        assert weights.resize_positions(name, torch.empty(theirs), torch.empty(ours)) is None
    layers = pytest.importorskip("timm").layers
    table = torch.randn(1, 1 + 12 * 12, 6)
    theirs = layers.resample_abs_pos_embed(table, [16, 16])
    assert relative(weights.resize_positions("pos_embed", table, theirs), theirs) < 1e-6


def test_positions_of_another_image_size():
    """All resized; or, as published for DeiT-S on ImageNet-100, relative biases from zero."""
    state = random_weights(models.build(**PEER_VIT | dict(img_size=192))).state_dict()
    state = {f"module._orig_mod.{name}": value for name, value in state.items()}
    biases = [f"encoder.blocks.{i}.attn.relative_position_bias_table" for i in range(3)]
    vit = models.build(**PEER_VIT | dict(img_size=224))
    report = weights.load(vit, state)
    assert report["resized"] == ["encoder.pos_embed", *biases] and not report["unused"]

    deit = models.build(**PEER_VIT | dict(img_size=224, qv_bias=False))
    deit = models.Predictor(deit.encoder, 7, "token")
    report = weights.load(deit, state, resize_bias=False)
    assert report["resized"] == ["encoder.pos_embed"] and report["neutral"] == biases
    assert not any(deit.get_parameter(name).any() for name in biases)
    assert torch.equal(deit.encoder.pos_embed, vit.encoder.pos_embed)
    assert torch.equal(deit.encoder.norm.weight, vit.encoder.norm.weight)
    left = [name for name in report["unused"] if name.startswith("encoder.")]
    assert len(left) == 9 and all("_bias" in name for name in left)


# ---- weights.py: models

def first_house(state, path):
    """A file as the first version of this program wrote it: a zip file, then a digest."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getvalue() + b"\nsha256 " + 64 * b"0")


@torch.no_grad()
@pytest.mark.parametrize("key,save", [("config", torch.save), ("identity", first_house)])
@pytest.mark.parametrize("arch,pool,options", [
    ("vit_nano", "mean", {}), ("vit_nano", "token", dict(qv_bias=False)),
    ("resnet_nano", "mean", {})])
def test_open_model_makes_what_our_files_hold(key, save, arch, pool, options, tmp_path):
    """With and without classifier, as written now and by the first version: the same outputs."""
    path = tmp_path / "it.pt"
    run = dict(arch=arch, img_size=64, fill="zero", token="replace", mask_layer=1, mean=[0.1] * 3)
    a2mim = random_weights(models.build(arch, 64, fill="zero", token="replace", mask_layer=1))
    save({"model": a2mim.state_dict(), key: run}, path)
    model, about = weights.open_model(path)
    assert isinstance(model, models.A2MIM) and about["missing"] == [] and about["run"] == run
    assert about["mean"] == [0.1] * 3 and about["std"] == list(data.STD) and about["channels"] == 3
    assert torch.equal(model.eval()(IMAGE, MASK), a2mim(IMAGE, MASK))

    encoder = models.build(arch, 64, **options).encoder
    tuned = random_weights(models.Predictor(encoder, 5, pool))
    run = dict(arch=arch, img_size=32, test_crop=64, pool=pool) | options
    save({"model": tuned.state_dict(), "classes": list("abcde"), key: run}, path)
    model, about = weights.open_model(path)
    assert about["classes"] == list("abcde") and about["size"] == 64 and model.pool == pool
    assert about["missing"] == about["neutral"] == []
    assert torch.equal(model.eval()(IMAGE), tuned(IMAGE))

    # a head that no classifier is stays in the file
    pose = random_weights(models.Predictor(models.build(arch, 64).encoder, 5, "flatten"))
    save({"model": pose.state_dict(), key: dict(arch=arch, img_size=64, task="pose")}, path)
    model, about = weights.open_model(path)
    assert isinstance(model, models.A2MIM) and "decoder.0.weight" in about["missing"]
    assert torch.equal(model.eval().encoder(IMAGE).movedim(1, -1), pose.features(IMAGE))


@torch.no_grad()
def test_export_knows_channels_and_biases(exported):
    pytest.importorskip("timm")
    options = dict(channels=5, qv_bias=False)
    run = dict(arch="vit_nano", img_size=32) | options
    image = torch.randn(2, 5, 32, 32)
    model = random_weights(models.build("vit_nano", 32, **options))
    tuned = random_weights(models.Predictor(copy.deepcopy(model.encoder), 7))  # without a norm
    for source in (tuned, model):
        state = {"model": source.state_dict(), "config": run}
        assert torch.equal(exported(state, "encoder")(image), source.encoder(image))
    theirs = exported(state, "timm").forward_features(image)[:, 1:]
    assert relative(theirs, model.encoder(image).flatten(2).mT) < 1e-5


# ---- timm's models

TIMM = """resnet18d regnety_002 densenet121 dla46_c hgnetv2_b0 mobilevit_xxs repvit_m0_9
efficientvit_b0 convnextv2_atto edgenext_xx_small poolformer_s12 pvt_v2_b0 mambaout_femto
swin_tiny_patch4_window7_224 test_nfnet cs3darknet_s""".split()
# those whose head is more than a linear layer after the mean
OWN_HEADS = """hgnetv2_b0 repvit_m0_9 efficientvit_b0 convnextv2_atto edgenext_xx_small
poolformer_s12 mambaout_femto swin_tiny_patch4_window7_224 test_nfnet""".split()


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name, tmp_path):
    """Stem and layers as promised; what is hidden stays hidden; to timm, and back."""
    timm = pytest.importorskip("timm")
    model = random_weights(models.build(f"timm/{name}", 64, token="none", fill="zero"))
    encoder = model.encoder
    assert model.mask_layer == len(encoder.layers) - 1
    z = encoder.stem(IMAGE)
    for layer, width, stride in zip([*encoder.layers, None], encoder.widths, encoder.strides,
                                    strict=True):
        assert z.shape == (2, width, 64 // stride, 64 // stride)
        z = layer(z) if layer else z
    hidden = repeat(MASK, 32)[:, None] * torch.randn(IMAGE.shape, generator=data.generator(3))
    assert MASK.any() and torch.equal(model(IMAGE, MASK), model(IMAGE + hidden, MASK))

    # to timm: the same last map, bit for bit, and logits where its head is ours
    predictor = random_weights(models.Predictor(encoder, 5))
    z = encoder(IMAGE)
    torch.save(dict(model=predictor.state_dict(), config=dict(arch=f"timm/{name}", img_size=64)),
               tmp_path / "tuned.pt")
    state, call, missing = weights.export(tmp_path / "tuned.pt", "timm")
    whole = eval(call, dict(timm=timm)).eval()
    keys = whole.load_state_dict(state, strict=False)
    assert keys.missing_keys == missing and not keys.unexpected_keys
    assert bool(missing) == (name in OWN_HEADS)
    maps = []
    last = whole.get_submodule(list(encoder.paths.values())[-1])
    last.register_forward_hook(lambda module, inputs, output: maps.append(output.clone()))
    logits = whole(IMAGE)
    assert torch.equal(maps[0].movedim(-1, 1) if maps[0].shape != z.shape else maps[0], z)
    assert missing or relative(predictor(IMAGE), logits) < 1e-5

    # and back
    theirs = whole.state_dict()
    for ours in (model, predictor):
        random_weights(ours, 1)
        assert not torch.equal(encoder(IMAGE), z)
        report = weights.load(ours, theirs)
        assert report["format"] == "timm" and torch.equal(encoder(IMAGE), z)
    assert set(report["unused"]) == {key for key in theirs if missing and not any(
        key.startswith(path + ".") for path in encoder.paths.values())}
    assert missing or relative(predictor(IMAGE), logits) < 1e-5


@pytest.mark.parametrize("name", ["regnety_002", "edgenext_xx_small"])
def test_runs_with_models_of_timm(name, noise, tmp_path, capsys):
    """Pre-training, stopped and not; fine-tuning; analyses; export, as the command says."""
    pytest.importorskip("timm")
    options = ["--arch", f"timm/{name}", "--img-size", 64, "--drop-path", 0.2, "--data", noise]
    pretrain(tmp_path / "straight", *options)
    for steps in (2, 3):
        pretrain(tmp_path / "parts", *options, "--steps", steps)
    assert_same_end(tmp_path / "straight", tmp_path / "parts")
    start = tmp_path / "parts" / "last.pt"

    # layer decay: stem, stages, head
    tune(tmp_path / "tuned", *options, "--init", start, "--epochs", 1, "--batch-size", 16,
         "--lr", 1, "--layer-decay", 0.5, "--warmup-epochs", 0, "--test-crop", 64)
    groups = checkpoint_of(tmp_path / "tuned")["optimizer"]["param_groups"]
    layers = len(models.build(f"timm/{name}", 64).encoder.layers)
    assert {group["peak_lr"] for group in groups} == {0.5 ** i for i in range(layers + 2)}

    analysed(tmp_path / "analysis", str(start), "--only", "reconstruct,cka,fourier", "--images",
             "8", "--workers", "0")
    matrix = next(iter(numbers(tmp_path / "analysis", "cka")["more"].values()))
    assert len(matrix) == layers + 1

    capsys.readouterr()
    out = str(tmp_path / "timm.pth")
    weights.main(["export", str(tmp_path / "tuned" / "best.pt"), "--to", "timm", out])
    said = capsys.readouterr().out
    assert ("Not in it" in said) == ("strict=False" in said) == (name in OWN_HEADS)
    names = {}
    exec("\n".join(line.strip() for line in said.split("To load them:\n")[1].splitlines()), names)
    assert names["model"](IMAGE).shape == (2, 3)


@pytest.mark.parametrize("name,options,says", [
    ("halonet26t", dict(img_size=96), "makes no map of 3×3 of images of 96 px: try another size"),
    ("densenet121", dict(drop_path=0.1), "timm's densenet121 has no drop path: set it to 0"),
    ("regnety_002", dict(mask_layer=4), "mask_layer must lie in 0..3"),
    ("resnet10t", None, "timm/resnet10t needs timm: pip install timm"),
])
def test_models_that_timm_has_not(name, options, says, monkeypatch):
    if options is None:
        monkeypatch.setitem(sys.modules, "timm", None)
    else:
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match="^[^\n]*" + re.escape(says)):
        models.build(f"timm/{name}", **options or {})


def test_number_of_models_that_work():
    """python extras/backbones.py --all"""
    count = json.loads((HERE / "results/backbones.json").read_text())
    words = f"{count['works']} of {count['tried']:,} names"
    assert len(count["names"]) == count["works"]
    for page in ("README.md", "docs/backbones.md"):
        assert words in (HERE / page).read_text()


@torch.no_grad()
def test_drop_path_of_timm():
    pytest.importorskip("timm")
    encoder = models.build("timm/edgenext_xx_small", 64, drop_path=0.5).encoder.train()
    assert not torch.equal(encoder(IMAGE), encoder(IMAGE))
    assert torch.equal(encoder.eval()(IMAGE), encoder(IMAGE))


# ---- attention's bias, torch.compile

@pytest.mark.parametrize("grid,stride", [(3, 16), (8, 72), (14, 200)])
def test_bias_as_fused_attention_wants_it(grid, stride):
    """In the queries' dtype, contiguous along keys, rows at multiples of 8; values as by the index."""
    attention = random_weights(models.Attention(12, 3, grid))
    table = attention.relative_position_bias_table
    N = grid ** 2 + 1
    expected = F.embedding(models.relative_position_index(grid), table).permute(2, 0, 1)
    for dtype in (torch.float32, torch.bfloat16):
        bias = attention.position_bias(dtype)
        assert bias.dtype == dtype and bias.stride() == (N * stride, stride, 1)
        assert bias.storage_offset() == 0 and torch.equal(bias, expected.to(dtype))
    weight = torch.randn(3, N, N)
    gradients = [torch.autograd.grad((weight * values).sum(), table)[0]
                 for values in (attention.position_bias(torch.float32), expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_under_autocast(dtype, monkeypatch):
    """Attention gets all of its inputs in one dtype, and the bias as it was made, uncopied."""
    attend = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        models.Attention(12, 3, 3)(torch.randn(2, 10, 12))
    tensors = [*attend.call_args.args, attend.call_args.kwargs["attn_mask"]]
    assert [tensor.dtype for tensor in tensors] == 4 * [dtype]
    assert tensors[3].stride() == (160, 16, 1)


@pytest.fixture
def compiling():
    """Nothing compiled before counts, and compiling a second time is an error."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "arch", [*models.PRESETS, "timm/convnextv2_atto", "timm/regnety_002"])
def test_every_model_is_one_graph(arch, compiling):
    """In training, with drop path; two blocks a stage, on the meta device: there are no numbers."""
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    kind = models.preset(arch)["encoder"]
    options = {models.ViT: dict(depth=2, mask_layer=1), models.ResNet: dict(depths=(1, 1, 1, 2))}
    with torch.device("meta"):
        model = models.build(arch, 64, drop_path=0.1, **options.get(kind, {}))
        image = torch.empty(2, 3, 64, 64)
        mask = torch.empty(2, 2, 2)
    if issubclass(kind, models.ConvNeXt):
        for stage in (1, 3, 5, 7):
            model.encoder.features[stage] = model.encoder.features[stage][:2]
    replica = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        assert replica(image, mask).shape == image.shape


# ---- analyze.py: the formulas

def mean_interaction(v, S, pair):
    """Mean of v(S∪{i,j}) − v(S∪{i}) − v(S∪{j}) + v(S) over contexts S (C, players) bool."""
    i, j = pair
    terms = []
    for context in S:
        members = set(np.flatnonzero(context))
        terms.append(v(members | {i, j}) - v(members | {i}) - v(members | {j}) + v(members))
    return np.mean(terms)


def test_interactions_are_their_definition():
    table = np.random.default_rng(0).standard_normal(2 ** 9)
    played = []

    def v(S):
        return table[sum(2 ** player for player in S)]

    def value(coalitions):
        played.append(len(np.unique(coalitions, axis=0)) == len(coalitions))
        return np.array([v(np.flatnonzero(row)) for row in coalitions])

    pairs = analyze.draw_pairs(3, 100, np.random.default_rng(1))
    assert len(pairs) == 36                                 # 3×3: all are neighbours
    I = analyze.interactions(value, 9, pairs, range(8), 20, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    drawn = [analyze.contexts(9, pairs, m, 20, rng) for m in range(8)]
    expected = [[mean_interaction(v, *each) for each in zip(S, pairs.tolist())] for S in drawn]
    assert np.abs(I - expected).max() <= 1e-12
    assert played == [True]                                 # once, each coalition once


def test_drawn_contexts_are_uniform():
    rng = np.random.default_rng(0)
    pairs = np.array([[0, 1], [3, 7], [14, 15]])
    for size in (0, 1, 5, 13, 14):
        S = analyze.contexts(16, pairs, size, 6000, rng)
        assert (S.sum(2) == size).all() and S.shape == (3, 6000, 16)
        for context, pair in zip(S, pairs):
            assert not context[:, pair].any()
            share = np.delete(context.mean(0), pair)
            deviation = (size / 14 * (1 - size / 14) / 6000) ** 0.5
            assert np.abs(share - size / 14).max() < 5 * deviation + 1e-12


def test_pairs_are_neighbours():
    rng = np.random.default_rng(0)
    drawn = np.stack([analyze.draw_pairs(8, 20, rng) for _ in range(50)])   # (50, 20, 2)
    rows, columns = np.divmod(drawn, 8)
    assert np.maximum(np.ptp(rows, 2), np.ptp(columns, 2)).max() == 2
    assert (drawn[..., 0] < drawn[..., 1]).all()
    assert {len(np.unique(pairs, axis=0)) for pairs in drawn} == {20}
    assert len(np.unique(drawn)) == 64                      # every patch takes part


def test_attention_measures_by_hand():
    places = list(itertools.product(range(3), range(3)))
    between = np.array([[math.dist(a, b) for b in places] for a in places])
    uniform = np.full((9, 9), 1 / 9)
    right = np.eye(9)[[1, 2, 1, 4, 5, 4, 7, 8, 7]]          # to a neighbour in the row
    soft = 0.9 * right + 0.1 * uniform

    def measures(*heads):
        p = torch.from_numpy(np.stack(heads))[None]
        return analyze.attention_measures(p.clamp(min=1e-300).log(), 16)[:, 0]

    distance, entropy, _ = measures(uniform, np.eye(9), right)
    assert relative(distance, [16 * between.mean(), 0, 16]) < 1e-12
    assert relative(entropy, [math.log(9), 0, 0]) < 1e-12
    assert abs(measures(uniform)[2]) < 1e-12                # one head
    both = [(p * np.log(p / q)).sum(1).mean() for p, q in ((soft, uniform), (uniform, soft))]
    assert relative(measures(soft, uniform)[2], both) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("grid", [3, None])
def test_log_attention_is_what_forward_uses(grid):
    attention = random_weights(models.Attention(12, 3, grid).double())
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    p = analyze.log_attention(attention, x).exp()
    out = attention.proj((p @ attention.project(x)[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, attention(x))


def cka_between(*features, batch):
    hsic = 0
    for parts in zip(*[x.split(batch) for x in features]):
        grams = torch.stack([analyze.centred_gram(x) for x in parts])
        hsic = hsic + grams @ grams.T
    return analyze.cka_of(hsic)


def test_cka_by_formula():
    g = torch.Generator().manual_seed(0)
    n = 640
    x = torch.randn(n, 4, 3, 3, generator=g).double()
    y = torch.randn(n, 20, generator=g).double()
    a = x.flatten(1)
    # Song et al.'s unbiased estimator of HSIC, term by term
    K = (a @ a.T).fill_diagonal_(0)
    L = (y @ y.T).fill_diagonal_(0)
    inner = (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K @ L).sum()
    assert relative(analyze.centred_gram(x) @ analyze.centred_gram(y), inner) < 1e-9
    rotation = torch.linalg.qr(torch.randn(36, 36, generator=g).double())[0]
    noise = torch.randn(n, 36, generator=g).double()
    features = x, 7 * a @ rotation + 3, y, a + noise        # the second: rotated, scaled, moved
    cka = cka_between(*features, batch=n)
    assert abs(cka[0, 1] - 1) < 1e-9 and abs(cka[0, 2]) < 0.02 and 0.3 < cka[0, 3] < 0.7
    assert (cka_between(*features, batch=32) - cka).abs().max() < 0.03      # an unbiased estimate


def test_spectrum_finds_a_wave():
    h = 16
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(h).double(), indexing="ij")
    for k in range(1, h // 2 + 1):
        wave = 5 + torch.cos(2 * math.pi * k * (x + y) / h)
        amplitude, variance = analyze.spectrum(wave.expand(2, 3, h, h))
        assert amplitude[0, 1:].argmax() + 1 == k and amplitude[0, 0] == 0
        half = 0.5 if k < h // 2 else 1                     # of a cosine: half at k, half at −k
        assert abs(amplitude[0, k] - math.log(half / 5)) < 1e-4
        assert abs(variance[0] - half * 256 / 255) < 1e-6   # unbiased


def test_probe_is_ridge_regression():
    labels = torch.arange(90) % 3
    noise = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
    features = noise + 3 * F.one_hot(labels, 5)
    probe = analyze.fit_probe(features, labels, 3)
    x = features.double()
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    x = torch.cat([x, torch.ones(90, 1)], 1)
    ridge = torch.cat([0.9 ** 0.5 * torch.eye(5), torch.zeros(5, 1)], 1)    # the penalty as rows
    targets = torch.cat([F.one_hot(labels, 3), torch.zeros(5, 3)]).double()
    solution = torch.linalg.lstsq(torch.cat([x, ridge]), targets).solution
    torch.testing.assert_close(probe(features), x @ solution)


@torch.no_grad()
@pytest.mark.parametrize("arch,names", [
    ("vit_nano", "stem 1a 1 2a 2 3a 3 4a 4"), ("resnet_nano", "stem 1.1 2.1 3.1 4.1"),
    ("resnet18", "stem 1.1 1.2 2.1 2.2 3.1 3.2 4.1 4.2"), ("convnext_t", "stem 1.1 2.1 3.1 4.1"),
    ("swin_t", "stem 1.1 2.1 3.1 4.1")])
def test_walk_is_the_forward_pass(arch, names):
    encoder = random_weights(models.build(arch, 64).encoder).eval()
    x = torch.randn(2, 3, 64, 64)
    walked, maps = zip(*analyze.walk(encoder, x, halves=True))
    z = maps[-1]
    if arch == "vit_nano":
        z = encoder.norm(z.movedim(1, -1)).movedim(-1, 1)
    assert " ".join(walked) == names
    torch.testing.assert_close(z, encoder(x))


# ---- analyze.py: the analyses

def save_run(path, model, classes=None, **config):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(config=config, model=model.state_dict(), classes=classes), path)
    return str(path)


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A folder of images in three classes, and small checkpoints: pre-trained, and with a head."""
    tmp = tmp_path_factory.mktemp("studied")
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "val") for kind in "abc" for i in range(8)]
    write_images(tmp / "images", names)
    torch.manual_seed(0)
    paths = {}
    for arch in ("vit_nano", "resnet_nano"):
        config = dict(arch=arch, img_size=32, mask="random", mask_size=8, mask_ratio=0.6)
        model = models.build(arch, 32)
        paths[arch] = save_run(tmp / arch / "last.pt", model, **config)
        predictor = random_weights(models.Predictor(model.encoder, 3))
        path = tmp / f"tuned-{arch}" / "best.pt"
        paths[f"tuned-{arch}"] = save_run(path, predictor, classes=list("abc"), **config)
    return str(tmp / "images"), paths


def analysed(out, *argv):
    analyze.main([*argv, "--out", str(out)])


def numbers(out, name):
    return json.loads((out / f"{name}.json").read_text(), parse_constant=pytest.fail)


def images_of(folder, split, size, count):
    """What an analysis sees: normalised images and their labels."""
    source = data.open_source(folder, split, size)
    order = torch.randperm(len(source), generator=data.generator(0, split))[:count].tolist()
    crops = [data.evaluation_crop(source[i][0], size, size) for i in order]
    return data.normalize(torch.stack(crops)), torch.tensor([source[i][1] for i in order])


def test_all_analyses_of_all_kinds(studied, tmp_path, capsys):
    folder, paths = studied
    analysed(tmp_path, *paths.values(), "--data", folder, "--images", "8", "--probe-images", "20",
             "--pairs", "2", "--contexts", "1")
    text = capsys.readouterr().out
    for line in ("tuned-vit_nano: not applicable: no decoder", "tuned-vit_nano: for the true class",
                 "vit_nano: a linear probe of the last features, fitted on 20 images"):
        assert line in text
    page = (tmp_path / "index.html").read_text()
    rows = dict(reconstruct=2, interaction=2, occlusion=4, fourier=4, attention=2, cka=4, layers=4)
    for name, checkpoints in rows.items():
        assert f"<h2>{name}</h2>" in page and f'<img src="{name}.png"' in page
        for quantity, curves in numbers(tmp_path, name)["curves"].items():
            if "whole images" not in quantity:              # which needs an accuracy well above 0
                assert len(curves) == checkpoints
            for places, means, errors, *_ in curves.values():
                assert len(places) == len(means) == len(errors)
        if analyze.Figure or name == "reconstruct":
            assert (tmp_path / f"{name}.png").stat().st_size > 5000
    matrix = np.concatenate(list(numbers(tmp_path, "cka")["more"].values()))
    assert matrix.shape == (20, 20)
    assert np.allclose(np.diag(matrix), 1) and np.allclose(matrix, matrix.T)


@pytest.mark.skipif(not SLOW, reason="compiling takes minutes: SLOW=1")
@pytest.mark.parametrize("arch", ["vit_nano", "resnet_nano", "timm/convnextv2_atto"])
def test_inductor(arch, compiling):
    """Loss and gradients of what Inductor makes of it, in float64: batch norms enlarge rounding."""
    size = 64
    model = random_weights(models.build(arch, size)).double().train()
    image = torch.randn(4, 3, size, size).double()
    mask = masking.random_mask(4, 2, 0.6)
    results = []
    for replica in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        state = copy.deepcopy(model.state_dict())
        loss = (replica(image, mask) - image).square().mean()
        gradients = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
        model.load_state_dict(state)                        # batch norm's statistics
        results.append([loss, *[g for g in gradients if g is not None]])
    for compiled, eager in zip(*results[::-1], strict=True):
        assert relative(compiled, eager) < 1e-6 or eager.norm() < 1e-9


@torch.no_grad()
def test_interaction_of_a_network_by_enumeration(studied, tmp_path, monkeypatch):
    """J of a ViT of nine patches, from its outputs for all 512 coalitions."""
    folder = studied[0]
    options = dict(patch_size=8, dim=24, depth=2, heads=3, mlp_dim=48, like="vit_nano")
    monkeypatch.setitem(models.PRESETS, "toy", models.PRESETS["vit_nano"] | options)
    model = random_weights(models.Predictor(models.build("toy", 24).encoder, 3))
    path = save_run(tmp_path / "toy.pt", model, arch="toy", img_size=24)
    analysed(tmp_path, f"Toy={path}:toy", "--data", folder, "--images", "8", "--only", "interaction")
    places, J, _ = numbers(tmp_path, "interaction")["curves"].popitem()[1]["Toy"]
    bits = torch.tensor([[c >> p & 1 for p in range(9)] for c in range(512)])
    present = repeat(bits.view(512, 3, 3), 8)[:, None]
    strength = []
    for index, (image, label) in enumerate(zip(*images_of(folder, "val", 24, 8))):
        p = model(image * present).double().softmax(1)[:, label]
        v = (p / (1 - p)).log().numpy()

        def game(S):
            return v[sum(2 ** int(player) for player in S)]

        rng = np.random.default_rng((0, index))
        pairs = analyze.draw_pairs(3, 10, rng)
        for r in places:
            S = analyze.contexts(9, pairs, int(7 * r), 10, rng)
            each = [mean_interaction(game, *pair) for pair in zip(S, pairs.tolist())]
            strength.append(np.abs(each).mean())
    strength = np.array(strength).reshape(8, -1)
    assert np.abs(J - strength.mean(0) / strength.mean()).max() <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("arch", ["vit_nano", "resnet_nano"])
def test_occlusion_is_evaluation_without_patches(arch, studied, tmp_path):
    folder, paths = studied
    x, labels = images_of(folder, "val", 32, 24)
    analysed(tmp_path, paths[f"tuned-{arch}"], "--only", "occlusion", "--data", folder)
    curves = numbers(tmp_path, "occlusion")["curves"]["top-1, %, by share of patches dropped"]
    [(places, top1, _)] = curves.values()
    model = random_weights(models.Predictor(models.build(arch, 32).encoder, 3))
    dropped = masking.random_mask(24, 8, 0.5, [data.generator(0, "drop", i) for i in range(24)])
    for share, image in ((0, x), (0.5, masking.fill(x, dropped, "zero"))):
        right = 100 * (model(image).argmax(1) == labels).double().mean()
        assert abs(top1[places.index(share)] - right) < 1e-9


@torch.no_grad()
def test_analyses_look_at_what_they_say(studied, tmp_path):
    """Reconstructions, spectra, attention, CKA and probes of a ViT, computed anew."""
    folder = studied[0]
    vit = random_weights(models.build("vit_nano", 32))
    path = save_run(tmp_path / "vit.pt", vit, arch="vit_nano", img_size=32, mask_size=8)
    analysed(tmp_path, path, "--data", folder, "--images", "14", "--only",
             "reconstruct,fourier,attention,cka,layers")
    results = {}
    for name in ("reconstruct", "fourier", "attention", "cka", "layers"):
        results[name] = [curve["vit"] for curve in numbers(tmp_path, name)["curves"].values()]
    x, labels = images_of(folder, "val", 32, 14)
    mask = masking.random_mask(14, 4, 0.6, [data.generator(0, "mask", i) for i in range(14)])
    M = repeat(mask, 8).bool()[:, None].expand(-1, 3, -1, -1)
    guesses = vit(x, mask), x.mean((2, 3), keepdim=True)
    errors = [[(guess - x)[i][M[i]].abs().mean() for guess in guesses] for i in range(14)]
    assert relative(results["reconstruct"][0][1], torch.tensor(errors).mean(0)) < 1e-5

    spectra = [analyze.spectrum(z) for _, z in analyze.walk(vit.encoder, x, halves=True)]
    diagonals = [amplitude.mean(0) for amplitude, _ in spectra]
    highest, variance = results["fourier"]
    assert relative(highest[1], [diagonal[4] for diagonal in diagonals]) < 1e-4
    assert relative(variance[1], [v.mean() for _, v in spectra]) < 1e-4
    shown = numbers(tmp_path, "fourier")["more"]["vit"]
    assert list(shown) == highest[0] and relative(list(shown.values()), torch.stack(diagonals)) < 1e-4

    # what each block's attention takes in
    inputs = []
    for block in vit.encoder.blocks:
        block.attn.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    maps = [z for _, z in analyze.walk(vit.encoder, x)]
    for number, (block, y) in enumerate(zip(vit.encoder.blocks, inputs)):
        p = analyze.log_attention(block.attn, y).exp()[:, :, 1:, 1:]
        p = p / p.sum(-1, keepdim=True)                     # no class token: a distribution again
        for curve, by_hand in zip(results["attention"], analyze.attention_measures(p.log(), 4)):
            places, means, errors, heads = curve
            assert places == [1, 2, 3, 4] and relative(means[number], by_hand.mean()) < 1e-4
            assert relative(errors[number], by_hand.mean(1).std() / 14 ** 0.5) < 1e-3
            assert relative(heads[number], by_hand.mean(0)) < 1e-4

    matrix = numbers(tmp_path, "cka")["more"]["vit"]
    by_hand = cka_between(*[z[:12] for z in maps], batch=4)                 # two are left over
    assert np.abs(matrix - by_hand.numpy()).max() < 1e-4
    train, train_labels = images_of(folder, "train", 32, 24)
    for number, (_, z) in enumerate(analyze.walk(vit.encoder, train)):
        probe = analyze.fit_probe(z.mean((2, 3)), train_labels, 3)
        right = probe(maps[number].mean((2, 3))).argmax(1) == labels
        assert abs(results["layers"][0][1][number] - 100 * right.double().mean()) < 1e-9


def test_without_matplotlib_labels_or_readable_images(studied, tmp_path, monkeypatch, capfd):
    paths = [studied[1]["vit_nano"], studied[1]["tuned-vit_nano"]]
    monkeypatch.setattr(analyze, "Figure", None)
    folder = write_images(tmp_path / "flat", [f"{i}.png" for i in range(40)])
    (tmp_path / "flat/0.png").write_bytes(b"broken")        # the first of those held out
    analysed(tmp_path / "out", *paths, "--data", folder, "--pairs", "1", "--contexts", "1")
    text, warned = capfd.readouterr()
    assert "pip install matplotlib" in text and "for the predicted class" in text
    assert "no occlusion, no layers" in text and not (tmp_path / "out/layers.json").exists()
    assert "0.png" in warned and "another image takes its place" in warned
    assert [path.name for path in tmp_path.glob("out/*.png")] == ["reconstruct.png"]


# ---- bench.py

def test_bench_loader(tmp_path, monkeypatch, capsys):
    """The tar holds the folder's images; PIL's pipeline sees them as ours does."""
    small = shapes.Shapes(32, count=300)
    monkeypatch.setattr(shapes, "Shapes", lambda size, count: small)
    folder, tar = [data.open_source(path, "train", 32) for path in bench.write_photos(tmp_path)]
    assert len(folder) == len(tar) == 291
    assert all(folder[i][0].equal(tar[i][0]) for i in range(0, 291, 29))
    image = bench.PILViews(folder, 32, (1.0, 1.0), data.BILINEAR)[0, 0, 3]
    assert (image.mean() - data.normalize(folder[3][0][None]).mean()).abs() < 0.05
    bench.main("loader --batch 2 --runs 1 --workers 1".split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[5:]]
    assert [(Path(row[4]).name, row[5]) for row in rows] == 2 * [
        ("PIL", "0"), ("photos", "0"), ("photos", "1"), ("photos.tar", "0"), ("photos.tar", "1")]
    assert all(float(row[2]) > 0 for row in rows) and rows[0][3] == rows[5][3] == "1.00"


def test_bench_loss_keeps_every_run(tmp_path, capsys):
    path = tmp_path / "loss.json"
    bench.main(["loss", "--batch", "2", "--runs", "3", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["command"] == f"python bench.py loss --batch 2 --runs 3 --json {path}"
    assert result["machine"] in capsys.readouterr().out
    theirs, ours = result["tables"]["loss"]
    assert len(theirs["seconds"]) == len(ours["seconds"]) == 3
    assert ours["cells"]["ms"] == f"{1000 * np.median(ours['seconds']):.2f}"
    ratios = np.array(theirs["seconds"]) / ours["seconds"]
    assert ours["cells"]["times faster"] == f"{np.median(ratios):.2f}"
    assert float(ours["cells"]["value"]) < 1e-6 and float(ours["cells"]["gradient"]) < 1e-6


def test_bench_step(tmp_path, monkeypatch, capsys):
    """The way through the CUDA branch, with PyTorch's functions for it replaced."""
    called = Mock()
    monkeypatch.setattr(bench, "CUDA", True)
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    small = torch.ones(64, 64)
    monkeypatch.setattr(torch, "randn", lambda n, m, device: small)     # for the matrix products
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", called.synchronize)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", called.reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 34_560_000_000)
    images = write_images(tmp_path / "images", [f"{i}.png" for i in range(16)], (32, 32))
    steps = []
    update = optim.update
    monkeypatch.setattr(optim, "update", lambda *args: steps.append(update(*args)))
    path = tmp_path / "step.json"
    bench.main(["step", "--arch", "vit_nano", "--compile", "--batch", "2", "--runs", "1", "--workers",
                "1", "--data", str(images), "--json", str(path)])
    eager, compiled, loaded = json.loads(path.read_text())["tables"]["step"]
    assert [row["cells"]["how"] for row in (eager, compiled, loaded)] == [
        "eager", "compiled", "compiled, loaded"]
    assert eager["cells"]["GB"] == compiled["cells"]["GB"] == "34.6"
    assert called.reset.call_count == 2
    # two runs of three products and of three ways to step
    assert called.synchronize.call_count == 2 * 6
    # one to count FLOPs; two by two for memory; three ways, two runs of two
    assert len(steps) == 1 + 2 * 2 + 3 * 2 * 2
    # a run is of two steps: FLOP/s and images/s agree
    for row in (eager, compiled, loaded):
        speed = row["flops"] / 2 * float(row["cells"]["images/s"]) / 2
        assert speed == pytest.approx(1e12 * float(row["cells"]["TFLOP/s"]), rel=0.02)
    assert loaded["peak"] == eager["peak"] > 0
    # FLOPs: 2 a multiplication, forward and twice that backward; of 2 steps, 2 images
    block = 65 * 96 * (4 * 96 + 2 * 384) + 2 * 65 ** 2 * 96     # 65 tokens of 96
    image = 3 * 2 * (4 * block + 64 * 96 * 3 * 64 * 2)
    assert eager["flops"] == pytest.approx(2 * 2 * image, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bench_matmul_takes_the_dtype_of_autocast(dtype, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda n, m, device: torch.ones(n // 64, m // 64))
    works = bench.matmuls(torch.autocast("cpu", dtype, enabled=dtype != torch.float32))
    for n, (function, a, b) in works.items():
        assert function(a, b).dtype == dtype and a.shape == b.shape == (n // 64, n // 64)


def test_speed_page_says_what_its_files_say():
    """python extras/tables.py"""
    text = tables.PAGE.read_text()
    assert tables.fill_in(text) == text
    names = set(re.findall("<!-- table: (.*) -->", text))
    assert names == {path.stem for path in tables.FOLDER.glob("*.json")}


@pytest.mark.parametrize("path", sorted((HERE / "results/speed").glob("*.json")), ids=lambda p: p.stem)
def test_results_of_bench(path):
    """At least five runs, and figures that follow from them; no path of a machine."""
    text = path.read_text()
    assert f"--json results/speed/{path.name}" in text and not re.search("/(work|tmp|home)/", text)
    for rows in json.loads(text)["tables"].values():
        for row in rows:
            assert len(row["seconds"]) >= 5
            if "ms" in row["cells"]:
                assert row["cells"]["ms"] == f"{1000 * np.median(row['seconds']):.2f}"
            if "peak" in row:
                share = row["flops"] / np.median(row["seconds"]) / row["peak"]
                assert row["cells"]["of peak"] == f"{share:.1%}"


# ---- extras/sweep.py, docs/evidence.md, results/, checkpoints/

RESULTS = sweep.read_results(HERE / "results")
RUNS = [run for stage in sweep.STAGES for group in sweep.plan(*stage) for run in group]
SWEEP = argparse.Namespace(out="runs/sweep", data="cifar10", steps=None)


def parsed(run, monkeypatch):
    """(configuration, how to run) that a run's command comes to."""
    config = dict(arch=run.split("/")[1], img_size=32)
    monkeypatch.setattr(runtime, "read", lambda path: dict(config=config))
    program, *argv = sweep.command(run, SWEEP)
    return CONFIGURE[program](argv, "")[:2]


def test_evidence_is_trained_as_designed(monkeypatch):
    """Each run once, after what it begins with; fine-tunings of a pair differ in that alone."""
    assert len(set(RUNS)) == len(RUNS)
    for i, run in enumerate(RUNS):
        assert sweep.start(run) is None or sweep.start(run) in RUNS[:i]
    assert sweep.start("world/vit_nano/a2mim/mask-256/seed3") == "world/vit_nano/a2mim/pretrain/seed1"
    assert sweep.start("ladder/resnet_nano/preset/mask-256/seed3").startswith("world/")
    assert sweep.start("cifar10/vit_nano/simmim/class-100/seed3").endswith("simmim/pretrain/seed0")

    pairs = {}
    for run in [run for run in RUNS if "-" in run.split("/")[3]]:
        table, arch, arm, part, seed = run.split("/")
        cfg, args = parsed(run, monkeypatch)
        assert (args.init is None) == (arm == "scratch") and cfg.layer_decay is None
        assert 500 <= args.labels // 64 * cfg.epochs < 500 + args.labels // 64 and args.steps == 500
        assert cfg.warmup_epochs == cfg.epochs / 10 and f"seed{args.seed}" == seed
        how = {key: value for key, value in args.items() if key not in ("init", "out")}
        pairs.setdefault((table, arch, part, seed), []).append(cfg | how)
    assert all(config == configs[0] for configs in pairs.values() for config in configs)
    arms = [len(configs) for configs in pairs.values()]
    assert [arms.count(n) for n in (4, 3, 8)] == [2 * (3 * 4 + 2 * 6), 2 * 3 * 4 + 2, 4]

    # pre-training: a rung of the ladder changes one thing of the preset
    preset, _ = parsed("world/resnet_nano/a2mim/pretrain/seed0", monkeypatch)
    assert (preset.shapes_count, preset.epochs, preset.img_size) == (32768, 6, 32)
    assert (preset.fill, preset.mask_layer, preset.frequency_loss) == ("mean", 3, "focal")
    changes = []
    for arm in [*sweep.RUNGS, *sweep.LAST_RUNGS]:
        rung, _ = parsed(f"ladder/resnet_nano/{arm}/pretrain/seed0", monkeypatch)
        changes.append({f"{key} {rung[key]}" for key in preset if rung[key] != preset[key]})
    off = {f"frequency_{key} None" for key in ("loss", "weight", "standin", "visible")}
    assert changes == [{"fill zero"}, {"fill none"}, {"mask_layer 0"}, {"mask_layer 2"},
                       {"token none"}, off, {"frequency_loss focal_per_image"}]
    cfg, args = parsed("world/vit_nano/supervised/pretrain/seed1", monkeypatch)
    assert (cfg.epochs, cfg.shapes_count, cfg.protocol) == (6, 32768, "scratch-small")
    assert args.labels is None and args.seed == 1 and not cfg.mixup and not cfg.cutmix


def test_evidence_statistics_by_hand():
    """Differences 1, 2, 3, 6: mean 3, standard deviation √(14/3), over √4 pairs."""
    results = {f"t/v/{arm}/mask-64/seed{seed}": {"miou": 10.0 + more * (arm == "b")}
               for arm in "ab" for seed, more in enumerate((1, 2, 3, 6))}
    results["t/v/b/mask-64/seed4"] = {"miou": 1000.0}   # has no partner
    mean, half, least, pairs = sweep.gain(results, "t/v/b", "t/v/a", "mask-64", "miou")
    assert (mean, pairs) == (3, 4) and half == pytest.approx(3.182 * math.sqrt(14 / 3) / 2)
    assert least == pytest.approx((3.182 + 0.978) * math.sqrt(14 / 3) / 2)
    assert sweep.gain(results, "t/v/b", "t/v/a", "mask-256", "miou") is None

    # the smallest detectable difference is shown in about 80 % of experiments, of two pairs in 73 %
    rng = np.random.default_rng(0)
    for n, power in ((2, 0.73), (4, 0.78), (6, 0.80)):
        t, t_power = sweep.STUDENT[n - 1]
        d = rng.normal((t + t_power) / math.sqrt(n), 1, (100_000, n))
        shown = d.mean(1) > t * d.std(1, ddof=1) / math.sqrt(n)
        assert np.mean(shown) == pytest.approx(power, abs=0.01)

    # the ledger: 10.25 is shown, its opposite too, 3 ± 3.44 is not
    for seed in range(4):
        results[f"t/v/c/mask-64/seed{seed}"] = {"miou": 20.1 + seed / 10}
    row = "| c | `python extras/sweep.py t/v mask-64` | miou: {} |"
    page = "\n".join(row.format(text) for text in ("c − a", "a − c", "b − a")) + "\ntext\n"
    shown, opposite, neither, text = sweep.fill_in(page, results).splitlines()
    assert shown.endswith("+10.25 [+10.04, +10.46] | 4 | 0.27 | **shown** |")
    assert opposite.endswith("-10.25 [-10.46, -10.04] | 4 | 0.27 | **the opposite** |")
    assert neither.endswith("+3.00 [-0.44, +6.44] | 4 | 4.49 | not shown |")
    assert sweep.fill_in(sweep.fill_in(page, results), {}).count("not run yet") == 3


def test_evidence_goes_on_and_says_what_failed(tmp_path, capsys):
    where = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--steps", "1"]
    one = ["world/vit_nano/simmim", "mask-64/seed1"]
    sweep.main([*one, *where])
    begins, path = sorted(tmp_path.glob("world/*/*/*/seed1.json"), key=os.path.getmtime)
    assert begins.parent.name == "pretrain" and json.loads(path.read_text())["step"] == 1
    path.write_text("{}")
    sweep.main([*one, *where])                          # what has a result is not done again
    assert path.read_text() == "{}"
    assert "nothing is missing in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no run has class-50 in its name: take pieces of names"):
        sweep.main(["class-50", *where])                # nor of class-500
    path.unlink()
    shutil.rmtree(tmp_path / "runs")                    # in a fresh clone: results, no weights
    first = begins.read_text()
    sweep.main([*one, *where])                          # what it begins with is trained again
    assert json.loads(path.read_text())["step"] == 1
    assert begins.read_text() == first and begins.with_suffix(".2.json").exists()
    path.unlink()
    (tmp_path / "runs/world/vit_nano/simmim/pretrain/seed1/unfinished").touch()
    sweep.main([*one, *where])                          # so it is after an interrupted repeat
    assert begins.with_suffix(".3.json").exists()
    with pytest.raises(ValueError, match="exit code 2: see its log.txt"):
        sweep.main(["cifar10/vit_nano/scratch", "class-100", "--data", "nowhere", *where])


EVIDENCE_TABLES = [("world", ["mask-64", "mask-256", "mask-1024"]),
                   ("world", ["pose-256", "class-1024"]),
                   ("cifar10", ["class-100", "class-500", "class-5000"])]


def test_evidence_pages_are_the_results():
    for page in sweep.PAGES:
        assert page.read_text() == sweep.fill_in(page.read_text(), RESULTS), page.name
    readme = re.search(r"<!-- evidence -->(.*?)<!-- end -->", (HERE / "README.md").read_text(), re.S)
    numbers = re.findall(r"\d+\.\d+", readme[1]) if readme else []
    assert [number for number in numbers if number not in sweep.PAGES[0].read_text()] == []
    assert set(RESULTS) == set(RUNS)                    # all of the design is run, as it says
    notebook = (HERE / "notebooks/3_is_it_worth_it.ipynb").read_text()
    for table, parts in EVIDENCE_TABLES:
        for line in sweep.make_table(RESULTS, table, parts):
            assert line in notebook, "results/ have changed: python notebooks/build.py"


def test_evidence_sentences_are_the_results():
    text = " ".join(sweep.PAGES[0].read_text().split())
    in_short = re.search("## In short(.*?)## The runs", text)[1]
    for number in re.findall(r"[+-]\d+\.\d+", in_short):
        assert number in text.partition("## The runs")[2], number
    claims = [line for line in sweep.PAGES[0].read_text().splitlines() if sweep.CLAIM.match(line)]
    verdicts = [line.split("|")[-2].strip(" *") for line in claims if line.startswith("| MIM helps")]
    assert verdicts == ["shown"] * 16                   # "in all 16 rows"
    verdicts = [line.split("|")[-2].strip(" *") for line in claims if "beats SimMIM" in line]
    assert verdicts.count("not shown") == 4             # "in the other four rows"
    cells = [(table, part, metric) for table, parts in EVIDENCE_TABLES for part in parts
             for metric in sweep.METRICS[part.split("-")[0]]]
    nothing = []                                        # "four show nothing"
    for table, part, metric in cells:
        for place in [f"{table}/{arch}" for arch in sweep.ARCHS]:
            for arm in sweep.MIM:
                mean, half, *_ = sweep.gain(RESULTS, f"{place}/{arm}", f"{place}/scratch", part, metric)
                nothing += [f"{place}/{arm} {metric}"] if mean <= half else []
    assert nothing == ["world/vit_nano/simmim miou", "world/vit_nano/a2mim angle_deg",
                       "world/resnet_nano/simmim angle_deg", "world/resnet_nano/a2mim angle_deg"]
    upper = [RESULTS[f"cifar10/{arch}/supervised/pretrain/seed0"]["top1"] for arch in sweep.ARCHS]
    assert "the ViT gets to {:.2f} % top-1 and the CNN to {:.2f} %".format(*upper) in text
    tenth = [sweep.values(RESULTS, f"cifar10/{arch}/a2mim", "class-5000", "top1")
             for arch in sweep.ARCHS]
    tenth = [np.mean(list(found.values())) for found in tenth]
    assert "the steps after A²MIM, to {:.2f} and {:.2f} %".format(*tenth) in text
    apart = []                                          # two pre-trainings of a CNN, as it says
    for part in ("mask-256", "mask-1024", "mask-64"):
        for arm in sweep.MIM:
            miou = sweep.values(RESULTS, f"world/resnet_nano/{arm}", part, "miou")
            even, odd = [np.mean([miou[seed] for seed in miou if seed % 2 == k]) for k in (0, 1)]
            apart.append(f"{abs(even - odd):.1f}")
    words = "{} and {} points of mIoU with 256 labels, {} and {} with 1,024, but {} and {} with 64"
    assert words.format(*apart) in text

    def minutes(runs):                                  # the median, of what was not interrupted
        seconds = [json.loads(path.read_text())["seconds"] for path in (HERE / "results").glob(runs)]
        return round(np.median([each for each in seconds if each]) / 60)

    words = "a pre-training took {} minutes on the world and {} on CIFAR-10, a fine-tuning {}"
    runs = ("world/*/*/pretrain/*.json", "cifar10/*/*/pretrain/*.json", "*/*/*/*-*/*.json")
    assert words.format(*map(minutes, runs)) in text
    for arch, words in (("resnet_nano", " of ten classes"), ("vit_nano", "")):
        dropped = []                                    # top-1 with half of the patches, as it says
        for arm in sweep.FOUR[1:]:
            for seed in range(4):
                curves = RESULTS[f"world/{arch}/{arm}/occlusion/seed{seed}"]["curves"]
                places, means, *_ = curves["top-1, %, by share of patches dropped"]["model"]
                dropped.append(means[places.index(0.5)])
        assert f" {min(dropped):.1f} to {max(dropped):.1f} %{words}" in text
    ended = [json.loads((HERE / f"results/world/vit_nano/supervised/pretrain/{seed}.json").read_text())
             for seed in ("seed0", "seed1", "seed1.2")]  # the supervised ViTs, as it says
    ended = ["{:.2f}".format(result["top1"]) for result in ended]
    assert "{} and {} % top-1 (the second trained again: {})".format(*ended) in text
    for part, metric, least, words in (("class-1024", "top1", 1.7, "{:.2f} and {:.2f} % top-1"),
                                       ("mask-1024", "miou", 0.4, "{:.2f} and {:.2f} mIoU")):
        for arm in sweep.FOUR[1:]:                      # of each one's two pre-trainings
            value = sweep.values(RESULTS, f"world/vit_nano/{arm}", part, metric)
            first, second = (value[0] + value[2]) / 2, (value[1] + value[3]) / 2
            if arm == "supervised":
                assert words.format(first, second) in text
            else:
                assert abs(first - second) < least
    miou = sweep.values(RESULTS, "world/vit_nano/supervised", "mask-256", "miou")
    assert f"than with 256 ({np.mean([miou[seed] for seed in (1, 3, 5)]):.2f})" in text
    repeats = sorted((HERE / "results/half/vit_nano/simmim/mask-256").glob("seed0*.json"))
    for path in repeats:
        assert f"{json.loads(path.read_text())['miou']:.2f}" in sweep.PAGES[1].read_text(), path.name


def test_evidence_pairs_are_pairs():
    """In the result files: the same labels, order, first head and configuration in every arm."""
    first = {}
    for run, result in RESULTS.items():
        table, arch, arm, part, seed = run.split("/")
        if "-" in part:
            config = {key: value for key, value in result["config"].items() if key != "init"}
            known = first.setdefault((table, arch, part, seed), (result["hashes"], config))
            assert (result["hashes"], config) == known and result["step"] == 500, run
            assert set(result["hashes"]) == {"labels", "order", "head"}


def test_evidence_was_designed_before_it_was_run():
    def first_commit(*words):
        git = ["git", "-C", str(HERE), "log", "--reverse", "--format=%H", *words]
        return subprocess.run(git, capture_output=True, text=True).stdout.split()[:1]

    design = first_commit("-S## Decided before the runs", "--", "docs/evidence.md")
    results = first_commit("--diff-filter=A", "--", ":(glob)results/*/*/*/*/seed?.json")
    if results:
        git = ["git", "-C", str(HERE), "merge-base", "--is-ancestor", *design, *results]
        assert design != results and subprocess.run(git).returncode == 0


@pytest.mark.parametrize("path", sorted((HERE / "checkpoints").glob("*.pt")), ids=str)
def test_checkpoints_give_what_is_said(path, tmp_path):
    """What half precision costs: little of the loss or top-1; of one cell, behind SLOW=1."""
    arch, arm = path.stem.split("-")
    model, about = weights.open_model(path)
    original = RESULTS[f"world/{arch}/{arm}/pretrain/seed0"]
    cfg = recipes.Config(about["run"])
    assert not about["missing"] and not about["unused"] and path.stat().st_size < 3e6
    if arm == "supervised":
        again = tune(tmp_path / "run", "--init", path, "--eval")
        assert again["top1"] == pytest.approx(original["top1"], abs=0.4)     # two images
    else:
        images, masks = train.validation_set(shapes.Shapes(32, "val"), cfg, cfg.seed, "cpu")
        criterion = losses.A2MIMLoss(cfg.spatial_loss, cfg.frequency_loss, cfg.frequency_weight,
                                     cfg.frequency_standin or "mixed", cfg.frequency_visible or 0.0)
        loss = train.validate(model, criterion, images, masks, cfg, 32)
        assert loss == pytest.approx(original["val_loss"], rel=1e-4)
    if SLOW:
        run = f"world/{arch}/{arm}/mask-256/seed0"
        argv = sweep.command(run, SWEEP)[1:]
        again = tune(tmp_path / "cell", *argv, "--init", path, "--out", tmp_path / "cell")
        print(path.name, "mIoU", again["miou"], "with the original", RESULTS[run]["miou"])
        assert again["miou"] == pytest.approx(RESULTS[run]["miou"], abs=1)


# ---- recipes.py, protocols.py: as published

def config_of(*argv):
    return recipes.pretraining([str(word) for word in argv], "")[0]


def protocol_of(*argv):
    return protocols.finetuning([str(word) for word in argv], "")[0]


COLOURS = dict(
    data="shapes", shapes_count=4096, channels=3, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
STEP = COLOURS | dict(
    mask="random", mask_size=32, mask_ratio=0.6, img_size=224, batch_size=2048, epochs=800,
    lr=4e-4, min_lr=None, schedule="step", lr_step_epoch=700, warmup_epochs=10, weight_decay=0.05,
    clip=5.0, drop_path=0.1, crop_scale=[0.67, 1.0], mask_layer=0, fill="mean", token="add",
    spatial_loss="l1", frequency_loss="focal", frequency_weight=0.1, frequency_standin="mixed",
    frequency_visible=0, token_lr_scale=1)
COSINE = dict(schedule="cosine", lr_step_epoch=None, min_lr=1e-5)
DEIT = STEP | COSINE | dict(img_size=192, lr=8e-4, mask_layer=8)
RESNET = STEP | COSINE | dict(
    epochs=300, lr=1.2e-3, clip=None, drop_path=None, crop_scale=[0.8, 1.0], mask_layer=3,
    spatial_loss="focal_l1", frequency_weight=0.5, frequency_visible=1e-3, token_lr_scale=0.1)
OFF = dict(
    frequency_loss=None, frequency_weight=None, frequency_standin=None, frequency_visible=None)
AS_SIMMIM = OFF | dict(
    mask_layer=0, fill="none", token="replace", spatial_loss="l1", crop_scale=[0.67, 1.0],
    token_lr_scale=1)
RECIPES = [  # recipe, architectures, what is published, or ours
    ("imagenet", "vit_s vit_b vit_l", STEP),
    ("imagenet", "deit_t deit_s", DEIT),
    ("imagenet", "resnet18 resnet34 resnet50", RESNET),
    ("imagenet", "resnet101", RESNET | dict(frequency_loss="focal_l1", frequency_weight=0.1)),
    ("imagenet", "resnet152 resnet200 convnext_t convnext_s convnext_b", RESNET | OFF),
    ("imagenet100", "deit_t deit_s", DEIT),
    ("imagenet100", "resnet18 resnet34 resnet50", RESNET | dict(epochs=800, img_size=192)),
]


@pytest.mark.parametrize("recipe,archs,row", RECIPES)
def test_recipes(recipe, archs, row):
    for arch in archs.split():
        argv = ["--arch", arch, "--recipe", recipe]
        assert config_of(*argv) == row | dict(arch=arch, method="a2mim")
        is_vit = arch.startswith(("vit", "deit"))
        simmim = row | AS_SIMMIM | dict(lr=4e-4 if is_vit else 8e-4)
        expected = simmim | dict(arch=arch, method="simmim")
        assert config_of(*argv, "--method", "simmim") == expected


TUNED = dict.fromkeys(protocols.OPTIONS) | COLOURS | dict(
    img_size=224, test_resize=256, test_crop=224, epochs=100, batch_size=1024, optimizer="adamw",
    lr=1e-2, min_lr=1e-6, schedule="cosine", warmup_epochs=20, weight_decay=0.05, layer_decay=0.65,
    clip=5.0, drop_path=0.1, loss="ce", label_smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=9,
    random_erasing=0.25, crop_scale=[0.08, 1.0], pool="mean", head_std=0.01, qv_bias=True,
    resize_bias=True, sync_bn=True)
A3 = dict.fromkeys(protocols.OPTIONS) | COLOURS | dict(
    img_size=160, test_resize=236, test_crop=224, epochs=100, batch_size=2048, optimizer="lamb",
    lr=8e-3, min_lr=1e-6, schedule="cosine_by_epoch", warmup_epochs=5, weight_decay=0.02,
    loss="bce", mixup=0.1, cutmix=1.0, randaugment=6, crop_scale=[0.08, 1.0], pool="mean",
    head_std=0.01, sync_bn=True)
A2 = A3 | dict(
    img_size=224, epochs=300, lr=5e-3, randaugment=7, repeated_augmentation=3, drop_path=0.05)
KNN = dict.fromkeys(protocols.OPTIONS) | COLOURS | dict(
    img_size=224, test_resize=256, test_crop=224, batch_size=256, pool="mean", qv_bias=True,
    resize_bias=True)
PROBE = KNN | dict(
    optimizer="sgd", weight_decay=0, warmup_epochs=0, loss="ce", crop_scale=[0.08, 1.0],
    head_std=0.01, sync_bn=True)
PROBE_VIT = PROBE | dict(epochs=90, batch_size=1024, lr=12, min_lr=0, schedule="cosine")
OF_A_CNN = dict(qv_bias=None, resize_bias=None)
PROBE_CNN = PROBE | OF_A_CNN | dict(
    epochs=100, lr=30, schedule="step", lr_step_epochs=[60, 80])
AS_CONVNEXT = TUNED | OF_A_CNN | dict(
    epochs=300, batch_size=4096, lr=4e-3, schedule="cosine_from_start", warmup_epochs=5,
    layer_decay=None, clip=None, drop_path=0.4, ema=0.9999, head_std=0.02)
PROTOCOLS = [  # recipe, protocol, architectures, what is published, or ours
    ("imagenet", "simmim", "vit_s", TUNED | dict(epochs=200)),
    ("imagenet", "simmim", "vit_b", TUNED | dict(ema=0.99996)),
    ("imagenet", "simmim", "vit_l",
     TUNED | dict(epochs=150, ema=0.99996, repeated_augmentation=3)),
    ("imagenet", "simmim", "deit_t deit_s", TUNED),
    ("imagenet", "rsb_a3", "resnet18 resnet34 resnet50 resnet101 resnet152 resnet200", A3),
    ("imagenet", "rsb_a2", "resnet50", A2 | dict(ema=0.9999)),
    ("imagenet", "rsb_a2", "resnet101", A2 | dict(drop_path=0.1)),
    ("imagenet", "rsb_a2", "resnet152", A2 | dict(drop_path=0.15)),
    ("imagenet", "rsb_a2", "resnet200", A2 | dict(drop_path=0.2)),
    ("imagenet", "linear", "vit_s vit_b vit_l deit_s", PROBE_VIT),
    ("imagenet", "linear", "resnet50 resnet101 resnet152 resnet200", PROBE_CNN),
    ("imagenet", "knn", "vit_b", KNN),
    ("imagenet", "convnext", "convnext_t convnext_s", AS_CONVNEXT),
    ("imagenet", "convnext", "convnext_b", AS_CONVNEXT | dict(drop_path=0.5)),
    ("imagenet100", "simmim", "deit_s", TUNED | dict(
        lr=8e-3, warmup_epochs=5, pool="token", head_std=0.02, qv_bias=False, resize_bias=False)),
    ("imagenet100", "simmim", "resnet50", TUNED | OF_A_CNN | dict(
        batch_size=2048, lr=5e-3, schedule="cosine_from_start", layer_decay=None, clip=None,
        drop_path=None, sync_bn=False)),
]


@pytest.mark.parametrize("recipe,protocol,archs,row", PROTOCOLS)
def test_protocols(recipe, protocol, archs, row):
    for arch in archs.split():
        argv = ["--arch", arch, "--protocol", protocol, "--recipe", recipe]
        assert protocol_of(*argv) == row | dict(arch=arch, protocol=protocol)
        if "rsb" in protocol or protocol == "convnext":  # what is trained from scratch is trained alike
            argv[3] = "scratch-" + protocol
            assert protocol_of(*argv) == row | dict(arch=arch, protocol=argv[3])


def test_what_follows_from_what_is_given():
    # lr scales with the batch, unless it is given
    for configure, lr in ((config_of, 1e-4), (protocol_of, 5e-3)):
        assert configure("--arch", "vit_b", "--batch-size", 512).lr == pytest.approx(lr)
        assert configure("--arch", "vit_b", "--batch-size", 512, "--lr", 3e-4).lr == 3e-4
    assert config_of("--arch", "resnet50", "--frequency-loss", "none").frequency_weight is None
    assert config_of("--arch", "vit_b", "--drop-path", "none").drop_path == 0
    assert config_of("--img-size", 96).mask_size == 24
    # the usual protocol, and sizes of training and of tests
    for argv, protocol, sizes in (
            (("vit_b", "--img-size", 256), "simmim", (256, 293, 256)),
            (("resnet50", "--img-size", 64), "rsb_a3", (64, 101, 96)),
            (("resnet_nano", "--test-resize", 48), "small", (32, 48, 32)),
            (("vit_nano", "--task", "pose"), "small", (64, 64, 64))):
        config = protocol_of("--arch", *argv)
        assert (config.img_size, config.test_resize, config.test_crop) == sizes
        assert config.protocol == protocol
    assert config.crop_scale is None and config.loss is None  # of poses
    off = protocol_of("--arch", "vit_b", "--layer-decay", "none", "--ema", "none")
    assert off.layer_decay is off.ema is None
    # what is given goes before the method's and the recipe's
    given = "--method simmim --fill zero --mask-layer 1 --crop-scale 0.5 0.9 --frequency-loss l1"
    config = config_of(*given.split())
    assert (config.fill, config.mask_layer, config.crop_scale) == ("zero", 1, [0.5, 0.9])
    assert config.frequency_loss == "l1" and config.frequency_standin == "mixed"
    again = pickle.loads(pickle.dumps(config))  # it travels to loader processes
    assert again == config and again.fill == "zero"


def test_micro_batches():
    assert recipes.micro_batch(2048, None, 8, 256) == 256
    assert recipes.micro_batch(2048, None, 16, 256) == 128  # no more than there are
    assert recipes.micro_batch(96, None, 1, 64) == 48  # the largest that divides
    for batch, asked, world in ((96, 64, 1), (10, None, 4), (96, 32, 2)):
        with pytest.raises(ValueError, match=f"{batch} is not divisible by {world} process"):
            recipes.micro_batch(batch, asked, world, 64)


# ---- optim.py

# script, options, steps an epoch; step: learning rate, worked out from the published formulas
RATES = [
    ("train", "--arch vit_b", 625, {
        0: 6.4e-08, 625: 4.0064e-05, 6249: 0.0004, 6250: 0.0004, 125000: 0.0004, 250000: 0.0004,
        437499: 0.0004, 437500: 4e-05, 499374: 4e-05, 499999: 4e-05}),
    ("train", "--arch resnet50 --epochs 100", 625, {
        0: 1.92e-07, 625: 0.000120192, 6249: 0.0012, 6250: 0.0012, 15625: 0.00112028511525174,
        31249: 0.000708353391765014, 31250: 0.000708320665711824, 46875: 0.000222541372236509,
        61874: 1.03636185986402e-05, 62499: 1.00000009279865e-05}),
    ("train", "--arch resnet50", 625, {
        0: 1.92e-07, 625: 0.000120192, 6249: 0.0012, 6250: 0.0012, 46875: 0.00105848642280094,
        93749: 0.000637222948568815, 93750: 0.000637212650608323, 140625: 0.000195818821982213,
        186874: 1.00350247537488e-05, 187499: 1.0000000089378e-05}),
    ("train", "--arch convnext_t", 625, {
        0: 1.92e-07, 625: 0.000120192, 6249: 0.0012, 6250: 0.0012, 46875: 0.00105848642280094,
        93749: 0.000637222948568815, 93750: 0.000637212650608323, 140625: 0.000195818821982213,
        186874: 1.00350247537488e-05, 187499: 1.0000000089378e-05}),
    ("train", "--arch deit_s --recipe imagenet100", 61, {
        0: 1.31147540983607e-06, 61: 8.13114754098361e-05, 609: 0.0008, 610: 0.0008,
        12200: 0.00069251213009595, 24399: 0.000412879209780293, 24400: 0.000412853464127703,
        36600: 0.000128483380545077, 48738: 1.00032265305423e-05, 48799: 1.00000008393691e-05}),
    ("finetune", "--arch vit_b --protocol simmim", 1251, {
        0: 3.99680255795364e-07, 1251: 0.000500399680255795, 25019: 0.01, 25020: 0.01,
        31275: 0.00990393600937595, 62549: 0.00691387081131823, 62550: 0.00691372582010927,
        93825: 0.0022229266200185, 123848: 4.86059714746685e-06, 125099: 1.00000246321143e-06}),
    ("finetune", "--arch deit_s --recipe imagenet100", 123, {
        0: 1.30081300813008e-05, 123: 0.0016130081300813, 614: 0.008, 615: 0.008,
        3075: 0.00715666746733088, 6149: 0.00433184770069101, 6150: 0.00433077609221659,
        9225: 0.00129171235428285, 12176: 3.22239454821203e-06, 12299: 1.00014454997275e-06}),
    ("finetune", "--arch resnet50 --recipe imagenet100", 61, {
        0: 4.09836065573771e-06, 61: 0.000254035682092883, 1219: 0.00452339435370315,
        1220: 0.00452263797744018, 1525: 0.00426791339957578, 3049: 0.00250178728040828,
        3050: 0.0025005, 4575: 0.000733086600424225, 6038: 2.27411814154585e-06,
        6099: 1.00033148448888e-06}),
    ("finetune", "--arch convnext_s --protocol convnext", 312, {
        0: 2.56410256410256e-06, 312: 0.00080254210551526, 1559: 0.00399726326594934,
        1560: 0.00399725975474177, 23400: 0.0034143600089825, 46799: 0.00200056711126613,
        46800: 0.0020005, 70200: 0.000586639991017498, 93287: 1.11033775454957e-06,
        93599: 1.00000112626211e-06}),
    ("finetune", "--arch resnet50 --protocol rsb_a3", 625, {
        0: 2.56e-06, 625: 0.00160216466611277, 3124: 0.00796846274790725,
        3125: 0.00795075951821025, 15625: 0.0068285735713556, 31249: 0.00412612733093297,
        31250: 0.0040005, 46875: 0.0011724264286444, 61874: 8.8920996511279e-06,
        62499: 2.97351181725647e-06}),
    ("finetune", "--arch resnet101 --protocol rsb_a2", 625, {
        0: 1.6e-06, 625: 0.00100157254631008, 3124: 0.0049978075138321, 3125: 0.00499657452211906,
        46875: 0.00426791339957578, 93749: 0.00252667422439856, 93750: 0.0025005,
        140625: 0.000733086600424225, 186874: 1.54818165462367e-06, 187499: 1.1370491709024e-06}),
]


@pytest.mark.parametrize("script,argv,steps_per_epoch,rates", RATES)
def test_published_learning_rates(script, argv, steps_per_epoch, rates):
    config = (config_of if script == "train" else protocol_of)(*argv.split())
    for step, rate in rates.items():
        factor = optim.learning_rate(config, step, steps_per_epoch)
        assert config.lr * factor == pytest.approx(rate, rel=1e-12, abs=1e-17), step

    # and by the formula, at the first, a middle and the last step of every epoch
    warmup = config.warmup_epochs * steps_per_epoch
    total = config.epochs * steps_per_epoch
    for epoch in range(config.epochs):
        for within in (0, steps_per_epoch // 2, steps_per_epoch - 1):
            step = epoch * steps_per_epoch + within
            progress = {"step": 0.0,
                        "cosine": max(0, step - warmup) / (total - warmup),
                        "cosine_from_start": step / total,
                        "cosine_by_epoch": epoch / config.epochs}[config.schedule]
            low = config.min_lr or 0.0
            rate = low + (config.lr - low) * (1 + math.cos(math.pi * progress)) / 2
            if config.schedule == "step" and epoch >= 700:
                rate = 0.1 * config.lr
            rate *= min(1.0, (step + 1) / warmup)
            factor = optim.learning_rate(config, step, steps_per_epoch)
            assert config.lr * factor == pytest.approx(rate, rel=1e-12), step


def test_schedules_of_short_runs():
    short = config_of("--arch", "resnet50", "--epochs", 4)  # warm-up: half at most
    assert optim.learning_rate(short, 13, 7) == 1 > optim.learning_rate(short, 12, 7)
    probe = protocol_of("--arch", "resnet50", "--protocol", "linear")
    factors = [optim.learning_rate(probe, step, 10) for step in (0, 599, 600, 799, 800, 999)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def check_groups(model, config, decay, factors):
    """Matrices decay, the rest does not; factors: pattern of names -> factor on the peak rate."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    matched = set()
    for group in optim.make_optimizer(model, config).param_groups:
        for parameter in group["params"]:
            name = names.pop(parameter)
            plain = "pos_embed|cls_token|position_bias_table|layer_scale"
            is_plain = parameter.ndim == 1 or re.search(plain, name)
            assert group["weight_decay"] == (0 if is_plain else decay), name
            for pattern, factor in factors.items():
                if re.match(pattern, name):
                    assert group["peak_lr"] == pytest.approx(config.lr * factor), name
                    matched.add(pattern)
    assert not names and matched == set(factors)


@pytest.mark.parametrize("arch,token", [
    ("vit_b", 1.0), ("deit_s", 1.0), ("resnet50", 0.1), ("convnext_t", 0.1)])
def test_groups_of_pretraining(arch, token):
    config = config_of("--arch", arch)
    check_groups(models.build(arch, 32), config, 0.05, {"mask_token": token, "encoder|decoder": 1})


OF_VIT = {"head|fc_norm": 1, r"encoder\.blocks\.11\.": 0.65, r"encoder\.blocks\.0\.": 0.65 ** 12,
          "encoder.(pos_embed|cls_token|patch_embed)": 0.65 ** 13}
OF_DEIT = OF_VIT | {r"head|encoder\.norm": 1}
del OF_DEIT["head|fc_norm"]
TUNED_MODELS = [  # options; pool, head_std, qv_bias, sync_bn; weight decay; factors on the rate
    ("--arch vit_b --protocol simmim", ("mean", 0.01, True, True), 0.05, OF_VIT),
    ("--arch deit_s --recipe imagenet100", ("token", 0.02, False, True), 0.05, OF_DEIT),
    ("--arch resnet50 --recipe imagenet100", ("mean", 0.01, None, False), 0.05, {"": 1}),
    ("--arch resnet50 --protocol rsb_a3", ("mean", 0.01, None, True), 0.02, {"": 1}),
    ("--arch resnet50 --protocol rsb_a2", ("mean", 0.01, None, True), 0.02, {"": 1}),
    ("--arch convnext_t --protocol convnext", ("mean", 0.02, None, True), 0.05, {"": 1}),
    ("--arch resnet_nano --protocol small", ("mean", 0.01, None, True), 0.05,
     {"head": 1, r"encoder\.layer4": 0.8, r"encoder\.layer1": 0.8 ** 4,
      r"encoder\.(conv|bn)1": 0.8 ** 5}),
]


@pytest.mark.parametrize("argv,kind,decay,factors", TUNED_MODELS)
def test_tuned_models(argv, kind, decay, factors, monkeypatch):
    config = protocol_of(*argv.split())
    assert (config.pool, config.head_std, config.qv_bias, config.sync_bn) == kind
    options = {} if config.qv_bias is None else dict(qv_bias=config.qv_bias)
    encoder = models.build(config.arch, config.img_size, **options).encoder
    model = models.Predictor(encoder, 1000, config.pool, config.head_std)
    check_groups(model, config, decay, factors)

    # the head, what it sees, the biases
    assert model.head.weight.std().item() == pytest.approx(config.head_std, rel=0.02)
    names = dict(model.named_parameters())
    assert any("q_bias" in name for name in names) == bool(config.qv_bias)
    assert ("encoder.norm.weight" in names) == (config.pool == "token")
    assert ("fc_norm.weight" in names) == (config.arch in ("vit_b", "convnext_t"))

    # batch norm over all GPUs, or local to each
    converted = []
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "convert_sync_batchnorm",
                        lambda model: converted.append(model) or model)
    model.to = lambda *args, **options: model
    runtime.place(model, Mock(type="cuda"), 4, config.sync_bn)
    assert bool(converted) == config.sync_bn


def test_lamb_is_timms():
    peers = pytest.importorskip("timm.optim")
    x = torch.randn(8, 6, dtype=torch.float64, generator=data.generator(0))
    ends = []
    for make in (optim.LAMB, peers.Lamb):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 5).double()
        torch.nn.init.zeros_(net.weight)  # of norm 0: not scaled at first
        optimizer = make([dict(params=[net.weight], weight_decay=0.02),
                          dict(params=[net.bias], weight_decay=0.0)], lr=8e-3)
        for scale in (1e-3, 1.0, 30.0, 1e3, 1.0, 0.0):  # clipped and not
            optimizer.zero_grad()
            y = net(x)
            (scale * y.square().sum() + scale * y.sum()).backward()
            optimizer.step()
        ends.append(torch.cat([net.weight.flatten(), net.bias]))
    assert relative(*ends) < 1e-12


def test_ema_by_hand():
    model = torch.nn.BatchNorm1d(3)
    ema = optim.EMA(model, 0.9, warmup_steps=4)
    wanted = torch.ones(3)
    for step in range(7):
        model.weight.data += torch.randn(3)
        model(torch.randn(4, 3))  # moves the batch statistics
        ema.update(model, step)
        decay = 0.9 * (0.9 + 0.1 * min(1, step / 4))
        wanted = decay * wanted + (1 - decay) * model.weight.detach()
    assert relative(ema.module.weight, wanted) < 1e-6
    assert torch.equal(ema.module.running_mean, model.running_mean)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd"])
def test_a_step_left_out_leaves_no_trace(optimizer):
    """Weights, optimizer and batch statistics are as without the step, the first one included."""
    config = dict(optimizer=optimizer, lr=0.01, weight_decay=0.1, layer_decay=None)
    scaler = runtime.precision("off", torch.device("cpu"))[1]

    def train_on(batches):
        torch.manual_seed(0)
        model = models.Predictor(models.build("resnet_nano", 32).encoder, 3).train()
        made = optim.make_optimizer(model, config)
        for image in batches:
            before = optim.statistics(model)
            loss = model(image).square().mean()
            loss.backward()
            skipped = optim.update(model, made, scaler, 1.0, loss.detach(), before)
            assert bool(skipped) == bool(image.isnan().any())
        tensors = list(model.state_dict().values())
        for state in made.state.values():
            tensors += state.values()
        return [t for t in tensors if torch.is_tensor(t) and t.is_floating_point()]

    one, two = torch.randn(2, 4, 3, 32, 32, generator=data.generator(1))
    bad = torch.full_like(one, math.nan)
    around = train_on([bad, one, two, bad])
    for a, b in zip(train_on([one, two]), around, strict=True):
        assert torch.equal(a, b)


# ---- finetune.py: its parts

def test_mixed_targets():
    image = torch.randn(6, 3, 32, 32)
    label = torch.tensor([0, 1, 2, 3, 3, 1])
    hot = F.one_hot(label, 4).float()
    mixups = 0
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, target = finetune.mix(image, label, dict(mixup=0.8, cutmix=1.0), 4)
        lam = float(target[1, 1])  # λ, one for the batch
        assert torch.allclose(target, lam * hot + (1 - lam) * hot.roll(1, 0), atol=1e-5)
        mixups += torch.allclose(mixed, lam * image + (1 - lam) * image.roll(1, 0), atol=1e-5)
    assert 4 < mixups < 16  # a coin decides
    assert torch.equal(finetune.mix(image, label, dict(mixup=None, cutmix=None), 4)[1], hot)


def test_classification_by_hand():
    task = finetune.TASKS["class"]
    logits = torch.randn(5, 4, generator=data.generator(0), dtype=torch.float64)
    target = torch.rand(5, 4, generator=data.generator(1), dtype=torch.float64)
    p = logits.sigmoid()
    # summed over classes, averaged over images
    wanted = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()
    loss = task.loss(logits, target, dict(loss="bce", label_smoothing=None))
    assert relative(loss, wanted) < 1e-12
    scores = torch.tensor([[0.1, 0.9, 0, 0, 0, 0.2], [6, 5, 4, 3, 2, 1]])
    assert task.sums(scores, torch.tensor([1, 5]), 64).tolist() == [1, 1]
    # fewer than five classes
    assert task.sums(torch.eye(3), torch.tensor([0, 1, 0]), 64).tolist() == [2, 3]
    assert task.metrics([2, 3], 4) == dict(top1=50, top5=75)


def test_pose_and_mask_by_hand():
    task = finetune.TASKS["pose"]
    pose = torch.tensor([[0.5, 0.5, 0.3, 0.1], [0.25, 0.75, 0.4, 6.2]])
    assert task.sums(task.encode(pose), pose, 64).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
    moved = pose + torch.tensor([[3 / 64, 4 / 64, 2 / 64, math.radians(30)],  # and beyond 2π
                                 [0, 0, 0, math.radians(20)]])
    assert task.sums(task.encode(moved), pose, 64).tolist() == pytest.approx([5, 2, 50], rel=1e-4)
    mask = torch.tensor([[[1, 1], [0, 0]]]).bool()
    logits = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
    task = finetune.TASKS["mask"]
    assert task.sums(logits, mask, 2).tolist() == [1, 3, 1, 3]
    assert task.metrics([2, 10, 6, 14], 1)["miou"] == pytest.approx(50 * (2 / 10 + 6 / 14))


def test_augment():
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=data.generator(0))

    def views(count, magnitude, erasing):
        config = COLOURS | dict(randaugment=magnitude, random_erasing=erasing)
        return torch.stack(
            [finetune.augment(image, data.generator(i), config) for i in range(count)])

    before = torch.random.get_rng_state()
    strong = views(60, 9, 0.25)
    assert torch.equal(torch.random.get_rng_state(), before)  # the model's own
    assert torch.equal(strong, views(60, 9, 0.25))
    assert 5 < (strong == image).flatten(1).all(1).sum() < 35  # a quarter escapes both operations
    weak = (views(60, 1, None).float() - image).abs().mean()
    assert weak < 0.8 * (views(60, 9, None).float() - image).abs().mean()
    # erasing: how often, by what
    erased = (views(200, None, 0.25) != image).flatten(1).any(1).sum()
    assert erased == pytest.approx(50, abs=20)
    noise = data.normalize(views(1, None, 1.0))[0]
    box = (views(1, None, 1.0)[0] != image).any(0)
    assert noise[:, box].std() == pytest.approx(1, abs=0.15)


def test_knn_by_hand():
    bank = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [-1, 0]]), dim=1)
    labels = torch.tensor([0, 2, 1, 1])
    query = torch.tensor([[1.0, 0]])
    votes = finetune.votes(bank, labels, query, 3, 0.5, 4)
    wanted = torch.tensor([[math.exp(2), 1, math.exp(1 / math.sqrt(1.01) / 0.5), 0]])
    assert torch.allclose(votes / votes.sum(), wanted / wanted.sum())
    # however cold
    assert finetune.votes(bank, labels, query, 3, 1e-6, 4).isfinite().all()
    metrics = finetune.knn(bank, labels, bank, torch.tensor([0, 2, 1, 0]), 1, 0.5, 4)
    assert metrics == dict(top1=75, top5=100, n=4)


# ---- docs/why-is-my-mim-not-learning.md, docs/teaching.md, docs/exercises.md

@pytest.mark.parametrize("page", ["why-is-my-mim-not-learning", "teaching", "exercises"])
def test_pages_name_what_there_is(page, monkeypatch):
    """Files, functions (`module.function`; `file.py`, `function`), options and commands exist."""
    monkeypatch.chdir(HERE)
    text = re.sub(r"\s+", " ", (HERE / "docs" / f"{page}.md").read_text())
    quoted = re.findall(r"`([^`]+)`", text)
    named = [word.split(".") for word in quoted if re.fullmatch(r"[a-z]\w*(\.\w+)+", word)]
    named += [[file, *name.split(".")] for file, name in re.findall(r"`(\w+)\.py`, `([\w.]+)`", text)]
    for module, *names in named:
        if (HERE / f"{module}.py").exists() and names != ["py"]:
            thing = importlib.import_module(module)
            for name in names:
                assert hasattr(thing, name), (module, names)
                thing = getattr(thing, name)
    for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|ipynb))`", text):
        assert (HERE / path).exists(), path
    known = set(recipes.OPTIONS) | set(recipes.RUN) | set(protocols.OPTIONS) | set(protocols.RUN)
    known |= {"only", "images", "runs", "show", "jobs", "nproc_per_node", "max_restarts"}
    for option in re.findall(r"--([a-z][\w-]+)", " ".join(quoted)):
        assert option.replace("-", "_") in known, option
    for command in re.findall(r"`(?:OMP_NUM_THREADS=1 )?(?:python|torchrun \S+) (\w+\.py[^`]*)`", text):
        script, *argv = shlex.split(command)
        if script in CONFIGURE and "CHECKPOINT" not in argv and command not in BAD:
            CONFIGURE[script](argv, "")


@functools.cache
def held_out_images():
    source = shapes.Shapes(32, "val")
    return torch.stack([source[i][0] for i in range(256)])


def errors_of(name, mean=None, std=None):
    """Mean |error| over masked and over visible pixels, in standard deviations and in levels of 255."""
    model, about = weights.open_model(HERE / "checkpoints" / f"{name}.pt")
    mean = mean or about["mean"]
    std = std or about["std"]
    images = held_out_images()
    mask = masking.random_mask(256, 4, 0.6, [data.generator(0, "mask", i) for i in range(256)])
    M = masking.resize(mask, (32, 32)).expand(256, 3, 32, 32) > 0
    x = data.normalize(images, mean, std)
    with torch.no_grad():
        error = (model.eval()(x, mask) - x).abs()
    levels = error * 255 * torch.tensor(std).view(-1, 1, 1)
    means = [float(part.mean()) for part in (error[M], error[~M], levels[M], levels[~M])]
    print("{}, std {:.3f}: masked {:.2f}, visible {:.2f}; in levels {:.1f}, {:.1f}".format(
        name, std[0], *means))
    return means


def test_another_normalisation_is_worse_though_the_loss_may_be_lower():
    masked, _, levels, _ = errors_of("vit_nano-a2mim")
    other, _, other_levels, _ = errors_of("vit_nano-a2mim", [0.5] * 3, [0.5] * 3)
    assert other < 0.6 * masked and other_levels > 1.05 * levels
    assert errors_of("vit_nano-a2mim", [0.0] * 3, [1.0] * 3)[2] > 1.2 * levels      # pixels in 0..1
    assert errors_of("vit_nano-a2mim", [0.0] * 3, [1 / 255] * 3)[2] > 3 * levels    # bytes


@pytest.mark.parametrize("name", ["vit_nano-a2mim", "vit_nano-simmim",
                                  "resnet_nano-a2mim", "resnet_nano-simmim"])
def test_visible_blocks_are_reconstructed_worse_than_masked_ones(name):
    masked, visible, _, _ = errors_of(name)
    assert visible > 1.1 * masked


@pytest.mark.parametrize("arch, options, leaks", [
    ("vit_nano", dict(), False),
    ("resnet_nano", dict(), False),
    ("vit_nano", dict(fill="none", token="replace", mask_layer=0), False),
    ("resnet_nano", dict(fill="none", token="replace", mask_layer=0), True),      # a rim of a pixel
    ("vit_nano", dict(fill="none", token="none"), True),
    ("vit_nano", dict(fill="none", token="add", mask_layer=1), True)])
def test_what_the_model_sees_of_masked_pixels(arch, options, leaks):
    """Nothing but their mean, unless neither fill nor token hides them."""
    torch.manual_seed(0)
    model = models.build(arch, 32, **options).eval()
    image = torch.randn(2, 3, 32, 32)
    mask = masking.random_mask(2, 4, 0.6, data.generator(0))
    noise = torch.randn(2, 3, 32, 32) * masking.resize(mask, (32, 32))
    hidden = masking.resize(mask, (32, 32))
    noise = (noise - noise.sum((2, 3), keepdim=True) / hidden.sum((2, 3), keepdim=True)) * hidden
    with torch.no_grad():
        change = (model(image + noise, mask) - model(image, mask)).abs().max()
    assert (change > 1e-3) == leaks


# ---- what a user can get wrong: one line, exit code 2, nothing on the disk changed

@pytest.mark.parametrize("common, low, high", [(0.0, 3.3, 5.5), (1.0, 0.9, 1.5)])
def test_a_smaller_micro_batch_raises_the_frequency_loss(common, low, high):
    """32 errors averaged by 8: about 4 times as much where nothing is common to the images."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 3, 32, 32, generator=generator)
    target = torch.randn(32, 3, 32, 32, generator=generator) + common * 3 * shared
    mask = torch.ones(32, 4, 4)
    criterion = losses.A2MIMLoss()
    whole = criterion(torch.zeros_like(target), target, mask)
    parts = [criterion(torch.zeros_like(x), x, m) for x, m in zip(target.split(8), mask.split(8))]
    frequency = sum(part["frequency"] for part in parts) / 4
    assert low < frequency / whole["frequency"] < high
    spatial = sum(part["spatial"] for part in parts) / 4
    assert torch.allclose(spatial, whole["spatial"])


def test_an_encoder_without_decoder_says_so():
    """As after `weights.py export --to encoder`, or of a file for fine-tuning."""
    model, about = weights.open_model(HERE / "checkpoints" / "vit_nano-a2mim.pt")
    state = model.encoder.state_dict() | {"decoder_pred.weight": torch.zeros(3)}
    fresh = models.build("vit_nano", 32)
    said = weights.describe(weights.load(fresh, state))
    assert "new: mask_token.token, decoder." in said and "left in the file: decoder_pred.weight" in said


BAD = {  # command line: words of the one line
    "train.py --arch vit_x": "unknown arch 'vit_x': choose from",
    "train.py --arch timm/nosuch": "timm has no model 'nosuch'",
    "train.py --arch timm/efficientnet_b0": "is no sequence of modules",
    "finetune.py --arch timm/regnety_002 --img-size 50": "img_size 50 is not a multiple of",
    "train.py --channels 13": "need as many numbers in --mean and --std",
    "train.py --img-size 50": "img_size 50 is not a multiple of mask_size 12",
    "train.py --unknown 3": "unrecognized arguments",
    "train.py --crop-scale 0.9 0.5": "the smaller share first",
    "train.py --mask-ratio nan": "--mask-ratio nan: give a number in",
    "train.py --img-size 64 --mask-size 4": "not a multiple of 8, the encoder's stride at layer 0",
    "train.py --mask-layer 5": "0..4",
    "train.py --schedule step": "--lr-step-epoch",
    "train.py --arch vit_b --recipe imagenet100": "recipe of vit_b: choose from",
    "train.py --batch-size 10 --micro-batch 4": "not divisible by 1 process(es) × --micro-batch 4",
    "train.py --data nowhere": "no folder nowhere",
    "train.py --data text": "is no plain tar",
    "train.py --data few": "4 training images make no batch of 32",
    "train.py --data empty": "no images in empty",
    "train.py --data broken": "is no readable image",
    "train.py --data bands": "has 13 channels, not 3: see --channels",
    "train.py --data bands --channels 13": "python extras/stats.py SRC measures them",
    "train.py --init foreign.pt --arch resnet18": "in no known format",
    "train.py --init tuned.pt --arch resnet_nano": "holds a vit_nano, not a resnet_nano",
    "train.py --init vit.pt --img-size 32": "this model's (96, 3, 4, 4)",
    "train.py --out text": "exists: 'text'",
    "train.py --out other": "(0.5 there, 0.6 here): choose another --out or remove the folder",
    "train.py --out foreign": "another program",
    "train.py --out damaged": "and damaged/previous.pt cannot be read, or are damaged",
    "finetune.py --protocol rsb_a3": "no rsb_a3 protocol of imagenet for vit_nano: choose from",
    "finetune.py --protocol scratch-small --init vit.pt": "leave out --init",
    "finetune.py --init bare.pt": "does not say which architecture it holds",
    "finetune.py --init vit.pt --img-size 32": "build it with the file's architecture",
    "finetune.py --init tuned.pt --data three --eval": "has no class head for three",
    "finetune.py --init nan.pt --data three --eval": "not finite",
    "finetune.py --init tuned.pt --eval --epochs 3": "--epochs has no effect where nothing is",
    "finetune.py --init other/last.pt --out other": "other is where --init lies",
    "finetune.py --data few": "have no labels",
    "finetune.py --data single": "has one class only, cat",
    "finetune.py --data unmatched": "'emu'",
    "finetune.py --data three --task pose": "only the built-in images know the pose",
    "finetune.py --data three --protocol knn --k 10": "--k 10 is more than the 9",
    "finetune.py --data three --protocol knn --k 3 --out result": "the result of something else",
    "finetune.py --randaugment 9 --mean .2 .2 --std .1 .1": "--randaugment none",
    "finetune.py --labels 5000": "--labels 5000 is more than the 4096",
    "finetune.py --test-resize 40": "test_resize 40 is smaller than test_crop 64",
    "finetune.py --arch timm/swin_tiny_patch4_window7_224 --img-size 64 --test-crop 96":
        "timm/swin_tiny_patch4_window7_224 is tested at its own size",
    "finetune.py --test-crop 96": "vit_nano is tested at its own size",
    "analyze.py": "required: CHECKPOINT",
    "analyze.py bare.pt:vit_x": "unknown arch 'vit_x'",
    "analyze.py NAME=bare.pt:resnet18": "its encoder has encoder.",
    "analyze.py vit.pt --only attention,colour": "no analysis 'colour': choose from reconstruct, ",
    "analyze.py vit.pt vit.pt": "different names",
    "analyze.py vit.pt --images 3": "8 or more",
    "analyze.py vit.pt --data few": "8 ",
    "analyze.py vit.pt --out text": "exists: 'text'",
    "weights.py export nowhere.pt --to timm out.pt": "No such file",
    "weights.py export text --to timm out.pt": "holds no state_dict of PyTorch",
    "weights.py export cut.pt --to timm out.pt": "is damaged",
    "weights.py export list.pt --to timm out.pt": "holds no state_dict",
    "weights.py export bare.pt --to timm out.pt --arch vit_b": "its encoder has encoder.",
    "weights.py export vit.pt --to timm out.pt --img-size 33": "not a multiple",
    "weights.py export vit.pt --to torchvision out.pt": "torchvision has no counterpart",
    "weights.py export vit.pt --to timm text": "'text' exists",
    "weights.py export vit.pt --to timm no/folder.pt": "No such file",
    "bench.py speed": "invalid choice: 'speed'",
    "bench.py loader --data nowhere": "no folder nowhere",
    "bench.py loss --runs 0": "--runs and --batch must be 1 or more",
    "extras/stats.py few --channels 5": "can be read. few/1.png has 3 channels, not 5",
    "extras/prepare.py few text": "text exists",
    "extras/prepare.py broken out.tar --workers 0": "no image can be read",
    "extras/sweep.py --jobs many": "invalid int value: 'many'",
    "extras/sweep.py --show --results nowhere": "no results in nowhere",
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")

    # images
    names = [f"few/{i}.png" for i in range(5)]
    for split in ("train", "val"):
        names += [f"single/{split}/cat/1.png"]
        names += [f"unmatched/{split}/{label}/1.png" for label in "ab"]
        names += [f"three/{split}/{label}/{i}.png" for label in "bgr" for i in range(3)]
    write_images(root, [*names, "unmatched/train/emu/1.png"])
    for name in ("bands", "broken", "empty", "result", "other", "foreign", "damaged"):
        (root / name).mkdir()
    for i in range(40):
        np.save(root / f"bands/{i}.npy", np.zeros((32, 32, 13), np.uint8))
        (root / f"broken/{i}.jpg").write_text("hello")

    # checkpoints
    model = models.build("vit_nano", 64)
    bare = model.state_dict()
    config = config_of("--mask-ratio", 0.5) | dict(seed=0, init=None, images=4096, micro_batch=32)
    tuned = models.Predictor(model.encoder, 3).state_dict()
    broken = {name: value * math.nan for name, value in tuned.items()}
    for path, content in {
            "vit.pt": dict(model=bare, config=config),
            "tuned.pt": dict(model=tuned, config=config, classes=["x", "y", "z"]),
            "nan.pt": dict(model=broken, config=config),
            "bare.pt": bare,
            "foreign.pt": {"conv.weight": torch.ones(1)},
            "list.pt": [1, 2],
            "other/last.pt": dict(model=bare, config=config, step=3),
            "foreign/last.pt": {"conv.weight": torch.ones(1)}}.items():
        torch.save(content, root / path)
    for path in ("cut.pt", "damaged/last.pt", "damaged/previous.pt"):
        (root / path).write_bytes((root / "vit.pt").read_bytes()[:-9])
    (root / "text").write_text("hello")
    (root / "result/result.json").write_text('{"config": {}}')
    return root


def main_of(script):
    spec = importlib.util.spec_from_file_location(script.replace("/", "."), HERE / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


SCRIPTS = list(dict.fromkeys(command.split()[0] for command in BAD))


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_is_one_line(script, bad_files, monkeypatch, capsys):
    def tree():
        return {path: path.is_file() and path.read_bytes() for path in bad_files.rglob("*")}

    monkeypatch.chdir(bad_files)
    main = main_of(script)
    before = tree()
    for command, words in BAD.items():
        name, *argv = shlex.split(command)
        if name != script or "timm/" in command and not importlib.util.find_spec("timm"):
            continue
        if name in ("train.py", "finetune.py"):
            argv += ["--workers", "0"]
        with pytest.raises(SystemExit) as left:
            runtime.run(main, argv)
        said = capsys.readouterr().err
        assert left.value.code == 2 and len(said.splitlines()) == 1, (command, said)
        assert said.startswith(HERE.joinpath(script).name + ": ") and words in said, (command, said)
        assert tree() == before, command


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_print_config(script, capsys):
    with pytest.raises(SystemExit) as left:
        runtime.run(main_of(script), ["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and len(text.splitlines()) > 10
    if script in ("train.py", "finetune.py"):
        main_of(script)(["--arch", "vit_b", "--clip", "3", "--print-config"])
        shown = json.loads(capsys.readouterr().out)
        assert list(shown) == list((recipes if script == "train.py" else protocols).OPTIONS)
        assert shown["clip"] == 3 and all("--" + key.replace("_", "-") in text for key in shown)


# ---- runs of train.py and finetune.py

TINY = "--img-size 32 --batch-size 16 --epochs 1 --log-every 1".split()


def entries(out, key="loss"):
    """The entries of a run's log that have this key, without the speed."""
    log = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return [entry | dict(images_per_second=None) for entry in log if key in entry]


def curve(out, key="loss"):
    return [entry[key] for entry in entries(out, key)]


def checkpoint_of(out, name="last.pt"):
    return torch.load(Path(out, name), weights_only=True)


def pretrain(out, *argv):
    train.main([*TINY, "--workers", "0", "--out", str(out), *map(str, argv)])


def tune(out, *argv):
    """A run of finetune.py: its result."""
    finetune.main(["--workers", "0", "--log-every", "1", "--out", str(out), *map(str, argv)])
    return json.loads(Path(out, "result.json").read_text())


def assert_same(one, other):
    """Two checkpoints: all tensors to the last bit, and all else."""
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_end(one, other):
    """Two runs: their last checkpoints, the losses of all steps, each there once, and results."""
    assert_same(checkpoint_of(one), checkpoint_of(other))
    assert entries(one) == entries(other)
    steps = [entry["step"] for entry in entries(one)]
    assert steps == list(range(1, 1 + checkpoint_of(one)["step"]))
    if Path(one, "result.json").exists():
        assert Path(one, "result.json").read_text() == Path(other, "result.json").read_text()
        assert_same(checkpoint_of(one, "best.pt"), checkpoint_of(other, "best.pt"))


def save_noise(root, split, images):
    """Images of three classes that a small net tells apart: red, green and blue noise."""
    rng = np.random.default_rng(images)
    for i in range(images):
        path = Path(root, split, "rgb"[i % 3], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (32, 32, 3)).astype(np.uint8)
        pixels[..., i % 3] += 130
        Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A folder of 48 + 13 images."""
    root = tmp_path_factory.mktemp("noise")
    save_noise(root, "train", 48)
    save_noise(root, "val", 13)
    return str(root)


@pytest.mark.parametrize("options", ["", "--arch resnet_nano --method simmim --lr 0.01"])
def test_training_learns(options, noise, tmp_path, capsys):
    pretrain(tmp_path, "--data", noise, "--epochs", 8, "--warmup-epochs", 1, *options.split())
    weight = checkpoint_of(tmp_path)["config"]["frequency_weight"] or 0
    for entry in entries(tmp_path):
        total = entry["spatial"] + weight * entry["frequency"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert np.mean(curve(tmp_path)[-5:]) < 0.8 * np.mean(curve(tmp_path)[:5])
    picture = data.read_image(str(tmp_path / "recon.png")).float()
    assert picture.shape[1] > 4 * 32 and picture.shape[2] > 8 * 32 and picture.std() > 10
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("metric,sign,options", [
    ("top1", 1, "--batch-size 12 --epochs 5 --lr 0.002 --warmup-epochs 1"),
    ("top1", 1, "--arch resnet_nano --batch-size 12 --epochs 5 --lr 0.002 --warmup-epochs 1"),
    ("angle_deg", -1, "--task pose --freeze --batch-size 16 --labels 16 --epochs 30"),
    ("miou", 1, "--task mask --batch-size 16 --labels 16 --epochs 30"),
])
def test_fine_tuning_learns(metric, sign, options, noise, tmp_path, capsys):
    images = ["--data", noise] if metric == "top1" else ["--eval-every", 30]
    options = ["--arch", "vit_nano", "--img-size", 32, *options.split(), *images]
    result = tune(tmp_path / "run", *options)
    loss = curve(tmp_path / "run")
    assert np.mean(loss[-5:]) < 0.8 * np.mean(loss[:5])
    assert metric != "top1" or result["top1"] > 90
    tests = curve(tmp_path / "run", metric)
    assert len(tests) == (5 if metric == "top1" else 1)
    assert sign * result["best"][metric] == max(sign * value for value in tests)
    best = tmp_path / "run" / "best.pt"
    again = tune(tmp_path / "eval", "--init", best, "--eval", *(images if metric == "top1" else []))
    assert again[metric] == pytest.approx(result["best"][metric], rel=1e-4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("run,options", [
    (pretrain, "--arch vit_nano --drop-path 0.2 --micro-batch 6"),
    (pretrain, "--arch resnet_nano"),
    (tune, "--drop-path 0.2 --mixup 0.8 --cutmix 1 --randaugment 9 --random-erasing 0.25 "
           "--ema 0.9 --optimizer lamb --loss bce"),
    (tune, "--arch resnet_nano --optimizer sgd --repeated-augmentation 3 --labels 24 "
           "--micro-batch 4 --epochs 4"),
])
def test_resume_is_exact(run, options, noise, tmp_path, capsys):
    """Stopped in the middle and at the end of an epoch, the log torn, a key not yet known."""
    options = ["--arch", "vit_nano", "--img-size", 32, "--batch-size", 12, "--epochs", 2,
               "--data", noise, *options.split()]
    run(tmp_path / "straight", *options)
    parts = tmp_path / "parts"
    run(parts, *options, "--steps", 3)
    with open(parts / "log.jsonl", "a") as log:
        log.write('{"step": 4, "loss": 0.5}\n{"step')
    old = checkpoint_of(parts)
    default = old["config"].pop("weight_decay")
    torch.save(old, parts / "last.pt")
    with pytest.raises(ValueError, match=f"weight_decay .{default} there, 0.3 here.*another --out"):
        run(parts, *options, "--weight-decay", 0.3)
    for steps in (4, 8, 8):  # the last one finds nothing left to do
        run(parts, *options, "--steps", steps)
    assert capsys.readouterr().out.count("step 1/") == 2
    assert_same_end(tmp_path / "straight", parts)


def test_mixed_precision(noise, tmp_path):
    """On a CPU, auto is float32; fp16 goes through the gradient scaler."""
    last = {}
    for amp in ("auto", "bf16", "fp16"):
        pretrain(tmp_path / amp, "--data", noise, "--steps", 2, "--amp", amp)
        last[amp] = curve(tmp_path / amp)[-1]
    for amp in ("bf16", "fp16"):
        assert last[amp] != last["auto"] and last[amp] == pytest.approx(last["auto"], rel=0.02)
    assert checkpoint_of(tmp_path / "fp16")["scaler"]["scale"] > 0
    assert not checkpoint_of(tmp_path / "auto")["scaler"]


@pytest.mark.parametrize("run,arch,options", [
    (pretrain, "vit_nano", "--lr 0 --steps 1"),
    (tune, "resnet_nano", "--freeze --epochs 1 --batch-size 12"),
    (tune, "vit_nano", "--protocol linear --epochs 1 --batch-size 12 --test-resize 32 --test-crop 32"),
])
def test_weights_of_init_are_kept(run, arch, options, noise, tmp_path):
    """With a learning rate of 0, or frozen; a classifier is read for --eval only."""
    model = models.Predictor(models.build(arch, 32).encoder, 3)
    torch.nn.init.constant_(model.head.bias, 7)
    before = model.state_dict()
    start = tmp_path / "start.pt"
    torch.save(dict(model=before, config=dict(arch=arch, img_size=32)), start)
    run(tmp_path / "run", "--arch", arch, "--init", start, "--data", noise, "--img-size", 32,
        *options.split())
    after = checkpoint_of(tmp_path / "run")["model"]
    kept = [name for name in after if name.startswith("encoder.") and "encoder.norm" not in name]
    assert len(kept) > 50
    for name in kept:
        assert torch.equal(after[name], before[name]), name
    if run is tune:
        assert 0 < after["head.bias"].abs().max() < 1


@pytest.mark.parametrize("run,options", [
    (pretrain, "--arch vit_nano --drop-path 0.2 --micro-batch 6"),
    (pretrain, "--arch resnet_nano"),
    (tune, "--drop-path 0.2 --mixup 0.8 --cutmix 1 --ema 0.9 --loss bce"),
    (tune, "--arch resnet_nano --freeze --micro-batch 4"),
])
def test_compiled_runs(run, options, compiling, noise, tmp_path, monkeypatch):
    """Compiled once, though tests are between the steps, of batches that are no multiple; the same
    weights under the same names."""
    options = ["--arch", "vit_nano", "--img-size", 32, "--batch-size", 12, "--epochs", 2,
               "--save-epochs", 1, "--data", noise, *options.split()]
    run(tmp_path / "eager", *options)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    one_graph = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", one_graph)
    run(tmp_path / "compiled", *options, "--compile")
    assert len(graphs) == 1
    assert_same_end(tmp_path / "eager", tmp_path / "compiled")


# ---- several processes

# as torchrun starts them, but as forks of a process that has imported PyTorch already
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_all"])


def work(main, argv, log, environment, patch):
    """One process of a run."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers: as usual
    if patch is not None:
        patch()
    try:
        runtime.run(main, argv)
    finally:
        data.kill_workers()  # as at the exit of Python


class Run:
    """A run of train.py or finetune.py in processes of its own."""

    def __init__(self, script, *argv, processes=1, patch=None):
        """patch: a function to be called first."""
        self.log = tempfile.NamedTemporaryFile("r")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            shared = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]),
                          WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
        self.processes = []
        for rank in map(str, range(processes)):
            environment = shared | dict(RANK=rank, LOCAL_RANK=rank) if processes > 1 else {}
            main = dict(train=train.main, finetune=finetune.main)[script]
            process = FORKS.Process(target=work, args=(main, list(map(str, argv)), self.log.name,
                                                       environment, patch))
            process.start()
            self.processes.append(process)

    def wait(self):
        """(exit codes, minus the signal where one was killed; what the processes said)."""
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes], self.log.read()


def complete(*argv, **options):
    """A run that must end well: what it said."""
    codes, said = Run(*argv, **options).wait()
    assert not any(codes), said
    return said


ALIKE = ["--drop-path", "0", "--frequency-loss", "none"]  # nothing depends on the process

def watch(path):
    """A patch: note what training steps compute their losses from."""
    call = losses.A2MIMLoss.__call__
    seen = open(path + os.environ.get("RANK", "0"), "w")

    def watched(self, reconstruction, image, mask):
        if reconstruction.requires_grad:
            for i, m in zip(image, mask):
                print(zlib.crc32(i.numpy().tobytes() + m.numpy().tobytes()), file=seen, flush=True)
        return call(self, reconstruction, image, mask)

    losses.A2MIMLoss.__call__ = watched


def test_survives_another_number_of_processes(noise, tmp_path):
    """With other workers and accumulation, too: the same samples, crops, masks and losses."""
    options = ["train", *TINY, *ALIKE, "--data", noise, "--epochs", "2", "--save-epochs", "1"]

    def samples(name, out, processes, *argv):
        complete(*options, "--out", tmp_path / out, *argv, processes=processes,
                 patch=functools.partial(watch, str(tmp_path / name)))
        seen = []
        for rank in range(processes):
            seen += (tmp_path / f"{name}{rank}").read_text().split()
        return seen

    straight = samples("0-", "straight", 1, "--workers", "0")
    assert len(straight) == len(set(straight)) == 6 * 16
    part = samples("1-", "other", 1, "--workers", "2", "--micro-batch", "8", "--steps", "2")
    assert part == straight[:32]
    part = samples("2-", "other", 2, "--workers", "1", "--micro-batch", "4")
    assert sorted(part) == sorted(straight[32:])
    assert curve(tmp_path / "other") == pytest.approx(curve(tmp_path / "straight"), rel=1e-5)
    expected = curve(tmp_path / "straight", "val_loss")  # not that of step 2
    assert curve(tmp_path / "other", "val_loss")[1:] == pytest.approx(expected, rel=1e-5)


def test_fine_tuning_on_two_processes(noise, tmp_path):
    """As on one, with accumulation; each image is tested once."""
    options = ["--data", noise, "--img-size", "32", "--log-every", "1"]
    init = ["--init", tmp_path / "train" / "best.pt"]
    for name, argv, batch in (
            ("train", ["--arch", "vit_nano", "--epochs", "1", "--batch-size", "12"], "3"),
            ("eval", [*init, "--eval"], "5"),
            ("knn", [*init, "--protocol", "knn", "--k", "7"], "4")):
        one = tune(tmp_path / name, *options, *argv)
        complete("finetune", *options, *argv, "--micro-batch", batch, "--workers", "0", "--out",
                 tmp_path / f"{name}2", processes=2)
        two = json.loads((tmp_path / f"{name}2" / "result.json").read_text())
        assert two["n"] == one["n"] == 13 and two["top1"] == one["top1"] > 0
    assert curve(tmp_path / "train2") == pytest.approx(curve(tmp_path / "train"), rel=1e-5)


def test_processes_fail_together(tmp_path):
    """Bad input on two processes: one line, exit code 2 of both."""
    codes, said = Run("train", "--data", tmp_path / "nowhere", processes=2).wait()
    assert codes == [2, 2] and re.fullmatch("train.py: no folder .*nowhere.*\n", said), said


# ---- a run that survives
# SLOW=1 python -m pytest -q -s -k survives         as often as it takes to believe it

LIVELY = [*TINY, "--batch-size", "8", "--micro-batch", "4", "--drop-path", "0.2", "--epochs", "2"]


@pytest.fixture(scope="module", params=["train", "finetune"])
def lively(request, noise, tmp_path_factory):
    """(script and options, the folder of a run of twelve steps that was left alone)."""
    out = tmp_path_factory.mktemp("straight")
    options = [request.param, *LIVELY, "--data", noise]
    if request.param == "finetune":
        options += ["--mixup", "0.8", "--ema", "0.9", "--randaugment", "7"]
    complete(*options, "--workers", "0", "--out", out)
    return options, out


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid):
    pids = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            pids += [child, *descendants(child)]
    return pids


def wait_for(condition, what, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"no {what} in {seconds} seconds"
        time.sleep(0.002)


def wait_for_steps(out, steps):
    log = out / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count('"loss"') >= steps, "steps")


def test_survives_sigkill(lively, tmp_path):
    """Killed at random moments and started again: the bits of a run that was left alone."""
    options, straight = lively
    usual, slow = dict(train=(2, 50), finetune=(1, 10))[options[0]]
    trials = slow if SLOW else usual
    chance = random.Random(0)
    killed = 0
    torn = 0
    for i in range(trials):
        out = tmp_path / f"run{i}"
        command = [*options, "--workers", i % 3, "--save-minutes", (0, 0.003)[i % 2], "--out", out]
        run = Run(*command)
        pid = run.processes[0].pid
        wait_for_steps(out, chance.randrange(10))
        time.sleep(chance.uniform(0, 0.1))
        if i % 4 < 2:  # in the middle of a save
            wait_for(lambda: (out / "last.pt.tmp").exists() or not alive(pid), "save")
            time.sleep(chance.uniform(0, 0.01))
        run.processes[0].kill()
        killed += run.wait()[0] == [-signal.SIGKILL]
        torn += (out / "last.pt.tmp").exists()
        complete(*command)
        assert_same_end(straight, out)
    print(f"\n{options[0]}.py: {killed} of {trials} killed, {torn} of them in the middle of a "
          f"save; {trials} of {trials} ended with the same bits")
    assert killed >= 0.5 * trials


def test_survives_signals(lively, tmp_path):
    """SIGTERM, Ctrl-C and SIGUSR1 at random moments: saved within a few steps, none left."""
    options, straight = lively
    usual = dict(train=[signal.SIGTERM, signal.SIGINT], finetune=[signal.SIGUSR1])[options[0]]
    numbers = [signal.SIGTERM] * 10 + usual[-1:] * 5 if SLOW else usual
    chance = random.Random(2)
    for i, number in enumerate(numbers):
        out = tmp_path / f"run{i}"
        command = [*options, "--workers", "1", "--out", out]
        run = Run(*command)
        pid = run.processes[0].pid
        wait_for_steps(out, chance.randrange(1, 8))
        started = [pid, *descendants(pid)]
        step = len(curve(out))
        os.kill(pid, number)
        codes, said = run.wait()
        assert codes == [75] and "stopped after step" in said and "Traceback" not in said, said
        assert step <= checkpoint_of(out)["step"] <= step + 4
        assert len(started) >= 2
        wait_for(lambda: not any(map(alive, started)), "end of all processes", 20)
        assert "step 1/" not in complete(*command)
        assert_same_end(straight, out)
    print(f"\n{options[0]}.py: {len(numbers)} signals, each with a checkpoint and exit code 75")


def test_survives_a_signal_to_one_of_two(noise, tmp_path):
    """Both processes stop after the same step."""
    run = Run("train", *LIVELY, "--epochs", "1000", "--data", noise, "--workers", "0", "--out",
              tmp_path, processes=2)
    wait_for_steps(tmp_path, 2)
    run.processes[1].terminate()
    codes, said = run.wait()
    assert codes == [75, 75] and f"stopped after step {checkpoint_of(tmp_path)['step']} of" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL] if SLOW else [signal.SIGKILL])
def test_survives_the_end_of_torchrun(number, noise, tmp_path):
    """SIGTERM, or torchrun killed, which it cannot pass on: saved in a few steps, none left."""
    trials = 5 if SLOW else 1
    for i in range(trials):
        out = tmp_path / f"run{i}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", "train.py", *LIVELY, "--epochs", "1000", "--data", noise,
                   "--workers", "1", "--out", out]
        with open(tmp_path / "log", "w") as log:
            run = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=log, env=os.environ | dict(OMP_NUM_THREADS="1"))
        wait_for_steps(out, 3 * i + 1)
        started = descendants(run.pid)
        step = len(curve(out))
        run.send_signal(number)
        assert run.wait(timeout=60) != 0 and len(started) >= 4  # and their workers
        wait_for(lambda: not any(map(alive, started)), "end of all processes", 20)
        assert "stopped after step" in (tmp_path / "log").read_text()
        assert step <= checkpoint_of(out)["step"] <= step + 10  # of six thousand
    print(f"\ntorchrun, {number.name}: {trials} of {trials} with a checkpoint, no process left")


def break_losses():
    """A patch: losses of rank 1 are not finite in two steps, and from the tenth on."""
    call = losses.A2MIMLoss.__call__
    calls = []

    def broken(*args):
        loss = call(*args)
        calls.append(1)
        if os.environ["RANK"] == "1" and (len(calls) in (5, 12) or len(calls) > 18):
            loss["loss"] = loss["loss"] * (math.inf if len(calls) == 5 else math.nan)
        return loss

    losses.A2MIMLoss.__call__ = broken


def test_survives_numbers_that_are_not_finite(noise, tmp_path):
    """On one of two processes: left out on both, and counted; twenty in a row end the run."""
    run = Run("train", *TINY, "--data", noise, "--epochs", 10, "--save-epochs", 3, "--micro-batch", 4,
              "--workers", 0, "--out", tmp_path, processes=2, patch=break_losses)
    codes, said = run.wait()
    assert codes == [2, 2] and said.count("in 20 steps, up to 29: try a smaller --lr") == 1, said
    assert curve(tmp_path, "skipped") == [0, 0, 1, 1, 1, 2, 2, 2, 2, *range(3, 22)]
    assert [loss is None for loss in curve(tmp_path)[2:6]] == [True, False, False, True]
    state = checkpoint_of(tmp_path)
    for value in tree_leaves(state):
        assert not torch.is_tensor(value) or value.isfinite().all()
    assert state["step"] == 27
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {7.0}


def save(folder, step, weight=1.0):
    """A small checkpoint, as a run saves it."""
    state = dict(config={}, step=step, model=dict(weight=torch.full([9000], weight)))
    runtime.save(str(folder / "last.pt"), state, str(folder / "previous.pt"))
    return state


def test_survives_a_full_disk(tmp_path):
    """No room for a checkpoint after 20 of its places: one line says so, the others are as before."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="weights are no longer finite and are not saved"):
        save(tmp_path, 3, math.nan)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in np.linspace(0, os.path.getsize(tmp_path / "last.pt") - 1, 20).astype(int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), limits[1]))
        try:
            with pytest.raises(OSError, match="^.*last.pt cannot be written .*too large.*whole$"):
                save(tmp_path, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert all(path.read_bytes() == content for path, content in before.items())
    assert runtime.load(str(tmp_path), {})["step"] == 2
    print("\nfull disk: at 20 of 20 places of a save, last.pt is as before")


def test_survives_damage(tmp_path):
    """Bytes flipped, those of the file's directory too, and cuts: noticed, or harmless."""
    last = tmp_path / "last.pt"
    states = {step: save(tmp_path, step, float(step)) for step in (1, 2)}
    content = last.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [content[:at] for at in rng.integers(0, len(content), 50 if SLOW else 10)]
    places = list(rng.integers(0, len(content), 100 if SLOW else 20))
    # zipfile and PyTorch read the directory differently
    places += range(content.index(b"PK\x01\x02"), len(content), 1 if SLOW else 5)
    damaged += [content[:at] + bytes([content[at] ^ 255]) + content[at + 1:] for at in places]
    noticed = 0
    for damage in damaged:
        last.write_bytes(damage)
        loaded = runtime.load(str(tmp_path), {})
        assert_same(loaded, states[loaded["step"]])
        if loaded["step"] == 1:  # what is damaged never becomes previous.pt
            noticed += 1
            save(tmp_path, 2, 2.0)
            assert_same(checkpoint_of(tmp_path, "previous.pt"), states[1])
    print(f"\n{noticed} of {len(damaged)} flipped bytes and cuts noticed, the others are harmless")
    assert noticed >= 0.5 * len(damaged)


def test_survives_unreadable_images(tmp_path):
    """The same others take their places on two processes, counted; too many end a run."""
    root = tmp_path / "images"
    save_noise(root, "train", 60)
    save_noise(root, "val", 20)
    broken = [path for i in (7, 11, 30, 31, 50, 59) for path in root.rglob(f"{i}.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:99])  # 6 to train on and 2 to test on
    options = ["train", *TINY, *ALIKE, "--data", root, "--epochs", "2", "--batch-size", "12"]
    for name, processes in (("one", 1), ("two", 2)):
        said = complete(*options, "--workers", "1", "--max-bad", "0.2", "--out", tmp_path / name,
                        processes=processes)
        assert all(f"warning: {path} is no readable image" in said for path in broken)
        counts = curve(tmp_path / name, "unreadable")
        assert (counts[4], counts[9]) == (6, 6)  # five steps an epoch
    assert counts == curve(tmp_path / "one", "unreadable")
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
    strict = [*options, "--workers", "0", "--out", tmp_path / "strict"]
    codes, said = Run(*strict).wait()
    assert codes == [2] and re.search("train.py: .* more than --max-bad 0.01", said), said
    assert 0 < checkpoint_of(tmp_path / "strict")["step"] < 5
    complete(*strict, "--max-bad", "0.2")
    assert_same_end(tmp_path / "one", tmp_path / "strict")
    few = ["--arch", "vit_nano", "--data", root, "--img-size", 32, "--batch-size", 20, "--steps", 1]
    assert tune(tmp_path / "tuned", *few, "--max-bad", 0.2)["n"] == 20
    with pytest.raises(ValueError, match="2 of 20 .*could not be read, more than --max-bad 0.05"):
        tune(tmp_path / "strict-tuned", *few, "--max-bad", 0.05)


# ---- README.md and docs/

PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]


def blocks_of(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def documented_commands():
    """(command line, script, arguments) of all pages, and of the table of official results."""
    lines = []
    for page in PAGES:
        for block in blocks_of(page, "sh"):
            lines += block.replace("\\\n", " ").splitlines()
        prefix = re.search(r"command, `(torchrun .*finetune\.py .*)` and", page.read_text())
        if prefix:
            cells = re.findall(r"\| `(--(?:init|arch) [^`]*)` \|", page.read_text())
            lines += [f"{prefix[1]} {cell}" for cell in cells]
            cells = re.findall(r"\| `(train\.py [^`]*)`", page.read_text())
            lines += [f"torchrun {cell}" for cell in cells]
    found = []
    for line in lines:
        match = re.match(r"(?:python|torchrun) .*?((?:extras/)?\w+\.py)(.*)", line.split("#")[0].strip())
        if match and "convmixer" not in line:  # which has a test of its own
            found.append((line, match[1], shlex.split(match[2])))
    return found


def as_if_trained(path):
    """What last.pt of a run says of itself."""
    arch = re.match(r"runs/([^-]+)-", path)[1]
    nano = "nano" in arch
    return {"config": dict(arch=arch, img_size=recipes.RECIPES[arch]["img_size"] if nano else 224)}


def test_differences_name_their_proof():
    """Each row of docs/differences.md names a test that there is, or an official file and key."""
    tests = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.M))
    page = (HERE / "docs" / "differences.md").read_text()
    rows = re.findall(r"^\| \*\*(.+) \| (.+) \|$", page, re.M)
    assert len(rows) > 35
    for statement, proof in rows:
        assert "→" in statement or "ours" in statement, statement
        assert "`" in proof and set(re.findall(r"test_\w+", proof)) <= tests, proof


def test_readme_fits_its_readers():
    text = (HERE / "README.md").read_text()
    assert len(text.splitlines()) <= 300 and len(text.split()) <= 3000
    line = int(re.search(r"`train\.py`, line (\d+)", text)[1])
    assert (HERE / "train.py").read_text().splitlines()[line - 1] == "    for step in range(start, stop):"
    for page in PAGES:
        assert "<<" not in page.read_text(), page
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def test_documented_commands_are_valid_and_published(monkeypatch):
    """All parse; those on ImageNet change nothing of the published recipe but where it lives."""
    monkeypatch.setattr(runtime, "read", as_if_trained)
    counts = {"train.py": 0, "finetune.py": 0}
    for line, script, argv in documented_commands():
        if script not in counts:
            continue
        counts[script] += 1
        cfg = CONFIGURE[script](argv, "")[0]
        if "imagenet" in cfg.data and script == "train.py":
            given = [word for word in argv if word.startswith("--")]
            assert set(given) <= {"--arch", "--data", "--method", "--recipe", "--epochs", "--out"}, line
            assert cfg.epochs in (100, 300, 800)
    assert counts["train.py"] >= 25 and counts["finetune.py"] >= 22


def copy_of_the_project(folder):
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "test_*"))


# commands of standard input, one after the other; then the Python that the last of them printed
PERFORM = """
import contextlib, io, runpy, shlex, sys
for command in sys.stdin:
    sys.argv = shlex.split(command)[1:]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(sys.argv[0], run_name="__main__")
    print(said.getvalue())
exec("\\n".join(line.strip() for line in said.getvalue().splitlines()[1:]))
"""


def test_bring_your_own_as_the_readme_says(tmp_path):
    """Encoder, mask, fill, losses and data set, appended as printed; the commands as printed."""
    fork = tmp_path / "fork"
    copy_of_the_project(fork)
    for block in blocks_of(HERE / "README.md", "python"):
        heading = re.match(r"# at the end of (\w+\.py)\n", block)
        if heading:
            with open(fork / heading[1], "a") as file:
                file.write("\n\n" + block)
    printed = blocks_of(HERE / "README.md", "sh")
    commands = next(block for block in printed if "--arch convmixer" in block).splitlines()
    commands = [commands[0] + " --steps 5", *commands]
    commands = [line + " --workers 0" if "weights.py" not in line else line for line in commands]
    done = subprocess.run([sys.executable, "-c", PERFORM], input="\n".join(commands), cwd=fork,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 5 of" in done.stdout and "top1" in done.stdout
    config = checkpoint_of(fork / "runs/convmixer-a2mim-gratings")["config"]
    rows = [config[key] for key in ("mask", "fill", "spatial_loss", "frequency_loss", "data")]
    assert rows == ["square", "noise", "charbonnier", "low", "gratings"]
    assert (next(fork.glob("runs/analysis-*")) / "cka.json").exists()


def test_documented_code_runs(tmp_path, monkeypatch):
    """The Python blocks, as printed, where the files that they read exist."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    train.main("--steps 2 --workers 0".split())
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.jpg")
    torch.save({"model": models.build("vit_b").state_dict()}, "checkpoint.pth")
    resnet = models.build("resnet50")
    config = dict(arch="resnet50", img_size=224)
    torch.save({"config": config, "model": resnet.state_dict()}, "resnet.pt")
    torch.save(weights.export("resnet.pt", "torchvision")[0], "resnet50.pth")
    count = 0
    for page in PAGES:
        for block in blocks_of(page, "python"):
            if not block.startswith("# at the end of"):
                exec(block, {})
                count += 1
    assert count == 4
    assert os.path.exists("photo-reconstructed.png") and os.path.exists("curve.png")


FEW = {  # what makes a documented command short
    "train.py": "--steps 2 --workers 0 --batch-size 4 --micro-batch 1 --out runs/short-{n}",
    "finetune.py": "--workers 0 --batch-size 4 --micro-batch 1 --out runs/short-{n}",
    "analyze.py": "--images 8 --contexts 1 --pairs 1 --probe-images 32 --workers 0",
    "bench.py": "--runs 1 --batch 2",
}
STAND_INS = ("SUPERVISED", "SIMMIM", "A2MIM")            # checkpoints for analyze.py


@pytest.mark.skipif(not SLOW, reason="twenty minutes: SLOW=1")
def test_documented_commands_run(tmp_path):
    """Every command of the pages, with stand-ins for data and checkpoints, for a few steps."""
    here = tmp_path / "project"
    copy_of_the_project(here)
    shapes = "lambda split, size: Shapes(32, split, 200 if split == 'train' else 100)"
    with open(here / "data.py", "a") as file:
        file.write(f"\nSOURCES['cifar10'] = {shapes}\n")
    for name in ("imagenet", "imagenet100"):
        names = [f"{split}/{c}/{i}.jpg" for split in ("train", "val") for c in "ab" for i in range(12)]
        write_images(here / "path/to" / name, names, (64, 64))
    write_images(here / "path/to/photos", [f"{i}.jpg" for i in range(80)], (64, 64))
    write_images(here / "path/to/images", [f"{c}/{i}.jpg" for c in "ab" for i in range(40)], (64, 64))

    # runs that the commands go on from, each a file of random weights; a ViT of another project
    inits = [word for _, _, argv in documented_commands() for word in argv if word.startswith("runs/")]
    for path in {word for word in inits if word.endswith(".pt")}:
        state = as_if_trained(path)
        model = models.build(state["config"]["arch"], state["config"]["img_size"])
        if "small-" in path:
            model = models.Predictor(model.encoder, 10)
            state["classes"] = list(data.SOURCES["shapes"]("val", 32).classes)
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"model": model.state_dict()}, here / path)
    nano = "runs/vit_nano-a2mim-shapes/last.pt"
    torch.save(models.build("vit_b").state_dict(), here / "vit_base.pth")
    count = 0
    for n, (line, script, argv) in enumerate(documented_commands()):
        if "HOST" in line or (script == "extras/sweep.py" and "--show" not in argv):
            continue
        argv = [f"{word}={nano}" if word in STAND_INS else word for word in argv]
        few = FEW.get(script, "").format(n=n).split()
        if script == "finetune.py" and not {"knn", "--eval"} & set(argv):
            few += ["--steps", "2"]
        if script == "extras/prepare.py" and (here / argv[1]).exists():
            continue
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        if line.startswith("python"):
            words = [sys.executable]
        done = subprocess.run([*words, script, *argv, *few], cwd=here, capture_output=True, text=True)
        print(f"{done.returncode}  {line}", flush=True)
        assert done.returncode == 0, (line, done.stderr[-800:])
        shutil.rmtree(here / f"runs/short-{n}", ignore_errors=True)     # together 50 GB
        count += 1
    assert count > 60
