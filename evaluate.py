"""How a model is tested: metrics over the test images of all processes, nearest neighbours, and result.json."""
import json
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import harness
from harness import RANK, fail, gather, say, sum_over_ranks, together


def test_batches(images, batch, world):
    """This process's share of the indices, in batches: each image on one process only, none twice."""
    share = [(0, i, i) for i in range(RANK, images, world)]
    return [share[i:i + batch] for i in range(0, len(share), batch)]


@torch.no_grad()
def evaluate(model, loader, task, device, autocast, normalize):
    """(metrics of a task over every image of the loaders of all processes, lines on those that could not be read)."""
    model.eval()
    if dist.is_initialized():                                               # each process has its own batch statistics
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    total, broken, images, problems = torch.zeros(4, dtype=torch.float64, device=device), torch.zeros((), device=device), 0, []
    for (image, target), unreadable in tqdm(loader, "test", leave=False, disable=RANK > 0 or not sys.stderr.isatty()):
        image, target = normalize(image.to(device, non_blocking=True)), target.to(device, non_blocking=True)
        with autocast():
            output = model.forward(image).float()                           # not compiled: other batch sizes
        for i, value in enumerate(task.sums(output, target, image.shape[-1])):
            total[i] += value
        broken += ~output.isfinite().all()
        images += len(image) - len(unreadable)                              # whose label is none, and never hit
        problems += unreadable
    n, broken = sum_over_ranks(torch.stack([torch.tensor(images, device=device), broken.long()])).tolist()
    if broken:
        fail("the model's outputs are not finite numbers: its training has diverged (try a smaller --lr), or --init is broken")
    return task.metrics(sum_over_ranks(total).tolist(), max(n, 1)) | dict(n=n), problems


def note_unreadable(problems, images, out, most):
    """List images that could not be read for a test, on any process. Returns a line if they are more than a share `most`."""
    problems = sum(gather(problems), [])
    if not problems:
        return None
    together(lambda: RANK == 0 and harness.list_bad_images(out, set(problems)))
    where = os.path.join(out, "bad_images.txt")
    if len(problems) > most * images:
        return (f"{len(problems)} of {images:,} images could not be read, more than --max-bad {most:g}: repair or remove those in "
                f"{where}, or allow more")
    say(f"{len(problems)} of {images:,} images could not be read and are not counted: {where}")


@torch.no_grad()
def features(model, loader, images, device, autocast, normalize, world):
    """(images, C) features of unit length and (images,) labels, in the order of the source, on every process (label −1: could
    not be read); and this one's lines on those."""
    model.eval()
    found, labels, problems = [], [], []
    for (image, label), unreadable in tqdm(loader, "features", disable=RANK > 0 or not sys.stderr.isatty()):
        with autocast():
            found.append(F.normalize(model.features(normalize(image.to(device))).float(), dim=1))
        labels.append(label.to(device))
        problems += unreadable
    all_features = torch.zeros(images, model.encoder.widths[-1], device=device)
    all_labels = torch.zeros(images, dtype=torch.int64, device=device)
    if found:
        all_features[RANK::world], all_labels[RANK::world] = torch.cat(found), torch.cat(labels)
    return sum_over_ranks(all_features), sum_over_ranks(all_labels), problems


def knn(bank, labels, queries, k, temperature, classes):
    """(B, K) votes: each of the k most similar of the bank, by cosine, votes exp(similarity / T) for its class
    (Wu et al., arXiv 1805.01978), up to a common factor. All features have unit length."""
    similarity, nearest = (queries @ bank.T).topk(k)
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add_(1, labels[nearest], ((similarity - similarity[:, :1]) / temperature).exp())


# ------------------------------------------------------------------------------------------------ results

def check_result(out, identity, overwrite):
    """Make the folder of an evaluation. Raises ValueError if it holds a run, or the result of something else, and OSError."""
    path = os.path.join(out, "result.json")
    if os.path.exists(os.path.join(out, "last.pt")):
        raise ValueError(f"{out} holds a run: choose another --out")
    if os.path.exists(path) and not overwrite:
        try:
            with open(path) as file:
                same = json.load(file)["config"] == identity
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise ValueError(f"{out} holds the result of something else: choose another --out, or --overwrite")
    os.makedirs(out, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out} cannot be written to: choose another --out")


def finish(this, args, metrics, **more):
    """The result: result.json, and a line."""
    result = metrics | more | dict(task=args.task, protocol=this.identity["protocol"], arch=this.identity["arch"], init=args.init,
                                   config=this.identity)
    path = os.path.join(this.out, "result.json")
    together(lambda: RANK == 0 and data.write_file(path, json.dumps(result, indent=2).encode()))
    say(f"Result: {describe(metrics)} ({metrics['n']:,} images). {path}")


def result_step(out):
    """After which step the result in a folder was; None if there is none."""
    try:
        with open(os.path.join(out, "result.json")) as file:
            return json.load(file)["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(metrics):
    """Metrics for people: top1 56.20, top5 93.10."""
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if name != "n")
