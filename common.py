"""What the scripts share: an error that the user can mend, files that are whole or not there, and checkpoints.

Nothing here imports torch before it must, so that `--help` and the preparation of data start at once.
"""
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something the user can mend. The scripts print it as one line, without a traceback."""


def command_line(main):
    """Run a script's main(): what the user can mend becomes one line and exit status 1."""
    for stream in (sys.stdout, sys.stderr):         # a terminal without this character shows another, and nothing stops
        stream.reconfigure(errors="replace")
    try:
        main()
    except (InputError, OSError, UnicodeDecodeError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def written_whole(path: Path):
    """A temporary path to write to. It takes the name `path` once it is whole and on the disk; else nothing changes."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """What a JSON file holds. Raises InputError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is missing or damaged ({error})") from error


# ---- checkpoints: folders `step-00000300` with config.json and model.pt (and what train.py adds) ----------------------

def newest_checkpoint(path) -> Path:
    """The folder itself if it is a checkpoint, else the newest checkpoint in it. Raises InputError if there is none."""
    path = Path(path)
    found = [path] if (path / "model.pt").exists() else sorted(path.glob("step-*[0-9]"))
    if not found:
        raise InputError(f"no checkpoint in {path}: name a folder that train.py has written")
    return found[-1]


def load_tensors(path: Path, device="cpu"):
    """What torch.save wrote, loaded without running code from the file. Raises InputError if it is damaged."""
    import torch
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:      # torch raises anything from EOFError to RuntimeError on a file cut short
        raise InputError(f"{path} is missing, damaged or cut short ({str(error).splitlines()[0]}): "
                         "use an earlier checkpoint") from error
