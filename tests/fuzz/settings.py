"""Settings, on the command line and in files."""

import contextlib
import io
import shutil
import sys
from functools import reduce
from pathlib import Path
from random import Random
from typing import Any

import yaml

from graft_inference import GraftError
from graft_train import recipe
from graft_train.config import Config, setting_names

from .mutate import VALUES, damage_bytes, damaged_value
from .subject import Subject


class Settings(Subject):
    """Settings on the command line and in an experiment's file: refused in one line, or they mean what they say."""

    share = 1

    def __init__(self, root: Path) -> None:
        self.directory = root / "conf"
        shutil.copytree(recipe.CONF, self.directory)
        self.experiment = self.directory / "experiment" / "fuzzed.yaml"
        self.overrides: list[str] = []

    def damage(self, rng: Random) -> str:
        self.restore(0)
        if rng.random() < 0.5:
            said = damage_bytes(self.experiment, rng) if rng.random() < 0.6 else self._damage_yaml(rng)
            return f"experiment, {said}"
        name = rng.choice([*setting_names(), "head", "experiment", "hydra.run.dir", "+x.y", "~head.family", "@a"])
        value = rng.choice(
            [*map(str, VALUES), "null", "true", "[1,2]", "{a:1}", "${a}", "${oc.env:A}", "'", "\x00", "???"]
        )
        self.overrides = [f"{name}={value}"] + (["--multirun"] if rng.random() < 0.05 else [])
        return str(self.overrides)

    def _damage_yaml(self, rng: Random) -> str:
        values = yaml.safe_load(self.experiment.read_text())
        text, said = damaged_value(values, rng)
        self.experiment.write_text(f"# @package _global_\n{text}", encoding="utf-8", errors="surrogatepass")
        return said

    def restore(self, number: int) -> bool:
        self.overrides = []
        shutil.copyfile(recipe.CONF / "experiment" / "smollm2.yaml", self.experiment)
        return number == 0

    def use(self) -> str:
        given = ["experiment=fuzzed", *self.overrides]
        found = self._composed(given)
        if not isinstance(found, Config):
            return f"no settings: {found}"
        for override in self.overrides:
            name, _, value = override.partition("=")
            if name in setting_names() and not _means(reduce(getattr, name.split("."), found), value):
                return f"{override} became {reduce(getattr, name.split('.'), found)!r}"
        return "right"

    def _composed(self, overrides: list[str]) -> Any:
        """As the command composes them. Raises GraftError where it ends with one line that says why."""
        found: list[Any] = []
        said = io.StringIO()
        arguments, real, conf = sys.argv, recipe.run_stages, recipe.CONF
        recipe.run_stages = lambda composed, names: found.append(_config_of(composed))
        recipe.CONF = self.directory
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                recipe.run("distill", overrides)
        except SystemExit as end:
            lines = said.getvalue().strip().splitlines()
            if end.code != 2 or not lines or "Traceback" in said.getvalue():
                raise AssertionError(f"ended with {end.code}: {said.getvalue()}") from end
            raise GraftError(lines[-1]) from end
        finally:
            sys.argv, recipe.run_stages, recipe.CONF = arguments, real, conf
        return found[0] if found else None

    @property
    def size(self) -> int:
        return self.experiment.stat().st_size


def _means(found: Any, value: str) -> bool:
    """Whether a setting is what was written for it. Lists and what stands for other settings is not looked into."""
    if value[:1] in "[{$" or isinstance(found, list | dict):
        return True
    if isinstance(found, bool):
        number = value.removeprefix("-").isdigit() and int(value) != 0
        return found == (value.lower() in ("true", "yes", "on") or number)
    if isinstance(found, int | float):
        return found == (int(value) if isinstance(found, int) else float(value))
    return (found is None and value.lower() in ("null", "")) or str(found) == value.strip("'")


def _config_of(composed: Any) -> Any:
    """As `run_stages` does, whose refusals end the command in one line, too."""
    try:
        return recipe.to_config(composed)
    except GraftError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
