"""Ballots and votes in one SQLite file: who judges what, in which order, and what they said.

In: a study, evaluators who join, their votes. Out: the next ballot of each, and all votes. A vote is on the disk before
it is answered (write-ahead log, synced at every commit), so a server that is killed loses none that it acknowledged;
(evaluator, place) is unique, so a vote that is sent again counts once. Which groups an evaluator gets is written down
when they join: those with the fewest ballots so far, in an order of their own, with repeated and planted groups among
them. The order of the pictures on a ballot follows from the study's seed, the evaluator and the place.

SQLite's write-ahead log wants a disk of this machine; over a network file system it is not safe.
"""

import json
import random
import secrets
import sqlite3
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from cogview.errors import ManifestError
from cogview.evaluation.human_votes import SCALES, Kind, Vote
from pipelines.judging.study import Group, Study
from pipelines.serving.fields import RefusedError

VOTES_FOLDER, VOTES_NAME = "votes", "votes.db"
MAX_NAME = 60  # characters
CODE_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"  # none that is taken for another
CODE_LENGTH = 8  # 40 bits
LOCK_SECONDS = 30.0
MEASURED: Kind = "measured"
BUSY_SECONDS = 5  # after which a vote that could not be written may be sent again
Scores = dict[str, dict[str, int]]  # model -> scale -> score
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS study (digest TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS evaluators (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, code TEXT NOT NULL,
    joined TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
);
CREATE TABLE IF NOT EXISTS ballots (
    evaluator INTEGER NOT NULL REFERENCES evaluators (id), place INTEGER NOT NULL,
    group_id TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('measured', 'repeated', 'planted')),
    PRIMARY KEY (evaluator, place)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS ballots_by_group ON ballots (kind, group_id);
CREATE TABLE IF NOT EXISTS votes (
    number INTEGER PRIMARY KEY, evaluator INTEGER NOT NULL, place INTEGER NOT NULL,
    best TEXT NOT NULL, seconds REAL NOT NULL,
    voted TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
    UNIQUE (evaluator, place), FOREIGN KEY (evaluator, place) REFERENCES ballots (evaluator, place)
);
CREATE TABLE IF NOT EXISTS scores (
    vote INTEGER NOT NULL REFERENCES votes (number), model TEXT NOT NULL,
    {", ".join(f"{name} INTEGER NOT NULL CHECK ({name} BETWEEN 1 AND {highest})" for name, highest in SCALES.items())},
    PRIMARY KEY (vote, model)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many groups an evaluator gets: to be measured (0 for all), shown a second time, and planted."""

    measured: int
    repeated: int
    planted: int


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Who judges. done, total: ballots; code: with the name it is what lets them go on elsewhere."""

    id: int
    name: str
    code: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """A group as an evaluator sees it. models: of its pictures, in the order in which they are shown."""

    place: int
    group: Group
    kind: Kind
    models: tuple[str, ...]


class Ballots:
    """The file, opened by one server; its methods may be called from any thread."""

    def __init__(self, path: Path, *, study: Study, share: Share) -> None:
        """ManifestError if the file holds the votes of another study, or is damaged."""
        self._study, self._share = study, share
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = _connect(path)
            self._connection.executescript(SCHEMA)
            with self._transaction() as connection:
                connection.execute("INSERT OR IGNORE INTO study VALUES (?)", (study.digest,))
                digests = [row[0] for row in connection.execute("SELECT digest FROM study")]
        except sqlite3.DatabaseError as error:
            raise ManifestError(f"{path} cannot be read as votes ({error}); move it away, and keep it") from error
        if digests != [study.digest]:
            raise ManifestError(f"{path} holds votes on another study; move it away, and keep it")

    def close(self) -> None:
        """Write everything into the one file, and close it."""
        with self._lock:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.close()

    def join(self, name: str, *, code: str = "") -> Evaluator:
        """A new evaluator, or with the code one who was here before. RefusedError for a name that is taken."""
        name = clean_name(name)
        with self._transaction() as connection:
            row = connection.execute("SELECT id, code FROM evaluators WHERE name = ?", (name,)).fetchone()
            if row is not None:
                return self._known(connection, row, name=name, code=code)
            if code:
                raise RefusedError(404, f"nobody of the name {name} has begun; leave the code empty to begin")
            code = "".join(secrets.choice(CODE_LETTERS) for _ in range(CODE_LENGTH))
            cursor = connection.execute("INSERT INTO evaluators (name, code) VALUES (?, ?)", (name, code))
            evaluator = cast(int, cursor.lastrowid)
            ballots = self._draw_ballots(connection, evaluator)
            connection.executemany(
                "INSERT INTO ballots VALUES (?, ?, ?, ?)",
                [(evaluator, place, group, kind) for place, (group, kind) in enumerate(ballots)],
            )
            return Evaluator(id=evaluator, name=name, code=code, done=0, total=len(ballots))

    def evaluator(self, name: str, *, code: str) -> Evaluator:
        """Who this is. RefusedError for a name that has not joined, or a wrong code."""
        name = clean_name(name)
        with self._lock:
            row = self._connection.execute("SELECT id, code FROM evaluators WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise RefusedError(401, f"nobody of the name {name} has begun; begin again")
            return self._known(self._connection, row, name=name, code=code)

    def next_ballot(self, evaluator: Evaluator) -> Ballot | None:
        """The first ballot without a vote; None when all are done."""
        with self._lock:
            return self._next_ballot(self._connection, evaluator)

    def vote(
        self, evaluator: Evaluator, *, place: int, best: int, scores: Sequence[Mapping[str, int]], seconds: float
    ) -> None:
        """Write a vote for good; when this returns it is on the disk. The same vote sent again changes nothing.

        best, scores: by the order in which the pictures were shown. RefusedError for a ballot whose turn it is not,
        and for a second vote that says something else.
        """
        with self._transaction() as connection:
            ballot = self._ballot(connection, evaluator, place)
            if not 0 <= best < len(ballot.models) or len(scores) != len(ballot.models):
                raise RefusedError(422, f"this group has {len(ballot.models)} pictures; judge each, and choose one")
            by_model = dict(zip(ballot.models, scores, strict=True))
            known = _stored_vote(connection, evaluator.id, place)
            if known is not None:
                if known != (ballot.models[best], by_model):
                    raise RefusedError(409, f"group {place + 1} has its vote, which stays; go on with the next")
                return
            expected = self._next_ballot(connection, evaluator)
            if expected is None or expected.place != place:
                raise RefusedError(409, f"it is not the turn of group {place + 1}; open the page again")
            cursor = connection.execute(
                "INSERT INTO votes (evaluator, place, best, seconds) VALUES (?, ?, ?, ?)",
                (evaluator.id, place, ballot.models[best], seconds),
            )
            connection.executemany(
                f"INSERT INTO scores (vote, model, {', '.join(SCALES)}) VALUES (?, ?, ?, ?, ?, ?)",
                [(cursor.lastrowid, model, *(own[name] for name in SCALES)) for model, own in by_model.items()],
            )

    def votes(self) -> list[Vote]:
        """All votes so far."""
        with self._lock:
            return read_votes(self._connection)

    def _known(self, connection: sqlite3.Connection, row: tuple[int, str], *, name: str, code: str) -> Evaluator:
        if not code:
            raise RefusedError(409, f"the name {name} is taken; if it is yours, give your code as well, else another")
        if not secrets.compare_digest(row[1].encode(), code.strip().lower().encode(errors="surrogateescape")):
            raise RefusedError(401, f"this is not the code of {name}")
        total = connection.execute("SELECT count(*) FROM ballots WHERE evaluator = ?", row[:1]).fetchone()[0]
        done = connection.execute("SELECT count(*) FROM votes WHERE evaluator = ?", row[:1]).fetchone()[0]
        return Evaluator(id=row[0], name=name, code=row[1], done=done, total=total)

    def _next_ballot(self, connection: sqlite3.Connection, evaluator: Evaluator) -> Ballot | None:
        row = connection.execute(
            "SELECT min(place) FROM ballots LEFT JOIN votes USING (evaluator, place) "
            "WHERE evaluator = ? AND number IS NULL",
            (evaluator.id,),
        ).fetchone()
        return None if row[0] is None else self._ballot(connection, evaluator, row[0])

    def _ballot(self, connection: sqlite3.Connection, evaluator: Evaluator, place: int) -> Ballot:
        row = connection.execute(
            "SELECT group_id, kind FROM ballots WHERE evaluator = ? AND place = ?", (evaluator.id, place)
        ).fetchone()
        if row is None:
            raise RefusedError(404, f"there is no group {place + 1} for {evaluator.name}")
        group = self._study.group(row[0])
        models = sorted(group.pictures)
        random.Random(f"order:{self._study.seed}:{evaluator.id}:{place}").shuffle(models)
        return Ballot(place=place, group=group, kind=row[1], models=tuple(models))

    def _draw_ballots(self, connection: sqlite3.Connection, evaluator: int) -> list[tuple[str, Kind]]:
        """The groups with the fewest ballots so far, shuffled; a repeated one comes half the way after its first."""
        rng = random.Random(f"ballots:{self._study.seed}:{evaluator}")
        counts = dict(
            connection.execute("SELECT group_id, count(*) FROM ballots WHERE kind = ? GROUP BY group_id", (MEASURED,))
        )
        mixed = rng.sample(sorted(self._study.groups), len(self._study.groups))
        chosen = sorted(mixed, key=lambda group: counts.get(group, 0))[: self._share.measured or len(mixed)]
        rng.shuffle(chosen)
        half = len(chosen) // 2
        repeated = rng.sample(chosen[:half], min(self._share.repeated, half))
        planted = rng.sample(sorted(self._study.planted), min(self._share.planted, len(self._study.planted)))
        late: list[tuple[str, Kind]] = [*((group, MEASURED) for group in chosen[half:])]
        for group in repeated:
            late.insert(rng.randrange(len(late) + 1), (group, "repeated"))
        ballots: list[tuple[str, Kind]] = [*((group, MEASURED) for group in chosen[:half]), *late]
        for group in planted:
            ballots.insert(rng.randrange(len(ballots) + 1), (group, "planted"))
        return ballots

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing; on the disk when it ends."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except sqlite3.OperationalError as error:  # a full disk, another process that holds the file
                raise RefusedError(503, f"this cannot be written now ({error})", retry_after=BUSY_SECONDS) from error
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")


def clean_name(name: str) -> str:
    """A name as it is kept: one form for letters that can be written in several ways, no spaces around it."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise RefusedError(422, f"name={json.dumps(name[:MAX_NAME])}: give a name of 1 to {MAX_NAME} characters")
    return name


def load_votes(path: Path) -> list[Vote]:
    """All votes of a file, also while a server writes to it. ManifestError if there is none."""
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; nobody has judged yet, `make human-evaluation` asks them")
    try:
        connection = _connect(path)
        try:
            return read_votes(connection)
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise ManifestError(f"{path} cannot be read as votes ({error})") from error


def read_votes(connection: sqlite3.Connection) -> list[Vote]:
    """All votes in the order in which they were given."""
    scores: dict[int, Scores] = {}
    connection.execute("BEGIN")  # both questions about the same moment
    try:
        for number, model, *values in connection.execute(f"SELECT vote, model, {', '.join(SCALES)} FROM scores"):
            scores.setdefault(number, {})[model] = dict(zip(SCALES, values, strict=True))
        rows = connection.execute(
            "SELECT number, name, group_id, kind, best, seconds FROM votes JOIN ballots USING (evaluator, place) "
            "JOIN evaluators ON evaluators.id = evaluator ORDER BY number"
        ).fetchall()
    finally:
        connection.execute("COMMIT")
    return [
        Vote(evaluator=name, group=group, kind=kind, best=best, scores=scores[number], seconds=seconds)
        for number, name, group, kind, best, seconds in rows
    ]


def _stored_vote(
    connection: sqlite3.Connection, evaluator: int, place: int
) -> tuple[str, dict[str, dict[str, int]]] | None:
    row = connection.execute(
        "SELECT number, best FROM votes WHERE evaluator = ? AND place = ?", (evaluator, place)
    ).fetchone()
    if row is None:
        return None
    found = connection.execute(f"SELECT model, {', '.join(SCALES)} FROM scores WHERE vote = ?", row[:1])
    return row[1], {model: dict(zip(SCALES, values, strict=True)) for model, *values in found}


def _connect(path: Path) -> sqlite3.Connection:
    """A connection whose transactions are begun by hand, and synced to the disk when they are committed."""
    connection = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    return connection
