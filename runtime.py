"""What scripts share: processes, precision, requests to stop, checkpoints, errors in one line."""
import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import sys
import time
import zipfile

import torch
import torch.distributed as dist

import data
import model as models

STOPPED = 75  # exit code of a run that was asked to stop: EX_TEMPFAIL, try again


# ---- command lines

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are ValueErrors, like all others."""

    def __init__(self, *args, **options):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(message)


def run(main, argv=None):
    """Call a script's main. A user's mistake is printed in one line, and the exit code is 2."""
    try:
        main(argv)
    except (ValueError, OSError) as error:
        # all processes find the same mistakes; an image may be unreadable on one machine only
        if os.environ.get("RANK", "0") == "0" or isinstance(error, data.BadImage):
            # of a loader process's error, which comes with its traceback, only the last line
            message = re.sub(r"(?s).*\n[\w.]+: ", "", str(error).strip())
            print(f"{os.path.basename(main.__code__.co_filename)}: {message}", file=sys.stderr)
        else:
            time.sleep(3)  # torchrun ends all processes when the first one leaves
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- processes and devices

def setup(deterministic=False):
    """(rank, world size, device) of this process. Joins the others where torchrun started it."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    if cuda:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise ValueError(f"there are {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # an hour, because a download or the listing of a large archive may take long
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size(), device


@contextlib.contextmanager
def local_first():
    """One process of each machine goes first: it may download, or list an archive."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()
    try:
        yield
    finally:  # also if it failed: the others then fail alike
        if dist.is_initialized() and first:
            dist.barrier()


def workers(asked=None):
    """Loader processes of this process: as asked, else its share of the cores, at most 8."""
    if asked is not None:
        return asked
    return min(8, data.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def place(model, device, world=1, sync_bn=True):
    """The model on its device. sync_bn: whether several GPUs normalise over their batches together."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where mixed precision is off
        if world > 1 and sync_bn:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if not isinstance(model.encoder, models.ViT):  # convolutions are fastest with channels last
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def precision(amp, device):
    """(autocast context, gradient scaler) for --amp auto, bf16, fp16 or off."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    autocast = torch.autocast(device.type, dtypes.get(amp), enabled=amp in dtypes)
    return autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


# ---- requests to stop

class StopRequest:
    """Whether SIGTERM, SIGUSR1 or Ctrl-C has asked a run to stop, or nobody else could any more.

    A second Ctrl-C leaves at once.
    """

    def __init__(self):
        self.asked = False
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.before = {number: signal.signal(number, self.ask) for number in numbers}

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            data.kill_workers()
            os._exit(130)
        self.asked = True

    def pending(self):
        # torchrun passes SIGTERM on; when it dies itself, its processes get another parent
        return self.asked or self.torchrun not in (None, os.getppid())

    def restore(self):
        """Signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- checkpoints

def save(path, state, previous=None):
    """Write a checkpoint whole or not at all; what stood there is kept as `previous`, if given.

    Raises ValueError if the weights are not finite, OSError if it cannot be written.
    """
    if not all(value.isfinite().all() for value in state["model"].values()):
        raise ValueError(f"the weights are no longer finite and are not saved as {path}: "
                         "try a smaller --lr")
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
    except (OSError, RuntimeError) as error:
        # torch.save, told that the disk is full, complains of something else
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path} cannot be written ({reason}); the last one is whole") from None
    if previous is not None and os.path.exists(path):
        os.replace(path, previous)
    os.replace(path + ".tmp", path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(folder)  # so that the names survive a power cut
    os.close(folder)


def read(path):
    """The dictionary that a checkpoint file holds; no code in it is run. Raises ValueError, OSError."""
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            if "GLOBAL" in str(error):
                raise ValueError(f"{path} holds Python objects beside tensors, which are never run "
                                 "here: save its state_dict alone and pass that") from None
            checkpoint = None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds no state_dict of PyTorch, or is damaged")
    return checkpoint


def is_undamaged(path):
    """Whether a checkpoint is what torch.save wrote: a zip file, with checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            # a flipped bit may call an entry a folder: Python would not mind, but PyTorch believes it
            folders = [entry for entry in file.infolist() if entry.external_attr & 16]
            return not folders and file.testzip() is None
    except Exception:  # damage shows in half a dozen ways
        return False


def load(out, config, defaults={}):
    """The newest undamaged checkpoint in a run's folder, or None if there is none: a new run.

    config: what the run is, which may not change when it goes on. defaults: of keys that an older
    checkpoint lacks. Raises ValueError if it differs, or if all checkpoints are damaged.
    """
    last = os.path.join(out, "last.pt")
    paths = [path for path in (last, os.path.join(out, "previous.pt")) if os.path.exists(path)]
    if not paths:
        return None
    for path in filter(is_undamaged, paths):
        with contextlib.suppress(ValueError):  # PyTorch may find damage where checksums do not
            state = read(path)
            break
    else:
        raise ValueError(f"{' and '.join(paths)} cannot be read, or are damaged: "
                         "choose another --out or remove the folder")
    there = config | defaults | state.get("config", {"format": "of another program"})
    differing = [key for key in there if there[key] != config.get(key)]
    if differing:
        fields = [f"{key} ({there[key]} there, {config.get(key)} here)" for key in differing[:4]]
        raise ValueError(f"{out} holds another run, which differs in {', '.join(fields)}: "
                         "choose another --out or remove the folder")
    if path != last and os.environ.get("RANK", "0") == "0":
        print(f"{last} is damaged or missing: going on from {path}", flush=True)
        if last in paths:
            os.remove(last)  # or it would become the next previous.pt
    return state


def restore(checkpoint, model, optimizer, scaler):
    """Put a checkpoint's state in its places; --amp may have changed since."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])


def open_log(out, step):
    """log.jsonl, to be added to. Entries after this step belong to what was lost, and go."""
    log = open(os.path.join(out, "log.jsonl"), "a+")
    log.seek(0)
    size = 0
    with contextlib.suppress(ValueError):  # the last line may be a part of one
        for line in log:
            if json.loads(line)["step"] > step:
                break
            size += len(line)
    log.truncate(size)
    return log
