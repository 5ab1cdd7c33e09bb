"""A small part of `python -m tests.fuzz`."""
import fuzz


def test_damaged_and_hostile_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz.sys, "argv", [])
    found = fuzz.readers(fuzz.make(tmp_path))
    assert len(found) == 19
    for name, (path, read) in found.items():
        inputs, accepted = fuzz.fuzz(path, read, 30)
        assert inputs > accepted, name
