"""Leviathan against its dense twins: `python bench.py speed`.

Each model lives in a process of its own, so that its peak memory is its own; the processes take turns (A B C A B C ...), so
that whatever else the machine does falls on all alike. A step is forward, backward and AdamW on one micro-batch. The ids have
the statistics of text: words, spaces and signs of Python's standard library, each hashed to one of V ids.
"""
import argparse
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
import zlib
from pathlib import Path

import torch

from leviathan import Config, InputError, LanguageModel, linear_cross_entropy
from prepare_pile import documents, stdlib_files

VARIANTS = {     # the first is what the others are compared with
    "dense": dict(model="dense"),
    "dense-untied": dict(model="dense-untied"),
    "leviathan v1, width 1": dict(model="leviathan", generator="v1", mode_width=1),
    "leviathan v1, width 64": dict(model="leviathan", generator="v1", mode_width=64),
    "leviathan lev, width 64": dict(model="leviathan", generator="lev", mode_width=64),
}


def natural_ids(n: int, vocab_size: int) -> torch.Tensor:
    """The first n ids of real text, of which each distinct piece has an id of its own, but for hash collisions."""
    ids = []
    for file in stdlib_files():
        for text in documents(file):
            ids += [zlib.crc32(piece.encode()) % vocab_size for piece in re.findall(r" ?\w+|\s+|[^\w\s]", text)]
        if len(ids) >= n:
            return torch.tensor(ids[:n])
    raise InputError(f"the standard library has only {len(ids):,} pieces of text, {n:,} were asked for: lower --tokens")


def timed(device: torch.device, function) -> float:
    """Seconds that a call takes, with all that it started on the device."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Bytes: of the allocator on CUDA, of the whole process (resident, high-water mark) elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worker(pipe, fields: dict, device: str, tokens: int, compiled: bool):
    """Answers "step", "parts", "memory" and "size" until the pipe closes."""
    device = torch.device(device)
    config = Config(**fields)
    model = LanguageModel(config).to(device)
    if compiled:
        for layer in model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-4, fused=device.type != "mps")
    windows = natural_ids(tokens + tokens // config.seq_len, config.vocab_size).view(-1, config.seq_len + 1).to(device)
    ids, targets = windows[:, :-1], windows[:, 1:]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def embed():
        x = model.embed_tokens(ids)
        x.backward(torch.ones_like(x))

    def blocks():
        x = torch.randn(*ids.shape, config.d_model, device=device, requires_grad=True)
        with autocast:
            y = x
            for layer in model.layers:
                y = layer(y, model.cos[:config.seq_len], model.sin[:config.seq_len])
            y = model.norm(y)
        y.backward(torch.ones_like(y))

    def head():
        x = torch.randn(*ids.shape, config.d_model, device=device, requires_grad=True)
        with autocast:
            linear_cross_entropy(x, model.lm_head.weight, targets).backward()

    def step():
        with autocast:
            model(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def parts() -> dict:
        parts = {"embedding": embed, "blocks": blocks, "head": head, "optimizer": optimizer.step}
        seconds = {}
        for name, part in parts.items():
            if name != "optimizer":
                part()          # warm: allocations and compilation
            seconds[name] = timed(device, part)
        optimizer.zero_grad(set_to_none=True)
        return seconds

    answers = {"step": lambda: timed(device, step), "parts": parts, "memory": lambda: peak_memory(device),
               "size": lambda: model.parameters_by_part() | {"distinct_ids": len(ids.unique())}}
    while (question := pipe.recv()) is not None:
        try:
            pipe.send(answers[question]())
        except (RuntimeError, torch.OutOfMemoryError) as error:
            pipe.send(error)
            return


def speed(args) -> list[dict]:
    """One row for each model: medians over rounds in which the models take turns."""
    shape = dict(d_model=args.d_model, n_layers=args.n_layers, vocab_size=args.vocab_size, seq_len=args.seq_len)
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, variant in VARIANTS.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(theirs, shape | variant, args.device, args.tokens, args.compile),
                                         daemon=True))
        processes[-1].start()

    def ask(name: str, question: str):
        pipes[name].send(question)
        answer = pipes[name].recv()
        if isinstance(answer, Exception):
            print(f"{name} is left out: {str(answer).splitlines()[0]}")
            del pipes[name]
            return None
        return answer

    sizes = {name: ask(name, "size") for name in list(pipes)}
    warm_up = {name: ask(name, "step") for name in list(pipes)}
    seconds = {name: [] for name in pipes}
    for i in range(args.rounds):
        for name in list(pipes):
            seconds[name].append(ask(name, "step"))
        print(f"round {i + 1} of {args.rounds}: " + ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in pipes), flush=True)
    memory = {name: ask(name, "memory") for name in list(pipes)}      # before parts, which a step does not need
    parts = {name: ask(name, "parts") for name in list(pipes)}
    for process in processes:
        process.terminate()
    return [dict(model=VARIANTS[name]["model"], generator=VARIANTS[name].get("generator"),
                 mode_width=VARIANTS[name].get("mode_width"), **shape, tokens=args.tokens,
                 distinct_ids=sizes[name].pop("distinct_ids"), parameters=sizes[name], peak_memory_bytes=memory[name],
                 tokens_per_second=args.tokens / statistics.median(seconds[name]), seconds=seconds[name],
                 warm_up_seconds=warm_up[name], part_seconds=parts[name]) for name in pipes]


def as_table(rows: list[dict]) -> str:
    """Markdown. The ratio is of each model's tokens/s to the first's, round by round: median (lowest to highest)."""
    lines = ["| model | tokens/s | to dense (spread) | peak memory, GB | embedding | blocks | head | AdamW | warm-up, s |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        name = f"{row['model']} {row['generator']}, width {row['mode_width']}" if row["generator"] else row["model"]
        ratios = sorted(first / own for first, own in zip(rows[0]["seconds"], row["seconds"]))
        lines.append(f"| {name} | {row['tokens_per_second']:,.0f} | {statistics.median(ratios):.3f} ({ratios[0]:.3f} to "
                     f"{ratios[-1]:.3f}) | {row['peak_memory_bytes'] / 1e9:.2f} | "
                     + " | ".join(f"{s:.3f} s" for s in row["part_seconds"].values()) + f" | {row['warm_up_seconds']:.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Leviathan against its dense twins.", allow_abbrev=False)
    parser.add_argument("what", choices=["speed"])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu, cuda or mps [%(default)s]")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=default == "cuda", help="compile the blocks")
    for name, value, meaning in (("d_model", 256, "width"), ("n_layers", 6, "blocks"), ("vocab_size", 200_019, "ids"),
                                 ("seq_len", 512, "tokens of a window"), ("tokens", 4_096, "tokens of a micro-batch"),
                                 ("rounds", 5, "steps of each model that are timed, after one that is not")):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"{meaning} [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    if args.tokens < args.seq_len or args.tokens % args.seq_len or args.rounds < 1:
        raise InputError(f"--tokens {args.tokens} must be a multiple of --seq-len {args.seq_len}, and --rounds at least 1")
    rows = speed(args)
    if not rows:
        raise InputError("no model fits: lower --tokens or --d-model")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    precision = "bfloat16" if args.device == "cuda" else "float32"
    print(f"\n{args.device} ({machine}), torch {torch.__version__}, {precision}, compile {'on' if args.compile else 'off'}; "
          f"D = {args.d_model}, {args.n_layers} layers, V = {args.vocab_size:,}, {args.tokens:,} tokens in windows of "
          f"{args.seq_len}, {rows[0]['distinct_ids']:,} distinct ids; median of {args.rounds} rounds\n")
    print(as_table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"bench.py: {error}")
