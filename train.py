"""Pre-train an encoder with A²MIM, on a laptop or on many GPUs.

  python train.py                                                 a small ViT on built-in images, about two minutes
  python train.py --arch resnet_nano --data path/to/images        a small ResNet on your own
  torchrun --nproc_per_node=8 train.py --arch vit_b --data path/to/imagenet        the published recipe

--arch picks the published recipe; any field of it can be overridden. --print-config shows the result. A run lives in
a folder: last.pt and previous.pt (checkpoints), log.jsonl, recon.png. The same command again continues an interrupted run.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import warnings
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

import data
import harness
import losses
import masking
import model as models
import optim
import sources
from harness import RANK, fail, say, together
from recipes import IMAGENET100, METHODS, RECIPES

# ------------------------------------------------------------------------------------------------ configuration

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
                  f"{', '.join(sources.SOURCES)} (all but shapes are downloaded)", None),
    "channels": (number(int, 1, 1000), "of images; 1: colours become grey; absent: as many as --mean has", None),
    "mean": (float, "of each channel, pixels in 0..1 (data.py stats measures it; absent: ImageNet's)", None),
    "std": (float, "standard deviation of each channel, the same way", None),
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
    "mask": (str, "which blocks are masked", masking.MASKS),
    "mask_size": (count, "side of a mask block, pixels", None),
    "mask_ratio": (share, "share of masked blocks", None),
    "mask_layer": (int, "the mask token goes in just before this layer, from 0", None),
    "fill": (str, "what masked pixels show", masking.FILLS),
    "token": (str, "what the mask token does to masked features", ("add", "replace", "none")),
    "spatial_loss": (str, "over masked pixels", losses.ELEMENTWISE),
    "frequency_loss": (optional(str), "over frequencies, or none", (*losses.FREQUENCY, None)),
    "frequency_weight": (optional(positive), "λ", None),
    "frequency_standin": (optional(str), "for visible pixels, before the DFT", (*losses.STANDINS, None)),
    "frequency_visible": (optional(share), "u, the share of the gradient at visible pixels", None),
    "token_lr_scale": (positive, "learning rate of the mask token (and γ), relative to all others", None),
}


def make_parser(program, usage, text, table, recipe, micro_batch):
    """The command line that pre-training and fine-tuning share: the keys of a configuration, and how to run."""
    harness.PROGRAM = program
    parser = argparse.ArgumentParser(program, f"{program} {usage}", text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail                                                     # one line, without the usage
    option = parser.add_argument_group("configuration", f"what --print-config shows; the {recipe}'s, unless given").add_argument
    for name, (kind, text, choices) in table.items():
        listed = ": " + ", ".join(filter(None, choices)) if choices else ""
        several = {"crop_scale": 2, "lr_step_epochs": "+", "mean": "+", "std": "+"}.get(name)
        option("--" + name.replace("_", "-"), type=kind, nargs=several, choices=choices,
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
    option("--save-minutes", type=positive, default=10, help="between two checkpoints (10); there is one at the end, and when the run is "
           "stopped: by Ctrl-C, SIGTERM or SIGUSR1, after the step, with exit code 75")
    option("--save-epochs", type=count, help="a checkpoint after every so many epochs, too")
    option("--max-bad", type=share, default=0.01, help="unreadable images are replaced by others and listed in bad_images.txt; with more than "
           "this share in an epoch, the run stops (0.01)")
    option("--deterministic", action="store_true", help="the same bits again on a GPU, too, at some cost in speed (a CPU needs no option)")
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
    recipe = dict(arch=arch, method=method, data="shapes", mask_layer=models.PRESETS[arch].get("mask_layer", 0)) | table[arch] | data.colours(given)
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
                         fill=config["fill"], channels=config["channels"], **drop_path)
    if config["mask_size"] % (stride := model.encoder.strides[config["mask_layer"]]):
        raise ValueError(f"mask_size {config['mask_size']} is not a multiple of {stride}, the encoder's stride at layer "
                         f"{config['mask_layer']}")
    frequency = {} if config["frequency_loss"] is None else dict(
        frequency_weight=config["frequency_weight"], standin=config["frequency_standin"], visible=config["frequency_visible"])
    return model, losses.A2MIMLoss(config["spatial_loss"], config["frequency_loss"], **frequency)


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


# ------------------------------------------------------------------------------------------------ devices

def place(model, device, world):
    """The model on its device; several GPUs normalise over their batches together."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                          # TF32 where mixed precision is off
        if world > 1:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if not isinstance(model.encoder, models.ViT):                           # convolutions are fastest with channels innermost
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def replicate(model, device, world, accumulate):
    """What to call in training: the model, on several processes wrapped so that they exchange gradients. (Buffers need no
    exchange: they are constants, or statistics that synchronised batch norms agree on.)"""
    if world == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)                      # broadcast_buffers has another name from PyTorch 2.15 on
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
                                       gradient_as_bucket_view=True, static_graph=accumulate == 1)


def loader_workers(args):
    """Loader processes of this process: as asked, else its share of the cores."""
    return min(8, data.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if args.workers is None else args.workers


@torch.no_grad()
def reconstruct(model, image, mask):
    """Of normalised images: [image, what the model sees of it, reconstruction, composite (reconstruction where masked)]."""
    prediction = model.forward(image, mask)                                 # not compiled: another batch size
    seen = masking.fill(image, mask, "zero" if model.fill == "none" else model.fill)
    return [image, seen, prediction, torch.where(masking.resize(mask, image.shape[-2:]) > 0, prediction, image)]


def draw(path, model, image, mask, mean, std):
    """Four rows of `reconstruct`, a column an image (uint8)."""
    image, mask = (tensor.to(model.decoder[0].weight.device) for tensor in (image, mask))
    rows = reconstruct(model.eval(), data.normalize(image, mean, std), mask)
    model.train()
    data.write_picture(path, data.denormalize(torch.cat(rows), mean, std), columns=len(image))


# ------------------------------------------------------------------------------------------------ training

PARTS = ("loss", "spatial", "frequency")
LINE = "epoch {epoch} loss {loss:.4f} (spatial {spatial:.4f}, frequency {frequency:.4f}), {images_per_second:.0f} images/s"


def view(sample, generator, size, scale):
    """What a loader's worker makes of an (image, label): a crop (3, size, size) uint8; the generator then draws the mask."""
    return data.random_resized_crop(sample[0], size, scale, generator), generator


def collate(samples, mask, grid, ratio):
    """... and of many: crops (B, 3, size, size) uint8, masks (B, grid, grid)."""
    crops, generators = zip(*samples)
    return torch.stack(crops), masking.MASKS[mask](len(crops), grid, ratio, generators)


def prepare(args, config, world, device):
    """The run, its model and data. Whatever can be wrong with it is found here, before anything is written. Raises ValueError
    and OSError."""
    micro_batch = find_micro_batch(config["batch_size"], args.micro_batch, world, RECIPES[config["arch"]]["micro_batch"])
    torch.manual_seed(data.key(args.seed))
    model, criterion = build(config)
    size, grid = config["img_size"], config["img_size"] // config["mask_size"]
    source, held_out = (sources.open_source(config["data"], split, size, config["channels"]) for split in ("train", "val"))
    total = config["epochs"] * (len(source) // config["batch_size"])
    name = os.path.basename(os.path.normpath(config["data"]))
    out = args.out or os.path.join("runs", f"{config['arch']}-{config['method']}-{name}")
    # what a run is: none of these may change when it continues; the micro-batch is one where spectra are averaged over it
    identity = config | dict(seed=args.seed, images=len(source), micro_batch=micro_batch if config["frequency_loss"] == "focal" else None)
    run = harness.Run(args, out, identity, total)
    batches = data.Batches(len(source), config["batch_size"], micro_batch, run.start, run.stop, args.seed, RANK, world)
    views = data.Views(source, functools.partial(view, size=size, scale=config["crop_scale"]), args.seed)
    stream = data.loader(views, batches, loader_workers(args), device.type == "cuda",
                         functools.partial(collate, mask=config["mask"], grid=grid, ratio=config["mask_ratio"]))
    data.readable(source, 0, args.seed, -1)                                 # if none is, now is the time to say so
    shown = [data.readable(held_out, int(i), args.seed, -1, i)[0][0] for i in torch.linspace(0, len(held_out) - 1, min(8, len(held_out)))]
    shown = torch.stack([data.center_crop(image, size) for image in shown])
    shown_mask = masking.MASKS[config["mask"]](len(shown), grid, config["mask_ratio"], [data.generator(args.seed, -1, i) for i in range(len(shown))])
    if shown_mask.shape != (len(shown), grid, grid) or not shown_mask.flatten(1).any(1).all():
        raise ValueError(f"--mask {config['mask']} makes no masks (B, {grid}, {grid}) with masked blocks, but {tuple(shown_mask.shape)}")
    return run, SimpleNamespace(model=model, criterion=criterion, micro_batch=micro_batch, images=len(source), stream=stream,
                                steps_per_epoch=batches.steps_per_epoch, shown=(shown, shown_mask, config["mean"], config["std"]))


def train(args, config, world, device):
    if config["data"] in sources.SOURCES:                                   # one process of each machine downloads
        together(lambda: os.environ.get("LOCAL_RANK", "0") == "0" and sources.open_source(config["data"], "train", 32))
    run, this = together(lambda: prepare(args, config, world, device))
    model, criterion, steps_per_epoch = this.model, this.criterion, this.steps_per_epoch
    accumulate = config["batch_size"] // (this.micro_batch * world)

    # ---- what this run is
    say(f"{config['method']}: {config['arch']}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, on {device} × "
        f"{world}, {config['data']}: {this.images:,} images at {config['img_size']} px"
        + ("" if "data" in args else " (no --data given: the built-in images)"))
    run.announce(config, this.micro_batch, accumulate)
    if config["frequency_loss"] == "focal" and this.micro_batch != (usual := RECIPES[config["arch"]]["micro_batch"]):
        say(f"note: spectra are averaged over {this.micro_batch} images, the recipe's micro-batch is {usual}; fewer give a larger loss")
    if config["schedule"] == "step" and config["lr_step_epoch"] >= config["epochs"]:
        say(f"note: the learning rate would step at epoch {config['lr_step_epoch']}, after the end: see --lr-step-epoch")
    if run.start >= run.stop:
        return

    # ---- model, optimizer, precision, data
    model = place(model, device, world)
    optimizer = optim.make_optimizer(model, config)
    autocast, scaler = precision(args.amp, device)
    if run.resumed:
        together(lambda: run.restore(model, optimizer, scaler))
    if args.compile:
        model.compile()
    replica = replicate(model, device, world, accumulate)
    stream, picture = iter(this.stream), os.path.join(run.out, "recon.png")

    def snapshot():
        return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    model.train()
    with run.underway(snapshot, PARTS, LINE, config["batch_size"]):
        for step in range(run.start, run.stop):
            torch.manual_seed(data.key(args.seed, step, RANK))              # drop path, the same when continued
            factor = optim.learning_rate(config, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            parts, problems, before = torch.zeros(len(PARTS), device=device), [], optim.statistics(model)
            for micro in range(accumulate):
                batch, unreadable = next(stream)
                image, mask = (tensor.to(device, non_blocking=True) for tensor in batch)
                image = data.normalize(image, config["mean"], config["std"])
                last = micro == accumulate - 1                              # gradients travel between processes once
                with contextlib.nullcontext() if last or world == 1 else replica.no_sync():
                    with autocast():
                        reconstruction = replica(image, mask)
                    loss = criterion(reconstruction, image, mask)           # in float32
                    scaler.scale(loss["loss"] / accumulate).backward()
                parts += torch.stack([loss[name].detach() for name in PARTS]) / accumulate
                problems += unreadable
            sums = run.agree(parts, problems)
            skipped = optim.update(model, optimizer, scaler, config["clip"], sums[0], before)

            done = step + 1
            run.report(done, sums, skipped, config["lr"] * factor)
            if run.due(done):
                if RANK == 0:
                    run.attempt(draw, picture, model, *this.shown)
                run.save(done)
            if run.stopping and done < run.stop:
                return run.leave(done)
    if run.problem:
        fail(run.problem)
    say(f"Loss {run.first['loss']:.4f} -> {run.recent['loss']:.4f}. Pictures: {picture}; weights: {run.last}; curve: {run.log}.")
    if run.stop == run.total:
        say("Next: your own images, python train.py --data FOLDER; a CNN, --arch resnet_nano; the baseline, --method simmim.")
    else:
        say("The same command without --steps goes on from here.")


def main(argv=None):
    args = parse(argv)
    try:
        config = resolve(args)
    except ValueError as error:
        fail(error)
    if args.print_config:
        say(json.dumps(config, indent=2))
    else:
        harness.launch(train, args, config)


if __name__ == "__main__":
    main()
