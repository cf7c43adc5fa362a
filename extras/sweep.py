"""Train the tables of docs/evidence.md again: what is pre-training worth, and which part of it?

  python extras/sweep.py                        every run that is missing, then the tables
  python extras/sweep.py cifar10 --jobs 8       one table, eight runs at a time
  python extras/sweep.py world --scale 10       ten times as many epochs
  python extras/sweep.py --show --out results   only the tables, of the results in a folder

A run has a folder, OUT/TABLE/ARCH/ROW/seedN, with a result.json for each task. The same command
goes on where it was interrupted. A new row is a line of ROWS, a new table one of TABLES.
"""
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]      # where train.py is
sys.path.insert(0, str(ROOT))

import data
import runtime

ROWS = {  # row: (what it is, options of train.py or None for no pre-training)
    "scratch": ("from scratch", None),
    "simmim": ("SimMIM", "--method simmim"),
    "a2mim": ("A²MIM", ""),
    "fill-zero": ("A²MIM, fill: zero", "--fill zero"),
    "fill-none": ("A²MIM, fill: none", "--fill none"),
    "token-input": ("A²MIM, token: before layer 0 (`vit_nano`'s own)", "--mask-layer 0"),
    "token-middle": ("A²MIM, token: before layer 2", "--mask-layer 2"),
    "token-none": ("A²MIM, token: none", "--token none"),
    "frequency-none": ("A²MIM, frequency loss: none", "--frequency-loss none"),
    "frequency-per-image": (
        "A²MIM, frequency loss: per image", "--frequency-loss focal_per_image"),
}
SEVERAL = ["scratch", "simmim", "a2mim"]                # rows that are trained with several seeds
TABLES = {  # archs: {architecture: epochs of pre-training}; epochs, options: of fine-tuning
    "cifar10": dict(data="cifar10", rows=list(ROWS), archs={"vit_nano": 2, "resnet_nano": 1},
                    epochs=5, options="--labels 5000", tasks=["class"]),
    "world": dict(data="shapes", rows=SEVERAL, archs={"vit_nano": 12},
                  epochs=6, options="", tasks=["class", "pose", "mask"]),
}
METRICS = {  # task: {key of result.json: head of its column}
    "class": {"top1": "top-1, %"},
    "pose": {"centre_px": "centre, px", "scale_px": "radius, px", "angle_deg": "angle, °"},
    "mask": {"miou": "mask, mIoU %"},
}


# ---- the runs

def is_done(table, folder):
    return all((folder / task / "result.json").exists() for task in TABLES[table]["tasks"])


def missing(args, table):
    """(table, arch, row, seed, folder) of the runs that lack a result, in order."""
    for seed in range(args.seeds):
        for row in TABLES[table]["rows"]:
            for arch in TABLES[table]["archs"]:
                folder = pathlib.Path(args.out, table, arch, row, f"seed{seed}")
                wanted = seed == 0 or row in SEVERAL
                if wanted and not is_done(table, folder):
                    yield table, arch, row, seed, folder


def commands(args, table, arch, row, seed, folder):
    """(name, command line) of a run's programs: pre-training, if it has any, then the tasks."""
    spec = TABLES[table]
    workers = data.cores() // (2 * args.jobs)           # half of the cores load, or none of two
    common = ["--data", args.data or spec["data"], "--img-size", "32", "--seed", str(seed)]
    common += ["--workers", str(workers)]
    options = ROWS[row][1]
    start = ["--arch", arch, "--protocol", "scratch-small"]
    if options is not None:
        epochs = str(spec["archs"][arch] * args.scale)
        pretraining = ["train.py", "--arch", arch, *common, "--epochs", epochs]
        yield "pretrain", pretraining + options.split()
        start = ["--init", str(folder / "pretrain/last.pt"), "--protocol", "small"]
    epochs = str(spec["epochs"] * args.scale)
    for task in spec["tasks"]:
        tuning = ["finetune.py", *start, *common, "--task", task, "--epochs", epochs]
        yield task, tuning + ["--eval-every", epochs] + spec["options"].split()


def train(pool, args, number, run):
    """Do what is missing of a run. Returns its folder. Raises ValueError if a program fails."""
    folder = run[-1]
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, data.cores() // args.jobs)))
    machine = f"{data.cores()} cores of {platform.machine()}, torch {torch.__version__}"
    if torch.cuda.is_available():                       # the runs take the GPUs in turn
        machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % torch.cuda.device_count()]
    for name, (script, *options) in commands(args, *run):
        began = time.time()
        line = [sys.executable, ROOT / script, *options, "--out", folder / name]
        with open(folder / f"{name}.txt", "a") as log, open(folder / "times.jsonl", "a") as times:
            code = subprocess.call(line, stdout=log, stderr=log, env=environment)
            entry = dict(what=name, seconds=round(time.time() - began), exit=code, jobs=args.jobs)
            times.write(json.dumps(entry | dict(machine=machine)) + "\n")
        if code:
            pool.shutdown(wait=False, cancel_futures=True)              # no other run begins
            raise ValueError(f"{script} left with exit code {code}: see {folder / name}.txt. "
                             "The same command goes on from there")
    return folder


# ---- the tables

def cell(values):
    """mean ± standard deviation; of one run, its value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" if values else "–"


def show(out, table):
    """Print a table, in Markdown, of the runs that are done."""
    archs = TABLES[table]["archs"]
    columns = []
    for task in TABLES[table]["tasks"]:
        columns += [(task, metric, head) for metric, head in METRICS[task].items()]
    heads = [f"`{arch}` {head}" for arch in archs for _, _, head in columns]
    print(f"\n| {table} | {' | '.join(heads)} | runs | minutes of the fastest |")
    print("|---|" + "---|" * (len(heads) + 2))
    machines = set()
    for row in TABLES[table]["rows"]:
        cells = [ROWS[row][0]]
        counts = []
        fastest = []
        for arch in archs:
            folders = pathlib.Path(out, table, arch, row).glob("seed*")
            runs = [folder for folder in folders if is_done(table, folder)]
            for task, metric, _ in columns:
                files = [(run / task / "result.json").read_text() for run in runs]
                cells.append(cell([json.loads(text)[metric] for text in files]))
            minutes = []
            for run in runs:
                lines = (run / "times.jsonl").read_text().splitlines()
                times = [json.loads(line) for line in lines]
                minutes.append(sum(entry["seconds"] for entry in times) / 60)
                machines |= {f"{entry['machine']}, {entry['jobs']} at a time" for entry in times}
            counts.append(str(len(runs)))
            fastest.append(f"{min(minutes):.1f}" if runs else "–")
        print(f"| {' | '.join(cells)} | {', '.join(counts)} | {', '.join(fastest)} |")
    for line in sorted(machines):
        print(f"\nMean ± standard deviation. {line}.")


def main(argv=None):
    parser = runtime.Parser("sweep.py", description=__doc__)
    option = parser.add_argument
    option("table", nargs="?", choices=TABLES, help="which table (all)")
    option("--out", help="folder of the runs (runs/sweep, or with --scale 10, runs/sweep10)")
    option("--data", help="where the images are, if not where TABLES says")
    option("--seeds", type=int, default=3, help="of the first three rows; the others get one (3)")
    option("--jobs", type=int, default=1, help="runs at a time (1)")
    option("--scale", type=int, default=1, help="factor on all epochs (1)")
    option("--show", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/sweep{args.scale if args.scale > 1 else ''}"
    tables = [args.table] if args.table else list(TABLES)

    if not args.show:
        runs = [run for table in tables for run in missing(args, table)]
        print(f"{len(runs)} runs to do, {args.jobs} at a time, in {args.out}", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(train, pool, args, i, run) for i, run in enumerate(runs)]
            for future in futures:
                print(future.result(), flush=True)
    for table in tables:
        show(args.out, table)


if __name__ == "__main__":
    runtime.run(main)
