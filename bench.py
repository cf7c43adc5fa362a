"""How fast, against what, and how far from the limit.

  python bench.py                                     all three tables
  python bench.py loader --data path/to/photos x.tar  from disk to batch; the usual PIL pipeline
  python bench.py loss                                our frequency loss; two FFTs of every image
  python bench.py step --arch vit_b resnet50          a step; the fastest matrix product

What is compared runs in turn, again and again. Every figure is a median over --runs; a ratio is the
median of the ratios run by run. Use an idle machine, and believe the ratios more than the times.
"""
import os
import shutil
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import data
import finetune
import losses
import masking
import model as models
import optim
import recipes
import runtime
import shapes

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def in_turn(runs, works):
    """{name: (function, *arguments)} → {name: (seconds, times faster than the first)}, medians."""
    times = {name: [] for name in works}
    for run in range(1 + runs):     # one to warm up
        for name, (function, *arguments) in works.items():
            began = time.perf_counter()
            function(*arguments)
            if CUDA:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    times = {name: np.array(seconds[1:]) for name, seconds in times.items()}
    first = next(iter(times.values()))
    return {name: (np.median(t), np.median(first / t)) for name, t in times.items()}


# ---- from disk to batch

class PILViews(torch.utils.data.Dataset):
    """The usual pipeline: PIL decodes, crops and resizes; floats are normalised in the worker."""

    def __init__(self, source, size, scale, interpolation):
        self.source = source
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(size, scale, interpolation=interpolation),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(data.MEAN, data.STD)])

    def __getitem__(self, sample):
        return self.transform(Image.open(self.source.where(sample[2])).convert("RGB"))


def write_photos(folder):
    """For want of photographs, 300 built-in images of 500 px: a folder of JPEGs, and a tar."""
    photos = os.path.join(folder, "photos")
    os.mkdir(photos)
    world = shapes.Shapes(500, count=300)
    for i in range(300):
        image = transforms.functional.to_pil_image(world[i][0])
        image.save(os.path.join(photos, f"{i:03}.jpg"), quality=95)
    return [photos, shutil.make_archive(photos, "tar", photos)]


def load(views, batch, steps):
    batches = data.Batches(len(views.source), batch, batch, 0, steps)
    for loaded in data.loader(views, batches, workers=0):
        pass


def bench_loader(args):
    """images a second on one core: decoding, crop (and ours: mask), batching"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print("crop           px  images/s   × PIL  from")
    with tempfile.TemporaryDirectory() as temporary:
        paths = args.data or write_photos(temporary)
        folder = data.Folder(paths[0], "train")
        batch = args.batch or min(100, len(folder))
        size = 224 if min(folder[0][0].shape[-2:]) >= 224 else 32
        cfg = dict(img_size=size, mask="random", mask_size=size // 7, mask_ratio=0.6,
                   randaugment=None, random_erasing=None)
        # PIL and ours cut the same shares of the area, with the same interpolation
        for crop, ours, scale, interpolation in (
                ("pre-training", data.Crops, (0.67, 1.0), data.BILINEAR),
                ("fine-tuning", finetune.TrainViews, (0.08, 1.0), data.BICUBIC)):
            cfg["crop_scale"] = scale
            works = {"PIL": (load, PILViews(folder, size, scale, interpolation), batch, 20)}
            for path in paths:
                works[path] = (load, ours(data.Folder(path, "train"), cfg, 0), batch, 20)
            for name, (seconds, faster) in in_turn(args.runs, works).items():
                print(f"{crop:12}{size:5}{20 * batch / seconds:10.1f}{faster:8.2f}  {name}")
    torch.set_num_threads(threads)


# ---- the loss

def two_ffts(reconstruction, target, mask):
    """A²MIM's loss for a ViT as the formulas read: both images of every pair are transformed."""
    M = F.interpolate(mask[:, None], size=target.shape[-2:], mode="nearest-exact")
    spatial = ((reconstruction - target).abs() * M).sum() / (3 * (M.sum() + 1e-5))
    blend = M * reconstruction + (1 - M) * 0.5 * (reconstruction.detach() + target)
    spectrum = torch.fft.fft2(blend, norm="ortho").mean(0)
    error = spectrum - torch.fft.fft2(target, norm="ortho").mean(0)
    power = error.real ** 2 + error.imag ** 2
    w = power.detach().sqrt().log1p()
    return {"loss": spatial + 0.1 * ((w / w.max()).clamp(0, 1) * power).mean()}


def evaluate(loss, reconstruction, image, mask):
    """The loss, and its gradient with respect to the reconstruction."""
    value = loss(reconstruction, image, mask)["loss"]
    return value.detach(), torch.autograd.grad(value, reconstruction)[0]


def bench_loss(args):
    """A²MIM's for a ViT at 224 px, forward and backward; relative differences from two FFTs"""
    batch = args.batch or 32
    image = torch.randn(batch, 3, 224, 224, device=DEVICE)
    mask = masking.random_mask(batch, 7, 0.6).to(DEVICE)
    reconstruction = torch.randn_like(image).requires_grad_()
    works = {"two FFTs": (evaluate, two_ffts, reconstruction, image, mask),
             "ours": (evaluate, losses.A2MIMLoss(), reconstruction, image, mask)}
    expected = evaluate(two_ffts, reconstruction, image, mask)
    print("loss      batch       ms  times faster    value  gradient")
    for name, (seconds, faster) in in_turn(args.runs, works).items():
        pairs = zip(evaluate(*works[name][1:]), expected)
        value, gradient = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        print(f"{name:10}{batch:5}{1000 * seconds:9.2f}{faster:14.2f}{value:9.0e}{gradient:10.0e}")


# ---- the step

def take_step(model, cfg, criterion, optimizer, autocast, scaler, image, mask):
    """train.py's step, on a micro-batch."""
    image = data.normalize(image, cfg.mean, cfg.std)
    batchnorm = optim.statistics(model)
    with autocast:
        reconstruction = model(image, mask)
    loss = criterion(reconstruction, image, mask)["loss"]
    scaler.scale(loss).backward()
    optim.update(model, optimizer, scaler, cfg.clip, loss.detach(), batchnorm)


def matmul_peak(autocast, runs):
    """FLOP/s of the fastest square matrix product, in the dtype that autocast computes in."""
    works = {}
    for n in (2048, 4096, 8192) if CUDA else (1024, 2048, 4096):
        with autocast:
            square = torch.randn(n, n, device=DEVICE) @ torch.randn(n, n, device=DEVICE)
        works[n] = (torch.matmul, square, square)
    return max(2 * n ** 3 / seconds for n, (seconds, _) in in_turn(runs, works).items())


def bench_step(args):
    """training on random images; FLOPs of products, convolutions; peak of a matrix product"""
    print("arch          how       batch  images/s  × eager  TFLOP/s  of peak")
    for arch in args.arch:
        cfg = recipes.pretraining(["--arch", arch], "")[0]
        batch = args.batch or (recipes.RECIPES[arch]["micro_batch"] if CUDA else 8)
        image = torch.randint(256, (batch, 3, cfg.img_size, cfg.img_size)).byte().to(DEVICE)
        blocks = cfg.img_size // cfg.mask_size
        mask = masking.random_mask(batch, blocks, cfg.mask_ratio).to(DEVICE)

        # as in train.py; the compiled model shares its weights with the eager one
        model = models.build(arch, cfg.img_size, drop_path=cfg.drop_path or 0.0)
        model = runtime.place(model, DEVICE).train()
        criterion = losses.A2MIMLoss(cfg.spatial_loss, cfg.frequency_loss, cfg.frequency_weight,
                                     cfg.frequency_standin or "mixed", cfg.frequency_visible or 0.0)
        optimizer = optim.make_optimizer(model, cfg)
        autocast, scaler = runtime.precision("auto", DEVICE)
        rest = (cfg, criterion, optimizer, autocast, scaler, image, mask)
        works = {"eager": (take_step, model, *rest)}
        if args.compile:
            works["compiled"] = (take_step, torch.compile(model), *rest)

        # how much a step has to compute, how fast the machine could do that, how fast it does
        with FlopCounterMode(display=False) as counter:
            take_step(model, *rest)
        flops = counter.get_total_flops()
        peak = matmul_peak(autocast, args.runs)
        for how, (seconds, faster) in in_turn(args.runs, works).items():
            print(f"{arch:14}{how:10}{batch:5}{batch / seconds:10.2f}{faster:9.2f}"
                  f"{flops / seconds / 1e12:9.3g}{flops / seconds / peak:9.1%}")


def main(argv=None):
    tables = {"loader": bench_loader, "loss": bench_loss, "step": bench_step}
    parser = runtime.Parser("bench.py", description=__doc__)
    option = parser.add_argument
    option("table", nargs="?", choices=tables, help="which table (all)")
    option("--data", nargs="+", help="loader: a folder of images, then tars of it (built-in ones)")
    option("--arch", nargs="+", default=["vit_b", "resnet50"], metavar="ARCH",
           help="step: architectures, as of train.py (vit_b resnet50)")
    option("--compile", action="store_true", help="step: compiled, too")
    option("--batch", type=int, help="images (loader 100; loss 32; step 8, on a GPU the recipe's)")
    option("--runs", type=int, default=5, help="repetitions, of which medians are taken (5)")
    args = parser.parse_args(argv)
    if args.runs < 1 or (args.batch is not None and args.batch < 1):
        raise ValueError("--runs and --batch must be 1 or more")

    device = torch.cuda.get_device_name() if CUDA else torch.backends.cpu.get_cpu_capability()
    print(f"{device}, {data.cores()} cores, torch {torch.__version__}; runs: {args.runs}")
    for name in [args.table] if args.table else tables:
        print(f"\n{name}: {tables[name].__doc__}\n")
        tables[name](args)


if __name__ == "__main__":
    runtime.run(main)
