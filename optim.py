"""Optimization: schedules, parameter groups, optimizers that PyTorch lacks, a step that leaves bad numbers out, and averaged weights."""
import math

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


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


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al., arXiv 1904.00962), in the form of ResNet strikes back (arXiv 2110.00476).

    Gradients are clipped to a global norm of 1. AdamW's direction, decay included, is scaled by |p| / |direction| for
    each parameter that decays (by 1 if either is 0). found_inf, as of PyTorch's fused optimizers: 1 leaves the step out.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        shrink = torch.nn.utils.get_total_norm(gradients).clamp(min=1.0)
        taken = 1 - self.found_inf
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state, gradient, weight = self.state[p], torch.where(taken > 0, p.grad / shrink, 0.0), taken.to(p.dtype)
                if not state:
                    state |= dict(mean=torch.zeros_like(p), square=torch.zeros_like(p), steps=torch.zeros((), device=p.device))
                state["steps"] += taken
                t = state["steps"].double().clamp(min=1)                    # 1 − 0.999^t needs the digits
                state["mean"].lerp_(gradient, weight * (1 - beta1))
                state["square"].lerp_(gradient.square(), weight * (1 - beta2))
                direction = state["mean"] / (1 - beta1 ** t) / ((state["square"] / (1 - beta2 ** t)).sqrt() + group["eps"])
                if group["weight_decay"]:
                    direction += group["weight_decay"] * p
                    size, length = p.norm(), direction.norm()
                    direction *= torch.where((size > 0) & (length > 0), size / length, 1.0)
                p -= weight * group["lr"] * direction


OPTIMIZERS = {"adamw": (torch.optim.AdamW, dict(fused=True)), "lamb": (LAMB, {}), "sgd": (torch.optim.SGD, dict(momentum=0.9, fused=True))}


def layer_scales(model, decay):
    """Parameter's name -> factor on its learning rate: 1 for the head, d^(L − i) for the encoder's block i (from 0; of a CNN,
    layer), d^(L + 1) for what comes before its L blocks."""
    blocks = getattr(model.encoder, "blocks", model.encoder.layers)
    place = {parameter: i for i, block in enumerate(blocks) for parameter in block.parameters()}
    return {name: decay ** (len(blocks) - place.get(parameter, -1)) if name.startswith("encoder.") else 1.0
            for name, parameter in model.named_parameters()}


def make_optimizer(model, config):
    """The optimizer of a configuration: no weight decay for whatever is not a weight matrix; learning rates of the mask token and γ times
    token_lr_scale, of the encoder decaying with depth."""
    scales, groups = layer_scales(model, config.get("layer_decay") or 1.0), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay, scale = decays(name, parameter), config["token_lr_scale"] if name.startswith("mask_token.") else scales[name]
            group = groups.setdefault((decay, scale), dict(
                params=[], weight_decay=config["weight_decay"] if decay else 0.0, peak_lr=config["lr"] * scale))
            group["params"].append(parameter)
    kind, options = OPTIMIZERS[config.get("optimizer", "adamw")]
    optimizer = kind(list(groups.values()), lr=config["lr"], **options)
    if kind is torch.optim.SGD:                                             # of a first step left out, it would keep what memory held
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def statistics(model):
    """What a forward pass changes, running means and variances of batch norms: pairs of the buffer and its value now."""
    return [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.is_floating_point()]


def update(model, optimizer, scaler, clip, loss, before):
    """The optimizer step, once all gradients are there; left out where the loss or the gradient is not finite, and then the
    statistics are as they were `before` the step. All on the device, which nobody waits for. Returns 1 if it was left out, else 0."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
    skipped = (~(norm + loss).isfinite()).float()
    optimizer.found_inf = skipped                                           # optimizers look at it on the device
    optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    for buffer, value in before:
        buffer.copy_(torch.where(skipped > 0, value, buffer))
    return skipped


class EMA(AveragedModel):
    """A running mean of a model's parameters; buffers are the model's. The decay rises from 0.9 of its value to all of it."""

    def __init__(self, model, decay, warmup_steps):
        super().__init__(model)
        self.decay, self.warmup_steps = decay, warmup_steps
        self.n_averaged.fill_(1)                                            # the first update averages, too

    def update(self, model, step):
        decay = self.decay * (0.9 + 0.1 * min(1.0, step / max(1, self.warmup_steps)))
        self.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self.update_parameters(model)
