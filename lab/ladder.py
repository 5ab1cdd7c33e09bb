"""The paper in miniature: models whose table is from eight times to once as large as their body.

    python prepare_pile.py --input texts/ --val val.jsonl.zst --vocab-size 8192 --out data/prose
    python -m lab.ladder --data data/prose --jobs 2             # -> OUT/tables.md, OUT/ladder.png ...

A rung is a width D and a depth L. The table has V / (16 D L) times the body's numbers; a run sees 20 tokens
for each parameter of the untied twin [R, from v2], whatever its model. On the smallest rung each model finds
its own rate, then its own warm-up, on one seed; on the others it has the same, the rate times 32 / D. One
more rung, of --wide, is the smallest with a larger vocabulary, whose losses no law can compare with these.
"""
import argparse
import math
import shlex
import time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch

from lab import command
from lab.addresses import BASE
from lab.campaign import CONTROL, OURS, TWINS, as_table, campaign, spread
from leviathan import GENERATORS
from prepare_pile import read_counts

V, TOKENS = 8_192, 8_192                                        # of the vocabulary; of a step
RUNGS = {64: (32, 2), 128: (64, 2), 256: (64, 4), 512: (64, 8)}                     # D L: D, L
RATES, WARMUPS = (5e-3, 1e-2, 2e-2, 4e-2), (0.25, 0.1, 0.5)     # at D = 32; shares of the steps


def recipe(d_model: int, n_layers: int, rate: float, warmup: float, vocab_size: int = V) -> str:
    """Flags of a rung, the same for all its models but for the rate at D = 32 and the share of warm-up."""
    steps = round(20 * (2 * vocab_size * d_model + 16 * d_model**2 * n_layers) / TOKENS)
    return (f"--d-model {d_model} --n-layers {n_layers} --seq-len 128 --tokens-per-step {TOKENS} "
            f"--steps {steps} --warmup-steps {round(warmup * steps)} --learning-rate {rate * 32 / d_model:g}")


def generator(name: str, share: float, d_model: int, vectors=False, vocab_size: int = V, **settings) -> str:
    """Flags of a generator with d_seed = D and the mode width that gives it about this share of a table."""
    settings = dict(d_seed=d_model) | settings
    def size(r: int) -> int:
        made = GENERATORS[name](vocab_size, d_model, mode_width=r, base=BASE if vectors else None, **settings)
        return sum(p.numel() for p in made.parameters())
    with torch.device("meta"):
        width = 1 + round((share * vocab_size * d_model - size(1)) / (size(2) - size(1)))
    flags = [f"--{flag.replace('_', '-')} {value}" for flag, value in settings.items()]
    return " ".join([OURS, "--generator", name, *flags, "--mode-width", str(max(1, width)),
                     *["--start {learned}"] * vectors])


def models(d_model: int, vocab_size: int = V) -> dict[str, str]:
    """Flags of those that are swept. Generators have about a twentieth or a fifth of the table's numbers."""
    control = {name: f"{flags} --d-seed {d_model}" for name, flags in CONTROL.items()}      # of such vectors
    found = TWINS | control | {"bits of the id": f"{OURS} --generator bits"}
    for name in ("v1", "lev"):
        for share in (20, 5):
            found[f"{name}, 1/{share}"] = generator(name, 1 / share, d_model, vocab_size=vocab_size)
        found[f"{name}, 1/5, from vectors"] = generator(name, 1 / 5, d_model, True, vocab_size)
    return found


def relatives(d_model: int) -> dict[str, dict[str, str]]:
    """{one of the swept: what has its rate and warm-up, but for one thing}: what decides? And five attempts
    to win, each with the reason that was written down before."""
    D, known = d_model, models(d_model)
    fine = f"{OURS} --generator v1 --d-seed {D} --mode-width 1 --start {{fine}}"
    hasty = f" --start {{pace@0.02,{D**-0.5:.2g}}}"     # the start that results/ladder/hasty was made with
    return {
        "dense": {"dense, deepened": known["dense"] + " --isoparametric"},          # what tying saves buys it
        "v1, 1/5": {
            "v1, 1/5, deepened": known["v1, 1/5"] + " --isoparametric",
            "v1, 1/5, uncentred": known["v1, 1/5"] + " --no-centred",
            "v1, 1/5, two digits": generator("v1", 1 / 5, D, n_coords=2),           # fewer share a row
            "v1, 1/5, half the factors": generator("v1", 1 / 5, D, d_seed=D // 2),
            "v1, 1/5, twice the factors": generator("v1", 1 / 5, D, d_seed=2 * D),
            "v1, 1/5, eight knots": generator("v1", 1 / 5, D, n_knots=8),
            "additive, 1/5": generator("additive", 1 / 5, D),                       # no product
            "v1, 1/1": generator("v1", 1, D),                       # as many numbers as the table has
            "v1, 1/5, hasty": known["v1, 1/5"] + hasty},
        "lev, 1/5": {
            "lev, 1/5, deepened": known["lev, 1/5"] + " --isoparametric",
            "lev, 1/5, hasty": known["lev, 1/5"] + hasty},
        "v1, 1/5, from vectors": {
            "v1, 1/5, learned digits": known["v1, 1/5, from vectors"].replace("{learned}", "{noise}"),
            "points, from vectors": f"{OURS} --generator points --d-seed {D} --start {{learned}}",  # no modes
            # 1. A sum is additive quantisation's own form: what the vectors know is in reach from the start.
            "additive, 1/5, from vectors": generator("additive", 1 / 5, D, vectors=True),
            # 2. As large as the control: if what is lacking is size, here it is not.
            "v1, 1/1, from vectors": generator("v1", 1, D, vectors=True),
            # 4. Number 3 again, with embeddings that are the vectors from the first step on, as v1's can be.
            "v1, 1/5, from vectors, deepened": known["v1, 1/5, from vectors"] + " --isoparametric",
            # 5. What modes add to vectors is noise at first: as many numbers, but as digits of 512 values.
            "v1, fine digits, from vectors": fine,
            "v1, fine digits, from vectors, deepened": fine + " --isoparametric"},
        # 3. The paper's own bargain, what the table saves spent on depth, with all that vectors know.
        "lev, 1/5, from vectors": {
            "lev, 1/5, from vectors, deepened": known["lev, 1/5, from vectors"] + " --isoparametric"}}


NAMES = [*models(32), *(name for others in relatives(32).values() for name in others)]


def sweep(run, names) -> tuple[dict[str, tuple[float, float]], str]:
    """Each one's best rate on the smallest rung, then its best warm-up; and a table."""
    flags = {name: own for name, own in models(RUNGS[64][0]).items() if name in names}
    best = dict.fromkeys(flags, (RATES[1], WARMUPS[0]))
    table = ["| model | rate | warm-up | loss |", "|---" * 4 + "|"]
    for place, values in enumerate((RATES, WARMUPS)):
        tried = {name: [(*own[:place], value, *own[place + 1:]) for value in values]
                 for name, own in best.items()}
        found = run({name: {own: f"{flags[name]} {recipe(*RUNGS[64], *own)}" for own in tried[name]}
                     for name in best}, 1)
        losses = {name: {own: runs[0]["log"][-1]["val_loss"] for own, runs in variants.items()}
                  for name, variants in found.items()}
        best = {name: min(own, key=own.get) for name, own in losses.items() if own}
        table += [f"| {name} | {rate:g} | {warmup:g} | {loss:.3f} |"
                  for name, own in losses.items() for (rate, warmup), loss in own.items()]
    return best, "\n".join(table)


def experiments(rungs: list[int], best: dict, names) -> dict[str, dict[str, str]]:
    """{rung: {model: flags}} for those whose rate is known."""
    found = {}
    for D, L in map(RUNGS.get, rungs):
        found[f"D {D}, L {L}"] = own = {}
        made = {name: {name: flags} for name, flags in models(D).items()}
        for swept, others in relatives(D).items():
            made[swept] |= {name: own for name, own in others.items() if D * L == 64 or "deepened" in name}
        for swept, group in made.items():
            own |= {name: f"{flags} {recipe(D, L, *best[swept])}" for name, flags in group.items()
                    if name in names and swept in best}
    return found


def wide(data: str, best: dict, names) -> dict[str, dict[str, str]]:
    """The same for the smallest rung with the vocabulary of other data, of those that are swept."""
    (D, L), vocab_size = RUNGS[64], len(read_counts(data))
    return {f"D {D}, L {L}, V {vocab_size:,}": {
        name: f"{flags} {recipe(D, L, *best[name], vocab_size)} --data {shlex.quote(data)}"
        for name, flags in models(D, vocab_size).items() if name in names and name in best}}


# ---- what came out -----------------------------------------------------------------------------------------

def by_size(found: dict, name: str) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """A model on the rungs that have it. -> parameters (rungs), last losses {seed that all have: (rungs)}"""
    rungs = [variants[name] for variants in found.values() if name in variants]
    sizes = np.array([sum(runs[0]["parameters"].values()) for runs in rungs])
    losses = [{run["seed"]: run["log"][-1]["val_loss"] for run in runs} for runs in rungs]
    seeds = set.intersection(*map(set, losses)) if losses else ()
    return sizes, {seed: np.array([own[seed] for own in losses]) for seed in sorted(seeds)}


def power_law(sizes, losses):
    """log loss = a + b log(size), by least squares. -> b, a"""
    return np.polyfit(np.log(sizes), np.log(losses), 1)


def multiples(found: dict, name: str, of: str = "dense") -> np.ndarray:
    """How many times its own size a dense model needs for the same loss. -> (seeds of both, rungs)"""
    (sizes, dense), (own_sizes, own) = by_size(found, of), by_size(found, name)
    laws = {seed: power_law(sizes, dense[seed]) for seed in own if seed in dense}
    return np.array([np.exp((np.log(own[seed]) - a) / b) / own_sizes for seed, (b, a) in laws.items()])


def repeated(found: dict) -> list[str]:
    """Names of the models that more than one rung has."""
    names = Counter(name for variants in found.values() for name in variants)
    return [name for name in next(iter(found.values())) if names[name] > 1]


def summary(found: dict) -> str:
    """Markdown: a row for each model of several rungs. The last columns: lowest and highest of the multiples
    of its size at which a dense model has the same loss."""
    rows = ["| validation loss | " + " | ".join([*found, "as tied, times", "as untied, times"]) + " |",
            "|---" * (3 + len(found)) + "|"]
    for name in repeated(found):
        losses = [[run["log"][-1]["val_loss"] for run in v.get(name, ())] for v in found.values()]
        cells = [spread(own) if own else "" for own in losses]
        for times in (multiples(found, name, of=twin) for twin in TWINS):
            cells.append(f"{times.min():.2f} to {times.max():.2f}" if times.size else "")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(found: dict, path: Path):
    """Left: loss against parameters, with a power law through each dense twin, and a band of those through
    any of its seeds. Right: the gap to the untied twin against tokens for each of its parameters, on the
    largest rung."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = fig.subplots(1, 2)
    colors = {"dense": "0.6", "dense-untied": "black", "control": "C3", "bits": "C2", "v1": "C0", "lev": "C1"}
    largest = [*found.values()][-1]
    base = {run["seed"]: run["log"] for run in largest["dense-untied"]}
    for name in repeated(found):
        kind = ("vectors" in name and "control" not in name) + 2 * ("deepened" in name)
        color = colors[name.replace(",", " ").split()[0]]
        style = dict(color=color, ms=6, marker="v" if "1/20" in name else "os^D"[kind],
                     mfc="white" if "fine" in name else color)
        sizes, losses = by_size(found, name)
        if not losses:                                  # no seed that all its rungs have
            continue
        losses = np.array([*losses.values()])           # (seeds, rungs)
        spans = losses.mean(0) - losses.min(0), losses.max(0) - losses.mean(0)
        left.errorbar(sizes / 1e6, losses.mean(0), spans, label=name, ls="" if name in TWINS else ":", lw=0.8,
                      **style)
        if name in TWINS:
            line = np.geomspace(sizes.min() / 1.2, 1.1 * max(sum(run["parameters"].values())
                                                            for run, *_ in largest.values()), 50)
            seeds = product(*([run["log"][-1]["val_loss"] for run in v[name]] for v in found.values()))
            laws = np.array([np.exp(np.polyval(power_law(sizes, own), np.log(line))) for own in seeds])
            left.plot(line / 1e6, laws.mean(0), lw=1, color=color)
            left.fill_between(line / 1e6, laws.min(0), laws.max(0), alpha=0.2, lw=0, color=color)
        own = [(run["log"], base[run["seed"]]) for run in largest.get(name, ()) if run["seed"] in base]
        if own and name != "dense-untied":
            gaps = [[a["val_loss"] - b["val_loss"] for a, b in zip(*pair)] for pair in own]
            steps = np.array([line["step"] for line in own[0][0]])
            right.plot(20 * steps / steps[-1], np.mean(gaps, axis=0), lw=0.8, **style)
    left.set(xscale="log", xlabel="million parameters", ylabel="validation loss, nats per token")
    for axis in (left.xaxis.set_major_formatter, left.xaxis.set_minor_formatter):
        axis("{x:.1g}")
    right.axhline(0, color="black", lw=0.8)
    right.set(xlabel=f"tokens for each parameter of dense-untied, {[*found][-1]}",
              ylabel="loss less that of dense-untied")
    labels = left.get_legend_handles_labels()
    fig.legend(*labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    fig.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description="The paper in miniature.", allow_abbrev=False)
    parser.add_argument("--data", required=True, help=f"a prepared folder with a vocabulary of {V:,}")
    parser.add_argument("--wide", metavar="DATA", help="one with a larger vocabulary: one rung more")
    parser.add_argument("--rungs", type=int, nargs="+", choices=RUNGS, default=[*RUNGS], help="D L [all]")
    parser.add_argument("--models", nargs="+", metavar="NAME", default=NAMES, help="as in the tables [all]")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each [%(default)s]")
    parser.add_argument("--train", default="", metavar="FLAGS",
                        help="of train.py that all share, in quotes; a rung's own follow, and win")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the cores [%(default)s]")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--out", type=Path, default=Path("out/ladder"), help="[%(default)s]")
    args = parser.parse_args()
    if min(args.seeds, args.jobs) < 1:
        raise ValueError("--seeds and --jobs must be at least 1")
    if unknown := {*args.models} - {*NAMES}:
        raise ValueError(f"unknown model {min(unknown)!r}: choose from {'; '.join(NAMES)}")
    if (n := len(read_counts(args.data))) != V:
        raise ValueError(f"{args.data} has a vocabulary of {n:,}: prepare it with --vocab-size {V}")
    if args.wide:
        read_counts(args.wide)              # raises before hours of work
    end = time.monotonic() + 60 * args.minutes

    def run(wanted: dict, seeds: int) -> dict:
        shared = f"--data {shlex.quote(args.data)} {args.train}".strip()
        return campaign(wanted, shared, seeds, args.out, args.jobs, (end - time.monotonic()) / 60)

    swept = {name for name, others in relatives(32).items() if {*others} & {*args.models}} | {*args.models}
    best, table = sweep(run, swept)
    found = run(experiments(sorted(args.rungs), best, args.models), args.seeds)
    found = {title: variants for title, variants in found.items() if variants}
    wider = run(wide(args.wide, best, args.models), args.seeds) if args.wide else {}
    tables = [f"{title}\n\n{as_table(variants)}" for title, variants in (found | wider).items() if variants]
    compared = len(found) > 2 and all({*TWINS} <= variants.keys() for variants in found.values())
    if compared:
        tables.insert(0, summary(found))
    (args.out / "sweep.md").write_text(table + "\n", encoding="utf-8")
    (args.out / "tables.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    if compared:
        draw(found, args.out / "ladder.png")
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    command("lab.ladder", main)
