"""A small part of `python -m tests.fuzz`."""
import fuzz


def test_damaged_and_foreign_files(tmp_path):
    found = fuzz.make(tmp_path)
    assert len(found) == 16
    for name, how in found.items():
        inputs, accepted = fuzz.fuzz(*how, examples=30)
        assert inputs > accepted, name
