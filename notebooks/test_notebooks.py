"""The notebooks run, are what their scripts make, and their exercises name the mistakes."""
import importlib
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "notebooks")]

jupytext = pytest.importorskip("jupytext")
pytest.importorskip("nbclient")

import analyze
import build
import checks
import losses
import masking
import model as models
from extras import sweep

NOTEBOOKS = sorted((HERE / "notebooks").glob("[0-9]_*.py"))


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_as_scripts(script, tmp_path):
    environment = dict(os.environ, QUICK="1", MPLBACKEND="Agg", OMP_NUM_THREADS="1",
                       PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())                 # nothing is left behind


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_what_their_scripts_make(script):
    path = script.with_suffix(".ipynb")
    assert path.stat().st_size < 1.5e6
    notebook = jupytext.read(path)
    source = jupytext.read(script)
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in source.cells]
    # else: python notebooks/build.py
    assert notebook.metadata["nanoa2mim"]["code"] == build.code_hash()
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        assert not any(output.output_type == "error" for output in outputs), cell.source
        assert not any("Traceback" in output.get("text", "") for output in outputs), cell.source


def test_a_notebook_without_the_repository_says_so(tmp_path):
    first = jupytext.read(NOTEBOOKS[0]).cells
    first = next(cell.source for cell in first if cell.cell_type == "code")
    with pytest.raises(FileNotFoundError, match="clone the repository"):
        exec(first, {"__file__": str(tmp_path / "notebook.py")})


# ---- the exercises of 1_method

def mutated(function, old, new, times=1):
    """A copy of a function of the repository with one thing changed."""
    text = inspect.getsource(function)
    assert text.count(old) >= 1, old
    names = dict(vars(inspect.getmodule(function)))
    exec(text.replace(old, new, times), names)
    return names[function.__name__]


def shuffle(z, s):
    """PixelShuffle, the end of our decoder, without it."""
    B, C, h, w = z.shape
    blocks = z.view(B, C // s ** 2, s, s, h, w)
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(B, C // s ** 2, h * s, w * s)


def shuffle_wh(z, s):
    """h and w exchanged."""
    B, C, h, w = z.shape
    blocks = z.view(B, C // s ** 2, s, s, h, w)
    return blocks.permute(0, 1, 5, 2, 4, 3).reshape(B, C // s ** 2, w * s, h * s)


def with_token(Token):
    def mask_token(z, mask, t, gamma):
        layer = Token(len(t), gamma=0.0)
        return torch.func.functional_call(layer, dict(token=t, gamma=gamma), (z, mask))
    return mask_token


our_token = with_token(models.MaskToken)


@torch.no_grad()
def token_without_gradient(z, mask, t, gamma):
    return our_token(z, mask, t, gamma)


def spectra(prediction, target):
    D = torch.fft.fft2(prediction, norm="ortho") - torch.fft.fft2(target, norm="ortho")
    return D.mean(0)


def bernoulli(batch, grid, ratio, generator):
    return (torch.rand(batch, grid, grid, generator=generator) < ratio).float()


def masked_by(count):
    """A mask of count(ratio · grid²) blocks."""
    def mask(batch, grid, ratio, generator):
        score = torch.rand(batch, grid * grid, generator=generator)
        rank = score.argsort(1).argsort(1)
        return (rank < count(ratio * grid * grid)).float().view(batch, grid, grid)
    return mask


def in_a_row(batch, grid, ratio, generator):
    count = math.ceil(round(ratio * grid * grid, 6))
    start = torch.randint(grid * grid, (batch, 1), generator=generator)
    place = (torch.arange(grid * grid) - start) % (grid * grid)
    return (place < count).float().view(batch, grid, grid)


def same_every_time(batch, grid, ratio, generator):
    fixed = [torch.Generator().manual_seed(i) for i in range(batch)]
    return masking.random_mask(batch, grid, ratio, fixed)


def M_of(mask, like):
    return masking.resize(mask, like.shape[-2:])


def visible_mean(image, mask):
    M = M_of(mask, image)
    mean = (image * (1 - M)).sum((2, 3), keepdim=True) / (1 - M).sum((2, 3), keepdim=True)
    return image * (1 - M) + mean * M


def whole_loss(D, w=None, over=None):
    power = D.abs() ** 2
    if w is None:
        w = power.detach().sqrt().log1p()
    return (w / (w.amax(over, keepdim=True) if over else w.max()) * power).mean()


def fft(d):
    return torch.fft.fft2(d, norm="ortho")


def columns(g):
    """(C,) for maps (B, C, h, w)."""
    return g.view(-1, 1, 1)


def mean_over(*dims):
    return lambda x, m: torch.where(M_of(m, x) > 0, x.mean(dims, keepdim=True), x)


# exercise: (the repository's function, a mutated copy, [(wrong answer, words on the mistake)])
EXERCISES = {
    "random_mask": (masking.random_mask,
                    mutated(masking.random_mask, "ceil(round", "floor(round"), [
        (bernoulli, "changes from image to image"),
        (masked_by(int), "is 0.5625, not ⌈0.6·n²⌉/n² = 0.625 .*: it is rounded down, not up"),
        (masked_by(round), "rounded to the nearest"),
        (masked_by(lambda n: int(n + 0.5)), "rounded to the nearest"),
        (masked_by(lambda n: int(n) + 1), "⌈8⌉ is not 8 . 1"),
        (lambda *a: 1 - masking.random_mask(*a), "is 0.375, .*: 1 is masked, 0 visible"),
        (mutated(masking.random_mask, "round(ratio * n, 6)", "ratio * n"),
         "is 0.08, .*0.07 · 100 is 7.000000000000001"),
        (lambda b, n, r, g: masking.random_mask(b, n, r), "the same seed gives another mask"),
        (lambda b, n, r, g: masking.random_mask(1, n, r, g).repeat(b, 1, 1), "have the same mask"),
        (same_every_time, "another seed gives the same mask"),
        (in_a_row, "one pair of blocks is masked together in"),
        (lambda b, n, r, g: masking.random_mask(b, n, r, g).flatten(1), "its shape is")]),
    "fill": (masking.fill, mutated(masking.fill, "FILLS[how]", "FILLS['zero']"), [
        (visible_mean, "the mean is over the masked image's visible pixels, ours over all pixels"),
        (mean_over(0, 2, 3), "over the batch"),
        (mean_over(1, 2, 3), "over the channels"),
        (lambda x, m: x * (1 - M_of(m, x)), "masked pixels are 0"),
        (lambda x, m: masking.fill(x, 1 - m), "1 is masked"),
        (lambda x, m: masking.fill(2 * x, m), "visible pixels were changed"),
        (lambda x, m: x.mul_(1 - M_of(m, x)), "the image itself was changed"),
        (lambda x, m: masking.fill(x, m.mT), "resize M first, rows before columns"),
        (lambda x, m: torch.where(masking.resize(m, x.shape[:1:-1]) > 0, 0, x), "rows before"),
        (lambda x, m: masking.fill(x.detach(), m), "the gradient of the image is not"),
        (lambda x, m: torch.where(m > 0, 0, x), "it raises RuntimeError.*resize M first")]),
    "mask_token": (our_token,
                   with_token(mutated(models.MaskToken, "gamma * z * M", "gamma * z")), [
        (lambda z, m, t, g: z + columns(t) * M_of(m, z), "γ is missing"),
        (lambda z, m, t, g: z * (1 - M_of(m, z)) + columns(t) * M_of(m, z), "γ·z·M is missing"),
        (lambda z, m, t, g: z * (1 - M_of(m, z)) + columns(g) * z * M_of(m, z) + columns(t),
         "t was added everywhere"),
        (lambda z, m, t, g: our_token(z, 1 - m, t, g), "1 is masked"),
        (lambda z, m, t, g: our_token(z, m, g, t), "t and γ are exchanged"),
        (lambda z, m, t, g: our_token(z, m, t.detach(), g), "the gradient of t is not"),
        (lambda z, m, t, g: our_token(z, m, t, g.detach()), "the gradient of γ is not"),
        (lambda z, m, t, g: our_token(z.detach(), m, t, g), "the gradient of z is not"),
        (token_without_gradient, "the gradient of t is not"),
        (lambda z, m, t, g: z + columns(t) * masking.resize(m, z.shape[:1:-1]), "resize M first"),
        (lambda z, m, t, g: z + t * M_of(m, z), r"RuntimeError.*\[:, None, None\]")]),
    "rearrange": (shuffle, lambda z, s: shuffle(z, s).flip(1), [
        (lambda z, s: z.reshape(2, 3, 6, 10), "a plain reshape"),
        (lambda z, s: shuffle(z.unflatten(1, (3, s, s)).transpose(2, 3).flatten(1, 3), s),
         "rows and columns are swapped"),
        (lambda z, s: shuffle(z.unflatten(1, (s * s, 3)).transpose(1, 2).flatten(1, 2), s),
         "colours are mixed up"),
        (shuffle_wh, "h and w are exchanged"),
        (lambda z, s: shuffle_wh(z, s).view_as(shuffle(z, s)), "h and w are exchanged"),
        (torch.nn.functional.pixel_shuffle, "by pixel_shuffle itself"),
        (lambda z, s: torch.nn.PixelShuffle(s)(z), "by pixel_shuffle itself"),
        (lambda z, s: shuffle(z, 2), "right for s = 2, not for s = 3"),
        (lambda z, s: shuffle(z.detach(), s), "the gradient of z is not")]),
    "frequency_two": (checks.two_transforms,
                      mutated(losses.focal_frequency, "c * w * power", "w * power"), [
        (lambda p, x: (spectra(p, x).abs() ** 2).mean(), "w is missing"),
        (lambda p, x: whole_loss(torch.fft.fft2(p, norm="ortho") - torch.fft.fft2(x, norm="ortho")),
         "spectra of the batch were not averaged"),
        (lambda p, x: whole_loss(torch.fft.fft2((p - x).mean(0))), "orthonormal"),
        (lambda p, x: whole_loss((torch.fft.fft2(p, norm="ortho").abs()
                                  - torch.fft.fft2(x, norm="ortho").abs()).mean(0)), "the phases"),
        (lambda p, x: whole_loss(spectra(p, x), spectra(p, x).abs().log1p()), "detach"),
        (lambda p, x: whole_loss(torch.fft.rfft2((p - x).mean(0), norm="ortho")), "stand for two"),
        (lambda p, x: whole_loss(fft((p - x).mean(0)), over=(1, 2)), "the maximum of each channel"),
        (lambda p, x: whole_loss(fft(p - x), over=(2, 3)), "not averaged.*; .*of each channel"),
        (lambda p, x: whole_loss(fft((p - x).mean(0)), over=(1, 2)) * 192, "each channel.*the sum"),
        (lambda p, x: whole_loss(fft(p - x).abs(), fft(p - x).abs(), (1, 2, 3)),
         r"not averaged.*; w is \|D\|, .*; .*of each image"),
        (lambda p, x: whole_loss(fft((p - x).sum(0))), "summed over the batch"),
        (lambda p, x: whole_loss(fft(p - x).abs().square().mean(0).sqrt()), "power was averaged"),
        (lambda p, x: whole_loss(fft((p - x).abs().mean(0))), "before F"),
        (lambda p, x: whole_loss(fft((p - x).mean(0).abs())), "before F, of the mean"),
        (lambda p, x: whole_loss(fft((p - x).mean(0)), fft((p - x).mean(0)).abs()), "w is .D.,"),
        (lambda p, x: whole_loss(fft((p - x).mean(0)).abs().sqrt(),
                                 fft((p - x).mean(0)).abs().log1p()), "not squared"),
        (lambda p, x: checks.two_transforms(p, x).detach(), "has no gradient")]),
    "frequency_one": (losses.frequency_loss,
                      mutated(losses.frequency_loss, "pred - target", "pred + target"), [
        (checks.two_transforms, "with 2 transforms"),
        (lambda p, x: whole_loss(torch.fft.fft2((p - x).mean(0), norm="ortho"),
                                 torch.ones(3, 8, 8)), "w is missing"),
        (lambda p, x: whole_loss(torch.fft.fft2((p - x).mean(0), norm="ortho")) * 192, "the sum")]),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_exercises_of_notebook_1_name_the_mistake(name, capsys):
    right, mutant, mistakes = EXERCISES[name]
    checks.check(name, right)
    said = capsys.readouterr().out
    assert re.fullmatch(rf"{name}: right\. Ours: \w+\.py, line \d+, \d+ lines\n", said), said
    checks.check(name, mutant)
    assert "right." not in capsys.readouterr().out
    for wrong, words in mistakes:
        checks.check(name, wrong)
        said = capsys.readouterr().out
        assert re.search(words, said) and said.count("\n") == 1, said


@pytest.mark.parametrize("name", EXERCISES)
def test_unfinished_exercises_say_so(name, capsys):
    def stub(*inputs):
        ...

    def broken(*inputs):
        return torch.zeros(2)[5]

    checks.check(name, stub)
    assert capsys.readouterr().out == f"{name}: not written yet: replace the dots\n"
    checks.check(name, broken)
    assert "it raises IndexError" in capsys.readouterr().out


def test_a_transform_of_the_whole_batch_is_right_too(capsys):
    checks.check("frequency_one", lambda p, x: whole_loss(fft(p - x).mean(0)))
    said = capsys.readouterr().out
    assert "right; the mean over the batch can come before F, too. Ours: losses.py" in said


def test_source_shows_file_and_line(capsys):
    checks.source(models.A2MIM.encode)
    said = capsys.readouterr().out
    assert re.match(r"# model\.py, line \d+\ndef encode\(self, image, mask\):\n    ", said), said


# ---- the exercises of 2_what_it_learned and 3_is_it_worth_it

def asked(name, answer, capsys):
    """What check says of an answer; nothing may be raised."""
    checks.check(name, answer)
    return capsys.readouterr().out


def measure(place, measures=analyze.attention_measures):
    """attention_measures as an answer of one exercise."""
    if place == 0:
        return lambda p, patch: measures(p.log(), patch)[0]
    return lambda log_p: measures(log_p, 1)[place]


def cka_by(gram=analyze.centred_gram, cka_of=analyze.cka_of):
    def cka(x, y):
        K = torch.stack([gram(x), gram(y)])
        return cka_of(K @ K.T)[0, 1]
    return cka


def gain_by(gain=sweep.gain):
    def interval(ours, theirs):
        results = {}
        for arm, numbers in dict(a=ours, b=theirs).items():
            results |= {f"{arm}/mask-64/seed{i}": dict(miou=v) for i, v in enumerate(numbers)}
        return gain(results, "a", "b", "mask-64", "miou")
    return interval


def differences_by(gain=sweep.gain):
    return lambda d: gain_by(gain)(d, [0.0] * len(d))[2]


class Plain(models.Encoder):
    """Two convolutions: a right answer, from which wrong ones differ in one thing."""
    wide, shrink = [8, 8, 16], [4, 4, 8]

    def __init__(self, img_size, *, channels=3):
        super().__init__()
        self.img_size = img_size
        self.widths = self.wide
        self.strides = self.shrink
        self.stem = torch.nn.Conv2d(channels, 8, 4, 4)
        self.layers = torch.nn.ModuleList([
            torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 16, 3, 2, 1)])


class Unseen(Plain):
    def __init__(self, img_size):
        super().__init__(img_size)
        layers = list(self.layers)
        del self.layers
        self.layers = layers


def changed(**attributes):
    return type("", (Plain,), attributes)


def vit(img_size):
    return models.build("vit_nano", img_size).encoder


def square_mask(batch, grid, ratio, generators):
    blocks = re.search(r"def square_mask.*?return mask\n", (HERE / "README.md").read_text(), re.S)
    names = dict(torch=torch)
    exec(blocks[0], names)
    return names["square_mask"](batch, grid, ratio, generators)


def checkerboard(batch, grid, ratio, generators):
    board = torch.arange(grid)[:, None] + torch.arange(grid)
    first = [torch.randint(2, (), generator=generator) for generator in generators]
    return torch.stack([(board + one) % 2 for one in first]).float()


RIGHT = [
    ("attention_distance", measure(0)), ("head_divergence", measure(2)), ("cka", cka_by()),
    ("cka", lambda x, y: cka_by()(x, y).item()),
    ("drop_patches", lambda image, mask: masking.fill(image, mask, "zero")),
    ("paired_interval", lambda a, b: gain_by()(a, b)[:2]),
    ("smallest_difference", differences_by()),
    ("own_mask", masking.random_mask), ("own_mask", square_mask), ("own_mask", checkerboard),
    ("own_encoder", models.ResNet), ("own_encoder", Plain), ("own_encoder", vit)]


@pytest.mark.parametrize("name, answer", RIGHT)
def test_exercises_accept_the_repositorys_own_functions(name, answer, capsys):
    assert f"{name}: right. Ours: " in asked(name, answer, capsys)


def test_the_exercises_accept_the_readmes_encoder(capsys):
    block = re.search(r"class ConvMixer.*?\n\n\n", (HERE / "README.md").read_text(), re.S)
    names = dict(vars(models))
    exec(block[0], names)
    assert "right" in asked("own_encoder", names["ConvMixer"], capsys)


def test_exercises_refuse_mutated_copies(capsys):
    measures = analyze.attention_measures
    attended = mutated(measures, "patch * torch.cdist", "torch.cdist")
    crossed = mutated(measures, "- entropy[:, :, None]", "")
    gram = mutated(analyze.centred_gram, "/ (n - 2)", "/ n")
    similar = mutated(analyze.cka_of, ".sqrt()", "")
    unfilled = mutated(masking.fill, "> 0 ", "== 0 ")
    gain = mutated(sweep.gain, "ddof=1", "ddof=0")
    least = mutated(sweep.gain, "(t + t_power)", "t_power")
    mask = mutated(masking.random_mask, "generator=generator[i]", "")
    stage = mutated(models.ResNet, "2 * s, 4 * s", "4 * s, 4 * s")
    for name, answer in [
            ("attention_distance", measure(0, attended)), ("head_divergence", measure(2, crossed)),
            ("cka", cka_by(gram)), ("cka", cka_by(cka_of=similar)),
            ("drop_patches", lambda image, mask: unfilled(image, mask, "zero")),
            ("paired_interval", lambda a, b: gain_by(gain)(a, b)[:2]),
            ("smallest_difference", differences_by(least)), ("own_mask", mask)]:
        said = asked(name, answer, capsys)
        assert "right" not in said and said.startswith(f"{name}: "), (name, said)
    names = dict(vars(models))
    exec(inspect.getsource(models.ResNet).replace("2 * s, 4 * s", "4 * s, 4 * s"), names)
    assert "strides[2]" in asked("own_encoder", names["ResNet"], capsys)


def in_place(image, mask):
    image *= 1 - masking.resize(mask, image.shape[-2:])
    return image


def naive_gram(centre):
    def gram(x):
        x = x - x.mean(0) if centre else x
        return (x @ x.T).flatten()
    return gram


def distance_of(order=2, patch=None, reduce=True):
    def distance(p, side):
        place = torch.cartesian_prod(*[torch.arange(3).double()] * 2) * (patch or side)
        far = (p * torch.cdist(place, place, p=order)).sum(-1)
        return far.mean(-1) if reduce else far
    return distance


def t_half(a, b, t=2.776, ddof=1, root=5 ** 0.5):
    d = np.array(a) - np.array(b)
    return d.mean(), t * d.std(ddof=ddof) / root


def ends(a, b):
    mean, half = t_half(a, b)
    return mean - half, mean + half


def unpaired(a, b):
    return t_half(a, b)[0], 2.776 * math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 5)


def kl_between(p_first):
    def divergence(log_p):
        kl = torch.stack([(log_p.exp() * (log_p - log_p[:, [g]])).sum(-1).mean(-1)
                          for g in range(log_p.shape[1])], 2)
        return kl.mean(2) if p_first else kl.sum(1) / (log_p.shape[1] - 1)
    return divergence


WRONG = [  # exercise, answer, words that name the mistake
    ("attention_distance", distance_of(patch=1), "in patches"),
    ("attention_distance", distance_of(order=1), "straight line"),
    ("attention_distance", distance_of(reduce=False), "mean over queries"),
    ("attention_distance", lambda p, patch: distance_of()(torch.full_like(p, 1 / 9), patch),
     "weigh the distance"),
    ("attention_distance", lambda p, patch: distance_of()(p, patch) / 9, "number of keys"),
    ("attention_distance", lambda p, patch: distance_of()(p, patch).mean(), "shape is ()"),
    ("head_divergence", kl_between(True), "divide by heads − 1"),
    ("head_divergence", kl_between(False), "other way round"),
    ("head_divergence", lambda log_p: measure(1)(log_p) + measure(2)(log_p), "cross entropy"),
    ("head_divergence", lambda log_p: 9 * measure(2)(log_p), "sums over queries"),
    ("cka", cka_by(naive_gram(False)), "not centred"),
    ("cka", cka_by(naive_gram(True)), "biased"),
    ("cka", lambda x, y: analyze.centred_gram(x) @ analyze.centred_gram(y), "without a scale"),
    ("cka", lambda x, y: (x.mean(), y.mean()), "not a tensor"),
    ("drop_patches", lambda image, mask: masking.fill(image, 1 - mask, "zero"), "1 is dropped"),
    ("drop_patches", masking.fill, "own mean"),
    ("drop_patches", lambda image, mask: masking.fill(image, mask.mT, "zero"), "exchanged"),
    ("drop_patches", in_place, "changes the images"),
    ("paired_interval", unpaired, "unpaired"),
    ("paired_interval", lambda a, b: t_half(a, b, ddof=0), "n − 1"),
    ("paired_interval", lambda a, b: t_half(a, b, root=1), "s / √n"),
    ("paired_interval", lambda a, b: t_half(a, b, t=1.96), "1.96 is for many seeds"),
    ("paired_interval", lambda a, b: t_half(a, b, t=sweep.STUDENT[5][0]), "degrees of freedom"),
    ("paired_interval", lambda b, a: t_half(a, b), "sign"),
    ("paired_interval", lambda a, b: np.array(ends(a, b)), "two numbers"),
    ("paired_interval", lambda a, b: ends(a, b), "ends"),
    ("smallest_difference", lambda d: t_half(d, np.zeros(5))[1], "80 % quantile"),
    ("smallest_difference", lambda d: (2.776 + 0.941) * np.std(d, ddof=1), "√n"),
    ("smallest_difference", lambda d: 2.8 * np.std(d, ddof=1) / 5 ** 0.5, "many seeds"),
    ("smallest_difference", lambda d: (2.776 + 0.941) * np.std(d) / 5 ** 0.5, "n − 1"),
    ("own_mask", lambda b, n, r, g: masking.random_mask(1, n, r, g[:1])[0],
     "each image has its own"),
    ("own_mask", lambda b, n, r, g: masking.random_mask(b, n, r, g)[:, None], "without channels"),
    ("own_mask", lambda b, n, r, g: torch.ones(b, n, n), "no visible block"),
    ("own_mask", lambda b, n, r, g: torch.zeros(b, n, n), "no masked block"),
    ("own_mask", lambda b, n, r, g: 2 * masking.random_mask(b, n, r, g) - 1,
     "1 is masked, 0 is visible"),
    ("own_mask", lambda b, n, r, g: masking.random_mask(b, n, r), "same generators"),
    ("own_encoder", changed(wide=[8, 16]), "needs one for what enters"),
    ("own_encoder", changed(wide=[8, 16, 16]), "has 8 channels"),
    ("own_encoder", changed(shrink=[4, 4, 4]), "what leaves the last"),
    ("own_encoder", Unseen, "nn.ModuleList"),
    ("own_encoder", lambda size: torch.nn.ModuleDict(dict(stem=Plain(size))), "no model.Encoder"),
    ("own_encoder", lambda: None, "it raises TypeError"),
]


@pytest.mark.parametrize("name, answer, words", WRONG)
def test_exercises_name_the_mistake(name, answer, words, capsys):
    said = asked(name, answer, capsys)
    assert words in said and said.startswith(f"{name}: "), said


@pytest.mark.parametrize("script", ["2_what_it_learned", "3_is_it_worth_it"])
def test_unfinished_exercises_of_notebooks_2_and_3_say_so(script, capsys):
    text = (HERE / f"notebooks/{script}.py").read_text()
    stub = r"# %%\n((?:def|class) [^%]*?# your turn\n)\n\ncheck\(\"(\w+)\", (\w+)\)"
    stubs = re.findall(stub, text, re.S)
    assert len(stubs) == text.count("# your turn") == 4
    for stub, name, answer in stubs:
        names = dict(models=models)
        exec(stub, names)
        assert asked(name, names[answer], capsys) == f"{name}: not written yet: replace the dots\n"
