"""A checkpoint as a folder that Hugging Face's transformers loads: a Leviathan whose table is materialised is a Llama.

    pip install transformers safetensors
    python export.py out/leviathan-nano --out out/leviathan-nano-hf

    model = transformers.LlamaForCausalLM.from_pretrained("out/leviathan-nano-hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out/leviathan-nano-hf")       # puts <|endoftext|> first, as in training
"""
import argparse
import os
import shutil
from pathlib import Path

import torch

from checkpoints import newest_checkpoint
from common import InputError, command_line, read_json
from leviathan import LanguageModel
from tokenizer import END_OF_TEXT, tokenizer_from_json


def to_llama(model: LanguageModel, end_of_text: int):
    """The same function as a transformers.LlamaForCausalLM; untied but for the tied twin. Materialises `model` in place."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model.materialize().config
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=4 * c.d_model, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, max_position_embeddings=c.seq_len, rms_norm_eps=1e-6, rope_theta=10_000.0,
        tie_word_embeddings=c.model == "dense", bos_token_id=end_of_text, eos_token_id=end_of_text))
    llama.load_state_dict({name if name.startswith("lm_head") else f"model.{name}": weight
                           for name, weight in model.state_dict().items()})
    return llama.eval()


def to_fast_tokenizer(encoding, seq_len: int):
    """The same tokenizer as a transformers.PreTrainedTokenizerFast, converted by transformers.

    It starts each text with <|endoftext|>, as every document in training does. Where a *text* spells that out, it takes it for the
    token, unless called with split_special_tokens=True.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    converter = TikTokenConverter(pattern=encoding._pat_str)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks           # in place of a file
    tokenizer = converter.converted()
    names = {i: name for name, i in encoding._special_tokens.items()}
    first = len(encoding._mergeable_ranks)          # ids without a token need a name too, or those behind them would move up
    tokenizer.add_special_tokens([AddedToken(names.get(i, f"<|unused_{i}|>"), special=True, normalized=False)
                                  for i in range(first, encoding.n_vocab)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, encoding.encode_single_token(END_OF_TEXT))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
                                   model_max_length=seq_len, clean_up_tokenization_spaces=False)


def export(checkpoint: Path, out: Path, dtype: str = "float32"):
    """Write `out`, whole or not at all. Raises InputError."""
    folder = newest_checkpoint(checkpoint)
    encoding = tokenizer_from_json(read_json(folder / "tokenizer.json"))
    llama = to_llama(LanguageModel.from_checkpoint(folder), encoding.encode_single_token(END_OF_TEXT)).to(getattr(torch, dtype))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        llama.save_pretrained(partial)
        to_fast_tokenizer(encoding, llama.config.max_position_embeddings).save_pretrained(partial)
        os.replace(partial, out)
    except Exception as error:          # safetensors and tokenizers raise their own on a full disk
        raise InputError(f"cannot write {out} ({str(error).splitlines()[0]})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description="A checkpoint as a Llama for Hugging Face's transformers.", allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run, of which the newest is taken")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="[%(default)s]")
    args = parser.parse_args()
    try:            # here, since it takes seconds
        import safetensors  # noqa: F401
        import transformers
    except ImportError as error:
        raise InputError(f"this needs two packages more ({error}): pip install transformers safetensors") from error
    transformers.utils.logging.disable_progress_bar()
    if args.out.exists():
        raise InputError(f"{args.out} exists: name a new folder with --out")
    export(args.checkpoint, args.out, args.dtype)
    print(f"wrote {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    command_line(main)
