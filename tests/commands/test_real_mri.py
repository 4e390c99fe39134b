"""Real scans, where they lie beside the checkout: what preprocess makes of them."""

import nibabel as nib
import numpy as np

from mambahome_jax.commands import preprocess
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.flags import PreprocessConfig
from mambahome_jax.patches.store import Store


def test_hippocampus_is_stored_as_it_is(tmp_path, hippocampus):
    names = sorted(path.name for path in (hippocampus / "images").glob("*.nii.gz"))[:6]
    for kind in ("images", "labels"):
        (tmp_path / "in" / kind).mkdir(parents=True)
        for name in names:
            (tmp_path / "in" / kind / name).symlink_to(hippocampus / kind / name)
    config = PreprocessConfig(tmp_path / "in", tmp_path / "out", spacing=(1.0, 1.0, 1.0), modality="mr", num_workers=1)
    assert preprocess.run(config) == 0
    prepared, store = read_prepared(tmp_path / "out"), Store(tmp_path / "out" / "store")
    assert [f"{case.id}.nii.gz" for case in prepared.cases] == names
    assert set(prepared.labels) == {1, 2}
    for case, name in zip(prepared.cases, names, strict=True):
        # RAS at 1 mm already, so that nothing is to be resampled.
        image, label = (np.asarray(nib.load(hippocampus / kind / name).dataobj) for kind in ("images", "labels"))
        np.testing.assert_array_equal(store.read_image(case.id)[..., 0], image.astype(np.float32))
        np.testing.assert_array_equal(store.read_label(case.id), label)
        assert case.spacing == (1.0, 1.0, 1.0)
        assert store.entry(case.id).foreground_counts == {value: int((label == value).sum()) for value in (1, 2)}
