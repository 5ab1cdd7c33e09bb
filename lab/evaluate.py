"""How good checkpoints are, side by side: loss and bits per byte, by domain and by how frequent a token is.

    python -m lab.evaluate out/dense-untied-nano out/leviathan-nano
    python -m lab.evaluate out/dense-untied-nano out/leviathan-nano --lambada lambada.jsonl --out out/eval

All of a split is read, in windows of the model's own context, which cross documents as in training; each
token but a shard's first is predicted once. Bits per byte leave out <|endoftext|>, which has no bytes.
"""
import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import lab.generators  # noqa: F401  whose models can be loaded then
from lab import command
from leviathan import LanguageModel
from prepare_pile import (
    Windows,
    documents,
    encode,
    quiet,
    read_counts,
    read_index,
    read_meta,
    token_bytes,
    tokenizer_from_json,
)
from sample import choose_device, read_checkpoint

TOKENS_AT_ONCE, LOGITS_AT_ONCE = 2**13, 2**22
RESAMPLES = 2_000               # of the bootstrap
FEWEST = 10                     # documents from which an interval is formed
FREQUENCIES = ["never seen", "decile 1, the rarest", *(f"decile {d}" for d in range(2, 11))]


def check_tokenizer(tokenizer, data, name):
    """Raises ValueError where the prepared folder `data` has another one, however many ids."""
    if token_bytes(tokenizer_from_json(read_meta(data)["tokenizer"])) != token_bytes(tokenizer):
        raise ValueError(f"{data} has another tokenizer than {name}: use the data that it was trained on")


# ---- losses ------------------------------------------------------------------------------------------------

@torch.no_grad()
def token_losses(model: LanguageModel, ids, targets, last: int = 0):
    """Nats of each target, or of the `last`, and whether it is the likeliest. -> two of (B, T or last)"""
    device, parts = model.lm_head.weight.device, []
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    targets = targets.to(device)[:, -last:]
    hidden = model.hidden(model.embed_tokens(ids.to(device)))[:, -last:].flatten(0, 1)
    for x, target in zip(hidden.split(rows), targets.flatten().split(rows)):
        logits = model.lm_head(x)
        parts.append((F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target))
    return tuple(torch.cat(part).view(targets.shape).cpu() for part in zip(*parts))


def frequency_groups(counts: np.ndarray) -> np.ndarray:
    """0 for an id never seen, then 1 ... 10: deciles of the ids that were seen, rarest first. (V) -> (V)"""
    groups = np.zeros(len(counts), dtype=np.int64)
    order = np.argsort(counts, kind="stable")[(counts == 0).sum():]
    groups[order] = 1 + np.arange(len(order)) * 10 // max(1, len(order))
    return groups


def evaluate(model: LanguageModel, windows: Windows, spelling: list[bytes], counts: np.ndarray, name=""):
    """Sums by document and column, and what they are divided by. -> columns, two of (documents, columns)

    Columns: nats of all tokens; bits of the text's bytes; nats by domain, by how frequent the target is, and
    by how frequent the input is: the last token of the context, whose embedding Leviathan generates.
    """
    T, domains, groups = model.config.seq_len, windows.meta["domains"], frequency_groups(counts)
    columns = [("all", "loss"), ("all", "bits per byte"), *(("domain", domain) for domain in domains),
               *((role, group) for role in ("target", "input") for group in FREQUENCIES)]
    targets_from, inputs_from = 2 + len(domains), 2 + len(domains) + len(FREQUENCIES)
    n_bytes, at_once = np.array([*map(len, spelling)]), max(1, TOKENS_AT_ONCE // T) * T
    indices = [read_index(windows.folder, shard) for shard in windows.shards]
    sizes = [shard["tokens"] - 1 for shard in windows.shards]
    sums, weights = np.zeros((2, sum(map(len, indices)), len(columns)))
    bar = tqdm(total=sum(sizes), unit="token", unit_scale=True, desc=name, disable=quiet())
    first = 0                                               # document of the shard
    for shard, (n, index) in enumerate(zip(sizes, indices)):
        cuts = sorted({*range(0, n, at_once), n // T * T, n})           # whole windows, then a shorter one
        for start, stop in zip(cuts, cuts[1:]):
            tokens = windows.tokens(shard, start, stop + 1)
            inputs, targets = tokens[:-1], tokens[1:]
            batch = (torch.from_numpy(part).view(-1, min(T, len(part))) for part in (inputs, targets))
            nats = token_losses(model, *batch)[0].double().flatten().numpy()
            entry = np.searchsorted(index["start"], np.arange(start + 1, stop + 1), side="right") - 1
            size = n_bytes[targets]
            for column, value, weight in ((0, nats, 1), (1, nats / math.log(2) * (size > 0), size),
                                          (2 + index["domain"][entry].astype(int), nats, 1),
                                          (targets_from + groups[targets], nats, 1),
                                          (inputs_from + groups[inputs], nats, 1)):
                np.add.at(sums, (first + entry, column), value)
                np.add.at(weights, (first + entry, column), weight)
            bar.update(len(targets))
        first += len(index)
    bar.close()
    return columns, sums, weights


def lambada(model: LanguageModel, tokenizer, texts: list[str], name: str = "") -> np.ndarray:
    """Nats of each text's last word, and whether all of it is the likeliest. -> (texts, 2)

    As lm-evaluation-harness has it: the word begins with the last space, and the text with <|endoftext|>.
    """
    found = []
    for text in tqdm(texts, desc=f"{name}, LAMBADA", disable=quiet()):
        ids, before = encode(tokenizer, text), encode(tokenizer, text.rsplit(" ", 1)[0].rstrip())
        window = torch.tensor([[tokenizer.eot_token, *ids][-(model.config.seq_len + 1):]])
        nats, likeliest = token_losses(model, window[:, :-1], window[:, 1:], max(1, len(ids) - len(before)))
        found.append((nats.sum(), likeliest.all()))
    return np.array(found, dtype=float)


# ---- what came out -----------------------------------------------------------------------------------------

def bootstrap(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """95 % intervals of Σ values / Σ weights. (K, n, columns), (n, columns) -> (K, columns, 2)

    From n documents drawn anew with replacement, as the tokens of one are not independent. They tell how sure
    a mean is for more text of this kind, not for other seeds of training. nan where too few documents are.
    """
    rng, n, found = np.random.default_rng(0), len(weights), []
    with np.errstate(invalid="ignore"):                     # a draw may lack a column
        for _ in range(RESAMPLES // 100):
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=100).astype(float)
            found.append((drawn @ values) / (drawn @ weights))
    ends = np.nanpercentile(np.concatenate(found, axis=1), [2.5, 97.5], axis=1)
    ends[..., (weights > 0).sum(0) < FEWEST] = np.nan
    return np.moveaxis(ends, 0, -1)


def compare(columns: list, sums: list, weights: np.ndarray) -> list[dict]:
    """A row for each column that is not empty: means, what they are less the first's, intervals of that."""
    there = weights.any(0)
    sums, weights = np.stack(sums)[..., there], weights[:, there]
    means, ends = sums.sum(1) / weights.sum(0), bootstrap(sums - sums[0], weights)[1:]
    return [dict(role=role, name=name, documents=int((weights[:, i] > 0).sum()),
                 predicted=int(weights[:, i].sum()), means=means[:, i].tolist(),
                 less_the_first=(means[1:, i] - means[0, i]).tolist(),
                 intervals=[pair.tolist() if np.isfinite(pair).all() else None for pair in ends[:, i]])
            for i, (role, name) in enumerate(column for column, some in zip(columns, there) if some)]


def as_markdown(names: list[str], rows: list[dict]) -> str:
    lines = [["", "documents", "predicted", *names, *(f"{name} less {names[0]}" for name in names[1:])]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        gaps = [f"{gap:+.4f}" + (" [{:+.4f}, {:+.4f}]".format(*ends) if ends else "")
                for gap, ends in zip(row["less_the_first"], row["intervals"])]
        lines.append([f"{row['role']}: {row['name']}", f"{row['documents']:,}", f"{row['predicted']:,}",
                      *(f"{mean:.4f}" for mean in row["means"]), *gaps])
    perplexities = [f"{math.exp(min(loss, 700)):,.2f}" for loss in rows[0]["means"]]
    lines.insert(3, ["all: perplexity", "", "", *perplexities, *[""] * (len(names) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(names: list[str], rows: list[dict], path: Path):
    """What each loses or gains on the first, by how frequent the target is, and by how frequent the input."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(10, 4), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    for ax, role in zip(axes, ("target", "input")):
        own = [row for row in rows if row["role"] == role and row["name"] in FREQUENCIES[1:]]
        places = [FREQUENCIES.index(row["name"]) for row in own]
        for i, name in enumerate(names[1:]):
            ax.plot(places, [row["less_the_first"][i] for row in own], marker="os^vDP*X"[i % 8], label=name)
            known = [(place, *row["intervals"][i]) for place, row in zip(places, own) if row["intervals"][i]]
            ax.fill_between(*zip(*known or [(0, 0, 0)]), alpha=0.15, lw=0)
        ax.axhline(0, color="gray", lw=0.8)
        ax.set(xlabel=f"decile of the {role}'s frequency, from the rarest ids", xticks=range(1, 11))
    axes[0].set_ylabel(f"nats per token, less those of {names[0]}")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8, frameon=False)
    fig.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser("lab.evaluate", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", help="or folders of runs, of which the newest is taken")
    parser.add_argument("--data", type=Path, help="a prepared folder, which tells how frequent a token "
                        "is too [that of the first one's training]")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="[%(default)s]")
    parser.add_argument("--lambada", type=Path, metavar="FILE", help="OpenAI's LAMBADA, as JSON lines")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder for the table and its numbers")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps [%(default)s]")
    args = parser.parse_args()
    device, names = choose_device(args.device), args.checkpoints
    found = [read_checkpoint(path)[1:] for path in names]       # all before the work, but one model in memory
    data = args.data or found[0][1]
    windows, counts = Windows(data, args.split, 1), read_counts(data)   # of one token: short splits will do
    for path, (tokenizer, _) in zip(names, found):
        check_tokenizer(tokenizer, data, path)
    if args.lambada:
        texts = [text or "" for text, _ in documents(args.lambada, "jsonl", skip_bad=True)] or [""]
        if bad := [n for n, text in enumerate(texts, start=1) if " " not in text]:
            raise ValueError(f'{args.lambada}: document {bad[0]} is no JSON such as {{"text": "... a word"}}')
    if args.out:
        Path(os.path.realpath(args.out)).mkdir(parents=True, exist_ok=True)     # what a link points to
        if any(args.out.iterdir()):
            raise ValueError(f"{args.out} holds files: name a new folder with --out")

    sums, words = [], []
    for path in names:
        model = read_checkpoint(path, device)[0].materialize()
        columns, part, weights = evaluate(model, windows, token_bytes(tokenizer), counts, path)
        sums.append(part)
        words += [lambada(model, tokenizer, texts, path)] if args.lambada else []
    rows = compare(columns, sums, weights)
    if args.lambada:
        columns = [("LAMBADA", "nats of the last word"), ("LAMBADA", "share predicted right")]
        rows += compare(columns, words, np.ones((len(texts), 2)))
    table = f"{data}, {args.split}\n\n{as_markdown(names, rows)}"
    if args.out:
        (args.out / "table.md").write_text(table + "\n", encoding="utf-8")
        (args.out / "numbers.json").write_text(json.dumps(dict(checkpoints=names, rows=rows), indent=1))
        if len(names) > 1:
            draw(names, rows, args.out / "frequency.png")
    print(table)                # last: a terminal may refuse it


if __name__ == "__main__":
    command("lab.evaluate", main)
