"""Data sets with columns as rows of text, and of class labels, each row checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_hf.config import did_you_mean, shown
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.files import KINDS, TEXT, Loaded, find_files, kind_of, load_files, suffix_of
from sa_hf.tasks.labels import check_classes, check_label, in_a_line, listed, names_of, number_of, numbers_of
from sa_hf.tasks.ranks import say
from sa_hf.tasks.splits import HELD_OUT, TRAIN, held_out_of, split_of

TEXT_COLUMNS = ("text", "content", "sentence", "document", "code")
LABEL_COLUMNS = ("label", "labels", "class", "target")
SEPARATORS = (";", "\t", "|")  # of other tables than a .csv
# The share of the training rows that is held out where no split is; of a single text, of its chunks.
HELD_OUT_SHARE = 0.1
# Held-out rows must not depend on --seed: what one seed trains on, another would evaluate.
CUT_SEED = 0
ALL = "all"


@dataclass(frozen=True)
class Choice:
    """What to read of a data set; fields as the flags of the same names. ``made``: names of those that are made, for
    hints."""

    dataset: str
    dataset_config: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    train_rows: int | None = None
    eval_rows: int | None = None
    eval_split: str | None = None
    encoding: str | None = None
    evaluate_only: bool = False
    made: Sequence[str] = ()


class Texts(Sequence[dict[str, Any]]):
    """One column of a data set as rows ``{"text": str}``, read and checked when asked for."""

    def __init__(self, dataset: Any, column: str, where: Callable[[int], str]) -> None:
        self.dataset, self.column, self.where = dataset, column, where

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return {"text": checked_text(self.dataset[index][self.column], lambda: self.where(index), self.column)}


def checked_text(value: Any, where: Callable[[], str], column: str) -> str:
    """The text of a row; raises ``SparseAttentionError`` where it is none."""
    if isinstance(value, str):
        return value
    problem = "is missing" if value is None else f"is {in_a_line(value)}, a {type(value).__name__} and no text"
    raise SparseAttentionError(f"{where()}: column {column!r} {problem}")


def load(choice: Choice, classify: bool) -> Loaded:
    """The splits of a local file or folder, a folder of ``save_to_disk``, or a hub data set, under their usual names.

    Raises:
        SparseAttentionError: the data set is not there, or a file of it cannot be read.
    """
    import datasets

    root = Path(choice.dataset).expanduser()
    if root.is_file() and choice.dataset_config is not None:
        raise SparseAttentionError(
            f"dataset_config={choice.dataset_config!r} is for hub data sets and folders that are laid out as such, not "
            f"for the file {choice.dataset!r}"
        )
    if not root.exists():
        found = _from_hub(choice)
    elif any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
        found = datasets.load_from_disk(str(root))
    elif choice.dataset_config is not None or _has_card_of_files(root):
        found = _read_repository(choice)
    else:
        files = find_files(root)
        kind = kind_of(files, choice.dataset)
        if kind == TEXT and classify:
            raise SparseAttentionError(
                f"{choice.dataset!r} is plain text without labels; classification needs json, parquet or csv"
            )
        return load_files(root, kind, files, choice.encoding)
    if isinstance(found, datasets.Dataset):
        found = {TRAIN: found}
    return Loaded(_usual_names(found), lambda split, row: f"split {split!r}, row {row + 1}", is_local=root.exists())


def parts_of(loaded: Loaded, choice: Choice) -> tuple[tuple[str, Any] | None, tuple[str, Any] | None]:
    """The split to train on and that to evaluate on, each as its name and rows; the second is None where a part of
    the first is to be cut off, the first where only evaluation is asked for and has a split of its own.

    Raises:
        SparseAttentionError: there is no split for training, or not the one to evaluate on.
    """
    splits = loaded.splits
    if choice.eval_split == ALL:
        if not choice.evaluate_only or len(splits) > 1:
            raise SparseAttentionError(
                f"eval_split='all' is for evaluating a single file or split; splits: {list(splits)}"
            )
        return None, next(iter(splits.items()))
    name = held_out_of(splits, choice.eval_split)
    held_out = None if name is None else (name, splits[name])
    if choice.evaluate_only and held_out is not None:
        return None, held_out
    if TRAIN not in splits:
        raise SparseAttentionError(
            f"dataset {choice.dataset!r} holds held-out rows alone (splits: {list(splits)}), and none to train on; "
            "name a file or folder 'train', or rename what is not held out"
        )
    return (TRAIN, splits[TRAIN]), held_out


def column_of(data: Any, wanted: str | None, usual: Sequence[str], flag: str, loaded: Loaded, split: str) -> str:
    """The column that a flag names, or a usual one; raises ``SparseAttentionError`` where there is none, or two."""
    columns = data.column_names
    found = [name for name in ([wanted] if wanted is not None else usual) if name in columns]
    if not found:
        name = wanted or usual[0]
        near = did_you_mean(name, columns)
        absent = next(
            (f"; {n!r} is missing from {loaded.lacking[n]}" for n in (name, *usual) if n in loaded.lacking), ""
        )
        rule = f"{flag}={wanted!r} is no column" if wanted else f"none of the usual columns {list(usual)} is there"
        place = loaded.where(split, 0).rpartition(", row")[0] or split
        parted = next((mark for mark in SEPARATORS if len(columns) == 1 and mark in columns[0]), None)
        if parted is not None:
            raise SparseAttentionError(
                f"{place} has one column, {columns[0]!r}, which looks like several parted by {parted!r}; save the file "
                "with commas, or with tabs as .tsv"
            )
        raise SparseAttentionError(f"{rule} of {place}{near}{absent}; set {flag} to one of {shown(list(columns))}")
    if flag == "label_column" and len(found) > 1:
        raise SparseAttentionError(f"columns {found} could each hold the classes; set label_column to one of them")
    return found[0]


def texts_of(loaded: Loaded, choice: Choice, split: str, data: Any, columns_like: str | None = None) -> Texts:
    """The texts of one split; those of local files are checked at once."""
    column = columns_like or column_of(data, choice.text_column, TEXT_COLUMNS, "text_column", loaded, split)
    if column not in data.column_names:
        column_of(data, column, TEXT_COLUMNS, "text_column", loaded, split)
    _check_families(loaded, column)
    texts = Texts(data, column, lambda row: loaded.where(split, row))
    if loaded.is_local:
        for row, text in enumerate(data[column]):
            if not isinstance(text, str):
                checked_text(text, lambda row=row: loaded.where(split, row), column)  # type: ignore[misc]
    return texts


def labelled_rows(
    loaded: Loaded, choice: Choice, train: tuple[str, Any] | None, held_out: tuple[str, Any] | None,
    label2id: Mapping[str, int] | None,
) -> tuple[list[list[dict[str, Any]]], list[str]]:  # fmt: skip
    """Rows ``{"text", "label"}`` of training and evaluation, cut to the limits after shuffling, and the class names.

    Args:
        label2id: the numbers of a trained model's classes. Evaluation goes by them; training does where it knows all
            labels, and else numbers the classes anew.
    """
    given = [part for part in (train, held_out) if part is not None]
    first_split, first = given[0]
    text = column_of(first, choice.text_column, TEXT_COLUMNS, "text_column", loaded, first_split)
    label = column_of(first, choice.label_column, LABEL_COLUMNS, "label_column", loaded, first_split)
    say(f"data: text from column {text!r}, classes from {label!r}")
    labels = {}
    for split, data in given:
        for flag, name, usual in (("text_column", text, TEXT_COLUMNS), ("label_column", label, LABEL_COLUMNS)):
            column_of(data, name, usual, flag, loaded, split)
        labels[split] = _checked(loaded, split, data, text, label)
    for column in (text, label):
        _check_families(loaded, column)
    class_names = getattr(first.features[label], "names", None)
    if train is None:
        known = dict(label2id or {})
    elif held_out is None and len(first) < 2:
        raise SparseAttentionError(
            f"dataset {choice.dataset!r} holds {len(first)} rows and no validation split; classification needs at "
            "least 2, or a file whose name says 'validation'"
        )
    else:
        names = list(class_names) if class_names is not None else names_of(labels[train[0]])
        counted = labels[train[0]] if class_names is None else [class_names[v] for v in labels[train[0]]]
        check_classes(names, counted, label, choice.dataset)
        known = dict(label2id or {})
        if not known or any(number_of(name, known) is None for name in names):
            known = {name: i for i, name in enumerate(names)}
    rows = {}
    for split, data in given:
        own_names = getattr(data.features[label], "names", None)
        numbers = numbers_of(
            labels[split],
            known,
            own_names,
            lambda row, split=split: f"{loaded.where(split, row)}, column {label!r}",  # type: ignore[misc]
        )
        rows[split] = data.select_columns([text]).add_column("_number", numbers)
    cut = _cut(rows[train[0]] if train else None, rows[held_out[0]] if held_out else None, choice)
    parts = [[{"text": r[text], "label": r["_number"]} for r in part] for part in cut]
    if train is not None and not choice.evaluate_only:
        counts = {name: sum(row["label"] == number for row in parts[0]) for name, number in known.items()}
        shares = [f"{name} {count}" for name, count in counts.items()]
        say(f"data: {len(parts[0])} rows to train on ({listed_plain(shares)}), {len(parts[1])} to evaluate on")
        left = {row["label"] for row in parts[0]}
        absent = [name for name in names if number_of(name, known) not in left]
        if absent:
            say(f"warning: no row to train on is of the class {listed(absent)}; all of them are held out, or cut off")
    else:
        say(f"data: {len(parts[1])} rows to evaluate on")
    _warn_of_duplicates(parts)
    return parts, sorted(known, key=known.__getitem__)


def listed_plain(words: Sequence[str]) -> str:
    return listed(words).replace("'", "")


def cut_texts(train: Any, held_out: Any, choice: Choice) -> list[Any]:
    """Training and evaluation data sets of whole texts; a tenth of the first where there is no second."""
    return _cut(train, held_out, choice, limited=False)


def _cut(train: Any, held_out: Any, choice: Choice, limited: bool = True) -> list[Any]:
    if held_out is None:
        parts = train.train_test_split(test_size=HELD_OUT_SHARE, seed=CUT_SEED)
        train, held_out = parts[TRAIN], parts["test"]
        say(
            f"data: no validation split, so a tenth of the rows ({len(held_out)}) is held out"
            + ("; --eval_split all evaluates on all of them" if choice.evaluate_only else "")
        )
    parts = []
    for data, limit in ((None if choice.evaluate_only else train, choice.train_rows), (held_out, choice.eval_rows)):
        if data is None:
            data = []
        elif limited and limit is not None and limit < len(data):
            # Files are often sorted by label: their first rows would be of one class.
            data = data.shuffle(seed=CUT_SEED).select(range(limit))
        parts.append(data)
    return parts


def _checked(loaded: Loaded, split: str, data: Any, text: str, label: str) -> list[Any]:
    """The labels of a split, after a look at each of its rows."""
    class_names = getattr(data.features[label], "names", None)
    labels = list(data[label])
    first: tuple[int, Any] | None = None
    for row, (words, value) in enumerate(zip(data[text], labels, strict=True)):

        def where(row: int = row) -> str:
            return loaded.where(split, row)

        checked_text(words, where, text)
        if not words.strip():
            raise SparseAttentionError(f"{where()}: column {text!r} holds no text but blanks")
        problem = check_label(value, where, label)
        if problem is None and class_names is not None and not 0 <= value < len(class_names):
            problem = f"{where()}: column {label!r} is {value}, which names no class ({listed(class_names)})"
        if problem is not None:
            raise SparseAttentionError(problem)
        first = first or (row, value)
        if isinstance(value, str) != isinstance(first[1], str):
            raise SparseAttentionError(
                f"{where()}: column {label!r} is {shown(value)}, a {type(value).__name__}, but {shown(first[1])}, a "
                f"{type(first[1]).__name__}, in {where(first[0])}; write all classes as texts, or all as integers"
            )
    return labels


def _check_families(loaded: Loaded, column: str) -> None:
    """Raise ``SparseAttentionError`` where a column holds texts in one file and numbers in another."""
    found = list(loaded.families(column).items())
    if len(found) > 1:
        (family, name), (other, other_name) = found
        raise SparseAttentionError(
            f"{other_name}: column {column!r} holds {other}, but in {name} it holds {family}; write all of them alike"
        )


def _warn_of_duplicates(parts: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    train = {row["text"] for row in parts[0]}
    both = sum(row["text"] in train for row in parts[1])
    if both:
        say(f"warning: {both} of {len(parts[1])} texts to evaluate on stand in the training rows, too")


def _usual_names(found: Mapping[str, Any]) -> dict[str, Any]:
    """Splits of a hub data set by what their names say; one by exactly that name comes first."""
    usual = {name: found[name] for name in (TRAIN, *HELD_OUT) if name in found}
    for name, data in found.items():
        split = split_of(name) or (TRAIN if len(found) == 1 else None)
        if name not in usual and split is not None and split not in usual:
            say(f"data: split {name!r} serves as {split}")
            usual[split] = data
    return usual


def _has_card_of_files(root: Path) -> bool:
    """Whether a folder is laid out for the hub, its README.md naming the files of each split."""
    card = root / "README.md"
    if not root.is_dir() or not card.is_file():
        return False
    from huggingface_hub import DatasetCard

    try:
        return "configs" in DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a README that is no card; its folder is read by the files in it
        return False


def _near(choice: Choice) -> str:
    """The name of a data set that is made, or the file or folder beside, that is like this one, as a hint."""
    wanted = Path(choice.dataset).expanduser()
    beside = sorted(wanted.parent.iterdir()) if wanted.parent.is_dir() else []
    there = [str(path) for path in beside if path.is_dir() or suffix_of(path) in KINDS]
    return did_you_mean(str(wanted), [*choice.made, *there])


def _from_hub(choice: Choice) -> Any:
    # Hub names are "name" or "owner/name", and no file of ours.
    name = choice.dataset
    if Path(name).suffix in KINDS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SparseAttentionError(
            f"dataset {name!r} does not exist{_near(choice)}; give a file or folder of {sorted(KINDS)}, a hub name, or "
            "'stdlib'"
        )
    return _read_repository(choice)


def _read_repository(choice: Choice) -> Any:
    import datasets

    dataset = choice.dataset
    try:
        return datasets.load_dataset(dataset, choice.dataset_config)
    except OSError as error:
        raise SparseAttentionError(
            f"dataset {dataset!r} is no file or folder here{_near(choice)}, and the hub did not give it: {error}"
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        advice = "; choose one by --dataset_config" if "onfig" in str(error) else ""
        raise SparseAttentionError(
            f"dataset {dataset!r} cannot be read: {' '.join(str(error).split())[:300]}{advice}"
        ) from error
