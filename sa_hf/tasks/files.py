"""Local files as data sets: which there are, whether they can be read, and which file a row came from."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from encodings.aliases import aliases
from pathlib import Path
from typing import Any

from sa_hf.config import did_you_mean
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.ranks import say
from sa_hf.tasks.splits import TRAIN, by_split, named

TEXT, CSV, PARQUET = "text", "csv", "parquet"
KINDS = {
    ".txt": TEXT,
    ".md": TEXT,
    ".py": TEXT,
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": PARQUET,
    ".csv": CSV,
    ".tsv": CSV,
}
TEXTS, NUMBERS = "texts", "numbers"
# Unpacked by datasets as it reads.
COMPRESSED = (".gz", ".bz2", ".xz")
_BLOCK = 2**20
# That of UTF-32 begins as that of UTF-16 does.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Where pandas finds more values than columns, it takes the first for row numbers, and all columns shift.
_SHIFTED = "__index_level_0__"


@dataclass
class Loaded:
    """Data sets by split.

    Attributes:
        splits: ``{split: datasets.Dataset}``.
        where: ``(split, row)`` -> the place of a row for a message, rows counted from 1.
        lacking: columns that some files have and a named one has not.
        families: column -> "texts" and "numbers" that it holds, each with the first file that does.
        is_local: files of the user's, as against a hub data set.
    """

    splits: Mapping[str, Any]
    where: Callable[[str, int], str]
    lacking: Mapping[str, str] = field(default_factory=dict)
    families: Callable[[str], Mapping[str, str]] = lambda column: {}
    is_local: bool = True


def suffix_of(path: Path) -> str:
    """The suffix that says the kind: of ``rows.jsonl.gz`` it is ``.jsonl``."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def find_files(root: Path) -> list[Path]:
    """The data files of a folder, or the one file; hidden ones and what describes a data set are left out."""
    from datasets.data_files import FILES_TO_IGNORE

    if root.is_file():
        return [root]
    found = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith((".", "__")) for part in parts[:-1]) or parts[-1].startswith(".")
        if path.is_file() and not hidden and suffix_of(path) in KINDS and path.name not in FILES_TO_IGNORE:
            found.append(path)
    return found


def kind_of(files: Sequence[Path], dataset: str) -> str:
    """The one kind of all files; raises ``SparseAttentionError`` where there are several, or none."""
    kinds = {KINDS.get(suffix_of(path)) for path in files}
    if len(kinds) != 1 or None in kinds:
        raise SparseAttentionError(
            f"{dataset!r} holds {sorted({suffix_of(p) for p in files}) or 'no data file'}; give files of one kind, "
            f"of {sorted(KINDS)}"
        )
    return str(kinds.pop())


def load_files(root: Path, kind: str, files: Sequence[Path], encoding: str | None) -> Loaded:
    """Local files by split, each of them checked; says which became which.

    Raises:
        SparseAttentionError: a file is empty, in another encoding, or not what its suffix says.
    """
    base = root.parent if root.is_file() else root
    if kind != PARQUET:
        check_encoding(encoding)
        files = [path for path in files if _check_bytes(path, base, kind, encoding)]
        if not files:
            raise SparseAttentionError(f"every file of {str(root)!r} is empty")
    splits, left_out = by_split(files, base)
    parts = "; ".join(f"{split}: {named(found, base)}" for split, found in splits.items())
    say(f"data: {parts}" + (f"; not used, as others name a split: {named(left_out, base)}" if left_out else ""))
    options = _options(kind, files, encoding)
    lacking: dict[str, str] = {}
    try:
        loaded = _load(kind, splits, options)
    except OSError:
        raise
    except Exception:  # whatever a user's file can make a reader raise: found out file by file
        loaded, lacking = _load_each(kind, splits, options, base)

    def where(split: str, row: int) -> str:
        if kind == TEXT:
            return str(splits[split][row].relative_to(base))
        *before, last = splits[split]
        for path in before:
            count = len(_load(kind, {TRAIN: [path]}, options)[TRAIN])
            if row < count:
                return f"{path.relative_to(base)}, row {row + 1}"
            row -= count
        return f"{last.relative_to(base)}, row {row + 1}"

    def families(column: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in files:
            family = _first_family(path, kind, column, encoding)
            if family is not None:
                found.setdefault(family, str(path.relative_to(base)))
        return found

    return Loaded(loaded, where, lacking, families)


def _first_family(path: Path, kind: str, column: str, encoding: str | None) -> str | None:
    """The kind of values that a file's column has, by its first row: "texts" or "numbers"; None where it is not known.

    Files that are read together are read as the first of them is: integers become texts without a word. The columns of
    CSV have no types.
    """
    if kind == PARQUET:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        schema = pq.read_schema(path)
        family = _family(schema.field(column).type) if column in schema.names else ""
        return {"string": TEXTS, "int": NUMBERS, "float": NUMBERS}.get(family)
    if kind != "json":
        return None
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(str(path), "rt", encoding=encoding or "utf-8-sig", compression="infer") as stream:
        block = stream.read(_BLOCK)
    try:
        row, _ = json.JSONDecoder().raw_decode(block, block.index("{"))
    except ValueError:  # the row is longer, or the file's form another
        return None
    value = row.get(column)
    return TEXTS if isinstance(value, str) else NUMBERS if isinstance(value, int | float) else None


def check_encoding(encoding: str | None) -> None:
    """Raise ``SparseAttentionError`` for a name that is no encoding of text; None is UTF-8."""
    if encoding is None or _is_encoding(encoding):
        return
    known = sorted({name.replace("_", "-") for name in aliases.values() if _is_encoding(name)})
    raise SparseAttentionError(
        f"encoding={encoding!r} is no encoding of text{did_you_mean(encoding, known)}; examples: utf-8, utf-16, "
        "latin-1, cp1252"
    )


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name)
    except LookupError:
        return False
    return True


def _options(kind: str, files: Sequence[Path], encoding: str | None) -> dict[str, Any]:
    # utf-8-sig is UTF-8 with or without a mark at its beginning.
    options: dict[str, Any] = {} if kind == PARQUET else {"encoding": encoding or "utf-8-sig"}
    if kind == TEXT:
        options["sample_by"] = "document"
    elif kind == CSV:
        # Only an empty field is a missing one: "NA", "None" and "null" are words.
        options |= {"keep_default_na": False, "na_values": [""]}
        separators = {"\t" if suffix_of(path) == ".tsv" else "," for path in files}
        if len(separators) > 1:
            raise SparseAttentionError("the folder holds .csv and .tsv files; give files of one kind")
        options["sep"] = separators.pop()
    elif kind == "json":
        options["encoding"] = encoding or "utf-8"
    return options


def _load(kind: str, splits: Mapping[str, Sequence[Path]], options: Mapping[str, Any]) -> dict[str, Any]:
    import datasets

    log = datasets.utils.logging
    before = log.get_verbosity()
    log.set_verbosity(log.CRITICAL)  # it logs what it raises
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(
            kind, data_files={split: [str(path) for path in files] for split, files in splits.items()}, **options
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):  # a full disk is no fault of the file's
            raise error.__cause__ from error
        raise
    finally:
        log.set_verbosity(before)
        if not bars:
            datasets.enable_progress_bars()
    for split, data in found.items():
        if _SHIFTED in data.column_names:
            raise SparseAttentionError(
                f"{splits[split][0].name}: its rows have more values than its header has columns"
            )
    return dict(found)


def _load_each(
    kind: str, splits: Mapping[str, Sequence[Path]], options: Mapping[str, Any], base: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """File by file: the one that cannot be read is named; where all can, the columns that they share are kept."""
    import datasets

    loaded: dict[str, dict[Path, Any]] = {}
    for split, files in splits.items():
        for path in files:
            name = str(path.relative_to(base))
            try:
                data = _load(kind, {TRAIN: [path]}, options)[TRAIN]
            except OSError:
                raise
            except Exception as error:
                raise SparseAttentionError(f"{name} cannot be read as {kind}: {_reason(error)}") from error
            loaded.setdefault(split, {})[path] = data
    flat = {path: data for part in loaded.values() for path, data in part.items()}
    lacking: dict[str, str] = {}
    for column in {name for data in flat.values() for name in data.column_names}:
        without = next((path for path, data in flat.items() if column not in data.column_names), None)
        if without is not None:
            lacking[column] = str(without.relative_to(base))
    types: dict[str, tuple[Path, Any]] = {}
    for path, data in flat.items():
        for column, found in data.features.items():
            if column in lacking or _family(found) == "null":
                continue
            first, expected = types.setdefault(column, (path, found))
            if _family(found) != _family(expected):
                raise SparseAttentionError(
                    f"{path.relative_to(base)}: column {column!r} holds {_family(found)}, but in "
                    f"{first.relative_to(base)} it holds {_family(expected)}"
                )
    kept = datasets.Features({column: expected for column, (_, expected) in types.items()})
    together = {}
    for split, part in loaded.items():
        parts = [data.select_columns(list(kept)).cast(kept) for data in part.values()]
        together[split] = datasets.concatenate_datasets(parts)
    return together, lacking


def _family(feature: Any) -> str:
    """Types that mix well are one: the widths of integers and strings do not matter, nor a column of nothing."""
    kind = str(getattr(feature, "dtype", feature))
    return next((name for name in ("string", "int", "float") if name in kind), kind)


def _reason(error: BaseException) -> str:
    """The innermost cause of a reader's error on one line."""
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return "it holds no rows"
    while error.__cause__ is not None:
        error = error.__cause__
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else f"{line[:300]}..."


def _check_bytes(path: Path, base: Path, kind: str, encoding: str | None) -> bool:
    """Raise where a file is empty or not in its encoding; False for an empty text, which is left out."""
    name = path.relative_to(base)
    try:
        has_text = _has_text(path, name, encoding)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise SparseAttentionError(f"{name} cannot be unpacked: {error}") from error
    if not has_text and kind != TEXT:
        raise SparseAttentionError(f"{name} is empty")
    if not has_text:
        say(f"data: {name} holds no text and is left out")
    return has_text


def _has_text(path: Path, name: Path, encoding: str | None) -> bool:
    import fsspec

    codec = encoding or "utf-8"
    decoder = codecs.getincrementaldecoder(codec)()
    line, has_text, likely = 1, False, ""
    with fsspec.open(str(path), "rb", compression="infer") as stream:
        for number in itertools.count():
            block = stream.read(_BLOCK)
            if number == 0:
                likely = _likely_encoding(block)
            advice = f"save the file as UTF-8, or say what it is, e.g. --encoding {likely.replace(codec, 'latin-1')}"
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                bad = error.object[error.start : error.start + 1].hex()
                raise SparseAttentionError(f"{name}, line {line}: byte 0x{bad} is no {codec}; {advice}") from error
            if encoding is None and "\0" in text:
                # UTF-16 without its mark is UTF-8, too, where all letters are of ASCII.
                line += text[: text.index("\0")].count("\n")
                raise SparseAttentionError(f"{name}, line {line}: byte 0x00 stands in no text of UTF-8; {advice}")
            line += text.count("\n")
            has_text = has_text or bool(text.strip("\ufeff \t\r\n\f\v"))
            if not block:
                return has_text
    return has_text


def _likely_encoding(block: bytes) -> str:
    """What a file that is no UTF-8 may be: by its mark, or by the half of its bytes that is 0 in UTF-16."""
    marked = next((name for mark, name in _MARKS.items() if block.startswith(mark)), None)
    if marked is not None:
        return marked
    for begin, unmarked in ((1, "utf-16-le"), (0, "utf-16-be")):
        half = block[begin::2]
        if half.count(0) * 2 > len(half) > 0:
            return unmarked
    return "latin-1"
