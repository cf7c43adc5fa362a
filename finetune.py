"""Find out what an encoder's features are worth: fine-tune it, probe it, or evaluate it.

Fine-tune a pre-trained encoder on the built-in images' ten classes, or train the same from scratch:
$ python finetune.py --init runs/vit_nano-a2mim-shapes/last.pt
$ python finetune.py --arch vit_nano --protocol scratch-small
Nearest neighbours, where nothing is trained; a probe of where, how large, turned how far:
$ python finetune.py --init CHECKPOINT --protocol knn --data path/to/images
$ python finetune.py --init CHECKPOINT --task pose --freeze
As published, on 8 GPUs:
$ torchrun --nproc_per_node=8 finetune.py --arch vit_b --init CHECKPOINT --data path/to/imagenet

CHECKPOINT is ours or another project's (see weights.py). --protocol picks a recipe; every key of it is an
option. A run lives in a folder: last.pt, best.pt, log.jsonl, result.json. The same command continues it.
"""
import json
import math
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torchvision.transforms import v2
from tqdm import tqdm

import data
import model as models
import optim
import protocols
import recipes
import runtime
import shapes
import weights


# ---- tasks: what a head predicts, and how it is judged

class Classification:
    """Which class: logits (B, K); targets (B, K) in training, labels (B,) in tests."""
    pool = "mean"                                       # of model.Predictor
    outputs = None                                      # one for each class
    metric = "top1"                                     # the one that counts
    sign = 1                                            # more is better

    @staticmethod
    def loss(logits, target, cfg):
        smoothing = cfg["label_smoothing"] or 0.0
        if cfg["loss"] == "ce":
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        # summed over classes, averaged over images: it matters where gradients are clipped (LAMB)
        target = target * (1 - smoothing) + smoothing / target.shape[1]
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(target)

    @staticmethod
    def sums(logits, label, size):
        hits = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
        return torch.stack([hits[:, 0].sum(), hits.sum()])

    @staticmethod
    def metrics(sums, n):
        return dict(top1=100 * sums[0] / n, top5=100 * sums[1] / n)


class Pose:
    """Where the object is, how large, turned how far: (B, 5); targets (B, 4), see Shapes.sample."""
    pool = "flatten"
    outputs = 5
    metric = "angle_deg"
    sign = -1

    @staticmethod
    def encode(pose):
        """Centre x and y, radius, angle -> x, y, radius, cos and sin of the angle, of variance 1 or so."""
        x, y, radius, angle = pose.unbind(1)
        return torch.stack([8 * (x - 0.5), 8 * (y - 0.5), 16 * (radius - 0.35), angle.cos(), angle.sin()], 1)

    @staticmethod
    def loss(output, pose, cfg):
        return F.mse_loss(output, Pose.encode(pose))

    @staticmethod
    def sums(output, pose, size):
        error = output - Pose.encode(pose)
        turn = torch.atan2(output[:, 4], output[:, 3]) - pose[:, 3]
        turn = torch.atan2(turn.sin(), turn.cos()).abs()                    # the shorter way round
        return torch.stack([error[:, :2].norm(dim=1).sum() / 8 * size, error[:, 2].abs().sum() / 16 * size,
                            turn.rad2deg().sum()])

    @staticmethod
    def metrics(sums, n):
        return dict(centre_px=sums[0] / n, scale_px=sums[1] / n, angle_deg=sums[2] / n)


class Mask:
    """Which pixels are the object's: logits (B, 1, H, W); targets (B, H, W) bool."""
    pool = "none"
    outputs = 1
    metric = "miou"
    sign = 1

    @staticmethod
    def loss(logits, mask, cfg):
        return F.binary_cross_entropy_with_logits(logits[:, 0], mask.float())

    @staticmethod
    def sums(logits, mask, size):
        """Pixels that both, and either, call object; and background."""
        object_ = logits[:, 0] > 0
        return torch.stack([(object_ & mask).sum(), (object_ | mask).sum(),
                            (~object_ & ~mask).sum(), (~object_ | ~mask).sum()])

    @staticmethod
    def metrics(sums, n):
        return dict(miou=50 * (sums[0] / sums[1] + sums[2] / sums[3]))


TASKS = {"class": Classification, "pose": Pose, "mask": Mask}


def main(argv=None):
    # configuration: how to train (a protocol, and the user's changes), and how to run it
    cfg, args, checkpoint = protocols.finetuning(argv, __doc__)
    if args.print_config:
        print(json.dumps(cfg, indent=2))
        return
    task = TASKS[args.task]
    frozen = args.freeze or cfg.protocol == "linear"
    trains = not args.eval and cfg.protocol != "knn"

    # processes
    rank, world, device = runtime.setup(args.deterministic)
    cuda = device.type == "cuda"
    master_process = rank == 0                          # this process prints and saves

    # data: a step sees batch_size images, in `accumulate` micro-batches on each of `world` processes
    with runtime.local_first():                         # which may have to download, or to list an archive
        held_out, classes = open_labelled(cfg, "test" if args.eval else "val", args.task)
        source, learned = held_out, classes
        if not args.eval:
            source, learned = open_labelled(cfg, "train", args.task)
    if learned != classes:
        name = min(set(classes) ^ set(learned))
        where = "train" if name in learned else "val"
        raise ValueError(f"the classes of {cfg.data} do not match: {name!r} is in {where} only")
    if args.labels:
        if args.labels > len(source):
            raise ValueError(f"--labels {args.labels} is more than the {len(source)} there are")
        order = torch.randperm(len(source), generator=data.generator(args.seed, "labels"))
        source = torch.utils.data.Subset(source, order[:args.labels].tolist())
    usual = recipes.RECIPES[cfg.arch]["micro_batch"]
    if "nano" in models.like(cfg.arch):
        usual = 256
    if trains:
        micro_batch = recipes.micro_batch(cfg.batch_size, args.micro_batch, world, usual)
    else:
        micro_batch = args.micro_batch or min(usual, cfg.batch_size)

    # model: an encoder, from --init if given, and a head
    torch.manual_seed(data.key(args.seed))
    encoder = models.build(cfg.arch, cfg.img_size, channels=cfg.channels,
                           drop_path=cfg.drop_path or 0.0).encoder
    if isinstance(encoder, models.ViT) and cfg.test_crop != cfg.img_size:
        raise ValueError(f"a ViT is tested at its own size: --test-crop {cfg.test_crop} differs from "
                         f"--img-size {cfg.img_size}")
    model = models.Predictor(encoder, task.outputs or len(classes), task.pool)
    init_report = "no --init: from scratch"
    if checkpoint is not None:
        report = weights.load(model, checkpoint, args.init, head=args.eval)
        init_report = f"{args.init} is {weights.describe(report)}"
        missing = [name for name in report["missing"] if name.startswith("head.")]
        if args.eval and (missing or checkpoint.get("classes") not in (None, classes)):
            raise ValueError(f"{args.init} has no {args.task} head for {cfg.data}: "
                             "its classes are others, or it was not fine-tuned")
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("head.")
    model = runtime.place(model, device, world)
    autocast, scaler = runtime.precision(args.amp, device)

    # the folder of the run
    out = args.out or os.path.join("runs", run_name(args, cfg))
    identity = dict(cfg, task=args.task, eval=args.eval, init=args.init, freeze=args.freeze,
                    labels=args.labels, seed=args.seed, images=len(source))
    if args.init and os.path.realpath(os.path.dirname(args.init)) == os.path.realpath(out):
        raise ValueError(f"{out} is where --init lies: choose another --out")
    if master_process:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{cfg.arch}, {millions:.1f} M parameters, on {device} × {world}; {cfg.data}: {len(source):,} "
              f"images for {args.task}, {len(held_out):,} to test\n{init_report}", flush=True)

    workers = runtime.workers(args.workers)
    test_loader = torch.utils.data.DataLoader(
        TestViews(held_out, cfg), batch_sampler=test_batches(len(held_out), micro_batch, rank, world),
        num_workers=workers, pin_memory=cuda, worker_init_fn=data.ignore_signals)

    # evaluation and nearest neighbours train nothing
    if not trains:
        if cfg.protocol == "knn":
            identity.update(k=args.k, temperature=args.temperature)
        check_result(out, identity)
        if args.eval:
            metrics = evaluate(model, test_loader, task, cfg, device, autocast, args.max_bad)
        else:
            bank_loader = torch.utils.data.DataLoader(
                TestViews(source, cfg), batch_sampler=test_batches(len(source), micro_batch, rank, world),
                num_workers=workers, pin_memory=cuda, worker_init_fn=data.ignore_signals)
            bank = features(model, bank_loader, cfg, device, autocast, args.max_bad)
            queries = features(model, test_loader, cfg, device, autocast, args.max_bad)
            metrics = knn(*bank, *queries, args.k, args.temperature, len(classes))
        if master_process:
            write_result(out, identity, metrics)
        return

    # optimizer, moving average
    accumulate = cfg.batch_size // (micro_batch * world)
    steps_per_epoch = len(source) // cfg.batch_size
    total = cfg.epochs * steps_per_epoch
    stop = min(args.steps or total, total)
    optimizer = optim.make_optimizer(model, cfg)
    ema = optim.EMA(model, cfg.ema, 20 * steps_per_epoch) if cfg.ema else None
    tested_model = ema.module if ema else model

    # resume: as in train.py, all randomness is keyed, here also that of mixup and cutmix
    start = 0
    counts = dict(skipped=0, skipped_in_a_row=0, unreadable=0, unreadable_in_epoch=0)
    tested = 0                                          # the step of the last test
    best = None
    checkpoint = runtime.load(out, identity)
    if checkpoint is not None:
        start = checkpoint["step"]
        counts = checkpoint["counts"]
        tested = checkpoint["tested"]
        best = checkpoint["best"]
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if ema:
            tested_model.load_state_dict(checkpoint["ema"])
        if scaler.is_enabled() and checkpoint["scaler"]:        # --amp may change
            scaler.load_state_dict(checkpoint["scaler"])
    del checkpoint                                      # its memory
    if start > stop:
        raise ValueError(f"{out} is at step {start} already: more --steps, or another --out")

    # what is read in a step
    batches = data.Batches(len(source), cfg.batch_size, micro_batch, start, stop, args.seed, rank, world,
                           cfg.repeated_augmentation or 1)
    loader = iter(torch.utils.data.DataLoader(
        TrainViews(source, cfg, args.seed), batch_sampler=batches, num_workers=workers, pin_memory=cuda,
        worker_init_fn=data.ignore_signals))

    # compiled, and wrapped so that processes average their gradients; `model` keeps its plain names
    replica = torch.compile(model) if args.compile else model
    if world > 1:
        replica = DDP(replica, device_ids=[device.index] if cuda else None)
    if master_process:
        print(f"batch {cfg.batch_size} = {world} process(es) × {micro_batch} images × {accumulate} "
              f"accumulated; {total} steps in {cfg.epochs} epochs; lr {cfg.lr:.3g}")
        print(f"{out}: " + (f"going on after step {start}" if start else "a new run"), flush=True)
        os.makedirs(out, exist_ok=True)
        log = runtime.open_log(out, start)

    # training loop
    bar = tqdm(total=total, initial=start, unit="step", disable=not (master_process and sys.stderr.isatty()))
    stop_request = runtime.StopRequest()
    stopping = False
    saving = False
    bad_images = False
    next_save = time.time() + 60 * args.save_minutes
    skipped = torch.tensor([counts["skipped"], counts["skipped_in_a_row"]], device=device)
    unreadable = counts["unreadable"] if master_process else 0              # each process counts its own
    unreadable_in_epoch = counts["unreadable_in_epoch"] if master_process else 0
    slow = False                                        # whether a step takes more than a second
    t0 = time.time()
    step0 = start
    for step in range(start, stop + 1):
        # test after whole epochs and at the end; whoever is asked to stop has no time for it
        test_now = step == stop or (step > 0 and step % (steps_per_epoch * args.eval_every) == 0)
        if test_now and (step == stop or (step != tested and not stopping)):
            metrics = evaluate(tested_model, test_loader, task, cfg, device, autocast, args.max_bad)
            epoch = (step - 1) // steps_per_epoch + 1
            better = best is None or task.sign * metrics[task.metric] > task.sign * best[task.metric]
            if step % steps_per_epoch == 0 and better:
                best = dict(metrics, epoch=epoch)
                if master_process:
                    state = dict(config=identity, classes=classes, step=step, metrics=metrics,
                                 model=tested_model.state_dict())
                    runtime.save(os.path.join(out, "best.pt"), state)
            if master_process and step != tested:
                print(json.dumps(dict(step=step, epoch=epoch, **metrics)), file=log, flush=True)
                tqdm.write(f"epoch {epoch}: {describe(metrics)}", file=sys.stdout)
            tested = step
            t0 = time.time()
            step0 = step

        # save, and leave if asked to
        if saving or (step == stop and step > start):
            if master_process:
                state = dict(config=identity, classes=classes, step=step, counts=counts, tested=tested,
                             best=best, model=model.state_dict(), optimizer=optimizer.state_dict(),
                             scaler=scaler.state_dict())
                if ema:
                    state["ema"] = ema.module.state_dict()
                runtime.save(os.path.join(out, "last.pt"), state, os.path.join(out, "previous.pt"))
                next_save = time.time() + 60 * args.save_minutes
            t0 = time.time()
            step0 = step
            saving = False
        if bad_images:
            raise ValueError(f"{counts['unreadable_in_epoch']} images of this epoch could not be read, more than "
                             f"--max-bad {args.max_bad:g}: repair them, or allow more; then the same command "
                             "goes on")
        if step == stop:
            break
        if stopping:
            if world > 1:
                dist.barrier()                          # torchrun ends all processes when the first has left
            if master_process:
                bar.close()
                print(f"stopped after step {step} of {total}; the same command goes on from there", flush=True)
            sys.exit(runtime.STOPPED)

        # forward and backward, micro-batch by micro-batch
        model.train()
        if frozen:
            model.encoder.eval()
        torch.manual_seed(data.key(args.seed, step, rank))                  # of drop path, mixup and cutmix
        lr_factor = optim.learning_rate(cfg, step, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        if step % steps_per_epoch == 0:
            unreadable_in_epoch = 0
        loss = torch.zeros(1, device=device)
        statistics = optim.statistics(model)            # of batch norms, put back if the step is skipped
        for micro_step in range(accumulate):
            image, target, replaced = next(loader)
            image = image.to(device, non_blocking=True)
            target = target.to(device, non_blocking=True)
            image = data.normalize(image, cfg.mean, cfg.std)                # bytes until here
            if args.task == "class":
                image, target = mix(image, target, cfg, len(classes))
            if world > 1:                               # gradients travel once, with the last micro-batch
                replica.require_backward_grad_sync = micro_step == accumulate - 1
            with autocast:
                output = replica(image)
            micro_loss = task.loss(output.float(), target, cfg) / accumulate
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
            unreadable += int(replaced.sum())
            unreadable_in_epoch += int(replaced.sum())
        if world > 1:
            dist.all_reduce(loss)
            loss /= world

        # clip and step, unless the loss or the gradient is not finite: then the step is skipped, and counted
        skip = optim.update(model, optimizer, scaler, cfg.clip, loss[0], statistics)
        if ema:
            ema.update(model, step)
        skipped[0] += skip.int()
        skipped[1] = (skipped[1] + 1) * skip.int()
        done = step + 1
        bar.update()

        # look at what came of it: Python waits for the device here, and nowhere else. One process sees at once
        # that it is to stop or to save; several have to ask each other.
        asked = stop_request.asked or stop_request.torchrun not in (None, os.getppid())
        due = master_process and time.time() > next_save
        log_now = done % args.log_every == 0 or done in (start + 1, stop)
        end_of_epochs = done % ((args.save_epochs or total) * steps_per_epoch) == 0
        end_of_epoch = done % steps_per_epoch == 0      # whoever is asked to stop does not test
        if not (log_now or end_of_epoch or slow or (world == 1 and (asked or due))):
            continue
        seconds = (time.time() - t0) / (done - step0)   # a step
        sums = torch.tensor([asked, due, unreadable, unreadable_in_epoch, seconds],
                            dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(sums)
        asked, due, all_unreadable, all_in_epoch, seconds = sums.tolist()
        counts = dict(unreadable=int(all_unreadable), unreadable_in_epoch=int(all_in_epoch))
        counts["skipped"], counts["skipped_in_a_row"] = skipped.tolist()
        stopping = asked > 0
        slow = seconds / world > 1
        if counts["skipped_in_a_row"] >= 20:
            raise ValueError(f"no finite loss and gradient in 20 steps, up to {done}: try a smaller --lr, or "
                             f"--amp off; the last checkpoint, {out}/last.pt, is from before")
        bad_images = counts["unreadable_in_epoch"] > args.max_bad * steps_per_epoch * cfg.batch_size
        saving = stopping or due > 0 or end_of_epochs or bad_images

        # log
        if log_now:
            entry = dict(step=done, epoch=step // steps_per_epoch + 1, loss=loss.item(), lr=cfg.lr * lr_factor,
                         skipped=counts["skipped"], unreadable=counts["unreadable"],
                         images_per_second=world * cfg.batch_size / seconds)
            if not math.isfinite(entry["loss"]):
                entry["loss"] = None                    # JSON knows no NaN
            t0 = time.time()
            step0 = done
            if master_process:
                print(json.dumps(entry), file=log, flush=True)
                line = f"loss {loss.item():.4f}, {entry['images_per_second']:.0f} images/s"
                bar.set_postfix_str(line)
                if bar.disable:
                    print(f"step {done}/{total}, epoch {entry['epoch']}, {line}", flush=True)

    bar.close()
    stop_request.restore()
    if master_process:
        write_result(out, identity, metrics, epoch=epoch, step=stop, steps=total, best=best)


# ---- images

def open_labelled(cfg, split, task):
    """(source of images that have a label, names of the classes). Raises ValueError."""
    if task != "class":
        world = shapes.Shapes(cfg.img_size, split, target=task)
        return data.Channels(world, cfg.channels), None
    source = data.open_source(cfg.data, split, cfg.img_size, cfg.channels)
    if getattr(source, "empty", None):
        raise ValueError(f"class folder {source.empty[0]} in {source.root} has no images: remove it, or fill it")
    labelled = (source.labels >= 0).nonzero()[0]
    if not len(labelled):
        raise ValueError(f"the images of {cfg.data} have no labels: put those of each class in a folder "
                         "of its own")
    if len(source.classes) < 2:
        raise ValueError(f"{cfg.data} has one class only, {source.classes[0]}: nothing to tell apart")
    return torch.utils.data.Subset(source, labelled), list(source.classes)


class TrainViews(torch.utils.data.Dataset):
    """(epoch, position, index) -> (augmented image uint8 (C, S, S), target, whether it is a replacement)."""

    def __init__(self, source, cfg, seed):
        self.source = source
        self.cfg = cfg
        self.seed = seed

    def __getitem__(self, item):
        epoch, position, index = item
        cfg = self.cfg
        (image, target), replaced = data.readable(self.source, index, self.seed, epoch, position)
        generator = data.generator(self.seed, epoch, position)
        if cfg["crop_scale"] is not None:
            image = data.random_resized_crop(image, cfg["img_size"], cfg["crop_scale"], generator,
                                             interpolation=data.BICUBIC)
        if cfg["randaugment"] is not None or cfg["random_erasing"]:
            image = augment(image, generator, cfg)
        return image, target, replaced


class TestViews(torch.utils.data.Dataset):
    """index -> (image uint8 (C, S, S), target, False); of an unreadable one (black, −1, True)."""

    def __init__(self, source, cfg):
        self.source = source
        self.cfg = cfg

    def __getitem__(self, index):
        unreadable = False
        try:
            image, target = self.source[index]
        except data.BadImage as error:
            print(f"warning: {error}; it is not counted", file=sys.stderr)
            image, target = torch.zeros(self.cfg["channels"], 8, 8, dtype=torch.uint8), -1
            unreadable = True
        image = data.evaluation_crop(image, self.cfg["test_resize"], self.cfg["test_crop"])
        return image, target, unreadable


def augment(image, generator, cfg):
    """RandAugment and random erasing of a uint8 image (C, H, W), as in timm, by torchvision's operations.

    RandAugment (arXiv 1909.13719): two operations, each done half the time, at m + N(0, 0.5) with m in
    0..10. Random erasing (arXiv 1708.04896): a box is filled with N(0, 1) in normalised space.
    """
    mean = cfg["mean"]
    shared = torch.default_generator                    # these transforms take no other
    before = shared.get_state()
    shared.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)))
    if cfg["randaugment"] is not None:
        fill = [round(255 * m) for m in mean]
        for _ in range(2):
            magnitude = (cfg["randaugment"] + 0.5 * torch.randn(())).clamp(0, 10)
            if torch.rand(()) < 0.5:                    # magnitudes 0..10 are levels 0..30
                operation = v2.RandAugment(1, round(3 * float(magnitude)), 31, data.BILINEAR, fill)
                image = operation(image)
    if cfg["random_erasing"] and torch.rand(()) < cfg["random_erasing"]:
        erase = v2.RandomErasing(1.0, (0.02, 1 / 3), value="random")
        erased = erase(data.normalize(image[None], mean, cfg["std"])[0])
        image = data.denormalize(erased[None], mean, cfg["std"])[0]
    shared.set_state(before)
    return image


def mix(image, label, cfg, classes):
    """Mixup or cutmix of a batch, one λ for all (arXiv 1710.09412, 1905.04899): image, targets (B, K)."""
    transforms = []
    if cfg["mixup"]:
        transforms.append(v2.MixUp(alpha=cfg["mixup"], num_classes=classes))
    if cfg["cutmix"]:
        transforms.append(v2.CutMix(alpha=cfg["cutmix"], num_classes=classes))
    if not transforms:
        return image, F.one_hot(label, classes).float()
    return transforms[int(torch.rand(()) * len(transforms))](image, label)


# ---- tests

def test_batches(images, batch, rank, world):
    """This process's share of the indices, in batches: each image on one process only, none twice."""
    share = list(range(rank, images, world))
    return [share[i:i + batch] for i in range(0, len(share), batch)]


def reduce_sum(value):
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def check_unreadable(unreadable, images, max_bad):
    if unreadable > max_bad * images:
        raise ValueError(f"{unreadable} of {images:,} images could not be read, more than --max-bad "
                         f"{max_bad:g}: repair or remove them, or allow more")


@torch.no_grad()
def evaluate(model, loader, task, cfg, device, autocast, max_bad):
    """A task's metrics, and `n`, over every image of the loaders of all processes. Raises ValueError."""
    model.eval()
    if dist.is_initialized():                           # each process has batch statistics of its own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    counts = torch.zeros(3, dtype=torch.float64, device=device)             # images, unreadable, not finite
    show = sys.stderr.isatty() and (not dist.is_initialized() or dist.get_rank() == 0)
    for image, target, unreadable in tqdm(loader, "test", leave=False, disable=not show):
        image = data.normalize(image.to(device, non_blocking=True), cfg.mean, cfg.std)
        target = target.to(device, non_blocking=True)
        with autocast:
            output = model(image).float()
        batch = task.sums(output, target, image.shape[-1])
        sums[:len(batch)] += batch
        counts[0] += len(image)
        counts[1] += unreadable.sum().item()
        counts[2] += ~output.isfinite().all()
    images, unreadable, broken = reduce_sum(counts).tolist()
    if broken:
        raise ValueError("the model's outputs are not finite: its training has diverged (try a smaller --lr), "
                         "or --init is broken")
    check_unreadable(int(unreadable), int(images), max_bad)
    n = int(images - unreadable)
    return task.metrics(reduce_sum(sums).tolist(), max(n, 1)) | dict(n=n)


@torch.no_grad()
def features(model, loader, cfg, device, autocast, max_bad):
    """(features (N, C) of unit length, labels (N,)) of all readable images, on every process."""
    model.eval()
    parts = []
    labels = []
    for image, label, unreadable in tqdm(loader, "features", disable=not sys.stderr.isatty()):
        image = data.normalize(image.to(device), cfg.mean, cfg.std)
        with autocast:
            parts.append(F.normalize(model.features(image).float(), dim=1))
        labels.append(label.to(device))
    images = len(loader.dataset.source)
    everything = torch.zeros(images, model.encoder.widths[-1], device=device)
    all_labels = torch.zeros(images, dtype=torch.int64, device=device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if parts:
        everything[rank::world] = torch.cat(parts)
        all_labels[rank::world] = torch.cat(labels)
    everything = reduce_sum(everything)
    all_labels = reduce_sum(all_labels)
    readable = all_labels >= 0
    check_unreadable(int((~readable).sum()), images, max_bad)
    return everything[readable], all_labels[readable]


def votes(bank, labels, queries, k, temperature, classes):
    """(B, K) votes: each of the k most similar of the bank votes exp(cosine / T) for its class.

    bank: (N, C), queries: (B, C), of unit length (Wu et al., arXiv 1805.01978). Up to a common factor.
    """
    similarity, nearest = (queries @ bank.T).topk(k)
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    result = torch.zeros(len(queries), classes, device=queries.device)
    return result.scatter_add_(1, labels[nearest], weight)


def knn(bank, labels, queries, wanted, k, temperature, classes):
    """Classification's metrics of nearest neighbours. Raises ValueError."""
    if k > len(bank):
        raise ValueError(f"--k {k} is more than the {len(bank)} training images")
    scores = [votes(bank, labels, part, k, temperature, classes) for part in queries.split(256)]
    sums = Classification.sums(torch.cat(scores), wanted, None).tolist()
    return Classification.metrics(sums, max(len(wanted), 1)) | dict(n=len(wanted))


# ---- results

def run_name(args, cfg):
    """Name of a run's folder: from what, by which protocol, for which task, on which images."""
    if args.init is not None:
        folder, file = os.path.split(os.path.abspath(args.init))
        start = os.path.splitext(file)[0]
        if file in ("last.pt", "best.pt"):
            start = os.path.basename(folder) + ("-best" if file == "best.pt" else "")
    else:
        start = cfg.arch + ("" if cfg.protocol.startswith("scratch") else "-random")
    parts = [start, "eval" if args.eval else cfg.protocol]
    if args.freeze:
        parts.append("frozen")
    if args.task != "class":
        parts.append(args.task)
    parts.append(os.path.basename(os.path.normpath(cfg.data)).removesuffix(".tar"))
    if args.labels:
        parts.append(f"{args.labels}labels")
    if cfg.protocol == "knn" and args.k != 20:
        parts.append(f"k{args.k}")
    if args.seed:
        parts.append(f"seed{args.seed}")
    return "-".join(parts)


def check_result(out, identity):
    """Raises ValueError if a folder holds a run, or the result of something else."""
    path = os.path.join(out, "result.json")
    if os.path.exists(os.path.join(out, "last.pt")):
        raise ValueError(f"{out} holds a run: choose another --out")
    if os.path.exists(path):
        with open(path) as file:
            if json.load(file)["config"] != identity:
                raise ValueError(f"{path} is the result of something else: choose another --out")


def write_result(out, identity, metrics, **more):
    """result.json, and a line."""
    result = metrics | more
    result |= {key: identity[key] for key in ("task", "protocol", "arch", "init")}
    result["config"] = identity
    path = os.path.join(out, "result.json")
    os.makedirs(out, exist_ok=True)
    with open(path, "w") as file:
        json.dump(result, file, indent=2)
    print(f"result: {describe(metrics)} ({metrics['n']:,} images). {path}", flush=True)


def describe(metrics):
    """Metrics for people: top1 56.20, top5 93.10."""
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if name != "n")


if __name__ == "__main__":
    runtime.run(main)
