"""Preparing a stand-in: the checks in this process, the builder in its own.

The checks need no TensorFlow. The builder and the conversion of tfds do: those
tests are slow, and run the script in the environment that it makes.
"""

import contextlib
import io
import json
import logging
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import make_stand_in
import numpy as np
from PIL import Image
import prepare_imagenet
import pytest
from stand_ins import TIMEOUT

from bn_repro.data import imagenet_metadata, prepared
from bn_repro.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN, VALIDATION = prepare_imagenet.ARCHIVES
COMMAND = ('bash', str(ROOT / 'scripts/prepare_imagenet.sh'))
CLASSES = sorted(set(imagenet_metadata.validation_synsets()[:12]))


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
  """Twelve validation images, and three training images of each class."""
  folder = tmp_path_factory.mktemp('archives')
  make_stand_in.make_training_archive(folder / TRAIN, CLASSES, 3)
  make_stand_in.make_validation_archive(
    folder / VALIDATION, imagenet_metadata.validation_synsets()[:12]
  )
  return folder


@pytest.fixture(scope='module')
def tfrecord(archives, tmp_path_factory):
  """The archives as tfds prepares them by default."""
  make = (
    'import sys, tensorflow_datasets as tfds;'
    'b = tfds.builder("imagenet2012", data_dir=sys.argv[2]);'
    'b.download_and_prepare(download_config=tfds.download.DownloadConfig('
    'manual_dir=sys.argv[1], num_shards=2))'
  )
  old = tmp_path_factory.mktemp('tfrecord') / 'old'
  environment = (
    'source scripts/environment.sh; '
    'use_environment requirements-prepare.txt .venv-prepare'
  )
  for command in (
    ('bash', '-ec', environment),
    (ROOT / '.venv-prepare/bin/python', '-c', make, archives, old),
  ):
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
  return old


@pytest.fixture
def prepare(capsys):
  """Calls the script in this process; returns its exit code and output."""

  def call(*arguments):
    code = prepare_imagenet.main([str(a) for a in arguments])
    return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

  yield call
  logging.disable(logging.NOTSET)


def flags(source, data_dir, *, of='--manual_dir', stand_in=True):
  return (
    f'{of}={source}',
    f'--data_dir={data_dir}',
    *(['--stand_in'] if stand_in else []),
  )


def problem(result):
  """The one line on standard error that a mistake gets."""
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ')
  return line


def contents(archive):
  """Name and content of every image in an archive, also in archives in it."""
  found = {}
  with tarfile.open(fileobj=io.BytesIO(archive)) as members:
    for member in members:
      content = members.extractfile(member).read()
      inner = member.name.endswith('.tar')
      found |= contents(content) if inner else {member.name: content}
  return found


def assert_holds(data_dir, archives):
  """Training reads every image of the archives once, with its label."""
  labels = imagenet_metadata.synsets()
  of_validation = imagenet_metadata.validation_synsets()
  for split, archive in (('train', TRAIN), ('validation', VALIDATION)):
    expected = contents((archives / archive).read_bytes())
    for example in prepared.EncodedExamples('imagenet2012', split, data_dir):
      name = example['file_name']
      name = name.decode() if isinstance(name, bytes) else name
      assert example['image'] == expected.pop(name)
      if split == 'train':
        synset = name.split('_')[0]
      else:
        synset = of_validation[int(name[-13:-5]) - 1]
      assert labels[example['label']] == synset
    assert not expected
  assert 'tensorflow' not in sys.modules


def run_script(*arguments, limit=''):
  """Runs the script, under a limit of the shell such as `ulimit -n 100`."""
  return subprocess.run(
    ['bash', '-c', f'{limit}\nexec "$@"', 'bash', *COMMAND, *arguments],
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
    check=False,
  )


def assert_failures_leave_nothing(data_dir, begun, *arguments):
  """Fails with a full disk, then by two signals once files match `begun`."""
  folder = data_dir / 'imagenet2012'
  # As on a full disk, no file can be larger than 300 kB.
  line = problem(run_script(*arguments, limit='ulimit -f 300'))
  assert 'File too large' in line and 'Free space' in line
  assert str(data_dir) in line
  assert not list(folder.glob('*'))
  for number, left in ((signal.SIGINT, '*'), (signal.SIGKILL, '5*')):
    process = subprocess.Popen(
      [*COMMAND, *arguments],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    while not list(folder.glob(begun)):
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=TIMEOUT)
    if number == signal.SIGINT:
      assert process.returncode == 1 and stderr.startswith('error: interrupted')
    assert not list(folder.glob(left))


def test_interruption_that_a_library_hides(monkeypatch, prepare, tmp_path):
  def interrupted(flags):
    with contextlib.suppress(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    raise UserError('initialization failed')

  monkeypatch.setattr(prepare_imagenet, 'run', interrupted)
  line = problem(prepare(*flags(tmp_path, tmp_path)))
  assert line.startswith('error: interrupted')


@pytest.mark.slow
def test_archives_are_prepared(archives, tfrecord, tmp_path, prepare):
  """The archives are where tfds would keep them; one has no labels."""
  manual_dir = tmp_path / 'downloads' / 'manual'
  shutil.copytree(archives, manual_dir)
  unused = manual_dir / 'ILSVRC2012_img_test.tar'
  with tarfile.open(unused, 'w') as archive:
    make_stand_in.add(archive, 'ILSVRC2012_test_00000001.JPEG', b'x')
  arguments = flags(manual_dir, tmp_path)
  assert_failures_leave_nothing(tmp_path, 'incomplete.*_5*', *arguments)
  result = run_script(*arguments)
  assert result.returncode == 0, result.stderr
  assert result.stderr == ''
  assert 'WARNING' not in result.stdout
  assert f'{unused}: not used' in result.stdout
  assert f'{3 * len(CLASSES)} train images' in result.stdout
  assert '12 validation images' in result.stdout
  assert_holds(tmp_path, archives)
  for path in archives.iterdir():
    assert (manual_dir / path.name).read_bytes() == path.read_bytes()
  assert unused.is_file()
  folder = tmp_path / 'imagenet2012'
  assert [path.name for path in folder.iterdir()] == ['5.1.0']
  info = json.loads((folder / '5.1.0' / 'dataset_info.json').read_text())
  assert {s['name'] for s in info['splits']} == {'train', 'validation'}
  result = prepare(*arguments)
  assert result.returncode == 0 and 'prepared already' in result.stdout


@pytest.mark.slow
def test_tfrecord_is_converted(archives, tfrecord, tmp_path, prepare):
  line = problem(prepare(*flags(archives, tfrecord)))
  assert f'--from_tfrecord={tfrecord}' in line
  new = tmp_path / 'new'
  arguments = flags(tfrecord, new, of='--from_tfrecord')
  assert_failures_leave_nothing(new, 'being_converted', *arguments)
  result = run_script(*arguments)
  assert result.returncode == 0, result.stderr
  assert f'{12 + 3 * len(CLASSES)} images: up to ' in result.stdout
  assert 'GB at the end, about 0.0 hours' in result.stdout
  assert_holds(new, archives)
  line = problem(prepare(*flags(new, tmp_path / 'newer', of='--from_tfrecord')))
  assert 'is ArrayRecord already' in line


def test_incomplete_tfrecord(tmp_path):
  """Lengths of splits and shards, without what tfds writes."""
  folder = tmp_path / 'imagenet2012' / '5.1.0'
  folder.mkdir(parents=True)

  def describe(train, num_validation=50_000):
    lengths = {'train': train, 'validation': [num_validation]}
    splits = [{'name': n, 'shardLengths': v} for n, v in lengths.items()]
    (folder / 'dataset_info.json').write_text(json.dumps({'splits': splits}))

  def check(*, stand_in=False):
    return prepare_imagenet.check_tfrecord(tmp_path, stand_in=stand_in)

  for name in ('train', 'validation'):
    (folder / f'imagenet2012-{name}.tfrecord-00000-of-00001').touch()
  describe([1_281_167])
  assert check() == (folder, 1_331_167)
  for train, num_validation, expected in (
    ([1_281_166], 50_000, '1,281,166 train images, not 1,281,167'),
    ([1_281_167], 49_999, '49,999 validation images, not 50,000'),
    ([1_281_166, 1], 50_000, '1 TFRecord files of train, not 2'),
  ):
    describe(train, num_validation)
    with pytest.raises(UserError, match=expected):
      check()
  describe([12], 3)
  assert check(stand_in=True) == (folder, 15)
  describe([12], 0)
  with pytest.raises(UserError, match='0 validation images'):
    check(stand_in=True)
  folder.rename(folder.with_name('5.0.0'))
  with pytest.raises(UserError, match='found version 5.0.0'):
    check()


@pytest.mark.slow
def test_unusable_tfrecord(tfrecord, tmp_path, prepare):
  old, new = shutil.copytree(tfrecord, tmp_path / 'old'), tmp_path / 'new'
  arguments = flags(old, new, of='--from_tfrecord')
  line = problem(prepare(*arguments[:2]))
  assert 'train images, not 1,281,167' in line
  folder = old / 'imagenet2012' / '5.1.0'
  shard = folder / 'imagenet2012-train.tfrecord-00001-of-00002'
  raw = bytearray(shard.read_bytes())
  raw[len(raw) // 2] ^= 1
  shard.write_bytes(raw)
  line = problem(run_script(*arguments))
  assert str(folder) in line and 'copy it again' in line
  shard.unlink()
  line = problem(prepare(*arguments))
  assert '1 TFRecord files of train, not 2' in line
  folder.rename(folder.with_name('5.0.0'))
  line = problem(prepare(*arguments))
  assert 'found version 5.0.0' in line and '--manual_dir' in line
  line = problem(prepare(*flags(folder.parent, new, of='--from_tfrecord')))
  assert 'choose the folder that contains imagenet2012/5.1.0' in line
  assert not list(new.glob('imagenet2012/*'))


@pytest.mark.parametrize(
  ('size', 'factor', 'fits'),
  [
    (1e9, prepare_imagenet.SPACE_OVER_ARCHIVES, True),
    (1.01e9, prepare_imagenet.SPACE_OVER_ARCHIVES, False),
    (2e9, prepare_imagenet.SPACE_OVER_TFRECORD, True),
    (2.01e9, prepare_imagenet.SPACE_OVER_TFRECORD, False),
  ],
)
def test_room_that_is_needed(size, factor, fits, tmp_path, monkeypatch, capsys):
  """Of 2.1 GB: archives take 2.1 times their size, TFRecord files 1.05."""
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda _: usage._replace(free=2.1e9)
  )
  with (
    contextlib.nullcontext()
    if fits
    else pytest.raises(UserError, match=r'2\.100 GB of disk are free')
  ):
    prepare_imagenet.check_space(tmp_path, size, factor, 1_080_000, 300)
  assert '1,080,000 images' in (said := capsys.readouterr().out)
  assert 'about 1.0 hours' in said


@pytest.mark.slow
def test_no_room(archives, tfrecord, tmp_path, monkeypatch):
  """It is known before anything is written."""
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda _: usage._replace(free=10**6)
  )
  for call, arguments in (
    (prepare_imagenet.prepare, (tmp_path, archives)),
    (prepare_imagenet.convert, (tfrecord, tmp_path)),
  ):
    with pytest.raises(UserError, match=r'0\.001 GB .* are free.* Free space'):
      call(*arguments, stand_in=True)
    assert not list(tmp_path.iterdir())


def write_copy(
  data_dir, num_train=40, num_validation=10, num_shards=4, **splits
):
  """A prepared copy; short texts, which nobody decodes, replace the JPEGs."""
  default = {
    'train': [
      (f'n01440764_{i}.JPEG', 0, b'train %d' % i) for i in range(num_train)
    ],
    'validation': validation(
      b'validation %d' % i for i in range(num_validation)
    ),
  }
  return make_stand_in.write_prepared(
    data_dir, {**default, **splits}, num_shards
  )


def validation_name(number):
  return f'ILSVRC2012_val_{number:08}.JPEG'


def validation(contents):
  return [
    (validation_name(i), 0, content) for i, content in enumerate(contents, 1)
  ]


@pytest.mark.parametrize(
  'damage',
  [
    lambda raw: raw[:-1000],
    lambda raw: raw.replace(b'train 40', b'train 4X'),
  ],
)
def test_damaged_shard(tmp_path, damage, prepare):
  """Some damage shows when the shard is opened, some when an image is read."""
  folder = write_copy(tmp_path, num_train=41)
  shard = imagenet_metadata.shard_path(folder, 'train', 3, 4)
  shard.write_bytes(damage(shard.read_bytes()))
  line = problem(prepare(*flags(tmp_path, tmp_path)))
  assert line.startswith(f'error: {shard}: damaged')
  assert 'Copy it again' in line


@pytest.mark.parametrize(
  'text, expected', [(None, 'no dataset_info.json'), ('{', 'cannot be read')]
)
def test_copy_without_its_description(tmp_path, text, expected, prepare):
  path = write_copy(tmp_path) / 'dataset_info.json'
  path.unlink()
  if text:
    path.write_text(text)
  line = problem(prepare(*flags(tmp_path, tmp_path)))
  assert f'{path.parent}: ' in line and expected in line
  assert f'delete {path.parent}' in line and 'TFRecord' not in line


OWN = [b'validation %d' % i for i in range(200)]
TRAINED_ON = [b'train %d' % i for i in range(200)]


@pytest.mark.parametrize(
  ('expected', 'splits'),
  [
    (None, {'validation': validation([*TRAINED_ON[:2], *OWN[2:]])}),
    (
      '3 of 200 validation images are training images as well, byte for byte; '
      'expected at most 2.',
      {'validation': validation([*TRAINED_ON[:3], *OWN[3:]])},
    ),
    (
      '9 of 10 validation images repeat others',
      {'validation': validation(OWN[:1] * 10)},
    ),
    (
      '39 of 40 train images repeat others',
      {'train': [(f'n01440764_{i}.JPEG', 0, b'one') for i in range(40)]},
    ),
    (
      '40 train images have 39 different names',
      {
        'train': [(f'n01440764_{i % 39}.JPEG', 0, b'%d' % i) for i in range(40)]
      },
    ),
  ],
)
def test_repeated_images(expected, splits, tmp_path, prepare):
  """They are found by their content, whatever their names."""
  write_copy(tmp_path, 200, 200, **splits)
  result = prepare(*flags(tmp_path, tmp_path))
  if expected:
    assert expected in problem(result)
  else:
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_many_shards(tfrecord, tmp_path):
  """Each is kept open, as are the 1,088 of ImageNet."""
  write_copy(tmp_path, 150, 150, num_shards=150)
  arguments = flags(tmp_path, tmp_path)
  result = run_script(*arguments, limit='ulimit -S -n 128')
  assert result.returncode == 0, result.stderr
  line = problem(run_script(*arguments, limit='ulimit -n 128'))
  assert '700 open files' in line and 'limit is 128' in line
  assert 'ulimit -n 700' in line
  # For ImageNet itself it is known before the archives are read.
  empty = tmp_path / 'empty'
  empty.mkdir()
  arguments = flags(empty, empty, stand_in=False)
  line = problem(run_script(*arguments, limit='ulimit -n 1024'))
  assert '1,488 open files' in line


@pytest.mark.parametrize('place', ['file', 'file/below'])
def test_data_dir_that_is_no_folder(tmp_path, place, prepare):
  (tmp_path / 'file').write_text('')
  line = problem(prepare(*flags(tmp_path, tmp_path / place)))
  assert f'--data_dir={tmp_path / place}: ' in line and 'Choose a' in line


def truncate(archives):
  raw = (archives / TRAIN).read_bytes()
  (archives / TRAIN).write_bytes(raw[: len(raw) // 2 + 100])


def damage_a_class(archives):
  """Overwrites the header of an image in the archive of a class."""
  raw = bytearray((archives / TRAIN).read_bytes())
  raw[512 + 148 : 512 + 156] = b'notasum\0'
  (archives / TRAIN).write_bytes(raw)


def add_another(archive, name, kind=tarfile.REGTYPE):
  def add(archives):
    with tarfile.open(archives / archive, 'a') as tar:
      tar.addfile(member(name, kind))

  return add


def member(name, kind):
  """A member without content, a link to /etc/passwd if it is one."""
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, '/etc/passwd'
  return info


def add_class(*members):
  """Adds a class whose archive has these members."""

  def add(archives):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w') as of_class:
      for info in members:
        of_class.addfile(info)
    with tarfile.open(archives / TRAIN, 'a') as tar:
      make_stand_in.add(tar, f'{FREE}.tar', content.getvalue())

  return add


# A class that is not in the archives.
FREE = max(set(imagenet_metadata.synsets()) - set(CLASSES))
IMAGE = f'{FREE}_1.JPEG'


@pytest.mark.parametrize(
  ('damage', 'archive', 'expected'),
  [
    (
      lambda archives: (archives / VALIDATION).unlink(),
      VALIDATION,
      'from image-net.org',
    ),
    (truncate, TRAIN, 'Download it again'),
    (damage_a_class, TRAIN, f'{CLASSES[0]}.tar is damaged'),
    (
      add_another(VALIDATION, 'cat.JPEG'),
      VALIDATION,
      "'cat.JPEG', which does not belong",
    ),
    (add_another(TRAIN, 'cat.tar'), TRAIN, 'which does not belong'),
    (add_another(TRAIN, f'{CLASSES[0]}.tar'), TRAIN, 'or is repeated'),
    (
      add_another(TRAIN, f'{FREE}.tar', tarfile.SYMTYPE),
      TRAIN,
      f"'{FREE}.tar', which is not a regular file",
    ),
    (
      add_another(VALIDATION, validation_name(20), tarfile.LNKTYPE),
      VALIDATION,
      'is not a regular file',
    ),
    (
      add_another(VALIDATION, validation_name(20), tarfile.DIRTYPE),
      VALIDATION,
      'is not a regular file',
    ),
    (
      add_another(VALIDATION, validation_name(50_001)),
      VALIDATION,
      "50001.JPEG', which does not belong",
    ),
    (add_another(VALIDATION, validation_name(0)), VALIDATION, 'not belong'),
    (add_another(VALIDATION, validation_name(3)), VALIDATION, 'is repeated'),
    (
      add_another(VALIDATION, '../' + validation_name(20)),
      VALIDATION,
      'not belong',
    ),
    (
      add_class(*[member(IMAGE, tarfile.REGTYPE)] * 2),
      TRAIN,
      f"'{IMAGE}', which does not belong, or is repeated",
    ),
    (
      add_class(member(IMAGE, tarfile.SYMTYPE)),
      TRAIN,
      f"'{IMAGE}', which is not a regular file",
    ),
    (
      add_class(member(f'{FREE}_\n.JPEG', tarfile.REGTYPE)),
      TRAIN,
      r'_\n.JPEG',
    ),
  ],
)
def test_unusable_archives(
  damage, archive, expected, archives, tmp_path, prepare
):
  manual_dir = shutil.copytree(archives, tmp_path / 'archives')
  damage(manual_dir)
  line = problem(prepare(*flags(manual_dir, tmp_path / 'data')))
  assert str(manual_dir / archive) in line and expected in line
  assert not list(tmp_path.glob('data/imagenet2012/*'))


def test_archive_of_another_size(archives, tmp_path, prepare):
  result = prepare(*flags(archives, tmp_path, stand_in=False))
  line = problem(result)
  assert TRAIN in line and '147,897,477,120' in line


def test_stand_in_can_be_learnt():
  """Most images are nearer to the mean of their class than to another's."""

  def small(synset, number):
    image = Image.open(io.BytesIO(make_stand_in.picture(synset, number)))
    return np.asarray(image.resize((8, 8)), np.float64)

  synsets = imagenet_metadata.synsets()[:6]
  means = [
    np.mean([small(synset, number) for number in range(6)], 0)
    for synset in synsets
  ]
  right = 0
  for label, synset in enumerate(synsets):
    for number in range(6, 10):
      image = small(synset, number)
      distances = [np.linalg.norm(image - mean) for mean in means]
      right += np.argmin(distances) == label
  assert right > 20
