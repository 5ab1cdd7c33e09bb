"""Speed and memory of Leviathan beside its dense twins: `python bench.py`.

    models   a training step (forward, backward, AdamW) of each model of one shape; on a CPU in float32, and
             in bfloat16 where train.py would choose that
    pieces   the generator, and the head with its loss, beside the way in which they are usually written

Each is a contest of processes, so that a peak of memory is a contestant's own and one that fails is named and
left out. They take turns (A B C A B C ...): whatever else the machine does falls on all alike.

Ids have the statistics of text: words of Python's standard library, each hashed to one of V. Without spaces
and signs, 4,096 of them hold about 1,350 distinct ids, nearly as many as o200k_base tokens of prose, 1,500.
"""
import argparse
import functools
import json
import multiprocessing
import re
import signal
import statistics
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from leviathan import GENERATORS, Config, LanguageModel, TokenGenerator, linear_cross_entropy, softmax_
from prepare_pile import documents, quiet, stdlib_files
from train import choose_device, compile_parts, multiplies_bfloat16

MODELS = {                                      # the first is what the others are compared with
    "dense": dict(model="dense"),
    "dense-untied": dict(model="dense-untied"),
    "leviathan v1, width 1": dict(generator="v1", mode_width=1),
    "leviathan v1, width 64": dict(generator="v1", mode_width=64),
    "leviathan lev, width 64": dict(generator="lev", mode_width=64),
    "hf-llama": dict(model="dense-untied"),     # transformers' LlamaForCausalLM of the same shape
}
PIECES = [("plain generator", "generator", "compiled generator", "table"),
          ("plain head", "compiled plain head", "head", "compiled head")]
PARTS = ("embedding", "blocks", "head", "AdamW")        # where the time of a training step goes
TURN_SECONDS = 0.5                              # a turn is as many steps as begin in this time, at least one
CUDA = torch.cuda.is_available()


@functools.cache
def hashed_words() -> torch.Tensor:
    texts = (text for file in stdlib_files() for text, _ in documents(file))
    return torch.tensor([zlib.crc32(word.encode()) for text in texts for word in re.findall(r"\w+", text)])


def natural_windows(tokens: int, vocab_size: int, seq_len: int) -> torch.Tensor:
    """Ids and their targets, in windows from all over the text. -> (tokens / seq_len, seq_len + 1)"""
    words, random = hashed_words(), torch.Generator().manual_seed(0)
    if tokens < 1 or tokens % seq_len or seq_len >= len(words):
        raise ValueError(f"--tokens is {tokens}: it must be a multiple of {seq_len}, the length of a window")
    starts = torch.randint(len(words) - seq_len, (tokens // seq_len, 1), generator=random)
    return words[starts + torch.arange(seq_len + 1)] % vocab_size


# ---- measuring ---------------------------------------------------------------------------------------------

class Contestant:
    """Lives in a process of its own, where it takes the step that build(contestant, **settings) makes."""
    def __init__(self, build, settings: dict, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.step, module = build(self, **settings)
        self.facts = dict(parameters=sum(p.numel() for p in module.parameters()))

    def mark(self, part: str):
        """A part of the step ends; on CUDA by the device's own clock, so that nothing waits."""
        now = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
        self.marks.append((part, now))

    def turn(self, limit: float) -> dict:
        """As many steps as begin in `limit` seconds, at least one. -> medians of their seconds, and memory"""
        steps, begun = [], time.perf_counter()
        while not steps or time.perf_counter() - begun < limit:
            self.marks = []
            self.mark("start")
            self.step()
            if self.cuda:
                torch.cuda.synchronize()
            steps.append(Counter())
            for (_, before), (part, after) in pairwise(self.marks):
                steps[-1][part] += before.elapsed_time(after) / 1000 if self.cuda else after - before
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()            # room for the others
        else:                                   # of the whole process, at its highest; a Mac counts in bytes
            from resource import RUSAGE_SELF, getrusage  # which Windows has not
            peak = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        medians = {part: statistics.median(seconds[part] for seconds in steps) for part in steps[0]}
        return self.facts | medians | dict(seconds=sum(medians.values()), peak_bytes=peak)


def turn(limit: float, *what) -> dict:
    """What a contestant's process is asked for; the first time it is told `what` to build."""
    global contestant
    contestant = Contestant(*what) if what else contestant
    return contestant.turn(limit)


def contest(build, contestants: dict[str, dict], device: torch.device, rounds: int) -> list[dict]:
    """Let {name: settings} take turns. -> a row for each that did not fail. Raises ValueError if all do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])   # once; not us, who ask for CUDA, which survives no fork
    deaf = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))       # to Ctrl-C
    processes = {name: ProcessPoolExecutor(1, context, **deaf) for name in contestants}
    turns = {name: [] for name in contestants}  # the first is a single step, which may compile
    for _ in tqdm(range(1 + rounds), disable=quiet(), leave=False):
        for name in list(turns):
            how = (TURN_SECONDS,) if turns[name] else (0, build, contestants[name], device)
            try:
                turns[name].append(processes[name].submit(turn, *how).result())
            except Exception as error:          # whatever it is, the others go on
                tqdm.write(" ".join(f"{name} is left out: {type(error).__name__}: {error}".split())[:300])
                processes[name].shutdown()
                del turns[name]
    for process in processes.values():
        process.shutdown()                      # so that its memory is free for the next contest
    if not turns:
        raise ValueError("nothing could be measured, see above; if it was for want of memory, lower --tokens")
    rows = []
    for name, (first, *others) in turns.items():
        config, windows, dtype = (contestants[name][key] for key in ("config", "windows", "dtype"))
        row = dict(what=build.__name__, name=name, config=asdict(config), dtype=dtype,
                   tokens=windows[:, 1:].numel(), first_step=first["seconds"],
                   rounds=[turn["seconds"] for turn in others])
        row |= {key: statistics.median(turn[key] for turn in others) for key in first}
        rows.append(row | dict(tokens_per_second=row["tokens"] / row["seconds"]))
    return rows


# ---- contestants -------------------------------------------------------------------------------------------

def training_step(contestant, config: Config, windows, dtype: str, compiled: bool, hf: bool):
    c, device, mark = config, contestant.device, contestant.mark
    if hf:
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=4 * c.d_model,
            num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads))
    else:
        model = LanguageModel(c)
    inner = model.to(device).model if hf else model.to(device)
    if compiled and hf:                                 # as much of it as of ours
        for layer in inner.layers:
            layer.compile()
        model.loss_function = torch.compile(model.loss_function)
    elif compiled:
        compile_parts(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, targets = (half.contiguous().to(device) for half in (windows[:, :-1], windows[:, 1:]))

    def boundary(before: str, after: str, module, inputs, output):
        """Forward ends the part before; the gradient that arrives here, the backward of the part after."""
        mark(before)
        output.register_hook(lambda gradient: mark(after))

    inner.embed_tokens.register_forward_hook(functools.partial(boundary, "embedding", "blocks"))
    inner.norm.register_forward_hook(functools.partial(boundary, "blocks", "head"))

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = (model(ids, labels=targets, shift_labels=targets, use_cache=False).loss if hf
                    else model(ids, targets))
        mark("head")
        loss.backward()
        mark("embedding")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("AdamW")
    return step, model


class PlainGenerator(TokenGenerator):
    """The January method as it is usually written: every token, every knot, all at once."""
    def forward(self, ids):
        x = self.coordinates(self.seeds(ids.flatten()))                             # (N, d_seed)
        t = (x.unsqueeze(-1) * (self.n_knots - 1) - torch.arange(self.n_knots, device=x.device)).abs()
        basis = torch.where(t < 0.5, 0.75 - t**2, F.relu(1.5 - t)**2 / 2)           # (N, d_seed, κ)
        curves = torch.einsum("ndk,dkc->ndc", basis / basis.sum(-1, keepdim=True), self.modes.splines + 1)
        centre = 1 if self.centred else 0
        rows = self.mode_proj(curves.prod(1) - centre) + self.residual_proj(x - centre / 2)
        return rows.view(*ids.shape, -1)


def piece(contestant, config: Config, windows, dtype: str, kind: str):
    """Forward and backward of a head with its loss, of a table or of a generator, as `kind` says."""
    c, device = config, contestant.device
    ids, targets = windows[:, :-1].to(device), windows[:, 1:].flatten().to(device)
    hidden = torch.randn(len(targets), c.d_model, device=device, requires_grad=True)
    if kind.endswith("head"):
        module = torch.nn.Linear(c.d_model, c.vocab_size, bias=False)
    elif kind == "table":
        module = torch.nn.Embedding(c.vocab_size, c.d_model)
    else:
        cls = PlainGenerator if kind == "plain generator" else GENERATORS[c.generator]
        module = cls(c.vocab_size, c.d_model, mode_width=c.mode_width)
    module.to(device)
    forward = {"plain head": lambda: F.cross_entropy(module(hidden).float(), targets),
               "head": lambda: linear_cross_entropy(hidden, module.weight, targets, softmax)}.get(
        kind.removeprefix("compiled "), lambda: module(ids).sum())
    softmax = torch.compile(softmax_) if kind.startswith("compiled") else softmax_
    if kind == "compiled plain head":
        forward = torch.compile(forward)
    elif kind == "compiled generator":
        compile_parts(module)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            y = forward()
        y.backward()
        module.zero_grad(set_to_none=True)
        hidden.grad = None
        contestant.mark(kind)
    return step, module


def contests(args):
    """Yields of each contest its title, what builds a contestant, {name: settings}. Raises ValueError."""
    V, T, (first, *others) = args.vocab_size, args.seq_len, args.dtypes
    for shape in args.shape:
        if not (numbers := re.fullmatch(r"(\d+)x(\d+)", shape)):
            raise ValueError(f"--shape {shape}: write width x layers, such as 256x6")
        title = f"D = {numbers[1]}, {numbers[2]} layers"
        config = Config(d_model=int(numbers[1]), n_layers=int(numbers[2]), vocab_size=V, seq_len=T)
        given = dict(config=config, windows=natural_windows(args.tokens, V, T), dtype=first)
        models = {name: given | dict(config=replace(config, **how), compiled=args.compile, hf="hf" in name)
                  for name, how in MODELS.items()}
        if "models" in args.sections:
            yield title, training_step, models
            for dtype in others:            # beside the same first one; all at once would want much memory
                own = {f"{name}, {dtype}": how | dict(dtype=dtype) for name, how in models.items()
                       if "hf" not in name}
                yield f"{title}, {dtype}", training_step, {"dense": models["dense"]} | own
        for kinds in PIECES if "pieces" in args.sections else ():
            dtypes = args.dtypes if "head" in kinds else ["float32"]            # as in any model
            yield title, piece, {f"{kind}, {dtype}": given | dict(kind=kind, dtype=dtype)
                                 for dtype in dtypes for kind in kinds}


def as_table(rows: list[dict]) -> str:
    """Markdown. The ratio is that of medians; in brackets the lowest and the highest of a round."""
    first = rows[0]
    lines = [["", "tokens/s", f"to {first['name']}", "peak memory, GB", "parameters, M", "first step, s"],
             ["---"] * 6]
    for r in rows:
        ratios = [theirs / own for theirs, own in zip(first["rounds"], r["rounds"])]
        lines.append([r["name"], f"{r['tokens_per_second']:,.0f}",
                      f"{first['seconds'] / r['seconds']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                      f"{r['peak_bytes'] / 1e9:.2f}", f"{r['parameters'] / 1e6:.2f}",
                      f"{r['first_step']:.1f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(panels: dict[str, list[dict]], path: Path, setting: str):
    """Where the time of a training step goes: a panel for each shape, a bar for each model."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 1 + 0.4 * sum(map(len, panels.values()))), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for ax, (title, rows) in zip(axes, panels.items()):
        left = [0.0] * len(rows)
        for part in PARTS:
            drawn = ax.barh([r["name"] for r in rows], [r[part] for r in rows], left=left, label=part)
            left = [so_far + r[part] for so_far, r in zip(left, rows)]
        ax.bar_label(drawn, padding=4, fontsize=8, labels=[
            f"{r['tokens_per_second']:,.0f} tokens/s, {r['peak_bytes'] / 1e9:.1f} GB" for r in rows])
        ax.set(xlabel="seconds of a training step", xlim=(0, 1.35 * max(left)), title=title)
        ax.invert_yaxis()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(setting, fontsize=8)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sections", nargs="+", choices=["models", "pieces"], default=["models", "pieces"])
    parser.add_argument("--shape", nargs="+", default=["256x6"], metavar="DxL", help="width x layers [256x6]")
    parser.add_argument("--tokens", type=int, default=16_384 if CUDA else 4_096, help="[%(default)s]")
    parser.add_argument("--vocab-size", type=int, default=200_019, help="V [%(default)s]")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window [%(default)s]")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=CUDA,
                        help="what repeats in models; pieces have it in their names")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if CUDA else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there what was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the section models there, as .png")
    args = parser.parse_args()
    for path in filter(None, (args.json, args.plot)):
        if path.exists() or not path.parent.is_dir():
            raise ValueError(f"{path} is there already, or its folder is not: name another file")
    if args.rounds < 1 or args.plot and (args.plot.suffix != ".png" or "models" not in args.sections):
        raise ValueError("--rounds must be at least 1, and --plot a .png that draws the section models")
    device = choose_device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    faster = multiplies_bfloat16(device)            # then train.py would choose that
    args.dtypes = ["float32"] * (device.type == "cpu" or not faster) + ["bfloat16"] * faster
    setting = (f"{device.type} ({name}), torch {torch.__version__}, {' and '.join(args.dtypes)}, compile "
               f"{'on' if args.compile else 'off'}; V = {args.vocab_size:,}, {args.tokens:,} tokens a step")
    rows, panels, found = [], {}, list(contests(args))      # all at once: bad flags are refused now
    print(setting)
    for title, build, contestants in found:
        new = contest(build, contestants, device, args.rounds)
        print(f"\n{title}\n\n{as_table(new)}", flush=True)
        rows += new
        if build is training_step:
            panels[title] = new
        if args.json:
            args.json.write_text(json.dumps(dict(setting=setting, rows=rows), indent=1), encoding="utf-8")
    if args.plot:
        plot(panels, args.plot, setting)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {error}")
    except KeyboardInterrupt:
        sys.exit("bench.py: stopped")
