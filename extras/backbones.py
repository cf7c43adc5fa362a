"""The tables of docs/backbones.md: which models of timm work, what a step costs, what export gives.

  python extras/backbones.py           the models of MODELS, trained a few steps each (or give names)
  python extras/backbones.py --all     every name, shapes only; the list: results/backbones.json
"""
import json
import pathlib
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]      # where model.py is
sys.path.insert(0, str(ROOT))

import bench
import data
import losses
import model as models
import optim
import recipes
import runtime
import weights

MODELS = """resnet18d resnetv2_18d seresnet50 res2net50_26w_4s resnest14d regnety_002 regnety_004
    nf_resnet50 densenet121 vgg11_bn dla46_c darknet17 ese_vovnet19b_dw hgnetv2_b0 rexnet_100
    repvgg_a0 repvit_m0_9 repghostnet_050 starnet_s1 fasternet_t0 convnextv2_atto rdnet_tiny
    inception_next_atto mambaout_femto poolformer_s12 caformer_s18 focalnet_tiny_srf fastvit_t8
    edgenext_xx_small mobilevit_xxs efficientformerv2_s0 swiftformer_xs pvt_v2_b0 tiny_vit_5m_224
    nest_tiny davit_tiny swin_tiny_patch4_window7_224""".split()
TITLE = """| timm/ | M parameters | widths | strides | token before | recipe | MIM, images/s | supervised, \
images/s | MIM / supervised | missing | unexpected | Δ logits |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def problem(name):
    """What is wrong with a model at its own size, or, where its stride does not divide that, at the
    next multiple of 64 px; "" if nothing is. On the meta device: shapes only."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    try:
        with torch.device("meta"), torch.no_grad():
            if size % models.Timm(size, name=name).stride:
                size += -size % 64
            encoder = models.build(f"timm/{name}", size).encoder.eval()
            z = encoder.stem(torch.empty(1, 3, size, size))
            for i, layer in enumerate([*encoder.layers, torch.nn.Identity()]):
                side = size // encoder.strides[i]
                if z.shape != (1, encoder.widths[i], side, side):
                    return "its maps are not those that timm lists"
                z = layer(z)
    except Exception as error:                          # whatever timm raises is a reason
        return str(error).split(";")[0].replace(f"timm's {name}", "it")
    return ""


def survey():
    """--all: how many names work in each family (a module of timm), and why others do not."""
    names = [n for n in timm.list_models() if timm.get_pretrained_cfg(n).input_size[-1] <= 288]
    with ProcessPoolExecutor(data.cores()) as pool:
        problems = list(tqdm(pool.map(problem, names), total=len(names), unit="model"))
    works = [name for name, reason in zip(names, problems) if not reason]
    print(f"{len(works)} of {len(names)} names work (timm {timm.__version__}, up to 288 px).\n\n"
          "| family | work | of | why not |\n|---|---|---|---|")
    families = [timm.model_entrypoint(name).__module__.split(".")[-1] for name in names]
    for family in sorted(set(families)):
        found = [reason for reason, its in zip(problems, families) if its == family]
        print(f"| {family} | {found.count('')} | {len(found)} | {', '.join({*found} - {''})} |")
    summary = dict(timm=timm.__version__, tried=len(names), works=len(works), names=works)
    (ROOT / "results/backbones.json").write_text(json.dumps(summary) + "\n")


class Classifier(models.Predictor):
    """Supervised training through bench.take_step, with a label in place of the mask."""

    def forward(self, image, label=None):
        return super().forward(image)


def cross_entropy(logits, image, label):
    return dict(loss=F.cross_entropy(logits, label))


def row(name):
    """A model's cells: both steps in turn on 8 images of 64 px, medians of 5; the way to timm."""
    cfg = recipes.pretraining(["--arch", f"timm/{name}", "--img-size", "64"], "")[0]
    device = torch.device("cpu")
    model = runtime.place(models.build(cfg.arch, 64), device).train()
    peer = runtime.place(Classifier(models.build(cfg.arch, 64).encoder, 1000), device).train()
    image = torch.randint(256, (8, 3, 64, 64)).byte()
    mask = torch.rand(8, 64 // cfg.mask_size, 64 // cfg.mask_size).lt(cfg.mask_ratio).float()
    label = torch.randint(1000, (8,))
    loss = losses.A2MIMLoss(cfg.spatial_loss, cfg.frequency_loss, cfg.frequency_weight,
                            cfg.frequency_standin or "mixed", cfg.frequency_visible or 0.0)
    works = {}
    for kind, net, criterion, target in (("supervised", peer, cross_entropy, label),
                                         ("MIM", model, loss, mask)):
        works[kind] = (bench.take_step, net, cfg, criterion, optim.make_optimizer(net, cfg),
                       *runtime.precision("off", device), image, target)
    times = bench.in_turn(5, works)

    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(dict(config=dict(arch=cfg.arch, img_size=64), model=peer.state_dict()), file.name)
        state, call, _ = weights.export(file.name, "timm")
    theirs = eval(call)                                 # the Python that export prints
    kept = theirs.load_state_dict(state, strict=False)
    image = torch.randn(8, 3, 64, 64)
    difference = (peer.eval()(image) - theirs.eval()(image)).abs().max().item()

    encoder = model.encoder
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    shapes = [" ".join(map(str, values)) for values in (encoder.widths, encoder.strides)]
    speeds = [f"{8 / times[kind][0]:.0f}" for kind in ("MIM", "supervised")]
    return [name, f"{millions:.1f}", *shapes, f"`{encoder.paths[encoder.pieces[-1][0]]}`",
            models.like(cfg.arch), *speeds, f"{times['MIM'][1]:.2f}", len(kept.missing_keys),
            len(kept.unexpected_keys), f"{difference:.0e}" if encoder.classifier else "–"]


def main(argv=None):
    parser = runtime.Parser("backbones.py", description=__doc__)
    parser.add_argument("names", nargs="*", help="models of timm")
    parser.add_argument("--all", action="store_true", help="every name, shapes only")
    args = parser.parse_args(argv)
    if args.all:
        return survey()
    print(TITLE)
    for name in args.names or MODELS:
        print("|", " | ".join(map(str, row(name))), "|", flush=True)


if __name__ == "__main__":
    runtime.run(main)
