"""Checkpoints: reading and writing our own, other projects' in.

`load(model, source)` recognises what a file holds by its parameters' names. A new format is one row of FORMATS:
a test on the names, and a translation of one name and tensor into ours.
"""
import os
import re

import torch


def ours(name, value):
    return name, value


# The official code's names for what stands under other names here; the rest (attn.*, gamma_*, layer1.* …) is equal.
OPENMIXUP = [(r"^neck\.decoder_pred\.0\.", "decoder.0."),
             (r"^backbone\.mask_token$", "mask_token.token"),
             (r"^backbone\.mask_gamma$", "mask_token.gamma"),
             (r"^backbone\.patch_embed\.projection\.", "encoder.patch_embed."),
             (r"^backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.", r"encoder.blocks.\1.mlp.fc1."),
             (r"^backbone\.layers\.(\d+)\.ffn\.layers\.1\.", r"encoder.blocks.\1.mlp.fc2."),
             (r"^backbone\.layers\.(\d+)\.ln(\d)\.", r"encoder.blocks.\1.norm\2."),
             (r"^backbone\.layers\.(\d+)\.", r"encoder.blocks.\1."),
             (r"^backbone\.ln1\.", "encoder.norm."),
             (r"^backbone\.", "encoder.")]


def openmixup(name, value):
    """backbone.layers.0.ln1.weight -> encoder.blocks.0.norm1.weight; tokens (1, 1, C) or (1, C, 1, 1) -> (C,)."""
    for pattern, replacement in OPENMIXUP:
        new, found = re.subn(pattern, replacement, name)
        if found:
            return new, value.flatten() if new.startswith("mask_token.") else value
    return name, value


def torchvision(name, value):
    return "encoder." + name, value


FORMATS = {  # format: (does a file with these names have it?, (name, tensor) -> (our name, tensor))
    "nanoA2MIM": (lambda names: any(n.startswith("encoder.") for n in names), ours),
    "OpenMixup": (lambda names: any(n.startswith("backbone.") for n in names), openmixup),
    "torchvision ResNet": (lambda names: "layer1.0.conv1.weight" in names, torchvision),
}


def read(path):
    """What a checkpoint file holds, loaded without running any code in it. Raises ValueError, in one line."""
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:          # torch.load has no one exception for what is no checkpoint, or no mere data
        reason = str(error).strip().splitlines()
        unsafe = any("weights_only" in line or "Unsupported" in line for line in reason)
        raise ValueError(f"{path} holds Python objects beside tensors, which are never run here: save its state_dict "
                         "alone and pass that" if unsafe else f"{path} is no PyTorch checkpoint, or is damaged") from None


def write(path, state):
    """A checkpoint, whole or not at all: what stood there stays until the new one is on the disk. Raises OSError."""
    with open(path + ".tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def load(model, source):
    """Load an A2MIM model's encoder, and token and decoder as far as the source has them (and they fit).

    source: a path, or the dictionary such a file holds: ours, the official code's (OpenMixup), or a torchvision
    ResNet's. Integer buffers are optional. Returns {"format", "loaded", "missing", "unused"}: lists of our names, but for `unused`, the file's.
    Raises ValueError, and leaves the model as it was, if the format is unknown or the encoder is another one.
    """
    where = source if isinstance(source, (str, os.PathLike)) else "the dictionary"
    state = read(source) if where is source else source
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{where} holds no state_dict: expected tensors by name, or such under 'model' or 'state_dict'")
    kind = next((k for k, (test, _) in FORMATS.items() if test(state)), None)
    if kind is None:
        raise ValueError(f"{where} is in no known format ({', '.join(FORMATS)}): it begins with {next(iter(state))!r}")
    own, found, unused = model.state_dict(), {}, []
    for name, value in state.items():
        new, value = FORMATS[kind][1](name, value)
        encoder = new.startswith("encoder.")
        if new in own and own[new].shape == value.shape:
            found[new] = value
        elif new in own and encoder:
            raise ValueError(f"{where}: {name} is {tuple(value.shape)}, but the model's is {tuple(own[new].shape)}: "
                             "build the model with the architecture and image size of the file")
        else:
            unused.append(name)
    missing = [name for name in own if name not in found and own[name].is_floating_point()]
    if lost := [n for n in missing if n.startswith("encoder.")]:
        raise ValueError(f"{where} has no {lost[0]} and {len(lost) - 1} more of this encoder: is it another architecture?")
    model.load_state_dict(found, strict=False)
    return {"format": kind, "loaded": list(found), "missing": missing, "unused": unused}
