"""lab.export against the real transformers: same logits, text and tokens; our generator in their Llama."""
import copy
import json
import re
import sys

import pytest
import torch

from lab import export
from leviathan import Config, TokenGenerator
from prepare_pile import get_encoding, read_meta, stdlib_files, tokenizer_from_json, train_tokenizer
from sample import generate
from test_leviathan import TWINS

transformers = pytest.importorskip("transformers")
TINY = dict(vocab_size=300, seq_len=128, d_model=64, n_layers=3, n_heads=2, d_seed=16, mode_width=4)


@pytest.fixture
def run(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lab.export", *map(str, arguments)])
        export.main()
    return run


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """1,000 pieces of Python's own library: what real text there is on every machine."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files()[:100]]
    return [piece for text in texts for piece in re.split(r"(?<=\n)(?=def |class )", text)][:1_000]


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_llama_has_the_same_logits_and_says_the_same(twin, saved, tiny_data, run, tmp_path):
    model = saved(Config(**TINY | twin), tmp_path / "run")
    with torch.no_grad():           # some preference among tokens, so that equal text says something
        for layer in model.layers:
            for p in layer.parameters():
                p.mul_(10 if p.ndim == 2 else 1)
    torch.save(model.state_dict(), tmp_path / "run/step-00000002/model.pt")
    run(tmp_path / "run", "--out", tmp_path / "new/hf")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "new/hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new/hf")
    assert llama.config.tie_word_embeddings == (twin.get("model") == "dense")
    ids = torch.randint(300, (2, 128))
    with torch.no_grad():
        ours, theirs = model(ids), llama(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.05

    encoding = tokenizer_from_json(read_meta(tiny_data)["tokenizer"])
    batch = tokenizer("import os\n", return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch.input_ids[0].tolist() == [encoding.eot_token, *encoding.encode_ordinary("import os\n")]
    said = [token.item() for token in generate(model, batch.input_ids[0], 100, temperature=0)]
    theirs = llama.generate(**batch, max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert theirs[0, batch.input_ids.shape[1]:].tolist() == said and len(set(said)) > 10


def test_files(saved, run, tiny_data, tmp_path):
    """What transformers 4.57 needs, what llama.cpp's converter needs, and modes as of any new file."""
    saved(Config(**TINY), tmp_path)
    run(tmp_path, "--out", tmp_path / "hf")
    run(tmp_path, "--out", tmp_path / "gguf", "--gguf-ready")
    plain, ready = ([json.loads((tmp_path / out / name).read_text(encoding="utf-8"))
                     for name in ("tokenizer_config.json", "tokenizer.json")] for out in ("hf", "gguf"))
    assert plain[0]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert ready[0] == plain[0] | dict(add_bos_token=True)
    assert ready[1] == plain[1] | dict(post_processor=None)
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gguf")     # as the converter does
    encoding = tokenizer_from_json(read_meta(tiny_data)["tokenizer"])
    assert tokenizer.encode("import os\n") == encoding.encode_ordinary("import os\n")


@pytest.mark.parametrize("name", ["own", "o200k_base"])
def test_tokenizer_splits_real_documents_alike(name, documents):
    try:
        encoding = train_tokenizer(iter(documents), 600, "small") if name == "own" else get_encoding(name)
    except ValueError:
        pytest.skip("o200k_base is not in tiktoken's cache")
    theirs = export.to_fast_tokenizer(encoding, 10**9)
    assert len(theirs) == encoding.n_vocab
    assert theirs.convert_tokens_to_ids("<|endoftext|>") == encoding.eot_token
    odd = "né 北京 🙂\r\n\u2028\u0085\x00"
    for text in [*documents, "", " ", "a <|endoftext|> b", odd, " \n" * 300]:
        expected = encoding.encode_ordinary(text)
        assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == expected, text
        assert theirs.decode(expected) == text


def test_bad_input(saved, run, tmp_path, monkeypatch):
    saved(Config(**TINY), tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint in .*nowhere"):
        run(tmp_path / "nowhere", "--out", tmp_path / "hf")
    (tmp_path / "there").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="there exists: name a new folder with --out"):
        run(tmp_path / "run", "--out", tmp_path / "there")
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"cannot write .*hf \(division by zero\)"):
        run(tmp_path / "run", "--out", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        run(tmp_path / "run", "--out", tmp_path / "hf")


def test_generator_in_a_llama_of_transformers(tmp_path):
    """It trains, generates, deep-copies, and is saved and loaded as the README says."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2))
    llama.set_input_embeddings(TokenGenerator(300, 64, d_seed=16))
    before = copy.deepcopy(llama)
    optimizer, ids = torch.optim.AdamW(llama.parameters(), lr=1e-2), torch.arange(32).repeat(4, 1)
    for _ in range(8):
        optimizer.zero_grad()
        llama(ids, labels=ids).loss.backward()
        optimizer.step()
    assert llama(ids, labels=ids).loss < before(ids, labels=ids).loss - 1
    assert all(not p.equal(old) for p, old in zip(llama.parameters(), before.parameters()))

    llama.save_pretrained(tmp_path)
    torch.save(llama.get_input_embeddings().state_dict(), tmp_path / "generator.pt")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    loaded.set_input_embeddings(TokenGenerator(300, 64, d_seed=16))
    loaded.get_input_embeddings().load_state_dict(torch.load(tmp_path / "generator.pt", weights_only=True))
    said = [model.generate(ids[:1, :8], max_new_tokens=20, do_sample=False, pad_token_id=0)
            for model in (llama, loaded, copy.deepcopy(llama))]
    assert loaded(ids).logits.equal(llama(ids).logits) and said[0].equal(said[1]) and said[0].equal(said[2])
