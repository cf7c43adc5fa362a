"""A²MIM: the method, the encoders that it pre-trains, and their presets.

B, C, H, W: images, channels, rows, columns; h, w: rows and columns of a feature map; N, D: tokens
of a ViT and their width; n: its patches a side. A mask is (B, h, w), 1 = masked. Wherever images
have 3 channels here, an encoder built for others has its own number.
"""
import contextlib
import functools
import inspect
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth

import masking


# ---- the method

class A2MIM(nn.Module):
    """Architecture-agnostic masked image modeling (Li et al., ICML 2023, arXiv 2205.13943).

    encoder: an Encoder. mask_layer: the token enters just before this layer, counted from 0.
    token: "add" (A²MIM), "replace" (SimMIM) or "none". gamma: None, or the start of a learned γ.
    fill: what stands at masked pixels, a row of masking.FILLS. token_std: see MaskToken.
    Raises ValueError.
    """

    def __init__(self, encoder, mask_layer=0, token="add", gamma=None, fill="mean", token_std=0.02):
        super().__init__()
        last = len(encoder.layers) - 1
        if not 0 <= mask_layer <= last:
            raise ValueError(f"mask_layer must lie in 0..{last} for this encoder, not {mask_layer}")
        if token not in ("add", "replace", "none"):
            raise ValueError(f"unknown token {token!r}: choose add, replace or none")
        self.encoder = encoder
        self.mask_layer = mask_layer
        self.fill = fill
        width = encoder.widths[mask_layer]
        self.mask_token = None if token == "none" else MaskToken(width, token, gamma, token_std)
        self.decoder = decoder(encoder.widths[-1], encoder.stride, encoder.channels)

    def forward(self, image, mask):
        """Normalised images (B, 3, H, W) and masks (B, h, w) -> reconstructions (B, 3, H, W)."""
        z = self.encode(image, mask)
        return self.decoder(z)                                  # x̂ = PixelShuffle(s)(Conv1×1(z))

    def encode(self, image, mask):
        """As forward, up to the feature z (B, C, H/stride, W/stride). Raises ValueError."""
        stride = self.encoder.strides[-1]
        H, W = image.shape[-2:]
        if H % stride or W % stride:
            raise ValueError(f"image sides must be multiples of {stride}, not {(H, W)}")
        x = masking.fill(image, mask, self.fill)                # x_in = x·(1 − M) + mean(x)·M
        z = self.encoder.stem(x)
        for i, layer in enumerate(self.encoder.layers):
            # the token enters where middle-order interactions are made
            if i == self.mask_layer and self.mask_token is not None:
                z = self.mask_token(z, mask)                    # z·(1 − M) + γ·z·M + t·M
            z = layer(z)
        return z

    def reconstruct(self, image, mask):
        """Four rows of a picture, (B, 3, H, W) each: the image; what the model sees of it; the
        reconstruction; the composite, which is the reconstruction where masked, else the image."""
        how = "zero" if self.fill == "none" else self.fill      # show what only the token hides
        seen = masking.fill(image, mask, how)
        # forward, which is not compiled: another batch size would compile anew
        reconstruction = self.forward(image, mask)
        masked = masking.resize(mask, image.shape[-2:]) > 0
        composite = torch.where(masked, reconstruction, image)
        return [image, seen, reconstruction, composite]


class MaskToken(nn.Module):
    """z·(1 − M) + γ·z·M + t·M, with one learned vector t for all masked positions (A²MIM).

    γ = 1 adds t to what is there (A²MIM's ViT). γ = 0 replaces it (SimMIM). A learned γ for each
    channel, which starts near 0, is A²MIM's for CNNs. std: of t at the start; 0 starts it at zero.
    """

    def __init__(self, channels, how="add", gamma=None, std=0.02):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(channels))
        if std:
            nn.init.trunc_normal_(self.token, std=std)
        self.gamma = 1.0 if how == "add" else 0.0
        if how == "add" and gamma is not None:
            self.gamma = nn.Parameter(torch.full((channels,), gamma))

    def forward(self, z, mask):
        """z: a map (B, C, h, w), or a sequence (B, 1 + n·n, C) with a class token. The same out."""
        if z.ndim == 4:
            M = masking.resize(mask, z.shape[-2:])              # (B, 1, h, w)
            shape = (-1, 1, 1)
        else:
            N = z.shape[1]
            n = math.isqrt(N)
            M = masking.resize(mask, (n, n))                    # (B, 1, n, n)
            M = M.flatten(2).transpose(1, 2)                    # (B, n·n, 1)
            M = F.pad(M, (0, 0, N - n * n, 0))                  # the class token is never masked
            shape = (-1,)
        M = M.to(z.dtype)
        token = self.token.to(z.dtype).view(shape)
        gamma = self.gamma
        if torch.is_tensor(gamma):
            gamma = gamma.to(z.dtype).view(shape)
        return z * (1 - M) + gamma * z * M + token * M


def decoder(width, stride, channels=3):
    """One linear map from a feature vector to its s×s pixels: (B, C, h, w) -> (B, 3, h·s, w·s)."""
    conv = nn.Conv2d(width, channels * stride ** 2, 1)
    nn.init.trunc_normal_(conv.weight, std=0.02)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.PixelShuffle(stride))


# ---- after pre-training

class Predictor(nn.Module):
    """An encoder with a head, for fine-tuning and probes: (B, 3, H, W) -> (B, outputs).

    pool: what the head sees.
      "mean"     the mean over positions; a linear head. For classes.
      "token"    the class token of a ViT, after its final norm; a linear head (as in DeiT).
      "flatten"  all positions side by side; a small MLP. For what depends on places.
      "none"     each position by itself; a linear head -> (B, outputs, H, W). For dense tasks.
    But for "token", the encoder's final `norm`, if it has one, gives way to `fc_norm`, a LayerNorm
    after the mean, and the class token is not used (as in BEiT and SimMIM).
    head_std: the head starts at N(0, head_std²); with "token" at a truncated normal, as the
    published DeiT-S does (0.02). Raises ValueError for "token" without a class token.
    """

    def __init__(self, encoder, outputs, pool="mean", head_std=0.01):
        super().__init__()
        if pool == "token" and not isinstance(encoder, ViT):
            raise ValueError("pool 'token' needs a ViT's class token: choose 'mean'")
        width = encoder.widths[-1]
        self.encoder = encoder
        self.pool = pool
        self.fc_norm = nn.Identity()
        if hasattr(encoder, "norm") and pool != "token":
            encoder.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        if pool == "flatten":
            positions = (encoder.img_size // encoder.stride) ** 2
            last = nn.Linear(128, outputs)
            self.head = nn.Sequential(
                nn.Linear(width, 16), nn.GELU(), nn.Flatten(1),             # (B, n·n, C) -> (B, ·)
                nn.Linear(16 * positions, 128), nn.GELU(), last)
        else:
            pixels = encoder.stride ** 2 if pool == "none" else 1           # of each position
            last = nn.Linear(width, outputs * pixels)
            self.head = last
        initialise = nn.init.trunc_normal_ if pool == "token" else nn.init.normal_
        initialise(last.weight, std=head_std)
        nn.init.zeros_(last.bias)

    def features(self, image):
        """(B, 3, H, W) -> (B, C) with pool "mean" or "token", else (B, H/stride, W/stride, C)."""
        if self.pool == "token":
            return self.encoder.class_token(image)
        z = self.encoder(image).movedim(1, -1)
        if self.pool == "mean":
            z = z.mean((1, 2))
        return self.fc_norm(z)

    def forward(self, image):
        z = self.features(image)
        if self.pool == "flatten":
            z = z.flatten(1, 2)                                 # (B, n·n, C)
        z = self.head(z)
        if self.pool == "none":
            z = F.pixel_shuffle(z.movedim(-1, 1), self.encoder.stride)
        return z


# ---- encoders

class Encoder(nn.Module):
    """What all encoders have in common: image (B, 3, H, W) -> feature (B, C, H/stride, W/stride).

    A new one sets in its __init__(img_size, *, …):
      img_size      side of the images, in pixels
      stem, layers  a callable and a list of callables, applied in turn: maps between them
      widths        channels entering each layer, and leaving the last
      strides       input pixels to a step of the map, at the same places
    and may set channels (of images), norm (a LayerNorm at its end), blocks (finer than layers, for
    learning rates that decay with depth), and fixed_size (it takes images of img_size alone).
    """
    channels = 3
    fixed_size = False

    @property
    def stride(self):
        return self.strides[-1]

    def check(self):
        """Raises ValueError for a size of images that the encoder does not take, or not evenly."""
        if self.img_size % self.stride:
            raise ValueError(f"img_size {self.img_size} is not a multiple of the encoder's stride "
                             f"{self.stride}")

    def forward(self, image):
        z = self.stem(image)
        for layer in self.layers:
            z = layer(z)
        return z


# ---- ViT

class ViT(Encoder):
    """Vision transformer, pre-norm, in the flavour of BEiT and SimMIM (arXiv 2010.11929).

    layer_scale: start of γ1 and γ2, or None. rel_pos_bias, abs_pos: the two kinds of positions.
    qv_bias: whether queries and values have biases, as in BEiT.
    patch_size: None for 8 patches a side. init_std: of weights, positions and class token; 0.02
    suits widths of hundreds, a narrow model needs more. drop_path: rises linearly to this.
    `layers[0]` adds class token and positions; `layers[k]` is block k, counted from 1.
    """
    fixed_size = True

    def __init__(self, img_size=224, *, channels=3, patch_size=16, dim=768, depth=12, heads=12,
                 mlp_dim=3072, drop_path=0.1, layer_scale=0.1, rel_pos_bias=True, abs_pos=True,
                 qv_bias=True, init_std=0.02):
        super().__init__()
        if img_size % (patch_size or 8):
            raise ValueError(f"img_size {img_size} is not a multiple of {patch_size or 8}")
        patch_size = patch_size or img_size // 8
        self.channels = channels
        self.img_size = img_size
        self.grid = img_size // patch_size                      # n
        self.widths = [dim] * (depth + 2)
        self.strides = [patch_size] * (depth + 2)

        self.patch_embed = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = None
        if abs_pos:
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid ** 2, dim))
        self.blocks = nn.ModuleList()
        grid = self.grid if rel_pos_bias else None
        for i in range(depth):
            drop = drop_path * i / max(depth - 1, 1)
            self.blocks.append(Block(dim, heads, mlp_dim, drop, layer_scale, grid, qv_bias))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        # patch_embed keeps PyTorch's own initialisation
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        if abs_pos:
            nn.init.trunc_normal_(self.pos_embed, std=init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def layers(self):
        return [self.embed, *self.blocks[:-1], self.last]

    def stem(self, image):                                      # (B, 3, H, W) -> (B, D, n, n)
        if image.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"this ViT was built for images of {self.img_size} px, not of "
                             f"{tuple(image.shape[-2:])}")
        return self.patch_embed(image)

    def embed(self, z):                                         # (B, D, n, n) -> (B, 1 + n·n, D)
        z = z.flatten(2).transpose(1, 2)
        z = torch.cat([self.cls_token.expand(len(z), -1, -1), z], dim=1)
        if self.pos_embed is not None:
            z = z + self.pos_embed
        return z

    def last(self, z):                                          # (B, 1 + n·n, D) -> (B, D, n, n)
        """The last block, the final norm, and back to a map, without the class token."""
        z = self.norm(self.blocks[-1](z))
        return z[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def class_token(self, image):                               # (B, 3, H, W) -> (B, D)
        z = self.embed(self.stem(image))
        for block in self.blocks:
            z = block(z)
        return self.norm(z)[:, 0]


class Block(nn.Module):
    """x += drop_path(γ1 · attn(LN(x))), then x += drop_path(γ2 · mlp(LN(x)))."""

    def __init__(self, dim, heads, mlp_dim, drop_path, layer_scale, grid, qv_bias=True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, grid, qv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, mlp_dim), gelu=nn.GELU(), fc2=nn.Linear(mlp_dim, dim)))
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.gamma_1 = 1.0
        self.gamma_2 = 1.0
        if layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x):                                       # (B, N, D) -> the same
        return self.feed(self.attend(x))

    def attend(self, x):
        return x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))

    def feed(self, x):
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention. k has no bias (softmax would cancel it), q and v by qv_bias.

    grid: n, patches a side, for a learned relative position bias (BEiT, arXiv 2106.08254), or
    None. Its table has a row for each of the (2n − 1)² offsets between two patches, then for
    class → patch, patch → class and class → class; and a column for each head.
    """

    def __init__(self, dim, heads, grid, qv_bias=True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qv_bias else None
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = None
        if grid is not None:
            table = torch.zeros((2 * grid - 1) ** 2 + 3, heads)
            self.relative_position_bias_table = nn.Parameter(table)
            index = relative_position_index(grid)
            index = F.pad(index, (0, -len(index) % 8))          # see position_bias
            self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x):                                       # (B, N, D) -> the same
        q, k, v = self.project(x)
        bias = self.position_bias(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))

    def project(self, x):
        """(B, N, D) -> q, k, v as one tensor (3, B, heads, N, D/heads)."""
        bias = None
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                # (B, N, 3·D)
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def position_bias(self, dtype):
        """(heads, N, N), to be added to the logits of attention; or None."""
        if self.relative_position_bias_table is None:
            return None
        # an embedding, because plain indexing has no deterministic gradient on the CPU
        bias = F.embedding(self.relative_position_index, self.relative_position_bias_table)
        # the fused kernels of GPUs take a bias of the queries' dtype, contiguous along keys, whose
        # rows start at multiples of 8 numbers: so rows are gathered too long, and cut
        bias = bias.permute(2, 0, 1).to(dtype).contiguous()
        return bias[..., :bias.shape[1]]


def relative_position_index(n):
    """Row of the bias table for each (query, key), class token first: (1 + n², 1 + n²) int64."""
    side = torch.arange(n)
    at = torch.stack(torch.meshgrid(side, side, indexing="ij")).flatten(1)  # (2, n²)
    row, column = at[:, :, None] - at[:, None, :] + n - 1       # query − key, from 0
    rows = (2 * n - 1) ** 2 + 3
    index = torch.empty(n * n + 1, n * n + 1, dtype=torch.int64)
    index[1:, 1:] = row * (2 * n - 1) + column
    index[0, 1:] = rows - 3                                     # class → patch
    index[1:, 0] = rows - 2                                     # patch → class
    index[0, 0] = rows - 1
    return index


# ---- ResNet

class Basic(BasicBlock):
    """torchvision's block of two convolutions, with drop path."""

    def forward(self, x):                                       # (B, C, h, w)
        z = self.relu(self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(z))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.drop_path(z) + shortcut)


class Bottle(Bottleneck):
    """torchvision's block of three convolutions, with drop path."""

    def forward(self, x):                                       # (B, C, h, w)
        z = self.relu(self.bn1(self.conv1(x)))
        z = self.relu(self.bn2(self.conv2(z)))
        z = self.bn3(self.conv3(z))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.drop_path(z) + shortcut)


class ResNet(Encoder):
    """torchvision's ResNet v1.5 without its classifier, its parameters' names (arXiv 1512.03385).

    block: Basic or Bottle. depths: blocks in each of the four stages. width: channels of the stem.
    small_stem: 3×3, stride 1, no pooling, for small images. drop_path: rises linearly to this.
    `layers[i]` is stage i + 1, torchvision's layer{i+1}.
    """

    def __init__(self, img_size=224, *, channels=3, block=Bottle, depths=(3, 4, 6, 3), width=64,
                 small_stem=False, drop_path=0.0):
        super().__init__()
        s = 1 if small_stem else 4                              # stride of the stem
        self.channels = channels
        self.img_size = img_size
        self.widths = [width]
        self.strides = [s, s, 2 * s, 4 * s, 8 * s]
        if small_stem:
            self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        blocks = []
        for i, depth in enumerate(depths):
            planes = width * 2 ** i
            stride = 1 if i == 0 else 2
            before = self.widths[-1]
            after = planes * block.expansion
            shortcut = None                                     # the first block's
            if before != after:
                conv = nn.Conv2d(before, after, 1, stride, bias=False)
                shortcut = nn.Sequential(conv, nn.BatchNorm2d(after))
            first = block(before, planes, stride, shortcut)
            layer = nn.Sequential(first, *[block(after, planes) for _ in range(depth - 1)])
            self.add_module(f"layer{i + 1}", layer)
            self.widths.append(after)
            blocks += layer

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for i, module in enumerate(blocks):
            last = module.bn3 if block is Bottle else module.bn2
            nn.init.zeros_(last.weight)                         # a block starts as its shortcut
            drop = drop_path * i / max(len(blocks) - 1, 1)
            module.drop_path = StochasticDepth(drop, mode="row")

    @property
    def layers(self):
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def stem(self, image):                                      # (B, 3, H, W) -> (B, C, H/s, W/s)
        return self.maxpool(self.relu(self.bn1(self.conv1(image))))


# ---- torchvision's other encoders

class ConvNeXt(Encoder):
    """torchvision's ConvNeXt without its classifier, its parameters' names (arXiv 2201.03545).

    make: its function in torchvision.models. drop_path: rises linearly to this.
    """
    cuts = (1, 3, 5, 7, 8)      # layers in `features`: each stage, and the downsampling after it
    last = False                # whether channels come last in torchvision's maps
    eps = 1e-6

    def __init__(self, img_size=224, *, channels=3, make, drop_path=0.0):
        super().__init__()
        self.features = make().features                         # stem, stage, downsampling, stage…
        width = self.features[0][0].out_channels
        self.channels = channels
        self.img_size = img_size
        self.widths = [width * 2 ** ((cut - 1) // 2) for cut in self.cuts]
        self.strides = [4 * 2 ** ((cut - 1) // 2) for cut in self.cuts]
        self.norm = nn.LayerNorm(8 * width, eps=self.eps)
        drops = [m for m in self.features.modules() if isinstance(m, StochasticDepth)]
        for i, drop in enumerate(drops):
            drop.p = drop_path * i / (len(drops) - 1)
        if channels != 3:
            self.features[0][0] = nn.Conv2d(channels, width, 4, 4)

    @property
    def layers(self):
        return [functools.partial(self.layer, i) for i in range(4)]

    @property
    def blocks(self):
        return [self.features[start:stop] for start, stop in zip(self.cuts, self.cuts[1:])]

    def stem(self, image):                                      # (B, 3, H, W) -> (B, C, H/4, W/4)
        z = self.features[0](image)
        return z.movedim(-1, 1) if self.last else z

    def layer(self, i, z):                                      # (B, C, h, w) -> the like
        if self.last:
            z = z.movedim(1, -1)
        for k in range(self.cuts[i], self.cuts[i + 1]):
            z = self.features[k](z)
        if not self.last:
            z = z.movedim(1, -1)
        if i == 3:
            z = self.norm(z)
        return z.movedim(-1, 1)


class Swin(ConvNeXt):
    """torchvision's Swin transformer, in the same way (arXiv 2103.14030)."""
    cuts = (1, 2, 4, 6, 8)      # each stage, and the downsampling before it
    last = True
    eps = 1e-5


# ---- timm's encoders

class Timm(Encoder):
    """A model of timm whose feature extractor is a sequence of modules.

    name: as timm.create_model takes it. The sequence is cut after the modules whose channels and
    strides timm lists (feature_info): `stem` is the first piece, `layers` are the others.
    drop_path: timm's drop_path_rate. Raises ValueError.
    `paths`: {our name of a module: timm's}. `missing`: the weights that timm's whole model has
    beside. `classifier`: the last module of its head; `head_shape`: of a class's weights there,
    None if the head is more than a linear layer after the mean.
    """

    def __init__(self, img_size=224, *, channels=3, name, drop_path=0.0):
        super().__init__()
        options = dict(in_chans=channels, drop_path_rate=drop_path or None)     # None: not passed on
        net, self.fixed_size = timm_model(name, img_size, features_only=True, **options)
        if type(net).__name__ != "FeatureListNet":
            raise ValueError(f"timm's {name} is no sequence of modules; convnextv2_atto, regnety_004 "
                             "and swin_tiny_patch4_window7_224 are")
        self.name = name
        self.channels = channels
        self.img_size = img_size
        self.widths = net.feature_info.channels()
        self.strides = net.feature_info.reduction()

        with torch.device("meta"):
            whole = timm_model(name, img_size)[0]
        path_of = {path.replace(".", "_"): path for path, _ in whole.named_modules()}
        channels_last = net.output_fmt.value == "NHWC"
        self.stem = Piece(False, channels_last)
        self.layers = nn.ModuleList()
        self.paths = {}
        piece = self.stem
        for flat, module in net.items():
            place = f"layers.{len(self.layers) - 1}" if self.layers else "stem"
            self.paths[f"{place}.{len(piece)}"] = path_of[flat]
            piece.append(module)
            if path_of[flat] in net.feature_info.module_name()[:-1]:
                piece = Piece(channels_last, channels_last)
                self.layers.append(piece)

        there = tuple(path + "." for path in self.paths.values())
        self.missing = [name for name in whole.state_dict() if not name.startswith(there)
                        and not name.endswith("num_batches_tracked")]       # PyTorch adds it
        self.classifier = whole.pretrained_cfg["classifier"]
        head = [f"{self.classifier}.weight", f"{self.classifier}.bias"]
        is_ours = self.missing == head and not hasattr(whole, "final_act")      # of NFNets
        self.head_shape = whole.get_parameter(head[0]).shape[1:] if is_ours else None

    def check(self):
        super().check()
        z = torch.zeros(1, self.channels, self.img_size, self.img_size)
        side = self.img_size // self.stride
        shape = None
        # what models raise for a size, and for lists where maps should be
        with torch.no_grad(), contextlib.suppress(AssertionError, AttributeError, RuntimeError):
            shape = self.eval()(z).shape[-2:]
        self.train()
        if shape != (side, side):
            raise ValueError(f"timm's {self.name} makes no map of {side}×{side} of images of "
                             f"{self.img_size} px: try another size, or model")


class Piece(nn.ModuleList):
    """Modules of timm in a row; where their maps are (B, h, w, C), these are turned."""

    def __init__(self, turn_input, turn_output):
        super().__init__()
        self.turn_input = turn_input
        self.turn_output = turn_output

    def forward(self, z):                                       # (B, C, h, w) -> the like
        z = z.movedim(1, -1) if self.turn_input else z
        for module in self:
            z = module(z)
        return z.movedim(-1, 1) if self.turn_output else z


def timm_model(name, img_size, **options):
    """(timm.create_model(name, …), whether it is built for one size of images). Raises ValueError."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"timm/{name} needs timm: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: see timm.list_models()")
    for size in (dict(img_size=img_size), {}):                  # CNNs are not told the size
        with contextlib.suppress(TypeError):
            return timm.create_model(name, **size, **options), bool(size)
    raise ValueError(f"timm's {name} has no drop path: set it to 0")


@functools.cache
def timm_preset(name):
    """A row like those of PRESETS: ResNet-50's, or ConvNeXt's where nothing is a batch norm. The
    token enters before the last piece. Raises ValueError."""
    with torch.device("meta"):
        encoder = Timm(name=name)
    kinds = " ".join(type(module).__name__ for module in encoder.modules())
    like = "resnet50" if "BatchNorm" in kinds else "convnext_t"
    return dict(encoder=Timm, name=name, mask_layer=len(encoder.layers) - 1, gamma=1e-6, like=like)


# ---- presets

RESNET = dict(encoder=ResNet, mask_layer=3, gamma=1e-6)
CONVNEXT = dict(encoder=ConvNeXt, mask_layer=3, gamma=1e-6, token_std=0.0)

# encoder: its class; mask_layer, gamma, token_std: of A2MIM; like: the preset whose recipes and
# protocols to use, if there are none of its own. The rest are keywords of the encoder's class.
PRESETS = {
    "vit_s": dict(encoder=ViT, dim=768, depth=8, heads=8, mlp_dim=2304),    # the paper's: shallow
    "vit_b": dict(encoder=ViT, dim=768, depth=12, heads=12, mlp_dim=3072),
    "vit_l": dict(encoder=ViT, dim=1024, depth=24, heads=16, mlp_dim=4096),
    "deit_t": dict(encoder=ViT, dim=192, depth=12, heads=3, mlp_dim=768, mask_layer=8),
    "deit_s": dict(encoder=ViT, dim=384, depth=12, heads=6, mlp_dim=1536, mask_layer=8),
    "vit_nano": dict(encoder=ViT, dim=96, depth=4, heads=4, mlp_dim=384, patch_size=None,
                     drop_path=0.0, layer_scale=None, init_std=0.1),
    "resnet18": RESNET | dict(block=Basic, depths=(2, 2, 2, 2)),
    "resnet34": RESNET | dict(block=Basic, depths=(3, 4, 6, 3)),
    "resnet50": RESNET | dict(block=Bottle, depths=(3, 4, 6, 3)),
    "resnet101": RESNET | dict(block=Bottle, depths=(3, 4, 23, 3)),
    "resnet152": RESNET | dict(block=Bottle, depths=(3, 8, 36, 3)),
    "resnet200": RESNET | dict(block=Bottle, depths=(3, 24, 36, 3)),
    "resnet_nano": RESNET | dict(block=Basic, depths=(1, 1, 1, 1), width=32, small_stem=True),
    "convnext_t": CONVNEXT | dict(make=torchvision.models.convnext_tiny),
    "convnext_s": CONVNEXT | dict(make=torchvision.models.convnext_small),
    "convnext_b": CONVNEXT | dict(make=torchvision.models.convnext_base),
    "swin_t": dict(encoder=Swin, make=torchvision.models.swin_t, mask_layer=2, like="vit_b"),
}


def preset(arch):
    """The row of PRESETS; of timm/NAME one for any model of timm. Raises ValueError."""
    if str(arch).startswith("timm/"):
        return timm_preset(arch.removeprefix("timm/"))
    if arch not in PRESETS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(PRESETS)}, timm/NAME")
    return PRESETS[arch]


def like(arch):
    """The preset whose recipes and protocols an architecture uses: its own, unless it says so."""
    return preset(arch).get("like", arch)


def build(arch, img_size=224, *, mask_layer=None, token=None, fill=None, **overrides):
    """The one way to make a model: A2MIM around the encoder of a preset.

    arch: a row of PRESETS, or timm/NAME. img_size: side of the square images, in pixels.
    mask_layer, token, fill: of A2MIM; None = as in the preset, or A2MIM's default. overrides:
    keywords of the encoder's class, such as channels (of images). Raises ValueError for whatever
    does not fit.
    """
    given = dict(mask_layer=mask_layer, token=token, fill=fill)
    options = preset(arch) | overrides
    options |= {key: value for key, value in given.items() if value is not None}
    options.pop("like", None)
    make_encoder = options.pop("encoder")
    method = {key: options.pop(key) for key in (*given, "gamma", "token_std") if key in options}

    # what an encoder does not know of, it need not be told, as long as it is the usual
    known = inspect.signature(make_encoder).parameters
    for key, usual in dict(channels=3, drop_path=0).items():
        if key not in known and options.get(key) == usual:
            del options[key]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{arch} has no {', '.join(unknown)}: choose from {', '.join(known)}")

    encoder = make_encoder(img_size, **options)
    encoder.check()
    return A2MIM(encoder, **method)
