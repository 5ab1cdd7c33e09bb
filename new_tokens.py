"""A token added to a trained model (open question 3 of the paper): what it takes, and what it is worth.

    python new_tokens.py out/leviathan-nano out/dense-untied-nano       # runs on the same data -> a table

The new tokens are words that the tokenizer cuts in two: the pairs of tokens that belong together most. Each becomes one token
and is learned from a few sentences with the whole model frozen: its input, and its row of the head. The input is a seed of
d_seed numbers, which stands in for a codebook sum (Leviathan), or a row of the table (its dense twin). Or nothing is
fitted: the new token takes a free address, or the mean of its pieces. Measured on sentences of the validation text, against
the same model that reads the word as two tokens.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from addresses import approximate
from checkpoints import newest_checkpoint
from common import InputError, command_line, read_json
from leviathan import LanguageModel
from quality import spread
from shards import Windows, read_meta
from tokenizer import tokenizer_from_json

BEFORE, AFTER = 32, 16          # tokens of a sentence that stand before and behind the new one
SEARCHED = 10_000_000           # training tokens in which sentences are looked for
TESTED = 16                     # sentences of validation for each new token
STEPS, BATCH = 40, 32           # of Adam, whose rate falls linearly to 0; sentences
RATES = (0.1, 0.3, 1.0)         # of Adam, in standard deviations of what it fits: the best is taken, by sentences set aside


def find_words(train: np.ndarray, val: np.ndarray, V: int, n: int, examples: int, never: int = -1) -> np.ndarray:
    """The n pairs of tokens that belong together most, by count(ab)^2 / (count(a) count(b)). -> (n, 2)

    Of those with 2 * examples places in training, half of which are set aside, and TESTED in validation.
    """
    keys, counts = np.unique(train[:-1].astype(np.int64) * V + train[1:], return_counts=True)
    in_val, val_counts = np.unique(val[:-1].astype(np.int64) * V + val[1:], return_counts=True)
    alone = np.bincount(train, minlength=V).astype(float)
    enough = (counts >= 2 * examples) & np.isin(keys, in_val[val_counts >= TESTED])
    keys, counts = keys[enough], counts[enough]
    order = np.argsort(-counts.astype(float)**2 / (alone[keys // V] * alone[keys % V]), kind="stable")
    chosen, used = [], {never}
    for key in keys[order]:
        pair = (int(key // V), int(key % V))
        if pair[0] != pair[1] and not used & set(pair):         # so that no two of them overlap
            chosen.append(pair)
            used |= set(pair)
    if len(chosen) < n:
        raise InputError(f"only {len(chosen)} pairs of tokens stand together often enough, of {n}: lower --words or --examples")
    return np.array(chosen[:n])


def sentences(text: np.ndarray, pairs: np.ndarray, V: int, n: int, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """n sentences around each pair, as pieces and with the new token. -> two of (pairs, n, T)"""
    keys, pieces = text[:-1].astype(np.int64) * V + text[1:], []
    for a, b in pairs:
        places = np.flatnonzero(keys[BEFORE:len(keys) - AFTER] == a * V + b) + BEFORE
        pieces.append([text[p - BEFORE:p + 2 + AFTER] for p in rng.choice(places, n, replace=False)])
    pieces = torch.from_numpy(np.array(pieces).astype(np.int64))
    new = (V + torch.arange(len(pairs))).view(-1, 1, 1).expand(-1, n, 1)
    return pieces, torch.cat([pieces[..., :BEFORE], new, pieces[..., BEFORE + 2:]], dim=2)


def losses(model, sentences):
    """Nats of every token but the first. (..., T) -> (..., T - 1)"""
    parts = [F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="none")
             for part in sentences.flatten(0, -2).split(BATCH)]
    return torch.cat(parts).view(*sentences.shape[:-1], -1)


class Extended(nn.Module):
    """A frozen model with n tokens more, ids V ... V + n - 1: their inputs are seeds (n, d_seed) or rows (n, D)."""
    def __init__(self, model: LanguageModel, table, inputs, outputs, seeds: bool):
        super().__init__()
        self.model, self.seeds = [model], seeds                 # in a list: its parameters are not ours
        self.table, self.inputs, self.outputs = table, nn.Parameter(inputs.clone()), nn.Parameter(outputs.clone())

    def forward(self, ids):
        """(B, T) -> logits (B, T, V + n)"""
        model = self.model[0]
        rows = model.embed_tokens.from_seeds(self.inputs) if self.seeds else self.inputs
        hidden = model.hidden(F.embedding(ids, torch.cat([self.table, rows])))
        return hidden @ torch.cat([model.lm_head.weight.detach(), self.outputs]).T

    def fit(self, sentences, rate: float):
        """Adam on inputs and head rows alone."""
        optimizer = torch.optim.Adam([dict(params=[p], lr=rate * p.std().item()) for p in self.parameters()])
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1 / STEPS, STEPS)
        flat = sentences.flatten(0, 1)
        batches = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))].split(BATCH)
        for step in range(STEPS):
            losses(self, batches[step % len(batches)]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return self


def free_addresses(generator, wanted=None, n: int = 0):
    """The first n free addresses; or, for each wanted seed (n, d_seed), the free address whose sum is nearest. -> (n)"""
    room = generator.config.base ** generator.config.n_coords
    if not generator.num_embeddings + n <= room <= 2**28:
        raise InputError(f"{room - generator.num_embeddings:,} of {room:,} addresses are free: {n:,} are wanted, and at most "
                         f"{2**28:,} in all, which are tried one by one")
    taken = torch.zeros(room, dtype=torch.bool)
    taken[generator.addresses.cpu()] = True
    if wanted is None:
        return (~taken).nonzero().flatten()[:n]
    best, found = torch.full((len(wanted),), torch.inf), torch.zeros(len(wanted), dtype=torch.long)
    for part in torch.arange(room).split(2**16):
        distance = torch.cdist(wanted, approximate(part, generator.codebooks)).masked_fill(taken[part], torch.inf)
        nearest, index = distance.min(1)
        found = torch.where(nearest < best, part[index], found)
        best = torch.minimum(nearest, best)
    return found


@torch.no_grad()
def methods(model: LanguageModel, pairs) -> dict:
    """{name: (inputs, whether they are seeds, whether they are fitted)} for this kind of model."""
    first, second = torch.from_numpy(pairs).T
    if model.config.model != "leviathan":
        table = model.embed_tokens.weight.detach()
        mean = (table[first] + table[second]) / 2
        return {"row, pieces' mean": (mean, False, False), "row, fitted from the mean": (mean, False, True)}
    generator = model.embed_tokens
    mean = sum(approximate(generator.addresses[ids], generator.codebooks) for ids in (first, second)) / 2
    free = approximate(free_addresses(generator, n=len(pairs)), generator.codebooks)
    near = approximate(free_addresses(generator, mean), generator.codebooks)
    return {"first free address": (free, True, False), "nearest free address": (near, True, False),
            "seed, pieces' mean": (mean, True, False), "seed, fitted from the mean": (mean, True, True)}


def study(checkpoint: Path, words: int, examples: list[int]) -> list[dict]:
    """Every method on one model.

    -> lines with nats of a `sentence`, in which the new token is one or two, and nats of a token `following` it
    """
    model = LanguageModel.from_checkpoint(checkpoint).eval().requires_grad_(False)
    training, c = read_json(checkpoint / "config.json")["training"], model.config
    if c.model == "dense":
        raise InputError(f"{checkpoint} has a tied table, whose rows are the head's too: use dense-untied")
    if c.seq_len < BEFORE + AFTER + 1:
        raise InputError(f"{checkpoint} has a context of {c.seq_len}: sentences take {BEFORE + AFTER + 1}")
    V, most, rng = c.vocab_size, max(examples), np.random.default_rng(0)
    train, val = (np.asarray(Windows(training["data"], split, c.seq_len).shards[0][:SEARCHED]) for split in ("train", "val"))
    end_of_text = read_meta(Path(training["data"]))["end_of_text"]
    pairs = find_words(train[BEFORE:-AFTER], val[BEFORE:-AFTER], V, words, most, never=end_of_text)
    tokenizer = tokenizer_from_json(read_json(checkpoint / "tokenizer.json"))
    print("new tokens:", ", ".join(repr(tokenizer.decode(pair.tolist())) for pair in pairs), file=sys.stderr)
    _, known = sentences(train, pairs, V, 2 * most, rng)
    fitted_to, set_aside = known[:, :most], known[:, most:]
    pieces, test = sentences(val, pairs, V, TESTED, rng)
    outputs = model.lm_head.weight[torch.from_numpy(pairs[:, 0])]       # at first predicted where its first piece was

    name = c.model if c.model != "leviathan" else (
        f"{'paper ' * c.paper}{c.generator}, width {c.mode_width}, {training['addresses']} addresses of base {c.base}")
    name += ", from vectors" * (training["start"] == "vectors")
    table = model.embed_tokens.table() if c.model == "leviathan" else model.embed_tokens.weight

    def line(method, n, rate, nats, behind):
        return dict(model=name, method=method, examples=n, rate=rate, sentence=nats.sum(-1).mean().item(),
                    following=nats[..., behind:].mean().item(), seed=training["seed"], words=words)

    with torch.no_grad():
        lines = [line("as two tokens", 0, None, losses(model, pieces), BEFORE + 1)]
    for method, (inputs, seeds, fitted) in methods(model, pairs).items():
        best = None
        for n in sorted(examples, reverse=True) if fitted else [0]:
            found = {}
            for rate in (RATES if best is None else [best]) if fitted else [None]:  # chosen with the most sentences, and kept
                extended = Extended(model, table, inputs, outputs, seeds)
                if fitted:
                    extended.fit(fitted_to[:, :n], rate)
                with torch.no_grad():
                    found[rate] = losses(extended, set_aside).mean().item() if fitted else 0, losses(extended, test)
            best = min(found, key=lambda rate: found[rate][0])
            lines.append(line(method, n, best, found[best][1], BEFORE))
    return lines


def as_table(lines: list[dict]) -> str:
    """Markdown: differences to the same model that reads two tokens; means ± one standard deviation over its seeds."""
    rows = ["| model | input of the new token | sentences for each | nats a sentence | nats a following token | seeds |",
            "|---|---|---|---|---|---|"]
    kinds = dict.fromkeys((line["model"], line["method"], line["examples"]) for line in lines)
    for kind in kinds:
        own = [line for line in lines if (line["model"], line["method"], line["examples"]) == kind]
        two = {line["seed"]: line for line in lines if line["model"] == kind[0] and line["method"] == "as two tokens"}
        cells = [spread([line[key] - (0 if kind[1] == "as two tokens" else two[line["seed"]][key]) for line in own])
                 for key in ("sentence", "following")]
        signed = [cell if kind[1] == "as two tokens" or cell.startswith("-") else f"+{cell}" for cell in cells]
        rows.append(f"| {kind[0]} | {kind[1]} | {kind[2] or ''} | {' | '.join(signed)} | {len(own)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description="Add tokens to trained models.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or checkpoints")
    parser.add_argument("--words", type=int, default=32, help="new tokens [%(default)s]")
    parser.add_argument("--examples", type=int, nargs="+", default=[4, 32], help="sentences for each [4 32]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, a JSON line each")
    args = parser.parse_args()
    if min(args.words, *args.examples) < 1:
        raise InputError("--words and --examples must be at least 1")
    if args.json and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: there is no folder {args.json.parent}")
    lines = []
    for run in args.runs:
        lines += study(newest_checkpoint(run), args.words, args.examples)
        if args.json:
            args.json.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(as_table(lines))


if __name__ == "__main__":
    command_line(main)
