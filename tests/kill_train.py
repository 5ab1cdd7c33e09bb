"""Stop train.py at random moments in every way there is, go on each time, and compare with an undisturbed run, bit by bit.

    python -m tests.kill_train --data data/stdlib --times 20

Ways: SIGKILL, SIGTERM, SIGINT (Ctrl-C), a full disk while saving; alone with micro-batches, and on 2 ranks (gloo), of which one
or both are killed. The run crosses epochs, and saves often, so that many moments fall into a save.
"""
import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from checkpoints import load_tensors
from shards import Windows

HERE = Path(__file__).parent.parent
FLAGS = ("--device cpu --seq-len 32 --d-model 32 --n-layers 1 --n-heads 2 --d-seed 8 --mode-width 1 --tokens-per-step 512 "
         "--save-every 7 --eval-every 25 --eval-tokens 512 --micro-batch 3").split()
LIMIT = 100_000                 # bytes of a file, between model.pt and optimizer.pt, for the disk that is full


def start(out: Path, data: Path, steps: int, ranks: int, resume: bool, full: bool = False) -> subprocess.Popen:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
                                      "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))) if full else None
    return subprocess.Popen(
        [sys.executable, *launcher, HERE / "train.py", *FLAGS, "--data", data, "--steps", str(steps), "--out", out,
         *(["--resume"] if resume else [])], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=limit, env=os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"))


def finish(process: subprocess.Popen, timeout: float = 600) -> str:
    """What it said on its way out, success or not."""
    error = process.communicate(timeout=timeout)[1]
    assert "Traceback" not in error or "torch.distributed.run" in process.args, error       # torchrun has one of its own
    return error


def result(out: Path) -> tuple[list, dict, dict]:
    """The log without the clock, and the last checkpoint's weights and moments."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = sorted(out.glob("step-*"))[-1]
    moments = load_tensors(last / "optimizer.pt")["state"]
    return ([{key: value for key, value in line.items() if key != "tokens_per_second"} for line in log],
            load_tensors(last / "model.pt"), {f"{i}.{name}": x for i, own in moments.items() for name, x in own.items()})


def assert_equal(ours: Path, whole: Path):
    for a, b in zip(result(ours), result(whole)):
        assert a == b if isinstance(a, list) else a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    names = [sorted(path.name for path in out.iterdir() if not path.name.startswith("step-")) for out in (ours, whole)]
    steps = [sorted(out.glob("step-*")) for out in (ours, whole)]           # a stop makes one more, but no more than --keep
    assert names[0] == names[1] and len(steps[0]) == len(steps[1]) and steps[0][-1].name == steps[1][-1].name


def disturb(process: subprocess.Popen, way: str, moment: float):
    """Wait for the moment, then stop the run in this way, or let it end."""
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        if way == "one rank":
            ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())]
            if ranks:
                random.choice(ranks).kill()
        else:
            os.killpg(process.pid, {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}[way])
    begun = time.monotonic()
    finish(process)
    if way == "one rank":
        assert time.monotonic() - begun < 60, "the other rank did not notice"


def kill_and_compare(folder: Path, data: Path, steps: int, ranks: int, way: str, times: int, seed: int = 0) -> int:
    """Stop `times` times in this way, go on to the end, and compare. -> the checkpoints that a stop has left, all of them whole"""
    whole, out, rng, left = folder / "whole", folder / way.replace(" ", "-"), random.Random(seed), 0
    if not whole.exists():
        begun = time.monotonic()
        error = finish(start(whole, data, steps, ranks, resume=False))
        assert (whole / "curves.png").exists(), error
        (folder / "seconds").write_text(str(time.monotonic() - begun))
    duration = float((folder / "seconds").read_text())
    for _ in range(times):
        process = start(out, data, steps, ranks, resume=out.exists())
        disturb(process, way if way != "full disk" else "SIGTERM", rng.uniform(0.2, 1) * duration)
        if way == "full disk" and len((out / "log.jsonl").read_text().splitlines()) < steps:
            error = finish(start(out, data, steps, ranks, resume=True, full=True))
            assert "cannot save step" in error and "free some space and go on with --resume" in error, error
        for checkpoint in out.glob("step-*[0-9]"):          # whatever has its final name is whole
            load_tensors(checkpoint / "model.pt"), load_tensors(checkpoint / "optimizer.pt")
            left += 1
    error = finish(start(out, data, steps, ranks, resume=out.exists()))
    assert (out / "curves.png").exists(), error
    assert_equal(out, whole)
    return left


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a small folder that prepare_pile.py has written")
    parser.add_argument("--times", type=int, default=20, help="stops of each kind [%(default)s]")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    windows = len(Windows(args.data, "train", 32))
    print(f"{args.steps} steps of 16 windows of {windows:,}: {args.steps * 16 / windows:.2f} epochs")
    for ranks, ways in ((1, ("SIGKILL", "SIGTERM", "SIGINT", "full disk")), (2, ("SIGKILL", "SIGTERM", "SIGINT", "one rank"))):
        with tempfile.TemporaryDirectory() as folder:
            for way in ways:
                left = kill_and_compare(Path(folder), args.data, args.steps, ranks, way, args.times)
                print(f"{ranks} rank{'s' * (ranks > 1)}, {way}: stopped {args.times} times, {left} checkpoints left, whole; log, "
                      "weights and moments equal those of an undisturbed run, bit by bit", flush=True)


if __name__ == "__main__":
    main()
