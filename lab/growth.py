"""How the cost of an input embedding grows with tokens, vocabulary, mode width and D.

    python -m lab.growth --json growth.json --plot growth.png

Forward and backward of generators and of a table: contests of bench.py, along axes that cross at one point.
"""
import argparse
import json
from pathlib import Path

import torch

from bench import CUDA, contest, natural_windows, piece
from lab import command
from leviathan import Config
from prepare_pile import written_whole
from train import choose_device

AXES = dict(tokens=(1 / 4, 1, 4, 16, 64), vocab_size=(1 / 24, 1 / 4, 1, 5),         # times where they cross
            mode_width=(1 / 64, 1 / 8, 1, 4), d_model=(1, 2, 4, 8))
LABELS = dict(tokens="tokens at once", vocab_size="vocabulary V", mode_width="mode width r", d_model="D")
EMBEDDINGS = {"v1, width 1": dict(generator="v1", mode_width=1), "v1": dict(generator="v1"),
              "lev": dict(generator="lev"), "table": {}}
WINDOW = 128


def contests(crossing: dict, axes: list[str]):
    """Yields each point once, with {name: settings} of the embeddings that meet there. Raises ValueError."""
    seen = []
    for axis, factor in [(name, factor) for name in axes for factor in AXES[name]]:
        point = crossing | {axis: max(1, round(crossing[axis] * factor))}
        if point in seen:
            continue
        seen.append(point)
        config = Config(**{name: value for name, value in point.items() if name != "tokens"})
        given = dict(windows=natural_windows(point["tokens"], config.vocab_size, WINDOW), dtype="float32")
        yield point, {name: given | dict(config=Config(**vars(config) | variant),
                                         kind="table" if name == "table" else "generator")
                      for name, variant in EMBEDDINGS.items()}


def plot(rows: list[dict], crossing: dict, axes: list[str], path: Path, title: str):
    """Above, seconds; below, peak memory; an axis of growth in each column."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator
    figure = Figure(figsize=(1.5 + 2.9 * len(axes), 5.6), layout="constrained")
    grid = figure.subplots(2, len(axes), sharex="col", sharey="row", squeeze=False)
    for column, axis in zip(grid.T, axes):
        others = crossing.keys() - {axis}
        on_axis = [r for r in rows if all(r["point"][other] == crossing[other] for other in others)]
        for ax, key, unit in zip(column, ("seconds", "peak_bytes"), (1, 1e9)):
            for name, style in zip(EMBEDDINGS, ("C0o-", "C1o-", "C2o-", "C7o--")):
                line = sorted((r["point"][axis], r[key] / unit) for r in on_axis if r["name"] == name)
                ax.plot([x for x, _ in line], [y for _, y in line], style, ms=4, label=name)
            ax.set(xscale="log", yscale="log", xticks=sorted({r["point"][axis] for r in on_axis}))
            ax.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.grid(alpha=0.3)
        column[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        column[1].yaxis.set_major_formatter("{x:g}")
        column[1].yaxis.set_minor_formatter(NullFormatter())
        column[1].set_xlabel(LABELS[axis])
    grid[0, 0].set_ylabel("seconds, forward + backward")
    grid[1, 0].set_ylabel("peak memory, GB")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=8)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def main():
    parser = argparse.ArgumentParser(prog="lab.growth", description=__doc__.splitlines()[0],
                                     allow_abbrev=False)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="[all]")
    parser.add_argument("--tokens", type=int, default=4_096, help="where axes cross [%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=200_019, help="likewise [%(default)s]")
    parser.add_argument("--mode-width", type=int, default=64, help="likewise [%(default)s]")
    parser.add_argument("--d-model", type=int, default=256, help="likewise [%(default)s]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if CUDA else "cpu")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each embedding [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="write what was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", required=True, help="draw it, as .png")
    args = parser.parse_args()
    for path in (args.json, args.plot):
        if path.exists() or not path.parent.is_dir():
            raise ValueError(f"{path} is there already, or its folder is not: name another file")
    if args.rounds < 1 or args.plot.suffix != ".png" or args.tokens % (4 * WINDOW):
        raise ValueError("--rounds must be at least 1, --plot end in .png, and --tokens be a multiple of "
                         f"{4 * WINDOW}")
    device = choose_device(args.device)
    crossing = {name: getattr(args, name) for name in AXES}

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    setting = (f"{device.type} ({machine}), torch {torch.__version__}, float32; axes cross at "
               + ", ".join(f"{name} {value:,}" for name, value in crossing.items()))
    rows = []
    for point, contestants in list(contests(crossing, args.axes)):
        new = contest(piece, contestants, device, args.rounds)
        rows += [row | dict(point=point) for row in new]
        print(", ".join(f"{name} {value:,}" for name, value in point.items()) + ": "
              + ", ".join(f"{row['name']} {row['seconds']:.4f} s" for row in new), flush=True)
        with written_whole(args.json) as partial:
            partial.write_text(json.dumps(dict(setting=setting, rows=rows), indent=1), encoding="utf-8")
    plot(rows, crossing, args.axes, args.plot, setting)


if __name__ == "__main__":
    command("lab.growth", main)
