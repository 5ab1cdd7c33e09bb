"""A token added to a trained model (open question 3 of the paper): what it takes, and what it is worth.

    python -m lab.new_tokens out/leviathan-nano out/dense-untied-nano       # runs on the same data -> a table

New tokens are words that the tokenizer cuts in two: pairs of tokens that belong together most. Each is made
one. From a few sentences, with the model frozen, its row of the head is learned and its input: a seed, which
stands in for a sum of codebook rows (Leviathan), or a row of the table (its twin). Or nothing is learned: its
input is the mean of its pieces, or that of a free address if there is one. Measured on sentences of the
validation text, against the same model that reads the word as two tokens.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from lab import command
from lab.addresses import summed
from lab.campaign import spread
from lab.evaluate import check_tokenizer, token_losses
from leviathan import LanguageModel, newest_checkpoint
from prepare_pile import Windows, written_whole
from sample import read_checkpoint

BEFORE, AFTER = 32, 16          # tokens of a sentence that stand before and behind the new one
SEARCHED = 10_000_000           # training tokens in which sentences are looked for
TESTED = 16                     # sentences of validation for each new token
STEPS, BATCH = 40, 32           # of Adam, whose rate falls linearly to 0; sentences
RATES = (0.1, 0.3, 1.0)         # of Adam, in standard deviations of what it fits: by sentences set aside
AS_TWO = "as two tokens"


def find_words(train, val, V: int, n: int, examples: int, never: int = -1) -> np.ndarray:
    """The n pairs of tokens that belong together most, by count(ab)² / (count(a) count(b)). -> (n, 2)

    Of those with 2 * examples places in training, half of which are set aside, and TESTED in validation.
    """
    keys, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    in_val, val_counts = np.unique(val[:-1] * V + val[1:], return_counts=True)
    alone = np.bincount(train, minlength=V).astype(float)
    enough = (counts >= 2 * examples) & np.isin(keys, in_val[val_counts >= TESTED])
    keys, counts = keys[enough], counts[enough].astype(float)
    chosen, used = [], {never}
    for key in keys[np.argsort(-counts**2 / (alone[keys // V] * alone[keys % V]), kind="stable")].tolist():
        pair = divmod(key, V)
        if pair[0] != pair[1] and not used & {*pair}:           # so that no two of them overlap
            chosen.append(pair)
            used |= {*pair}
    if len(chosen) < n:
        raise ValueError(f"only {len(chosen)} pairs of tokens stand together often enough, of {n}: "
                         "lower --words or --examples")
    return np.array(chosen[:n])


def sentences(text, pairs, V: int, n: int, rng):
    """n sentences around each pair, as pieces and with the new token. -> two of (pairs, n, T)"""
    keys, pieces = text[:-1] * V + text[1:], []
    for a, b in pairs:
        places = np.flatnonzero(keys[BEFORE:len(keys) - AFTER] == a * V + b) + BEFORE
        pieces.append([text[p - BEFORE:p + 2 + AFTER] for p in rng.choice(places, n, replace=False)])
    pieces = torch.from_numpy(np.array(pieces))
    new = (V + torch.arange(len(pairs))).view(-1, 1, 1).expand(-1, n, 1)
    return pieces, torch.cat([pieces[..., :BEFORE], new, pieces[..., BEFORE + 2:]], dim=2)


def nats(model: LanguageModel, sentences):
    """Of every token but the first. (..., T) -> (..., T - 1)"""
    parts = [token_losses(model, ids[:, :-1], ids[:, 1:])[0] for ids in sentences.flatten(0, -2).split(BATCH)]
    return torch.cat(parts).view(*sentences.shape[:-1], -1)


def extended(model: LanguageModel, to_rows, inputs, outputs, sentences, rate: float) -> LanguageModel:
    """A model that has a table, with n tokens more. To `sentences` (n, some or none, T) nothing is fitted but
    their inputs (n, d), made rows by `to_rows`, and their rows of the head (n, D)."""
    new = [nn.Parameter(x.clone()) for x in (inputs, outputs)]

    def tables():
        return {"embed_tokens.weight": torch.cat([model.embed_tokens.weight, to_rows(new[0])]),
                "lm_head.weight": torch.cat([model.lm_head.weight, new[1]])}

    optimizer = torch.optim.Adam([dict(params=[p], lr=rate * p.std().item()) for p in new])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1 / STEPS, STEPS)
    flat = sentences.flatten(0, 1)
    batches = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))].split(BATCH)
    for step in range(STEPS if len(flat) else 0):
        ids = batches[step % len(batches)]
        functional_call(model, tables(), (ids[:, :-1], ids[:, 1:])).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.device("meta"):
        longer = LanguageModel(replace(model.config, vocab_size=model.config.vocab_size + len(inputs)))
    longer.load_state_dict(model.state_dict() | tables(), assign=True)
    return longer.eval().requires_grad_(False)


def nearest_address(generator, free, wanted):
    """For each wanted seed that of the free addresses whose sum is nearest. (free), (n, d_seed) -> (n)"""
    best, found = torch.full((len(wanted),), torch.inf), torch.zeros(len(wanted), dtype=torch.long)
    for part in free.split(2**16):
        distance, index = torch.cdist(wanted, summed(part, generator.codebooks)).min(1)
        found = torch.where(distance < best, part[index], found)
        best = torch.minimum(distance, best)
    return found


def methods(embed, pairs) -> dict:
    """{name: (inputs of the new tokens, whether they are fitted)} for a generator or a table."""
    table = isinstance(embed, nn.Embedding)
    mean = sum(embed(ids) if table else embed.seeds(ids) for ids in torch.from_numpy(pairs).T) / 2
    kind, room = ("row", 0) if table else ("seed", embed.base ** embed.n_coords)
    found = {f"{kind}, pieces' mean": (mean, False), f"{kind}, fitted from the mean": (mean, True)}
    if embed.num_embeddings < room <= 2**26:            # all free addresses are tried
        free = torch.ones(room, dtype=torch.bool).index_fill(0, embed.addresses, False).nonzero().flatten()
        found["nearest free address"] = summed(nearest_address(embed, free, mean), embed.codebooks), False
    return found


def read_run(run: Path):
    """A model that can be given tokens, its tokenizer and its data. Raises ValueError"""
    model, tokenizer, data = read_checkpoint(run)
    check_tokenizer(tokenizer, data, run)
    c = model.config
    if c.model == "dense" or c.generator == "bits" or c.seq_len < BEFORE + AFTER + 1:
        raise ValueError(f"{run} must have an input that can be fitted, an untied head and "
                         f"{BEFORE + AFTER + 1} tokens of context: name another run")
    return model, tokenizer, data


def study(run: Path, words: int, examples: list[int]) -> list[dict]:
    """Every method on one model. -> lines: nats of a `sentence`, and of a token `following` the new one"""
    model, tokenizer, data = read_run(run)
    train, val = (Windows(data, split, 1) for split in ("train", "val"))
    embed, c, V = model.requires_grad_(False).embed_tokens, model.config, model.config.vocab_size
    training = json.loads((newest_checkpoint(run) / "config.json").read_text(encoding="utf-8"))["training"]
    name = f"{c.generator}, width {c.mode_width}, base {embed.base}" if c.model == "leviathan" else c.model
    name += f", D {c.d_model}, L {c.n_layers}"
    name += f", {Path(training['start']).stem}" if training.get("start") else ""
    to_rows = (lambda z: embed.surface(embed.coordinates(z))) if c.model == "leviathan" else lambda rows: rows
    model.materialize()

    train, val = (windows.tokens(0, 0, SEARCHED) for windows in (train, val))
    rng = np.random.default_rng(0)
    pairs = find_words(train[BEFORE:-AFTER], val[BEFORE:-AFTER], V, words, max(examples), tokenizer.eot_token)
    print("new tokens:", ", ".join(repr(tokenizer.decode(pair.tolist())) for pair in pairs), file=sys.stderr)
    pieces, test = sentences(val, pairs, V, TESTED, rng)
    known, set_aside = sentences(train, pairs, V, 2 * max(examples), rng)[1].chunk(2, dim=1)
    outputs = model.lm_head.weight[pairs[:, 0]]         # at first predicted where its first piece was

    def line(method, n, rate, nats, behind):
        return dict(run=str(run), model=name, seed=training.get("seed"), method=method, examples=n, rate=rate,
                    words=words, sentence=nats.sum(-1).mean().item(),
                    following=nats[..., behind:].mean().item())

    lines = [line(AS_TWO, 0, None, nats(model, pieces), BEFORE + 1)]
    for method, (inputs, fitted) in methods(embed, pairs).items():
        for n in examples if fitted else [0]:
            models = {rate: extended(model, to_rows, inputs, outputs, known[:, :n], rate)
                      for rate in (RATES if fitted else [0])}
            rate = min(models, key=lambda rate: nats(models[rate], set_aside).mean())
            lines.append(line(method, n, rate, nats(models[rate], test), BEFORE))
    return lines


def as_table(lines: list[dict]) -> str:
    """Markdown: nats beyond those of the model that reads two tokens; ± one standard deviation of seeds."""
    rows = ["| model | input of the new token | sentences | nats of one | of a following token | runs |",
            "|---" * 6 + "|"]
    two = {line["run"]: line for line in lines if line["method"] == AS_TWO}
    for kind in dict.fromkeys((line["model"], line["method"], line["examples"]) for line in lines):
        own = [line for line in lines if (line["model"], line["method"], line["examples"]) == kind]
        less = kind[1] != AS_TWO
        cells = [spread([line[key] - less * two[line["run"]][key] for line in own], "+" * less)
                 for key in ("sentence", "following")]
        rows.append(f"| {kind[0]} | {kind[1]} | {kind[2] or ''} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description="Add tokens to trained models.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or checkpoints")
    parser.add_argument("--words", type=int, default=32, help="new tokens [%(default)s]")
    parser.add_argument("--examples", type=int, nargs="+", default=[4, 32], help="sentences for each [4 32]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, a JSON line each")
    args = parser.parse_args()
    if min(args.words, *args.examples) < 1:
        raise ValueError("--words and --examples must be at least 1")
    if args.json and (args.json.exists() or not args.json.parent.is_dir()):
        raise ValueError(f"--json {args.json}: name a new file, in a folder that is there")
    for run in args.runs:                           # all, before the work
        read_run(run)
    lines = []
    for run in args.runs:
        lines += study(run, args.words, args.examples)
        if args.json:
            with written_whole(args.json) as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(as_table(lines))


if __name__ == "__main__":
    command("lab.new_tokens", main)
