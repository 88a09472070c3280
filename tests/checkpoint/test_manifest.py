"""No bit of a manifest is free, and the directory holds exactly what it lists."""

from __future__ import annotations

import hashlib
import json

import pytest

from compress.checkpoint import check_files, dump_json, hash_files, read_manifest, write_manifest
from compress.errors import BadInput, Corrupt

DIGEST = "0" * 64


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}\n")
    (tmp_path / "sub/ünï.txt").write_text("text")
    return tmp_path


def document(directory, **changes):
    return {
        "class": "lossless",
        "source": {"id": "org/model", "revision": None},
        "recipe": {"version": 1, "é": [1.5, None, True]},
        "versions": {"entropress": "0.1.0"},
        "stages": [{"histogram": {10: 1, 9: 2}}],
        "tensors": {"w": {"dtype": "BF16", "shape": [2, 0], "sha256": DIGEST, "from": "v"}},
        "files": hash_files(directory),
        "gates": [],
        **changes,
    }


def seal(directory, doc):
    """Write a document as an attacker would: canonical and with a right digest."""
    doc = {key: value for key, value in doc.items() if key != "sha256"}
    doc["sha256"] = hashlib.sha256(dump_json(doc)).hexdigest()
    (directory / "entropress.json").write_bytes(dump_json(doc))


def test_round_trip(directory):
    written = write_manifest(directory, document(directory))
    assert read_manifest(directory) == written
    raw = (directory / "entropress.json").read_bytes()
    assert raw.endswith(b"}\n")
    assert "é".encode() in raw
    without = {key: value for key, value in written.items() if key != "sha256"}
    assert written["sha256"] == hashlib.sha256(dump_json(without)).hexdigest()
    assert check_files(directory, written) == []


def test_every_flipped_bit_is_found(directory):
    write_manifest(directory, document(directory))
    path = directory / "entropress.json"
    raw = path.read_bytes()
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(Corrupt, match=r"entropress\.json"):
            read_manifest(directory)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncation_and_additions(directory, cut):
    write_manifest(directory, document(directory))
    path = directory / "entropress.json"
    raw = path.read_bytes()
    for changed in (
        raw[:cut],
        raw + b"\n",
        raw[:cut] + b" " + raw[cut:],
        raw.replace(b"\n", b"\r\n"),
    ):
        path.write_bytes(changed)
        with pytest.raises(Corrupt, match=r"entropress\.json"):
            read_manifest(directory)


def test_missing(directory):
    with pytest.raises(Corrupt, match="unfinished"):
        read_manifest(directory)


def test_nested_too_deeply(directory):
    for depth in (500, 100_000):
        (directory / "entropress.json").write_bytes(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
        with pytest.raises(Corrupt, match=r"entropress\.json"):
            read_manifest(directory)


def test_a_newer_format(directory):
    doc = write_manifest(directory, document(directory))
    seal(directory, doc | {"min_reader": 2})
    with pytest.raises(BadInput, match=r"reads format 2 or later.*upgrade entropress"):
        read_manifest(directory)


FILE = {"bytes": 1, "sha256": DIGEST}
CHANGES = {
    "class": {"class": "perfect"},
    "version": {"format_version": "1"},
    "bool": {"min_reader": True},
    "stages": {"stages": {}},
    "file without digest": {"files": {"a": {"bytes": 1}}},
    "file of negative size": {"files": {"a": FILE | {"bytes": -1}}},
    "file of short digest": {"files": {"a": FILE | {"sha256": "00"}}},
    "tensor without shape": {"tensors": {"w": {"dtype": "U8", "sha256": DIGEST}}},
    "tensor from a number": {
        "tensors": {"w": {"dtype": "U8", "shape": [], "sha256": DIGEST, "from": 1}}
    },
} | {
    f"path {path!r}": {"files": {path: FILE}}
    for path in ("", "/a", "a/", "a//b", "./a", "a/..", "../a", "a\\b", "a\0")
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_members_are_checked_on_both_ways(directory, change):
    good = write_manifest(directory, document(directory))
    with pytest.raises(Corrupt):
        write_manifest(directory, document(directory, **change))
    assert read_manifest(directory) == good
    seal(directory, good | change)
    with pytest.raises(Corrupt, match=r"entropress\.json"):
        read_manifest(directory)


@pytest.mark.parametrize(
    "member", ["class", "source", "recipe", "versions", "stages", "tensors", "files", "gates"]
)
def test_no_member_may_be_missing(directory, member):
    good = write_manifest(directory, document(directory))
    good.pop(member)
    seal(directory, good)
    with pytest.raises(Corrupt, match=member):
        read_manifest(directory)


def test_numbers_that_json_lacks(directory):
    with pytest.raises(ValueError, match="JSON"):
        write_manifest(directory, document(directory, gates=[{"ratio": float("inf")}]))
    assert not (directory / "entropress.json").exists()


def test_differences_between_directory_and_manifest(directory):
    manifest = write_manifest(directory, document(directory))
    (directory / "extra.txt").touch()
    (directory / "config.json").write_text("[]\n")
    (directory / "sub/ünï.txt").write_text("longer text")
    assert check_files(directory, manifest) == [
        "config.json: wrong sha256",
        "extra.txt: not in the manifest",
        "sub/ünï.txt: wrong size, got 11 bytes, expected 4",
    ]
    (directory / "config.json").unlink()
    assert "config.json: missing" in check_files(directory, manifest)


def test_what_git_and_the_hub_leave_is_not_counted(directory):
    manifest = write_manifest(directory, document(directory))
    for path in (".git/config", ".cache/huggingface/x", ".gitattributes"):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).touch()
    assert check_files(directory, manifest) == []


@pytest.mark.parametrize("target", ["/etc/hostname", "/etc", "nowhere"])
def test_a_link_that_leaves_is_corrupt(directory, target):
    (directory / "link").symlink_to(target)
    with pytest.raises(Corrupt, match="link: not a regular file of the directory"):
        hash_files(directory)


def test_hashes(directory):
    found = hash_files(directory)
    assert list(found) == ["config.json", "sub/ünï.txt"]
    assert found["sub/ünï.txt"] == {"bytes": 4, "sha256": hashlib.sha256(b"text").hexdigest()}
    assert json.loads(dump_json(found)) == found
