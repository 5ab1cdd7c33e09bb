"""Stop train.py at random moments in every way, go on, and compare with an undisturbed run, bit by bit.

    python -m tests.kill_train --data data/stdlib --times 20

On one rank, or on two (gloo), of which one or both are stopped, with many checkpoints and micro-batches.
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
FLAGS = ("--device cpu --dtype float32 --seq-len 32 --d-model 32 --n-layers 1 --n-heads 2 --d-seed 8 "
         "--mode-width 1 --tokens-per-step 256 --eval-tokens 512").split()
GENTLE = "SIGTERM", "SIGINT", "SIGHUP", "closed pipe"       # after these the step is finished and saved
FULL = 150_000         # bytes of a file, between model.pt and optimizer.pt


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def start(out, data, *flags, ranks: int = 1, full: int = -1, output=subprocess.PIPE) -> subprocess.Popen:
    """train.py as a user starts it, on a disk that takes files of `full` bytes."""
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
                "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [*launcher, ROOT / "train.py", *FLAGS, "--data", data, "--out", out, *flags]
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=output, stderr=output, text=True, start_new_session=True,
        env=os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (full, full)))


def finish(process: subprocess.Popen) -> str:
    """Wait for its end. -> what it complained of, without a traceback unless torchrun has one of its own"""
    process.stdout = None if process.stdout.closed else process.stdout
    error = process.communicate(timeout=300)[1]
    assert "Traceback" not in error or "torch.distributed.run" in process.args, error
    return error


def result(out: Path) -> dict:
    """The log without the clock; the newest checkpoint, and its weights and moments to the bit."""
    newest, log = newest_checkpoint(out), [line | dict(tokens_per_second=0) for line in read_log(out)]
    moments = load_tensors(newest / "optimizer.pt")["state"]
    tensors = {f"{i}.{name}": x for i, own in moments.items() for name, x in own.items()}
    tensors |= load_tensors(newest / "model.pt")
    return dict(log=log, step=newest.name, **{name: x.numpy().tobytes() for name, x in tensors.items()})


def kill_and_compare(folder: Path, data: Path, steps: int, ranks: int, way: str, times: int):
    """Stop `times` times in this way, go on to the end, and compare."""
    whole, out, rng = folder / "whole", folder / way, random.Random(0)
    flags = [*"--micro-batch 3 --save-every 7 --eval-every 25 --steps".split(), steps]
    if not whole.exists():
        finish(start(whole, data, *flags, ranks=ranks))
    seconds = sum(256 / line["tokens_per_second"] for line in read_log(whole))
    log = out / "log.jsonl"                                             # its loop begins with another one
    for _ in range(times):
        begun = log.stat().st_ino if log.exists() else 0
        process = start(out, data, *flags, *["--resume"] * out.exists(), ranks=ranks)
        while process.poll() is None and (not log.exists() or log.stat().st_ino == begun):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2 * seconds / (times + 1)))
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)         # torchrun's ranks
            if way == "closed pipe":
                process.stdout.close()
            elif way in GENTLE:
                process.send_signal(getattr(signal, way))
            else:
                for one in [rng.choice(children)] if way == "one rank" else [process, *children]:
                    one.kill()
        error = finish(process)
        assert way not in GENTLE or int(newest_checkpoint(out).name[5:]) == len(read_log(out)), error
        if way == "full disk":
            error = finish(start(out, data, *flags, "--resume", full=FULL))
            assert "could not be saved" in error and "File too large" in error or not error, error
        for file in out.glob("step-????????/*.pt"):                     # what has its final name is whole
            load_tensors(file)
    error = finish(start(out, data, *flags, "--resume", ranks=ranks))
    assert result(out) == result(whole), error
    assert len(os.listdir(out)) == len(os.listdir(whole)), os.listdir(out)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Stop train.py, go on, compare.")
    parser.add_argument("--data", type=Path, required=True, help="a small folder of prepare_pile.py")
    parser.add_argument("--times", type=int, default=20, help="stops of each kind [%(default)s]")
    args = parser.parse_args()
    for ranks, last in (1, "full disk"), (2, "one rank"):
        with tempfile.TemporaryDirectory() as folder:
            for way in ("SIGKILL", *GENTLE, last):
                kill_and_compare(Path(folder), args.data, 300, ranks, way, args.times)
                print(f"{ranks} rank(s), {way}: {args.times} stops, and the same end", flush=True)


if __name__ == "__main__":
    main()
