"""Unpacking hostile archives. Each case names the attack or CVE that it stands for."""

import bz2
import gzip
import io
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yxanul_nemo.errors import UserError
from yxanul_nemo.unpacking.safe_tar import safe_extract

ALLOWED = ("model_config.yaml", "*.safetensors", "*_tokenizer.model", "dist/*.distcp")
END = bytes(1024)
LIMIT_BYTES = 100_000


def header(
    name: str | bytes, size_bytes: int = 0, kind: bytes = b"0", link: bytes = b"", size_field: bytes = b""
) -> bytes:
    """One ustar header with a right checksum, whatever it says."""
    raw_name = name.encode() if isinstance(name, str) else name
    block = bytearray(512)
    block[0 : len(raw_name[:100])] = raw_name[:100]
    block[100:108] = b"0000777\0"
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = size_field or b"%011o\0" % size_bytes
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\00000"
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return bytes(block)


def member(name: str | bytes, data: bytes = b"data", kind: bytes = b"0", **fields) -> bytes:
    return header(name, len(data), kind, **fields) + data + bytes(-len(data) % 512)


def pax(records: dict[str, str | bytes] | bytes, kind: bytes = b"x") -> bytes:
    """An extension header for the member after it."""
    if isinstance(records, bytes):
        return member("PaxHeaders/x", records, kind)
    data = b""
    for key, value in records.items():
        body = b" " + key.encode() + b"=" + (value.encode() if isinstance(value, str) else value) + b"\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        data += str(length).encode() + body
    return member("PaxHeaders/x", data, kind)


CONFIG = member("model_config.yaml", b"a: 1\n")
WEIGHTS = member("model.safetensors", b"w" * 600)


def everything_in(folder: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = (
            f"-> {path.readlink()}" if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        )
    return found


def refused(folder: Path, raw: bytes, reason: str, **limits) -> None:
    """The archive is refused for `reason`, and nothing anywhere in `folder` differs from before."""
    (folder / "box").mkdir()
    (folder / "box" / "archive.nemo").write_bytes(raw)
    (folder / "victim").write_text("precious")
    before = everything_in(folder)
    with pytest.raises(UserError, match=reason) as caught:
        safe_extract(
            folder / "box" / "archive.nemo",
            folder / "box" / "out",
            ALLOWED,
            **({"max_total_bytes": LIMIT_BYTES} | limits),
        )
    assert "archive.nemo" in str(caught.value)
    assert everything_in(folder) == before


# --- what must work ---


def made_like_nemo(folder: Path, mode: str) -> tuple[Path, dict[str, bytes | str]]:
    """As NeMo's SaveRestoreConnector makes it: the whole folder under the name `.`."""
    source = folder / "source"
    (source / "dist").mkdir(parents=True)
    (source / "model_config.yaml").write_text("name: größer\n")
    (source / "0123456789abcdef_tokenizer.model").write_bytes(os.urandom(3000))
    (source / "model.safetensors").write_bytes(os.urandom(2_500_000))
    (source / "dist" / "__0_0.distcp").write_bytes(b"")
    with tarfile.open(folder / "model.nemo", mode) as tar:
        tar.add(source, arcname=".")
    return folder / "model.nemo", everything_in(source)


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_unpacks_what_nemo_makes(tmp_path, mode):
    archive, source = made_like_nemo(tmp_path, mode)
    names = safe_extract(archive, tmp_path / "out", ALLOWED)
    assert everything_in(tmp_path / "out") == source
    assert sorted(names) == sorted(name for name, value in source.items() if value != "folder")
    assert not list(tmp_path.glob(".out*"))


def test_reads_the_same_as_tarfile(tmp_path):
    """Long sizes and times come in extension headers; Python's own reader is the reference."""
    archive = tmp_path / "model.nemo"
    with tarfile.open(archive, "w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {
            "model_config.yaml": b"a: 1",
            "größe_tokenizer.model": b"x" * 1024,
            "dist/a.distcp": b"y",
        }.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode, info.uname = len(data), 1.5, 0o4777, "jürgen"
            tar.addfile(info, io.BytesIO(data))
    safe_extract(archive, tmp_path / "out", ALLOWED)
    with tarfile.open(archive) as tar:
        for info in tar.getmembers():
            assert (tmp_path / "out" / info.name).read_bytes() == tar.extractfile(info).read()
            assert (tmp_path / "out" / info.name).stat().st_mode & 0o7777 == 0o644


def test_an_empty_target_is_taken_and_a_full_one_is_not(tmp_path):
    archive, source = made_like_nemo(tmp_path, "w:")
    (tmp_path / "out").mkdir()
    safe_extract(archive, tmp_path / "out", ALLOWED)
    assert everything_in(tmp_path / "out") == source
    with pytest.raises(UserError, match="is not empty"):
        safe_extract(archive, tmp_path / "out", ALLOWED)
    assert everything_in(tmp_path / "out") == source


def test_size_limit_is_exact(tmp_path):
    raw = CONFIG + WEIGHTS + END
    (tmp_path / "model.nemo").write_bytes(raw)
    with pytest.raises(UserError, match="604 are allowed"):
        safe_extract(tmp_path / "model.nemo", tmp_path / "out", ALLOWED, max_total_bytes=604)
    safe_extract(tmp_path / "model.nemo", tmp_path / "out", ALLOWED, max_total_bytes=605, max_members=2)


# --- what must not ---

HOSTILE: dict[str, tuple[bytes, str]] = {
    # Paths.
    "CVE-2007-4559 parent path": (CONFIG + member("../victim") + END, "unsafe path"),
    "CVE-2007-4559 parent path inside": (CONFIG + member("dist/../../victim") + END, "unsafe path"),
    "CVE-2007-4559 absolute path": (CONFIG + member("/tmp/victim") + END, "unsafe path"),
    "CVE-2007-4559 parent path in an extension header": (pax({"path": "../victim"}) + CONFIG + END, "unsafe path"),
    "CVE-2007-4559 folder outside": (member("../out2/", b"", b"5") + CONFIG + END, "unsafe path"),
    "CVE-2007-4559 parent folder": (member("..", b"", b"5") + CONFIG + END, "unsafe path"),
    "zip slip with backslashes": (CONFIG + member("..\\victim") + END, "unsafe path"),
    "drive letter": (CONFIG + member("C:victim") + END, "unsafe path"),
    "empty name": (CONFIG + member("") + END, "unsafe path"),
    "name that is not UTF-8": (CONFIG + member(b"\xff\xfe.safetensors") + END, "unsafe path"),
    "line break in a name, forging log lines": (CONFIG + member("a\nb.safetensors") + END, "unsafe path"),
    "CVE-2021-42574 name that reads backwards": (CONFIG + member("a\u202eb.safetensors") + END, "unsafe path"),
    "NUL in a name, cut short by C code": (pax({"path": "a.safetensors\0/x"}) + CONFIG + END, "unsafe path"),
    "long name": (pax({"path": "a" * 300 + ".safetensors"}) + CONFIG + END, "name of over"),
    # Links and special files.
    "CVE-2025-4517 symbolic link out": (header("dist", 0, b"2", link=b"..") + member("dist/a.distcp") + END, "type"),
    "CVE-2025-4138 symbolic link to a file": (
        header("a.safetensors", 0, b"2", link=b"../victim") + CONFIG + END,
        "type",
    ),
    "CVE-2025-4330 hard link": (header("a.safetensors", 0, b"1", link=b"../victim") + CONFIG + END, "type"),
    "link target in an extension header": (pax({"linkpath": "../victim"}) + CONFIG + END, "linkpath"),
    "character device": (header("a.safetensors", 0, b"3") + CONFIG + END, "type"),
    "block device": (header("a.safetensors", 0, b"4") + CONFIG + END, "type"),
    "named pipe, a reader hangs": (header("a.safetensors", 0, b"6") + CONFIG + END, "type"),
    "contiguous file": (member("a.safetensors", kind=b"7") + CONFIG + END, "type"),
    "unknown type": (member("a.safetensors", kind=b"Z") + CONFIG + END, "type"),
    # Sparse files.
    "sparse file of old GNU tar": (member("a.safetensors", kind=b"S") + CONFIG + END, "type"),
    "sparse map in an extension header": (
        pax({"GNU.sparse.major": "1", "GNU.sparse.realsize": "99999999999"}) + CONFIG + END,
        "GNU.sparse",
    ),
    # Members twice.
    "duplicate member, last one wins (.nemo weights swap)": (WEIGHTS + CONFIG + WEIGHTS + END, "twice"),
    "duplicate as ./a and a": (CONFIG + member("./model_config.yaml") + END, "twice"),
    "duplicate by case": (member("A.safetensors") + member("a.safetensors") + END, "twice"),
    "duplicate by Unicode form": (member("\u00e9.safetensors") + member("e\u0301.safetensors") + END, "twice"),
    "duplicate folder by case": (member("dist/a.distcp") + member("Dist/b.distcp") + END, "unknown member|twice"),
    "duplicate by an extension header": (CONFIG + pax({"path": "model_config.yaml"}) + WEIGHTS + END, "twice"),
    "folder in the place of a file": (
        member("dist/a.distcp") + member("dist/a.distcp/", b"", b"5") + END,
        "unknown member|twice",
    ),
    "folder twice": (member("dist/", b"", b"5") * 2 + CONFIG + END, "twice"),
    "path with empty parts": (member("dist//a.distcp") + END, "unsafe path"),
    "path with dots": (member("dist/./a.distcp") + END, "unsafe path"),
    # Names that nobody asked for.
    "CVE-2025-23304 python file": (CONFIG + member("sitecustomize.py") + END, "unknown member"),
    "CVE-2025-32434 pickled weights": (CONFIG + member("model_weights.ckpt") + END, "unknown member"),
    "unknown folder": (CONFIG + member("hooks/", b"", b"5") + END, "unknown member"),
    "known name in an unknown folder": (CONFIG + member("hooks/model_config.yaml") + END, "unknown member"),
    "wildcard across folders": (CONFIG + member("x/y_tokenizer.model") + END, "unknown member"),
    # Sizes.
    "size over the limit": (CONFIG + header("a.safetensors", LIMIT_BYTES) + END, "are allowed"),
    "size over the limit in parts": (
        b"".join(member(f"{number}.safetensors", bytes(LIMIT_BYTES // 4)) for number in range(5)) + END,
        "are allowed",
    ),
    "size in base 256": (CONFIG + header("a.safetensors", size_field=b"\x80" + b"\xff" * 11) + END, "are allowed"),
    "CVE-2025-8194 negative size, the reader goes back for ever": (
        CONFIG + header("a.safetensors", size_field=b"\xff" * 11 + b"\x00") + END,
        "negative size",
    ),
    "size that is no number": (CONFIG + header("a.safetensors", size_field=b"9zzzzzzzzzz\0") + END, "damaged"),
    "size in an extension header": (pax({"size": "99999999999"}) + CONFIG + END, "are allowed"),
    "size of words in an extension header": (pax({"size": "1e9"}) + CONFIG + END, "of size '1e9'"),
    "negative size in an extension header": (pax({"size": "-512"}) + CONFIG + END, "of size '-512'"),
    "size of many digits": (pax({"size": "9" * 5000}) + CONFIG + END, "of size"),
    "folder with content": (member("dist/", b"x" * 512, b"5") + CONFIG + END, "folder with content"),
    "many members": (b"".join(member(f"{number}.safetensors", b"") for number in range(300)) + END, "more than 256"),
    "many folders": (b"".join(member("./", b"", b"5") for _ in range(300)) + END, "twice"),
    # Extension headers.
    "CVE-2019-20907 record of length 0, an endless loop": (pax(b"0 path=a\n") + CONFIG + END, "damaged extension"),
    "record longer than its header": (pax(b"99 path=a\n") + CONFIG + END, "damaged extension"),
    "record without an end": (pax(b"9 path=a") + CONFIG + END, "damaged extension"),
    "CVE-2024-6232 record of digits, quadratic time": (pax(b"1" * 8000) + CONFIG + END, "damaged extension"),
    "two extension headers": (pax({"path": "a.safetensors"}) + pax({"mtime": "1"}) + CONFIG + END, "two extension"),
    "path twice in one header": (pax(b"9 path=a\n9 path=b\n") + CONFIG + END, "twice"),
    "large extension header": (pax({"uname": "a" * 9000}) + CONFIG + END, "extension header of"),
    "extension header of GNU for long names": (member("././@LongLink", b"../victim", b"L") + CONFIG + END, "type"),
    "global extension header": (pax({"path": "../victim"}, b"g") + CONFIG + END, "type"),
    "charset in an extension header": (pax({"hdrcharset": "BINARY"}) + CONFIG + END, "hdrcharset"),
    "extension header without a member": (CONFIG + pax({"mtime": "1"}) + END, "without a member"),
    # Ends.
    "second archive after the end": (CONFIG + END + WEIGHTS + END, "after its end"),
    "data after the end": (CONFIG + END + bytes(9000) + b"#!/bin/sh", "after its end"),
    "member after half an end": (CONFIG + bytes(512) + WEIGHTS + END, "after its end"),
    "no end": (CONFIG, "truncated"),
    "half an end": (CONFIG + bytes(512), "truncated"),
    "cut in a member": ((CONFIG + WEIGHTS)[:-300], "truncated"),
    "cut in a header": ((CONFIG + WEIGHTS)[:1100], "truncated"),
    "endless padding": (CONFIG + END + bytes(2 << 20), "after its end"),
    "nothing inside": (END, "no files"),
    "empty file": (b"", "truncated"),
    "wrong checksum": (CONFIG.replace(b"model_config", b"m0del_config") + END, "damaged"),
    # Other formats.
    "CVE-2025-32434 torch zip under another name": (b"PK\x03\x04" + bytes(2000), "not a tar"),
    "pickle": (b"\x80\x04cposix\nsystem\n(S'id'\ntR." + bytes(2000), "not a tar"),
    "bzip2": (bz2.compress(CONFIG + END, 1).ljust(600, b"\0"), "not a tar"),
    # Compression.
    "gzip bomb": (gzip.compress(header("a.safetensors", 90_000_000) + bytes(90_000_000) + END, 9), "are allowed"),
    "gzip bomb after the end": (gzip.compress(CONFIG + END + bytes(90_000_000), 9), "after its end|more bytes"),
    "gzip bomb before any header": (gzip.compress(b"\1" * 90_000_000, 9), "not a tar"),
    "gzip in gzip": (gzip.compress(gzip.compress(CONFIG + END).ljust(600, b"\0")), "not a tar"),
    "two gzip streams": (gzip.compress(CONFIG) + gzip.compress(WEIGHTS + END), "after the end of its gzip|truncated"),
    "data after the gzip stream": (gzip.compress(CONFIG + END) + b"PK\x03\x04", "after the end of its gzip"),
    "cut gzip stream": (gzip.compress(CONFIG + WEIGHTS + END)[:-20], "truncated"),
    "damaged gzip stream": (gzip.compress(CONFIG + END, 0).replace(b"a: 1", b"a: 2"), "damaged"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_archive(tmp_path, attack):
    raw, reason = HOSTILE[attack]
    refused(tmp_path, raw, reason)


def test_harmless_part_alone_is_accepted(tmp_path):
    """The cases above are refused for what they add, not for what they share."""
    (tmp_path / "model.nemo").write_bytes(pax({"mtime": "1.5"}) + CONFIG + WEIGHTS + END)
    assert safe_extract(tmp_path / "model.nemo", tmp_path / "out", ALLOWED) == [
        "model_config.yaml",
        "model.safetensors",
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_file_and_folder_in_one_place(tmp_path, order):
    parts = [member("a", b"file"), member("a/b", b"below")]
    (tmp_path / "model.nemo").write_bytes(b"".join(parts[::order]) + END)
    with pytest.raises(UserError, match=r"twice, or in the place|in the place of the folder"):
        safe_extract(tmp_path / "model.nemo", tmp_path / "out", ["a", "a/b"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.nemo"]


def test_sparse_archive_file_costs_no_memory_or_disk(tmp_path):
    """A member of 1 TB in an archive that is a hole on disk; the sum of headers stops it before it is read."""
    archive = tmp_path / "model.nemo"
    with open(archive, "wb") as handle:
        handle.write(CONFIG + header("a.safetensors", size_field=b"\x80" + (1 << 40).to_bytes(11, "big")))
        handle.truncate(1 << 40)
    with pytest.raises(UserError, match="are allowed"):
        safe_extract(archive, tmp_path / "out", ALLOWED)
    assert [path.name for path in tmp_path.iterdir()] == ["model.nemo"]


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    "make", [Path.mkdir, a_pipe, a_loop, lambda path: path.symlink_to("/dev/zero"), lambda path: None]
)
def test_archive_that_is_no_file(tmp_path, make: Callable[[Path], None]):
    make(tmp_path / "archive.nemo")
    with pytest.raises(UserError, match=r"archive\.nemo"):
        safe_extract(tmp_path / "archive.nemo", tmp_path / "out", ALLOWED)
    assert not (tmp_path / "out").exists()


def test_target_that_is_a_link_is_not_followed(tmp_path):
    archive, _ = made_like_nemo(tmp_path, "w:")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="out"):
        safe_extract(archive, tmp_path / "out", ALLOWED)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_target_without_a_parent_is_named(tmp_path):
    archive, _ = made_like_nemo(tmp_path, "w:")
    with pytest.raises(UserError, match="is not a folder"):
        safe_extract(archive, tmp_path / "absent" / "out", ALLOWED)


def test_torch_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.nemo", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.".ljust(600))
    with pytest.raises(UserError, match="not a tar"):
        safe_extract(tmp_path / "archive.nemo", tmp_path / "out", ALLOWED)


# --- fuzzing ---


def unpacks_or_refuses(raw: bytes) -> None:
    """Only `UserError`; nothing outside; whole or nothing."""
    # In memory where possible: each unpacked file is synced, which a busy disk makes slow.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        place = Path(folder)
        (place / "box").mkdir()
        (place / "box" / "archive.nemo").write_bytes(raw)
        try:
            names = safe_extract(place / "box" / "archive.nemo", place / "box" / "out", ALLOWED, LIMIT_BYTES, 20)
        except UserError:
            assert [path.name for path in place.rglob("*")] == ["box", "archive.nemo"]
            return
        files = {path for path in (place / "box" / "out").rglob("*") if not path.is_dir()}
        assert files == {place / "box" / "out" / name for name in names}
        assert all(path.is_file() and not path.is_symlink() for path in files)
        assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
        assert {path.name for path in place.iterdir()} == {"box"}
        assert {path.name for path in (place / "box").iterdir()} == {"archive.nemo", "out"}


@given(st.lists(st.binary(max_size=512), max_size=5), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_fuzz_random_blocks(blocks, with_magic, packed):
    """Random blocks; with the magic number and a right checksum they get as far as the header's parser."""
    raw = b"".join(block.ljust(512, b"\0") for block in blocks)
    if with_magic:
        raw = with_right_checksums(
            b"".join(raw[i : i + 257] + b"ustar" + raw[i + 262 : i + 512] for i in range(0, len(raw), 512))
        )
    unpacks_or_refuses(gzip.compress(raw + END) if packed else raw + END)


def with_right_checksums(raw: bytes) -> bytes:
    """So that a change of a header is not caught by its checksum alone."""
    blocks = bytearray(raw)
    for start in range(0, len(blocks) - 511, 512):
        block = blocks[start : start + 512]
        if block[257:262] == b"ustar":
            blocks[start + 148 : start + 156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return bytes(blocks)


VALID = (
    member("./", b"", b"5")
    + pax({"mtime": "1.5"})
    + CONFIG
    + member("dist/", b"", b"5")
    + member("dist/a.distcp")
    + WEIGHTS
    + END
)


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=12)), max_size=4),
    st.integers(0, len(VALID)),
    st.sampled_from(["plain", "cut", "gzip", "gzip changed"]),
)
@settings(max_examples=400, deadline=None)
def test_fuzz_changed_archive(changes, cut_at, form):
    raw = bytearray(gzip.compress(VALID) if form == "gzip changed" else VALID)
    for place, data in changes:
        place %= len(raw)
        raw[place : place + len(data)] = data
    raw = bytes(raw) if form == "gzip changed" else with_right_checksums(raw)
    unpacks_or_refuses(raw[:cut_at] if form == "cut" else gzip.compress(raw) if form == "gzip" else raw)


GOOD_NAMES = st.sampled_from(
    ["model_config.yaml", "./a.safetensors", "A.safetensors", "b.safetensors", "dist/a.distcp"]
)
BAD_NAMES = st.sampled_from(["dist", "dist/", ".", "..", "../b", "/c", "x\\y", "", "dist/a.distcp/b"]) | st.text(
    max_size=20
)
BAD_KINDS = st.sampled_from([b"1", b"2", b"5", b"6", b"L", b"S", b"g"])
RECORDS = st.fixed_dictionaries(
    {}, optional={"mtime": st.just("1.5"), "path": GOOD_NAMES | BAD_NAMES, "size": st.just("3")}
)
MEMBERS = st.one_of(
    st.builds(member, GOOD_NAMES, st.binary(max_size=700)),
    st.builds(member, GOOD_NAMES, st.binary(max_size=700)),
    st.builds(
        lambda records, entry: pax(records) + entry, RECORDS, st.builds(member, GOOD_NAMES, st.binary(max_size=700))
    ),
    st.builds(member, BAD_NAMES, st.binary(max_size=700)),
    st.builds(member, GOOD_NAMES | BAD_NAMES, st.binary(max_size=9), BAD_KINDS),
)


@given(st.lists(MEMBERS, max_size=4), st.sampled_from([END, END, END, END[:512], b"", END + b"x"]))
@settings(max_examples=400, deadline=None)
def test_fuzz_made_up_archive(members, end):
    unpacks_or_refuses(b"".join(members) + end)
