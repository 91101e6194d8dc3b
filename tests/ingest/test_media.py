"""One image file: formats by content, damage, limits, and paths that must not be followed."""

import os
import signal
import zlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
from image.kinds import JPEG_12, JPEG_XL, chunk, encode, tiff, with_chunks
from ingest.source import image
from PIL import Image

from voco.ingest.media.decoder import Decoder
from voco.ingest.media.folder import MediaRoot
from voco.ingest.media.image import check_image, read_image
from voco.ingest.media.source import MediaLimits
from voco.ingest.source_row import BadRow

HEADER = MediaLimits("header", 1 << 20, 10_000, 200.0, 1 << 20)
FULL = replace(HEADER, check="full")
NAMES = {"JPEG": "jpeg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff", "AVIF": "avif"}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    started = Decoder()
    yield started
    started.close()


@pytest.mark.parametrize("limits", [HEADER, FULL], ids=["header", "full"])
@pytest.mark.parametrize("kind", NAMES)
def test_format_is_known_by_content(kind: str, limits: MediaLimits, decoder: Decoder) -> None:
    assert check_image(image(1, kind), limits, decoder) == (NAMES[kind], 48, 32)


@pytest.mark.parametrize("limits", [HEADER, FULL], ids=["header", "full"])
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_corrupt(kind: str, share: float, limits: MediaLimits, decoder: Decoder) -> None:
    data = image(1, kind, (96, 96))
    with pytest.raises(BadRow) as caught:
        check_image(data[: max(16, int(len(data) * share))], limits, decoder)
    assert caught.value.reason == "corrupt_media"


def test_a_flipped_bit_in_a_png_is_corrupt(decoder: Decoder) -> None:
    data = bytearray(image(1, "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadRow) as caught:
        check_image(bytes(data), HEADER, decoder)
    assert caught.value.reason == "corrupt_media"


@pytest.mark.parametrize("data", [b"hello, not an image", b"%PDF-1.7 ...", b"<svg></svg>", b"RIFF\0\0\0\0WAVEfmt "])
def test_other_content_is_unsupported(data: bytes, decoder: Decoder) -> None:
    with pytest.raises(BadRow) as caught:
        check_image(data, HEADER, decoder)
    assert caught.value.reason == "unsupported_format"


def test_an_empty_file_is_corrupt(decoder: Decoder) -> None:
    with pytest.raises(BadRow) as caught:
        check_image(b"", HEADER, decoder)
    assert caught.value.reason == "corrupt_media"
    assert caught.value.detail == "UnidentifiedImageError: cannot identify image file <_io.BytesIO object>"  # no address


@pytest.mark.parametrize("limits", [HEADER, FULL], ids=["header", "full"])
@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (JPEG_12, "JPEG of 12 bits"),
        (JPEG_XL, "JPEG XL: begins with"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
        (tiff(2, 8, bytes(2), compression=34712), "TIFF of compression 34712"),
    ],
)
def test_pictures_that_cannot_be_mapped_are_unsupported_in_either_check(
    data: bytes, detail: str, limits: MediaLimits, decoder: Decoder
) -> None:
    with pytest.raises(BadRow) as caught:
        check_image(data, limits, decoder)
    assert caught.value.reason == "unsupported_format"
    assert detail in caught.value.detail


@pytest.mark.parametrize("limits", [HEADER, FULL], ids=["header", "full"])
def test_a_png_with_much_text_is_good(limits: MediaLimits, decoder: Decoder) -> None:
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20)))
    assert check_image(with_chunks(image(1, "PNG"), profile), limits, decoder) == ("png", 48, 32)
    damaged = bytearray(with_chunks(image(1, "PNG"), profile))
    damaged[-20] ^= 1
    with pytest.raises(BadRow) as caught:
        check_image(bytes(damaged), limits, decoder)
    assert caught.value.reason == "corrupt_media"


def test_trailing_bytes_after_a_jpeg_are_no_fault(decoder: Decoder) -> None:
    assert check_image(image(1) + b"\xff\xda" * 9, HEADER, decoder)[0] == "jpeg"


def test_too_many_pixels_by_the_header_alone(decoder: Decoder) -> None:
    data = bytearray(image(1, "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # a bomb: Pillow itself stops at this size
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    for bomb in (bytes(data), image(1, "JPEG", (101, 100))):
        with pytest.raises(BadRow) as caught:
            check_image(bomb, FULL, decoder)
        assert caught.value.reason == "media_too_large"


def test_paths_that_must_not_be_read(tmp_path, decoder: Decoder) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(image(1))
    (root / "good.jpg").write_bytes(image(2))
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "up").symlink_to(tmp_path)
    (root / "in.jpg").symlink_to(root / "good.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe.jpg")  # reading it would never end
    source = MediaRoot(str(root))
    assert read_image(source, "in.jpg", HEADER, decoder)["bytes"] == image(2)
    expected = {
        "out.jpg": "unsafe_path",
        "up/secret.jpg": "unsafe_path",
        "loop.jpg": "missing_media",
        "gone.jpg": "missing_media",
        "good.jpg/x.jpg": "missing_media",
        "folder": "missing_media",
        "pipe.jpg": "missing_media",
        "n" * 300 + ".jpg": "missing_media",
    }
    for path, reason in expected.items():
        with pytest.raises(BadRow) as caught:
            read_image(source, path, HEADER, decoder)
        assert caught.value.reason == reason, path


def test_a_root_that_is_a_link_is_a_root(tmp_path, decoder: Decoder) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(image(1))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert read_image(MediaRoot(str(tmp_path / "link")), "a.jpg", HEADER, decoder)["width"] == 48


def test_size_is_checked_before_reading(tmp_path, decoder: Decoder) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(BadRow) as caught:
        read_image(MediaRoot(str(tmp_path)), "huge.jpg", HEADER, decoder)
    assert caught.value.reason == "media_too_large"


@pytest.mark.parametrize("size", [(600, 3), (3, 600)])
def test_a_strip_that_padding_would_blow_up(size: tuple[int, int], decoder: Decoder) -> None:
    limits = replace(HEADER, max_aspect=199.0)
    with pytest.raises(BadRow, match=r"longer than ingest\.max_aspect 199 to 1") as caught:
        check_image(image(1, "PNG", size), limits, decoder)
    assert caught.value.reason == "media_too_large"
    assert check_image(image(1, "PNG", size), replace(HEADER, max_aspect=200.0), decoder)[0] == "png"


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGSEGV, "corrupt_media"), (signal.SIGALRM, "decode_timeout")])
def test_a_decoder_that_dies_costs_a_single_image(number: signal.Signals, expected: str) -> None:
    decoder = Decoder()
    assert check_image(image(1), FULL, decoder)[0] == "jpeg"
    assert decoder.child is not None
    os.kill(decoder.child.pid, number)
    with pytest.raises(BadRow) as caught:
        check_image(image(2), FULL, decoder)
    assert caught.value.reason == expected
    assert check_image(image(2), FULL, decoder)[0] == "jpeg"
    decoder.close()


def test_an_end_marker_before_the_last_scan_is_no_end(decoder: Decoder) -> None:
    """A thumbnail inside a header has its own end marker: a file that is cut after it is incomplete."""
    complete = image(1, "JPEG", (96, 96))
    thumbnail = b"\xff\xe1" + (len(image(2)) + 2).to_bytes(2, "big") + image(2)
    data = complete[:2] + thumbnail + complete[2:]
    assert check_image(data, HEADER, decoder)[0] == "jpeg"
    with pytest.raises(BadRow) as caught:
        check_image(data[: len(data) - 300], HEADER, decoder)
    assert caught.value.reason == "corrupt_media"
