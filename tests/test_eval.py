"""eval.py: every token counted once, sums that can be checked by another way, intervals that mean something."""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import shards
from checkpoints import save_checkpoint
from common import InputError, read_json
from leviathan import Config, LanguageModel
from prepare_pile import prepare
from tokenizer import token_bytes, tokenizer_from_json, train_tokenizer

SHAPE = dict(vocab_size=300, seq_len=32, d_model=32, n_layers=1, n_heads=2, d_seed=8, mode_width=1)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Three domains, in validation shards of 700 tokens, so that documents go on from one to the next."""
    source = Path(evaluation.__file__).read_text(encoding="utf-8")
    lines = [dict(text=source[i * 90:i * 90 + 40 + 7 * i], meta=dict(pile_set_name="ABC"[i % 3])) for i in range(60)]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "train.txt").write_text(source[:3_000], encoding="utf-8")
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    encoding = train_tokenizer(iter([source]), 300, "small")
    prepare([tmp_path / "train.txt"], tmp_path / "data", encoding, val_files=[tmp_path / "val.jsonl"])
    assert len(read_json(tmp_path / "data/meta.json")["val"]["shards"]) > 3
    return tmp_path / "data"


def test_every_token_is_predicted_once(data):
    """Against the plainest loop over shards and windows, whose documents are told by their first token."""
    model = LanguageModel(Config(**SHAPE))
    meta, counts = read_json(data / "meta.json"), np.load(data / "counts.npy")
    encoding = tokenizer_from_json(meta["tokenizer"])
    spelling, groups = token_bytes(encoding), evaluation.frequency_groups(counts)
    nats, weights, columns = evaluation.evaluate(model, data, "val", spelling, "")

    firsts, total, by_domain, by_group, by_input, of_text, document = 0, 0.0, [0.0] * 4, [0.0] * 11, [0.0] * 11, 0.0, -1
    domain = [meta["domains"].index(json.loads(line)["meta"]["pile_set_name"])
              for line in (data.parent / "val.jsonl").read_text().splitlines()]
    for shard in meta["val"]["shards"]:
        tokens = shards.open_shard(data / shard["file"], shard["tokens"]).astype(np.int64)
        document += tokens[0] == meta["end_of_text"]
        firsts += len(spelling[tokens[0]])
        for start in range(0, len(tokens) - 1, 32):
            ids = torch.from_numpy(tokens[start:start + 33])
            losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none").tolist()
            for previous, target, loss in zip(ids.tolist(), ids[1:].tolist(), losses):
                document += target == meta["end_of_text"]
                total += loss
                by_domain[domain[document]] += loss
                by_group[groups[target]] += loss
                by_input[groups[previous]] += loss
                of_text += loss * bool(spelling[target])
    assert document == 59 and (groups == 0).any()
    assert nats.sum(0) == pytest.approx([of_text, *by_domain, *by_group, *by_input], rel=1e-5)
    assert weights[:, 0].sum() == meta["val"]["bytes"] - firsts                     # each text, to the byte
    assert weights[:, 1:5].sum() == meta["val"]["tokens"] - len(meta["val"]["shards"])
    assert weights[:, 5:16].sum() == weights[:, 16:].sum() == weights[:, 1:5].sum()

    text, numbers = evaluation.as_tables(["it"], "", columns, [nats], weights)
    loss, bits = numbers["rows"][-1]["loss"][0], numbers["rows"][0]["loss"][0] / math.log(2)
    assert loss == pytest.approx(total / weights[:, 1:5].sum(), rel=1e-5)
    assert bits == pytest.approx(of_text / weights[:, 0].sum() / math.log(2), rel=1e-5)
    assert f"| it | {loss:.4f} | {math.exp(loss):,.2f} | {bits:.4f} |  |" in text


def test_groups_of_frequency_by_hand():
    """Two ids never seen; of the 20 others two in each decile, rarest first."""
    counts = np.array([0, *range(20, 0, -1), 0])
    assert evaluation.frequency_groups(counts).tolist() == [0, *(d for d in range(10, 0, -1) for _ in range(2)), 0]
    assert evaluation.frequency_groups(np.zeros(3, dtype=int)).tolist() == [0, 0, 0]


def test_the_interval_is_that_of_a_mean_over_documents():
    """400 documents of 5 tokens that share their document's deviation, of standard deviation 1: 1.96 / sqrt(400) either way."""
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(0.3, 1, (400, 1)), 2, axis=1) * 5
    weights = np.full((400, 2), 5.0)
    weights[9:, 1] = values[9:, 1] = 0                      # the second column stands in nine documents only
    low, high = evaluation.bootstrap(values, weights)[0]
    mean = values[:, 0].sum() / weights[:, 0].sum()
    assert high - low == pytest.approx(2 * 1.96 * (values[:, 0] / 5).std() / 20, rel=0.1) and low < mean < high
    assert np.isnan(evaluation.bootstrap(values, weights)[1]).all()


def checkpoint(folder, data, **fields):
    folder.mkdir()
    model = LanguageModel(Config(**SHAPE | fields))
    meta = read_json(data / "meta.json")
    save_checkpoint(folder, 1, model, torch.optim.AdamW(model.parameters()),
                    dict(config=vars(model.config), training=dict(data=str(data))), meta["tokenizer"], 1)
    return str(folder)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    evaluation.main()


def test_checkpoints_side_by_side(data, tmp_path, monkeypatch, capsys):
    """The first is compared with itself at another context length, and with another model; LAMBADA beside."""
    (tmp_path / "lambada.jsonl").write_text('{"text": "def main():\\n    return None"}\n{"text": "import os"}\n')
    a, b = checkpoint(tmp_path / "a", data), checkpoint(tmp_path / "b", data, model="dense-untied", seq_len=16)
    call(monkeypatch, a, a, b, "--out", tmp_path / "out", "--lambada", tmp_path / "lambada.jsonl")
    printed, tables = capsys.readouterr().out, (tmp_path / "out/tables.md").read_text(encoding="utf-8")
    assert printed.startswith(tables.rstrip()) and (tmp_path / "out/losses.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "out/numbers.json").read_text())["rows"]
    whole = rows[-1]
    assert whole["less_the_first"][0] == 0 and whole["interval"][0] == [0, 0]
    low, high = whole["interval"][1]
    assert low < whole["less_the_first"][1] < high and high - low < 0.1
    assert whole["less_the_first"][1] == pytest.approx(whole["loss"][2] - whole["loss"][0])
    assert {row["name"] for row in rows if row["role"] == "domain" and row["tokens"]} == set("ABC")
    assert "LAMBADA, 2 texts" in tables
    with pytest.raises(InputError, match="out exists: name a new folder with --out"):
        call(monkeypatch, a, "--out", tmp_path / "out")


def test_lambada_by_hand(data, tmp_path):
    """The model knows one word: after a space, "cat". Its texts: right, wrong, longer than the context."""
    encoding = tokenizer_from_json(read_json(data / "meta.json")["tokenizer"])
    model = LanguageModel(Config(**SHAPE)).eval()
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps(dict(text=text)) for text in (
        "def f(self, text):\n    return  text ", "a b", "self " * 200 + "other")))
    nats, right = evaluation.lambada(model, encoding, tmp_path / "some.jsonl", "")
    for text, before, found in (("def f(self, text):\n    return  text", "def f(self, text):\n    return", nats[0]),
                                ("a b", "a", nats[1]), ("self " * 200 + "other", ("self " * 200).strip(), nats[2])):
        ids = [encoding.encode_single_token("<|endoftext|>"), *encoding.encode_ordinary(text)]
        n = len(encoding.encode_ordinary(text)) - len(encoding.encode_ordinary(before))
        ids = torch.tensor([ids[-33:]])
        expected = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")[-n:].sum()
        assert found == pytest.approx(expected.item(), rel=1e-5)
    assert encoding.encode_ordinary("a b") == [97, 32, 98]
    with torch.no_grad():           # a head that has only learned what comes behind "a": " ", then "b"
        ids = torch.tensor([[encoding.encode_single_token("<|endoftext|>"), 97, 32]])
        model.lm_head.weight.zero_()
        model.lm_head.weight[[32, 98]] = model.hidden(model.embed_tokens(ids))[0, 1:]
    assert evaluation.lambada(model, encoding, tmp_path / "some.jsonl", "")[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("content, message", [
    ("", "holds no text"),
    ('{"text": "one"}', "text 1: it has no two words"), ('{"text": 3}', 'some.jsonl:1: not a JSON object'),
    ('{"text": "a b"}\n{"text"', "some.jsonl:2: not valid JSON"), ('{"text": "a \\ud800"}', "text that is not valid Unicode")])
def test_bad_lambada(data, tmp_path, content, message):
    (tmp_path / "some.jsonl").write_text(content)
    encoding = tokenizer_from_json(read_json(data / "meta.json")["tokenizer"])
    with pytest.raises(InputError, match=message):
        evaluation.lambada(LanguageModel(Config(**SHAPE)), encoding, tmp_path / "some.jsonl", "")


def test_bad_input(data, tmp_path, monkeypatch):
    a = checkpoint(tmp_path / "a", data)
    with pytest.raises(InputError, match="no prepared data in .*nowhere"):
        call(monkeypatch, a, "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    meta = read_json(data / "meta.json")
    (data / "meta.json").write_text(json.dumps(meta | dict(val=meta["val"] | dict(documents=2))))
    with pytest.raises(InputError, match="has more documents than the 2 of its meta.json: prepare the data again"):
        call(monkeypatch, a, "--out", tmp_path / "out")
    about = read_json(tmp_path / "a/step-00000001/config.json")
    (tmp_path / "a/step-00000001/config.json").write_text(json.dumps(about | dict(training=3)))
    with pytest.raises(InputError, match="config.json does not say what it was trained on"):
        call(monkeypatch, a, "--out", tmp_path / "out")
    (tmp_path / "a/step-00000001/config.json").write_text(json.dumps(about))
    meta["tokenizer"]["fingerprint"] = "0"
    (data / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="was trained with another tokenizer than .* compare bits per byte"):
        call(monkeypatch, a, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
