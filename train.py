"""Pre-train an encoder with A²MIM (Li et al., ICML 2023, arXiv 2205.13943).

On a laptop, a small ViT on built-in images, about two minutes:
$ python train.py
A small ResNet on your own images:
$ python train.py --arch resnet_nano --data path/to/images
The published recipe, on 8 GPUs:
$ torchrun --nproc_per_node=8 train.py --arch vit_b --data path/to/imagenet

Every key of a recipe is an option, such as --mask-ratio 0.5; --print-config shows the result. A run lives
in a folder: last.pt, log.jsonl, recon.png. The same command again continues it, to the very weights it
would have had without the break.
"""
import json
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import losses
import masking
import model as models
import optim
import recipes
import runtime
import weights


def main(argv=None):
    # configuration: what to train (a recipe, and the user's changes), and how to run it
    cfg, args, checkpoint = recipes.pretraining(argv, __doc__)
    if args.print_config:
        print(json.dumps(cfg, indent=2))
        return

    # processes
    rank, world, device = runtime.setup(args.deterministic)
    cuda = device.type == "cuda"
    master_process = rank == 0                          # this process prints, saves and draws

    # data: a step sees batch_size images, in `accumulate` micro-batches on each of `world` processes
    with runtime.local_first():                         # which may have to download, or to list an archive
        source = data.open_source(cfg.data, "train", cfg.img_size, cfg.channels)
        held_out = data.open_source(cfg.data, "val", cfg.img_size, cfg.channels)
    usual = recipes.RECIPES[cfg.arch]["micro_batch"]
    micro_batch = recipes.micro_batch(cfg.batch_size, args.micro_batch, world, usual)
    accumulate = cfg.batch_size // (micro_batch * world)
    steps_per_epoch = len(source) // cfg.batch_size
    total = cfg.epochs * steps_per_epoch
    stop = min(args.steps or total, total)

    # model, loss, optimizer, mixed precision
    torch.manual_seed(data.key(args.seed))
    model = models.build(cfg.arch, cfg.img_size, channels=cfg.channels, mask_layer=cfg.mask_layer,
                         token=cfg.token, fill=cfg.fill, drop_path=cfg.drop_path or 0.0)
    stride = model.encoder.strides[cfg.mask_layer]
    if cfg.mask_size % stride:
        raise ValueError(f"mask_size {cfg.mask_size} is not a multiple of {stride}, the encoder's stride "
                         f"at layer {cfg.mask_layer}")
    init_report = None
    if checkpoint is not None:
        init_report = weights.load(model, checkpoint, args.init)
    criterion = losses.A2MIMLoss(cfg.spatial_loss, cfg.frequency_loss, cfg.frequency_weight,
                                 cfg.frequency_standin or "mixed", cfg.frequency_visible or 0.0)
    model = runtime.place(model, device, world)
    optimizer = optim.make_optimizer(model, cfg)
    autocast, scaler = runtime.precision(args.amp, device)

    # resume: all randomness is keyed, by (seed, epoch, position) in data.Crops and by (seed, step, rank)
    # below, so that beside weights and optimizer there are only a few counts to remember
    images_name = os.path.basename(os.path.normpath(cfg.data)).removesuffix(".tar")
    out = args.out or os.path.join("runs", f"{cfg.arch}-{cfg.method}-{images_name}")
    identity = dict(cfg, seed=args.seed, init=args.init, images=len(source))
    if cfg.frequency_loss == "focal":                   # spectra are averaged over the micro-batch
        identity["micro_batch"] = micro_batch
    start = 0
    counts = dict(skipped=0, skipped_in_a_row=0, unreadable=0, unreadable_in_epoch=0)
    checkpoint = runtime.load(out, identity)
    if checkpoint is not None:
        start = checkpoint["step"]
        counts = checkpoint["counts"]
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if scaler.is_enabled() and checkpoint["scaler"]:        # --amp may change
            scaler.load_state_dict(checkpoint["scaler"])
        del checkpoint                                  # its memory

    # what is read in a step: bytes of crops, and masks
    batches = data.Batches(len(source), cfg.batch_size, micro_batch, start, stop, args.seed, rank, world)
    crops = data.Crops(source, cfg, args.seed)
    loader = iter(torch.utils.data.DataLoader(
        crops, batch_sampler=batches, num_workers=runtime.workers(args.workers), pin_memory=cuda,
        worker_init_fn=data.ignore_signals))
    val_images, val_masks = validation_set(held_out, cfg, args.seed)

    # compiled, and wrapped so that processes average their gradients; `model` keeps its plain names
    replica = torch.compile(model) if args.compile else model
    if world > 1:
        replica = DDP(replica, device_ids=[device.index] if cuda else None)

    if master_process:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{cfg.method}: {cfg.arch}, {millions:.1f} M parameters, on {device} × {world}; {cfg.data}: "
              f"{len(source):,} images at {cfg.img_size} px")
        print(f"batch {cfg.batch_size} = {world} process(es) × {micro_batch} images × {accumulate} "
              f"accumulated; {total} steps in {cfg.epochs} epochs; lr {cfg.lr:.3g}")
        if init_report is not None:
            print(f"{args.init} is {weights.describe(init_report)}")
        if cfg.frequency_loss == "focal" and micro_batch != usual:
            print(f"note: spectra are averaged over {micro_batch} images, the recipe's micro-batch is {usual}")
        print(f"{out}: " + (f"going on after step {start}" if start else "a new run"), flush=True)
    if start >= stop:
        if master_process:
            print("nothing is left to do: more --steps or another --out", flush=True)
        return
    if master_process:
        os.makedirs(out, exist_ok=True)
        log = runtime.open_log(out, start)

    # training loop
    bar = tqdm(total=total, initial=start, unit="step", disable=not (master_process and sys.stderr.isatty()))
    stop_request = runtime.StopRequest()
    next_save = time.time() + 60 * args.save_minutes
    skipped = torch.tensor([counts["skipped"], counts["skipped_in_a_row"]], device=device)
    unreadable = counts["unreadable"] if master_process else 0              # each process counts its own
    unreadable_in_epoch = counts["unreadable_in_epoch"] if master_process else 0
    slow = False                                        # whether a step takes more than a second
    t0 = time.time()
    step0 = start
    model.train()
    for step in range(start, stop):
        torch.manual_seed(data.key(args.seed, step, rank))                  # of drop path
        lr_factor = optim.learning_rate(cfg, step, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        if step % steps_per_epoch == 0:
            unreadable_in_epoch = 0

        # forward and backward, micro-batch by micro-batch
        parts = torch.zeros(3, device=device)           # loss, spatial, frequency
        statistics = optim.statistics(model)            # of batch norms, put back if the step is skipped
        for micro_step in range(accumulate):
            image, mask, replaced = next(loader)
            image = image.to(device, non_blocking=True)
            mask = mask.to(device, non_blocking=True)
            image = data.normalize(image, cfg.mean, cfg.std)                # bytes until here
            if world > 1:                               # gradients travel once, with the last micro-batch
                replica.require_backward_grad_sync = micro_step == accumulate - 1
            with autocast:
                reconstruction = replica(image, mask)
            loss = criterion(reconstruction, image, mask)                   # in float32
            scaler.scale(loss["loss"] / accumulate).backward()
            parts += torch.stack([loss["loss"], loss["spatial"], loss["frequency"]]).detach() / accumulate
            unreadable += int(replaced.sum())
            unreadable_in_epoch += int(replaced.sum())
        if world > 1:
            dist.all_reduce(parts)
            parts /= world

        # clip and step, unless the loss or the gradient is not finite: then the step is skipped, and counted
        skip = optim.update(model, optimizer, scaler, cfg.clip, parts[0], statistics)
        skipped[0] += skip.int()
        skipped[1] = (skipped[1] + 1) * skip.int()
        done = step + 1
        bar.update()

        # look at what came of it: Python waits for the device here, and nowhere else. One process sees at once
        # that it is to stop or to save; several have to ask each other.
        asked = stop_request.asked or stop_request.torchrun not in (None, os.getppid())
        due = master_process and time.time() > next_save
        log_now = done % args.log_every == 0 or done in (start + 1, stop)
        save_now = done == stop or done % ((args.save_epochs or total) * steps_per_epoch) == 0
        if not (log_now or save_now or slow or (world == 1 and (asked or due))):
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

        # log
        if log_now:
            loss, spatial, frequency = parts.tolist()
            entry = dict(step=done, epoch=step // steps_per_epoch + 1, loss=loss, spatial=spatial,
                         frequency=frequency, lr=cfg.lr * lr_factor, skipped=counts["skipped"],
                         unreadable=counts["unreadable"], images_per_second=world * cfg.batch_size / seconds)
            for name in entry:
                if not math.isfinite(entry[name]):
                    entry[name] = None                  # JSON knows no NaN
            t0 = time.time()
            step0 = done
            if master_process:
                print(json.dumps(entry), file=log, flush=True)
                line = f"loss {loss:.4f}, {entry['images_per_second']:.0f} images/s"
                bar.set_postfix_str(line)
                if bar.disable:
                    print(f"step {done}/{total}, epoch {entry['epoch']}, {line}", flush=True)

        # save, and see how far reconstruction has come
        if save_now or due or stopping or bad_images:
            if master_process:
                state = dict(config=identity, step=done, counts=counts, model=model.state_dict(),
                             optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
                runtime.save(os.path.join(out, "last.pt"), state, os.path.join(out, "previous.pt"))
                next_save = time.time() + 60 * args.save_minutes
            val_loss = validate(model, criterion, val_images, val_masks, cfg, usual)
            if master_process:
                print(json.dumps(dict(step=done, val_loss=val_loss)), file=log, flush=True)
                draw(os.path.join(out, "recon.png"), model, val_images, val_masks, cfg)
            t0 = time.time()
            step0 = done
        if bad_images:
            raise ValueError(f"{counts['unreadable_in_epoch']:.0f} images of this epoch could not be read, more "
                             f"than --max-bad {args.max_bad:g}: repair them, or allow more; then the same "
                             "command goes on")
        if stopping and done < stop:
            if world > 1:
                dist.barrier()                          # torchrun ends all processes when the first has left
            if master_process:
                bar.close()
                print(f"stopped after step {done} of {total}; the same command goes on from there", flush=True)
            sys.exit(runtime.STOPPED)

    bar.close()
    stop_request.restore()
    if master_process:
        print(f"loss {loss:.4f}, on held-out images {val_loss:.4f}. Pictures: {out}/recon.png; weights: "
              f"{out}/last.pt; curve: {out}/log.jsonl", flush=True)


def validation_set(source, cfg, seed):
    """Up to 256 images (N, C, S, S) uint8 with masks (N, g, g): the same ones throughout a run."""
    grid = cfg.img_size // cfg.mask_size
    images = []
    masks = []
    for i in torch.linspace(0, len(source) - 1, min(256, len(source))).long().tolist():
        (image, label), replaced = data.readable(source, i, seed, -1, i)
        images.append(data.center_crop(image, cfg.img_size))
        masks.append(masking.MASKS[cfg.mask](1, grid, cfg.mask_ratio, [data.generator(seed, -1, i)]))
    return torch.stack(images), torch.cat(masks)


@torch.no_grad()
def validate(model, criterion, images, masks, cfg, chunk):
    """The reconstruction loss, in float32: the same on any number of processes (but for batch norm)."""
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    for image, mask in zip(images.split(chunk), masks.split(chunk)):
        image = data.normalize(image.to(device), cfg.mean, cfg.std)
        mask = mask.to(device)
        total += len(image) * criterion(model(image, mask), image, mask)["loss"].item()
    model.train()
    return total / len(images)


@torch.no_grad()
def draw(path, model, images, masks, cfg):
    """Eight images, a column each: the image, what the model sees, what it paints, and both together."""
    device = next(model.parameters()).device
    apart = max(1, len(images) // 8)
    image = data.normalize(images[::apart][:8].to(device), cfg.mean, cfg.std)
    model.eval()
    rows = torch.cat(model.reconstruct(image, masks[::apart][:8].to(device)))
    model.train()
    data.write_picture(path, data.denormalize(rows, cfg.mean, cfg.std), columns=len(image))


if __name__ == "__main__":
    runtime.run(main)
