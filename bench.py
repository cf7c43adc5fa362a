"""How fast, against what, and how far from the limit. Three tables; without a word, all of them:

  python bench.py loader --data path/to/photos x.tar  from disk to batch; the usual PIL pipeline
  python bench.py loss                                our frequency loss; two FFTs of every image
  python bench.py step --arch vit_b resnet50          a step; the fastest matrix product

What is compared runs in turn, again and again. Every figure is a median over --runs, which --json
keeps; a ratio is the median of the ratios run by run. Use an idle machine, and believe the ratios
more than the times. `python extras/tables.py` writes the tables of docs/speed.md.
"""
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

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
STEPS = 10 if CUDA else 1       # timed together: in training, a GPU doesn't wait either


def in_turn(runs, works):
    """{name: (function, *arguments)} → {name: seconds of each run}."""
    times = {name: [] for name in works}
    for run in range(1 + runs):     # one to warm up
        for name, (function, *arguments) in works.items():
            began = time.perf_counter()
            function(*arguments)
            if CUDA:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: np.array(seconds[1:]) for name, seconds in times.items()}


# ---- from disk to batch

class PILViews(torch.utils.data.Dataset):
    """The usual pipeline: PIL decodes, crops and resizes; floats are normalised in the worker."""

    def __init__(self, source, size, scale, interpolation):
        self.source = source
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(size, scale, interpolation=interpolation),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(data.MEAN, data.STD)])

    def __getitem__(self, sample):
        return self.transform(Image.open(self.source.where(sample[2])).convert("RGB"))


def write_photos(folder):
    """For want of photographs, 300 built-in images of 500 px: a folder of JPEGs, and a tar."""
    photos = Path(folder, "photos")
    photos.mkdir()
    world = shapes.Shapes(500, count=300)
    for i in range(300):
        data.TF.to_pil_image(world[i][0]).save(photos / f"{i:03}.jpg", quality=95)
    return [str(photos), shutil.make_archive(photos, "tar", photos)]


def load(views, batch, steps, workers):
    batches = data.Batches(len(views.source), batch, batch, 0, steps)
    for loaded in data.loader(views, batches, workers):
        pass


def bench_loader(args):
    """images a second: decoding, crop (and ours: mask), batching; 0 workers: the main process"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
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
            works = {("PIL", 0): (load, PILViews(folder, size, scale, interpolation), batch, 20, 0)}
            for path in paths:
                views = ours(data.Folder(path, "train"), cfg, 0)
                for workers in sorted({0, args.workers or 0}):
                    works[path, workers] = (load, views, batch, 20, workers)
            times = in_turn(args.runs, works)
            for (path, workers), t in times.items():
                yield {"crop": crop, "px": size, "images/s": f"{20 * batch / np.median(t):.0f}",
                       "× PIL": f"{np.median(times['PIL', 0] / t):.2f}", "from": path,
                       "workers": workers}, dict(seconds=t)
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
    times = in_turn(args.runs, works)
    for name, t in times.items():
        pairs = zip(evaluate(*works[name][1:]), expected)
        value, gradient = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        yield {"loss": name, "batch": batch, "ms": f"{1000 * np.median(t):.2f}",
               "times faster": f"{np.median(times['two FFTs'] / t):.2f}",
               "value": f"{value:.0e}", "gradient": f"{gradient:.0e}"}, dict(seconds=t)


# ---- the step

def train(model, batches, cfg, criterion, optimizer, autocast, scaler):
    """train.py's step, on each of the next STEPS micro-batches."""
    for _, (image, mask, *_) in zip(range(STEPS), batches):
        image = data.normalize(image.to(DEVICE, non_blocking=True), cfg.mean, cfg.std)
        mask = mask.to(DEVICE, non_blocking=True)
        batchnorm = optim.statistics(model)
        with autocast:
            reconstruction = model(image, mask)
        loss = criterion(reconstruction, image, mask)["loss"]
        scaler.scale(loss).backward()
        optim.update(model, optimizer, scaler, cfg.clip, loss.detach(), batchnorm)


def matmuls(autocast):
    """{side: (function, *arguments)} of matrix products, in the dtype that autocast computes in."""
    works = {}
    for n in (4096, 8192, 16384) if CUDA else (1024, 2048, 4096):
        with autocast:
            square = torch.randn(n, n, device=DEVICE) @ torch.randn(n, n, device=DEVICE)
        works[n] = (torch.matmul, square, square)
    return works


def bench_step(args):
    """training on micro-batches; FLOPs of products, convolutions; peak of a matrix product"""
    for arch in args.arch:
        cfg = recipes.pretraining(["--arch", arch], "")[0]
        batch = args.batch or (recipes.RECIPES[arch]["micro_batch"] if CUDA else 8)
        image = torch.randint(256, (batch, 3, cfg.img_size, cfg.img_size)).byte().to(DEVICE)
        mask = masking.random_mask(batch, cfg.img_size // cfg.mask_size, cfg.mask_ratio).to(DEVICE)

        # as in train.py; the compiled model shares its weights with the eager one
        model = models.build(arch, cfg.img_size, drop_path=cfg.drop_path or 0.0)
        model = runtime.place(model, DEVICE).train()
        criterion = losses.A2MIMLoss(cfg.spatial_loss, cfg.frequency_loss, cfg.frequency_weight,
                                     cfg.frequency_standin or "mixed", cfg.frequency_visible or 0.0)
        optimizer = optim.make_optimizer(model, cfg)
        autocast, scaler = runtime.precision("auto", DEVICE)
        rest = (cfg, criterion, optimizer, autocast, scaler)
        again = [(image, mask)] * STEPS
        works = {"eager": (train, model, again, *rest)}
        if args.compile:
            works["compiled"] = (train, torch.compile(model, dynamic=False), again, *rest)

        # how much a step has to compute; then how much memory it needs
        with FlopCounterMode(display=False) as counter:
            train(model, again[:1], *rest)
        flops = counter.get_total_flops() * STEPS
        memory = {}
        for how, (_, *arguments) in works.items() if CUDA else ():
            torch.cuda.reset_peak_memory_stats()
            train(*arguments)
            memory[how] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"

        # how fast it is and could be; with a loader by itself, which would get ahead meanwhile
        squares = matmuls(autocast)
        times = in_turn(args.runs, squares | works)
        peak = max(2 * n ** 3 / np.median(times.pop(n)) for n in squares)
        if args.data:
            views = data.Crops(data.Folder(args.data[0], "train"), cfg, 0)
            batches = data.Batches(len(views.source), batch, batch, 0, STEPS * (1 + args.runs))
            loader = iter(data.loader(views, batches, runtime.workers(args.workers)))
            how, (_, fastest, *_) = works.popitem()
            times |= in_turn(args.runs, {f"{how}, loaded": (train, fastest, loader, *rest)})
        for how, t in times.items():
            speed = flops / np.median(t)
            yield {"arch": arch, "how": how, "batch": batch,
                   "images/s": f"{batch * STEPS / np.median(t):.2f}",
                   "× eager": f"{np.median(times['eager'] / t):.2f}",
                   "TFLOP/s": f"{speed / 1e12:.3g}", "of peak": f"{speed / peak:.1%}",
                   "GB": memory.get(how, "–")}, dict(seconds=t, flops=flops, peak=peak)


def main(argv=None):
    tables = {"loader": bench_loader, "loss": bench_loss, "step": bench_step}
    parser = runtime.Parser("bench.py", description=__doc__)
    option = parser.add_argument
    option("table", nargs="?", choices=tables, help="which table (all)")
    option("--data", nargs="+", help="a folder of images; loader: tars of it, too (built-in ones)")
    option("--arch", nargs="+", default=["vit_b", "resnet50"], help="step: of train.py (these two)")
    option("--compile", action="store_true", help="step: compiled, too")
    option("--batch", type=int, help="images (loader 100; loss 32; step 8, on a GPU the recipe's)")
    option("--runs", type=int, default=5, help="repetitions, of which medians are taken (5)")
    option("--workers", type=int, help="loader processes (loader: beside none; step: all cores)")
    option("--json", help="file for the tables, and every run")
    args = parser.parse_args(argv)
    if args.runs < 1 or (args.batch is not None and args.batch < 1):
        raise ValueError("--runs and --batch must be 1 or more")

    chip = torch.cuda.get_device_name() if CUDA else torch.backends.cpu.get_cpu_capability()
    machine = f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    command = " ".join(["python bench.py", *(sys.argv[1:] if argv is None else argv)])
    result = dict(command=command, machine=machine, tables={})
    print(f"{machine}; runs: {args.runs}")
    for name in [args.table] if args.table else tables:
        print(f"\n{name}: {tables[name].__doc__}\n")
        rows = result["tables"][name] = []
        for cells, runs in tables[name](args):
            for line in [cells.values()] if rows else [cells, cells.values()]:
                print(*(f"{cell!s:12}" for cell in line), flush=True)
            rows.append(dict(cells=cells, **runs))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1, default=np.ndarray.tolist))


if __name__ == "__main__":
    runtime.run(main)
