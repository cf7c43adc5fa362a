"""The fine-tuning protocols, the options of finetune.py, and what they come to.

lr is the one at the protocol's own batch_size. `--print-config` shows what a command line comes to.
"""
import model as models
import recipes
from recipes import Option, integer_or_none, number_or_none, true_or_false

# ---- protocols

BASE = dict.fromkeys((  # None: off, or not used by the protocol
    "img_size test_resize test_crop epochs batch_size optimizer lr min_lr schedule lr_step_epochs "
    "warmup_epochs weight_decay layer_decay clip drop_path loss label_smoothing mixup cutmix "
    "randaugment random_erasing repeated_augmentation ema crop_scale "
    "pool head_std qv_bias resize_bias sync_bn").split())
BASE |= dict(
    img_size=224, test_resize=256, test_crop=224, batch_size=256,
    pool="mean", head_std=0.01, qv_bias=True, resize_bias=True, sync_bn=True)
TUNE = BASE | dict(
    epochs=100, batch_size=1024, optimizer="adamw", min_lr=1e-6, schedule="cosine",
    warmup_epochs=20, weight_decay=0.05, loss="ce", label_smoothing=0.1, mixup=0.8, cutmix=1.0,
    randaugment=9, random_erasing=0.25, crop_scale=(0.08, 1.0))
SIMMIM = TUNE | dict(lr=1e-2, layer_decay=0.65, clip=5.0, drop_path=0.1)
CONVNEXT = TUNE | dict(
    epochs=300, batch_size=4096, lr=4e-3, schedule="cosine_from_start", warmup_epochs=5,
    drop_path=0.4, ema=0.9999, head_std=0.02)
RSB = TUNE | dict(
    batch_size=2048, optimizer="lamb", lr=8e-3, schedule="cosine_by_epoch", warmup_epochs=5,
    weight_decay=0.02, loss="bce", label_smoothing=None, mixup=0.1, randaugment=6,
    random_erasing=None, test_resize=236)
RSB_A3 = RSB | dict(img_size=160)
RSB_A2 = RSB | dict(epochs=300, lr=5e-3, randaugment=7, repeated_augmentation=3, drop_path=0.05)
# on ImageNet-100
DEIT_100 = SIMMIM | dict(
    lr=8e-3, warmup_epochs=5, pool="token", head_std=0.02, qv_bias=False, resize_bias=False)
RESNET_100 = TUNE | dict(batch_size=2048, lr=5e-3, schedule="cosine_from_start", sync_bn=False)
# ours
LINEAR = BASE | dict(
    optimizer="sgd", weight_decay=0.0, warmup_epochs=0, loss="ce", crop_scale=(0.08, 1.0))
LINEAR_VIT = LINEAR | dict(epochs=90, batch_size=1024, lr=12.0, min_lr=0.0, schedule="cosine")
LINEAR_CNN = LINEAR | dict(epochs=100, lr=30.0, schedule="step", lr_step_epochs=(60, 80))
SCRATCH_DEIT = SIMMIM | dict(  # after DeiT, arXiv 2012.12877
    epochs=300, lr=1e-3, min_lr=1e-5, warmup_epochs=5, layer_decay=None, clip=None,
    repeated_augmentation=3)
SMALL = BASE | dict(
    epochs=20, batch_size=64, optimizer="adamw", lr=2e-3, min_lr=1e-6, schedule="cosine",
    warmup_epochs=2, weight_decay=0.05, layer_decay=0.8, clip=5.0, loss="ce", label_smoothing=0.1,
    crop_scale=(0.5, 1.0))
SCRATCH_SMALL = SMALL | dict(layer_decay=None)

FAMILIES = ("vit", "resnet", "convnext")
PROTOCOLS = {  # the rows for those families that have one
    "simmim": dict(vit=SIMMIM),
    "rsb_a3": dict(resnet=RSB_A3),
    "rsb_a2": dict(resnet=RSB_A2),
    "convnext": dict(convnext=CONVNEXT),
    "linear": dict(vit=LINEAR_VIT, resnet=LINEAR_CNN, convnext=LINEAR_CNN),
    "knn": dict.fromkeys(FAMILIES, BASE),
    "small": dict.fromkeys(FAMILIES, SMALL),
    "scratch-deit": dict(vit=SCRATCH_DEIT),
    "scratch-rsb_a3": dict(resnet=RSB_A3),
    "scratch-rsb_a2": dict(resnet=RSB_A2),
    "scratch-convnext": dict(convnext=CONVNEXT),
    "scratch-small": dict.fromkeys(FAMILIES, SCRATCH_SMALL),
}
PROTOCOLS_IMAGENET100 = {"simmim": dict(vit=DEIT_100, resnet=RESNET_100)}
USUAL = dict(vit="simmim", resnet="rsb_a3", convnext="convnext")
FOR_ARCH = {  # what an architecture changes in a protocol, with scratch- or without
    "simmim": {
        "vit_s": dict(epochs=200),
        "vit_b": dict(ema=0.99996),
        "vit_l": dict(epochs=150, ema=0.99996, repeated_augmentation=3),
    },
    "rsb_a2": {
        "resnet50": dict(ema=0.9999),
        "resnet101": dict(drop_path=0.1),
        "resnet152": dict(drop_path=0.15),
        "resnet200": dict(drop_path=0.2),
    },
    "convnext": {"convnext_b": dict(drop_path=0.5)},
}

# ---- options

OPTIONS = recipes.OPTIONS | {
    "protocol": Option(str, "scratch-… is without --init; linear, knn, small and scratch-deit are ours",
                       choices=tuple(PROTOCOLS)),
    "test_resize": Option(int, "short side of test images, pixels (absent: as --img-size asks)", 1),
    "test_crop": Option(int, "side of their central crop, pixels (absent: as --img-size asks)", 1),
    "optimizer": Option(str, "of the training", choices=("adamw", "lamb", "sgd")),
    "lr_step_epochs": Option(int, "of the step schedule: ×0.1 at each", several="+"),
    "layer_decay": Option(number_or_none, "factor on the lr from block to block, downwards", high=1),
    "loss": Option(str, "cross entropy, or binary cross entropy", choices=("ce", "bce")),
    "label_smoothing": Option(number_or_none, "of the targets", high=1),
    "mixup": Option(number_or_none, "α of mixup; with cutmix, a coin decides for each batch"),
    "cutmix": Option(number_or_none, "α of cutmix"),
    "randaugment": Option(number_or_none, "magnitude of RandAugment", high=10),
    "random_erasing": Option(number_or_none, "how often a box of an image is erased", high=1),
    "repeated_augmentation": Option(integer_or_none, "crops of an image in one epoch", 1),
    "ema": Option(number_or_none, "decay of a mean of the weights, which is tested", high=1),
    "pool": Option(str, "what the head sees of a ViT", choices=("mean", "token")),
    "head_std": Option(float, "standard deviation of its first weights", 1e-6),
    "qv_bias": Option(true_or_false, "whether a ViT's queries and values have biases: true, false"),
    "resize_bias": Option(true_or_false, "of another image size, resize tables of relative position "
                          "bias; false: start them at zero"),
    "sync_bn": Option(true_or_false, "batch norm over all processes: true, false"),
}
KEYS = ("arch", "protocol", "data", "shapes_count", "channels", "mean", "std", *BASE)
OPTIONS = {key: OPTIONS[key] for key in KEYS}
RUN = recipes.RUN | {
    "task": Option(str, "what to predict; pose, mask: of built-in images only (absent: class)",
                   choices=("class", "pose", "mask")),
    "freeze": Option(bool, "train the head only, as linear does"),
    "eval": Option(bool, "only evaluate --init, head included, on the test images (of a folder "
                   "without train/: on all)"),
    "labels": Option(int, "train on so many images, drawn by --seed (absent: all)", 1),
    "eval_every": Option(int, "epochs between two evaluations", 1, default=1),
    "k": Option(int, "knn: neighbours", 1, default=20),
    "temperature": Option(float, "knn: a neighbour weighs exp(similarity / temperature)", 1e-6,
                          default=0.07),
}


# ---- what a command line comes to

def family(arch):
    """Whose protocols an architecture uses: those of "resnet", "convnext" or "vit"."""
    for name in ("resnet", "convnext"):
        if name in models.like(arch):
            return name
    return "vit"


def protocol_of(recipe, protocol, arch):
    """The row of a protocol for an architecture. Raises ValueError."""
    table = PROTOCOLS
    if recipe == "imagenet100":
        table = PROTOCOLS_IMAGENET100 if arch in recipes.IMAGENET100 else {}
    names = [name for name in table if family(arch) in table[name]]
    if protocol not in names:
        raise ValueError(f"there is no {protocol} protocol of {recipe} for {arch}: "
                         f"choose from {', '.join(names) or 'those of --recipe imagenet'}")
    changes = FOR_ARCH.get(protocol.removeprefix("scratch-"), {})
    row = table[protocol][family(arch)] | changes.get(models.like(arch), {})
    if family(arch) != "vit":
        row = row | dict(qv_bias=None, resize_bias=None)
    return row


def finetuning(argv, doc):
    """(configuration, how to run, checkpoint of --init or None) of finetune.py."""
    given, args = recipes.parse(argv, doc, OPTIONS, RUN)
    checkpoint, known, arch = recipes.start_from(args, given)
    nano = "nano" in models.like(arch)
    protocol = "simmim" if args.recipe == "imagenet100" else USUAL[family(arch)]
    if nano:
        protocol = "small"
    # what is only evaluated is tested as it was while it was trained
    tested = known if args.eval and "test_crop" in known else {}
    protocol = given.get("protocol", tested.get("protocol", protocol))
    args.task = args.task or tested.get("task", "class")
    row = protocol_of(args.recipe, protocol, arch)

    # what has no size of its own takes the encoder's
    if nano or protocol in ("knn", "small", "scratch-small"):
        size = known.get("img_size") or recipes.RECIPES[arch]["img_size"]
        resize = round(size * 256 / 224) if protocol == "knn" and not nano else size
        row = row | dict(img_size=size, test_crop=size, test_resize=resize)
    sizes = ("img_size", "test_resize", "test_crop")
    row = row | {key: tested[key] for key in (*sizes, "pool", "qv_bias") if key in tested}

    # options without effect are refused, and shown as null
    unused = []
    if args.eval or protocol == "knn":
        used = (*sizes, "batch_size", "pool", "qv_bias", "resize_bias")
        unused = [key for key in BASE if key not in used]
        reason = "where nothing is trained"
    elif args.task != "class":  # images are seen whole, and as they are
        unused = ("test_resize test_crop loss label_smoothing mixup cutmix randaugment "
                  "random_erasing crop_scale pool").split()
        reason = f"on the {args.task}"
    for key in unused:
        if key in given:
            raise ValueError(f"--{key.replace('_', '-')} has no effect {reason}: leave it out")
    row = row | {key: None for key in unused if key not in sizes}

    cfg = recipes.Config(row, arch=arch, protocol=protocol, data="shapes")
    cfg |= recipes.colours(given, known) | given
    cfg.shapes_count = recipes.shapes_count(cfg)
    if "lr" not in given and row["lr"]:
        cfg.lr = row["lr"] * cfg.batch_size / row["batch_size"]
    if "test_crop" not in given:
        cfg.test_crop = cfg.img_size
        if row["test_crop"] != row["img_size"]:         # of CNNs, whose strides go up to 32
            ratio = row["test_crop"] / row["img_size"]
            cfg.test_crop = 32 * round(cfg.img_size * ratio / 32)
    if "test_resize" not in given:
        resize = round(row["test_resize"] * cfg.test_crop / row["test_crop"])
        cfg.test_resize = max(cfg.test_crop, resize)
    if args.task != "class":
        cfg |= dict(test_resize=cfg.img_size, test_crop=cfg.img_size)
    for key in ("crop_scale", "lr_step_epochs"):
        cfg[key] = cfg[key] and list(cfg[key])  # as JSON has it

    recipes.check(cfg)
    if args.eval and (args.init is None or protocol == "knn"):
        raise ValueError("--eval needs --init, a fine-tuned checkpoint, and no --protocol knn")
    if args.init is not None and protocol.startswith("scratch-") and not args.eval:
        raise ValueError(f"{protocol} starts from random weights: leave out --init, "
                         "or choose another --protocol")
    if args.task != "class" and cfg.data != "shapes":
        raise ValueError(f"only the built-in images know the {args.task}: leave out --data")
    if args.task != "class" and protocol in ("knn", "linear"):
        raise ValueError(f"{protocol} is for classes, not for the {args.task}: "
                         "choose another --protocol, and --freeze for a probe")
    if cfg.randaugment is not None and cfg.channels not in (1, 3):
        raise ValueError(f"RandAugment is for 1 or 3 channels, not {cfg.channels}: --randaugment none")
    if cfg.test_resize < cfg.test_crop:
        raise ValueError(f"test_resize {cfg.test_resize} is smaller than test_crop {cfg.test_crop}")
    return recipes.Config({key: cfg[key] for key in OPTIONS}), args, checkpoint
