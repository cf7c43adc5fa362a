"""Optimization: schedules, parameter groups, LAMB, a step that leaves bad numbers out, EMA."""
import math

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


# ---- schedules

def learning_rate(config, step, steps_per_epoch):
    """The factor on every group's peak learning rate at an optimizer step, counted from 0.

    A linear warm-up, times ×0.1 at certain epochs ("step") or a cosine that ends at min_lr: from the
    end of the warm-up ("cosine"), or as mmcv's, which the warm-up multiplies, from the start of
    training ("cosine_from_start"), there also constant within an epoch ("cosine_by_epoch").
    """
    total = config["epochs"] * steps_per_epoch
    warmup = min(round(config["warmup_epochs"] * steps_per_epoch), total // 2)
    factor = (step + 1) / warmup if step < warmup else 1.0
    if config["schedule"] == "step":
        for epoch in config.get("lr_step_epochs") or [config["lr_step_epoch"]]:
            if step >= epoch * steps_per_epoch:
                factor *= 0.1
        return factor
    if config["schedule"] == "cosine":
        progress = max(0, step - warmup) / (total - warmup)
    elif config["schedule"] == "cosine_from_start":
        progress = step / total
    else:
        progress = step // steps_per_epoch / config["epochs"]
    lowest = min(1.0, config["min_lr"] / config["lr"]) if config["lr"] else 1.0
    return factor * (lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2)


# ---- parameter groups

def decays(name, parameter):
    """Weight decay is for weight matrices only: not for biases, norms, positions, tokens, scales."""
    tables = ("cls_token", "pos_embed", "relative_position_bias_table")
    return parameter.squeeze().ndim > 1 and not name.endswith(tables)


def layer_scales(model, decay):
    """Parameter's name -> factor on its learning rate, with layer decay d and L blocks.

    d^(L − i) for the encoder's block i (from 0; of a CNN, its layer), d^(L + 1) for what comes
    before the blocks, 1 for the final norm and the head.
    """
    blocks = getattr(model.encoder, "blocks", model.encoder.layers)
    block_of = {}
    for i, block in enumerate(blocks):
        for parameter in block.parameters():
            block_of[parameter] = i
    scales = {}
    for name, parameter in model.named_parameters():
        in_encoder = name.startswith("encoder.") and not name.startswith("encoder.norm.")
        scales[name] = decay ** (len(blocks) - block_of.get(parameter, -1)) if in_encoder else 1.0
    return scales


def make_optimizer(model, config):
    """The optimizer of a configuration. Each group has its own peak learning rate, `peak_lr`.

    Mask token and γ learn at token_lr_scale times the rate; an encoder's rate decays with depth.
    """
    scales = layer_scales(model, config.get("layer_decay") or 1.0)
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = config["token_lr_scale"] if name.startswith("mask_token.") else scales[name]
        weight_decay = config["weight_decay"] if decays(name, parameter) else 0.0
        group = dict(params=[], weight_decay=weight_decay, peak_lr=config["lr"] * scale)
        groups.setdefault((decays(name, parameter), scale), group)["params"].append(parameter)
    groups = list(groups.values())
    kind = config.get("optimizer", "adamw")
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=config["lr"], fused=True)
    if kind == "lamb":
        return LAMB(groups, lr=config["lr"])
    optimizer = torch.optim.SGD(groups, lr=config["lr"], momentum=0.9, fused=True)
    # a first step that is left out has to leave some momentum as it is
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive moments (arXiv 1904.00962), as in ResNet strikes back (2110.00476).

    Gradients are clipped to a global norm of 1. AdamW's direction, decay included, is scaled by
    |p| / |direction| for each parameter that decays (by 1 if either is 0). found_inf: 1 leaves the
    step out, as in PyTorch's fused optimizers.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self, closure=None):
        parameters = []
        for group in self.param_groups:
            parameters += [(p, group) for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p, _ in parameters])
        shrink = norm.clamp(min=1.0)
        taken = 1 - self.found_inf
        for p, group in parameters:
            beta1, beta2 = group["betas"]
            state = self.state[p]
            if not state:
                state["mean"] = torch.zeros_like(p)
                state["square"] = torch.zeros_like(p)
                state["steps"] = torch.zeros((), device=p.device)
            gradient = torch.where(taken > 0, p.grad / shrink, 0.0)
            weight = taken.to(p.dtype)
            state["steps"] += taken
            t = state["steps"].double().clamp(min=1)  # 1 − 0.999^t needs the digits
            state["mean"].lerp_(gradient, weight * (1 - beta1))
            state["square"].lerp_(gradient.square(), weight * (1 - beta2))
            root = (state["square"] / (1 - beta2 ** t)).sqrt() + group["eps"]
            direction = state["mean"] / (1 - beta1 ** t) / root
            if group["weight_decay"]:
                direction += group["weight_decay"] * p
                size = p.norm()
                length = direction.norm()
                direction *= torch.where((size > 0) & (length > 0), size / length, 1.0)
            p -= weight * group["lr"] * direction


# ---- the optimizer step

def statistics(model):
    """What a forward pass changes: batch norms' statistics, as pairs (buffer, its value now)."""
    return [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.is_floating_point()]


def update(model, optimizer, scaler, clip, loss, before):
    """Clip, and take the optimizer step. Returns 1 if it was left out, else 0.

    It is left out where the loss or the gradient is not finite; batch statistics then are what they
    were `before` the step. All of that happens on the device: the host waits for nothing.
    """
    scaler.unscale_(optimizer)
    clip = math.inf if clip is None else clip
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    skipped = (~(norm + loss).isfinite()).float()
    # in place of scaler.step(): fused optimizers read found_inf on the device and leave the step out,
    # without a GPU→CPU synchronisation; here also where the loss is not finite
    optimizer.found_inf = skipped
    optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    for buffer, value in before:
        buffer.copy_(torch.where(skipped > 0, value, buffer))
    return skipped.long()


class EMA(AveragedModel):
    """A running mean of a model's parameters; buffers are the model's.

    The decay rises from 0.9 of its value to all of it, over warmup_steps.
    """

    def __init__(self, model, decay, warmup_steps):
        super().__init__(model)
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.n_averaged.fill_(1)  # the first update averages, too

    def update(self, model, step):
        warmed_up = min(1.0, step / max(1, self.warmup_steps))
        self.multi_avg_fn = get_ema_multi_avg_fn(self.decay * (0.9 + 0.1 * warmed_up))
        self.update_parameters(model)
