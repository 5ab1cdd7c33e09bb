"""How fast text is prepared and read, and in how much memory. The figures of the README's section Data.

    python -m tests.measure_data --encoding o200k_base data/00.jsonl.zst data/01.jsonl.zst ...

Preparing is compared, in one run, with `tiktoken.encode_ordinary_batch` alone: texts that lie in memory, as many threads.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from common import command_line
from documents import documents
from shards import Windows, batches
from tokenizer import get_encoding

PREPARE = [sys.executable, str(Path(__file__).parent.parent / "prepare_pile.py")]


def prepare(files, out: Path, encoding: str, workers: int) -> tuple[float, float]:
    """-> seconds of the whole command, and the most that all its processes together held, in GB (resident, summed)"""
    started, peak = time.perf_counter(), 0
    command = [*PREPARE, "--encoding", encoding, "--out", out, "--workers", workers, "--input", *files]
    process = psutil.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        held = 0
        for each in [process, *process.children(recursive=True)]:
            try:
                held += each.memory_info().rss
            except psutil.NoSuchProcess:
                pass
        peak = max(peak, held)
        time.sleep(0.25)           # looking costs time, too
    assert process.returncode == 0, "prepare_pile.py failed"
    return time.perf_counter() - started, peak / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--encoding", required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    encoding = get_encoding(args.encoding)
    texts = [text for file in args.files for text in documents(file)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for i in range(args.rounds):
            started = time.perf_counter()
            for first in range(0, len(texts), 1_000):
                encoding.encode_ordinary_batch(texts[first:first + 1_000], num_threads=args.workers)
            alone = time.perf_counter() - started
            whole, peak = prepare(args.files, folder / f"round-{i}", args.encoding, args.workers)
            print(f"{size:.0f} MB, {args.workers} threads or workers: tiktoken {size / alone:.1f} MB/s, prepare_pile.py "
                  f"{size / whole:.1f} MB/s, ratio {alone / whole:.2f}; {peak:.2f} GB resident", flush=True)
        tenfold = folder / "tenfold"
        tenfold.mkdir()
        for i in range(10):
            for file in args.files:
                (tenfold / f"{i}-{file.name}").symlink_to(file.resolve())
        whole, peak = prepare([tenfold], folder / "ten", args.encoding, args.workers)
        print(f"ten times the input: {10 * size / whole:.1f} MB/s, {peak:.2f} GB resident")

        windows, per_step, steps = Windows(folder / "ten", "train", 512), 512, 100
        for _ in range(2):          # the second time from the system's cache
            started = time.perf_counter()
            for batch in batches(windows, per_step, range(steps), seed=0):
                assert batch.shape == (per_step, 513)
            print(f"reading, for nobody: {per_step * 512 * steps / (time.perf_counter() - started) / 1e6:.1f} M tokens/s")
        waited, started = [], time.perf_counter()
        stream = batches(windows, 128, range(100), seed=1)
        for _ in range(100):
            asked = time.perf_counter()
            next(stream)
            waited.append(time.perf_counter() - asked)
            time.sleep(max(0, 128 * 512 / 1e6 - waited[-1]))
        print(f"at a million tokens a second: {np.sum(waited) / (time.perf_counter() - started):.3%} of the time spent waiting, "
              f"of which the first step {waited[0] / np.sum(waited):.0%}")


if __name__ == "__main__":
    command_line(main)
