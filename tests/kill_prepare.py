"""Kill prepare_pile.py (SIGKILL) at random moments, start it again, and compare with an undisturbed run.

    python -m tests.kill_prepare --times 20 --part 1_000_000 --input data/*.jsonl.zst --encoding o200k_base

Parts are of --part tokens instead of 100 M; everything else is what prepare_pile.py takes.
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL_PARTS = """
import runpy, sys
sys.path.insert(0, {root!r})
import prepare_pile
prepare_pile.PART_TOKENS, sys.argv[0] = {part}, "prepare_pile.py"
if __name__ == "__main__":
    try:
        prepare_pile.main()
    except (ValueError, OSError) as error:
        sys.exit(f"prepare_pile.py: {{error}}")
"""


def small_parts(folder: Path, part: int) -> list[str]:
    """A command that is prepare_pile.py but for the size of its parts."""
    (folder / "small.py").write_text(SMALL_PARTS.format(root=str(ROOT), part=part))
    return [sys.executable, str(folder / "small.py")]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which may stay."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
            and path.name != ".lock"}


def assert_equal(out: Path, whole: Path):
    ours, theirs = contents(out), contents(whole)
    differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    assert not differ, f"{differ} differ from an undisturbed run"


def kill_and_compare(folder: Path, command: list, times: int, seed: int = 0) -> list[float]:
    """Run `command --out FOLDER/whole`, then into FOLDER/killed with kills. -> when, in shares of it

    Raises AssertionError where files differ, or a folder that is not whole says that it is.
    """
    def start(out):
        return subprocess.Popen([*map(str, command), "--out", str(out)], stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE)

    def finish(process):
        error = process.communicate(timeout=3600)[1].decode()
        assert process.returncode == 0, error

    whole, out, rng, killed = folder / "whole", folder / "killed", random.Random(seed), []
    begun = time.perf_counter()
    finish(start(whole))
    duration = time.perf_counter() - begun
    while len(killed) < times:
        process, moment = start(out), rng.uniform(0.2, 1) * duration
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed.append(moment / duration)
            meta = out / "meta.json"
            if not meta.exists() or not json.loads(meta.read_text())["finished"]:
                continue            # it goes on; else it was whole already, when the kill came
        else:
            finish(process)
        assert_equal(out, whole)
        shutil.rmtree(out)
    finish(start(out))
    assert_equal(out, whole)
    return killed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--part", type=int, default=1_000_000)
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        killed = kill_and_compare(Path(folder), [*small_parts(Path(folder), args.part), *rest], args.times)
    moments = ", ".join(f"{moment:.0%}" for moment in killed)
    print(f"killed {len(killed)} times, at {moments} of a whole run's time: "
          "the files equal those of an undisturbed run, byte for byte")
