"""What keeps a run alive: processes that agree, checkpoints, signals, the log. train.py and finetune.py stand on it.

Two ideas carry it. All randomness is keyed, by seed, epoch and position in the epoch (data.py) or seed, step and process, so
that beside weights and optimizer a run has only to remember how many steps it has done. And there is one commit point, the
renaming of a finished checkpoint to last.pt: whatever came after the last one has not happened, and is computed again.
"""
import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import sources
import weights

RANK = int(os.environ.get("RANK", 0))                                       # of this process among all; torchrun sets it
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))              # how often torchrun has started this run again
PARENT = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None      # torchrun
LAUNCH = None                                                               # which torchrun, of the first process
PROGRAM = "train.py"                                                        # who speaks in messages: this, or finetune.py
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1                     # ask a run to save and leave
STOPPED = 75                                                                # exit code of one that did (EX_TEMPFAIL)
FILES = "log.jsonl", "bad_images.txt", "recon.png", "best.pt", "result.json"        # of a run, beside its checkpoints
HOPELESS = 20                                                               # so many steps in a row without finite numbers


# ------------------------------------------------------------------------------------------------ processes

def start_processes():
    """(world, device). Joins the process group where torchrun started us; else one process. Leaves if there are too few GPUs."""
    global LAUNCH
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 1, torch.device("cuda" if cuda else "cpu")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            fail(f"{os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPUs: see --nproc_per_node", everywhere=True)
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {ATTEMPT}", store)                   # or we'd wait for those whom an earlier attempt noted there
    dist.init_process_group("nccl" if cuda else "gloo", world_size=world, rank=rank, store=store,
                            timeout=datetime.timedelta(hours=1))            # a download may take long
    LAUNCH = gather(f"{os.environ.get('TORCHELASTIC_RUN_ID')} {PARENT}")[0]
    return world, device


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values):
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value):
    """The value of every process, in a list."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def say(text):
    """A line for people. That nobody listens any more, or that their disk is full, is no reason to end a run."""
    if RANK == 0:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:                                 # there may be room again
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def fail(problem, everywhere=False):
    """Say in one line, without a traceback, what is wrong with the user's input, and leave with exit code 2. `everywhere`: it
    is not found by all processes alike."""
    line = str(problem).strip().rpartition("\n")[2].removeprefix("sources.BadImage: ")         # a worker's ends a traceback
    if RANK == 0 or everywhere:
        print(f"{PROGRAM}: {line}", file=sys.stderr)
    sys.exit(2)


def together(work):
    """The result of work(). If it fails on any process, the first one says why, and all leave."""
    result, problem = None, None
    try:
        result = work()
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    except ValueError as error:
        problem = str(error)
    if found := [p for p in gather(problem) if p is not None]:
        fail(found[0])
    return result


def leave_at_once(code):
    data.kill_workers()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def on_signals(handler):
    """What a signal of SIGNALS does meanwhile."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def launch(work, args, config):
    """Run work(args, config, world, device) on every process of the run; it may return an exit code."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    def leave(number, frame):                                               # before the first step there is nothing to save
        print(f"{PROGRAM}: stopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(STOPPED)

    processes = start_processes()                                           # where a handler of Python's could not run
    with on_signals(leave):
        try:
            code = work(args, config, *processes)
            if dist.is_initialized():
                dist.barrier()                                              # nobody leaves while messages are under way
        except sources.BadImage as error:                                   # found while training, by any process
            fail(error, everywhere=True)
        except Exception as error:
            if killed := re.search(r"DataLoader worker \(pid.*", str(error)):
                fail(f"a loader process died, most likely for lack of memory: try fewer --workers ({killed[0]})", everywhere=True)
            if not dist.is_initialized():
                raise
            traceback.print_exc()                                           # such as the loss of another process; the group can't be
            leave_at_once(1)                                                # taken down in good order any more
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    if code:
        sys.exit(code)


# ------------------------------------------------------------------------------------------------ a run in its folder

def list_bad_images(out, names):
    """Add lines to bad_images.txt, each once."""
    path = os.path.join(out, "bad_images.txt")
    names = {name.replace("\n", " ") for name in names}
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="surrogateescape") as file:
        names |= set(file.read().splitlines())
    data.write_file(path, "".join(name + "\n" for name in sorted(names)).encode("utf-8", "surrogateescape"))


class Run:
    """A training run in its folder: where it stands, its log and checkpoints, and what ends it before its last step.

    identity is what may not change when it continues, total how many steps it has. Raises ValueError if something else lives
    in the folder. The loop, in `underway`, calls `agree` and `report` in each step, then if they are due `save` and `leave`.
    """

    def __init__(self, args, out, identity, total):
        self.args, self.out, self.identity, self.total, self.steps_per_epoch = args, out, identity, total, total // identity["epochs"]
        self.last, self.previous, self.log = (os.path.join(out, name) for name in ("last.pt", "previous.pt", "log.jsonl"))
        self.note, self.stamp = None, self.written()
        self.state = self.find()
        self.resumed, self.start, self.counts = False, 0, dict(skipped=0, in_a_row=0, replaced=0, this_epoch=0)
        if self.state:
            self.resumed, self.start, self.counts = True, self.state["step"], self.state["counts"]
        self.stop = min(args.steps or total, total)

    # ---- what is there

    def find(self):
        """The newest intact checkpoint, or None for a new run."""
        if self.args.overwrite and not ATTEMPT:
            return None
        paths = [path for path in (self.last, self.previous) if os.path.exists(path)]
        others = [name for name in FILES if os.path.exists(os.path.join(self.out, name))]
        problems = [f"{self.out} holds a {others[0]} but no last.pt"] if others and not paths else []
        for path in paths:
            try:
                state = weights.read(path, sealed=True)
            except ValueError as error:
                problems.append(str(error))
                continue
            if self.args.overwrite and state.get("launch") != LAUNCH:       # started again, but the first attempt had not come so far
                return None
            self.check(path, state)
            if path == self.previous:
                self.note = f"{problems[0] if problems else self.last + ' is missing'}: going on from {path}"
            return state
        if problems and not self.args.overwrite:
            raise ValueError(f"{' and '.join(problems)}: choose another --out, or --overwrite")
        return None

    def written(self):
        """When last.pt was."""
        return os.stat(self.last).st_mtime_ns if os.path.exists(self.last) else None

    def check(self, path, state):
        """Raises ValueError unless the state is one of this run."""
        if not {"identity", "step", "counts", "model", "optimizer", "scaler"} <= state.keys():
            raise ValueError(f"{path} is no checkpoint of this program: choose another --out, or --overwrite")
        there = state["identity"]
        if differ := [f"{k} ({there.get(k)} there, {v} here)" for k, v in self.identity.items() if repr(there.get(k)) != repr(v)]:
            raise ValueError(f"{self.out} holds another run: it differs in {', '.join(differ)}; choose another --out, or --overwrite")

    def announce(self, config, micro_batch, accumulate):
        """Say how the batch is made up, and where a run goes on; from the same step on all processes."""
        if len(set(gather(self.start))) > 1:
            fail(f"{self.out} is not one folder for all processes: --out must lie on a disk that all machines share")
        if self.note:
            say(self.note)
        say(f"batch {config['batch_size']} = {world_size()} process(es) × {micro_batch} images × {accumulate} accumulated; "
            f"{self.steps_per_epoch} steps an epoch, {self.total} in {config['epochs']} epochs; lr {config['lr']:.3g}")
        if self.resumed and self.start < self.stop:
            say(f"{self.out}: continuing after step {self.start}")
        elif self.resumed:
            hint = "a larger --steps goes on" if self.start < self.total else "finished: --overwrite starts anew, --out elsewhere"
            say(f"{self.out}: already at step {self.start} of {self.total}; {hint}")

    def restore(self, model, optimizer, scaler, ema=None):
        """Put the checkpoint's state in its places. Raises ValueError if it does not fit."""
        state, self.state = self.state, None                                # its memory is no longer needed
        try:
            model.load_state_dict(state["model"])
            if ema is not None:
                ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            if scaler.is_enabled() and state["scaler"]:                     # --amp may change from run to run
                scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"the checkpoint does not fit this model: {str(error).splitlines()[0]}") from None

    # ---- under way

    @contextlib.contextmanager
    def underway(self, snapshot, columns, line, batch_size):
        """Take possession of the folder. Until the end, signals only ask to stop.

        snapshot: () -> the state of model, optimizer, …; columns: of the log, what each step's losses are called; line: their
        text for people.
        """
        self.snapshot, self.columns, self.line, self.batch_size = snapshot, columns, line, batch_size
        self.asked, self.stopping, self.saving, self.problem, self.names = False, False, False, None, set()
        self.pending, self.first, self.recent, self.unwritten, self.saved = None, None, None, [], self.start
        self.next_save = time.time() + 60 * self.args.save_minutes
        held = together(lambda: self.take() if RANK == 0 else contextlib.nullcontext())
        self.bar = tqdm(total=self.total, initial=self.start, unit="step", disable=RANK > 0 or not sys.stderr.isatty())
        self.step, self.clock = self.start, time.time()
        with held, self.bar, on_signals(self.ask):
            yield

    def take(self):
        """Lock the folder. A new run writes its first checkpoint, so that it is found at once if it cannot, and removes what
        another one left; a continued one forgets what was logged after its checkpoint."""
        os.makedirs(self.out, exist_ok=True)
        held = open(os.path.join(self.out, ".lock"), "w")
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = self.written() != self.stamp                             # it was, until now
        except OSError as error:                                            # of another kind: a file system without locks
            busy = isinstance(error, (BlockingIOError, PermissionError))
        if busy:
            raise ValueError(f"another process is training in {self.out}: wait for it, or choose another --out")
        if not self.resumed:
            self.commit(0)
        if self.note and os.path.exists(self.last):
            os.replace(self.last, os.path.join(self.out, "damaged.pt"))     # so that it won't become the previous one
        elif self.start == 0:
            for name in ("previous.pt", "damaged.pt", *FILES):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.out, name))
        if os.path.exists(self.log):
            with open(self.log, errors="replace") as file:
                steps = [(line, re.match(r'\{"step": (\d+),.*\}\n$', line)) for line in file]
            data.write_file(self.log, "".join(line for line, found in steps if found and int(found[1]) <= self.start).encode())
        return held

    def ask(self, number, frame):
        """The first signal is a request. A second Ctrl-C is not."""
        if self.asked and number == signal.SIGINT:
            leave_at_once(128 + number)
        if not self.asked and RANK == 0:
            text = f"{PROGRAM}: {signal.Signals(number).name}: stopping after this step (Ctrl-C: at once)\n"
            with contextlib.suppress(OSError):                              # the terminal may be what went away
                os.write(2, (text if self.bar.disable else "\n" + text).encode())
        self.asked = True

    def agree(self, values, problems=()):
        """What all processes make of a step, as one tensor on the device: the means of these values; how many wish to stop,
        and to save; and how many images could not be read."""
        self.names.update(problems)
        orphan = PARENT is not None and os.getppid() != PARENT              # torchrun is dead, and nobody else would stop us
        mine = self.asked or orphan, RANK == 0 and time.time() >= self.next_save, len(problems)
        mine = [torch.full((1,), float(number), device=values.device) for number in mine]      # no copy that a GPU would wait for
        return sum_over_ranks(torch.cat([values / world_size(), *mine]))

    def report(self, done, sums, skipped, lr):
        """A step is done. What a GPU still computes is read in the next one, so that it never waits for us: stopping and saving
        may be a step late, on all processes alike."""
        self.bar.update()
        self.flush()
        values = torch.cat([sums, skipped.view(1)])
        host, sent = values.to("cpu", non_blocking=True), torch.cuda.Event() if values.is_cuda else None
        if sent:
            sent.record()
        self.pending = done, lr, host, sent
        if sent is None or done == self.stop:
            self.flush()

    def flush(self):
        """Read what the last step reported. Returns whether to stop."""
        if self.pending is None:
            return self.stopping
        (step, lr, host, sent), self.pending = self.pending, None
        if sent:
            sent.synchronize()                                              # with the end of that step, not of the one begun since
        *values, asked, due, unreadable, skipped = host.tolist()
        self.stopping |= asked > 0
        self.saving |= due > 0
        counts, (epoch, within) = self.counts, divmod(step - 1, self.steps_per_epoch)
        counts["skipped"] += int(skipped)
        counts["in_a_row"] = counts["in_a_row"] + 1 if skipped else 0
        counts["replaced"] += int(unreadable)
        counts["this_epoch"] = int(unreadable) + (counts["this_epoch"] if within else 0)
        if step % self.args.log_every == 0 or step in (self.start + 1, self.stop):
            self.recent = dict(step=step, epoch=epoch + 1) | dict(zip(self.columns, values))
            self.first = self.first or self.recent
            speed = (step - self.step) * self.batch_size / (time.time() - self.clock)
            self.step, self.clock = step, time.time()
            more = dict(lr=lr, skipped=counts["skipped"], replaced=counts["replaced"], images_per_second=speed)
            self.write(self.recent | more, self.line)
        if skipped:
            say(f"step {step} is left out: its loss or gradient is not finite ({counts['skipped']} so far)")
        if counts["in_a_row"] >= HOPELESS:
            fail(f"no finite loss and gradient in {HOPELESS} steps, up to {step}: try a smaller --lr, or --amp off. The last good "
                 f"checkpoint is {self.last}, of step {self.saved}")
        images = self.steps_per_epoch * self.batch_size
        if unreadable and counts["this_epoch"] > self.args.max_bad * images:
            self.stopping, self.problem = True, (
                f"{counts['this_epoch']} of the {images:,} images of this epoch could not be read, more than --max-bad "
                f"{self.args.max_bad:g}: repair or remove those in {os.path.join(self.out, 'bad_images.txt')}, or allow more")
        return self.stopping

    def write(self, entry, text):
        """A line for log.jsonl, and one for people: in the progress bar, or where there is no terminal, of its own."""
        if RANK > 0:
            return
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in entry.items()}
        self.unwritten.append(json.dumps(finite) + "\n")
        length = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        try:
            with open(self.log, "a") as file:
                file.writelines(self.unwritten)
            self.unwritten = []
        except OSError as error:                                            # later, then; no half lines meanwhile
            with contextlib.suppress(OSError):
                os.truncate(self.log, length)
            say(f"{self.log} cannot be written ({error.strerror}): the run goes on")
        self.bar.set_postfix_str(text.format(**entry))
        if self.bar.disable:
            say(f"step {entry['step']}/{self.bar.total}, " + text.format(**entry))

    # ---- checkpoints

    def due(self, done):
        """Whether to save now; the same on all processes."""
        epochs = self.args.save_epochs
        return done == self.stop or self.stopping or self.saving or bool(epochs) and done % (epochs * self.steps_per_epoch) == 0

    def save(self, done):
        """Write a checkpoint, on the first process. Leaves with a line if it is the last one and can't be written; if it is not,
        the run goes on, as the disk may be back before its end."""
        self.flush()
        self.names = set().union(*gather(self.names))
        together(lambda: RANK == 0 and self.commit(done))
        self.saving, self.names = False, set()

    def commit(self, done):
        state, self.next_save = self.snapshot(), time.time() + 60 * self.args.save_minutes
        if not all(bool(value.isfinite().all()) for value in state["model"].values()):
            raise ValueError(f"the weights are no longer finite: try a smaller --lr. The last good checkpoint is {self.last}, "
                             f"of step {self.saved}")
        try:
            if self.names:
                list_bad_images(self.out, self.names)
            weights.write(self.last, dict(format="nanoA2MIM", identity=self.identity, step=done, counts=self.counts, launch=LAUNCH) | state,
                          self.previous if done else None)
            self.saved = done
        except OSError as error:
            kept = f"; there is still the one of step {self.saved}" if done else ""
            problem = f"{self.last} cannot be written ({error.strerror}){kept}"
            if done in (0, self.stop) or self.stopping:
                raise ValueError(problem) from None
            say(f"{problem}. The run goes on, and tries again in a minute")
            self.next_save = min(self.next_save, time.time() + 60)

    def attempt(self, work, *args):
        """Write what a run can do without. Returns whether that went well."""
        try:
            work(*args)
        except OSError as error:
            say(f"{self.out}: {error.strerror}: the run goes on")
            return False
        return True

    def leave(self, done):
        """The end of a run that was stopped, when it is saved: its exit code."""
        if self.problem:
            fail(self.problem)
        say(f"stopped after step {done} of {self.total}, as asked. The same command goes on from there")
        return STOPPED
