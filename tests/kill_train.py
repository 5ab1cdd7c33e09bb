"""Stop train.py at random moments in every way there is, go on each time, and compare with an undisturbed run.

    python -m tests.kill_train --data data/stdlib --times 20

A run is alone, or two ranks (gloo), of which one or both are stopped; it saves often, and uses micro-batches.
Log, weights and moments must be those of the undisturbed run, bit by bit.
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

from leviathan import load_tensors, newest_checkpoint

ROOT = Path(__file__).parent.parent
FLAGS = ("--device cpu --dtype float32 --seq-len 32 --d-model 32 --n-layers 1 --n-heads 2 --d-seed 8 --mode-width 1 "
         "--tokens-per-step 256 --eval-tokens 512").split()
OFTEN = "--micro-batch 3 --save-every 7 --eval-every 25".split()
GENTLE = "SIGTERM", "SIGINT", "SIGHUP", "closed pipe"       # after these the step is finished and saved
FULL = 150_000          # bytes of a file, between model.pt and optimizer.pt


def start(out, data, *flags, ranks: int = 1, most_bytes: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """train.py as a user starts it, on a disk that takes files of so many bytes at most."""
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
                "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train.py"), *FLAGS, "--data", str(data), "--out", str(out), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)))


def finish(process: subprocess.Popen) -> str:
    """Wait for its end. -> what it said on its way out, which is no traceback unless torchrun has one of its own"""
    if process.stdout.closed:
        process.stdout = None
    error = process.communicate(timeout=300)[1]
    assert "Traceback" not in error or "torch.distributed.run" in process.args, error
    return error


def result(out: Path) -> dict:
    """The log without the clock, and the weights and moments of the newest checkpoint, to the bit."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    newest = newest_checkpoint(out)
    moments = load_tensors(newest / "optimizer.pt")["state"]
    tensors = load_tensors(newest / "model.pt") | {f"{i}.{name}": x for i, own in moments.items() for name, x in own.items()}
    return dict(log=[{k: v for k, v in line.items() if k != "tokens_per_second"} for line in log],
                step=newest.name, **{name: x.numpy().tobytes() for name, x in tensors.items()})


def begun(out: Path) -> int:
    """Changes when a run enters its loop, for then the log is written anew."""
    return (out / "log.jsonl").stat().st_ino if (out / "log.jsonl").exists() else 0


def stop(process: subprocess.Popen, way: str):
    if way == "closed pipe":
        process.stdout.close()
    elif way == "one rank":
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())]
        random.choice(ranks).kill()
    elif process.poll() is None:
        os.killpg(process.pid, getattr(signal, way if way in GENTLE else "SIGKILL"))


def kill_and_compare(folder: Path, data: Path, steps: int, ranks: int, way: str, times: int) -> int:
    """Stop `times` times in this way, go on to the end and compare. -> how many checkpoints were met, all whole"""
    whole, out, rng, met = folder / "whole", folder / way.replace(" ", "-"), random.Random(0), 0
    flags = [*OFTEN, "--steps", str(steps)]
    if not whole.exists():
        error = finish(start(whole, data, *flags, ranks=ranks))
        assert (whole / "curves.png").exists(), error
    seconds = sum(256 / json.loads(line)["tokens_per_second"] for line in open(whole / "log.jsonl"))
    for _ in range(times):
        resume, before = ["--resume"] if out.exists() else [], begun(out)
        process = start(out, data, *flags, *resume, ranks=ranks)
        while process.poll() is None and begun(out) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2 * seconds / (times + 1)))
        if process.poll() is None:
            stop(process, way)
        stopped = time.monotonic()
        error = finish(process)
        assert time.monotonic() - stopped < 60, "the other rank did not notice"
        last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] if way in GENTLE else 0
        assert way not in GENTLE or newest_checkpoint(out).name == f"step-{last:08d}", error
        if way == "full disk":
            error = finish(start(out, data, *flags, "--resume", ranks=ranks, most_bytes=FULL))
            assert "could not be saved" in error and "File too large" in error or "whole" in error, error
        for checkpoint in out.glob("step-????????"):            # whatever has its final name is whole
            load_tensors(checkpoint / "model.pt"), load_tensors(checkpoint / "optimizer.pt")
            met += 1
    error = finish(start(out, data, *flags, "--resume", ranks=ranks))
    assert (out / "curves.png").exists(), error
    ours, theirs = result(out), result(whole)
    assert ours == theirs, [name for name in theirs if ours.get(name) != theirs[name]]
    assert len(list(out.iterdir())) == len(list(whole.iterdir()))       # nothing half-made is left
    return met


def main():
    parser = argparse.ArgumentParser(description="Stop train.py, go on, compare.", allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="a small folder that prepare_pile.py has written")
    parser.add_argument("--times", type=int, default=20, help="stops of each kind [%(default)s]")
    parser.add_argument("--steps", type=int, default=300, help="of a run [%(default)s]")
    args = parser.parse_args()
    for ranks, last in ((1, "full disk"), (2, "one rank")):
        with tempfile.TemporaryDirectory() as folder:
            for way in ("SIGKILL", *GENTLE, last):
                met = kill_and_compare(Path(folder), args.data, args.steps, ranks, way, args.times)
                print(f"{ranks} rank(s), {way}: stopped {args.times} times, {met} checkpoints met, all whole; log, weights and "
                      "moments equal those of an undisturbed run, bit by bit", flush=True)


if __name__ == "__main__":
    main()
