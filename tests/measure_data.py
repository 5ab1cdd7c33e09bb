"""How fast text is prepared, and in how much memory. The figures of the README's section on data.

    python -m tests.measure_data --encoding o200k_base data/00.jsonl.zst data/01.jsonl.zst ...

Preparing is compared, in turns, with `tiktoken.encode_ordinary_batch` alone: texts in memory, equal threads.
Wall-clock time says what a user waits for; CPU time is the fairer one where others use the machine.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from prepare_pile import THREADS, documents, get_encoding

PREPARE = [sys.executable, str(Path(__file__).parent.parent / "prepare_pile.py")]


def prepare(files, out: Path, encoding: str, threads: int) -> tuple[float, float, float]:
    """-> seconds of the whole command, of its CPUs, and the most that it held, in GB (resident)"""
    started, peak, cpu = time.perf_counter(), 0, 0
    command = [*PREPARE, "--encoding", encoding, "--out", out, "--threads", threads, "--input", *files]
    process = psutil.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            peak, cpu = max(peak, process.memory_info().rss), sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.1)
    if process.returncode:
        sys.exit("prepare_pile.py failed")
    return time.perf_counter() - started, cpu, peak / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--encoding", required=True)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tenfold", action="store_true", help="also ten times the input: does memory grow?")
    args = parser.parse_args()
    encoding = get_encoding(args.encoding)
    texts = [text for file in args.files for text, _ in documents(file)]
    size, ratios = sum(len(text.encode()) for text in texts) / 1e6, []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds):
            started, cpu_started = time.perf_counter(), time.process_time()
            for first in range(0, len(texts), 1_000):
                encoding.encode_ordinary_batch(texts[first:first + 1_000], num_threads=args.threads)
            alone, alone_cpu = time.perf_counter() - started, time.process_time() - cpu_started
            whole, cpu, peak = prepare(args.files, Path(folder, f"round-{i}"), args.encoding, args.threads)
            ratios.append((alone / whole, alone_cpu / cpu))
            print(f"{size:.0f} MB, {args.threads} threads: tiktoken {size / alone:.1f} MB/s, "
                  f"prepare_pile.py {size / whole:.1f} MB/s, "
                  f"ratio {alone / whole:.2f}, of CPU time {alone_cpu / cpu:.2f}; {peak:.2f} GB resident",
                  flush=True)
        print("medians of the ratios: {:.2f}, of CPU time {:.2f}".format(*map(statistics.median,
                                                                              zip(*ratios))))
        if args.tenfold:
            copies = Path(folder, "tenfold")
            copies.mkdir()
            for i in range(10):
                for file in args.files:
                    (copies / f"{i}-{file.name}").symlink_to(file.resolve())
            whole, _, peak = prepare([copies], Path(folder, "ten"), args.encoding, args.threads)
            print(f"ten times the input: {10 * size / whole:.1f} MB/s, {peak:.2f} GB resident")


if __name__ == "__main__":
    main()
