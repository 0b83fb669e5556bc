"""MovieLens (Harper and Konstan, 2015): ratings of films, with the label "rated at least so high"."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.folder import MAX_TIMESTAMP, write_dataset
from vista_ext.data.importers._common import (
    check_fraction,
    check_not_empty,
    dense,
    feature_codes,
    find_files,
    positions,
    split_names,
    texts,
)
from vista_ext.data.tables import Kind, Table, check_range, read_csv

RATINGS: dict[str, Kind] = {"userId": "int", "movieId": "int", "rating": "float", "timestamp": "int"}
MOVIES: dict[str, Kind] = {"movieId": "int", "title": "string", "genres": "string"}
YEARS_PER_BUCKET = 5


def import_movielens(
    source: Path | str,
    target: Path | str,
    *,
    positive_rating: float = 4.0,
    test_fraction: float = 0.2,
    valid_fraction: float = 0.1,
) -> None:
    """Write MovieLens ratings as an event data set with the task `liked`.

    Every rating is an event; its action is round(2 * rating). Item features: first genre, 5-year bucket of release.
    Ratings of one user with equal timestamps are not in each other's history.

    Args:
        source: a folder with ratings.csv and movies.csv (gzipped or not), or with ratings.dat and movies.dat.
        target: the folder to make.
        positive_rating: ratings from this on have the label 1.
        test_fraction: share of each user's ratings, the last by time, that are test.
        valid_fraction: share of each user's other ratings, the last by time, that are valid.

    Raises:
        DataError: a file or column is missing or damaged, or a value out of range.
    """
    check_fraction("test_fraction", test_fraction)
    check_fraction("valid_fraction", valid_fraction)
    ratings_file, ratings = _read(Path(source), "ratings", RATINGS)
    movies_file, movies = _read(Path(source), "movies", MOVIES)
    check_not_empty(ratings_file, ratings["rating"])
    check_range(ratings_file, "rating", ratings["rating"], 0, 5)
    check_range(ratings_file, "timestamp", ratings["timestamp"], 0, MAX_TIMESTAMP)
    for file, table in ((ratings_file, ratings), (movies_file, movies)):
        check_range(file, "movieId", table["movieId"], 0, 2**62)

    user, users = dense(ratings["userId"])
    item, films = dense(ratings["movieId"])
    place, count = positions(user, ratings["timestamp"])
    kept = count - np.floor(test_fraction * count).astype(np.int64)
    is_test = place >= kept
    is_valid = place >= kept - np.floor(valid_fraction * kept).astype(np.int64)

    genre = np.array([genres.partition("|")[0] for genres in movies["genres"]], object)
    year = np.array([_year(title) for title in movies["title"]], np.int64)
    features, counts = {}, {}
    for name, values, unknown in (
        ("genre", genre, (genre == "") | (genre == "(no genres listed)")),
        ("year", year // YEARS_PER_BUCKET, year == 0),
    ):
        features[name], names = feature_codes(movies["movieId"], values, films, unknown)
        counts[name] = len(names) + 1
    write_dataset(
        target,
        name="movielens",
        schema=FeatureSchema(len(films), num_actions=11, item_features=counts, tasks=("liked",)),
        source="MovieLens, Harper and Konstan 2015, doi 10.1145/2827872; GroupLens terms, no commercial use",
        items={"source_id": texts(films), **features},
        users={"source_id": texts(users)},
        events={
            "user_id": user,
            "timestamp": ratings["timestamp"],
            "item_id": item + 1,
            "action": np.rint(2 * ratings["rating"]).astype(np.int64),
        },
        samples={
            "user_id": user,
            "timestamp": ratings["timestamp"],
            "item_id": item + 1,
            "split": split_names(is_test, is_valid),
            "label_liked": ratings["rating"] >= positive_rating,
        },
    )


def _read(folder: Path, name: str, columns: dict[str, Kind]) -> tuple[Path, Table]:
    file = find_files(folder, f"{name}.csv", f"{name}.csv.gz", f"{name}.dat", f"{name}.dat.gz")[0]
    if ".dat" in file.suffixes:
        return file, read_csv(file, columns, names=list(columns), separator="::", quoted=False)
    return file, read_csv(file, columns)


def _year(title: str) -> int:
    match = re.search(r"\((\d{4})\)\s*$", title)
    return int(match[1]) if match else 0
