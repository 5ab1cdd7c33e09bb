"""What is learned: paired runs of train.py, their tables and figures.

    python -m lab.campaign --experiments first-run --jobs 2     # -> OUT/tables.md, OUT/first-run.png
    python -m lab.campaign --experiments width --train "--data data/mine --steps 600" --out out/mine

An experiment is a few variants, each some flags of train.py on top of what all share. Each runs once a seed:
the same tokens in the same order, the same blocks and head at first. A run is JSON lines in OUT/runs, with
its model beside them. What is there is not run again, so a campaign can be stopped and gone on with. A file
to start from is drawn once for all seeds: ± over them leaves out what it draws.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from lab import addresses, command, generators
from leviathan import GENERATORS, Config, load, newest_checkpoint
from prepare_pile import locked, naming, prepare_stdlib, read_counts, read_meta, written_whole
from train import PRESETS, Training, save_tensors

ROOT, TRAIN = Path(__file__).parent.parent, Path(generators.__file__)      # train.py, with more generators
STARTS = {      # {name} or {name@scale} is a file that lab.addresses writes of the data with these settings,
    #             {pace@x,y} one with codebooks of standard deviation x and W_seed of y
    "table": dict(model="dense-untied"), "learned": dict(), "fine": dict(base=512), "noise": dict(noise=True),
    "shuffled": dict(addresses="shuffled", noise=True), "frequency": dict(addresses="frequency", noise=True)}
TWINS = {"dense": "--model dense", "dense-untied": "--model dense-untied"}
CONTROL = {"control, from vectors": "--model dense-untied --start {table}"}     # the same knowledge
OURS = "--model leviathan"
THREE = TWINS | {"leviathan": OURS}
EXPERIMENTS = {
    "first-run": TWINS | CONTROL | {
        "leviathan": OURS, "leviathan, from vectors": OURS + " --start {learned}"},
    "reading": TWINS | {
        "leviathan": OURS, "uncentred": f"{OURS} --no-centred", "lev": f"{OURS} --generator lev"},
    "addresses": TWINS | CONTROL | {
        "id": OURS, "shuffled": OURS + " --start {shuffled}", "frequency": OURS + " --start {frequency}",
        "learned": OURS + " --start {noise}", "learned, from vectors": OURS + " --start {learned}"},
    "modes": TWINS | {              # with them, and by `points` without
        name + what: OURS + kind + start
        for what, start in (("", ""), (", learned digits", " --start {noise}"),
                            (", from vectors", " --start {learned}"))
        for name, kind in (("leviathan", ""), ("points", " --generator points"))},
    "dtype": THREE | {f"{name}, float32": f"{flags} --dtype float32" for name, flags in THREE.items()},
    "width": THREE | {f"leviathan, mode width {r}": f"{OURS} --mode-width {r}" for r in (16, 64)},
    "rate": THREE | {f"{name}, {rate:g}": f"{flags} --learning-rate {rate:g}"
                     for name, flags in THREE.items() for rate in (2e-3, 4e-3, 8e-3)},
    "pace": TWINS | CONTROL | {"leviathan": OURS, "lev": f"{OURS} --generator lev"} | {
        f"{name}, {x} and {y}": f"{flags} --start {{pace@{x},{y}}}"
        for name, flags in (("leviathan", OURS), ("lev", f"{OURS} --generator lev"))
        for x, y in ((0.02, 0.09), (0.1, 0.09), (0.5, 0.09), (2, 0.09), (0.5, 0.27))} | {
        f"control, {x}": f"--model dense-untied --start {{table@{x}}}" for x in (0.02, 0.1, 1)} | {
        f"leviathan, from vectors, {x}": f"{OURS} --start {{learned@{x}}}" for x in (0.1, 0.2, 0.5, 1)},
    "warmup": THREE | {f"{name}, {steps}": f"{flags} --warmup-steps {steps}"
                       for name, flags in THREE.items() for steps in (60, 180)},
}
SWEEPS = {"width", "rate", "warmup"}     # of one seed, in a table alone: what is best is then repeated
MAKING = Lock()


# ---- runs --------------------------------------------------------------------------------------------------

def ready(flags: list[str], out: Path) -> list:
    """The flags with a file for each {name}. Makes it, and the default data, where it is not there."""
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag[:2] == "--" else [flag])]
    given = dict(zip(flags, flags[1:]))                 # behind a flag stands its value
    data, d_seed = given.get("--data", Training.data), int(given.get("--d-seed", Config.d_seed))
    preset = PRESETS.get(given.get("--preset"), PRESETS[Training.preset])   # an unknown one train.py refuses
    d_model = int(given.get("--d-model", preset["d_model"]))
    with MAKING:
        if data == Training.data:
            prepare_stdlib(data)
        for i, flag in [(i, flag[1:-1]) for i, flag in enumerate(flags) if flag[:1] == "{"]:
            name, _, scale = flag.partition("@")
            if name not in ("pace", *STARTS):
                raise ValueError(f"unknown start {{{flag}}}: choose from {', '.join(STARTS)}, or name a file")
            kind, which = given.get("--generator", Config.generator), read_meta(data)["identity"][:8]
            flags[i] = out / "starts" / f"{Path(data).name}-{which}-{flag}-{kind}-{d_seed}-{d_model}.pt"
            if flags[i].exists():
                continue
            if name == "pace":
                x, y = map(float, scale.split(","))
                flags[i].parent.mkdir(parents=True, exist_ok=True)
                made = GENERATORS[kind](len(read_counts(data)), d_model, d_seed=d_seed)
                save_tensors({"embed_tokens.codebooks": x * made.codebooks.data,
                              "embed_tokens.seed_proj.weight": y * made.seed_proj.weight.data}, flags[i])
            else:
                how = dict(model="lev" if kind == "lev" else "leviathan") | STARTS[name]
                how |= dict(scale=float(scale)) if scale else {}
                addresses.write(flags[i], data, d_seed=d_seed, d_model=d_model, **how)
    return flags


def run(flags: str, seed: int, shared: str, out: Path, threads: int, deadline: float) -> dict | None:
    """One run, made if it is not there. -> settings, "folder", evaluations as "log"; None: no time for it"""
    slug = re.sub("[^a-z0-9.]+", "-", flags.removeprefix("--model ")).strip("-")
    folder, file = (out / "runs" / f"{slug}.seed-{seed}{suffix}" for suffix in ("", ".jsonl"))
    if new := not file.exists():
        if time.monotonic() > deadline:
            return None
        given = [*ready(shlex.split(f"{shared} {flags}"), out), "--seed", str(seed), "--out", folder,
                 *["--resume"] * folder.exists()]       # a run that was stopped
        env = os.environ | dict(OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT))
        done = subprocess.run([sys.executable, TRAIN, "--save-every", "1000000", *given], capture_output=True,
                              text=True, env=env)
        if done.returncode:
            reason = (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ValueError(f"the run {flags!r} of seed {seed} failed: {reason}")
        checkpoint = newest_checkpoint(folder)
        about = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        if about["step"] < about["training"]["steps"]:  # Ctrl-C reaches it too
            raise ValueError(f"the run {flags!r} of seed {seed} was stopped: the same command goes on")
        head = dict(flags=flags, shared=shared, seed=seed, parameters=load(checkpoint).parameters_by_part(),
                    config=about["config"], training=about["training"], data=about["data"])
        with written_whole(file) as path:
            lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text(json.dumps(head) + "\n" + "".join(line for line in lines if "val_loss" in line))
        (checkpoint / "optimizer.pt").unlink()
    with naming(file, "remove it and the folder beside it, and the same command runs it again"):
        head, *log = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        log = [line for line in log if "val_loss" in line]
        if log[-1]["step"] != head["training"]["steps"]:
            raise ValueError("its last evaluation is missing")
    if new:
        print(f"{log[-1]['val_loss']:.4f}  seed {seed}  {flags}", flush=True)
    return head | dict(folder=folder, log=log)


def campaign(experiments: dict, shared: str, seeds: int, out: Path, jobs=1, minutes=float("inf")) -> dict:
    """Run what is missing of {experiment: {variant: flags}}, until the time is up. -> [runs] for the flags"""
    deadline, threads = time.monotonic() + 60 * minutes, max(1, torch.get_num_threads() // jobs)
    Path(os.path.realpath(out), "runs").mkdir(parents=True, exist_ok=True)      # what a link points to
    keys = dict.fromkeys((flags, seed) for seed in range(seeds) for name, variants in experiments.items()
                         for flags in variants.values() if seed == 0 or name not in SWEEPS)

    def attempt(key, until=deadline):
        try:
            return run(*key, shared, out, threads, until)
        except ValueError as error:                     # of a rate too high, say: the others go on
            return print(f"lab.campaign: {error}", file=sys.stderr) or error

    with locked(out), ThreadPoolExecutor(jobs) as pool:
        runs = {key: attempt(key, until=0) for key in keys}
        for (flags, _), found in runs.items():          # what is there, before hours of work
            if isinstance(found, dict):
                data = Path(found["training"]["data"])
                known = {read_meta(data)["identity"], None} if data.exists() else {found.get("data")}
                if (found["flags"], found["shared"]) != (flags, shared) or found.get("data") not in known:
                    raise ValueError(f"{found['folder']}.jsonl is of --train {found['shared']!r}, not "
                                     f"{shared!r}, or of what was in {data} before: change --out")
        missing = [key for key, found in runs.items() if found is None]
        runs |= zip(missing, pool.map(attempt, missing))
    failed = [key for key, found in runs.items() if isinstance(found, ValueError)]
    if failed and len(failed) == len(runs):
        raise runs[failed[0]]
    runs = {key: found for key, found in runs.items() if key not in failed}
    if None in runs.values():
        print(f"{[*runs.values()].count(None)} runs had no time: the same command goes on")
    return {name: {variant: own for variant, flags in variants.items()
                   if (own := [runs[flags, seed] for seed in range(seeds) if runs.get((flags, seed))])}
            for name, variants in experiments.items()}


# ---- what came out -----------------------------------------------------------------------------------------

def spread(values, sign: str = "") -> str:
    return f"{np.mean(values):{sign}.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def as_table(variants: dict) -> str:
    """Markdown: last validation losses, and how much they differ from the first variant's, seed by seed."""
    first = next(iter(variants))
    base = {run["seed"]: run["log"][-1]["val_loss"] for run in variants[first]}
    rows = [f"| variant | parameters, M | embedding, M | validation loss | minus {first} | seeds |",
            "|---" * 6 + "|"]
    for name, runs in variants.items():
        parts, losses = runs[0]["parameters"], [run["log"][-1]["val_loss"] for run in runs]
        gaps = [loss - base[run["seed"]] for loss, run in zip(losses, runs) if run["seed"] in base]
        rows.append(f"| {name} | {sum(parts.values()) / 1e6:.2f} | {parts['embedding'] / 1e6:.2f} "
                    f"| {spread(losses)} | {spread(gaps, '+') if gaps and name != first else ''} "
                    f"| {len(runs)} |")
    return "\n".join(rows)


def draw(variants: dict, path: Path, title: str):
    """Validation loss against tokens: means, and bands from the lowest seed to the highest."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(8, 4), layout="constrained")
    ax = fig.subplots()
    tables = cycle((dict(color="0.55"), dict(color="0.15"), dict(color="0.15", ls="--")))
    generators, ends = (dict(color=f"C{i}") for i in count()), []
    for name, runs in variants.items():
        style = next(generators if runs[0]["config"]["model"] == "leviathan" else tables)
        steps = np.array([line["step"] for line in runs[0]["log"]])
        losses = np.array([[line["val_loss"] for line in run["log"]] for run in runs])
        tokens = steps * runs[0]["training"]["tokens_per_step"] / 1e6
        ax.plot(tokens, losses.mean(0), marker="o", ms=3, **style)
        ax.fill_between(tokens, losses.min(0), losses.max(0), alpha=0.2, lw=0, color=style["color"])
        ends.append((losses[:, -1].mean(), name, style["color"]))
    ax.set(xlabel="million training tokens", ylabel="validation loss, nats per token")
    ax.spines[["top", "right"]].set_visible(False)
    place, line = 0, np.ptp(ax.get_ylim()) / 18
    for loss, name, color in sorted(ends):              # each name where its curve ends, or above another
        place = max(loss, place + line)
        ax.annotate(f"{name}  {loss:.3f}", (1.02, place), xycoords=ax.get_yaxis_transform(), color=color,
                    va="center", annotation_clip=False)
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description="Paired runs of train.py.", allow_abbrev=False)
    parser.add_argument("--experiments", nargs="+", default=["first-run"], choices=EXPERIMENTS,
                        metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant [%(default)s]")
    parser.add_argument("--train", default="", metavar="FLAGS", help="of train.py that all share, in quotes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the cores [%(default)s]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--out", type=Path, default=Path("out/campaign"), help="[%(default)s]")
    args = parser.parse_args()
    if min(args.seeds, args.jobs) < 1:
        raise ValueError("--seeds and --jobs must be at least 1")
    wanted = {name: EXPERIMENTS[name] for name in args.experiments}
    found = campaign(wanted, args.train, args.seeds, args.out, args.jobs, args.minutes)
    tables = []
    for name, variants in found.items():
        if variants:
            t = next(iter(variants.values()))[0]["training"]
            title = (f"{name}: {t['preset']}, {t['steps']:,} steps of {t['tokens_per_step']:,} tokens, "
                     f"{Path(t['data']).name}")
            tables.append(f"{title}\n\n{as_table(variants)}\n")
            if name not in SWEEPS:
                draw(variants, args.out / f"{name}.png", title)
    if tables:
        (args.out / "tables.md").write_text("\n".join(tables), encoding="utf-8")
        print("\n" + "\n".join(tables))
    if lost := [f"{name}: {variant}" for name, own in wanted.items() for variant in own.keys() - found[name]]:
        raise ValueError(f"no run of {'; '.join(sorted(lost))}: the same command tries again")


if __name__ == "__main__":
    command("lab.campaign", main)
