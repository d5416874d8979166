"""A few of the mutations of `fuzz_bundle.py`; its docstring has the command for thousands."""

import pytest

from .fuzz_bundle import Fuzz

MUTATIONS = 120


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


def test_a_sound_bundle_decodes_as_the_target_does(fuzz):
    assert all(fuzz._decode(bundle) == fuzz.expected for bundle in fuzz.bundles.values())


def test_a_damaged_bundle_is_right_or_refused(fuzz):
    found = [fuzz.run(seed) for seed in range(MUTATIONS)]
    assert [damage for outcome, damage in found if outcome not in ("right", "refused")] == []
    assert {outcome for outcome, _ in found} == {"right", "refused"}
