"""Damaged and foreign files, of fuzz.py: 30 for each reader here, FUZZ of them in the long run."""
import os
import resource

import fuzz

MEMORY = 1_000_000              # kB that all inputs together may add


def test_damaged_and_foreign_files(tmp_path):
    found = fuzz.make(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(found) == 16
    for name, how in found.items():
        inputs, accepted = fuzz.fuzz(*how, examples=int(os.environ.get("FUZZ", 30)))
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"{name}: {inputs:,} inputs, {accepted:,} accepted, {more:,} kB more", flush=True)
        assert inputs > accepted and more < MEMORY
