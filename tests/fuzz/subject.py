"""What is damaged and used: one of these for every kind of input."""

import shutil
from pathlib import Path
from random import Random

from .mutate import Damage, damage


class Subject:
    """A kind of input that others may have made.

    Attributes:
        share: of twenty mutations, how many are of this kind.
    """

    share = 1

    def open(self) -> None:
        """Once in the process that uses it, before any use."""

    def damage(self, rng: Random) -> str:
        """Makes a damaged one of a sound one; says how."""
        raise NotImplementedError

    def use(self) -> str:
        """Reads the damaged one and does what it is for: "right", or what is wrong. Raises GraftError to refuse it."""
        raise NotImplementedError

    def restore(self, number: int) -> bool:
        """Puts a sound one in the damaged one's place; False where there are no more."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Bytes of the damaged one."""
        raise NotImplementedError


class Directories(Subject):
    """Directories of files: a few sound ones, and the damaged copy of one of them.

    Args:
        root: where they lie.
        sound: by their names.
    """

    own: dict[str, Damage] = {}  # noqa: RUF012
    """Damages of its own, by suffix."""

    def __init__(self, root: Path, sound: dict[str, Path]) -> None:
        self.damaged = root / "damaged"
        self.sound = sound
        self.name = ""

    def damage(self, rng: Random) -> str:
        name = rng.choice(sorted(self.sound))
        self._copy(name)
        return f"{name}, {damage(self.damaged, rng, list(self.sound.values()), self.own)}"

    def restore(self, number: int) -> bool:
        if number < len(self.sound):
            self._copy(sorted(self.sound)[number])
        return number < len(self.sound)

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.damaged.rglob("*") if file.is_file())

    def _copy(self, name: str) -> None:
        self.name = name
        shutil.rmtree(self.damaged, ignore_errors=True)
        shutil.copytree(self.sound[name], self.damaged)
