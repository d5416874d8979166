"""Questions that every machine can ask: about functions, from their docstrings."""

import re

from graft_train.config.data import DataConfig
from graft_train.data.documents import read_documents
from graft_train.data.questions import ASKED, questions

SOURCE = '''
def doubled(x):
    """Return the number that is twice as large as the one given.

    Not a word of this is asked about.
    """

def terse(x):
    """Too short."""

def shown(x):
    """>>> shown(1) and a few more words that make it long enough"""

def signed(x):
    """signed(number, other) -> what it is, and that is long enough, too."""

def same(x):
    """Return the number that is twice as large as the one given."""

def _private(x):
    """Long enough to be asked about, but nobody's business."""

class Thing:
    def method(self):
        """A method is no function of the module, however much it says."""
'''


def test_documented_public_functions_are_asked_about(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    found = list(questions(tmp_path / "m.py", "pack.m", set()))
    assert [record["id"] for record in found] == ["pack.m.doubled"]
    assert "doubled" in found[0]["prompt"]
    assert "Not a word" not in found[0]["prompt"]
    assert "{" not in found[0]["prompt"]


def test_what_two_functions_say_alike_is_asked_about_once(tmp_path):
    """Or an answer that is trained on would be that of a prompt which is measured."""
    said = set()
    for name, function in (("a", "first"), ("b", "second")):
        (tmp_path / f"{name}.py").write_text(f'''
def {function}(x):
    """Return the number that is twice as large as the one given."""

def {function}_of_all():
    """Long enough, and says the name of the module, which is {name}."""
''')
    found = [record["id"] for name in "ab" for record in questions(tmp_path / f"{name}.py", name, said)]
    assert found == ["a.first", "a.first_of_all", "b.second_of_all"]


def test_the_standard_library_gives_hundreds_of_every_kind_each_its_own_document():
    documents = list(read_documents(DataConfig(path="questions", evaluation_share=0.1, calibration_share=0.1)))
    asked = [document.conversation.messages[0]["content"] for document in documents]
    kinds = [re.compile(re.escape(text).replace(r"\{", "{").replace(r"\}", "}").split("{")[0]) for text in ASKED]
    counts = [sum(bool(kind.match(text)) for text in asked) for kind in kinds]
    assert min(counts) > 100
    assert sum(counts) == len(asked) == len({document.id for document in documents})
    assert "textwrap.dedent" in {document.id for document in documents}
    assert {document.split for document in documents} == {"train", "calibration", "evaluation"}
