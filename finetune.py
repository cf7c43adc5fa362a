"""Find out what an encoder's features are worth: fine-tune it, probe it, or evaluate it.

Fine-tune a pre-trained encoder on the built-in images' ten classes, or train the same from scratch:
$ python finetune.py --init runs/vit_nano-a2mim-shapes/last.pt
$ python finetune.py --arch vit_nano --protocol scratch-small
Nearest neighbours, where nothing is trained; a probe of where, how large, turned how far:
$ python finetune.py --init CHECKPOINT --protocol knn --data path/to/images
$ python finetune.py --init CHECKPOINT --task pose --freeze
As published, on 8 GPUs:
$ torchrun --nproc_per_node=8 finetune.py --arch vit_b --init CHECKPOINT --data path/to/imagenet

CHECKPOINT is ours or another project's (see weights.py). --protocol picks a recipe; every key of it
is an option. A run lives in a folder: last.pt, best.pt, log.jsonl, result.json. The same command
continues it.
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
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import data
import model as models
import optim
import protocols
import recipes
import runtime
import shapes
import weights


# ---- tasks: what a head predicts, and how that is judged

class Classification:
    """Which class: logits (B, K); targets (B, K) in training, labels (B,) in tests."""
    pool = None         # of model.Predictor: as the protocol says
    outputs = None      # one for each class
    metric = "top1"     # the one that counts
    sign = 1            # more is better

    def loss(self, logits, target, cfg):
        smoothing = cfg["label_smoothing"] or 0.0
        if cfg["loss"] == "ce":
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        # summed over classes, averaged over images: it matters where gradients are clipped (LAMB)
        target = target * (1 - smoothing) + smoothing / target.shape[1]
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(target)

    def sums(self, logits, label, size):
        hits = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
        return torch.stack([hits[:, 0].sum(), hits.sum()])

    def metrics(self, sums, n):
        return dict(top1=100 * sums[0] / n, top5=100 * sums[1] / n)


class Pose:
    """Where the object is, how large, turned how far: (B, 5); targets (B, 4), see Shapes.sample."""
    pool = "flatten"
    outputs = 5
    metric = "angle_deg"
    sign = -1

    def encode(self, pose):
        """Centre, radius, angle -> centre, radius, cos and sin of the angle, of variance 1 or so."""
        x, y, radius, angle = pose.unbind(1)
        return torch.stack(
            [8 * (x - 0.5), 8 * (y - 0.5), 16 * (radius - 0.35), angle.cos(), angle.sin()], 1)

    def loss(self, output, pose, cfg):
        return F.mse_loss(output, self.encode(pose))

    def sums(self, output, pose, size):
        error = output - self.encode(pose)
        centre = error[:, :2].norm(dim=1).sum() / 8 * size
        radius = error[:, 2].abs().sum() / 16 * size
        turn = torch.atan2(output[:, 4], output[:, 3]) - pose[:, 3]
        turn = torch.atan2(turn.sin(), turn.cos()).abs()        # the shorter way round
        return torch.stack([centre, radius, turn.rad2deg().sum()])

    def metrics(self, sums, n):
        return dict(centre_px=sums[0] / n, scale_px=sums[1] / n, angle_deg=sums[2] / n)


class Mask:
    """Which pixels are the object's: logits (B, 1, H, W); targets (B, H, W) bool."""
    pool = "none"
    outputs = 1
    metric = "miou"
    sign = 1

    def loss(self, logits, mask, cfg):
        return F.binary_cross_entropy_with_logits(logits[:, 0], mask.float())

    def sums(self, logits, mask, size):
        """Intersection and union of object pixels, then of background pixels."""
        guess = logits[:, 0] > 0
        return torch.stack([(guess & mask).sum(), (guess | mask).sum(),
                            (~guess & ~mask).sum(), (~guess | ~mask).sum()])

    def metrics(self, sums, n):
        return dict(miou=50 * (sums[0] / sums[1] + sums[2] / sums[3]))


TASKS = {"class": Classification(), "pose": Pose(), "mask": Mask()}


# ---- from start to end

def main(argv=None):
    # configuration: how to train (a protocol, and the user's changes), and how to run it
    cfg, args, init = protocols.finetuning(argv, __doc__)
    if args.print_config:
        print(json.dumps(cfg, indent=2))
        return
    task = TASKS[args.task]
    trains = not args.eval and cfg.protocol != "knn"

    # processes; the first one prints and saves
    rank, world, device = runtime.setup(args.deterministic)
    master_process = rank == 0
    workers = runtime.workers(args.workers)

    # data: a step sees batch_size images, in `accumulate` micro-batches on each of `world` processes
    with runtime.local_first():
        held_out, classes = open_labelled(cfg, "test" if args.eval else "val", args.task)
        source = held_out
        if not args.eval:
            source, train_classes = open_labelled(cfg, "train", args.task)
            if train_classes != classes:
                odd = sorted(set(classes) ^ set(train_classes))
                raise ValueError(f"train and val of {cfg.data} have different classes: {odd[0]!r} is "
                                 "in one of them only")
    chosen = list(range(len(source)))
    if args.labels:
        if args.labels > len(source):
            raise ValueError(f"--labels {args.labels} is more than the {len(source)} there are")
        order = torch.randperm(len(source), generator=data.generator(args.seed, "labels"))
        chosen = order[:args.labels].tolist()
        source = torch.utils.data.Subset(source, chosen)
    usual = 256 if "nano" in models.like(cfg.arch) else recipes.RECIPES[cfg.arch]["micro_batch"]
    if trains:
        micro_batch = recipes.micro_batch(cfg.batch_size, args.micro_batch, world, usual)
    else:
        micro_batch = args.micro_batch or min(usual, cfg.batch_size)
    test_loader = make_test_loader(held_out, cfg, micro_batch, workers, rank, world)

    # model: an encoder, from --init if given, and a head
    torch.manual_seed(data.key(args.seed))
    options = dict(drop_path=cfg.drop_path or 0.0)
    if cfg.qv_bias is False:
        options["qv_bias"] = False
    encoder = models.build(cfg.arch, cfg.img_size, channels=cfg.channels, **options).encoder
    if encoder.fixed_size and cfg.test_crop != cfg.img_size:
        raise ValueError(f"{cfg.arch} is tested at its own size: --test-crop {cfg.test_crop} differs "
                         f"from --img-size {cfg.img_size}")
    outputs = task.outputs or len(classes)
    model = models.Predictor(encoder, outputs, task.pool or cfg.pool, cfg.head_std or 0.01)
    started_from = "random weights"
    if init is not None:
        report = weights.load(model, init, args.init, args.eval, cfg.resize_bias is not False)
        started_from = f"{args.init}, {weights.describe(report)}"
        no_head = any(name.startswith("head.") for name in report["missing"])
        if args.eval and (no_head or init.get("classes") not in (None, classes)):
            raise ValueError(f"{args.init} has no {args.task} head for {cfg.data}: its classes are "
                             "others, or it was not fine-tuned")
    frozen = args.freeze or cfg.protocol == "linear"
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("head.")
    model = runtime.place(model, device, world, cfg.sync_bn is not False)
    autocast, scaler = runtime.precision(args.amp, device)

    # the run, and its folder
    out = args.out or os.path.join("runs", run_name(args, cfg))
    identity = dict(cfg, task=args.task, eval=args.eval, init=args.init, freeze=args.freeze,
                    labels=args.labels, seed=args.seed, images=len(source))
    if cfg.protocol == "knn":
        identity |= dict(k=args.k, temperature=args.temperature)
    if args.init and os.path.realpath(os.path.dirname(args.init)) == os.path.realpath(out):
        raise ValueError(f"{out} is where --init lies: choose another --out")
    as_published = ["--arch", cfg.arch, "--protocol", cfg.protocol, "--recipe", args.recipe,
                    "--data", cfg.data]
    defaults, *_ = protocols.finetuning(as_published, "")
    checkpoint = runtime.load(out, identity, defaults)
    if master_process:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{cfg.arch}, {millions:.1f} M parameters, on {device} × {world}; {cfg.data}: "
              f"{len(source):,} images for {args.task}, {len(held_out):,} to test\n"
              f"{out}: from {started_from}", flush=True)

    # evaluation and nearest neighbours train nothing
    if not trains:
        path = os.path.join(out, "result.json")
        if os.path.exists(path):
            with open(path) as file:
                if json.load(file)["config"] != identity:
                    raise ValueError(f"{path} is the result of something else: choose another --out")
        if args.eval:
            metrics = evaluate(model, test_loader, task, cfg, device, autocast, args.max_bad)
        else:
            bank_loader = make_test_loader(source, cfg, micro_batch, workers, rank, world)
            bank, labels = features(model, bank_loader, cfg, device, autocast)
            queries, answers = features(model, test_loader, cfg, device, autocast)
            metrics = knn(bank, labels, queries, answers, args.k, args.temperature, len(classes))
        if master_process:
            write_result(out, identity, metrics)
        return

    # runs with equal hashes train on the same images, from the same order and first head: pairs
    first_batch = next(iter(data.Batches(len(source), cfg.batch_size, micro_batch, 0, 1, args.seed)))
    head = torch.cat([parameter.detach().flatten() for parameter in model.head.parameters()])
    numbers = dict(labels=chosen, order=[index for _, _, index in first_batch], head=head.tolist())
    hashes = {name: f"{data.key(*values):016x}" for name, values in numbers.items()}

    # optimizer, and a running mean of the weights, which is then what is tested
    accumulate = cfg.batch_size // (micro_batch * world)
    steps_per_epoch = len(source) // cfg.batch_size
    total = cfg.epochs * steps_per_epoch
    stop = min(args.steps or total, total)
    optimizer = optim.make_optimizer(model, cfg)
    ema = optim.EMA(model, cfg.ema, 20 * steps_per_epoch) if cfg.ema else None
    tested_model = ema.module if ema else model

    # resume: as in train.py all randomness is keyed, here also that of mixup and cutmix
    start = 0
    counts = dict(skipped=0, skipped_in_a_row=0, unreadable=0)
    best = None
    if checkpoint is not None:
        start = checkpoint["step"]
        counts = checkpoint["counts"]
        best = checkpoint["best"]
        runtime.restore(checkpoint, model, optimizer, scaler)
        if ema:
            tested_model.load_state_dict(checkpoint["ema"])
    del checkpoint, init  # their memory
    if start >= stop:
        if master_process:
            more = "--steps" if start < total else "--out: the run is finished"
            print(f"nothing is left to do: choose another {more}")
        return

    # what a step reads, and what it goes through: compiled, and wrapped so that processes average
    # their gradients; `model` keeps plain names
    batches = data.Batches(len(source), cfg.batch_size, micro_batch, start, stop, args.seed, rank,
                           world, cfg.repeated_augmentation or 1)
    loader = iter(data.loader(TrainViews(source, cfg, args.seed), batches, workers))
    replica = torch.compile(model, dynamic=False) if args.compile else model
    if world > 1:
        replica = DDP(replica, device_ids=[device.index] if device.type == "cuda" else None)
    if master_process:
        print(f"batch {cfg.batch_size} = {world} process(es) × {micro_batch} images × {accumulate} "
              f"accumulated; {total} steps in {cfg.epochs} epochs, {start} done; lr {cfg.lr:.3g}",
              flush=True)
        os.makedirs(out, exist_ok=True)
        log = runtime.open_log(out, start)

    # training loop
    bar = tqdm(total=total, initial=start, unit="step",
               disable=not (master_process and sys.stderr.isatty()))
    stop_request = runtime.StopRequest()
    next_save = time.time() + 60 * args.save_minutes
    skipped = torch.tensor([counts["skipped"], counts["skipped_in_a_row"]], device=device)
    # unreadable images of the epoch: each process counts its own
    unreadable = counts["unreadable"] if master_process else 0
    slow = False
    t0 = time.time()
    step0 = start
    for step in range(start, stop):
        # drop path, mixup and cutmix draw from here on: the same when the run is continued
        torch.manual_seed(data.key(args.seed, step, rank))
        lr_factor = optim.learning_rate(cfg, step, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        if step % steps_per_epoch == 0:
            unreadable = 0

        # forward and backward, micro-batch by micro-batch
        model.train()
        if frozen:
            model.encoder.eval()
        # batch norm's statistics are put back if the step is skipped
        loss = torch.zeros(1, device=device)
        batchnorm = optim.statistics(model)
        for micro_step in range(accumulate):
            image, target, replaced = next(loader)
            unreadable += int(replaced.sum())
            image = image.to(device, non_blocking=True)
            target = target.to(device, non_blocking=True)
            # images were bytes until here
            image = data.normalize(image, cfg.mean, cfg.std)
            if args.task == "class":
                image, target = mix(image, target, cfg, len(classes))
            if world > 1:
                # gradients travel between processes once, with the last micro-batch
                replica.require_backward_grad_sync = micro_step == accumulate - 1
            with autocast:
                output = replica(image)
            # the loss is computed in float32
            micro_loss = task.loss(output.float(), target, cfg) / accumulate
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        if world > 1:
            dist.all_reduce(loss)
            loss /= world

        # clip and step; where the loss or the gradient is not finite, the step is skipped instead
        skip = optim.update(model, optimizer, scaler, cfg.clip, loss[0], batchnorm)
        if ema:
            ema.update(model, step)
        skipped[0] += skip
        skipped[1] = (skipped[1] + 1) * skip
        done = step + 1
        bar.update()

        # look at what came of it: only here does Python wait for the device. One process sees at
        # once that it is to stop or to save; several ask each other when they log or an epoch ends,
        # or each step where steps take over a second.
        asked = stop_request.pending()
        due = master_process and time.time() > next_save
        log_now = done % args.log_every == 0 or done in (start + 1, stop)
        end_of_epoch = done % steps_per_epoch == 0
        if not (log_now or end_of_epoch or slow or (world == 1 and (asked or due))):
            continue
        seconds = (time.time() - t0) / (done - step0)
        sums = torch.tensor([asked, due, unreadable, seconds], dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(sums)
        asked, due, all_unreadable, seconds = sums.tolist()
        seconds /= world
        slow = seconds > 1
        counts = dict(unreadable=int(all_unreadable))
        counts["skipped"], counts["skipped_in_a_row"] = skipped.tolist()
        if counts["skipped_in_a_row"] >= 20:
            raise ValueError(f"no finite loss and gradient in 20 steps, up to {done}: try a smaller "
                             f"--lr, or --amp off; {out}/last.pt is from before")
        too_bad = counts["unreadable"] > args.max_bad * steps_per_epoch * cfg.batch_size
        epoch = step // steps_per_epoch + 1

        # log
        if log_now:
            speed = cfg.batch_size / seconds
            entry = dict(step=done, epoch=epoch, loss=loss.item(), lr=cfg.lr * lr_factor,
                         skipped=counts["skipped"], unreadable=counts["unreadable"],
                         images_per_second=speed)
            if not math.isfinite(entry["loss"]):
                entry["loss"] = None  # JSON knows no NaN
            if master_process:
                print(json.dumps(entry), file=log, flush=True)
                bar.set_postfix_str(f"loss {loss.item():.4f}")
            if master_process and bar.disable:
                print(f"step {done}/{total}, epoch {epoch}, loss {loss.item():.4f}, "
                      f"{speed:.0f} images/s", flush=True)

        # test after epochs and at the end; the best weights of an epoch's end are kept
        test_now = done == stop or done % (steps_per_epoch * args.eval_every) == 0
        if test_now:
            metrics = evaluate(tested_model, test_loader, task, cfg, device, autocast, args.max_bad)
            better = best is None or task.sign * (metrics[task.metric] - best[task.metric]) > 0
            if better and end_of_epoch:
                best = dict(metrics, epoch=epoch)
                if master_process:
                    state = dict(config=identity, classes=classes, step=done, metrics=metrics,
                                 model=tested_model.state_dict())
                    runtime.save(os.path.join(out, "best.pt"), state)
            if master_process:
                print(json.dumps(dict(step=done, epoch=epoch, **metrics)), file=log, flush=True)
                tqdm.write(f"epoch {epoch}: {describe(metrics)}", file=sys.stdout)
                if done == stop:
                    bar.close()
                    write_result(out, identity, metrics, epoch=epoch, step=stop, steps=total,
                                 best=best, hashes=hashes)

        # save, and leave if asked to
        epochs_due = done % ((args.save_epochs or cfg.epochs) * steps_per_epoch) == 0
        save_now = asked or due or too_bad or epochs_due or done == stop
        if save_now and master_process:
            state = dict(config=identity, classes=classes, step=done, counts=counts, best=best,
                         model=model.state_dict(), optimizer=optimizer.state_dict(),
                         scaler=scaler.state_dict())
            if ema:
                state["ema"] = tested_model.state_dict()
            runtime.save(os.path.join(out, "last.pt"), state, os.path.join(out, "previous.pt"))
            next_save = time.time() + 60 * args.save_minutes
        if too_bad:
            raise ValueError(f"{counts['unreadable']} images of this epoch could not be read, more "
                             f"than --max-bad {args.max_bad:g}: repair them, or allow more; then the "
                             "same command goes on")
        if asked and done < stop:
            if world > 1:
                # torchrun ends all processes when the first one has left
                dist.barrier()
            if master_process:
                bar.close()
                print(f"stopped after step {done} of {total}; the same command goes on", flush=True)
            sys.exit(runtime.STOPPED)
        if log_now or test_now or save_now:
            # the speed is that of steps, without tests and saves
            t0 = time.time()
            step0 = done

    stop_request.restore()


# ---- images

def open_labelled(cfg, split, task):
    """(source of images that have a label, names of the classes). Raises ValueError."""
    if task != "class":
        count = cfg.shapes_count if split == "train" else None
        source = shapes.Shapes(cfg.img_size, split, count, target=task)
        return data.Channels(source, cfg.channels), None
    source = data.open_source(cfg.data, split, cfg.img_size, cfg.channels, cfg.shapes_count)
    labelled = (source.labels >= 0).nonzero()[0]
    if not len(labelled):
        raise ValueError(f"the images of {cfg.data} have no labels: put each class in a folder")
    if len(source.classes) < 2:
        raise ValueError(f"{cfg.data} has one class only, {source.classes[0]}: give two or more")
    return torch.utils.data.Subset(source, labelled), list(source.classes)


class TrainViews(torch.utils.data.Dataset):
    """(epoch, position, index) -> (image uint8 (C, S, S), augmented; target; whether replaced)."""

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
    """index -> (image uint8 (C, S, S), target, whether replaced because it was unreadable)."""

    def __init__(self, source, cfg):
        self.source = source
        self.cfg = cfg

    def __getitem__(self, index):
        (image, target), replaced = data.readable(self.source, index, -1, index)
        image = data.evaluation_crop(image, self.cfg["test_resize"], self.cfg["test_crop"])
        return image, target, replaced


def augment(image, generator, cfg):
    """RandAugment and random erasing of a uint8 image (C, H, W): timm's, by torchvision's operations.

    RandAugment (arXiv 1909.13719): two operations, each done half the time, at m + N(0, 0.5), m in
    0..10. Random erasing (arXiv 1708.04896): a box is filled with N(0, 1) in normalised space.
    """
    mean = cfg["mean"]
    # these transforms take no generator: they draw from the shared one, which then is as before
    with torch.random.fork_rng(devices=[]):
        seed = int(torch.randint(2 ** 62, (), generator=generator))
        torch.default_generator.manual_seed(seed)
        if cfg["randaugment"] is not None:
            fill = [round(255 * m) for m in mean]
            # Pillow turns and shears bicubically; torchvision, of tensors, bilinearly at best
            image = TF.to_pil_image(image)
            for _ in range(2):
                magnitude = (cfg["randaugment"] + 0.5 * torch.randn(())).clamp(0, 10)
                if torch.rand(()) < 0.5:
                    level = round(3 * float(magnitude))  # of 0..30
                    image = v2.RandAugment(1, level, 31, data.BICUBIC, fill)(image)
            image = TF.pil_to_tensor(image)
        if cfg["random_erasing"] and torch.rand(()) < cfg["random_erasing"]:
            erase = v2.RandomErasing(1.0, (0.02, 1 / 3), value="random")
            erased = erase(data.normalize(image[None], mean, cfg["std"])[0])
            image = data.denormalize(erased[None], mean, cfg["std"])[0]
    return image


def mix(image, label, cfg, classes):
    """Mixup or cutmix (arXiv 1710.09412, 1905.04899), one λ a batch: (image, targets (B, K))."""
    transforms = []
    if cfg["mixup"]:
        transforms.append(v2.MixUp(alpha=cfg["mixup"], num_classes=classes))
    if cfg["cutmix"]:
        transforms.append(v2.CutMix(alpha=cfg["cutmix"], num_classes=classes))
    if not transforms:
        return image, F.one_hot(label, classes).float()
    return transforms[int(torch.rand(()) * len(transforms))](image, label)


# ---- tests

def make_test_loader(source, cfg, batch, workers, rank, world):
    """Of this process's share of the images, in batches: each is on one process, once."""
    share = list(range(rank, len(source), world))
    batches = [share[i:i + batch] for i in range(0, len(share), batch)]
    return data.loader(TestViews(source, cfg), batches, workers)


def reduce_sum(value):
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


@torch.no_grad()
def evaluate(model, loader, task, cfg, device, autocast, max_bad):
    """A task's metrics, and `n`, over every image of all processes' loaders. Raises ValueError."""
    model.eval()
    if dist.is_initialized():
        # each process has batch statistics of its own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    # images, replaced ones, batches with numbers that are not finite, the task's own sums
    sums = torch.zeros(7, dtype=torch.float64, device=device)
    for image, target, replaced in tqdm(loader, "test", leave=False, disable=None):
        image = data.normalize(image.to(device, non_blocking=True), cfg.mean, cfg.std)
        target = target.to(device, non_blocking=True)
        with autocast:
            output = model(image).float()
        batch = task.sums(output, target, image.shape[-1])
        sums[0] += len(image)
        sums[1] += int(replaced.sum())
        sums[2] += ~output.isfinite().all()
        sums[3:3 + len(batch)] += batch
    images, replaced, broken, *sums = reduce_sum(sums).tolist()
    if broken:
        raise ValueError("the model's outputs are not finite: its training has diverged (try a "
                         "smaller --lr), or --init is broken")
    if replaced > max_bad * images:
        raise ValueError(f"{replaced:.0f} of {images:.0f} test images could not be read, more than "
                         f"--max-bad {max_bad:g}: repair or remove them, or allow more")
    return task.metrics(sums, images) | dict(n=int(images))


@torch.no_grad()
def features(model, loader, cfg, device, autocast):
    """(features (N, C) of unit length, labels (N,)) of all images, in order, on every process."""
    model.eval()
    images = len(loader.dataset.source)
    everything = torch.zeros(images, model.encoder.widths[-1], device=device)
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    bar = tqdm(loader, "features", leave=False, disable=None)
    for (image, label, replaced), rows in zip(bar, loader.batch_sampler):
        with autocast:
            batch = model.features(data.normalize(image.to(device), cfg.mean, cfg.std))
        everything[rows] = F.normalize(batch.float(), dim=1)
        labels[rows] = label.to(device)
    return reduce_sum(everything), reduce_sum(labels)


def votes(bank, labels, queries, k, temperature, classes):
    """(B, K) votes: each of the k most similar of the bank votes exp(cosine / T) for its class.

    bank: (N, C), queries: (B, C), of unit length (Wu et al., arXiv 1805.01978).
    """
    similarity, nearest = (queries @ bank.T).topk(k)
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    result = torch.zeros(len(queries), classes, device=queries.device)
    return result.scatter_add_(1, labels[nearest], weight)


def knn(bank, labels, queries, wanted, k, temperature, classes):
    """The metrics of classification by nearest neighbours. Raises ValueError."""
    if k > len(bank):
        raise ValueError(f"--k {k} is more than the {len(bank)} training images")
    scores = [votes(bank, labels, part, k, temperature, classes) for part in queries.split(256)]
    task = TASKS["class"]
    sums = task.sums(torch.cat(scores), wanted, None).tolist()
    return task.metrics(sums, len(wanted)) | dict(n=len(wanted))


# ---- results

def run_name(args, cfg):
    """Name of a run's folder: from what, by which protocol, for which task, on which images."""
    start = cfg.arch + ("" if cfg.protocol.startswith("scratch") else "-random")
    if args.init is not None:
        # the name of a run, or of a file
        folder, file = os.path.split(os.path.abspath(args.init))
        names = {"last.pt": os.path.basename(folder), "best.pt": os.path.basename(folder) + "-best"}
        start = names.get(file, os.path.splitext(file)[0])
    parts = [start, "eval" if args.eval else cfg.protocol, "frozen" if args.freeze else "",
             args.task if args.task != "class" else "",
             data.name_of(cfg.data),
             f"{args.labels}labels" if args.labels else "",
             f"k{args.k}" if cfg.protocol == "knn" and args.k != 20 else "",
             f"seed{args.seed}" if args.seed else ""]
    return "-".join(filter(None, parts))


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
