"""The published recipes of A²MIM and its official code, as tables: pre-training, then fine-tuning. lr is the one at the recipe's
own batch_size. What train.py and finetune.py make of them, --print-config shows.
"""
import model as models

# ------------------------------------------------------------------------------------------------ pre-training

VIT = dict(epochs=800, img_size=224, batch_size=2048, micro_batch=256, lr=dict(a2mim=4e-4, simmim=4e-4), min_lr=None,
           schedule="step", lr_step_epoch=700, warmup_epochs=10, weight_decay=0.05, clip=5.0, drop_path=0.1,
           crop_scale=(0.67, 1.0), mask="random", mask_size=32, mask_ratio=0.6, fill="mean", token="add", spatial_loss="l1",
           frequency_loss="focal", frequency_weight=0.1, frequency_standin="mixed", frequency_visible=0.0,
           token_lr_scale=1.0)
COSINE = dict(schedule="cosine", lr_step_epoch=None, min_lr=1e-5)
DEIT = VIT | COSINE | dict(img_size=192, lr=dict(a2mim=8e-4, simmim=4e-4))
RESNET = VIT | COSINE | dict(epochs=300, lr=dict(a2mim=1.2e-3, simmim=8e-4), clip=None, drop_path=None,
                             crop_scale=(0.8, 1.0), spatial_loss="focal_l1", frequency_weight=0.5,
                             frequency_visible=1e-3, token_lr_scale=0.1)
NANO = COSINE | dict(epochs=8, img_size=64, batch_size=32, micro_batch=32, lr=dict(a2mim=3e-3, simmim=3e-3), warmup_epochs=1,
                     mask_size=None)

RECIPES = {
    "vit_s": VIT, "vit_b": VIT | dict(micro_batch=128), "vit_l": VIT | dict(micro_batch=128),
    "deit_t": DEIT, "deit_s": DEIT,
    "vit_nano": VIT | NANO | dict(drop_path=0.0),
    "resnet18": RESNET, "resnet34": RESNET, "resnet50": RESNET,
    "resnet101": RESNET | dict(frequency_loss="focal_l1", frequency_weight=0.1),
    "resnet152": RESNET | dict(frequency_loss=None), "resnet200": RESNET | dict(frequency_loss=None),
    "resnet_nano": RESNET | NANO | dict(img_size=32),
}
for arch in models.PRESETS:
    if models.like(arch) not in RECIPES:
        raise SystemExit(f"model.PRESETS[{arch!r}] needs like=…, the preset whose recipes it uses, or a row of recipes.RECIPES")
RECIPES |= {arch: RECIPES[models.like(arch)] for arch in models.PRESETS}
IMAGENET100 = {"deit_t": DEIT, "deit_s": DEIT} | dict.fromkeys(
    ("resnet18", "resnet34", "resnet50"), RESNET | dict(epochs=800, img_size=192))

METHODS = {  # what differs from the recipe; SimMIM: arXiv 2111.09886
    "a2mim": {},
    "simmim": dict(mask_layer=0, fill="none", token="replace", spatial_loss="l1", frequency_loss=None,
                   crop_scale=(0.67, 1.0), token_lr_scale=1.0),
}

# ------------------------------------------------------------------------------------------------ fine-tuning

KEYS = """arch protocol data channels mean std img_size test_resize test_crop epochs batch_size optimizer lr min_lr schedule lr_step_epochs
warmup_epochs weight_decay layer_decay clip drop_path loss label_smoothing mixup cutmix randaugment random_erasing
repeated_augmentation ema crop_scale""".split()
SIZES = {"img_size", "test_resize", "test_crop"}
TRAINING = [key for key in KEYS[KEYS.index("epochs"):] if key != "batch_size"]
UNCUT = "test_resize test_crop loss label_smoothing mixup cutmix randaugment random_erasing crop_scale".split()
BASE = dict.fromkeys(KEYS[6:]) | dict(img_size=224, test_resize=256, test_crop=224, batch_size=256)
TUNE = BASE | dict(epochs=100, batch_size=1024, optimizer="adamw", min_lr=1e-6, schedule="cosine", warmup_epochs=20,
                   weight_decay=0.05, loss="ce", label_smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=9, random_erasing=0.25,
                   crop_scale=(0.08, 1.0))
SIMMIM = TUNE | dict(lr=1e-2, layer_decay=0.65, clip=5.0, drop_path=0.1)
RSB = TUNE | dict(batch_size=2048, optimizer="lamb", lr=8e-3, warmup_epochs=5, weight_decay=0.02, loss="bce", label_smoothing=None,
                  mixup=0.1, randaugment=6, random_erasing=None, test_resize=236)
RSB_A3 = RSB | dict(img_size=160)
RSB_A2 = RSB | dict(epochs=300, lr=5e-3, randaugment=7, repeated_augmentation=3, drop_path=0.05)
LINEAR = BASE | dict(optimizer="sgd", weight_decay=0.0, warmup_epochs=0, loss="ce", crop_scale=(0.08, 1.0))
SCRATCH_DEIT = SIMMIM | dict(epochs=300, lr=1e-3, min_lr=1e-5, warmup_epochs=5, layer_decay=None, clip=None, repeated_augmentation=3)
SMALL = BASE | dict(epochs=20, batch_size=64, optimizer="adamw", lr=2e-3, min_lr=1e-6, schedule="cosine", warmup_epochs=2,
                    weight_decay=0.05, layer_decay=0.8, clip=5.0, loss="ce", label_smoothing=0.1, crop_scale=(0.5, 1.0))

PROTOCOLS = {  # (for a ViT, for a ResNet); None where there is none
    "simmim": (SIMMIM, None),
    "rsb_a3": (None, RSB_A3),
    "rsb_a2": (None, RSB_A2),
    "linear": (LINEAR | dict(epochs=90, batch_size=1024, lr=12.0, min_lr=0.0, schedule="cosine"),
               LINEAR | dict(epochs=100, lr=30.0, schedule="step", lr_step_epochs=(60, 80))),
    "knn": (BASE, BASE),
    "small": (SMALL, SMALL),
    "scratch-deit": (SCRATCH_DEIT, None),                                           # DeiT's own, arXiv 2012.12877
    "scratch-rsb_a3": (None, RSB_A3),
    "scratch-rsb_a2": (None, RSB_A2),
    "scratch-small": (SMALL | dict(layer_decay=None),) * 2,
}
PROTOCOLS_IMAGENET100 = {"simmim": (SIMMIM | dict(lr=8e-3, warmup_epochs=5), TUNE | dict(batch_size=2048, lr=5e-3))}
A2 = {"resnet50": dict(ema=0.9999), "resnet101": dict(drop_path=0.1), "resnet152": dict(drop_path=0.15), "resnet200": dict(drop_path=0.2)}
FOR_ARCH = {  # what an architecture changes
    "simmim": {"vit_s": dict(epochs=200), "vit_b": dict(ema=0.99996),
               "vit_l": dict(epochs=150, ema=0.99996, repeated_augmentation=3)},
    "rsb_a2": A2, "scratch-rsb_a2": A2,
}

