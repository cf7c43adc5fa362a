"""Find out what an encoder's features are worth: fine-tune it, probe it, or evaluate it.

  python finetune.py --init runs/vit_nano-a2mim-shapes/last.pt             fine-tune on the built-in images' ten classes
  python finetune.py --arch vit_nano --protocol scratch-small              the same from scratch
  python finetune.py --init CHECKPOINT --protocol knn --data FOLDER        nearest neighbours, nothing is trained
  python finetune.py --init CHECKPOINT --task pose --freeze                where, how large, turned how far?
  torchrun --nproc_per_node=8 finetune.py --arch vit_b --init CHECKPOINT --data path/to/imagenet       as published

CHECKPOINT is ours or another project's (see weights.py). --protocol picks a published recipe; any field of it can be
overridden. A run lives in a folder: last.pt, best.pt, log.jsonl, result.json. The same command again continues it.
"""
import contextlib
import functools
import json
import os
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import data
import evaluate
import harness
import losses
import model as models
import optim
import shapes
import sources
import train
import weights
from harness import RANK, fail, say, sum_over_ranks, together
from recipes import FOR_ARCH, IMAGENET100, KEYS, PROTOCOLS, PROTOCOLS_IMAGENET100, RECIPES, SIZES, TRAINING, UNCUT
from train import count, number, optional, positive, share

# ------------------------------------------------------------------------------------------------ configuration

CHANGED = {  # options beside those of train.CONFIG: (type, help, choices)
    "arch": (str, "architecture; absent: the checkpoint's, if it is ours", RECIPES),
    "protocol": (str, "scratch-…: without --init; knn trains nothing; small is ours, for small images, and the default of the nano presets; "
                      "the others are as published, the defaults simmim for a ViT and rsb_a3 for a ResNet", PROTOCOLS),
    "data": (str, "a folder of class folders, or of train/ and val/ with class folders; a pack of one (data.py pack); or one of "
                  f"{', '.join(sources.SOURCES)} (all but shapes are downloaded)", None),
    "test_resize": (count, "short side of test images, pixels; absent: in proportion to img_size", None),
    "test_crop": (count, "side of their central crop, pixels; absent: in proportion to img_size", None),
    "optimizer": (str, "of the training", ("adamw", "lamb", "sgd")),
    "lr": (positive, "peak learning rate; absent: the protocol's, scaled linearly with the batch size", None),
    "schedule": (str, "after a linear warm-up; step is ×0.1 at each of --lr-step-epochs", ("step", "cosine")),
    "lr_step_epochs": (number(int, 0), "of the step schedule", None),
    "weight_decay": (positive, "biases, norms, positions, tokens and scales have none", None),
    "layer_decay": (optional(share), "factor on the learning rate from each block to the one below, or none", None),
    "clip": (optional(positive), "largest norm of the gradient, or none (LAMB has its own)", None),
    "loss": (str, "cross entropy, or binary cross entropy summed over classes", ("ce", "bce")),
    "label_smoothing": (optional(share), "of the targets", None),
    "mixup": (optional(positive), "α of mixup; with cutmix too, a coin decides for each batch", None),
    "cutmix": (optional(positive), "α of cutmix", None),
    "randaugment": (optional(number(float, 0, 10)), "magnitude of RandAugment", None),
    "random_erasing": (optional(share), "how often a box of an image is erased", None),
    "repeated_augmentation": (optional(count), "crops of an image in one epoch", None),
    "ema": (optional(share), "decay of a running mean of the weights, which is then evaluated", None),
}
CONFIG = {key: (train.CONFIG | CHANGED)[key] for key in KEYS}


def parse(argv):
    parser = train.make_parser("finetune.py", "[--init CHECKPOINT] [--protocol PROTOCOL] [--data DATA] [option ...]", __doc__,
                               CONFIG, "protocol", " (at most 256; 128 for vit_b and vit_l)")
    option = parser.add_argument_group("what to find out").add_argument
    option("--init", metavar="CHECKPOINT", help="encoder to start from, its classifier left aside; absent: random weights")
    option("--task", choices=losses.TASKS, help="class (the default); or of the built-in images, the pose (centre, size, angle) or the "
           "object's mask")
    option("--freeze", action="store_true", help="train the head only, as linear does")
    option("--eval", action="store_true", help="evaluate --init, head included, on the test images (of a folder without train/: "
           "on all), and train nothing")
    option("--labels", type=count, help="train on this many images, drawn by --seed (all)")
    option("--eval-every", type=count, default=1, help="epochs between two evaluations (1)")
    option("--k", type=count, default=20, help="knn: neighbours (20)")
    option("--temperature", type=number(float, 1e-6), default=0.07, help="knn: a neighbour weighs exp(similarity / temperature) (0.07)")
    return parser.parse_args(argv)


def resolve(args, checkpoint=None):
    """The configuration: row of --protocol for --arch, then what was given. Raises ValueError, in one line.

    checkpoint: what the file --init holds; ours say which architecture and image size it is.
    """
    given, known = vars(args), weights.run_of(checkpoint)
    if args.init is not None and "arch" not in given and "arch" not in known:
        raise ValueError(f"{args.init} does not say which architecture it holds: give --arch, one of {', '.join(RECIPES)}")
    arch = given.get("arch") or known.get("arch", "vit_nano")
    if known.get("arch", arch) != arch:
        raise ValueError(f"{args.init} holds a {known['arch']}, not a {arch}")
    like = models.like(arch)
    cnn, nano = "resnet" in like, "nano" in like
    if args.task is None:
        args.task = known["task"] if args.eval and known.get("task") in losses.TASKS else "class"
    protocol = given.get("protocol") or (known["protocol"] if args.eval and known.get("protocol") in PROTOCOLS else "small" if nano
                                         else "rsb_a3" if cnn and args.recipe == "imagenet" else "simmim")
    table = PROTOCOLS if args.recipe == "imagenet" else PROTOCOLS_IMAGENET100 if arch in IMAGENET100 else {}
    row = table.get(protocol, (None, None))[cnn]
    if row is None:
        some = [name for name, rows in table.items() if rows[cnn]]
        raise ValueError(f"there is no {protocol} protocol of {args.recipe} for {arch}" + (f": choose from {', '.join(some)}" if some else ""))
    if args.init is not None and protocol.startswith("scratch-") and not args.eval:
        raise ValueError(f"{protocol} starts from random weights: leave out --init, or choose another --protocol")
    if args.recipe == "imagenet":
        row = row | FOR_ARCH.get(protocol, {}).get(like, {})
    if nano or protocol in ("knn", "small", "scratch-small"):               # no size of their own: the encoder's
        size = known.get("img_size") or RECIPES[arch]["img_size"]
        row = row | dict(img_size=size, test_crop=size, test_resize=round(size * 256 / 224) if protocol == "knn" and not nano else size)
    if args.eval:                                                           # as it was tested while it was trained
        row = row | {key: known[key] for key in SIZES if SIZES <= known.keys()}
    whole, still = args.task != "class", args.eval or protocol == "knn"     # pose and mask: whole images, as they are
    without = TRAINING if still else UNCUT if whole else []                 # what has no effect
    if odd := [name for name in without if name in given]:
        raise ValueError(f"--{odd[0].replace('_', '-')} has no effect " + ("where nothing is trained" if still else f"on the {args.task}")
                         + ": leave it out")
    row = row | {name: None for name in without if name not in SIZES}
    config = dict(arch=arch, protocol=protocol, data="shapes") | data.colours(given, known) | row
    config |= {name: given[name] for name in CONFIG if name in given}
    if "lr" not in given and row["lr"]:
        config["lr"] = row["lr"] * config["batch_size"] / row["batch_size"]
    if "test_crop" not in given:
        config["test_crop"] = round(row["test_crop"] * config["img_size"] / row["img_size"])
    if "test_resize" not in given:
        config["test_resize"] = max(config["test_crop"], round(row["test_resize"] * config["test_crop"] / row["test_crop"]))
    if whole:
        config |= dict(test_resize=config["img_size"], test_crop=config["img_size"])
    for name in ("crop_scale", "lr_step_epochs"):
        config[name] = config[name] and list(config[name])                  # as JSON has it
    c = SimpleNamespace(**config)
    for wrong, message in (
            (args.eval and args.init is None, "--eval needs --init, a fine-tuned checkpoint"),
            (args.eval and protocol == "knn", "--eval evaluates a head and knn has none: take one of them"),
            (c.crop_scale and not 0 < c.crop_scale[1] >= c.crop_scale[0], "--crop-scale: the smaller share first, above 0"),
            (c.randaugment is not None and c.channels not in (1, 3), f"RandAugment knows no images of {c.channels} channels: --randaugment none"),
            (whole and c.data != "shapes", f"only the built-in images know the {args.task}: leave out --data"),
            (whole and protocol in ("knn", "linear"), f"{protocol} is for classes, not for the {args.task}: "
             "choose another --protocol, and --freeze for a probe"),
            (c.test_resize < c.test_crop, f"test_resize {c.test_resize} is smaller than test_crop {c.test_crop}"),
            (c.schedule == "step" and not c.lr_step_epochs, "the step schedule needs --lr-step-epochs"),
            (c.schedule == "cosine" and c.min_lr is None, "the cosine schedule needs --min-lr")):
        if wrong:
            raise ValueError(message)
    return {name: config[name] for name in CONFIG}


# ------------------------------------------------------------------------------------------------ what is seen

def mix(image, label, config, classes):
    """Mixup or cutmix of a batch, one λ for all (arXiv 1710.09412, 1905.04899): image, soft targets (B, K)."""
    kinds = [kind for kind, name in ((v2.MixUp, "mixup"), (v2.CutMix, "cutmix")) if config[name]]
    if not kinds:
        return image, F.one_hot(label, classes).float()
    kind = kinds[int(torch.rand(()) * len(kinds))]
    return kind(alpha=config["mixup" if kind is v2.MixUp else "cutmix"], num_classes=classes)(image, label)


def train_view(sample, generator, config):
    """What a loader's worker makes of an (image, target) in training."""
    image, target = sample
    if config["crop_scale"] is not None:
        image = data.random_resized_crop(image, config["img_size"], config["crop_scale"], generator, interpolation=data.BICUBIC)
    if config["randaugment"] is not None or config["random_erasing"]:
        image = data.augment(image, generator, config["randaugment"], config["random_erasing"], config["mean"], config["std"])
    return image, target


def test_view(sample, generator, config):
    return data.evaluation_crop(sample[0], config["test_resize"], config["test_crop"]), sample[1]


# ------------------------------------------------------------------------------------------------ runs

LINE = "epoch {epoch} loss {loss:.4f}, {images_per_second:.0f} images/s"


def open_labelled(config, split, task):
    """Source of a split, of images that have a label, and the names of the classes. Raises ValueError."""
    if task != "class":
        return sources.Channels(shapes.Shapes(config["img_size"], split, target=task), config["channels"]), None
    source = sources.open_source(config["data"], split, config["img_size"], config["channels"])
    if getattr(source, "empty", None):
        raise ValueError(f"class folder {source.empty[0]} in {source.root} has no images: remove it, or fill it"
                         + (", where the pack came from" if sources.is_pack(source.root) else ""))
    where, labelled = getattr(source, "root", config["data"]), (source.labels >= 0).nonzero()[0]
    if not len(labelled):
        raise ValueError(f"the images of {where} have no labels: put those of each class in a folder of its own")
    if len(source.classes) < 2:
        raise ValueError(f"{where} has one class only, {' '.join(source.classes)}: nothing to tell apart")
    return torch.utils.data.Subset(source, labelled), list(source.classes)


def build(args, config, classes, checkpoint):
    """The model, its encoder from --init, and what `weights.load` reports. Raises ValueError."""
    task = losses.TASKS[args.task]
    torch.manual_seed(data.key(args.seed))
    encoder = models.build(config["arch"], config["img_size"], drop_path=config["drop_path"] or 0.0, channels=config["channels"]).encoder
    if isinstance(encoder, models.ViT) and config["test_crop"] != config["img_size"]:
        raise ValueError(f"a ViT is tested at its own size: --test-crop {config['test_crop']} differs from --img-size {config['img_size']}")
    model, loaded = models.Predictor(encoder, task.outputs or len(classes), task.pool), None
    if args.init is not None:
        loaded = weights.load(model, checkpoint, args.init, head=args.eval)
        theirs = checkpoint.get("classes")
        theirs = theirs if isinstance(theirs, list) and all(isinstance(name, str) for name in theirs) else None
        if args.eval and (any(name.startswith("head.") for name in loaded["missing"]) or theirs and theirs != classes):
            there = f"one of {len(theirs)} ({', '.join(theirs[:3])} …)" if theirs else "another, or none"
            raise ValueError(f"{args.init} has no {args.task} head for {config['data']}"
                             + (f" and its {len(classes)} classes ({', '.join(classes[:3])} …), but {there}" if classes else ""))
        checkpoint.clear()                                                  # its memory is no longer needed
    if args.freeze or config["protocol"] == "linear":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("head.")
    return model, loaded


def prepare(args, config, world, checkpoint):
    """(the run, if there is training; its model and data). Whatever can be wrong is found here, before anything is written.
    Raises ValueError and OSError."""
    usual = 256 if "nano" in models.like(config["arch"]) else RECIPES[config["arch"]]["micro_batch"]
    training = not args.eval and config["protocol"] != "knn"
    micro_batch = (train.find_micro_batch(config["batch_size"], args.micro_batch, world, usual) if training else
                   args.micro_batch or min(usual, config["batch_size"]))
    held_out, classes = open_labelled(config, "test" if args.eval else "val", args.task)
    source, learned = (held_out, classes) if args.eval else open_labelled(config, "train", args.task)
    if learned != classes:
        odd = sorted(set(classes) ^ set(learned))
        raise ValueError(f"the classes of {config['data']} do not match: {odd[0]!r} is in {'train' if odd[0] in learned else 'val'} only")
    if args.labels:
        if args.labels > len(source):
            raise ValueError(f"--labels {args.labels} is more than the {len(source)} there are")
        chosen = torch.randperm(len(source), generator=data.generator(args.seed, "labels"))[:args.labels]
        source = torch.utils.data.Subset(source, chosen.tolist())
    for each in (source, held_out):                                         # if none can be read, now is the time to say so
        data.readable(each, 0, args.seed, -1)
    model, loaded = build(args, config, classes, checkpoint)
    if config["protocol"] == "knn" and args.k > len(source):
        raise ValueError(f"--k {args.k} is more than the {len(source)} training images")
    identity = config | dict(task=args.task, eval=args.eval, init=args.init, freeze=args.freeze, labels=args.labels, seed=args.seed)
    if config["protocol"] == "knn":
        identity |= dict(k=args.k, temperature=args.temperature)
    out = args.out or os.path.join("runs", run_name(args, config))
    this = SimpleNamespace(model=model, loaded=loaded, source=source, held_out=held_out, classes=classes, micro_batch=micro_batch,
                           identity=identity, out=out)
    if args.init is not None and os.path.realpath(os.path.dirname(args.init) or ".") == os.path.realpath(out):
        raise ValueError(f"{out} is where --init lies: choose another --out")
    if not training:
        evaluate.check_result(out, identity, args.overwrite)
        return None, this
    total = config["epochs"] * (len(source) // config["batch_size"])
    run = harness.Run(args, out, identity | dict(images=len(source)), total)
    this.batches = data.Batches(len(source), config["batch_size"], micro_batch, run.start, run.stop, args.seed, RANK, world,
                                config["repeated_augmentation"] or 1)
    return run, this


def name_of(checkpoint):
    """What to call a checkpoint: after its folder if that is a run's, else after the file."""
    folder, name = os.path.split(os.path.abspath(checkpoint))
    return {"last.pt": os.path.basename(folder), "best.pt": os.path.basename(folder) + "-best"}.get(name, os.path.splitext(name)[0])


def run_name(args, config):
    """Name of the folder of a run: from what, by which protocol, for which task, on which images."""
    if args.init is not None:
        start = name_of(args.init)
    else:
        start = config["arch"] + ("" if config["protocol"].startswith("scratch") else "-random")
    parts = [start, "eval" if args.eval else config["protocol"], "frozen" * args.freeze, args.task if args.task != "class" else "",
             os.path.basename(os.path.normpath(config["data"])), f"{args.labels}labels" if args.labels else "",
             f"k{args.k}" if config["protocol"] == "knn" and args.k != 20 else "", f"seed{args.seed}" if args.seed else ""]
    return "-".join(filter(None, parts))


def work(args, config, world, device, checkpoint):
    """What one process does: evaluate, find neighbours, or train."""
    if config["data"] in sources.SOURCES:                                   # one process of each machine downloads
        together(lambda: os.environ.get("LOCAL_RANK", "0") == "0" and sources.open_source(config["data"], "train", 32))
    run, this = together(lambda: prepare(args, config, world, checkpoint))
    say(f"{config['arch']}, {sum(p.numel() for p in this.model.parameters()) / 1e6:.1f} M parameters, on {device} × {world}; "
        f"{config['data']}: " + (f"{len(this.source):,} images to learn {args.task} from, " if this.source is not this.held_out else "")
        + f"{len(this.held_out):,} to test"
        + ("" if "data" in args else " (no --data given: the built-in images)"))
    say(f"{args.init} is {weights.describe(this.loaded)}" if this.loaded else "no --init: from scratch")
    workers, pin = train.loader_workers(args), device.type == "cuda"

    def test_loader(source):
        view = functools.partial(test_view, config=config)
        return data.loader(data.TestViews(source, view, config["channels"]), evaluate.test_batches(len(source), this.micro_batch, world), workers, pin)

    task, (autocast, scaler) = losses.TASKS[args.task], train.precision(args.amp, device)
    how = device, autocast, functools.partial(data.normalize, mean=config["mean"], std=config["std"])
    model, loader = train.place(this.model, device, world), test_loader(this.held_out)

    def note(problems, images):
        if line := evaluate.note_unreadable(problems, images, this.out, args.max_bad):
            fail(line)

    if args.eval:
        metrics, problems = evaluate.evaluate(model, loader, task, *how)
        note(problems, len(this.held_out))
        evaluate.finish(this, args, metrics, epoch=None)
    elif config["protocol"] == "knn":
        bank, labels, problems = evaluate.features(model, test_loader(this.source), len(this.source), *how, world)
        note(problems, len(this.source))
        bank, labels = bank[labels >= 0], labels[labels >= 0]
        queries, wanted, problems = evaluate.features(model, loader, len(this.held_out), *how, world)
        note(problems, len(this.held_out))
        mine = slice(RANK, None, world)                                     # each process's share of the test images
        vote = functools.partial(evaluate.knn, bank, labels, k=min(args.k, len(bank)), temperature=args.temperature, classes=len(this.classes))
        votes = torch.cat([vote(queries=part) for part in queries[mine].split(256)])
        sums, n = sum_over_ranks(torch.stack(task.sums(votes, wanted[mine]))).tolist(), int((wanted >= 0).sum())
        evaluate.finish(this, args, task.metrics(sums, max(n, 1)) | dict(n=n), epoch=None)
    else:
        return tune(args, config, run, this, model, loader, world, scaler, *how)


def tune(args, config, run, this, model, test_loader, world, scaler, device, autocast, normalize):
    """The training loop."""
    task, steps_per_epoch = losses.TASKS[args.task], this.batches.steps_per_epoch
    accumulate = config["batch_size"] // (this.micro_batch * world)
    run.announce(config, this.micro_batch, accumulate)
    if run.start > run.stop or run.start == run.stop == evaluate.result_step(run.out):
        return
    optimizer = optim.make_optimizer(model, config)
    ema = optim.EMA(model, config["ema"], 20 * steps_per_epoch) if config["ema"] else None
    best, tested = (run.state.get("best"), run.state.get("tested")) if run.resumed else (None, 0)
    if run.resumed:
        together(lambda: run.restore(model, optimizer, scaler, ema and ema.module))
    average = ema.module if ema else model

    def snapshot():
        return dict(classes=this.classes, best=best, tested=tested, model=model.state_dict(), optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict()) | (dict(ema=ema.module.state_dict()) if ema else {})

    if args.compile:
        model.compile()
    replica = train.replicate(model, device, world, accumulate)
    views = data.Views(this.source, functools.partial(train_view, config=config), args.seed)
    stream = iter(data.loader(views, this.batches, train.loader_workers(args), device.type == "cuda"))

    def test(done):
        """Evaluate after so many steps, and keep the best of those after whole epochs."""
        nonlocal best, tested
        began, epoch = time.time(), (done - 1) // steps_per_epoch + 1
        metrics, unreadable = evaluate.evaluate(average, test_loader, task, device, autocast, normalize)
        if line := evaluate.note_unreadable(unreadable, len(this.held_out), run.out, args.max_bad):
            run.problem, run.stopping = line, True
        run.clock += time.time() - began                                    # no part of the training speed
        if tested != done:
            run.write(dict(step=done, epoch=epoch, **metrics), f"epoch {epoch} " + evaluate.describe(metrics))
        tested = done
        name, sign = task.best
        if done % steps_per_epoch == 0 and (best is None or sign * metrics[name] > sign * best[name]):
            if RANK > 0 or run.attempt(weights.write, os.path.join(run.out, "best.pt"), dict(
                    format="nanoA2MIM", identity=run.identity, classes=this.classes, step=done, metrics=metrics, model=average.state_dict())):
                best = metrics | dict(epoch=epoch)
        return metrics

    with run.underway(snapshot, ("loss",), LINE, config["batch_size"]):
        tests = lambda done: done == run.stop or done % (steps_per_epoch * args.eval_every) == 0
        if run.start and tests(run.start) and (tested != run.start or run.start == run.stop):
            metrics = test(run.start)                                       # for which there was no time, or no disk
        for step in range(run.start, run.stop):
            model.train()
            if args.freeze or config["protocol"] == "linear":
                model.encoder.eval()
            torch.manual_seed(data.key(args.seed, step, RANK))              # drop path and mixing, the same when continued
            factor = optim.learning_rate(config, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            loss, problems, before = torch.zeros(1, device=device), [], optim.statistics(model)
            for micro in range(accumulate):
                batch, unreadable = next(stream)
                image, target = (tensor.to(device, non_blocking=True) for tensor in batch)
                image = normalize(image)
                if args.task == "class":
                    image, target = mix(image, target, config, len(this.classes))
                with contextlib.nullcontext() if micro == accumulate - 1 or world == 1 else replica.no_sync():
                    with autocast():
                        output = replica(image)
                    part = task.loss(output.float(), target, config) / accumulate
                    scaler.scale(part).backward()
                loss += part.detach()
                problems += unreadable
            sums = run.agree(loss, problems)
            skipped = optim.update(model, optimizer, scaler, config["clip"], sums[0], before)
            if ema:
                ema.update(model, step)

            done = step + 1
            run.report(done, sums, skipped, config["lr"] * factor)
            if tests(done) and (done == run.stop or not run.flush()):         # who is asked to stop has no time for it
                metrics = test(done)
            if run.due(done):
                run.save(done)
            if run.stopping and done < run.stop:
                return run.leave(done)
    if run.problem:
        fail(run.problem)
    evaluate.finish(this, args, metrics, epoch=(run.stop - 1) // steps_per_epoch + 1, step=run.stop, steps=run.total, best=best)


def main(argv=None):
    args = parse(argv)
    try:
        checkpoint = weights.read(args.init) if args.init is not None else None
        for unneeded in ("optimizer", "scaler") if checkpoint else ():
            checkpoint.pop(unneeded, None)
        config = resolve(args, checkpoint)
    except ValueError as error:
        fail(error)
    if args.print_config:
        say(json.dumps(config, indent=2))
    else:
        harness.launch(functools.partial(work, checkpoint=checkpoint), args, config)


if __name__ == "__main__":
    main()
