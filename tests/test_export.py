"""export.py, against the real transformers: same logits, same text, same tokens."""
import re
import sys
from pathlib import Path

import pytest
import torch

import export
from checkpoints import save_checkpoint
from common import InputError
from documents import stdlib_files
from leviathan import Config, LanguageModel
from sample import generate
from tokenizer import END_OF_TEXT, get_encoding, tokenizer_to_json, train_tokenizer

transformers = pytest.importorskip("transformers")
SHAPE = dict(seq_len=128, d_model=64, n_layers=3, n_heads=2, d_seed=16, mode_width=4)
TWINS = [dict(generator="v1"), dict(generator="lev"), dict(model="dense"), dict(model="dense-untied")]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """1,000 pieces of Python's own library: what real text there is on every machine."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files()]
    return [piece for text in texts for piece in re.split(r"(?<=\n)(?=def |class )", text)][:1_000]


@pytest.fixture(scope="module")
def encoding(documents):
    return train_tokenizer(iter(documents), 600, "small")


def checkpoint(folder: Path, twin: dict, encoding) -> LanguageModel:
    """A model with some preference among tokens, saved as train.py does."""
    model = LanguageModel(Config(vocab_size=encoding.n_vocab, **SHAPE | twin))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("layers") and p.ndim == 2:
                p.mul_(4)
    save_checkpoint(folder, 1, model, torch.optim.AdamW(model.parameters()), dict(config=vars(model.config)),
                    tokenizer_to_json(encoding), 1)
    return model


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_llama_has_the_same_logits_and_says_the_same(twin, encoding, tmp_path, monkeypatch):
    model = checkpoint(tmp_path, twin, encoding)
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), "--out", str(tmp_path / "hf")])
    export.main()
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert llama.config.tie_word_embeddings == (twin.get("model") == "dense")
    ids = torch.randint(600, (2, 128))
    with torch.no_grad():
        ours, theirs = model(ids), llama(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.05                                                    # so that 1e-4 says something

    prompt = tokenizer("import os\n", return_tensors="pt").input_ids
    assert prompt[0].tolist() == [encoding.encode_single_token(END_OF_TEXT), *encoding.encode_ordinary("import os\n")]
    said = [token.item() for token in generate(model, prompt[0], 100, temperature=0)]
    theirs = llama.generate(prompt, max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert theirs[0, prompt.shape[1]:].tolist() == said and len(set(said)) > 3


@pytest.mark.parametrize("name", ["small", "o200k_base"])
def test_tokenizer_splits_real_documents_alike(name, encoding, documents):
    try:
        encoding = encoding if name == "small" else get_encoding(name)
    except InputError:
        pytest.skip("o200k_base is not in tiktoken's cache")
    theirs = export.to_fast_tokenizer(encoding, 10**9)
    assert len(theirs) == encoding.n_vocab
    assert theirs.convert_tokens_to_ids(END_OF_TEXT) == encoding.encode_single_token(END_OF_TEXT)
    for text in [*documents, "", " ", f"a {END_OF_TEXT} b", "né 北京 🙂\r\n\u2028\u0085\x00", " \n" * 300]:
        expected = encoding.encode_ordinary(text)
        assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == expected, text
        assert theirs.decode(expected) == text


def test_bad_input(encoding, tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        export.main()

    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run", TWINS[0], encoding)
    with pytest.raises(InputError, match="no checkpoint in .*nowhere"):
        run(tmp_path / "nowhere", "--out", tmp_path / "hf")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there exists: name a new folder with --out"):
        run(tmp_path / "run", "--out", tmp_path / "there")
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(InputError, match=r"cannot write .*hf \(division by zero\)"):
        run(tmp_path / "run", "--out", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match="pip install transformers safetensors"):
        run(tmp_path / "run", "--out", tmp_path / "hf")
