"""Text from a checkpoint.

    python sample.py out/leviathan-nano --prompt "def main():"
    cat story.txt | python sample.py out/leviathan-nano --prompt - --tokens 500
"""
import argparse
import codecs
import sys
from pathlib import Path

import torch

from common import InputError, command_line, newest_checkpoint, read_json
from leviathan import LanguageModel
from tokenizer import END_OF_TEXT, tokenizer_from_json


def stream_text(model, tokenizer, ids: list[int], **how):
    """Yield the continuation of `ids` as it comes. `how`: LanguageModel.generate's n_tokens, temperature, top_k, seed.

    A character whose bytes are spread over several tokens is held back until it is whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids = torch.tensor(ids, device=next(model.parameters()).device)
    for token in model.generate(ids, **how):
        yield decoder.decode(tokenizer.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def main():
    parser = argparse.ArgumentParser(description="Text from a checkpoint.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run, of which the newest is taken")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue, - to read it from standard input [the start of a document]")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens to write [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 for always the likeliest token [%(default)s]")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest tokens only, 0 for all [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps [%(default)s]")
    args = parser.parse_args()
    for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(args, name) >= least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")

    folder = newest_checkpoint(args.checkpoint)
    tokenizer = tokenizer_from_json(read_json(folder / "tokenizer.json"))
    model = LanguageModel.from_checkpoint(folder, args.device).eval()
    if model.config.vocab_size != tokenizer.n_vocab:
        raise InputError(f"{folder}: the model has {model.config.vocab_size:,} ids and the tokenizer {tokenizer.n_vocab:,}: "
                         "they do not belong together")
    if args.prompt_file:
        prompt = args.prompt_file.read_text(encoding="utf-8")
    else:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt or ""
    ids = [tokenizer.encode_single_token(END_OF_TEXT), *tokenizer.encode_ordinary(prompt)]
    if len(ids) > model.config.seq_len:
        print(f"the prompt has {len(ids):,} tokens: the model sees the last {model.config.seq_len:,}", file=sys.stderr)
    print(prompt, end="", flush=True)
    for text in stream_text(model, tokenizer, ids, n_tokens=args.tokens, temperature=args.temperature, top_k=args.top_k,
                            seed=args.seed):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    command_line(main)
