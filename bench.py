"""How fast, against what, and how far from the limit.

  python bench.py                                            all three tables
  python bench.py loader --data path/to/photos photos.tar    from disk to batch, and the usual PIL pipeline
  python bench.py loss                                       our frequency loss, and two FFTs of every image
  python bench.py step --arch vit_b resnet50                 a training step, and the fastest matrix product

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
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

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

class PILViews(Dataset):
    """The usual pipeline: PIL decodes, crops and resizes; then floats, normalised in the worker.

    Boxes and masks are those of data.Crops and finetune.TrainViews.
    """

    def __init__(self, source, config, seed):
        self.source = source
        self.config = config
        self.seed = seed

    def __getitem__(self, sample):
        epoch, position, index = sample
        config = self.config
        size = config["img_size"]
        draw = data.generator(self.seed, epoch, position)
        image = Image.open(self.source.where(index)).convert("RGB")
        box, flip = data.crop_box(image.height, image.width, config["crop_scale"], draw)
        image = TF.resized_crop(image, *box, [size, size], config["interpolation"])
        if flip:
            image = TF.hflip(image)
        image = TF.normalize(TF.to_tensor(image), data.MEAN, data.STD)
        target = int(self.source.labels[index])
        if config["mask"] is not None:
            grid = size // config["mask_size"]
            target = masking.MASKS[config["mask"]](1, grid, config["mask_ratio"], [draw])[0]
        return image, target, False


VIEWS = {  # crop: (ours, configuration)
    "pre-training, bilinear": (data.Crops, dict(
        crop_scale=(0.67, 1.0), interpolation=data.BILINEAR, mask="random", mask_ratio=0.6)),
    "fine-tuning, bicubic": (finetune.TrainViews, dict(
        crop_scale=(0.08, 1.0), interpolation=data.BICUBIC, mask=None, randaugment=None,
        random_erasing=None)),
}


def write_photos(folder):
    """For want of photographs, 300 built-in images, 500 × 375 px: a folder of JPEGs, and a tar."""
    photos = os.path.join(folder, "photos")
    os.mkdir(photos)
    world = shapes.Shapes(500, count=300)
    with tarfile.open(photos + ".tar", "w") as tar:
        for i in range(300):
            path = os.path.join(photos, f"{i:03}.jpg")
            image = world[i][0][:, 62:437].permute(1, 2, 0)
            Image.fromarray(image.numpy()).save(path, quality=95)
            tar.add(path, f"{i:03}.jpg")
    return [photos, photos + ".tar"]


def images_per_second(views, batch, workers, work=None, steps=20):
    """Of a loader, and of work(batch) on what it brings."""
    ahead = 3 * workers                                 # batches that the workers begin together
    batches = data.Batches(len(views.source), batch, batch, 0, ahead + steps)
    loader = iter(DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=CUDA,
                             worker_init_fn=data.ignore_signals))
    for step in range(ahead + steps):
        if step == ahead:
            began = clock()
        loaded = next(loader)
        if work is not None:
            work(loaded)
    return steps * batch / (clock() - began)


def bench_loader(args):
    """Images a second on one core, of the real loader: decoding, crop, mask, batching.

    difference: mean |ours − PIL's| over the crops, in 1/255; of a tar of smaller images, what their
    resizing and compression changed included.
    """
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        paths = args.data or write_photos(temporary)
        folder = data.Folder(paths[0], "train")
        sources = {path: data.open_source(path, "train", 224) for path in paths}
        size = 224 if min(folder[0][0].shape[-2:]) >= 224 else 32
        for crop, (ours, config) in VIEWS.items():
            config = config | dict(img_size=size, mask_size=size // 7)
            views = {"PIL": PILViews(folder, config, 0)}
            for path, source in sources.items():
                views[path] = ours(source, config, 0)
            batch = min(args.batch or 100, len(folder))
            works = {name: (images_per_second, view, batch, 0) for name, view in views.items()}
            speeds = in_turn(args.runs, works)
            for name, view in views.items():
                row = {"crop": f"{crop}, {size} px", "from": name,
                       "images/s": statistics.median(speeds[name]),
                       "× PIL": ratio(speeds[name], speeds["PIL"])}
                if name != "PIL":
                    row["difference"] = difference(view, views["PIL"])
                rows.append(row)
    torch.set_num_threads(threads)
    return rows


def difference(ours, pil):
    """Mean absolute difference of a hundred crops, in 1/255."""
    differences = []
    for i in range(0, len(pil.source), max(1, len(pil.source) // 100)):
        image = data.denormalize(pil[0, i, i][0][None])[0]
        differences.append((ours[0, i, i][0].float() - image.float()).abs().mean().item())
    return statistics.mean(differences)


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
    return spatial + 0.1 * ((w / w.max()).clamp(0, 1) * power).mean()


def ours(reconstruction, target, mask):
    return losses.A2MIMLoss()(reconstruction, target, mask)["loss"]


def bench_loss(args):
    """Forward and backward of A²MIM's loss for a ViT at 224 px.

    value, gradient: the relative difference from those of two FFTs.
    """
    batch = args.batch or 32
    image = torch.randn(batch, 3, 224, 224, device=DEVICE)
    mask = masking.random_mask(batch, 7, 0.6).to(DEVICE)
    reconstruction = torch.randn_like(image).requires_grad_()

    def evaluate(loss):
        value = loss(reconstruction, image, mask)
        return value.detach(), torch.autograd.grad(value, reconstruction)[0]

    functions = {"two FFTs": two_ffts, "ours": ours}
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
    """A step of train.py on random images: from bytes on the device to updated weights."""

    def __init__(self, arch, batch):
        cfg = recipes.pretraining(["--arch", arch], "")[0]
        model = models.build(cfg.arch, cfg.img_size, mask_layer=cfg.mask_layer, token=cfg.token,
                             fill=cfg.fill, drop_path=cfg.drop_path or 0.0)
        self.cfg = cfg
        self.model = runtime.place(model, DEVICE).train()
        self.criterion = losses.A2MIMLoss(
            cfg.spatial_loss, cfg.frequency_loss, cfg.frequency_weight,
            cfg.frequency_standin or "mixed", cfg.frequency_visible or 0.0)
        self.optimizer = optim.make_optimizer(self.model, cfg)
        self.autocast, self.scaler = runtime.precision("auto", DEVICE)
        size = (batch, cfg.channels, cfg.img_size, cfg.img_size)
        self.image = torch.randint(0, 256, size, dtype=torch.uint8).to(DEVICE)
        grid = cfg.img_size // cfg.mask_size
        self.mask = masking.random_mask(batch, grid, cfg.mask_ratio).to(DEVICE)

    def take(self, replica, clock=time.perf_counter):
        """Take the step. Returns what the clock says before it and after each of PARTS."""
        times = [clock()]
        statistics = optim.statistics(self.model)
        image = data.normalize(self.image, self.cfg.mean, self.cfg.std)
        times.append(clock())
        with self.autocast:
            reconstruction = replica(image, self.mask)
        times.append(clock())
        loss = self.criterion(reconstruction, image, self.mask)["loss"]
        times.append(clock())
        self.scaler.scale(loss).backward()
        times.append(clock())
        optim.update(self.model, self.optimizer, self.scaler, self.cfg.clip, loss.detach(), statistics)
        times.append(clock())
        return times

    def take_on(self, loaded):
        """Take the step on a batch that a loader brought."""
        self.image = loaded[0].to(DEVICE, non_blocking=True)
        self.mask = loaded[1].to(DEVICE, non_blocking=True)
        self.take(self.model)

    def flops(self):
        """Of matrix products and convolutions, forward and backward, for one image."""
        with FlopCounterMode(display=False) as counter:
            self.take(self.model)
        return counter.get_total_flops() / len(self.image)

    def peak(self, runs):
        """FLOP/s of the fastest square matrix product, in the precision of the step."""
        works = {}
        for n in (2048, 4096, 8192) if CUDA else (1024, 2048, 4096):
            square = torch.randn(n, n, device=DEVICE)
            with self.autocast:
                square = square @ square                # has the dtype that autocast computes in
            works[n] = (seconds, torch.matmul, square, square)
        times = in_turn(runs, works)
        return max(2 * n ** 3 / statistics.median(times[n]) for n in works)


def bench_step(args):
    """Training steps, compiled and not, and with --data on what a loader brings.

    FLOP/s are those of matrix products and convolutions, the peak is the fastest matrix product's.
    """
    sources = {path: data.open_source(path, "train", 224) for path in args.data}
    rows = []
    for arch in args.arch:
        batch = args.batch or (recipes.RECIPES[arch]["micro_batch"] if CUDA else 8)
        step = Step(arch, batch)
        flops = step.flops()
        peak = step.peak(args.runs)
        replicas = {"eager": step.model}
        if not args.eager:
            replicas["compiled"] = torch.compile(step.model)

        # whole steps; then, with the device waited for after each, their parts
        works = {how: (seconds, step.take, replica) for how, replica in replicas.items()}
        times = in_turn(args.runs, works)
        works = {how: (step.take, replica, clock) for how, replica in replicas.items()}
        parts = in_turn(args.runs, works)
        for how in replicas:
            speed = batch / statistics.median(times[how])
            row = {"arch": arch, "how": how, "batch": batch, "images/s": speed,
                   "× eager": ratio(times["eager"], times[how]), "TFLOP/s": flops * speed / 1e12,
                   "peak TFLOP/s": peak / 1e12, "share of peak %": 100 * flops * speed / peak}
            for i, part in enumerate(PARTS):
                shares = [(t[i + 1] - t[i]) / (t[-1] - t[0]) for t in parts[how]]
                row[f"{part} %"] = 100 * statistics.median(shares)
            rows.append(row)

        for path, source in sources.items():
            views = data.Crops(source, step.cfg, 0)
            speed = images_per_second(views, batch, runtime.workers(), step.take_on)
            rows.append({"arch": arch, "how": f"eager, fed from {path}", "batch": batch,
                         "images/s": speed,
                         "× eager": speed / batch * statistics.median(times["eager"])})
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
    print()


def main(argv=None):
    parser = runtime.Parser("bench.py", description=__doc__)
    option = parser.add_argument
    option("table", nargs="?", choices=TABLES, help="which table (all)")
    option("--data", nargs="+", default=[], help="loader: a folder of images, and what to compare, "
           "such as a tar of it (300 built-in ones); step: what to feed it from, too")
    option("--arch", nargs="+", default=["vit_b", "resnet50"], choices=recipes.RECIPES,
           metavar="ARCH", help="step: architectures (vit_b resnet50)")
    option("--batch", type=int,
           help="images (loader: 100; loss: 32; step: 8, on a GPU the recipe's micro-batch)")
    option("--runs", type=int, default=5, help="repetitions, of which medians are taken (5)")
    option("--eager", action="store_true", help="step: without torch.compile (it needs a compiler)")
    option("--json", action="store_true", help="print JSON, not text")
    args = parser.parse_args(argv)

    device = torch.cuda.get_device_name() if CUDA else torch.backends.cpu.get_cpu_capability()
    machine = dict(torch=torch.__version__, device=device, cores=data.cores(), runs=args.runs)
    results = {"machine": machine}
    for name in [args.table] if args.table else TABLES:
        results[name] = TABLES[name](args)
        if not args.json:
            print(f"{name}: {TABLES[name].__doc__.strip()}\n")
            show(results[name])
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in machine.items()))


if __name__ == "__main__":
    runtime.run(main)
