"""How good checkpoints are, side by side: loss, perplexity and bits per byte, by domain and by how frequent a token is.

    python eval.py out/dense-untied-nano out/leviathan-nano
    python eval.py out/dense-untied-nano out/leviathan-nano --lambada lambada_test.jsonl --out out/eval-lambada

All of a split is read, in windows of the model's own context, which cross documents as in training; every token but the first of a
shard is predicted once. Bits per byte leave the predictions of <|endoftext|> out, as it has no bytes; the rest has them in.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoints import newest_checkpoint, training_data
from common import InputError, choose_device, command_line, read_json
from documents import chunks, parse_chunk
from leviathan import LanguageModel
from loss import LinearCrossEntropy
from shards import SPLITS, Windows, read_counts, read_index, read_meta
from tokenizer import END_OF_TEXT, encode, token_bytes, tokenizer_from_json

TOKENS_AT_ONCE = 8_192
RESAMPLES = 2_000               # of the bootstrap
FEWEST = 10                     # documents from which an interval is formed
FREQUENCIES = ["never seen", *(f"decile {d}" for d in range(1, 11))]


# ---- losses ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def token_losses(model: LanguageModel, ids, targets, last: int = 0):
    """Nats of each target, or of the `last`, and whether it is the likeliest. Two of (B, T) -> two of (B, T or last), on the CPU"""
    weight = model.lm_head.weight
    targets = targets.to(weight.device)[:, -last:]
    hidden = model.hidden(model.embed_tokens(ids.to(weight.device)))[:, -last:].flatten(0, 1)
    rows, parts = LinearCrossEntropy.logits_per_chunk(weight.device.type) // 4 // len(weight) or 1, []     # and their copies
    for x, target in zip(hidden.split(rows), targets.flatten().split(rows)):
        logits = x @ weight.T
        parts.append((F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target))
    return tuple(torch.cat(part).view(targets.shape).cpu() for part in zip(*parts))


def frequency_groups(counts: np.ndarray) -> np.ndarray:
    """A group for each id: 0 for never seen, then 1 ... 10, deciles of the ids that were seen, rarest first. (V) -> (V)"""
    groups = np.zeros(len(counts), dtype=np.int64)
    order = np.argsort(counts, kind="stable")[(counts == 0).sum():]
    groups[order] = 1 + np.arange(len(order)) * 10 // max(1, len(order))
    return groups


def pieces(windows: Windows):
    """Every token of a split but the first of each shard, once as a target, with its document and that one's domain.

    Yields (B, T + 1), (B, T), (B, T). Documents are counted through all shards; one may go on in the next shard.
    """
    T, first = windows.seq_len, 0
    at_once = max(T, TOKENS_AT_ONCE // T * T)
    for shard, tokens in enumerate(windows.shards):
        index = read_index(windows.paths[shard].with_suffix(".idx"), len(tokens), len(windows.meta["domains"]))
        first -= bool(shard) and tokens[0] != windows.meta["end_of_text"]
        whole = (len(tokens) - 1) // T * T              # targets that fill windows; the rest are one shorter window
        for start, stop in [*((n, min(whole, n + at_once)) for n in range(0, whole, at_once)), (whole, len(tokens) - 1)]:
            if start < stop:
                length, ids = min(T, stop - start), windows.tokens(shard, start, stop + 1)
                entry = np.searchsorted(index["start"], np.arange(start + 1, stop + 1), side="right") - 1
                yield (np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length], (first + entry).reshape(-1, length),
                       index["domain"][entry].reshape(-1, length))
        first += len(index)


def evaluate(model: LanguageModel, data: Path, split: str, spelling: list[bytes], name: str) -> tuple[np.ndarray, np.ndarray, list]:
    """Sums for each document and column: nats, and what they are divided by. -> two of (documents, columns), the columns' names

    Columns: the text's bytes (for bits per byte), domains, groups of frequency of the target, then of the input: the last token of
    the context, whose embedding Leviathan generates.
    """
    windows = Windows(data, split, model.config.seq_len)
    domains, n_bytes = windows.meta["domains"], np.array([len(token) for token in spelling])
    groups = frequency_groups(read_counts(data, len(spelling)))
    columns = [("bytes", ""), *(("domain", name) for name in domains),
               *((role, name) for role in ("target", "input") for name in FREQUENCIES)]
    targets_from, inputs_from = 1 + len(domains), 1 + len(domains) + len(FREQUENCIES)
    shape = windows.meta[split]["documents"], len(columns)
    nats, weights = np.zeros(shape), np.zeros(shape)
    total = windows.meta[split]["tokens"]
    with tqdm(total=total, unit="token", unit_scale=True, desc=name, leave=False, dynamic_ncols=True, mininterval=1) as bar:
        for ids, documents, domain in pieces(windows):
            if documents.max() >= len(nats):
                raise InputError(f"{data} has more documents than the {len(nats):,} of its meta.json: prepare the data again")
            inputs, targets = ids[:, :-1], ids[:, 1:]
            losses = token_losses(model, torch.from_numpy(inputs.copy()), torch.from_numpy(targets.copy()))[0].double().numpy()
            ones, size = np.ones_like(losses), n_bytes[targets]
            for column, n in ((np.zeros_like(targets), size), (1 + domain.astype(np.int64), ones),
                              (targets_from + groups[targets], ones), (inputs_from + groups[inputs], ones)):
                np.add.at(weights, (documents, column), n)
                np.add.at(nats, (documents, column), losses * (n > 0))
            bar.update(losses.size)
    return nats, weights, columns


def last_words(path: Path):
    """Yield the texts of a LAMBADA file, of two words or more each. Raises InputError."""
    how, bad, n = 'LAMBADA is JSON lines such as {"text": "... the last word"}', [], 0
    for chunk in chunks(path):
        for text, _ in parse_chunk(chunk, bad):
            n += 1
            if len(text.split()) < 2:
                bad.append((f"{path}, text {n}", "it has no two words"))
            else:
                yield text.strip()
        if bad:
            raise InputError(f"{bad[0][0]}: {bad[0][1]}: {how}")
    if not n:
        raise InputError(f"{path} holds no text: {how}")


def lambada(model: LanguageModel, tokenizer, path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Nats of the last word of each text, and whether it is the likeliest continuation throughout. -> two of (texts)

    As lm-evaluation-harness has it: the word with the space before it, given what comes before; here behind <|endoftext|>.
    """
    T, nats, right = model.config.seq_len, [], []
    for text in tqdm(last_words(path), desc=f"{name}, LAMBADA", leave=False, dynamic_ncols=True):
        before = text[:-len(text.split()[-1])].rstrip()
        ids = [tokenizer.encode_single_token(END_OF_TEXT), *encode(tokenizer, text)]
        n = min(T, max(1, len(ids) - 1 - len(encode(tokenizer, before))))               # tokens of the last word
        ids = torch.tensor([ids[-(T + 1):]], device=model.lm_head.weight.device)
        losses, likeliest = token_losses(model, ids[:, :-1], ids[:, 1:], last=n)
        nats.append(losses.sum().item())
        right.append(bool(likeliest.all()))
    return np.array(nats), np.array(right, dtype=float)


# ---- what came out ---------------------------------------------------------------------------------------------------

def bootstrap(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """95 % intervals of sum(values) / sum(weights), from documents drawn anew with replacement. Two of (n, columns) -> (columns, 2)

    Documents, since tokens of one are not independent. It tells how sure a difference is for more text of this kind, not for
    other seeds of training.
    """
    rng, n, found = np.random.default_rng(0), len(values), []
    for _ in range(RESAMPLES // 100):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=100).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((drawn @ values) / (drawn @ weights))
    found, enough = np.concatenate(found), (weights > 0).sum(0) >= FEWEST
    return np.array([np.nanpercentile(part, [2.5, 97.5]) if there else [np.nan, np.nan] for part, there in zip(found.T, enough)])


def with_interval(value: float, interval) -> str:
    return f"{value:+.3f}" + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if np.isfinite(interval).all() else "")


def as_tables(names: list[str], about: str, columns: list, nats: list, weights: np.ndarray) -> tuple[str, dict]:
    """Markdown, and the numbers in it. Differences are to the first checkpoint, with bootstrap()'s interval."""
    of = lambda role: [i for i, column in enumerate(columns) if column[0] == role]          # noqa: E731
    stack = lambda part: np.concatenate([part, part[:, of("target")].sum(1, keepdims=True)], axis=1)        # noqa: E731
    weights, nats = stack(weights), [stack(part) for part in nats]          # the last column: all tokens
    totals = weights.sum(0)
    with np.errstate(invalid="ignore"):
        losses = [part.sum(0) / totals for part in nats]
    gaps = [(loss - losses[0], bootstrap(part - nats[0], weights)) for part, loss in zip(nats[1:], losses[1:])]
    lines = [about, "", "| checkpoint | loss | perplexity | bits per byte | loss less the first's, 95 % interval |",
             "|---|---|---|---|---|"]
    for i, name in enumerate(names):
        loss, bits = losses[i][-1], losses[i][0] / math.log(2)
        gap = with_interval(gaps[i - 1][0][-1], gaps[i - 1][1][-1]) if i else ""
        lines.append(f"| {name} | {loss:.4f} | {math.exp(min(loss, 700)):,.2f} | {bits:.4f} | {gap} |")
    for role, title in (("domain", "domain"), ("target", "predicted token"), ("input", "last token of the context")):
        heads = [title, "documents", "tokens", f"loss of {names[0]}", *(f"{name}, less that" for name in names[1:])]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for i in of(role):
            if totals[i]:
                cells = [f"{(weights[:, i] > 0).sum():,}", f"{totals[i]:,.0f}", f"{losses[0][i]:.3f}",
                         *(with_interval(gap[i], interval[i]) for gap, interval in gaps)]
                lines.append(f"| {columns[i][1]} | {' | '.join(cells)} |")
    number = lambda x: float(x) if np.isfinite(x) else None         # noqa: E731 (JSON knows no nan)
    rows = [dict(role=role, name=label, documents=int((weights[:, i] > 0).sum()), tokens=int(totals[i]),
                 loss=[number(loss[i]) for loss in losses], less_the_first=[number(gap[i]) for gap, _ in gaps],
                 interval=[[number(end) for end in interval[i]] for _, interval in gaps])
            for i, (role, label) in enumerate([*columns, ("all", "")])]
    return "\n".join(lines), dict(checkpoints=names, about=about, rows=rows)


def plot(path: Path, numbers: dict):
    """Losses by domain, by target and by input; of several checkpoints, differences to the first with their intervals."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names, roles = numbers["checkpoints"], (("domain", "by domain"), ("target", "by the predicted token"),
                                            ("input", "by the last token of the context"))
    shown_rows = {role: [row for row in numbers["rows"] if row["role"] == role and row["tokens"]] for role, _ in roles}
    roles = [(role, title) for role, title in roles if len(shown_rows[role]) > 1]           # not where there is one domain
    fig, axes = plt.subplots(1, len(roles), figsize=(14, 4.5), layout="constrained", sharey=len(names) > 1)
    for ax, (role, title) in zip(axes, roles):
        rows = shown_rows[role]
        shown = names[1:] or names
        for j, name in enumerate(shown):
            x = np.arange(len(rows)) + 0.6 * ((j + 0.5) / len(shown) - 0.5)
            if len(names) == 1:
                ax.plot(x, [row["loss"][0] for row in rows], "o", label=name)
                continue
            y = np.array([row["less_the_first"][j] for row in rows])
            ends = np.array([[y[i] if end is None else end for end in row["interval"][j]] for i, row in enumerate(rows)])
            ax.errorbar(x, y, yerr=np.abs(ends.T - y), fmt="o", ms=4, capsize=2, label=name)
        if len(names) > 1:
            ax.axhline(0, color="gray", lw=1)
        ax.set_xticks(range(len(rows)), [f"{row['name']} ({row['tokens']:,})" for row in rows], rotation=40, ha="right", fontsize=7)
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("loss, nats per token" if len(names) == 1 else f"loss less that of {names[0]}, nats per token", fontsize=8)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def lambada_table(names: list[str], results: list) -> str:
    """Markdown; ± is the standard error of the mean over texts."""
    lines = [f"LAMBADA, {len(results[0][0]):,} texts", "", "| checkpoint | accuracy of the last word, % | its perplexity "
             "| nats less those of the first, 95 % interval |", "|---|---|---|---|"]
    for i, (name, (nats, right)) in enumerate(zip(names, results)):
        gap = (nats - results[0][0])[:, None]
        cells = [f"{100 * right.mean():.2f} ± {100 * right.std() / math.sqrt(len(right)):.2f}",
                 f"{math.exp(min(nats.mean(), 700)):,.2f}",
                 with_interval(gap.mean(), bootstrap(gap, np.ones_like(gap))[0]) if i else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Compare checkpoints on a validation split.", allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", type=Path,
                        help="checkpoints, or folders of runs, of which the newest is taken; differences are to the first")
    parser.add_argument("--data", type=Path, help="a folder that prepare_pile.py has written [that of the first one's training]")
    parser.add_argument("--split", choices=SPLITS, default="val", help="[%(default)s]")
    parser.add_argument("--lambada", type=Path, metavar="FILE", help="OpenAI's LAMBADA, JSON lines with a text: its last word")
    parser.add_argument("--out", type=Path, default=Path("out/eval"), help="a new folder for tables and a figure [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps [%(default)s]")
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"{args.out} exists: name a new folder with --out")

    device, folders = choose_device(args.device), [newest_checkpoint(path) for path in args.checkpoints]
    known = [read_json(folder / "tokenizer.json") for folder in folders]
    data = args.data or training_data(folders[0])
    meta = read_meta(data)
    for folder, tokenizer in zip(folders, known):
        if tokenizer.get("fingerprint") != meta["tokenizer"]["fingerprint"]:
            raise InputError(f"{folder} was trained with another tokenizer than {data} was made with: evaluate it on data of its "
                             "own and compare bits per byte")
    encoding = tokenizer_from_json(known[0])
    names, nats, words = [str(path) for path in args.checkpoints], [], []
    for folder, name in zip(folders, names):
        model = LanguageModel.from_checkpoint(folder, device).eval().materialize()
        part, weights, columns = evaluate(model, data, args.split, token_bytes(encoding), name)
        nats.append(part)
        if args.lambada:
            words.append(lambada(model, encoding, args.lambada, name))
    predicted = weights[:, [column[0] == "domain" for column in columns]].sum()
    about = (f"{data}, {args.split}: {len(weights):,} documents, {predicted:,.0f} tokens predicted, {weights[:, 0].sum():,.0f} "
             "bytes of text")
    text, numbers = as_tables(names, about, columns, nats, weights)
    if args.lambada:
        text += "\n\n" + lambada_table(names, words)
        numbers["lambada"] = [dict(accuracy=right.mean(), nats=nats.mean(), texts=len(nats)) for nats, right in words]
    args.out.mkdir(parents=True)
    (args.out / "tables.md").write_text(text + "\n", encoding="utf-8")
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    plot(args.out / "losses.png", numbers)
    print(f"{text}\n\nthese tables, the numbers and a figure are in {args.out}")


if __name__ == "__main__":
    command_line(main)
