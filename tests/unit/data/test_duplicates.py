"""Records of the same content are found, whatever they are called."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_dattn.data.duplicates import (
    ImageHashes,
    SeenImages,
    content_hash,
    hash_of,
    repeated,
)
from megatron_dattn.data.image_files import EmbeddedImages, RecordWithImages


def test_names_and_the_order_of_keys_are_no_content() -> None:
    one = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "q"}]}
    other = {"conversations": [{"value": "q", "from": "human"}], "image": "a.png", "key": "set-3"}
    assert content_hash(one) == content_hash(other)
    assert content_hash(one) != content_hash({**one, "image": "b.png"})
    assert content_hash({"system": "\ud800"}) != content_hash({"system": "\ud801"})
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    assert content_hash({"x": deep}) is None


def test_images_that_came_with_a_record_are_content() -> None:
    """In a shard the first image of every record has the same name."""
    record = {"image": ["0.png"], "conversations": []}
    one, other, again = (
        content_hash(RecordWithImages(record, {"0.png": data})) for data in (b"a", b"b", b"a")
    )
    assert one == again != other


def test_hashes_are_the_same_everywhere() -> None:
    assert hash_of("a") == 3405396810240292928


@given(st.lists(st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_every_later_one_names_the_first(hashes: list[int]) -> None:
    expected = [
        (place, hashes.index(value))
        for place, value in enumerate(hashes)
        if hashes.index(value) < place
    ]
    assert list(repeated(hashes)) == expected


def test_images_of_the_same_bytes_in_other_places_are_repeated() -> None:
    """One file of several records is none, however it is spelled."""
    book, below = SeenImages(), "/data"
    for number, images in enumerate(
        [
            [("a.png", b"a"), ("b.png", b"b")],
            [("a.png", b"a")],
            [("./x/../a.png", b"a"), ("/data/b.png", b"b")],
            [("other.png", b"a"), ("third.png", b"b")],
            [("new.png", b"c"), ("newer.png", b"c")],
        ]
    ):
        book.add(number, [ImageHashes.of(data, below, path) for path, data in images])
    assert list(book.repeated()) == [(3, 0)]


def test_images_that_came_with_their_records_are_in_other_places() -> None:
    book = SeenImages()
    for number, data in enumerate((b"a", b"b", b"a")):
        brought = EmbeddedImages({"0.png": data}, "/data")
        book.add(number, [ImageHashes.of(data, brought, "0.png")])
    book.add(3, [ImageHashes.of(b"b", EmbeddedImages({}, "/data"), "0.png")])
    assert list(book.repeated()) == [(2, 0), (3, 1)]
