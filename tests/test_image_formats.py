"""Images as people have them: formats, modes, orientation, and what lies beside them."""

import dataclasses
import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image
from test_data_sources import RGB, colour_image, folder, message

from skd_jax import data as data_lib
from skd_jax.config import to_dict, with_defaults
from skd_jax.data.records import decode
from skd_jax.errors import UserError

SIZE = 16
# Four plain quarters: red, green, blue and black.
QUARTERS = np.zeros((SIZE, SIZE, 3), np.uint8)
for _channel, (_row, _column) in enumerate(((0, 0), (0, 8), (8, 0))):
    QUARTERS[_row : _row + 8, _column : _column + 8, _channel] = 255


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def decoded(content: bytes, channels: int = 3, size: int = SIZE, **how) -> np.ndarray:
    return decode(content, "x.png", "mend it", size, channels, how.pop("fit", "squash"), **how)


def refused(content: bytes) -> str:
    with pytest.raises(UserError, match=r"^x\.png cannot be read as an image \(") as error:
        decoded(content)
    assert "\n" not in str(error.value)
    return str(error.value)


# What an image says of itself


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: x[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda x: np.rot90(x)),
        (9, lambda x: x),  # there is none such
    ],
)
def test_images_are_turned_upright(form, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    found = decoded(encoded(QUARTERS, form, exif=exif, **exact.get(form, {})))
    assert np.abs(found.astype(int) - upright(QUARTERS)).max() < 5


def test_turned_images_are_cropped_after_the_turn():
    wide = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    wide[:, :SIZE] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decoded(encoded(wide, exif=exif))
    assert found[2, 8, 0] > 150 and found[-3, 8, 0] == 0  # what was left is on top


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"rubbish", b"MM\0*\0\0\0\x08\0\x05\x01\x12", b"MM\0*\xff\xff"])
def test_damaged_exif_does_no_harm(exif):
    plain = decoded(encoded(QUARTERS, "JPEG"))
    np.testing.assert_array_equal(
        decoded(encoded(QUARTERS, "JPEG", exif=b"Exif\0\0" + exif)), plain
    )


# Modes


GREY = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
DEEP = (GREY.astype(">u2") * 257).astype(">u2").tobytes()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "content",
    [
        encoded(GREY),
        encoded(GREY, "TIFF"),
        encoded(GREY, "BMP"),
        encoded(GREY.astype(np.uint16) * 257),
        encoded(GREY.astype(np.uint16) * 257 + (GREY % 255 > 9), "TIFF"),  # rounded
        encoded(GREY.astype(np.int32) * 257, "TIFF"),
        b"P5 16 16 65535\n" + DEEP,
        encoded(Image.frombytes("I;16B", (SIZE, SIZE), DEEP), "TIFF"),
    ],
    ids=["8", "8 tiff", "8 bmp", "16", "16 tiff", "32 tiff", "16 pgm", "16 big-endian"],
)
def test_grey_of_any_depth_keeps_its_levels(content, channels):
    found = decoded(content, channels)
    np.testing.assert_array_equal(found, np.broadcast_to(GREY[..., None], found.shape))


def test_one_bit_is_black_and_white():
    found = decoded(encoded(Image.fromarray(GREY > 99)))
    np.testing.assert_array_equal(found[..., 1], np.where(GREY > 99, 255, 0))


def test_cmyk_is_converted():
    ink = Image.fromarray(QUARTERS).convert("CMYK")
    for form, far in (("TIFF", 1), ("JPEG", 60)):
        middle = decoded(encoded(ink, form))[3::8, 3::8].astype(int)
        assert np.abs(middle - QUARTERS[3::8, 3::8]).max() < far
    assert decoded(encoded(ink, "TIFF"), 1)[3, 3, 0] == 76  # red, as "L" weighs it


def test_palette_is_looked_up():
    image = Image.fromarray(QUARTERS).quantize(4)
    np.testing.assert_array_equal(decoded(encoded(image)), QUARTERS)
    np.testing.assert_array_equal(decoded(encoded(image, "GIF")), QUARTERS)
    assert decoded(encoded(image), 1)[3, 3, 0] == 76


WHITE_AND = QUARTERS.copy()
WHITE_AND[8:, 8:] = 255  # where the black quarter is transparent
ALPHA = Image.fromarray(QUARTERS)
ALPHA.putalpha(Image.fromarray(np.where(QUARTERS.any(-1), 255, 0).astype(np.uint8)))
INDEXED = Image.fromarray(QUARTERS).quantize(4)
BLACK = INDEXED.getpixel((15, 15))


@pytest.mark.parametrize(
    "content",
    [
        encoded(ALPHA),
        encoded(ALPHA, "TIFF"),
        encoded(ALPHA, "WEBP", lossless=True),
        encoded(QUARTERS, transparency=(0, 0, 0)),
        encoded(INDEXED, transparency=BLACK),
        encoded(INDEXED, transparency=bytes(255 * (i != BLACK) for i in range(4))),
        encoded(INDEXED, "GIF", transparency=BLACK),
    ],
    ids=["png", "tiff", "webp", "colour", "palette", "palette of alphas", "gif"],
)
def test_what_is_transparent_is_white(content):
    np.testing.assert_array_equal(decoded(content), WHITE_AND)
    assert (decoded(content, 1)[8:, 8:] == 255).all()


def test_transparent_grey_is_white():
    alpha = np.where(GREY < 100, 0, 255).astype(np.uint8)
    layers = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    wanted = np.where(GREY < 100, 255, GREY)[..., None]
    np.testing.assert_array_equal(decoded(encoded(layers), 1), wanted)
    deep = encoded(GREY.astype(np.uint16) * 257, transparency=0)
    np.testing.assert_array_equal(decoded(deep, 1)[..., 0], np.where(GREY == 0, 255, GREY))


def test_half_transparent_is_mixed_with_white():
    half = Image.new("RGBA", (SIZE, SIZE), (0, 100, 200, 51))  # a fifth
    assert decoded(encoded(half))[5, 5].tolist() == [204, 224, 244]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encoded(GREY.astype(np.float32), "TIFF"), "floats, of unknown range"),
        (encoded(GREY.astype(np.int32) - 5, "TIFF"), "values go from -5 to 250"),
        (encoded(GREY.astype(np.int32) * 1000, "TIFF"), "values go from 0 to 255000"),
    ],
)
def test_values_of_unknown_range_are_refused(content, words):
    assert words in refused(content)


# Formats and sizes


@pytest.mark.parametrize(
    "form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"]
)
def test_formats_are_told_by_content_and_truncated_files_are_refused(form):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    content = encoded(noise, form)
    assert decoded(content).std() > 10
    for length in (len(content) // 2, 60, 3, 0):
        refused(content[:length])


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_image_of_several_is_taken(form):
    others = [Image.fromarray(255 - QUARTERS)] * 2
    options = {"lossless": True} if form == "WEBP" else {}
    content = encoded(QUARTERS, form, save_all=True, append_images=others, **options)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames > 1
    np.testing.assert_array_equal(decoded(content), QUARTERS)


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (5, 7), (300, 200)])
def test_any_size_becomes_the_square(size, fit):
    found = decoded(encoded(Image.new("RGB", size, (9, 8, 7))), fit=fit)
    assert found.shape == (SIZE, SIZE, 3) and (found == (9, 8, 7)).all()


def test_too_many_pixels_are_refused():
    assert "more than 178,956,970 pixels" in refused(encoded(Image.new("1", (20_000, 10_000))))


def test_formats_that_start_other_programs_are_not_opened():
    assert "unknown format" in refused(encoded(QUARTERS, "EPS"))


# How an image is resized


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_interpolation(tmp_path, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    wanted = np.asarray(noise.resize((SIZE, SIZE), Image.Resampling[name.upper()]))
    np.testing.assert_array_equal(decoded(encoded(noise), interpolation=name), wanted)
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(2):
            noise.save(tmp_path / label / f"{i}.png")
    data = folder(tmp_path, interpolation=name, load_size=SIZE, image_size=SIZE)
    np.testing.assert_array_equal(data_lib.open_source(data).read("train", [0])[0], wanted)
    np.testing.assert_array_equal(data_lib.read_images([tmp_path / "a" / "0.png"], data)[0], wanted)


def test_interpolation_is_bilinear_unless_told():
    noise = encoded(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    np.testing.assert_array_equal(decoded(noise), decoded(noise, interpolation="bilinear"))
    with pytest.raises(UserError, match=r"config\.data\.interpolation='cubic'.*bicubic"):
        data_lib.check(dataclasses.replace(RGB, interpolation="cubic"))


def test_settings_from_before_interpolation_are_readable():
    from configs import folder as config
    from skd_jax.methods import METHODS, from_config_dict

    fields = config.get_config()
    now = to_dict(from_config_dict(fields))
    saved = {**now, "data": {n: x for n, x in now["data"].items() if n != "interpolation"}}
    assert with_defaults(saved, METHODS) == now
    del fields.data.interpolation
    assert from_config_dict(fields).data.interpolation == "bilinear"


# What lies in an image folder


@pytest.fixture
def images(tmp_path) -> pathlib.Path:
    """A folder of two classes with three images each."""
    for name, value in (("ant", 10), ("cat", 100)):
        (tmp_path / name).mkdir()
        for i in range(3):
            colour_image(value + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def counts(root: pathlib.Path) -> list[int]:
    source = data_lib.open_source(folder(root))
    labels = np.concatenate([source.labels("train"), source.labels("test")])
    return np.bincount(labels).tolist()


@pytest.mark.parametrize("suffix", ["gif", "tif", "TIFF", "jfif", "jpe", "pgm", "avif", "dib"])
def test_suffixes_that_people_have(images, suffix, capsys):
    kind = {"jfif": "JPEG", "jpe": "JPEG", "pgm": "PPM", "avif": "AVIF", "dib": "DIB"}
    image = colour_image(5).convert("L" if suffix == "pgm" else "RGB")
    image.save(images / "ant" / f"x.{suffix}", kind.get(suffix))
    assert counts(images) == [4, 3]
    assert capsys.readouterr() == ("", "")


def test_companion_files_are_ignored_without_a_word(images, capsys):
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (images / "cat" / name).write_bytes(b"Mac OS X")
        (images / name).write_bytes(b"Mac OS X")
    systems = ("__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir")
    for name in (*systems, ".thumbnails", "cat/.cache", "cat/__MACOSX"):
        (images / name).mkdir()
        (images / name / "._0.png").write_bytes(b"Mac OS X")
        colour_image(7).save(images / name / "small.png")
    assert counts(images) == [3, 3]
    assert len(data_lib.find_images(images)) == 6
    assert capsys.readouterr() == ("", "")


def warning(capsys) -> str:
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert out == ""
    return line


def test_files_that_are_left_out_are_counted_and_named(images, capsys):
    (images / "cat" / "a.txt").write_text("notes")
    colour_image(5).save(images / "cat" / "photo.bak", "JPEG")
    (images / "ant" / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    colour_image(5).save(images / "loose.png")
    (images / "labels.csv").write_text("in no class folder, and no image")
    assert counts(images) == [3, 3]
    said = warning(capsys)
    assert said.startswith(f"warning: left out of {images}, 4 files: ")
    named = (
        "loose.png (in no class folder), cat/photo.bak (a JPEG by content), ant/b.heic, cat/a.txt."
    )
    assert named in said and "labels.csv" not in said
    for i in range(9):
        (images / "ant" / f"more{i}").write_text("x")
    counts(images)
    said = warning(capsys)
    assert "13 files: " in said and "and 8 more. " in said


def test_odd_files_are_named_on_one_line(images, capsys):
    os.mkfifo(images / "cat" / "pipe")
    os.mkfifo(images / "cat" / "pipe.png")  # opening it would wait for ever
    (images / "cat" / "two\nlines").write_text("x")
    assert counts(images) == [3, 3]
    said = warning(capsys)
    assert "cat/pipe, cat/pipe.png" in said and r"cat/two\nlines" in said
    assert len(data_lib.find_images(images)) == 6
    capsys.readouterr()


def test_images_below_a_class_folder_are_read_and_told(images, capsys):
    (images / "cat" / "2023" / "may").mkdir(parents=True)
    colour_image(7).save(images / "cat" / "2023" / "may" / "x.png")
    (images / "cat" / "2023" / "back").symlink_to(images / "cat")  # a circle
    (images / "cat" / "2023" / "up").symlink_to(images)  # where the other class is, too
    assert counts(images) == [3, 4]
    said = warning(capsys)
    assert said.startswith(f"warning: in {images}, images in folders below a class folder")
    assert said.endswith(": cat/2023/may/x.png")
    colour_image(7).save(images / "cat" / "2023" / "y.png")
    assert counts(images) == [3, 5]
    assert warning(capsys).endswith(": cat/2023/may/x.png and 1 more")


def test_a_class_folder_of_unknown_files_only_says_what_it_has(images):
    (images / "dog").mkdir()
    (images / "dog" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    said = message(folder(images))
    assert f"{images / 'dog'} holds no images" in said and "it has IMG_1.HEIC" in said


# The workdir


def test_workdir_among_the_images_is_refused(images):
    data = folder(images)
    for inside in (images, images / "run", images / "cat" / "x" / "y"):
        with pytest.raises(UserError, match=f"--workdir={inside} lies in the image folder"):
            data_lib.check_workdir(inside, data)
    with pytest.raises(UserError, match="--out="):
        data_lib.check_workdir(images / "run", data, flag="--out")
    (images.parent / "link").unlink(missing_ok=True)
    (images.parent / "link").symlink_to(images)
    with pytest.raises(UserError, match="lies in the image folder"):
        data_lib.check_workdir(images.parent / "link" / "run", data)
    data_lib.check_workdir(images.parent / "run", data)
    data_lib.check_workdir(images / ".runs" / "run", data)  # a hidden folder is not read
    data_lib.check_workdir(images / "run", dataclasses.replace(data, name="cifar100"))


def test_workdir_beside_the_splits_is_taken(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
    data_lib.check_workdir(tmp_path / "run", folder(tmp_path))
    with pytest.raises(UserError, match="lies in the image folder"):
        data_lib.check_workdir(tmp_path / "val" / "run", folder(tmp_path))


# Images of a path


def test_images_are_found_by_file_and_by_folder(images, capsys):
    (images / "cat" / "more").mkdir()
    colour_image(7).save(images / "cat" / "more" / "x.jpg")
    colour_image(7).save(images / "top.gif")
    found = data_lib.find_images(str(images))
    names = [file.relative_to(images).as_posix() for file in found]
    assert names == [
        *("ant/0.png", "ant/1.png", "ant/2.png"),
        *("cat/0.png", "cat/1.png", "cat/2.png", "cat/more/x.jpg", "top.gif"),
    ]
    assert data_lib.find_images(images / "cat" / "0.png") == [images / "cat" / "0.png"]
    (images / "unnamed").write_bytes((images / "top.gif").read_bytes())
    assert data_lib.find_images(images / "unnamed") == [images / "unnamed"]
    assert capsys.readouterr() == ("", "")
    assert data_lib.find_images(images) == found
    assert "unnamed (a GIF by content)" in warning(capsys)


def test_a_path_without_images_is_an_error(tmp_path):
    for path, words in ((tmp_path / "x.png", ": there is no such"), (tmp_path, " holds no images")):
        with pytest.raises(UserError, match=f"^{path}{words}"):
            data_lib.find_images(path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"it has notes\.txt"):
        data_lib.find_images(tmp_path)


def test_images_of_paths_are_those_of_training(images):
    data = folder(images)
    source = data_lib.open_source(data)
    files = data_lib.find_images(images)
    found = data_lib.read_images(files, data)
    assert found.dtype == np.uint8 and found.shape == (6, 8, 8, 3)
    trained = [*source.read("train", np.arange(4)), *source.read("test", np.arange(2))]
    assert sorted(image.tobytes() for image in found) == sorted(x.tobytes() for x in trained)
    grey = dataclasses.replace(data, channels=1, mean=(0.5,), std=(0.5,))
    assert data_lib.read_images([], grey).shape == (0, 8, 8, 1)
    (images / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cat/1\.png cannot be read as an image"):
        data_lib.read_images(list(map(str, files)), data)
