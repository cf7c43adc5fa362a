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
from torchvision.transforms import functional as TF
from tqdm import tqdm

import data
import harness
import losses
import masking
import optim
import recipes
import shapes
import sources
import train

CORES = data.cores()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------ measuring

def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, *args):
    wait()
    began = time.perf_counter()
    work(*args)
    wait()
    return time.perf_counter() - began


def in_turn(runs, works, what):
    """Functions {name: work}, one after the other, `runs` times after a warm-up: {name: what each run returned}."""
    results = {name: [] for name in works}
    for run in tqdm(range(-1, runs), what, leave=False, disable=not sys.stderr.isatty()):
        for name, work in works.items():
            result = work()
            if run >= 0:
                results[name].append(result)
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
    squares = [torch.randn(n, n, device=DEVICE, dtype=dtype) for n in ((2048, 4096, 8192) if DEVICE.type == "cuda" else (1024, 2048, 4096))]
    times = in_turn(runs, {len(a): functools.partial(seconds, torch.matmul, a, a) for a in squares}, "matrix product")
    return max(2 * n ** 3 / statistics.median(each) for n, each in times.items())


def throughput(views, collate, batch, workers, work=lambda batch: None):
    """Images a second of the real loader and of work(batch), from when all batches that were begun together are used up."""
    ahead, steps = 3 * workers, 20
    batches = data.Batches(len(views.source), batch, batch, 0, ahead + steps)
    stream = iter(data.loader(views, batches, workers, DEVICE.type == "cuda", collate))
    for i in range(ahead + steps):
        if i == ahead:
            wait()
            began = time.perf_counter()
        found, _ = next(stream)
        work(found)
    wait()
    return steps * batch / (time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------ from disk to batch

CROPS = {"pre-training, bilinear": dict(scale=(0.67, 1.0), interpolation=data.BILINEAR),
         "fine-tuning, bicubic": dict(scale=(0.08, 1.0), interpolation=data.BICUBIC)}


class PILFolder(sources.Folder):
    """The yardstick, as in most repositories: PIL decodes, crops and resizes, then float tensors, normalised in the worker."""

    def __getitem__(self, index):
        return Image.open(os.path.join(self.root, os.fsdecode(self.paths[index]))).convert("RGB"), int(self.labels[index])


def pil_crop(image, size, scale, generator, interpolation):
    """The box that data.random_resized_crop draws, too."""
    box, flip = data.crop_box(image.height, image.width, scale, generator)
    image = TF.resized_crop(image, *box, [size, size], interpolation)
    return TF.normalize(TF.to_tensor(TF.hflip(image) if flip else image), data.MEAN, data.STD)


def view(sample, generator, crop, **options):
    """Of an (image, label): a crop; the generator then draws the mask."""
    return crop(sample[0], generator=generator, **options), generator


def photos(folder):
    """For want of photographs: 300 of the built-in images as JPEG files of 500 × 375 px."""
    os.mkdir(folder)
    world = shapes.Shapes(500, count=300)
    for i in range(300):
        Image.fromarray(world[i][0][:, 62:437].permute(1, 2, 0).numpy()).save(os.path.join(folder, f"{i}.jpg"), quality=95)
    return folder


def bench_loader(args):
    """Images a second of the real loader on training images: decoding, crop, mask, seeding, batching.

    difference: mean |ours − PIL's| of crops, in 1/255; of the pack's, its smaller images' rounding and JPEG included.
    """
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, folder in enumerate(args.data or [photos(os.path.join(temporary, "built-in, as JPEG"))]):
            files, pack = sources.Folder(folder, "train"), os.path.join(temporary, f"pack{number}")
            data.pack(folder, pack, workers=CORES)
            batch, size = min(100, len(files)), min(224, *files[0][0].shape[-2:])
            collate = functools.partial(train.collate, mask="random", grid=size // 32 if size > 128 else 4, ratio=0.6)
            for kind, options in CROPS.items():
                ours, theirs = (functools.partial(view, crop=crop, size=size, **options) for crop in (data.random_resized_crop, pil_crop))
                pil = data.Views(PILFolder(folder, "train"), theirs)
                views_of = {"files, PIL": pil, "files": data.Views(files, ours), "pack": data.Views(sources.Packed(pack, "train"), ours)}
                with threads(1):
                    one, every = (in_turn(args.runs, {name: functools.partial(throughput, views, collate, batch, workers)
                                                      for name, views in views_of.items()}, f"{folder}, {kind}") for workers in (0, CORES))
                for name, views in views_of.items():
                    differ = [(views[0, i, i][0][0].float() - data.denormalize(pil[0, i, i][0][0][None])).abs().mean().item()
                              for i in range(0, len(files), max(1, len(files) // 100))]
                    rows.append({"images": f"{os.path.basename(os.path.normpath(folder))} → {size} px", "crop": kind, "source": name,
                                 "images/s, one core": statistics.median(one[name]), "× PIL": ratio(one[name], one["files, PIL"]),
                                 f"images/s, {CORES} workers": statistics.median(every[name]),
                                 "difference": None if views is pil else statistics.mean(differ)})
    return rows


# ------------------------------------------------------------------------------------------------ the loss

def two_ffts(reconstruction, target, mask, weight=0.1):
    """A²MIM's loss for a ViT as the formulas read: both images of every pair transformed whole, then spectra averaged."""
    M = F.interpolate(mask[:, None], size=target.shape[-2:], mode="nearest-exact")
    spatial = ((reconstruction - target).abs() * M).sum() / (3 * (M.sum() + 1e-5))
    blend = M * reconstruction + (1 - M) * (0.5 * reconstruction.detach() + 0.5 * target)
    spectra = [torch.fft.fft2(image, norm="ortho") for image in (blend, target)]
    difference = spectra[0].mean(0) - spectra[1].mean(0)
    power = difference.real ** 2 + difference.imag ** 2
    w = power.detach().sqrt().log1p()
    return spatial + weight * ((w / w.max()).clamp(0, 1) * power).mean()


def bench_loss(args):
    """Forward and backward of A²MIM's loss for a ViT, 224 px; value and gradient relative to those of two FFTs."""
    rows, batch, ours = [], args.batch or 32, losses.A2MIMLoss()
    image, mask = torch.randn(batch, 3, 224, 224, device=DEVICE), masking.random_mask(batch, 7, 0.6).to(DEVICE)
    reconstruction = torch.randn_like(image).requires_grad_()

    def both_ways(loss):
        value = loss(reconstruction, image, mask)
        return value.detach(), torch.autograd.grad(value, reconstruction)[0]

    works = {"two FFTs": lambda: both_ways(two_ffts), "ours": lambda: both_ways(lambda *pair: ours(*pair)["loss"])}
    memory = {name: peak_memory(work) for name, work in works.items()}
    (value, gradient), (our_value, our_gradient) = (work() for work in works.values())
    for count in sorted({1, CORES}) if DEVICE.type == "cpu" else [1]:
        with threads(count):
            times = in_turn(args.runs, {name: functools.partial(seconds, work) for name, work in works.items()}, f"loss, {count} thread(s)")
        for name, each in times.items():
            rows.append({"loss": name, "batch": batch, "threads": count, "ms": 1e3 * statistics.median(each),
                         "times faster": ratio(times["two FFTs"], each), "peak MB": memory[name] / 1e6})
        rows[-1] |= {"value": ((our_value - value).abs() / value).item(),
                     "gradient": ((our_gradient - gradient).norm() / gradient.norm()).item()}
    return rows


# ------------------------------------------------------------------------------------------------ the step

class Step:
    """One step of train.py on random images, from bytes on the device to updated weights."""

    def __init__(self, arch, batch, img_size=None):
        size = [] if img_size is None else ["--img-size", str(img_size)]
        self.config = train.resolve(train.parse(["--arch", arch, *size]))
        model, self.criterion = train.build(self.config)
        self.model = train.place(model, DEVICE, 1).train()
        self.optimizer = optim.make_optimizer(self.model, self.config)
        self.autocast, self.scaler = train.precision("auto", DEVICE)
        with self.autocast():
            self.dtype = torch.get_autocast_dtype(DEVICE.type) if torch.is_autocast_enabled(DEVICE.type) else torch.float32
        size, grid = self.config["img_size"], self.config["img_size"] // self.config["mask_size"]
        self.image = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(DEVICE)
        self.mask = masking.random_mask(batch, grid, self.config["mask_ratio"]).to(DEVICE)

    def parts(self, model):
        """Takes the step; says what is done, part by part."""
        image, before = data.normalize(self.image), optim.statistics(self.model)
        yield "bytes to floats"
        with self.autocast():
            reconstruction = model(image, self.mask)
        yield "forward"
        loss = self.criterion(reconstruction, image, self.mask)["loss"]
        yield "loss"
        self.scaler.scale(loss).backward()
        yield "backward"
        optim.update(self.model, self.optimizer, self.scaler, self.config["clip"], loss.detach(), before)
        yield "optimizer"

    def __call__(self, model=None):
        for _ in self.parts(self.model if model is None else model):        # a compiled one is neither true nor false
            pass

    def split(self, model):
        """{part: percent of the time}, one after the other."""
        parts, began = {}, time.perf_counter()
        for name in self.parts(model):
            wait()
            parts[name], began = time.perf_counter() - began, time.perf_counter()
        return {f"{name} %": 100 * part / sum(parts.values()) for name, part in parts.items()}

    def flops(self):
        """Of matrix products and convolutions, forward and backward, for one image."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops() / len(self.image)

    def fed(self, path):
        """Images a second of steps on images from --data."""
        def work(found):
            self.image, self.mask = (tensor.to(DEVICE, non_blocking=True) for tensor in found)
            self()

        batch, size, grid = len(self.image), self.image.shape[-1], self.mask.shape[-1]
        views = data.Views(sources.open_source(path, "train", size), functools.partial(train.view, size=size, scale=self.config["crop_scale"]))
        collate = functools.partial(train.collate, mask="random", grid=grid, ratio=self.config["mask_ratio"])
        return throughput(views, collate, batch, max(1, min(8, CORES - 1)), work)


def bench_step(args):
    """Training steps: model FLOP/s (matrix products and convolutions) as a share of the machine's fastest matrix product."""
    rows = []
    for path in args.data or []:
        sources.open_source(path, "train", 32)                              # a wrong path, before minutes are spent
    for arch in args.arch or ["vit_b", "resnet50"]:
        step = Step(arch, args.batch or (recipes.RECIPES[arch]["micro_batch"] if DEVICE.type == "cuda" else 8))
        batch, flops, peak = len(step.image), step.flops(), matmul_peak(step.dtype, args.runs)
        models = {"eager": step.model, "compiled": torch.compile(step.model)}
        try:
            step(models["compiled"])
        except Exception as error:                                          # no compiler on the machine, say
            rows.append({"arch": arch, "how": f"compiled: {type(error).__name__}"})
            del models["compiled"]
        times = in_turn(args.runs, {name: functools.partial(seconds, step, model) for name, model in models.items()}, arch)
        for name, model in models.items():
            parts, speed = [step.split(model) for _ in range(args.runs)], batch / statistics.median(times[name])
            rows.append({"arch": arch, "how": name, "batch": batch, "images/s": speed, "TFLOP/s": flops * speed / 1e12,
                         "share of peak %": 100 * flops * speed / peak, f"peak TFLOP/s ({str(step.dtype)[6:]})": peak / 1e12,
                         "× eager": ratio(times["eager"], times[name])}
                        | {part: statistics.median(each[part] for each in parts) for part in parts[0]})
        for path in args.data or []:
            speed = step.fed(path)
            rows.append({"arch": arch, "how": f"eager, fed by the loader from {path}", "images/s": speed,
                         "of those without": speed / batch * statistics.median(times["eager"])})
    return rows


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
                    break
                step = Step(arch, batch, size)
                used = peak_memory(step)
                times = in_turn(args.runs, {"step": functools.partial(seconds, step)}, f"{arch}, {size} px, {batch}")["step"]
                rows.append({"arch": arch, "px": size, "batch": batch, "peak MB": used / 1e6, "MB an image": used / 1e6 / batch,
                             "ms an image": 1e3 * statistics.median(times) / batch})
                del step                                                    # before the next one is made
    return rows


def bench_scaling(args):
    """Training on several processes: images a second of the last steps that were logged."""
    rows, here, arch = [], os.path.dirname(os.path.abspath(__file__)), (args.arch or ["vit_nano"])[0]
    most = torch.cuda.device_count() if DEVICE.type == "cuda" else CORES
    for count in sorted({n for n in (1, 2, 4, 8, most) if n <= most}):
        speeds = []
        for _ in range(args.runs):
            with tempfile.TemporaryDirectory() as folder:
                command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "train.py", "--arch", arch, "--out", folder,
                           "--steps", "40", "--batch-size", str((args.batch or 32) * count), "--workers", "1"]
                environment = os.environ | dict(OMP_NUM_THREADS=str(max(1, CORES // count)))
                subprocess.run([sys.executable, *command], cwd=here, env=environment, check=True, capture_output=True)
                with open(os.path.join(folder, "log.jsonl")) as file:
                    speeds.append(json.loads(list(file)[-1])["images_per_second"])
        speed = statistics.median(speeds)
        rows.append({"processes": count, "images/s": speed, "images/s each": speed / count})
    return rows


# ------------------------------------------------------------------------------------------------ tables

def cell(value):
    return value if isinstance(value, str) else "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def show(rows):
    """Rows of {column: value} as text."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    texts = [columns] + [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    for text in texts:
        print("  ".join(value.ljust(width) for value, width in zip(text, widths)).rstrip())
    print()


TABLES = {"loader": bench_loader, "loss": bench_loss, "step": bench_step, "memory": bench_memory, "scaling": bench_scaling}


def parse(argv):
    harness.PROGRAM = "bench.py"
    parser = argparse.ArgumentParser("bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = harness.fail
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"which: {', '.join(TABLES)} (all)")
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="loader: folders of images (300 built-in ones, as JPEG files); step: "
                        "whatever train.py takes, packs too, for steps on what the loader brings (random images only)")
    parser.add_argument("--arch", nargs="+", choices=recipes.RECIPES, metavar="ARCH",
                        help="architectures (step: vit_b resnet50; memory: deit_t resnet50; scaling: vit_nano)")
    parser.add_argument("--batch", type=train.count, help="images (loss: 32; step: 8, on a GPU the recipe's; scaling: 32 a process)")
    parser.add_argument("--runs", type=train.count, default=5, help="repetitions, of which medians are taken (5)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    args = parser.parse_args(argv)
    if wrong := [name for name in args.tables if name not in TABLES]:
        parser.error(f"there is no table {wrong[0]!r}: choose from {', '.join(TABLES)}")
    return args


def main(argv=None):
    args = parse(argv)
    machine = dict(torch=torch.__version__, cores=CORES, cpu=torch.backends.cpu.get_cpu_capability(),
                   device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu", runs=args.runs)
    results = {"machine": machine}
    if not args.json:
        print(", ".join(f"{k} {v}" for k, v in machine.items()) + "\n")
    for name in args.tables or TABLES:
        results[name] = harness.together(functools.partial(TABLES[name], args))                # errors in one line
        if not args.json:
            print(f"{name}: {TABLES[name].__doc__.strip()}\n")
            show(results[name])
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
