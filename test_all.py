"""The proof: python -m pytest -q (a few minutes on two cores; no network, no GPU, no other file needed).

Golden values come from the authors' official code, run in float64; they are held here as scalars over inputs and
weights that are computed from seeds, and once more tensor by tensor where the full files lie in ../shared/golden.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import analyze
import bench
import data
import evaluate
import finetune
import harness
import losses
import masking
import optim
import recipes
import model as models
import shapes
import sources
import study
import sweep
import train
import weights

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "shared" / "golden"


def relative(a, b):
    a, b = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (a, b))
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------ golden values

def philox(seed):
    return np.random.Generator(np.random.Philox(seed))


def official_value(name, shape):
    """The weights for which the official code's outputs were recorded: a function of each parameter's name."""
    n = philox(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    leaf = name.split(".")[-1]
    if leaf == "running_var":
        return np.abs(n) * np.float32(0.1) + np.float32(1)
    if leaf == "weight":
        return 1 + n * np.float32(0.1) if len(shape) == 1 else n * np.float32((1 / np.prod(shape[1:])) ** 0.5)
    return n * np.float32(0.1)


def official_name(name, value):
    """Our name and shape -> the official code's, written apart from weights.py and the other way round."""
    shape = list(value.shape)
    if name.startswith("mask_token."):
        vit = "token" in name and len(shape) == 1 and shape[0] != 1024
        return "backbone.mask_" + name.split(".")[1], [1, 1, *shape] if vit else [1, *shape, 1, 1]
    name = name.replace("decoder.0", "neck.decoder_pred.0").replace("encoder.", "backbone.")
    if "blocks." in name or name.startswith(("backbone.norm", "backbone.patch")):
        name = re.sub(r"\.norm(\d)\.", r".ln\1.", name.replace("blocks.", "layers.")).replace("backbone.norm", "backbone.ln1")
        name = name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1").replace("patch_embed", "patch_embed.projection")
    return name, shape


VIT = dict(arch="vit_b", img_size=64, dim=48, depth=3, heads=4, mlp_dim=192, drop_path=0.0)
CASES = {  # model, loss, Philox seed of the target, the visible of 2×2 blocks per image
    "vit_layer0": (VIT | dict(mask_layer=0), dict(spatial="l1", frequency_weight=0.1), 11, [1, 0, 3, 2]),
    "vit_layer2": (VIT | dict(mask_layer=2), dict(spatial="l1", frequency_weight=0.1), 12, [1, 0, 1, 1]),
    "resnet50_layer3": (dict(arch="resnet50", img_size=64),
                        dict(spatial="focal_l1", frequency_weight=0.5, visible=1e-3), 13, [3, 1]),
}
# The official values, of tensors: their norm, and their product with cos(0), cos(1), …
SCALARS = {
    "vit_layer0": {
        "loss": 1.1827670057138335, "spatial_loss": 1.1387489059349216, "grad_norm": 0.3926531562342037,
        "masked_image": (110.86885179767367, 136.376221782762), "feature": (56.039911436622766, -33.72441083539218),
        "reconstruction": (225.88833051744143, -106.4097086585318),
        "grad:backbone.mask_token": (0.11316261046981947, -0.039372722379866255),
        "grad:backbone.patch_embed.projection.weight": (0.10069973857983398, 0.011047484445356928),
        "grad:backbone.layers.1.attn.relative_position_bias_table": (0.0008761931343396405, 9.556141504132499e-05)},
    "vit_layer2": {
        "loss": 1.1788329007990033, "spatial_loss": 1.1305862235400785, "grad_norm": 0.41017464353901395,
        "masked_image": (111.8614665405646, 52.98460807536344), "feature": (56.06879315328725, -24.36441948402551),
        "reconstruction": (225.8135829112402, -60.91007449276744),
        "grad:backbone.mask_token": (0.1167421725881031, -0.026284246380894744),
        "grad:backbone.patch_embed.projection.weight": (0.1008456396553961, 0.04982625709481933),
        "grad:backbone.layers.1.attn.relative_position_bias_table": (0.0018265568136409326, -0.0003838373915940189)},
    "resnet50_layer3": {
        "loss": 0.7374541716826171, "spatial_loss": 0.2805440480147974, "grad_norm": 69.65059685700773,
        "masked_image": (77.95791010692916, -8.149730966878826), "feature": (200.20006935921123, 6.730648360112539),
        "reconstruction": (244.51560732998055, -75.01395229863844),
        "grad:backbone.mask_token": (0.019205156382611596, -0.00046091163694582816),
        "grad:backbone.mask_gamma": (0.09499042897355647, 0.06949939785356928),
        "grad:backbone.conv1.weight": (28.7047939949801, -2.0599841974480935)},
}


def official_model(case):
    """A case's model in float64, with the official weights brought in by the project's own reader."""
    model = models.build(**CASES[case][0])
    names = (official_name(n, v) for n, v in model.state_dict().items() if v.is_floating_point())
    state = {name: torch.from_numpy(np.asarray(official_value(name, shape))) for name, shape in names}
    report = weights.load(model, {"state_dict": state, "meta": {}})
    assert report["format"] == "OpenMixup" and not report["missing"] and not report["unused"]
    return model.double().train(), state


@pytest.fixture(scope="module", params=CASES)
def reproduced(request):
    """Everything the golden file of a case holds, computed by our code from seeds."""
    case = request.param
    _, loss, seed, visible = CASES[case]
    target = torch.from_numpy(philox(seed).standard_normal((len(visible), 3, 64, 64), dtype=np.float32)).double()
    mask = torch.ones(len(visible), 4)
    mask[range(len(visible)), visible] = 0
    mask = mask.view(-1, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    feature = official_model(case)[0].encode(target, mask)
    model, _ = official_model(case)
    reconstruction = model(target, mask)
    parts = losses.A2MIMLoss(**loss)(reconstruction, target, mask)
    parts["loss"].backward()
    gradients = {official_name(n, p)[0]: p.grad.reshape(official_name(n, p)[1]) for n, p in model.named_parameters()}
    found = dict(target=target, mask=mask, masked_image=masking.fill(target, mask), feature=feature, loss=parts["loss"],
                 reconstruction=reconstruction, spatial_loss=parts["spatial"],
                 grad_norm=torch.cat([g.flatten() for g in gradients.values()]).norm())
    return case, found | {"grad:" + name: g for name, g in gradients.items()}


def test_golden_models_as_scalars(reproduced):
    case, found = reproduced
    for name, expected in SCALARS[case].items():
        value = found[name].detach()
        if isinstance(expected, float):
            assert relative(value, expected) < 1e-8, name
        else:
            wave = torch.arange(value.numel(), dtype=torch.float64).cos()
            assert relative(value.norm(), expected[0]) < 1e-8, name
            assert abs(value.flatten() @ wave - expected[1]) < 1e-8 * expected[0] * wave.norm(), name


def test_golden_models_from_files(reproduced):
    case, found = reproduced
    if not (GOLDEN / f"{case}.npz").exists():
        pytest.skip(f"needs {GOLDEN / case}.npz; the scalar test above stands in for it")
    file = np.load(GOLDEN / f"{case}.npz")
    assert {n for n, _ in json.loads((GOLDEN / f"{case}.names.json").read_text())} == set(official_model(case)[1])
    for name in file.files:
        assert relative(found[name], file[name]) < 1e-8, name


# (loss, norm of its gradient in pred): average, log, alpha in the order of itertools.product
FREQUENCY = {
    (21, (4, 3, 48, 48)): [
        (1.2719717755506619, 0.010991467529043798), (0.8350550215512712, 0.007538323003428453),
        (1.4917083548568768, 0.012776124771974725), (1.2094179200342168, 0.010547014627885855),
        (0.3346507916121119, 0.0057941206750597544), (0.23204851935313556, 0.004203726643282648),
        (0.37557616301922153, 0.006452012566336215), (0.29233209104349095, 0.00515559839142862)],
    (22, (3, 3, 33, 47)): [
        (1.3368360546516356, 0.016247955968853072), (0.9212802963303058, 0.011682457238138903),
        (1.5372408742098016, 0.018522741571885673), (1.2690263755418134, 0.015563440811948166),
        (0.4763266735431927, 0.009969852718179089), (0.34687404215461093, 0.0075623322974856634),
        (0.5278328398620475, 0.010965998743304438), (0.42731018945484833, 0.00908331786867724)],
}
# the same for the whole loss, λ = 0.5: spatial loss, stand-in, u, then focal and the spatial loss's own form
TOTAL = [
    (1.2300829128872237, 0.008473659129879798), (1.6593563685238641, 0.009698930211904029),
    (1.2301133251080978, 0.00847374040425026), (1.6594230441439217, 0.009698659214618158),
    (1.2703352317064118, 0.00853625887912401), (1.7515410943668637, 0.009382773754031726),
    (1.2703352324885981, 0.008536259017635038), (1.751541095808012, 0.009382773922877334),
    (1.216298405476404, 0.008446298207156738), (1.624430792103026, 0.009847126751552894),
    (1.2163110992102286, 0.008446446787297902), (1.6244328053659407, 0.009847148768309217),
    (1.2442768580354742, 0.008501410458248666), (1.6924299423903189, 0.009573364588058327),
    (1.2442680397494288, 0.008501322944320202), (1.6924312838050113, 0.009573337654960403),
    (0.30118628559346855, 0.0034062092680164024), (0.2673487824557212, 0.002709867787742305),
    (0.30121669781434257, 0.003406360156857467), (0.2673667865843223, 0.002709864662540478),
    (0.34143860441265655, 0.0035454224357229737), (0.29424480923194857, 0.002705206766333203),
    (0.3414386051948429, 0.003545422768259806), (0.2942448096861754, 0.002705206812806296),
    (0.287401778182649, 0.0033496905728141774), (0.25833975926658154, 0.0027114297898197253),
    (0.28741447191647335, 0.003349902306422813), (0.2583397984061099, 0.0027114298322292504),
    (0.3153802307417189, 0.00346465055723952), (0.2764272164419047, 0.0027083329781554272),
    (0.31537141245567357, 0.0034645232057825665), (0.27642762623074957, 0.0027083328941531187)]
SIMMIM = 1.1241691861846663


def golden_images(seed, shape):
    rng = philox(seed)
    pred, target = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).double() for _ in range(2))
    return pred.requires_grad_(), target, torch.from_numpy(rng.random((4, 6, 6)) < 0.6)


def assert_loss(value, pred, expected):
    pred.grad = None
    value.backward()
    assert relative(value, expected[0]) < 1e-8 and relative(pred.grad.norm(), expected[1]) < 1e-8


@pytest.mark.parametrize("images", FREQUENCY)
def test_golden_frequency_losses(images):
    pred, target, _ = golden_images(*images)
    for expected, (average, log, alpha) in zip(FREQUENCY[images], itertools.product((False, True), (False, True), (0.5, 1.0)), strict=True):
        assert_loss(losses.frequency_loss(pred, target, average, log, alpha), pred, expected)


def test_golden_training_losses():
    pred, target, mask = golden_images(21, (4, 3, 48, 48))
    options = itertools.product(("l1", "focal_l1"), ("mixed", "prediction", "target", "mean"), (0.0, 1e-3), ("focal", None))
    for expected, (spatial, standin, visible, frequency) in zip(TOTAL, options, strict=True):
        loss = losses.A2MIMLoss(spatial, frequency or spatial, 0.5, standin, visible)
        assert_loss(loss(pred, target, mask)["loss"], pred, expected)
    simmim = losses.A2MIMLoss("l1", None)(pred, target, mask)
    assert relative(simmim["loss"], SIMMIM) < 1e-8 and simmim["frequency"] == 0


def test_golden_losses_from_files():
    if not GOLDEN.exists():
        pytest.skip(f"needs {GOLDEN}; the two tests above stand in for it")
    for name, images in zip(("losses_48", "losses_33x47"), FREQUENCY):
        file, (pred, target, mask) = np.load(GOLDEN / f"{name}.npz"), golden_images(*images)
        assert np.array_equal(file["pred"], pred.detach()) and np.array_equal(file["target"], target)
        tested = 0
        for entry in file.files:
            kind, _, options = entry.partition(":")
            if kind == "loss":
                average, log, alpha = re.fullmatch(r"average(\d)_log(\d)_batchmax1_alpha(.+)", options).groups()
                value = losses.frequency_loss(pred, target, average == "1", log == "1", float(alpha))
                assert_loss(value, pred, (file[entry], file["gradnorm:" + options]))
            elif kind == "total":
                spatial, standin, u, frequency = re.fullmatch(r"((?:focal_)?l1)_loss_([a-z]+)_u([\d.]+)_(.+)", options).groups()
                loss = losses.A2MIMLoss(spatial, frequency.removesuffix("_loss"), 0.5, standin, float(u))
                assert_loss(loss(pred, target, torch.from_numpy(file["mask"]))["loss"], pred, (file[entry], file["totalgradnorm:" + options]))
            elif kind == "simmim":
                assert relative(losses.A2MIMLoss("l1", None)(pred, target, mask)["loss"], file[entry]) < 1e-8
            tested += kind in ("loss", "total", "simmim")
        assert tested == len([e for e in file.files if not e.startswith(("pred", "target", "mask", "gradnorm", "totalgradnorm"))])


# ------------------------------------------------------------------------------------------------ losses.py

def plain_frequency_loss(pred, target, average, log, alpha, maximum):
    """The definition, word by word: two full transforms of every image."""
    P, T = (torch.fft.fft2(image, norm="ortho") for image in (pred, target))
    D = P.mean(0) - T.mean(0) if average else P - T
    w = D.abs().detach() ** alpha
    w = torch.log(1 + w) if log else w
    if maximum:
        w = (w / (w.max() if maximum == "batch" else w.amax((-2, -1), keepdim=True))).clamp(0, 1)
    return (w * D.abs() ** 2).mean()


@pytest.mark.parametrize("size", [(16, 16), (9, 12), (12, 9), (7, 5)])
def test_frequency_loss_is_its_definition(size):
    pred, target = torch.randn(2, 3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pred.requires_grad_()
    for options in itertools.product((False, True), (False, True), (0.5, 1.0, 2.0), ("batch", "image", None)):
        expected, value = plain_frequency_loss(pred, target, *options), losses.frequency_loss(pred, target, *options)
        (wanted,), (gradient,) = torch.autograd.grad(expected, pred), torch.autograd.grad(value, pred)
        assert relative(value, expected) < 1e-12 and relative(gradient, wanted) < 1e-12, options


@pytest.mark.parametrize("standin", losses.STANDINS)
def test_standins_are_their_definition(standin):
    g = torch.Generator().manual_seed(1)
    pred, x = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64, generator=g)
    pred.requires_grad_()
    mask, u = masking.random_mask(2, 4, 0.6, g), 0.25
    r = {"mixed": pred.detach() / 2 + x / 2, "prediction": pred.detach(), "target": x,
         "mean": x.mean((2, 3), keepdim=True).expand_as(x)}[standin]
    M = mask.double().repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    M_f = M + (1 - M) * u
    expected = plain_frequency_loss(M_f * pred + (1 - M_f) * r, x, False, False, 1.0, None)
    loss = losses.A2MIMLoss("l1", functools.partial(losses.focal_frequency, average=False, log=False, maximum=None), 1.0, standin, u)(pred, x, mask)
    assert relative(loss["frequency"], expected) < 1e-12
    assert relative(torch.autograd.grad(loss["frequency"], pred)[0], torch.autograd.grad(expected, pred)[0]) < 1e-12
    assert relative(loss["spatial"], (M * (pred - x).abs()).sum() / (3 * (M.sum() + 1e-5))) < 1e-12


def test_loss_types_and_masks():
    g = torch.Generator().manual_seed(2)
    pred, target = torch.randn(2, 4, 3, 32, 32, generator=g)
    mask = masking.random_mask(4, 4, 0.5, g)
    loss = losses.A2MIMLoss("focal_l1", visible=1e-3)
    value = loss(pred, target, mask)
    assert {v.dtype for v in value.values()} == {torch.float32}
    for dtype in (torch.float16, torch.bfloat16):
        half = loss(pred.to(dtype), target.to(dtype), mask)
        assert half["loss"].dtype == torch.float32 and relative(half["loss"], value["loss"]) < 0.02
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
    for same in (mask.bool(), mask.to(torch.uint8), mask.double(), pixels, pixels.bool()):
        assert loss(pred, target, same)["loss"] == value["loss"]
    assert losses.frequency_loss(target, target) == 0                       # no 0/0 where there is no error
    with pytest.raises(ValueError, match="does not divide"):
        loss(pred, target, torch.ones(4, 5, 5))
    for wrong in (dict(spatial="nonsense"), dict(frequency="nonsense"), dict(standin="nonsense")):
        with pytest.raises(ValueError, match="choose from"):
            losses.A2MIMLoss(**wrong)
    with pytest.raises(ValueError, match="choose 'batch'"):
        losses.frequency_loss(pred, target, maximum="all")


# ------------------------------------------------------------------------------------------------ masking.py

def test_random_mask():
    g = torch.Generator().manual_seed(0)
    for grid, ratio, masked in ((7, 0.6, 30), (2, 0.6, 3), (10, 0.07, 7), (6, 0.6, 22)):
        mask = masking.random_mask(5, grid, ratio, g)
        assert mask.shape == (5, grid, grid) and set(mask.unique().tolist()) == {0, 1}
        assert mask.sum((1, 2)).tolist() == [masked] * 5                    # ceil(ratio · grid²) of each image
    often = masking.random_mask(20000, 4, 0.5, g).mean(0)
    assert (often - 0.5).abs().max() < 0.02                                 # uniform: 5 standard errors
    each = masking.random_mask(3, 7, 0.6, [data.generator(i) for i in range(3)])
    for i in range(3):                                                      # an image's mask is its generator's alone
        assert torch.equal(each[i], masking.random_mask(1, 7, 0.6, data.generator(i))[0])
    assert not torch.equal(each[0], each[1])
    for wrong in (dict(ratio=0.0), dict(ratio=1.0), dict(ratio=-1), dict(ratio=0.5, grid=0), dict(ratio=0.5, generator=[g])):
        with pytest.raises(ValueError):
            masking.random_mask(**dict(batch=2, grid=4) | wrong)


def test_fill():
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    mask = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [1, 1]]])
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].bool().expand_as(image)
    filled = masking.fill(image, mask)
    assert torch.equal(filled[~pixels], image[~pixels])
    assert torch.equal(filled[pixels], image.mean((2, 3), keepdim=True).expand_as(image)[pixels])    # of all pixels
    assert (masking.fill(image, mask, "zero")[pixels] == 0).all() and torch.equal(masking.fill(image, mask, "none"), image)
    with pytest.raises(ValueError, match="unknown fill"):
        masking.fill(image, mask, "median")
    with pytest.raises(ValueError, match="does not divide"):
        masking.fill(image, torch.ones(2, 3, 3))


@pytest.mark.parametrize("blocks,size", [(7, 224), (3, 21), (6, 6), (24, 8), (5, 35)])
def test_resize_repeats_blocks(blocks, size):
    mask = torch.arange(blocks * blocks).view(1, blocks, blocks)
    if size >= blocks:
        expected = mask.repeat_interleave(size // blocks, 1).repeat_interleave(size // blocks, 2)
    else:                                                                   # block masks given at finer resolution
        mask = mask[:, :size, :size].repeat_interleave(blocks // size, 1).repeat_interleave(blocks // size, 2)
        expected = mask[:, ::blocks // size, ::blocks // size]
    assert torch.equal(masking.resize(mask, (size, size))[:, 0].long(), expected)


# ------------------------------------------------------------------------------------------------ model.py

def test_mask_token_formula():
    g = torch.Generator().manual_seed(0)
    z, mask = torch.randn(2, 5, 4, 4, generator=g), masking.random_mask(2, 2, 0.5, g)
    M = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    for how, gamma, factor in (("add", None, 1.0), ("replace", 0.3, 0.0), ("add", 0.3, 0.3)):
        token = models.MaskToken(5, how, gamma)
        t = token.token.view(5, 1, 1)
        expected = z * (1 - M) + factor * z * M + t * M
        assert torch.allclose(token(z, mask), expected, atol=1e-7)
        assert (how == "add" and gamma is not None) == (sum(1 for _ in token.parameters()) == 2)
        sequence = torch.cat([torch.randn(2, 1, 5, generator=g), z.flatten(2).transpose(1, 2)], 1)
        out = token(sequence, mask)
        assert torch.equal(out[:, 0], sequence[:, 0])                       # never the class token
        assert torch.allclose(out[:, 1:], expected.flatten(2).transpose(1, 2), atol=1e-7)


@pytest.mark.parametrize("arch,layers,units", [("vit_nano", 5, lambda e: [e.embed, *e.blocks[:-1]]),
                                               ("resnet_nano", 4, lambda e: [e.layer1, e.layer2, e.layer3, e.layer4])])
def test_mask_layer_counts_units(arch, layers, units):
    """The token enters just before the unit of its number, and only there."""
    for mask_layer in range(layers):
        model = models.build(arch, 32, mask_layer=mask_layer, fill="none").eval()
        image, mask, seen = torch.randn(2, 3, 32, 32), masking.random_mask(2, 4, 0.6), []
        originals = model.encoder.layers
        assert originals[:len(units(model.encoder))] == units(model.encoder)
        z = expected = model.encoder.stem(image)
        for i, layer in enumerate(originals):
            expected = layer(model.mask_token(expected, mask) if i == mask_layer else expected)
            z = layer(z)
        assert torch.allclose(model.encode(image, mask), expected) and not torch.allclose(expected, z)
        assert torch.allclose(model.encoder(image), z)                      # .encoder knows no mask
    without = models.build(arch, 32, token="none", fill="none").eval()
    assert without.mask_token is None and torch.equal(without.encode(image, mask), without.encoder(image))
    with pytest.raises(ValueError, match="mask_layer"):
        models.build(arch, 32, mask_layer=layers)


def test_relative_position_index():
    n = 3
    index = models.relative_position_index(n)
    for (qr, qc), (kr, kc) in itertools.product(itertools.product(range(n), repeat=2), repeat=2):
        assert index[1 + qr * n + qc, 1 + kr * n + kc] == (qr - kr + n - 1) * (2 * n - 1) + (qc - kc + n - 1)
    T = (2 * n - 1) ** 2 + 3
    assert (index[0, 1:] == T - 3).all() and (index[1:, 0] == T - 2).all() and index[0, 0] == T - 1


def test_vit_switches_and_shapes():
    image, mask = torch.randn(2, 3, 48, 48), masking.random_mask(2, 3, 0.6)
    plain = models.build("vit_nano", 48, patch_size=16, rel_pos_bias=False, abs_pos=True, layer_scale=None, drop_path=0.0)
    names = set(plain.encoder.state_dict())
    assert not any("gamma" in n or "relative" in n for n in names) and "pos_embed" in names
    assert "pos_embed" not in models.build("vit_nano", 48, abs_pos=False).encoder.state_dict()
    assert plain(image, mask).shape == image.shape and plain.encode(image, mask).shape == (2, 96, 3, 3)
    model = models.build("vit_b", 32, dim=32, depth=3, heads=2, mlp_dim=64)
    assert model.encoder.blocks[0].gamma_1.unique().item() == pytest.approx(0.1)
    assert [b.drop_path.p for b in model.encoder.blocks] == pytest.approx([0, 0.05, 0.1])
    assert (model.encoder.blocks[0].attn.relative_position_bias_table == 0).all()
    assert model.mask_token.token.std() < 0.06 and (model.decoder[0].bias == 0).all()
    with pytest.raises(ValueError, match="built for images of 32"):
        model.encoder(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="multiples of 32"):
        models.build("resnet50")(torch.zeros(1, 3, 40, 40), torch.ones(1, 2, 2))
    for wrong in (dict(arch="vit_x"), dict(arch="vit_b", img_size=100), dict(arch="resnet50", img_size=100), dict(arch="vit_b", heads=7),
                  dict(arch="vit_b", token="mean"), dict(arch="vit_b", fill="blur"), dict(arch="resnet50", dim=3), dict(arch="vit_nano", img_size=4)):
        with pytest.raises(ValueError):
            models.build(**wrong)


@pytest.mark.parametrize("arch,millions", [("vit_s", 48.8), ("vit_b", 86.7), ("vit_l", 304.6), ("deit_s", 22)])
def test_vit_parameter_counts(arch, millions):
    with torch.device("meta"):
        encoder = models.build(arch).encoder
    head = 1000 * (encoder.widths[-1] + 1)
    assert round((sum(p.numel() for p in encoder.parameters()) + head) / 1e6, 1 if millions != 22 else 0) == millions


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnet_is_torchvisions(arch):
    peer = getattr(torchvision.models, arch)().eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in peer.state_dict().items():                      # no zeros and ones that could hide a slip
            if tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=g) * 0.5 + (0.5 if "weight" in name or "var" in name else -0.25))
    peer.avgpool, peer.fc = torch.nn.Identity(), torch.nn.Identity()
    ours = models.build(arch, 64).encoder.eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}
    ours.load_state_dict(peer.state_dict())
    model = models.build(arch, 64)                                          # and through the reader, classifier and all
    report = weights.load(model, torchvision.models.__dict__[arch]().state_dict() | peer.state_dict())
    assert report["format"] == "ResNet of torchvision or timm" and report["unused"] == ["fc.weight", "fc.bias"]
    assert all(torch.equal(v, model.encoder.state_dict()[k]) for k, v in peer.state_dict().items())
    image = torch.randn(2, 3, 64, 64, generator=g)
    with torch.no_grad():
        assert relative(ours(image).flatten(1), peer(image)) < 1e-5
    assert models.build("resnet50").encoder.widths == [64, 256, 512, 1024, 2048]


def test_resnet_initialisation_and_drop_path():
    model = models.build("resnet50", 64, drop_path=0.5)
    blocks = [b for layer in model.encoder.layers for b in layer]
    assert all((b.bn3.weight == 0).all() and (b.bn1.weight == 1).all() for b in blocks)
    assert model.encoder.layer1[0].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)   # fan_out
    assert torch.allclose(model.mask_token.gamma, torch.full((1024,), 1e-6))
    assert [b.drop_path.p for b in blocks] == pytest.approx([0.5 * i / 15 for i in range(16)])
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in models.build("resnet_nano", 32).modules()) == 0
    assert models.build("resnet_nano", 32).encoder.strides == [1, 1, 2, 4, 8]


def test_drop_path_drops_whole_branches():
    block = models.Block(8, 2, 16, 0.5, None, None).train()
    x = torch.randn(400, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    dropped = (block(x) == x).all((1, 2)).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.08)                         # both branches of a sample
    assert not (block.eval()(x) == x).any()
    block = models.build("resnet18", 32, drop_path=0.5).encoder.layer4[1]   # the last block's is the given one
    torch.nn.init.ones_(block.bn2.weight)
    x = torch.rand(400, 512, 1, 1)
    assert (block(x) == x).all((1, 2, 3)).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert not (block.eval()(x) == x).all((1, 2, 3)).any()


@pytest.mark.parametrize("arch", ["vit_nano", "resnet_nano"])
def test_compiles_without_graph_breaks(arch):
    model = models.build(arch, 32).eval()
    image, mask = torch.randn(2, 3, 32, 32), masking.random_mask(2, 4, 0.6)
    expected = model(image, mask)
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(image, mask), expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(image, mask), expected) < 0.05


def test_own_encoder():
    """Whatever offers stem, layers, widths and strides can be pre-trained."""
    class Tiny(models.Encoder):
        widths, strides = [8, 16], [4, 8]

        def __init__(self):
            super().__init__()
            self.stem, self.stage = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Conv2d(8, 16, 2, 2)
            self.layers = [self.stage]

    model = models.A2MIM(Tiny())
    image, mask = torch.randn(2, 3, 32, 64), torch.ones(2, 2, 4)            # not even square
    assert model(image, mask).shape == image.shape


# ------------------------------------------------------------------------------------------------ train.py: recipes

COLOURS = dict(channels=3, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
COMMON = COLOURS | dict(data="shapes", mask="random", batch_size=2048, warmup_epochs=10, weight_decay=0.05, mask_size=32, mask_ratio=0.6)
STEP = dict(epochs=800, img_size=224, lr=4e-4, min_lr=None, schedule="step", lr_step_epoch=700, clip=5.0, drop_path=0.1,
            crop_scale=[0.67, 1.0], mask_layer=0, fill="mean", token="add", spatial_loss="l1", frequency_loss="focal",
            frequency_weight=0.1, frequency_standin="mixed", frequency_visible=0, token_lr_scale=1)
DEIT = STEP | dict(img_size=192, lr=8e-4, min_lr=1e-5, schedule="cosine", lr_step_epoch=None, mask_layer=8)
RESNET = dict(epochs=300, img_size=224, lr=1.2e-3, min_lr=1e-5, schedule="cosine", lr_step_epoch=None, clip=None, drop_path=None,
              crop_scale=[0.8, 1.0], mask_layer=3, fill="mean", token="add", spatial_loss="focal_l1", frequency_loss="focal",
              frequency_weight=0.5, frequency_standin="mixed", frequency_visible=1e-3, token_lr_scale=0.1)
OFF = dict(frequency_loss=None, frequency_weight=None, frequency_standin=None, frequency_visible=None)
TABLE = {"vit_s": STEP, "vit_b": STEP, "vit_l": STEP, "deit_t": DEIT, "deit_s": DEIT,                # as published
         "resnet18": RESNET, "resnet34": RESNET, "resnet50": RESNET,
         "resnet101": RESNET | dict(frequency_loss="focal_l1", frequency_weight=0.1),
         "resnet152": RESNET | OFF, "resnet200": RESNET | OFF}
TABLE100 = {"deit_t": DEIT, "deit_s": DEIT} | {a: RESNET | dict(epochs=800, img_size=192) for a in ("resnet18", "resnet34", "resnet50")}
SIMMIM_ROW = OFF | dict(mask_layer=0, fill="none", token="replace", spatial_loss="l1", crop_scale=[0.67, 1.0], token_lr_scale=1)


def config_of(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.main([*map(str, argv), "--print-config"])
    return json.loads(out.getvalue())


@pytest.mark.parametrize("recipe,table", [("imagenet", TABLE), ("imagenet100", TABLE100)])
@pytest.mark.parametrize("method", ["a2mim", "simmim"])
def test_recipes(recipe, table, method):
    for arch, row in table.items():
        expected = COMMON | row | dict(arch=arch, method=method)
        if method == "simmim":
            expected |= SIMMIM_ROW | dict(lr=8e-4 if "resnet" in arch else 4e-4)
        found = config_of("--arch", arch, "--method", method, "--recipe", recipe)
        assert found == expected and list(found) == list(train.CONFIG)


def test_config_overrides():
    assert config_of("--arch", "vit_b", "--batch-size", 512)["lr"] == pytest.approx(1e-4)             # scales with the batch
    assert config_of("--arch", "vit_b", "--batch-size", 512, "--lr", 3e-4)["lr"] == 3e-4              # unless given
    assert config_of("--arch", "resnet50", "--frequency-loss", "none")["frequency_weight"] is None
    assert config_of("--arch", "resnet152", "--frequency-loss", "focal")["frequency_standin"] == "mixed"
    assert config_of("--arch", "vit_b", "--clip", "none")["clip"] is None
    assert config_of("--arch", "vit_b", "--drop-path", "none")["drop_path"] == 0
    assert config_of("--img-size", 96)["mask_size"] == 24
    given = {"arch": "resnet_nano", "method": "simmim", "data": "elsewhere", "crop_scale": [0.5, 0.9], "schedule": "step",
             "lr_step_epoch": 3, "fill": "zero", "token": "add", "spatial_loss": "focal_l1", "frequency_loss": "l1",
             "frequency_standin": "mean", "img_size": 96, "mask_size": 24, "mask_layer": 1, "epochs": 5, "batch_size": 12,
             "channels": 2, "mean": [0.25, 0.5], "std": [0.125, 0.25], "mask": "random"}
    given |= {k: 0.125 for k in train.CONFIG if k not in given}
    argv = [s for k, v in given.items() for s in ["--" + k.replace("_", "-"), *map(str, v if isinstance(v, list) else [v])]]
    assert config_of(*argv) == given                                        # every key is an option


def test_schedules():
    config = config_of("--arch", "resnet50")
    rate = [optim.learning_rate(config, step, 7) * config["lr"] for step in range(300 * 7)]
    for t in (0, 3, 69):
        assert rate[t] == pytest.approx(1.2e-3 * (t + 1) / 70)
    for t in (70, 500, 2099):
        assert rate[t] == pytest.approx(1e-5 + (1.2e-3 - 1e-5) * (1 + math.cos(math.pi * (t - 70) / (2100 - 70))) / 2)
    config = config_of("--arch", "vit_b")
    assert [optim.learning_rate(config, 7 * epoch, 7) for epoch in (10, 699, 700, 799)] == [1, 1, 0.1, 0.1]
    assert optim.learning_rate(config, 700 * 7 - 1, 7) == 1
    short = config_of("--arch", "resnet50", "--epochs", 4)
    assert optim.learning_rate(short, 13, 7) == 1 > optim.learning_rate(short, 12, 7)                 # warm-up: half at most
    tiny = config_of("--arch", "resnet50", "--batch-size", 2)               # lr below min_lr: never above lr
    assert all(0 < optim.learning_rate(tiny, step, 1) <= 1 for step in range(300))


def test_parameter_groups():
    for arch, scale in (("vit_nano", 1.0), ("resnet_nano", 0.1)):
        config = config_of("--arch", arch)
        model, _ = train.build(config)
        names = {id(p): n for n, p in model.named_parameters()}
        seen = {}
        for group in optim.make_optimizer(model, config).param_groups:
            for p in group["params"]:
                seen[names[id(p)]] = group["weight_decay"], group["peak_lr"]
        assert set(seen) == set(names.values())
        for name, (decay, lr) in seen.items():
            bare = re.search(r"bias|norm|bn|downsample\.1|pos_embed|cls_token|mask_token|gamma", name)
            assert decay == (0 if bare else 0.05), name
            assert lr == pytest.approx(config["lr"] * (scale if name.startswith("mask_token") else 1)), name


# ------------------------------------------------------------------------------------------------ data.py

def stream(**changes):
    """Hashes of what a run's first six steps would see, in the order of the whole batch."""
    o = dict(world=1, micro=12, workers=0, start=0, seed=0) | changes
    view = train.functools.partial(train.view, size=16, scale=(0.5, 1.0))
    collate = functools.partial(train.collate, mask="random", grid=4, ratio=0.6)
    views = data.Views(shapes.Shapes(16, count=40), view, o["seed"])
    ranks = [list(data.loader(views, data.Batches(40, 12, o["micro"], o["start"], 6, o["seed"], rank, o["world"]), o["workers"], collate=collate))
             for rank in range(o["world"])]
    return [zlib.crc32(image.numpy().tobytes() + mask.numpy().tobytes()) for micros in zip(*ranks, strict=True)
            for (images, masks), _ in micros for image, mask in zip(images, masks)]


def test_stream_depends_on_nothing_but_the_seed():
    expected = stream()
    assert len(expected) == 72 and len(set(expected)) == 72                 # no two crops alike, repeated images included
    for same in (dict(micro=4), dict(world=2, micro=6), dict(world=3, micro=2), dict(workers=2), dict(world=2, micro=3, workers=1)):
        assert stream(**same) == expected, same
    assert stream(start=4) == expected[48:]                                 # continued, in another epoch
    assert set(stream(seed=1)).isdisjoint(expected)


def test_batches_cover_each_epoch_once():
    batches = list(data.Batches(10, 3, 3, 0, 6))
    for epoch in (batches[:3], batches[3:]):
        assert len({index for batch in epoch for _, _, index in batch}) == 9
    assert [(e, p) for b in batches for e, p, _ in b] == [(e, p) for e in (0, 1) for p in range(9)]
    assert [i for b in batches[:3] for *_, i in b] != [i for b in batches[3:] for *_, i in b]
    for wrong in (dict(images=2), dict(micro_batch=2), dict(world=2)):
        with pytest.raises(ValueError, match="batch"):
            data.Batches(**dict(images=10, batch_size=3, micro_batch=3, start=0, stop=1) | wrong)


def test_random_resized_crop():
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    image = torch.stack([y * 4, x * 3, y]).byte()                           # a picture that says where it was cut
    share, aspects, flips = [], [], 0
    for i in range(400):
        crop = data.random_resized_crop(image, 32, (0.3, 0.9), data.generator(i)).float()
        height, width = (float(c[..., -1].mean() - c[..., 0].mean()) for c in (crop[0].T[None] / 4, crop[1][None] / 3))
        flips += width < 0
        share.append(abs(height * width) * (32 / 31) ** 2 / (60 * 80))
        aspects.append(abs(width / height))
    assert 0.25 < min(share) < 0.36 and 0.8 < max(share) < 0.95 and np.mean(share) == pytest.approx(0.58, abs=0.04)
    assert 0.7 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.45 and 160 < flips < 240
    reference = torchvision.transforms.v2.functional.resized_crop(image, 0, 0, 60, 80, [32, 32], antialias=True)
    whole = data.random_resized_crop(image, 32, (1.0, 1.0), data.generator(0), ratio=(80 / 60, 80 / 60))
    assert torch.equal(whole, reference) or torch.equal(whole.flip(-1), reference)
    strip = data.random_resized_crop(torch.zeros(3, 8, 400, dtype=torch.uint8), 32, (0.9, 1.0), data.generator(0))
    assert strip.shape == (3, 32, 32)                                       # no try fits: the largest centred crop
    one = data.random_resized_crop(torch.zeros(3, 1, 1, dtype=torch.uint8), 32, (0.67, 1.0), data.generator(0))
    assert one.shape == (3, 32, 32)
    batch = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(data.denormalize(data.normalize(batch)), batch)
    assert relative(data.normalize(batch)[:, 1], (batch[:, 1] / 255 - 0.456) / 0.224) < 1e-6


def write_images(folder, names, size=(40, 30)):
    for i, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return str(folder)


def test_folders(tmp_path):
    root = write_images(tmp_path / "a", ["train/cat/1.jpg", "train/dog/x/2.PNG", "val/cat/3.jpg", "val/dog/4.jpg", "val/dog/5.bmp"])
    source, held = sources.Folder(root, "train"), sources.Folder(root, "val")
    assert (len(source), len(held), source.classes, held.classes) == (2, 3, ["cat", "dog"], ["cat", "dog"])
    assert [source[i][1] for i in range(2)] == [0, 1] and source[0][0].shape == (3, 30, 40)
    root = write_images(tmp_path / "b", [f"{'cat' if i % 2 else 'dog'}/{i:03}.png" for i in range(40)])
    source, held = sources.Folder(root, "train"), sources.Folder(root, "val")
    assert (len(source), len(held)) == (32, 8) and set(source.paths).isdisjoint(held.paths) and source.classes == ["cat", "dog"]
    root = write_images(tmp_path / "c", [f"é {i}.png" for i in range(5)])   # flat, any name
    source, held = sources.Folder(root, "train"), sources.Folder(root, "val")
    assert (len(source), len(held), source[0][1], source.classes) == (4, 1, -1, [])
    os.symlink(root, tmp_path / "c" / "again")                              # and round in circles
    assert len(sources.Folder(root, "train")) == 4
    (tmp_path / "d" / "cat").mkdir(parents=True)
    for wrong, says in ((tmp_path / "d", "no images"), (tmp_path / "nowhere", "no folder")):
        with pytest.raises(ValueError, match=says):
            sources.Folder(str(wrong), "train")


def png_of_16_bits(image):
    """(H, W, 3) uint16 as a PNG file, which Pillow cannot write."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    H, W, _ = image.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    header = W.to_bytes(4, "big") + H.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_image_formats(tmp_path):
    picture = Image.fromarray(np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8)))
    for name, mode in (("grey.jpg", "L"), ("cmyk.jpg", "CMYK"), ("palette.png", "P"), ("alpha.png", "RGBA"), ("bits.png", "1"),
                       ("a.gif", "P"), ("a.bmp", "RGB"), ("a.tif", "RGB"), ("a.webp", "RGB")):
        picture.convert(mode).save(tmp_path / name)
        image = sources.read_image(str(tmp_path / name))
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8, name
        if mode != "1":
            assert (image.float().mean(0)[[4, 4, 27, 27], [4, 27, 4, 27]] - torch.tensor([0., 80, 160, 240])).abs().max() < 12, name
    deep = 257 * np.array(picture).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    torchvision.io.write_file(str(tmp_path / "deep_rgb.png"), torch.frombuffer(bytearray(png_of_16_bits(np.stack([deep] * 3, -1))), dtype=torch.uint8))
    for name in ("deep.png", "deep.tif", "deep_rgb.png"):
        assert torch.equal(sources.read_image(str(tmp_path / name)), torch.from_numpy(np.array(picture)).expand(3, 32, 32)), name
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # shot with the camera turned
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert sources.read_image(str(tmp_path / "turned.jpg"))[0, 4, 4] > 140
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "grey.jpg").read_bytes()[:150])
    with pytest.raises(sources.BadImage, match="broken.jpg is no readable image"):
        sources.read_image(str(tmp_path / "broken.jpg"))


def test_shapes_world():
    world = shapes.Shapes(48)
    assert len(world) == 4096 and len(world.classes) >= 8
    for index in range(40):
        s = world.sample(index)
        x, y, radius, angle = s["pose"].tolist()
        assert s["image"].shape == (3, 48, 48) and s["image"].dtype == torch.uint8 and s["label"] == index % 10
        assert torch.equal(s["image"], shapes.Shapes(48).sample(index)["image"])                         # by seed and index
        rows, columns = s["mask"].nonzero(as_tuple=True)
        assert len(rows) > 20                                               # the mask lies within the pose's circle
        far = ((columns + 0.5 - x * 48) ** 2 + (rows + 0.5 - y * 48) ** 2).sqrt().max()
        assert 0.7 < far / (radius * 48) < 1.15 and 0 <= angle < 2 * math.pi
        large = shapes.Shapes(96).sample(index)                             # the same thing at any size
        assert torch.equal(large["pose"], s["pose"])
        both = torch.nn.functional.max_pool2d(large["mask"][None].float(), 2)[0].bool()
        assert (both ^ s["mask"]).float().mean() < 0.06
    s, u = world.sample(0), world.sample(1)
    assert not torch.equal(s["image"], shapes.Shapes(48, "val")[0][0]) and not torch.equal(s["image"], shapes.Shapes(48, seed=1)[0][0])
    for kind, inside in shapes.KINDS.items():                               # no kind looks the same when turned
        v, u = np.mgrid[-1:1:65j, -1:1:65j]
        upright = inside(u, v) > 0
        for degrees in (30, 60, 90, 120, 180, 240, 270):
            c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            assert ((inside(c * u + s * v, c * v - s * u) > 0) ^ upright).sum() > 0.1 * upright.sum(), (kind, degrees)
    spectrum = np.abs(np.fft.fft2(shapes.pink_noise(32, 64, np.random.default_rng(0))))[:, 0].mean(0)
    assert spectrum[2] / spectrum[16] == pytest.approx(8, rel=0.3)          # amplitude falls as 1/f


def test_downloads_say_what_failed(tmp_path, monkeypatch):
    class Unreachable:
        def __init__(self, root, download, **split):
            raise OSError("no route to host\nmore")

    with pytest.raises(ValueError, match="^Unreachable cannot be downloaded to .*: no route to host$"):
        sources.Download(Unreachable, str(tmp_path))

    class Arrays:                                                           # as CIFAR and STL-10 hold them
        classes = ["a", "b"]

        def __init__(self, root, download, last):
            self.data = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape((2, 4, 4, 3) if last else (2, 3, 4, 4))
            setattr(self, *("targets", [1, 0]) if last else ("labels", np.array([1, -1])))

    image, label = sources.Download(Arrays, str(tmp_path), last=True)[1]
    assert image.shape == (3, 4, 4) and image[:, 0, 0].tolist() == [48, 49, 50] and label == 0
    image, label = sources.Download(Arrays, str(tmp_path), last=False)[1]
    assert image.shape == (3, 4, 4) and image[0, 0].tolist() == [48, 49, 50, 51] and label == -1


# ------------------------------------------------------------------------------------------------ weights.py

def test_weights_report_and_refuse(tmp_path):
    model = models.build("vit_nano", 32)
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    torch.save({"model": state, "step": 1}, tmp_path / "ours.pt")
    report = weights.load(model, tmp_path / "ours.pt")
    assert report["format"] == "nanoA2MIM" and not report["missing"] and not report["unused"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    encoder = {k: v for k, v in state.items() if k.startswith("encoder.")} | {"head.weight": torch.ones(3)}
    report = weights.load(models.build("vit_nano", 32), encoder)            # as far as the file has them
    assert report["missing"] == ["mask_token.token", "decoder.0.weight", "decoder.0.bias"] and report["unused"] == ["head.weight"]

    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save({"model": models.build("vit_nano", 64).state_dict()}, tmp_path / "size.pt")
    torch.save({"state_dict": {"conv.weight": torch.ones(1)}}, tmp_path / "foreign.pt")
    torch.save({"state_dict": {k: v for k, v in list(state.items())[:9]}}, tmp_path / "part.pt")
    torch.save({"model": 3}, tmp_path / "empty.pt")
    torch.save({"model": state, "args": train.argparse.Namespace(lr=1)}, tmp_path / "objects.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "ours.pt").read_bytes()[:-1000])
    for name, says in (("size.pt", "build the model with"), ("foreign.pt", "no known format"), ("part.pt", "another architecture"),
                       ("empty.pt", "holds no state_dict"), ("objects.pt", "never run"), ("text.pt", "no PyTorch checkpoint"),
                       ("cut.pt", "no PyTorch checkpoint"), ("none.pt", "no checkpoint at")):
        with pytest.raises(ValueError, match=says) as error:
            weights.load(model, str(tmp_path / name))
        assert len(str(error.value).splitlines()) == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ train.py: runs

def run(out, *argv):
    """A small run in this process: its log."""
    train.main(["--img-size", "32", "--batch-size", "16", "--workers", "0", "--log-every", "1", "--out", str(out), *map(str, argv)])
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arch,steps,options", [("vit_nano", 60, []), ("vit_nano", 60, ["--method", "simmim"]),
                                                ("resnet_nano", 200, ["--lr", "3e-3", "--warmup-epochs", "0.05"])])
def test_training_learns(tmp_path, capsys, arch, steps, options):
    log = run(tmp_path / "run", "--arch", arch, "--epochs", 1, "--steps", steps, *options)
    assert [e["step"] for e in log] == list(range(1, steps + 1)) and {e["epoch"] for e in log} == {1}
    assert list(log[0]) == ["step", "epoch", "loss", "spatial", "frequency", "lr", "skipped", "replaced", "images_per_second"]
    weight = config_of("--arch", arch, *options)["frequency_weight"] or 0
    assert all(e["loss"] == pytest.approx(e["spatial"] + weight * e["frequency"], rel=1e-5) for e in log)
    assert np.mean([e["loss"] for e in log[-10:]]) < 0.85 * np.mean([e["loss"] for e in log[:10]])
    picture = torchvision.io.read_image(str(tmp_path / "run" / "recon.png"))
    assert picture.shape[1] > 4 * 32 and picture.shape[2] > 8 * 32 and picture.float().std() > 10
    said = capsys.readouterr()
    assert "no --data given" in said.out and f"step {steps}/" in said.out and said.err == ""
    model = models.build(arch, 32)
    assert not weights.load(model, tmp_path / "run" / "last.pt")["missing"] or "simmim" in options


def test_resume_is_exact(tmp_path, capsys):
    def state(out):
        return torch.load(tmp_path / out / "last.pt", weights_only=True)

    options = ["--arch", "vit_nano", "--drop-path", 0.2, "--epochs", 1]     # with its own randomness
    whole = run(tmp_path / "whole", *options, "--steps", 6)
    run(tmp_path / "parts", *options, "--steps", 4)
    lines = (tmp_path / "parts" / "log.jsonl").read_text()
    (tmp_path / "parts" / "log.jsonl").write_text(lines + lines.splitlines()[-1].replace('"step": 4', '"step": 5') + '\n{"step')
    parts = run(tmp_path / "parts", *options, "--steps", 6)                 # as after a crash in the middle of step 5
    assert "continuing after step 4" in capsys.readouterr().out
    assert [e["loss"] for e in parts] == [e["loss"] for e in whole]
    a, b = state("whole"), state("parts")
    assert a["step"] == b["step"] == 6 and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    before = (tmp_path / "parts" / "last.pt").read_bytes()
    run(tmp_path / "parts", *options, "--steps", 6)
    assert "already at step 6" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "parts", *options, "--mask-ratio", 0.5)
    said = capsys.readouterr().err
    assert error.value.code == 2 and "mask_ratio (0.6 there, 0.5 here)" in said and len(said.splitlines()) == 1
    assert (tmp_path / "parts" / "last.pt").read_bytes() == before
    assert len(run(tmp_path / "parts", *options, "--mask-ratio", 0.5, "--steps", 2, "--overwrite")) == 2


def test_folder_of_images_trains(tmp_path):
    root = write_images(tmp_path / "images", [f"{i:02}.png" for i in range(24)])
    log = run(tmp_path / "run", "--arch", "resnet_nano", "--data", root, "--epochs", 2, "--workers", 2)
    assert len(log) == 2 and log[-1]["epoch"] == 2 and log[-1]["replaced"] == 0


def test_mixed_precision(tmp_path):
    full, *others = (run(tmp_path / amp, "--steps", 3, "--amp", amp)[-1] for amp in ("off", "bf16", "fp16"))
    for other in others:                                                    # fp16: through the gradient scaler
        assert other["loss"] != full["loss"] and other["loss"] == pytest.approx(full["loss"], rel=0.02)
    assert torch.load(tmp_path / "fp16" / "last.pt", weights_only=True)["scaler"]["scale"] > 0


def test_precision_follows_the_device():
    for amp, dtype in (("auto", None), ("off", None), ("bf16", torch.bfloat16)):
        autocast, scaler = train.precision(amp, torch.device("cpu"))
        with autocast():
            out = torch.nn.Linear(4, 4)(torch.ones(1, 4))
        assert out.dtype == (dtype or torch.float32) and not scaler.is_enabled()


BAD = [  # options, what the one line must say
    ("--arch vit_x", "invalid choice: 'vit_x' (choose from "),
    ("--method mae", "invalid choice: 'mae'"),
    ("--frequency-loss fft", "invalid choice: 'fft'"),
    ("--fill median", "invalid choice: 'median'"),
    ("--lr fast", "invalid float value: 'fast'"),
    ("--unknown 3", "unrecognized arguments"),
    ("--crop-scale 0.5", "expected 2 arguments"),
    ("--img-size 65", "not a multiple of"),
    ("--arch vit_b --img-size 100", "not a multiple of"),
    ("--arch resnet50 --img-size 200", "not a multiple of"),
    ("--img-size 64 --mask-size 24", "not a multiple of mask_size"),
    ("--img-size 64 --mask-size 4", "not a multiple of 8, the encoder's stride at layer 0"),
    ("--mask-ratio 0", "between 0 and 1"),
    ("--mask-ratio 1", "between 0 and 1"),
    ("--mask-ratio nan", "nan is not in 0..1"),
    ("--mask-layer 5", "0..4"),
    ("--arch resnet_nano --mask-layer -1", "0..3"),
    ("--crop-scale 0.5 1.1", "1.1 is not in 0..1"),
    ("--img-size 3", "not a multiple of 8"),
    ("--epochs none", "invalid int value: 'none'"),
    ("--drop-path 2", "--drop-path: 2 is not in 0..1"),
    ("--epochs 0", "--epochs: 0 is not 1 or more"),
    ("--steps 0", "--steps: 0 is not 1 or more"),
    ("--batch-size 0", "0 is not 1 or more"),
    ("--batch-size 10 --micro-batch 4", "not divisible by 1 process(es) × --micro-batch 4"),
    ("--batch-size 5000", "make no batch of 5000"),
    ("--lr -1", "-1 is not 0 or more"),
    ("--lr nan", "nan is not 0 or more"),
    ("--lr inf", "inf is too large"),
    ("--crop-scale 0.9 0.5", "the smaller first"),
    ("--lr-step-epoch -3", "0 or more"),
    ("--frequency-visible nan", "nan is not in 0..1"),
    ("--mask-size 0", "0 is not 1 or more"),
    ("--frequency-weight none", "a frequency loss needs --frequency-weight"),
    ("--schedule step", "needs --lr-step-epoch"),
    ("--arch vit_b --recipe imagenet100", "no ImageNet-100 recipe of vit_b"),
    ("--data {tmp}/missing", "no folder"),
    ("--data {tmp}/empty", "no images"),
    ("--data {tmp}/file.txt", "no folder"),
    ("--data {tmp}/few", "make no batch of"),
    ("--data {tmp}/broken", "is no readable image"),
    ("--out {tmp}/foreign", "no checkpoint of this program"),
    ("--out {tmp}/damaged", "is damaged"),
    ("--out {tmp}/file.txt", "file.txt"),
    ("--out {tmp}/strange", "holds a log.jsonl but no last.pt"),
    ("--out {tmp}/other", "mask_ratio (0.5 there, 0.6 here)"),
    ("--out {tmp}/half", "does not fit this model"),
    ("--out {tmp}/cut", "previous.pt has no checksum"),
    ("--out {tmp}/hostile", "has no checksum: it is damaged, or no checkpoint of this program"),
    ("--out {tmp}/sealed", "holds Python objects beside tensors, which are never run here"),
    ("--out {tmp}/elsewhere", "no checkpoint of this program"),
    ("--out {tmp}/tensor", "mask_ratio (tensor([1., 1.]) there, 0.6 here)"),
    ("--out {tmp}/held", "another process is training in {tmp}/held"),
    ("--save-minutes -1", "-1 is not 0 or more"),
    ("--save-epochs 0", "0 is not 1 or more"),
    ("--max-bad 2", "2 is not in 0..1"),
]


class Harm:
    """What would do harm when it is unpickled: it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def checkpoint(identity, step=3, **more):
    """The smallest that looks like one."""
    counts = dict(skipped=0, in_a_row=0, replaced=0, this_epoch=0)
    return dict(identity=identity, step=step, counts=counts, model={}, optimizer={}, scaler={}) | more


@pytest.fixture
def bad_inputs(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    write_images(tmp_path / "few", [f"{i}.png" for i in range(5)])
    (tmp_path / "broken").mkdir()
    for i in range(100):
        (tmp_path / "broken" / f"{i}.jpg").write_text("hello")
    for name in ("foreign", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "log.jsonl").write_text("precious")
    identity = config_of() | dict(seed=0, images=4096, micro_batch=32)
    for name, more in (("half", {}), ("other", dict(mask_ratio=0.5)), ("cut", {})):
        (tmp_path / name).mkdir()
        weights.write(str(tmp_path / name / "last.pt"), checkpoint(identity | more), str(tmp_path / name / "previous.pt"))
    whole = (tmp_path / "cut" / "last.pt").read_bytes()
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "cut" / name).write_bytes(whole[:-9])
    for name, state in (("hostile", Harm(tmp_path / "harm")), ("sealed", {"model": Harm(tmp_path / "harm")}), ("elsewhere", {"model": {}})):
        (tmp_path / name).mkdir()
        weights.write(str(tmp_path / name / "last.pt"), state) if name != "hostile" else torch.save(state, tmp_path / name / "last.pt")
    (tmp_path / "held").mkdir()
    (tmp_path / "tensor").mkdir()
    weights.write(str(tmp_path / "tensor" / "last.pt"), checkpoint(identity | dict(mask_ratio=torch.ones(2))))
    torch.save({"state_dict": {}}, tmp_path / "foreign" / "last.pt")
    (tmp_path / "damaged" / "last.pt").write_text("hello")
    return tmp_path


def test_bad_input_is_one_line(bad_inputs, capsys):
    def tree():
        return {p: p.read_bytes() for p in bad_inputs.rglob("*") if p.is_file()}

    holds = subprocess.Popen([sys.executable, "-c", "import fcntl, sys\nfile = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
                              "print(flush=True); sys.stdin.read()", bad_inputs / "held" / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holds.stdout.readline()
    before = tree()
    for options, says in BAD:
        argv = shlex.split(options.format(tmp=bad_inputs))
        with pytest.raises(SystemExit) as error:
            train.main(argv if "--out" in argv else argv + ["--out", str(bad_inputs / "out")])
        said = capsys.readouterr()
        assert error.value.code == 2 and says.format(tmp=bad_inputs) in said.err and len(said.err.splitlines()) == 1, (options, said.err)
    assert tree() == before and not (bad_inputs / "out").exists() and not (bad_inputs / "harm").exists()
    holds.communicate(b"")


def process(argv, **options):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=300, cwd=HERE, **options)


def test_bad_input_as_a_process(bad_inputs):
    for options, says in (BAD[0], ("--data {tmp}/missing", "no folder")):
        done = process(["train.py", *shlex.split(options.format(tmp=bad_inputs))])
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ weights.py: other projects

def random_weights(module, seed=0):
    """Every tensor filled with something of its own, so that no zero or one hides a slip. Returns the module, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=g) * (t[0].numel() ** -0.5 if t.ndim in (2, 4) and "table" not in name else 0.1))
                if t.ndim == 1 and ("weight" in name or "var" in name or "gamma" in name):
                    t.add_(1)
    return module.eval()


PEER_VIT = dict(arch="vit_b", img_size=64, dim=48, depth=3, heads=4, mlp_dim=192, drop_path=0.0)
LIKE = dict(img_size=64, embed_dim=48, depth=3, num_heads=4)                # the same in timm's words
VIT_PEERS = {  # our switches -> timm's model
    "BEiT with absolute positions": (dict(), "beit", "Beit", dict(use_rel_pos_bias=True, init_values=0.1)),
    "BEiT without absolute positions": (dict(abs_pos=False), "beit", "Beit", dict(use_rel_pos_bias=True, init_values=0.1, use_abs_pos_emb=False)),
    "relative bias only": (dict(layer_scale=None), "beit", "Beit", dict(use_rel_pos_bias=True)),
    "plain": (dict(rel_pos_bias=False, layer_scale=None), "vision_transformer", "VisionTransformer", dict()),
    "plain with LayerScale": (dict(rel_pos_bias=False), "vision_transformer", "VisionTransformer", dict(init_values=0.1)),
}


@torch.no_grad()
@pytest.mark.parametrize("peer", VIT_PEERS)
@pytest.mark.parametrize("classes", [0, 7])
def test_timm_vit_both_ways(peer, classes, tmp_path):
    pytest.importorskip("timm")
    from timm.models import beit, vision_transformer
    ours, module, name, theirs = VIT_PEERS[peer]
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    make = getattr(dict(beit=beit, vision_transformer=vision_transformer)[module], name)
    there = dict(LIKE, num_classes=classes, global_pool="avg" if classes else "token", **theirs)

    def our_model(**options):
        model = models.build(**PEER_VIT | options)
        return models.Predictor(model.encoder, classes) if classes else model

    def outputs(model, theirs):                                             # logits, or the features of patches
        if classes:
            return model(image), theirs(image)
        return model.encoder(image).flatten(2).transpose(1, 2), theirs.forward_features(image)[:, 1:]

    model = random_weights(our_model(**ours))                               # out
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pt")
    weights.main(["export", str(tmp_path / "ours.pt"), "--to", "timm", str(tmp_path / "theirs.pt")])
    timm_model = make(**there)
    timm_model.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True), strict=True)
    assert relative(*outputs(model, timm_model.eval())) < 1e-5
    _, call = weights.export(tmp_path / "ours.pt", "timm")                  # and the printed line builds such a model
    assert {k: v.shape for k, v in eval(call.replace("HEADS", "4"), dict(timm=__import__("timm"))).state_dict().items()} == {
        k: v.shape for k, v in timm_model.state_dict().items()}

    timm_model = random_weights(make(**there), seed=2)                      # in: the same switches, or all of them on
    for options in (ours, {}):
        model = our_model(**options).eval()
        report = weights.load(model, timm_model.state_dict())
        assert report["format"] == "ViT of timm, BEiT or MAE" and not report["unused"]
        assert relative(*outputs(model, timm_model)) < 1e-5
        assert bool(report["neutral"]) == (set(options) != set(ours))


@torch.no_grad()
@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("arch", ["resnet50", "resnet101", "resnet152", "resnet18"])
def test_resnet_both_ways(library, arch, tmp_path):
    build = pytest.importorskip("timm").create_model if library == "timm" else torchvision.models.get_model
    peer = random_weights(build(arch, num_classes=7))
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = models.Predictor(models.build(arch, 64).encoder, 7).eval()
    report = weights.load(model, peer.state_dict())
    assert not report["missing"] and not report["unused"] and relative(model(image), peer(image)) < 1e-5
    random_weights(model, seed=2)
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pt")
    weights.main(["export", str(tmp_path / "ours.pt"), "--to", library, str(tmp_path / "theirs.pt")])
    peer.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True), strict=True)
    assert relative(model(image), peer(image)) < 1e-5


@torch.no_grad()
def test_mae_simmim_and_fine_tuned_openmixup():
    """Formats without a package to compare with: files made from our own model by their naming rules, written down here."""
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain = random_weights(models.build(**PEER_VIT, rel_pos_bias=False, layer_scale=None))
    expected, mae = plain.encoder(image), {"mask_token": torch.ones(1, 1, 32), "decoder_embed.weight": torch.ones(32, 48),
                                           "decoder_blocks.0.attn.qkv.bias": torch.ones(96), "decoder_pred.bias": torch.ones(768)}
    for name, value in plain.encoder.state_dict().items():
        name = name.replace("patch_embed.", "patch_embed.proj.")
        if name.endswith("q_bias"):                                         # one bias; that of the keys does nothing
            v = plain.encoder.state_dict()[name.replace("q_bias", "v_bias")]
            name, value = name.replace("q_bias", "qkv.bias"), torch.cat([value, torch.full_like(v, 3.0), v])
        if not name.endswith("v_bias"):
            mae[name] = value
    model = models.build(**PEER_VIT).eval()
    report = weights.load(model, {"model": mae})
    assert relative(model.encoder(image), expected) < 1e-6
    assert set(report["unused"]) == {n for n in mae if n.startswith(("mask_token", "decoder"))} and len(report["neutral"]) == 9

    shared = random_weights(models.build(**PEER_VIT, abs_pos=False, token="replace"))      # as SimMIM: one table, no positions
    for block in shared.encoder.blocks:
        block.attn.relative_position_bias_table.copy_(shared.encoder.blocks[0].attn.relative_position_bias_table)
    simmim = {n.replace("patch_embed.", "patch_embed.proj."): v for n, v in shared.state_dict().items() if "relative" not in n}
    simmim["encoder.rel_pos_bias.relative_position_bias_table"] = shared.encoder.blocks[0].attn.relative_position_bias_table.data
    simmim["encoder.rel_pos_bias.relative_position_index"] = models.relative_position_index(4)
    simmim["encoder.mask_token"] = simmim.pop("mask_token.token").view(1, 1, -1)
    model = models.build(**PEER_VIT, token="replace").eval()
    report = weights.load(model, {"model": simmim, "epoch": 3})
    assert report["format"] == "SimMIM" and not report["unused"] and not report["missing"]
    assert report["neutral"] == ["encoder.pos_embed"]
    mask = masking.random_mask(2, 2, 0.5, torch.Generator().manual_seed(0))
    assert relative(model(image, mask), shared(image, mask)) < 1e-6

    for arch, head in ((PEER_VIT, "head.fc."), (PEER_VIT, "head.layers.head."), (dict(arch="resnet18", img_size=64), "head.fc.")):
        tuned = random_weights(models.Predictor(models.build(**arch).encoder, 7))
        names = ((n, official_name(n, v)[0]) for n, v in tuned.state_dict().items())
        state = {official.replace("head.", head).replace("fc_norm.", "backbone.fc_norm."): tuned.state_dict()[n] for n, official in names}
        model = models.Predictor(models.build(**arch).encoder, 7).eval()
        report = weights.load(model, {"state_dict": state, "meta": {}})
        assert report["format"] == "OpenMixup" and not report["missing"] and not report["unused"]
        assert torch.equal(model(image), tuned(image))


def test_tables_of_positions_are_resized_right():
    for old, new in ((14, 16), (12, 14), (16, 14), (8, 16)):
        for name, side, rest, dim in (("encoder.pos_embed", lambda n: n, 1, 5), ("x.relative_position_bias_table", lambda n: 2 * n - 1, 3, 4)):
            a, b = side(old), side(new)
            y, x = torch.meshgrid(torch.arange(a) + 0.5, torch.arange(a) + 0.5, indexing="ij")
            planes = torch.stack([i * x / a - y / a for i in range(dim)], -1).view(a * a, dim)       # ramps over the image
            extra = torch.randn(rest, dim)
            table = torch.cat([extra, planes])[None] if rest == 1 else torch.cat([planes, extra])
            like = torch.empty(1, 1 + b * b, dim) if rest == 1 else torch.empty(b * b + 3, dim)
            out = weights.resize_positions(name, table, like)
            assert out.shape == like.shape
            body, kept = (out[0, 1:], out[0, :1]) if rest == 1 else (out[:-3], out[-3:])
            assert torch.equal(kept, extra)                                 # what belongs to the class token
            y, x = torch.meshgrid(torch.arange(b) + 0.5, torch.arange(b) + 0.5, indexing="ij")
            wanted = torch.stack([i * x / b - y / b for i in range(dim)], -1)
            error, edge = (body.view(b, b, dim) - wanted).abs(), -(-2 * b // a) + 1
            step = dim / b                                                  # a ramp stays a ramp: exactly when enlarged, else to 2 % of a step
            assert error[edge:-edge, edge:-edge].max() < (1e-5 if new > old else 0.02 * step), (name, old, new)
            assert error.max() < dim * 0.5 / a                              # at the edge it levels off, within half a patch
            assert torch.allclose(weights.resize_positions(name, table, table), table, atol=1e-6)
    centre = torch.zeros(27 * 27 + 3, 1)
    centre[13 * 27 + 13] = 1.0                                              # offset 0 stays offset 0
    grid = weights.resize_positions("x.relative_position_bias_table", centre, torch.empty(31 * 31 + 3, 1))[:-3]
    assert grid.argmax() == 15 * 31 + 15
    for wrong in (torch.empty(1, 11, 5), torch.empty(1, 17, 6), torch.empty(17, 5)):
        assert weights.resize_positions("encoder.pos_embed", torch.empty(1, 10, 5), wrong) is None


def test_positions_are_resized_as_in_timm():
    layers = pytest.importorskip("timm").layers
    table = torch.randn(1, 1 + 12 * 12, 6)
    theirs = layers.resample_abs_pos_embed(table, [16, 16])
    assert relative(weights.resize_positions("pos_embed", table, theirs), theirs) < 1e-6


def test_same_size_is_loaded_untouched(tmp_path):
    model = random_weights(models.build(**PEER_VIT))
    other = models.build(**PEER_VIT)
    assert not weights.load(other, model.state_dict())["resized"]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    bigger = models.build(**PEER_VIT | dict(img_size=96))
    report = weights.load(bigger, {f"module.{k}": v for k, v in model.state_dict().items()})          # a wrapped model's names
    assert report["resized"] == ["encoder.pos_embed", *(f"encoder.blocks.{i}.attn.relative_position_bias_table" for i in range(3))]
    assert "resized: encoder.pos_embed, encoder.blocks.*.attn.relative_position_bias_table" in weights.describe(report)


@pytest.mark.parametrize("change,says", [
    (dict(rel_pos_bias=False), "its encoder has encoder.blocks.0.attn.relative_position_bias_table"),
    (dict(layer_scale=None), "its encoder has encoder.blocks.0.gamma_1"),
    (dict(abs_pos=False), "its encoder has encoder.pos_embed"),
    (dict(depth=2), "its encoder has encoder.blocks.2."),
    (dict(depth=4), "has not all of this encoder, encoder.blocks.3.norm1.weight for one"),
    (dict(patch_size=8), "encoder.patch_embed.weight is (48, 3, 16, 16), but the model's is (48, 3, 8, 8)"),
])
def test_another_encoder_is_refused(change, says):
    """What a file has and a model has not is never dropped silently: the features would be others."""
    state, model = models.build(**PEER_VIT).state_dict(), models.build(**PEER_VIT | change)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(says)):
        weights.load(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_head_on_the_class_token_stays_in_the_file():
    model = models.Predictor(models.build(**PEER_VIT, rel_pos_bias=False, layer_scale=None).encoder, 7)
    state = models.build(**PEER_VIT, rel_pos_bias=False, layer_scale=None).encoder.state_dict() | {"head.weight": torch.ones(7, 48), "head.bias": torch.ones(7)}
    report = weights.load(model, {n.replace("patch_embed.", "patch_embed.proj."): v for n, v in state.items()})
    assert {"head.weight", "head.bias"} <= set(report["unused"]) and model.head.weight.std() < 0.02


def test_detection_and_segmentation_with_our_resnet(tmp_path):
    """The README's lines: torchvision's Mask R-CNN and FCN around an exported encoder, one training step each."""
    torch.save({"model": random_weights(models.build("resnet50", 64)).state_dict()}, tmp_path / "last.pt")
    weights.main(["export", str(tmp_path / "last.pt"), "--to", "torchvision", str(tmp_path / "resnet50.pth")])
    state = torch.load(tmp_path / "resnet50.pth", weights_only=True)
    for which in ("detection", "segmentation"):
        if which == "detection":
            model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
            body = model.backbone.body
        else:
            model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
            body = model.backbone
        body.load_state_dict(state, strict=True)
        before = body.layer4[0].conv1.weight.clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        image = torch.rand(2, 3, 64, 64)
        if which == "detection":
            targets = [dict(boxes=torch.tensor([[8.0, 8.0, 40.0, 48.0]]), labels=torch.tensor([1]),
                            masks=torch.ones(1, 64, 64, dtype=torch.uint8)) for _ in range(2)]
            loss = sum(model.train()(list(image), targets).values())
        else:
            loss = torch.nn.functional.cross_entropy(model.train()(image)["out"], torch.randint(0, 3, (2, 64, 64)))
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss) and not torch.equal(body.layer4[0].conv1.weight, before)


BAD_WEIGHTS = [  # command, what the one line must say
    ("show {tmp}/nowhere.pt", "no checkpoint at"),
    ("show {tmp}/text.pt", "no PyTorch checkpoint"),
    ("show {tmp}/cut.pt", "is damaged"),
    ("show {tmp}/foreign.pt", "in no known format"),
    ("show {tmp}/list.pt", "holds a list, no state_dict"),
    ("show {tmp}/numbers.pt", "holds no state_dict"),
    ("show {tmp}", "no checkpoint at"),
    ("export {tmp}/odd.pt --to timm {tmp}/out.pt", "no ViT and no ResNet of the forms"),
    ("export {tmp}/pose.pt --to timm ''", "names no file"),
    ("export {tmp}/vit.pt --to torchvision {tmp}/out.pt", "no counterpart"),
    ("export {tmp}/vit.pt --to detectron {tmp}/out.pt", "invalid choice: 'detectron'"),
    ("export {tmp}/vit.pt --to timm {tmp}/text.pt", "exists, or names no file: choose another name"),
    ("export {tmp}/vit.pt --to timm {tmp}/no/folder.pt", "No such file"),
    ("export {tmp}/nano.pt --to torchvision {tmp}/out.pt", "stem of 3 × 3 × 3"),
    ("export {tmp}/vit.pt", "the following arguments are required"),
    ("convert", "invalid choice: 'convert'"),
    ("", "required: COMMAND"),
]


def test_weights_commands(tmp_path, capsys):
    torch.save({"model": models.build("vit_nano", 32).state_dict(), "identity": dict(arch="vit_nano", lr=0.1), "step": 7}, tmp_path / "vit.pt")
    torch.save({"model": models.build("resnet_nano", 32).state_dict()}, tmp_path / "nano.pt")
    torch.save({"state_dict": {"conv.weight": torch.ones(1)}}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({0: torch.ones(1)}, tmp_path / "numbers.pt")
    torch.save({"encoder.foo": torch.ones(1)}, tmp_path / "odd.pt")
    pose = models.Predictor(models.build("vit_nano", 32).encoder, 5, "flatten")
    torch.save({"model": pose.state_dict(), "identity": dict(arch="vit_nano", task="pose")}, tmp_path / "pose.pt")
    (tmp_path / "text.pt").write_text("<html>not found, torch.load with weights_only</html>")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "vit.pt").read_bytes()[:-1000])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for command, says in BAD_WEIGHTS:
        with pytest.raises(SystemExit) as error:
            weights.main(shlex.split(command.format(tmp=tmp_path)))
        said = capsys.readouterr()
        assert error.value.code == 2 and says in said.err and len(said.err.splitlines()) == 1, (command, said.err)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    state, call = weights.export(tmp_path / "pose.pt", "timm")              # a head that no classifier is stays behind
    assert "num_classes=0" in call and not any(name.startswith("head") for name in state)
    weights.main(["show", str(tmp_path / "vit.pt")])
    said = capsys.readouterr().out
    assert "nanoA2MIM, 0.5 M numbers" in said and "run: arch vit_nano" in said and "step: 7" in said
    assert "encoder.blocks.*.attn.qkv.weight  (288, 96) float32 × 4" in said


# ------------------------------------------------------------------------------------------------ finetune.py: protocols

NONE = dict.fromkeys(("epochs", "optimizer", "lr", "min_lr", "schedule", "lr_step_epochs", "warmup_epochs", "weight_decay", "layer_decay",
                      "clip", "drop_path", "loss", "label_smoothing", "mixup", "cutmix", "randaugment", "random_erasing",
                      "repeated_augmentation", "ema", "crop_scale"))
TUNED = NONE | dict(img_size=224, test_resize=256, test_crop=224, epochs=100, batch_size=1024, optimizer="adamw", lr=1e-2, min_lr=1e-6,
                    schedule="cosine", warmup_epochs=20, weight_decay=0.05, layer_decay=0.65, clip=5.0, drop_path=0.1, loss="ce",
                    label_smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=9, random_erasing=0.25, crop_scale=[0.08, 1.0])
A3 = NONE | dict(img_size=160, test_resize=236, test_crop=224, epochs=100, batch_size=2048, optimizer="lamb", lr=8e-3, min_lr=1e-6,
                 schedule="cosine", warmup_epochs=5, weight_decay=0.02, loss="bce", mixup=0.1, cutmix=1.0, randaugment=6,
                 crop_scale=[0.08, 1.0])
A2 = A3 | dict(img_size=224, epochs=300, lr=5e-3, randaugment=7, repeated_augmentation=3, drop_path=0.05)
PROBE = NONE | dict(img_size=224, test_resize=256, test_crop=224, optimizer="sgd", weight_decay=0, warmup_epochs=0, loss="ce",
                    crop_scale=[0.08, 1.0])
LINEAR_VIT = PROBE | dict(epochs=90, batch_size=1024, lr=12, min_lr=0, schedule="cosine")
LINEAR_RESNET = PROBE | dict(epochs=100, batch_size=256, lr=30, schedule="step", lr_step_epochs=[60, 80])
AS_PUBLISHED = {
    ("vit_s", "simmim"): TUNED | dict(epochs=200), ("vit_b", "simmim"): TUNED | dict(ema=0.99996),
    ("vit_l", "simmim"): TUNED | dict(epochs=150, ema=0.99996, repeated_augmentation=3),
    ("deit_t", "simmim"): TUNED, ("deit_s", "simmim"): TUNED,
    **{(arch, "rsb_a3"): A3 for arch in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")},
    ("resnet50", "rsb_a2"): A2 | dict(ema=0.9999), ("resnet101", "rsb_a2"): A2 | dict(drop_path=0.1),
    ("resnet152", "rsb_a2"): A2 | dict(drop_path=0.15), ("resnet200", "rsb_a2"): A2 | dict(drop_path=0.2),
    **{(arch, "linear"): LINEAR_VIT for arch in ("vit_s", "vit_b", "vit_l", "deit_s")},
    **{(arch, "linear"): LINEAR_RESNET for arch in ("resnet50", "resnet101", "resnet152", "resnet200")},
    ("vit_b", "knn"): NONE | dict(img_size=224, test_resize=256, test_crop=224, batch_size=256),
}
AS_PUBLISHED100 = {("deit_s", "simmim"): TUNED | dict(lr=8e-3, warmup_epochs=5),
                   ("resnet50", "simmim"): TUNED | dict(batch_size=2048, lr=5e-3, layer_decay=None, clip=None, drop_path=None)}


def protocol_of(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        finetune.main([*map(str, argv), "--print-config"])
    return json.loads(out.getvalue())


@pytest.mark.parametrize("recipe,table", [("imagenet", AS_PUBLISHED), ("imagenet100", AS_PUBLISHED100)])
def test_protocols(recipe, table):
    for (arch, protocol), row in table.items():
        found = protocol_of("--arch", arch, "--protocol", protocol, "--recipe", recipe)
        assert found == row | COLOURS | dict(arch=arch, protocol=protocol, data="shapes"), (arch, protocol)
        assert list(found) == recipes.KEYS


def test_protocol_defaults_and_overrides():
    assert [protocol_of("--arch", a)["protocol"] for a in ("vit_b", "resnet50", "vit_nano", "resnet_nano")] == ["simmim", "rsb_a3", "small", "small"]
    assert protocol_of("--arch", "vit_b", "--batch-size", 256)["lr"] == pytest.approx(2.5e-3)
    assert protocol_of("--arch", "vit_b", "--batch-size", 256, "--lr", 3e-4)["lr"] == 3e-4
    sizes = [protocol_of("--arch", *a) for a in (("vit_b", "--img-size", 256), ("resnet50", "--img-size", 80), ("vit_b", "--test-resize", 224))]
    assert [(c["img_size"], c["test_resize"], c["test_crop"]) for c in sizes] == [(256, 293, 256), (80, 118, 112), (224, 224, 224)]
    for arch, scratch, like in (("resnet50", "scratch-rsb_a2", "rsb_a2"), ("resnet50", "scratch-rsb_a3", "rsb_a3")):
        assert protocol_of("--arch", arch, "--protocol", scratch) | dict(protocol=like) == protocol_of("--arch", arch, "--protocol", like)
    assert protocol_of("--protocol", "scratch-small") | dict(protocol="small", layer_decay=0.8) == protocol_of("--protocol", "small")
    deit = protocol_of("--arch", "deit_s", "--protocol", "scratch-deit")
    assert (deit["epochs"], deit["lr"], deit["layer_decay"], deit["repeated_augmentation"]) == (300, 1e-3, None, 3)
    given = dict(arch="resnet_nano", protocol="scratch-small", data="elsewhere", crop_scale=[0.5, 0.9], schedule="step", lr_step_epochs=[3, 4],
                 optimizer="sgd", loss="bce", img_size=96, test_resize=120, test_crop=104, epochs=5, batch_size=12, repeated_augmentation=2,
                 channels=1, mean=[0.25], std=[0.125])
    given |= {k: 0.125 for k in recipes.KEYS if k not in given}
    argv = [s for k, v in given.items() for s in ["--" + k.replace("_", "-"), *map(str, v if isinstance(v, list) else [v])]]
    assert protocol_of(*argv) == given                                      # every key is an option
    for key in ("min_lr", "layer_decay", "clip", "drop_path", "label_smoothing", "mixup", "cutmix", "randaugment", "random_erasing", "ema"):
        if key != "min_lr":
            assert protocol_of("--arch", "vit_b", "--" + key.replace("_", "-"), "none")[key] is None
    pose = protocol_of("--task", "pose")
    assert pose["crop_scale"] is None and pose["loss"] is None and pose["img_size"] == pose["test_crop"] == 64


def test_step_schedule_of_the_linear_probe():
    config = protocol_of("--arch", "resnet50", "--protocol", "linear")
    assert [optim.learning_rate(config, 5 * epoch, 5) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    config = protocol_of("--arch", "vit_b", "--protocol", "linear")
    assert optim.learning_rate(config, 0, 5) == 1 and optim.learning_rate(config, 449, 5) < 1e-4


# ------------------------------------------------------------------------------------------------ finetune.py: parts

def test_lamb_is_timms():
    peers = pytest.importorskip("timm.optim")
    def problem():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
        torch.nn.init.zeros_(net[2].weight)                                 # of norm 0: no scaling at first
        return net, [dict(params=[net[0].weight, net[2].weight], weight_decay=0.02), dict(params=[net[0].bias, net[2].bias], weight_decay=0.0)]

    (ours, our_groups), (theirs, their_groups) = problem(), problem()
    mine, peer = optim.LAMB(our_groups, lr=8e-3), peers.Lamb(their_groups, lr=8e-3, max_grad_norm=1.0)
    x = torch.randn(8, 6, dtype=torch.float64)
    for scale in (1e-3, 1.0, 30.0, 1e3, 1.0, 0.0):                          # clipped and not
        for net, optimizer in ((ours, mine), (theirs, peer)):
            optimizer.zero_grad()
            (scale * net(x).square().sum() + scale * net(x).sum()).backward()
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters()):
            assert relative(a, b) < 1e-12
    again, groups = problem()
    other = optim.LAMB(groups, lr=8e-3)
    other.load_state_dict(mine.state_dict())                                # continues with its moments and its step
    assert other.state[again[0].weight]["steps"] == 6 and torch.equal(other.state[again[0].weight]["mean"], mine.state[ours[0].weight]["mean"])


def test_mixed_targets():
    image, label = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 3, 1])
    kinds, neighbour = set(), image.roll(1, 0)
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, target = finetune.mix(image, label, dict(mixup=0.8, cutmix=1.0), 4)
        assert target.shape == (6, 4) and torch.allclose(target.sum(1), torch.ones(6))
        lam = [float(target[i, label[i]]) for i in (1, 2, 3)]               # whose neighbour is of another class
        assert max(lam) - min(lam) < 1e-6                                   # one λ a batch
        lam = lam[0]
        for i in range(6):
            wanted = lam * torch.nn.functional.one_hot(label[i], 4) + (1 - lam) * torch.nn.functional.one_hot(label[i - 1], 4)
            assert torch.allclose(target[i], wanted, atol=1e-5)
        pasted = mixed == neighbour
        if torch.allclose(mixed, lam * image + (1 - lam) * neighbour, atol=1e-5) and not pasted.any():
            kinds.add("mixup")
        else:
            assert (pasted | (mixed == image)).all() and abs(float(pasted.float().mean()) - (1 - lam)) < 1e-5
            kinds.add("cutmix")
    assert kinds == {"mixup", "cutmix"}
    same, target = finetune.mix(image, label, dict(mixup=None, cutmix=None), 4)
    assert torch.equal(same, image) and torch.equal(target, torch.nn.functional.one_hot(label, 4).float())


def test_classification_losses():
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(5, 4, generator=g, dtype=torch.float64), torch.rand(5, 4, generator=g, dtype=torch.float64)
    p = logits.sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()            # over classes: summed; over images: averaged
    assert relative(losses.class_loss(logits, target, "bce"), expected) < 1e-12
    target = target / target.sum(1, keepdim=True)
    smooth = 0.9 * target + 0.1 / 4
    assert relative(losses.class_loss(logits, target, "ce", 0.1), -(smooth * logits.log_softmax(1)).sum(1).mean()) < 1e-12
    top1, top5 = losses.class_sums(torch.tensor([[.1, .9, 0, 0, 0, .2], [6., 5, 4, 3, 2, 1]]), torch.tensor([1, 5]))
    assert (int(top1), int(top5)) == (1, 1)
    assert [int(v) for v in losses.class_sums(torch.eye(3), torch.tensor([0, 1, 0]))] == [2, 3]      # fewer than five classes


def test_pose_and_mask_metrics():
    pose = torch.tensor([[0.5, 0.5, 0.3, 0.1], [0.25, 0.75, 0.4, 6.2]])
    right = losses.encode_pose(pose)
    assert [float(v) for v in losses.pose_sums(right, pose, 64)] == pytest.approx([0, 0, 0], abs=1e-3)
    moved = pose + torch.tensor([[3 / 64, 4 / 64, 2 / 64, math.radians(30)], [0, 0, 0, math.radians(-20)]])
    assert [float(v) for v in losses.pose_sums(losses.encode_pose(moved), pose, 64)] == pytest.approx([5, 2, 50], rel=1e-4)
    across = losses.pose_sums(losses.encode_pose(torch.tensor([[0.5, 0.5, 0.3, 6.2]])), pose[:1], 64)[2]
    assert float(across) == pytest.approx(math.degrees(0.1 + 2 * math.pi - 6.2), rel=1e-3)            # the shorter way round
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2] = True
    found = torch.full((1, 1, 4, 4), -1.0)
    found[0, 0, :, :1] = 1
    sums = [float(v) for v in losses.mask_sums(found, mask)]
    assert sums == [2, 10, 6, 14] and losses.TASKS["mask"].metrics(sums, 1)["miou"] == pytest.approx(50 * (2 / 10 + 6 / 14))
    world = shapes.Shapes(32, target="pose")
    assert torch.equal(world[3][1], world.sample(3)["pose"]) and torch.equal(shapes.Shapes(32, target="mask")[3][1], world.sample(3)["mask"])


def test_layer_decay():
    model = models.Predictor(models.build("vit_b", 32, dim=32, depth=12, heads=2, mlp_dim=64).encoder, 5)
    scales = optim.layer_scales(model, 0.65)
    assert set(scales) == {n for n, _ in model.named_parameters()}
    for name, scale in scales.items():
        if m := re.match(r"encoder\.blocks\.(\d+)\.", name):
            assert scale == pytest.approx(0.65 ** (12 - int(m[1])))
        else:
            assert scale == pytest.approx(0.65 ** 13 if name.startswith("encoder.") else 1)
    assert {n for n, s in scales.items() if s == 1} == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    resnet = optim.layer_scales(models.Predictor(models.build("resnet_nano", 32).encoder, 5), 0.5)
    assert [resnet[n] for n in ("encoder.conv1.weight", "encoder.layer1.0.conv1.weight", "encoder.layer4.0.conv1.weight", "head.bias")] == [1 / 32, 1 / 16, 1 / 2, 1]
    config = protocol_of("--arch", "vit_nano", "--weight-decay", 0.05, "--layer-decay", 0.5)
    model = models.Predictor(models.build("vit_nano", 32).encoder, 5)
    names, seen = {id(p): n for n, p in model.named_parameters()}, {}
    for group in optim.make_optimizer(model, config).param_groups:
        seen |= {names[id(p)]: (group["weight_decay"], group["peak_lr"]) for p in group["params"]}
    assert seen["encoder.blocks.3.mlp.fc1.weight"] == (0.05, config["lr"] / 2) and seen["fc_norm.weight"] == (0, config["lr"])
    assert seen["encoder.pos_embed"] == (0, config["lr"] / 32) and seen["encoder.blocks.0.attn.relative_position_bias_table"][0] == 0
    assert seen["head.weight"] == (0.05, config["lr"]) and len(seen) == len(names)


def test_ema_by_hand():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).double()
    ema, wanted = optim.EMA(model, 0.9, warmup_steps=4), {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(7):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(4, 3).double())                                   # moves the batch statistics
        ema.update(model, step)
        decay = 0.9 * (0.9 + 0.1 * min(1, step / 4))
        wanted = {n: decay * wanted[n] + (1 - decay) * p.detach() for n, p in model.named_parameters()}
    assert all(relative(p, wanted[n]) < 1e-12 for n, p in ema.module.named_parameters())
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)


def test_repeated_augmentation():
    batches = list(data.Batches(30, 12, 4, 0, 4, repeats=3))
    epoch = [sample for batch in batches[:6] for sample in batch]           # two steps of three micro-batches
    assert len(epoch) == 24 and len({p for _, p, _ in epoch}) == 24          # as long as without, each crop its own
    counts = np.unique([i for _, _, i in epoch], return_counts=True)[1]
    assert set(counts) == {3} and len(counts) == 8                          # a third of the images, three times each
    assert all(len({i for _, _, i in batch}) == 4 for batch in batches)     # mixing never pairs an image with itself
    assert {i for _, _, i in epoch} != {i for batch in batches[6:] for _, _, i in batch}
    odd = [i for batch in data.Batches(30, 10, 10, 0, 3, repeats=3) for _, _, i in batch]
    assert len(odd) == 30 and len(set(odd)) == 10                           # where a batch is no multiple of three
    two = [list(data.Batches(30, 12, 2, 0, 2, rank=r, world=3, repeats=3)) for r in range(3)]
    assert [s for micro in zip(*two) for batch in micro for s in batch] == epoch


def test_augment():
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    out = [data.augment(image, data.generator(i), 9, 0.25) for i in range(60)]
    assert torch.equal(torch.random.get_rng_state(), before)                # leaves the model's randomness alone
    assert all(o.shape == image.shape and o.dtype == torch.uint8 for o in out)
    assert all(torch.equal(o, data.augment(image, data.generator(i), 9, 0.25)) for i, o in enumerate(out[:10]))
    assert 5 < sum(torch.equal(o, image) for o in out) < 35                 # a quarter escapes both operations, some the box too
    share = []
    for i in range(200):
        changed = (data.augment(image, data.generator(i), None, 0.25) != image).any(0).float().mean()
        share.append(float(changed))
    erased = [s for s in share if s]
    assert len(erased) == pytest.approx(50, abs=20) and 0.01 < min(erased) and max(erased) < 0.36
    noise = data.normalize(data.augment(torch.full((3, 200, 200), 124, dtype=torch.uint8), data.generator(3), None, 1.0)[None])[0]
    box = (noise - noise[:, :1, :1]).abs().sum(0) > 0
    assert noise[:, box].std() == pytest.approx(1, abs=0.05)                # N(0, 1), but for what bytes cannot show
    weak, strong = (np.mean([float((data.augment(image, data.generator(i), m).float() - image).abs().mean()) for i in range(80)]) for m in (1, 9))
    assert weak < 0.8 * strong


def test_evaluation_crop():
    image = torch.randint(0, 256, (3, 60, 100), dtype=torch.uint8)
    crop = data.evaluation_crop(image, 48, 40)
    v2 = torchvision.transforms.v2
    assert torch.equal(crop, v2.CenterCrop(40)(v2.Resize(48, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)(image)))
    small = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(data.evaluation_crop(small, 32, 32), small)


def test_knn_by_hand():
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [-1, 0]]), dim=1)
    labels, query = torch.tensor([0, 2, 1, 1]), torch.tensor([[1.0, 0]])
    votes = evaluate.knn(bank, labels, query, 3, 0.5, 4)
    wanted = torch.tensor([[math.exp(2), math.exp(0), math.exp(1 / math.sqrt(1.01) / 0.5), 0]])
    assert torch.allclose(votes / votes.sum(), wanted / wanted.sum())
    assert evaluate.knn(bank, labels, query, 3, 1e-6, 4).isfinite().all()   # however cold
    assert evaluate.knn(bank, labels, query, 4, 100.0, 4).argmax() == 1     # a high temperature counts heads


@pytest.mark.parametrize("arch", ["vit_nano", "resnet_nano"])
def test_predictors(arch):
    image = torch.randn(2, 3, 32, 32)
    encoder = models.build(arch, 32).encoder.eval()
    z = encoder(image)
    model = models.Predictor(encoder, 5).eval()
    if arch == "vit_nano":                                                  # the final norm gave way to fc_norm
        assert not torch.allclose(encoder(image), z)
        mean = torch.nn.functional.layer_norm(encoder(image).mean((2, 3)), (96,), eps=1e-6)
    else:
        mean = z.mean((2, 3))
    assert torch.allclose(model.features(image), mean, atol=1e-6) and torch.allclose(model(image), model.head(mean), atol=1e-6)
    assert 0.007 < model.head.weight.std() < 0.013 and (model.head.bias == 0).all()
    assert models.Predictor(models.build(arch, 32).encoder, 5, "flatten")(image).shape == (2, 5)
    dense = models.Predictor(models.build(arch, 32).encoder, 2, "none").eval()
    other = image.clone()
    assert dense(image).shape == (2, 2, 32, 32)
    if arch == "resnet_nano":                                               # what is far away in the image is so in the output
        other[..., :4, :4] += 3
        changed = (dense(other) - dense(image)).abs().amax((0, 1))
        assert changed[:8, :8].mean() > changed[-8:, -8:].mean()


# ------------------------------------------------------------------------------------------------ finetune.py: runs

def tune(out, *argv):
    """A small run in this process: its result, and its log."""
    finetune.main(["--workers", "0", "--log-every", "1", "--out", str(out), *map(str, argv)])
    log = Path(out) / "log.jsonl"
    return json.loads((Path(out) / "result.json").read_text()), [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder of three classes that a small net tells apart: red, green and blue noise; 48 + 13 images."""
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for split, images in (("train", 48), ("val", 13)):
        for i in range(images):
            path = root / split / "rgb"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (32, 32, 3)).astype(np.uint8)
            pixels[..., i % 3] += 130
            Image.fromarray(pixels).save(path)
    return root


@pytest.mark.parametrize("arch", ["vit_nano", "resnet_nano"])
def test_fine_tuning_learns(arch, labelled, tmp_path, capsys):
    options = ["--arch", arch, "--data", labelled, "--img-size", 32, "--batch-size", 12, "--epochs", 5, "--lr", 2e-3, "--warmup-epochs", 1]
    result, log = tune(tmp_path / "run", *options)
    assert result["top1"] > 90 and result["n"] == 13 and result["epoch"] == 5 and result["best"]["top1"] >= result["top1"]
    assert {"top1", "top5", "n", "epoch", "protocol", "arch", "init", "config"} <= set(result)
    assert result["config"]["lr"] == 2e-3 and result["init"] is None and result["protocol"] == "small"
    tests = [e for e in log if "top1" in e]
    assert [e["epoch"] for e in tests] == [1, 2, 3, 4, 5] and tests[-1]["top1"] == result["top1"]
    assert max(e["top1"] for e in tests) == result["best"]["top1"]
    assert [e["step"] for e in log if "loss" in e] == list(range(1, 21))
    again, _ = tune(tmp_path / "eval", "--init", tmp_path / "run" / "best.pt", "--data", labelled, "--eval")
    assert (again["top1"], again["n"]) == (result["best"]["top1"], 13) and again["arch"] == arch
    said = capsys.readouterr()
    assert "from scratch" in said.out and "Result: top1" in said.out and said.err == ""
    near, _ = tune(tmp_path / "knn", "--init", tmp_path / "run" / "last.pt", "--data", labelled, "--protocol", "knn", "--k", 5)
    assert near["top1"] > 90 and near["config"]["k"] == 5 and near["config"]["temperature"] == 0.07


def test_resume_of_fine_tuning_is_exact(labelled, tmp_path, capsys):
    options = ["--arch", "vit_nano", "--data", labelled, "--img-size", 32, "--batch-size", 12, "--epochs", 2, "--drop-path", 0.2, "--mixup", 0.8,
               "--cutmix", 1.0, "--randaugment", 9, "--random-erasing", 0.25, "--ema", 0.9, "--optimizer", "lamb", "--loss", "bce"]
    tune(tmp_path / "whole", *options)
    tune(tmp_path / "parts", *options, "--steps", 3)
    assert len(torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["ema"]) > 60
    result, log = tune(tmp_path / "parts", *options)
    assert "continuing after step 3" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())
    assert any(not torch.equal(v, a["ema"][k]) for k, v in a["model"].items())
    with pytest.raises(SystemExit):
        tune(tmp_path / "parts", *options, "--label-smoothing", 0.2)
    assert "label_smoothing (0.1 there, 0.2 here)" in capsys.readouterr().err
    evaluated, _ = tune(tmp_path / "eval", "--init", tmp_path / "parts" / "last.pt", "--data", labelled, "--eval")
    assert evaluated["top1"] == result["top1"] and evaluated["config"]["protocol"] == "small"
    for name in ("whole", "parts"):                                         # the average is what is tested, and what is read
        best, last = (torch.load(tmp_path / name / file, weights_only=True) for file in ("best.pt", "last.pt"))
        assert best["step"] == a["best"]["epoch"] * 4 and last["best"] == a["best"]
        if best["step"] == 8:
            assert all(torch.equal(v, last["ema"][k]) for k, v in best["model"].items())
    model = models.Predictor(models.build("vit_nano", 32).encoder, 3)
    weights.load(model, tmp_path / "parts" / "last.pt")
    assert all(torch.equal(v, b["ema"][k]) for k, v in model.state_dict().items())
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == result
    assert (tmp_path / "whole" / "log.jsonl").read_text().count("top1") == 2 and (result["step"], result["steps"]) == (8, 8)


def test_a_training_step_by_hand(labelled, tmp_path):
    """Two steps of SGD with momentum, smoothing, clipping and accumulation, rewritten here from the configuration."""
    torch.manual_seed(3)
    start = models.build("vit_nano", 32)
    torch.save({"model": start.state_dict(), "identity": dict(arch="vit_nano", img_size=32)}, tmp_path / "start.pt")
    options = ["--init", tmp_path / "start.pt", "--data", labelled, "--batch-size", 12, "--micro-batch", 3, "--steps", 2, "--epochs", 8, "--lr", 0.1,
               "--optimizer", "sgd", "--clip", 0.5, "--label-smoothing", 0.3, "--layer-decay", 0.5, "--weight-decay", 0, "--warmup-epochs", 1]
    tune(tmp_path / "run", *options)
    after = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    config = after["identity"]
    torch.manual_seed(data.key(0))
    model = models.Predictor(models.build("vit_nano", 32).encoder, 3)
    weights.load(model, tmp_path / "start.pt")
    source, velocity = sources.Folder(str(labelled), "train"), {}
    for step, batch in enumerate(data.Batches(48, 12, 12, 0, 2)):
        views = data.Views(source, lambda sample, g: finetune.train_view(sample, g, config))
        image, label = (torch.stack(list(map(torch.as_tensor, each))) for each in zip(*(views[s][0] for s in batch)))
        target = 0.7 * torch.nn.functional.one_hot(label, 3) + 0.1
        gradients = torch.autograd.grad(-(target * model(data.normalize(image)).log_softmax(1)).sum(1).mean(), list(model.parameters()))
        shrink = min(1.0, 0.5 / (float(torch.cat([g.flatten() for g in gradients]).norm()) + 1e-6))
        assert shrink < 1
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), gradients):
                velocity[name] = 0.9 * velocity.get(name, 0) + shrink * g
                block = re.search(r"blocks\.(\d)", name)
                depth = 4 - int(block[1]) if block else 5 if name.startswith("encoder.") else 0
                p -= 0.1 * (step + 1) / 4 * 0.5 ** depth * velocity[name]
    for name, value in model.state_dict().items():
        assert torch.allclose(after["model"][name], value, atol=2e-6), name


def test_labels_and_heads(labelled, tmp_path, capsys):
    options = ["--arch", "vit_nano", "--data", labelled, "--img-size", 32, "--batch-size", 4, "--epochs", 2, "--eval-every", 2, "--labels", 8]
    _, log = tune(tmp_path / "zero", *options)
    assert len([e for e in log if "top1" in e]) == 1 and max(e["step"] for e in log) == 4
    _, other = tune(tmp_path / "one", *options, "--seed", 1)
    assert "8 images to learn class from" in capsys.readouterr().out and log[0]["loss"] != other[0]["loss"]
    state = torch.load(tmp_path / "zero" / "last.pt", weights_only=True)
    state["model"]["head.weight"].fill_(7)
    torch.save(state, tmp_path / "old.pt")                                  # a classifier is read for --eval only
    tune(tmp_path / "again", "--init", tmp_path / "old.pt", *options, "--steps", 1)
    assert torch.load(tmp_path / "again" / "last.pt", weights_only=True)["model"]["head.weight"].abs().max() < 0.1
    assert "left in the file: head.weight" in capsys.readouterr().out
    alone, _ = tune(tmp_path / "val", "--init", tmp_path / "zero" / "last.pt", "--data", labelled / "val", "--eval")
    both, _ = tune(tmp_path / "both", "--init", tmp_path / "zero" / "last.pt", "--data", labelled, "--eval")
    assert alone["n"] == both["n"] == 13 and alone["top1"] == both["top1"]  # of a folder without train/: all images


def test_frozen_encoders_stay_as_they_are(tmp_path):
    for arch, options in (("resnet_nano", ["--freeze"]), ("vit_nano", ["--protocol", "linear", "--batch-size", 64])):
        model = models.build(arch, 32)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
        torch.save({"model": model.state_dict(), "identity": dict(arch=arch, img_size=32)}, tmp_path / f"{arch}.pt")
        tune(tmp_path / arch, "--init", tmp_path / f"{arch}.pt", "--labels", 128, "--epochs", 1, *options)
        after = torch.load(tmp_path / arch / "last.pt", weights_only=True)["model"]
        kept = [name for name in model.state_dict() if name.startswith("encoder.") and not name.startswith("encoder.norm")]
        assert len(kept) > 50 and all(torch.equal(after[name], model.state_dict()[name]) for name in kept)      # statistics of norms, too
        assert not torch.equal(after["head.bias"], torch.zeros(10))


@pytest.mark.parametrize("task,metrics", [("pose", ["centre_px", "scale_px", "angle_deg"]), ("mask", ["miou"])])
@pytest.mark.parametrize("freeze", [[], ["--freeze"]])
def test_pose_and_mask_runs(task, metrics, freeze, tmp_path):
    options = ["--arch", "vit_nano", "--task", task, "--img-size", 32, "--labels", 64, "--batch-size", 32, "--epochs", 60, "--eval-every", 20, *freeze]
    result, log = tune(tmp_path / "run", *options)
    assert [k for k in result if k in (*metrics, "n", "top1")] == [*metrics, "n"] and result["n"] == 512
    trained = [e["loss"] for e in log if "loss" in e]
    assert np.mean(trained[-5:]) < (0.5 if task == "pose" else 0.8) * np.mean(trained[:5])               # learned by heart
    name, sign = losses.TASKS[task].best
    assert sign * result["best"][name] == max(sign * e[name] for e in log if name in e)
    assert result["config"]["loss"] is None and result["config"]["task"] == task
    again, _ = tune(tmp_path / "eval", "--init", tmp_path / "run" / "last.pt", "--eval")                 # the file says which task
    assert all(again[k] == pytest.approx(result[k], rel=1e-4) for k in metrics)


def test_192_to_224_to_256(labelled, tmp_path):
    """Pre-trained at 192, fine-tuned at 224, evaluated at 256: both kinds of position table are resized on the way."""
    train.main(["--arch", "deit_t", "--data", str(labelled), "--batch-size", "2", "--steps", "1", "--workers", "0", "--out", str(tmp_path / "pre")])
    finetune.main(["--init", str(tmp_path / "pre" / "last.pt"), "--data", str(labelled), "--labels", "4", "--batch-size", "4", "--epochs", "1",
                   "--protocol", "simmim", "--workers", "0", "--out", str(tmp_path / "tuned")])
    result, _ = tune(tmp_path / "eval", "--init", tmp_path / "tuned" / "best.pt", "--data", labelled, "--protocol", "simmim", "--img-size", 256, "--eval")
    assert result["n"] == 13 and [result["config"][k] for k in ("img_size", "test_resize", "test_crop")] == [256, 293, 256]
    pre, tuned = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("pre/last.pt", "tuned/best.pt"))
    table = "encoder.blocks.0.attn.relative_position_bias_table"
    assert [v["encoder.pos_embed"].shape[1] for v in (pre, tuned)] == [1 + 12 ** 2, 1 + 14 ** 2]
    assert [v[table].shape[0] for v in (pre, tuned)] == [23 ** 2 + 3, 27 ** 2 + 3]


BAD_TUNING = [  # options, what the one line must say
    ("--protocol mae", "invalid choice: 'mae'"),
    ("--arch resnet50 --protocol simmim", "no simmim protocol of imagenet for resnet50: choose from rsb_a3, rsb_a2"),
    ("--arch vit_b --protocol rsb_a2", "choose from simmim, linear"),
    ("--arch vit_b --recipe imagenet100", "no simmim protocol of imagenet100 for vit_b"),
    ("--arch deit_s --recipe imagenet100 --protocol linear", "choose from simmim"),
    ("--protocol scratch-small --init {tmp}/vit.pt", "leave out --init"),
    ("--eval", "--eval needs --init"),
    ("--init {tmp}/nowhere.pt", "no checkpoint at"),
    ("--init {tmp}/text.pt", "no PyTorch checkpoint"),
    ("--init {tmp}/cut.pt", "is damaged"),
    ("--init {tmp}/objects.pt", "never run"),
    ("--init {tmp}/bare.pt", "does not say which architecture it holds"),
    ("--init {tmp}/foreign.pt --arch resnet18", "in no known format"),
    ("--init {tmp}/vit.pt --arch resnet_nano", "holds a vit_nano, not a resnet_nano"),
    ("--init {tmp}/bare.pt --arch resnet_nano", "its encoder has"),
    ("--init {tmp}/vit.pt --img-size 64", "patch size and channels of the file"),
    ("--init {tmp}/vit.pt --eval", "has no class head for shapes and its 10 classes"),
    ("--init {tmp}/tuned.pt --data {data} --eval", "has no class head for"),
    ("--data {tmp}/nowhere", "no folder"),
    ("--init ''", "no checkpoint at ''"),
    ("--init {tmp}/vit.pt --out {tmp} --overwrite", "is where --init lies"),
    ("--data {tmp}/flat", "have no labels"),
    ("--data {tmp}/single", "has one class only, cat"),
    ("--init {tmp}/tuned.pt --data {data} --eval --epochs 3", "--epochs has no effect where nothing is trained"),
    ("--protocol knn --lr 3", "--lr has no effect"),
    ("--init {tmp}/tuned.pt --eval --protocol knn", "take one of them"),
    ("--task pose --mixup 0.8", "--mixup has no effect on the pose"),
    ("--crop-scale 0.9 0.5", "the smaller share first"),
    ("--crop-scale 0 0", "above 0"),
    ("--batch-size 99999999999999", "is too large"),
    ("--init {tmp}/nan.pt --data {data} --eval --out {tmp}/empty", "not finite"),
    ("--protocol knn --out {tmp}/text.pt", "text.pt"),
    ("--protocol knn --out {tmp}/other", "holds a run: choose another --out"),
    ("--data {tmp}/unmatched", "the classes of {tmp}/unmatched do not match: 'dog' is in train only"),
    ("--data {tmp}/hollow", "class folder cow in {tmp}/hollow/train has no images"),
    ("--data {tmp}/broken", "is no readable image"),
    ("--data {data}", "make no batch of 64"),
    ("--data {data} --task pose", "only the built-in images know the pose"),
    ("--task depth", "invalid choice: 'depth'"),
    ("--task mask --protocol knn", "knn is for classes"),
    ("--labels 5000", "--labels 5000 is more than the 4096"),
    ("--labels 10 --protocol knn", "--k 20 is more than the 10"),
    ("--k 0", "0 is not 1 or more"),
    ("--temperature 0", "is not"),
    ("--test-resize 40", "test_resize 40 is smaller than test_crop 64"),
    ("--test-crop 96 --test-resize 96", "a ViT is tested at its own size"),
    ("--schedule step", "needs --lr-step-epochs"),
    ("--min-lr none", "needs --min-lr"),
    ("--randaugment 11", "11 is not in 0..10"),
    ("--ema 1.5", "1.5 is not in 0..1"),
    ("--lr nan", "nan is not 0 or more"),
    ("--optimizer adam", "invalid choice: 'adam'"),
    ("--img-size 65", "not a multiple of 8"),
    ("--batch-size 10 --micro-batch 4", "not divisible by"),
    ("--out {tmp}/other", "epochs (3 there, 20 here)"),
    ("--out {tmp}/strange", "holds a result.json but no last.pt"),
    ("--protocol knn --out {tmp}/strange", "holds the result of something else"),
    ("--out {tmp}/text.pt", "text.pt"),
]


def test_bad_input_of_finetune_is_one_line(labelled, tmp_path, capsys):
    vit = models.build("vit_nano", 32).state_dict()
    torch.save({"model": vit, "identity": dict(arch="vit_nano", img_size=32)}, tmp_path / "vit.pt")
    torch.save({"model": vit}, tmp_path / "bare.pt")
    torch.save({"model": vit, "args": train.argparse.Namespace(lr=1)}, tmp_path / "objects.pt")
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "foreign.pt")
    tuned = models.Predictor(models.build("vit_nano", 32).encoder, 3).state_dict()
    torch.save({"model": tuned, "classes": ["a", "b", "c"], "identity": dict(arch="vit_nano", img_size=32)}, tmp_path / "tuned.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "vit.pt").read_bytes()[:-1000])
    write_images(tmp_path / "flat", [f"{i}.png" for i in range(9)])
    write_images(tmp_path / "single", ["train/cat/1.png", "val/cat/3.png"])
    tuned["head.bias"][0] = math.nan
    torch.save({"model": tuned, "classes": ["b", "g", "r"], "identity": dict(arch="vit_nano", img_size=32)}, tmp_path / "nan.pt")
    write_images(tmp_path / "unmatched", ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/emu/4.png"])
    write_images(tmp_path / "hollow", ["train/cat/1.png", "train/dog/1.png", "val/cat/3.png", "val/dog/3.png"])
    (tmp_path / "hollow" / "train" / "cow").mkdir()
    for i in range(200):
        path = tmp_path / "broken" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("hello")
    for name in ("other", "strange"):
        (tmp_path / name).mkdir()
    (tmp_path / "strange" / "result.json").write_text("{}")
    identity = protocol_of() | dict(task="class", eval=False, init=None, freeze=False, labels=None, seed=0, epochs=3)
    weights.write(str(tmp_path / "other" / "last.pt"), checkpoint(identity))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for options, says in BAD_TUNING:
        argv = shlex.split(options.format(tmp=tmp_path, data=labelled)) + ["--workers", "0"]
        with pytest.raises(SystemExit) as error:
            finetune.main(argv if "--out" in argv or "broken" in options else argv + ["--out", str(tmp_path / "out")])
        said = capsys.readouterr()
        assert error.value.code == 2 and says.format(tmp=tmp_path) in said.err and len(said.err.splitlines()) == 1, (options, said.err)
        assert said.err.startswith("finetune.py: ")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ several processes

def torchrun(processes, out, *argv, script="train.py"):
    done = process(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script, "--out", out, *argv])
    assert done.returncode == 0, done.stderr
    if "--eval" in argv or "knn" in argv:
        return json.loads((Path(out) / "result.json").read_text())
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def test_two_processes_are_one(tmp_path):
    """The same loss curve from the same total batch, on 1 or 2 processes, with and without accumulation."""
    options = ["--frequency-loss", "none", "--drop-path", "0", "--img-size", "32", "--batch-size", "32", "--epochs", "1",
               "--steps", "20", "--log-every", "1"]
    one = torchrun(1, tmp_path / "one", *options, "--workers", "0")
    assert len(one) == 20
    for name, processes, more in (("two", 2, ["--workers", "1"]), ("accumulated", 2, ["--micro-batch", "4", "--workers", "0"]),
                                  ("alone", 1, ["--micro-batch", "8", "--workers", "2"])):
        other = torchrun(processes, tmp_path / name, *options, *more)
        assert max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, other, strict=True)) < 1e-5, name


@pytest.mark.parametrize("protocol", [["--eval"], ["--protocol", "knn", "--k", "7"]])
def test_evaluation_counts_each_image_once(protocol, tmp_path):
    """The same correct answers on 1 and 2 processes, with any batch size, of 37 images."""
    rng = np.random.default_rng(0)
    for i in range(37 + 23):
        path = tmp_path / "images" / ("val" if i < 37 else "train") / "abcde"[i % 5] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(path)
    model = random_weights(models.Predictor(models.build("resnet_nano", 32).encoder, 5))
    torch.save({"model": model.state_dict(), "identity": dict(arch="resnet_nano", img_size=32)}, tmp_path / "best.pt")
    options = ["--init", tmp_path / "best.pt", "--data", tmp_path / "images", *protocol]
    one, _ = tune(tmp_path / "one", *options, "--batch-size", 4)
    others = [tune(tmp_path / f"batch{b}", *options, "--batch-size", b)[0] for b in (1, 37, 64)]
    others.append(torchrun(2, tmp_path / "two", *map(str, options), "--batch-size", "7", "--workers", "1", script="finetune.py"))
    for other in others:
        assert (other["top1"], other["top5"], other["n"]) == (one["top1"], one["top5"], 37)
    assert 0 < one["top1"] < 100 and one["top1"] * 37 / 100 == pytest.approx(round(one["top1"] * 37 / 100))


def test_fine_tuning_on_two_processes(labelled, tmp_path):
    """The same curve as on one, where nothing depends on the process (no drop path, no mixing, no batch norm)."""
    options = ["--arch", "vit_nano", "--data", labelled, "--img-size", "32", "--batch-size", "12", "--epochs", "2", "--log-every", "1"]
    _, one = tune(tmp_path / "one", *options)
    two = torchrun(2, tmp_path / "two", *map(str, options), "--workers", "1", script="finetune.py")
    assert len(one) == len(two) == 10
    for a, b in zip(one, two):
        assert a.get("top1") == b.get("top1") and a.get("loss", 1) == pytest.approx(b.get("loss", 1), rel=1e-5)


def test_processes_fail_together(tmp_path):
    done = process(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "--data", tmp_path / "nowhere"])
    assert done.returncode and [line for line in done.stderr.splitlines() if line.startswith("train.py:")] == [
        f"train.py: no folder {tmp_path / 'nowhere'}: --data takes {', '.join(sources.SOURCES)}, or a folder of images, or a pack"]
    assert "train.py\", line" not in done.stderr                             # torchrun's own report, but none of ours


def test_published_command_with_a_small_batch(tmp_path):
    """torchrun … train.py --arch vit_b as it stands, but for the number of processes, the batch and the steps."""
    log = torchrun(2, tmp_path / "vit_b", "--arch", "vit_b", "--batch-size", "4", "--steps", "1", "--workers", "1")
    assert len(log) == 1 and 0.5 < log[0]["loss"] < 3 and log[0]["lr"] == pytest.approx(4e-4 * 4 / 2048 / 10240)


# ------------------------------------------------------------------------------------------------ speed: loader, packs, the loop, bench.py

def test_crops_are_pils(tmp_path):
    """The same boxes cut by PIL, and by torchvision's own function, differ by rounding only."""
    image = shapes.Shapes(300, count=1)[0][0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "i.jpg", quality=95)
    image, photo = sources.read_image(str(tmp_path / "i.jpg")), Image.open(tmp_path / "i.jpg").convert("RGB")
    for seed, (kind, scale) in itertools.product(range(6), ((data.BILINEAR, (0.67, 1.0)), (data.BICUBIC, (0.08, 0.2)))):
        ours = data.random_resized_crop(image, 112, scale, data.generator(seed), interpolation=kind)
        box, flip = data.crop_box(300, 300, scale, data.generator(seed))
        for there in (photo, image):
            crop = data.TF.resized_crop(there, *box, [112, 112], kind, antialias=True)
            crop = data.TF.horizontal_flip(crop) if flip else crop
            crop = crop if torch.is_tensor(crop) else torch.from_numpy(np.array(crop)).permute(2, 0, 1)
            assert (crop.float() - ours.float()).abs().mean() < 0.3
        assert ours.dtype == torch.uint8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of PNG files: 36 of 32 px, and of other sizes, one of them tall."""
    root = tmp_path_factory.mktemp("pictures")
    for kind in range(3):
        (root / f"class{kind}").mkdir()
        for i, (size, side) in enumerate([(32, 32)] * 12 + [(90, 90), (300, 200)]):
            image = shapes.Shapes(size, count=200)[10 * i + kind][0][..., :side]
            torchvision.io.write_png(image, str(root / f"class{kind}" / f"{i}.png"))
    return root


def test_pack_holds_the_images(pictures, tmp_path, capsys):
    for name, size, quality in (("jpeg", 100, 92), ("raw", 0, "raw")):
        data.main(["pack", str(pictures), str(tmp_path / name), "--size", str(size), "--quality", str(quality), "--workers", "1"])
        assert "42 images" in (said := capsys.readouterr()).out and "Now --data" in said.out and not said.err
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(name)) == [name]     # nothing half-written left
        for split in ("train", "val", "test"):
            files, packed = sources.Folder(pictures, split), sources.open_source(str(tmp_path / name), split, 32)
            assert isinstance(packed, sources.Packed) and len(packed) == len(files) and packed.classes == files.classes
            if split != "test":                                             # there, those for training come first
                assert np.array_equal(packed.labels, files.labels)
                for i in range(len(files)):
                    (there, label), (image, packed_label) = files[i], packed[i]
                    assert label == packed_label
                    if quality == "raw" or there.shape[-1] <= 64:
                        assert torch.equal(image, there)
                    else:                                                   # as much worse as a JPEG of that quality, and no more
                        small = data.TF.resize(there, [min(100, there.shape[-1])], data.BICUBIC, antialias=True)
                        jpeg = io.BytesIO()
                        Image.fromarray(small.permute(1, 2, 0).numpy()).save(jpeg, "JPEG", quality=92)
                        lossy = torch.from_numpy(np.array(Image.open(jpeg))).permute(2, 0, 1)
                        error, usual = ((other.float() - small).square().mean().sqrt() for other in (image, lossy))
                        assert image.shape == small.shape and 0.5 * usual < error < 1.5 * usual
    again = pickle.loads(pickle.dumps(packed))                              # as a worker that is not forked gets it
    assert torch.equal(again[3][0], packed[3][0]) and len(again) == len(packed)
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_packs_keep_what_sources_say(tmp_path):
    """Splits of their own stay, class folders without images are named as before, an unreadable image is left out and named."""
    root = tmp_path / "set"
    write_images(root, [f"{s}/{c}/{i}.png" for s, n in (("train", 6), ("val", 2)) for c in "ab" for i in range(n)])
    (root / "val" / "c").mkdir()
    (root / "train" / "a" / "9.jpg").write_text("hello")
    images, problems = data.pack(str(root), str(tmp_path / "set.pack"))
    assert images == 16 and len(problems) == 1 and "9.jpg is no readable image" in problems[0]
    sizes = {split: len(sources.Packed(str(tmp_path / "set.pack"), split)) for split in ("train", "val", "test")}
    assert sizes == dict(train=12, val=4, test=4)
    assert sources.Packed(str(tmp_path / "set.pack"), "val").empty == sources.Folder(root, "val").empty == ["c"]
    flat = tmp_path / "flat"
    write_images(flat, [f"{i}.png" for i in range(40)])
    data.pack(str(flat), str(tmp_path / "flat.pack"))
    assert (sources.Packed(str(tmp_path / "flat.pack"), "train").labels == -1).all()


def test_training_from_a_pack_is_training_from_files(pictures, tmp_path):
    data.main(["pack", str(pictures), str(tmp_path / "pack"), "--size", "0", "--quality", "raw", "--workers", "0"])
    losses_of = {}
    for name, path in (("files", pictures), ("pack", tmp_path / "pack")):
        options = ["--data", str(path), "--batch-size", "12", "--log-every", "1", "--workers", "0"]
        train.main(["--img-size", "32", "--steps", "5", "--out", str(tmp_path / name), *options])
        finetune.main(["--protocol", "scratch-small", "--img-size", "32", "--steps", "4", "--out", str(tmp_path / f"tuned-{name}"), *options])
        losses_of[name] = [entry.get("loss") or entry["top1"] for run in (name, f"tuned-{name}")
                           for entry in map(json.loads, (tmp_path / run / "log.jsonl").read_text().splitlines())]
    assert losses_of["files"] == losses_of["pack"] and len(losses_of["files"]) >= 10


def test_damaged_packs(pictures, tmp_path, capsys):
    data.pack(str(pictures), str(tmp_path / "pack"), quality="raw", size=0)

    def damaged(name, file, change):
        copy = tmp_path / name
        shutil.copytree(tmp_path / "pack", copy)
        content = change((copy / file).read_bytes())
        (copy / file).unlink() if content is None else (copy / file).write_bytes(content)
        return copy

    pixels = (tmp_path / "pack" / "images.bin").read_bytes()

    def checked(offset, length, label, height, width):                      # a record whose checksum is right
        record = np.array((offset, length, label, height, width, 0), sources.RECORD)
        record["check"] = sources.checksum(record, pixels[offset:offset + length])
        return record.tobytes()

    flip = lambda at: lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]
    huge = np.array([(2 ** 63, 2 ** 31, 0, 2 ** 31, 2 ** 31, 0)], sources.RECORD).tobytes()
    cases = [("short", "images.bin", lambda c: c[:-1], "truncated"), ("index", "index.bin", lambda c: c[:-28], "truncated"),
             ("odd", "index.bin", lambda c: c[:-1], "half-written or damaged"), ("none", "pack.json", lambda c: None, "half-written"),
             ("text", "pack.json", lambda c: b"hello", "half-written or damaged"), ("list", "pack.json", lambda c: b"[1]", "damaged"),
             ("version", "pack.json", lambda c: c.replace(b"pack 2", b"pack 1"), "this program reads 'nanoA2MIM pack 2'"),
             ("other", "pack.json", lambda c: c.replace(b'"classes"', b'"kinds"'), "damaged"),
             ("deep", "pack.json", lambda c: b"[" * 100000, "damaged"), ("endless", "pack.json", lambda c: c.replace(b'"images": 33', b'"images": Infinity'), "damaged"),
             ("less", "pack.json", lambda c: c.replace(b'"images": 33', b'"images": -5').replace(b'"images": 9', b'"images": 47'), "damaged"),
             ("word", "pack.json", lambda c: re.sub(rb'"classes": \[[^]]*\]', b'"classes": "abc"', c), "damaged"),
             ("pixel", "images.bin", lambda c: bytes(b ^ 1 for b in c), "is damaged"),
             ("label", "index.bin", lambda c: b"".join(flip(12)(c[i:i + 28]) for i in range(0, len(c), 28)), "is damaged"),
             ("outside", "index.bin", lambda c: huge * (len(c) // 28), "is damaged"),
             ("nothing", "index.bin", lambda c: checked(0, 0, 0, 4, 0) * (len(c) // 28), "is damaged"),
             ("class", "index.bin", lambda c: checked(0, 3072, 99, 32, 32) * (len(c) // 28), "is damaged"),
             ("shape", "index.bin", lambda c: checked(0, 3072, 0, 32, 31) * (len(c) // 28), "is damaged"),
             ("pixels", "index.bin", lambda c: checked(0, 3072, 0, 0, 0) * (len(c) // 28), "is damaged")]
    for name, file, change, says in cases:
        path = damaged(name, file, change)
        before = {p: p.read_bytes() for p in path.iterdir()}
        with pytest.raises(SystemExit) as error:
            train.main(["--data", str(path), "--out", str(tmp_path / "run"), "--batch-size", "8", "--img-size", "32", "--workers", "0"])
        said = capsys.readouterr().err.splitlines()
        assert error.value.code == 2 and len(said) == 1 and says in said[0] and "pack the images again" in said[0], (name, said)
        assert {p: p.read_bytes() for p in path.iterdir()} == before
    packed = sources.Packed(str(tmp_path / "pack"), "train")
    os.truncate(tmp_path / "pack" / "images.bin", 100)                      # while it is in use
    with pytest.raises(sources.BadImage, match="is damaged"):
        packed[len(packed) - 1]


def test_a_pack_is_whole_or_not_there(pictures, tmp_path):
    """Killed while it writes, or on a full disk: no pack, nothing else changed, and the same command works afterwards."""
    out, partial = tmp_path / "pack", tmp_path / "pack.partial"
    command = [sys.executable, "data.py", "pack", str(pictures), str(out), "--workers", "0"]
    slowly = ("import time, data; encode = data.Stored.__getitem__\n"
              "data.Stored.__getitem__ = lambda self, i: time.sleep(0.1) or encode(self, i)\n"
              f"data.main({command[2:]!r})")
    killed = subprocess.Popen([sys.executable, "-c", slowly], cwd=HERE)
    while not (partial / "images.bin").exists():
        time.sleep(0.05)
    time.sleep(1)
    killed.kill()
    killed.wait()
    left = {p.name: p.read_bytes() for p in partial.iterdir()}
    assert not out.exists() and sorted(left) == ["images.bin", "index.bin", "pack.json"]
    with pytest.raises(ValueError, match="half-written"):
        sources.open_source(str(partial), "train", 32)
    again = process(command[1:])                                            # might be another one that is still at it
    assert again.returncode == 2 and "pack.partial exists" in again.stderr and {p.name: p.read_bytes() for p in partial.iterdir()} == left
    shutil.rmtree(partial)
    full = ("import os, data\n"                                             # a disk without room
            "mkdir = os.mkdir\n"
            "os.mkdir = lambda path, *mode: (mkdir(path, *mode), str(path).endswith('.partial') and os.symlink('/dev/full', path + '/images.bin'))\n"
            f"data.main({command[2:]!r})")
    full = process(["-c", full])
    assert full.returncode == 2 and "No space left" in full.stderr and "Traceback" not in full.stderr and len(full.stderr.splitlines()) == 1
    assert not out.exists() and not partial.exists()
    done = process(command[1:])
    assert done.returncode == 0 and not partial.exists() and len(sources.Packed(str(out), "train")) == 33
    before = (out / "images.bin").read_bytes()
    again = process(command[1:])
    assert again.returncode == 2 and "exists: choose another name" in again.stderr and (out / "images.bin").read_bytes() == before


@pytest.mark.parametrize("options,says", [("{p} {t}/x --size -1", "--size -1 is not 0"), ("{p} {t}/x --quality 101", "neither in 1..100 nor raw"),
                                          ("{p} {t}/x --quality best", "best is neither"), ("{t}/missing {t}/x", "no folder"),
                                          ("{p}", "required: OUT"), ("{p} /dev/null/x", "/dev/null"), ("{p} shapes", "knows")])
def test_bad_input_of_pack_is_one_line(options, says, pictures, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        data.main(["pack", *options.format(p=pictures, t=tmp_path).split(" "), "--workers", "0"])
    said = capsys.readouterr().err
    assert error.value.code == 2 and says in said and len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


class Waiting(TorchDispatchMode):
    """Notes each operation for which the host would wait for the GPU: blocking copies. (Reading a number of a fake tensor raises.)"""

    def __init__(self):
        super().__init__()
        self.found, self.devices = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        into, outof = ({t.device.type for t in tree_leaves(each) if torch.is_tensor(t)} for each in (out, (args, kwargs)))
        self.devices |= into
        if str(function.overloadpacket) in ("aten._to_copy", "aten.copy_") and {"cpu", "cuda"} == into | outof:
            asynchronous = (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            if not asynchronous:
                self.found.append(str(function))
        return out


class Event:
    def record(self):
        pass


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="older PyTorch's fake CUDA tensors need a driver")
@pytest.mark.parametrize("script,arch", [(train, "vit_nano"), (train, "resnet_nano"), (finetune, "vit_nano"), (finetune, "resnet_nano")])
def test_the_loop_never_waits_for_the_gpu(script, arch, pictures, tmp_path, monkeypatch):
    """The training loop itself, on a GPU that is not there: fake tensors have a device, and no numbers to read."""
    steps, cuda, fake, watch, held = 6, torch.device("cuda", 0), FakeTensorMode(allow_non_fake_inputs=True), Waiting(), {}
    reads, image, label = [], torch.zeros(6, 3, 32, 32, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    second = label if script is finetune else torch.zeros(6, 4, 4)

    def place(model, device, world):                                        # from here on, nothing is real
        held["modes"].enter_context(fake)
        for module in model.modules():
            for kept in (module._parameters, module._buffers):
                for name, t in kept.items():
                    kept[name] = t if t is None else torch.empty(t.shape, dtype=t.dtype, device=device)
                    if isinstance(t, torch.nn.Parameter):
                        kept[name] = torch.nn.Parameter(kept[name])
        held["model"] = model
        return model

    def backward(loss):
        assert loss.device == cuda
        for p in held["model"].parameters():
            p.grad = torch.empty_like(p)
        if len(held["factors"]) == 2:                                       # constants are there after the first step
            held["modes"].enter_context(watch)

    def learning_rate(*_):
        held["factors"] = held.get("factors", []) + [1]
        return 1.0

    def flush(run):
        if run.pending is not None:
            reads.append((run.pending[0], len(held["factors"])))
            run.first = run.recent = dict(loss=1.0)
            run.pending = None

    def commit(run, done):
        run.next_save = math.inf

    def loader(views, batches, workers, pin, collate=None):
        assert pin                                                          # page-locked, or a copy cannot be asynchronous
        return [((image, second), [])] * (2 * steps)

    for owner, name, value in ((harness, "start_processes", lambda: (1, cuda)), (train, "place", place), (optim, "learning_rate", learning_rate),
                               (train, "draw", lambda *_: None), (harness.Run, "commit", commit), (harness.Run, "flush", flush), (weights, "write", lambda *_: None),
                               (data, "loader", loader), (torch.Tensor, "backward", backward), (torch.cuda, "Event", Event),
                               (torch, "manual_seed", lambda seed: None), (evaluate, "evaluate", lambda *_: (dict(top1=0.0, n=1), [])),
                               (evaluate, "finish", lambda *_, **__: None)):
        monkeypatch.setattr(owner, name, value)
    argv = ["--arch", arch, "--data", str(pictures), "--img-size", "32", "--batch-size", "12", "--micro-batch", "6", "--steps", str(steps),
            "--epochs", "4", "--log-every", "2", "--amp", "bf16", "--out", str(tmp_path)]
    with contextlib.ExitStack() as modes:
        held["modes"] = modes
        script.main(argv + (["--eval-every", "9"] if script is finetune else []))
        assert watch.found == [] and "cuda" in watch.devices
        with pytest.raises(Exception, match="_local_scalar_dense"):         # the trap works: reading a number,
            bool(torch.ones((), device=cuda) > 0)
        torch.tensor([1.0], device=cuda)                                    # and a copy that blocks
        assert watch.found
    data.constants.cache_clear()
    assert reads == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 6)]        # each in the next step, the last at the end


@pytest.mark.parametrize("arch,options", [("vit_nano", {}), ("vit_nano", dict(token="replace", fill="none")), ("resnet_nano", dict(fill="zero"))])
def test_compiled_and_in_bf16(arch, options):
    """One graph, forward and backward; under bf16, loss and gradient are those of float32 to its precision."""
    torch.manual_seed(0)
    model = models.build(arch, 32, **options)
    image, mask = data.normalize(torch.stack([shapes.Shapes(32)[i][0] for i in range(8)])), masking.random_mask(8, 4, 0.6)
    criterion = losses.A2MIMLoss()

    def gradient(call, amp):
        with train.precision(amp, torch.device("cpu"))[0]():
            reconstruction = call(image, mask)
        loss = criterion(reconstruction, image, mask)["loss"]
        assert loss.dtype == torch.float32
        return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    loss, expected = gradient(model, "off")
    explained = torch._dynamo.explain(model)(image, mask)
    assert explained.graph_count == 1 and explained.graph_break_count == 0
    compiled_loss, compiled = gradient(torch.compile(model, backend="aot_eager", fullgraph=True), "off")
    assert relative(compiled_loss, loss) < 1e-6 and relative(compiled, expected) < 1e-4
    half_loss, half = gradient(model, "bf16")
    assert 0 < relative(half_loss, loss) < 0.01 and 0 < relative(half, expected) < 0.1


def test_channels_last_changes_nothing():
    torch.manual_seed(0)
    model, image, mask = models.build("resnet_nano", 32), torch.randn(4, 3, 32, 32), masking.random_mask(4, 4, 0.6)
    expected = model(image, mask)
    placed = train.place(model, torch.device("cpu"), 1)
    assert placed.encoder.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert placed.encoder.stem(image).is_contiguous(memory_format=torch.channels_last)
    assert relative(placed(image, mask), expected) < 1e-5


def test_loss_needs_little_memory():
    """What bench.py counts: exactly what is allocated, and for our loss, less than half of that of two FFTs."""
    assert bench.peak_memory(lambda: torch.ones(1000, 1000).add(1).sum()) == pytest.approx(8e6, rel=0.01)
    rows = bench.bench_loss(SimpleNamespace(batch=8, runs=1))
    theirs, ours = rows[:2]
    assert ours["peak MB"] < 0.5 * theirs["peak MB"] and ours["value"] < 1e-6 and ours["gradient"] < 1e-6


def test_bench_commands(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", (32,))
    monkeypatch.setattr(bench, "BATCHES", (2, 4))
    bench.main(["loader", "step", "memory", "--data", str(pictures), "--arch", "vit_nano", "--batch", "4", "--runs", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["runs"] == 1
    table = {(row["crop"][:3], row["source"]): row for row in found["loader"]}
    assert len(table) == 6 and all(row["images/s, one core"] > 0 for row in table.values())
    assert table["pre", "files, PIL"]["× PIL"] == 1 and table["pre", "files"]["difference"] < 1 and table["fin", "pack"]["difference"] < 2
    step = {row["how"][:8]: row for row in found["step"]}
    assert step.keys() == {"eager", "compiled", "eager, f"} and step["eager, f"]["images/s"] > 0
    assert step["compiled"]["how"] == "compiled" or not shutil.which("c++")
    eager = step["eager"]
    assert 0 < eager["share of peak %"] < 100 and sum(v for k, v in eager.items() if k in ("forward %", "loss %", "backward %")) < 100
    small, large = found["memory"]
    assert large["peak MB"] == pytest.approx(2 * small["peak MB"], rel=0.3)
    bench.main(["loss", "--batch", "2", "--runs", "1"])
    assert "two FFTs" in capsys.readouterr().out
    for argv, says in ((["speed"], "no table 'speed'"), (["loader", "--data", str(tmp_path / "missing")], "no folder"), (["step", "--arch", "x"], "invalid choice")):
        with pytest.raises(SystemExit) as error:
            bench.main(argv)
        said = capsys.readouterr().err
        assert error.value.code == 2 and says in said and len(said.splitlines()) == 1


def test_step_flops_are_counted():
    """2 FLOPs a multiplication, forward and twice that backward: a ViT-B image is close to 3 · 2 · 17.6 G."""
    step = bench.Step("vit_nano", 2, 64)
    tokens, dim, mlp, depth = 65, 96, 384, 4
    block = tokens * dim * (4 * dim + 2 * mlp) + 2 * tokens ** 2 * dim
    assert step.flops() == pytest.approx(3 * 2 * (depth * block + 64 * dim * 3 * 64 * 2), rel=0.03)


# ------------------------------------------------------------------------------------------------ a run that survives
# SLOW=1 python -m pytest -q -s -k survives        as often as it takes to believe it: eight minutes

SLOW = bool(os.environ.get("SLOW"))
SMALL = ["--img-size", "32", "--batch-size", "16", "--micro-batch", "8", "--drop-path", "0.2", "--epochs", "1", "--log-every", "1"]

SERVER = """
import json, os, sys, traceback
import data, finetune, train
print(flush=True)
for line in sys.stdin:
    script, argv, out = json.loads(line)
    child = os.fork()
    if child == 0:
        file, code = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1
        os.dup2(file, 1), os.dup2(file, 2)
        try:
            {"train.py": train.main, "finetune.py": finetune.main}[script](argv)
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Starts runs as processes of their own, without importing PyTorch for each: a process that has, and forks."""

    def __init__(self, log):
        self.log = str(log)
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SERVER], cwd=HERE, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1"))
        self.process.stdout.readline()

    def start(self, script, argv):
        """The process id."""
        self.process.stdin.write(json.dumps([script, list(map(str, argv)), self.log]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """The exit code, minus the signal of one that was killed."""
        return int(self.process.stdout.readline())

    def run(self, script, argv):
        self.start(script, argv)
        return self.wait(), Path(self.log).read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.process.stdin.close()
    server.process.wait()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def all_below(pid):
    return [p for child in children(pid) for p in (child, *all_below(child))]


def wait_for(condition, what, seconds=60):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, f"no {what}"
        time.sleep(0.001)
    return found


def assert_same_end(one, other):
    """Weights, optimizer and counts, to the last bit; and the same losses at the same steps, each once."""
    a, b = ({**weights.read(str(Path(path) / "last.pt"), sealed=True), "launch": None} for path in (one, other))
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y
    a, b = ([{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in (Path(path) / "log.jsonl").read_text().splitlines()]
            for path in (one, other))
    assert [e["step"] for e in b if "loss" in e] == [e["step"] for e in a if "loss" in e] == list(range(1, 1 + a[-1]["step"])) and a == b


def kill_at_random(pid, out, chance, seconds):
    """SIGKILL; half of the time in the middle of a save."""
    time.sleep(chance.uniform(0, seconds))
    if chance.random() < 0.5:
        with contextlib.suppress(AssertionError):                           # it may have ended
            wait_for(lambda: (out / "last.pt.tmp").exists() or not alive(pid), "save", 5)
            time.sleep(chance.uniform(0, 0.01))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("script,options", [("train.py", ["--steps", "24"]), ("finetune.py", ["--mixup", "0.8", "--ema", "0.9", "--steps", "12", "--randaugment", "7"])])
def test_survives_sigkill(script, options, server, labelled, tmp_path):
    """Killed at random moments, saves included, and started again: the weights are those of the run that was left alone."""
    options = SMALL + options + (["--data", labelled, "--epochs", "4"] if script == "finetune.py" else [])
    began = time.time()
    assert server.run(script, [*options, "--workers", "0", "--out", tmp_path / "whole"])[0] == 0
    seconds, chance, killed, torn = time.time() - began, random.Random(0), 0, 0
    for i in range((50 if script == "train.py" else 10) if SLOW else 3):
        out = tmp_path / f"run{i}"
        command = [*options, "--workers", i % 3, "--save-minutes", (0, 0, 0.003)[i % 3], "--out", out]
        kill_at_random(server.start(script, command), out, chance, 1.2 * seconds)
        killed += server.wait() == -signal.SIGKILL
        torn += (out / "last.pt.tmp").exists()
        code, said = server.run(script, command)
        assert code == 0, said
        assert_same_end(tmp_path / "whole", out)
        shutil.rmtree(out)
    print(f"{script}: {killed} of {i + 1} killed, {torn} of them while a checkpoint was being written")
    assert killed >= 0.6 * i


def agent(processes, out, *argv, **environment):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *argv]
    with open(out, "w") as log:
        return subprocess.Popen(list(map(str, command)), cwd=HERE, stdout=log, stderr=log, env=os.environ | dict(OMP_NUM_THREADS="1") | environment)


def ranks(torchrun, out):
    """The processes that torchrun started, once the run has its folder."""
    return wait_for(lambda: (out / "log.jsonl").exists() and children(torchrun.pid), "run")


def test_survives_the_death_of_a_rank(tmp_path):
    """torchrun --max-restarts: one of two processes is killed, both start again by themselves and end as if nothing had been."""
    options = [*SMALL, "--steps", "30", "--workers", "1", "--save-minutes", "0"]
    assert agent(2, tmp_path / "log", "train.py", *options, "--out", tmp_path / "whole").wait() == 0
    chance = random.Random(1)
    for i in range(10 if SLOW else 1):
        out = tmp_path / f"run{i}"
        parent = agent(2, tmp_path / "log", "--max-restarts=1", "train.py", *options, "--overwrite", "--out", out)
        victim = ranks(parent, out)[chance.randrange(2)]
        kill_at_random(victim, out, chance, 1)
        assert parent.wait(timeout=200) == 0, (tmp_path / "log").read_text()
        assert "continuing after step" in (tmp_path / "log").read_text()
        assert_same_end(tmp_path / "whole", out)


def test_survives_signals(server, labelled, tmp_path):
    """SIGTERM, Ctrl-C and SIGUSR1, at random moments: a checkpoint within two steps, exit code 75, no process left, and the same end."""
    scripts = {"train.py": [*SMALL, "--steps", "24"], "finetune.py": [*SMALL, "--data", labelled, "--epochs", "8"]}
    chance = random.Random(2)
    for script, options in scripts.items():
        assert server.run(script, [*options, "--workers", "0", "--out", tmp_path / script])[0] == 0
    for i in range(30 if SLOW else 6):                                      # two in three are SIGTERM
        script, out = list(scripts)[i % 2], tmp_path / f"run{i}"
        command, log = [*scripts[script], "--workers", "1", "--out", out], out / "log.jsonl"
        pid = server.start(script, command)
        wait_for(lambda: log.exists() and log.read_text().count("loss") > chance.randrange(12), "steps")
        helpers, step = children(pid), log.read_text().count('"loss"')
        os.kill(pid, number := harness.SIGNALS[0 if i % 3 < 2 else 1 + i // 3 % 2])
        code, said = server.wait(), Path(server.log).read_text()
        assert code == 75 and f"{signal.Signals(number).name}: stopping after this step" in said and "The same command goes on" in said, said
        assert "Traceback" not in said and step <= weights.read(str(out / "last.pt"), sealed=True)["step"] <= step + 2
        assert not any(map(alive, (pid, *helpers)))
        code, said = server.run(script, command)
        assert code == 0 and "continuing after step" in said
        assert_same_end(tmp_path / script, out)
    pid = server.start("train.py", [*SMALL, "--workers", "1", "--out", tmp_path / "twice", "--micro-batch", "1", "--img-size", "96"])
    helpers = ranks(SimpleNamespace(pid=pid), tmp_path / "twice")
    os.kill(pid, signal.SIGINT), time.sleep(0.02), os.kill(pid, signal.SIGINT)      # the second time, at once
    assert server.wait() in (75, 130)
    wait_for(lambda: not any(map(alive, helpers)), "end of the workers", 10)


def test_survives_the_end_of_torchrun(tmp_path):
    """SIGTERM, or torchrun killed, which nobody can pass on: two processes agree on the step, save once, and none is left."""
    for i in range(6 if SLOW else 2):
        out, log = tmp_path / f"run{i}", tmp_path / "log"
        parent = agent(2, log, "train.py", *SMALL, "--workers", "1", "--out", out)
        wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("loss") > 3 * i, "steps")
        everyone, step = all_below(parent.pid), (out / "log.jsonl").read_text().count("loss")
        parent.send_signal(signal.SIGKILL if i % 2 else signal.SIGTERM)
        assert parent.wait(timeout=60) != 0 and len(everyone) >= 4          # two ranks and their workers
        wait_for(lambda: not any(map(alive, everyone)), "end of all processes", 20 if i % 2 else 1)
        assert "stopped after step" in log.read_text()
        assert step <= weights.read(str(out / "last.pt"), sealed=True)["step"] <= step + 2


def test_survives_on_two_nodes(tmp_path):
    """Two torchrun agents that find each other, as on two machines with one disk: the run of two processes on one."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["train.py", *SMALL, "--steps", "6", "--workers", "0", "--out"]
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=1",
            f"--rdzv_endpoint=localhost:{port}", *options, str(tmp_path / "nodes")]
    agents = [subprocess.Popen(node, cwd=HERE, env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
              for _ in range(2)]
    assert [each.wait(timeout=120) for each in agents] == [0, 0]
    assert agent(2, tmp_path / "log", *options, tmp_path / "one").wait() == 0
    assert_same_end(tmp_path / "one", tmp_path / "nodes")


WATCHED = """
import json, os, sys, zlib
import data, harness, train
seen, loader = open(os.environ["SEEN"] + os.environ.get("RANK", "0"), "a"), data.loader
def watched(*args):
    for (image, mask), problems in loader(*args):
        seen.write(json.dumps([zlib.crc32(i.numpy().tobytes() + m.numpy().tobytes()) for i, m in zip(image, mask)]) + "\\n")
        seen.flush()
        yield (image, mask), problems
data.loader = watched
train.main(sys.argv[1:])
"""


def test_survives_another_number_of_processes(tmp_path):
    """Continued on two processes, with other workers and accumulation: the same samples, crops and masks, and the same losses."""
    script = tmp_path / "watched.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n" + WATCHED)
    options = ["--img-size", "32", "--batch-size", "16", "--drop-path", "0", "--frequency-loss", "none", "--epochs", "1", "--log-every", "1"]

    def go(name, out, processes, workers, micro, steps):
        environment = os.environ | dict(SEEN=str(tmp_path / name), OMP_NUM_THREADS="1")
        torchrun = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([sys.executable, "-W", "ignore", *torchrun, script, *options, "--out", tmp_path / out, "--workers", str(workers), "--micro-batch",
                               str(micro), "--steps", str(steps)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        parts = [[json.loads(line) for line in (tmp_path / f"{name}{rank}").read_text().splitlines()] for rank in range(processes)]
        return [sample for micros in zip(*parts, strict=True) for micro in micros for sample in micro]

    whole = go("whole", "whole", 1, 0, 16, 12)
    assert len(whole) == 12 * 16 and len(set(whole)) == len(whole)
    assert go("first", "other", 1, 0, 16, 5) == whole[:5 * 16]
    assert go("second", "other", 2, 1, 4, 9) == whole[5 * 16:9 * 16]        # two processes, accumulated twice
    assert go("third", "other", 1, 2, 8, 12) == whole[9 * 16:]
    a, b = ([json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "other"))
    assert len(a) == 12 and max(abs(x - y) / x for x, y in zip(a, b, strict=True)) < 1e-5


def a_run(out):
    """A run in its folder, outside of a training loop."""
    run = harness.Run(train.parse(["--out", str(out)]), str(out), dict(epochs=1), 1000)
    return run, run.underway(lambda: dict(model=dict(w=torch.full((500,), float(run.saved))), optimizer={}, scaler={}), train.PARTS, train.LINE, 1)


class Full:
    """A file on a disk with room for so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, block):
        block = bytes(memoryview(block).cast("B"))
        if len(block) > self.room:
            self.file.write(block[:self.room])
            raise OSError(28, "No space left on device")
        self.room -= len(block)
        return self.file.write(block)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_survives_a_full_disk_at_every_point_of_a_save(tmp_path, monkeypatch, capsys):
    """Each byte range and each call that a save makes fails in turn: the run says so and goes on, a good checkpoint is there."""
    def failing(function, at, calls):
        def call(*args):
            calls.append(function.__name__)
            if len(calls) == at:
                raise OSError(28, "No space left on device")
            return function(*args)
        return call

    run, underway = a_run(tmp_path / "run")
    with underway:
        run.save(1), run.save(2)
        size, kept = os.path.getsize(run.last), 2
        points = [("bytes", at) for at in [*range(0, size, size // 20), size - 80, size - 1]] + [("calls", at) for at in range(1, 6)]
        for done, (kind, at) in zip(range(4, 100, 2), points):
            calls = []
            if kind == "calls":
                run.save(done - 1)                                          # last.pt and previous.pt are both there
                kept = done - 1
            with monkeypatch.context() as patch:
                if kind == "bytes":
                    patch.setattr(weights, "open", lambda path, mode: Full(open(path, mode), at) if mode == "wb" else open(path, mode), raising=False)
                else:                                                       # fsync, two renames, fsync of the folder
                    for name in ("fsync", "replace"):
                        patch.setattr(os, name, failing(getattr(os, name), at, calls))
                run.save(done)
            said = capsys.readouterr().out
            there = a_run(tmp_path / "run")[0].state["step"]
            if kind == "calls" and at == 5:                                 # a save makes four calls
                assert len(calls) == 4 and there == done and said == ""
            else:                                                           # once it is renamed it counts, whatever happens next
                assert f"{run.last} cannot be written (No space left on device)" in said and "The run goes on" in said
                assert there == (done if kind == "calls" and at == 4 else kept), (kind, at)
                assert run.next_save < time.time() + 61                     # tries again soon
            kept = there
            assert not os.path.exists(run.last + ".tmp")
        monkeypatch.setattr(os, "fsync", failing(os.fsync, 1, []))
        run.stopping = True                                                 # the last chance to save
        with pytest.raises(SystemExit) as error:
            run.save(done + 1)
    said = capsys.readouterr().err
    assert error.value.code == 2 and "cannot be written (No space left on device); there is still the one of step" in said and len(said.splitlines()) == 1
    assert a_run(tmp_path / "run")[0].state["step"] == kept


def test_survives_a_disk_that_is_really_full(tmp_path):
    """On a file system of 13 MB, two checkpoints of 5.7 MB fit, and no third beside them: the run goes on to its end, says so, and the
    second stays; with more room, the same command finishes it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = shlex.join([sys.executable, "-W", "ignore", "train.py", *SMALL, "--workers", "0", "--save-minutes", "0", "--out", str(disk / "run")])
    script = f"mount -t tmpfs -o size=13m none {disk} && {command} --steps 4; echo code $?; mount -o remount,size=40m {disk}; {command} --steps 5; echo code $?"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=HERE) if shutil.which("unshare") else None
    if done is None or "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no right to mount a file system")
    first, second = done.stdout.split("code ", 1)
    assert "last.pt cannot be written (No space left on device)" in first and "The run goes on" in first and second.startswith("2"), done.stderr
    assert "Traceback" not in done.stderr and "there is still the one of step 2" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "continuing after step 2" in second and second.endswith("code 0\n")


def test_survives_damage(pictures, tmp_path, capsys):
    """A flipped byte or a cut, at a hundred random places each, of a checkpoint and of a pack: detected, and the previous checkpoint used."""
    rng = np.random.default_rng(0)

    def damages(whole, count=100):
        for at in rng.integers(0, len(whole), count):
            yield whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1:]
            yield whole[:at]

    run, underway = a_run(tmp_path / "run")
    with underway:
        run.save(1), run.save(2)
    last = tmp_path / "run" / "last.pt"
    whole = last.read_bytes()
    for content in damages(whole):
        last.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            weights.read(str(last), sealed=True)
        again = a_run(tmp_path / "run")[0]
        assert again.state["step"] == 1 and "last.pt" in again.note and f"going on from {again.previous}" in again.note
    again, underway = a_run(tmp_path / "run")
    again.announce(dict(batch_size=1, epochs=1, lr=1.0), 1, 1)
    assert "going on from" in capsys.readouterr().out
    with underway:                                                          # a damaged file is kept aside and never becomes the previous one
        again.save(2)
    assert (tmp_path / "run" / "damaged.pt").read_bytes() == content and weights.read(again.previous, sealed=True)["step"] == 1
    assert weights.read(str(last), sealed=True)["step"] == 2
    data.pack(str(pictures), str(tmp_path / "pack"))
    names = {name: (tmp_path / "pack" / name).read_bytes() for name in sources.NAMES}
    for name, whole in names.items():
        for content in damages(whole, 100 if name == "images.bin" else 40):
            (tmp_path / "pack" / name).write_bytes(content)
            with pytest.raises(ValueError, match="damaged|truncated|half-written|this program reads"):     # BadImage is one
                for split in ("train", "val"):
                    packed = sources.Packed(str(tmp_path / "pack"), split)
                    [packed[i] for i in range(len(packed))]
        (tmp_path / "pack" / name).write_bytes(whole)
    assert len(sources.Packed(str(tmp_path / "pack"), "train")) == 33


def odd_images(folder, count):
    """`count` of each kind that is met in the wild. Returns the names of those that nobody could read."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(shapes.Shapes(40)[3][0].permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    frame = jpeg.index(b"\xff\xc0")
    exif = Image.Exif()
    exif[0x0112] = 6
    header = lambda w, h: b"IHDR" + w.to_bytes(4, "big") + h.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunk = lambda content: (len(content) - 4).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")
    png = lambda w, h: b"\x89PNG\r\n\x1a\n" + chunk(header(w, h)) + chunk(b"IDAT" + zlib.compress(bytes(1000))) + chunk(b"IEND")
    bad = {"truncated.jpg": jpeg[:len(jpeg) // 2], "empty.jpg": b"", "text.png": b"<html>404 Not Found</html>", "nothing.png": png(0, 0),
           "bomb.png": png(50000, 50000), "bomb.jpg": jpeg[:frame + 5] + b"\xff\xdc\xff\xdc" + jpeg[frame + 9:],
           "bomb.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02D\x01\x00;"}
    for i in range(count):
        for name, content in bad.items():
            (folder / f"{i}-{name}").write_bytes(content)
        picture.save(folder / f"{i}-mislabelled.jpg", "PNG")
        (folder / f"{i}-deep.png").write_bytes(png_of_16_bits(257 * np.array(picture).astype(np.uint16)))
        for kind, mode in (("cmyk.jpg", "CMYK"), ("palette.png", "P"), ("grey.jpg", "L"), ("alpha.webp", "RGBA"), ("bits.tif", "1")):
            picture.convert(mode).save(folder / f"{i}-{kind}")
        for kind in ("gif", "webp"):
            picture.save(folder / f"{i}-animated.{kind}", save_all=True, append_images=[picture.rotate(90), picture.rotate(180)], duration=9)
        picture.save(folder / f"{i}-turned.jpg", exif=exif)
        picture.resize((1, 1)).save(folder / f"{i}-pixel.png")
        picture.resize((3000, 2)).save(folder / f"{i}-strip.png")
    (folder / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    (folder / "folder.jpg").mkdir(exist_ok=True)
    (folder / "link.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")                                          # reading it would take forever
    return {f"{i}-{name}" for i in range(count) for name in bad} | {"link.jpg", "pipe.jpg", "program.jpg"}


def test_odd_images(tmp_path, monkeypatch):
    def started(*_, **__):
        raise AssertionError("a program was started")

    bad = odd_images(tmp_path, 1)
    monkeypatch.setattr(subprocess, "Popen", started)                       # as Pillow would for the EPS file
    picture = shapes.Shapes(40)[3][0]
    for path in sorted(tmp_path.iterdir()):
        if path.name in bad or path.is_dir():
            with pytest.raises(sources.BadImage, match=re.escape(path.name) + " is no readable image") as error:
                sources.read_image(str(path))
            assert ("too many" in str(error.value)) == ("bomb" in path.name), error.value
            assert len(str(error.value).splitlines()) == 1
            continue
        image = sources.read_image(str(path))
        assert image.dtype == torch.uint8
        size = {"0-pixel.png": (1, 1), "0-strip.png": (2, 3000)}.get(path.name, (40, 40))
        assert image.shape == (3, *size)
        expected = picture.rot90(-1, (1, 2)) if "turned" in path.name else picture
        if size == (40, 40) and not re.search("bits|grey|palette|gif", path.name):
            assert (image.float() - expected).abs().mean() < 12, path.name
        assert data.evaluation_crop(image, 256, 224).shape == data.random_resized_crop(image, 224, (0.1, 1), data.generator(0)).shape == (3, 224, 224)
    strip = shapes.Shapes(40)[0][0].repeat(1, 1, 101)[:, :2, :4000]         # the middle of a strip is what it was
    assert torch.equal(data.evaluation_crop(strip, 32, 32), data.TF.center_crop(data.TF.resize(strip, [32], data.BICUBIC, antialias=True), [32, 32]))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """256 photographs' worth of images to train on, 2 % of each odd kind among them, and 40 to test on, four of them unreadable."""
    root = tmp_path_factory.mktemp("mixed")
    bad = odd_images(root / "train" / "a", 5)                               # 19 kinds, 5 of each, and three more
    there = sum(p.is_file() or p.name in bad for p in (root / "train" / "a").iterdir())
    for split, count in (("train", 240 - there), ("val", 36)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"photo{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shapes.Shapes(48, count=400)[i][0].permute(1, 2, 0).numpy()).save(path)
    for i in range(4):
        (root / "val" / "a" / f"broken{i}.jpg").write_bytes(b"broken")
    return root, {str(root / "train" / "a" / name) for name in bad}


def test_survives_bad_images(mixed, tmp_path, capsys):
    """Unreadable images are replaced by the same others on every run and number of processes, counted and listed; above a share, a
    run stops, and goes on when it may."""
    root, bad = mixed
    options = ["--data", str(root), "--img-size", "32", "--batch-size", "16", "--epochs", "2", "--drop-path", "0", "--frequency-loss", "none", "--log-every", "1"]
    logs = {}
    for name, more in (("one", ["--workers", "0"]), ("two", ["--workers", "2"])):
        train.main([*options, *more, "--max-bad", "0.2", "--out", str(tmp_path / name)])
        logs[name] = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    logs["processes"] = torchrun(2, tmp_path / "processes", *options, "--workers", "1", "--max-bad", "0.2")
    assert [e["replaced"] for e in logs["one"]][14::15] == [len(bad), 2 * len(bad)]        # 240 images, 15 steps an epoch
    for name, log in logs.items():
        assert [e["replaced"] for e in log] == [e["replaced"] for e in logs["one"]], name
        assert max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(log, logs["one"], strict=True)) < 1e-5, name
        listed = (tmp_path / name / "bad_images.txt").read_text().splitlines()
        assert {line.split(" is no readable image")[0] for line in listed} == bad and len(listed) == len(bad)
    capsys.readouterr()
    code = []
    for _ in range(2):                                                      # both times at the next bad image
        with pytest.raises(SystemExit) as error:
            train.main([*options, "--workers", "0", "--out", str(tmp_path / "strict")])
        said, step = capsys.readouterr().err, weights.read(str(tmp_path / "strict" / "last.pt"), sealed=True)["step"]
        assert error.value.code == 2 and len(said.splitlines()) == 1 and "more than --max-bad 0.01" in said and "bad_images.txt" in said
        code.append(step)
    assert 0 < code[0] < code[1] < 15
    train.main([*options, "--workers", "0", "--max-bad", "0.2", "--out", str(tmp_path / "strict")])
    assert_same_end(tmp_path / "one", tmp_path / "strict")
    few = ["--data", str(root), "--arch", "vit_nano", "--img-size", "32", "--max-bad", "0.2", "--workers", "0"]
    finetune.main([*few, "--batch-size", "24", "--steps", "2", "--out", str(tmp_path / "tuned")])
    finetune.main([*few, "--init", str(tmp_path / "tuned" / "last.pt"), "--eval", "--out", str(tmp_path / "eval")])
    finetune.main([*few, "--init", str(tmp_path / "tuned" / "last.pt"), "--protocol", "knn", "--out", str(tmp_path / "knn")])
    for name in ("tuned", "eval", "knn"):
        assert json.loads((tmp_path / name / "result.json").read_text())["n"] == 36, name
        assert (tmp_path / name / "bad_images.txt").read_text().count("val/a/broken") == 4
    with pytest.raises(SystemExit) as error:
        finetune.main([*few, "--init", str(tmp_path / "tuned" / "last.pt"), "--eval", "--out", str(tmp_path / "eval2"), "--max-bad", "0.05"])
    assert error.value.code == 2 and "4 of 40 images could not be read, more than --max-bad 0.05" in capsys.readouterr().err


BROKEN = """
import os, sys
import losses, train
calls, original = [0], losses.A2MIMLoss.__call__
def broken(self, *args):
    out, step = original(self, *args), calls[0] // 2                        # two micro-batches a step
    calls[0] += 1
    at, rank, how = os.environ["BROKEN"].split()
    if rank == os.environ.get("RANK", "0") and str(step) in at.split(","):
        out["loss"] = out["loss"] * float(how)
    return out
losses.A2MIMLoss.__call__ = broken
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("arch", ["vit_nano", "resnet_nano"])
def test_survives_numbers_that_are_not_finite(arch, tmp_path):
    """NaN or infinity at some steps on one of two processes: these steps are left out on both, and counted; the next ones train."""
    script = tmp_path / "broken.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n" + BROKEN)
    options = [*SMALL[:4], "--micro-batch", "4", "--epochs", "1", "--log-every", "1", "--steps", "8", "--workers", "0", "--arch", arch]
    for how in ("nan", "inf"):
        done = agent(2, tmp_path / "log", script, *options, "--out", tmp_path / how, BROKEN=f"2,5 1 {how}")
        assert done.wait() == 0, (tmp_path / "log").read_text()
        log = [json.loads(line) for line in (tmp_path / how / "log.jsonl").read_text().splitlines()]
        assert [e["skipped"] for e in log] == [0, 0, 1, 1, 1, 2, 2, 2] and [e["loss"] is None for e in log] == [e["step"] in (3, 6) for e in log]
        assert "step 3 is left out: its loss or gradient is not finite (1 so far)" in (tmp_path / "log").read_text()
        state = weights.read(str(tmp_path / how / "last.pt"), sealed=True)
        assert all(v.isfinite().all() for v in tree_leaves(state) if torch.is_tensor(v)) and state["counts"]["skipped"] == 2
        steps = {float(s["step"]) for s in state["optimizer"]["state"].values()}
        assert steps == {6.0}                                               # the optimizer took six
    assert_same_end(tmp_path / "nan", tmp_path / "inf")


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd"])
@pytest.mark.parametrize("when", [0, 2])
def test_a_step_left_out_leaves_no_trace(optimizer, when):
    """Weights, optimizer and batch statistics are as if the step had not been, the first one included."""
    def train_on(batches):
        torch.manual_seed(0)
        model = models.Predictor(models.build("resnet_nano", 32).encoder, 3).train()
        made = optim.make_optimizer(model, dict(optimizer=optimizer, lr=0.01, weight_decay=0.1, layer_decay=None))
        scaler = train.precision("off", torch.device("cpu"))[1]
        for image in batches:
            before = optim.statistics(model)
            loss = model(image).square().mean()
            loss.backward()
            skipped = optim.update(model, made, scaler, 1.0, loss.detach(), before)
            assert bool(skipped) == bool(image.isnan().any())
        return [p.detach() for p in model.parameters()] + [value for _, value in optim.statistics(model)] + [
            t for state in made.state.values() for t in state.values() if torch.is_tensor(t)]

    images = list(torch.randn(4, 6, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    broken = images[:when] + [images[0].clone().fill_(math.nan)] + images[when:]
    for a, b in zip(train_on(images), train_on(broken), strict=True):
        assert torch.equal(a, b)


def test_survives_no_longer(tmp_path, capsys, monkeypatch):
    """Twenty steps in a row without finite numbers, or weights that are not: the run ends, and names its last good checkpoint."""
    options = ["--img-size", "32", "--batch-size", "16", "--workers", "0", "--epochs", "1", "--out", str(tmp_path / "run")]
    train.main([*options, "--steps", "2"])
    before = (tmp_path / "run" / "last.pt").read_bytes()
    monkeypatch.setattr(losses.A2MIMLoss, "__call__", lambda self, r, *_: dict.fromkeys(train.PARTS, r.sum() * math.nan))
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        train.main(options)
    said = capsys.readouterr()
    assert error.value.code == 2 and len(said.err.splitlines()) == 1 and said.out.count("is left out") == 20
    assert f"in 20 steps, up to 22: try a smaller --lr, or --amp off. The last good checkpoint is {tmp_path / 'run' / 'last.pt'}, of step 2" in said.err
    monkeypatch.undo()
    monkeypatch.setattr(optim, "update", lambda model, *_: [p.data.fill_(math.inf) for p in model.parameters()] and torch.zeros(()))
    with pytest.raises(SystemExit) as error:
        train.main([*options, "--steps", "3"])
    assert error.value.code == 2 and "weights are no longer finite" in capsys.readouterr().err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_the_same_command(tmp_path, capsys, monkeypatch):
    """Finished: it says so and changes nothing. Another number of images: refused. --overwrite, started again by torchrun: goes on."""
    root = write_images(tmp_path / "images", [f"{i:02}.png" for i in range(40)])
    options = ["--data", root, "--img-size", "32", "--batch-size", "16", "--epochs", "2", "--workers", "0", "--out", str(tmp_path / "run")]
    train.main([*options, "--save-epochs", "1"])
    assert weights.read(str(tmp_path / "run" / "previous.pt"), sealed=True)["step"] == 2           # after an epoch, and at the end
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    train.main(options)
    assert "already at step 4 of 4; finished: --overwrite starts anew" in capsys.readouterr().out
    write_images(tmp_path / "images", ["new.png", "new2.png"])
    with pytest.raises(SystemExit) as error:
        train.main(options)
    assert error.value.code == 2 and "images (32 there, 33 here)" in capsys.readouterr().err
    for name in ("new.png", "new2.png"):
        (tmp_path / "images" / name).unlink()
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    train.main([*options, "--steps", "3", "--overwrite"])
    assert not (tmp_path / "run" / "previous.pt").exists() or weights.read(str(tmp_path / "run" / "previous.pt"), sealed=True)["step"] == 0
    monkeypatch.setattr(harness, "ATTEMPT", 1)
    train.main([*options, "--overwrite"])
    assert "continuing after step 3" in capsys.readouterr().out
    monkeypatch.setattr(harness, "LAUNCH", "another torchrun")              # whose first attempt died before its first checkpoint
    train.main([*options, "--steps", "4", "--overwrite", "--seed", "1"])
    assert "continuing" not in capsys.readouterr().out
    (tmp_path / "run" / "log.jsonl").write_bytes((tmp_path / "run" / "log.jsonl").read_bytes() + b"\xff\xfe garbage\n")
    options += ["--seed", "1"]
    (tmp_path / "run" / "last.pt").unlink()                                 # killed between the two renamings
    train.main([*options, "--steps", "4"])
    assert "last.pt is missing: going on from" in capsys.readouterr().out and weights.read(str(tmp_path / "run" / "last.pt"), sealed=True)["step"] == 4


FATAL = """
import sys, optim, train
update, calls = optim.update, []
def broken(*args):
    calls.append(1)
    if len(calls) == 3:
        raise MemoryError("no room")
    return update(*args)
optim.update = broken
train.main(sys.argv[1:])
"""


def test_survives_without_listeners_and_ends_with_workers(tmp_path):
    """A run whose output nobody can take goes on; one with a fatal error ends, its workers too."""
    command = [sys.executable, "-W", "ignore", "train.py", *SMALL, "--workers", "1", "--steps", "4", "--out"]
    with open("/dev/full", "w") as full:
        assert subprocess.run([*command, tmp_path / "full"], stdout=full, stderr=full, cwd=HERE, timeout=100).returncode in (0, 120)
    piped = f"{shlex.join([*command, str(tmp_path / 'piped')])} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, cwd=HERE, timeout=100)
    assert done.stdout.splitlines()[1:] == ["0"] and done.stderr == ""
    for name in ("full", "piped"):
        assert weights.read(str(tmp_path / name / "last.pt"), sealed=True)["step"] == 4
    done = process(["-c", FATAL, *SMALL, "--workers", "1", "--out", tmp_path / "fatal"])
    assert done.returncode == 1 and "MemoryError: no room" in done.stderr


def test_survives_failures_beside_checkpoints(labelled, tmp_path, capsys, monkeypatch):
    """best.pt or result.json cannot be written: tried again with the next best, and by the same command. Stopped at the end of an
    epoch: its evaluation is done when the run continues."""
    options = ["--data", str(labelled), "--img-size", "32", "--batch-size", "12", "--epochs", "3", "--workers", "0", "--log-every", "1", "--out"]
    finetune.main([*options, str(tmp_path / "whole")])
    write, write_file = weights.write, data.write_file

    def no_best(path, state, previous=None):
        if path.endswith("best.pt") and state["step"] == 4:
            raise OSError(28, "No space left on device")
        write(path, state, previous)

    def no_result(path, content):
        if path.endswith("result.json"):
            raise OSError(28, f"{path} cannot be written (No space left on device)")
        write_file(path, content)

    monkeypatch.setattr(weights, "write", no_best)
    monkeypatch.setattr(data, "write_file", no_result)
    with pytest.raises(SystemExit) as error:
        finetune.main([*options, str(tmp_path / "run")])
    said = capsys.readouterr()
    assert error.value.code == 2 and "result.json cannot be written (No space left" in said.err and len(said.err.splitlines()) == 1
    assert "No space left on device: the run goes on" in said.out and (tmp_path / "run" / "best.pt").exists()
    assert weights.read(str(tmp_path / "run" / "best.pt"), sealed=True)["step"] > 4
    monkeypatch.undo()
    finetune.main([*options, str(tmp_path / "run")])
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "run")]
    assert {k: v for k, v in results[0].items() if k != "best"} == {k: v for k, v in results[1].items() if k != "best"}
    assert "Result" in capsys.readouterr().out
    finetune.main([*options, str(tmp_path / "run")])
    assert "finished" in (said := capsys.readouterr().out) and "Result" not in said
    report = harness.Run.report                                             # the signal comes in the eighth step, which ends an epoch
    monkeypatch.setattr(harness.Run, "report", lambda run, done, *rest: (report(run, done, *rest), setattr(run, "asked", done == 7)))
    with pytest.raises(SystemExit) as error:
        finetune.main([*options, str(tmp_path / "stopped")])
    assert error.value.code == 75 and '"top1"' not in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()[-1]
    monkeypatch.undo()
    finetune.main([*options, str(tmp_path / "stopped"), "--steps", "3"])    # less than there is
    assert "a larger --steps goes on" in capsys.readouterr().out and not (tmp_path / "stopped" / "result.json").exists()
    finetune.main([*options, str(tmp_path / "stopped")])
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    assert json.loads((tmp_path / "stopped" / "result.json").read_text()) == results[0]


def test_code_in_files_is_never_run(tmp_path, capsys):
    """A checkpoint that would run code when unpickled naively, and honest ones with objects in them: one clear line."""
    vit, harm = models.build("vit_nano", 32).state_dict(), tmp_path / "harm"
    for name, state in (("harm", {"model": vit, "x": Harm(harm)}), ("arguments", {"model": vit, "args": train.argparse.Namespace(lr=1)}),
                        ("scalar", {"model": vit, "loss": np.float64(1)})):
        for legacy in (False, True):
            torch.save(state, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=not legacy)
            for main, argv in ((weights.main, ["show"]), (weights.main, ["export", "--to", "timm"]), (finetune.main, ["--arch", "vit_nano", "--init"])):
                with pytest.raises(SystemExit) as error:
                    main([*argv, str(tmp_path / f"{name}.pt"), *([str(tmp_path / "out")] if "export" in argv else [])])
                said = capsys.readouterr().err
                assert error.value.code == 2 and len(said.splitlines()) == 1 and "holds Python objects beside tensors, which are never run" in said, said
    assert not harm.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["arguments.pt", "harm.pt", "scalar.pt"]
    torch.load(tmp_path / "harm.pt", weights_only=False)
    assert harm.is_dir()                                                    # it would have


# ------------------------------------------------------------------------------------------------ analyze.py

def brute_force(v, players, pair, size):
    """I⁽ᵐ⁾(i,j) by its definition: every context, four values each."""
    i, j = pair
    others = [p for p in range(players) if p not in pair]
    terms = []
    for S in itertools.combinations(others, size):
        terms.append(v({*S, i, j}) - v({*S, i}) - v({*S, j}) + v({*S}))
    return sum(terms) / len(terms)


def as_sets(v):
    """A game on sets of players, as `interactions` plays it: on rows of booleans."""
    return lambda coalitions: np.array([v(set(np.flatnonzero(row).tolist())) for row in coalitions])


def test_interactions_are_their_definition():
    table = np.random.default_rng(0).standard_normal(2 ** 9)
    v = lambda S: table[sum(1 << p for p in S)]
    pairs = analyze.draw_pairs(3, 100, np.random.default_rng(1))
    assert len(pairs) == 36                                                 # 3×3: all are neighbours
    found, passes, terms = analyze.interactions(as_sets(v), 9, pairs, range(8), math.comb(7, 3), np.random.default_rng(2))
    expected = [[brute_force(v, 9, pair, m) for pair in pairs.tolist()] for m in range(8)]
    assert np.abs(found - expected).max() <= 1e-12
    assert terms == 4 * 36 * 2 ** 7 and passes == 2 ** 9                    # each coalition once


@pytest.mark.parametrize("grid,most", [(3, 1000), (8, 6), (14, 3)])        # all contexts; drawn ones
def test_interactions_of_games_in_closed_form(grid, most):
    rng, n = np.random.default_rng(0), grid * grid
    weight, product = rng.standard_normal(n), rng.standard_normal((n, n))
    product += product.T
    pairs = analyze.draw_pairs(grid, 12, rng)
    sizes = [int((n - 2) * r) for r in analyze.ORDERS]
    additive, passes, terms = analyze.interactions(lambda x: x @ weight, n, pairs, sizes, most, rng)
    pairwise, _, _ = analyze.interactions(lambda x: np.einsum("ni,ij,nj->n", x, product, x) / 2, n, pairs, sizes, most, rng)
    assert additive.shape == (13, 12) and np.abs(additive).max() < 1e-11 and passes < 0.8 * terms
    assert np.abs(pairwise - product[pairs[:, 0], pairs[:, 1]]).max() < 1e-9    # the same at every order


def test_drawn_contexts_are_uniform():
    rng = np.random.default_rng(0)
    pairs = np.array([[0, 1], [3, 7], [14, 15]])
    for size in (0, 1, 5, 13, 14):
        S = analyze.contexts(16, pairs, size, 6000, rng)
        assert S.dtype == bool and S.shape[0] == 3 and (S.sum(2) == size).all()
        assert S.shape[1] == min(6000, math.comb(14, size))
        for context, pair in zip(S, pairs):
            assert not context[:, pair].any()
            share = np.delete(context.mean(0), pair)
            assert np.abs(share - size / 14).max() < 5 * (size / 14 * (1 - size / 14) / len(context)) ** 0.5 + 1e-12
            if 1 < len(context) < 6000:
                assert len(np.unique(context, axis=0)) == len(context)
    S = analyze.contexts(16, pairs, 7, 3000, rng)                           # C(14, 7) = 3432: every context as often as every other
    both = np.delete(np.delete(np.einsum("cp,cq->pq", S[1].astype(float), S[1]) / 3000, [3, 7], 0), [3, 7], 1)
    assert np.abs(both[~np.eye(14, dtype=bool)] - 7 * 6 / (14 * 13)).max() < 5 * 0.01
    sampled = [analyze.interactions(lambda x: np.sin(x @ np.arange(16.0)), 16, pairs, [7], 200, rng)[0] for _ in range(60)]
    exact = analyze.interactions(lambda x: np.sin(x @ np.arange(16.0)), 16, pairs, [7], 4000, rng)[0]
    assert np.abs(np.mean(sampled, 0) - exact).max() < 5 * np.std(sampled, 0).max() / 60 ** 0.5


@pytest.mark.parametrize("grid", [2, 3, 8])
def test_pairs_are_neighbours(grid):
    rng, drawn = np.random.default_rng(0), []
    for _ in range(50):
        pairs = analyze.draw_pairs(grid, 20, rng)
        rows, columns = np.divmod(pairs, grid)
        assert np.maximum(np.ptp(rows, 1), np.ptp(columns, 1)).max() <= 2 and (pairs[:, 0] < pairs[:, 1]).all()
        assert len(pairs) == {2: 6}.get(grid, 20) == len(np.unique(pairs, axis=0))
        drawn.append(pairs)
    assert len(np.unique(np.concatenate(drawn))) == grid * grid             # every patch takes part


def test_attention_measures_by_hand():
    n, patch = 3, 16
    N, at = n * n, [(r, c) for r in range(n) for c in range(n)]
    between = np.array([[math.dist(a, b) for b in at] for a in at])
    uniform, identity, right = np.full((N, N), 1 / N), np.eye(N), np.zeros((N, N))
    for q, (r, c) in enumerate(at):
        right[q, at.index((r, c + 1 if c < 2 else c - 1))] = 1              # one neighbour
    log = lambda p: torch.from_numpy(np.log(np.maximum(p, 1e-300)))
    distance, entropy, kl = analyze.attention_measures(torch.stack([log(p) for p in (uniform, identity, right)])[None], patch)
    assert distance.shape == entropy.shape == (1, 3) and kl.shape == (1, 1)
    torch.testing.assert_close(distance[0], torch.tensor([patch * between.mean(), 0, patch]).double())
    torch.testing.assert_close(entropy[0], torch.tensor([math.log(N), 0, 0]).double())
    assert float(analyze.attention_measures(log(uniform).expand(2, 4, N, N), patch)[2].abs().max()) < 1e-12      # alike: no divergence
    assert float(analyze.attention_measures(log(uniform).expand(2, 1, N, N), patch)[2].abs().max()) < 1e-12      # one head
    soft = 0.9 * right + 0.1 * uniform                                      # two heads, one image; both directions by hand
    by_hand = np.mean([(p * np.log(p / q)).sum(1).mean() for p, q in ((soft, uniform), (uniform, soft))])
    found = analyze.attention_measures(torch.stack([log(soft), log(uniform)])[None], patch)[2]
    assert relative(found, by_hand) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("grid", [3, None])
def test_log_attention_is_what_forward_uses(grid):
    attention = random_weights(models.Attention(12, 3, grid).double())
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    p = attention.log_attention(x).exp()
    assert p.shape == (2, 3, 10, 10) and torch.allclose(p.sum(-1), torch.ones(()).double())
    torch.testing.assert_close(attention.proj((p @ attention.project(x)[2]).transpose(1, 2).flatten(2)), attention(x))


def hsic_by_formula(x, y):
    """Song et al.'s unbiased estimator, term by term."""
    n, ones = len(x), torch.ones(len(x), 1, dtype=x.dtype)
    K, L = (x @ x.T).fill_diagonal_(0), (y @ y.T).fill_diagonal_(0)
    inner = (K @ L).trace() + (ones.T @ K @ ones) * (ones.T @ L @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones.T @ K @ L @ ones)
    return float(inner) / (n * (n - 3))


def cka_between(*features, batch=None):
    n = batch or len(features[0])
    hsic = 0
    for at in range(0, len(features[0]), n):
        grams = torch.stack([analyze.centred_gram(x[at:at + n]) for x in features])
        hsic = hsic + grams @ grams.T / (n * (n - 3))
    return analyze.cka_of(hsic)


def test_cka():
    g = torch.Generator().manual_seed(0)
    x, y, noise = (torch.randn(640, *shape, generator=g, dtype=torch.float64) for shape in ((4, 3, 3), (20,), (36,)))
    n, q = 640, torch.linalg.qr(torch.randn(36, 36, generator=g, dtype=torch.float64))[0]
    a, b = x.flatten(1), y
    assert relative((analyze.centred_gram(x) * analyze.centred_gram(y)).sum() / (n * (n - 3)), hsic_by_formula(a, b)) < 1e-9
    turned = 7 * a @ q + 3                                                  # rotated, scaled, moved
    cka = cka_between(x, turned, y, a + noise)
    assert torch.allclose(cka.diag(), torch.ones(4).double()) and torch.allclose(cka, cka.T)
    assert abs(cka[0, 1] - 1) < 1e-9 and abs(cka[0, 2]) < 0.02 and 0.3 < cka[0, 3] < 0.7
    small = cka_between(x, turned, y, a + noise, batch=32)
    assert abs(small[0, 1] - 1) < 1e-9 and float((small - cka).abs().max()) < 0.03           # an unbiased estimate of the same
    biased = [float((K := x @ x.T).flatten() @ (L := z @ z.T).flatten() / K.norm() / L.norm()) for x, z in ((a[:32], b[:32]),)]
    assert biased[0] > 0.3                                                  # which without correction is far off


def test_spectrum_finds_a_wave():
    h = 16
    y, x = torch.meshgrid(*2 * [torch.arange(h).double()], indexing="ij")
    for k in range(1, h // 2 + 1):
        amplitude, variance = analyze.spectrum((5 + torch.cos(2 * math.pi * k * (x + y) / h)).expand(2, 3, h, h))
        assert amplitude.shape == (2, h // 2 + 1) and variance.shape == (2,)
        assert amplitude[0, 1:].argmax() + 1 == k
        expected = math.log((0.5 if k < h // 2 else 1) / 5)                 # of cos: half its amplitude at k, half at −k
        assert abs(float(amplitude[0, k]) - expected) < 1e-4 and float(amplitude[0, 0]) == 0
        assert abs(float(variance[0]) - (0.5 if k < h // 2 else 1)) < 1e-6
    z = torch.randn(2, 3, h, h)
    whole = (torch.fft.fft2(z.double()).abs() + 1e-6).log().mean(1)
    by_hand = torch.stack([whole[:, k, k] for k in range(h // 2 + 1)], 1) - whole[:, :1, 0]
    torch.testing.assert_close(analyze.spectrum(z)[0].double(), by_hand, rtol=1e-4, atol=1e-4)
    assert [t.shape for t in analyze.spectrum(torch.ones(2, 3, 1, 1))] == [(2, 1), (2,)]


def test_standard_errors_and_probe():
    g = torch.Generator().manual_seed(0)
    samples = torch.randn(50, 3, generator=g).double()
    mean, error = analyze.average(samples)
    assert relative(error, samples.std(0) / 50 ** 0.5) < 1e-12
    value, jackknifed = analyze.jackknife(samples, lambda total: total / 50)
    leave_one_out = analyze.jackknife(samples, lambda total: total / 49)[1]     # of a mean it is the usual one
    assert relative(value, mean) < 1e-12 and relative(leave_one_out, error) < 1e-9
    labels = torch.arange(90) % 3
    features = torch.randn(90, 5, generator=g) + 3 * F.one_hot(labels, 5)
    probe = analyze.fit_probe(features, labels, 3)
    assert (probe(features).argmax(1) == labels).double().mean() > 0.95
    x = (features.double() - features.double().mean(0)) / (features.double().std(0) + 1e-6)
    rows = torch.cat([torch.cat([x, torch.ones(90, 1)], 1), torch.cat([0.9 ** 0.5 * torch.eye(5), torch.zeros(5, 1)], 1)])    # ridge as rows
    solution = torch.linalg.lstsq(rows.double(), torch.cat([F.one_hot(labels, 3), torch.zeros(5, 3)]).double()).solution
    torch.testing.assert_close(probe(features), rows[:90].double() @ solution)


def test_walk_is_the_forward_pass():
    vit, resnet = random_weights(models.build("vit_nano", 32).encoder), random_weights(models.build("resnet18", 64).encoder)
    x = torch.randn(2, 3, 32, 32)
    names, maps = zip(*vit.walk(x, halves=True))
    assert names == ("stem", *(f"{i}{half}" for i in range(1, 5) for half in ("a", ""))) and {z.shape for z in maps} == {(2, 96, 8, 8)}
    assert [name for name, _ in vit.walk(x)] == ["stem", "1", "2", "3", "4"]
    torch.testing.assert_close(vit.norm(maps[-1].movedim(1, -1)).movedim(-1, 1), vit(x))
    y = vit.blocks[0](vit.embed(vit.stem(x)))[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(maps[2], y)
    names, maps = zip(*resnet.walk(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))))
    assert names == ("stem", *(f"{i}.{j}" for i in range(1, 5) for j in (1, 2)))
    torch.testing.assert_close(maps[-1], resnet(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))))


@torch.no_grad()
def test_open_model_makes_what_is_in_a_file(tmp_path):
    """Ours, timm's and torchvision's, with and without a classifier: the same outputs as where they come from."""
    import timm
    path = str(tmp_path / "it.pth")

    def reopened(state):
        torch.save(state, path)
        return weights.open_model(path)

    image = torch.randn(2, 3, 64, 64)
    for arch, options in (("vit_nano", {}), ("resnet18", {}), ("resnet_nano", {}), ("deit_t", {})):
        a2mim = random_weights(models.build(arch, 64, **options))
        model, about = reopened({"model": a2mim.state_dict(), "identity": dict(arch=arch, img_size=64)})
        assert isinstance(model, models.A2MIM) and (about["arch"], about["size"], about["missing"]) == (arch, 64, [])
        mask = masking.random_mask(2, 2, 0.6)
        torch.testing.assert_close(model.eval()(image, mask), a2mim(image, mask))
        predictor = random_weights(models.Predictor(models.build(arch, 64).encoder, 5))
        model, about = reopened({"model": predictor.state_dict(), "classes": list("abcde"), "identity": dict(arch=arch, img_size=64, test_crop=64)})
        assert about["classes"] == list("abcde")
        torch.testing.assert_close(model.eval()(image), predictor(image))
    large = torch.randn(1, 3, 224, 224)
    theirs = random_weights(timm.create_model("vit_tiny_patch16_224", num_classes=7))
    model, about = reopened(theirs.state_dict())
    assert about["arch"] == "deit_t" and about["size"] == 224 and model.pool == "token"
    torch.testing.assert_close(model.eval()(large), theirs(large), rtol=1e-4, atol=1e-4)
    theirs = random_weights(timm.create_model("vit_tiny_patch16_224", num_classes=0))
    assert isinstance(reopened(theirs.state_dict())[0], models.A2MIM)
    theirs = random_weights(torchvision.models.resnet18(num_classes=7))
    model, about = reopened(theirs.state_dict())
    assert about["arch"] == "resnet18" and about["size"] == 224
    torch.testing.assert_close(model.eval()(large), theirs(large), rtol=1e-4, atol=1e-4)
    pose = models.Predictor(models.build("vit_nano", 32).encoder, 5, "flatten")
    model, about = reopened({"model": pose.state_dict(), "identity": dict(arch="vit_nano", img_size=32, task="pose")})
    assert isinstance(model, models.A2MIM) and any(name.startswith("decoder.") for name in about["missing"])
    with pytest.raises(ValueError, match="holds an encoder that is none of vit_s, "):
        reopened(models.build("vit_b", 32, patch_size=16, dim=24, heads=2, depth=1, mlp_dim=8).state_dict())
    for arch in models.PRESETS:                                             # each is told from the others by its shapes
        with torch.device("meta"):
            state = models.build(arch, 96).state_dict()
        assert weights.recognise(state, 96)[:2] == (arch, 96)


def analysis(out, name):
    return json.loads((out / (name + ".json")).read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A folder of images in three classes, and six checkpoints: pre-trained, fine-tuned, others'."""
    import timm
    tmp = tmp_path_factory.mktemp("studied")
    write_images(tmp / "images", [f"{split}/{kind}/{i}.png" for split in ("train", "val") for kind in "abc" for i in range(8)], size=(40, 48))
    torch.manual_seed(0)
    paths = {}
    for name, state in (
            ("vit", lambda: {"model": models.build("vit_nano", 32).state_dict(), "identity": dict(arch="vit_nano", img_size=32, mask_size=8)}),
            ("simmim", lambda: {"model": models.build("vit_nano", 32, fill="none", token="replace").state_dict(),
                                "identity": dict(arch="vit_nano", img_size=32, mask_size=8, fill="none", token="replace")}),
            ("resnet", lambda: {"model": models.build("resnet_nano", 32).state_dict(), "identity": dict(arch="resnet_nano", img_size=32, mask_size=8)}),
            ("timm", lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict()),
            ("torchvision", lambda: torchvision.models.resnet18(num_classes=3).state_dict()),
            ("plain", lambda: timm.create_model("resnet18", num_classes=0).state_dict())):
        torch.save(state(), tmp / f"{name}.pth")
        paths[name] = str(tmp / f"{name}.pth")
    for arch in ("vit_nano", "resnet_nano"):
        finetune.main(["--arch", arch, "--data", str(tmp / "images"), "--img-size", "32", "--epochs", "1", "--batch-size", "8", "--workers", "0",
                       "--out", str(tmp / f"tuned-{arch}"), "--protocol", "scratch-small"])
        paths[arch] = str(tmp / f"tuned-{arch}" / "last.pt")
    return tmp, paths


def test_all_analyses_of_all_kinds(studied, tmp_path, capsys):
    tmp, paths = studied
    out = tmp_path / "out"
    common = ["--data", str(tmp / "images"), "--images", "12", "--probe-images", "20", "--pairs", "3", "--contexts", "2", "--workers", "0"]
    analyze.main([paths[k] for k in ("vit", "simmim", "resnet", "vit_nano", "resnet_nano")] + common + ["--out", str(out)])
    text = capsys.readouterr().out
    assert "reconstruct\n" in text and "not for tuned-vit_nano: there is no decoder" in text
    assert "not for resnet: a resnet_nano has no attention" in text and "not for vit: it has no classifier" in text
    assert "vit, simmim, resnet: a linear probe of the last features, fitted on 20 images\ntuned-vit_nano, tuned-resnet_nano: its classifier" in text
    assert re.search(r"forward passes where four a context would be [\d,]+; 3 pairs, 2 contexts; for the true class", text)
    page = (out / "index.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in analyze.ANALYSES) and "http" not in page
    names = {"reconstruct": 3, "interaction": 2, "occlusion": 5, "fourier": 5, "attention": 3, "cka": 5, "layers": 5}
    for name, subjects in names.items():
        found = analysis(out, name)
        for quantity, each in found["curves"].items():
            assert len(each) == subjects or "whole images" in quantity      # which needs an accuracy well above 0
            for places, means, errors, *_ in each.values():
                assert len(places) == len(means) == len(errors) and np.isfinite(means + errors).all()
    if study.Figure:
        assert all((out / f"{name}.png").stat().st_size > 5000 for name in names) and page.count("data:image/png;base64,") == 7
    more = analysis(out, "cka")["more"]
    whole, ends = np.concatenate([each["matrix"] for each in more.values()]), more["vit"]["ends"]
    assert whole.shape == (25, 25) and np.allclose(np.diag(whole), 1) and np.allclose(whole, whole.T) and ends == [0, 5, 10, 15, 20, 25]
    before = {name: (out / f"{name}.json").read_bytes() for name in names}
    analyze.main([paths[k] for k in ("vit", "simmim", "resnet", "vit_nano", "resnet_nano")] + common + ["--out", str(out), "--only", "cka,interaction"])
    assert {name: (out / f"{name}.json").read_bytes() for name in names} == before     # the same again, bit for bit


def test_analyses_of_other_projects_models(studied, tmp_path, monkeypatch, capsys):
    tmp, paths = studied
    monkeypatch.setattr(analyze, "ORDERS", [0, .5, 1])                      # these models are large
    monkeypatch.setattr(analyze, "SHARES", [0, .5])
    analyze.main([paths["timm"], paths["torchvision"], paths["plain"], "--data", str(tmp / "images"), "--images", "8", "--probe-images", "8", "--pairs", "1",
                  "--contexts", "1", "--workers", "0", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "timm (deit_t, 224 px), torchvision (resnet18, 224 px), plain (resnet18, 224 px)" in text
    assert "for the predicted class" in text and "for the true class" in text           # ten classes, of which the images know nothing; three
    assert not (tmp_path / "out" / "reconstruct.json").exists() and analysis(tmp_path / "out", "attention")["curves"]["entropy, nats, by block"].keys() == {"timm"}
    assert "timm, plain: a linear probe" in text and "torchvision: its classifier" in text


def test_interaction_of_a_network_by_enumeration(tmp_path, capsys):
    """A ViT on nine patches: J from every context of every pair, four forward passes each, against what the script says."""
    torch.manual_seed(0)
    model = random_weights(models.Predictor(models.build("vit_nano", 24, patch_size=8).encoder, 3))
    torch.save({"model": model.state_dict()}, tmp_path / "toy.pt")
    write_images(tmp_path / "images", [f"{split}/{kind}/{i}.png" for split in ("train", "val") for kind in "abc" for i in range(4)], size=(24, 24))
    out = tmp_path / "out"
    analyze.main([str(tmp_path / "toy.pt"), "--data", str(tmp_path / "images"), "--images", "8", "--pairs", "50", "--contexts", "35", "--only", "interaction",
                  "--workers", "0", "--out", str(out)])
    (places, J, errors), = analysis(out, "interaction")["curves"]["interaction strength J by order m / (n² − 2)"].values()
    assert "4,096 forward passes where four a context would be" in capsys.readouterr().out    # 8 images × 2⁹ coalitions
    source = sources.open_source(str(tmp_path / "images"), "val", 24)
    chosen = torch.randperm(12, generator=data.generator(0, "val"))[:8].tolist()
    sizes, strength = [int(7 * r) for r in places], []
    every = torch.tensor([[c >> p & 1 for p in range(9)] for c in range(512)]).view(512, 1, 3, 3).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    for index in chosen:
        image, label = source[index]
        image = data.evaluation_crop(image, 24, 24)
        with torch.no_grad():
            p = model(data.normalize(image[None]) * every).double().softmax(1)[:, label]
        v = (p / (1 - p)).log().numpy()
        game = lambda S: v[sum(1 << player for player in S)]
        strength.append([np.mean([abs(brute_force(game, 9, pair, m)) for pair in itertools.combinations(range(9), 2)]) for m in sizes])
    expected = np.mean(strength, 0) / np.mean(strength)
    assert np.abs(np.array(J) - expected).max() <= 1e-6
    again = [np.mean(np.delete(strength, k, 0), 0) / np.mean(np.delete(strength, k, 0)) for k in range(8)]
    assert np.abs(np.array(errors) - (np.var(again, 0) * 7) ** 0.5).max() <= 1e-6


def test_occlusion_at_zero_is_plain_evaluation(studied, tmp_path, capsys):
    tmp, paths = studied
    for arch in ("vit_nano", "resnet_nano"):
        finetune.main(["--init", paths[arch], "--eval", "--data", str(tmp / "images"), "--workers", "0", "--out", str(tmp_path / f"eval-{arch}")])
        plain = json.loads((tmp_path / f"eval-{arch}" / "result.json").read_text())
        analyze.main([paths[arch], "--only", "occlusion,layers", "--data", str(tmp / "images"), "--images", "24", "--workers", "0", "--out", str(tmp_path / arch)])
        (places, top1, _), = analysis(tmp_path / arch, "occlusion")["curves"]["top-1, %, by share of patches dropped"].values()
        assert plain["n"] == 24 and places[0] == 0 and abs(top1[0] - plain["top1"]) < 1e-9
        assert f"its classifier, on all blocks: {top1[0]:.1f}" in capsys.readouterr().out
    image = torch.randn(4, 3, 32, 32)
    assert analyze.occlude(image, 0, 8, None) is image
    for share in (0.1, 0.5, 0.95):
        gone = (analyze.occlude(image, share, 8, [data.generator(i) for i in range(4)]) == 0).all(1)
        assert (gone.float().mean((1, 2)) == math.ceil(64 * share) / 64).all()
        assert (gone.view(4, 8, 4, 8, 4).float().mean((2, 4)) % 1 == 0).all() and not (gone[0] == gone[1]).all()   # whole patches, others in each


def test_analyses_look_at_what_they_say(studied, tmp_path, capsys):
    """Reconstructions, attention, spectra, CKA and probes of a ViT, computed anew, from what its blocks take in and give out."""
    tmp, paths = studied
    folder, out = str(tmp / "images"), tmp_path / "out"
    torch.manual_seed(0)
    a2mim = random_weights(models.build("vit_nano", 24, patch_size=8))
    torch.save({"model": a2mim.state_dict()}, tmp_path / "toy.pt")
    analyze.main([str(tmp_path / "toy.pt"), "--data", folder, "--images", "14", "--only", "reconstruct,attention,cka,layers", "--workers", "0", "--out", str(out)])
    vit = a2mim.encoder

    def features(split, images):
        """[what each block gives, (B, 1 + N, D)], [what its attention takes in], labels."""
        source = sources.open_source(folder, split, 24)
        order = torch.randperm(24, generator=data.generator(0, split))[:images].tolist()
        batch = torch.stack([data.evaluation_crop(source[i][0], 24, 24) for i in order])
        outputs, inputs, hooks = [], [], []
        for block in vit.blocks:
            hooks.append(block.register_forward_hook(lambda module, args, output: outputs.append(output)))
            hooks.append(block.attn.register_forward_hook(lambda module, args, output: inputs.append(args[0])))
        with torch.no_grad():
            x = data.normalize(batch)
            stem = vit.patch_embed(x).flatten(2).transpose(1, 2)
            vit(x)
        for hook in hooks:
            hook.remove()
        return [stem, *(z[:, 1:] for z in outputs)], inputs, torch.tensor([source[i][1] for i in order])

    maps, inputs, labels = features("val", 14)
    at = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    for block, x, number in zip(vit.blocks, inputs, range(4)):
        with torch.no_grad():
            q, k, _ = block.attn.project(x)
            p = (q @ k.transpose(-2, -1) / (96 / 4) ** 0.5 + block.attn.position_bias(q.dtype)).softmax(-1)[:, :, 1:, 1:]    # no class token,
        p = p / p.sum(-1, keepdim=True)                                                         # and the rest a distribution again
        curves = analysis(out, "attention")["curves"]
        for quantity, by_hand in (("attention distance, px, by block", (p * 8 * torch.cdist(at, at)).sum(-1)), ("entropy, nats, by block", -(p * p.log()).sum(-1))):
            places, means, errors, heads = curves[quantity]["toy"]
            assert places == [1, 2, 3, 4] and relative(heads[number], by_hand.mean((0, 2))) < 1e-4
            assert relative(means[number], by_hand.mean()) < 1e-4 and relative(errors[number], by_hand.mean((1, 2)).std() / 14 ** 0.5) < 1e-3
        kl = [(p[:, g] * (p[:, g] / p[:, h]).log()).sum(-1).mean() for g in range(4) for h in range(4) if g != h]
        assert relative(curves["KL divergence between heads, nats, by block"]["toy"][1][number], sum(kl) / 12) < 1e-3
    source = sources.open_source(folder, "val", 24)
    order = torch.randperm(24, generator=data.generator(0, "val"))[:14].tolist()
    x = data.normalize(torch.stack([data.evaluation_crop(source[i][0], 24, 24) for i in order]))
    mask = masking.random_mask(14, 3, 0.6, [data.generator(0, "mask", i) for i in range(14)])   # three patches a side, a block each
    M = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).bool()[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        errors = [((a2mim(x, mask) - x).abs()[i][M[i]].mean(), (x.mean((2, 3), keepdim=True) - x).abs()[i][M[i]].mean()) for i in range(14)]
    (places, means, spread), = analysis(out, "reconstruct")["curves"]["|error| of masked pixels"].values()
    assert relative(means, torch.tensor(errors).mean(0)) < 1e-5 and relative(spread, torch.tensor(errors).std(0) / 14 ** 0.5) < 1e-4
    cka, = analysis(out, "cka")["more"].values()                         # three minibatches of four; two images are left over
    assert np.abs(np.array(cka["matrix"]) - cka_between(*[z[:12] for z in maps], batch=4).numpy()).max() < 1e-4
    (places, top1, _), = analysis(out, "layers")["curves"]["top-1 of a linear probe, %, by layer"].values()
    trained, _, known = features("train", 24)
    by_hand = [100 * (analyze.fit_probe(a.mean(1), known, 3)(b.mean(1)).argmax(1) == labels).double().mean() for a, b in zip(trained, maps)]
    assert places == ["stem", "1", "2", "3", "4"] and relative(top1, by_hand) < 1e-9 and len(set(top1)) > 1
    analyze.main([paths["vit"], "--data", folder, "--images", "14", "--only", "fourier", "--workers", "0", "--out", str(tmp_path / "fourier")])
    result, vit = analysis(tmp_path / "fourier", "fourier"), models.build("vit_nano", 32).encoder
    weights.load(models.A2MIM(vit), paths["vit"])
    source, seen = sources.open_source(folder, "val", 32), []
    order = torch.randperm(24, generator=data.generator(0, "val"))[:14].tolist()
    hooks = [m.register_forward_hook(hook) for b in vit.blocks for m, hook in ((b.norm2, lambda m, args, o: seen.append(args[0])), (b, lambda m, a, o: seen.append(o)))]
    with torch.no_grad():
        x = data.normalize(torch.stack([data.evaluation_crop(source[i][0], 32, 32) for i in order]))
        vit(x)
        seen = [vit.patch_embed(x), *(z[:, 1:].transpose(1, 2).unflatten(2, (8, 8)) for z in seen)]
    spectra = [analyze.spectrum(z) for z in seen]
    (places, means, errors), = result["curves"]["Δ log amplitude at the highest frequency by layer"].values()
    assert places == ["stem", "1a", "1", "2a", "2", "3a", "3", "4a", "4"] and relative(means, [a[:, 4].mean() for a, _ in spectra]) < 1e-4
    assert relative(errors, [a[:, 4].std() / 14 ** 0.5 for a, _ in spectra]) < 1e-3
    (_, means, _), = result["curves"]["log10 of the variance over positions by layer"].values()
    assert relative(means, [v.log10().mean() for _, v in spectra]) < 1e-4


def test_results_of_another_checkpoint_are_not_mixed(studied, tmp_path, monkeypatch, capsys):
    tmp, paths = studied
    shutil.copy(paths["vit"], tmp_path / "last.pt")
    command = [str(tmp_path / "last.pt"), "--data", str(tmp / "images"), "--images", "8", "--workers", "0", "--out", str(tmp_path / "out"), "--only"]
    analyze.main([*command, "fourier"])
    analyze.main([*command, "cka"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<h2>fourier</h2>" in page and "<h2>cka</h2>" in page            # a folder may grow
    shutil.copy(paths["simmim"], tmp_path / "last.pt")                      # the run went on
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        analyze.main([*command, "cka"])
    assert done.value.code == 2 and "holds the analysis of something else" in capsys.readouterr().err
    assert (tmp_path / "out" / "index.html").read_text() == page
    (tmp_path / "out" / "cka.png").write_bytes(b"the other model's figure")
    monkeypatch.setattr(study, "Figure", None)
    analyze.main([*command, "cka", "--overwrite"])
    assert not (tmp_path / "out" / "cka.png").exists()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<h2>cka</h2>" in page and "<h2>fourier</h2>" not in page


def test_checkpoints_of_equal_names_all_appear(studied, tmp_path, capsys):
    tmp, paths = studied
    for folder, name in (("1", "x"), ("2", "x"), ("1", "2 x")):
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(paths["vit"], tmp_path / folder / f"{name}.pt")
    files = [str(tmp_path / name) for name in ("1/x.pt", "2/x.pt", "1/2 x.pt")]
    analyze.main([*files, "--data", str(tmp / "images"), "--images", "8", "--workers", "0", "--only", "fourier,fourier", "--out", str(tmp_path / "out")])
    assert [len(each) for each in analysis(tmp_path / "out", "fourier")["curves"].values()] == [3, 3]
    assert capsys.readouterr().out.count("\nfourier\n") == 1


def test_labelled_images_are_replaced_by_labelled_ones(studied, tmp_path, capsys):
    tmp, paths = studied
    write_images(tmp_path / "mixed", [f"train/{i}.png" for i in range(30)] + [f"{split}/{kind}/{i}.png" for split in ("train", "val") for kind in "ab" for i in range(9)])
    for i in range(4):
        (tmp_path / "mixed" / "train" / "a" / f"{i}.png").write_bytes(b"broken")
    analyze.main([paths["vit"], "--data", str(tmp_path / "mixed"), "--images", "18", "--only", "layers", "--workers", "0", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert text.count("replaced by another") == 4 and "fitted on 18 images" in text


def test_analysis_replaces_unreadable_images(studied, tmp_path, capsys):
    tmp, paths = studied
    shutil.copytree(tmp / "images", tmp_path / "images")
    (tmp_path / "images" / "val" / "b" / "3.png").write_bytes(b"broken")
    analyze.main([paths["vit"], "--only", "fourier", "--data", str(tmp_path / "images"), "--images", "24", "--workers", "0", "--out", str(tmp_path / "out")])
    assert "replaced by another: " in (text := capsys.readouterr().out) and "3.png is no readable image" in text


BAD_ANALYSES = [
    ("{tmp}/missing.pt", "no checkpoint at"),
    ("{tmp}/foreign.pt", "in no known format"),
    ("{tmp}/unknown.pth", "none of vit_s"),
    ("{tmp}/broken.pth", "broken.pth makes of images is no finite number"),
    ("{vit} --only attention,colour", "no analysis 'colour': choose from reconstruct, "),
    ("{vit} --images 3", "3 is not 8 or more"),
    ("{vit} --data {tmp}/nothing", "no folder"),
    ("{vit} --data {tmp}/few", "holds out 1 images only"),
    ("{vit} --data {tmp}/held", "holds out 7 images only"),
    ("{vit} --pairs 0", "0 is not 1 or more"),
    ("{vit} --pairs 1000 --contexts 1000", "100,000 at most"),
    ("{vit} --out {tmp}/folder", "cka.png is a folder"),
    ("{vit} --unknown", "unrecognized arguments"),
    ("", "required: CHECKPOINT"),
    ("{vit} --out {tmp}/other", "holds the analysis of something else"),
    ("{vit} --out {tmp}/page", "holds the analysis of something else"),
    ("{vit} --out {tmp}/strange", "holds the analysis of something else"),
    ("{vit} --out {tmp}/foreign.pt", "foreign.pt"),
    ("{tmp}/sizes.pt", "none of resnet_nano"),
    ("{tmp}/odd.pt", "odd.pt holds no whole model"),
]


def test_bad_analyses_are_one_line(studied, tmp_path, capsys):
    tmp, paths = studied
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.pt")
    torch.save(models.build("vit_b", 32, patch_size=16, dim=24, heads=2, depth=1, mlp_dim=8).state_dict(), tmp_path / "unknown.pth")
    broken = models.build("vit_nano", 32)
    torch.nn.init.constant_(broken.encoder.patch_embed.bias, math.nan)
    torch.save(broken.state_dict(), tmp_path / "broken.pth")
    write_images(tmp_path / "few", ["a/0.png", "b/1.png", "b/2.png", "b/3.png"])
    write_images(tmp_path / "held", [f"{split}/a/{i}.png" for split in ("train", "val") for i in range(7)])
    for name, file, text in (("other", "fourier.json", '{"about": {"seed": 3}}'), ("page", "index.html", "my own page"), ("strange", "cka.json", "[" * 100000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    (tmp_path / "folder" / "cka.png").mkdir(parents=True)
    torch.save({"model": models.build("resnet_nano", 32).state_dict(), "identity": dict(arch="resnet_nano", img_size=999)}, tmp_path / "sizes.pt")
    torch.save(models.build("vit_nano", 32).state_dict() | {"encoder.pos_embed": torch.zeros(5)}, tmp_path / "odd.pt")
    files = lambda: {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    before = files()
    for command, says in BAD_ANALYSES:
        with pytest.raises(SystemExit) as done:
            analyze.main(shlex.split(command.format(tmp=tmp_path, vit=paths["vit"])) + ["--workers", "0"])
        said = capsys.readouterr()
        assert done.value.code == 2 and says in said.err and len(said.err.splitlines()) == 1 and said.err.startswith("analyze.py: "), command
    assert files() == before


def test_analysis_without_matplotlib_or_labels(studied, tmp_path, monkeypatch, capsys):
    tmp, paths = studied
    monkeypatch.setattr(study, "Figure", None)
    write_images(tmp_path / "flat", [f"{i}.png" for i in range(40)])
    analyze.main([paths["vit"], paths["vit_nano"], "--data", str(tmp_path / "flat"), "--images", "8", "--workers", "0", "--pairs", "1", "--contexts", "1", "--out",
                  str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "no figures, only numbers: pip install matplotlib" in text and not list((tmp_path / "out").glob("*.png"))
    assert text.count(f"only 0 images of {tmp_path}/flat for train have a label, 8 are needed") == 4 and "for the predicted class" in text
    assert "<pre>" in (tmp_path / "out" / "index.html").read_text()


# ------------------------------------------------------------------------------------------------ README.md


# ------------------------------------------------------------------------------------------------ bring your own

def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def copy_of_the_project(folder):
    folder.mkdir(exist_ok=True)
    for file in HERE.glob("*.py"):
        shutil.copy(file, folder)


def test_bring_your_own_as_the_readme_says(tmp_path):
    """An encoder, a mask, a fill, two losses and a data set, appended to the files as printed; then the commands as printed."""
    here = tmp_path / "fork"
    copy_of_the_project(here)
    blocks = [block for block in readme_blocks("python") if block.startswith("# at the end of ")]
    for block in blocks:
        file = re.match(r"# at the end of (\w+\.py)\n", block)[1]
        assert len(block.splitlines()) < 30, file
        (here / file).write_text((here / file).read_text() + "\n\n" + block)
    assert len(blocks) == 5
    commands = next(block for block in readme_blocks("sh") if "--arch convmixer" in block).splitlines()

    def perform(command):
        return subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True, timeout=300, cwd=here)

    stopped = perform(commands[0] + " --steps 5")
    assert stopped.returncode == 0, stopped.stderr
    said = [perform(command) for command in commands]
    assert all(done.returncode == 0 for done in said), [done.stderr for done in said]
    assert "continuing after step 5" in said[0].stdout and "Result: top1" in said[1].stdout
    config = torch.load(here / "runs/convmixer-a2mim-gratings/last.pt", weights_only=True)["identity"]
    assert [config[key] for key in ("arch", "mask", "fill", "spatial_loss", "frequency_loss", "data")] == ["convmixer", "square", "noise", "charbonnier", "low", "gratings"]
    assert (next(here.glob("runs/analysis-*")) / "cka.json").exists() and (here / "convmixer.pth").exists()
    loads = "\n".join(line.strip() for line in said[3].stdout.splitlines()[1:])         # what export says loads it
    assert perform(shlex.join(["python", "-c", loads])).returncode == 0


@pytest.mark.parametrize("arch,theirs", [("convnext_t", torchvision.models.convnext_tiny), ("swin_t", torchvision.models.swin_t)])
def test_torchvision_encoders(arch, theirs, tmp_path, capsys):
    """Pre-trained a few steps, continued, fine-tuned, analysed, exported; and the same function as torchvision's own."""
    torch.manual_seed(0)
    net, encoder = theirs().eval(), models.build(arch, 64).encoder.eval()
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    report = weights.load(models.Predictor(encoder, 1000), str(tmp_path / "theirs.pth"))
    assert report["format"] == "ConvNeXt or Swin of torchvision" and not [n for n in report["missing"] if n.startswith("encoder.")]
    x, encoder.norm = torch.randn(2, 3, 64, 64), torch.nn.Identity()
    with torch.no_grad():
        z = net.features(x)
        assert torch.equal(encoder(x), z.movedim(-1, 1) if arch == "swin_t" else z)
    few = ["--img-size", "64", "--batch-size", "4", "--micro-batch", "4", "--workers", "0"]
    train.main(["--arch", arch, *few, "--steps", "2", "--out", str(tmp_path / "a")])
    train.main(["--arch", arch, *few, "--steps", "3", "--out", str(tmp_path / "a")])
    train.main(["--arch", arch, *few, "--steps", "3", "--out", str(tmp_path / "b")])
    assert "continuing after step 2" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in b)                 # the same bits as undisturbed
    finetune.main(["--init", str(tmp_path / "a/last.pt"), "--protocol", "small", "--labels", "8", "--batch-size", "4", "--epochs", "1",
                   "--workers", "0", "--out", str(tmp_path / "f")])
    tuned = torch.load(tmp_path / "f/last.pt", weights_only=True)["model"]
    for name, state in (("a", a), ("f", tuned)):
        exported, call = weights.export(str(tmp_path / name / "last.pt"), "torchvision")
        names = {}
        exec("import torch, torchvision; model = " + call, names)
        names["model"].load_state_dict(exported)
        own, build = weights.export(str(tmp_path / name / "last.pt"), "encoder")
        exec("import torch, model; model = " + build, built := {})
        built["model"].load_state_dict(own)
        model = weights.open_model(str(tmp_path / name / "last.pt"))[0].eval()
        with torch.no_grad():
            z = names["model"].eval().features(x)
            ours = model.encoder.run([6, 7], model.encoder.run([4, 5], model.encoder.run([2, 3], model.encoder.run([1], model.encoder.stem(x)))))
            assert torch.equal(ours, z.movedim(-1, 1) if arch == "swin_t" else z)
            if arch == "convnext_t" and name == "f":
                assert relative(names["model"](x), model(x)) < 1e-5         # classifier included
        assert set(own) == {n.removeprefix("encoder.") for n in state if n.startswith("encoder.")}
    analyze.main([str(tmp_path / "a/last.pt"), str(tmp_path / "f/last.pt"), "--only", "fourier,cka,reconstruct", "--images", "8", "--workers", "0",
                  "--out", str(tmp_path / "s")])
    assert {"fourier.json", "cka.json", "reconstruct.json"} <= {path.name for path in (tmp_path / "s").iterdir()}
    with pytest.raises(ValueError, match="multiple of the encoder's stride 32"):
        models.build(arch, 40)


# ------------------------------------------------------------------------------------------------ own colours

def test_stats_by_hand(tmp_path, capsys):
    rng, images = np.random.default_rng(0), []
    for i in range(6):
        folder = tmp_path / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        images.append(rng.integers(0, 256, (8 + i, 12, 3), dtype=np.uint8))
        Image.fromarray(images[-1]).save(folder / f"{i}.png")
    (tmp_path / "train/a/broken.png").write_bytes(b"no image")
    shutil.copytree(tmp_path / "train/b", tmp_path / "val/b")
    shutil.copytree(tmp_path / "train/b", tmp_path / "val/a")
    data.main(["stats", str(tmp_path)])
    said = capsys.readouterr().out
    means = np.mean([image.mean((0, 1)) for image in images], 0) / 255
    squares = np.mean([(image / 255.0).__pow__(2).mean((0, 1)) for image in images], 0)
    text = [" ".join(f"{v:.3f}" for v in values) for values in (means, np.sqrt(squares - means ** 2))]
    assert f"--channels 3 --mean {text[0]} --std {text[1]}" in said
    assert "train: 7 images, 2 classes of 3 to 4" in said and "val: 6 images, 2 classes of 3 to 3" in said
    assert "8 to 13 px high, 12 to 12 wide" in said and "broken.png is no readable image" in said and "grey" not in said
    for image in images[:1]:                                                # and of one channel: the luma, as Pillow has it
        Image.fromarray(image).convert("L").save(tmp_path / "train/b/grey.png")
        grey = sources.Channels([(torch.from_numpy(image).permute(2, 0, 1), 0)], 1)[0][0]
        assert (grey.int() - torch.from_numpy(np.array(Image.fromarray(image).convert("L")))[None].int()).abs().max() <= 1
    same = torch.full((3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(sources.Channels([(same, 0)], 1)[0][0], same[:1]) and torch.equal(sources.Channels([(same[:1], 0)], 3)[0][0], same)


@pytest.mark.parametrize("options,says", [("stats {t}/nowhere", "no folder"), ("stats {t} --channels 5", "5"), ("stats {t} --images 0", "1 or more"), ("stats {t} --channels 0", "1 or more")])
def test_bad_input_of_stats_is_one_line(options, says, tmp_path, capsys):
    write_images(tmp_path, ["1.png", "2.png"])
    with pytest.raises(SystemExit) as error:
        data.main(options.format(t=tmp_path).split())
    said = capsys.readouterr().err
    assert error.value.code == 2 and says in said and len(said.splitlines()) == 1


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """Class folders of images of 13 channels, and of one."""
    root = tmp_path_factory.mktemp("bands")
    for split, count in (("train", 48), ("val", 16)):
        for i in range(count):
            for kind in ("grey", "thirteen"):
                (root / kind / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            array = np.random.default_rng((i, split == "val")).integers(40, 60, (32, 32, 13), dtype=np.uint8)
            np.save(root / "thirteen" / split / "ab"[i % 2] / f"{i}.npy", array)
            Image.fromarray(array[..., 0]).save(root / "grey" / split / "ab"[i % 2] / f"{i}.png")
    return root


@pytest.mark.parametrize("kind,channels,arch", [("grey", 1, "vit_nano"), ("thirteen", 13, "resnet_nano"), ("thirteen", 13, "vit_nano"), ("grey", 1, "resnet_nano")])
def test_other_channels_all_the_way(kind, channels, arch, bands, tmp_path, capsys):
    """What train.py was told once, fine-tuning, evaluation, probes, analyses, packs and export know."""
    folder, mean, std = str(bands / kind), [0.196] * channels, [0.0226] * channels
    colours = ["--channels", str(channels), "--mean", *map(str, mean), "--std", *map(str, std)]
    common = ["--data", folder, "--workers", "0", "--batch-size", "16"]
    pre, tuned = str(tmp_path / "p/last.pt"), str(tmp_path / "f/last.pt")
    train.main(["--arch", arch, "--img-size", "32", *common, *colours, "--epochs", "2", "--out", str(tmp_path / "p")])
    entries = [json.loads(line) for line in open(tmp_path / "p/log.jsonl")]
    picture = torchvision.io.read_image(str(tmp_path / "p/recon.png"))[:, :200, :200]
    shown = picture[:, (picture > 30).all(0)].float()                       # between the frames
    assert 40 <= shown.min() and shown.max() <= 62                          # neither blue nor white: as the images are
    assert entries[0]["spatial"] < 3                                        # of images that are normalised
    finetune.main(["--init", pre, *common, "--epochs", "1", "--out", str(tmp_path / "f")])
    finetune.main(["--init", pre, "--data", folder, "--workers", "0", "--protocol", "knn", "--k", "5", "--out", str(tmp_path / "k")])
    finetune.main(["--init", tuned, "--data", folder, "--workers", "0", "--eval", "--out", str(tmp_path / "e")])
    for name in "fke":
        config = json.loads((tmp_path / name / "result.json").read_text())["config"]
        assert (config["channels"], config["mean"], config["std"]) == (channels, mean, std)
    assert json.loads((tmp_path / "f/result.json").read_text())["top1"] == json.loads((tmp_path / "e/result.json").read_text())["top1"]
    analyze.main([pre, tuned, "--only", "reconstruct,cka,occlusion", "--images", "8", "--probe-images", "16", "--workers", "0", "--out", str(tmp_path / "s")])
    errors = json.loads((tmp_path / "s/reconstruct.json").read_text())["curves"]["|error| of masked pixels"]["p"][1]
    assert 0.5 < errors[1] < 1.2                                            # the mean colour, in standard deviations of uniform noise: 0.87
    model, about = weights.open_model(pre)
    assert model.encoder.channels == channels and about["mean"] == mean
    own, call = weights.export(pre, "encoder")
    names = {}
    exec("import model; model = " + call, names)
    names["model"].load_state_dict(own)
    if channels == 13:
        data.main(["pack", folder, str(tmp_path / "x.pack"), "--workers", "0"])
        assert torch.equal(sources.Packed(str(tmp_path / "x.pack"), "val")[3][0], sources.Folder(folder, "val")[3][0])
    capsys.readouterr()


@pytest.mark.parametrize("main,options,says", [
    (train.main, "--data {t}/thirteen", "has 13 channels, not 3: see --channels"),
    (train.main, "--data {t}/thirteen --channels 13", "data.py stats"), (train.main, "--mean 0.5 0.5 --std 0.1", "as many numbers"),
    (train.main, "--mean 124 116 104 --std 58 57 57", "0..1"), (train.main, "--channels 0", "not in 1..1000"),
    (finetune.main, "--data {t}/thirteen --arch resnet50 --channels 13 --mean" + 13 * " .2" + " --std" + 13 * " .1", "--randaugment none")])
def test_bad_colours_are_one_line(main, options, says, bands, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        main([*options.format(t=bands).split(), "--out", str(tmp_path / "x")])
    said = capsys.readouterr().err
    assert error.value.code == 2 and says in said and len(said.splitlines()) == 1 and not (tmp_path / "x").exists()


def test_an_unreadable_test_image_of_other_channels(bands, tmp_path, capsys):
    folder = shutil.copytree(bands / "thirteen", tmp_path / "d")
    (folder / "val/a/0.npy").write_bytes(b"no array")
    np.save(folder / "train/a/0.npy", np.zeros((13, 32, 32), np.uint8))
    common = ["--data", str(folder), "--arch", "resnet_nano", "--protocol", "scratch-small", "--img-size", "32", "--workers", "0", "--batch-size", "16",
              "--epochs", "1", "--max-bad", "0.5", "--out", str(tmp_path / "f")]
    finetune.main([*common, "--mean", *["0.196"] * 13, "--std", *["0.0226"] * 13])
    assert "(15 images)" in capsys.readouterr().out
    listed = (tmp_path / "f/bad_images.txt").read_text()
    assert "val/a/0.npy" in listed and "train/a/0.npy is no readable image (an array (13, 32, 32), as if channels came first" in listed


@pytest.mark.parametrize("mask", [lambda b, grid, *_: torch.zeros(b, grid, grid), lambda b, grid, *_: torch.ones(b, grid)])
def test_masks_are_looked_at(mask, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(masking.MASKS, "odd", mask)
    with pytest.raises(SystemExit) as error:
        train.main(["--mask", "odd", "--steps", "1", "--workers", "0", "--out", str(tmp_path / "x")])
    assert error.value.code == 2 and "--mask odd makes no masks (B, 4, 4)" in capsys.readouterr().err and not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------ sweep.py

def test_sweep_goes_on_and_sums_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sweep.TABLES, "cifar10", ("cifar10", ["scratch", "a2mim", "frequency-per-image"], {"resnet_nano": 1}, 1, 16, ["class"]))
    folder = write_images(tmp_path / "d", [f"{split}/{c}/{i}.png" for split in ("train", "val") for c in "ab" for i in range(48)], (32, 32))
    argv = ["cifar10", "--data", folder, "--out", str(tmp_path / "s"), "--jobs", "2", "--seeds", "2"]
    few = sweep.commands
    monkeypatch.setattr(sweep, "commands", lambda *args: ((name, [*command, "--batch-size", "16"]) for name, command in few(*args)))
    sweep.main(argv)
    assert "5 runs to do" in (first := capsys.readouterr().out)             # two rows of two seeds, one of one
    lost = tmp_path / "s/cifar10/resnet_nano/a2mim/seed1/class/result.json"
    pretrained = lost.parents[1] / "pretrain/last.pt"
    before, stamp = json.loads(lost.read_text()), pretrained.stat().st_mtime_ns
    lost.unlink()
    sweep.main(argv)                                                        # as if it had been killed there
    assert "1 runs to do" in (second := capsys.readouterr().out) and pretrained.stat().st_mtime_ns == stamp
    assert json.loads(lost.read_text())["top1"] == before["top1"]
    values = [json.loads((tmp_path / f"s/cifar10/resnet_nano/scratch/seed{seed}/class/result.json").read_text())["top1"] for seed in (0, 1)]
    mean, spread = sum(values) / 2, abs(values[0] - values[1]) / 2 ** 0.5
    row = next(line for line in second.splitlines() if line.startswith("| from scratch"))
    assert f"| {mean:.2f} ± {spread:.2f} | 2 |" in row and row in first
    config = json.loads((tmp_path / "s/cifar10/resnet_nano/a2mim/seed1/class/result.json").read_text())["config"]
    assert config["seed"] == 1 and config["labels"] == 16 and config["init"].endswith("a2mim/seed1/pretrain/last.pt")
    with pytest.raises(SystemExit) as error:
        sweep.main(["cifar11"])
    assert error.value.code == 2 and "choose from" in capsys.readouterr().err
    monkeypatch.undo()
    args = sweep.argparse.Namespace(out="o", data=None, seeds=1, jobs=1, scale=1)
    configs = [train.resolve(train.parse(command[1:])) for run in sweep.plan(args, "cifar10") for name, command in sweep.commands(args, *run) if name == "pretrain"]
    assert len(configs) == 2 * 9 and {(c["arch"], c["fill"], c["token"], c["mask_layer"], c["frequency_loss"]) for c in configs} >= {
        ("vit_nano", "mean", "add", 2, "focal"), ("resnet_nano", "mean", "add", 3, "focal_per_image"), ("vit_nano", "zero", "add", 0, "focal"),
        ("resnet_nano", "none", "replace", 0, None), ("resnet_nano", "mean", "none", 3, "focal"), ("vit_nano", "none", "add", 0, "focal")}


def test_sweep_says_which_run_failed(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        sweep.main(["cifar10", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "s")])
    said = capsys.readouterr().err
    assert error.value.code == 2 and "exit code 2: see" in said and "goes on from there" in said


def test_readme_tables_are_the_results(capsys):
    """Those of README.md are what `sweep.py --show` makes of the files in results/."""
    for table in sweep.TABLES:
        sweep.show(str(HERE / "results"), table)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 12 and "–" not in lines[2]
    text = (HERE / "README.md").read_text()
    assert [line for line in lines if line not in text] == []


# ------------------------------------------------------------------------------------------------ README.md

def readme_commands(script):
    blocks = [block.replace("\\\n", " ") for block in readme_blocks("sh") if "convmixer" not in block]        # which has a test of its own
    return [c.split(script, 1)[1].split("#")[0].strip() for b in blocks for c in re.split(r"\n|&&", b)
            if re.match(r"\s*(python|torchrun) .*\b" + re.escape(script), c)]


def test_readme_commands_are_valid_and_published():
    commands = readme_commands("train.py")
    assert len(commands) >= 8
    for command in commands:
        argv = shlex.split(command)
        config = config_of(*argv)
        if "imagenet" in config["data"]:                                    # every ImageNet command is a published recipe
            arch, recipe100 = config["arch"], "imagenet100" in argv
            expected = COMMON | (TABLE100 if recipe100 else TABLE)[arch] | dict(arch=arch, method=config["method"], data=config["data"])
            if arch == "resnet50" and not recipe100:
                expected["epochs"] = config["epochs"]
                assert config["epochs"] in (100, 300)
            if config["method"] == "simmim":
                expected |= SIMMIM_ROW | dict(lr=8e-4 if "resnet" in arch else 4e-4)
            assert config == expected, command


def test_readme_finetune_commands_are_protocols(monkeypatch):
    """Every command parses; --init is a run that an earlier command makes; those of the table are as published."""
    text = (HERE / "README.md").read_text()
    prefix = re.search(r"command, `torchrun .* finetune\.py (.*)` and", text)[1]
    table = [cell for row in re.findall(r"^\|.*\|$", text, re.M) for cell in re.findall(r"\| `(--(?:init|arch) [^`]*)` \|", row)]
    assert len(readme_commands("finetune.py")) >= 6 and len(table) == 14
    rows = AS_PUBLISHED | {(a, "scratch-rsb_a2"): r for (a, p), r in AS_PUBLISHED.items() if p == "rsb_a2"}
    rows |= {("vit_b", "scratch-deit"): dict(epochs=300, batch_size=1024, lr=1e-3, layer_decay=None, mixup=0.8, cutmix=1.0, repeated_augmentation=3)}

    def as_if_trained(path):                                                # what last.pt of such a run says of itself
        arch = re.match(r"runs/((?:vit|deit)_[a-z]+|resnet\w+)-", path)[1]
        nano = re.search(r"-(shapes|cifar10)\b", path) and train.RECIPES[arch]["img_size"]
        return {"identity": dict(arch=arch, img_size=nano or 224)}

    monkeypatch.setattr(weights, "read", as_if_trained)
    for command in [*readme_commands("finetune.py"), *(f"{prefix} {more}" for more in table)]:
        config = protocol_of(*shlex.split(command))
        if "imagenet" in config["data"]:
            published = (AS_PUBLISHED100 if "imagenet100" in config["data"] else rows)[config["arch"], config["protocol"]]
            assert published.items() <= config.items(), command


def test_readme_commands_of_packs_bench_and_analyses(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "path" / "to" / "imagenet", [f"{split}/a/{i}.png" for split in ("train", "val") for i in range(3)])
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "path" / "to" / "photos", [f"{i}.png" for i in range(40)])
    packs, benches = readme_commands("data.py"), readme_commands("bench.py")
    assert len(packs) >= 3 and len(benches) >= 5
    for command in packs:
        data.main(shlex.split(command))
        assert re.search("6 images|--channels [13] --mean", capsys.readouterr().out), command
    assert {table for command in benches for table in bench.parse(shlex.split(command)).tables} == set(bench.TABLES)
    assert len([analyze.parse(shlex.split(command)) for command in readme_commands("analyze.py")]) >= 2


def test_readme_code_runs(tmp_path, monkeypatch):
    """The Python blocks, as printed, where the files they read exist."""
    blocks = [block for block in readme_blocks("python") if not block.startswith("# at the end of")]
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    train.main(["--steps", "3", "--workers", "0"])
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save("photo.jpg")
    torch.save({"model": models.build("vit_b").state_dict()}, "checkpoint.pth")
    torch.save(weights.export({"model": models.build("resnet50").state_dict()}, "torchvision")[0], "resnet50.pth")
    for block in blocks:
        names = {}
        with torch.no_grad():
            exec(block, names)
        assert "reconstruction" not in names or names["feature"].shape == (2, 768, 14, 14)
        assert "vector" not in names or names["vector"].shape == (1, 96) and os.path.exists("photo-painted.png")
    assert os.path.exists("curve.png")


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="ten minutes: SLOW=1")
def test_readme_commands_run(tmp_path):
    """Every command of the page, in its order, in a copy of the project: with stand-ins for the data that it names, for a few steps or images."""
    here = tmp_path / "project"
    copy_of_the_project(here)
    shutil.copytree(HERE / "results", here / "results")
    with open(here / "sources.py", "a") as file:
        file.write("SOURCES['cifar10'] = lambda split, size: Shapes(32, split, 6000 if split == 'train' else 100)\n")
    for name in ("imagenet", "imagenet100"):
        write_images(here / "path/to" / name, [f"{split}/{c}/{i}.jpg" for split in ("train", "val") for c in "ab" for i in range(12)], (64, 64))
    write_images(here / "path/to/photos", [f"{i}.jpg" for i in range(80)], (64, 64))
    write_images(here / "path/to/images", [f"{c}/{i}.jpg" for c in "ab" for i in range(40)], (64, 64))
    done, text = [], (HERE / "README.md").read_text()
    prefix = re.search(r"command, `(torchrun .* finetune\.py .*)` and", text)[1]             # of the table of official results
    rows = [f"{prefix} {cell}" for cell in re.findall(r"\| `(--(?:init|arch) [^`]*)` \|", text)]
    for line in itertools.chain(*(block.replace("\\\n", " ").splitlines() for block in readme_blocks("sh")), rows):
        words = shlex.split(line, comments=True)
        script = next((word for word in words if word.endswith(".py") and re.match("python|torchrun", line)), None)
        if script is None or "convmixer" in line or "HOST" in line or script == "bench.py" or script == "sweep.py" and "--show" not in words:
            continue                                                        # of which others have tests of their own, or need a cluster
        for named, path in (("SUPERVISED", "vit_nano-scratch-small-shapes"), ("SIMMIM", "vit_nano-a2mim-shapes"), ("A2MIM", "vit_nano-a2mim-shapes-small-shapes")):
            words = [f"runs/{path}/last.pt" if word == named else word for word in words]
        large = "imagenet" in line or "vit_b" in line
        few = {"train.py": ["--steps", "2", "--workers", "0", "--batch-size", "4" if large else "32"] + large * ["--micro-batch", "1"],
               "finetune.py": ["--workers", "0"] + ([] if {"knn", "--eval"} & set(words) else ["--steps", "2", "--batch-size", "4", "--micro-batch", "1"] if large
                                                    else ["--epochs", "1", "--batch-size", "1024"]),
               "analyze.py": ["--images", "8", "--contexts", "1", "--pairs", "1", "--probe-images", "32", "--workers", "0"]}.get(script, [])
        start = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        if "--overwrite" not in words and script in ("train.py", "finetune.py", "analyze.py"):
            few.append("--overwrite")                                       # the same run with another number of steps
        run = subprocess.run([*start, *words[words.index(script):], *few], cwd=here, capture_output=True, text=True, timeout=600)
        print(f"{run.returncode}  {line.split('#')[0].strip()}", flush=True)
        assert run.returncode == 0, (line, run.stderr[-800:])
        done.append(line)
    assert len(done) > 54


@pytest.mark.parametrize("main,words", [(train.main, ["--micro-batch", "recipe"]), (finetune.main, ["--protocol", "--freeze", "--k", "LAMB"]),
                                        (weights.main, ["show", "export"]), (data.main, ["pack", "stats"]), (sweep.main, ["--jobs", "--scale", "TABLE"]), (bench.main, ["loader", "--runs", "--json"]), (analyze.main, ["attention", "--pairs", "CHECKPOINT"])])
def test_help_teaches(main, words, capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and all(word in text for word in words) and len(text.splitlines()) > 10
