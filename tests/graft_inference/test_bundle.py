"""Bundles: what was saved is what decodes, and nothing that does not belong together loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft_inference import METHODS, GraftEngine, GraftError, paper_policy
from graft_inference.bundle import load_bundle, load_target_model, tokenizer_hash
from graft_inference.heads.eagle3.checkpoint import save_head
from graft_inference.target import packed_linear

from .test_engine import prompt
from .tiny import learned_policy, tiny_engine, tiny_head, tiny_model, tiny_policy
from .tiny_bundle import tiny_successors, tiny_tokenizer, write_bundle, write_target

FILES = ["config.json", "model.safetensors", "graft.json", "successors.safetensors"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    target = write_target(root / "target")
    write_bundle(root / "bundle", target)
    return root


@pytest.fixture
def target(originals, tmp_path):
    return shutil.copytree(originals / "target", tmp_path / "target")


@pytest.fixture
def bundle(originals, tmp_path):
    return shutil.copytree(originals / "bundle", tmp_path / "bundle")


def load(bundle, target):
    return GraftEngine.from_pretrained(bundle, target, fallback=False)


def edit_json(path, edit):
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_round_trip_keeps_every_part(bundle):
    loaded = load_bundle(bundle, tiny_model("llama").config, tiny_tokenizer())
    assert loaded.policy == tiny_policy()
    assert torch.equal(loaded.successors.ids_VK, tiny_successors()["ids"])
    saved = tiny_head(tiny_model("llama")).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.head.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_loaded_engine_does_what_the_one_in_memory_does(bundle, target, method):
    engine, reference = load(bundle, target), tiny_engine(tiny_model("llama"))
    ours = engine.generate(prompt(9), max_new_tokens=24, method=method)
    theirs = reference.generate(prompt(9), max_new_tokens=24, method=method)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert (ours.stats.rounds, ours.stats.checkpoints) == (theirs.stats.rounds, theirs.stats.checkpoints)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vocab_size": 67}, "vocab_size=61, but it has 67"),
        ({"hidden_size": 64}, "hidden_size=32, but it has 64"),
        ({"num_hidden_layers": 5}, "num_hidden_layers=4, but it has 5"),
    ],
)
def test_targets_of_another_size_are_refused(bundle, tmp_path, overrides, message):
    other = write_target(tmp_path / "other", **overrides)
    with pytest.raises(GraftError, match=f"{message}: pass the target it was made for .*target"):
        load(bundle, other)


def test_a_head_and_a_policy_for_different_targets_are_refused(bundle, target):
    edit_json(bundle / "graft.json", lambda graft: graft["target"].update(vocab_size=67))
    with pytest.raises(GraftError, match="vocab_size=67, but it has 61"):
        load(bundle, target)


def test_another_tokenizer_is_refused(bundle, target):
    tiny_tokenizer(extra="§").save_pretrained(target)
    with pytest.raises(GraftError, match=r"tokenizer is not the one .* trained with: pass"):
        load(bundle, target)


def test_tokenizer_hash_sees_ids_and_not_order():
    class Vocabulary:
        def __init__(self, **tokens):
            self.tokens = tokens

        def get_vocab(self):
            return self.tokens

    assert tokenizer_hash(Vocabulary(a=0, b=1)) == tokenizer_hash(Vocabulary(b=1, a=0))
    assert tokenizer_hash(Vocabulary(a=0, b=1)) != tokenizer_hash(Vocabulary(a=1, b=0))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle, target, name):
    (bundle / name).unlink()
    with pytest.raises(GraftError, match=f"{name} is missing.*again"):
        load(bundle, target)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.95])
def test_a_truncated_file_is_named(bundle, target, name, share):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(GraftError, match=f"{name}.*again"):
        load(bundle, target)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"\xff" * 400, b"[]", b"null", b'{"a": 1}', b"\0" * 64])
def test_a_corrupt_file_is_named(bundle, target, name, content):
    (bundle / name).write_bytes(content)
    with pytest.raises(GraftError, match=name):
        load(bundle, target)


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_the_place_of_a_file_is_named(bundle, target, name):
    (bundle / name).unlink()
    (bundle / name).mkdir()
    with pytest.raises(GraftError, match=name):
        load(bundle, target)


def checkpoints(graft):
    return graft["policy"]["graft"]["checkpoints"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: g.update(extra=1), "exactly the objects policy and target"),
        (lambda g: g.update(policy=None), "exactly the objects policy and target"),
        (lambda g: g["target"].update(family="llama"), "target must hold exactly"),
        (lambda g: g["target"].pop("tokenizer"), "target must hold exactly"),
        (lambda g: g["policy"].update(turbo={}), "must hold exactly .*turbo"),
        (lambda g: g["policy"].pop("eagle3"), "must hold exactly"),
        (lambda g: g["policy"].update(graft=[]), "not a plan"),
        (lambda g: g["policy"]["graft"].update(breadth=3), "not a plan.*breadth"),
        (lambda g: checkpoints(g)[0].update(depth=3), "not a plan.*depth"),
        (lambda g: checkpoints(g)[0].pop("template"), "not a plan.*template"),
        (lambda g: g["policy"]["graft"].update(checkpoints=7), "not a plan"),
        (lambda g: g["policy"]["graft"].update(budget=4), "not a plan.*budget"),
        (lambda g: g["policy"]["graft"].update(kind="best"), "not a plan.*best"),
        (lambda g: g["policy"]["graft"].update(kind="scores"), "not a plan"),
        (lambda g: g["policy"]["graft"].update(kind=[]), "not a plan"),
        (lambda g: g["policy"]["graft"].pop("kind"), "not a plan.*kind"),
        (lambda g: checkpoints(g)[-1].update(drafted=64), "lower drafted"),
        (lambda g: checkpoints(g)[-1].update(drafted=1 << 20), "over the limit of 1024"),
        (lambda g: checkpoints(g)[0].update(drafted=2.0), "drafted=2.0 .* must be a whole number"),
        (lambda g: g["policy"]["graft"].update(topk=100_000), "or over 65536"),
        (lambda g: g["policy"]["graft"].update(topk=0), "propose no nodes"),
        (lambda g: g["policy"]["graft"].update(topk=True), "topk=True .* must be a whole number"),
        (lambda g: g["policy"]["graft"].update(learns_accepted={}), "learns_accepted={} .* must be true or false"),
        (lambda g: g["policy"]["graft"].update(shares_noise=None), "shares_noise=None .* must be true or false"),
        (lambda g: g["policy"]["graft"].update(acceptance=[]), "not a plan"),
        (
            lambda g: checkpoints(g)[0].update(threshold="0.3"),
            "threshold='0.3' .* a finite number",
        ),
        (lambda g: checkpoints(g)[0].update(threshold=True), "threshold=True .* a finite number"),
        (lambda g: checkpoints(g)[-1].update(steps=10**9), "lower either"),
        (lambda g: checkpoints(g)[0].update(template=[]), "a template of 0 paths"),
        (lambda g: checkpoints(g)[0]["template"].append([]), "needs ranks from 0"),
        (
            lambda g: checkpoints(g)[0]["template"].append([7, 7]),
            r"the parent of \[7, 7\] before it",
        ),
        (lambda g: checkpoints(g)[0]["template"].append([0]), "each path once"),
        (lambda g: checkpoints(g)[0]["template"].append([-1]), "needs ranks from 0"),
        (lambda g: checkpoints(g)[0]["template"].append(["0"]), "template=.* must be"),
        (lambda g: g["policy"].update(measured_on=[1]), "measured_on=.* must be an object"),
        (lambda g: g["policy"].update(measured_on={"device": "mine"}), "measured_on=.* must be an object"),
        (lambda g: g["target"].update(tokenizer=""), "tokenizer must be a SHA-256 or null"),
        (lambda g: g["target"].update(tokenizer=False), "tokenizer must be a SHA-256 or null"),
        (lambda g: g["target"].update(name_or_path=None), "must have a name and sizes"),
        (lambda g: g["target"].update(vocab_size=61.0), "must have a name and sizes"),
    ],
)
def test_a_graft_json_that_means_something_else_is_refused(bundle, target, edit, message):
    edit_json(bundle / "graft.json", edit)
    with pytest.raises(GraftError, match=f"graft.json.*{message}.*export"):
        load(bundle, target)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("counts"), "must hold ids, probs and counts"),
        (lambda t: t.update(extra=torch.zeros(1)), "must hold ids, probs and counts"),
        (lambda t: t.update(ids=t["ids"].long()), r"int32 \[61, k\]"),
        (lambda t: t.update(ids=t["ids"][:60].clone()), r"int32 \[61, k\]"),
        (lambda t: t.update(ids=t["ids"][:, 0].clone()), r"int32 \[61, k\]"),
        (lambda t: t["ids"][0].fill_(61), r"lie in -1..60"),
        (lambda t: t["ids"][0].fill_(-2), r"lie in -1..60"),
        (lambda t: t["ids"][0, 2:].fill_(7), r"names a successor of one token twice"),
        (lambda t: t["probs"][3].fill_(torch.nan), r"probs must lie in 0..1"),
        (lambda t: t["probs"][3].fill_(torch.inf), r"probs must lie in 0..1"),
        (lambda t: t["probs"][3].fill_(-0.1), r"probs must lie in 0..1"),
        (lambda t: t["counts"][3].fill_(-1), r"counts must not be negative"),
    ],
)
def test_a_matrix_of_another_vocabulary_is_refused(bundle, target, edit, message):
    edit_tensors(bundle / "successors.safetensors", edit)
    with pytest.raises(GraftError, match=f"successors.safetensors.*{message}"):
        load(bundle, target)


NUMBERS = {
    "drafted": lambda model: model["drafted"][0],
    "slopes": lambda model: model["sources"][0]["slopes"],
    "offsets": lambda model: model["sources"][0]["offsets"][0],
    "offsets by evidence": lambda model: model["sources"][1]["offsets"][3],
    "ranks": lambda model: model["sources"][0]["ranks"],
}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1e999", '"0"', "null", "true", "1e300"])
def test_an_acceptance_model_of_what_is_no_number_is_refused(bundle, target, numbers, value):
    graft = json.loads((bundle / "graft.json").read_text())
    graft["policy"] = json.loads(json.dumps(learned_policy().to_dict()))
    NUMBERS[numbers](graft["policy"]["graft"]["acceptance"])[0] = "HERE"
    (bundle / "graft.json").write_text(json.dumps(graft).replace('"HERE"', value))
    with pytest.raises(GraftError, match=r"graft\.json.*(export|calibrate)"):
        load(bundle, target)


@pytest.mark.parametrize("made_for", ["{", "[]", "3", '{"a": NaN}', '"x"'])
def test_a_matrix_whose_metadata_is_no_object_is_refused(bundle, target, made_for):
    save_file(tiny_successors(), bundle / "successors.safetensors", {"made_for": made_for})
    with pytest.raises(GraftError, match=r"successors\.safetensors: what it was made for.*build the corpus again"):
        load(bundle, target)


def test_a_plan_that_asks_for_more_than_the_bundle_has_is_refused_at_load(bundle, target):
    """Not at the first request."""
    save_file(tiny_successors(k=2), bundle / "successors.safetensors")
    with pytest.raises(GraftError, match="the source matrix for 4 guesses after a token, but it keeps 2"):
        load(bundle, target)


def test_a_plan_that_is_wider_than_the_heads_vocabulary_is_refused(bundle, target):
    save_head(tiny_head(tiny_model("llama"), draft_vocab_size=2), bundle)
    with pytest.raises(GraftError, match="takes the 3 likeliest tokens of a head that knows 2"):
        load(bundle, target)
    for name in ("graft.json", "successors.safetensors"):
        (bundle / name).unlink()
    bare = load(bundle, target)  # the paper's settings, as wide as this head allows
    expected = bare.generate(prompt(20), 24, method="autoregressive").sequences.tolist()
    assert bare.generate(prompt(20), 24).sequences.tolist() == expected
    with pytest.raises(GraftError, match="takes the 10 likeliest tokens of a head that knows 2"):
        bare.generate(prompt(20), 24, plan=paper_policy().graft)


def test_a_bundle_that_is_nowhere_is_named(target, tmp_path):
    with pytest.raises(GraftError, match="nowhere is neither a directory nor a Hub repository"):
        load(tmp_path / "nowhere", target)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_target_is_named(bundle, target, name):
    content = (target / name).read_bytes()
    (target / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(GraftError, match=r"no target can be loaded from .*target"):
        load(bundle, target)


def test_a_target_with_a_tensor_missing_is_not_filled_up_at_random(bundle, target):
    edit_tensors(target / "model.safetensors", lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(GraftError, match=r"lacks the tensors .*layers.2.mlp.up_proj.weight"):
        load(bundle, target)


def test_a_target_with_a_tensor_of_another_shape_is_refused(bundle, target):
    def shorten(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:31].clone()

    edit_tensors(target / "model.safetensors", shorten)
    with pytest.raises(GraftError, match="no target can be loaded from"):
        load(bundle, target)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", "float33", "dtype 'float33' does not exist"),
        ("gpu", "float32", "device 'gpu' cannot be used here"),
    ],
)
def test_unknown_dtype_or_device_is_named(target, device, dtype, message):
    with pytest.raises(GraftError, match=message):
        load_target_model(target, device, dtype)


def test_a_bare_head_gets_the_papers_policy_and_an_empty_matrix(bundle, target):
    full = load(bundle, target)
    for name in ("graft.json", "successors.safetensors"):
        (bundle / name).unlink()
    bare = load(bundle, target)
    assert bare.policy == paper_policy()
    assert (bare.successors.ids_VK == -1).all()
    expected = full.generate(prompt(20), 24, method="autoregressive").sequences.tolist()
    for method in METHODS:
        assert bare.generate(prompt(20), 24, method=method).sequences.tolist() == expected
    # The prompt alone filled the matrix.
    stats = bare.generate(torch.cat((torch.tensor([expected[0]]),) * 2, dim=1), 24, method="retrieve").stats
    assert stats.accepted["matrix"] > 0


@pytest.mark.parametrize("size", ["vocab_size", "hidden_size"])
def test_a_bare_head_for_another_target_is_refused(bundle, tmp_path, size):
    for name in ("graft.json", "successors.safetensors"):
        (bundle / name).unlink()
    other = write_target(tmp_path / "other", **{size: 64})
    with pytest.raises(GraftError, match=f"the head has {size}=.*, but the target 64: it is another target's"):
        load(bundle, other)


@pytest.mark.parametrize("scale", [1, 3])
def test_embeddings_of_a_head_are_used_unless_they_are_the_targets(bundle, target, scale):
    weight = tiny_model("llama").get_input_embeddings().weight
    edit_tensors(bundle / "model.safetensors", lambda t: t.update({"embed_tokens.weight": weight * scale}))
    engine, plain = load(bundle, target), tiny_engine(tiny_model("llama"))
    ours, theirs = (one.generate(prompt(9), 30, method="eagle3") for one in (engine, plain))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert (engine.head.embed_tokens is None) == (scale == 1)
    with torch.inference_mode():
        tokens, taps = prompt(9)[0], torch.ones(9, 96)
        heads = [one.speculator.head for one in (engine, plain)]
        drafts = [
            head.begin([head.open(3, 0, 20)], [(tokens, taps)], [tokens[-1:]], [None])[0].candidates for head in heads
        ]
    assert torch.allclose(drafts[0].logp_N, drafts[1].logp_N, atol=1e-4) == (scale == 1)


def test_a_target_without_a_tokenizer_works_with_ids_and_says_what_is_not_checked(bundle, target):
    for file in target.glob("token*"):
        file.unlink()
    with pytest.warns(UserWarning, match="has no tokenizer: pass token ids"):
        engine = load(bundle, target)
    assert engine.generate(prompt(9), 8).stats.emitted == 8


def test_the_engine_finds_stop_strings_with_the_targets_tokenizer(bundle, target):
    engine = load(bundle, target)
    text = engine.tokenizer.decode(engine.generate(prompt(9), 24).sequences[0, 9:])
    out = engine.generate(prompt(9), 24, stop_strings=text[4:7])
    assert text[4:7] in engine.tokenizer.decode(out.sequences[0, 9:])
    assert out.stats.emitted < 24


@pytest.mark.parametrize("method", ["graft", "autoregressive"])
def test_linear_layers_are_packed_for_every_method_unless_told_otherwise(bundle, target, monkeypatch, method):
    monkeypatch.setattr(packed_linear, "_seconds", lambda products, layer: float(products[0] == layer.forward))
    calls, packed_products = [], packed_linear._packed_products

    def counted(layers):
        def counting(layer, product):
            return lambda input_BSH: calls.append(layer) or product(input_BSH)

        return list(map(counting, layers, packed_products(layers)))

    monkeypatch.setattr(packed_linear, "_packed_products", counted)
    for packs in (True, False):
        calls.clear()
        engine = GraftEngine.from_pretrained(bundle, target, packed=packs, check=False)
        engine.generate(torch.arange(9), 8, method=method)
        assert (engine.target.model.lm_head in calls) == packs
        assert (engine.head.lm_head in calls) == (packs and method == "graft")


@pytest.mark.parametrize("broken", [True, False])
def test_the_self_check_runs_at_loading_unless_switched_off(bundle, target, monkeypatch, broken):
    monkeypatch.setattr("graft_inference.target.model.Visibility.first_key", lambda *_: int(broken))
    monkeypatch.setattr("graft_inference.target.model.Visibility.bias", lambda *_: None)
    with pytest.raises(GraftError, match="LlamaForCausalLM gives other logits under tree attention"):
        load(bundle, target)
    GraftEngine.from_pretrained(bundle, target, check=False)


def test_a_target_split_over_devices_serves(bundle, target, tmp_path):
    """Layers in memory and layers that are fetched from the disk for every pass."""
    places = {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(4)}
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    engine = GraftEngine.from_pretrained(bundle, target, device_map=device_map | places, fallback=False)
    assert engine.target.is_split
    whole = load(bundle, target)
    for method in METHODS:
        for sampling in ({}, {"temperature": 1.0, "seed": 1}):
            ours, theirs = (one.generate(prompt(9), 20, method=method, **sampling) for one in (engine, whole))
            assert ours.sequences.tolist() == theirs.sequences.tolist()
            assert ours.stats.accepted == theirs.stats.accepted
