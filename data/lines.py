"""Reads the lines of a text file in bounded memory: every encoding, byte order mark and line end is settled here.

    python -c "from data import lines; print(next(lines.read_lines('FILE.txt')))"

Every reader of text in this project gets its lines from here, so that all of them read the same file alike.
"""
from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from machine.errors import UserError

LONGEST = 1 << 20  # characters of a line, and of a cell of CSV
UTF8 = "utf-8"
# The marks of UTF-32 come first: that of UTF-16 is the beginning of one of them.
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
                    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class Line(NamedTuple):
    """Holds a line with its end, or its error."""

    number: int  # in the file, from 1
    text: str
    error: str | None = None


def open_binary(path: Path | str, expected: str) -> BinaryIO:
    """Opens a file.

    Args:
        expected: the kind of file, for the error's text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); expected {expected}") from None


def read_whole(path: Path | str, expected: str) -> tuple[BinaryIO, str]:
    """Reads a file into memory, to be parsed from there.

    A digest of a second read would be another file's, if somebody replaced the file in between.

    Args:
        expected: the kind of file, for the error's text.

    Returns:
        The bytes as an open file, and their SHA-256.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open_binary(path, expected) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None
    # Buffered, because readers look at the first bytes before they read.
    return io.BufferedReader(io.BytesIO(content)), hashlib.sha256(content).hexdigest()


def encoding_of(start: bytes, encoding: str = UTF8) -> str:
    """Returns the encoding that a file's byte order mark declares, `encoding` where the file has none."""
    return next((found for mark, found in BYTE_ORDER_MARKS.items() if start.startswith(mark)), encoding)


def decoded_lines(file: BinaryIO, path: Path | str, encoding: str = UTF8) -> Iterator[Line]:
    """Yields the lines of an open file; LF, CR or both end a line.

    A line longer than LONGEST, or one that is not in the encoding, is an error in its place.

    Raises:
        UserError: no such encoding, or a damaged file in an encoding of several bytes a character.
    """
    encoding = encoding_of(file.peek(4), encoding)
    # Bytes that cannot be decoded stay in their line, so that only this line is an error.
    try:
        text = io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape", newline="")
    except (LookupError, ValueError):
        raise UserError(f"--encoding {encoding}: no such encoding of text; expected utf-8, utf-16, cp1252, latin-1, "
                        "...") from None
    number = 0
    try:
        while line := text.readline(LONGEST):
            number += 1
            if len(line) == LONGEST and line[-1] not in "\r\n":
                # The rest of the line is read and dropped, so that the next one is whole.
                while line and line[-1] not in "\r\n":
                    line = text.readline(LONGEST)
                yield Line(number, "\n", f"longer than {LONGEST:,} characters")
            else:
                yield Line(number, line, None if line.isascii() else undecoded(line, encoding))
    except UnicodeError:
        raise UserError(f"{path}: not {encoding.upper()} (after line {number})") from None
    finally:
        # The file belongs to the caller: without this, the wrapper would close standard input when it is collected.
        with contextlib.suppress(ValueError):
            text.detach()


def undecoded(text: str, encoding: str) -> str | None:
    """Returns the error of a line with bytes of another encoding: the decoder left them as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not {encoding.removesuffix('-sig').upper()} (byte 0x{ord(text[error.start]) & 0xFF:02x})"
    return None


def read_lines(path: Path | str, expected: str = "a text file", file: BinaryIO | None = None) -> Iterator[Line]:
    """Yields the lines of a UTF-8 file without their ends.

    Args:
        expected: the kind of file, for the error's text.
        file: the file's bytes (`read_whole`); None: it is opened.

    Raises:
        UserError: it cannot be read, or one of its lines cannot; names file and line.
    """
    with file or open_binary(path, expected) as file:
        try:
            for line in decoded_lines(file, path):
                if line.error:
                    raise UserError(f"{path}, line {line.number}: {line.error}")
                yield Line(line.number, line.text.rstrip("\r\n"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None


def read_sentences(path: Path | str) -> tuple[list[str], str]:
    """Reads a text file, one sentence a line; blank lines are left out, and several spaces are one.

    Returns:
        The sentences, and the SHA-256 of the bytes that held them.

    Raises:
        UserError: missing, not UTF-8, or without a sentence.
    """
    file, digest = read_whole(path, "a text file")
    sentences = [" ".join(line.text.split()) for line in read_lines(path, file=file)]
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise UserError(f"{path}: no sentence in it; expected one a line")
    return sentences, digest
