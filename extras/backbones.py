"""The tables of docs/backbones.md: which models of timm work, what a step costs, what export gives.

  python extras/backbones.py           the models of MODELS, trained a few steps each (or give names)
  python extras/backbones.py --all     every name, shapes only; the list: results/backbones.json
"""
import json
import pathlib
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]      # where model.py is
sys.path.insert(0, str(ROOT))

import bench
import data
import losses
import masking
import model as models
import optim
import recipes
import runtime
import weights

MODELS = """resnet18d resnetv2_18d seresnet50 res2net50_26w_4s resnest14d regnety_002 regnety_004
    nf_resnet50 densenet121 vgg11_bn dla46_c darknet17 ese_vovnet19b_dw hgnetv2_b0 rexnet_100
    repvit_m0_9 repghostnet_050 starnet_s1 fasternet_t0 convnextv2_atto rdnet_tiny mambaout_femto
    inception_next_atto poolformer_s12 caformer_s18 focalnet_tiny_srf edgenext_xx_small pvt_v2_b0
    mobilevit_xxs efficientformerv2_s0 swiftformer_xs tiny_vit_5m_224 nest_tiny davit_tiny
    swin_tiny_patch4_window7_224""".split()
TITLE = ("timm/", "M parameters", "widths", "strides", "token before", "recipe", "MIM, images/s",
         "supervised, images/s", "time, MIM / supervised", "missing", "unexpected", "Δ logits")


def problem(name):
    """What is wrong with a model at its own size, or, where its stride does not divide that, at the
    next multiple of 64 px; "" if nothing is. On the meta device: shapes only."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    try:
        models.preset(f"timm/{name}")                   # raises for what is no sequence
        with torch.device("meta"), torch.no_grad():
            encoder = models.Timm(size, name=name)
            if size % encoder.stride:
                size += -size % 64
                encoder = models.Timm(size, name=name)
            encoder.check()
            encoder.eval()
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
    """--all: how many names work, in which families (modules of timm), and why the others do not."""
    names = [n for n in timm.list_models() if timm.get_pretrained_cfg(n).input_size[-1] <= 288]
    with ProcessPoolExecutor(data.cores()) as pool:
        problems = list(tqdm(pool.map(problem, names), total=len(names), unit="model"))
    works = [name for name, reason in zip(names, problems) if not reason]
    print(f"{len(works)} of {len(names)} names work (timm {timm.__version__}, up to 288 px).")
    families = [timm.model_entrypoint(name).__module__.split(".")[-1] for name in names]
    for reason in sorted(set(problems)):
        found = [family for family, its in zip(families, problems) if its == reason]
        counts = [f"{family} {found.count(family)}" for family in sorted(set(found))]
        print(f"\n{reason or 'They work'}: {', '.join(counts)}")
    summary = dict(timm=timm.__version__, tried=len(names), works=len(works), names=works)
    (ROOT / "results/backbones.json").write_text(json.dumps(summary) + "\n")


def supervised_step(model, cfg, optimizer, scaler, image, label):
    """bench.train's step, with the cross entropy."""
    batchnorm = optim.statistics(model)
    loss = F.cross_entropy(model(data.normalize(image, cfg.mean, cfg.std)), label)
    loss.backward()
    optim.update(model, optimizer, scaler, cfg.clip, loss.detach(), batchnorm)


def row(name):
    """A model's cells: steps of both kinds in turn on 8 images of 64 px, medians of 5; export."""
    cfg = recipes.pretraining(["--arch", f"timm/{name}", "--img-size", "64"], "")[0]
    cpu = torch.device("cpu")
    autocast, scaler = runtime.precision("off", cpu)
    model = runtime.place(models.build(cfg.arch, 64), cpu).train()
    peer = models.Predictor(models.build(cfg.arch, 64).encoder, 1000)
    peer = runtime.place(peer, cpu).train()
    image = torch.randint(256, (8, 3, 64, 64)).byte()
    mask = masking.random_mask(8, 64 // cfg.mask_size, cfg.mask_ratio)
    label = torch.randint(1000, (8,))
    loss = losses.A2MIMLoss(cfg.spatial_loss, cfg.frequency_loss, cfg.frequency_weight,
                            cfg.frequency_standin or "mixed", cfg.frequency_visible or 0.0)
    first = optim.make_optimizer(peer, cfg)
    second = optim.make_optimizer(model, cfg)
    times = bench.in_turn(5, dict(
        supervised=(supervised_step, peer, cfg, first, scaler, image, label),
        mim=(bench.train, model, [(image, mask)], cfg, loss, second, autocast, scaler)))

    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(dict(config=dict(arch=cfg.arch, img_size=64), model=peer.state_dict()), file.name)
        state, call, _ = weights.export(file.name, "timm")
    theirs = eval(call)                                 # the Python that export prints
    kept = theirs.load_state_dict(state, strict=False)
    image = torch.randn(8, 3, 64, 64)
    difference = (peer.eval()(image) - theirs.eval()(image)).abs().max().item()

    encoder = model.encoder
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    last = encoder.paths[f"layers.{len(encoder.layers) - 1}.0"]
    widths, strides = [" ".join(map(str, sizes)) for sizes in (encoder.widths, encoder.strides)]
    speeds = [f"{8 / np.median(times[kind]):.0f}" for kind in ("mim", "supervised")]
    ratio = np.median(times["mim"] / times["supervised"])
    return [name, f"{millions:.1f}", widths, strides, f"`{last}`",
            models.like(cfg.arch), *speeds, f"{ratio:.2f}", len(kept.missing_keys),
            len(kept.unexpected_keys), f"{difference:.0e}" if encoder.head_shape is not None else "–"]


def main(argv=None):
    parser = runtime.Parser("backbones.py", description=__doc__)
    parser.add_argument("names", nargs="*", help="models of timm")
    parser.add_argument("--all", action="store_true", help="every name, shapes only")
    args = parser.parse_args(argv)
    if args.all:
        return survey()
    print("|", " | ".join(TITLE), "|\n" + "|---" * len(TITLE) + "|")
    for name in args.names or MODELS:
        print("|", " | ".join(map(str, row(name))), "|", flush=True)


if __name__ == "__main__":
    runtime.run(main)
