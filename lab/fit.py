"""Can the generator hold what a table has learned? It is fitted to the rows of a trained untied twin.

    python -m lab.fit out/dense-untied-nano --mode-width 32 --out out/fitted.pt
    python train.py --start out/fitted.pt --out out/fitted      # goes on, with the twin's blocks and head

Rows count as often as their token stands in the text. What remains of their variance, and what the twin's
validation loss is with the fitted rows in place of its own, is what the generator's form costs by itself:
no language model has to be learned at the same time.
"""
import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import trange

from lab import command
from lab.evaluate import check_tokenizer
from lab.generators import GENERATORS
from leviathan import LanguageModel
from prepare_pile import Windows, quiet, read_counts, tokenizer_to_json
from sample import read_checkpoint
from train import Training, build, save_tensors

BATCH = 2_048               # tokens drawn for a step, by frequency


def fit(table, frequency, embed, steps: int, rate: float, seed: int = 0) -> float:
    """Train `embed` to make the rows. (V, D), (V) -> share of the variance that remains, 0 to 1 and above"""
    rng = torch.Generator().manual_seed(seed)
    mean = (frequency @ table) / frequency.sum()
    variance = frequency @ (table - mean).square().sum(1) / frequency.sum()
    optimizer = torch.optim.AdamW(embed.parameters(), lr=rate, weight_decay=0, betas=(0.9, 0.95))
    rise = max(0.1, 2 / steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=rise)
    for _ in trange(steps, desc="fitting", disable=quiet()):
        ids = torch.multinomial(frequency, BATCH, replacement=True, generator=rng)
        loss = (embed(ids) - table[ids]).square().sum(1).mean() / variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (frequency @ (embed.table() - table).square().sum(1) / frequency.sum() / variance).item()


@torch.no_grad()
def validation_loss(model: LanguageModel, windows: Windows, n: int = 512) -> float:
    """Mean over n windows, evenly spaced."""
    places = torch.linspace(0, len(windows) - 1, min(n, len(windows))).long().tolist()
    batches = (torch.stack([torch.from_numpy(windows[i]) for i in part])
               for part in (places[i:i + 8] for i in range(0, len(places), 8)))
    return sum(model(b[:, :-1], b[:, 1:]).item() * len(b) for b in batches) / len(places)


def main():
    parser = argparse.ArgumentParser(description="Fit a generator to a trained table.", allow_abbrev=False)
    parser.add_argument("run", help="a checkpoint, or a run's folder, of --model dense-untied")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="for train.py --start")
    kinds = [name for name in GENERATORS if name != "bits"]     # which has nothing to fit
    parser.add_argument("--generator", default="v1", choices=kinds, help="[%(default)s]")
    parser.add_argument("--start", help="its addresses and codebooks, as lab.addresses writes them")
    for name, default, about in (("d-seed", 128, "dimensions"), ("mode-width", 64, "numbers in a mode"),
                                 ("steps", 2_000, "of Adam"), ("seed", 0, "of all that is drawn")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} [{default}]")
    parser.add_argument("--rate", type=float, default=1e-2, help="the highest of the steps [%(default)s]")
    args = parser.parse_args()
    if args.out.exists() or min(args.d_seed, args.mode_width, args.steps - 2) < 1 or not args.rate > 0:
        raise ValueError(f"{args.out} exists: name another --out" if args.out.exists() else
                         "--d-seed and --mode-width must be at least 1, --steps 3, --rate above 0")
    args.out.parent.mkdir(parents=True, exist_ok=True)          # before the work
    model, tokenizer, data = read_checkpoint(args.run)
    check_tokenizer(tokenizer, data, args.run)
    if model.config.model != "dense-untied":
        raise ValueError(f"{args.run} is {model.config.model}: fit the table of a dense-untied")
    table, V, D = model.embed_tokens.weight.detach(), model.config.vocab_size, model.config.d_model
    config = replace(model.config, model="leviathan", generator=args.generator, d_seed=args.d_seed,
                     mode_width=args.mode_width)
    embed = build(config, Training(start=args.start, data=str(data), seed=args.seed)).embed_tokens
    with torch.no_grad():                       # from the table's scale, which training has moved
        larger = table.std() / embed.table().std()
        for proj in filter(None, (embed.mode_proj, embed.residual_proj)):
            proj.weight *= larger
    windows = Windows(data, "val", model.config.seq_len)
    frequency = torch.from_numpy(read_counts(data)).float()
    own = validation_loss(model, windows)
    left = fit(table, frequency, embed, args.steps, args.rate, args.seed)
    if not math.isfinite(left):
        raise ValueError(f"the fit diverged at --rate {args.rate}: lower it")
    model.embed_tokens = torch.nn.Embedding.from_pretrained(embed.table())
    size = sum(p.numel() for p in embed.parameters())
    print(f"{size:,} numbers for {V * D:,}: {1 - left:.1%} of the rows' variance; validation loss {own:.4f} "
          f"with the table, {validation_loss(model, windows):.4f} with the fitted rows")
    found = {f"embed_tokens.{name}": x for name, x in embed.state_dict().items()}
    found |= {name: x for name, x in model.state_dict().items() if not name.startswith("embed_tokens.")}
    found["tokenizer"] = tokenizer_to_json(tokenizer)["sha256"]
    save_tensors(found, args.out)


if __name__ == "__main__":
    command("lab.fit", main)
