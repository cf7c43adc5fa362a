"""How fast, against what, and how far from the limit.

  python bench.py                                     all three tables
  python bench.py loader --data path/to/photos x.tar  from disk to batch; the usual PIL pipeline
  python bench.py loss                                our frequency loss; two FFTs of every image
  python bench.py step --arch vit_b resnet50          a step; the fastest matrix product

What is compared runs in turn, again and again. Every figure is a median over --runs; a ratio is the
median of the ratios run by run. Use an idle machine, and believe the ratios more than the times.
"""
import json
import os
import statistics
import tarfile
import tempfile
import time

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


# ---- measuring

def clock():
    """Seconds, once the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work, *args):
    began = clock()
    work(*args)
    return clock() - began


def in_turn(runs, works):
    """{name: (function, *arguments)} → {name: [what each run returned]}, after one to warm up."""
    results = {name: [] for name in works}
    for run in range(runs + 1):
        for name, (function, *args) in works.items():
            result = function(*args)
            if run > 0:
                results[name].append(result)
    return results


def ratio(over, under):
    return statistics.median(a / b for a, b in zip(over, under))


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
        image = Image.open(self.source.where(sample[2])).convert("RGB")
        return self.transform(image)


def write_photos(folder):
    """For want of photographs, 300 built-in images of 500 px: a folder of JPEGs, and a tar."""
    photos = os.path.join(folder, "photos")
    os.mkdir(photos)
    world = shapes.Shapes(500, count=300)
    with tarfile.open(photos + ".tar", "w") as tar:
        for i in range(300):
            path = os.path.join(photos, f"{i:03}.jpg")
            image = world[i][0].permute(1, 2, 0).numpy()
            Image.fromarray(image).save(path, quality=95)
            tar.add(path, f"{i:03}.jpg")
    return [photos, photos + ".tar"]


def images_per_second(views, batch, workers, work=None, steps=20):
    """Of a loader, and of work(batch) on what it brings."""
    ahead = 3 * workers                                 # batches that the workers begin together
    batches = data.Batches(len(views.source), batch, batch, 0, ahead + steps)
    loader = iter(data.loader(views, batches, workers))
    for step in range(ahead + steps):
        if step == ahead:
            began = clock()
        loaded = next(loader)
        if work is not None:
            work(loaded)
    return steps * batch / (clock() - began)


def bench_loader(args):
    """Images a second on one core: decoding, crop (and ours: mask), batching.

    The bilinear crops are those of pre-training, the bicubic ones those of fine-tuning.
    """
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        paths = args.data or write_photos(temporary)
        folder = data.Folder(paths[0], "train")
        batch = min(args.batch or 100, len(folder))
        size = 224 if min(folder[0][0].shape[-2:]) >= 224 else 32
        cfg = dict(img_size=size, mask="random", mask_size=size // 7, mask_ratio=0.6,
                   randaugment=None, random_erasing=None)
        # PIL and ours cut the same shares of the area, with the same interpolation
        for ours, scale, interpolation in ((data.Crops, (0.67, 1.0), data.BILINEAR),
                                           (finetune.TrainViews, (0.08, 1.0), data.BICUBIC)):
            views = {"PIL": PILViews(folder, size, scale, interpolation)}
            for path in paths:
                source = data.open_source(path, "train", size)
                views[path] = ours(source, cfg | dict(crop_scale=scale), 0)
            works = {name: (images_per_second, view, batch, 0) for name, view in views.items()}
            speeds = in_turn(args.runs, works)
            for name in views:
                rows.append({"crop": f"{interpolation.value}, {size} px", "from": name,
                             "images/s": statistics.median(speeds[name]),
                             "× PIL": ratio(speeds[name], speeds["PIL"])})
    torch.set_num_threads(threads)
    return rows


# ---- the loss

def two_ffts(reconstruction, target, mask):
    """A²MIM's loss for a ViT as the formulas read: both images of every pair are transformed."""
    M = F.interpolate(mask[:, None], size=target.shape[-2:], mode="nearest-exact")
    spatial = ((reconstruction - target).abs() * M).sum() / (3 * (M.sum() + 1e-5))
    standin = 0.5 * reconstruction.detach() + 0.5 * target
    blend = M * reconstruction + (1 - M) * standin
    spectrum = torch.fft.fft2(blend, norm="ortho").mean(0)
    error = spectrum - torch.fft.fft2(target, norm="ortho").mean(0)
    power = error.real ** 2 + error.imag ** 2
    w = power.detach().sqrt().log1p()
    return {"loss": spatial + 0.1 * ((w / w.max()).clamp(0, 1) * power).mean()}


def bench_loss(args):
    """Forward and backward of A²MIM's loss for a ViT at 224 px.

    value, gradient: their relative differences from those of two FFTs.
    """
    batch = args.batch or 32
    image = torch.randn(batch, 3, 224, 224, device=DEVICE)
    mask = masking.random_mask(batch, 7, 0.6).to(DEVICE)
    reconstruction = torch.randn_like(image).requires_grad_()

    def evaluate(loss):
        value = loss(reconstruction, image, mask)["loss"]
        return value.detach(), torch.autograd.grad(value, reconstruction)[0]

    functions = {"two FFTs": two_ffts, "ours": losses.A2MIMLoss()}
    works = {name: (seconds, evaluate, loss) for name, loss in functions.items()}
    times = in_turn(args.runs, works)
    value, gradient = evaluate(two_ffts)
    rows = []
    for name, loss in functions.items():
        its_value, its_gradient = evaluate(loss)
        rows.append({"loss": name, "batch": batch, "ms": 1e3 * statistics.median(times[name]),
                     "times faster": ratio(times["two FFTs"], times[name]),
                     "value": ((its_value - value).abs() / value).item(),
                     "gradient": ((its_gradient - gradient).norm() / gradient.norm()).item()})
    return rows


# ---- the step

PARTS = ("bytes to floats", "forward", "loss", "backward", "optimizer")


class Step:
    """train.py's step, with a model, loss and optimizer of its own."""

    def __init__(self, cfg, compiled=False):
        model = models.build(cfg.arch, cfg.img_size, mask_layer=cfg.mask_layer, token=cfg.token,
                             fill=cfg.fill, drop_path=cfg.drop_path or 0.0)
        self.cfg = cfg
        self.model = runtime.place(model, DEVICE).train()
        self.replica = torch.compile(self.model) if compiled else self.model
        self.criterion = losses.A2MIMLoss(
            cfg.spatial_loss, cfg.frequency_loss, cfg.frequency_weight,
            cfg.frequency_standin or "mixed", cfg.frequency_visible or 0.0)
        self.optimizer = optim.make_optimizer(self.model, cfg)
        self.autocast, self.scaler = runtime.precision("auto", DEVICE)

    def take(self, loaded, clock=time.perf_counter):
        """The step on a batch. Returns times before it and after each of PARTS."""
        times = [clock()]
        image = loaded[0].to(DEVICE, non_blocking=True)
        mask = loaded[1].to(DEVICE, non_blocking=True)
        image = data.normalize(image, self.cfg.mean, self.cfg.std)
        batchnorm = optim.statistics(self.model)
        times.append(clock())
        with self.autocast:
            reconstruction = self.replica(image, mask)
        times.append(clock())
        loss = self.criterion(reconstruction, image, mask)["loss"]
        times.append(clock())
        self.scaler.scale(loss).backward()
        times.append(clock())
        clip = self.cfg.clip
        optim.update(self.model, self.optimizer, self.scaler, clip, loss.detach(), batchnorm)
        times.append(clock())
        return times


def matmul_peak(autocast, runs):
    """FLOP/s of the fastest square matrix product, in the dtype that autocast computes in."""
    works = {}
    for n in (2048, 4096, 8192) if CUDA else (1024, 2048, 4096):
        square = torch.randn(n, n, device=DEVICE)
        with autocast:
            square = square @ square
        works[n] = (seconds, torch.matmul, square, square)
    times = in_turn(runs, works)
    return max(2 * n ** 3 / statistics.median(times[n]) for n in works)


def bench_step(args):
    """Training steps on random images, and with --data on what a loader brings.

    FLOP/s: of matrix products and convolutions; their peak: of the fastest matrix product.
    """
    rows = []
    sources = {path: data.open_source(path, "train", 224) for path in args.data}
    for arch in args.arch:
        cfg = recipes.pretraining(["--arch", arch], "")[0]
        batch = args.batch or (recipes.RECIPES[arch]["micro_batch"] if CUDA else 8)
        size = (batch, 3, cfg.img_size, cfg.img_size)
        image = torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE)
        grid = cfg.img_size // cfg.mask_size
        mask = masking.random_mask(batch, grid, cfg.mask_ratio).to(DEVICE)

        # the steps to compare, how much they have to compute, and how fast the machine could do it
        eager = Step(cfg)
        steps = {"eager": eager}
        if not args.eager:
            steps["compiled"] = Step(cfg, compiled=True)
        with FlopCounterMode(display=False) as counter:
            eager.take((image, mask))
        flops = counter.get_total_flops() / batch
        peak = matmul_peak(eager.autocast, args.runs)

        # whole steps; then, with the device waited for after each, their parts
        works = {how: (seconds, step.take, (image, mask)) for how, step in steps.items()}
        times = in_turn(args.runs, works)
        works = {how: (step.take, (image, mask), clock) for how, step in steps.items()}
        parts = in_turn(args.runs, works)
        for how in steps:
            speed = batch / statistics.median(times[how])
            row = {"arch": arch, "how": how, "batch": batch, "images/s": speed,
                   "× eager": ratio(times["eager"], times[how]), "TFLOP/s": flops * speed / 1e12,
                   "peak TFLOP/s": peak / 1e12, "share of peak %": 100 * flops * speed / peak}
            for i, part in enumerate(PARTS):
                shares = [(t[i + 1] - t[i]) / (t[-1] - t[0]) for t in parts[how]]
                row[f"{part} %"] = 100 * statistics.median(shares)
            rows.append(row)

        # the same steps, waiting for images where the loader is slower than they are
        for path, source in sources.items():
            crops = data.Crops(source, cfg, 0)
            speed = images_per_second(crops, batch, runtime.workers(), eager.take)
            rows.append({"arch": arch, "how": f"eager, from {path}", "batch": batch,
                         "images/s": speed,
                         "× eager": speed * statistics.median(times["eager"]) / batch})
    return rows


# ---- tables

TABLES = {"loader": bench_loader, "loss": bench_loss, "step": bench_step}


def cell(value):
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def show(rows):
    """Rows of {column: value} as text."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns] + [[cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def main(argv=None):
    parser = runtime.Parser("bench.py", description=__doc__)
    option = parser.add_argument
    option("table", nargs="?", choices=TABLES, help="which table (all)")
    option("--data", nargs="+", default=[], help="loader: a folder of images, then what to compare "
           "with it, such as a tar (300 built-in images); step: what to feed it from, too")
    option("--arch", nargs="+", default=["vit_b", "resnet50"], choices=recipes.RECIPES,
           metavar="ARCH", help="step: architectures (vit_b resnet50)")
    option("--batch", type=int,
           help="images (loader: 100; loss: 32; step: 8, on a GPU the recipe's micro-batch)")
    option("--runs", type=int, default=5, help="repetitions, of which medians are taken (5)")
    option("--eager", action="store_true", help="step: no torch.compile, which needs a compiler")
    option("--json", action="store_true", help="print JSON, not tables")
    args = parser.parse_args(argv)

    device = torch.cuda.get_device_name() if CUDA else torch.backends.cpu.get_cpu_capability()
    machine = dict(torch=torch.__version__, device=device, cores=data.cores(), runs=args.runs)
    results = {"machine": machine}
    for name in [args.table] if args.table else TABLES:
        results[name] = TABLES[name](args)
        if not args.json:
            print(f"{name}: {TABLES[name].__doc__.strip()}\n")
            show(results[name])
            print()
    print(json.dumps(results, indent=2) if args.json else machine)


if __name__ == "__main__":
    runtime.run(main)
