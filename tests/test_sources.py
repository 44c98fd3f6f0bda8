"""Which files of a folder are read, in which order, and why the others are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hcache_rag import SourceError
from hcache_rag.sources import FolderContents, SourceFile, read_folder


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def paths(contents: FolderContents) -> list[str]:
    return [file.path for file in contents.files]


def test_files_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": b"B", "a/z.md": b"Z", "a/b/c.txt": b"C", "c": b"no suffix"})
    contents = read_folder(tmp_path)
    assert contents.files == (
        SourceFile(os.path.join("a", "b", "c.txt"), "C"),
        SourceFile(os.path.join("a", "z.md"), "Z"),
        SourceFile("b.txt", "B"),
        SourceFile("c", "no suffix"),
    )
    assert contents.skipped == ()


def test_two_readings_are_equal(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}/{j}.txt": f"{i} {j}".encode() for i in range(3) for j in range(3)})
    assert read_folder(tmp_path) == read_folder(str(tmp_path))


def test_hidden_files_and_folders_are_ignored_silently(tmp_path: Path) -> None:
    write(tmp_path, {".hidden": b"x", ".git/config": b"x", "a/.b/c.txt": b"x", "seen.txt": b"S"})
    contents = read_folder(tmp_path)
    assert paths(contents) == ["seen.txt"]
    assert contents.skipped == ()


def test_text_is_kept_as_it_stands(tmp_path: Path) -> None:
    text = "  première ligne\n\n\ttab, trailing spaces  \n\n日本語 🪐\n"
    write(tmp_path, {"a.txt": text.encode()})
    assert read_folder(tmp_path).files[0].text == text


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"\xef\xbb\xbfText"})
    assert read_folder(tmp_path).files == (SourceFile("a.txt", "Text"),)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"text\0text", "binary"),
        ("Stra\N{LATIN SMALL LETTER SHARP S}e".encode("latin-1"), "not UTF-8 text"),
        ("\N{SATURN} text".encode("utf-16"), "binary"),
    ],
)
def test_what_holds_no_text_is_passed_over_and_named(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    write(tmp_path, {"good.txt": b"good", "sub/bad.txt": data})
    contents = read_folder(tmp_path)
    assert paths(contents) == ["good.txt"]
    assert contents.skipped == ((os.path.join("sub", "bad.txt"), reason),)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_passed_over_and_named(tmp_path: Path) -> None:
    write(tmp_path, {"good.txt": b"good", "secret.txt": b"secret"})
    (tmp_path / "secret.txt").chmod(0)
    contents = read_folder(tmp_path)
    assert paths(contents) == ["good.txt"]
    assert contents.skipped == (("secret.txt", "unreadable: Permission denied"),)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    write(tmp_path, {"good.txt": b"good", "sub/a.txt": b"a"})
    (tmp_path / "sub").chmod(0)
    try:
        with pytest.raises(SourceError, match="sub cannot be read: Permission denied"):
            read_folder(tmp_path)
    finally:
        (tmp_path / "sub").chmod(0o700)


def test_a_file_that_fails_while_being_read_is_passed_over_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"bad.txt": b"bad", "good.txt": b"good"})
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "bad.txt":
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    contents = read_folder(tmp_path)
    assert paths(contents) == ["good.txt"]
    assert contents.skipped == (("bad.txt", "unreadable: Input/output error"),)


def test_linked_folders_are_not_followed_so_loops_end(tmp_path: Path) -> None:
    write(tmp_path, {"docs/a.txt": b"a", "elsewhere/b.txt": b"b"})
    (tmp_path / "docs" / "loop").symlink_to(tmp_path / "docs", target_is_directory=True)
    (tmp_path / "docs" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "docs" / "self").symlink_to("self")
    (tmp_path / "docs" / "gone.txt").symlink_to("nowhere.txt")
    contents = read_folder(tmp_path / "docs")
    assert paths(contents) == ["a.txt"]


def test_a_linked_file_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"docs/a.txt": b"a", "elsewhere/b.txt": b"b"})
    (tmp_path / "docs" / "b.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    contents = read_folder(tmp_path / "docs")
    assert contents.files == (SourceFile("a.txt", "a"), SourceFile("b.txt", "b"))


def test_a_linked_folder_may_be_the_one_that_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"docs/a.txt": b"a"})
    (tmp_path / "link").symlink_to(tmp_path / "docs", target_is_directory=True)
    assert paths(read_folder(tmp_path / "link")) == ["a.txt"]


def test_pipes_and_sockets_are_not_opened(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"a"})
    os.mkfifo(tmp_path / "pipe")
    assert paths(read_folder(tmp_path)) == ["a.txt"]


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "hidden only", "binary only"])
def test_a_folder_without_text_is_an_error_in_one_line(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "docs"
    expected = "nothing to index: .* holds no files"
    if kind == "missing":
        expected = "no such folder"
    elif kind == "file":
        folder.write_bytes(b"text")
        expected = "is a file; give the folder that holds it"
    elif kind == "empty":
        folder.mkdir()
    elif kind == "hidden only":
        write(folder, {".a": b"text"})
    else:
        write(folder, {"a.bin": b"\0", "b.bin": b"\xff\xfe"})
        expected = r"holds 2 file\(s\) that hold no text"
    with pytest.raises(SourceError, match=expected) as raised:
        read_folder(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_home_folder_has_its_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"docs/a.txt": b"a"})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths(read_folder("~/docs")) == ["a.txt"]
