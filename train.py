"""Pre-train an encoder with A²MIM (Li et al., ICML 2023, arXiv 2205.13943).

On a laptop, a small ViT on built-in images, about two minutes:
$ python train.py
A small ResNet on your own images:
$ python train.py --arch resnet_nano --data path/to/images
The published recipe, on 8 GPUs:
$ torchrun --nproc_per_node=8 train.py --arch vit_b --data path/to/imagenet

Every key of a recipe is an option, such as --mask-ratio 0.5; --print-config shows the result. A run
lives in a folder: last.pt, log.jsonl, recon.png. The same command again continues it, to the very
weights that it would have had without the break.
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
    cfg, args, init = recipes.pretraining(argv, __doc__)
    if args.print_config:
        print(json.dumps(cfg, indent=2))
        return

    # processes; the first one prints, saves and draws
    rank, world, device = runtime.setup(args.deterministic)
    master_process = rank == 0

    # data: a step sees batch_size images, in `accumulate` micro-batches on each of `world` processes
    with runtime.local_first():
        source = data.open_source(cfg.data, "train", cfg.img_size, cfg.channels, cfg.shapes_count)
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
        raise ValueError(f"mask_size {cfg.mask_size} is not a multiple of {stride}, the encoder's "
                         f"stride at layer {cfg.mask_layer}")
    started_from = "random weights"
    if init is not None:
        started_from = f"{args.init}, {weights.describe(weights.load(model, init, args.init))}"
    criterion = losses.A2MIMLoss(cfg.spatial_loss, cfg.frequency_loss, cfg.frequency_weight,
                                 cfg.frequency_standin or "mixed", cfg.frequency_visible or 0.0)
    model = runtime.place(model, device, world)
    optimizer = optim.make_optimizer(model, cfg)
    autocast, scaler = runtime.precision(args.amp, device)

    # resume: all randomness is keyed, by (seed, epoch, position) in data.Crops and by (seed, step,
    # rank) below, so that beside weights and optimizer there are only a few counts to remember
    out = args.out or f"runs/{cfg.arch}-{cfg.method}-{data.name_of(cfg.data)}"
    identity = dict(cfg, seed=args.seed, init=args.init, images=len(source))
    if cfg.frequency_loss == "focal":
        # spectra are averaged over the micro-batch: its size is a part of what the run is
        identity["micro_batch"] = micro_batch
    start = 0
    counts = dict(skipped=0, skipped_in_a_row=0, unreadable=0)
    as_published = ["--arch", cfg.arch, "--method", cfg.method, "--recipe", args.recipe,
                    "--data", cfg.data]
    defaults, *_ = recipes.pretraining(as_published, "")
    checkpoint = runtime.load(out, identity, defaults)
    if checkpoint is not None:
        start = checkpoint["step"]
        counts = checkpoint["counts"]
        runtime.restore(checkpoint, model, optimizer, scaler)
        started_from = f"step {start} of {out}"
        del checkpoint  # its memory

    # what a step reads: bytes of crops, masks, and whether an image was unreadable and replaced
    batches = data.Batches(len(source), cfg.batch_size, micro_batch, start, stop, args.seed, rank, world)
    crops = data.Crops(source, cfg, args.seed)
    loader = iter(data.loader(crops, batches, runtime.workers(args.workers)))
    val_images, val_masks = validation_set(held_out, cfg, args.seed, device)

    # compiled, and wrapped so that processes average their gradients; `model` keeps plain names
    replica = torch.compile(model, dynamic=False) if args.compile else model
    if world > 1:
        replica = DDP(replica, device_ids=[device.index] if device.type == "cuda" else None)

    if master_process:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{cfg.method}: {cfg.arch}, {millions:.1f} M parameters, on {device} × {world}; "
              f"{cfg.data}: {len(source):,} images at {cfg.img_size} px\n"
              f"batch {cfg.batch_size} = {world} process(es) × {micro_batch} images × {accumulate} "
              f"accumulated; {total} steps in {cfg.epochs} epochs; lr {cfg.lr:.3g}\n"
              f"{out}: from {started_from}", flush=True)
        if cfg.frequency_loss == "focal" and micro_batch != usual:
            print(f"note: spectra are averaged over {micro_batch} images, the recipe's number is {usual}")
    if start >= stop:
        if master_process:
            more = "--steps" if start < total else "--out: the run is finished"
            print(f"nothing is left to do: choose another {more}")
        return
    if master_process:
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
    model.train()
    for step in range(start, stop):
        # drop path draws from here on: the same when the run is continued
        torch.manual_seed(data.key(args.seed, step, rank))
        lr_factor = optim.learning_rate(cfg, step, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        if step % steps_per_epoch == 0:
            unreadable = 0

        # forward and backward, micro-batch by micro-batch
        # the loss and its two terms; batch norm's statistics, put back if the step is skipped
        parts = torch.zeros(3, device=device)
        batchnorm = optim.statistics(model)
        for micro_step in range(accumulate):
            image, mask, replaced = next(loader)
            unreadable += int(replaced.sum())
            image = image.to(device, non_blocking=True)
            mask = mask.to(device, non_blocking=True)
            # images were bytes until here
            image = data.normalize(image, cfg.mean, cfg.std)
            if world > 1:
                # gradients travel between processes once, with the last micro-batch
                replica.require_backward_grad_sync = micro_step == accumulate - 1
            # the model masks the image (A2MIM.encode); the target is the whole image, in float32
            with autocast:
                reconstruction = replica(image, mask)
            terms = criterion(reconstruction, image, mask)
            scaler.scale(terms["loss"] / accumulate).backward()
            terms = torch.stack([terms["loss"], terms["spatial"], terms["frequency"]])
            parts += terms.detach() / accumulate
        if world > 1:
            dist.all_reduce(parts)
            parts /= world

        # clip and step; where the loss or the gradient is not finite, the step is skipped instead
        skip = optim.update(model, optimizer, scaler, cfg.clip, parts[0], batchnorm)
        skipped[0] += skip
        skipped[1] = (skipped[1] + 1) * skip
        done = step + 1
        bar.update()

        # look at what came of it: only here does Python wait for the device. One process sees at
        # once that it is to stop or to save; several ask each other when they log, or each step
        # where steps take over a second.
        asked = stop_request.pending()
        due = master_process and time.time() > next_save
        log_now = done % args.log_every == 0 or done in (start + 1, stop)
        save_now = done == stop or done % ((args.save_epochs or cfg.epochs) * steps_per_epoch) == 0
        if not (log_now or save_now or slow or (world == 1 and (asked or due))):
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

        # log
        if log_now:
            loss, spatial, frequency = parts.tolist()
            speed = cfg.batch_size / seconds
            entry = dict(step=done, epoch=step // steps_per_epoch + 1, loss=loss, spatial=spatial,
                         frequency=frequency, lr=cfg.lr * lr_factor, skipped=counts["skipped"],
                         unreadable=counts["unreadable"], images_per_second=speed)
            for key in entry:
                if not math.isfinite(entry[key]):
                    entry[key] = None  # JSON knows no NaN
            if master_process:
                print(json.dumps(entry), file=log, flush=True)
                bar.set_postfix_str(f"loss {loss:.4f}")
            if master_process and bar.disable:
                print(f"step {done}/{total}, epoch {entry['epoch']}, loss {loss:.4f}, "
                      f"{speed:.0f} images/s", flush=True)
            t0 = time.time()
            step0 = done

        # save first, then see how far reconstruction has come
        if save_now or due or asked or too_bad:
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

    bar.close()
    stop_request.restore()
    if master_process:
        print(f"loss {loss:.4f}, on held-out images {val_loss:.4f}. Pictures: {out}/recon.png; "
              f"weights: {out}/last.pt; curve: {out}/log.jsonl", flush=True)


def validation_set(source, cfg, seed, device):
    """Up to 256 images (N, C, S, S) uint8 and masks (N, g, g): the same ones throughout a run."""
    grid = cfg.img_size // cfg.mask_size
    images = []
    masks = []
    for i in torch.linspace(0, len(source) - 1, min(256, len(source))).long().tolist():
        (image, label), replaced = data.readable(source, i, seed, -1, i)
        draw_mask = masking.MASKS[cfg.mask]
        images.append(data.center_crop(image, cfg.img_size))
        masks.append(draw_mask(1, grid, cfg.mask_ratio, [data.generator(seed, -1, i)]))
    return torch.stack(images).to(device), torch.cat(masks).to(device)


@torch.no_grad()
def validate(model, criterion, images, masks, cfg, chunk):
    """The loss on held-out images in float32: without batch norm, the same on any processes."""
    model.eval()
    total = 0.0
    for image, mask in zip(images.split(chunk), masks.split(chunk)):
        image = data.normalize(image, cfg.mean, cfg.std)
        total += len(image) * criterion(model(image, mask), image, mask)["loss"].item()
    model.train()
    return total / len(images)


@torch.no_grad()
def draw(path, model, images, masks, cfg):
    """Eight images, a column each: the image, what the model sees, its reconstruction, both."""
    apart = max(1, len(images) // 8)
    image = data.normalize(images[::apart][:8], cfg.mean, cfg.std)
    model.eval()
    rows = torch.cat(model.reconstruct(image, masks[::apart][:8]))
    model.train()
    data.write_picture(path, data.denormalize(rows, cfg.mean, cfg.std), columns=len(image))


if __name__ == "__main__":
    runtime.run(main)
