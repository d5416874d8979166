"""`graft texts`: a run's samples as a JSON string a line, which is how SGLang takes corpora."""

import json

import pytest
from click.testing import CliRunner

from graft_inference import GraftError
from graft_train.cli import main
from graft_train.data.samples import Sample, answered, append_samples
from graft_train.texts import write_texts
from tests.graft_inference.tiny_bundle import tiny_tokenizer

TURNS = [Sample(f"talk#{turn}", "train", [7, 8, 9, 10][: 2 * turn], [[1, 2 * turn]]) for turn in (1, 2)]


@pytest.fixture
def run(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    (tmp_path / "run" / "data").mkdir(parents=True)
    samples = [answered("a", [3, 36], [5], {}), *TURNS, answered("b", [1], [2, 57], {})]
    held_out = Sample("c", "evaluation", [4, 4, 4])
    with (tmp_path / "run" / "data" / "samples.jsonl").open("wb") as file:
        append_samples(file, [*samples, held_out])
    return tmp_path


def test_every_text_is_there_once_and_has_its_tokens(run, capsys):
    write_texts(run / "run", str(run / "target"), run / "corpus.jsonl")
    texts = [json.loads(line) for line in (run / "corpus.jsonl").read_text().splitlines()]
    tokens = [tiny_tokenizer().encode(text, add_special_tokens=False) for text in texts]
    # A conversation is there as its last turn has it, and what was held out is not there at all.
    assert tokens == [[3, 36, 5], [7, 8, 9, 10], [1, 2, 57]]
    assert "3 texts of 12 tokens" in capsys.readouterr().out  # with the separators that SGLang counts


def test_the_command_writes_it_and_tells_what_is_wrong_in_a_line(run):
    file = str(run / "corpus.jsonl")
    done = CliRunner().invoke(main, ["texts", str(run / "run"), file, "--target", str(run / "target")])
    assert (done.exit_code, "3 texts" in done.output) == (0, True)
    done = CliRunner().invoke(main, ["texts", str(run), file, "--target", str(run / "target")])
    assert done.exit_code == 1
    assert "samples.jsonl is missing: run graft regenerate" in done.output


def test_another_target_and_a_place_without_one_are_refused(run):
    with (run / "run" / "data" / "samples.jsonl").open("ab") as file:
        append_samples(file, [answered("d", [1], [61], {})])
    with pytest.raises(GraftError, match="has 61 tokens, but the samples hold the token 61: name the run's own target"):
        write_texts(run / "run", str(run / "target"), run / "corpus.jsonl")
    with pytest.raises(GraftError, match="cannot load the tokenizer of"):
        write_texts(run / "run", str(run / "run"), run / "corpus.jsonl")
    assert not (run / "corpus.jsonl").exists()
