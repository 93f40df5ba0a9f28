"""WebShop's catalogue, prices and goals as the environment uses them: in memory, or on disk where the files are large.

A million products do not fit into memory, so files above `LARGE` are read once, product by product, into a cache:
products in SQLite, the search index and all numbers in arrays that are memory-mapped. Goals are made when they are
asked for. What is drawn is the same either way.
"""
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.official import (
    build_products,
    catalogue_files,
    draw_price_bound,
    human_goals_of,
    kept_instructions,
    read_catalogue,
    read_products,
    synthetic_goals_of,
)
from lib.program import crc32, try_lock
from lib.retrieval import build_postings, load_postings, product_document, save_postings

LARGE = 16 << 20                         # bytes of the product file above which the catalogue is kept on disk
FORMAT = 1                               # of the cache: raise it when its content changes, by other search terms, say
VAL_GOALS = 500                          # the first 500 official goals of the fixed order are held out
SUMMED = 1 << 30                         # bytes of SQLite that are summed at each start: more would take seconds
ABANDONED = 86400                        # seconds after which an unfinished cache is one of a process that was killed
LOCK_PAUSE = 0.2                         # seconds between two looks whether the process that makes a cache is done


# ---------------------------------------------------------------------------------------------------------------------
# What prices and goals are drawn from
# ---------------------------------------------------------------------------------------------------------------------

class GoalTable(NamedTuple):
    """What prices and goals are drawn from: an entry per product, in their order."""
    low: np.ndarray                      # fp64, the price or the first end of its range, in dollars
    high: np.ndarray                     # fp64, the other end, NaN for a fixed price
    bounds: np.ndarray                   # int64, how many price bounds are drawn
    goals: np.ndarray                    # int64, how many goals there are
    weights: np.ndarray                  # fp64, of each of its goals in the original's draw


class Draws(NamedTuple):
    """Prices and goals of one pair of seeds."""
    prices: np.ndarray                   # fp64 [products], in dollars
    bounds: np.ndarray                   # fp64 [price bounds], in dollars
    order: np.ndarray                    # uint32 [goals]: the goal's number in the order of the products


def goal_table(products, human_goals):
    """(asins, `GoalTable`, sorted categories of the products that have goals) of an iterable of products."""
    asins, rows, wished, frequency, categories = [], array("d"), [], Counter(), set()
    for product in products:
        asins.append(product["asin"])
        low, high = (*product["pricing"], math.nan)[:2]
        kept = kept_instructions(product, human_goals)
        goals = len(kept) if human_goals else math.prod(map(len, product["options"].values())) if kept else 0
        rows.extend([low, high, len(kept), goals])
        wished.append(kept[0] if goals and not human_goals else ())
        for attribute in wished[-1]:
            frequency[attribute] += goals
        categories |= {product["category"]} if goals else set()
    rarities = [sum(1 / frequency[attribute] for attribute in attributes) / len(attributes) if attributes else 1
                for attributes in wished]
    low, high, bounds, goals = np.array(rows).reshape(-1, 4).T
    return asins, GoalTable(low, high, bounds.astype(int), goals.astype(int), np.array(rarities)), sorted(categories)


def draw_goals(table, seed, shuffle_seed):
    """The `Draws` of the original: all prices, then all bounds, from one seed; the order of goals from another."""
    rng = random.Random(seed)
    prices = [low if math.isnan(high) else rng.uniform(low, high)
              for low, high in zip(table.low.tolist(), table.high.tolist(), strict=True)]
    bounds = [draw_price_bound(price, rng)
              for price, count in zip(prices, table.bounds.tolist(), strict=True) for _ in range(count)]
    order = list(range(table.goals.sum()))
    random.Random(shuffle_seed).shuffle(order)
    return Draws(np.array(prices), np.array(bounds), np.array(order, dtype=np.uint32))


class Goals(Sequence):
    """The goals in the order of `draws`, made when they are asked for; goals of one product are made together."""

    def __init__(self, shop, draws):
        self.shop, self.order, self.bounds = shop, draws.order, draws.bounds
        self.ends = np.cumsum(shop.table.goals)
        self.bound_ends = np.cumsum(shop.table.bounds)
        self.of_product = functools.lru_cache(maxsize=1024)(self.of_product)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = int(self.order[index])
        product = int(np.searchsorted(self.ends, number, side="right"))
        return self.of_product(product)[number - self.ends[product]]             # counted from the end

    @functools.cached_property
    def cumulative_weights(self):
        """0, and the sums of the weights up to each goal, [goals + 1] fp64."""
        return np.cumsum(np.append(0, np.repeat(self.shop.table.weights, self.shop.table.goals)[self.order]))

    def of_product(self, number):
        """All goals of product `number`."""
        product, table = self.shop.products[str(self.shop.asins[number])], self.shop.table
        last = self.bound_ends[number]
        bounds = self.bounds[last - table.bounds[number]:last].tolist()
        if self.shop.human_goals:
            return [goal | {"weight": 1} for goal in human_goals_of(product, bounds)]
        weight = {"weight": float(table.weights[number])}
        return [goal | weight for goal in synthetic_goals_of(product, bounds)]


def split_goals(goals, held_out):
    """{split: indices of its goals}: by product where some are held out, else the first 500 goals or half are "val"."""
    if held_out:
        return {split: [number for number, goal in enumerate(goals) if (goal["asin"] in held_out) == (split == "val")]
                for split in ("val", "train")}
    first_train = VAL_GOALS if len(goals) >= 2 * VAL_GOALS else len(goals) // 2
    return {"val": range(first_train), "train": range(first_train, len(goals))}


def weighted_goal(goals, rng):
    """The index of the goal that the original plays when none is asked for.

    Its table of cumulative weights begins with a zero, so goal i is drawn with the weight of goal i - 1 and goal 0
    never.
    """
    cumulative = (goals.cumulative_weights if isinstance(goals, Goals)
                  else np.cumsum([0, *(goal["weight"] for goal in goals)]))
    return min(int(np.searchsorted(cumulative, rng.uniform(0, cumulative[-1]), side="right")), len(goals) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# A folder that is made once
# ---------------------------------------------------------------------------------------------------------------------

def cache_homes(data):
    """Where what is made of the folder `data` may be kept: beside the files, or, if that cannot be written, at home."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdar"
    data = Path(data).resolve()
    return [data / "sdar_cache", home / hashlib.sha256(os.fsencode(data)).hexdigest()[:16]]


def checksums(folder):
    """{file: [bytes, CRC-32]} of a folder; of SQLite files above SUMMED, whose rows have checksums, without the CRC."""
    found = {}
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        found[path.name] = [size, 0 if path.suffix == ".sqlite" and size > SUMMED else crc32(path)]
    return found


def is_whole(folder, stamp):
    """Whether the folder was made, of these files, and is as it was written; says so where it is damaged."""
    try:
        written = json.loads((folder / "stamp.json").read_text(encoding="utf-8"))
        if written["stamp"] != stamp:
            return False
        found = checksums(folder)
        found.pop("stamp.json")
        damage = "its files are not as they were written" if found != written["contents"] else ""
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, LookupError, TypeError) as error:
        damage = f"{type(error).__name__}: {error}"
    if damage:
        warnings.warn(f"The cache {folder} is damaged ({damage}), so it is made again.", RuntimeWarning, stacklevel=4)
    return not damage


def cached_folder(data, files, name, build):
    """The folder `name` that build(folder) makes of `files` in the folder `data`: made once, kept until they change.

    Written under another name and renamed, so that it is whole or not there. Of processes that start at once one makes
    it and the others wait. Raises OSError where neither of `cache_homes` can be written.
    """
    stamp = [FORMAT, {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}]
    homes = cache_homes(data)
    for home in homes:
        if is_whole(home / name, stamp):
            return home / name
    home = next(filter(is_writable, homes), None)
    if home is None:
        raise OSError(f"Neither {homes[0]} nor {homes[1]} can be written; make one of them writable, or set "
                      "XDG_CACHE_HOME to a folder that is.")
    with exclusive_lock(home / f".{name}.lock"):
        if not is_whole(home / name, stamp):
            build_folder(home, name, stamp, build)
    return home / name


def is_writable(home):
    """Whether files can be made in a folder, which is made if need be."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def exclusive_lock(path):
    """Holds a lock on the file `path`, if the system has locks; says so if another process makes it wait."""
    with open(path, "a") as file:
        if not try_lock(file):
            print(f"Waiting for another process, which makes {path.parent}.", file=sys.stderr, flush=True)
            while not try_lock(file):
                time.sleep(LOCK_PAUSE)
        yield


def build_folder(home, name, stamp, build):
    """Makes the folder home/name anew by build(folder); what fails leaves nothing behind."""
    for old in home.glob(f".{name}-*"):              # of processes that were killed
        with contextlib.suppress(FileNotFoundError):  # one that lives, and renames or deletes its own meanwhile
            if time.time() - old.stat().st_mtime > ABANDONED:
                shutil.rmtree(old, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
    try:
        build(aside)
        written = {"stamp": stamp, "contents": checksums(aside)}
        (aside / "stamp.json").write_text(json.dumps(written), encoding="utf-8")
        os.chmod(aside, 0o755)                       # a temporary folder is its owner's alone
        rename_into_place(aside, home / name, stamp)
    except (OSError, sqlite3.OperationalError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES):
            raise
        raise OSError(f"{home} cannot be written ({error}); free some disk space there, or set XDG_CACHE_HOME to a "
                      "folder on a larger disk.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def rename_into_place(aside, folder, stamp):
    """Renames a finished folder to its place, unless, where there is no lock, another process was quicker.

    A folder that stands there is moved away only if it is outdated: others may read it.
    """
    outdated = aside.with_name(aside.name + "-old")
    with contextlib.suppress(OSError):               # where nothing stands, this alone
        return os.rename(aside, folder)
    if is_whole(folder, stamp):
        return
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, outdated)
    try:
        os.rename(aside, folder)
    except OSError:
        if not is_whole(folder, stamp):
            raise
    shutil.rmtree(outdated, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Products on disk
# ---------------------------------------------------------------------------------------------------------------------

class StoredProducts(Mapping):
    """{asin: product} read one by one from SQLite; the last 1,024 are remembered and must not be changed."""

    def __init__(self, path, asins):
        self.path, self.asins, self.connections = path, asins, {}
        self.read = functools.lru_cache(maxsize=1024)(self.read)

    def rows(self, query, *values):
        """What an SQL query gives. Connections belong to a thread, and must not be taken into a forked process."""
        key = os.getpid(), threading.get_ident()
        try:
            if key not in self.connections:
                self.connections[key] = sqlite3.connect(f"{self.path.as_uri()}?mode=ro&immutable=1", uri=True)
            return self.connections[key].execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self.damaged(error) from error

    def damaged(self, reason):
        return ValueError(f"{self.path} is damaged ({reason}); delete its folder and start again.")

    def read(self, asin):
        return self.parse(*self.one("crc, body", asin))

    def one(self, columns, asin):
        """The columns of a product. Raises KeyError if there is none, ValueError if SQLite's index has lost it."""
        found = self.rows(f"SELECT {columns} FROM products WHERE asin = ?", asin)
        if not found and asin in self.asins:
            raise self.damaged(f"product {asin} cannot be found")
        if not found:
            raise KeyError(asin)
        return found[0]

    def parse(self, crc, body):
        if zlib.crc32(body) != crc:
            raise self.damaged("a product's checksum differs")
        return json.loads(body)

    def __getitem__(self, asin):
        return self.read(asin)

    def __contains__(self, asin):
        return bool(self.rows("SELECT 1 FROM products WHERE asin = ?", asin))

    def __len__(self):
        return len(self.asins)

    def __iter__(self):
        for first in range(0, len(self.asins), 65536):
            yield from self.asins[first:first + 65536].tolist()

    def stream(self):
        """Yields the products in their order, faster than one by one."""
        for first in range(0, len(self.asins), 256):
            query = "SELECT crc, body FROM products WHERE number >= ? AND number < ? ORDER BY number"
            yield from (self.parse(*row) for row in self.rows(query, first, first + 256))

    def number(self, asin):
        (number,) = self.one("number", asin)
        if not 0 <= number < len(self.asins) or self.asins[number] != asin:
            raise self.damaged(f"the number of product {asin} is {number}")
        return number

    def where(self, field, value):
        """The asins of the products whose `field` ("category" or "query") is `value`, in their order."""
        return [asin for asin, in self.rows(f"SELECT asin FROM products WHERE {field} = ? ORDER BY number", value)]


class StoredPrices(Mapping):
    """{asin: price in dollars} over an array in the order of the products."""

    def __init__(self, products, prices):
        self.products, self.prices = products, prices

    def __getitem__(self, asin):
        return float(self.prices[self.products.number(asin)])

    def __len__(self):
        return len(self.prices)

    def __iter__(self):
        return iter(self.products)


def store_products(products, path):
    """Writes products into a new SQLite file and yields them again."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE products "
                                 "(number INTEGER PRIMARY KEY, asin TEXT, category TEXT, query TEXT, crc INTEGER, "
                                 "body BLOB);")
        for number, product in enumerate(products):
            body = json.dumps(product, ensure_ascii=False).encode()
            connection.execute("INSERT INTO products VALUES (?, ?, ?, ?, ?, ?)", (
                number, product["asin"], product["category"], product["query"], zlib.crc32(body), body))
            yield product
        for field in ("asin", "category", "query"):
            connection.execute(f"CREATE INDEX by_{field} ON products ({field})")
        connection.commit()


def store_catalogue(paths, folder):
    """Writes all that does not depend on seeds: products, `GoalTable`, categories and the search index."""
    print(f"Reading {paths[0]} into {folder.parent}: once, some 5 minutes for a million products.", file=sys.stderr,
          flush=True)
    with tqdm(total=paths[0].stat().st_size, desc="products", unit="B", unit_scale=True, disable=None) as bar:
        catalogue = read_catalogue(paths, progress=bar)
        products = store_products(read_products(catalogue), folder / "products.sqlite")
        asins, table, categories = goal_table(products, catalogue.human is not None)
    asins = np.array(asins)
    save_arrays({"asins": asins} | table._asdict(), folder)
    (folder / "categories.json").write_text(json.dumps(categories), encoding="utf-8")
    products = StoredProducts(folder / "products.sqlite", asins).stream()
    bar = tqdm(products, total=len(asins), desc="search index", unit="product", disable=None)
    save_postings(build_postings(asins, map(product_document, bar)), folder)


def save_arrays(arrays, folder):
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def load_arrays(names, folder):
    """Arrays of `save_arrays`, memory-mapped."""
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# A shop
# ---------------------------------------------------------------------------------------------------------------------

class Shop(NamedTuple):
    """A catalogue. Shared between environments: not to be changed."""
    products: Mapping                    # {asin: product} as after the official loader
    asins: np.ndarray                    # of the products, in the order of the file
    table: GoalTable
    categories: list                     # sorted, of the products that have goals
    human_goals: bool                    # goals are those of people, else synthetic ones
    files: tuple = ()                    # the official files, where the catalogue is on disk
    held_out: set = frozenset()          # asins that only validation asks for; none where the order of goals decides

    def postings(self):
        """The search index."""
        if self.files:
            return load_postings(self.products.path.parent, self.asins)
        return build_postings(self.asins, map(product_document, self.products.values()))

    def draw(self, seed, shuffle_seed):
        """({asin: price}, goals), drawn as in the original."""
        if not self.files:
            draws = draw_goals(self.table, seed, shuffle_seed)
            lazy = Goals(self, draws)
            goals = [goal for number in np.flatnonzero(self.table.goals) for goal in lazy.of_product(number)]
            return dict(zip(self.products, draws.prices.tolist(), strict=True)), [goals[i] for i in draws.order]
        name = f"{self.products.path.parent.name}-{int(seed)}-{int(shuffle_seed)}"
        folder = cached_folder(self.files[0].parent, self.files, name, lambda folder: save_arrays(
            draw_goals(self.table, seed, shuffle_seed)._asdict(), folder))
        draws = Draws(*load_arrays(Draws._fields, folder))
        return StoredPrices(self.products, draws.prices), Goals(self, draws)

    def where(self, field, value):
        """The asins of the products whose `field` ("category" or "query") is `value`, in the order of the file."""
        if self.files:
            return self.products.where(field, value)
        return [asin for asin, product in self.products.items() if product[field] == value]


def shop_of(catalogue):
    """The `Shop` of a `Catalogue` in memory."""
    products, human_goals = build_products(catalogue), catalogue.human is not None
    asins, table, categories = goal_table(products.values(), human_goals)
    return Shop(products, np.array(asins), table, categories, human_goals, held_out=catalogue.held_out)


def official_shop(data, human_goals):
    """The `Shop` in a folder with the official files; a large one is read into a cache first."""
    paths = catalogue_files(data, human_goals)
    if paths[0].stat().st_size <= LARGE:
        return shop_of(read_catalogue(paths))
    name = "webshop-human" if human_goals else "webshop-synthetic"
    folder = cached_folder(data, paths, name, functools.partial(store_catalogue, paths))
    asins, *table = load_arrays(("asins", *GoalTable._fields), folder)
    categories = json.loads((folder / "categories.json").read_text(encoding="utf-8"))
    return Shop(StoredProducts(folder / "products.sqlite", asins), asins, GoalTable(*table), categories, human_goals,
                tuple(paths))
