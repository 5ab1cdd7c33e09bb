"""Leviathan against its dense twins: `python bench.py speed`, and `python bench.py quality`, which quality.py carries out.

Speed has three sections (`--sections`), each a contest between processes that take turns (A B C A B C ...), so that whatever else
the machine does falls on all alike, and each has a peak memory of its own:

    models   a training step (forward, backward, AdamW) of each model of one shape
    pieces   the generator, and the head with its loss, against the way they are usually written
    growth   forward and backward of generator and table as tokens, vocabulary, mode width and D grow

The ids have the statistics of text: words of Python's standard library, each hashed to one of V ids. Without spaces and
signs, 4,096 of them hold nearly as many distinct ids, 1,299, as o200k_base tokens of prose do, about 1,500.
"""
import argparse
import functools
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
import zlib
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import quality
from common import InputError, choose_device, command_line
from leviathan import Config, LanguageModel, TokenGenerator
from loss import linear_cross_entropy
from prepare_pile import documents, stdlib_files
from train import expected_memory, peak_flops

MODELS = {       # the first is what the others are compared with
    "dense": dict(model="dense"),
    "dense-untied": dict(model="dense-untied"),
    "leviathan v1, width 1": dict(model="leviathan", generator="v1", mode_width=1),
    "leviathan v1, width 64": dict(model="leviathan", generator="v1", mode_width=64),
    "leviathan lev, width 64": dict(model="leviathan", generator="lev", mode_width=64),
    "hf-llama": dict(model="dense-untied"),      # transformers' LlamaForCausalLM of the same shape, where it is installed
}
PARTS = ("embedding", "blocks", "head", "optimizer")
POINT = dict(tokens=4_096, vocab_size=200_019, mode_width=64, d_model=256)      # of growth: all axes cross there
GROWTH = dict(tokens=[1_024, 4_096, 16_384, 65_536, 262_144], vocab_size=[8_192, 50_257, 200_019, 1_000_000],
              mode_width=[1, 8, 64, 256], d_model=[256, 512, 1024, 2048])
EMBEDDINGS = {"v1, width 1": dict(generator="v1", mode_width=1), "v1": dict(generator="v1"), "lev": dict(generator="lev"),
              "table": {}}
TURN_SECONDS = 1.0      # a turn is as many steps as begin in this time, at least one


@functools.cache
def hashed_words() -> torch.Tensor:
    words = (word for file in stdlib_files() for text in documents(file) for word in re.findall(r"\w+", text))
    return torch.tensor([zlib.crc32(word.encode()) for word in words])


def natural_windows(tokens: int, vocab_size: int, seq_len: int) -> torch.Tensor:
    """`tokens` ids and their targets, in windows drawn from all over the text. -> (tokens / seq_len, seq_len + 1)"""
    words, size = hashed_words() % vocab_size, seq_len + 1
    windows = words[:len(words) // size * size].view(-1, size)
    if tokens > len(windows) * seq_len:
        raise InputError(f"the standard library has only {len(windows) * seq_len:,} words in windows of {seq_len}: lower --tokens")
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:tokens // seq_len]]


# ---- measuring -------------------------------------------------------------------------------------------------------

class Clock:
    """Seconds between marks, summed by the part that ends at the mark; on CUDA by its own clock, so that nothing waits."""
    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        self.mark("start")

    def mark(self, part: str):
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            if self.device.type == "mps":
                torch.mps.synchronize()
            now = time.perf_counter()
        self.marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        cuda, seconds = self.device.type == "cuda", defaultdict(float)
        if cuda:
            torch.cuda.synchronize()
        for (_, start), (part, end) in itertools.pairwise(self.marks):
            seconds[part] += start.elapsed_time(end) / 1000 if cuda else end - start
        return dict(seconds)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's on CUDA, the driver's on MPS, of the whole process (resident, high-water mark) elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError as error:
        raise InputError("peak memory cannot be read on Windows: use WSL, or a GPU") from error
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worker(pipe, build, settings: dict, device: str):
    """One contestant. Sends what `build` says of it, then for every turn the seconds of its parts, then its memory."""
    try:
        device = torch.device(device)
        step, facts = build(device=device, **settings)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = peak_memory(device)
        pipe.send(facts)
        while pipe.recv() == "turn":
            clocks, begun = [], time.perf_counter()
            while not clocks or time.perf_counter() - begun < TURN_SECONDS:
                clocks.append(Clock(device))
                step(clocks[-1])
            turns = [clock.seconds() for clock in clocks]
            pipe.send({part: statistics.median(turn[part] for turn in turns) for part in turns[0]})
            if device.type == "cuda":
                torch.cuda.empty_cache()        # room for the others
        pipe.send(dict(peak_memory_bytes=peak_memory(device), extra_memory_bytes=peak_memory(device) - before))
    except (InputError, ImportError, RuntimeError) as error:
        pipe.send(error)


def contest(contestants: dict, device: str, rounds: int) -> dict[str, dict]:
    """Let {name: (build, settings)} take turns. -> for each its facts, memory, warm-up and seconds of every round.

    One that fails is named and left out.
    """
    context, pipes, results = multiprocessing.get_context("forkserver"), {}, {}
    context.set_forkserver_preload(["bench"])       # torch is imported once

    def ask(name: str, question: str):
        try:
            if question:
                pipes[name].send(question)
            answer = pipes[name].recv()
        except (EOFError, OSError):
            answer = RuntimeError("its process was killed: most likely out of memory")
        if isinstance(answer, Exception):
            print(f"{name} is left out: {str(answer).splitlines()[0]}", flush=True)
            pipes.pop(name).close()
            results.pop(name, None)
            return None
        return answer

    for name, (build, settings) in contestants.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=worker, args=(theirs, build, settings, device), daemon=True).start()
        theirs.close()                          # so that a killed process ends the conversation
    for name in list(pipes):
        if facts := ask(name, ""):
            results[name] = facts | dict(turns=[])
    for name in list(pipes):
        if turn := ask(name, "turn"):
            results[name]["warm_up_seconds"] = sum(turn.values())
    for i in range(rounds):
        for name in list(pipes):
            if turn := ask(name, "turn"):
                results[name]["turns"].append(turn)
        latest = {name: sum(results[name]["turns"][-1].values()) for name in pipes}
        times = ", ".join(f"{name} {seconds:.4f} s" for name, seconds in latest.items())
        print(f"round {i + 1} of {rounds}: {times}", file=sys.stderr, flush=True)
    for name in list(pipes):
        if memory := ask(name, "memory"):
            turns = results[name].pop("turns")
            parts = {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}
            results[name] |= memory | dict(seconds=[sum(turn.values()) for turn in turns], part_seconds=parts)
    return results


# ---- contestants: each builder returns a step, to which a clock is given, and facts ----------------------------------

def hf_llama(config: Config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=4 * config.d_model, rms_norm_eps=1e-6,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, max_position_embeddings=config.seq_len))


def training_step(device, config: Config, windows, compiled: bool, hf: bool):
    model = (hf_llama(config) if hf else LanguageModel(config)).to(device).train()
    inner = model.model if hf else model
    if compiled and hf:
        for layer in inner.layers:
            layer.compile()
    elif compiled:
        model.compile_parts()
    groups = model.parameters() if hf else model.decay_groups(0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1, fused=device.type != "mps")
    ids, targets = (half.contiguous().to(device) for half in (windows[:, :-1], windows[:, 1:]))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    mark = lambda part: None            # noqa: E731

    def step(clock: Clock):
        nonlocal mark
        mark = clock.mark
        with autocast:
            loss = model(ids, labels=targets, shift_labels=targets, use_cache=False).loss if hf else model(ids, targets)
        mark("head")
        loss.backward()
        mark("embedding")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimizer")

    def boundary(module, before: str, after: str):
        """Forward ends the part before; the gradient that arrives here ends the backward of the part after."""
        def hook(module, inputs, output):
            mark(before)
            output.register_hook(lambda gradient: mark(after))
        module.register_forward_hook(hook)

    boundary(inner.embed_tokens, "embedding", "blocks")
    boundary(inner.norm, "blocks", "head")
    facts = dict(distinct_ids=len(ids.unique()))
    return step, facts if hf else facts | dict(parameters=model.parameters_by_part())


class PlainGenerator(TokenGenerator):
    """The method as usually written: every token, every knot, the seeds summed before they are projected, no chunks."""
    def forward(self, ids):
        c = self.config
        address = self.addresses[ids.flatten()].unsqueeze(-1)
        digits = address // torch.tensor([c.base**j for j in reversed(range(c.n_coords))], device=ids.device) % c.base
        z = torch.stack([codebook[digit] for codebook, digit in zip(self.codebooks, digits.T)]).sum(0)
        latent = self.squash(torch.einsum("us,pts->upt", z, self.seed_proj))
        t = (latent.unsqueeze(-1) * (c.n_knots - 1) - torch.arange(c.n_knots, device=ids.device)).abs()
        basis = torch.where(t < 0.5, 0.75 - t**2, torch.where(t < 1.5, (1.5 - t)**2 / 2, 0))
        basis = basis / basis.sum(-1, keepdim=True)
        modes = torch.einsum("updn,dpnc->updc", basis, self.splines).prod(2).flatten(1)
        return self.aggregate(latent, modes).view(*ids.shape, -1)


def embedding_step(device, config: Config, windows, kind: str):
    if kind == "table":
        model = nn.Embedding(config.vocab_size, config.d_model)
    else:
        model = (PlainGenerator if kind == "plain generator" else TokenGenerator)(
            config.vocab_size, config.d_model, config.generator, mode_width=config.mode_width)
    model, ids = model.to(device), windows[:, :-1].to(device)
    if kind == "compiled generator":
        model.compile_modes()

    def step(clock: Clock):
        if kind == "materialize":
            model.table()
        else:
            x = model(ids)
            x.backward(torch.ones_like(x))
            model.zero_grad(set_to_none=True)
        clock.mark("embedding")
    return step, dict(distinct_ids=len(ids.unique()))


def head_step(device, config: Config, windows, kind: str):
    weight = torch.empty(config.vocab_size, config.d_model, device=device).normal_(0, 0.02).requires_grad_()
    targets = windows[:, 1:].flatten().to(device)
    hidden = torch.empty(len(targets), config.d_model, device=device).normal_().requires_grad_()
    plain = lambda hidden, weight, targets: F.cross_entropy((hidden @ weight.T).float(), targets)      # noqa: E731
    loss = plain if kind == "plain head" else linear_cross_entropy

    def step(clock: Clock):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss(hidden, weight, targets).backward()
        weight.grad = hidden.grad = None
        clock.mark("head")
    return step, dict(gradient_bytes=weight.nbytes)


# ---- the three sections ----------------------------------------------------------------------------------------------

def row(section: str, name: str, model: str, config: Config, tokens: int, result: dict, **more) -> dict:
    """One measurement, with the names of Config; the generator is None where there is none, and layers are 0 in a piece."""
    generates = model in ("leviathan", "generator", "plain generator", "compiled generator", "materialize")
    return dict(section=section, name=name, model=model, generator=config.generator if generates else None,
                mode_width=config.mode_width if generates else None, d_model=config.d_model,
                n_layers=config.n_layers if section == "models" else 0, vocab_size=config.vocab_size, seq_len=config.seq_len,
                tokens=tokens, tokens_per_second=tokens / statistics.median(result["seconds"]), **result, **more)


def models(args, shape: dict) -> list[dict]:
    """A training step of each model that fits."""
    dtype, needs, held = "bfloat16" if args.device.type == "cuda" else "float32", {}, {}
    configs = {name: Config(**shape | variant) for name, variant in MODELS.items()}
    for name, config in configs.items():
        with torch.device("meta"):
            model = LanguageModel(config)
        needs[name] = expected_memory(model, args.tokens, args.device, dtype)
        needs[name] += 12 * args.tokens * args.vocab_size if name == "hf-llama" else 0     # all logits, three times
        held[name] = 12 * model.n_parameters()              # while others take their turn
    room = (torch.cuda.get_device_properties(args.device).total_memory if args.device.type == "cuda"
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    while held and (wanted := sum(held.values()) + max(needs[name] - held[name] for name in held)) > 0.95 * room:
        largest = max(held, key=needs.get)
        del held[largest]
        print(f"{largest} is left out: with the others it would take {wanted / 1e9:.0f} of {room / 1e9:.0f} GB; lower --tokens")
    windows = natural_windows(args.tokens, args.vocab_size, args.seq_len)
    results = contest({name: (training_step, dict(config=configs[name], windows=windows, compiled=args.compile,
                                                  hf=name == "hf-llama")) for name in held}, args.device.type, args.rounds)
    peak, flops = peak_flops(args.device, dtype), model.flops_per_token()       # of any: bodies and heads are equal
    rows = [row("models", name, name if name == "hf-llama" else MODELS[name]["model"], configs[name], args.tokens, result)
            for name, result in results.items()]
    return [r | dict(mfu=r["tokens_per_second"] * flops / peak if peak else None) for r in rows]


def pieces(args, shape: dict) -> list[dict]:
    """Parts of the model alone, each beside the way it is usually written, and the table that materialize() makes."""
    config, V = Config(**shape | dict(generator="lev", mode_width=64)), args.vocab_size
    few, many = (natural_windows(n, V, args.seq_len) for n in (2_048, 16_384))
    contestants = {
        f"{kind}, {n:,} tokens": (build, dict(config=config, windows=windows, kind=kind)) for kind, build, n, windows in (
            ("plain generator", embedding_step, 2_048, few), ("generator", embedding_step, 2_048, few),
            ("compiled generator", embedding_step, 2_048, few), ("generator", embedding_step, 16_384, many),
            ("compiled generator", embedding_step, 16_384, many), ("materialize", embedding_step, V, few),
            ("plain head", head_step, 2_048, few), ("head", head_step, 2_048, few))}
    return [row("pieces", name, contestants[name][1]["kind"], config, int(name.split()[-2].replace(",", "")), result)
            for name, result in contest(contestants, args.device.type, min(3, args.rounds)).items()]


def growth(args, shape: dict) -> list[dict]:
    """What the embedding costs, forward and backward, along four axes through one point."""
    points, rows = [POINT | {axis: value} for axis, values in GROWTH.items() for value in values], []
    for i, point in enumerate(points):
        if point in points[:i]:
            continue
        tokens, fields = point["tokens"], {key: value for key, value in point.items() if key != "tokens"}
        configs = {name: Config(seq_len=args.seq_len, **fields | variant) for name, variant in EMBEDDINGS.items()}
        windows = natural_windows(tokens, point["vocab_size"], args.seq_len)
        kinds = {name: "table" if name == "table" else "generator" for name in configs}
        contestants = {name: (embedding_step, dict(config=configs[name], windows=windows, kind=kinds[name])) for name in configs}
        results = contest(contestants, args.device.type, min(2, args.rounds))
        rows += [row("growth", name, kinds[name], configs[name], tokens, result, point=point) for name, result in results.items()]
    return rows


# ---- what came out ---------------------------------------------------------------------------------------------------

def as_table(rows: list[dict]) -> str:
    """Markdown. The ratio of a model is of its median tokens/s to the first's; in brackets, lowest and highest of a round."""
    columns = ["model", "tokens/s", f"to {rows[0]['name']}", "peak memory, GB", "embedding + blocks + head, M parameters",
               "time in embedding / blocks / head / AdamW, %", "warm-up, s"] + ["MFU"] * (rows[0]["mfu"] is not None)
    lines = [columns, ["---"] * len(columns)]
    for r in rows:
        rounds = [first / own for first, own in zip(rows[0]["seconds"], r["seconds"])]
        total = sum(r["part_seconds"].values())
        lines.append([r["name"], f"{r['tokens_per_second']:,.0f}",
                      f"{r['tokens_per_second'] / rows[0]['tokens_per_second']:.3f} ({min(rounds):.3f} to {max(rounds):.3f})",
                      f"{r['peak_memory_bytes'] / 1e9:.2f}",
                      " + ".join(f"{n / 1e6:.2f}" for n in r.get("parameters", {}).values()) or "as dense-untied",
                      " / ".join(f"{100 * r['part_seconds'][part] / total:.1f}" for part in PARTS), f"{r['warm_up_seconds']:.1f}",
                      *([f"{r['mfu']:.3f}"] if r["mfu"] is not None else [])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_list(rows: list[dict]) -> str:
    """Markdown, for pieces."""
    lines = ["| piece | seconds, median (lowest to highest) | memory beyond weights and input, GB |", "|---|---|---|"]
    for r in rows:
        middle, low, high = statistics.median(r["seconds"]), min(r["seconds"]), max(r["seconds"])
        lines.append(f"| {r['name']} | {middle:.4f} ({low:.4f} to {high:.4f}) | {r['extra_memory_bytes'] / 1e9:.3f} |")
    return "\n".join(lines)


def plot_models(rows: list[dict], path: Path, title: str):
    """A bar for each model: where the time of a step goes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shapes = list(dict.fromkeys((r["d_model"], r["n_layers"]) for r in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(2 + 5 * len(shapes), 3.4), layout="constrained", squeeze=False)
    for ax, shape in zip(axes[0], shapes):
        bars = [r for r in rows if (r["d_model"], r["n_layers"]) == shape][::-1]
        left = [0.0] * len(bars)
        for part in PARTS:
            widths = [r["part_seconds"][part] for r in bars]
            ax.barh([r["name"] for r in bars], widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths)]
        ax.set(xlabel="seconds of a training step", title=f"D = {shape[0]}, {shape[1]} layers")
    axes[0, 0].figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_growth(rows: list[dict], path: Path, title: str):
    """Above, seconds of forward and backward; below, peak memory; an axis of growth in each column."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator
    labels = dict(tokens="tokens of a micro-batch", vocab_size="vocabulary V", mode_width="mode width r", d_model="width D")
    figure, axes = plt.subplots(2, len(GROWTH), figsize=(13, 5.6), layout="constrained", sharex="col", sharey="row")
    for column, axis in zip(axes.T, GROWTH):
        on_axis = [r for r in rows if all(r["point"][other] == value for other, value in POINT.items() if other != axis)]
        for name, style in zip(EMBEDDINGS, ("C0o-", "C1o-", "C2o-", "C7o--")):
            line = sorted((r["point"][axis], statistics.median(r["seconds"]), r["peak_memory_bytes"] / 1e9)
                          for r in on_axis if r["name"] == name and not (axis == "mode_width" and name == "v1, width 1"))
            for ax, values in zip(column, list(zip(*line))[1:]):
                ax.plot([x for x, *_ in line], values, style, ms=4, label=name)
        for ax in column:
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(GROWTH[axis])
            ax.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
            ax.xaxis.set_minor_locator(NullLocator())
        column[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        column[1].yaxis.set_major_formatter("{x:g}")
        column[1].yaxis.set_minor_formatter(NullFormatter())
        column[1].set_xlabel(labels[axis])
    axes[0, 0].set_ylabel("seconds, forward + backward")
    axes[1, 0].set_ylabel("peak memory of the process, GB")
    axes[0, 0].legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Leviathan against its dense twins.", allow_abbrev=False)
    how = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    speed_ = commands.add_parser("speed", help="time and memory of training steps and of their parts", **how)
    speed_.add_argument("--sections", nargs="+", choices=["models", "pieces", "growth"], default=["models", "pieces", "growth"])
    speed_.add_argument("--device", help="cpu, cuda or mps; the best there is if left out")
    speed_.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile blocks and modes; on CUDA if left out")
    speed_.add_argument("--shapes", nargs="+", metavar="DxL",
                        help="width x layers; 256x6, and on CUDA 1024x12 and 768x28, if left out")
    speed_.add_argument("--tokens", type=int, help="of a micro-batch; 4096, on CUDA 32768, if left out")
    speed_.add_argument("--vocab-size", type=int, default=200_019, help="ids")
    speed_.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    speed_.add_argument("--rounds", type=int, default=3, help="timed turns of each contestant, after one that is not")
    speed_.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    speed_.add_argument("--plots", type=Path, metavar="FOLDER", default=Path("out/speed"), help="write the figures there")
    quality.add_arguments(commands.add_parser("quality", help="losses of paired runs of train.py", **how))
    args = parser.parse_args()
    (speed if args.what == "speed" else quality.main)(args)


def speed(args):
    args.device = choose_device(args.device, 0)
    cuda = args.device.type == "cuda"
    args.tokens = args.tokens or (32_768 if cuda else 4_096)
    args.compile = cuda if args.compile is None else args.compile
    if args.rounds < 1 or args.seq_len < 1 or args.tokens < 1 or args.tokens % args.seq_len:
        raise InputError(f"--tokens {args.tokens} must be a multiple of --seq-len {args.seq_len}, and --rounds at least 1")
    shapes = []
    for text in args.shapes or (["256x6", "1024x12", "768x28"] if cuda else ["256x6"]):
        if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
            raise InputError(f"--shapes {text}: write width x layers, like 256x6")
        shapes.append(dict(d_model=int(match[1]), n_layers=int(match[2]), vocab_size=args.vocab_size, seq_len=args.seq_len))
        Config(**shapes[-1])            # raises where the numbers don't fit
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: there is no folder {args.json.parent}")
    args.plots.mkdir(parents=True, exist_ok=True)

    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    setting = (f"{args.device.type} ({machine}), torch {torch.__version__}, {'bfloat16' if cuda else 'float32'}, "
               f"compile {'on' if args.compile else 'off'}, V = {args.vocab_size:,}, windows of {args.seq_len}")
    print(setting)
    rows = []
    for shape in shapes if "models" in args.sections else []:
        if new := models(args, shape):
            rows += new
            print(f"\nD = {shape['d_model']}, {shape['n_layers']} layers, {args.tokens:,} tokens at once, "
                  f"{new[0]['distinct_ids']:,} distinct; medians of {args.rounds} rounds\n\n{as_table(new)}\n", flush=True)
    if rows:
        plot_models(rows, args.plots / "models.png", setting)
    if "pieces" in args.sections:
        new = pieces(args, shapes[0])
        rows += new
        print(f"\npieces: lev of width 64, D = {shapes[0]['d_model']}\n\n{as_list(new)}\n", flush=True)
    if "growth" in args.sections:
        new = growth(args, shapes[0])
        rows += new
        plot_growth(new, args.plots / "growth.png", setting + "; " + ", ".join(f"{key} {value:,}" for key, value in POINT.items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command_line(main)
