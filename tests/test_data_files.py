"""Sets of images from the disk, sources, augmentations and labels.

The files are made here byte by byte, from the descriptions of their formats, so that
the readers are compared with something else than themselves.
"""

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdegen.data import (
    ImageFolder,
    array_records,
    cifar10,
    compose,
    fashion_mnist,
    flip,
    mnist,
    one_hot,
    shift,
)

# -- files of the formats --------------------------------------------------------------


def idx(values):
    head = struct.pack(">BBBB", 0, 0, 8, values.ndim)
    return head + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def ink(n, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (n, 28, 28), np.uint8)
    return images, random.integers(0, 10, n).astype(np.uint8)


def write_ink(folder, split, images, labels, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{split}-{kind}-ubyte"
        if zipped:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(values)))
        else:
            path.write_bytes(idx(values))


def short(text):
    return b"U" + bytes([len(text)]) + text


def pickled_array(values, kind=b"u1"):
    """A uint8 array as cPickle of Python 2 wrote it, protocol 2."""
    shape = b"".join(b"J" + struct.pack("<i", n) for n in values.shape)
    data = values.tobytes()
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85"
        + (short(b"b") + b"\x87R(K\1" + shape + b"\x86cnumpy\ndtype\n" + short(kind))
        + (b"K\0K\1\x87R(K\3" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff")
        + (b"K\0tb\x89T" + struct.pack("<i", len(data)) + data + b"tb")
    )


def cifar_batch(images, labels):
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    values = b"](" + b"".join(b"K" + bytes([k]) for k in labels) + b"e"
    entries = short(b"data") + pickled_array(planes) + short(b"labels") + values
    return b"\x80\x02}(" + entries + b"u."


@pytest.fixture(scope="module")
def photos():
    random = np.random.default_rng(1)
    return {
        name: (
            random.integers(0, 256, (2, 32, 32, 3), np.uint8),
            random.integers(0, 10, 2),
        )
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    }


@pytest.fixture
def cifar_folder(tmp_path, photos):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, batch in photos.items():
        (folder / name).write_bytes(cifar_batch(*batch))
    (folder / "batches.meta").write_bytes(b"not read")
    return folder


def same(got, images, labels):
    assert got[0].dtype == np.uint8 and got[1].dtype == np.int32
    np.testing.assert_array_equal(got[0], images)
    np.testing.assert_array_equal(got[1], labels)


# -- the sets --------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "read, folder", [(mnist, "mnist"), (fashion_mnist, "fashion-mnist")]
)
def test_idx_files_become_images_and_labels(tmp_path, read, folder, zipped):
    train, test = ink(5), ink(3, seed=1)
    write_ink(tmp_path / folder, "train", *train, zipped)
    write_ink(tmp_path / folder, "t10k", *test, zipped)
    same(read("train", tmp_path), train[0][..., None], train[1])
    same(read("test", tmp_path), test[0][..., None], test[1])
    same(read("test", tmp_path / folder), test[0][..., None], test[1])


def test_the_environment_and_the_layout_of_torchvision_are_found(tmp_path, monkeypatch):
    images, labels = ink(4)
    write_ink(tmp_path / "MNIST" / "raw", "train", images, labels, zipped=False)
    monkeypatch.setenv("SDEGEN_DATA", str(tmp_path))
    same(mnist(), images[..., None], labels)
    write_ink(tmp_path / "other" / "mnist", "train", *ink(2, seed=3))
    assert len(mnist(directory=tmp_path / "other")[0]) == 2


def test_npz_files_become_images_and_labels(tmp_path, photos):
    images, labels = ink(4)
    for name in ("mnist", "fashion-mnist", "cifar10"):
        (tmp_path / name).mkdir()
    for name in ("mnist", "fashion-mnist"):
        arrays = {"x_train": images, "y_train": labels, "x_test": 1, "y_test": 2}
        np.savez(tmp_path / name / f"{name}.npz", **arrays)
    same(mnist("train", tmp_path), images[..., None], labels)
    same(fashion_mnist("train", tmp_path), images[..., None], labels)
    images, labels = photos["test_batch"]
    arrays = {"x_test": images, "y_test": labels[:, None]}  # as Keras keeps them
    np.savez_compressed(tmp_path / "cifar10" / "cifar10.npz", **arrays)
    same(cifar10("test", tmp_path), images, labels)


def test_cifars_batches_are_read_from_the_folder_and_from_the_archive(
    tmp_path, cifar_folder, photos
):
    train = [photos[f"data_batch_{i}"] for i in range(1, 6)]
    images, labels = (np.concatenate(part) for part in zip(*train, strict=True))
    same(cifar10("train", tmp_path), images, labels)
    same(cifar10("test", tmp_path / "cifar10"), *photos["test_batch"])
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "cifar-10-python.tar.gz", "w:gz") as file:
        file.add(cifar_folder, "cifar-10-batches-py")
    same(cifar10("train", tmp_path / "packed"), images, labels)
    same(cifar10("test", tmp_path / "packed"), *photos["test_batch"])


def test_a_copy_is_kept_only_when_asked_for_and_follows_its_source(
    tmp_path, cifar_folder, photos
):
    # Every folder's entries, to see what is written: nothing but the cache.
    def everything():
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    before = everything()
    cifar10("test", tmp_path)
    assert everything() == before
    archive = tmp_path / "cifar10" / "cifar10.npz"
    images, labels = photos["test_batch"]
    os.rename(cifar_folder, tmp_path / "away")
    np.savez(archive, x_test=images, y_test=labels)
    same(cifar10("test", tmp_path, cache=tmp_path / "cache"), images, labels)
    (copy,) = (tmp_path / "cache").iterdir()
    # To see that the copy is what is read, it gets other values.
    np.savez(copy, x_test=255 - images, y_test=labels)
    same(cifar10("test", tmp_path, cache=tmp_path / "cache"), 255 - images, labels)
    np.savez(archive, x_test=images[:1], y_test=labels[:1])
    same(cifar10("test", tmp_path, cache=tmp_path / "cache"), images[:1], labels[:1])


def test_a_set_that_is_not_there_is_answered_with_the_places(tmp_path, monkeypatch):
    monkeypatch.delenv("SDEGEN_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="directory=.*SDEGEN_DATA"):
        mnist()
    with pytest.raises(FileNotFoundError) as caught:
        mnist("test", tmp_path)
    for part in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "mnist.npz"):
        assert part in str(caught.value)
    for folder in ("mnist", "MNIST/raw"):
        assert str(tmp_path / folder) in str(caught.value)
    monkeypatch.setenv("SDEGEN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere, which is no folder"):
        cifar10()
    with pytest.raises(ValueError, match='"train" or "test", got \'valid\''):
        fashion_mnist("valid", tmp_path)
    # Images alone are no set.
    write_ink(tmp_path / "mnist", "train", *ink(2))
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        mnist("train", tmp_path)


def test_mnist_is_not_taken_for_fashion(tmp_path):
    write_ink(tmp_path / "mnist", "train", *ink(2))
    with pytest.raises(FileNotFoundError, match="fashion-mnist"):
        fashion_mnist("train", tmp_path / "mnist")


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda data: data[:-7], "promises 3136 values .* 3129 follow"),
        (lambda data: data + b"\0", "promises 3136 values .* 3137 follow"),
        (lambda data: b"\0\0\x0d" + data[3:], "magic number 00000d03"),
        (lambda data: b"\x89PNG" + data[4:], "magic number 89504e47"),
        (lambda data: data[:9], "it ends after 9 bytes"),
        (lambda data: b"", "magic number"),
    ],
)
def test_a_damaged_idx_file_is_answered_with_a_sentence(tmp_path, spoil, sentence):
    write_ink(tmp_path / "mnist", "train", *ink(4), zipped=False)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{sentence}.*again"):
        mnist("train", tmp_path)


@pytest.mark.parametrize("cut", [200, 5, 0])
def test_a_truncated_gz_file_is_answered_with_a_sentence(tmp_path, cut):
    write_ink(tmp_path / "mnist", "train", *ink(4))
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
        mnist("train", tmp_path)


def test_counts_sizes_and_labels_that_do_not_fit_are_answered(tmp_path):
    images, labels = ink(4)
    write_ink(tmp_path / "mnist", "train", images, labels[:3])
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        mnist("train", tmp_path)
    write_ink(tmp_path / "mnist", "train", images[:, :20], labels)
    with pytest.raises(ValueError, match="20, 28, 1"):
        mnist("train", tmp_path)
    write_ink(tmp_path / "mnist", "train", images, labels + 10)
    with pytest.raises(ValueError, match="labels 1[0-9] to 1[0-9]"):
        mnist("train", tmp_path)


def test_a_damaged_npz_file_is_answered_with_a_sentence(tmp_path):
    path = tmp_path / "cifar10" / "cifar10.npz"
    path.parent.mkdir()
    np.savez(path, images=np.zeros(3))
    with pytest.raises(ValueError, match=r"x_train and y_train.*\['images'\]"):
        cifar10("train", tmp_path)
    np.savez(path, x_train=np.zeros((2, 32, 32, 3)), y_train=np.zeros(2, int))
    with pytest.raises(ValueError, match="found float64"):
        cifar10("train", tmp_path)
    np.savez_compressed(path, x_train=np.zeros((2, 32, 32, 3), np.uint8), y_train=[1])
    data = path.read_bytes()
    for spoiled in (data[: len(data) // 2], b"", b"text"):
        path.write_bytes(spoiled)
        with pytest.raises(ValueError, match="cifar10.npz cannot be read"):
            cifar10("train", tmp_path)
    np.savez(path, x_train=np.array([print], object), y_train=[1])
    with pytest.raises(ValueError, match="cifar10.npz cannot be read"):
        cifar10("train", tmp_path)


def test_a_pickle_that_asks_for_more_than_arrays_is_not_run(tmp_path, cifar_folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)  # posix.mkdir, or nt.mkdir

    for batch in (Evil(), {b"data": Evil(), b"labels": [1]}):
        (cifar_folder / "test_batch").write_bytes(pickle.dumps(batch, 3))
        with pytest.raises(ValueError, match=r"asks for \w+\.mkdir.*was not run"):
            cifar10("test", tmp_path)
    assert not (tmp_path / "was run").exists()
    other = b"\x80\x02}(" + short(b"data") + pickled_array(np.zeros(8), b"O8") + b"u."
    (cifar_folder / "test_batch").write_bytes(other)
    with pytest.raises(ValueError, match="an array of b'O8'"):
        cifar10("test", tmp_path)


def test_damaged_batches_of_cifar_are_answered_with_a_sentence(tmp_path, cifar_folder):
    path = cifar_folder / "test_batch"
    data = path.read_bytes()
    for spoiled in (data[:100], data[:-50], b"", b"\x80\x02}."):
        path.write_bytes(spoiled)
        with pytest.raises(ValueError, match="test_batch cannot be read"):
            cifar10("test", tmp_path)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    path.write_bytes(cifar_batch(images, [1]))
    with pytest.raises(ValueError, match=r"not \(n, 3072\) bytes, with labels"):
        cifar10("test", tmp_path)
    (cifar_folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="lacks data_batch_3.*data_batch_5"):
        cifar10("train", tmp_path)


def test_a_damaged_archive_of_cifar_is_answered_with_a_sentence(tmp_path, photos):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        data = cifar_batch(*photos["data_batch_1"])
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))
    with pytest.raises(FileNotFoundError, match="lacks data_batch_2, .*data_batch_5"):
        cifar10("train", tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="tar.gz cannot be read"):
        cifar10("train", tmp_path)


def test_the_real_sets_have_their_published_moments():
    if not os.environ.get("SDEGEN_DATA"):
        pytest.skip("SDEGEN_DATA is not set: the real sets are not here to be read")
    # Means and standard deviations as torchvision's and Zalando's pages give them.
    for read, mean, std in ((mnist, 0.1307, 0.3081), (fashion_mnist, 0.2860, 0.3530)):
        images, labels = read()
        assert images.shape == (60_000, 28, 28, 1)
        assert abs(images.mean() / 255 - mean) < 1e-4
        assert abs(images.std() / 255 - std) < 1e-4
        test, test_labels = read("test")
        assert test.shape == (10_000, 28, 28, 1)
        for found in (labels, test_labels):
            assert (np.unique(found) == np.arange(10)).all()


# -- folders of images -----------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Files of one colour each, their number in the red channel."""
    Image = pytest.importorskip("PIL.Image")
    names = ["b/2.png", "b/10.PNG", "a/x/deep.png", "a/1.png", "c c/.hidden.png"]
    for number, name in enumerate(names):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 7, 3), (number, 9, 200), np.uint8)).save(path)
    (tmp_path / "set" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "set" / ".cache").mkdir()
    return tmp_path / "set"


def test_a_folder_gives_images_and_classes_in_sorted_order(folder):
    source = ImageFolder(folder, 4)
    assert source.classes == ("a", "b", "c c") and len(source) == 4
    found = [(int(x[0, 0, 0]), label) for x, label in map(source.__getitem__, range(4))]
    assert found == [(3, 0), (2, 0), (1, 1), (0, 1)]
    assert source.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(source[1][0], np.full((4, 4, 3), (2, 9, 200)))
    (again,) = [pickle.loads(pickle.dumps(source))]
    np.testing.assert_array_equal(again[3][0], source[3][0])


def test_images_are_cropped_at_the_centre_and_averaged_down(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "k").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "k" / "wide.png")
    square = values[:, 2:6].astype(float)
    mean = square.reshape(2, 2, 2, 2, 3).mean((1, 3))
    got, label = ImageFolder(tmp_path, 2)[0]
    # Pillow averages the rows and then the columns, and rounds both.
    assert label == 0 and abs(got - mean).max() <= 1
    np.testing.assert_array_equal(ImageFolder(tmp_path, 4)[0][0], values[:, 2:6])
    enlarged = values[:, 2:6].repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(ImageFolder(tmp_path, 8)[0][0], enlarged)
    luma = square @ [0.299, 0.587, 0.114]  # ITU-R 601-2
    got = ImageFolder(tmp_path, 4, mode="L")[0][0]
    assert got.shape == (4, 4, 1) and abs(got[..., 0] - luma).max() < 1


def test_folders_that_cannot_be_used_are_answered_with_a_sentence(folder, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        ImageFolder(folder / "nothing", 4)
    with pytest.raises(FileNotFoundError, match="sub-folders: x.*one *sub-folder"):
        (folder / "c c" / "x").mkdir()
        ImageFolder(folder / "c c", 4)
    with pytest.raises(ValueError, match='"RGB" or "L", got 4 and .RGBA'):
        ImageFolder(folder, 4, mode="RGBA")
    path = folder / "a" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="1.png cannot be read as an image"):
        ImageFolder(folder, 4)[0]
    Image.fromarray(np.full((5, 7), 60_000, np.uint16)).save(path)
    with pytest.raises(ValueError, match="more than 8 bits"):
        ImageFolder(folder, 4)[0]
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pillow.*pip install 'sdegen\[data\]'"):
        ImageFolder(folder, 4)


# -- ArrayRecord -----------------------------------------------------------------------


def decode_record(record):
    return np.frombuffer(record[:-1], np.uint8), record[-1]


def test_records_come_in_the_order_of_the_files_and_decoded(tmp_path, monkeypatch):
    module = pytest.importorskip("array_record.python.array_record_module")
    values = np.random.default_rng(0).integers(0, 256, (7, 5), np.uint8)
    paths = [tmp_path / "second.arrayrecord", tmp_path / "first.arrayrecord"]
    for path, part in zip(paths, (values[:4], values[4:]), strict=True):
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for row in part:
            writer.write(row.tobytes())
        writer.close()
    source = array_records(paths, decode_record)
    assert len(source) == 7
    for i in (6, 0, 4, 3):
        x, label = source[i]
        assert x.tolist() == values[i, :4].tolist() and label == values[i, 4]
    x, label = pickle.loads(pickle.dumps(source))[5]
    assert [*x.tolist(), label] == values[5].tolist()
    assert len(array_records(paths[0], decode_record)) == 4
    with pytest.raises(FileNotFoundError, match="third.arrayrecord"):
        array_records([paths[0], tmp_path / "third.arrayrecord"], decode_record)
    with pytest.raises(FileNotFoundError, match="the list is empty"):
        array_records([], decode_record)
    monkeypatch.setitem(
        sys.modules, "array_record.python.array_record_data_source", None
    )
    with pytest.raises(ImportError, match=r"array_record.*install 'sdegen\[data\]'"):
        array_records(paths, decode_record)


# -- augmentations ---------------------------------------------------------------------


def picture(dtype=np.uint8):
    return np.random.default_rng(2).integers(0, 256, (6, 7, 3)).astype(dtype)


def augmented(augment, x, n):
    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(jax.jit(jax.vmap(augment, (0, None)))(keys, x))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_flip_mirrors_left_and_right_half_of_the_time(dtype):
    x, n = picture(dtype), 2000
    got = augmented(flip, x, n)
    assert got.dtype == dtype
    flipped = (got == x[:, ::-1]).all((1, 2, 3))
    assert (flipped | (got == x).all((1, 2, 3))).all()
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(n)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(
    "padding, mode", [("reflect", "reflect"), ("zero", "constant")]
)
def test_a_shift_moves_by_every_offset_equally_often(padding, mode, dtype):
    x, n = picture(dtype), 2500
    wide = np.pad(x, ((2, 2), (2, 2), (0, 0)), mode=mode)
    windows = {
        wide[i : i + 6, j : j + 7].tobytes(): (i, j) for i in range(5) for j in range(5)
    }
    got = augmented(shift(2, padding), x, n)
    assert got.dtype == dtype
    counts = np.zeros((5, 5))
    for image in got:
        counts[windows[image.tobytes()]] += 1
    p = 1 / 25
    assert abs(counts / n - p).max() < 5 * np.sqrt(p * (1 - p) / n)


def test_augmentations_are_functions_of_the_key_and_compose():
    x = picture()
    both = compose(flip, shift(2))
    for i in range(4):
        key = jax.random.key(i)
        one, two = (jax.random.fold_in(key, k) for k in range(2))
        np.testing.assert_array_equal(both(key, x), shift(2)(two, flip(one, x)))
    got = augmented(both, x, 200)
    assert len({image.tobytes() for image in got}) > 40  # of 50
    np.testing.assert_array_equal(compose()(jax.random.key(0), x), x)
    np.testing.assert_array_equal(shift(0)(jax.random.key(0), x), x)
    same = [jax.tree.flatten(compose(flip, shift(2))) for _ in range(2)]
    assert same[0] == same[1]  # so a step that takes one is compiled once


def test_augmentations_answer_with_a_sentence():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="one image .*jax.vmap"):
        flip(key, jnp.zeros((2, 4, 4, 1)))
    with pytest.raises(ValueError, match="no further than the image.*6 x 7"):
        shift(6)(key, picture())
    with pytest.raises(ValueError, match='"reflect" or "zero", got 2 and .wrap'):
        shift(2, "wrap")


# -- labels ----------------------------------------------------------------------------


def test_one_hot_is_the_identitys_row():
    labels = np.array([[0, 2], [3, 1]], np.int32)
    np.testing.assert_array_equal(one_hot(labels, 4), np.eye(4)[labels])
    np.testing.assert_array_equal(one_hot(2, 3), [0, 0, 1])
    assert one_hot(np.uint8(1), 2).dtype == np.float32
    for bad in (4, -1):
        with pytest.raises(ValueError, match="labels must be 0 to 3"):
            one_hot(np.array([0, bad]), 4)
    with pytest.raises(ValueError, match="integer labels"):
        one_hot(np.array([0.0]), 4)
