"""ImageNet-V2: new test images of ImageNet's classes (Recht et al., 2019).

`data.data_dir` is an extracted archive of github.com/modestyachts/ImageNetV2,
such as imagenetv2-matched-frequency-format-val: a folder for each label, named
0 to 999, with ten images each. It has the split `test` alone.
"""

from ml_collections import ConfigDict

from bn_repro import files
from bn_repro.data import folder, imagenet_metadata, jpeg
from bn_repro.data.split import Dataset


def load(data: ConfigDict) -> Dataset:
  """Opens the images.

  Args:
    data: the `data` sub-tree of a config.

  Raises:
    UserError: if a folder is missing or empty, or there are others.
  """
  jpeg.load_turbojpeg()
  root = files.expand_data_dir(
    data.data_dir,
    'data.name=imagenet_v2 needs the folder of an extracted archive. Pass '
    '--config.data.data_dir=FOLDER.',
  )
  labels = [str(label) for label in range(imagenet_metadata.NUM_CLASSES)]
  # Like ImageNet's own images, these are decoded as they are stored.
  split = folder.open_split('test', root, labels, data, as_shown=False)
  return Dataset(imagenet_metadata.class_names(), {'test': split})
