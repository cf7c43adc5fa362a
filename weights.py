"""Checkpoints: reading and writing our own, other projects' in, ours out.

  python weights.py show FILE                      what a file holds
  python weights.py export CKPT --to timm OUT      the encoder (and classifier) in timm's names, or torchvision's

`load(model, source)` recognises what a file holds by its parameters' names. A new format is one row of FORMATS:
a test on the names, and a table that turns each name into ours. `open_model(path)` makes the model that a file holds.
"""
import argparse
import collections
import contextlib
import hashlib
import math
import os
import re

import torch
import torch.nn.functional as F
import torchvision

import data
import model as models

# ------------------------------------------------------------------------------------------------ formats

# (pattern, replacement), applied in order. What needs more than a new name is in `translate`.
TIMM = [(r"^fc\.", "head."),                                                # ResNets
        (r"^(?!head\.|fc_norm\.|mask_token|decoder)", "encoder."),
        (r"^encoder\.patch_embed\.proj\.", "encoder.patch_embed."),
        (r"\.ls(\d)\.gamma$", r".gamma_\1")]
SIMMIM = [(r"^encoder\.mask_token$", "mask_token.token"),
          (r"^encoder\.patch_embed\.proj\.", "encoder.patch_embed.")]
OPENMIXUP = [(r"^neck\.decoder_pred\.", "decoder."),
             (r"^head\.(fc|layers\.head)\.", "head."),
             (r"^backbone\.mask_(token|gamma)$", r"mask_token.\1"),
             (r"^backbone\.fc_norm\.", "fc_norm."),
             (r"^backbone\.", "encoder."),
             (r"^encoder\.patch_embed\.projection\.", "encoder.patch_embed."),
             (r"^encoder\.layers\.", "encoder.blocks."),
             (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
             (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
             (r"^encoder\.ln1\.", "encoder.norm."),
             (r"\.ln(\d)\.", r".norm\1.")]
TORCHVISION = [(r"^classifier\.0\.", "fc_norm."), (r"^classifier\.2\.", "head."),        # ConvNeXt's
               (r"^(?!head\.|fc_norm\.)", "encoder.")]

FORMATS = {  # format: (does a file with these names have it?, table of names)
    "OpenMixup": (lambda names: any(n.startswith("backbone.") for n in names), OPENMIXUP),
    "SimMIM": (lambda names: "encoder.patch_embed.proj.weight" in names, SIMMIM),
    "nanoA2MIM": (lambda names: any(n.startswith("encoder.") for n in names), []),
    "ViT of timm, BEiT or MAE": (lambda names: {"patch_embed.proj.weight", "blocks.0.norm1.weight"} <= set(names), TIMM),
    "ConvNeXt or Swin of torchvision": (lambda names: "features.0.0.weight" in names, TORCHVISION),
    "ResNet of torchvision or timm": (lambda names: {"conv1.weight", "layer1.0.conv1.weight"} <= set(names), TIMM),
}

FIRST = "encoder.patch_embed.weight", "encoder.conv1.weight", "encoder.features.0.0.weight"        # what sees the channels of images

# What an encoder may lack, and the value that makes ours compute the same: no bias, no scale, no positions.
NEUTRAL = {"q_bias": 0.0, "v_bias": 0.0, "relative_position_bias_table": 0.0, "pos_embed": 0.0, "gamma_1": 1.0, "gamma_2": 1.0}


def translate(state, table):
    """Yields (name in the file, our name, tensor); a tensor of the file may become several."""
    blocks = {m[0] for name in state if (m := re.search(r"\bblocks\.\d+\.", name))}
    for name, value in state.items():
        new = name
        for pattern, replacement in table:
            new = re.sub(pattern, replacement, new)
        if re.match(r"encoder\.blocks\..*attn\.qkv\.bias", new):           # the softmax cancels the bias of the keys
            q, _, v = value.chunk(3)
            yield name, new.replace("qkv.bias", "q_bias"), q
            yield name, new.replace("qkv.bias", "v_bias"), v
        elif new == "encoder.rel_pos_bias.relative_position_bias_table":    # one table for all blocks
            for block in blocks:
                yield name, f"encoder.{block}attn.relative_position_bias_table", value
        elif not re.match(r"encoder\.(blocks|rel_pos).*(relative_position_index|attn\.k_bias)", new):      # computed; always zero
            yield name, new, value.flatten() if new.startswith("mask_token.") else value    # ours are vectors


# ------------------------------------------------------------------------------------------------ files

SEAL = b"\nsha256 "         # PyTorch's file, then this, then the digest of all before it: torch.load reads over bit flips


def check_seal(file, path, needed):
    """Compare an open file with the digest at its end. Raises ValueError if they differ, or if a needed one is missing."""
    length = file.seek(0, os.SEEK_END) - len(SEAL) - 64
    file.seek(max(0, length))
    seal, sha = file.read(), hashlib.sha256()
    file.seek(0)
    if seal.startswith(SEAL):
        for start in range(0, length, 2 ** 22):
            sha.update(file.read(min(2 ** 22, length - start)))
        if seal != SEAL + sha.hexdigest().encode():
            raise ValueError(f"{path} is damaged: its checksum differs")
    elif needed:
        raise ValueError(f"{path} has no checksum: it is damaged, or no checkpoint of this program")


def read(path, sealed=False):
    """The dictionary a checkpoint file holds, loaded without running any code in it. A seal is checked, and with
    sealed=True there must be one, as there is on what `write` wrote. Raises ValueError, in one line."""
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path!r}")
    try:
        with open(path, "rb") as file:
            check_seal(file, path, sealed)
            file.seek(0)
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:                                      # of many kinds; a GLOBAL is pickle's word for what it would run
                raise ValueError(f"{path} holds Python objects beside tensors, which are never run here: save its state_dict alone and "
                                 "pass that" if "GLOBAL" in str(error) else f"{path} is no PyTorch checkpoint, or is damaged") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, no state_dict")
    return state


class Sealed:
    """A file that keeps the digest of what is written to it."""

    def __init__(self, file):
        self.file, self.sha, self.flush, self.problem = file, hashlib.sha256(), file.flush, None

    def write(self, block):
        self.sha.update(block)
        try:
            return self.file.write(block)
        except OSError as error:                                            # which torch.save answers with one of its own
            self.problem = error
            raise


def write(path, state, previous=None):
    """A checkpoint, whole or not at all: what stood there stays, then as `previous` if that is given, until the new one is
    on the disk. The one moment that counts is its renaming. Raises OSError."""
    try:
        with open(path + ".tmp", "wb") as file:
            sealed = Sealed(file)
            try:
                torch.save(state, sealed)
            except RuntimeError as error:
                raise sealed.problem or error
            file.write(SEAL + sealed.sha.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(path + ".tmp", path)
        data.sync_folder(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise


def unpack(state, where="the dictionary"):
    """(format, [(name in the file, our name, tensor)]) of what a file holds. Raises ValueError, in one line."""
    for key in ("ema", "model", "state_dict"):                              # of a run with an average: the average
        if isinstance(state.get(key), dict):
            state = state[key]
    if not state or not all(isinstance(k, str) and torch.is_tensor(v) and v.layout == torch.strided for k, v in state.items()):
        raise ValueError(f"{where} holds no state_dict: expected tensors by name, or such under 'model' or 'state_dict'")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}
    kind = next((k for k, (test, _) in FORMATS.items() if test(state)), None)
    if kind is None:
        raise ValueError(f"{where} is in no known format ({', '.join(FORMATS)}): it begins with {next(iter(state))!r}")
    return kind, list(translate(state, FORMATS[kind][1]))


# ------------------------------------------------------------------------------------------------ in

def resize_positions(name, value, like):
    """A table of positions for another number of patches a side, or None if that is not all that differs.

    Absolute positions (1, 1 + n·n, D) and relative-bias tables ((2n − 1)² + 3, heads) are maps, interpolated bicubically
    (antialiased, corners not aligned: a place keeps its share of the image, an offset about its share). What belongs to
    the class token, at one end or the other, is kept. For absolute positions timm does the same.
    """
    absolute, relative = name.endswith("pos_embed"), name.endswith("relative_position_bias_table")
    if not (absolute or relative) or value.ndim != like.ndim or value.shape[-1] != like.shape[-1]:
        return None
    tokens, rest = (value[0, 1:], value[0, :1]) if absolute else (value[:-3], value[-3:])
    wanted = like.shape[-2] - len(rest)
    old, new = math.isqrt(len(tokens)), math.isqrt(wanted)
    if old * old != len(tokens) or new * new != wanted:
        return None
    grid = tokens.T.reshape(1, -1, old, old).float()
    tokens = F.interpolate(grid, (new, new), mode="bicubic", antialias=True).flatten(2)[0].T.to(value.dtype)
    return torch.cat([rest, tokens])[None] if absolute else torch.cat([tokens, rest])


def load(model, source, where="the dictionary", head=True):
    """Load the encoder of an A2MIM or a Predictor, and of the rest what the source has and what fits.

    source: a path, or the dictionary such a file holds (`where` it is from), in a format of FORMATS. Positions are
    resized to the model's image size. What the file's encoder lacks by design (see NEUTRAL) gets the value that changes
    nothing. Returns {"format", "loaded", "resized", "neutral", "missing", "unused"}: lists of our names, but for
    `unused`, the file's. head=False leaves a classifier in the file. Raises ValueError, and leaves the model as it was, if
    the format is unknown or the encoder is another one.
    """
    if isinstance(source, (str, os.PathLike)):
        source, where = read(source), source
    kind, items = unpack(source, where)
    own, names = model.state_dict(), [new for _, new, _ in items]
    pooled = "fc_norm.weight" in names                                      # a fine-tuned ViT, which has no final norm
    other_head = not head or "fc_norm.weight" in own and not pooled         # learned on the class token, say
    found, resized, unused = {}, [], []
    for name, new, value in items:
        if new.startswith("head.") and other_head:
            unused.append(name)
        elif new in own and own[new].shape == value.shape:
            found[new] = value
        elif new in own and (table := resize_positions(new, value, own[new])) is not None:
            found[new] = table
            resized.append(new)
        elif new in own and new.startswith("encoder."):
            raise ValueError(f"{where}: {name} is {tuple(value.shape)}, but the model's is {tuple(own[new].shape)}: "
                             "build the model with the architecture, patch size and channels of the file")
        elif new.startswith("encoder.") and not new.startswith("encoder.norm."):
            raise ValueError(f"{where}: its encoder has {name}, this model's has not: build the model with the "
                             "architecture of the file")
        else:
            unused.append(name)
    neutral = {n: torch.full_like(own[n], NEUTRAL[n.split(".")[-1]]) for n in own if n not in found and n.split(".")[-1] in NEUTRAL}
    missing = [n for n in own if n not in found and n not in neutral and own[n].is_floating_point()]
    if lost := [n for n in missing if n.startswith("encoder.") and not (pooled and n.startswith("encoder.norm."))]:
        raise ValueError(f"{where} has not all of this encoder, {lost[0]} for one: is it another architecture?")
    model.load_state_dict(found | neutral, strict=False)
    return {"format": kind, "loaded": list(found), "resized": resized, "neutral": list(neutral), "missing": missing, "unused": unused}


def run_of(checkpoint):
    """What a checkpoint of ours says of its run, those fields that are what they should be; of another's, nothing."""
    run = checkpoint.get("identity") if checkpoint else None
    kinds = dict(arch=str, protocol=str, task=str, data=str, fill=str, token=str, mask=str, mask_ratio=float, mean=list, std=list) | dict.fromkeys(
        ("img_size", "test_resize", "test_crop", "mask_size", "mask_layer", "channels"), int)
    run = {k: v for k, v in run.items() if type(v) is kinds.get(k) and (type(v) is not int or 0 <= v < 10000)
           and (type(v) is not list or all(type(number) is float for number in v))} if isinstance(run, dict) else {}
    return run if run.get("arch") in models.PRESETS else {}


def size_of(run):
    return run.get("test_crop") or run.get("img_size") or 224


def presets_of(run):
    return [run["arch"]] if run else models.PRESETS


def recognise(state, size=224, presets=models.PRESETS, where="the dictionary", channels=3):
    """(preset, image size, keywords of its encoder) for an encoder's tensors, by our names: the first preset whose weights have their
    shapes. A ViT's table of positions says its image size; otherwise it is `size`. Raises ValueError."""
    def shapes(state):
        return {name: tuple(value.shape) for name, value in state.items() if name.startswith("encoder.") and name.endswith(".weight")
                and value.ndim > 1 and "patch_embed" not in name}

    first, table = [state[name] for name in FIRST if name in state], state.get("encoder.blocks.0.attn.relative_position_bias_table")
    channels = first[0].shape[1] if first else channels
    options = {} if channels == 3 else dict(channels=channels)
    if "encoder.patch_embed.weight" in state:
        options["patch_size"] = patch = state["encoder.patch_embed.weight"].shape[-1]
        if "encoder.pos_embed" in state:
            size = patch * math.isqrt(state["encoder.pos_embed"].shape[1] - 1)
        elif table is not None:
            size = patch * ((math.isqrt(len(table) - 3) + 1) // 2)
    for arch in presets:
        with contextlib.suppress(ValueError), torch.device("meta"):         # shapes only; a ResNet has no patch_size
            if shapes(models.build(arch, size, **options).state_dict()) == shapes(state):
                return arch, size, options
    raise ValueError(f"{where} holds an encoder that is none of {', '.join(presets)}")


def open_model(path):
    """The model in a file: a Predictor if there is a classifier, else an A2MIM. Returns (model, about it): a dictionary of arch, size,
    run (what our checkpoints say of it), classes (their names, if known), channels, mean and std (of images), and the report of `load`.
    Raises ValueError."""
    checkpoint = read(path)
    kind, items = unpack(checkpoint, path)
    run, state = run_of(checkpoint), {new: value for _, new, value in items}
    classes = checkpoint.get("classes")
    method = dict(mask_layer=0, fill="none", token="replace") if kind == "SimMIM" else {k: run.get(k) for k in ("mask_layer", "fill", "token")}
    try:
        arch, size, options = recognise(state, size_of(run), presets_of(run), path, run.get("channels", 3))
        model, head = models.build(arch, size, **options, **method), state.get("head.weight")
        if head is not None and head.ndim == 2 and len(head) > 1 and run.get("task", "class") == "class":
            on_token = "encoder.blocks.0.norm1.weight" in state and "fc_norm.weight" not in state
            model = models.Predictor(model.encoder, len(head), "token" if on_token else "mean")
        report = load(model, checkpoint, path)
    except (IndexError, RuntimeError, TypeError) as error:                  # odd shapes
        raise ValueError(f"{path} holds no whole model: {str(error).splitlines()[0]}") from None
    classes = classes if isinstance(classes, list) else None
    return model, dict(arch=arch, size=size, run=run, classes=classes) | data.colours({}, run) | report


def starred(name):
    """The name without its number, one for all blocks."""
    return re.sub(r"\.\d+\.", ".*.", name)


def describe(report):
    """What `load` did, in one line."""
    text = f"{report['format']}: {len(report['loaded'])} tensors loaded"
    for key, what in (("resized", "resized"), ("neutral", "not in the file, set to change nothing"), ("missing", "new"),
                      ("unused", "left in the file")):
        if kinds := list(dict.fromkeys(map(starred, report[key]))):
            text += f"; {what}: {', '.join(kinds[:6])}" + (f" and {len(kinds) - 6} more" if len(kinds) > 6 else "")
    return text


# ------------------------------------------------------------------------------------------------ out

def export(source, to):
    """(state_dict in the names of "timm" or "torchvision", or our "encoder" alone; the call that builds a model for it). Raises
    ValueError.

    A ViT with relative bias becomes timm's Beit, without one its VisionTransformer; a ResNet keeps torchvision's names,
    which timm shares. Pre-trained: the final norm and no classifier; fine-tuned: mean pooling with fc_norm, classifier.
    """
    source, where = (source, "the dictionary") if isinstance(source, dict) else (read(source), source)
    run = run_of(source)
    kept = ("encoder.", "fc_norm.", "head.") if run.get("task", "class") == "class" else ("encoder.", "fc_norm.")
    state = {new: value for _, new, value in unpack(source, where)[1] if new.startswith(kept)}
    if to == "encoder" or "encoder.features.0.0.weight" in state:
        return export_own(state, to, *recognise(state, size_of(run), presets_of(run), where, run.get("channels", 3)))
    vit = "encoder.patch_embed.weight" in state
    if ("encoder.blocks.0.mlp.fc1.bias" if vit else "encoder.layer1.0.conv1.weight") not in state or "head.0.weight" in state:
        raise ValueError(f"{where} holds no ViT and no ResNet of the forms that {to} has")
    if vit and to != "timm":
        raise ValueError(f"a ViT has no counterpart of the same form in {to}: --to timm")
    if not vit and (stem := tuple(state["encoder.conv1.weight"].shape[1:])) != (3, 7, 7):
        raise ValueError(f"{to} has no ResNet with a stem of {' × '.join(map(str, stem))} (channels, height, width): --to encoder")
    beit, out = any("relative_position" in name for name in state), {}
    for name, value in state.items():
        name = name.removeprefix("encoder.").replace("patch_embed.", "patch_embed.proj.")
        if not vit:
            name = name.replace("head.", "fc.")
        elif not beit:                                                      # one bias for queries, keys (they need none) and values
            name = re.sub(r"gamma_(\d)$", r"ls\1.gamma", name).replace("q_bias", "qkv.bias")
            if name.endswith("qkv.bias"):
                v = state["encoder." + name.replace("qkv.bias", "v_bias")]
                value = torch.cat([value, torch.zeros_like(v), v])
        if beit or not name.endswith("v_bias"):
            out[name] = value.clone()
    return out, constructor(state, vit, beit, to)


def export_own(state, to, arch, size, options):
    """An encoder under its own names, which for ConvNeXt and Swin are torchvision's. A fine-tuned Swin's norm and classifier stay
    behind: torchvision has the norm before the mean over positions."""
    make, classes, unused = models.PRESETS[arch].get("make"), len(state.get("head.bias", ())), []
    if to == "encoder":
        names, call = [], f"model.build({arch!r}, {size}{''.join(f', {key}={value}' for key, value in options.items())}).encoder"
        unused = [".norm"] * ("fc_norm.weight" in state)
    elif to == "timm" or "channels" in options:
        raise ValueError(f"{arch} is torchvision's, of 3 channels: --to torchvision for those, else --to encoder")
    else:
        names = [("encoder.norm.", "classifier.0."), ("fc_norm.", "classifier.0."), ("head.", "classifier.2.")]
        call = f"torchvision.models.{make.__name__}(num_classes={classes or 1000})"
        if make is torchvision.models.swin_t:
            names, unused = [], [".head"] if "encoder.norm.weight" in state else [".norm", ".head"]
        elif not classes:
            unused = [".classifier[2]"]
    out = {}
    for name, value in state.items():
        new = next((name.replace(old, new) for old, new in names if name.startswith(old)), name.removeprefix("encoder."))
        if new != name:
            out[new] = value.clone()
    return out, "; ".join([call, *(f"model{part} = torch.nn.Identity()" for part in unused)])


def constructor(state, vit, beit, to):
    """The line of Python that builds the model which loads an exported state_dict."""
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    depths = collections.Counter(m[1] for n in state if (m := re.match(r"encoder\.(blocks|layer\d)\.\d+\.(?:norm1|bn1)\.weight", n)))
    if not vit:
        block, library = "Bottleneck" if "encoder.layer1.0.conv3.weight" in state else "BasicBlock", f"{to}.models.resnet"
        call = f"{library}.ResNet({library}.{block}, {[depths[f'layer{i}'] for i in range(1, 5)]}, num_classes={classes or 1000})"
        return call if classes else call + "; model.fc = torch.nn.Identity()"
    dim, channels, patch, _ = state["encoder.patch_embed.weight"].shape
    table, positions = state.get("encoder.blocks.0.attn.relative_position_bias_table"), state.get("encoder.pos_embed")
    side = (math.isqrt(len(table) - 3) + 1) // 2 if positions is None else math.isqrt(positions.shape[1] - 1)
    options = dict(img_size=side * patch, patch_size=patch, embed_dim=dim, depth=depths["blocks"],
                   num_heads=table.shape[1] if beit else "HEADS",           # which a plain ViT does not show
                   mlp_ratio=len(state["encoder.blocks.0.mlp.fc1.bias"]) / dim, num_classes=classes,
                   init_values=0.1 if "encoder.blocks.0.gamma_1" in state else None,
                   global_pool="'avg'" if "fc_norm.weight" in state else "'token'")
    if channels != 3:
        options["in_chans"] = channels
    if beit:
        options |= dict(use_abs_pos_emb=positions is not None, use_rel_pos_bias=True)
    arguments = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"timm.models.{'beit.Beit' if beit else 'vision_transformer.VisionTransformer'}({arguments})"


# ------------------------------------------------------------------------------------------------ command line

def show(path):
    """What a file holds: format, run, and its tensors, those that differ in a number only on one line."""
    state = read(path)
    kind, items = unpack(state, path)
    print(f"{path}: {kind}, {sum(value.numel() for _, _, value in items) / 1e6:.1f} M numbers in {len(items)} tensors")
    with contextlib.suppress(ValueError, IndexError, RuntimeError):         # of odd shapes
        run = run_of(state)
        print("encoder: " + recognise({new: value for _, new, value in items}, size_of(run), presets_of(run), path, run.get("channels", 3))[0])
    for key, value in state.items():
        if isinstance(value, (int, float, str)):
            print(f"{key}: {value}")
        elif key == "identity" and isinstance(value, dict):
            print("run: " + ", ".join(f"{k} {v}" for k, v in value.items() if v is not None))
    groups = collections.Counter((starred(name), tuple(value.shape), str(value.dtype)[6:]) for _, name, value in items)
    for (name, shape, dtype), times in groups.items():
        print(f"  {name}  {shape} {dtype}" + (f" × {times}" if times > 1 else ""))


def main(argv=None):
    parser = argparse.ArgumentParser("weights.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    option = commands.add_parser("show", help="what a file holds").add_argument
    option("file", metavar="FILE", help="a checkpoint, ours or of " + ", ".join(FORMATS))
    option = commands.add_parser("export", help="write it in another library's names").add_argument
    option("checkpoint", metavar="CKPT", help="a checkpoint, ours or any that `show` knows")
    option("--to", choices=("timm", "torchvision", "encoder"), required=True, help="whose names; encoder: our own, for model.build(…).encoder")
    option("out", metavar="OUT", help="the file to write; must not exist")
    for each in (parser, *commands.choices.values()):
        each.error = lambda message: parser.exit(2, f"weights.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        if args.command == "show":
            return show(args.file)
        state, call = export(args.checkpoint, args.to)
        if os.path.exists(args.out) or not os.path.basename(args.out):
            raise ValueError(f"{args.out!r} exists, or names no file: choose another name, or remove it")
        write(args.out, state)
        library = "model" if args.to == "encoder" else args.to
        print(f"{args.out}: {len(state)} tensors. To load them" + (" (put in the number of HEADS)" if "HEADS" in call else "") + ":")
        print(f"  import torch, {library}\n  model = {call}\n  model.load_state_dict(torch.load({args.out!r}, weights_only=True))")
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
