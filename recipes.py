"""The published recipes of pre-training, the options of train.py, and what they come to.

lr is the one at the recipe's own batch_size. `--print-config` shows what a command line comes to.
"""
import argparse
from typing import Any, NamedTuple

import data
import losses
import masking
import model as models
import runtime
import weights

# ---- recipes: one row an architecture

VIT = dict(
    epochs=800, img_size=224, batch_size=2048, micro_batch=256, lr=dict(a2mim=4e-4, simmim=4e-4),
    min_lr=None, schedule="step", lr_step_epoch=700, warmup_epochs=10, weight_decay=0.05, clip=5.0,
    drop_path=0.1, crop_scale=(0.67, 1.0), mask="random", mask_size=32, mask_ratio=0.6, fill="mean",
    token="add", spatial_loss="l1", frequency_loss="focal", frequency_weight=0.1,
    frequency_standin="mixed", frequency_visible=0.0, token_lr_scale=1.0)
COSINE = dict(schedule="cosine", lr_step_epoch=None, min_lr=1e-5)
DEIT = VIT | COSINE | dict(img_size=192, lr=dict(a2mim=8e-4, simmim=4e-4))
RESNET = VIT | COSINE | dict(
    epochs=300, lr=dict(a2mim=1.2e-3, simmim=8e-4), clip=None, drop_path=None,
    crop_scale=(0.8, 1.0), spatial_loss="focal_l1", frequency_weight=0.5, frequency_visible=1e-3,
    token_lr_scale=0.1)
CONVNEXT = RESNET | dict(frequency_loss=None)
NANO = COSINE | dict(  # ours; mask_size None: 4 blocks a side
    epochs=8, img_size=64, batch_size=32, micro_batch=32, lr=dict(a2mim=3e-3, simmim=3e-3),
    warmup_epochs=1, mask_size=None)


class Recipes(dict):
    """Rows by architecture; what has none has that of the preset which it is like."""

    def __missing__(self, arch):
        return self[models.preset(arch)["like"]]


RECIPES = Recipes({
    "vit_s": VIT,
    "vit_b": VIT | dict(micro_batch=128),
    "vit_l": VIT | dict(micro_batch=128),
    "deit_t": DEIT,  # ours; so is deit_s, but on ImageNet-100
    "deit_s": DEIT,
    "vit_nano": VIT | NANO | dict(drop_path=0.0),
    "resnet18": RESNET,  # ours
    "resnet34": RESNET,  # ours
    "resnet50": RESNET,
    "resnet101": RESNET | dict(frequency_loss="focal_l1", frequency_weight=0.1),
    "resnet152": RESNET | dict(frequency_loss=None),
    "resnet200": RESNET | dict(frequency_loss=None),
    "resnet_nano": RESNET | NANO | dict(img_size=32),
    "convnext_t": CONVNEXT,
    "convnext_s": CONVNEXT,
    "convnext_b": CONVNEXT,
})
IMAGENET100 = {"deit_t": DEIT, "deit_s": DEIT}  # published: deit_s and resnet50
for arch in ("resnet18", "resnet34", "resnet50"):
    IMAGENET100[arch] = RESNET | dict(epochs=800, img_size=192)

METHODS = {  # what differs from the recipe; SimMIM: arXiv 2111.09886
    "a2mim": {},
    "simmim": dict(mask_layer=0, fill="none", token="replace", spatial_loss="l1",
                   frequency_loss=None, crop_scale=(0.67, 1.0), token_lr_scale=1.0),
}

# ---- options

class Option(NamedTuple):
    kind: Any  # int, float, str, bool (a flag), or one of the four below
    help: str
    low: float = 0  # smallest and largest number
    high: float = 1e9
    choices: tuple = ()
    several: Any = None  # how many values: argparse's nargs
    default: Any = None  # of how to run; the configuration's are the recipe's


def number_or_none(text):
    return None if text == "none" else float(text)


def integer_or_none(text):
    return None if text == "none" else int(text)


def true_or_false(text):
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def name_or_none(text):
    return None if text == "none" else text


OPTIONS = {  # the configuration: what --print-config shows
    "arch": Option(str, "architecture, and with it the recipe: timm/NAME, if timm is installed, or "
                   + ", ".join(models.PRESETS)),
    "method": Option(str, "published method, or baseline", choices=tuple(METHODS)),
    "data": Option(str, "a folder of images, of class folders, or of train/ and val/ with those; a "
                   ".tar of one; a folder of .tar shards; or " + ", ".join(data.SOURCES)),
    "shapes_count": Option(integer_or_none, "built-in images to train on; more are other ones", 1),
    "channels": Option(int, "of images; 1: grey (absent: as many as --mean has)", 1, 1000),
    "mean": Option(float, "of each channel, pixels in 0..1 (see extras/stats.py)", 0, 1, several="+"),
    "std": Option(float, "standard deviation of each channel", 1e-6, 1, several="+"),
    "img_size": Option(int, "side of the square training crops, pixels", 1),
    "epochs": Option(int, "passes over the training images", 1),
    "batch_size": Option(int, "images to an optimizer step, of all processes together", 1),
    "lr": Option(float, "peak learning rate (absent: the recipe's, linear in the batch size)"),
    "min_lr": Option(number_or_none, "where a cosine schedule ends"),
    "schedule": Option(str, "after a linear warm-up, or times it: a cosine from the start, in steps "
                       "or epochs", choices=("step", "cosine", "cosine_from_start", "cosine_by_epoch")),
    "lr_step_epoch": Option(integer_or_none, "of the step schedule: ×0.1"),
    "warmup_epochs": Option(float, "of linear warm-up; half of the run at most"),
    "weight_decay": Option(float, "biases, norms, positions, tokens and scales have none"),
    "clip": Option(number_or_none, "largest norm of the gradient, or none"),
    "drop_path": Option(number_or_none, "stochastic depth, rising to this from block to block", high=1),
    "crop_scale": Option(float, "share of an image in a crop: from, to", 1e-6, 1, several=2),
    "mask": Option(str, "which blocks are masked", choices=tuple(masking.MASKS)),
    "mask_size": Option(int, "side of a mask block, pixels", 1),
    "mask_ratio": Option(float, "share of masked blocks", 1e-6, 1 - 1e-6),
    "mask_layer": Option(int, "the mask token goes in just before this layer, from 0"),
    "fill": Option(str, "what masked pixels show", choices=tuple(masking.FILLS)),
    "token": Option(str, "what the token does to features", choices=("add", "replace", "none")),
    "spatial_loss": Option(str, "over masked pixels", choices=tuple(losses.ELEMENTWISE)),
    "frequency_loss": Option(name_or_none, "over frequencies", choices=(*losses.FREQUENCY, None)),
    "frequency_weight": Option(float, "λ"),
    "frequency_standin": Option(str, "for visible pixels, before the DFT",
                                choices=tuple(losses.STANDINS)),
    "frequency_visible": Option(float, "u, share of gradient at visible pixels", high=1),
    "token_lr_scale": Option(float, "learning rate of mask token and γ, relative to all others"),
}
RUN = {  # how to run it
    "recipe": Option(str, "which recipe of --arch", choices=("imagenet", "imagenet100"),
                     default="imagenet"),
    "print_config": Option(bool, "print the configuration as JSON and exit"),
    "init": Option(str, "checkpoint to start from, ours or another project's"),
    "out": Option(str, "folder of the run (absent: one below runs/, named after it)"),
    "seed": Option(int, "of weights, order, augmentation, drop path", -2 ** 63, 2 ** 63, default=0),
    "steps": Option(int, "stop after so many optimizer steps; the schedule stays", 1),
    "micro_batch": Option(int, "images that a process takes through the model at once; part of the "
                          "recipe where spectra are averaged (absent: the recipe's)", 1),
    "workers": Option(int, "loader processes of each process (absent: its cores, at most 8)"),
    "amp": Option(str, "mixed precision; auto: bf16 or fp16 on a GPU, off on a CPU",
                  choices=("auto", "bf16", "fp16", "off"), default="auto"),
    "compile": Option(bool, "torch.compile the model: a minute at the start, for a GPU"),
    "deterministic": Option(bool, "the same bits again on a GPU, too, at some cost in speed"),
    "log_every": Option(int, "optimizer steps between two log entries", 1, default=10),
    "save_minutes": Option(float, "between two checkpoints; one more at the end, or when the run is "
                           "stopped, by Ctrl-C, SIGTERM or SIGUSR1 (exit code 75)", default=10.0),
    "save_epochs": Option(int, "a checkpoint after every so many epochs, too", 1),
    "max_bad": Option(float, "stop when more of an epoch's images are unreadable than this share",
                      high=1, default=0.01),
}


class Config(dict):
    """A dictionary whose keys are attributes, too: cfg["lr"] is cfg.lr."""

    def __init__(self, *args, **values):
        super().__init__(*args, **values)
        self.__dict__ = self


def parse(argv, doc, options, run):
    """(keys of the configuration that were given, how to run), Configs. Raises ValueError."""
    parser = runtime.Parser(usage="%(prog)s [option ...]", description=doc)
    for title, table in (("configuration", options), ("run", run)):
        group = parser.add_argument_group(title)
        for name, option in table.items():
            flag = "--" + name.replace("_", "-")
            text = option.help.replace("%", "%%")
            if option.kind is bool:
                group.add_argument(flag, action="store_true", help=text)
                continue
            if option.choices:
                text += ": " + ", ".join(choice or "none" for choice in option.choices)
            if option.default is not None:
                text += f" ({option.default})"
            group.add_argument(flag, type=option.kind, nargs=option.several, help=text,
                               choices=option.choices or None, metavar=name.upper(),
                               default=argparse.SUPPRESS)
    given = Config(vars(parser.parse_args(argv)))
    for name, value in given.items():
        option = (options | run)[name]
        for number in value if option.several else [value]:
            if isinstance(number, (int, float)) and not option.low <= number <= option.high:
                raise ValueError(f"--{name.replace('_', '-')} {number}: "
                                 f"give a number in {option.low:g}..{option.high:g}")
    args = Config({name: given.pop(name, option.default) for name, option in run.items()})
    return given, args


# ---- what a command line comes to

def colours(given, known):
    """channels, mean and std: as given, else as the checkpoint knows, else 3 and ImageNet's."""
    result = dict(channels=3, mean=data.MEAN, std=data.STD)
    for values in (known, given):
        result |= {key: values[key] for key in result if key in values}
    if "mean" in given and "channels" not in given:
        result["channels"] = len(result["mean"])
    if not len(result["mean"]) == len(result["std"]) == result["channels"]:
        raise ValueError(f"{result['channels']} channel(s) need as many numbers in --mean and --std: "
                         "python extras/stats.py SRC measures them")
    return result | dict(mean=list(result["mean"]), std=list(result["std"]))


def shapes_count(cfg):
    """How many built-in images there are to train on; None with other data. Raises ValueError."""
    if cfg.data == "shapes":
        return cfg.get("shapes_count") or 4096
    if cfg.get("shapes_count"):
        raise ValueError("only the built-in images can be counted out: leave out --shapes-count")
    return None


def start_from(args, given):
    """(checkpoint of --init or None, what it says of its run, architecture). Raises ValueError."""
    checkpoint = runtime.read(args.init) if args.init is not None else None
    known = weights.run_of(checkpoint or {})
    if checkpoint and "arch" not in given and "arch" not in known:
        raise ValueError(f"{args.init} does not say which architecture it holds: "
                         f"give --arch, one of {', '.join(models.PRESETS)}")
    arch = given.get("arch") or known.get("arch", "vit_nano")
    if known.get("arch", arch) != arch:
        raise ValueError(f"{args.init} holds a {known['arch']}, not a {arch}")
    return checkpoint, known, arch


def check(cfg):
    """What train.py and finetune.py ask of a configuration. Raises ValueError."""
    if cfg.crop_scale and cfg.crop_scale[0] > cfg.crop_scale[1]:
        raise ValueError("--crop-scale: the smaller share first")
    if cfg.schedule not in ("step", None) and cfg.min_lr is None:
        raise ValueError("a cosine schedule needs --min-lr")
    if cfg.schedule == "step" and not (cfg.get("lr_step_epoch") or cfg.get("lr_step_epochs")):
        raise ValueError("the step schedule needs the epochs of its steps: "
                         "--lr-step-epoch in pre-training, --lr-step-epochs in fine-tuning")


def pretraining(argv, doc):
    """(configuration, how to run, checkpoint of --init or None) of train.py. Raises ValueError."""
    given, args = parse(argv, doc, OPTIONS, RUN)
    checkpoint, known, arch = start_from(args, given)
    method = given.get("method", "a2mim")
    table = RECIPES if args.recipe == "imagenet" else IMAGENET100
    if table is IMAGENET100 and arch not in table:
        raise ValueError(f"ImageNet-100 has no recipe of {arch}: choose from {', '.join(table)}")

    # the recipe of the architecture, then the method's changes, then the user's
    recipe = table[arch]
    cfg = Config(recipe, arch=arch, method=method, data="shapes")
    cfg |= dict(mask_layer=models.preset(arch).get("mask_layer", 0)) | colours(given, known)
    cfg |= METHODS[method] | given
    cfg.shapes_count = shapes_count(cfg)
    if "lr" not in given:
        cfg.lr = recipe["lr"][method] * cfg.batch_size / recipe["batch_size"]
    if cfg.mask_size is None:
        cfg.mask_size = max(1, cfg.img_size // 4)
    if cfg.frequency_loss is None:
        cfg |= dict(frequency_weight=None, frequency_standin=None, frequency_visible=None)
    if cfg.drop_path is None and recipe["drop_path"] is not None:
        cfg.drop_path = 0.0
    cfg.crop_scale = list(cfg.crop_scale)  # as JSON has it

    check(cfg)
    if cfg.img_size % cfg.mask_size:
        raise ValueError(f"img_size {cfg.img_size} is not a multiple of mask_size {cfg.mask_size}")
    return Config({key: cfg[key] for key in OPTIONS}), args, checkpoint


def micro_batch(batch_size, asked, world, usual):
    """Images a process takes at once: as asked, or the usual number, or the largest below that fits.

    Raises ValueError if the batch cannot be cut like that.
    """
    share = batch_size // world
    if batch_size % world or share % (asked or 1):
        parts = f"{world} process(es)" + (f" × --micro-batch {asked}" if asked else "")
        raise ValueError(f"--batch-size {batch_size} is not divisible by {parts}")
    if asked:
        return asked
    size = min(usual, share)
    while share % size:
        size -= 1
    return size
