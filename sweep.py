"""Train the small tables of the README again: what pre-training is worth, and which of its parts does it.

  python sweep.py                           every run that is missing, one after another, then the tables
  python sweep.py cifar10 --jobs 8          one table, eight runs at a time: each on its share of the GPUs or cores
  python sweep.py world --scale 10          ten times as many epochs
  python sweep.py --show                    only the tables, of whatever results there are

Each run has a folder below --out: OUT/TABLE/ARCH/ROW/seedN, with a result.json for each task. Interrupt it whenever you like:
the same command goes on where it was. A new row is a line of ROWS, a new table one of TABLES.
"""
import argparse
import contextlib
import glob
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time

import torch
from tqdm import tqdm

import data

ROWS = {  # row: (what it is, options of train.py or None: no pre-training, whether it gets all the seeds)
    "scratch": ("from scratch", None, True),
    "simmim": ("SimMIM", ["--method", "simmim"], True),
    "a2mim": ("A²MIM", [], True),
    "fill-zero": ("A²MIM, fill: zero", ["--fill", "zero"], False),
    "fill-none": ("A²MIM, fill: none", ["--fill", "none"], False),
    "token-input": ("A²MIM, token: before layer 0 (`vit_nano`'s own)", ["--mask-layer", "0"], False),
    "token-middle": ("A²MIM, token: before layer 2", ["--mask-layer", "2"], False),
    "token-none": ("A²MIM, token: none", ["--token", "none"], False),
    "frequency-none": ("A²MIM, frequency loss: none", ["--frequency-loss", "none"], False),
    "frequency-per-image": ("A²MIM, frequency loss: per image", ["--frequency-loss", "focal_per_image"], False),
}
TABLES = {  # table: data, rows, {architecture: epochs of pre-training}, epochs of fine-tuning, labels, tasks
    "cifar10": ("cifar10", list(ROWS), {"vit_nano": 2, "resnet_nano": 1}, 5, 5000, ["class"]),
    "world": ("shapes", ["scratch", "simmim", "a2mim"], {"vit_nano": 12}, 6, None, ["class", "pose", "mask"]),
}
SIZE, HERE = 32, os.path.dirname(os.path.abspath(__file__))                 # pixels; where train.py is


def plan(args, table):
    """(table, row, architecture, seed) of every run: first the rows that get all the seeds."""
    _, rows, archs, *_ = TABLES[table]
    for all_seeds in (True, False):
        for seed in range(args.seeds if all_seeds else 1):
            for row in (row for row in rows if ROWS[row][2] == all_seeds):
                for arch in archs:
                    yield table, row, arch, seed


def folder_of(args, table, row, arch, seed):
    return os.path.join(args.out, table, arch, row, f"seed{seed}")


def commands(args, table, row, arch, seed):
    """{name: command line} of a run: pre-training, if it has one, then fine-tuning on each task."""
    source, _, archs, epochs, labels, tasks = TABLES[table]
    folder = folder_of(args, table, row, arch, seed)
    common = ["--data", args.data if args.data and source == "cifar10" else source, "--img-size", str(SIZE), "--seed", str(seed)]
    if args.jobs > 1:
        common += ["--workers", str(data.cores() // args.jobs if torch.cuda.is_available() else 0)]
    if ROWS[row][1] is None:
        start = ["--arch", arch, "--protocol", "scratch-small"]
    else:
        yield "pretrain", ["train.py", "--arch", arch, *common, "--epochs", str(archs[arch] * args.scale), *ROWS[row][1]]
        start = ["--init", os.path.join(folder, "pretrain", "last.pt"), "--protocol", "small"]
    for task in tasks:
        yield task, ["finetune.py", *start, *common, "--task", task, "--epochs", str(epochs * args.scale), "--eval-every", str(epochs * args.scale),
                     *(["--labels", str(labels)] if labels else [])]


def perform(args, slot, run):
    """Do what is missing of a run. Returns a line on it. Raises RuntimeError."""
    folder, began = folder_of(args, *run), time.time()
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, data.cores() // args.jobs)))
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % torch.cuda.device_count()]
    os.makedirs(folder, exist_ok=True)
    for name, command in commands(args, *run):
        start = time.time()
        with open(os.path.join(folder, f"{name}.txt"), "a") as log:
            line = [sys.executable, os.path.join(HERE, command[0]), *command[1:], "--out", os.path.join(folder, name)]
            code = subprocess.call(line, stdout=log, stderr=log, env=environment)
        with open(os.path.join(folder, "times.jsonl"), "a") as log:
            log.write(json.dumps(dict(what=name, seconds=round(time.time() - start), exit=code, jobs=args.jobs, machine=machine())) + "\n")
        if code:
            raise RuntimeError(f"{command[0]} left with exit code {code}: see {folder}/{name}.txt")
    return f"{folder}: {(time.time() - began) / 60:.1f} minutes"


def machine():
    """What it runs on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    with open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else open(os.devnull) as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{data.cores()} cores of {names[0] if names else platform.machine()}, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------ the tables

def read(path):
    """The JSON values in a file, one after another; none if there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file] if path.endswith("l") else [json.load(file)]


def cell(values):
    """mean ± standard deviation of so many runs."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" if values else "–"


def show(out, table):
    """Print a table, in Markdown, from the result.json files."""
    _, rows, archs, _, _, tasks = TABLES[table]
    columns = [(arch, task, metric) for arch in archs for task in tasks for metric in METRICS[task]]
    print(f"\n| {table} | " + " | ".join(f"`{arch}` {METRICS[task][metric]}" for arch, task, metric in columns) + " | runs | minutes of the fastest |")
    print("|---|" + "---|" * (len(columns) + 2))
    machines = set()
    for row in rows:
        runs = {arch: sorted(glob.glob(os.path.join(out, table, arch, row, "seed*"))) for arch in archs}
        found = {(arch, task): sum([read(os.path.join(run, task, "result.json")) for run in runs[arch]], []) for arch in archs for task in tasks}
        times = {run: read(os.path.join(run, "times.jsonl")) for arch in archs for run in runs[arch]}
        machines |= {f"{entry['machine']}, {entry['jobs']} at a time" for entries in times.values() for entry in entries}
        done = {arch: [run for run in runs[arch] if read(os.path.join(run, tasks[-1], "result.json"))] for arch in archs}
        minutes = [f"{min(sum(e['seconds'] for e in times[run]) for run in done[arch]) / 60:.1f}" if done[arch] else "–" for arch in archs]
        counts = [len(done[arch]) for arch in archs]
        print(f"| {ROWS[row][0]} | " + " | ".join(cell([result[metric] for result in found[arch, task]]) for arch, task, metric in columns)
              + f" | {', '.join(map(str, counts))} | {', '.join(minutes)} |")
    for line in sorted(machines):
        print(f"\nMean ± standard deviation. {line}.")


METRICS = {"class": dict(top1="top-1, %"), "pose": dict(centre_px="centre, px", scale_px="radius, px", angle_deg="angle, °"),
           "mask": dict(miou="mask, mIoU %")}


def main(argv=None):
    parser = argparse.ArgumentParser("sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"which: {', '.join(TABLES)} (all)")
    parser.add_argument("--out", help="folder of the runs (runs/sweep, or with --scale 10, runs/sweep10)")
    parser.add_argument("--data", help="where CIFAR-10 lies: a folder of train/ and val/, or a pack (absent: it is downloaded)")
    parser.add_argument("--seeds", type=int, default=3, help="of the first three rows; the others get one (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--scale", type=int, default=1, help="factor on all epochs (1)")
    parser.add_argument("--show", action="store_true", help="train nothing")
    parser.error = lambda message: parser.exit(2, f"sweep.py: {message}\n")
    args = parser.parse_args(argv)
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"there is no table {min(unknown)}: choose from {', '.join(TABLES)}")
    if min(args.jobs, args.scale, args.seeds) < 1:
        parser.error("--jobs, --scale and --seeds start at 1")
    tables, args.out = args.tables or list(TABLES), args.out or ("runs/sweep" if args.scale == 1 else f"runs/sweep{args.scale}")
    if not args.show:
        work = [run for table in tables for run in plan(args, table) if not all(
            os.path.exists(os.path.join(folder_of(args, *run), task, "result.json")) for task in TABLES[table][-1])]
        print(f"{len(work)} runs to do, {args.jobs} at a time, in {args.out}", flush=True)
        problems = []

        def take_turns(slot):
            with contextlib.suppress(IndexError):                           # nothing is left
                while not problems:
                    run = work.pop(0)
                    try:
                        tqdm.write(perform(args, slot, run))
                        sys.stdout.flush()
                        bar.update()
                    except (RuntimeError, OSError) as problem:
                        problems.append(str(problem))

        with tqdm(total=len(work), unit="run", disable=not sys.stderr.isatty()) as bar:
            threads = [threading.Thread(target=take_turns, args=(slot,)) for slot in range(args.jobs)]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            except KeyboardInterrupt:                                       # it reaches the programs under way, too; they save and leave
                problems.append("interrupted")
                for thread in threads:
                    thread.join()
        if problems:
            print(f"sweep.py: {problems[0]}. The same command goes on from there", file=sys.stderr)
            sys.exit(2)
    for table in tables:
        show(args.out, table)


if __name__ == "__main__":
    main()
