"""Kill prepare_pile.py (SIGKILL) at random moments, each time start it again, and compare with an undisturbed run.

    python -m tests.kill_prepare --times 20 --input data/*.jsonl.zst --encoding o200k_base      # what prepare_pile.py takes
"""
import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREPARE = [sys.executable, str(Path(__file__).parent.parent / "prepare_pile.py")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_equal(out: Path, whole: Path):
    ours, theirs = contents(out), contents(whole)
    differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    assert not differ, f"{differ} differ from an undisturbed run"


def kill_and_compare(folder: Path, command: list, times: int, seed: int = 0) -> list[float]:
    """Run `command --out FOLDER/whole`, then into FOLDER/killed with kills. -> when each came, in shares of a whole run's time

    Raises AssertionError where the files differ, or a half-written folder has the final name.
    """
    def start(out):
        return subprocess.Popen([*map(str, command), "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finish(process):
        error = process.communicate(timeout=3600)[1].decode()
        assert process.returncode == 0, error

    whole, out, rng, killed = folder / "whole", folder / "killed", random.Random(seed), []
    begun = time.perf_counter()
    finish(start(whole))
    duration = time.perf_counter() - begun
    while len(killed) < times:
        process, moment = start(out), rng.uniform(0, duration)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed.append(moment / duration)
            if not out.exists():
                continue            # it goes on; else it was whole already, when the kill came
        else:
            finish(process)
        assert_equal(out, whole)
        shutil.rmtree(out)
    finish(start(out))
    assert_equal(out, whole)
    assert sorted(path.name for path in folder.iterdir()) == ["killed", "whole"]
    return killed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        killed = kill_and_compare(Path(folder), [*PREPARE, *rest], args.times)
    print(f"killed {len(killed)} times, at {', '.join(f'{moment:.0%}' for moment in killed)} of a whole run's time: "
          "the files equal those of an undisturbed run, byte for byte")
