"""How fast, against what, and how far from the limit.

  python bench.py                                          every table below; at most half an hour on two cores
  python bench.py loader --data path/to/photos             from disk to batch, beside the usual PIL pipeline
  python bench.py loss                                     our frequency loss, beside two FFTs of every image
  python bench.py step --arch vit_b resnet50               a training step, beside this machine's own matrix product
  python bench.py memory --arch deit_t                     memory and time of a step, by batch and image size
  python bench.py scaling                                  training on several processes

What is compared runs in turn, again and again, and every figure is a median. Machines are noisy: run it on an idle one, and
believe the ratios more than the times.
"""
import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

import data
import finetune
import losses
import masking
import train

CORES = data.cores()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------ measuring

def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def in_turn(runs, works, what):
    """Functions {name: work}, one after the other, `runs` times after a warm-up: {name: what each run returned, or seconds}."""
    results = {name: [] for name in works}
    for run in tqdm(range(-1, runs), what, leave=False, disable=not sys.stderr.isatty()):
        for name, work in works.items():
            wait()
            began = time.perf_counter()
            result = work()
            wait()
            if run >= 0:
                results[name].append(time.perf_counter() - began if result is None else result)
    return results


def ratio(over, under):
    """The median of the ratios, run by run."""
    return statistics.median(a / b for a, b in zip(over, under))


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def peak_memory(work):
    """Bytes that work() holds at most beyond what was held before, as PyTorch's own allocator counts them."""
    work()                                                                  # whatever stays is there from now on
    if DEVICE.type == "cuda":
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(path := os.path.join(folder, "trace.json"))
        with open(path) as file:
            events = [e for e in json.load(file)["traceEvents"] if e.get("name") == "[memory]"]
    return int(max(np.cumsum([e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])])))


def matmul_peak(dtype, runs):
    """FLOP/s of the fastest square matrix product."""
    sizes, times = ((2048, 4096, 8192), 20) if DEVICE.type == "cuda" else ((1024, 2048, 4096), 1)
    pairs = {n: [torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2)] for n in sizes}

    def product(a, b):
        for _ in range(times):
            a @ b

    seconds = in_turn(runs, {n: functools.partial(product, *pair) for n, pair in pairs.items()}, "matrix product")
    return max(2 * n ** 3 * times / statistics.median(s) for n, s in seconds.items())


# ------------------------------------------------------------------------------------------------ from disk to batch

class PILViews(torch.utils.data.Dataset):
    """The yardstick, as in most repositories: PIL decodes, crops and resizes, then float tensors, normalised in the worker."""

    def __init__(self, folder, size, scale, interpolation, grid):
        self.folder, self.size, self.scale, self.interpolation, self.grid = folder, size, scale, interpolation, grid
        self.finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)])

    def crop(self, sample):
        epoch, position, index = sample
        image = Image.open(os.path.join(self.folder.root, os.fsdecode(self.folder.paths[index]))).convert("RGB")
        box, flip = data.crop_box(image.height, image.width, self.scale, data.generator(0, epoch, position))
        image = transforms.functional.resized_crop(image, *box, [self.size, self.size], self.interpolation)
        return transforms.functional.hflip(image) if flip else image

    def __getitem__(self, sample):
        image = self.finish(self.crop(sample))
        return image, masking.random_mask(1, self.grid, 0.6)[0] if self.grid else int(self.folder.labels[sample[2]])


def photos(folder, count):
    """For want of photographs: the built-in images as JPEG files of 500 × 375 px."""
    world = data.Shapes(500, count=count)
    for i in tqdm(range(count), "images", leave=False, disable=not sys.stderr.isatty()):
        Image.fromarray(world[i][0][:, 62:437].permute(1, 2, 0).numpy()).save(os.path.join(folder, f"{i}.jpg"), quality=95)
    return folder


def throughput(views, collate, images, batch, workers=0):
    """Images a second of the real loader. With workers, from when all batches that were begun together are there."""
    ahead = 3 * workers
    steps = images // batch if workers == 0 else max(20, 2000 // batch)
    stream = iter(data.loader(views, data.Batches(images, batch, batch, 0, ahead + steps), workers, False, collate))
    for _ in range(ahead):
        next(stream)
    began = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return steps * batch / (time.perf_counter() - began)


def bench_loader(args):
    """Images a second of the real loader: decoding, crop, mask, seeding, batching. Both crop the same boxes of the same images.

    difference: mean |ours − PIL's| of crops, in 1/255; of the pack's, its smaller images' rounding and JPEG included.
    """
    rows = []
    for path in args.data or []:
        if not os.path.isdir(path) or data.is_pack(path):
            raise ValueError(f"the loader's table compares files: {path} is no folder of images")
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(args.data or [photos(folder, 300)]):
            files, pack = data.Folder(path, "test"), os.path.join(folder, f"pack{number}")
            data.pack(path, pack, workers=CORES)
            packed = data.Packed(pack, "test")
            if len(files) != len(data.Folder(path, "val")):                 # a pack of undivided images has those for training first
                parts = [data.Folder(path, split) for split in ("train", "val")]
                files.paths, files.labels = (np.concatenate([getattr(part, k) for part in parts]) for k in ("paths", "labels"))
            images = min(len(files), args.images)
            batch, size = min(100, images), min(224, *files[0][0].shape[-2:])
            for crop, scale, interpolation, grid in (("pre-training, bilinear", (0.67, 1.0), data.BILINEAR, size // 32 if size > 128 else 4),
                                                     ("fine-tuning, bicubic", (0.08, 1.0), data.BICUBIC, None)):
                view, collate = functools.partial(finetune.train_view, config=dict(
                    crop_scale=scale, img_size=size, randaugment=None, random_erasing=None)), None
                if grid:
                    view, collate = functools.partial(train.view, size=size, scale=scale), functools.partial(train.collate, grid=grid, ratio=0.6)
                pil = PILViews(files, size, scale, interpolation, grid)
                sources = {"files, PIL": (pil, None), "files": (data.Views(files, view), collate), "pack": (data.Views(packed, view), collate),
                           "built-in shapes": (data.Views(data.Shapes(size, count=images), view), collate)}
                with threads(1):
                    one = in_turn(args.runs, {name: functools.partial(throughput, *source, images, batch) for name, source in sources.items()}, path)
                    every = in_turn(args.runs, {name: functools.partial(throughput, *source, images, batch, CORES)
                                                for name, source in sources.items()}, f"{path}, {CORES} workers")
                for name, (views, _) in sources.items():
                    compared = [(0, i, i) for i in range(0, images, max(1, images // 100))] if name in ("files", "pack") else []
                    differ = [np.abs(views[s][0][0].permute(1, 2, 0).numpy().astype(float) - np.asarray(pil.crop(s))).mean() for s in compared]
                    rows.append({"images": f"{os.path.basename(os.path.normpath(path)) if args.data else 'built-in, as JPEG'} → {size} px", "crop": crop, "source": name,
                                 "images/s, one core": statistics.median(one[name]), "× PIL": ratio(one[name], one["files, PIL"]),
                                 f"images/s, {CORES} workers": statistics.median(every[name]),
                                 "difference": statistics.mean(differ) if differ else None})
    return rows


# ------------------------------------------------------------------------------------------------ the loss

def two_ffts(reconstruction, target, mask, weight=0.1, stacked=True):
    """A²MIM's loss for a ViT as the formulas read: both images of every pair transformed whole, then spectra averaged.

    stacked: real and imaginary parts are one real tensor, as in the published code of the focal frequency loss.
    """
    M = F.interpolate(mask[:, None], size=target.shape[-2:], mode="nearest-exact")
    spatial = ((reconstruction - target).abs() * M).sum() / (3 * (M.sum() + 1e-5))
    blend = M * reconstruction + (1 - M) * (0.5 * reconstruction.detach() + 0.5 * target)
    spectra = [torch.fft.fft2(image, norm="ortho") for image in (blend, target)]
    if stacked:
        spectra = [torch.stack([D.real, D.imag], -1) for D in spectra]
        power = ((spectra[0].mean(0) - spectra[1].mean(0)) ** 2).sum(-1)
    else:
        difference = spectra[0].mean(0) - spectra[1].mean(0)
        power = difference.real ** 2 + difference.imag ** 2
    w = power.detach().sqrt().log1p()
    return spatial + weight * ((w / w.max()).clamp(0, 1) * power).mean()


def bench_loss(args):
    """Forward and backward of A²MIM's loss for a ViT, 224 px; value and gradient relative to those of two FFTs."""
    rows, batch = [], args.batch or 32
    image, mask = torch.randn(batch, 3, 224, 224, device=DEVICE), masking.random_mask(batch, 7, 0.6).to(DEVICE)
    reconstruction = torch.randn_like(image).requires_grad_()
    ours = losses.A2MIMLoss()
    values = {"two FFTs": lambda: two_ffts(reconstruction, image, mask),
              "two FFTs, complex": lambda: two_ffts(reconstruction, image, mask, stacked=False),
              "ours": lambda: ours(reconstruction, image, mask)["loss"]}

    def both_ways(value):
        torch.autograd.grad(value(), reconstruction)

    found = {name: (value().detach(), torch.autograd.grad(value(), reconstruction)[0]) for name, value in values.items()}
    memory = {name: peak_memory(lambda: both_ways(value)) for name, value in values.items()}
    for count in sorted({1, CORES}) if DEVICE.type == "cpu" else [1]:
        with threads(count):
            seconds = in_turn(args.runs, {name: functools.partial(both_ways, value) for name, value in values.items()}, f"loss, {count} thread(s)")
        for name, value in values.items():
            rows.append({"loss": name, "batch": batch, "threads": count, "ms": 1e3 * statistics.median(seconds[name]),
                         "times faster": ratio(seconds["two FFTs"], seconds[name]), "peak MB": memory[name] / 1e6,
                         "of the first": memory[name] / memory["two FFTs"],
                         "value": float((found[name][0] - found["two FFTs"][0]).abs() / found["two FFTs"][0]),
                         "gradient": float((found[name][1] - found["two FFTs"][1]).norm() / found["two FFTs"][1].norm())})
    return rows


# ------------------------------------------------------------------------------------------------ the step

class Step:
    """One step of train.py on random images, from bytes on the device to updated weights."""

    def __init__(self, arch, batch, img_size=None, amp="auto"):
        size = [] if img_size is None else ["--img-size", str(img_size)]
        self.config = train.resolve(train.parse(["--arch", arch, *size]))
        model, self.criterion = train.build(self.config)
        self.model = train.place(model, DEVICE, 1).train()
        self.optimizer = train.make_optimizer(self.model, self.config)
        self.autocast, self.scaler = train.precision(amp, DEVICE)
        size, grid = self.config["img_size"], self.config["img_size"] // self.config["mask_size"]
        self.image = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(DEVICE)
        self.mask = masking.random_mask(batch, grid, self.config["mask_ratio"]).to(DEVICE)

    def __call__(self, model=None, mark=lambda name: None):
        image, before = data.normalize(self.image), train.statistics(self.model)
        mark("bytes to floats")
        with self.autocast():
            reconstruction = (self.model if model is None else model)(image, self.mask)
        mark("forward")
        loss = self.criterion(reconstruction, image, self.mask)["loss"]
        mark("loss")
        self.scaler.scale(loss).backward()
        mark("backward")
        train.update(self.model, self.optimizer, self.scaler, self.config["clip"], loss.detach(), before)
        mark("optimizer")

    def split(self, model):
        """{part: seconds}, one after the other."""
        parts, last = {}, [time.perf_counter()]

        def mark(name):
            wait()
            parts[name], last[0] = time.perf_counter() - last[0], time.perf_counter()

        self(model, mark)
        return parts

    def flops(self):
        """Of matrix products and convolutions, forward and backward, for one image."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops() / len(self.image)


def bench_step(args):
    """Training steps: model FLOP/s (matrix products and convolutions) as a share of the machine's fastest matrix product."""
    rows = []
    for path in args.data or []:
        data.open_source(path, "train", 32)                                 # a wrong path, before minutes are spent
    for arch in args.arch or ["vit_b", "resnet50"]:
        step = Step(arch, args.batch or (train.RECIPES[arch]["micro_batch"] if DEVICE.type == "cuda" else 8), amp=args.amp)
        batch, flops = len(step.image), step.flops()
        with step.autocast():
            dtype = torch.get_autocast_dtype(DEVICE.type) if torch.is_autocast_enabled(DEVICE.type) else torch.float32
        peak, models, problem = matmul_peak(dtype, args.runs), {"eager": step.model}, None
        compiled = torch.compile(step.model)
        try:
            step(compiled)
            models["compiled"] = compiled
        except Exception as error:                                          # no compiler on the machine, say
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        seconds = in_turn(args.runs, {name: functools.partial(step, model) for name, model in models.items()}, arch)
        for name, model in models.items():
            parts = [step.split(model) for _ in range(args.runs)]
            whole = statistics.median(seconds[name])
            rows.append({"arch": arch, "how": name, "batch": batch, "images/s": batch / whole, "TFLOP/s": flops * batch / whole / 1e12,
                         "share of peak %": 100 * flops * batch / whole / peak, f"peak TFLOP/s ({str(dtype)[6:]})": peak / 1e12,
                         "× eager": ratio(seconds["eager"], seconds[name])}
                        | {part + " %": 100 * statistics.median(p[part] / sum(p.values()) for p in parts) for part in parts[0]})
        if problem:
            rows.append({"arch": arch, "how": f"compiled: {problem}"})
        for path in args.data or []:
            speed = fed(step, path, args)
            rows.append({"arch": arch, "how": f"eager, fed by the loader from {path}", "images/s": speed,
                         "of those without": speed / batch * statistics.median(seconds["eager"])})
    return rows


def fed(step, path, args):
    """Images a second of steps on images from --data, from when all batches that were loaded ahead are used up."""
    batch, size, grid = len(step.image), step.image.shape[-1], step.mask.shape[-1]
    source, workers = data.open_source(path, "train", size), max(1, min(8, CORES - 1))
    ahead, steps = 2 * workers + 1, 2 * workers + 4 * args.runs
    views = data.Views(source, functools.partial(train.view, size=size, scale=step.config["crop_scale"]))
    collate = functools.partial(train.collate, grid=grid, ratio=step.config["mask_ratio"])
    stream = iter(data.loader(views, data.Batches(len(source), batch, batch, 0, ahead + steps), workers, DEVICE.type == "cuda", collate))
    for i in range(ahead + steps):
        if i == ahead:
            wait()
            began = time.perf_counter()
        step.image, step.mask = (tensor.to(DEVICE, non_blocking=True) for tensor in next(stream)[0])
        step()
    wait()
    return steps * batch / (time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------ growth

def free_memory():
    """Bytes that could be had."""
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    return float("inf")


SIZES, BATCHES = (96, 192, 288, 384), (8, 16, 32, 64)                       # of images in pixels; images in a step


def bench_memory(args):
    """Memory that a training step needs beyond weights, images and optimizer, and its time; more than the machine has: not run."""
    rows = []
    for arch in args.arch or ["deit_t", "resnet50"]:
        for size in SIZES:
            used = 0
            for batch in BATCHES:
                if 2.2 * used > free_memory():                              # twice as much, and some air
                    continue
                step = Step(arch, batch, size, args.amp)
                used = peak_memory(step)
                seconds = statistics.median(in_turn(args.runs, {"step": step}, f"{arch}, {size} px, {batch}")["step"])
                rows.append({"arch": arch, "px": size, "batch": batch, "peak MB": used / 1e6, "MB an image": used / 1e6 / batch,
                             "kB a pixel": used / 1e3 / batch / size ** 2, "s": seconds, "ms an image": 1e3 * seconds / batch})
                del step
    return rows


def bench_scaling(args):
    """Training on several processes: images a second of the last steps that were logged."""
    rows, here = [], os.path.dirname(os.path.abspath(__file__))
    most = torch.cuda.device_count() if DEVICE.type == "cuda" else CORES
    for count in sorted({n for n in (1, 2, 4, 8, most) if n <= most}):
        speeds = []
        for _ in range(args.runs):
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "train.py", "--arch",
                                (args.arch or ["vit_nano"])[0], "--out", folder, "--steps", "40", "--batch-size", str((args.batch or 32) * count),
                                "--workers", "1"], cwd=here, env=os.environ | dict(OMP_NUM_THREADS=str(max(1, CORES // count))), check=True, capture_output=True)
                with open(os.path.join(folder, "log.jsonl")) as file:
                    speeds.append(json.loads(list(file)[-1])["images_per_second"])
        speed = statistics.median(speeds)
        rows.append({"processes": count, "images/s": speed, "images/s each": speed / count})
    return rows


# ------------------------------------------------------------------------------------------------ tables

def show(rows):
    """Rows of {column: value} as text, a table for each kind of row."""
    while rows:
        columns = list(rows[0])
        block = [row for row in rows if list(row) == columns]
        rows = [row for row in rows if list(row) != columns]
        texts = [columns] + [["" if v is None else f"{v:.3g}" if isinstance(v, float) and abs(v) < 100 else f"{v:,.0f}" if isinstance(v, float)
                              else str(v) for v in row.values()] for row in block]
        widths = [max(map(len, column)) for column in zip(*texts)]
        for text in texts:
            print("  ".join(cell.ljust(w) if isinstance(v, str) else cell.rjust(w) for cell, w, v in zip(text, widths, block[0].values())))
        print()


TABLES = {"loader": bench_loader, "loss": bench_loss, "step": bench_step, "memory": bench_memory, "scaling": bench_scaling}


def parse(argv):
    parser = argparse.ArgumentParser("bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}\n")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"which: {', '.join(TABLES)} (all)")
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="loader: folders of images (300 built-in ones, as JPEG files); step: "
                        "whatever train.py takes, packs too, for steps on what the loader brings (random images only)")
    parser.add_argument("--images", type=train.count, default=2000, help="loader: of each folder, at most (2000)")
    parser.add_argument("--arch", nargs="+", choices=train.RECIPES, metavar="ARCH",
                        help="architectures (step: vit_b resnet50; memory: deit_t resnet50; scaling: vit_nano)")
    parser.add_argument("--batch", type=train.count, help="images (loss: 32; step: 8, on a GPU the recipe's micro-batch; scaling: 32 a process)")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision of step and memory (auto)")
    parser.add_argument("--runs", type=train.count, default=5, help="repetitions, of which medians are taken (5)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    args = parser.parse_args(argv)
    if wrong := [name for name in args.tables if name not in TABLES]:
        parser.error(f"there is no table {wrong[0]!r}: choose from {', '.join(TABLES)}")
    return args


def main(argv=None):
    args = parse(argv)
    machine = dict(torch=torch.__version__, python=platform.python_version(), cores=CORES, cpu=torch.backends.cpu.get_cpu_capability(),
                   device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu", runs=args.runs)
    results = {"machine": machine}
    if not args.json:
        print(", ".join(f"{k} {v}" for k, v in machine.items()) + "\n")
    for name in args.tables or TABLES:
        try:
            results[name] = TABLES[name](args)
        except (ValueError, OSError) as error:
            print("bench.py: " + str(error).strip().splitlines()[-1].removeprefix("data.BadImage: "), file=sys.stderr)
            sys.exit(2)
        if not args.json:
            print(f"{name}: {TABLES[name].__doc__.strip()}\n")
            show(results[name])
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
