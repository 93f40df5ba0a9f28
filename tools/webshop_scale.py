"""Time and memory that WebShop takes on catalogues of the official size; writes results/webshop_scale_<products>.json.

    python -m tools.webshop_scale --products 100000

generates that many products in the official layout (words by Zipf's law, some 2.4 kB each), and measures in a process
of its own each: the catalogue in memory (up to 200,000 products), the first start, which makes the cache, and the
second one. --folder keeps files and cache. The official catalogue has 1,180,000 products.
"""
import argparse
import json
import os
import platform
import random
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import envs
from lib import catalogue

OFFICIAL, SEARCHES, EPISODES, LARGEST_IN_MEMORY = 1_180_000, 300, 60, 200_000
CATEGORIES = ("beauty", "electronics", "fashion", "garden", "grocery")


class Words:
    """Made-up words, drawn by Zipf's law."""

    def __init__(self, vocabulary=200_000):
        self.rng, self.draws, found = random.Random(0), np.random.default_rng(0), set()
        ends = ("a", "e", "i", "o", "u", "ar", "en", "ir")
        syllables = [first + end for first in "bcdfghklmnprstvw" for end in ends]
        while len(found) < vocabulary:
            found.add("".join(self.rng.choices(syllables, k=self.rng.randint(1, 4))))
        self.words = np.array(self.rng.sample(sorted(found), vocabulary), dtype=object)
        self.shares = np.cumsum(1 / np.arange(1, vocabulary + 1))

    def text(self, length):
        return " ".join(self.words[np.searchsorted(self.shares, self.draws.random(length) * self.shares[-1])])


def make_product(words, number, queries):
    """An entry of items_shuffle.json."""
    rng, low = words.rng, words.rng.randrange(300, 20000) / 100
    names = rng.sample(["color", "size", "style"], rng.choice([0, 1, 1, 2, 2]))
    return {
        "asin": f"B{number:09d}", "name": words.text(14), "full_description": words.text(70),
        "small_description": [words.text(14) for _ in range(5)], "category": CATEGORIES[number % 5],
        "pricing": f"${low}" + (f"${low + 20}" if rng.random() < 0.3 else ""), "query": rng.choice(queries),
        "product_category": " › ".join(words.text(1) for _ in range(3)),
        "images": [f"https://example.com/{number}-{image}.jpg" for image in range(5)],
        "customization_options": {
            name: [{"value": words.text(2), "image": None} for _ in range(rng.randint(1, 4))] for name in names},
        "seller_name": words.text(2), "product_information": {words.text(1): words.text(3) for _ in range(8)}}


def write_catalogue(folder, products):
    """Writes items_shuffle.json and items_ins_v2.json."""
    words = Words()
    attributes = [words.text(2) for _ in range(2000)]
    queries = [words.text(2) for _ in range(max(1, products // 100))]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "items_shuffle.json", "w") as items, open(folder / "items_ins_v2.json", "w") as instructions:
        for number in range(products):
            product, wished = make_product(words, number, queries), words.rng.sample(attributes, 4)
            entry = {"attributes": wished, "instruction": f"i need a {words.text(6)}",
                     "instruction_attributes": wished[:2]}
            items.write(("," if number else "[") + json.dumps(product))
            instructions.write(("," if number else "{") + f"{json.dumps(product['asin'])}: {json.dumps(entry)}")
        items.write("]")
        instructions.write("}")


def peak_memory():
    """GiB that this process has had at most; pages of files that are mapped count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_start(folder, in_memory):
    """Starts WebShop, searches, plays at random, and prints what it took as JSON."""
    catalogue.LARGE = sys.maxsize if in_memory else catalogue.LARGE
    begin, cpu = time.perf_counter(), time.process_time()
    env = envs.WebShop(folder)
    report = {"start_s": time.perf_counter() - begin, "start_cpu_s": time.process_time() - cpu,
              "start_peak_gib": peak_memory(), "products": len(env.products), "goals": len(env.goals)}
    rng, times = random.Random(0), []
    goals = [env.goals[rng.randrange(len(env.goals))] for _ in range(SEARCHES)]
    queries = [" ".join(rng.sample(goal["instruction_text"].split(), 6)) for goal in goals]
    cpu = time.process_time()
    for query in queries:
        begin = time.perf_counter()
        env.search(query)
        times.append(time.perf_counter() - begin)
    report |= {"search_ms": 1000 * statistics.median(times),
               "search_p90_ms": 1000 * statistics.quantiles(times, n=10)[8],
               "search_cpu_ms": 1000 * (time.process_time() - cpu) / SEARCHES}
    begin, cpu, steps = time.perf_counter(), time.process_time(), 0
    for number in range(EPISODES):
        _, info = env.reset(options={"split": "train", "task_id": number})
        ended = False
        while not ended:
            action = rng.choice(info["admissible"]).replace("<words>", env.goal["name"])
            *_, terminated, truncated, info = env.step(action)
            steps, ended = steps + 1, terminated or truncated
    report |= {"steps_per_s": steps / (time.perf_counter() - begin),
               "step_cpu_ms": 1000 * (time.process_time() - cpu) / steps, "peak_gib": peak_memory()}
    print(json.dumps(report))


def start(folder, in_memory=False):
    """`measure_start` in a process of its own, which begins with nothing read."""
    command = [sys.executable, "-m", "tools.webshop_scale", "--start", str(folder)] + ["--in_memory"] * in_memory
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def measure(folder, products):
    if not (folder / "items_ins_v2.json").exists():
        write_catalogue(folder, products)
    rows = {"in memory": start(folder, in_memory=True)} if products <= LARGEST_IN_MEMORY else {}
    rows |= {"first start": start(folder), "second start": start(folder)}
    for name, row in rows.items():
        print(f"{name}: {row['start_s']:.1f} s ({row['start_cpu_s']:.1f} s of CPU), {row['start_peak_gib']:.2f} GiB; "
              f"{row['search_ms']:.1f} ms per search, {row['steps_per_s']:.0f} steps/s, {row['peak_gib']:.2f} GiB")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.json"))}
    return {"bytes": files, "cache_bytes": size, "starts": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--products", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="of the files; default: one that is deleted afterwards")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in_memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        return measure_start(args.start, args.in_memory)
    report = {"command": shlex.join(["python", "-m", "tools.webshop_scale", "--products", str(args.products)]),
              "python": platform.python_version(), "numpy": np.__version__, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temporary:
        report |= measure(args.folder or Path(temporary), args.products)
    factor = OFFICIAL / args.products
    second = report["starts"]["second start"]
    report["official_size_by_proportion"] = {
        "products": OFFICIAL, "first_start_s": factor * report["starts"]["first start"]["start_s"],
        "cache_gib": factor * report["cache_bytes"] / 2**30, "search_ms": factor * second["search_ms"]}
    path = Path(__file__).resolve().parent.parent / "results" / f"webshop_scale_{args.products}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
