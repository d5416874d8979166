"""Block heads that speculators made and saved compute, read by us, the logits that they compute there; and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.checkpoint import Verifier
from graft_inference.heads.families import check_head, load_any_head, save_any_head

from ..graft_inference.tiny import VOCAB, tiny_model
from .environments import HERE, run_driver

pytestmark = pytest.mark.engines("speculators")

LENGTHS, ANCHORS = (23, 11), (3, 9, 15, 18, 24, 28)
"""Tokens of two documents, and places in both: with more and with less context than a window has."""
BLOCK, AUX_IDS = 4, [1, 3]
SOME = [token for token in range(VOCAB) if token % 3]
SETTINGS = {"block_size": BLOCK, "target_layer_ids": AUX_IDS, "mask_token_id": VOCAB - 1}


def head(kind: str = "dflash", full: tuple[int, ...] = (), window: int = 6, **more) -> dict:
    """A head of speculators; by default all its layers have a sliding window, and are causal."""
    own = {name: more.pop(name) for name in ("arch", "token_ids") if name in more}
    markov = {"markov_rank": 5} if kind == "dspark" else {}
    return {"kind": kind, "layers": 3, "full": list(full), "window": window, "settings": SETTINGS | markov | more} | own


HEADS = {
    "dflash": head(),
    "dflash_of_a_small_window": head(window=2),
    "dflash_not_causal": head(sliding_window_non_causal=True),
    "dflash_full": head(full=(0, 1, 2)),
    "dflash_mixed": head(full=(1,), token_ids=SOME),
    "dflash_mixed_not_causal": head(full=(0, 2), sliding_window_non_causal=True),
    "dflash_next_token": head(sample_from_anchor=True, token_ids=SOME),
    "dflash_of_a_llama_configuration": head(arch="llama"),
    "dspark": head("dspark"),
    "dspark_mixed": head("dspark", full=(2,), token_ids=SOME),
    "dspark_fill_in": head("dspark", sample_from_anchor=False, token_ids=SOME),
    "dspark_without_its_heads": head(
        "dspark", markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False
    ),
}


def states(width: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens = sum(LENGTHS)
    loss_mask = torch.zeros(tokens)
    loss_mask[list(ANCHORS)] = 1
    return {
        "input_ids": torch.randint(VOCAB - 1, (tokens,)),
        "document_ids": torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]),
        "loss_mask": loss_mask,
        "hidden_states": torch.randn(tokens, len(AUX_IDS) * width),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The target, the states that all heads read, and the directories of the heads that speculators has saved."""
    directory = tmp_path_factory.mktemp("speculators")
    model = tiny_model("llama")
    model.save_pretrained(directory / "target")
    read = states(model.config.hidden_size)
    save_file(read, directory / "states.safetensors")
    job = {"target": str(directory / "target"), "states": str(directory / "states.safetensors"), "heads": HEADS}
    return model, read, run_driver("speculators", HERE / "speculators_block_driver.py", directory, job)


def draft_logits(head: BlockHead, model, read: dict[str, torch.Tensor], anchor: int) -> torch.Tensor:
    """Of the block behind one anchor, each draft behind the text's own tokens. [K, D]"""
    config, start = head.config, anchor - int(read["position_ids"][anchor])
    context = head.read_context(read["hidden_states"][None, start:anchor], read["position_ids"][None, start:anchor])
    tokens = torch.tensor([[int(read["input_ids"][anchor]), *[config.mask_token_id] * (BLOCK - 1)]])
    embedding, lm_head = model.get_input_embeddings()(tokens), model.get_output_embeddings().weight
    logits = head.draft_logits(embedding, *context, torch.tensor([anchor - start]), lm_head)[0]
    if config.markov_rank:
        logits = logits + head.markov_bias(read["input_ids"][anchor : anchor + config.drafts])
    return logits


@pytest.mark.filterwarnings("ignore:the head's confidence head is not used")
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_head_of_speculators_has_the_logits_that_it_has_there(made, tmp_path, name):
    model, read, directories = made
    loaded = load_any_head(Path(directories[name]), model.config.num_hidden_layers)
    check_head(loaded.config, model.config)
    save_any_head(loaded, tmp_path)  # as `adopt` writes it
    expected = load_file(Path(directories[name]) / "logits.safetensors")["logits"]
    first, settings = loaded.config.first_slot, HEADS[name]["settings"]
    assert first == (not settings.get("sample_from_anchor", HEADS[name]["kind"] == "dspark"))
    for head in (loaded, load_any_head(tmp_path)):
        for place, anchor in enumerate(ANCHORS):
            got = draft_logits(head, model, read, anchor)
            torch.testing.assert_close(got, expected[place, first:], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    """The directories of the same heads as we write them for their target, after speculators has read them."""
    model, _, directories = made
    root = tmp_path_factory.mktemp("written")
    source = Path(next(iter(directories.values()))).parent
    for name, directory in directories.items():
        head = load_any_head(Path(directory), model.config.num_hidden_layers)
        save_any_head(head, root / name, Verifier(str(source / "target")))
    job = {"target": str(source / "target"), "states": str(source / "states.safetensors")}
    job |= {"written": {name: str(root / name) for name in directories}}
    return run_driver("speculators", HERE / "speculators_block_driver.py", root, job)


@pytest.mark.filterwarnings("ignore:the head's confidence head is not used")
@pytest.mark.parametrize("name", HEADS)
def test_speculators_computes_what_we_write_in_its_dialect(made, written, name):
    """Read from the configuration that other engines read, too."""
    _, _, directories = made
    found, expected = (
        load_file(Path(place[name]) / "logits.safetensors")["logits"] for place in (written, directories)
    )
    first = not HEADS[name]["settings"].get("sample_from_anchor", HEADS[name]["kind"] == "dspark")
    torch.testing.assert_close(found[:, first:], expected[:, first:], atol=1e-5, rtol=1e-5)
