"""Frames of videos are the right ones, of files and of lists; a damaged file has its reason."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_dattn.data import videos
from megatron_dattn.data.check import RecordChecker
from megatron_dattn.data.conversation import image_paths, parse_record
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.missing import missing_image
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.data.videos import Video, evenly, num_frames, read_frames, upright
from megatron_dattn.errors import ConfigError
from tests.unit.data.builders import (
    data_config,
    make_dataset,
    make_loader,
    make_tokenizer,
    record,
)

SIZE = (32, 16)
LEVELS = 8  # of red between one frame and the next
ROOT = Path(__file__).resolve().parents[3]


def frame(number: int) -> Image.Image:
    return Image.new("RGB", SIZE, (LEVELS * number % 256, 90, 160))


def make_video(path: Path, frames: int, *, codec: str = "mpeg4", keys: int = 5) -> None:
    """A video whose frames say by their colour which they are."""
    av = pytest.importorskip("av", reason="PyAV is optional")
    with av.open(str(path), "w") as container:
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=Fraction(10), options=quiet)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = keys
        stream.bit_rate = 4_000_000
        for number in range(frames):
            for packet in stream.encode(av.VideoFrame.from_image(frame(number))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def numbers(images: list[Image.Image]) -> list[int]:
    """Which frames these are."""
    return [round(float(np.asarray(image)[..., 0].mean()) / LEVELS) for image in images]


def read(folder: Path, name: str, count: int, max_pixels: int = 10_000) -> list[Image.Image]:
    frames = read_frames(str(folder), name, count, Image.Image.copy, max_pixels=max_pixels)
    assert len(frames) == num_frames(str(folder), name, count, max_pixels=max_pixels)
    return frames


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_frames_are_taken_evenly_with_the_first_and_the_last(total: int, count: int) -> None:
    chosen = evenly(total, count)
    assert len(chosen) == len(set(chosen)) == min(total, count)
    assert chosen[0] == 0
    if count > 1:
        assert chosen[-1] == total - 1
        steps = np.diff(chosen)
        assert len(steps) == 0 or steps.max() - steps.min() <= 1


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "mpeg4"),
        ("a.mp4", "libx264"),  # whose frames are not stored in their order
        ("a.mkv", "libx264"),
        ("a.mov", "libx265"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mjpeg"),
    ],
)
@pytest.mark.parametrize("count", [1, 4, 8, 30])
def test_frames_of_a_file(tmp_path: Path, name: str, codec: str, count: int) -> None:
    make_video(tmp_path / name, 24, codec=codec)
    frames = read(tmp_path, name, count)
    assert {image.size for image in frames} == {SIZE}
    # Codecs lose some levels of red, and a frame is eight away from the next.
    assert numbers(frames) == evenly(24, count)


def test_one_frame_and_one_key_frame(tmp_path: Path) -> None:
    make_video(tmp_path / "one.mp4", 1)
    assert numbers(read(tmp_path, "one.mp4", 8)) == [0]
    make_video(tmp_path / "long.mp4", 30, codec="libx264", keys=1000)
    assert numbers(read(tmp_path, "long.mp4", 3)) == [0, 14, 29]


def test_frames_are_turned_as_the_container_says() -> None:
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((0, 0), (0, 0, 255))
    assert upright(image, 0) is image
    assert upright(image, 90).getpixel((0, 1)) == (0, 0, 255)  # to the left: left becomes bottom
    assert upright(image, -90).getpixel((0, 0)) == (0, 0, 255)
    assert upright(image, -180).getpixel((1, 0)) == (0, 0, 255)
    assert upright(image, 45) is image


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty": (lambda data: b"", "damaged, or of another kind"),
    "noise": (lambda data: b"noise" * 1000, "damaged, or of another kind"),
    "half": (lambda data: data[: len(data) // 2], "damaged|ends after|no frames|no video stream"),
    "an image": (lambda data: b"\x89PNG\r\n\x1a\n" + data, "damaged, or of another kind"),
    "a playlist": (lambda data: b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", "damaged, or of another"),
    "a list": (lambda data: b"ffconcat version 1.0\nfile a.mp4\n", "damaged, or of another"),
}


@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_a_reason(tmp_path: Path, name: str, damage: str) -> None:
    make_video(tmp_path / name, 20, codec="mpeg4")
    change, text = DAMAGES[damage]
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(SampleError, match=text) as caught:
        read(tmp_path, name, 8)
    assert caught.value.reason == Reason.BROKEN_VIDEO


def test_a_file_without_pictures_or_of_too_large_ones_is_a_reason(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 4)
    with pytest.raises(SampleError, match="32x16 pixels; allowed are 500") as caught:
        read(tmp_path, "a.mp4", 8, max_pixels=500)
    assert caught.value.reason == Reason.BROKEN_VIDEO
    make_video(tmp_path / "b.mkv", 4, codec="ffv1")
    with pytest.raises(SampleError, match="codec is none of"):
        read(tmp_path, "b.mkv", 8)
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = np.zeros((1, 1024), np.float32)
        sound = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        sound.sample_rate = 8000
        for packet in (*stream.encode(sound), *stream.encode()):
            container.mux(packet)
    with pytest.raises(SampleError, match="no video stream"):
        read(tmp_path, "sound.mp4", 8)


def test_odd_places_are_missing_files(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is optional")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("none.mp4", "folder.mp4", "pipe.mp4", "../a.mp4"):
        with pytest.raises(SampleError, match=name) as caught:
            read(tmp_path, name, 8)
        assert caught.value.reason == Reason.MISSING_IMAGE


def test_without_pyav_a_file_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "has_av", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'megatron_dattn\[video\]'"):
        read(tmp_path, "a.mp4", 8)


def test_a_run_without_pyav_ends_with_the_remedy(
    processor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "has_av", lambda: False)
    dataset = make_dataset(tmp_path, [shown("<video>what ?", video="a.mp4")])
    loader = make_loader(data_config(processor), [dataset], training=False)
    with pytest.raises(ConfigError, match="pip install"):
        list(loader)


def test_a_long_video_is_read_in_little_memory_and_silence(tmp_path: Path) -> None:
    """Damaged ones too; a crash would be seen here."""
    make_video(tmp_path / "long.mp4", 2000, keys=50)
    data = np.frombuffer((tmp_path / "long.mp4").read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for number in range(60):
        damaged = data.copy()
        places = rng.integers(0, len(data), 30)
        damaged[places] = rng.integers(0, 256, len(places))
        (tmp_path / f"{number}.mp4").write_bytes(damaged.tobytes())
    code = """
import json, resource, sys
import av
from pathlib import Path
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.data.videos import read_frames
size = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 2**28,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
found = {}
for path in Path(sys.argv[1]).glob("*.mp4"):
    try:
        found[path.name] = len(read_frames(sys.argv[1], path.name, 8, id, max_pixels=10_000))
    except SampleError as error:
        found[path.name] = str(error.reason)
        assert found[path.name] == "broken_video", error
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["long.mp4"] == 8
    assert set(found.values()) <= {8, "broken_video"}


def shown(question: str, **more: Any) -> dict[str, Any]:
    return {**record(question, "It moves."), **more}


FILE, FRAMES = Video(("a.mp4",), True), Video(("0.png", "1.png"), False)


@pytest.mark.parametrize(
    ("written", "expected", "text"),
    [
        (shown("What <video>", video="a.mp4"), (FILE,), "<image>\nWhat"),
        (shown("What <video>", videos=["a.mp4"]), (FILE,), "<image>\nWhat"),
        (shown("<image>What", video="a.mp4"), (FILE,), "<image>\nWhat"),  # LLaVA-Video's way
        (shown("<video>What", video=["0.png", "1.png"]), (FRAMES,), "<image>\nWhat"),
        (shown("<video>What", videos=[["0.png", "1.png"]]), (FRAMES,), "<image>\nWhat"),
        (
            shown("<image><video>-<image>", video="a.mp4", image=["x.png", "y.png"]),
            ("x.png", FILE, "y.png"),
            "<image><image>-<image>",
        ),
        (shown("What is the <video> tag?"), (), "What is the <video> tag?"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "video", "video": ["0.png", "1.png"]},
                            {"type": "image", "image": "x.png"},
                            {"type": "text", "text": "What?"},
                        ],
                    },
                    {"role": "assistant", "content": "It."},
                ]
            },
            (FRAMES, "x.png"),
            "<image>\n<image>\nWhat?",
        ),
        (
            {
                "video": "a.mp4",
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "video"}, {"type": "text", "text": "What?"}],
                    },
                    {"role": "assistant", "content": "It."},
                ],
            },
            (FILE,),
            "<image>\nWhat?",
        ),
    ],
)
def test_records_name_videos(written: Any, expected: tuple[str | Video, ...], text: str) -> None:
    conversation = parse_record(written)
    assert conversation.images == expected
    assert conversation.turns[0].text == text
    files = [one.paths if isinstance(one, Video) else (one,) for one in expected]
    assert sorted(image_paths(written)) == sorted(path for paths in files for path in paths)


def test_a_placeholder_is_not_made_of_two_turns() -> None:
    turns = [*shown("<video>What<vid")["conversations"], *shown("eo>more")["conversations"]]
    conversation = parse_record({"conversations": turns, "video": "a.mp4"})
    assert conversation.images == (FILE,)
    assert conversation.turns[2].text == "eo>more"


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (shown("What", video="a.mp4"), Reason.IMAGE_COUNT),
        (shown("<video><video>", video="a.mp4"), Reason.EXTRA_PLACEHOLDER),
        (shown("<image>", video="a.mp4", image="x.png"), Reason.IMAGE_COUNT),
        (shown("<video>", video=[["0.png"]]), Reason.BAD_RECORD),
        (shown("<video>", videos=[[]]), Reason.BAD_RECORD),
        (shown("<video>", video=3), Reason.BAD_RECORD),
        (shown("<video>", video="a.mp4", videos=["b.mp4"]), Reason.BAD_RECORD),
    ],
)
def test_records_that_do_not_fit_their_videos(written: Any, reason: Reason) -> None:
    with pytest.raises(SampleError) as caught:
        parse_record(written)
    assert caught.value.reason == reason


def make_encoder(*, fit: Any = "resize", **more: Any) -> SampleEncoder:
    return SampleEncoder(
        ConversationTokenizer(make_tokenizer(), "mistral_v3"),
        ImagePreprocessor(8, image_fit=fit, video_frames=4),
        (2, 2),
        **{"visual_budget": 64, "text_budget": 200, **more},
    )


@pytest.mark.parametrize("fit", ["resize", "anyres"])
def test_every_frame_is_an_image_of_the_sample(tmp_path: Path, fit: str) -> None:
    """And has no tiles, whatever the images beside it have."""
    make_video(tmp_path / "a.mp4", 20)
    for number in range(3):
        frame(5 * number).save(tmp_path / f"{number}.png")
    frames = [f"{number}.png" for number in range(3)]
    question = "<video> then <video>, and <image>"
    written = shown(question, videos=["a.mp4", frames], image="1.png")
    encoder = make_encoder(fit=fit)
    sample = encoder(parse_record(written), str(tmp_path))
    squares = encoder.preprocessor.num_squares((tmp_path / "1.png").read_bytes())
    assert len(sample.images) == len(sample.image_offsets) == 4 + 3 + squares
    assert sample.image_offsets[:4] == sample.image_offsets[:1] * 4
    reds = [round(float(square[..., 0].mean()) / LEVELS) for square in sample.images[:7]]
    assert reds == [0, 6, 12, 19, 0, 5, 10]
    tokens, _ = encoder.text_tokens(parse_record(written), str(tmp_path))
    assert tokens.image_offsets == sample.image_offsets


def test_limits_count_the_frames(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 20)
    chat = parse_record(shown("<video>", video="a.mp4"))
    for limits, text in (
        ({"visual_budget": 15}, "4 images make 16 visual tokens"),
        ({"max_images": 3}, "4 images, more than data.max_images_per_sample 3"),
    ):
        with pytest.raises(SampleError, match=text) as caught:
            make_encoder(**limits)(chat, str(tmp_path))
        assert caught.value.reason == Reason.TOO_MANY_IMAGES
    assert len(make_encoder(visual_budget=16, max_images=4)(chat, str(tmp_path)).images) == 4


def test_checks_know_videos(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 5)
    (tmp_path / "b.mp4").write_bytes(b"noise")
    good, bad = (shown("<video>", video=name) for name in ("a.mp4", "b.mp4"))
    for encoder in (None, make_encoder()):
        check = RecordChecker(tmp_path, 10_000, encoder)
        found = check(good)
        assert (found.outcome, found.findings) == ("used", ())
        assert found.visual_tokens == (None if encoder is None else 4 * 4)
        (problem,) = check(bad).findings
        assert problem.problem == Reason.BROKEN_VIDEO
        assert "video 'b.mp4'" in problem.message
    assert missing_image(good, str(tmp_path)) is None
    assert missing_image(shown("<video>", video="c.mp4"), str(tmp_path)) == "c.mp4"
    frames = shown("<video>", video=["0.png"])
    assert missing_image(frames, str(tmp_path)) == "0.png"
