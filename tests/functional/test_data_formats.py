"""Every kind of source, in every layout: prepared, checked and loaded, and trained on alike.

Sources have the shape of the published ones: names of files and folders, ids, empty keys, order of
`<image>` and text. What the loader gives is compared with plain records of the same content.
"""

import contextlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_dattn.config.cli import load_config
from megatron_dattn.data.prepared_shards import write_index
from megatron_dattn.errors import DataError
from megatron_dattn.training import trainer
from megatron_dattn.training.sample_ledger import read_ledger
from tests.functional.workspace import Workspace, make_workspace, run_main
from tests.support.distributed import run_distributed
from tests.unit.data.builders import (
    data_config,
    make_dataset,
    make_loader,
    make_shards,
    record,
    save_image,
    save_processor,
)
from tests.unit.data.test_loader import assert_equal
from tests.unit.data.test_videos import make_video
from tools import check_data, prepare_data

LAYOUTS = ("jsonl", "webdataset")


@dataclass(frozen=True)
class Source:
    """A source below a folder, and plain records of the same content."""

    path: Path
    records: list[dict[str, Any]]
    """With images' paths counted from the folder."""
    image_root: Path | None = None


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def llava(
    folder: Path, name: str, root: str, records: list[dict[str, Any]], *, lines: bool = False
) -> Source:
    """A JSON file of records whose images count from `root`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps(value) for value in records]
    path.write_text("\n".join(texts) if lines else f"[{','.join(texts)}]")
    plain = []
    for number, value in enumerate(records):
        images = value.get("image") or []
        images = images if isinstance(images, list) else [images]
        for place, image in enumerate(images):
            save_image(folder / root / image, seed=10 * number + place)
        paths = [f"{root}/{image}" for image in images]
        plain.append({"image": paths, "conversations": value["conversations"]})
    return Source(path, plain, folder / root)


def blip_558k(folder: Path) -> Source:
    """Stage 1: `<image>` before or behind the text, images below a folder of their own."""
    records = [
        {
            "id": f"00453937{n}",
            "image": f"00453/00453937{n}.jpg",
            "conversations": turns(question, f"a red square {n}"),
        }
        for n, question in enumerate(("what is it ?\n<image>", "<image>\nwhat is it ?") * 3)
    ]
    name = "llava/llava_pretrain/blip_laion_cc_sbu_558k.json"
    return llava(folder, name, "llava/llava_pretrain/images", records)


def share_captioner_1246k(folder: Path) -> Source:
    """Stage 2: everything counts from data/, stage 1's images too."""
    images = [
        "coco/train2017/000000000009.jpg",
        "sam/images/sa_545504.jpg",
        "llava/llava_pretrain/images/00000/000000010.jpg",
    ]
    records = [
        {"id": Path(i).stem, "image": i, "conversations": turns("what ?\n<image>", f"a cat {i}")}
        for i in images
    ]
    name = "sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json"
    return llava(folder, name, ".", records)


def mix665k(folder: Path) -> Source:
    """Stage 3: ids twice and with dots, several exchanges, texts alone, an answer in front."""
    images = [
        "coco/train2017/000000033471.jpg",
        "gqa/images/2354786.jpg",
        "ocr_vqa/images/140031996X.jpg",
        "textvqa/train_images/011e7e629fb9ae7b.jpg",
        "vg/VG_100K/2.jpg",
        "vg/VG_100K_2/1.jpg",
    ]
    records: list[dict[str, Any]] = [
        {
            "id": "140031996X.1",
            "image": image,
            "conversations": turns(f"<image>\nwhat is {n} ?", "a square", "and where ?", "left"),
        }
        for n, image in enumerate(images)
    ]
    answer = {"from": "gpt", "value": "number 1"}
    records += [
        {"id": "wgByO4Y_0", "model": "", "conversations": turns("what is number 1 ?", "it is 1")},
        {"id": "wgByO4Y_0", "model": "", "conversations": [answer, *turns("and 2 ?", "2")]},
    ]
    return llava(folder, "llava/llava_v1_5_mix665k.json", ".", records)


def cap100k(folder: Path) -> Source:
    """Stage 3's captions by GPT-4V."""
    images = [
        "sam/images/sa_545504.jpg",
        "share_textvqa/images/0054c91397f2fe05.jpg",
        "web-celebrity/images/ann_bancroft.jpg",
        "web-landmark/images/taj_mahal.jpg",
        "wikiart/images/vincent_van-gogh.jpg",
    ]
    records = [
        {"id": image, "image": image, "conversations": turns("what ?\n<image>", f"a square {n}")}
        for n, image in enumerate(images)
    ]
    name = "sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json"
    return llava(folder, name, ".", records)


def several_images(folder: Path) -> Source:
    """LLaVA-NeXT's JSON lines: places of images have a meaning, one is there twice."""
    records: list[dict[str, Any]] = [
        {"image": ["a.jpg", "b.png"], "conversations": turns("<image> or <image> ?", "left")},
        {"image": ["c.v1.jpg", "c.v1.jpg"], "conversations": turns("<image><image>", "both")},
        {"image": "", "conversations": turns("where ?", "left")},
    ]
    return llava(folder, "in/interleave.jsonl", "images", records, lines=True)


def chat_messages(folder: Path) -> Source:
    """OpenAI's form: images by their parts, or by the record."""
    for number in range(2):
        save_image(folder / "in" / f"{number}.jpg", seed=number)
    url = {"type": "image_url", "image_url": {"url": "0.jpg"}}
    question = {"type": "text", "text": "what is it ?"}
    records = [
        {
            "messages": [
                {"role": "system", "content": "left of 1"},
                {"role": "user", "content": [url, question]},
                {"role": "assistant", "content": [{"type": "text", "text": "a square"}]},
            ]
        },
        {
            "images": ["1.jpg"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, question]},
                {"role": "assistant", "content": "a circle"},
            ],
        },
    ]
    path = folder / "in" / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    system = {"from": "system", "value": "left of 1"}
    first = [system, *turns("<image>\nwhat is it ?", "a square")]
    second = turns("<image>\nwhat is it ?", "a circle")
    plain = [
        {"image": f"in/{n}.jpg", "conversations": some} for n, some in enumerate((first, second))
    ]
    return Source(path, plain)


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Two files of a published data set's only split."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (folder / "data").mkdir()
    table = pa.Table.from_pylist(rows)
    for number, some in enumerate((table.slice(0, 2), table.slice(2))):
        path = folder / "data" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(some, path, row_group_size=1)
    return folder / "data"


def embedded(folder: Path, number: int) -> dict[str, Any]:
    """An image as a value of a column."""
    path = folder / "images" / f"{number}.jpg"
    save_image(path, seed=number)
    return {"bytes": path.read_bytes(), "path": f"{number}.jpg"}


def onevision_parquet(folder: Path) -> Source:
    """lmms-lab's: an image or none per row."""
    records = [
        record("<image>\nwhat is it ?", "a red square", "images/0.jpg"),
        record("what is number 2 ?", "it is 2"),
        record("<image>\nwhere is it ?", "left", "images/2.jpg"),
    ]
    rows = [
        {
            "id": f"CLEVR_{n}.png",
            "image": embedded(folder, n) if "image" in value else None,
            "conversations": value["conversations"],
            "data_source": "CLEVR-Math(MathV360K)",
        }
        for n, value in enumerate(records)
    ]
    return Source(parquet(folder, rows), records)


def cauldron_parquet(folder: Path) -> Source:
    """Hugging Face's: several images per row, before several questions."""
    texts = [("what ?", "a square"), ("and where ?", "left")]
    rows = [
        {
            "images": [embedded(folder, 2 * n), embedded(folder, 2 * n + 1)],
            "texts": [{"user": q, "assistant": f"{a} {n}", "source": "vqa"} for q, a in texts],
        }
        for n in range(3)
    ]
    records = [
        {
            "image": [f"images/{2 * n}.jpg", f"images/{2 * n + 1}.jpg"],
            "conversations": turns(
                "<image>\n<image>\nwhat ?", f"a square {n}", "and where ?", f"left {n}"
            ),
        }
        for n in range(3)
    ]
    return Source(parquet(folder, rows), records)


def messages_parquet(folder: Path) -> Source:
    """TRL's: parts of messages, whose fields are null where they are of another kind."""
    rows = []
    for number in range(3):
        image = {"type": "image", "text": None, "index": 0}
        question = {"type": "text", "text": "what ?", "index": None}
        answer = {"type": "text", "text": f"number {number}", "index": None}
        messages = [
            {"role": "user", "content": [image, question]},
            {"role": "assistant", "content": [answer]},
        ]
        rows.append({"messages": messages, "images": [embedded(folder, number)]})
    records = [record("<image>\nwhat ?", f"number {n}", f"images/{n}.jpg") for n in range(3)]
    return Source(parquet(folder, rows), records)


def write_tar(path: Path, parts: dict[int, dict[str, bytes]]) -> None:
    """A shard of records, each the bytes of its files by their endings."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, files in parts.items():
            for name, data in files.items():
                member = tarfile.TarInfo(f"{number:09d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def webdataset(folder: Path) -> Source:
    """Megatron-LM's example: a list of turns beside `jpg`."""
    records = [record("<image>\nwhat ?", f"number {n}", f"images/{n}.jpg") for n in range(4)]
    output = folder / "wds"
    parts = [
        {
            "jpg": embedded(folder, number)["bytes"],
            "json": json.dumps(value["conversations"]).encode(),
        }
        for number, value in enumerate(records)
    ]
    write_tar(output / "pretrain-0.tar", {0: parts[0], 1: parts[1]})
    write_tar(output / "pretrain-1.tar", {2: parts[2], 3: parts[3]})
    write_index(output, ["pretrain-0.tar", "pretrain-1.tar"], 1)
    return Source(output, records)


def frames_of_videos(folder: Path) -> Source:
    """Videos as lists of frames: LLaVA-Video's placeholder, and several beside an image."""
    frames = [f"frames/{number}.jpg" for number in range(6)]
    for number, frame in enumerate(frames):
        save_image(folder / frame, seed=number)
    between = record("<video> then <video> and <image>", "left", frames[5])
    records = [
        {**record("<video>\nwhat ?", "a square"), "video": frames[:3]},
        {**record("<image>\nwhat ?", "a circle"), "video": frames[2:4]},
        {**between, "videos": [frames[:2], frames[3:4]]},
        {**record("<video>\nwhat ?", "a square again"), "video": frames[:3]},
    ]
    path = folder / "frames.json"
    path.write_text(json.dumps(records))
    return Source(path, records)


def videos(folder: Path) -> Source:
    """Video files, one of which is wanted twice, and one beside an image."""
    (folder / "clips").mkdir()
    for number in range(2):
        make_video(folder / f"clips/{number}.mp4", 2 + number)
    save_image(folder / "0.jpg", seed=0)
    between = record("<image> and <video> ?", "left", "0.jpg")
    records = [
        {**record("<video>\nwhat ?", "a square"), "video": "clips/0.mp4"},
        {**between, "videos": ["clips/1.mp4"]},
        {**record("<image>\nwhere ?", "right"), "video": "clips/0.mp4"},
    ]
    path = folder / "videos.json"
    path.write_text(json.dumps(records))
    return Source(path, records)


def webdataset_of_videos(folder: Path) -> Source:
    """Tars of other makers: `mp4` beside turns, or beside a record as it was published."""
    records = videos(folder).records[::2]
    texts: list[Any] = [records[0]["conversations"], {**records[1], "video": "elsewhere/9.mp4"}]
    parts = [
        {"mp4": (folder / records[n]["video"]).read_bytes(), "json": json.dumps(text).encode()}
        for n, text in enumerate(texts)
    ]
    write_tar(folder / "wds" / "clips-0.tar", dict(enumerate(parts)))
    write_index(folder / "wds", ["clips-0.tar"], 1)
    return Source(folder / "wds", records)


SOURCES: list[Callable[[Path], Source]] = [
    *(blip_558k, share_captioner_1246k, mix665k, cap100k, several_images, chat_messages),
    *(onevision_parquet, cauldron_parquet, messages_parquet, webdataset),
    *(frames_of_videos, videos, webdataset_of_videos),
]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_processor(tmp_path_factory.mktemp("processor"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", SOURCES, ids=[make.__name__ for make in SOURCES])
def test_every_source_in_every_layout(
    tmp_path: Path, processor: Path, make: Callable[[Path], Source], layout: str
) -> None:
    source, output = make(tmp_path), tmp_path / "prepared"
    roots = [] if source.image_root is None else ["--image-root", str(source.image_root)]
    options = ["--template", "mistral_v3", "--tokenizer", str(processor), "--image-size", "16"]
    options += ["--patch-size", "8", "--visual-budget", "16", "--workers", "1"]
    assert check_data.main([str(source.path), *roots, *options]) == 0
    more = ["--layout", layout, "--output", str(output)]
    if layout == "webdataset":
        more += ["--shard-records", "2"]
    elif source.path.is_dir():
        more += ["--images-out", str(output / "images")]
    arguments = [str(source.path), *roots, *more]
    assert prepare_data.main(arguments) == 0
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix != ".yaml"}
    assert prepare_data.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (entry,) = load_config(output / "train.yaml").data.train
    checked = [entry.path, *(["--image-root", entry.image_root] if entry.image_root else [])]
    assert check_data.main([*checked, *options]) == 0
    config = data_config(processor)
    plain = make_dataset(tmp_path, source.records, "plain")
    found, expected = (list(make_loader(config, [data], training=False)) for data in (entry, plain))
    for batch in (*found, *expected):
        batch.sample_keys[:] = [key.rpartition("-")[2] for key in batch.sample_keys]
    assert sum(batch.num_samples for batch in found) == len(source.records)
    assert_equal(found, expected)


def _run_with_log(flags: list[str], stop_at: int | None) -> str:
    """The log of a run, which fails behind a step."""
    stdout, validate = io.StringIO(), trainer.validate_if_due

    def stop(run: Any) -> None:
        if run.state.progress.step == stop_at:
            raise DataError("stopped")
        validate(run)

    with mock.patch.object(trainer, "validate_if_due", stop), contextlib.redirect_stdout(stdout):
        code, errors = run_main(flags)
    assert code == (0 if stop_at is None else 2), errors
    return stdout.getvalue()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace"), train_iters=5)


def test_both_layouts_train_alike_and_resume_alike(workspace: Workspace) -> None:
    """The same losses and samples, with shards also when the run is stopped in the middle."""
    data = workspace.folder / "data"
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    shards = make_shards(data, lines, size=7)
    as_shards = ["--data.train", f"[{{path: {shards.path}}}]"]
    losses, keys = [], []
    for run, data_flags, stops in (
        ("lines", [], [None]),
        ("shards", as_shards, [None]),
        ("stopped", as_shards, [3, None]),
    ):
        flags = [*workspace.flags(run, num_workers=2), *data_flags]
        logs = [run_distributed(_run_with_log, 1, flags, stop)[0] for stop in stops]
        losses.append(dict(re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", "".join(logs))))
        ledger = read_ledger(workspace.folder / run / "ledger" / "samples-dp00000.jsonl")
        packs = [pack for step in ledger.values() for pack in step]
        keys.append([[key.rpartition("-")[2] for key in pack] for pack in packs])
    assert len(losses[0]) == 5
    assert losses[1] == losses[2] == losses[0]
    assert keys[1] == keys[2] == keys[0]
