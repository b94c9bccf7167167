"""Images of every mode and format that the examples read, against arrays known beforehand."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_cases import DataError, demo_data, images, sources

SIZE = 16
RAMP = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)  # 0 to 255
WIDE = RAMP * 257  # 0 to 65535
COLORS = np.stack([RAMP, 255 - RAMP, RAMP.T], -1)


def png(pixels: np.ndarray, kind: int, transparent: bytes | None = None) -> bytes:
    """A PNG file of 8 or 16 bits, written as its specification says."""
    rows = pixels.astype(pixels.dtype.newbyteorder(">"))
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", SIZE, SIZE, 8 * pixels.itemsize, kind, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    if transparent is not None:
        parts.insert(1, (b"tRNS", transparent))
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(pixels: np.ndarray, order: str = "<", photometric: int = 1) -> bytes:
    """An uncompressed TIFF file, written as its specification says."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(f"{order}{channels}H", *[8 * pixels.itemsize] * channels)
    kinds = struct.pack(f"{order}{channels}H", *[kind] * channels)
    first = 8 + 2 + 12 * 10 + 4
    after = first + len(body)
    short, long = 3, 4
    entries = [
        (256, long, 1, SIZE), (257, long, 1, SIZE), (258, short, channels, bits),
        (259, short, 1, 1), (262, short, 1, photometric), (273, long, 1, first),
        (277, short, 1, channels), (278, long, 1, SIZE), (279, long, 1, len(body)),
        (339, short, channels, kinds),
    ]  # fmt: skip
    listed, behind = b"", b""
    for tag, of, count, value in entries:
        if isinstance(value, int):
            value = struct.pack(f"{order}{'H' if of == short else 'I'}", value)
        if len(value) > 4:
            behind, value = behind + value, struct.pack(f"{order}I", after + len(behind))
        listed += struct.pack(f"{order}HHI", tag, of, count) + value.ljust(4, b"\0")
    mark = {"<": b"II", ">": b"MM"}[order]
    head = mark + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + listed + bytes(4) + body + behind


def pgm(pixels: np.ndarray, white: int) -> bytes:
    return b"P5\n%d %d\n%d\n" % (SIZE, SIZE, white) + pixels.astype(">u2").tobytes()


def ppm(pixels: np.ndarray, white: int) -> bytes:
    return b"P6\n%d %d\n%d\n" % (SIZE, SIZE, white) + pixels.astype(">u2").tobytes()


def pfm(pixels: np.ndarray) -> bytes:
    return b"Pf\n%d %d\n-1.0\n" % (SIZE, SIZE) + pixels[::-1].astype("<f4").tobytes()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes) -> np.ndarray:
    """As integers, channels last."""
    return images.decode(content, SIZE).permute(1, 2, 0).numpy().astype(int)


WIDE_COLORS = COLORS * 257
DEEP = np.dstack([WIDE_COLORS, np.full((SIZE, SIZE), 65535)])
ANY_RANGE = {
    f"{name} {kind} {order}": tiff((RAMP / 255 * white).astype(kind), order)
    for name, kind, white in [
        ("16 bits", "u2", 65535),
        ("16 bits, signed", "i2", 32767),
        ("32 bits, to 255", "i4", 255),
        ("32 bits, to 65535", "i4", 65535),
        ("32 bits, to the end", "i4", 2**31 - 1),
        ("floating, to 1", "f4", 1),
        ("floating, above 1 by interpolation", "f4", 1.02),
        ("floating, to 255", "f4", 255),
        ("floating, to 65535", "f4", 65535),
    ]
    for order in "<>"
}
GRAY = ANY_RANGE | {
    "PNG, 8 bits": png(RAMP.astype("u1"), 0),
    "PNG, 16 bits": png(WIDE.astype("u2"), 0),
    "PNG, 16 bits with alpha": png(np.dstack([WIDE, np.full((SIZE, SIZE), 65535)]).astype("u2"), 4),
    "TIFF, 32 bits unsigned": tiff((RAMP / 255 * (2**32 - 1)).astype("u4")),
    "TIFF, 16 bits, white is zero": tiff((65535 - WIDE).astype("u2"), photometric=0),
    "TIFF, 8 bits, white is zero": tiff((255 - RAMP).astype("u1"), photometric=0),
    "TIFF, floating, white is zero": tiff((1 - RAMP / 255).astype("f4"), photometric=0),
    "PGM, to 65535": pgm(WIDE, 65535),
    "PGM, to 1023": pgm((RAMP / 255 * 1023).round(), 1023),
    "PFM": pfm(RAMP / 255),
    "JPEG 2000, 16 bits": saved(Image.fromarray(WIDE.astype("u2")), "jpeg2000"),
}
OF_COLOR = {
    "PNG, 16 bits": png(WIDE_COLORS.astype("u2"), 2),
    "PNG, 16 bits with a transparent color": png(WIDE_COLORS.astype("u2"), 2, b"\xff" * 6),
    "PNG, 16 bits with alpha": png(DEEP.astype("u2"), 6),
    "TIFF, 16 bits": tiff(WIDE_COLORS.astype("u2"), photometric=2),
    "TIFF, 16 bits, big endian": tiff(WIDE_COLORS.astype("u2"), ">", 2),
    "TIFF, 8 bits": tiff(COLORS.astype("u1"), photometric=2),
    "PPM, 16 bits": ppm(WIDE_COLORS, 65535),
    **{
        f"{kind}, 8 bits": saved(Image.fromarray(COLORS.astype("u1")), kind, **options)
        for kind, options in {
            "png": {},
            "bmp": {},
            "tga": {},
            "tiff": {},
            "ppm": {},
            "webp": {"lossless": True},
            "jpeg2000": {},
        }.items()
    },
}


@pytest.mark.parametrize("name", GRAY)
def test_gray_keeps_its_range(name: str) -> None:
    found = decoded(GRAY[name])
    # An overshoot of 2 % is cut off at white.
    wanted = (RAMP * 1.02).clip(0, 255) if "above 1" in name else RAMP
    assert np.abs(found - wanted[..., None]).max() <= 1


@pytest.mark.parametrize("name", OF_COLOR)
def test_color_keeps_its_range(name: str) -> None:
    assert np.abs(decoded(OF_COLOR[name]) - COLORS).max() <= 1


def test_a_dark_image_of_16_bits_stays_dark() -> None:
    for content in (png(RAMP.astype("u2"), 0), pgm(RAMP, 65535), tiff(RAMP.astype("u2"))):
        assert decoded(content).max() == 1


def test_twelve_bits_in_sixteen() -> None:
    """Two pixels in three bytes."""
    values = (RAMP / 255 * 4095).round().astype(int).reshape(-1, 2)
    packed = np.stack(
        [values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], -1
    )
    content = bytearray(tiff(packed.astype("u1").reshape(SIZE, -1)))
    for position in range(10, 130, 12):
        if struct.unpack_from("<H", content, position)[0] == 258:
            struct.pack_into("<H", content, position + 8, 12)
    assert np.abs(decoded(bytes(content)) - RAMP[..., None]).max() <= 1


def test_numbers_that_are_none() -> None:
    pixels = (RAMP / 255).astype("f4")
    pixels[0, :3] = np.nan, np.inf, -np.inf
    found = decoded(tiff(pixels))[..., 0]
    assert found[0, :3].tolist() == [0, 255, 0]
    assert np.abs(found - RAMP)[1:].max() <= 1


HALF = (RAMP >= 128)[..., None]  # what is opaque: the lower half
NOISE = np.random.default_rng(0).integers(1, 256, (SIZE, SIZE, 3))
RGBA = Image.fromarray(np.dstack([NOISE, HALF * 255]).astype("u1"))
GRAY_NOISE = NOISE[..., 0]
LA = Image.fromarray(np.dstack([GRAY_NOISE, HALF[..., 0] * 255]).astype("u1"))
INDICES = np.where(HALF[..., 0], 1 + RAMP % 9, 0)
PALETTE = np.vstack([[[200, 10, 90]], 20 * np.arange(1, 10)[:, None] * [1, 1, 0]])


def _palette_image() -> Image.Image:
    image = Image.fromarray(INDICES.astype("u1"))
    image.putpalette(PALETTE.astype("u1").tobytes())
    return image


KEYED = np.where(HALF, NOISE, [7, 8, 9])
KEYED_GRAY = np.where(HALF[..., 0], 50 + RAMP // 2, 7)
TRANSPARENT: dict[str, tuple[bytes, np.ndarray]] = {
    **{f"RGBA in {kind}": (saved(RGBA, kind), NOISE) for kind in ("png", "tiff", "tga")},
    "RGBA in webp": (saved(RGBA, "webp", lossless=True, exact=True), NOISE),
    "RGBA of 16 bits": (
        png((np.dstack([NOISE, HALF * 255]) * 257).astype("u2"), 6),
        NOISE,
    ),
    "LA in png": (saved(LA, "png"), GRAY_NOISE[..., None]),
    "LA of 16 bits": (
        png((np.dstack([GRAY_NOISE, HALF[..., 0] * 255]) * 257).astype("u2"), 4),
        GRAY_NOISE[..., None],
    ),
    "P in png": (saved(_palette_image(), "png", transparency=0), PALETTE[INDICES]),
    "P in png, alphas": (
        saved(_palette_image(), "png", transparency=b"\0" + b"\xff" * 9),
        PALETTE[INDICES],
    ),
    "P in gif": (saved(_palette_image(), "gif", transparency=0), PALETTE[INDICES]),
    "RGB with a color": (png(KEYED.astype("u1"), 2, struct.pack(">HHH", 7, 8, 9)), KEYED),
    "L with a color": (
        png(KEYED_GRAY.astype("u1"), 0, struct.pack(">H", 7)),
        KEYED_GRAY[..., None],
    ),
    "16 bits with a color": (
        png((KEYED_GRAY * 257).astype("u2"), 0, struct.pack(">H", 7 * 257)),
        KEYED_GRAY[..., None],
    ),
    "1 bit with a color": (
        saved(Image.fromarray(HALF[..., 0]), "png", transparency=0),
        HALF * 255,
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_is_black(name: str) -> None:
    content, opaque = TRANSPARENT[name]
    assert np.abs(decoded(content) - np.where(HALF, opaque, 0)).max() <= 1


def test_half_transparent_is_half_as_bright() -> None:
    image = Image.fromarray(np.dstack([COLORS, np.full((SIZE, SIZE), 128)]).astype("u1"))
    assert np.abs(decoded(saved(image, "png")) - COLORS * 128 / 255).max() <= 1


def exif(*entries: tuple[int, int, int, bytes], orientation: int) -> bytes:
    """The segment of a JPEG file with a directory of any entries: tag, type, count, value."""
    rows = sorted([(0x112, 3, 1, struct.pack("<HH", orientation, 0)), *entries])
    first, listed, behind = 8 + 2 + 12 * len(rows) + 4, b"", b""
    for tag, of, count, value in rows:
        if len(value) > 4:
            behind, value = behind + value, struct.pack("<I", first + len(behind))
        listed += struct.pack("<HHI", tag, of, count) + value.ljust(4, b"\0")
    directory = struct.pack("<H", len(rows)) + listed + bytes(4) + behind
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
    0: lambda stored: stored,
    9: lambda stored: stored,
}
ODD_ENTRIES = {
    "nothing else": [],
    "a resolution in words": [(0x11A, 2, 8, b"72 dpi\0\0")],
    "a resolution in bytes": [(0x11A, 7, 8, bytes(range(8)))],
    "a rational of -1 and 0": [(0x9204, 10, 1, struct.pack("<ii", -1, 0))],
    "a width in words": [(0x100, 2, 6, b"wide\0\0")],
    "a short number in words": [(0x128, 2, 6, b"inch\0\0")],
    "a type that is none": [(0x131, 99, 1, b"1234")],
    "an offset behind the end": [(0x10F, 2, 2**31, b"maker")],
    "a directory of nothing": [(0x8769, 4, 1, struct.pack("<I", 2**31))],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("entries", ODD_ENTRIES.values(), ids=ODD_ENTRIES)
@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_data_that_cannot_be_parsed(entries: list, orientation: int) -> None:
    image = Image.fromarray(COLORS.astype("u1"))
    content = saved(image, "jpeg", quality=98, exif=exif(*entries, orientation=orientation))
    plain = decoded(saved(image, "jpeg", quality=98))
    assert np.array_equal(decoded(content), TURNS[orientation](plain))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_every_turn(kind: str, orientation: int) -> None:
    image = Image.fromarray(COLORS.astype("u1"))
    options = {"jpeg": {"quality": 98}, "webp": {"lossless": True}}.get(kind, {})
    data = Image.Exif()
    data[0x112] = orientation
    plain = decoded(saved(image, kind, **options))
    turned = decoded(saved(image, kind, exif=data, **options))
    assert np.array_equal(turned, TURNS[orientation](plain))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exif_data_that_are_none() -> None:
    image = Image.fromarray(COLORS.astype("u1"))
    plain = decoded(saved(image, "jpeg"))
    for data in (b"Exif\0\0", b"Exif\0\0rubbish", exif(orientation=6)[:20], b"\xff" * 200):
        assert np.array_equal(decoded(saved(image, "jpeg", exif=data)), plain)


RAISED = [
    DataError("one"),
    EOFError(),
    ImportError("a plugin's library"),
    IndexError(),
    KeyError("tag"),
    MemoryError(),
    NotImplementedError(),
    OSError("truncated"),
    OverflowError(),
    RecursionError(),
    RuntimeError("avif"),
    SyntaxError("broken PNG"),
    TypeError(),
    ValueError(),
    ZeroDivisionError(),
    struct.error(),
    zlib.error(),
    Image.DecompressionBombError(),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_a_decoder_raises_leaves_that_image_out(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def raising(image: Image.Image) -> Image.Image:
        if image.size == (7, 7):
            raise error
        return image.convert("RGB")

    monkeypatch.setattr(sources, "upright_rgb", raising)
    monkeypatch.setattr(demo_data, "upright_rgb", raising)
    for number, size in enumerate([8, 7, 8]):
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.new("RGB", (size, size)).save(tmp_path / "p" / f"{number}.png")
    faces = images.load_faces(tmp_path, 8)
    kept, names = images.readable(faces.images, 8, tmp_path / "scan.json", threads=2)
    assert kept.tolist() == [0, 2] and names == [str(tmp_path / "p" / "1.png")]
    found = demo_data.read_folder(tmp_path)
    assert len(found.images) == 2 and found.skipped == ["p/1.png"]
    printed = capsys.readouterr().out
    assert printed.count(f"1.png: {type(error).__name__}") == 2


def test_the_user_can_stop_a_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(image: Image.Image) -> Image.Image:
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "upright_rgb", stopping)
    held = images.MemoryImages("one", [png(RAMP.astype("u1"), 0)])
    with pytest.raises(KeyboardInterrupt):
        images.readable(held, 8, tmp_path / "scan.json", threads=1)
    assert not (tmp_path / "scan.json").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "gif", "bmp", "tiff", "ppm"])
def test_damaged_files_of_every_format(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, or with some bytes changed; one in a scan leaves the others in."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    whole = saved(Image.fromarray(COLORS.astype("u1")), kind)
    draw = np.random.default_rng(1)
    contents = [whole, b""]
    for number in range(60):
        damaged = bytearray(whole[: int(draw.integers(1, len(whole)))] if number % 2 else whole)
        for place in draw.integers(0, min(300, len(damaged)), 3):
            damaged[place] = draw.integers(256)
        contents.append(bytes(damaged))
    held = images.MemoryImages(kind, contents)
    kept, names = images.readable(held, 8, tmp_path / "scan.json", threads=1)
    assert 0 in kept and 1 not in kept and len(kept) + len(names) == len(contents)
