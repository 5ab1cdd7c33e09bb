"""Checkpoints: folders `step-00000300` that hold config.json, tokenizer.json, model.pt and optimizer.pt, whole or not at all.

What is read may be damaged, or come from a stranger: no code in it is run, and nothing in it is believed before it is looked at.
"""
import json
import os
import shutil
import zipfile
from pathlib import Path

import torch

from common import InputError, fsync, read_json


def newest_checkpoint(path) -> Path:
    """The folder itself if it is a checkpoint, else the newest checkpoint in it. Raises InputError if there is none."""
    path = Path(path)
    found = [path] if (path / "model.pt").exists() else sorted(path.glob("step-*[0-9]"))
    if not found:
        raise InputError(f"no checkpoint in {path}: name a folder that train.py has written")
    return found[-1]


def training_data(folder: Path) -> Path:
    """The folder of shards that a checkpoint was trained on. Raises InputError."""
    try:
        return Path(read_json(folder / "config.json")["training"]["data"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} does not say what it was trained on ({error!r})") from error


def load_tensors(path: Path, device="cpu"):
    """What torch.save wrote, loaded without running code from the file. Raises InputError if it is damaged.

    torch does not look at the checksums that it writes, nor at how large a compressed part will become: here both are looked at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("it holds more than its size")
            if bad := archive.testzip():
                raise ValueError(f"the checksum of {bad} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:      # torch raises anything from EOFError to RuntimeError on a file cut short
        raise InputError(f"{path} is missing, damaged or cut short ({(str(error).splitlines() or [repr(error)])[0]}): "
                         "use an earlier checkpoint") from error


def check_tensors(found, expected: dict, where: str):
    """Raises InputError unless `found` are finite tensors of the `expected` names and shapes, with as much memory as they claim."""
    if not isinstance(found, dict) or found.keys() != expected.keys():
        names = sorted(map(str, found.keys() ^ expected.keys()) if isinstance(found, dict) else [type(found).__name__])
        raise InputError(f"{where}: {', '.join(names[:3])}{' ...' * (len(names) > 3)} missing or unexpected")
    for name, like in expected.items():
        x = found[name]
        if not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.is_meta or x.shape != like.shape:
            raise InputError(f"{where}: size mismatch for {name}: {tuple(like.shape)} expected, "
                             f"{tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__} found")
        if x.is_floating_point() != like.is_floating_point() or x.is_complex():
            raise InputError(f"{where}: {name} is of type {x.dtype}")
        if x.untyped_storage().nbytes() < x.numel() * x.element_size() or not x.isfinite().all():
            raise InputError(f"{where}: {name} is damaged")


def save_checkpoint(out: Path, step: int, model, optimizer, description: dict, tokenizer: dict, keep: int) -> Path:
    """Write `out/step-…` aside, rename it when whole, then delete all but the newest `keep`."""
    folder = out / f"step-{step:08d}"
    partial = out / f"{folder.name}.partial"
    need = 3 * sum(p.numel() * p.element_size() for p in model.parameters())       # weights and AdamW's two moments
    try:
        if shutil.disk_usage(out).free < need:
            raise OSError("no room on the disk")
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(dict(step=step, **description), indent=1), encoding="utf-8")
        (partial / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        torch.save(model.state_dict(), partial / "model.pt")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        for file in [*partial.iterdir(), partial]:
            fsync(file)
        os.replace(partial, folder)
        fsync(out)
    except (OSError, RuntimeError) as error:        # torch.save raises RuntimeError on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"cannot save step {step} in {out} ({str(error).splitlines()[0]}), which takes {need / 1e6:,.1f} MB: "
                         "free some space and go on with --resume") from error
    for old in sorted(out.glob("step-*[0-9]"))[:-keep]:
        shutil.rmtree(old)
    return folder
