"""Safetensors and JSON files: valid files are read and written exactly, invalid ones refused before any allocation."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import _TYPES, load_file, save_file

from peft_zoo.io import TensorFile, TensorInfo, TensorWriter, copy_regular
from peft_zoo.io.header import MAX_HEADER
from peft_zoo.io.strict_json import MAX_JSON, parse_json, read_json
from tests.io.samples import entry, raw_file


def one_of_each_dtype() -> dict[str, torch.Tensor]:
    """Every dtype, a scalar, an empty tensor, and names that JSON escapes."""
    tensors = {f"t{i}.{name}": torch.ones(4, 2).to(dtype) for i, (name, dtype) in enumerate(sorted(_TYPES.items()))}
    return {**tensors, 'é"\\/': torch.tensor(1.5), "empty": torch.zeros(0, 3), "zeroed": torch.zeros(3, 0).half()}


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo.of(value) for name, value in tensors.items()}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors in reverse order: the order of writing does not matter."""
    with TensorWriter(path, infos(tensors), metadata) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_file_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(one_of_each_dtype(), path, metadata={"format": "pt"})
    expected = load_file(path)
    with TensorFile(path) as file:
        assert file.metadata == {"format": "pt"}
        assert file.tensors == infos(expected)
        for name, value in expected.items():
            read = file.read(name)
            assert (read.dtype, read.shape, as_bytes(read)) == (value.dtype, value.shape, as_bytes(value))
            assert file.tensors[name].nbytes == read.untyped_storage().nbytes()
    with pytest.raises(ValueError, match="closed file"):
        file.read("empty")


def test_a_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    with TensorFile(tmp_path / "a.safetensors") as file:
        first = file.read("a").zero_()
        assert torch.equal(file.read("a"), torch.ones(3)) and not first.any()
        with pytest.raises(KeyError):
            file.read("b")


def test_opening_allocates_nothing_of_a_tensors_size(tmp_path: Path) -> None:
    size = 1 << 36  # a sparse file: 64 GiB that are not there
    path = raw_file(tmp_path / "a.safetensors", {"a": entry("F32", [size // 4], [0, size])})
    os.truncate(path, path.stat().st_size + size)
    tracemalloc.start()
    try:
        with TensorFile(path) as file:
            assert file.tensors["a"].nbytes == size
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header beyond the file": ({}, b"", 1 << 40, "does not fit"),
    "header of 2^64 - 1 bytes": ({}, b"", (1 << 64) - 1, "does not fit"),
    "empty header": (b"", b"", None, "does not fit"),
    "not JSON": (b"{oops}", b"", None, "without quotes"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "invalid start byte"),
    "UTF-16": ("{}".encode("utf-16-le"), b"", None, "without quotes"),
    "a list": ([], b"", None, "not a JSON object"),
    "nested": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", None, "needs exactly"),
    "nested entry": (b'{"a":{"shape":' + b"[" * 1000 + b"]" * 1000 + b"}}", b"", None, "nested too deeply"),
    "endless entry": (b'{"a":{"shape":[' + b"[]," * 5000 + b"[]]}}", b"", None, "needs exactly"),
    "text after the end": (b"{}{}", b"", None, "after its end"),
    "open text": (b'{"a', b"", None, "does not end"),
    "comma at the end": (b'{"__metadata__":{"a":"b"},}', b"", None, "without quotes"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b"", None, "occurs twice"),
    "metadata key twice": (b'{"__metadata__":{"a":"","a":""}}', b"", None, "'a' occurs twice"),
    "metadata without commas": (b'{"__metadata__":{"a":"" "b":""}}', b"", None, "does not end"),
    "much metadata": ({"__metadata__": {str(i): "" for i in range(5000)}}, b"", None, "more than 4096"),
    "long name": ({"a" * 5000: entry()}, b"12345678", None, "5002 bytes"),
    "many tensors": (b"{" + b'"data_offsets"' * 100_001 + b"}", b"", None, "more than 100000"),
    "twice": (json.dumps({"a": entry(), "b": entry()}).replace("b", "a", 1).encode(), b"", None, "'a' occurs twice"),
    "twice inside": (b'{"a":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}', b"abcd", None, "twice"),
    "metadata list": ({"__metadata__": []}, b"", None, "must map texts to texts"),
    "metadata number": ({"__metadata__": {"a": 1}}, b"", None, "must map texts to texts"),
    "entry is a number": ({"a": 1}, b"", None, "needs exactly dtype, shape and data_offsets"),
    "extra field": ({"a": {**entry(), "code": "rm"}}, b"12345678", None, "needs exactly"),
    "unknown dtype": ({"a": entry("F32X")}, b"12345678", None, "unknown dtype 'F32X'"),
    "dtype list": ({"a": {**entry(), "dtype": ["F32"]}}, b"12345678", None, "unknown dtype"),
    "negative size": ({"a": entry(shape=[-2])}, b"12345678", None, r"impossible shape \[-2\]"),
    "fraction": ({"a": entry(shape=[2.0])}, b"12345678", None, "impossible shape"),
    "boolean": ({"a": entry(shape=[True, 2])}, b"12345678", None, "impossible shape"),
    "huge size": ({"a": entry(shape=[1 << 64])}, b"12345678", None, "impossible shape"),
    "huge product": ({"a": entry(shape=[1 << 62, 1 << 62, 0], offsets=[0, 0])}, b"", None, "impossible shape"),
    "many axes": ({"a": entry(shape=[1] * 64 + [2])}, b"12345678", None, "impossible shape"),
    "shape text": ({"a": entry(shape="2")}, b"12345678", None, "impossible shape"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, b"12345678", None, "impossible data_offsets"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, b"12345678", None, "impossible data_offsets"),
    "backwards": ({"a": entry(offsets=[8, 0])}, b"12345678", None, "needs 8 bytes and has -8"),
    "too few bytes": ({"a": entry(offsets=[0, 4])}, b"1234", None, "needs 8 bytes and has 4"),
    "beyond the end": ({"a": entry()}, b"1234", None, "end at byte"),
    "bytes left over": ({"a": entry()}, b"123456789", None, "end at byte"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, b"123456789012", None, "'b' begins at 4"),
    "same place": ({"a": entry(), "b": entry()}, b"12345678", None, "'b' begins at 0"),
    "gap": ({"a": entry(), "b": entry(offsets=[12, 20])}, b"1" * 20, None, "'b' begins at 12"),
    "control character": ({"a\x1b[2J": entry()}, b"12345678", None, "cannot be printed"),
    "half a character": ({"\ud800": entry()}, b"12345678", None, "cannot be printed"),
    "not a number": ({"a": entry(shape=[math.nan])}, b"12345678", None, "'NaN' is not finite"),
}


@pytest.mark.parametrize(("header", "data", "length", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_is_not_beyond_doubt_is_refused(
    tmp_path: Path, header: Any, data: bytes, length: int | None, message: str
) -> None:
    path = raw_file(tmp_path / "a.safetensors", header, data, length)
    with pytest.raises(ValueError, match=f"a.safetensors: not a valid safetensors file: .*{message}"):
        TensorFile(path)


def test_a_header_is_parsed_within_five_times_its_size(tmp_path: Path) -> None:
    entries = {f"{number:07d}": entry(shape=[0], offsets=[0, 0]) for number in range(3000)}
    texts = {"__metadata__": {str(number): 'x{}\\",' * 200 for number in range(50)}}
    nothing = b'{"x":[' + b"[]," * 100_000 + b"[]]}"
    for header in ({**texts, **entries}, {**dict(reversed(entries.items())), **texts}, nothing):
        path = raw_file(tmp_path / "a.safetensors", header)
        tracemalloc.start()
        try:
            with nullcontext() if isinstance(header, dict) else pytest.raises(ValueError, match="needs exactly"):
                TensorFile(path).close()
            assert tracemalloc.get_traced_memory()[1] < 5 * path.stat().st_size
        finally:
            tracemalloc.stop()


def test_pipes_devices_and_links_to_elsewhere_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", Path("/dev/zero"), tmp_path):
        for read in (TensorFile, read_json):
            with pytest.raises(ValueError, match="not a file"):
                read(path)
    inner, secret = tmp_path / "folder", tmp_path / "secret.json"
    inner.mkdir()
    secret.write_text("{}")
    (inner / "a.json").symlink_to(secret)
    (inner / "b.json").write_text("{}")
    (inner / "c.json").symlink_to("b.json")
    assert read_json(inner / "a.json") == read_json(inner / "c.json", inner) == {}
    with pytest.raises(ValueError, match=r"a\.json.*link"):
        read_json(inner / "a.json", inner)
    with pytest.raises(ValueError, match=r"a\.json.*link"):
        copy_regular(inner / "a.json", tmp_path / "copy", inner)
    copy_regular(inner / "c.json", tmp_path / "copy", inner)
    assert (tmp_path / "copy").read_text() == "{}"


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0" / "lora"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "12ab").write_text("{}")
    (snapshot / "a.json").symlink_to("../../../blobs/12ab")
    assert read_json(snapshot / "a.json", snapshot) == {}


def test_a_long_header_is_refused_unread(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a.safetensors", {}, length=MAX_HEADER + 1)
    os.truncate(path, MAX_HEADER * 2)
    with pytest.raises(ValueError, match=f"{MAX_HEADER + 1} bytes is longer than {MAX_HEADER}"):
        TensorFile(path)


@settings(max_examples=40)
@given(data=st.data())
def test_what_is_accepted_is_what_safetensors_accepts(data: st.DataObject, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(5).half()}, path, metadata={"k": "v"})
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.sampled_from(b'0123456789,:{}[]"FIUabk ') | st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, None, None, -1, 7, 50]))])
    try:
        with TensorFile(path) as file:
            tensors = {name: file.read(name) for name in file.tensors}
    except ValueError:
        return
    expected = load_file(path)
    assert tensors.keys() == expected.keys()
    assert all(as_bytes(tensors[name]) == as_bytes(value) for name, value in expected.items())


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a.bin", "zip"), ("a.pt", "legacy"), ("a.PTH", "zip"), ("a.ckpt", "legacy"), ("a.pkl", "pickle")),
        *(("a.safetensors", kind) for kind in ("zip", "legacy", "pickle")),
    ],
)
def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    buffer = io.BytesIO()
    if kind == "pickle":
        pickle.dump(Bomb(tmp_path / "mark"), buffer)
    else:
        torch.save({"a": Bomb(tmp_path / "mark")}, buffer, _use_new_zipfile_serialization=kind == "zip")
    (tmp_path / name).write_bytes(buffer.getvalue())
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    with pytest.raises(ValueError, match=r"a\..*pickle"):
        TensorFile(tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(0x0280)  # 0x80 0x02: protocol 2
    with TensorFile(raw_file(tmp_path / "a.safetensors", text, b"\0" * 8)) as file:
        assert list(file.tensors) == ["a"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening one waits for ever
    for name in ("pipe.safetensors", "missing.safetensors", "."):
        with pytest.raises(ValueError, match="not a file"):
            TensorFile(tmp_path / name)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ValueError, match="became shorter while it was read"):
            file.read("a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "Expecting property name"),
        ('{"r": 8, "r": 1}', "'r' occurs twice"),
        ('{"a": {"r": 8, "r": 1}}', "'r' occurs twice"),
        ('{"r": NaN}', "'NaN' is not finite"),
        ('{"r": -Infinity}', "'-Infinity' is not finite"),
        ('{"r": 1e999}', "'1e999' is not finite"),
        ('{"r": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("\ufeff{}", "without quotes|BOM"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
        ('{"a": [' + "[]," * 500_000 + "[]]}", "more than 400000 values"),
    ],
)
def test_json_is_read_strictly(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"a.json: not valid JSON: .*{message}"):
        read_json(tmp_path / "a.json")


def test_json_has_a_limit_and_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": 1.5}')
    assert read_json(path) == parse_json(b'{"a": 1.5}') == {"a": 1.5}
    os.truncate(path, MAX_JSON + 1)
    with pytest.raises(ValueError, match="larger than 16777216 bytes"):
        read_json(path)
    with pytest.raises(ValueError, match="not a file"):
        read_json(tmp_path)


def test_a_written_file_has_the_bytes_of_safetensors(tmp_path: Path) -> None:
    tensors = one_of_each_dtype()
    for number, metadata in enumerate([None, {}, {"format": "pt\n\x01é"}]):
        theirs, ours = tmp_path / f"theirs{number}", tmp_path / f"ours{number}"
        save_file(tensors, theirs, metadata=metadata)
        write(ours, tensors, metadata)
        assert ours.read_bytes() == theirs.read_bytes()


@settings(max_examples=30)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=9),
        st.builds(
            lambda dtype, shape: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype),
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=6,
    )
)
def test_any_file_has_the_bytes_of_safetensors(tensors: dict[str, torch.Tensor], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.unlink(missing_ok=True)
    write(path, tensors)
    assert path.read_bytes() == safetensors.torch.save(tensors)
    with TensorFile(path) as file:
        assert all(torch.equal(file.read(name), value) for name, value in tensors.items())


INFO = TensorInfo(torch.float32, (2,))


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2).half(), torch.ones(2, 1), [torch.zeros(12).byte()]])
def test_a_tensor_that_differs_from_the_announced_one_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"a: .*announced"), TensorWriter(tmp_path / "x", {"a": INFO}) as writer:
        writer.write("a", wrong)
    assert not any(tmp_path.iterdir())


def test_every_tensor_is_written_once(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="'b' was announced"),
        TensorWriter(tmp_path / "x", {"a": INFO, "b": INFO}) as w,
    ):
        w.write("a", torch.ones(2, 2).t()[0])
        with pytest.raises(ValueError, match="a: already"):
            w.write("a", torch.ones(2))
        with pytest.raises(ValueError, match="c: was not announced"):
            w.write("c", torch.ones(2))
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_stored_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    for name, info in (("a", TensorInfo(torch.complex128, (2,))), ("__metadata__", INFO)):
        with pytest.raises(ValueError, match=f"'{name}' of dtype {info.dtype}"):
            TensorWriter(tmp_path / "x", {name: info})
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="path="), TensorWriter(tmp_path / "x", {"a": INFO}):
        pytest.fail("the block ran")
    assert (tmp_path / "x").read_text() == "mine"


def test_a_tensor_is_copied_in_pieces(tmp_path: Path) -> None:
    tensors = {**one_of_each_dtype(), "long": torch.arange(1000)}
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    with TensorFile(tmp_path / "a") as file:
        sizes = [len(piece) for piece in file.pieces("long", 300)]
        assert sizes == [300] * 26 + [200]
        with TensorWriter(tmp_path / "b", file.tensors, file.metadata) as writer:
            for name in file.tensors:
                writer.write(name, file.pieces(name, 7))
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        with pytest.raises(KeyError):
            next(file.pieces("missing"))
        os.truncate(tmp_path / "a", 4000)
        with pytest.raises(ValueError, match="became shorter"):
            list(file.pieces("long"))
