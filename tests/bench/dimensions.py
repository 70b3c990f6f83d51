"""How many dimensions a vector needs, how to get there, and whether K interests beat one.

    python tests/bench/dimensions.py                 MovieLens-100K, out of its package
    python tests/bench/dimensions.py --path FOLDER   also the Amazon and Online Retail files there

Prints tables and asserts nothing. Catalogues are encoded once by the bundled base and
kept in the temporary folder. Nothing here is trained: a shopper's vector is the mean of
the item vectors in order, times 0.7 per step back; the last item of each shopper is the
one to find among all items, the one before it chooses parameters.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import redis
import torch

from model.encoder import TextEncoder
from model.projection import FIT_TEXTS, Floats, fit_projection, unit_rows
from model.text import item_text, text_version
from profiles.arithmetic import Layout, interests
from profiles.schema import WINDOW_ENTRY, Keys
from profiles.store import ProfileStore
from stream.local_servers import RedisServer

Ints = npt.NDArray[np.int64]

DIMENSIONS = (384, 256, 128, 64)
STEP_DECAY = 0.7
WINDOW = 50
INTERESTS = 4
SHOPPERS = 8_000  # at most: the standard error of a share of 0.07 is then 0.003
INTEREST_SHOPPERS = 4_000
VALIDATION_SHOPPERS = 1_000
AGREEMENT_ITEMS = 2_000
TOP = 10
CACHE = Path(tempfile.gettempdir()) / "penchant-dimensions"


@dataclass(frozen=True)
class Shop:
    name: str
    vectors: Floats  # (items, 384)
    histories: list[Ints]
    """Item rows of each shopper in order of time; empty where the set has none."""


@dataclass(frozen=True)
class Scores:
    """Shares of shoppers whose next item is among the first 10, and NDCG, both with items
    seen before left in the ranking (kept) or taken out (masked)."""

    recall_kept: float
    ndcg_kept: float
    recall_masked: float
    ndcg_masked: float

    def __str__(self) -> str:
        return (
            f"{self.recall_kept:.4f}/{self.ndcg_kept:.4f}   "
            f"{self.recall_masked:.4f}/{self.ndcg_masked:.4f}"
        )


def encode_once(encoder: TextEncoder, name: str, texts: list[str]) -> Floats:
    CACHE.mkdir(parents=True, exist_ok=True)
    file = CACHE / f"{name}-{text_version(chr(0).join(texts))}.npy"
    if not file.exists():
        start = time.perf_counter()
        np.save(file, encoder.encode(texts))
        print(f"encoded {len(texts):,} texts of {name} in {time.perf_counter() - start:.0f} s")
    vectors: Floats = np.load(file)
    return vectors


def movielens(encoder: TextEncoder) -> Shop:
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MovieLens is not installed; run `make env`")
    folder = Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k"
    with (folder / "ml-100k.item").open(encoding="utf-8") as stream:
        items = list(csv.DictReader(stream, delimiter="\t"))
    with (folder / "ml-100k.inter").open(encoding="utf-8") as stream:
        events = list(csv.DictReader(stream, delimiter="\t"))
    row_of = {item["item_id:token"]: row for row, item in enumerate(items)}
    texts = [
        item_text(item["movie_title:token_seq"], item["class:token_seq"].split(), "", "")
        for item in items
    ]
    return Shop(
        "movielens",
        encode_once(encoder, "movielens", texts),
        split_by_user(
            np.array([int(event["user_id:token"]) for event in events]),
            np.array([float(event["timestamp:float"]) for event in events]),
            np.array([row_of[event["item_id:token"]] for event in events]),
        ),
    )


def amazon(encoder: TextEncoder, folder: Path, name: str, text_column: str) -> Shop:
    items = pq.read_table(folder / f"amazon_{name}_items.parquet")
    events = pq.read_table(folder / f"amazon_{name}_events.parquet")
    texts = [item_text(text or "", [], "", "") for text in items[text_column].to_pylist()]
    row_of = {item: row for row, item in enumerate(items["item_id"].to_pylist())}
    return Shop(
        name,
        encode_once(encoder, name, texts),
        split_by_user(
            events["user_id"].to_numpy(),
            events["pos"].to_numpy(),
            np.array([row_of[item] for item in events["item_id"].to_pylist()]),
        ),
    )


def online_retail(encoder: TextEncoder, folder: Path) -> Shop:
    table = pq.read_table(
        folder / "online_retail_2010_2011_cc0.parquet", columns=["StockCode", "Description"]
    )
    titles = {
        code: text
        for code, text in zip(*(column.to_pylist() for column in table.columns), strict=True)
        if text
    }
    texts = [item_text(text, [], "", "") for text in titles.values()]
    return Shop("online retail", encode_once(encoder, "online-retail", texts), [])


def split_by_user(users: npt.NDArray[Any], times: npt.NDArray[Any], items: Ints) -> list[Ints]:
    order = np.lexsort((times, users))
    cuts = np.flatnonzero(np.diff(users[order])) + 1
    histories = [history for history in np.split(items[order], cuts) if len(history) >= 4]
    if len(histories) <= SHOPPERS:
        return histories
    chosen = np.random.default_rng(0).choice(len(histories), SHOPPERS, replace=False)
    return [histories[i] for i in chosen]


def plain_pca(vectors: Floats, dimensions: int) -> Floats:
    centred = vectors - vectors.mean(axis=0)
    return unit_rows(centred @ np.linalg.svd(centred, full_matrices=False)[2][:dimensions].T)


def uncentred_pca(vectors: Floats, dimensions: int) -> Floats:
    return unit_rows(vectors @ np.linalg.svd(vectors, full_matrices=False)[2][:dimensions].T)


def full_whitening(vectors: Floats, dimensions: int) -> Floats:
    centred = vectors - vectors.mean(axis=0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    return unit_rows(centred @ directions[:dimensions].T / scales[:dimensions])


def random_map(vectors: Floats, dimensions: int) -> Floats:
    return fit_projection(vectors[:0], dimensions).apply(vectors)


def shipped(vectors: Floats, dimensions: int) -> Floats:
    sample = np.random.default_rng(0).permutation(len(vectors))[:FIT_TEXTS]
    return fit_projection(vectors[sample], dimensions).apply(vectors)


MAPS: dict[str, Callable[[Floats, int], Floats]] = {
    "random orthogonal": random_map,
    "PCA, not centred": uncentred_pca,
    "PCA": plain_pca,
    "PCA, half whitened": shipped,
    "PCA, whitened": full_whitening,
}


def nearest(vectors: Floats, rows: Ints) -> Ints:
    """The 10 nearest other items of each of these rows: (r, 10)."""
    similarity = vectors[rows] @ vectors.T
    similarity[np.arange(len(rows)), rows] = -np.inf
    return np.argpartition(-similarity, TOP, axis=1)[:, :TOP]


def agreement(reference: Ints, other: Ints) -> float:
    shared = [len(np.intersect1d(a, b)) for a, b in zip(reference, other, strict=True)]
    return float(np.mean(shared)) / TOP


def decayed_profiles(vectors: Floats, histories: list[Ints]) -> Floats:
    sums = [step_weights(len(history)) @ vectors[history] for history in histories]
    return unit_rows(np.stack(sums))


def step_weights(length: int) -> Floats:
    return (STEP_DECAY ** np.arange(length - 1, -1, -1)).astype(np.float32)


def rank_scores(
    scores: Iterator[tuple[int, Floats]], histories: list[Ints], answers: Ints
) -> Scores:
    """Scores arrive as (first shopper, (shoppers, items)) blocks, so that they fit in memory."""
    kept, masked = [], []
    for start, block in scores:
        answer = answers[start : start + len(block)]
        above = block > block[np.arange(len(block)), answer][:, None]
        for i, row in enumerate(above):
            seen = np.unique(histories[start + i])
            kept.append(int(row.sum()))
            masked.append(kept[-1] - int(row[seen[seen != answer[i]]].sum()))
    return Scores(*recall_and_ndcg(np.array(kept)), *recall_and_ndcg(np.array(masked)))


def recall_and_ndcg(ranks: Ints) -> tuple[float, float]:
    hit = ranks < TOP
    return float(hit.mean()), float((hit / np.log2(ranks + 2)).mean())


def by_one_vector(vectors: Floats, profiles: Floats) -> Iterator[tuple[int, Floats]]:
    for start in range(0, len(profiles), 1_000):
        yield start, profiles[start : start + 1_000] @ vectors.T


def hold_out(shoppers: list[Ints], back: int) -> tuple[list[Ints], Ints]:
    """Histories without their last `back` items, and the first item left out of each."""
    return (
        [history[:-back] for history in shoppers],
        np.array([history[-back] for history in shoppers]),
    )


def report_dimensions(shop: Shop) -> None:
    rows = np.random.default_rng(1).permutation(len(shop.vectors))[:AGREEMENT_ITEMS]
    reference = nearest(shop.vectors, rows)
    histories, answers = hold_out(shop.histories, 1) if shop.histories else ([], np.array([]))

    def line(name: str, dimensions: int, vectors: Floats) -> None:
        text = f"{name:20}{dimensions:>5}{agreement(reference, nearest(vectors, rows)):>11.3f}"
        if histories:
            profiles = decayed_profiles(vectors, histories)
            text += f"    {rank_scores(by_one_vector(vectors, profiles), histories, answers)}"
        print(text, flush=True)

    print(f"\n{shop.name}: {len(shop.vectors):,} items, {len(shop.histories):,} shoppers")
    print(f"{'':25}{'overlap@10':>11}    R@10/N@10 kept  R@10/N@10 masked")
    line("as it is", 384, shop.vectors)
    for dimensions in DIMENSIONS:
        for name, projected in MAPS.items():
            line(name, dimensions, projected(shop.vectors, dimensions))


@dataclass(frozen=True)
class Interests:
    """Centroids (K, D) of a shopper's window and the decayed mass of each (K,), summing to 1."""

    centroids: Floats
    masses: Floats


def ward_interests(vectors: Floats, history: Ints) -> Interests:
    """As profiles keep them."""
    window = history[-WINDOW:]
    return _padded(*interests(vectors[window], step_weights(len(window)), INTERESTS))


def kmeans_interests(vectors: Floats, history: Ints) -> Interests:
    """Spherical k-means, started from the latest item and those furthest from the chosen."""
    window = history[-WINDOW:]
    weights, points = step_weights(len(window)).astype(np.float64), vectors[window]
    chosen = [len(points) - 1]
    while len(chosen) < min(INTERESTS, len(points)):
        chosen.append(int((points @ points[chosen].T).max(axis=1).argmin()))
    centroids = points[chosen]
    for _ in range(5):
        nearest_centroid = (points @ centroids.T).argmax(axis=1)
        member = nearest_centroid[:, None] == np.arange(len(centroids))
        sums = (member * weights[:, None]).T @ points
        centroids = np.where(member.any(axis=0)[:, None], unit_rows(sums), centroids)
    return _padded(centroids, (member * weights[:, None]).sum(axis=0))


def _padded(centroids: npt.NDArray[Any], masses: npt.NDArray[Any]) -> Interests:
    missing = INTERESTS - len(masses)
    return Interests(
        np.pad(unit_rows(centroids), ((0, missing), (0, 0))).astype(np.float32),
        np.pad(masses / masses.sum(), (0, missing)).astype(np.float32),
    )


@dataclass(frozen=True)
class Blend:
    """(1 - share) * cosine to the one vector + share * max over k of mass_k^power * cosine.

    With power 0 a shopper's smallest interest counts like the largest.
    """

    power: float
    share: float

    def __str__(self) -> str:
        return f"{self.share:g} of max, mass^{self.power:g}"


ALONE = [Blend(0.0, 1.0), Blend(0.25, 1.0), Blend(1.0, 1.0)]
GRID = [Blend(power, share) for power in (0.0, 0.25, 0.5) for share in (0.25, 0.5, 0.75)]


def by_interests(
    vectors: Floats, profiles: Floats, found: list[Interests], blend: Blend
) -> Iterator[tuple[int, Floats]]:
    for start in range(0, len(profiles), 250):
        part = found[start : start + 250]
        centroids = np.concatenate([one.centroids for one in part])  # (n * K, D)
        masses = np.stack([one.masses for one in part])  # (n, K)
        weights = np.where(masses > 0, np.maximum(masses, 1e-9) ** blend.power, 0.0)
        each = (centroids @ vectors.T).reshape(len(part), INTERESTS, -1) * weights[:, :, None]
        one = profiles[start : start + 250] @ vectors.T  # (n, items)
        yield start, ((1 - blend.share) * one + blend.share * each.max(axis=1)).astype(np.float32)


def report_interests(shop: Shop, dimensions: int = 128) -> None:
    vectors = shipped(shop.vectors, dimensions)
    print(f"\n{shop.name}: K = {INTERESTS} interests of the last {WINDOW} events, D = {dimensions}")
    print(f"{'':48}R@10/N@10 kept  R@10/N@10 masked")
    shoppers = shop.histories[:INTEREST_SHOPPERS]
    tests, answers = hold_out(shoppers, 1)
    profiles = decayed_profiles(vectors, tests)
    one = rank_scores(by_one_vector(vectors, profiles), tests, answers)
    print(f"{'one decayed vector':48}{one}", flush=True)
    for name, cluster in (("Ward", ward_interests), ("spherical k-means", kmeans_interests)):
        found = [cluster(vectors, history) for history in tests]
        for blend in [*ALONE, best_blend(vectors, shoppers[:VALIDATION_SHOPPERS], cluster)]:
            ranked = by_interests(vectors, profiles, found, blend)
            scores = rank_scores(ranked, tests, answers)
            print(f"{f'{name}: {blend}':48}{scores}", flush=True)


def best_blend(
    vectors: Floats, shoppers: list[Ints], cluster: Callable[[Floats, Ints], Interests]
) -> Blend:
    """The blend that ranks the item before the last one best."""
    histories, answers = hold_out(shoppers, 2)
    profiles = decayed_profiles(vectors, histories)
    found = [cluster(vectors, history) for history in histories]

    def quality(blend: Blend) -> float:
        ranked = by_interests(vectors, profiles, found, blend)
        return rank_scores(ranked, histories, answers).ndcg_masked

    return max(GRID, key=quality)


def report_profiles() -> None:
    """What a profile takes in Redis, and how many a writer saves per second."""
    print(f"\n{'D':>5}{'vectors, bytes':>18}{'in Redis, bytes':>18}{'fenced saves/s':>18}")
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        for dimensions in DIMENSIONS:
            layout = Layout(dimensions)
            stored, rate = save_profiles(server.url, layout)
            vectors = len(layout.half_lives_s) * dimensions * 4
            print(f"{dimensions:>5}{vectors:>18,}{stored:>18,}{rate:>18,.0f}", flush=True)


def save_profiles(url: str, layout: Layout) -> tuple[int, float]:
    """Bytes of one profile with a full window, and saves/s: the median of nine rounds."""
    users = [f"shopper-{layout.dimensions}-{i}" for i in range(2_000)]
    keys = Keys("bench")
    rates = []
    with redis.Redis.from_url(url) as client:
        store = ProfileStore(client, keys, layout, ttl_s=86_400, writer=1)
        profiles = store.load(users)
        window = np.zeros(layout.window, dtype=WINDOW_ENTRY).tobytes()
        profiles.window = [window] * len(users)
        for _ in range(9):
            start = time.perf_counter()
            refused = store.save(users, profiles, range(len(users)), {}, time.time())
            rates.append(len(users) / (time.perf_counter() - start))
            if refused:
                raise RuntimeError("a save was refused with one writer")
        stored = int(client.memory_usage(keys.profile(users[0])))
    return stored, float(np.median(rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--path", type=Path, help="folder of Amazon and Online Retail files")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    encoder = TextEncoder.from_pretrained("bundled", device="cpu")
    shops = [movielens(encoder)]
    if arguments.path:
        shops.append(amazon(encoder, arguments.path, "scientific", "text"))
        shops.append(amazon(encoder, arguments.path, "beauty", "title"))
        shops.append(online_retail(encoder, arguments.path))
    report_profiles()
    for shop in shops:
        report_dimensions(shop)
    for shop in shops:
        if shop.histories:
            report_interests(shop)


if __name__ == "__main__":
    main()
