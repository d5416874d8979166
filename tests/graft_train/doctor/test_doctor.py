"""`graft doctor`: what it can be given, what it says without a part of it, and what it refuses."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from graft_inference.bundle import tokenizer_hash
from graft_inference.heads.block.checkpoint import save_block_head
from graft_train.cli import main
from graft_train.data.samples import Sample, answered, to_line
from graft_train.doctor.data_checks import bf16_step
from graft_train.doctor.evidence import evidence_of
from graft_train.doctor.finding import UNCHECKED
from tests.graft_inference.test_block_drafter import tiny_block_head
from tests.graft_inference.tiny import VOCAB, tiny_head, tiny_model
from tests.graft_inference.tiny_bundle import tiny_successors, tiny_tokenizer, write_bundle, write_target

OPTIONS = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target with a chat template, and the bundle of a random head; nothing may be written there."""
    root = tmp_path_factory.mktemp("pair")
    (root / "bundle").mkdir()
    target = write_target(root / "target")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if terse %}x{% endif %}"
    tokenizer.save_pretrained(target)
    return write_bundle(root / "bundle", target), target


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"what is {word}"}) for word in ("this", "that", "it")))
    return path


def run(place, *arguments):
    return CliRunner().invoke(main, ["doctor", str(place), *OPTIONS, *map(str, arguments)])


def examined(place, *arguments):
    done = run(place, "--json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def made_run(directory, pair, **settings):
    """A run whose head was trained on answers that nobody gave."""
    bundle, _ = pair
    head, data = directory / "head", directory / "data"
    head.mkdir(parents=True)
    data.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bundle / name, head / name)
    trained = {"max_length": 64, "validation_samples": 2} | settings
    (head / "stage.json").write_text(json.dumps({"stage": "distill", "settings": {"head": trained, "seed": 0}}))
    choose = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (24, 16), generator=choose).tolist()
    samples = [answered(f"s{n}@0", row[:4], row[4:], {"temperature": 0.0}) for n, row in enumerate(ids)]
    samples += [Sample("e@0", "evaluation", ids[0][:5])]
    (data / "samples.jsonl").write_bytes(b"".join(map(to_line, samples)))
    return directory


@pytest.fixture(scope="module")
def bundle_examined(pair, prompts):
    before = {path: path.read_bytes() for path in pair[0].rglob("*") if path.is_file()}
    found = examined(pair[0], "--prompts", prompts)
    assert {path: path.read_bytes() for path in pair[0].rglob("*") if path.is_file()} == before
    return found


def test_a_bundle_is_examined_on_prompts_and_says_what_it_lacks(bundle_examined, pair):
    by_name = {finding["name"]: finding for finding in bundle_examined["findings"]}
    assert bundle_examined["target"] == str(pair[1])  # which the bundle names
    assert set(bundle_examined["lengths"]) <= {"yours", "decoded"}
    assert {by_name[name]["verdict"] for name in ("answers", "template", "under-training")} == {UNCHECKED}
    assert "no answer is here" in by_name["answers"]["seen"]
    assert by_name["cost"]["figures"]["pays_from"] > 0


def test_people_read_the_same_in_one_screen(pair, prompts, tmp_path):
    done = run(made_run(tmp_path / "run", pair), "--target", pair[1], "--prompts", prompts, "--dtype", "auto")
    assert done.exit_code == 0, done.output
    assert "answers" in done.stdout
    assert "not checked" in done.stdout
    assert "remedy" in done.stdout
    assert "doctor: loads" in done.stderr
    assert len(done.stdout.splitlines()) < 90


def test_a_run_without_held_out_answers_has_its_held_out_prompts_answered(pair, tmp_path):
    found = examined(made_run(tmp_path / "run", pair, validation_samples=0), "--target", pair[1])
    assert {"trained", "held_out"} <= set(found["lengths"])
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert by_name["answers"]["verdict"] == "cause"  # nobody's answers
    assert by_name["answers"]["figures"]["agreement"] < 0.5
    assert "graft calibrate" in by_name["fallback"]["seen"]


def test_a_head_from_elsewhere_is_not_held_against_this_run_s_answers(pair, tmp_path):
    place = made_run(tmp_path / "run", pair)
    (place / "head" / "stage.json").write_text(json.dumps({"stage": "adopt", "settings": {}}))
    found = examined(place, "--target", pair[1])
    by_name = {finding["name"]: finding["verdict"] for finding in found["findings"]}
    assert by_name["answers"] == by_name["over-training"] == UNCHECKED
    assert "held_out" in found["lengths"]


def test_nothing_but_the_result_is_on_stdout(pair, tmp_path):
    place = made_run(tmp_path / "run", pair, max_length=17)
    rows = [answered(f"long{n}@0", [1] * 17, [2, 3], {"temperature": 0.0}) for n in range(2)]
    with (place / "data" / "samples.jsonl").open("ab") as file:
        file.write(b"".join(map(to_line, rows)))
    done = run(place, "--json", "--target", pair[1])
    assert json.loads(done.stdout)["findings"]
    assert "2 of 26 samples fill head.max_length=17" in done.stderr


def test_a_block_head_is_examined_too(pair, tmp_path):
    place = made_run(tmp_path / "run", pair)
    for name in ("config.json", "model.safetensors"):
        (place / "head" / name).unlink()
    save_block_head(tiny_block_head(tiny_model("llama"), block_size=4), place / "head", torch.float32)
    found = examined(place, "--target", pair[1])
    assert {"trained", "held_out"} <= set(found["lengths"])
    aux_layers = next(finding for finding in found["findings"] if finding["name"] == "aux-layers")
    assert not any(name.startswith("norm") for name in aux_layers["figures"])


def test_a_step_of_bfloat16_is_that_of_torch():
    values = torch.tensor([0.013, 0.5, 1.0, 1.99, 7.3, 20.0, 31.9, -18.2])
    rounded = values.abs().to(torch.bfloat16)
    above = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    inside = rounded.float() != 2  # 1.99 rounds up into the next power of two
    assert torch.equal(bf16_step(values)[inside], (above.float() - rounded.float())[inside])


def test_what_the_target_says_of_an_answer_is_what_its_logits_say():
    model, head = tiny_model("llama"), tiny_head(tiny_model("llama"))
    ids = torch.randint(1, VOCAB, (12,), generator=torch.Generator().manual_seed(0))
    logits_SV = model(ids[None]).logits[0]
    with evidence_of(model, head, (0, 1, 3), 3) as evidence:
        read = evidence.read([answered("s@0", ids[:5].tolist(), ids[5:].tolist(), {"temperature": 0.5})], "it")[0]
    logp_AV = (logits_SV[4:-1] / 0.5).log_softmax(dim=-1)
    torch.testing.assert_close(read.predicted.likeliest_A, logp_AV.exp().amax(1), atol=1e-4, rtol=1e-4)
    assert torch.equal(read.predicted.agrees_A, logits_SV[4:-1].argmax(1) == ids[5:])
    best = logits_SV[4:-1].topk(2).values
    torch.testing.assert_close(read.predicted.gap_A, best[:, 0] - best[:, 1], atol=1e-4, rtol=1e-4)


def test_the_target_is_given_back_as_it_was():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), evidence_of(model, tiny_head(model), (0, 1, 3), 3):
        raise RuntimeError
    assert model.config._attn_implementation == before


def another_size(pair, tmp_path):
    return pair[0], ["--target", write_target(tmp_path / "wide", hidden_size=64)]


def another_tokenizer(pair, tmp_path):
    target = shutil.copytree(pair[1], tmp_path / "other")
    tiny_tokenizer("<eos>").save_pretrained(target)
    return pair[0], ["--target", target]


def no_target(pair, tmp_path):
    return pair[0], ["--target", "nobody/has-this-model"]


def no_run(pair, tmp_path):
    return tmp_path, ["--target", pair[1]]


def no_directory(pair, tmp_path):
    return tmp_path / "nowhere", ["--target", pair[1]]


def nobody_s_target(pair, tmp_path):
    return made_run(tmp_path / "run", pair), []


def unknown_family(pair, tmp_path):
    place = made_run(tmp_path / "run", pair)
    config = json.loads((place / "head" / "config.json").read_text())
    (place / "head" / "config.json").write_text(json.dumps(config | {"architectures": ["MedusaModel"]}))
    return place, ["--target", pair[1]]


def no_samples(pair, tmp_path):
    place = made_run(tmp_path / "run", pair)
    (place / "data" / "samples.jsonl").write_text("")
    return place, ["--target", pair[1]]


def foreign_samples(pair, tmp_path):
    place = made_run(tmp_path / "run", pair)
    rows = [answered(f"s{n}@0", [1, 2], [3, VOCAB, 4], {}) for n in range(3)]
    (place / "data" / "samples.jsonl").write_bytes(b"".join(map(to_line, rows)))
    return place, ["--target", pair[1]]


def untold_training(pair, tmp_path):
    place = made_run(tmp_path / "run", pair)
    (place / "head" / "stage.json").write_text(json.dumps({"stage": "distill", "settings": {}}))
    return place, ["--target", pair[1]]


def broken_weights(pair, tmp_path):
    place = made_run(tmp_path / "run", pair)
    tensors = load_file(place / "head" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "fc.weight"}, place / "head" / "model.safetensors"
    )
    return place, ["--target", pair[1]]


def another_corpus(pair, tmp_path, tokenizer="0" * 64):
    place = made_run(tmp_path / "run", pair)
    (place / "corpus").mkdir()
    made_for = {"made_for": json.dumps({"name_or_path": "elsewhere", "vocab_size": VOCAB, "tokenizer": tokenizer})}
    save_file(tiny_successors(), place / "corpus" / "successors.safetensors", made_for)
    return place, ["--target", pair[1]]


def no_prompts(pair, tmp_path):
    return pair[0], ["--prompts", tmp_path / "none.jsonl"]


def long_prompts(pair, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "q" * 250}))  # an answer does not fit behind it
    return pair[0], ["--prompts", path]


def unknown_variable(pair, tmp_path):
    return pair[0], ["--template-variable", "enable_thinking=false"]


def no_value(pair, tmp_path):
    return pair[0], ["--template-variable", "terse"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (another_size, "hidden_size=32, but it has 64"),
        (another_tokenizer, "tokenizer is not the one"),
        (no_target, "no target can be loaded from nobody/has-this-model"),
        (no_run, "run graft distill or graft adopt"),
        (no_directory, "neither a directory nor a Hub repository"),
        (nobody_s_target, "pass --target"),
        (unknown_family, "Medusa"),
        (no_samples, "is empty"),
        (foreign_samples, f"holds token {VOCAB}"),
        (untold_training, "does not say how the head was trained"),
        (broken_weights, "fc.weight"),
        (another_corpus, "built for another target: its tokenizer"),
        (no_prompts, "--prompts"),
        (long_prompts, "none of 1 documents gives a prompt"),
        (unknown_variable, "does not know enable_thinking"),
        (no_value, "write NAME=VALUE"),
    ],
)
def test_bad_input_is_told_in_one_line(pair, tmp_path, monkeypatch, make, told):
    monkeypatch.setattr(socket.socket, "connect", refuse)
    place, arguments = make(pair, tmp_path)
    done = run(place, *arguments)
    assert done.exit_code == 1, done.output
    assert told in done.output
    assert isinstance(done.exception, SystemExit)


def test_a_run_may_have_moved(pair, tmp_path):
    place, arguments = another_corpus(pair, tmp_path, tokenizer_hash(tiny_tokenizer()))
    assert examined(place, *arguments)["findings"]


def refuse(*_):
    raise OSError("no network here")


def test_without_text_and_template_prompts_are_asked_for(pair, tmp_path):
    target = shutil.copytree(pair[1], tmp_path / "plain")
    (target / "chat_template.jinja").unlink()
    tiny_tokenizer().save_pretrained(target)
    done = run(pair[0], "--target", target)
    assert done.exit_code == 1
    assert "--prompts FILE" in done.output


def test_the_page_has_every_check_in_their_order(bundle_examined):
    said = (Path(__file__).parents[3] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    names = re.findall(r"^## `(.+)`$", said, re.MULTILINE)
    assert names == re.findall(r"^\| \[`(.+?)`\]", said, re.MULTILINE)
    assert {finding["name"] for finding in bundle_examined["findings"]} == set(names)
