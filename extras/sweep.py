"""Train the evidence of docs/evidence.md: what is pre-training worth, and which part of it?

  python extras/sweep.py --jobs 2                    all that is missing, the most important first
  python extras/sweep.py world/vit_nano mask-256     runs with these pieces in their names,
                                                     and what they begin with
  python extras/sweep.py cka --results runs/again    again, as that folder has no results yet
  python extras/sweep.py --show                      tables, ledger, figure: of what is in results/
  python extras/sweep.py --checkpoints               the files in checkpoints/

A run's name is TABLE/ARCH/ARM/PART/seedN: below --out is its folder, below --results its result.
It takes one core. The same command goes on where it was interrupted.
"""
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]              # where train.py is
sys.path.insert(0, str(ROOT))

import analyze
import data
import finetune
import runtime
import train

PAGES = [ROOT / "docs/evidence.md", ROOT / "checkpoints/README.md"]
ARCHS = ["vit_nano", "resnet_nano"]
ARMS = {  # arm: its pre-training, if it has one of its own
    "scratch": None,
    "supervised": "finetune.py --protocol scratch-small",
    "simmim": "train.py --method simmim",
    "a2mim": "train.py",
    "preset": None,                                     # begins with the world's first a2mim
    "fill-zero": "train.py --fill zero",
    "fill-none": "train.py --fill none",
    "token-input": "train.py --mask-layer 0",
    "token-middle": "train.py --mask-layer 2",
    "token-none": "train.py --token none",
    "frequency-off": "train.py --frequency-loss none",
    "frequency-per-image": "train.py --frequency-loss focal_per_image",
}
FOUR = list(ARMS)[:4]
RUNGS = list(ARMS)[5:10]
LAST_RUNGS = list(ARMS)[10:]
MIM = ["simmim", "a2mim"]
STAGES = [  # (table, arms, parts, seeds): a stage begins when the one before it is done
    ("world", FOUR[1:], "pretrain", [0]),
    ("world", FOUR, "mask-256 pose-256", [0, 2, 4]),
    ("half", FOUR[1:], "mask-256", [0]),                # what half precision costs
    ("world", FOUR[1:], "pretrain", [1]),
    ("world", FOUR, "mask-256 pose-256", [1, 3, 5]),
    ("world", FOUR[1:], "cka attention", [0, 1]),
    ("world", FOUR, "mask-64", range(4)),
    ("ladder", RUNGS, "pretrain", [0]),
    ("ladder", ["preset", *RUNGS], "mask-256", range(4)),
    ("cifar10", MIM, "pretrain", [0]),
    ("cifar10", ["scratch", *MIM], "class-100 class-500", range(4)),
    ("cifar10", ["supervised"], "pretrain", [0]),
    ("ladder", LAST_RUNGS, "pretrain", [0]),
    ("ladder", LAST_RUNGS, "mask-256", range(4)),
    ("world", FOUR, "class-1024 mask-1024", range(4)),
    ("world", FOUR[1:], "occlusion interaction", range(4)),
    ("cifar10", ["scratch", *MIM], "class-5000", range(4)),
]
METRICS = {"mask": ["miou"], "pose": ["centre_px", "scale_px", "angle_deg"], "class": ["top1"],
           "pretrain": ["top1"]}                        # of the supervised arm
ANALYSES = {  # part: (of which runs, options of analyze.py, metric, its curve, place on the curve)
    "attention": ("pretrain", "--images 512", "kl", "KL divergence between heads, nats, by block", 4),
    "cka": ("pretrain", "--images 512", "cka", "mean CKA of its layers with those of", "model"),
    "occlusion": ("class-1024", "--images 512", "kept",
                  "% of top-1 on whole images by share of patches dropped", 0.5),
    "interaction": ("class-1024", "--images 50 --contexts 20", "J",
                    "interaction strength J by order m / (n² − 2)", 0.5),
}
STUDENT = {1: (12.706, 1.376), 2: (4.303, 1.061), 3: (3.182, 0.978), 4: (2.776, 0.941),
           5: (2.571, 0.920)}  # degrees of freedom: quantiles of t at 97.5 % and 80 %


# ---- the runs

def plan(table, arms, parts, seeds):
    """A stage's groups of runs. One process does a group, one run after another."""
    groups = []
    for part in parts.split():
        # frozen, a CNN's batch norm would know masked images only; and it has no attention
        archs = ARCHS[:1] if part in ("cka", "attention") else ARCHS
        for arch in ARCHS[1:] if table == "ladder" else archs:
            groups += [[f"{table}/{arch}/{arm}/{part}/seed{s}" for s in seeds] for arm in arms]
    return groups


def start(run):
    """The run whose last checkpoint a run begins with, or None."""
    table, arch, arm, part, seed = run.split("/")
    if part in ANALYSES:
        return run.replace(part, ANALYSES[part][0])
    if part == "pretrain" or arm == "scratch":
        return None
    if arm == "preset":
        return f"world/{arch}/a2mim/pretrain/seed0"
    table = "world" if table == "half" else table
    return f"{table}/{arch}/{arm}/pretrain/seed{int(seed[-1]) % 2 if table == 'world' else 0}"


def checkpoint(run, args):
    """The file that a run begins with: if --out has none, one of those in checkpoints/."""
    before = start(run)
    path = Path(args.out, before or "", "last.pt")
    first = re.fullmatch("world/(.*)/(.*)/pretrain/seed0", before or "")
    if first and (run.startswith("half/") or not path.exists()):
        path = Path(os.path.relpath(ROOT), "checkpoints/{}-{}.pt".format(*first.groups()))
    return str(path)


def command(run, args):
    """[program, option, ...] of a run."""
    table, arch, arm, part, seed = run.split("/")
    init = checkpoint(run, args)
    options = ["--workers", "0", "--out", f"{args.out}/{run}"]
    if part in ANALYSES:
        words = f"--only {part} {ANALYSES[part][1]}".split()
        return ["analyze.py", f"model={init}", *words, *options]
    options += ["--img-size", "32", "--seed", seed[-1]]
    options += ["--init", init] if start(run) else ["--arch", arch]
    options += ["--data", args.data] if table == "cifar10" else []
    if part == "pretrain":
        length = "--epochs 20" if table == "cifar10" else "--epochs 6 --shapes-count 32768"
        steps = f"--steps {args.steps}" if args.steps else ""
        return f"{ARMS[arm]} {length} {steps}".split() + options
    task, labels = part.split("-")
    epochs = math.ceil(500 / (int(labels) // 64))
    words = (f"finetune.py --protocol small --layer-decay none --task {task} --labels {labels} "
             f"--epochs {epochs} --warmup-epochs {epochs / 10} --eval-every {epochs} "
             f"--steps {args.steps or 500}")
    return words.split() + options


def work(group, args):
    """Do the runs of a group, and keep their results. This is what a process does."""
    programs = {"train.py": train.main, "finetune.py": finetune.main, "analyze.py": analyze.main}
    for run in group:
        folder = Path(args.out, run)
        first_time = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "unfinished").touch()                 # last.pt is there long before the end
        program, *argv = command(run, args)
        began = time.time()
        with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
            runtime.run(programs[program], argv)
        seconds = round(time.time() - began)

        # of an interrupted run the time is not known
        machine = f"one core of {data.cores()}, {platform.machine()}"
        if torch.cuda.is_available():
            machine = torch.cuda.get_device_name()
        result = dict(command=" ".join([program, *argv]), torch=torch.__version__, machine=machine,
                      seconds=seconds if first_time else None)
        if program == "finetune.py":
            result |= json.loads((folder / "result.json").read_text())
        elif program == "train.py":
            result["config"] = runtime.read(folder / "last.pt")["config"]
            for line in (folder / "log.jsonl").read_text().splitlines():
                result |= json.loads(line)              # the last numbers stay
        else:
            part = run.split("/")[3]
            _, _, metric, curve, place = ANALYSES[part]
            result["curves"] = json.loads((folder / f"{part}.json").read_text())["curves"]
            if curve in result["curves"]:               # no occlusion where top-1 is chance
                places, means, *_ = result["curves"][curve]["model"]
                result[metric] = means[places.index(place)]
        path = Path(args.results, run + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        times = len(list(path.parent.glob(path.stem + ".*")))
        if times:                                       # trained again: the first result stays
            path = path.with_suffix(f".{times + 1}.json")
        path.write_text(json.dumps(result, indent=1))
        (folder / "unfinished").unlink()
        print(f"{run}: {seconds} s", flush=True)


def train_missing(args):
    """Train what is asked for and has no result. Raises ValueError if a run fails."""
    stages = [plan(*stage) for stage in STAGES]
    runs = [run for stage in stages for group in stage for run in group]
    asked = {run for run in runs if all(f"/{word}/" in f"/{run}/" for word in args.words)}
    if not asked:
        raise ValueError(f"no run has {' and '.join(args.words)} in its name: take pieces of names "
                         f"like {runs[0]}")
    wanted = set()
    for run in reversed(runs):
        done = Path(args.results, run + ".json").exists()
        if run in wanted or (run in asked and not done):
            wanted.add(run)
            before = start(run)                         # which comes later in this order
            init = Path(checkpoint(run, args))
            finished = init.exists() and not init.with_name("unfinished").exists()
            if before and not (finished and Path(args.results, before + ".json").exists()):
                wanted.add(before)
    if not wanted:
        print(f"nothing is missing in {args.results}. To train the {len(asked)} runs again, give "
              "other folders: --out, --results")

    def run_process(group):
        process = multiprocessing.get_context("spawn").Process(target=work, args=(group, args))
        process.start()
        process.join()
        if process.exitcode:
            raise ValueError(f"one of {', '.join(group)} left with exit code {process.exitcode}: see "
                             f"its log.txt in {args.out}. The same command goes on from there")

    os.environ["OMP_NUM_THREADS"] = "1"
    for stage in stages:
        groups = [[run for run in group if run in wanted] for group in stage]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run_process, filter(None, groups)))


# ---- what they come to

def read_results(folder):
    """{name of a run: its result}."""
    paths = sorted(Path(folder).glob("*/*/*/*/seed?.json"))
    return {"/".join(path.parts[-5:])[:-5]: json.loads(path.read_text()) for path in paths}


def values(results, arm, part, metric):
    """{seed: value} of the runs that there are. arm: TABLE/ARCH/ARM."""
    found = {seed: results.get(f"{arm}/{part}/seed{seed}", {}) for seed in range(6)}
    return {seed: result[metric] for seed, result in found.items() if metric in result}


def gain(results, arm, reference, part, metric):
    """Over paired seeds: (mean gain, half of its 95 % interval, smallest difference that 80 % of such
    experiments would show, pairs). Less is a gain in pixels and degrees. None: fewer than two."""
    ours = values(results, arm, part, metric)
    theirs = values(results, reference, part, metric)
    sign = -1 if metric in METRICS["pose"] else 1
    differences = [sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    if len(differences) < 2:
        return None
    error = np.std(differences, ddof=1) / math.sqrt(len(differences))
    t, t_power = STUDENT[len(differences) - 1]
    return np.mean(differences), t * error, (t + t_power) * error, len(differences)


def make_table(results, table, parts):
    """Markdown: a mean; gain over the first arm ± half of its interval (pairs)."""
    columns = [(part, metric) for part in parts for metric in METRICS[part.split("-")[0]]]
    heads = [f"{part}: {metric}" for part, metric in columns]
    lines = [f"| {table} | {' | '.join(heads)} |", "|---|" + "---|" * len(columns)]
    reference = "preset" if table == "ladder" else "scratch"
    for name in [f"{table}/{arch}/{arm}" for arch in ARCHS for arm in ARMS]:
        cells = []
        for part, metric in columns:
            ours = list(values(results, name, part, metric).values())
            cell = f"{np.mean(ours):.2f}" if ours else "–"
            other = f"{name.rpartition('/')[0]}/{reference}"
            change = gain(results, name, other, part, metric)
            if change and name != other:
                cell += f"; {change[0]:+.2f} ± {change[1]:.2f} ({change[3]})"
            cells.append(cell)
        if set(cells) != {"–"}:
            lines.append(f"| {name.partition('/')[2]} | {' | '.join(cells)} |")
    return lines


CLAIM = re.compile(r".*`python extras/sweep.py (\S+) (\S+)` \| (\w+): (\S+) − (\S+) \|")
CHECKPOINT = re.compile(r"\| `(\w+)-(\w+)\.pt` \|")


def fill_in(text, results):
    """A page with its tables, and the last cells of its claims and checkpoints, as the results say."""
    lines = []
    text = re.sub(r"(<!-- table: .* -->\n)(\|.*\n)*", r"\1", text)
    for line in text.splitlines():
        claim = CLAIM.match(line)
        checkpoint = CHECKPOINT.match(line)
        if claim:
            place, part, metric, arm, reference = claim.groups()
            change = gain(results, f"{place}/{arm}", f"{place}/{reference}", part, metric)
            line = claim[0] + " not run yet | | | |"
            if change:
                mean, half, least, pairs = change
                interval = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
                verdict = "**shown**" if mean > half else "not shown"
                verdict = "**the opposite**" if mean < -half else verdict
                line = f"{claim[0]} {interval} | {pairs} | {least:.2f} | {verdict} |"
        if checkpoint:
            arch, arm = checkpoint.groups()
            path = ROOT / f"checkpoints/{arch}-{arm}.pt"
            made = results.get(f"world/{arch}/{arm}/pretrain/seed0")
            line = checkpoint[0] + " not made yet | | | | |"
            if made and path.exists():
                content = path.read_bytes()
                scores = [values(results, f"{table}/{arch}/{arm}", "mask-256", "miou")
                          for table in ("world", "half")]
                full, half = [score.get(0, math.nan) for score in scores]
                line = (f"{checkpoint[0]} {len(content):,} | {hashlib.sha256(content).hexdigest()} | "
                        f"{full:.2f} | {half:.2f} | `python {made['command']}` |")
        lines.append(line)
        if line.startswith("<!-- table: "):
            table, *parts = line.split()[2:-1]
            lines += make_table(results, table, parts)
    return "\n".join(lines) + "\n"


def draw(results, path):
    """Quality against labels; below it the gain over scratch, with 95 % intervals."""
    from matplotlib.figure import Figure                # optional

    names = {"vit_nano": "ViT", "resnet_nano": "CNN", "world": "built-in images",
             "cifar10": "CIFAR-10", "class": "class", "mask": "mask", "pose": "centre",
             "scratch": "from scratch", "supervised": "supervised", "simmim": "SimMIM",
             "a2mim": "A²MIM", "top1": "top-1, %", "miou": "mIoU, %",
             "centre_px": "error, px (less is better)"}
    panels = []                                         # a column each, of what was run
    for table, task, metric in (("cifar10", "class", "top1"), ("world", "class", "top1"),
                                ("world", "mask", "miou"), ("world", "pose", "centre_px")):
        found = [re.match(rf"{table}/.*/{task}-(\d+)/", run) for run in results]
        labels = sorted({int(match[1]) for match in found if match})
        if labels:
            panels.append((table, task, metric, labels))
    figure = Figure(figsize=(4 * len(panels), 9), layout="constrained")
    axes = figure.subplots(4, len(panels), squeeze=False)
    for column, (table, task, metric, labels) in enumerate(panels):
        for row, arch in enumerate(ARCHS):
            place = f"{table}/{arch}"
            above, below = axes[2 * row:2 * row + 2, column]
            above.set(title=f"{names[arch]}, {names[table]}: {names[task]}", ylabel=names[metric])
            below.set(ylabel="gain, px" if task == "pose" else "gain, points", xlabel="labels")
            below.axhline(0, color="k", lw=0.5)
            for ax in (above, below):
                ax.set_xticks(range(len(labels)), labels)
                ax.set_xlim(-0.5, len(labels) - 0.5)
            for i, (arm, marker) in enumerate(zip(FOUR, "os^D")):
                points = []
                for x, part in enumerate(f"{task}-{number}" for number in labels):
                    ours = list(values(results, f"{place}/{arm}", part, metric).values())
                    change = gain(results, f"{place}/{arm}", f"{place}/scratch", part, metric)
                    if change:
                        points.append((x + (i - 1.5) / 12, np.mean(ours), *change[:2]))
                if points:
                    x, mean, gains, half = zip(*points)
                    above.plot(x, mean, marker + "-", color=f"C{i}", label=names[arm])
                    below.errorbar(x, gains, half, fmt=marker, capsize=3, color=f"C{i}")
            upper = values(results, f"{place}/supervised", "pretrain", metric)
            if table == "cifar10" and upper:            # with all labels
                above.axhline(upper[0], color="C1", ls="--", label="supervised, all 50,000 labels")
            if not above.lines:
                above.text(0.5, 0.5, "not run yet", ha="center", transform=above.transAxes)
    # each label once; from the right, as the last column has the four arms in their order
    handles = {label: line for ax in axes[::2, ::-1].flat
               for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=90)


def main(argv=None):
    parser = runtime.Parser("sweep.py", description=__doc__)
    option = parser.add_argument
    option("words", nargs="*", metavar="PIECE", help="of the runs' names (absent: all runs)")
    option("--jobs", type=int, default=1, help="runs at a time (1)")
    option("--out", default="runs/sweep", help="folder of the runs (runs/sweep)")
    option("--results", default="results", help="folder of their results (results)")
    option("--data", default="cifar10", help="where CIFAR-10 is (absent: it is downloaded)")
    option("--steps", type=int, help="of all runs, to try it out")
    option("--show", action="store_true", help="no training: write the pages and the figure")
    option("--checkpoints", action="store_true", help="no training: write checkpoints/")
    args = parser.parse_args(argv)

    if args.checkpoints:
        for arch, arm in [(arch, arm) for arch in ARCHS for arm in FOUR[1:]]:
            state = runtime.read(f"{args.out}/world/{arch}/{arm}/pretrain/seed0/last.pt")
            kept = {key: state[key] for key in ("config", "classes") if key in state}
            kept["model"] = {name: value.half() if value.is_floating_point() else value
                             for name, value in state["model"].items()}
            torch.save(kept, ROOT / f"checkpoints/{arch}-{arm}.pt")
    elif args.show:
        results = read_results(args.results)
        if not results:
            raise ValueError(f"no results in {args.results}: train some first, python extras/sweep.py")
        for page in PAGES:
            page.write_text(fill_in(page.read_text(), results))
        draw(results, ROOT / "docs/images/evidence.png")
    else:
        train_missing(args)


if __name__ == "__main__":
    runtime.run(main)
