"""The paper in miniature: models whose table is from eight times to once as large as their body.

    python prepare_pile.py --input texts/ --val val.jsonl.zst --vocab-size 8192 --out data/prose
    python -m lab.ladder --data data/prose --jobs 2             # -> OUT/tables.md, OUT/ladder.png ...
    python -m lab.ladder --data data/prose --rungs 64 --sweep   # rates and warm-ups of the smallest rung

A rung is a width D and a depth L. The table has V / (16 D L) times the body's numbers; a run sees 20 tokens
for each parameter of the untied twin [R, from v2], whatever its model. Rates fall as 1 / D from those below.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

from lab.addresses import BASE
from lab.campaign import CONTROL, OURS, TWINS, as_table, campaign, spread
from leviathan import GENERATORS

V, TOKENS = 8_192, 8_192                                        # of the vocabulary; of a step
RUNGS = {64: (32, 2), 128: (64, 2), 256: (64, 4), 512: (128, 4)}                    # D L: D, L
RATES = {}                                                      # at D = 32, where it is not 1e-2
WARMUP = 0.25                                                   # of the steps
SWEEP = [(5e-3, WARMUP), (1e-2, WARMUP), (2e-2, WARMUP), (1e-2, 0.1), (1e-2, 0.5)]


def recipe(d_model: int, n_layers: int, rate: float = 1e-2, warmup: float = WARMUP) -> str:
    """Flags of a rung, the same for all its models but for the rate at D = 32."""
    steps = round(20 * (2 * V * d_model + 16 * d_model**2 * n_layers) / TOKENS)
    return (f"--d-model {d_model} --n-layers {n_layers} --seq-len 128 --tokens-per-step {TOKENS} "
            f"--steps {steps} --warmup-steps {round(warmup * steps)} --learning-rate {rate * 32 / d_model:g}")


def generator(name: str, share: float, d_model: int, base: int | None = None) -> str:
    """Flags of a generator with d_seed = D and the mode width that gives it about this share of a table."""
    def size(r: int) -> int:
        made = GENERATORS[name](V, d_model, base=base, d_seed=d_model, mode_width=r)
        return sum(p.numel() for p in made.parameters())
    with torch.device("meta"):
        width = 1 + round((share * V * d_model - size(1)) / (size(2) - size(1)))
    return f"{OURS} --generator {name} --d-seed {d_model} --mode-width {max(1, width)}"


def models(d_model: int) -> dict[str, str]:
    """Flags of each. Generators have about a twentieth or a fifth of the table's numbers."""
    control = {name: f"{flags} --d-seed {d_model}" for name, flags in CONTROL.items()}      # of such vectors
    found = TWINS | control | {"bits of the id": f"{OURS} --generator bits"}
    for name in ("v1", "lev"):
        small, large = (generator(name, share, d_model) for share in (1 / 20, 1 / 5))
        learned = generator(name, 1 / 5, d_model, BASE) + " --start {learned}"
        found |= {f"{name}, 1/20": small, f"{name}, 1/5": large, f"{name}, 1/5, from vectors": learned}
    return found | {"v1, 1/5, deepened": found["v1, 1/5"] + " --isoparametric"}


def experiments(rungs: list[int], sweep: bool, names: list[str] | None = None) -> dict[str, dict[str, str]]:
    """{rung: {model: flags}}; of a sweep the name says rate and warm-up too. Raises ValueError."""
    found = {}
    for D, L in map(RUNGS.get, rungs):
        known = models(D)
        if unknown := {*(names or known)} - known.keys():
            raise ValueError(f"unknown model {min(unknown)!r}: choose from {', '.join(known)}")
        found[f"D {D}, L {L}"] = own = {}
        for name in names or known:
            for rate, warmup in SWEEP if sweep else [(RATES.get(name, 1e-2), WARMUP)]:
                title = f"{name}, rate {rate:g}, warm-up {warmup:g}" if sweep else name
                own[title] = f"{known[name]} {recipe(D, L, rate, warmup)}"
    return found


# ---- what came out -----------------------------------------------------------------------------------------

def by_size(found: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and last losses of a model on each rung that has it. -> (rungs), (rungs, seeds in common)"""
    runs = [variants[name] for variants in found.values() if name in variants]
    seeds = set.intersection(*({run["seed"] for run in own} for own in runs)) if runs else {}
    sizes = [sum(own[0]["parameters"].values()) for own in runs]
    losses = [[run["log"][-1]["val_loss"] for run in own if run["seed"] in seeds] for own in runs]
    return np.array(sizes), np.array(losses)


def power_law(sizes, losses):
    """log loss = a + b log(size), by least squares. -> b, a"""
    return np.polyfit(np.log(sizes), np.log(losses), 1)


def multiples(found: dict, name: str, of: str = "dense") -> np.ndarray:
    """How many times its own size a dense model needs for the same loss. -> (rungs, seeds in common)"""
    sizes, losses = by_size(found, of)
    own_sizes, own = by_size(found, name)
    laws = [power_law(sizes, losses[:, seed]) for seed in range(min(losses.shape[1], own.shape[1]))]
    equal = [np.exp((np.log(own[:, seed]) - a) / b) for seed, (b, a) in enumerate(laws)]
    return np.stack(equal, axis=1) / own_sizes[:, None]


def draw_sizes(found: dict, path: Path):
    """Left: loss against parameters, with a power law through each dense twin. Right: the gap to the untied
    twin against tokens for each of its parameters, on the largest rung that has it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    names = dict.fromkeys(name for variants in found.values() for name in variants)
    for i, name in enumerate(names):
        style = dict(color=f"C{i}" if i < 10 else "black", marker="os^vDP*X<>h"[i % 11])
        sizes, losses = by_size(found, name)
        left.errorbar(sizes / 1e6, losses.mean(1), np.ptp(losses, axis=1) / 2, ls="", label=name, **style)
        if name in TWINS and len(sizes) > 2:
            b, a = power_law(sizes, losses.mean(1))
            line = np.geomspace(sizes.min() / 2, sizes.max(), 50)
            left.plot(line / 1e6, np.exp(a + b * np.log(line)), lw=1, color=style["color"])
        variants = [v for v in found.values() if name in v and "dense-untied" in v][-1:]
        if variants and name != "dense-untied":
            own, base = ({run["seed"]: run for run in variants[0][key]} for key in (name, "dense-untied"))
            steps = [line["step"] for line in next(iter(base.values()))["log"] if "val_loss" in line]
            gaps = [[own[seed]["log"][step - 1]["val_loss"] - base[seed]["log"][step - 1]["val_loss"]
                     for seed in own.keys() & base.keys()] for step in steps]
            right.plot(20 * np.array(steps) / steps[-1], np.mean(gaps, axis=1), ms=3, **style)
    left.set(xscale="log", xlabel="million parameters", ylabel="validation loss, nats per token")
    labels = left.get_legend_handles_labels()
    fig.legend(*labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    right.axhline(0, color="gray", lw=0.8)
    right.set(xlabel="tokens per parameter of the untied twin", ylabel="loss minus that of dense-untied")
    fig.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description="The paper in miniature.", allow_abbrev=False)
    parser.add_argument("--data", required=True, help=f"a prepared folder with a vocabulary of {V:,}")
    parser.add_argument("--rungs", type=int, nargs="+", choices=RUNGS, default=[*RUNGS], help="D L [all]")
    parser.add_argument("--sweep", action="store_true", help="of rate and warm-up, one seed")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of those in the tables [all]")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the cores [%(default)s]")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--out", type=Path, default=Path("out/ladder"), help="[%(default)s]")
    args = parser.parse_args()
    if min(args.seeds, args.jobs) < 1:
        raise ValueError("--seeds and --jobs must be at least 1")
    wanted = experiments(args.rungs, args.sweep, args.models)
    found = campaign(wanted, f"--data {args.data}", args.seeds, args.out, args.jobs, args.minutes)
    found = {title: variants for title, variants in found.items() if variants}
    tables = "\n\n".join(f"{title}\n\n{as_table(variants)}" for title, variants in found.items())
    for name in () if args.sweep else {name: 0 for variants in found.values() for name in variants}:
        if len(by_size(found, "dense")[0]) > 2 and name not in TWINS:
            size = spread(multiples(found, name).ravel())
            tables += f"\n\n{name}: as good as a tied model of {size} times its parameters"
    print("\n" + tables)
    (args.out / f"{'sweep' if args.sweep else 'tables'}.md").write_text(tables + "\n", encoding="utf-8")
    if found and not args.sweep:
        draw_sizes(found, args.out / "ladder.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"lab.ladder: {error}")
