"""A checkpoint as a folder that transformers loads: a Leviathan whose table is materialised is a Llama.

    pip install transformers
    python -m lab.export out/leviathan-nano --out out/leviathan-nano-hf

    model = transformers.LlamaForCausalLM.from_pretrained("out/leviathan-nano-hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out/leviathan-nano-hf")     # <|endoftext|> first
"""
import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import lab.generators  # noqa: F401  whose models can be loaded then
from lab import command
from leviathan import LanguageModel
from prepare_pile import END_OF_TEXT
from sample import read_checkpoint


def to_llama(model: LanguageModel, end_of_text: int):
    """The same function as a transformers.LlamaForCausalLM; tied if `dense`. Materialises `model`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model.materialize().config
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=4 * c.d_model,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, max_position_embeddings=c.seq_len,
        rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=c.model == "dense",
        bos_token_id=end_of_text, eos_token_id=end_of_text))
    llama.load_state_dict({name if name.startswith("lm_head") else f"model.{name}": weight
                           for name, weight in model.state_dict().items()})
    return llama.eval()


def to_fast_tokenizer(encoding, seq_len: int):
    """The same tokenizer as a transformers.PreTrainedTokenizerFast, converted by transformers.

    It starts each text with <|endoftext|>, as every document in training does. Where a *text* spells that
    out, it takes it for the token, unless called with split_special_tokens=True.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    converter = TikTokenConverter(pattern=encoding._pat_str)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks           # in place of a file
    tokenizer = converter.converted()
    names = {i: name for name, i in encoding._special_tokens.items()}
    first = len(encoding._mergeable_ranks)      # ids without a token need a name, or later ones would move up
    tokenizer.add_special_tokens([AddedToken(names.get(i, f"<|unused_{i}|>"), special=True, normalized=False)
                                  for i in range(first, encoding.n_vocab)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, encoding.eot_token)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=seq_len,
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"])


def change(file: Path, **fields):
    """Set fields of a JSON file."""
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(known | fields, indent=1), encoding="utf-8")


def export(checkpoint, out: Path, gguf_ready: bool = False):
    """Write the folder `out`, whole or not at all. Raises ValueError."""
    model, encoding, _ = read_checkpoint(checkpoint)
    llama = to_llama(model, encoding.eot_token)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as aside:
            folder = Path(aside) / out.name
            llama.save_pretrained(folder)
            for weights in folder.glob("*.safetensors"):            # which nobody else may read, as written
                shutil.copymode(folder / "config.json", weights)
            to_fast_tokenizer(encoding, model.config.seq_len).save_pretrained(folder)
            change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
            if gguf_ready:
                change(folder / "tokenizer_config.json", add_bos_token=True)
                change(folder / "tokenizer.json", post_processor=None)
            os.replace(folder, out)
    except Exception as error:          # safetensors and tokenizers raise their own on a full disk
        raise ValueError(f"cannot write {out} ({error})") from error


def main():
    parser = argparse.ArgumentParser("lab.export", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="or the folder of a run, of which the newest is taken")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--gguf-ready", action="store_true",
                        help="for llama.cpp's converter; in transformers, texts then lack <|endoftext|>")
    args = parser.parse_args()
    if os.path.lexists(args.out):
        raise ValueError(f"{args.out} exists: name a new folder with --out")
    try:            # here, since it takes seconds
        import transformers
    except ImportError as error:
        raise ValueError(f"this needs one package more ({error}): pip install transformers") from error
    transformers.utils.logging.disable_progress_bar()
    export(args.checkpoint, args.out, args.gguf_ready)
    print(f"wrote {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    command("lab.export", main)
