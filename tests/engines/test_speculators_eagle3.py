"""EAGLE-3 heads of speculators 0.9.0: the same logits here, whoever wrote the checkpoint."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft_inference.heads.eagle3.checkpoint import load_head, save_head
from graft_inference.heads.eagle3.drafter import Eagle3Proposer
from graft_train.distill.eagle3.layout import make_layout
from graft_train.distill.eagle3.unroll import unroll
from tests.graft_inference.plain_head import VARIANTS, varied
from tests.graft_inference.tiny import tiny_head, tiny_model

from .environments import HERE, run_driver

pytestmark = pytest.mark.engines("speculators")

SIZE, STEPS, WINDOW = 24, 5, 6
EXACT = {"atol": 1e-5, "rtol": 1e-5}
NORMS = ("norm_before_fc", "fc_norm", None)
MADE = {
    f"{layer}, window {window}, {norm}, norm_output {output}, norm_before_residual {residual}": {
        "layer": layer,
        "window": window,
        "norm_before_fc": norm == "norm_before_fc",
        "fc_norm": norm == "fc_norm",
        "norm_output": output,
        "norm_before_residual": residual,
    }
    for layer, window, norm, output, residual in product(
        ("llama", "qwen3"), (None, WINDOW), NORMS, (False, True), (False, True)
    )
}
WRITTEN = {name: changes for name, changes in VARIANTS.items() if name != "plain"}


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(61, (SIZE,), generator=generator), torch.randn(SIZE, 96, generator=generator)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, text):
    """Directories of the heads, and speculators' logits of each, [STEPS, SIZE - 1, Vd]."""
    root = tmp_path_factory.mktemp("heads")
    save_file(dict(zip(("tokens", "taps"), text, strict=True)), root / "inputs.safetensors")
    model = tiny_model("llama")
    model.save_pretrained(root / "target")
    places = {name: str(root / f"{number}") for number, name in enumerate([*MADE, *WRITTEN])}
    for name, changes in WRITTEN.items():
        written_by_us(model, changes, places[name], root / "target")
    job = {
        "inputs": str(root / "inputs.safetensors"),
        "steps": STEPS,
        "made": {places[name]: settings for name, settings in MADE.items()},
        "read": [places[name] for name in WRITTEN],
    }
    found = run_driver("speculators", HERE / "speculators_driver.py", root, job)
    return {name: (place, load_file(found[place])["logits"]) for name, place in places.items()}


def written_by_us(model, changes, place, target):
    """Of logits of the usual size, and with the target's name, which an exporter knows."""
    head = varied(tiny_head(model, draft_vocab_size=40, **changes))
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(0.2)
    save_head(head, place)
    path = f"{place}/config.json"
    with open(path) as file:
        values = json.load(file)
    values["speculators_config"]["verifier"]["name_or_path"] = str(target)
    with open(path, "w") as file:
        json.dump(values, file)


@pytest.mark.parametrize("name", [*MADE, *WRITTEN])
@torch.no_grad()
def test_logits_are_speculators_own(theirs, text, name):
    """Of every draft step from every position: of the unroll that trains, and of the cached drafter."""
    place, expected = theirs[name]
    head, (tokens, taps) = load_head(place), text
    embed = head.embed_tokens or tiny_model("llama").get_input_embeddings()
    layout = make_layout([SIZE], torch.ones(SIZE, dtype=torch.bool), head.config.sliding_window)
    outputs = unroll(head, embed(tokens), taps, layout, STEPS)
    for step, output in enumerate(outputs):
        inside = layout.columns_C + 1 + step < SIZE
        torch.testing.assert_close(head.logits(output)[inside], expected[step, layout.columns_C[inside]], **EXACT)
    for root in (0, WINDOW - 1, WINDOW, SIZE - 1 - STEPS):
        for step, logits in enumerate(drafted(head, embed, tokens, taps, root)):
            torch.testing.assert_close(logits, expected[step, root], **EXACT)


def drafted(head, embed, tokens, taps, root):
    """Logits of a chain from position `root` along the text's own tokens, by the drafter's cache."""
    proposer = Eagle3Proposer(head, embed, 256)
    drafter = proposer.open(topk=1, num_steps=STEPS, tokens=SIZE)
    read = tokens[1 : root + 2]
    (draft,) = proposer.begin([drafter], [(read, taps[: root + 1])], [read[-1:]], [None])
    for step in range(1, STEPS):
        yield head.logits(draft.layers[-1].hidden_AH)[0]
        draft.layers[-1].tokens_C.fill_(tokens[root + 1 + step])
        (draft,) = proposer.deepen([drafter], [draft])
    yield head.logits(draft.layers[-1].hidden_AH)[0]
