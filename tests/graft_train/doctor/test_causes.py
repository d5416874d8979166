"""The doctor on runs that are spoiled on purpose: it names the cause first; in runs that are well it finds nothing."""

import json

import pytest

from graft_train.doctor import examine
from graft_train.doctor.finding import CAUSE, FINE, UNCHECKED

from .spoiled import HEALTHY, SPOILED, World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("doctor"))


@pytest.mark.parametrize("what", SPOILED)
def test_the_cause_is_named_first(world, what):
    name, spoil = SPOILED[what]
    first = examine(spoil(world)).findings[0]
    assert (first.name, first.verdict) == (name, CAUSE)
    assert first.seen
    assert first.usual
    assert first.remedy


@pytest.mark.parametrize("what", HEALTHY)
def test_nothing_is_found_where_all_is_well(world, what):
    examined = examine(HEALTHY[what](world))
    found = {finding.name: finding.seen for finding in examined.findings if finding.verdict not in (FINE, UNCHECKED)}
    assert found == {}
    assert min(examined.lengths.values()) > 2


def test_a_chain_is_as_long_as_distill_measured(world):
    trained = json.loads((world.healthy / "head" / "training.json").read_text())
    assert trained["validation_samples"] <= 12  # all of them are looked at
    found = examine(world.options(world.healthy)).lengths["held_out"]
    assert found == pytest.approx(trained["validation"]["acceptance_length"], abs=1e-6)
