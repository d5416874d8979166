"""The bundle as exported: it decodes through the engine, through transformers alone, and from the Hub."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import graft_inference
from graft_inference import GraftEngine, GraftError
from graft_inference.bundle import read_safetensors
from graft_inference.heads.eagle3.checkpoint import save_head
from graft_train.config.export import ExportConfig
from graft_train.config.target import TargetConfig
from graft_train.export import REQUIREMENTS, export, write_card
from graft_train.files import write_json

from ..graft_inference.test_engine import prompt
from ..graft_inference.tiny import tiny_head, tiny_model, tiny_policy
from ..graft_inference.tiny_bundle import tiny_successors, write_target
from ..hub import serve

EVALUATION = {
    "methods": {
        name: {"tokens_per_second": 123.4, "speedup": 1.5, "speedup_interval": [1.4, 1.6], "acceptance_length": 2.5}
        for name in graft_inference.METHODS
    },
    "lossless": dict.fromkeys(graft_inference.METHODS, True) | {"retrieve": False},
    "device": {"name": "abacus", "threads": 2},
}


@dataclass
class RunConfig:
    """The part of the configuration that `export` reads."""

    run_dir: str
    seed: int = 0
    target: TargetConfig = field(default_factory=TargetConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


def write_stage(directory: Path) -> None:
    write_json(directory / "stage.json", {"fingerprint": directory.name, "settings": {}, "inputs": {}})


def write_run(run_dir: Path) -> Path:
    """A run directory whose stages before export are done."""
    write_target(run_dir / "target")
    save_head(tiny_head(tiny_model("llama")), run_dir / "head")
    (run_dir / "corpus").mkdir()
    save_file(tiny_successors(), run_dir / "corpus" / "successors.safetensors")
    (run_dir / "policy").mkdir()
    policy = tiny_policy().to_dict() | {"measured_on": {"device": {"name": "slide rule", "threads": 1}}}
    write_json(run_dir / "policy" / "policy.json", policy)
    for stage in ("target", "head", "corpus", "policy"):
        write_stage(run_dir / stage)
    return run_dir


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run_dir = write_run(tmp_path_factory.mktemp("exported") / "run")
    run_export(run_dir)
    return run_dir


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run")


def run_export(run_dir: Path, **settings: Any) -> Path:
    target = TargetConfig(str(run_dir / "target"))
    return export(RunConfig(str(run_dir), target=target, export=ExportConfig(**settings)))  # type: ignore[arg-type]


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """In a fresh process that sees transformers, but neither this repository nor its packages."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-c", HIDE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(sys.executable).parent,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# The packages may be installed in the interpreter that runs the tests: these processes must not find them.
HIDE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ("graft_inference", "graft_train"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Hidden]
"""

GENERATE = """
import json
import torch
from transformers import AutoModelForCausalLM

target, bundle, *draft = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(target)
ids = torch.tensor(INPUT)
found = {"plain": model.generate(ids, max_new_tokens=24).tolist()}
for name, extra in {"baked": {}, "draft": {"draft": draft[0] if draft else None}}.items():
    try:
        out = model.generate(ids, custom_generate=bundle, trust_remote_code=True, max_new_tokens=24, **extra)
        found[name] = out.tolist()
    except ValueError as error:
        found[name] = f"{type(error).__name__}: {error}"
assert "graft_inference" not in sys.modules
print(json.dumps(found))
""".replace("INPUT", str(prompt(9).tolist()))


def test_evaluations_that_end_at_once_are_all_on_the_card(run_dir):
    bundle = run_export(run_dir)
    fork = multiprocessing.get_context("fork")
    begin, names = fork.Barrier(8), [f"evaluation-{number}" for number in range(8)]

    def end(name: str) -> None:
        settings = {"prompts": 5, "path": f"{name}.jsonl", "temperature": 0.0}
        begin.wait()
        write_card(bundle, {name: EVALUATION | {"settings": settings}})

    processes = [fork.Process(target=end, args=(name,)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    card = (bundle / "README.md").read_text()
    assert [name for name in names if f"prompts of {name}.jsonl" not in card] == []
    assert [path.name for path in [*run_dir.glob(".*"), *bundle.glob(".*")]] == []


def test_a_bundle_that_may_not_be_written_keeps_its_card(run_dir, monkeypatch, capsys):
    bundle = run_export(run_dir)
    card = (bundle / "README.md").read_text()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    write_card(bundle, {"evaluation": EVALUATION})
    assert (bundle / "README.md").read_text() == card
    assert f"{bundle} cannot be written" in capsys.readouterr().out


def test_a_policy_chosen_anew_is_another_bundle_whose_evaluation_is_to_come(run_dir):
    """The traces, and so the stage's record, are the same."""
    bundle = run_export(run_dir)
    (run_dir / "evaluation").mkdir()
    write_json(run_dir / "evaluation" / "evaluation.json", EVALUATION)
    inputs = {"bundle": json.loads((bundle / "stage.json").read_text())["fingerprint"]}
    write_json(run_dir / "evaluation" / "stage.json", {"fingerprint": "e", "settings": {}, "inputs": inputs})
    assert "| graft |" in (run_export(run_dir) / "README.md").read_text()
    path = run_dir / "policy" / "policy.json"
    write_json(path, json.loads(path.read_text()) | {"measured_on": {"device": {"name": "abacus", "threads": 1}}})
    with pytest.raises(GraftError, match=r"bundle was made with other settings: policy: .*delete"):
        run_export(run_dir)
    shutil.rmtree(bundle)
    card = (run_export(run_dir) / "README.md").read_text()
    assert "abacus" in card
    assert "| graft |" not in card


def test_the_bundle_holds_what_was_made(exported):
    bundle = exported / "bundle"
    for stage, name in (("head", "model.safetensors"), ("corpus", "successors.safetensors")):
        assert (bundle / name).read_bytes() == (exported / stage / name).read_bytes()
    graft = json.loads((bundle / "graft.json").read_text())
    assert graft["policy"] == json.loads((exported / "policy" / "policy.json").read_text())
    tokenizer = graft["target"].pop("tokenizer")
    assert len(tokenizer) == 64
    assert graft["target"] == {
        "name_or_path": str(exported / "target"),
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 4,
    }
    assert not list(bundle.rglob(".*"))


def test_engines_that_read_every_safetensors_file_are_told_which_is_the_heads(exported):
    """vLLM keeps those that the index names, and takes every tensor in them for a weight."""
    bundle = exported / "bundle"
    files = {path.name for path in bundle.glob("*.safetensors")}
    assert files > {"model.safetensors"}
    index = json.loads((bundle / "model.safetensors.index.json").read_text())
    weights = read_safetensors(bundle / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(weights, "model.safetensors")


def test_the_engine_loads_it(exported):
    engine = GraftEngine.from_pretrained(exported / "bundle", exported / "target")
    expected = tiny_model("llama").generate(prompt(9), max_new_tokens=24)
    assert engine.generate(prompt(9), max_new_tokens=24).sequences.tolist() == expected.tolist()


def test_transformers_alone_runs_it(exported, tmp_path):
    found = json.loads(run_python(GENERATE, exported / "target", exported / "bundle", HF_HOME=str(tmp_path)))
    assert found["baked"] == found["draft"] == found["plain"]
    assert len(found["plain"][0]) == 33


def test_a_moved_bundle_says_so_and_runs_with_draft(exported, tmp_path):
    moved = shutil.copytree(exported / "bundle", tmp_path / "moved")
    code = moved / "custom_generate" / "generate.py"
    code.write_text(code.read_text().replace(str(exported), str(tmp_path / "old")))
    found = json.loads(run_python(GENERATE, exported / "target", moved, moved, HF_HOME=str(tmp_path / "home")))
    assert found["baked"].startswith(f"GraftError: {tmp_path / 'old' / 'bundle'} is neither a directory")
    assert found["baked"].endswith("if the bundle was moved, pass draft=PATH")
    assert found["draft"] == found["plain"]


def test_the_code_is_what_transformers_follows_and_nothing_else(exported):
    """Only flat relative imports: the loader copies no others. No module is there that nobody imports."""
    directory = exported / "bundle" / "custom_generate"
    modules = {path.stem for path in directory.glob("*.py")}
    assert {"generate", "engine", "bundle", "errors", "decode_round", "heads_eagle3_model"} <= modules
    assert not modules & {"__init__", "cli", "custom_generate"}
    for path in directory.glob("*.py"):
        text = path.read_text()
        assert "graft_inference" not in [
            line.split()[1] for line in text.splitlines() if line.startswith(("import", "from"))
        ]
        relative = [line.split()[1] for line in text.splitlines() if line.startswith("from .")]
        assert {name.removeprefix(".") for name in relative} <= modules


def test_requirements_are_the_runtimes(exported):
    written = (exported / "bundle" / "custom_generate" / "requirements.txt").read_text().split()
    project = Path(__file__).parents[2] / "inference" / "pyproject.toml"
    assert written == list(REQUIREMENTS) == tomllib.loads(project.read_text())["project"]["dependencies"]


def test_the_card_says_where_it_comes_from_and_what_was_measured(run_dir):
    bundle = run_export(run_dir, license="mit")
    card = ModelCard.load(bundle / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["speculative-decoding", "eagle3", "graft"],
    }
    assert f'custom_generate="{bundle}"' in card.text
    assert "Measured on slide rule, threads 1" in card.text
    assert "Not evaluated yet" in card.text

    write_card(bundle, {"evaluation": EVALUATION})
    text = ModelCard.load(bundle / "README.md").text
    assert "| graft | 123.4 | 1.50x (1.40-1.60) | 2.50 | yes |" in text
    assert "| retrieve | 123.4 | 1.50x (1.40-1.60) | 2.50 | **no** |" in text
    assert "Measured on abacus, threads 2" in text
    assert json.loads((bundle / "evaluation.json").read_text()) == EVALUATION
    write_card(bundle, {})
    assert ModelCard.load(bundle / "README.md").text == text


def test_a_hub_target_is_named_as_the_base_model(run_dir):
    bundle = run_export(run_dir)
    graft = json.loads((bundle / "graft.json").read_text())
    graft["target"]["name_or_path"] = "Qwen/Qwen3-8B"
    write_json(bundle / "graft.json", graft)
    write_card(bundle, {})
    assert ModelCard.load(bundle / "README.md").data.base_model == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("commit", ["0c64", None])
def test_the_card_names_an_adopted_head_of_the_hub_and_no_path_of_this_machine(run_dir, commit):
    adopted = {"stage": "adopt", "settings": {"init_from": "someone/eagle3", "commit": commit}}
    write_json(run_dir / "head" / "stage.json", {"fingerprint": "head", "inputs": {}} | adopted)
    text = ModelCard.load(run_export(run_dir) / "README.md").text
    assert ("Its weights are those of someone/eagle3 at 0c64" in text) == (commit is not None)
    assert ("someone" in text) == (commit is not None)


def test_an_evaluation_of_this_bundle_gets_onto_the_card_and_of_another_not(run_dir):
    bundle = run_export(run_dir)
    evaluation = run_dir / "evaluation"
    evaluation.mkdir()
    write_json(evaluation / "evaluation.json", EVALUATION)
    write_json(evaluation / "stage.json", {"fingerprint": "e", "inputs": {"bundle": "another"}})
    run_export(run_dir)
    assert "Not evaluated yet" in (bundle / "README.md").read_text()
    own = json.loads((bundle / "stage.json").read_text())["fingerprint"]
    write_json(evaluation / "stage.json", {"fingerprint": "e", "inputs": {"bundle": own}})
    run_export(run_dir)
    assert "| graft | 123.4 |" in (bundle / "README.md").read_text()


def test_a_bundle_the_engine_would_refuse_does_not_appear(run_dir):
    save_file(tiny_successors(67), run_dir / "corpus" / "successors.safetensors")
    with pytest.raises(GraftError, match=r"successors.safetensors: ids must be int32 \[61, k\]"):
        run_export(run_dir)
    assert not (run_dir / "bundle").exists()


@pytest.mark.parametrize("content", ["{}", '{"graft": 3}', "[" * 100_000, '{"measured_on": null}'])
def test_a_damaged_policy_is_told_and_no_bundle_appears(run_dir, content):
    (run_dir / "policy" / "policy.json").write_text(content)
    with pytest.raises(GraftError, match=r"(graft|policy)\.json"):
        run_export(run_dir)
    assert not (run_dir / "bundle").exists()


@pytest.mark.parametrize("name", ["head/model.safetensors", "corpus/successors.safetensors", "policy/policy.json"])
def test_a_file_missing_from_a_stage_is_named(run_dir, name):
    (run_dir / name).unlink()
    with pytest.raises(GraftError, match=f"{name} is missing"):
        run_export(run_dir)


@pytest.mark.parametrize(
    ("repo_id", "message"), [(None, "needs export.repo_id"), ("a b/c", "repo_id=a b/c is not a Hub id")]
)
def test_a_push_without_a_repository_fails_before_any_work(run_dir, repo_id, message):
    with pytest.raises(GraftError, match=message):
        run_export(run_dir, push_to_hub=True, repo_id=repo_id)
    assert not (run_dir / "bundle").exists()


PUSH = """
import sys
from graft_inference import GraftError
from tests.graft_train.test_export import run_export
from pathlib import Path

try:
    run_export(Path(sys.argv[1]), push_to_hub=True, repo_id=sys.argv[2])
except GraftError as error:
    print("refused:", error)
"""

PULL = """
import json, sys, torch
from graft_inference import GraftEngine

engine = GraftEngine.from_pretrained(sys.argv[1], sys.argv[2], "cpu", "float32")
print(json.dumps(engine.generate(torch.tensor(json.loads(sys.argv[3])), max_new_tokens=24).sequences.tolist()))
"""


def test_push_then_load_from_the_hub(run_dir, tmp_path):
    """The real client against a Hub on the loopback, in processes that were told of it before they imported it."""
    root = Path(__file__).parents[2]
    with serve() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": hub.token,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{root}:{root / 'inference'}",
            "NO_PROXY": "127.0.0.1",
        }

        def python(code, *arguments, home, **changes):
            finished = subprocess.run(
                [sys.executable, "-c", code, *map(str, arguments)],
                capture_output=True,
                text=True,
                env=environment | {"HF_HOME": str(tmp_path / home)} | changes,
                cwd=root,
                check=False,
            )
            assert finished.returncode == 0, finished.stderr
            return finished.stdout

        said = python(PUSH, run_dir, "someone/tiny-graft", home="a", HF_TOKEN="hf_wrong")
        assert "refused: " in said
        assert "could not be pushed to someone/tiny-graft" in said
        assert hub.repositories == {}

        # A name without an owner gets the user's.
        assert "reusing" in python(PUSH, run_dir, "tiny-graft", home="a")
        repository = hub.repositories["someone/tiny-graft"]
        assert repository.private
        pushed = repository.commits[repository.head]
        bundle = run_dir / "bundle"
        local = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
        assert set(pushed) == local - {"stage.json"} | {".gitattributes"}
        assert pushed["model.safetensors"] == (bundle / "model.safetensors").read_bytes()
        # Nothing uploaded leads to this machine, and the local bundle still leads to itself.
        assert "\nBUNDLE = 'someone/tiny-graft'\n" in pushed["custom_generate/generate.py"].decode()
        assert 'custom_generate="someone/tiny-graft"' in pushed["README.md"].decode()
        assert not [path for path, content in pushed.items() if str(bundle).encode() in content]
        assert f"\nBUNDLE = {str(bundle)!r}\n" in (bundle / "custom_generate" / "generate.py").read_text()

        expected = tiny_model("llama").generate(prompt(9), max_new_tokens=24).tolist()
        ids = json.dumps(prompt(9).tolist())
        assert json.loads(python(PULL, "someone/tiny-graft", run_dir / "target", ids, home="b")) == expected
        online = {name: environment[name] for name in environment if name.startswith(("HF_", "NO_"))}
        online["HF_HOME"] = str(tmp_path / "c")
        shutil.rmtree(bundle)
        found = json.loads(run_python(GENERATE, run_dir / "target", "someone/tiny-graft", **online))
        assert found["baked"] == found["draft"] == found["plain"] == expected


def test_the_matrix_and_policy_files_keep_their_meaning(exported):
    """What calibrate and build_corpus wrote is what the loaded engine uses."""
    engine = GraftEngine.from_pretrained(exported / "bundle", exported / "target")
    assert engine.policy.graft == tiny_policy().graft
    assert torch.equal(engine.successors.ids_VK, tiny_successors()["ids"])
