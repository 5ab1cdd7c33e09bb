"""The method in one figure, made from a checkpoint: basis, learned splines, tokens' coordinates, a map of their embeddings.

    python picture.py out/leviathan-nano --twin out/dense-untied-nano --out out/method.png

The map shows the two principal components of the embeddings of the most frequent tokens that are words; beside it that of a dense
twin trained on the same data, where one is named.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoints import newest_checkpoint, training_data
from common import InputError, command_line, read_json
from leviathan import LanguageModel, digits, spline_basis
from shards import read_counts
from tokenizer import token_bytes, tokenizer_from_json

WORDS = 1_000           # frequent words that span the map, ...
SHOWN = 200             # ... and how many of them are written at most, the most frequent first
ANCHORS = 5             # words whose nearest are shown
COLOURS = "tab10"


def load(path: Path) -> tuple[LanguageModel, object, np.ndarray]:
    """Model, tokenizer and the counts of the ids in its training data."""
    folder = newest_checkpoint(path)
    model = LanguageModel.from_checkpoint(folder).eval()
    counts = read_counts(training_data(folder), model.config.vocab_size)
    return model, tokenizer_from_json(read_json(folder / "tokenizer.json")), counts


def frequent_words(tokenizer, counts: np.ndarray) -> dict[int, str]:
    """The most frequent tokens that are a space and letters. -> {id: word}"""
    words = {}
    for token in np.argsort(-counts, kind="stable").tolist():
        text = token_bytes(tokenizer)[token].decode("utf-8", errors="replace")
        if len(text) > 3 and text[0] == " " and text[1:].isalpha():
            words[token] = text[1:]
        if len(words) == WORDS:
            break
    return words


def draw_map(ax, rows, words: list[str]):
    """Words at the two principal components of their rows (n, D), made of length 1; one that would cover another is left out."""
    rows = F.normalize(rows - rows.mean(0), dim=1)
    rows = rows - rows.mean(0)
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    places = (rows @ Vh[:2].T).numpy()
    share = S[:2].square().sum() / S.square().sum()
    ax.set_title(f"{ax.get_title()}: two principal components, {share:.0%} of their variance", fontsize=10)
    ax.scatter(*places.T, s=1.5, color="lightgray")
    ax.autoscale_view()                                 # now, since boxes of words are compared below
    renderer, taken = ax.figure.canvas.get_renderer(), []
    for place, word in zip(places, words):
        text = ax.annotate(word, place, ha="center", va="center", fontsize=6.5)
        box = text.get_window_extent(renderer).padded(0.5)
        if len(taken) < SHOWN and not any(box.overlaps(other) for other in taken):
            taken.append(box)
        else:
            text.remove()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="The method in one figure, made from a checkpoint.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a Leviathan's checkpoint, or the folder of its run")
    parser.add_argument("--twin", type=Path, help="a dense twin's, trained on the same data")
    parser.add_argument("--out", type=Path, default=Path("method.png"), help="a new file [%(default)s]")
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"{args.out} exists: name a new file with --out")
    model, tokenizer, counts = load(args.checkpoint)
    if model.config.model != "leviathan":
        raise InputError(f"{args.checkpoint} is {model.config.model}, which has no generator: name it with --twin")
    generator, c = model.embed_tokens, model.config
    words = frequent_words(tokenizer, counts)
    if len(words) < ANCHORS:
        raise InputError(f"the tokenizer has only {len(words)} words among its tokens: there is nothing to show")
    ids = torch.tensor(list(words))

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(13, 9), layout="constrained")
    upper, lower = fig.subfigures(2, 1, height_ratios=[1, 1.7])
    basis, curves, coordinates = upper.subplots(1, 3, width_ratios=[1, 1, 1.3])

    x = torch.linspace(0, 1, 1_001)
    B = spline_basis(x, c.n_knots)                                              # (1001, κ)
    basis.plot(x.numpy(), B.numpy(), lw=1)
    basis.set_title(f"the basis: {c.n_knots} quadratic B-splines", fontsize=10)
    basis.set_xlabel("coordinate ẑ")

    colours = plt.get_cmap(COLOURS).colors
    moved = (generator.splines - 1).square().mean((1, 2, 3)).topk(3).indices    # dimensions whose curves are least flat
    for d, colour in zip(moved.tolist(), colours):
        for channel in range(3):
            phi = B @ generator.splines[d, 0, :, channel]
            curves.plot(x.numpy(), phi.numpy(), color=colour, lw=1.2, alpha=1 - 0.25 * channel,
                        label=f"dimension {d}" if not channel else None)
    curves.set_title("learned φ of 3 dimensions, 3 channels each", fontsize=10)
    curves.set_xlabel("coordinate ẑ")
    curves.legend(fontsize=7)

    where = digits(generator.addresses[ids], c.base, c.n_coords)                # (n, k)
    latent = generator.latent(where)[:, 0]                                      # (n, d_seed), of the first mode
    near = torch.cdist(latent[:ANCHORS], latent).argsort(dim=1)[:, :3].flatten()        # each with its two nearest
    coordinates.imshow(latent[near, :64].numpy(), aspect="auto", interpolation="nearest", cmap="RdBu", vmin=0, vmax=1)
    coordinates.set_yticks(range(len(near)), [f"{words[ids[i].item()]}  {tuple(where[i].tolist())}" for i in near], fontsize=7)
    coordinates.set_title("digits and ẑ of words, and of their two nearest", fontsize=10)
    coordinates.set_xlabel("dimension, the first 64; red 0, blue 1")

    maps = [(f"embeddings generated by {args.checkpoint.name}", model.embed_tokens(ids))]
    if args.twin:
        twin, other, _ = load(args.twin)
        if other.n_vocab != tokenizer.n_vocab:
            raise InputError(f"{args.twin} has another tokenizer than {args.checkpoint}: name a twin trained on the same data")
        maps.append((f"those in the table of {args.twin.name}", twin.embed_tokens(ids)))
    axes = np.atleast_1d(lower.subplots(1, len(maps)))
    for ax, (title, _) in zip(axes, maps):
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=10)
    fig.canvas.draw()
    fig.set_layout_engine("none")                       # the places for words stay as they are
    for ax, (_, rows) in zip(axes, maps):
        draw_map(ax, rows, list(words.values()))
    fig.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command_line(main)
