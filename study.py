"""Checkpoints side by side: opened, shown the same images, and what came of it as numbers, tables and figures. analyze.py asks.

An analysis is a function of a Study and one of its Subjects. It returns curves, {quantity: (places, means, standard errors, and
perhaps the means of each head)}, a note and, if its figure needs more, that; or it raises NotFor. A quantity is called "what by where".
Its docstring says how to read it, on index.html too.
"""
import base64
import contextlib
import datetime
import functools
import html
import io
import itertools
import json
import math
import os
import pathlib
import re
import time
import zlib

import numpy as np
import torch

import data
import finetune
import masking
import model as models
import sources
import train
import weights
from harness import say

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None


class NotFor(Exception):
    """Why an analysis does not apply to a checkpoint."""


# ------------------------------------------------------------------------------------------------ models, images, results

class Subject:
    """A checkpoint under study: `encoder`; `mim`, the A2MIM around it, None if the file lacks its decoder or token; `logits`, images
    (B, 3, S, S) -> (B, K), None without a classifier, `known` if it is for the classes of the images; `grid`, patches a side; `batch`,
    images at once; `rate`, images a second; `points`, names of stem and blocks; `example`, noise (4, 3, S, S). Raises ValueError."""

    def __init__(self, path, name, device):
        model, about = weights.open_model(path)
        model, run = train.place(model, device, 1).eval().requires_grad_(False), about["run"]
        self.name, self.arch, self.size, self.classes, self.data = name, about["arch"], about["size"], about["classes"], run.get("data")
        self.encoder, self.logits, self.mim = model.encoder, model if isinstance(model, models.Predictor) else None, None
        if not self.logits and not any(name.startswith(("decoder.", "mask_token.")) for name in about["missing"]):
            self.mim = model
        self.channels, self.mean, self.std = (about[key] for key in ("channels", "mean", "std"))
        self.resize = run.get("test_resize") or (self.size if "nano" in models.like(self.arch) else round(self.size * 256 / 224))
        self.grid = getattr(self.encoder, "grid", self.size // 16 if self.size >= 128 else 8)
        usual = self.size // 32 if self.size >= 128 and self.size % 32 == 0 else 4 if self.grid % 4 == 0 else self.grid
        self.mask_grid = self.size // run["mask_size"] if run.get("mask_size") else usual
        self.mask_ratio, self.mask = run.get("mask_ratio", 0.6), masking.MASKS.get(run.get("mask"), masking.random_mask)
        self.example = torch.randn(4, self.channels, self.size, self.size, generator=data.generator(0)).to(device)
        with torch.no_grad():
            maps = dict(self.encoder.walk(self.example))
            self.points, largest = list(maps), max(z.numel() for z in maps.values())           # what makes it is some four times as large
            room = torch.cuda.mem_get_info()[0] / 4 if device.type == "cuda" else 1e9
            self.batch, began = max(4, min(64, int(room / (16 * largest)))), time.time()
            example = self.example[:1].expand(min(16, self.batch), -1, -1, -1)
            mask = [torch.ones(1, 1, 1).to(device)] if self.mim else []
            output = (self.logits or self.mim or self.encoder)(example, *mask)
            if not output.sum().isfinite().item():
                raise ValueError(f"what {path} makes of images is no finite number: it is broken")
            self.rate = len(example) / (time.time() - began)                # images a second


class Study:
    """Checkpoints, images, and where the results go, of analyses, {name: (analysis, how to draw it)}. Whatever can be wrong is found
    here. Raises ValueError and OSError."""

    def __init__(self, args, analyses):
        self.args, self.analyses, self.device = args, analyses, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if args.pairs * args.contexts > 100_000:
            raise ValueError(f"--pairs {args.pairs} × --contexts {args.contexts} is more than memory may hold: 100,000 at most")
        names = [re.sub(r"[^\w ().,=+-]|^_", "-", finetune.name_of(path)) for path in args.checkpoints]      # as figures can show them
        if len(set(names)) < len(names):
            names = [f"{i} {name}" for i, name in enumerate(names, 1)]
        self.subjects = [Subject(path, name, self.device) for path, name in zip(args.checkpoints, names)]
        self.data = args.data or self.subjects[0].data or "shapes"
        self.sources = {split: sources.open_source(self.data, split, max(s.size for s in self.subjects)) for split in ("train", "val")}
        self.classes, self.images = list(self.sources["val"].classes), min(args.images, len(self.sources["val"]))
        for s in self.subjects:                                             # is its classifier for these classes?
            s.known = bool(s.logits) and s.logits.head.out_features == len(self.classes) and s.classes in (None, self.classes)
        self.probe_images = min(args.probe_images, np.count_nonzero(self.sources["train"].labels >= 0))
        if self.images < 8:
            raise ValueError(f"{self.data} holds out {self.images} images only: the analyses need 8 or more")
        sums = [zlib.crc32(pathlib.Path(path).read_bytes()) for path in args.checkpoints]
        self.about = dict(checkpoints=dict(zip(names, sums)), data=self.data, images=self.images,
                          of={split: len(source) for split, source in self.sources.items()}, seed=args.seed)
        self.out = args.out or os.path.join("runs", "analysis-" + "-".join(names)[:150])
        files = [os.path.join(self.out, name) for name in ("index.html", *(name + end for name in analyses for end in (".json", ".png")))]
        if found := [path for path in files if os.path.isdir(path)]:
            raise ValueError(f"{found[0]} is a folder: choose another --out")
        if any(map(os.path.lexists, files)) and not self.results() and not args.overwrite:
            raise ValueError(f"{self.out} holds the analysis of something else: choose another --out, or --overwrite")
        os.makedirs(self.out, exist_ok=True)
        say(f"{self.images} held-out images of {self.data}{'' if args.data else ' (no --data given)'}, on {self.device}: "
            + ", ".join(f"{s.name} ({s.arch}, {s.size} px)" for s in self.subjects)
            + ("" if Figure else "; no figures, only numbers: pip install matplotlib for them"))

    def results(self):
        """{analysis: what its file holds}, of those there are of these checkpoints and images."""
        found = {}
        for name in self.analyses:
            with contextlib.suppress(OSError, ValueError, RecursionError), open(os.path.join(self.out, name + ".json")) as file:
                result = json.load(file)
                if isinstance(result, dict) and result.get("about") == self.about:
                    found[name] = result
        return found

    def batches(self, s, split="val", labelled=False, passes=1, batch=None, bar=True):
        """Yields (images (B, 3, S, S), labels (B,), position of the first), the same ones for all subjects. passes: forward passes an
        image, to say beforehand how long it takes. Raises NotFor without (labelled) images."""
        source, most, batch = self.sources[split], self.images if split == "val" else self.probe_images, batch or s.batch
        source = sources.Channels(source, s.channels)
        if labelled:
            source = torch.utils.data.Subset(source, np.flatnonzero(source.labels >= 0))
        if len(source) < 8:
            raise NotFor(f"only {len(source)} images of {self.data} for {split} have a label, 8 are needed")
        if labelled and len(self.classes) < 2:
            raise NotFor(f"the images of {self.data} are of one class")
        chosen = torch.randperm(len(source), generator=data.generator(self.args.seed, split))[:most].tolist()
        views = data.Views(source, functools.partial(finetune.test_view, config=dict(test_resize=s.resize, test_crop=s.size)), self.args.seed)
        batches = [[(0, i, chosen[i]) for i in range(at, min(at + batch, len(chosen)))] for at in range(0, len(chosen), batch)]
        say(f"  {s.name}: {passes * len(chosen):,} forward passes, about {datetime.timedelta(seconds=math.ceil(passes * len(chosen) / s.rate))}")
        loader, first = data.loader(views, batches, train.loader_workers(self.args), self.device.type == "cuda"), 0
        for (image, label), problems in data.progress(loader, len(chosen), s.name, lambda batch: len(batch[0][0])) if bar else loader:
            for line in problems:
                say(f"  replaced by another: {line}")
            yield data.normalize(image.to(self.device), s.mean, s.std), label.to(self.device), first
            first += len(image)

    def collect(self, s, function, **options):
        """function(images, labels, position of the first) -> some (B, …): each of all images, (images, …), on the CPU."""
        found = [[part.cpu() for part in function(*batch)] for batch in self.batches(s, **options)]
        return [torch.cat(parts) for parts in zip(*found)]

    def perform(self, name):
        """One analysis, of all checkpoints that it applies to: table, numbers, figure."""
        (analysis, draw), curves, notes, more = self.analyses[name], {}, {}, {}
        say(f"\n{name}")
        for s in self.subjects:
            try:
                with torch.no_grad():
                    found, note, *rest = analysis(self, s)
                if not all(np.isfinite(means).all() for _, means, *_ in found.values()):
                    raise NotFor("its numbers are not finite")
                notes[s.name], more[s.name] = note, rest[0] if rest else None
                for quantity, curve in found.items():
                    curves.setdefault(quantity, {})[s.name] = curve
            except NotFor as reason:
                say(f"  not for {s.name}: {reason}")
        if not curves:
            return
        notes = [", ".join(who for who in notes if notes[who] == note) + f": {note}" for note in dict.fromkeys(notes.values()) if note]
        result = dict(about=self.about, notes=notes, table=tabulate(curves), curves=curves, more=None if draw is draw_pictures else more)
        files = {name + ".json": json.dumps(result).encode()}
        if Figure:
            figure, picture = Figure(layout="constrained", dpi=120), io.BytesIO()
            draw(figure, curves, more)
            figure.savefig(picture, format="png")
            files[name + ".png"] = picture.getvalue()
        with contextlib.suppress(FileNotFoundError):                        # an older figure would belong to other numbers
            os.remove(os.path.join(self.out, name + ".png"))
        for file, content in files.items():
            data.write_file(os.path.join(self.out, file), content)
        say("\n".join(result["table"] + notes))

    def write_index(self):
        """index.html: all results in the folder that belong together."""
        page = ['<!doctype html><html lang="en"><meta charset="utf-8"><title>nanoA2MIM</title><style>body{font:16px/1.5 sans-serif;max-width:60em;'
                'margin:2em auto}img{max-width:100%}pre{overflow-x:auto;font-size:12px}</style>'
                f"<h1>{html.escape(', '.join(s.name for s in self.subjects))}</h1><p>{self.images} held-out images of {html.escape(self.data)}, "
                f"seed {self.args.seed}. ± is a standard error over images."]
        for name, found in self.results().items():
            page.append(f"<h2>{name}</h2><p>{self.analyses[name][0].__doc__}")
            if os.path.exists(path := os.path.join(self.out, name + ".png")):
                with open(path, "rb") as file:
                    page.append(f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(file.read()).decode()}">')
            page.append("<pre>" + html.escape("\n".join(found["table"] + found["notes"])) + "</pre>")
        data.write_file(os.path.join(self.out, "index.html"), "\n".join(page).encode())


# ------------------------------------------------------------------------------------------------ numbers, tables, figures

def average(samples):
    """(mean, standard error) over images, the first axis."""
    return samples.double().mean(0).tolist(), (samples.double().std(0) / len(samples) ** 0.5).tolist()


def jackknife(samples, statistic):
    """(statistic of the samples' sum, its standard error by leaving out one after the other)."""
    samples, n = samples.double(), len(samples)
    without = torch.stack([statistic(samples.sum(0) - sample) for sample in samples])
    return statistic(samples.sum(0)).tolist(), (without.var(0, correction=0) * (n - 1)).sqrt().tolist()


def tabulate(curves):
    """Lines of text: for each quantity a row of places and one of "mean ± standard error" for each checkpoint."""
    lines = []
    for quantity, each in curves.items():
        rows, shown, usual = [], None, np.median([error for _, _, errors, *_ in each.values() for error in errors])
        digits = max(0, min(3, 1 - math.floor(math.log10(usual or 1))))     # two of the error
        for name, (places, means, errors, *_) in each.items():
            if places != shown:
                rows.append([quantity, *map(str, places)])
            rows.append([name, *(f"{mean:.{digits}f} ± {error:.{digits}f}" for mean, error in zip(means, errors))])
            shown = places
        widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return lines


def draw_curves(figure, curves, more):
    """A panel a quantity, a line a checkpoint; places with names, the layers, over their share of the depth."""
    figure.set_size_inches(1.5 + 4.5 * len(curves), 4.6)
    for ax, (quantity, each) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for i, (name, (places, means, errors, *heads)) in enumerate(each.items()):
            x = np.linspace(0, 1, len(places)) if isinstance(places[0], str) else places
            ax.errorbar(x, means, errors, marker=".", capsize=2, color=f"C{i}", label=name)
            for dots in heads:
                ax.plot(np.repeat(x, len(dots[0])), np.ravel(dots), "o", ms=4, color=f"C{i}", alpha=0.5)
        title, _, where = quantity.rpartition(" by ")
        ax.set(title=title.strip(","), xlabel=where)
        if isinstance(places[0], str) and any(other != places for other, *_ in each.values()):
            ax.set_xlabel("depth, from the stem to the last block")
        elif not any(isinstance(place, float) for place in places):
            ax.set_xticks(x, places)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)


def draw_pictures(figure, curves, more):
    """more: {checkpoint: [(label, uint8 images (B, 3, S, S))]}, a row each, beginning with the images themselves."""
    rows = [(f"{name}\n{label}" if label == "masked" else label, row)
            for i, (name, rows) in enumerate(more.items()) for label, row in rows[bool(i):]]            # the images once
    figure.set_size_inches(9, 1.15 * len(rows))
    for ax, (label, row) in zip(figure.subplots(len(rows)), rows):
        ax.imshow(row.permute(2, 0, 3, 1).flatten(1, 2).numpy())
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
        ax.set(xticks=[], yticks=[])


def draw_map(figure, curves, more):
    """more: {checkpoint: its rows of the matrix of all layers with all, and where each checkpoint's layers end}."""
    ends, names = next(iter(more.values()))["ends"], list(more)
    figure.set_size_inches(3.5 + 2 * len(names), 2.5 + 2 * len(names))
    ax, middles = figure.subplots(), np.add(ends[1:], ends[:-1]) / 2 - 0.5
    image = ax.imshow(np.concatenate([each["matrix"] for each in more.values()]), vmin=0, vmax=1, origin="lower", cmap="magma")
    figure.colorbar(image, ax=ax, shrink=0.8, label="CKA")
    for line, end in itertools.product((ax.axhline, ax.axvline), ends[1:-1]):
        line(end - 0.5, color="w")
    ax.set_xticks(middles, names, fontsize=7)
    ax.set_yticks(middles, names, fontsize=7, rotation=90, va="center")
