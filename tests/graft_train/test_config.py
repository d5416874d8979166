"""Every recipe composes, alike, and refuses what it does not know."""

import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from graft_inference import GraftError
from graft_inference.policy.plan import MAX_CANDIDATES
from graft_inference.tree import MAX_NODES
from graft_train import recipe
from graft_train.config import Config
from graft_train.config.data import Source
from graft_train.data.target import target_path
from graft_train.recipe import register, run, to_config

ROOT = Path(__file__).parents[2]
STAGES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != "quickstart")
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def composed(recipe: str, *overrides: str) -> Config:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return to_config(compose(recipe, list(overrides)))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment):
    config = composed("distill", f"experiment={experiment}", "run_dir=runs/other")
    assert isinstance(config, Config)
    assert config.run_dir == "runs/other"


@pytest.mark.parametrize("recipe", STAGES)
def test_a_stage_alone_has_the_schemas_defaults(recipe):
    """Settings of a real target: the quickstart's small ones are asked for."""
    assert composed(recipe) == Config()
    assert composed(recipe, "experiment=quickstart") == composed("quickstart") != Config()


def test_data_has_to_be_named():
    with pytest.raises(GraftError, match=r"data\.path is not set"):
        composed("regenerate").data.all_sources()


def test_the_target_has_to_be_named():
    with pytest.raises(GraftError, match=r"target\.name_or_path is not set: give .* experiment=quickstart"):
        target_path(composed("regenerate").target)


@pytest.mark.parametrize("group", [field.name for field in fields(Config) if is_dataclass(field.default_factory)])
def test_a_key_that_plus_adds_is_named_too(group):
    with pytest.raises(GraftError, match="learning_rat"):
        composed("distill", f"+{group}.learning_rat=1")


def test_what_the_chat_template_is_told_is_written_on_the_command_line():
    told = composed("regenerate", "data.chat_template_kwargs={enable_thinking:false}").data.chat_template_kwargs
    assert told == {"enable_thinking": False}
    assert type(told) is dict
    with pytest.raises(GraftError, match=r"data\.chat_template_kwargs=1 must be"):
        composed("regenerate", "data.chat_template_kwargs=1")


@pytest.mark.parametrize(
    "setting",
    [
        "policy.prompts=0",
        "policy.checkpoints=-1",
        "policy.num_steps=0",
        "evaluation.temperature=-1.0",
        "regenerate.max_prompt_tokens=0",
        "threads=0",
    ],
)
def test_impossible_settings_are_named(setting):
    with pytest.raises(GraftError, match=setting.replace(".", r"\.")):
        composed("quickstart", setting)


def test_sources_and_servers_are_written_on_the_command_line():
    config = composed(
        "regenerate",
        "data.sources=[{path:chats/a.jsonl,weight:3},{path:org/name,hub_split:train_sft}]",
        "regenerate.base_url=[http://a:8000/v1,http://b:8000/v1]",
    )
    assert config.data.all_sources() == [
        Source(path="chats/a.jsonl", weight=3.0),
        Source(path="org/name", hub_split="train_sft"),
    ]
    assert config.regenerate.servers() == ["http://a:8000/v1", "http://b:8000/v1"]
    one = composed("regenerate", "data.path=a.jsonl", "regenerate.base_url=http://a:8000/v1")
    assert one.data.all_sources() == [Source(path="a.jsonl")]
    assert one.regenerate.servers() == ["http://a:8000/v1"]


def test_a_misspelt_key_fails_at_composition():
    with pytest.raises(ConfigCompositionException, match="learning_rat"):
        composed("distill", "head.learning_rat=1")


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    """Left as it was by what runs on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["graft"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("data.pth=x", "'data.pth'. Key 'pth' not in 'DataConfig'"),
        ("~data.pth", "'data.pth' does not exist"),
        ("experiment=nope", "Could not find 'experiment/nope' Available options in 'experiment': gemma3_12b"),
        ("head.epochs=x", "head.epochs=x Value 'x' of type 'str' could not be converted to Integer"),
        ("head.epochs", "Error parsing override 'head.epochs' missing EQUAL"),
        ("head.epochs=[1", "'[1'"),
        ("data=5", "int is not a subclass of DataConfig"),
        ("--config-dir=nope", "nope' not found"),
    ],
)
@pytest.mark.parametrize("shown", [[], ["--cfg", "job"], ["--help"]], ids=" ".join)
def test_what_hydra_refuses_is_one_line_too(mistake, words, shown, capsys):
    with pytest.raises(SystemExit) as end:
        run("distill", [mistake, *shown])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert "HYDRA" not in line
    assert "use +" not in line
    assert "Config search path" not in line


@pytest.mark.parametrize("setting", ["regenerate.base_url", "evaluation.server"])
def test_an_address_with_a_key_in_it_is_refused(setting):
    with pytest.raises(GraftError, match=rf"^{setting} has a name or a key in it, .*: use OPENAI_API_KEY$"):
        composed("regenerate", f"{setting}='http://me:sk-secret@a:8000/v1'")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (f"policy.num_draft_tokens=[1,{MAX_NODES + 1}]", f"policy.num_draft_tokens goes up to {MAX_NODES + 1}"),
        (f"policy.retrieval_depth={MAX_NODES + 1}", "policy.retrieval_depth goes up to"),
        ("policy.topk=91", f"propose {91 + 8 * 91**2} nodes a round, over {MAX_CANDIDATES}"),
        (f"policy.num_steps={MAX_NODES + 1}", f"more than {MAX_NODES} steps"),
    ],
)
def test_a_calibration_does_not_begin_with_what_no_plan_can_have(setting, words):
    with pytest.raises(GraftError, match=words):
        composed("calibrate", setting)
    assert composed("calibrate", f"policy.num_draft_tokens=[1,{MAX_NODES}]", "policy.topk=90").policy.topk == 90


@pytest.fixture
def own_settings(monkeypatch, tmp_path):
    """A directory of settings, with an experiment of one's own in it."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.setattr(recipe, "CONF", tmp_path / "conf")
    return tmp_path / "conf" / "experiment" / "mine.yaml"


@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize(
    "content",
    [
        b"# @package _global_\nseed: [1",
        b"seed: \xff\xfe",
        b"a: &a [*a]\n\tb: 1",
        b"- 1",
        b"3",
        b"seed: !!python/none x",
    ],
)
def test_a_damaged_file_of_settings_is_one_line_too(own_settings, content, capsys):
    own_settings.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        run("distill", ["experiment=mine"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.usefixtures("command_line")
def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(composed, names):
        raise KeyError("a bug")

    monkeypatch.setattr(recipe, "run_stages", broken)
    with pytest.raises(KeyError, match="a bug"):
        run("distill", [])


@pytest.mark.usefixtures("command_line")
def test_what_hydra_shows_is_shown(capsys):
    run("distill", ["head.epochs=3", "--cfg", "job"])
    assert "  epochs: 3\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        run("distill", ["--help"])
    assert not end.value.code
    printed = capsys.readouterr()
    assert f"  epochs: {Config().head.epochs}\n" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("setting", "words"), [("data.path=${nope}", "Interpolation key 'nope' not found"), ("data.path=???", "mandatory")]
)
def test_a_value_that_is_none_is_named(setting, words):
    with pytest.raises(GraftError, match=f"^.*{words}.* full_key: data.path; --help shows what there is to set$"):
        composed("distill", setting)


def test_a_users_mistake_is_one_line_and_leaves_nothing(tmp_path):
    ended = subprocess.run(
        [sys.executable, "recipes/calibrate.py", f"run_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "regenerate" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
