"""Images of a user: a folder for each class, and a file of arrays."""

import numpy as np
from PIL import Image

# In the order of their labels.
CLASSES = ('apple', 'zebra', 'Öl')


def pictures(count, shape=(24, 20, 3), seed=0):
  """Images, uint8 (count, *shape), and labels; classes differ in brightness."""
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % len(CLASSES)
  noise = rng.integers(0, 80, (count, *shape))
  levels = (85 * labels).reshape(-1, *(1 for _ in shape))
  return (levels + noise).astype(np.uint8), labels


def write_folder(folder, count, seed=0):
  """Writes `CLASS/NUMBER.png`; returns the images by these names."""
  images, labels = pictures(count, seed=seed)
  written = {}
  for number, (image, label) in enumerate(zip(images, labels, strict=True)):
    name = f'{CLASSES[label]}/{number}.png'
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / name)
    written[name] = image
  return written


def write_npz(path, count, **changes):
  """Writes `images` and `labels`, or what replaces them; returns both."""
  images, labels = pictures(count)
  arrays = {'images': images, 'labels': labels, **changes}
  np.savez(path, **{k: x for k, x in arrays.items() if x is not None})
  return images, labels
