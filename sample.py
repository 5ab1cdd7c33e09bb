"""Text from a checkpoint.

    python sample.py out/leviathan-nano --prompt "def main():"
    python sample.py out/leviathan-nano --samples 4 --temperature 1 --top-k 0 --top-p 0.95
    cat story.txt | python sample.py out/leviathan-nano --prompt - --tokens 500
"""
import argparse
import codecs
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoints import newest_checkpoint
from common import InputError, choose_device, command_line, read_json
from leviathan import LanguageModel
from tokenizer import END_OF_TEXT, encode, token_bytes, tokenizer_from_json


class KeyValues:
    """Keys and values of one layer's positions so far, in memory that is taken once. Two of (B, H, seq_len, head_dim)"""
    def __init__(self, model: LanguageModel, batch: int):
        c, weight = model.config, model.lm_head.weight
        self.k, self.v = weight.new_empty(2, batch, c.n_heads, c.seq_len, c.d_model // c.n_heads)
        self.length = 0

    def append(self, k, v):
        """Those of the next positions, (B, H, T, head_dim). -> all so far, two of (B, H, S, head_dim)"""
        stop = self.length + k.shape[2]
        self.k[:, :, self.length:stop], self.v[:, :, self.length:stop] = k, v
        self.length = stop
        return self.k[:, :, :stop], self.v[:, :, :stop]


class Embeddings:
    """Embeddings of the ids met so far: Leviathan generates each of them once."""
    def __init__(self, model: LanguageModel):
        c, weight = model.config, model.lm_head.weight
        self.embed_tokens = model.embed_tokens
        self.known = torch.zeros(c.vocab_size, dtype=torch.bool, device=weight.device)
        self.table = weight.new_empty(c.vocab_size, c.d_model)          # memory is used for the rows there are

    def __call__(self, ids):
        """(B, T) -> (B, T, D)"""
        new = ids[~self.known[ids]].unique()
        if len(new):
            self.table[new], self.known[new] = self.embed_tokens(new), True
        return F.embedding(ids, self.table)


def draw(logits, temperature: float, top_k: int, top_p: float, rngs):
    """Next tokens, each row's from its own generator, on the CPU so that a seed means the same everywhere. (B, V) -> (B)

    top_k: of the k likeliest tokens only, 0 for all; top_p: of the fewest likeliest that have this much probability together.
    """
    V = logits.shape[-1]
    values, candidates = logits.cpu().double().topk(1 if temperature == 0 else min(top_k or V, V))          # likeliest first
    if temperature == 0:
        return candidates[:, 0]
    probabilities = ((values - values[:, :1]) / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities               # 0 for the likeliest, which therefore stays
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    chosen = [torch.multinomial(row, 1, generator=rng) for row, rng in zip(probabilities, rngs)]
    return candidates.gather(1, torch.stack(chosen))[:, 0]


@torch.no_grad()
def generate(model: LanguageModel, ids, n_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             seed: int = 0, samples: int = 1):
    """Yield n_tokens times the next token of each of `samples` continuations of ids (T). -> (samples), on the CPU

    Only new tokens are embedded and pass through the model, whose keys and values of earlier ones are kept. When its context
    is full, the older half is forgotten and the newer half read again: so a token is drawn from the seq_len / 2 to seq_len
    tokens before it, at the cost of one token but for that reading.
    """
    T, device = model.config.seq_len, model.lm_head.weight.device
    rngs = [torch.Generator().manual_seed(seed + i) for i in range(samples)]        # the first sample is that of samples=1
    ids = new = ids[-T:].to(device).expand(samples, -1)                             # (B, up to T)
    embed, caches = Embeddings(model), [KeyValues(model, samples) for _ in model.layers]
    for _ in range(n_tokens):
        if caches[0].length == T:
            new = ids[:, -max(1, T // 2):]
            for cache in caches:
                cache.length = 0
        hidden = model.hidden(embed(new), caches)[:, -1]                          # (B, D)
        token = draw(model.lm_head(hidden), temperature, top_k, top_p, rngs)
        yield token
        new = token[:, None].to(device)
        ids = torch.cat([ids, new], dim=1)[:, -T:]


def stream_text(model: LanguageModel, tokenizer, ids: list[int], n_tokens: int, samples: int = 1, **how):
    """Yield what each continuation of `ids` gains, as it comes. -> lists of `samples` strings; `how`: see generate

    A character whose bytes are spread over several tokens is held back until it is whole. A sample ends at <|endoftext|>.
    """
    end, spelling = tokenizer.encode_single_token(END_OF_TEXT), token_bytes(tokenizer)
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(samples)]
    ended = [False] * samples
    for tokens in generate(model, torch.tensor(ids), n_tokens, samples=samples, **how):
        ended = [was or token == end for was, token in zip(ended, tokens.tolist())]
        yield [decoder.decode(b"" if over else spelling[token], final=over)
               for decoder, over, token in zip(decoders, ended, tokens.tolist())]
        if all(ended):
            return
    yield [decoder.decode(b"", final=True) for decoder in decoders]


def main():
    parser = argparse.ArgumentParser(description="Text from a checkpoint.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run, of which the newest is taken")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue, - to read it from standard input [the start of a document]")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the text to continue")
    parser.add_argument("--samples", type=int, default=1, help="continuations, side by side [%(default)s]")
    parser.add_argument("--tokens", type=int, default=200, help="how many at most; <|endoftext|> ends a sample [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 for always the likeliest token [%(default)s]")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest tokens only, 0 for all [%(default)s]")
    parser.add_argument("--top-p", type=float, default=1.0,
                        help="draw from the fewest likeliest tokens with this probability together [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; sample i has that of seed + i [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps [%(default)s]")
    args = parser.parse_args()
    for name, least in (("tokens", 1), ("samples", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not getattr(args, name) >= least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top-p is {args.top_p}: it must be above 0 and at most 1")

    device, folder = choose_device(args.device), newest_checkpoint(args.checkpoint)
    tokenizer = tokenizer_from_json(read_json(folder / "tokenizer.json"))
    model = LanguageModel.from_checkpoint(folder, device).eval()
    if model.config.vocab_size != tokenizer.n_vocab:
        raise InputError(f"{folder}: the model has {model.config.vocab_size:,} ids and the tokenizer {tokenizer.n_vocab:,}: "
                         "they do not belong together")
    if args.prompt_file:
        prompt = args.prompt_file.read_text(encoding="utf-8")
    else:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt or ""
    ids = [tokenizer.encode_single_token(END_OF_TEXT), *encode(tokenizer, prompt)]
    seq_len = model.config.seq_len
    if len(ids) > seq_len:
        print(f"the prompt has {len(ids):,} tokens: the model sees the last {seq_len:,}", file=sys.stderr)
    elif len(ids) + args.tokens - 1 > seq_len:
        print(f"the text may outgrow the model's context of {seq_len:,} tokens: it then sees the last {max(1, seq_len // 2):,} to "
              f"{seq_len:,}", file=sys.stderr)

    if args.samples == 1:
        print(prompt, end="", flush=True)
    texts, times = [prompt] * args.samples, [time.perf_counter()]
    for pieces in stream_text(model, tokenizer, ids, args.tokens, args.samples, temperature=args.temperature, top_k=args.top_k,
                              top_p=args.top_p, seed=args.seed):
        times.append(time.perf_counter())
        texts = [text + piece for text, piece in zip(texts, pieces)]
        if args.samples == 1:
            print(pieces[0], end="", flush=True)
    print("" if args.samples == 1 else "\n".join(f"--- sample {i} ---\n{text}" for i, text in enumerate(texts, 1)))
    steps = min(args.tokens, len(times) - 1)
    rate = f", then {(steps - 1) * args.samples / (times[steps] - times[1]):,.0f} tokens/s" if steps > 1 else ""
    print(f"{len(ids):,} tokens read and the first drawn in {times[1] - times[0]:.2f} s{rate}", file=sys.stderr)


if __name__ == "__main__":
    command_line(main)
