"""What the scripts share: an error that the user can mend, settings of the right type, files that are whole or not there.

Nothing here imports torch before it must, so that `--help` and the preparation of data start at once.
"""
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import get_args

LARGEST_JSON = 2**28            # bytes: a tokenizer of a million tokens takes a tenth of it


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


def choose_device(wanted: str | None, local_rank: int = 0):
    """cpu, cuda or mps as a torch.device; None: the best there is. Raises InputError where there is none of that kind."""
    import torch
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = wanted or next(name for name, there in available.items() if there)
    if not available.get(wanted):
        raise InputError(f"--device {wanted}: there is none here; choose from {', '.join(n for n, ok in available.items() if ok)}")
    return torch.device(wanted, local_rank) if wanted == "cuda" else torch.device(wanted)


def check_types(settings):
    """Raises InputError unless each field of a dataclass is of a declared type, or an int for a float; numbers must be finite."""
    for field in fields(settings):
        value, kinds = getattr(settings, field.name), get_args(field.type) or (field.type,)
        right = type(value) in kinds or type(value) is int and float in kinds
        if not right or type(value) is float and not math.isfinite(value) or type(value) is int and abs(value) >= 2**63:
            names = " or ".join("nothing" if kind is NoneType else kind.__name__ for kind in kinds)
            raise InputError(f"{field.name} is {value!r}: it must be {names}")


def fsync(path: Path):
    """Return when what was written to a file is on the disk; of a folder, that its names are, where the system can."""
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
    try:
        handle = os.open(path, flags)
    except PermissionError:         # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_whole(path: Path):
    """A temporary path to write to. It takes the name `path` once it is whole and on the disk; else nothing changes."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """The object that a JSON file holds. Raises InputError."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is missing or damaged ({error})") from error
