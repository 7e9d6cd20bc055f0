from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unbackdoor.data import images as images_module
from unbackdoor.data import load_images, load_samples
from unbackdoor.data.labels import in_order
from unbackdoor.errors import InvalidInputError, MissingDependencyError
from unbackdoor.types import LabelledImages


def put(path: Path, level: int = 0, size: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), level, dtype=np.uint8)).save(path)


def levels(images: torch.Tensor) -> list[int]:
    return [int(value) for value in images[:, 0, 0, 0]]


def image_folder(root: Path) -> Path:
    put(root / "dog" / "b.png", 20)
    put(root / "dog" / "a.bmp", 10)
    put(root / "cat" / "x.PNG", 30)
    put(root / "owl" / "deeper" / "y.png", 40)
    return root


def split_folder(root: Path) -> Path:
    put(root / "train" / "cat" / "1.png", 1)
    put(root / "train" / "dog" / "2.png", 2)
    put(root / "val" / "dog" / "3.png", 3)
    put(root / "test" / "dog" / "4.png", 4)
    put(root / "test" / "cat" / "5.png", 5)
    return root


def zipped(folder: Path, path: Path, around: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, around + file.relative_to(folder).as_posix())
    return path


def source(root: Path, kind: str, make: str) -> Path:
    folder = {"plain": image_folder, "splits": split_folder}[make](root / "set")
    if kind == "folder":
        return folder
    return zipped(folder, root / "set.zip", "around/" if kind == "wrapped zip" else "")


KINDS = pytest.mark.parametrize("kind", ["folder", "zip", "wrapped zip"])


@KINDS
def test_classes_are_the_sorted_folders(tmp_path: Path, kind: str) -> None:
    data = load_images(source(tmp_path, kind, "plain"))
    assert data.class_names == ("cat", "dog", "owl")
    assert data.labels.tolist() == [0, 1, 1, 2]
    assert levels(data.images) == [30, 10, 20, 40]


@KINDS
def test_source_without_splits(tmp_path: Path, kind: str) -> None:
    path = source(tmp_path, kind, "plain")
    assert len(load_images(path, split="train")) == len(load_images(path, split=None)) == 4
    with pytest.raises(InvalidInputError, match="has no split 'test', it has no splits"):
        load_images(path, split="test")


@KINDS
def test_splits_share_the_numbers_of_the_classes(tmp_path: Path, kind: str) -> None:
    path = source(tmp_path, kind, "splits")
    train, val, test = (load_images(path, split=split) for split in ("train", "validation", "test"))
    assert (levels(train.images), train.labels.tolist()) == ([1, 2], [0, 1])
    assert (levels(val.images), val.labels.tolist()) == ([3], [1])
    assert (levels(test.images), test.labels.tolist()) == ([5, 4], [0, 1])
    assert val.class_names == ("cat", "dog")
    assert levels(load_images(path, split=None).images) == [1, 2, 3, 5, 4]


def test_absent_split_lists_the_others(tmp_path: Path) -> None:
    split_folder(tmp_path)
    with pytest.raises(InvalidInputError, match="no split 'extra', it has the splits train, val, test"):
        load_images(tmp_path, split="extra")


def test_single_split_folder_in_a_zip_is_not_taken_for_a_wrapper(tmp_path: Path) -> None:
    put(tmp_path / "set" / "test" / "cat" / "1.png")
    path = zipped(tmp_path / "set", tmp_path / "set.zip")
    assert load_images(path, split="test").class_names == ("cat",)
    with pytest.raises(InvalidInputError, match="it has the splits test"):
        load_images(path)


def test_hidden_and_foreign_files_are_ignored(tmp_path: Path) -> None:
    image_folder(tmp_path / "set")
    for name in (".git/x.png", "dog/._b.png", "__MACOSX/dog/b.png"):
        put(tmp_path / "set" / name)
    (tmp_path / "set" / "dog" / "notes.txt").write_text("no image")
    put(tmp_path / "set" / "banner.png")
    assert len(load_images(tmp_path / "set")) == 4
    assert len(load_images(zipped(tmp_path / "set", tmp_path / "set.zip"))) == 4


def test_flat_folder_says_what_layout_is_needed(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    with pytest.raises(
        InvalidInputError, match="holds 1 images and none in a class folder; it needs one sub-folder"
    ):
        load_images(tmp_path)


def test_empty_folder_says_what_layout_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds 0 images"):
        load_images(tmp_path)


def test_split_without_class_folders(tmp_path: Path) -> None:
    put(tmp_path / "train" / "1.png")
    with pytest.raises(InvalidInputError, match="train holds no images in class folders"):
        load_images(tmp_path)


def test_empty_class_folder_keeps_the_numbers(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "crow").mkdir()
    data = load_images(tmp_path)
    assert data.class_names == ("cat", "crow", "dog", "owl")
    assert data.labels.tolist() == [0, 2, 2, 3]


def test_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "list.csv").write_text("a")
    with pytest.raises(InvalidInputError, match=r"files but no images \(meta\)"):
        load_images(tmp_path)


def test_splits_beside_other_folders_are_refused(tmp_path: Path) -> None:
    split_folder(tmp_path)
    put(tmp_path / "extras" / "1.png")
    with pytest.raises(
        InvalidInputError, match=r"mixes split folders \(test, train, val\) with others \(extras\)"
    ):
        load_images(tmp_path)


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    put(tmp_path / "train" / "1.png")
    put(tmp_path / "tram" / "2.png")
    assert load_images(tmp_path).class_names == ("train", "tram")


def test_class_that_the_training_split_lacks(tmp_path: Path) -> None:
    split_folder(tmp_path)
    put(tmp_path / "test" / "owl" / "1.png")
    with pytest.raises(
        InvalidInputError, match=r"test has class folders that the training split lacks \(owl\)"
    ):
        load_images(tmp_path, split="test")
    assert len(load_images(tmp_path)) == 2


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    image_folder(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    put(tmp_path / "set" / "cat" / "1.png")
    (tmp_path / "set" / "cat" / "loop").symlink_to(tmp_path / "set")
    assert load_images(tmp_path / "set").labels.tolist() == [0, 1, 1]


def test_folders_that_are_linked_twice_are_read_twice(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.png")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert load_images(tmp_path).labels.tolist() == [0, 1]
    image_folder(tmp_path / "set" / "train")
    (tmp_path / "set" / "test").symlink_to(tmp_path / "set" / "train")
    assert len(load_images(tmp_path / "set")) == len(load_images(tmp_path / "set", split="test")) == 4


def test_links_among_folders_end(tmp_path: Path) -> None:
    # Each folder links to the next one twice: 2^30 paths.
    for level in range(30):
        place = tmp_path / f"level{level}"
        place.mkdir()
        for name in ("one", "two"):
            (place / name).symlink_to(tmp_path / f"level{level + 1}")
    (tmp_path / "level30").mkdir()
    put(tmp_path / "set" / "cat" / "1.png")
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "level0")
    with pytest.raises(InvalidInputError, match="more than 8 folders deep"):
        load_images(tmp_path / "set")


def test_names_that_are_no_unicode_can_be_reported(tmp_path: Path) -> None:
    put(tmp_path / os.fsdecode(b"caf\x82") / "1.png")
    put(tmp_path / "dog" / "1.png")
    assert load_images(tmp_path).class_names == ("caf?", "dog")


@KINDS
def test_limit_decodes_only_the_chosen_images(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(12):
        put(tmp_path / "set" / f"class{index % 3}" / f"{index}.png", index)
    path = tmp_path / "set"
    if kind != "folder":
        path = zipped(path, tmp_path / "set.zip", "around/" if kind == "wrapped zip" else "")
    decoded: list[str] = []
    original = images_module._pixels

    def counting(encoded: bytes, name: str, size: int | None) -> np.ndarray:
        decoded.append(name)
        return original(encoded, name, size)

    monkeypatch.setattr(images_module, "_pixels", counting)
    data = load_images(path, limit=6)
    assert len(decoded) == 6
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_sizes_must_agree_or_be_given(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "1.png", size=4)
    put(tmp_path / "cat" / "2.png", size=5)
    with pytest.raises(InvalidInputError, match="4 x 4 and 5 x 5"):
        load_images(tmp_path)
    assert load_images(tmp_path, image_size=8).images.shape == (2, 3, 8, 8)


def test_class_names_give_the_order(tmp_path: Path) -> None:
    data = load_images(image_folder(tmp_path), class_names=["owl", "cat", "dog"])
    assert data.class_names == ("owl", "cat", "dog")
    assert data.labels.tolist() == [1, 2, 2, 0]


def test_class_names_that_differ_are_named(tmp_path: Path) -> None:
    image_folder(tmp_path)
    with pytest.raises(
        InvalidInputError, match="missing in the data 'fox', not among the names 'dog', 'owl'"
    ):
        load_images(tmp_path, class_names=["cat", "fox"])
    with pytest.raises(InvalidInputError, match="several classes called 'crane'"):
        in_order(LabelledImages(torch.zeros(3, 1, 2, 2), torch.arange(3), ("crane", "cat", "crane")), ["cat"])
    with pytest.raises(InvalidInputError, match="'cat' are given twice"):
        load_images(tmp_path, class_names=["cat", "cat"])


def test_class_names_for_unnamed_classes(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((2, 4, 4), np.uint8), labels=[0, 2])
    assert load_images(path, class_names=["a", "b", "c", "d"]).class_names == ("a", "b", "c", "d")
    with pytest.raises(InvalidInputError, match="labels up to 2, but 2 class names"):
        load_images(path, class_names=["a", "b"])


@pytest.mark.parametrize(
    "option", [{"limit": 0}, {"image_size": 0}, {"image_size": -4}, {"image_size": 5000}]
)
def test_options_are_checked(tmp_path: Path, option: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=f"got {next(iter(option.values()))}"):
        load_images(tmp_path, limit=option.get("limit"), image_size=option.get("image_size"))


def test_unknown_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        load_images(tmp_path / "absent")
    (tmp_path / "x.tar").write_bytes(b"whatever")
    with pytest.raises(InvalidInputError, match="a file of an unknown kind; give an image folder"):
        load_images(tmp_path / "x.tar")


def numbered(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images_name", "labels_name"), [("images", "labels"), ("x", "y"), ("X", "Y"), ("data", "targets")]
)
def test_npz_names(tmp_path: Path, images_name: str, labels_name: str) -> None:
    pixels = numbered(3, 3, 5, 6)
    np.savez(
        tmp_path / "x.npz", allow_pickle=True, **{images_name: pixels, labels_name: np.array([[2], [0], [1]])}
    )
    data = load_images(tmp_path / "x.npz")
    assert np.array_equal(data.images.numpy(), pixels)
    assert data.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize("pattern", ["{0}_{1}", "{1}_{0}"])
def test_npz_splits(tmp_path: Path, pattern: str) -> None:
    arrays = {}
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        arrays[pattern.format("images", split)] = numbered(count, 4, 4)
        arrays[pattern.format("labels", split)] = np.arange(count)
    np.savez_compressed(tmp_path / "x.npz", allow_pickle=True, **arrays)
    sizes = [len(load_images(tmp_path / "x.npz", split=split)) for split in ("train", "val", "test", None)]
    assert sizes == [3, 2, 1, 6]
    with pytest.raises(InvalidInputError, match="it has the splits train, validation, test"):
        load_images(tmp_path / "x.npz", split="other")


def test_npz_under_another_name_is_known_by_its_content(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=numbered(2, 4, 4), labels=[0, 1])
    (tmp_path / "x.npz").rename(tmp_path / "x.bin")
    assert load_images(tmp_path / "x.bin").images.shape == (2, 1, 4, 4)


def test_npz_channels_last(tmp_path: Path) -> None:
    pixels = numbered(2, 5, 6, 3)
    np.savez(tmp_path / "x.npz", images=pixels, labels=[0, 1])
    assert np.array_equal(load_images(tmp_path / "x.npz").images.numpy(), pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(2, 5, 6, 4), (2, 3, 6, 3), (2, 30)])
def test_npz_unclear_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "x.npz", images=numbered(*shape), labels=[0, 1])
    with pytest.raises(InvalidInputError, match="channels is unclear"):
        load_images(tmp_path / "x.npz")


def test_npz_values_that_are_understood(tmp_path: Path) -> None:
    def read(pixels: np.ndarray) -> torch.Tensor:
        np.savez(tmp_path / "x.npz", images=pixels.reshape(1, 1, -1), labels=[0])
        return load_images(tmp_path / "x.npz").images.flatten()

    unit = read(np.array([0.0, 0.25, 1.0]))
    assert unit.dtype == torch.float32
    assert unit.tolist() == [0.0, 0.25, 1.0]
    whole = read(np.array([0.0, 7.0, 255.0]))
    assert whole.dtype == torch.uint8
    assert whole.tolist() == [0, 7, 255]
    assert read(np.array([0, 1, 255], dtype=np.int64)).tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    "values",
    [[-0.1, 1.0], [0.5, 200.0], [0.0, 256.0], [float("nan"), 0.5], [0.0, float("inf")], [-1, 5], [0, 256]],
)
def test_npz_values_that_are_not(tmp_path: Path, values: list[float]) -> None:
    np.savez(tmp_path / "x.npz", images=np.array(values).reshape(1, 1, 2), labels=[0])
    with pytest.raises(InvalidInputError, match="give whole numbers from 0 to 255, or floats"):
        load_images(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0], "expected one integer for each of the 2 entries"),
        ([0.0, 1.0], "expected one integer"),
        ([[0, 1], [1, 0]], "expected one integer"),
        ([0, -1], "labels from -1 to 0"),
    ],
)
def test_npz_labels_are_checked(tmp_path: Path, labels: list[object], message: str) -> None:
    np.savez(tmp_path / "x.npz", images=numbered(2, 4, 4), labels=np.array(labels))
    with pytest.raises(InvalidInputError, match=message):
        load_images(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "names",
    [
        ("images", "weights"),
        ("images",),
        ("x_train", "y_train", "x_test"),
        ("x", "images", "y"),
        ("x", "y", "x_test", "y_test"),
    ],
)
def test_npz_unclear_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    np.savez(tmp_path / "x.npz", allow_pickle=True, **dict.fromkeys(names, np.zeros(2)))
    with pytest.raises(InvalidInputError, match="array"):
        load_images(tmp_path / "x.npz")


def test_npz_limit_and_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=numbered(30, 4, 4), labels=np.arange(30) % 3)
    data = load_images(tmp_path / "x.npz", limit=6, image_size=8)
    assert data.images.shape == (6, 1, 8, 8)
    assert data.labels.bincount().tolist() == [2, 2, 2]


def test_digits_are_split_in_a_fixed_way() -> None:
    train, test, both = (load_images("digits", split=split) for split in ("train", "test", None))
    assert train.images.shape == (1297, 1, 16, 16)
    assert test.images.shape == (500, 1, 16, 16)
    assert len(both) == 1797
    assert int(train.images.max()) == 255
    assert 48 <= int(test.labels.bincount().min()) <= int(test.labels.bincount().max()) <= 52
    assert train.class_names == tuple("0123456789")
    assert torch.equal(test.images, load_images("digits", split="test").images)
    assert torch.equal(torch.cat([train.labels, test.labels]).bincount(), both.labels.bincount())


def test_digits_options() -> None:
    data = load_images("digits", image_size=8, limit=50, class_names=tuple("9876543210"))
    assert data.images.shape == (50, 1, 8, 8)
    assert data.class_names[0] == "9"
    with pytest.raises(InvalidInputError, match="'digits' has no split 'val', it has the splits train, test"):
        load_images("digits", split="val")


def test_digits_may_be_a_path_unless_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(load_images(Path("digits"), split="test")) == 500
    image_folder(tmp_path / "digits")
    assert len(load_images(Path("digits"))) == 4
    assert len(load_images("digits", split="test")) == 500


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"\[data\]"):
        load_images(tmp_path)


def test_samples_need_no_labels_and_have_names(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set")
    put(folder / "loose.png", 50)
    (folder / "notes.txt").write_text("no image")
    (folder / "dog" / "._a.bmp").write_bytes(b"left by another system")
    images, names = load_samples(folder)
    assert names == ("cat/x.PNG", "dog/a.bmp", "dog/b.png", "loose.png", "owl/deeper/y.png")
    assert levels(images) == [30, 10, 20, 50, 40]
    one, name = load_samples(folder / "dog" / "b.png", image_size=2)
    assert (one.shape, name) == ((1, 3, 2, 2), ("b.png",))


def test_a_split_of_samples_is_a_sub_folder(tmp_path: Path) -> None:
    folder = split_folder(tmp_path)
    images, names = load_samples(folder, split="test")
    assert (levels(images), names) == ([5, 4], ("cat/5.png", "dog/4.png"))
    with pytest.raises(InvalidInputError, match="no sub-folder 'nonsense'"):
        load_samples(folder, split="nonsense")


def test_samples_with_labels_are_named_by_their_row(tmp_path: Path) -> None:
    images, names = load_samples(zipped(image_folder(tmp_path / "set"), tmp_path / "set.zip"))
    assert len(images) == 4
    assert names == ("row 0", "row 1", "row 2", "row 3")


def test_what_is_no_sample_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="holds no images"):
        load_samples(tmp_path / "empty")
    put(tmp_path / "one.png")
    with pytest.raises(InvalidInputError, match="image_size must be"):
        load_samples(tmp_path / "one.png", image_size=-1)
