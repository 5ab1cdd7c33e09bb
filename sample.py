"""Text from a checkpoint.

    python sample.py out/leviathan-nano --prompt "def main():"
    python sample.py out/leviathan-nano --samples 4 --temperature 1 --top-k 0 --top-p 0.95
    cat story.txt | python sample.py out/leviathan-nano --prompt - --tokens 500
"""
import argparse
import codecs
import json
import re
import signal
import sys
from pathlib import Path

import torch

from leviathan import LanguageModel, load, newest_checkpoint
from prepare_pile import END_OF_TEXT, encode, naming, token_bytes, tokenizer_from_json


def choose_device(wanted: str | None = None, local_rank: int = 0) -> torch.device:
    """cpu, cuda or mps; None: the best there is. Raises ValueError where there is none of that kind."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    wanted = wanted or there[0]
    if wanted not in there:
        raise ValueError(f"--device {wanted}: there is none here; choose from {', '.join(there)}")
    if wanted == "cuda" and local_rank >= (n := torch.cuda.device_count()):
        raise ValueError(f"there are {n} GPUs here: lower --nproc_per_node to that")
    return torch.device(wanted, local_rank) if wanted == "cuda" else torch.device(wanted)


def read_checkpoint(path, device="cpu"):
    """-> model, tokenizer, folder of the training data. Raises ValueError."""
    folder = newest_checkpoint(path)
    model = load(folder, device).eval()
    with naming(f"{folder}: config.json or tokenizer.json", "take another checkpoint"):
        about, known = (json.loads((folder / name).read_text(encoding="utf-8"))
                        for name in ("config.json", "tokenizer.json"))
        tokenizer, data = tokenizer_from_json(known), Path(about["training"]["data"])
        if tokenizer.n_vocab != model.config.vocab_size:
            raise ValueError(f"{tokenizer.n_vocab:,} ids, but the model has {model.config.vocab_size:,}")
    return model, tokenizer, data


class KeyValues:
    """Keys and values of one layer's positions so far."""
    length = 0

    def append(self, k, v):
        """Those of the next positions, (B, H, T, d). -> all so far, two of (B, H, S, d)"""
        if self.length:
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.k, self.v, self.length = k, v, k.shape[2]
        return k, v


def draw(logits, temperature: float, top_k: int, top_p: float, streams):
    """Next tokens, each row's from its own stream, on the CPU: a seed is the same everywhere. (B, V) -> (B)

    top_k: of the k likeliest only, 0 for all; top_p: of the fewest likeliest that have this probability.
    """
    if temperature == 0:
        return logits.cpu().argmax(-1)
    values, candidates = logits.cpu().double().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    probabilities = ((values - values[:, :1]) / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities               # 0 for the likeliest, which stays
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    chosen = [torch.multinomial(row, 1, generator=stream) for row, stream in zip(probabilities, streams)]
    return candidates.gather(1, torch.stack(chosen))[:, 0]


@torch.no_grad()
def generate(model: LanguageModel, ids, n_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, samples: int = 1):
    """Yield n_tokens times the next token of each continuation of ids (T). -> (samples), on the CPU

    Keys and values are kept, so only new tokens pass through the model. When its context is full, the older
    half is forgotten and the newer read again: a token is drawn from seq_len / 2 to seq_len before it.
    """
    T, device = model.config.seq_len, model.norm.weight.device
    streams = [torch.Generator().manual_seed(seed + i) for i in range(samples)]
    ids = new = ids[-T:].to(device).expand(samples, -1)                 # (B, up to T)
    caches = [KeyValues() for _ in model.layers]
    for _ in range(n_tokens):
        if caches[0].length == T:
            new, caches = ids[:, -max(1, T // 2):], [KeyValues() for _ in model.layers]
        hidden = model.hidden(model.embed_tokens(new), caches)[:, -1]   # (B, D)
        token = draw(model.lm_head(hidden), temperature, top_k, top_p, streams)
        yield token
        new = token[:, None].to(device)
        ids = torch.cat([ids, new], dim=1)[:, -T:]


def stream_text(model: LanguageModel, tokenizer, ids: list[int], n_tokens: int, samples: int = 1, **how):
    """Yield what each continuation of `ids` gains, as it comes, `how` as in generate. -> lists of strings

    A character whose bytes are spread over several tokens is held back until it is whole.
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
    parser.add_argument("checkpoint", help="a checkpoint, or a run's folder: its newest")
    parser.add_argument("--prompt", default="", help="text to continue; - reads it from standard input")
    parser.add_argument("--samples", type=int, default=1, help="continuations, side by side [%(default)s]")
    parser.add_argument("--tokens", type=int, default=200, help="how many at most [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 for the likeliest [%(default)s]")
    parser.add_argument("--top-k", type=int, default=50, help="of the k likeliest, 0 for all [%(default)s]")
    parser.add_argument("--top-p", type=float, default=1.0, help="of those of this probability [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of sample 0, then seed + 1 ... [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps [%(default)s]")
    args = parser.parse_args()
    for name, least, most in (("tokens", 1, 2**31), ("samples", 1, 2**31), ("temperature", 0, 1e6),
                              ("top_k", 0, 2**31), ("top_p", 1e-9, 1), ("seed", 0, 2**63)):
        if not least <= getattr(args, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} to {most:g}")

    model, tokenizer, _ = read_checkpoint(args.checkpoint, choose_device(args.device))
    prompt = (sys.stdin.read() if sys.stdin else "") if args.prompt == "-" else args.prompt
    ids = [tokenizer.encode_single_token(END_OF_TEXT), *encode(tokenizer, prompt)]
    if len(ids) + args.tokens - 1 > (T := model.config.seq_len):
        print(f"the model sees the last {max(1, T // 2):,} to {T:,} tokens only", file=sys.stderr)

    if args.samples == 1:
        print(prompt, end="", flush=True)
    texts = [prompt] * args.samples
    how = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    for pieces in stream_text(model, tokenizer, ids, args.tokens, args.samples, **how):
        texts = [text + piece for text, piece in zip(texts, pieces)]
        if args.samples == 1:
            print(pieces[0], end="", flush=True)
    for i, text in enumerate(texts):
        print("" if args.samples == 1 else f"--- sample {i} ---\n{text}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends it without a word
    if hasattr(sys.stdout, "reconfigure"):              # not in a notebook
        sys.stdout.reconfigure(errors="replace")        # where a character is lacking, "?"
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it without a word
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except (RuntimeError, MemoryError) as error:
        if not re.search("(of|enough|allocate) memory|MemoryError", repr(error)):
            raise
        sys.exit(f"sample.py: out of memory ({error!r:.300}): lower --samples")
