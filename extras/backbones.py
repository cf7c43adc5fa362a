"""The tables of docs/backbones.md: which models of timm work, what they cost, what export gives.

  python extras/backbones.py                        each row of MODELS, one after the other
  python extras/backbones.py timm/NAME …            other models
  python extras/backbones.py --all                  every name of timm, shapes only, nothing trained

Markdown goes to the standard output, progress to the standard error. Needs timm.
"""
import collections
import json
import pathlib
import sys
import tempfile
import warnings
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
import masking
import model as models
import optim
import recipes
import runtime
import weights

SIZE = 64
BATCH = 8
LARGEST = 288       # --all leaves out models whose default images are larger: they take minutes each
MODELS = """
    resnet18d resnetv2_18d seresnet18 resnext50_32x4d res2net50_26w_4s regnety_002 regnety_004
    nf_regnet_b0 densenet121 vgg11_bn dla46_c darknet17 cspresnet50 vovnet39a ese_vovnet19b_dw
    hgnetv2_b0 rexnet_100 repvgg_a0 mobileone_s0 repvit_m0_9 ghostnetv3_050 starnet_s1 fasternet_t0
    convnext_atto convnextv2_atto inception_next_atto rdnet_tiny mambaout_femto poolformer_s12
    caformer_s18 focalnet_tiny_srf edgenext_xx_small mobilevit_xxs fastvit_t8 efficientformerv2_s0
    swiftformer_xs pvt_v2_b0 tiny_vit_5m_224 nest_tiny davit_tiny swin_tiny_patch4_window7_224
    swinv2_cr_tiny_ns_224 coatnet_pico_rw_224 maxvit_pico_rw_256"""


def family(name):
    """The module of timm that a model stands in."""
    return timm.model_entrypoint(name).__module__.split(".")[-1]


# ---- every name

def problem(name):
    """Why A2MIM does not take a model at its default size; None if it does. Shapes only."""
    warnings.simplefilter("ignore")
    size = timm.get_pretrained_cfg(name).input_size[-1]
    try:
        with torch.device("meta"), torch.no_grad():
            model = models.build(f"timm/{name}", size)
            model.eval()
            encoder = model.encoder
            z = encoder.stem(torch.empty(1, 3, size, size))
            shapes = [tuple(z.shape)]
            for layer in encoder.layers:
                z = layer(z)
                shapes.append(tuple(z.shape))
    except Exception as error:      # whatever timm raises is a reason
        kind = type(error).__name__
        return str(error).split("; ")[0].replace(name, "it") if kind == "ValueError" else kind
    promised = [(1, width, size // stride, size // stride)
                for width, stride in zip(encoder.widths, encoder.strides)]
    return None if shapes == promised else "its maps are not as wide or large as timm says"


def survey(jobs):
    """--all: which names work, by family, and why the others do not."""
    names = timm.list_models()
    tried = [n for n in names if timm.get_pretrained_cfg(n).input_size[-1] <= LARGEST]
    with ProcessPoolExecutor(jobs) as pool:
        problems = list(tqdm(pool.map(problem, tried), total=len(tried), unit="model"))
    works = [name for name, reason in zip(tried, problems) if reason is None]
    families = collections.Counter(map(family, tried))
    working = collections.Counter(map(family, works))
    print(f"{len(works)} of {len(tried)} models work, of {len(working)} of {len(families)} modules "
          f"of timm {timm.__version__} (torch {torch.__version__}); {len(names) - len(tried)} names "
          f"whose default images are larger than {LARGEST} px were not tried.\n")
    print("| module of timm | work | of |\n|---|---|---|")
    for name, count in sorted(families.items()):
        print(f"| {name} | {working[name]} | {count} |")
    print("\n| why not | models | for example |\n|---|---|---|")
    reasons = collections.defaultdict(list)
    for name, reason in zip(tried, problems):
        reasons[reason].append(name)
    del reasons[None]
    for reason, those in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"| {reason} | {len(those)} | {', '.join(those[::1 + len(those) // 3])} |")
