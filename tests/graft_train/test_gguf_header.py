"""The header of a GGUF file, as the package gguf reads a sound one; and what cannot be one."""

import struct

import gguf
import pytest

from graft_inference import GraftError
from graft_train import gguf as module
from graft_train.config import Config
from graft_train.config.target import TargetConfig
from graft_train.gguf_header import read_header

from .tiny_gguf import write_gguf

KINDS = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


@pytest.mark.parametrize("quantised", [False, True])
def test_a_sound_header_is_read_as_the_package_reads_it(tmp_path, quantised):
    file = write_gguf(tmp_path / "tiny.gguf", quantised=quantised, rope__scaling__type="none")
    header, reader = read_header(file, KINDS), gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.said == fields
    assert header.shapes == {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors}
    assert header.weights == sum(int(tensor.n_elements) for tensor in reader.tensors)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors=(), keys=(), version=3):
    """A file of keys, each with its type and packed value, and of tensors, each with what follows its name."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(keys))]
    parts += [text(name) + struct.pack("<I", kind) + value for name, kind, value in keys]
    parts += [text(name) + struct.pack("<I", 1) + rest for name, rest in tensors]
    return b"".join(parts) + bytes(64)


def tensor(count, offset=0, kind=0):
    return struct.pack("<QIQ", count, kind, offset)


FOUR = struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"GGML" + bytes(20), "does not begin with GGUF"),
        (header(version=1), "version 1 is unknown"),
        (header(keys=[("a", 4, FOUR), ("a", 4, FOUR)]), "the key a is there twice"),
        (header(keys=[("a", 77, FOUR)]), "a value of the type 77 is None"),
        (header(keys=[("a", 6, struct.pack("<f", float("nan")))]), "a value of the type 6 is nan"),
        (header(keys=[("a", 8, struct.pack("<Q", 2) + bytes([255, 254]))]), "can't decode"),
        (header(keys=[("general.alignment", 4, struct.pack("<I", 24))]), "general.alignment=24 is no power of two"),
        (header([("w", tensor(4)), ("w", tensor(4, 32))]), "the tensor w is there twice"),
        (header([("v", tensor(4)), ("w", tensor(4, 64))]), "w begins at 64, and what is before it ends at 32"),
        (header([("w", tensor(0))]), r"w has the type 0 and the shape \[0\]"),
        (header([("w", tensor(4, kind=8))]), r"w has the type 8 and the shape \[4\]"),
        (header([("w", tensor(4, kind=999))]), "w has the type 999"),
        (header([("w", tensor(20))]), "it is truncated: "),
        (header([("w", tensor(400))]), "w of shape .400. is larger than the file"),
    ],
)
def test_what_cannot_be_one_is_refused(tmp_path, content, told):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(GraftError, match=rf"x\.gguf is no GGUF file, or damaged: .*{told}"):
        read_header(tmp_path / "x.gguf", KINDS)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"attention__key_length": 4096}, r"llama\.attention\.key_length=4096 is no size of its tensors"),
        ({"expert_count": 5000}, r"llama\.expert_count=5000 is no size of its tensors"),
    ],
)
def test_a_model_is_not_built_by_sizes_that_no_tensor_has(tmp_path, monkeypatch, said, told):
    monkeypatch.setattr(module, "_says_nothing", lambda *_: True)
    file = write_gguf(tmp_path / "tiny.gguf", **said)
    target = TargetConfig(str(file), dtype="float32", device="cpu")
    with pytest.raises(GraftError, match=told):
        module.with_directory(Config(run_dir=str(tmp_path / "run"), target=target))
    assert not (tmp_path / "run" / "target").exists()
