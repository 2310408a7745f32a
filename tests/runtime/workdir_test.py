"""The directory of a run: its lock, and files that are replaced as a whole."""

import pytest
import support

from bn_repro.errors import UserError
from bn_repro.runtime.workdir import (
  MetricsDigest,
  Workdir,
  check_metrics,
  read_json,
  replace_file,
  write_json,
)


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'status.json'
  replace_file(path, '{"old": 1}')

  def no_room(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('os.fsync', no_room)
  with pytest.raises(OSError, match='No space'):
    replace_file(path, '{"new": 2}')
  assert read_json(path) == {'old': 1}


@pytest.mark.parametrize(
  'content', [{'a': 1, 'b': [1.5e-300, 'é"\\n', None]}, {}, {'c': {'b': True}}]
)
def test_every_flipped_bit_of_a_file_is_noticed(content, tmp_path):
  """Or changes nothing, such as a space after a comma."""
  path = tmp_path / 'run.json'
  write_json(path, content)
  assert read_json(path) == content
  written, noticed = path.read_bytes(), 0
  for position in range(len(written)):
    for bit in range(8):
      flipped = bytearray(written)
      flipped[position] ^= 1 << bit
      path.write_bytes(flipped)
      try:
        assert read_json(path) == content, (position, bit)
      except UserError as error:
        assert str(path) in error.problems[0]
        noticed += 1
  assert noticed > 0.8 * 8 * len(written)


@pytest.mark.parametrize(
  'text, expected',
  [
    ('', 'not valid JSON'),
    ('{"a"', 'not valid JSON'),
    ('[' * 100_000, 'not valid JSON'),
    ('[1]', 'not a JSON object'),
    ('null', 'not a JSON object'),
    ('{"checksum": "sha256:0", "a": 1}', 'does not match its checksum'),
    ('{"checksum": null, "a": "sha256:0"}', 'does not match its checksum'),
  ],
)
def test_damaged_files_are_named(text, expected, tmp_path):
  path = tmp_path / 'run.json'
  path.write_text(text)
  with pytest.raises(UserError, match=expected) as caught:
    read_json(path)
  (problem,) = caught.value.problems
  assert problem.startswith(f'{path}: ') and 'delete it' in problem


def test_files_without_checksum_are_older(tmp_path):
  path = tmp_path / 'run.json'
  path.write_text('{"start_step": 0}')
  assert read_json(path) == {'start_step': 0}
  assert read_json(tmp_path / 'config.json') is None


LINES = [f'{{"step": {n}, "split": "train"}}\n'.encode() for n in range(3)]


@pytest.mark.parametrize(
  'found, expected',
  [
    (LINES[:2], None),
    (LINES, None),  # More may have been written since.
    ([*LINES[:2], b'{"step": 2'], None),
    (LINES[:1], 'has 1 lines, and should have at least 2'),
    ([], 'has 0 lines'),
    (None, 'has 0 lines'),
    (LINES[1:], 'first 2 lines are not those'),
    ([LINES[0], LINES[1].replace(b'1', b'9')], 'first 2 lines are not those'),
    ([LINES[0], LINES[1][:-1]], 'has 1 lines'),
  ],
)
def test_metrics_begin_with_the_recorded_lines(found, expected, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  if found is not None:
    path.write_bytes(b''.join(found))
  check_metrics(path, None)
  recorded = MetricsDigest(LINES[:2]).to_json()
  if expected is None:
    check_metrics(path, recorded)
    return
  with pytest.raises(UserError, match=expected) as caught:
    check_metrics(path, recorded)
  assert '--accept_lost_metrics' in caught.value.problems[0]


def test_lock_goes_with_the_process(tmp_path):
  hold = (
    'import sys, threading; from bn_repro.runtime.workdir import Workdir;'
    'w = Workdir(sys.argv[1]); w.claim(); print("held", flush=True);'
    'threading.Event().wait()'
  )
  process = support.start(str(tmp_path), program=('-c', hold))
  support.wait_for_line(process, 'held')
  with pytest.raises(UserError, match=f'in use by process {process.pid} on'):
    Workdir(str(tmp_path)).claim()
  support.kill(process)
  support.finish(process)
  workdir = Workdir(str(tmp_path))
  workdir.claim()
  workdir.release()


def test_a_directory_that_cannot_be_created():
  with pytest.raises(UserError, match='/proc/no/where: cannot be written'):
    Workdir('/proc/no/where').claim()


def test_release_leaves_no_empty_directory(tmp_path):
  workdir = Workdir(str(tmp_path / 'new' / 'run'))
  workdir.claim()
  workdir.release()
  assert not (tmp_path / 'new' / 'run').exists()
  workdir.claim()
  workdir.write_status('failed', 3, 'a reason')
  workdir.release()
  assert workdir.status() == {
    'status': 'failed',
    'step': 3,
    'reason': 'a reason',
  }


@pytest.mark.parametrize(
  'status, step, expected',
  [
    ('preempted', 5, True),
    # It lost another process before its first save.
    ('preempted', 0, False),
    ('running', 0, False),
    # The step that it had reached, not that of a checkpoint.
    ('failed', 5, False),
  ],
)
def test_what_tells_of_a_checkpoint(status, step, expected, tmp_path):
  workdir = Workdir(str(tmp_path))
  assert not workdir.has_saved()
  workdir.write_status(status, step, 'a reason')
  assert workdir.has_saved() == expected
  workdir.write_run({'start_step': 5})
  assert workdir.has_saved()


def test_starts_are_kept(tmp_path):
  workdir = Workdir(str(tmp_path))
  assert workdir.write_run({'start_step': 0}) is None
  assert workdir.write_run({'start_step': 5})['start_step'] == 0
  workdir.write_run({'start_step': 9})
  facts = read_json(tmp_path / 'run.json')
  assert facts['start_step'] == 9
  assert [start['start_step'] for start in facts['earlier_starts']] == [0, 5]
