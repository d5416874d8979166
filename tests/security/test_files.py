"""What a bundle's files may do: lie in it, hold data, and take no more memory than what they hold."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from graft_inference import GraftEngine, GraftError
from graft_inference.bundle import load_bundle, load_target_model
from graft_inference.files import LARGEST_JSON, read_json
from graft_inference.heads.eagle3.checkpoint import load_head
from graft_train.config.target import TargetConfig
from graft_train.data import target as target_module
from graft_train.inspect import inspect
from tests.graft_inference.tiny import tiny_model
from tests.graft_inference.tiny_bundle import tiny_tokenizer, write_bundle, write_target

FILES = ("config.json", "graft.json", "model.safetensors", "successors.safetensors")


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle", tmp_path / "target")


def load(bundle):
    return load_bundle(bundle, tiny_model("llama").config, tiny_tokenizer())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path, name, absolute):
    (bundle / name).rename(tmp_path / name)
    (bundle / name).symlink_to(tmp_path / name if absolute else f"../{name}")
    with pytest.raises(GraftError, match=rf"{name} leads out of its directory"):
        load(bundle)


@pytest.mark.parametrize("name", FILES)
def test_what_may_never_end_is_refused(bundle, name):
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(GraftError, match=rf"{name} is no regular file"):
        load(bundle)


def test_a_link_to_itself_is_refused(bundle):
    (bundle / "graft.json").unlink()
    (bundle / "graft.json").symlink_to("graft.json")
    with pytest.raises(GraftError, match=r"graft\.json cannot be read"):
        load(bundle)


def test_links_within_and_those_of_the_hubs_cache_are_followed(bundle, tmp_path):
    cache = tmp_path / "models--someone--head"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in bundle.iterdir():
        path.rename(cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (snapshot / "graft.json").rename(snapshot / "other.json")
    (snapshot / "graft.json").symlink_to("other.json")
    (tmp_path / "linked").symlink_to(snapshot)
    assert load(tmp_path / "linked").head


def test_a_huge_json_file_is_not_read(tmp_path):
    path = tmp_path / "graft.json"
    path.touch()
    os.truncate(path, LARGEST_JSON + 1)
    with pytest.raises(GraftError, match=r"graft\.json has 64 MiB, and what belongs there is far smaller"):
        read_json(path)


def test_a_key_that_is_there_twice_among_many_is_found_at_once(tmp_path):
    keys = ", ".join(f'"{number}": 0' for number in range(200_000))
    (tmp_path / "x.json").write_text(f'{{{keys}, "last": 0, "last": 0}}')
    with pytest.raises(GraftError, match="the key 'last' is there twice"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(2**40), torch.eye(3).to_sparse(), torch.zeros(4, 3).mT],
    ids=["expanded", "sparse", "transposed"],
)
def test_a_pickled_tensor_has_a_number_in_the_file_for_each_element(bundle, tensor):
    weights = load_file(bundle / "model.safetensors")
    (bundle / "model.safetensors").unlink()
    torch.save(weights | {"fc.weight": tensor}, bundle / "pytorch_model.bin")
    with pytest.raises(GraftError, match=r"pytorch_model\.bin .*each whole and dense"):
        load_head(bundle)


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nraise SystemExit('code ran')\n"


def plant(directory, marker):
    """Modules under every name that a loader might import, and configurations that name them."""
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", "code.T"]}
    for name in ("code", "modeling_llama", "generate", "__init__", "sitecustomize", "custom_generate/generate"):
        path = directory / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE.format(marker=str(marker)))
    for name in ("config.json", "tokenizer_config.json"):
        if (directory / name).exists():
            values = json.loads((directory / name).read_text())
            (directory / name).write_text(json.dumps(values | {"auto_map": names}))


def test_no_code_in_a_bundle_or_beside_a_target_runs(bundle, tmp_path, capsys):
    target, marker = write_target(tmp_path / "target"), tmp_path / "ran"
    for directory in (bundle, target):
        plant(directory, marker)
    engine = GraftEngine.from_pretrained(bundle, target, "cpu", "float32")
    assert engine.generate([5, 9, 5], 4).sequences.shape == (1, 7)
    inspect(str(bundle))
    assert not marker.exists()


def test_a_target_that_is_code_is_refused(tmp_path):
    target, marker = write_target(tmp_path / "target"), tmp_path / "ran"
    plant(target, marker)
    values = json.loads((target / "config.json").read_text()) | {"model_type": "own", "architectures": ["Own"]}
    (target / "config.json").write_text(json.dumps(values))
    with pytest.raises(GraftError, match="no target can be loaded from"):
        load_target_model(target, "cpu", "float32")
    settings = TargetConfig(str(target), device="cpu")
    for read in (target_module.text_config, target_module.load_target):
        with pytest.raises(GraftError, match=r"the target (in|from) "):
            read(settings)
    assert not marker.exists()
