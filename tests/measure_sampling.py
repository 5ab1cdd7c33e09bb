"""How fast checkpoints say something, with and without the cache of keys and values: they take turns.

    python -m tests.measure_sampling out/leviathan-nano out/dense-untied-nano
    python -m tests.measure_sampling --vocab-size 200019                # models that have learned nothing, of that many ids

The context is 512 tokens, whatever the models were trained with; speed does not depend on what they know.
"""
import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from checkpoints import newest_checkpoint
from common import read_json
from leviathan import Config, LanguageModel
from sample import draw, generate
from shards import Windows

CONTEXT, SAID, LONG, UNCACHED, ROUNDS = 512, 255, 2_000, 16, 3
HOW = dict(temperature=0.8, top_k=50, top_p=1.0)


@torch.no_grad()
def uncached(model, ids, n):
    """As nanoGPT does it: every token from a pass over the whole context."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(n):
        token = draw(model(ids[None, -CONTEXT:])[:, -1], rngs=[rng], **HOW)
        ids = torch.cat([ids, token])
        yield token


def tokens_per_second(stream, samples: int = 1) -> float:
    """Without the first token, which waits for the prompt."""
    times = []
    for _ in stream:
        times.append(time.perf_counter())
    return samples * (len(times) - 1) / (times[-1] - times[0])


def main():
    parser = argparse.ArgumentParser(description="Measure sampling.")
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--vocab-size", type=int)
    args = parser.parse_args()
    models = {}
    for run in args.runs:
        saved, about = LanguageModel.from_checkpoint(run), read_json(newest_checkpoint(run) / "config.json")
        models[str(run)] = LanguageModel(replace(saved.config, seq_len=CONTEXT)).eval()
        models[str(run)].load_state_dict(saved.state_dict())
        prompt = torch.from_numpy(Windows(about["training"]["data"], "val", CONTEXT)[0])
    for name in ("leviathan", "dense-untied") if args.vocab_size else ():
        config = Config.from_preset("nano", model=name, vocab_size=args.vocab_size, seq_len=CONTEXT, base=256)
        models[f"nano {name}, V = {args.vocab_size:,}"] = LanguageModel(config).eval()
        prompt = torch.randint(args.vocab_size, (CONTEXT,), generator=torch.Generator().manual_seed(0))
    start = prompt[:CONTEXT - SAID]
    ways = {
        f"cached, contexts of {CONTEXT - SAID} to {CONTEXT}": lambda m: tokens_per_second(generate(m, start, SAID, **HOW)),
        f"cached, {LONG:,} tokens": lambda m: tokens_per_second(generate(m, start, LONG, **HOW)),
        "cached, 8 samples": lambda m: tokens_per_second(generate(m, start, SAID, samples=8, **HOW), 8),
        f"uncached, a context of {CONTEXT}": lambda m: tokens_per_second(uncached(m, prompt[:CONTEXT], UNCACHED))}
    found = {(name, way): [] for way in ways for name in models}
    for turn in range(ROUNDS + 1):
        for name, way in found:
            speed = ways[way](models[name])
            if turn:                        # the first warms up
                found[name, way].append(speed)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; {ROUNDS} rounds\n")
    print("| model | | tokens/s, median (lowest to highest) |\n|---|---|---|")
    for (name, way), speeds in found.items():
        print(f"| {name} | {way} | {statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) |")


if __name__ == "__main__":
    main()
