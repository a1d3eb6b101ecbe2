"""No content of a file of a run gives a traceback, hangs, or becomes a value that the program does not expect."""

import pytest
from mutated_files import FILES, try_reader

MUTATIONS = 5_000  # benchmarks/resilience/run.py tries twenty times as many, with another seed


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_gives_a_value_of_its_type_or_the_reason_why_not(name):
    told = try_reader(name, MUTATIONS, seed=0)
    assert told["accepted"] + told["refused"] == MUTATIONS
    assert told["accepted"] > 100 and (FILES[name].lines or told["refused"] > 100), "neither is tried often"
