"""lab.evaluate: every token counted once, sums checked by another way, intervals that mean something."""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare_pile
from lab import evaluate
from leviathan import Config, LanguageModel
from prepare_pile import Windows, open_shard, prepare, read_counts, token_bytes, tokenizer_from_json

TINY = dict(vocab_size=300, seq_len=32, d_model=32, n_layers=1, n_heads=2, d_seed=8, mode_width=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents of three domains, in validation shards of at most 700 tokens."""
    folder, source = tmp_path_factory.mktemp("domains"), Path(evaluate.__file__).read_text(encoding="utf-8")
    lines = [dict(text=source[90 * i:97 * i + 40], meta=dict(pile_set_name="ABC"[i % 3])) for i in range(60)]
    (folder / "val.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (folder / "train.txt").write_text(source[:3_000], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_pile, "PART_TOKENS", 700)
        prepare([folder / "train.txt"], folder / "data", val_files=[folder / "val.jsonl"], vocab_size=300)
    return folder / "data"


@pytest.fixture
def run(monkeypatch, capsys):
    """What the command prints."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lab.evaluate", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr().out
    return run


def test_every_token_is_predicted_once(data, monkeypatch):
    """Against the plainest loop over shards and windows, whose documents are told by their first token."""
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 100)            # three windows
    model, windows, counts = LanguageModel(Config(**TINY)), Windows(data, "val", 1), read_counts(data)
    spelling = token_bytes(tokenizer_from_json(windows.meta["tokenizer"]))
    columns, sums, weights = evaluate.evaluate(model, windows, spelling, counts)
    groups = evaluate.frequency_groups(counts)
    assert len(windows.shards) > 3 and (groups == 0).any()

    expected, document = {}, -1
    lines = (data.parent / "val.jsonl").read_text(encoding="utf-8").splitlines()
    for tokens in (open_shard(data, shard) for shard in windows.shards):
        document += 1                                               # each shard begins with one
        for start in range(0, len(tokens) - 1, 32):
            ids = torch.from_numpy(tokens[start:start + 33].astype(np.int64))
            losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none").tolist()
            for previous, target, loss in zip(ids.tolist(), ids[1:].tolist(), losses):
                document += target == windows.meta["end_of_text"]
                size = len(spelling[target])
                for key, value, weight in (
                        (("all", "loss"), loss, 1),
                        (("all", "bits per byte"), loss / math.log(2) * (size > 0), size),
                        (("domain", json.loads(lines[document])["meta"]["pile_set_name"]), loss, 1),
                        (("target", evaluate.FREQUENCIES[groups[target]]), loss, 1),
                        (("input", evaluate.FREQUENCIES[groups[previous]]), loss, 1)):
                    expected.setdefault(key, np.zeros((2, 60)))[:, document] += value, weight
    assert document == 59 and {role for role, _ in columns} == {role for role, _ in expected}
    for i, column in enumerate(columns):
        values = expected.get(column, np.zeros((2, 60)))
        np.testing.assert_allclose(sums[:, i], values[0], rtol=1e-4)
        assert weights[:, i].tolist() == values[1].tolist()
    assert weights[:, 1].sum() == windows.meta["val"]["bytes"]      # each text, to the byte

    rows = evaluate.compare(columns, [sums], weights)
    table = evaluate.as_markdown(["it"], rows)
    loss, bits = sums[:, 0].sum() / weights[:, 0].sum(), sums[:, 1].sum() / weights[:, 1].sum()
    assert f"| {loss:.4f} |" in table and f"| {math.exp(loss):,.2f} |" in table and f"| {bits:.4f} |" in table
    assert {row["name"] for row in rows if row["role"] == "domain"} == set("ABC")


def test_groups_of_frequency_by_hand():
    """Two ids never seen; of the 20 others two in each decile, rarest first."""
    counts = np.array([0, *range(20, 0, -1), 0])
    assert evaluate.frequency_groups(counts).tolist() == [0, *(10 - i // 2 for i in range(20)), 0]
    assert evaluate.frequency_groups(np.zeros(3, dtype=int)).tolist() == [0, 0, 0]


def test_the_interval_is_that_of_a_mean_over_documents():
    """400 documents of 5 tokens, which share a deviation of scale 1: 1.96 / sqrt(400) either way."""
    values = np.repeat(np.random.default_rng(1).normal(0.3, 1, (400, 1)), 2, axis=1) * 5
    weights = np.full((400, 2), 5.0)
    weights[9:, 1] = values[9:, 1] = 0                  # the second column stands in nine documents only
    (low, high), none = evaluate.bootstrap(values[None], weights)[0]
    assert high - low == pytest.approx(2 * 1.96 * (values[:, 0] / 5).std() / 20, rel=0.1)
    assert low < values[:, 0].sum() / weights[:, 0].sum() < high and np.isnan(none).all()


def test_checkpoints_side_by_side(data, saved, run, tmp_path):
    """The first is compared with itself and with another model, of another context; LAMBADA beside."""
    saved(Config(**TINY), tmp_path / "a", data)
    saved(Config(**TINY | dict(model="dense-untied", seq_len=16)), tmp_path / "b", data)
    (tmp_path / "lambada.jsonl").write_text('{"text": "def main"}\n{"text": "import os"}\n', encoding="utf-8")
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    out.symlink_to(tmp_path / "new/there")                      # which is made
    printed = run(a, a, b, "--lambada", tmp_path / "lambada.jsonl", "--out", out)
    assert printed == (out / "table.md").read_text(encoding="utf-8")
    assert (out / "frequency.png").stat().st_size > 10_000
    rows = json.loads((out / "numbers.json").read_text())["rows"]
    whole, (low, high) = rows[0], rows[0]["intervals"][1]
    assert whole["less_the_first"][0] == 0 and whole["intervals"][0] == [0, 0]
    assert low < whole["less_the_first"][1] == whole["means"][2] - whole["means"][0] < high < low + 0.1
    assert [row["documents"] for row in rows if row["role"] == "LAMBADA"] == [2, 2]
    with pytest.raises(ValueError, match="out holds files: name a new folder with --out"):
        run(a, "--out", out)


def test_lambada_by_hand(saved, tiny_data):
    """Right and wrong; a last word behind a tab; longer than the context."""
    tokenizer = tokenizer_from_json(Windows(tiny_data, "val", 1).meta["tokenizer"])
    model = LanguageModel(Config(**TINY)).eval()
    texts = {"def f(self):\n    return  text": "def f(self):\n    return", "a b": "a", "x\ty z\tb": "x\ty",
             "self " * 200 + "other": ("self " * 200).strip()}
    for (text, before), found in zip(texts.items(), evaluate.lambada(model, tokenizer, [*texts])[:, 0]):
        n = len(tokenizer.encode_ordinary(text)) - len(tokenizer.encode_ordinary(before))
        ids = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(text)][-33:]])
        losses = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")
        assert found == pytest.approx(losses[-n:].sum().item(), rel=1e-5)
    with torch.no_grad():           # a head that has only learned what comes behind "a": the tokens of " b"
        ids = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary("a b")]])
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[0, 2:]] = model.hidden(model.embed_tokens(ids))[0, 1:-1]
    assert evaluate.lambada(model, tokenizer, [*texts])[:, 1].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("content", ["", '{"text": "one"}', '{"text": 3}', '{"text": "a b"}\n{"text"', "a b"])
def test_bad_lambada(saved, run, tmp_path, content):
    saved(Config(**TINY), tmp_path)
    (tmp_path / "some.jsonl").write_text(content)
    with pytest.raises(ValueError, match="some.jsonl") as error:
        run(tmp_path, "--lambada", tmp_path / "some.jsonl")
    assert "--skip-bad" not in str(error.value)                     # which this command does not have


def test_bad_input(tiny_data, data, saved, run, tmp_path):
    saved(Config(**TINY), tmp_path)
    with pytest.raises(ValueError, match="no checkpoint in .*nowhere"):
        run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no prepared data in .*nowhere"):
        run(tmp_path, "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="has another tokenizer than .*: use the data that it was trained"):
        run(tmp_path, "--data", data, "--out", tmp_path / "out")
    about = tmp_path / "step-00000002/config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | dict(training=3)))
    with pytest.raises(ValueError, match="step-00000002: config.json or tokenizer.json is missing, damaged"):
        run(tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
