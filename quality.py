"""What is learned: paired runs of train.py, their tables and figures. `python bench.py quality` calls this.

An experiment is a few variants, each some flags of train.py on top of what all share. Every variant runs once for each seed:
same tokens in the same order, same blocks and head at the start. Runs are JSON lines in OUT/runs, and one that is there is not
run again, so a campaign can be stopped and gone on with. Its model stays beside it, for sample.py and new_tokens.py.
"""
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common import InputError, choose_device
from eval import TOKENS_AT_ONCE, frequency_groups, token_losses
from leviathan import Config, LanguageModel
from prepare_pile import prepare_stdlib
from shards import Windows
from train import DEFAULT_DATA

HERE = Path(__file__).parent
BODY = {"dense": "--model dense", "dense-untied": "--model dense-untied"}
CONTROL = {"dense-untied, from vectors": "--model dense-untied --start vectors"}       # the same knowledge in a table
V1 = "--generator v1 --mode-width 8"    # the cheapest reading, on which one thing at a time is changed
SMALLEST = "--base 21"                  # with three digits, of a vocabulary of 8,192
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
EXPERIMENTS = {
    "rate": {f"{name}, {rate:g}": flags if rate == 4e-3 else f"{flags} --learning-rate {rate:g}".strip() for name, flags in (
        BODY | CONTROL | {"paper v1, width 8": f"--paper {V1}", "v1, width 8": V1, "ours": ""}).items() for rate in RATES},
    "iso-body": BODY | CONTROL | {
        "paper v1, width 1": "--paper --generator v1 --mode-width 1", "paper v1, width 8": f"--paper {V1}",
        "paper v1, width 64": "--paper --generator v1 --mode-width 64", "paper lev, width 64": "--paper --mode-width 64",
        "ours": ""},
    "reading": BODY | CONTROL | {           # from the literal reading to ours, one step at a time
        "literal, splines decayed": f"--paper {V1} --decay-splines", "literal": f"--paper {V1}",
        "centred, small start": f"{V1} --addresses id", "learned addresses": f"{V1} {SMALLEST} --start noise",
        "base 256": f"{V1} --start noise", "start from vectors": V1, "lev": "--mode-width 8", "width 32 (ours)": ""},
    "addresses": BODY | CONTROL | {
        "id": f"{V1} --addresses id", "shuffled": f"{V1} --addresses shuffled", "frequency": f"{V1} --addresses frequency",
        "learned": f"{V1} {SMALLEST} --start noise", "id, from vectors": f"{V1} {SMALLEST} --addresses id --start vectors",
        "learned, from vectors": f"{V1} {SMALLEST}", "the same, base 64": f"{V1} --base 64", "the same, base 256": V1},
    "digits": BODY | CONTROL | {f"k = {k}, {name}": " ".join(f"{V1} {flags} {'' if k == 3 else f'--n-coords {k}'}".split())
               for name, flags in (("id", "--addresses id"), ("learned, from vectors, base 256", "")) for k in (1, 2, 3, 4)},
    "isoparametric": BODY | CONTROL | {"v1, width 8": V1, "v1, width 8, deepened": f"{V1} --isoparametric"},    # ours: by no layer
    "scale": {"dense": "--model dense"} | {f"dense, D = {d}": f"--model dense --d-model {d}" for d in (64, 192)} | {"ours": ""},
    "vocabulary": BODY | CONTROL | {"ours": ""},            # what matters most, for data of another vocabulary
}
ONE_SEED = {"rate", "digits"}   # sweeps, of which only the best is repeated


@torch.no_grad()
def by_frequency(model: LanguageModel, training: dict) -> list[dict]:
    """Validation loss by how often the run has seen a token: never, or by decile of the tokens it has seen, rarest first.

    Once with the token as target, once as the last of the context, whose embedding the generator makes.
    """
    T, V = model.config.seq_len, model.config.vocab_size
    stream, val = (Windows(training["data"], split, T) for split in ("train", "val"))
    positions = np.arange(training["steps"] * training["tokens_per_step"] // T)
    seen = sum(np.bincount(stream.shuffled(part, training["seed"])[:, :-1].ravel(), minlength=V)
               for part in np.array_split(positions, len(positions) // 256 + 1))
    groups = frequency_groups(seen)
    sums = {role: np.zeros((11, 2)) for role in ("target", "input")}
    n = min(len(val), max(1, 4 * training["eval_tokens"] // T))      # more than train.py takes, for the sake of rare tokens
    evaluated = np.linspace(0, len(val) - 1, n).astype(int)
    for part in np.array_split(evaluated, min(n, -(-n * T // TOKENS_AT_ONCE))):
        windows = torch.from_numpy(np.stack([val[i] for i in part]))
        ids, targets = windows[:, :-1], windows[:, 1:]
        losses = token_losses(model, ids, targets)[0].double().flatten().numpy()
        for role, tokens in (("target", targets), ("input", ids)):
            np.add.at(sums[role], groups[tokens.flatten().numpy()], np.stack([losses, np.ones_like(losses)], axis=1))
    return [dict(role=role, decile=d, tokens=int(n), loss=total / n if n else None)
            for role, table in sums.items() for d, (total, n) in enumerate(table)]


def run(flags: str, seed: int, shared: str, folder: Path, threads: int, deadline: float) -> list[dict] | None:
    """One run, made if it is not there. -> a line that describes it, then train.py's line for each step; None: no time for it"""
    file = folder / f"{re.sub('[^a-z0-9.]+', '-', flags.replace('--model', '')).strip('-') or 'default'}.seed-{seed}.jsonl"
    if not file.exists():
        if time.monotonic() > deadline:
            return None
        scratch = folder / f"{file.stem}.running"
        shutil.rmtree(scratch, ignore_errors=True)
        command = [*shlex.split(shared), *flags.split(), "--seed", str(seed), "--out", scratch, "--save-every", "1000000"]
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, HERE / "train.py", *command], capture_output=True, text=True,
                              env=os.environ | dict(OMP_NUM_THREADS=str(threads)))
        seconds = time.perf_counter() - begun
        if done.returncode:
            reason = (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]
            raise InputError(f"the run {flags!r} of seed {seed} failed: {reason}")
        checkpoint = next(scratch.glob("step-*"))
        about = json.loads((checkpoint / "config.json").read_text())
        if about["step"] < about["training"]["steps"]:      # Ctrl-C reaches it too
            raise InputError(f"the run {flags!r} of seed {seed} was stopped: the same command goes on")
        model = LanguageModel.from_checkpoint(checkpoint, choose_device(about["training"]["device"], 0)).eval()
        head = dict(flags=flags, shared=shared, seed=seed, seconds=seconds, parameters=model.parameters_by_part(),
                    config=about["config"], training=about["training"], by_frequency=by_frequency(model, about["training"]))
        partial, kept = file.with_suffix(".tmp"), file.with_suffix("")
        partial.write_text(json.dumps(head) + "\n" + (scratch / "log.jsonl").read_text())
        (checkpoint / "optimizer.pt").unlink()
        shutil.rmtree(kept, ignore_errors=True)
        scratch.rename(kept)                        # the model stays beside its numbers
        os.replace(partial, file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if lines[0]["shared"] != shared:
        raise InputError(f"{file} was run with --train {lines[0]['shared']!r}, not {shared!r}: name another --out")
    print(f"{lines[-1]['val_loss']:.4f}  {lines[0]['seconds']:5.0f} s  seed {seed}  {flags}", flush=True)
    return lines


def campaign(names: list[str], shared: str, seeds: int, out: Path, jobs: int, minutes: float) -> dict:
    """Run what is missing, until the time is up. -> {experiment: {variant: [lines of each seed's run]}} of what is there"""
    deadline = time.monotonic() + 60 * minutes
    if "--data" not in shared and not Path(DEFAULT_DATA).exists():
        prepare_stdlib(Path(DEFAULT_DATA))      # before several runs would
    (out / "runs").mkdir(parents=True, exist_ok=True)
    wanted = [(name, variant, seed) for seed, name in itertools.product(range(seeds), names)
              if not seed or name not in ONE_SEED for variant in EXPERIMENTS[name]]
    with ThreadPoolExecutor(jobs) as pool:
        futures = {}
        for name, variant, seed in wanted:
            key, threads = (EXPERIMENTS[name][variant], seed), max(1, (os.cpu_count() or 1) // jobs)
            futures[key] = futures.get(key) or pool.submit(run, *key, shared, out / "runs", threads, deadline)
        try:
            results = {key: future.result() for key, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = {name: {variant: [] for variant in EXPERIMENTS[name]} for name in names}
    for name, variant, seed in wanted:
        if lines := results[EXPERIMENTS[name][variant], seed]:
            found[name][variant].append(lines)
    missing = sum(lines is None for lines in results.values())
    if missing:
        print(f"{missing} runs had no time: the same command goes on")
    return {name: {variant: runs for variant, runs in variants.items() if runs} for name, variants in found.items()}


# ---- what came out ---------------------------------------------------------------------------------------------------

def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def as_table(variants: dict) -> str:
    """Markdown: last validation loss, and its difference to the first variant's, paired by seed; ± one standard deviation."""
    first = next(iter(variants))
    lines = [f"| variant | embedding, M parameters | validation loss | to {first} | seeds |", "|---|---|---|---|---|"]
    for name, runs in variants.items():
        losses = [run[-1]["val_loss"] for run in runs]
        gaps = [loss - run[-1]["val_loss"] for loss, run in zip(losses, variants[first])]
        embedding = next(iter(runs[0][0]["parameters"].values())) / 1e6
        lines.append(f"| {name} | {embedding:.2f} | {spread(losses)} | {spread(gaps) if name != first else ''} | {len(runs)} |")
    return "\n".join(lines)


def frequency_table(variants: dict, role: str) -> str:
    """Markdown: loss less the first variant's by how often a run has seen the input or target token; ± one standard deviation."""
    groups = {"never seen": (0,), "rarest 3 deciles": (1, 2, 3), "deciles 4 to 9": (4, 5, 6, 7, 8, 9), "most frequent tenth": (10,)}

    def losses(run):            # -> (groups) loss and tokens
        rows = [[line for line in run[0]["by_frequency"] if line["role"] == role and line["decile"] in deciles and line["tokens"]]
                for deciles in groups.values()]
        tokens = np.array([sum(line["tokens"] for line in lines) for lines in rows])
        total = np.array([sum(line["tokens"] * line["loss"] for line in lines) for lines in rows])
        return np.divide(total, tokens, out=np.full(len(rows), np.nan), where=tokens > 0), tokens

    first, *others = variants
    tokens = np.mean([losses(run)[1] for run in variants[first]], axis=0)
    lines = [f"| {role} token | " + " | ".join(f"{name} ({n:,.0f})" for name, n in zip(groups, tokens)) + " |", "|---" * 5 + "|"]
    for name in others:
        gaps = np.array([losses(run)[0] - losses(base)[0] for run, base in zip(variants[name], variants[first])])
        lines.append(f"| {name} | " + " | ".join(spread(list(gap)) for gap in gaps.T) + " |")
    return "\n".join(lines)


def figure(panels: int):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, panels, figsize=(3 + 4 * panels, 4), layout="constrained", sharey=True, squeeze=False)
    for ax in axes[0]:
        ax.set_prop_cycle(color=plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2])
    return fig, axes[0]


def finish(fig, axes, path: Path, title: str):
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=150)


def flops_per_token(run: list[dict]) -> int:
    with torch.device("meta"):
        return LanguageModel(Config(**run[0]["config"])).flops_per_token()


def plot_losses(variants: dict, path: Path, title: str):
    """Validation loss against tokens, time and, where they differ, FLOPs; the mean of the seeds, a band from lowest to highest."""
    flops = {name: flops_per_token(runs[0]) for name, runs in variants.items()}
    fig, axes = figure(2 + (len(set(flops.values())) > 1))
    from matplotlib.ticker import EngFormatter
    for name, runs in variants.items():
        steps = [[line for line in run[1:] if "val_loss" in line] for run in runs]
        losses = np.array([[line["val_loss"] for line in lines] for lines in steps])
        tokens = np.array([line["tokens"] for line in steps[0]])
        clock = np.array([np.cumsum([run[1]["tokens"] / line["tokens_per_second"] for line in run[1:]]) for run in runs]).mean(0)
        seconds = [clock[line["step"] - 1] for line in steps[0]]
        for ax, x in zip(axes, (tokens, seconds, tokens * flops[name])):
            drawn, = ax.plot(x, losses.mean(0), "o-", ms=3, label=name)
            ax.fill_between(x, losses.min(0), losses.max(0), alpha=0.2, color=drawn.get_color(), lw=0)
    axes[0].set_ylabel("validation loss, nats per token")
    for ax, label in zip(axes, ("training tokens", "seconds of training steps", "FLOPs of blocks and head")):
        ax.set_xlabel(label)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    finish(fig, axes, path, title)


def plot_frequency(variants: dict, path: Path, title: str):
    """Difference in loss to the first variant, by how often a token was seen in training; the mean of the seeds and each seed."""
    fig, axes = figure(2)
    first, *others = variants
    for ax, role in zip(axes, ("target", "input")):
        table = {name: np.array([[line["loss"] for line in run[0]["by_frequency"] if line["role"] == role] for run in runs],
                                dtype=float) for name, runs in variants.items()}
        ax.axhline(0, color="gray", lw=1)
        for name in others:
            seeds = min(len(table[name]), len(table[first]))
            gaps = table[name][:seeds] - table[first][:seeds]
            drawn, = ax.plot(range(11), gaps.mean(0), "o-", ms=3, label=name)
            for gap in gaps:
                ax.plot(range(11), gap, ".", ms=3, alpha=0.4, color=drawn.get_color())
        ax.set(title=f"by the {role} token", xlabel="never seen, then deciles of seen tokens, rarest first")
    axes[0].set_ylabel(f"loss less that of {first}")
    finish(fig, axes, path, title)


def plot_rates(variants: dict, path: Path, title: str):
    """The last validation loss against the learning rate; a line for each model."""
    fig, axes = figure(1)
    for model in dict.fromkeys(name.rsplit(", ", 1)[0] for name in variants):
        runs = [runs[0] for name, runs in variants.items() if name.rsplit(", ", 1)[0] == model]
        rates, losses = zip(*((run[0]["training"]["learning_rate"], run[-1]["val_loss"]) for run in runs))
        axes[0].plot(rates, losses, "o-", label=model)
    axes[0].set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats per token")
    axes[0].set_xticks(RATES, RATES)
    axes[0].minorticks_off()
    finish(fig, axes, path, title)


def add_arguments(parser):
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=["iso-body", "addresses"], metavar="NAME",
                        help=f"any of {', '.join(EXPERIMENTS)}; made for nano and V = 8,192")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--train", default="", metavar="FLAGS", help="flags of train.py that all runs share, in quotes")
    parser.add_argument("--quick", action="store_true", help="iso-body, smaller: one seed, 100 steps of 2,048 tokens")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="runs, tables and figures")


def main(args):
    if args.quick:
        args.experiments, args.seeds = ["iso-body"], 1
        args.train = f"--steps 100 --eval-every 25 --tokens-per-step 2048 --eval-tokens 16384 {args.train}".strip()
    if args.seeds < 1 or args.jobs < 1:
        raise InputError("--seeds and --jobs must be at least 1")
    tables = []
    for name, variants in campaign(args.experiments, args.train, args.seeds, args.out, args.jobs, args.minutes).items():
        if next(iter(EXPERIMENTS[name])) not in variants:        # what all are compared with
            continue
        flags = next(iter(variants.values()))[0][0]["training"]
        title = (f"{name}: {flags['preset']}, {flags['steps']:,} steps of {flags['tokens_per_step']:,} tokens, "
                 f"{Path(flags['data']).name}")
        (plot_rates if name == "rate" else plot_losses)(variants, args.out / f"{name}.png", title)
        tables.append(f"{title}\n\n{as_table(variants)}\n")
        if len(variants) > 1 and name != "rate":
            plot_frequency(variants, args.out / f"{name}-frequency.png", title)
            tables += [f"{title}, by frequency\n\n{frequency_table(variants, role)}\n" for role in ("input", "target")]
    print("\n" + "\n".join(tables))
    (args.out / "tables.md").write_text("\n".join(tables), encoding="utf-8")
