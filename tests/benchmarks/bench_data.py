"""Sharding and loading at scale: rates against bare Pillow, peak memory, a kill in the middle.

    python tests/benchmarks/bench_data.py [--records 20000] [--image_scale 1] [--workers 2]

Makes a raw VisualPRM file with images, four solutions to each, converts it and shards it twice:
once undisturbed, once killed half-way and started again. Bare Pillow decodes and encodes (or, for
the loader, decodes) the same image files in as many processes.
"""

import argparse
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from data_tools.shard_pieces import BLOCK_RECORDS
from data_tools.workers import start_workers
from dreamprm_dist.data.shards import MANIFEST, ShardFolder

SOLUTIONS = 4  # an image
NUM_SHARDS = 64
BARE_IMAGES = 5_000  # bare Pillow is timed on at most so many, evenly drawn
LOADER_IMAGES = 400
STEP = "The two triangles share this side, so their angles at the base add up to 120 degrees. "


@lru_cache
def landscape() -> Image.Image:
    """The picture that all images are cut from: smooth, with some noise, as photographs are."""
    noise = Image.frombytes("RGB", (400, 400), random.Random(0).randbytes(400 * 400 * 3))
    return noise.resize((3200, 3200), Image.Resampling.BICUBIC)


def make_image(scale: float, path: Path) -> None:
    """A photograph, rarely a large one, or a drawing; its name is its seed."""
    draw = random.Random(path.stem)
    width = int(scale * (2400 if draw.random() < 0.02 else draw.randint(400, 900)))
    height = width * draw.randint(5, 9) // 8
    left, top = draw.randint(0, 3200 - width), draw.randint(0, max(0, 3200 - height))
    image = landscape().crop((left, top, left + width, top + height))
    if path.suffix == ".png":
        image = ImageOps.posterize(image, 2)
    image.save(path)


def make_source(folder: Path, num_records: int, scale: float, workers: int) -> Path:
    """Raw VisualPRM lines and their images, converted to training records."""
    images = [
        folder / "images" / f"{i}.{'png' if i % 10 == 0 else 'jpg'}"
        for i in range(-(-num_records // SOLUTIONS))
    ]
    (folder / "images").mkdir()
    with start_workers(workers) as in_order:
        for _ in tqdm(
            in_order(partial(make_image, scale), images), total=len(images), desc="images"
        ):
            pass
    with (folder / "geometry.jsonl").open("w") as file:
        for i in range(num_records):
            steps = [
                {"step": f"{STEP}({i}.{k})", "score": (i + k) % 5 / 4, "num_mc_total": 16}
                for k in range(6)
            ]
            image = images[i // SOLUTIONS].relative_to(folder)
            question = "Which of the two angles in the figure is larger?"
            record = {"image": str(image), "question": question, "steps_with_score": steps}
            file.write(json.dumps(record) + "\n")
    command = [sys.executable, "-m", "data_tools.convert", "raw", str(folder / "geometry.jsonl")]
    subprocess.run([*command, "--out", str(folder / "train.jsonl")], check=True)
    return folder / "train.jsonl"


def shard(source: Path, out: Path, workers: int, stop_after_blocks: int = 0) -> tuple[float, float]:
    """Run the command, or kill it half-way; its seconds and its largest process in GiB."""
    command = [sys.executable, "-m", "data_tools.shard", "--train", str(source), "--out", str(out)]
    command += ["--num_shards", str(NUM_SHARDS), "--workers", str(workers)]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0.0
    notes = out / "train.partial" / "blocks"
    while process.poll() is None:
        time.sleep(0.1)
        peak = max([peak, *map(peak_gib, [process.pid, *children(process.pid)])])
        if stop_after_blocks and len(list(notes.glob("*.json"))) >= stop_after_blocks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    if process.returncode != (-signal.SIGKILL if stop_after_blocks else 0):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, peak


def children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except FileNotFoundError:
        return []


def peak_gib(pid: int) -> float:
    """Largest resident set so far; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(x.split()[1]) / 2**20 for x in lines if x.startswith("VmHWM")), 0.0)


def decode_and_encode(path: Path) -> None:
    image = Image.open(path)
    image.load()
    image.save(io.BytesIO(), format=image.format)


def decode(data: bytes) -> None:
    Image.open(io.BytesIO(data)).convert("RGB")


def seconds_of(function, items: list, workers: int) -> float:
    """Time for a function over all items, in chunks, in processes that are already there."""
    with start_workers(workers) as in_order:
        chunks = [(function, items[i : i + 16]) for i in range(0, len(items), 16)]
        list(in_order(run_chunk, [(abs, [1])] * workers))
        start = time.perf_counter()
        list(in_order(run_chunk, chunks))
        return time.perf_counter() - start


def run_chunk(chunk: tuple) -> None:
    function, items = chunk
    for item in items:
        function(item)


def loader_over_bare_decode(folder: ShardFolder, workers: int) -> float:
    """Instances per second that a rank's loader tiles, encodes and collates, over bare decoding."""
    # Not above: the workers that handle images import this file, and need no torch.
    import torch

    from data_tools.demo_model import train_tokenizer
    from dreamprm_dist.prm.batch import InputFormat
    from dreamprm_dist.training.loader import RankBatches

    tokenizer = train_tokenizer([STEP])
    batches = RankBatches(
        shards=folder,
        tokenizer=tokenizer,
        format=InputFormat(6),
        global_batch_size=8,
        micro_batch_size=4,
        seed=1,
        level=0,
        rank=0,
        world_size=1,
    )
    stream = batches.stream(0, LOADER_IMAGES // 8 + 1, workers, torch.device("cpu"))
    next(stream)  # the workers are there
    start = time.perf_counter()
    count = sum(len(batch) for batches in stream for batch in batches)
    seconds = time.perf_counter() - start
    rows = itertools.islice(
        itertools.product(range(min(folder.rows_per_shard)), range(NUM_SHARDS)), LOADER_IMAGES
    )
    images = [data for row, shard in rows for data in folder.read(shard, row)["images"]]
    return count / seconds / (len(images) / seconds_of(decode, images, workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_data.json"))
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--image_scale", type=float, default=1.0, help="smaller: less disk")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    workers = arguments.workers
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(Path(folder), arguments.records, arguments.image_scale, workers)
        seconds, peak = shard(source, Path(folder) / "whole", workers)
        whole = Path(folder) / "whole" / "train"
        images = sorted((Path(folder) / "images").iterdir())
        some = images[:: -(-len(images) // BARE_IMAGES)]
        bare = seconds_of(decode_and_encode, some, workers) / len(some) * len(images)
        loader = loader_over_bare_decode(ShardFolder(whole), workers)
        hashes = (whole / MANIFEST).read_text()
        shutil.rmtree(whole)
        resumed = Path(folder) / "resumed"
        half = arguments.records // BLOCK_RECORDS // 2 + 1
        _, first_peak = shard(source, resumed, workers, stop_after_blocks=half)
        _, second_peak = shard(source, resumed, workers)
        ShardFolder(resumed / "train").verify()
        result = {
            "records": arguments.records,
            "images": len(images),
            "image_scale": arguments.image_scale,
            "workers": workers,
            "records_per_second": arguments.records / seconds,
            "worker_peak_gib": max(peak, first_peak, second_peak),
            "rate_over_bare_codec": bare / seconds,
            "resumed_identical": (resumed / "train" / MANIFEST).read_text() == hashes,
            "loader_over_bare_decode": loader,
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
