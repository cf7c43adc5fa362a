"""Pre-train an encoder with A²MIM, on a laptop or on many GPUs.

  python train.py                                                 a small ViT on built-in images, about two minutes
  python train.py --arch resnet_nano --data path/to/images        a small ResNet on your own
  torchrun --nproc_per_node=8 train.py --arch vit_b --data path/to/imagenet        the published recipe

--arch picks the published recipe; any field of it can be overridden. --print-config shows the result. A run lives in
a folder: last.pt (checkpoint), log.jsonl, recon.png. The same command again continues an interrupted run.
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import re
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import losses
import masking
import model as models
import weights

RANK = int(os.environ.get("RANK", 0))                                       # of this process among all; torchrun sets it
PROGRAM = "train.py"                                                        # who speaks in messages: this, or finetune.py

# ------------------------------------------------------------------------------------------------ recipes
# The published ones, of A²MIM and its official code. lr is the one at the recipe's own batch_size.

VIT = dict(epochs=800, img_size=224, batch_size=2048, micro_batch=256, lr=dict(a2mim=4e-4, simmim=4e-4), min_lr=None,
           schedule="step", lr_step_epoch=700, warmup_epochs=10, weight_decay=0.05, clip=5.0, drop_path=0.1,
           crop_scale=(0.67, 1.0), mask_size=32, mask_ratio=0.6, fill="mean", token="add", spatial_loss="l1",
           frequency_loss="focal", frequency_weight=0.1, frequency_standin="mixed", frequency_visible=0.0,
           token_lr_scale=1.0)
COSINE = dict(schedule="cosine", lr_step_epoch=None, min_lr=1e-5)
DEIT = VIT | COSINE | dict(img_size=192, lr=dict(a2mim=8e-4, simmim=4e-4))
RESNET = VIT | COSINE | dict(epochs=300, lr=dict(a2mim=1.2e-3, simmim=8e-4), clip=None, drop_path=None,
                             crop_scale=(0.8, 1.0), spatial_loss="focal_l1", frequency_weight=0.5,
                             frequency_visible=1e-3, token_lr_scale=0.1)
NANO = COSINE | dict(epochs=8, img_size=64, batch_size=32, micro_batch=32, lr=dict(a2mim=3e-3, simmim=3e-3), warmup_epochs=1,
                     mask_size=None)

RECIPES = {
    "vit_s": VIT, "vit_b": VIT | dict(micro_batch=128), "vit_l": VIT | dict(micro_batch=128),
    "deit_t": DEIT, "deit_s": DEIT,
    "vit_nano": VIT | NANO | dict(drop_path=0.0),
    "resnet18": RESNET, "resnet34": RESNET, "resnet50": RESNET,
    "resnet101": RESNET | dict(frequency_loss="focal_l1", frequency_weight=0.1),
    "resnet152": RESNET | dict(frequency_loss=None), "resnet200": RESNET | dict(frequency_loss=None),
    "resnet_nano": RESNET | NANO | dict(img_size=32),
}
IMAGENET100 = {"deit_t": DEIT, "deit_s": DEIT} | dict.fromkeys(
    ("resnet18", "resnet34", "resnet50"), RESNET | dict(epochs=800, img_size=192))

METHODS = {  # what differs from the recipe; SimMIM: arXiv 2111.09886
    "a2mim": {},
    "simmim": dict(mask_layer=0, fill="none", token="replace", spatial_loss="l1", frequency_loss=None,
                   crop_scale=(0.67, 1.0), token_lr_scale=1.0),
}


def number(kind, low, high=math.inf):
    """The type of an option that takes a number in low..high."""
    def convert(text):
        if (value := kind(text)) > 1e9:
            raise argparse.ArgumentTypeError(f"{text[:20]} is too large")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not " + (f"{low} or more" if high == math.inf else f"in {low}..{high}"))
        return value
    convert.__name__ = kind.__name__                                        # argparse names it in its messages
    return convert


def optional(kind):
    """The same, or `none`: absent, null in the configuration."""
    return lambda text: None if text == "none" else kind(text)


count, positive, share = number(int, 1), number(float, 0), number(float, 0, 1)
CONFIG = {  # key of the configuration: (type of --key, help, choices); the recipe's value where the option is absent
    "arch": (str, "architecture, and with it the recipe", RECIPES),
    "method": (str, "published method, or baseline", METHODS),
    "data": (str, "a folder of images, of class folders, or of train/ and val/ with class folders; a pack of one (data.py pack); or one of "
                  f"{', '.join(data.SOURCES)} (all but shapes are downloaded)", None),
    "img_size": (count, "side of the square training crops, pixels", None),
    "epochs": (count, "passes over the training images", None),
    "batch_size": (count, "images to an optimizer step, all processes and accumulation together", None),
    "lr": (positive, "peak learning rate; absent: the recipe's, scaled linearly with the batch size", None),
    "min_lr": (optional(positive), "where a cosine schedule ends", None),
    "schedule": (str, "after a linear warm-up; step is ×0.1 at --lr-step-epoch", ("step", "cosine")),
    "lr_step_epoch": (optional(number(int, 0)), "of the step schedule", None),
    "warmup_epochs": (positive, "of linear warm-up; half of the run at most", None),
    "weight_decay": (positive, "of AdamW; biases, norms, positions, tokens and scales have none", None),
    "clip": (optional(positive), "largest norm of the gradient, or none", None),
    "drop_path": (optional(share), "stochastic depth: 0 at the first block, rising to this at the last", None),
    "crop_scale": (share, "smallest and largest share of an image's area in a crop", None),
    "mask_size": (count, "side of a mask block, pixels", None),
    "mask_ratio": (share, "share of masked blocks", None),
    "mask_layer": (int, "the mask token goes in just before this layer, from 0", None),
    "fill": (str, "what masked pixels show", masking.FILLS),
    "token": (str, "what the mask token does to masked features", ("add", "replace", "none")),
    "spatial_loss": (str, "over masked pixels", losses.ELEMENTWISE),
    "frequency_loss": (optional(str), "over frequencies, or none", ("focal", *losses.ELEMENTWISE, None)),
    "frequency_weight": (optional(positive), "λ", None),
    "frequency_standin": (optional(str), "for visible pixels, before the DFT", (*losses.STANDINS, None)),
    "frequency_visible": (optional(share), "u, the share of the gradient at visible pixels", None),
    "token_lr_scale": (positive, "learning rate of the mask token (and γ), relative to all others", None),
}


def make_parser(program, usage, text, table, recipe, micro_batch):
    """The command line that pre-training and fine-tuning share: the keys of a configuration, and how to run."""
    global PROGRAM
    PROGRAM = program
    parser = argparse.ArgumentParser(program, f"{program} {usage}", text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail                                                     # one line, without the usage
    option = parser.add_argument_group("configuration", f"what --print-config shows; the {recipe}'s, unless given").add_argument
    for name, (kind, text, choices) in table.items():
        listed = ": " + ", ".join(filter(None, choices)) if choices else ""
        option("--" + name.replace("_", "-"), type=kind, nargs={"crop_scale": 2, "lr_step_epochs": "+"}.get(name), choices=choices,
               metavar=name.upper(), help=text + listed, default=argparse.SUPPRESS)
    option("--recipe", choices=("imagenet", "imagenet100"), default="imagenet", help="which published recipe of --arch (imagenet)")
    option("--print-config", action="store_true", help="print the configuration as JSON and exit")
    option = parser.add_argument_group("run").add_argument
    option("--seed", type=int, default=0, help="of weights, order, augmentation and drop path (0)")
    option("--micro-batch", type=count, help="images a process takes through the model at once" + micro_batch)
    option("--out", help="folder of the run (one below runs/, named after it)")
    option("--overwrite", action="store_true", help="start anew where a run already lives")
    option("--steps", type=count, help="stop after this many optimizer steps; the schedule stays")
    option("--workers", type=number(int, 0), help="loader processes of each process (the cores there are, at most 8)")
    option("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
           help="mixed precision; auto: bf16 where the GPU has it, else fp16, off on a CPU")
    option("--compile", action="store_true", help="torch.compile the model: a minute at the start, for a GPU")
    option("--log-every", type=count, default=10, help="optimizer steps between two log entries (10)")
    return parser


def parse(argv):
    return make_parser("train.py", "[--arch ARCH] [--data DATA] [option ...]", __doc__, CONFIG, "recipe",
                       ". Part of the recipe where the frequency loss averages spectra over them (256; 128 for vit_b and "
                       "vit_l)").parse_args(argv)


def resolve(args):
    """The configuration: recipe of --arch, then --method, then what was given. Raises ValueError, in one line."""
    given = vars(args)
    arch, method = given.get("arch", "vit_nano"), given.get("method", "a2mim")
    table = RECIPES if args.recipe == "imagenet" else IMAGENET100
    if arch not in table:
        raise ValueError(f"there is no ImageNet-100 recipe of {arch}: choose from {', '.join(table)}")
    recipe = dict(arch=arch, method=method, data="shapes", mask_layer=models.PRESETS[arch]["mask_layer"]) | table[arch]
    config = recipe | METHODS[method] | {name: given[name] for name in CONFIG if name in given}
    if "lr" not in given:
        config["lr"] = recipe["lr"][method] * config["batch_size"] / recipe["batch_size"]
    if config["mask_size"] is None:
        config["mask_size"] = max(1, config["img_size"] // 4)               # the small presets: 4 blocks a side
    if config["frequency_loss"] is None:
        config |= dict(frequency_weight=None, frequency_standin=None, frequency_visible=None)
    if config["drop_path"] is None and recipe["drop_path"] is not None:
        config["drop_path"] = 0.0                                           # --drop-path none, where the recipe has one
    config["crop_scale"] = list(config["crop_scale"])                       # as JSON has it
    c = SimpleNamespace(**config)
    for wrong, message in (
            (c.img_size % c.mask_size, f"img_size {c.img_size} is not a multiple of mask_size {c.mask_size}"),
            (not 0 < c.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, both excluded, not {c.mask_ratio}"),
            (not 0 < c.crop_scale[1] >= c.crop_scale[0], f"--crop-scale {c.crop_scale[0]} {c.crop_scale[1]}: the smaller first, above 0"),
            (c.schedule == "step" and c.lr_step_epoch is None, "the step schedule needs --lr-step-epoch"),
            (c.schedule == "cosine" and c.min_lr is None, "the cosine schedule needs --min-lr"),
            (c.frequency_loss and None in (c.frequency_weight, c.frequency_standin, c.frequency_visible),
             "a frequency loss needs --frequency-weight, --frequency-standin and --frequency-visible")):
        if wrong:
            raise ValueError(message)
    return {name: config[name] for name in CONFIG}


def build(config):
    """Model and loss of a configuration. Raises ValueError."""
    drop_path = {} if config["drop_path"] is None else dict(drop_path=config["drop_path"])
    model = models.build(config["arch"], config["img_size"], mask_layer=config["mask_layer"], token=config["token"],
                         fill=config["fill"], **drop_path)
    if config["mask_size"] % (stride := model.encoder.strides[config["mask_layer"]]):
        raise ValueError(f"mask_size {config['mask_size']} is not a multiple of {stride}, the encoder's stride at layer "
                         f"{config['mask_layer']}")
    frequency = {} if config["frequency_loss"] is None else dict(
        frequency_weight=config["frequency_weight"], standin=config["frequency_standin"], visible=config["frequency_visible"])
    return model, losses.A2MIMLoss(config["spatial_loss"], config["frequency_loss"], **frequency)


# ------------------------------------------------------------------------------------------------ optimization

def learning_rate(config, step, steps_per_epoch):
    """The factor on every group's learning rate at an optimizer step, counted from 0: warm-up, then step or cosine."""
    total = config["epochs"] * steps_per_epoch
    warmup = min(round(config["warmup_epochs"] * steps_per_epoch), total // 2)
    if step < warmup:
        return (step + 1) / warmup
    if config["schedule"] == "step":
        return 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.get("lr_step_epochs") or [config["lr_step_epoch"]])
    lowest = min(1.0, config["min_lr"] / config["lr"]) if config["lr"] else 1.0
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def decays(name, parameter):
    """Weight decay is for weight matrices only."""
    return parameter.squeeze().ndim > 1 and not name.endswith(("cls_token", "pos_embed", "relative_position_bias_table"))


def make_optimizer(model, config):
    """AdamW: no decay for whatever is not a weight matrix; the mask token and γ at their own lr."""
    groups = {}
    for name, parameter in model.named_parameters():
        decay, token = decays(name, parameter), name.startswith("mask_token.")
        group = groups.setdefault((decay, token), dict(
            params=[], weight_decay=config["weight_decay"] if decay else 0.0,
            peak_lr=config["lr"] * (config["token_lr_scale"] if token else 1.0)))
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=config["lr"], betas=(0.9, 0.999), eps=1e-8, fused=True)


def update(model, optimizer, scaler, clip):
    """The optimizer step, once all gradients are there."""
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def precision(amp, device):
    """(autocast context factory, gradient scaler) of --amp on a device."""
    if amp == "auto":
        amp = "off" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def find_micro_batch(batch_size, asked, world, usual):
    """Images a process takes at once: as asked, else the usual number, or the largest below that divides. Raises ValueError."""
    share, rest = divmod(batch_size, world)
    if rest or share % (asked or 1):
        raise ValueError(f"--batch-size {batch_size} is not divisible by {world} process(es)"
                         + (f" × --micro-batch {asked}" if asked else ""))
    return asked or next(m for m in range(min(usual, share), 0, -1) if share % m == 0)


# ------------------------------------------------------------------------------------------------ processes

def start_processes():
    """(world, device). Joins the process group where torchrun started us; else one process."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 1, torch.device("cuda" if cuda else "cpu")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=1))       # a download may take long
    return dist.get_world_size(), device


def place(model, device, world):
    """The model on its device; several GPUs normalise over their batches together."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                          # TF32 where mixed precision is off
        if world > 1:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if isinstance(model.encoder, models.ResNet):                            # convolutions are fastest with channels innermost
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def replicate(model, device, world, accumulate):
    """What to call in training: the model, on several processes wrapped so that they exchange gradients. (Buffers need no
    exchange: they are constants, or statistics that synchronised batch norms agree on.)"""
    if world == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
                                   gradient_as_bucket_view=True, static_graph=accumulate == 1)


def loader_workers(args):
    """Loader processes of this process: as asked, else its share of the cores."""
    return min(8, data.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if args.workers is None else args.workers


def sum_over_ranks(values):
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def say(text):
    if RANK == 0:
        tqdm.write(text)


class Log:
    """log.jsonl and the progress bar of a run. What a GPU still computes is written a step late, so that it never waits for us."""

    def __init__(self, path, text, start, total, batch_size):
        self.path, self.text, self.batch_size, self.first, self.last, self.pending = path, text, batch_size, None, None, None
        self.bar = tqdm(total=total, initial=start, unit="step", disable=RANK > 0 or not sys.stderr.isatty())
        self.step, self.clock = start, time.time()

    def add(self, entry, values):
        """An entry {"step": …, "loss": None, …}; for what is None, the means over all processes of a tensor, sent on their way."""
        values = sum_over_ranks(values) / (dist.get_world_size() if dist.is_initialized() else 1)
        host, sent = values.to("cpu", non_blocking=True), torch.cuda.Event() if values.is_cuda else None
        if sent:
            sent.record()
        self.pending = entry, host, sent
        if sent is None:                                                    # on a CPU there is nothing to wait for
            self.flush()

    def flush(self):
        """Write the entry on its way, if there is one."""
        if self.pending is None:
            return
        entry, host, sent = self.pending
        if sent:
            sent.synchronize()                                              # with the end of that step, not of the one begun since
        self.pending, self.last = None, entry | dict(zip([key for key, value in entry.items() if value is None], host.tolist()))
        self.first = self.first or self.last
        speed = (entry["step"] - self.step) * self.batch_size / (time.time() - self.clock)
        self.step, self.clock = entry["step"], time.time()
        self.write(self.last | dict(images_per_second=speed), self.text)

    def write(self, entry, text):
        """A line for the file, and one for people: in the progress bar, or where there is no terminal, of its own."""
        if RANK == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
            self.bar.set_postfix_str(text.format(**entry))
            if self.bar.disable:
                say(f"step {entry['step']}/{self.bar.total}, " + text.format(**entry))


def fail(problem):
    """Say in one line, without a traceback, what is wrong with the user's input, and leave with exit code 2."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    if RANK == 0 or isinstance(problem, data.BadImage):                     # all else is found by all processes alike
        print(f"{PROGRAM}: " + lines[-1].removeprefix("data.BadImage: "), file=sys.stderr)   # a worker's ends a traceback
    sys.exit(2)


def gather(value):
    """The value of every process, in a list."""
    values = [value]
    if dist.is_initialized():
        values = values * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def together(work):
    """The result of work(). If it fails on any process, the first one says why, and all leave."""
    result, problem = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        problem = str(error)
    if found := [p for p in gather(problem) if p is not None]:
        fail(found[0])
    return result


# ------------------------------------------------------------------------------------------------ checkpoints, pictures

def open_run(out, identity, overwrite, files):
    """The state to continue from, or None for a new run. Raises ValueError if something else lives in the folder."""
    path = os.path.join(out, "last.pt")
    if overwrite:
        return None
    if not os.path.exists(path):
        if other := [name for name in files if os.path.exists(os.path.join(out, name))]:
            raise ValueError(f"{out} holds a {other[0]} but no last.pt: choose another --out, or --overwrite")
        return None
    state = weights.read(path)
    known = {"identity", "step", "model", "optimizer", "scaler"} <= set(state)
    if not known or not isinstance(state["identity"], dict) or not isinstance(state["step"], int):
        raise ValueError(f"{path} is no checkpoint of this program: choose another --out, or --overwrite")
    there = state["identity"]
    if differ := [f"{k} ({there.get(k)} there, {v} here)" for k, v in identity.items() if there.get(k) != v]:
        raise ValueError(f"{out} holds another run: it differs in {', '.join(differ)}; choose another --out, or --overwrite")
    return state


def start_folder(out, state, resumed, files):
    """A folder that this run can write to: with its first checkpoint and without `files`, what an earlier run left; or,
    if resumed, without what was logged after the last checkpoint."""
    os.makedirs(out, exist_ok=True)
    log = os.path.join(out, "log.jsonl")
    if not resumed:
        weights.write(os.path.join(out, "last.pt"), state)
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(out, name))
    elif os.path.exists(log):
        with open(log) as file:
            steps = [(line, re.match(r'\{"step": (\d+),.*\}\n$', line)) for line in file]
        with open(log + ".tmp", "w") as file:
            file.writelines(line for line, found in steps if found and int(found[1]) <= state["step"])
        os.replace(log + ".tmp", log)


@torch.no_grad()
def draw(path, model, image, mask):
    """Four rows, a column an image: original, masked, reconstruction, composite (reconstruction where masked)."""
    image, mask = (tensor.to(model.decoder[0].weight.device) for tensor in (image, mask))
    image = data.normalize(image)
    prediction = model.eval().forward(image, mask)                          # not compiled: another batch size
    model.train()
    hidden = masking.fill(image, mask, "zero" if model.fill == "none" else model.fill)
    composite = torch.where(masking.resize(mask, image.shape[-2:]) > 0, prediction, image)
    data.write_picture(path, torch.cat([image, hidden, prediction, composite]), columns=len(image))


# ------------------------------------------------------------------------------------------------ training

FILES = ("log.jsonl", "recon.png")                                          # of a run, beside last.pt
PARTS = ("loss", "spatial", "frequency")
LINE = "epoch {epoch} loss {loss:.4f} (spatial {spatial:.4f}, frequency {frequency:.4f}), {images_per_second:.0f} images/s"


def view(sample, generator, size, scale):
    """What a loader's worker makes of an (image, label): a crop (3, size, size) uint8; the generator then draws the mask."""
    return data.random_resized_crop(sample[0], size, scale, generator), generator


def collate(samples, grid, ratio):
    """... and of many: crops (B, 3, size, size) uint8, masks (B, grid, grid)."""
    crops, generators = zip(*samples)
    return torch.stack(crops), masking.random_mask(len(crops), grid, ratio, generators)


def prepare(args, config, world, device):
    """Whatever can be wrong with a run is found here, before anything is written. Raises ValueError and OSError."""
    micro_batch = find_micro_batch(config["batch_size"], args.micro_batch, world, RECIPES[config["arch"]]["micro_batch"])
    torch.manual_seed(data.key(args.seed))
    model, criterion = build(config)
    size, grid = config["img_size"], config["img_size"] // config["mask_size"]
    source, held_out = (data.open_source(config["data"], split, size) for split in ("train", "val"))
    total = config["epochs"] * (len(source) // config["batch_size"])
    stop = total if args.steps is None else min(args.steps, total)
    name = os.path.basename(os.path.normpath(config["data"]))
    out = args.out or os.path.join("runs", f"{config['arch']}-{config['method']}-{name}")
    # what a run is: of these, none may change when it continues; the micro-batch is one where spectra are averaged over it
    identity = config | dict(seed=args.seed, micro_batch=micro_batch if config["frequency_loss"] == "focal" else None)
    state = open_run(out, identity, args.overwrite, FILES)
    start = state["step"] if state else 0
    batches = data.Batches(len(source), config["batch_size"], micro_batch, start, stop, args.seed, RANK, world)
    views = data.Views(source, functools.partial(view, size=size, scale=config["crop_scale"]), args.seed)
    stream = data.loader(views, batches, loader_workers(args), device.type == "cuda",
                         functools.partial(collate, grid=grid, ratio=config["mask_ratio"]))
    shown = [held_out[int(i)][0] for i in torch.linspace(0, len(held_out) - 1, min(8, len(held_out)))]
    shown = torch.stack([data.center_crop(image, size) for image in shown])
    shown_mask = masking.random_mask(len(shown), grid, config["mask_ratio"], data.generator(args.seed, -1))
    return SimpleNamespace(model=model, criterion=criterion, micro_batch=micro_batch, images=len(source), batches=batches, stream=stream,
                           start=start, stop=stop, total=total, out=out, identity=identity, state=state, shown=(shown, shown_mask))


def restore(model, optimizer, scaler, state, ema=None):
    """Put a checkpoint's state in its places. Raises ValueError if it does not fit."""
    try:
        model.load_state_dict(state["model"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled() and state["scaler"]:                         # --amp may change from run to run
            scaler.load_state_dict(state["scaler"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint does not fit this model: {str(error).splitlines()[0]}") from None


def announce(config, run, world, accumulate):
    """Say how the batch is made up, and where a run goes on; from the same step on all processes."""
    if len(set(gather(run.start))) > 1:
        fail(f"{run.out} is not one folder for all processes: --out must lie on a disk that all machines share")
    steps_per_epoch = run.batches.steps_per_epoch
    say(f"batch {config['batch_size']} = {world} process(es) × {run.micro_batch} images × {accumulate} accumulated; "
        f"{steps_per_epoch} steps an epoch, {run.total} in {config['epochs']} epochs; lr {config['lr']:.3g}")
    if run.state:
        say(f"{run.out}: continuing after step {run.start}" if run.start < run.stop else
            f"{run.out}: already at step {run.start} of {run.total}; "
            + ("--overwrite starts anew, --out elsewhere" if run.start >= run.total else "a larger --steps goes on"))


def train(args, config, world, device):
    if config["data"] in data.SOURCES:                                      # one process of each machine downloads
        together(lambda: os.environ.get("LOCAL_RANK", "0") == "0" and data.open_source(config["data"], "train", 32))
    run = together(lambda: prepare(args, config, world, device))
    model, criterion, start, stop, total, out = run.model, run.criterion, run.start, run.stop, run.total, run.out
    accumulate, steps_per_epoch = config["batch_size"] // (run.micro_batch * world), run.batches.steps_per_epoch

    # ---- what this run is
    say(f"{config['method']}: {config['arch']}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, on {device} × "
        f"{world}, {config['data']}: {run.images:,} images at {config['img_size']} px"
        + ("" if "data" in args else " (no --data given: the built-in images)"))
    announce(config, run, world, accumulate)
    if config["frequency_loss"] == "focal" and run.micro_batch != (usual := RECIPES[config["arch"]]["micro_batch"]):
        say(f"note: spectra are averaged over {run.micro_batch} images, the recipe's micro-batch is {usual}; fewer give a larger loss")
    if config["schedule"] == "step" and config["lr_step_epoch"] >= config["epochs"]:
        say(f"note: the learning rate would step at epoch {config['lr_step_epoch']}, after the end: see --lr-step-epoch")
    if start >= stop:
        return

    # ---- model, optimizer, precision, data
    model = place(model, device, world)
    optimizer = make_optimizer(model, config)
    autocast, scaler = precision(args.amp, device)
    if run.state:
        together(lambda: restore(model, optimizer, scaler, run.state))
        run.state = None                                                    # its memory is no longer needed

    def snapshot(step):
        return dict(format="nanoA2MIM", identity=run.identity, step=step, model=model.state_dict(),
                    optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    together(lambda: RANK == 0 and start_folder(out, snapshot(start), start > 0, FILES))
    if args.compile:
        model.compile()
    replica = replicate(model, device, world, accumulate)
    curve, picture, checkpoint = (os.path.join(out, name) for name in ("log.jsonl", "recon.png", "last.pt"))
    log, stream, saved = Log(curve, LINE, start, total, config["batch_size"]), iter(run.stream), time.time()

    model.train()
    for step in range(start, stop):
        torch.manual_seed(data.key(args.seed, step, RANK))                  # drop path, the same when continued
        factor = learning_rate(config, step, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        parts = torch.zeros(len(PARTS), device=device)
        for micro in range(accumulate):
            image, mask = (tensor.to(device, non_blocking=True) for tensor in next(stream))
            image = data.normalize(image)
            last = micro == accumulate - 1                                  # gradients travel between processes once
            with contextlib.nullcontext() if last or world == 1 else replica.no_sync():
                with autocast():
                    reconstruction = replica(image, mask)
                loss = criterion(reconstruction, image, mask)               # in float32
                scaler.scale(loss["loss"] / accumulate).backward()
            parts += torch.stack([loss[name].detach() for name in PARTS]) / accumulate
        update(model, optimizer, scaler, config["clip"])

        done = step + 1
        log.bar.update()
        log.flush()                                                         # what the step before computed
        if done % args.log_every == 0 or done in (start + 1, stop):
            log.add(dict(step=done, epoch=step // steps_per_epoch + 1) | dict.fromkeys(PARTS) | dict(lr=config["lr"] * factor), parts)
        if done == stop or done % steps_per_epoch == 0 and time.time() - saved > 60:
            log.flush()
            if RANK == 0:
                draw(picture, model, *run.shown)
                weights.write(checkpoint, snapshot(done))
            saved = time.time()
    log.bar.close()
    say(f"Loss {log.first['loss']:.4f} -> {log.last['loss']:.4f}. Pictures: {picture}; weights: {checkpoint}; curve: {curve}.")
    if done == total:
        say("Next: your own images, python train.py --data FOLDER; a CNN, --arch resnet_nano; the baseline, --method simmim.")
    else:
        say("The same command without --steps goes on from here.")


def launch(work, args, config):
    """Run work(args, config, world, device) on every process of the run."""
    try:
        processes = start_processes()
    except ValueError as error:
        fail(error)
    try:
        work(args, config, *processes)
        if dist.is_initialized():
            dist.barrier()                                                  # nobody leaves while messages are under way
    except data.BadImage as error:                                          # found while training, by any process
        fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    args = parse(argv)
    try:
        config = resolve(args)
    except ValueError as error:
        fail(error)
    if args.print_config:
        say(json.dumps(config, indent=2))
    else:
        launch(train, args, config)


if __name__ == "__main__":
    main()
