"""Which cases train, validate and test: split by patient, kept in a file, and which of them carry labels."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from datasets.index import IMAGE_SUFFIXES
from utils.errors import UserError
from utils.files import write_json

PARTS = ("train", "validation", "test")
SUFFIXES = (".nii.gz", ".nii", ".npy", *sorted(IMAGE_SUFFIXES))  # that the name of a case may carry or leave out


@dataclass(frozen=True)
class Split:
    """Names of the cases of each part."""

    train: list[str]
    validation: list[str]
    test: list[str]


def make_split(cases: Sequence[str], patients: Sequence[str], fractions: Sequence[float], seed: int) -> Split:
    """Draw a split in which all cases of a patient are in one part.

    patients: of each case, in the order of `cases`.  fractions: of the patients in train, validation and test; they
    sum to 1. Every part whose fraction is above 0 gets at least one patient. Depends on the names and the seed only,
    not on the order of the cases. Raises UserError where that cannot be done.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"fractions: {list(fractions)} must be three numbers (train, validation, test) that sum to 1")
    of = dict(zip(cases, patients, strict=True))
    people = sorted(set(patients))
    wanted = [fraction > 0 for fraction in fractions]
    if len(people) < sum(wanted):
        raise UserError(f"{len(people)} patient(s) cannot be split into {sum(wanted)} parts; give a split file")
    counts = [max(round(fraction * len(people)), 1) if fraction else 0 for fraction in fractions]
    while sum(counts) != len(people):  # rounding: the largest part gives or takes
        counts[int(np.argmax(counts))] += 1 if sum(counts) < len(people) else -1
    order = np.random.default_rng(seed).permutation(len(people))
    ends = np.cumsum(counts)
    part_of = {people[person]: int(np.searchsorted(ends, place, side="right")) for place, person in enumerate(order)}
    return Split(*(sorted(case for case in of if part_of[of[case]] == part) for part in range(3)))


def check_split(split: Split, patients: Mapping[str, str]) -> None:
    """Raise UserError for a case that is not there, or is named twice, and for a patient who is in two parts.

    patients: from the name of each existing case to its patient.
    """
    places: dict[str, tuple[str, str]] = {}  # of each patient: a part, and the first case there
    cases: set[str] = set()
    for part, names in asdict(split).items():
        for case in names:
            if case not in patients:
                raise UserError(f"split: {part} names {case!r}, which is not among the {len(patients)} cases found")
            if case in cases:
                raise UserError(f"split: {case!r} is named twice; name every case once")
            cases.add(case)
            other_part, other_case = places.setdefault(patients[case], (part, case))
            if other_part != part:
                raise UserError(
                    f"split: patient {patients[case]} is in two parts: {other_case} in {other_part}, {case} in {part}; "
                    "put both into one"
                )


def draw_split(
    file: str | None, fractions: Sequence[float], patients: Mapping[str, str], seed: int, needed: Sequence[str] = PARTS
) -> Split:
    """The split in a file, or one drawn by patient; checked.

    A file may leave out folders and suffixes, so that one made for `segment` serves `classify` on the same volumes, and
    it may name a patient in place of all of the patient's cases.
    patients: of every case.  needed: parts that must not be empty. Raises UserError.
    """
    if file:
        split = _full_names(read_split(file), patients)
    else:
        split = make_split(list(patients), list(patients.values()), fractions, seed)
    check_split(split, patients)
    for part in needed:
        if not getattr(split, part):
            raise UserError(f"split: {part} has no case; change {file or '--fractions'}")
    return split


def write_split(split: Split, path: Path) -> None:
    """A JSON file that `read_split` reads."""
    write_json(asdict(split), path)


def read_split(path: str | Path) -> Split:
    """The split in a YAML or JSON file. Raises UserError naming what is wrong with it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); leave --split out to have one made") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: is not valid YAML or JSON ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(values, dict) or set(values) != set(PARTS):
        found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{path}: must hold the lists {', '.join(PARTS)}, and nothing else; it holds {found}")
    for name, listed in values.items():
        if not isinstance(listed, list) or not all(isinstance(case, str) for case in listed):
            raise UserError(f"{path}: {name} must be a list of case names (quote names that are numbers)")
    return Split(**values)


def choose_labelled(train: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the training cases, 0: all of them.

    For one seed the choices are nested: those of a smaller count are the first of a larger one. Raises UserError
    for more than there are.
    """
    if not 0 <= count <= len(train):
        raise UserError(f"labelled: {count} cases were asked for; the split has {len(train)} for training")
    ordered = sorted(train)
    order = np.random.default_rng(seed).permutation(len(ordered))
    return [ordered[i] for i in order[: count or len(ordered)]]


def choose_by_turns(train: Sequence[str], labels: Mapping[str, int], count: int, seed: int) -> list[str]:
    """`count` training cases (0: all) that take the classes by turns, so that few labels show every class.

    Nested for one seed, as `choose_labelled`, whose order each class keeps. Raises UserError for more than there are.
    """
    choose_labelled(train, count, seed)  # checks the count
    classes = sorted({labels[case] for case in train})
    queues = [choose_labelled([case for case in train if labels[case] == k], 0, seed) for k in classes]
    longest = max(map(len, queues))
    turns = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return turns[: count or len(turns)]


def without_suffix(name: str) -> str:
    """`a/b.nii.gz` -> `a/b`, for all file types that hold cases; other endings stay."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def places_of(names: Sequence[str]) -> dict[str, set[int]]:
    """How people may name a case -> its positions in `names`: path or file name, each with or without its suffix."""
    places: dict[str, set[int]] = defaultdict(set)
    for i, name in enumerate(names):
        for key in {name, without_suffix(name), Path(name).name, without_suffix(Path(name).name)}:
            places[key].add(i)
    return places


def _full_names(split: Split, patients: Mapping[str, str]) -> Split:
    """The same split with the names that cases have, a patient's name turned into those of all cases of the patient.

    Names that are neither stay. Raises UserError for one that may be several.
    """
    cases, of_patient = list(patients), defaultdict(list)
    places = places_of(cases)
    for case, patient in patients.items():
        of_patient[patient].append(case)

    def full(name: str) -> list[str]:
        if name in patients:
            return [name]
        shorter = (name, without_suffix(name), without_suffix(Path(name).name))
        found = next((places[way] for way in shorter if way in places), {})
        if len(found) > 1:
            first, second, *_ = (cases[i] for i in sorted(found))
            raise UserError(f"split: {name!r} may be {first} or {second}; write the path below data_path")
        return [cases[min(found)]] if found else of_patient.get(name, [name])

    return Split(*([case for name in names for case in full(name)] for names in asdict(split).values()))
