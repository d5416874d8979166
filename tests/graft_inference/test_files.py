"""JSON that others made is read as the standard has it."""

import pytest

from graft_inference.errors import GraftError
from graft_inference.files import parse_json, read_json


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        '{"a": -Infinity}',
        "1e999",
        "[-1e999]",
        "[" * 100_000,
        "9" * 5000,
        "{'a': 1}",
        "",
        "\ufeff1",
    ],
)
def test_what_is_no_json_is_refused(tmp_path, text):
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(GraftError, match=r"x\.json is not valid JSON.*download it again"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[1]", "null", "3", '"a"'])
def test_what_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(GraftError, match=r"x\.json must hold a JSON object"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00", b'{"a": "\xff"}'])
def test_bytes_that_are_no_text_are_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(GraftError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")
