"""The archives' road to ArrayRecord, by the real builder, on a stand-in."""

import io
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
from PIL import Image
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'scripts'))

import make_stand_in  # noqa: E402

from bn_repro import ilsvrc2012  # noqa: E402

pytestmark = pytest.mark.slow
TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
COMMAND = ['bash', str(ROOT / 'scripts/prepare_imagenet.sh')]


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
  """Twelve validation images, and three training images of each class."""
  folder = tmp_path_factory.mktemp('archives')
  synsets = ilsvrc2012.validation_synsets()[:12]
  classes = sorted(set(synsets))
  make_stand_in.make_training_archive(folder / TRAIN, classes, 3)
  make_stand_in.make_validation_archive(folder / VALIDATION, synsets)
  # The environment is made once, and not while something is timed.
  subprocess.run([*COMMAND, '--help'], check=True, capture_output=True)
  return folder


@pytest.fixture
def damaged(archives, tmp_path):
  """A copy of the archives, for a test to damage."""
  return shutil.copytree(archives, tmp_path / 'damaged')


def prepare(*arguments):
  return subprocess.run(
    [*COMMAND, '--stand_in', *arguments],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def contents(path):
  """Name to content of every image in an archive, or an archive in it."""
  found = {}
  with tarfile.open(path) as archive:
    for member in archive:
      content = archive.extractfile(member).read()
      if member.name.endswith('.tar'):
        with tarfile.open(fileobj=io.BytesIO(content)) as inner:
          for image in inner:
            found[image.name] = inner.extractfile(image).read()
      else:
        found[member.name] = content
  return found


def prepared(data_dir, split):
  """Examples as training will read them: without TensorFlow."""
  import tensorflow_datasets as tfds

  return tfds.data_source(
    'imagenet2012',
    split=split,
    data_dir=data_dir,
    download=False,
    decoders={'image': tfds.decode.SkipDecoding()},
  )


def assert_holds(data_dir, archives):
  """Every image of the archives, once, with its label."""
  labels = ilsvrc2012.synsets()
  of_validation = ilsvrc2012.validation_synsets()
  for split, archive in (('train', TRAIN), ('validation', VALIDATION)):
    expected = contents(archives / archive)
    source = prepared(data_dir, split)
    assert len(source) == len(expected)
    for example in source:
      name = example['file_name']
      name = name.decode() if isinstance(name, bytes) else name
      assert example['image'] == expected.pop(name)
      synset = (
        name.split('_')[0]
        if split == 'train'
        else of_validation[int(name[-13:-5]) - 1]
      )
      assert labels[example['label']] == synset
    assert not expected
  assert 'tensorflow' not in sys.modules


def test_killed_and_run_again(archives, tmp_path):
  data_dir = tmp_path / 'data'
  arguments = (f'--manual_dir={archives}', f'--data_dir={data_dir}')
  process = subprocess.Popen(
    [*COMMAND, '--stand_in', *arguments],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  while not list(data_dir.glob('imagenet2012/incomplete.*')):
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not list(data_dir.glob('imagenet2012/5*'))
  result = prepare(*arguments)
  assert result.returncode == 0, result.stderr
  count = 3 * len(set(ilsvrc2012.validation_synsets()[:12]))
  assert f'{count} train images' in result.stdout
  assert '12 validation images' in result.stdout
  assert_holds(data_dir, archives)
  assert not list(data_dir.glob('imagenet2012/incomplete.*'))
  again = prepare(*arguments)
  assert again.returncode == 0
  assert 'prepared already' in again.stdout


def test_tfrecord_is_converted(archives, tmp_path):
  make = (
    'import sys, tensorflow_datasets as tfds;'
    'b = tfds.builder("imagenet2012", data_dir=sys.argv[2]);'
    'b.download_and_prepare(download_config=tfds.download.DownloadConfig('
    'manual_dir=sys.argv[1], num_shards=2))'
  )
  old, new = tmp_path / 'old', tmp_path / 'new'
  python = ROOT / '.venv-prepare/bin/python'
  subprocess.run(
    [python, '-c', make, archives, old], check=True, capture_output=True
  )
  refused = prepare(f'--manual_dir={archives}', f'--data_dir={old}')
  assert refused.returncode == 1
  assert f'--from_tfrecord={old}' in refused.stderr
  result = prepare(f'--from_tfrecord={old}', f'--data_dir={new}')
  assert result.returncode == 0, result.stderr
  assert_holds(new, archives)


def refused(manual_dir, data_dir, *arguments):
  """The one line that a mistake gets; nothing is prepared."""
  result = subprocess.run(
    [
      *COMMAND,
      f'--manual_dir={manual_dir}',
      f'--data_dir={data_dir}',
      *arguments,
    ],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert result.returncode == 1
  assert not list(Path(data_dir).glob('imagenet2012/*'))
  (line,) = (
    line for line in result.stderr.splitlines() if line.startswith('error')
  )
  assert 'Traceback' not in result.stderr
  return line


def test_missing_archive(damaged, tmp_path):
  (damaged / VALIDATION).unlink()
  line = refused(damaged, tmp_path / 'data', '--stand_in')
  assert VALIDATION in line and 'image-net.org' in line


def test_archive_of_another_size(archives, tmp_path):
  line = refused(archives, tmp_path / 'data')
  assert TRAIN in line and '147,897,477,120' in line


def test_truncated_archive(damaged, tmp_path):
  raw = (damaged / TRAIN).read_bytes()
  (damaged / TRAIN).write_bytes(raw[: len(raw) // 2 + 100])
  line = refused(damaged, tmp_path / 'data', '--stand_in')
  assert TRAIN in line and 'Download it again' in line


def test_archive_that_holds_something_else(damaged, tmp_path):
  with tarfile.open(damaged / VALIDATION, 'a') as archive:
    make_stand_in.add(archive, 'cat.JPEG', b'')
  line = refused(damaged, tmp_path / 'data', '--stand_in')
  assert 'cat.JPEG, which does not belong' in line


def test_stand_in_can_be_learnt():
  """Pictures of one class are nearer to one another than to another's."""

  def small(synset, number):
    image = Image.open(io.BytesIO(make_stand_in.picture(synset, number)))
    return np.asarray(image.resize((8, 8)), np.float64)

  means = {
    synset: np.mean([small(synset, number) for number in range(10)], 0)
    for synset in ilsvrc2012.synsets()[:10]
  }
  right = 0
  for synset in means:
    for number in range(10, 15):
      distance = {
        other: np.linalg.norm(small(synset, number) - mean)
        for other, mean in means.items()
      }
      right += min(distance, key=distance.__getitem__) == synset
  assert right > 45
