"""Checkpoints: other projects' in, ours out.

  python weights.py export CKPT --to timm OUT      the encoder (and classifier) in timm's names

`load(model, source)` knows a format by its parameters' names: a new one is a row of FORMATS.
`open_model(path)` makes the model that a file holds; `export(path, to)` is the way back.
"""
import math
import os
import re

import torch
import torch.nn.functional as F

import data
import model as models
import runtime

# ---- formats

# (pattern, replacement), applied in order. What needs more than a new name is in `unpack`.
TIMM = [(r"^fc\.", "head."),  # ResNets
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
             (r"^encoder\.(ln1|norm3)\.", "encoder.norm."),
             (r"\.ln(\d)\.", r".norm\1."),
             # ConvNeXt
             *[(rf"\.downsample_layers\.{i}\.", f".features.{2 * i}.") for i in range(4)],
             *[(rf"\.stages\.{i}\.", f".features.{2 * i + 1}.") for i in range(4)],
             (r"\.depthwise_conv\.", ".block.0."),
             (r"(\.features\..*)\.norm\.", r"\1.block.2."),
             (r"\.pointwise_conv1\.", ".block.3."),
             (r"\.pointwise_conv2\.", ".block.5."),
             (r"(\.features\..*)\.gamma$", r"\1.layer_scale")]
TORCHVISION = [(r"^classifier\.0\.", "fc_norm."),  # ConvNeXt
               (r"^classifier\.2\.", "head."),
               (r"^(?!head\.|fc_norm\.)", "encoder.")]

FORMATS = {  # format: (how one of its names begins, table of names); the first that fits counts
    "OpenMixup": (r"backbone\.", OPENMIXUP),
    "SimMIM": (r"encoder\.patch_embed\.proj\.", SIMMIM),
    "nanoA2MIM": (r"encoder\.", []),
    "ViT of timm, BEiT or MAE": (r"blocks\.0\.norm1\.", TIMM),
    "ConvNeXt or Swin of torchvision": (r"features\.0\.0\.", TORCHVISION),
    "ResNet of torchvision or timm": (r"layer1\.0\.conv1\.", TIMM),
}

# what an encoder may lack, and the value that makes ours compute the same
NEUTRAL = dict(q_bias=0.0, v_bias=0.0, relative_position_bias_table=0.0, pos_embed=0.0,
               gamma_1=1.0, gamma_2=1.0)
# what ours may lack by design: the final norm where there is fc_norm, biases of q and v
OPTIONAL = re.compile(r"encoder\.(norm\.|.*\.[qv]_bias$)")


def rename(name, table):
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def unpack(checkpoint, where, arch=""):
    """(format, [(name in the file, our name, tensor)]) of what a file holds. Raises ValueError."""
    state = checkpoint
    for key in ("ema", "model", "state_dict"):  # of a run with an average: the average
        if isinstance(state.get(key), dict):
            state = state[key]
    if not state or not all(torch.is_tensor(value) for value in state.values()):
        raise ValueError(f"{where} holds no state_dict: no tensors by name, nor under 'model'")
    # DDP and torch.compile put their own in front of a name
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)): value for k, value in state.items()}
    if arch.startswith("timm/") and not any(name.startswith("encoder.stem.") for name in state):
        with torch.device("meta"):
            encoder = models.Timm(name=arch.removeprefix("timm/"))
        table = [(rf"^{path}\.", f"encoder.{ours}.") for ours, path in encoder.paths.items()]
        # what learned on more than the mean is no head of ours
        head = "timm.head." if encoder.head_shape is None else "head."
        table.append((rf"^{encoder.classifier}\.", head))
        return "timm", [(name, rename(name, table), value) for name, value in state.items()]
    kinds = [kind for kind, (beginning, _) in FORMATS.items()
             if any(re.match(beginning, name) for name in state)]
    if not kinds:
        raise ValueError(f"{where} is in no known format ({', '.join(FORMATS)}): "
                         f"it begins with {next(iter(state))!r}")

    items = []
    blocks = dict.fromkeys(i for name in state for i in re.findall(r"\bblocks\.(\d+)\.", name))
    for name, value in state.items():
        new = rename(name, FORMATS[kinds[0]][1])
        if re.match(r"encoder\.blocks\..*\.qkv\.bias", new):  # softmax cancels the bias of the keys
            q, _, v = value.chunk(3)
            items.append((name, new.replace("qkv.bias", "q_bias"), q))
            items.append((name, new.replace("qkv.bias", "v_bias"), v))
        elif new == "encoder.rel_pos_bias.relative_position_bias_table":  # one for all blocks
            for i in blocks:
                items.append((name, f"encoder.blocks.{i}.attn.relative_position_bias_table", value))
        elif not re.match(r"encoder\.(blocks|rel_pos).*(relative_position_index|k_bias)$", new):
            items.append((name, new, value))
    return kinds[0], items


# ---- in

def resize_positions(name, value, like):
    """A tensor of the file in the shape of the model's; None where that cannot be.

    Sides of 1 don't count. Else only positions change: absolute ones (1, 1 + n·n, D) and relative
    biases ((2n − 1)² + 3, heads) are maps, interpolated bicubically (antialiased, corners not
    aligned: a place keeps its share of the image, as in timm). The class token's rows are kept.
    """
    if value.squeeze().shape == like.squeeze().shape:
        return value.reshape(like.shape)
    absolute = name.endswith("pos_embed")
    table = absolute or name.endswith("relative_position_bias_table")
    if not table or value.shape[-1] != like.shape[-1]:
        return None
    tokens, rest = (value[0, 1:], value[0, :1]) if absolute else (value[:-3], value[-3:])
    old = math.isqrt(len(tokens))
    new = math.isqrt(like.shape[-2] - len(rest))
    if old ** 2 != len(tokens):
        return None
    grid = tokens.T.reshape(1, -1, old, old).float()
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    tokens = grid.flatten(2)[0].T.to(value.dtype)
    return torch.cat([rest, tokens])[None] if absolute else torch.cat([tokens, rest])


def load(model, source, where="the dictionary", head=True, resize_bias=True):
    """Load the encoder of an A2MIM or a Predictor, and of the rest what is there and fits.

    source: a path, or the dictionary that is in a file (`where`). head=False: leave the classifier.
    Positions are resized; resize_bias=False: relative-bias tables of another size are left instead.
    What the file's encoder lacks by design is made NEUTRAL. Returns {"format", "loaded", "resized",
    "neutral", "missing", "unused"}: lists of our names, but for `unused`, the file's. Raises
    ValueError for another encoder; the model is then as it was.
    """
    if isinstance(source, (str, os.PathLike)):
        where = source
        source = runtime.read(source)
    is_timm = isinstance(model.encoder, models.Timm)
    kind, items = unpack(source, where, f"timm/{model.encoder.name}" if is_timm else "")
    own = model.state_dict()
    names = [new for _, new, _ in items]
    fc_norm = "fc_norm.weight" in own
    if fc_norm and type(model.encoder) is models.ConvNeXt:  # its one norm, officially, is for both
        names = [new.replace("encoder.norm.", "fc_norm.") for new in names]
    # a head belongs to what it was trained on: the mean after fc_norm, or what the final norm gives
    head = head and fc_norm == ("fc_norm.weight" in names)
    if not fc_norm:
        names = [new.replace("fc_norm.", "encoder.norm.") for new in names]

    loaded = {}
    resized = []
    unused = []
    for (name, _, value), new in zip(items, names):
        wanted = new in own and (head or not new.startswith("head."))
        fitted = resize_positions(new, value, own[new]) if wanted else None
        if fitted is None and new.startswith("encoder.") and (wanted or not OPTIONAL.match(new)):
            shape = tuple(own[new].shape) if wanted else "has not"
            raise ValueError(f"{where}: its encoder has {name} {tuple(value.shape)}, this model's "
                             f"{shape}: build it with the file's architecture and patch size")
        other_size = fitted is not None and fitted.numel() != value.numel()
        if fitted is None or (other_size and not resize_bias and new.endswith("bias_table")):
            unused.append(name)
            continue
        loaded[new] = fitted
        if other_size:
            resized.append(new)

    neutral = {name: torch.full_like(own[name], NEUTRAL[name.split(".")[-1]]) for name in own
               if name not in loaded and name.split(".")[-1] in NEUTRAL}
    missing = [name for name in own if own[name].is_floating_point()
               and name not in loaded and name not in neutral]
    for name in missing:
        if name.startswith("encoder."):
            raise ValueError(f"{where} has no {name}: is it of another architecture?")
    model.load_state_dict(loaded | neutral, strict=False)
    return dict(format=kind, loaded=list(loaded), resized=resized, neutral=list(neutral),
                missing=missing, unused=unused)


def describe(report):
    """What `load` did, in one line."""
    text = f"{report['format']}: {len(report['loaded'])} tensors loaded"
    for key, what in dict(resized="resized", neutral="not in the file, set to change nothing",
                          missing="new", unused="left in the file").items():
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in report[key])
        if names:  # one for all blocks
            text += f"; {what}: {', '.join(list(names)[:6])}" + (" …" if len(names) > 6 else "")
    return text


def run_of(checkpoint):
    """The configuration of the run that wrote a checkpoint of ours; {} for another project's."""
    config = checkpoint.get("config", checkpoint.get("identity"))  # its name in the first version
    arch = config.get("arch") if isinstance(config, dict) else None
    return config if arch in models.PRESETS or str(arch).startswith("timm/") else {}


def open_model(path, arch=None, img_size=None):
    """The model in a file: a Predictor if there is a classifier that fits it, else an A2MIM.

    arch: a row of model.PRESETS or timm/NAME, needed for another project's file. img_size: None =
    as the file says, else 224. Returns (model, about): arch, size, run (our configuration), classes
    (names, if known), channels, mean and std of images, and the report of `load`. Raises ValueError.
    """
    checkpoint = runtime.read(path)
    run = run_of(checkpoint)
    if not arch and not run:
        unpack(checkpoint, path)  # is it a checkpoint at all?
        raise ValueError(f"{path} does not say which architecture it holds: "
                         f"name it, one of {', '.join(models.PRESETS)}, timm/NAME")
    arch = arch or run["arch"]
    kind, items = unpack(checkpoint, path, arch)
    state = {new: value for _, new, value in items}
    size = img_size or run.get("test_crop") or run.get("img_size")
    if not size and "encoder.pos_embed" in state:
        patches = math.isqrt(state["encoder.pos_embed"].shape[1] - 1)
        size = patches * state["encoder.patch_embed.weight"].shape[-1]
    method = {key: run.get(key) for key in ("mask_layer", "fill", "token")}
    if kind == "SimMIM":
        method = dict(mask_layer=0, fill="none", token="replace")
    if run.get("qv_bias") is False:
        method["qv_bias"] = False
    channels = run.get("channels", 3)
    model = models.build(arch, size or 224, channels=channels, **method)

    # a classifier: on the mean over positions, or on the class token of a ViT without fc_norm
    encoder = model.encoder
    head = state.get("head.weight")
    if head is not None and head.ndim == 2 and run.get("task", "class") == "class":
        one_norm = type(encoder) is models.ConvNeXt or not hasattr(encoder, "norm")
        if one_norm or "fc_norm.weight" in state:
            model = models.Predictor(encoder, len(head), "mean")
        elif isinstance(encoder, models.ViT):
            model = models.Predictor(encoder, len(head), "token")
    about = dict(arch=arch, size=size or 224, run=run, classes=checkpoint.get("classes"),
                 channels=channels, mean=list(run.get("mean", data.MEAN)),
                 std=list(run.get("std", data.STD)))
    return model, about | load(model, checkpoint, path)


# ---- out

def export(source, to, arch=None, img_size=None):
    """The model in a file for another library: (state_dict, Python that builds what loads it, names
    that are there and not in the state_dict).

    source, arch, img_size: as for open_model. to: "timm", "torchvision", or "encoder", ours alone.
    Pre-trained: final norm, no classifier. Fine-tuned: a classifier, on the mean over positions and
    fc_norm, or on a ViT's class token. Raises ValueError.
    """
    model, about = open_model(source, arch, img_size)
    encoder = model.encoder
    kind = type(encoder)
    classes = model.head.out_features if isinstance(model, models.Predictor) else 0
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()
             if name.startswith(("encoder.", "fc_norm.", "head."))}
    table = []  # renames them, as in FORMATS
    unused = []  # parts of the other library's model that have no weights here
    missing = []  # names of such weights, where the part stays
    if to == "encoder":
        options = "" if encoder.channels == 3 else f", channels={encoder.channels}"
        options += ", qv_bias=False" if about["run"].get("qv_bias") is False else ""
        call = f"model.build({about['arch']!r}, {about['size']}{options}).encoder"
        unused = ["norm"] if "fc_norm.weight" in state else []
        state = encoder.state_dict()
    elif to == "timm" and kind is models.Timm:
        size = f", img_size={encoder.img_size}" if encoder.fixed_size else ""
        call = (f"timm.create_model({encoder.name!r}, num_classes={classes or 1000}, "
                f"in_chans={encoder.channels}{size})")
        table = [(rf"^{ours}\.", path + ".") for ours, path in encoder.paths.items()]
        table.append((r"^head\.", f"{encoder.classifier}."))
        if not classes or encoder.head_shape is None:
            state = encoder.state_dict()
            missing = encoder.missing
        else:  # a linear layer, or a convolution of 1×1
            state["head.weight"] = state["head.weight"].reshape(classes, *encoder.head_shape)
    elif to == "timm" and kind is models.ViT:
        table = [(r"^patch_embed\.", "patch_embed.proj.")]
        block = encoder.blocks[0]
        dim = encoder.widths[0]
        options = dict(
            img_size=encoder.img_size, patch_size=encoder.stride, in_chans=encoder.channels,
            embed_dim=dim, depth=len(encoder.blocks), num_heads=block.attn.heads,
            mlp_ratio=block.mlp.fc1.out_features / dim, num_classes=classes,
            init_values=0.1 if torch.is_tensor(block.gamma_1) else None,
            qkv_bias=block.attn.q_bias is not None,
            use_abs_pos_emb=encoder.pos_embed is not None,
            use_rel_pos_bias=block.attn.relative_position_bias_table is not None,
            global_pool="avg" if "fc_norm.weight" in state else "token")
        call = f"timm.models.beit.Beit({', '.join(f'{k}={v!r}' for k, v in options.items())})"
    elif kind is models.ResNet and encoder.conv1.weight.shape[1:] == (3, 7, 7):  # the same in both
        table = [(r"^head\.", "fc.")]
        block = "Bottleneck" if hasattr(encoder.layer1[0], "conv3") else "BasicBlock"
        call = (f"{to}.models.resnet.ResNet({to}.models.resnet.{block}, "
                f"{[len(layer) for layer in encoder.layers]}, num_classes={classes or 1000})")
        unused = [] if classes else ["fc"]
    elif to == "torchvision" and isinstance(encoder, models.ConvNeXt) and encoder.channels == 3:
        make = models.PRESETS[about["arch"]]["make"].__name__
        call = f"torchvision.models.{make}(num_classes={classes or 1000})"
        if kind is models.Swin:  # theirs normalises before the mean over positions, ours after
            state = encoder.state_dict()
            unused = ["norm", "head"] if classes else ["head"]
        else:
            table = [(r"^(fc_)?norm\.", "classifier.0."), (r"^head\.", "classifier.2.")]
            unused = [] if classes else ["classifier[2]"]
    else:
        raise ValueError(f"{to} has no counterpart of this {about['arch']}: try --to encoder")
    state = {rename(name, table): value for name, value in state.items()}
    call = "; ".join([call, *(f"model.{part} = torch.nn.Identity()" for part in unused)])
    return state, call, missing


def main(argv=None):
    parser = runtime.Parser("weights.py", description=__doc__)
    option = parser.add_argument
    option("command", choices=["export"], help="write a checkpoint in another library's names")
    option("checkpoint", metavar="CKPT", help="ours, or of " + ", ".join(FORMATS))
    option("--to", choices=("timm", "torchvision", "encoder"), required=True, help="whose names")
    option("out", metavar="OUT", help="the file to write; must not exist")
    option("--arch", help="of another project's checkpoint: a preset, or timm/NAME")
    option("--img-size", type=int, metavar="N", help="default: as the file says, else 224")
    args = parser.parse_args(argv)
    if os.path.exists(args.out) or not os.path.basename(args.out):
        raise ValueError(f"{args.out!r} exists, or is no name of a file: choose another")
    state, call, missing = export(args.checkpoint, args.to, args.arch, args.img_size)
    with open(args.out + ".tmp", "wb") as file:
        torch.save(state, file)
    os.replace(args.out + ".tmp", args.out)
    library = "model" if args.to == "encoder" else args.to
    strict = ", strict=False" if missing else ""
    if missing:
        print(f"Not in it, so left at timm's first values: {', '.join(missing)}")
    print(f"{args.out}: {len(state)} tensors. To load them:\n"
          f"  import torch, {library}\n  model = {call}\n"
          f"  model.load_state_dict(torch.load({args.out!r}, weights_only=True){strict})")


if __name__ == "__main__":
    runtime.run(main)
