"""The archives' road to ArrayRecord, by the real builder, on a stand-in."""

import io
import json
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

ROOT = Path(__file__).resolve().parent.parent.parent
import make_stand_in
import prepare_imagenet

from bn_repro.data import imagenet_metadata

pytestmark = pytest.mark.slow
TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
COMMAND = ['bash', str(ROOT / 'scripts/prepare_imagenet.sh')]


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
  """Twelve validation images, and three training images of each class."""
  folder = tmp_path_factory.mktemp('archives')
  synsets = imagenet_metadata.validation_synsets()[:12]
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
  labels = imagenet_metadata.synsets()
  of_validation = imagenet_metadata.validation_synsets()
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
  while not list(data_dir.glob('imagenet2012/incomplete.*_5*')):
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not list(data_dir.glob('imagenet2012/5*'))
  result = prepare(*arguments)
  assert result.returncode == 0, result.stderr
  count = 3 * len(set(imagenet_metadata.validation_synsets()[:12]))
  assert f'{count} train images' in result.stdout
  assert '12 validation images' in result.stdout
  assert_holds(data_dir, archives)
  assert not list(data_dir.glob('imagenet2012/incomplete.*'))
  again = prepare(*arguments)
  assert again.returncode == 0
  assert 'prepared already' in again.stdout


@pytest.fixture(scope='module')
def tfrecord(archives, tmp_path_factory):
  """The archives as tfds prepares them unless told otherwise."""
  make = (
    'import sys, tensorflow_datasets as tfds;'
    'b = tfds.builder("imagenet2012", data_dir=sys.argv[2]);'
    'b.download_and_prepare(download_config=tfds.download.DownloadConfig('
    'manual_dir=sys.argv[1], num_shards=2))'
  )
  old = tmp_path_factory.mktemp('tfrecord') / 'old'
  python = ROOT / '.venv-prepare/bin/python'
  subprocess.run(
    [python, '-c', make, archives, old], check=True, capture_output=True
  )
  return old


def test_tfrecord_is_converted(archives, tfrecord, tmp_path):
  new = tmp_path / 'new'
  refused = prepare(f'--manual_dir={archives}', f'--data_dir={tfrecord}')
  assert refused.returncode == 1
  assert f'--from_tfrecord={tfrecord}' in refused.stderr
  result = prepare(f'--from_tfrecord={tfrecord}', f'--data_dir={new}')
  assert result.returncode == 0, result.stderr
  count = 12 + 3 * len(set(imagenet_metadata.validation_synsets()[:12]))
  assert f'{count} images: up to ' in result.stdout
  assert 'MB at the end, about a minute' in result.stdout
  assert_holds(new, archives)
  of_source = f'--from_tfrecord={new}'
  assert 'is ArrayRecord already' in problem(
    prepare(of_source, f'--data_dir={tmp_path / "newer"}')
  )


def test_tfrecord_of_another_version(tfrecord, tmp_path):
  old = shutil.copytree(tfrecord, tmp_path / 'old') / 'imagenet2012'
  (old / imagenet_metadata.VERSION).rename(old / '5.0.0')
  source = f'--from_tfrecord={old.parent}'
  line = problem(prepare(source, f'--data_dir={tmp_path / "new"}'))
  assert 'found version 5.0.0' in line and '--manual_dir' in line
  line = problem(prepare(f'{source}/imagenet2012', f'--data_dir={tmp_path}'))
  assert 'name the folder that holds imagenet2012/5.1.0' in line


@pytest.mark.parametrize('damage', ['missing', 'flipped', 'fewer images'])
def test_damaged_tfrecord(tfrecord, tmp_path, damage):
  old, new = shutil.copytree(tfrecord, tmp_path / 'old'), tmp_path / 'new'
  folder = old / 'imagenet2012' / imagenet_metadata.VERSION
  shard = folder / 'imagenet2012-train.tfrecord-00001-of-00002'
  arguments = [f'--from_tfrecord={old}', f'--data_dir={new}']
  if damage == 'missing':
    shard.unlink()
    assert '1 TFRecord files of train, not 2' in problem(prepare(*arguments))
  elif damage == 'flipped':
    flip_a_bit(shard)
    line = problem(prepare(*arguments))
    assert str(folder) in line and 'copy it again' in line
  else:
    result = run_command(*arguments)
    assert 'train images, not 1,281,167' in problem(result)
  assert not list(new.glob('imagenet2012/*'))


def problem(result):
  """The one line, and all of standard error, that a mistake gets."""
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ')
  return line


def flip_a_bit(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)


def run_command(*arguments, limit=''):
  """Runs it, under a limit of the shell's such as `ulimit -n 100`."""
  return subprocess.run(
    ['bash', '-c', f'{limit}\nexec "$@"', 'bash', *COMMAND, *arguments],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.mark.parametrize('source', ['archives', 'tfrecord'])
def test_full_disk(source, archives, tfrecord, tmp_path):
  """No file may be larger than 300 kB: writing fails as on a full disk."""
  data_dir = tmp_path / 'data'
  arguments = [
    '--stand_in',
    f'--data_dir={data_dir}',
    f'--from_tfrecord={tfrecord}'
    if source == 'tfrecord'
    else f'--manual_dir={archives}',
  ]
  line = problem(run_command(*arguments, limit='ulimit -f 300'))
  assert 'File too large' in line and 'Make room' in line
  assert str(data_dir) in line
  assert not list(data_dir.glob('imagenet2012/*'))
  result = run_command(*arguments)
  assert result.returncode == 0, result.stderr
  assert_holds(data_dir, archives)


def test_no_room(archives, tfrecord, tmp_path, monkeypatch):
  """Both roads say so before they write."""
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda _: usage._replace(free=10**6)
  )
  for call, source, arguments in (
    (prepare_imagenet.prepare, archives, (tmp_path, archives)),
    (prepare_imagenet.convert, tfrecord, (tfrecord, tmp_path, '5.1.0')),
  ):
    with pytest.raises(
      prepare_imagenet.UserError, match=r'1\.0 MB are free.* Make room'
    ):
      call(*arguments, stand_in=True)
    assert source.is_dir() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('source', 'begun'),
  [('archives', 'incomplete.*_5*'), ('tfrecord', 'being_converted')],
)
def test_interrupted(source, begun, archives, tfrecord, tmp_path):
  data_dir = tmp_path / 'data'
  process = subprocess.Popen(
    [
      *COMMAND,
      '--stand_in',
      f'--data_dir={data_dir}',
      f'--from_tfrecord={tfrecord}'
      if source == 'tfrecord'
      else f'--manual_dir={archives}',
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not list(data_dir.glob(f'imagenet2012/{begun}')):
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  result = subprocess.CompletedProcess([], process.returncode, '', stderr)
  assert 'interrupted' in problem(result)
  assert not list(data_dir.glob('imagenet2012/*'))


def test_archives_where_tfds_keeps_them(archives, tmp_path):
  """They are left alone, and an archive without labels is."""
  manual_dir = tmp_path / 'downloads' / 'manual'
  shutil.copytree(archives, manual_dir)
  unused = manual_dir / 'ILSVRC2012_img_test.tar'
  with tarfile.open(unused, 'w') as archive:
    make_stand_in.add(archive, 'ILSVRC2012_test_00000001.JPEG', b'x')
  result = prepare(f'--manual_dir={manual_dir}', f'--data_dir={tmp_path}')
  assert result.returncode == 0, result.stderr
  assert result.stderr == ''
  assert 'WARNING' not in result.stdout
  assert f'{unused}: not used' in result.stdout
  for path in archives.iterdir():
    assert (manual_dir / path.name).read_bytes() == path.read_bytes()
  assert unused.is_file()
  folder = tmp_path / 'imagenet2012'
  info = json.loads((folder / '5.1.0' / 'dataset_info.json').read_text())
  assert {s['name'] for s in info['splits']} == {'train', 'validation'}
  assert [path.name for path in folder.iterdir()] == ['5.1.0']


def write_copy(
  data_dir, num_train=40, num_validation=10, num_shards=4, **other
):
  """A prepared copy; of what is not decoded, in place of JPEGs."""
  splits = {
    'train': [
      (f'n01440764_{i}.JPEG', 0, b'train %d' % i) for i in range(num_train)
    ],
    'validation': [
      (f'ILSVRC2012_val_{i:08}.JPEG', 0, b'validation %d' % i)
      for i in range(1, num_validation + 1)
    ],
  }
  return make_stand_in.write_prepared(data_dir, {**splits, **other}, num_shards)


def verified(data_dir, *arguments, **limits):
  return run_command(
    f'--manual_dir={data_dir}', f'--data_dir={data_dir}', *arguments, **limits
  )


@pytest.mark.parametrize(
  ('damage', 'says'),
  [
    ('deleted', 'missing'),
    ('emptied', 'damaged'),
    ('truncated', 'damaged'),
    ('flipped', 'damaged'),
    ('of another', '10 images, not 11'),
  ],
)
def test_damaged_shard(archives, tmp_path, damage, says):
  folder = write_copy(tmp_path, num_train=41)
  shard = imagenet_metadata.shard_path(folder, 'train', 3, 4)
  raw = shard.read_bytes()
  if damage == 'deleted':
    shard.unlink()
  elif damage == 'emptied':
    shard.write_bytes(b'')
  elif damage == 'truncated':
    shard.write_bytes(raw[:-1000])
  elif damage == 'of another':
    shutil.copy(imagenet_metadata.shard_path(folder, 'train', 0, 4), shard)
  else:
    at = raw.index(b'train 40')
    shard.write_bytes(raw[:at] + b'X' + raw[at + 1 :])
  line = problem(verified(tmp_path, '--stand_in'))
  assert line.startswith(f'error: {shard}: ') and says in line
  assert 'Copy it again' in line


@pytest.mark.parametrize('damage', ['missing', 'damaged'])
def test_copy_without_its_description(archives, tmp_path, damage):
  path = write_copy(tmp_path) / 'dataset_info.json'
  if damage == 'missing':
    path.unlink()
  else:
    path.write_text('{')
  line = problem(verified(tmp_path, '--stand_in'))
  assert f'{path.parent}: ' in line and 'Delete it' in line
  assert damage == 'damaged' or 'dataset_info.json' in line
  assert 'TFRecord' not in line


def test_images_that_are_there_again(archives, tmp_path):
  """By content, under proper names."""

  def check(name, expected, **splits):
    result = verified(
      write_copy(tmp_path / name, 200, 200, **splits).parents[1], '--stand_in'
    )
    if expected:
      assert expected in problem(result)
    else:
      assert result.returncode == 0, result.stderr

  def validation(contents):
    return {
      'validation': [
        (f'ILSVRC2012_val_{i:08}.JPEG', 0, content)
        for i, content in enumerate(contents, 1)
      ]
    }

  own = [b'validation %d' % i for i in range(200)]
  trained_on = [b'train %d' % i for i in range(200)]
  check('few', None, **validation([*trained_on[:2], *own[2:]]))
  check(
    'more',
    '3 of 200 validation images are training images as well, byte for byte; '
    'expected at most 2.',
    **validation([*trained_on[:3], *own[3:]]),
  )
  check(
    'same validation',
    '9 of 10 validation images repeat others',
    **validation(own[:1] * 10),
  )
  check(
    'same train',
    '39 of 40 train images repeat others',
    train=[(f'n01440764_{i}.JPEG', 0, b'one') for i in range(40)],
  )
  check(
    'same name',
    '40 train images have 39 names',
    train=[(f'n01440764_{i % 39}.JPEG', 0, b'%d' % i) for i in range(40)],
  )


def test_many_shards(archives, tmp_path):
  """Of which each is kept open, as are the 1,088 of ImageNet."""
  write_copy(tmp_path, 150, 150, num_shards=150)
  result = verified(tmp_path, '--stand_in', limit='ulimit -S -n 128')
  assert result.returncode == 0, result.stderr
  line = problem(verified(tmp_path, '--stand_in', limit='ulimit -n 128'))
  assert '700 files' in line and '128 may' in line and 'ulimit -n 700' in line
  # Of ImageNet itself it is known before the archives are looked through.
  empty = tmp_path / 'empty'
  empty.mkdir()
  line = problem(verified(empty, limit='ulimit -n 1024'))
  assert '1,488 files' in line


@pytest.mark.parametrize('place', ['file', 'file/below'])
def test_data_dir_that_is_no_folder(archives, tmp_path, place):
  (tmp_path / 'file').write_text('')
  line = problem(
    prepare(f'--manual_dir={archives}', f'--data_dir={tmp_path / place}')
  )
  assert f'--data_dir={tmp_path / place}: ' in line and 'Name a folder' in line


def test_in_words():
  assert prepare_imagenet.bytes_in_words(147_897_477_120) == '147.9 GB'
  assert prepare_imagenet.bytes_in_words(45_188_120) == '45.2 MB'
  assert prepare_imagenet.time_in_words(1_331_167 / 300) == '1.2 hours'
  assert prepare_imagenet.time_in_words(3) == 'a minute'
  assert prepare_imagenet.time_in_words(150) == '3 minutes'


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
    for synset in imagenet_metadata.synsets()[:10]
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
