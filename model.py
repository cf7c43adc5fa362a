"""A²MIM: encoders, mask token, decoder, and the method that joins them.

An encoder offers `stem` and `layers` (callables, applied in turn), `widths` (channels entering each layer and
leaving the last) and `strides` (input pixels to a step of the feature map, at the same places). Whatever offers
these can be pre-trained: `A2MIM(encoder)`.
"""
import functools
import inspect
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth

import masking


# ------------------------------------------------------------------------------------------------ the method

class A2MIM(nn.Module):
    """Architecture-agnostic masked image modeling (Li et al., ICML 2023, arXiv 2205.13943).

    encoder: an Encoder. mask_layer: the token is added just before this layer, counted from 0. token: "add"
    (A²MIM), "replace" (SimMIM) or "none". gamma: None, or the start of a learned factor γ on what "add" finds at
    masked positions. fill: a row of masking.FILLS. Raises ValueError.
    """

    def __init__(self, encoder, mask_layer=0, token="add", gamma=None, fill="mean"):
        super().__init__()
        if not 0 <= mask_layer < len(encoder.layers):
            raise ValueError(f"mask_layer must lie in 0..{len(encoder.layers) - 1} for this encoder, not {mask_layer}")
        if token not in ("add", "replace", "none"):
            raise ValueError(f"unknown token {token!r}: choose add, replace or none")
        if fill not in masking.FILLS:
            raise ValueError(f"unknown fill {fill!r}: choose from {', '.join(masking.FILLS)}")
        self.encoder, self.mask_layer, self.fill = encoder, mask_layer, fill
        self.mask_token = None if token == "none" else MaskToken(encoder.widths[mask_layer], token, gamma)
        self.decoder = decoder(encoder.widths[-1], encoder.stride, encoder.channels)

    def forward(self, image, mask):
        """The whole normalised image (B, 3, H, W) and a mask (B, h, w), 1 = masked -> reconstruction (B, 3, H, W). (3 stands for
        the encoder's channels, here and everywhere.)"""
        return self.decoder(self.encode(image, mask))                       # x̂ = PixelShuffle(s)(Conv1×1(z))

    def encode(self, image, mask):
        """As forward, up to the feature (B, C, H/stride, W/stride). Raises ValueError if H or W do not fit."""
        if any(side % self.encoder.stride for side in image.shape[-2:]):
            raise ValueError(f"image sides must be multiples of {self.encoder.stride}, not {tuple(image.shape[-2:])}")
        x = masking.fill(image, mask, self.fill)                            # x_in: RGB mean where masked
        z = self.encoder.stem(x)
        for i, layer in enumerate(self.encoder.layers):
            if i == self.mask_layer and self.mask_token is not None:
                z = self.mask_token(z, mask)                                # where middle-order interactions are made
            z = layer(z)
        return z


class MaskToken(nn.Module):
    """z·(1 − M) + γ·z·M + t·M, one learned vector t for all masked positions (A²MIM).

    γ = 1 adds to what is there (A²MIM's ViT), γ = 0 replaces it (SimMIM), a learned γ per channel that starts near
    0 does what training finds best (A²MIM's ResNet).
    """

    def __init__(self, channels, how="add", gamma=None):
        super().__init__()
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels), std=0.02))
        if how == "add" and gamma is not None:
            self.gamma = nn.Parameter(torch.full((channels,), gamma))
        else:
            self.gamma = 1.0 if how == "add" else 0.0

    def forward(self, z, mask):
        """z: a map (B, C, h, w), or a sequence (B, P + n·n, C) whose first P tokens are no patches. Returns the like."""
        gamma, token = self.gamma, self.token.to(z.dtype)
        if z.ndim == 4:
            M = masking.resize(mask, z.shape[-2:]).to(z.dtype)              # (B, 1, h, w)
            token = token.view(-1, 1, 1)
            gamma = gamma.to(z.dtype).view(-1, 1, 1) if torch.is_tensor(gamma) else gamma
        else:
            n = math.isqrt(z.shape[1])
            M = masking.resize(mask, (n, n)).flatten(2).transpose(1, 2)     # (B, n·n, 1)
            M = F.pad(M, (0, 0, z.shape[1] - n * n, 0)).to(z.dtype)         # the class token is never masked
        return z * (1 - M) + gamma * z * M + token * M


def decoder(width, stride, channels=3):
    """One linear map from each feature vector to its stride×stride pixels: (B, C, h, w) -> (B, 3, h·s, w·s)."""
    conv = nn.Conv2d(width, channels * stride ** 2, 1)
    nn.init.trunc_normal_(conv.weight, std=0.02)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.PixelShuffle(stride))


class Predictor(nn.Module):
    """An encoder with a head, for fine-tuning and probes.

    pool: "mean" over all positions, then a linear head, for classes: (B, 3, H, W) -> (B, outputs); "none": a linear head
    at each position, for dense tasks: -> (B, outputs, H, W); "flatten": a small MLP on all positions side by side, for
    what depends on places: -> (B, outputs). An encoder's final `norm` gives way to `fc_norm`, a LayerNorm after the mean; the
    class token is not used (as in BEiT and SimMIM). "token": a linear head on the class token of a ViT, after its final norm
    (as in DeiT). The head's last layer starts at N(0, 0.01).
    """

    def __init__(self, encoder, outputs, pool="mean"):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.fc_norm = nn.Identity()
        if hasattr(encoder, "norm") and pool != "token":
            encoder.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(encoder.widths[-1], eps=1e-6)
        C, positions = encoder.widths[-1], (encoder.img_size // encoder.stride) ** 2
        self.head = last = nn.Linear(128 if pool == "flatten" else C, outputs * (encoder.stride ** 2 if pool == "none" else 1))
        if pool == "flatten":
            self.head = nn.Sequential(nn.Linear(C, 16), nn.GELU(), nn.Flatten(1), nn.Linear(16 * positions, 128), nn.GELU(), last)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)

    def features(self, image):
        """(B, 3, H, W) -> (B, C) with pool "mean" or "token", else (B, H/stride, W/stride, C)."""
        if self.pool == "token":
            return self.encoder.class_token(image)
        z = self.encoder(image).movedim(1, -1)
        return self.fc_norm(z.mean((1, 2)) if self.pool == "mean" else z)

    def forward(self, image):
        z = self.features(image)
        if self.pool == "flatten":
            z = z.flatten(1, 2)                                             # (B, n·n, C)
        z = self.head(z)
        return F.pixel_shuffle(z.movedim(-1, 1), self.encoder.stride) if self.pool == "none" else z


class Encoder(nn.Module):
    """What every encoder has in common: image (B, 3, H, W) -> feature (B, C, H/stride, W/stride), without a mask.

    A new one sets, in __init__(img_size, *, …), where drop_path is passed if the recipe has one: img_size; stem and layers, what is called in turn, maps
    (B, C, h, w) between them; widths, the channels entering each layer and leaving the last; strides, at the same places.
    It may set `norm`, a LayerNorm that ends it, and `blocks`, finer than layers, for learning rates that decay with depth.
    """
    channels = 3                                                            # of images

    @property
    def stride(self):
        return self.strides[-1]

    def forward(self, image):
        z = self.stem(image)
        for layer in self.layers:
            z = layer(z)
        return z

    def walk(self, image):
        """Yields (name, feature map (B, C, h, w)) after the stem and every block."""
        z = self.stem(image)
        yield "stem", z
        for i, layer in enumerate(self.layers, 1):
            for j, block in enumerate(layer if isinstance(layer, nn.Sequential) else [layer], 1):
                z = block(z)
                yield f"{i}.{j}", z


# ------------------------------------------------------------------------------------------------ ViT

class ViT(Encoder):
    """Vision transformer, pre-norm, in the flavour of BEiT and SimMIM (Dosovitskiy et al., arXiv 2010.11929).

    layer_scale: start of γ1 and γ2, or None. rel_pos_bias, abs_pos: the two kinds of positions, on or off.
    init_std: of weights, positions and class token; 0.02 suits widths of hundreds, a narrow model needs more.
    `layers[0]` adds class token and positions to the patches, `layers[k]` is block k, counted from 1.
    """

    def __init__(self, img_size=224, *, channels=3, patch_size=16, dim=768, depth=12, heads=12, mlp_dim=3072, drop_path=0.1,
                 layer_scale=0.1, rel_pos_bias=True, abs_pos=True, init_std=0.02):
        super().__init__()
        if img_size < 1 or img_size % (patch_size or 8):
            raise ValueError(f"img_size {img_size} is not a multiple of {patch_size or 8}")
        patch_size = patch_size or img_size // 8                            # None: 8 patches a side
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.channels, self.img_size, self.grid = channels, img_size, img_size // patch_size   # grid: n, patches a side
        self.widths, self.strides = [dim] * (depth + 2), [patch_size] * (depth + 2)
        self.patch_embed = nn.Conv2d(channels, dim, patch_size, patch_size) # keeps PyTorch's own initialisation
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid ** 2, dim)) if abs_pos else None
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_dim, drop_path * i / max(depth - 1, 1), layer_scale, rel_pos_bias and self.grid)
            for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for parameter in filter(torch.is_tensor, (self.cls_token, self.pos_embed)):
            nn.init.trunc_normal_(parameter, std=init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def stem(self, image):                                                  # (B, 3, H, W) -> (B, D, n, n)
        if image.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"this ViT was built for images of {self.img_size} px, not {tuple(image.shape[-2:])}")
        return self.patch_embed(image)

    @property
    def layers(self):
        return [self.embed, *self.blocks[:-1], lambda z: self.to_map(self.blocks[-1](z))]

    def embed(self, z):                                                     # (B, D, n, n) -> (B, 1 + n·n, D)
        z = torch.cat([self.cls_token.expand(len(z), -1, -1), z.flatten(2).transpose(1, 2)], dim=1)
        return z if self.pos_embed is None else z + self.pos_embed

    def walk(self, image, halves=False):
        """As any encoder's, without class token and final norm; with halves, after each attention, too."""
        z = self.stem(image)
        yield "stem", z
        z = self.embed(z)
        for i, block in enumerate(self.blocks, 1):
            for half, name in ((block.attend, f"{i}a"), (block.feed, str(i))):
                z = half(z)
                if halves or half == block.feed:
                    yield name, z[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def class_token(self, image):                                           # (B, 3, H, W) -> (B, D)
        z = self.embed(self.stem(image))
        for block in self.blocks:
            z = block(z)
        return self.norm(z)[:, 0]

    def to_map(self, z):                                                    # (B, 1 + n·n, D) -> (B, D, n, n)
        return self.norm(z)[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))


class Block(nn.Module):
    """x += drop_path(γ1 · attn(LN(x))), then x += drop_path(γ2 · mlp(LN(x)))."""

    def __init__(self, dim, heads, mlp_dim, drop_path, layer_scale, grid):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads, grid)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, mlp_dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None
                                      for _ in range(2))

    def forward(self, x):                                                   # (B, N, D)
        return self.feed(self.attend(x))

    def attend(self, x):
        return x + self.drop_path(scale(self.attn(self.norm1(x)), self.gamma_1))

    def feed(self, x):
        return x + self.drop_path(scale(self.mlp(self.norm2(x)), self.gamma_2))


def scale(x, gamma):
    return x if gamma is None else gamma * x


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention; q and v have biases, k has none (softmax would cancel it).

    grid: patches a side, n, for a learned relative position bias (BEiT, arXiv 2106.08254), or None/False for none.
    The table has a row for each of the (2n − 1)² offsets between two patches, then class→patch, patch→class and
    class→class, and a column a head.
    """

    def __init__(self, dim, heads, grid):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads)) if grid else None
        self.register_buffer("relative_position_index", relative_position_index(grid) if grid else None, persistent=False)

    def forward(self, x):                                                   # (B, N, D)
        q, k, v = self.project(x)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.position_bias(q.dtype))
        return self.proj(x.transpose(1, 2).flatten(2))

    def project(self, x):                                                   # (B, N, D) -> q, k, v, (B, heads, N, D/heads) each
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def log_attention(self, x):                                             # (B, N, D) -> (B, heads, N, N)
        """Logarithm of each query's attention to each key, for those who want to see it: `forward` never makes it."""
        q, k, _ = self.project(x)
        logits, bias = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), self.position_bias(q.dtype)
        return (logits if bias is None else logits + bias).log_softmax(-1)

    def position_bias(self, dtype):
        """(heads, N, N) to be added to the attention's logits, or None."""
        if self.relative_position_bias_table is None:
            return None
        # an embedding, because plain indexing has no deterministic gradient on the CPU
        return F.embedding(self.relative_position_index, self.relative_position_bias_table).permute(2, 0, 1).to(dtype)


def relative_position_index(n):
    """Row of the bias table for each (query, key), class token first: (1 + n², 1 + n²) int64."""
    at = torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")).flatten(1)       # (2, n²)
    row, column = at[:, :, None] - at[:, None, :] + n - 1                   # Δ = query − key, from 0
    last = (2 * n - 1) ** 2 + 3
    index = torch.empty(n * n + 1, n * n + 1, dtype=torch.int64)
    index[1:, 1:] = row * (2 * n - 1) + column
    index[0, 1:], index[1:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index


# ------------------------------------------------------------------------------------------------ ResNet

def residual(self, x):                                                      # (B, C, h, w)
    """What torchvision's blocks compute, with drop path: relu(drop_path(branch(x)) + shortcut(x))."""
    out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    if isinstance(self, Bottleneck):
        out = self.bn3(self.conv3(self.relu(out)))
    return self.relu(self.drop_path(out) + (x if self.downsample is None else self.downsample(x)))


class Basic(BasicBlock):
    forward = residual


class Bottle(Bottleneck):
    forward = residual


class ResNet(Encoder):
    """torchvision's ResNet v1.5 without its classifier, parameter names included (He et al., arXiv 1512.03385).

    block: Basic or Bottle. depths: blocks of each of the four stages. width: channels of the first.
    small_stem: 3×3, stride 1, no pooling, for small images. drop_path: rises linearly over the blocks to this.
    `layers[i]` is stage i + 1, torchvision's layer{i+1}.
    """

    def __init__(self, img_size=224, *, channels=3, block=Bottle, depths=(3, 4, 6, 3), width=64, small_stem=False, drop_path=0.0):
        super().__init__()
        stem = 1 if small_stem else 4
        self.channels, self.img_size = channels, img_size
        self.strides = [stem, stem, 2 * stem, 4 * stem, 8 * stem]
        if img_size < 1 or img_size % self.stride:
            raise ValueError(f"img_size {img_size} is not a multiple of the encoder's stride {self.stride}")
        self.conv1 = nn.Conv2d(channels, width, *((3, 1, 1) if small_stem else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        self.widths = [width]
        for i, depth in enumerate(depths):
            self.add_module(f"layer{i + 1}", stage(block, self.widths[-1], width * 2 ** i, depth, 1 if i == 0 else 2))
            self.widths.append(width * 2 ** i * block.expansion)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        blocks = [b for layer in self.layers for b in layer]
        for i, b in enumerate(blocks):
            nn.init.zeros_((b.bn3 if isinstance(b, Bottleneck) else b.bn2).weight)     # starts as its shortcut
            b.drop_path = StochasticDepth(drop_path * i / max(len(blocks) - 1, 1), mode="row")

    def stem(self, image):
        return self.maxpool(self.relu(self.bn1(self.conv1(image))))

    @property
    def layers(self):
        return [self.layer1, self.layer2, self.layer3, self.layer4]


def stage(block, channels, planes, depth, stride):
    """`depth` residual blocks, the first of which may shrink the map and, where shapes differ, has a 1×1 shortcut."""
    shortcut = None
    if stride != 1 or channels != planes * block.expansion:
        shortcut = nn.Sequential(nn.Conv2d(channels, planes * block.expansion, 1, stride, bias=False),
                                 nn.BatchNorm2d(planes * block.expansion))
    rest = (block(planes * block.expansion, planes) for _ in range(depth - 1))
    return nn.Sequential(block(channels, planes, stride, shortcut), *rest)


# ------------------------------------------------------------------------------------------------ torchvision's other encoders

class TorchVision(Encoder):
    """A torchvision network of four stages without its classifier, parameter names included: ConvNeXt (Liu et al., arXiv 2201.03545)
    or Swin (arXiv 2103.14030). make: a function of torchvision.models. last: whether its own maps are (B, h, w, C)."""

    def __init__(self, img_size=224, *, channels=3, make, last=False, drop_path=0.0):
        super().__init__()
        self.features = make().features                                    # stem, stage, downsampling, stage, …
        width = self.features[0][0].out_channels
        self.channels, self.img_size, self.last = channels, img_size, last
        self.widths, self.strides = [width, width, 2 * width, 4 * width, 8 * width], [4, 4, 8, 16, 32]
        if img_size < 1 or img_size % self.stride:
            raise ValueError(f"img_size {img_size} is not a multiple of the encoder's stride {self.stride}")
        self.norm = nn.LayerNorm(8 * width, eps=1e-5 if last else 1e-6)     # as theirs
        drops = [module for module in self.features.modules() if isinstance(module, StochasticDepth)]
        for i, module in enumerate(drops):
            module.p = drop_path * i / (len(drops) - 1)
        if channels != 3:
            self.features[0][0] = nn.Conv2d(channels, width, 4, 4)

    def run(self, parts, z):                                                # (B, C, h, w) -> the like
        z = z.movedim(1, -1) if self.last and parts[0] else z
        for i in parts:
            z = self.features[i](z)
        return z.movedim(-1, 1) if self.last else z

    def stem(self, image):
        return self.run([0], image)

    @property
    def layers(self):
        *first, last = [functools.partial(self.run, parts) for parts in ([1], [2, 3], [4, 5], [6, 7])]
        return [*first, lambda z: self.norm(last(z).movedim(1, -1)).movedim(-1, 1)]

    @property
    def blocks(self):
        return [self.features[1:2], self.features[2:4], self.features[4:6], self.features[6:8]]


# ------------------------------------------------------------------------------------------------ presets

def vit(dim, depth, heads, mlp_dim, mask_layer=0, **more):
    return dict(encoder=ViT, dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim, mask_layer=mask_layer, **more)


def resnet(block, *depths, **more):
    return dict(encoder=ResNet, block=block, depths=depths, mask_layer=3, gamma=1e-6, **more)


# encoder and its keywords; mask_layer, gamma: of A2MIM; like: whose recipes and protocols to use, if it has none of its own.
PRESETS = {
    "vit_s": vit(768, 8, 8, 2304),                                          # the paper's: wide and shallow
    "vit_b": vit(768, 12, 12, 3072),
    "vit_l": vit(1024, 24, 16, 4096),
    "deit_t": vit(192, 12, 3, 768, mask_layer=8),
    "deit_s": vit(384, 12, 6, 1536, mask_layer=8),
    "vit_nano": vit(96, 4, 4, 384, patch_size=None, drop_path=0.0, layer_scale=None, init_std=0.1),  # patches: img_size / 8
    "resnet18": resnet(Basic, 2, 2, 2, 2),
    "resnet34": resnet(Basic, 3, 4, 6, 3),
    "resnet50": resnet(Bottle, 3, 4, 6, 3),
    "resnet101": resnet(Bottle, 3, 4, 23, 3),
    "resnet152": resnet(Bottle, 3, 8, 36, 3),
    "resnet200": resnet(Bottle, 3, 24, 36, 3),
    "resnet_nano": resnet(Basic, 1, 1, 1, 1, width=32, small_stem=True),
    "convnext_t": dict(encoder=TorchVision, make=torchvision.models.convnext_tiny, mask_layer=3, gamma=1e-6, like="resnet50"),
    "swin_t": dict(encoder=TorchVision, make=torchvision.models.swin_t, last=True, mask_layer=2, like="vit_b"),
}


def like(arch):
    """The preset whose recipes and protocols an architecture uses: its own, unless it says otherwise."""
    return PRESETS[arch].get("like", arch)


def build(arch, img_size=224, *, channels=3, mask_layer=None, token=None, fill=None, **encoder_overrides):
    """The one way to make a model: A2MIM around the encoder of a preset.

    arch: a row of PRESETS. img_size: side of the square images, in pixels. channels: of images; where it is not 3, the
    encoder's class has to know it. mask_layer, token, fill: None = the preset's (whose token is "add" and whose fill is
    "mean"). encoder_overrides: keywords of the encoder's class. Raises ValueError for whatever does not fit.
    """
    if arch not in PRESETS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(PRESETS)}")
    preset = dict(PRESETS[arch])
    encoder, gamma, layer, _ = (preset.pop(key, None) for key in ("encoder", "gamma", "mask_layer", "like"))
    mask_layer = mask_layer if mask_layer is not None else layer or 0
    if channels != 3:
        encoder_overrides["channels"] = channels
    options = inspect.signature(encoder).parameters
    if encoder_overrides.get("drop_path") == 0 and "drop_path" not in options:
        del encoder_overrides["drop_path"]                                  # none, and none
    if unknown := set(encoder_overrides) - set(options):
        raise ValueError(f"{arch} has no {', '.join(sorted(unknown))}: choose from {', '.join(options)}")
    return A2MIM(encoder(img_size, **preset | encoder_overrides), mask_layer, token or "add", gamma, fill or "mean")
