"""The runner of trials, with small shell scripts in the place of training."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from stand_ins import TIMEOUT

from bn_repro.errors import TemporaryError, UserError
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.sweep import runner as runner_lib
from bn_repro.sweep.runner import TrialProcess

# What a trial's script may use: how often it has been started, where it writes.
PRELUDE = """
mkdir -p "$WORKDIR"
echo x >>"$WORKDIR/starts"
starts=$(wc -l <"$WORKDIR/starts")
step() {
  echo "{\\"step\\": $1, \\"split\\": \\"train\\"}" >>"$WORKDIR/metrics.jsonl"
}
"""


class Recorder(runner_lib.Progress):
  """Records events, and calls a function after some of them.

  Args:
    reactions: functions to call after an event.
  """

  def __init__(self, reactions=None):
    self.events = []
    self.most = 0
    self._running = set()
    self._reactions = reactions or {}

  def changed(self, trial):
    if trial.state == 'running':
      self._running.add(trial.name)
      self.most = max(self.most, len(self._running))
      self._add(('start', trial.name))
    elif trial.state == 'runs elsewhere':
      self._add(f'elsewhere {trial.name}')
    else:
      self._running.discard(trial.name)
      self._add((trial.code, trial.name))

  def stopping(self):
    self._add('stop')

  def _add(self, event):
    self.events.append(event)
    self._reactions.get(event, lambda: None)()


class FakePreemption:
  """A preemption; a test sets its signal."""

  signal = 0


@pytest.fixture
def create(tmp_path):
  def one(name, script):
    return TrialProcess(
      name=name,
      workdir=tmp_path / name,
      command=[
        'bash',
        '-c',
        f'WORKDIR={tmp_path / name}\n{PRELUDE}\n{script}',
      ],
      total_steps=10,
    )

  return one


def run(
  all_trials, jobs=2, retries=1, preemption=None, reactions=None, check=bool
):
  recorder = Recorder(reactions)
  runner = runner_lib.Runner(all_trials, [{}] * jobs, retries, recorder)
  finished = runner.run(preemption or FakePreemption(), check)
  return finished, recorder


def starts(trial):
  return len((trial.workdir / 'starts').read_text().splitlines())


def test_some_at_a_time_in_order(create):
  many = [create(f't{i}', 'sleep 0.2') for i in range(5)]
  finished, recorder = run(many)
  assert finished
  assert recorder.most == 2
  begun = [name for what, name in recorder.events if what == 'start']
  assert begun == [trial.name for trial in many]
  assert {trial.state for trial in many} == {workdir_lib.Status.DONE}
  assert all(trial.seconds >= 0.2 for trial in many)


@pytest.mark.parametrize(
  'script, retries, expected, count',
  [
    ('exit 0', 1, 'done', 1),
    ('exit 3', 1, 'diverged', 1),
    ('exit 1', 0, 'failed', 1),
    ('exit 1', 2, 'failed', 3),
    ('exit 9', 1, 'failed', 2),
    ('kill -KILL $$', 1, 'failed', 2),
    ('[ $starts -gt 1 ] || exit 75', 1, 'done', 2),
    ('[ $starts -gt 1 ] || kill -KILL $$', 1, 'done', 2),
    # Progress resets the count of failures.
    ('step $starts; [ $starts -gt 6 ] || exit 75', 1, 'done', 7),
    ('step $starts; [ $starts -gt 6 ] || kill -KILL $$', 1, 'done', 7),
    # Failures with progress do not count.
    ('step 5; exit 1', 1, 'failed', 3),
    ('step 5; exit 75', 0, 'preempted', 2),
  ],
)
def test_ends(script, retries, expected, count, create):
  trial, other = create('trial', script), create('other', 'exit 0')
  finished, _ = run([trial, other], retries=retries)
  assert finished == (expected != 'preempted')
  assert trial.state == expected
  assert starts(trial) == count
  assert other.state == workdir_lib.Status.DONE


def test_a_trial_whose_process_cannot_be_started(create):
  bad, good = create('bad', 'exit 0'), create('good', 'exit 0')
  bad.log.mkdir(parents=True)
  finished, recorder = run([bad, good], jobs=1)
  assert finished
  assert (bad.state, good.state) == ('failed', 'done')
  assert 'Is a directory' in bad.failure_reason()
  assert ('start', 'bad') not in recorder.events


def test_stopping_before_the_handler_is_installed(create):
  """The trial has saved nothing, but has not failed."""
  trial = create('trial', 'sleep 600')
  preemption = FakePreemption()
  ask = {
    ('start', 'trial'): lambda: setattr(preemption, 'signal', signal.SIGTERM)
  }
  finished, recorder = run([trial], preemption=preemption, reactions=ask)
  assert not finished
  assert trial.state == 'preempted'
  assert recorder.events[-1] == (-signal.SIGTERM, 'trial')


def test_stopping(create):
  """Running trials save; no further ones start."""
  script = (
    'trap "echo saved >>$WORKDIR/saved; exit 75" TERM; touch $WORKDIR/begun; '
    'sleep 600 & wait'
  )
  many = [create(f't{i}', script) for i in range(3)]
  preemption = FakePreemption()

  def ask():
    for trial in many[:2]:
      wait_for(trial.workdir / 'begun')
    preemption.signal = signal.SIGTERM

  threading.Thread(target=ask).start()
  finished, recorder = run(many, preemption=preemption)
  assert not finished
  assert recorder.events.count('stop') == 1
  assert [t.state for t in many] == ['preempted', 'preempted', 'waiting']
  for trial in many[:2]:
    assert (trial.workdir / 'saved').read_text() == 'saved\n'
  assert not many[2].workdir.exists()


def test_a_claim_that_is_lost(create):
  """Running trials save, and end before the sweep does."""
  script = (
    'trap "sleep 0.5; echo saved >>$WORKDIR/saved; exit 75" TERM; '
    'touch $WORKDIR/begun; sleep 600 & wait'
  )
  trial, next_one = create('t0', script), create('t1', script)

  def check():
    if (trial.workdir / 'begun').exists():
      raise TemporaryError('lost')

  with pytest.raises(TemporaryError, match='lost'):
    run([trial, next_one], jobs=1, check=check)
  assert (trial.workdir / 'saved').read_text() == 'saved\n'
  assert not next_one.workdir.exists()


def test_a_workdir_that_is_locked(create):
  """By another process: the other trials go first."""
  locked, free = create('locked', 'exit 0'), create('free', 'exit 0')
  holder = workdir_lib.Workdir(str(locked.workdir))
  holder.claim()
  assert runner_lib.is_locked(locked.workdir)
  _, recorder = run([locked, free], 1, reactions={(0, 'free'): holder.release})
  assert recorder.events == [
    'elsewhere locked',
    ('start', 'free'),
    (0, 'free'),
    ('start', 'locked'),
    (0, 'locked'),
  ]
  assert locked.state == workdir_lib.Status.DONE
  assert not runner_lib.is_locked(locked.workdir)


def test_a_lock_that_cannot_be_opened(create):
  """`main` reports it, so the runner does not wait."""
  trial = create('trial', 'exit 1')
  (trial.workdir / 'lock').mkdir(parents=True)
  assert not runner_lib.is_locked(trial.workdir)


RUNNER = """
import resource, sys
from pathlib import Path
from bn_repro.runtime.preemption import Preemption
from bn_repro.sweep import runner
folder, number, script = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
many = [
  runner.TrialProcess(f't{i}', folder / f't{i}', ['bash', '-c', script], 1)
  for i in range(number)
]
all_of_them = runner.Runner(many, [{}] * 20, 0, runner.Progress())
all_of_them.run(Preemption(), check=bool)
assert {trial.state for trial in many} == {'done'}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(
  sys.platform != 'linux', reason='only Linux sends signals to orphans'
)
def test_a_killed_runner_stops_its_trials(tmp_path):
  """They receive SIGTERM, and save."""
  script = (
    f'trap "echo saved >{tmp_path}/saved; exit 75" TERM; '
    f'echo >{tmp_path}/begun; sleep 600 & wait'
  )
  runner = subprocess.Popen(
    [sys.executable, '-c', RUNNER, str(tmp_path / 'runs'), '1', script]
  )
  wait_for(tmp_path / 'begun')
  runner.kill()
  runner.wait()
  wait_for(tmp_path / 'saved')


def test_memory_does_not_grow_with_trials(tmp_path):
  """Memory of the runner: with 20 times as many trials, within 2 MB."""
  few, many = (
    int(
      subprocess.run(
        [sys.executable, '-c', RUNNER, tmp_path / number, number, 'true'],
        capture_output=True,
        text=True,
        check=True,
      ).stdout
    )
    for number in ('20', '400')
  )
  assert many - few < 2000


def wait_for(path):
  give_up = time.monotonic() + TIMEOUT
  while not path.exists():
    assert time.monotonic() < give_up, path
    time.sleep(0.05)


def test_the_log_holds_all_output(create):
  """Its last line is the reason of a failure; the other trials go on."""
  bad = create('bad', 'echo "error: try $starts" >&2; exit 1')
  good = create('good', 'exit 0')
  finished, _ = run([bad, good], jobs=1)
  assert finished
  assert (bad.state, good.state) == ('failed', 'done')
  assert bad.log.read_text() == 'error: try 1\nerror: try 2\n'
  assert runner_lib.failures([bad, good]) == [
    f'bad: failed, see {bad.log}: error: try 2'
  ]


def test_the_environment_of_a_slot(create, tmp_path):
  """Trials that run at once have different devices."""
  script = """
    echo $GPU >$WORKDIR/gpu
    until [ -e $WORKDIR/../t0/gpu ] && [ -e $WORKDIR/../t1/gpu ]
    do sleep 0.05; done
  """
  many = [create(f't{i}', script) for i in (0, 1)]
  slots = [{'GPU': '0'}, {'GPU': '1'}]
  runner = runner_lib.Runner(many, slots, 0, runner_lib.Progress())
  runner.run(FakePreemption(), check=bool)
  found = [(t.workdir / 'gpu').read_text().strip() for t in many]
  assert found == ['0', '1']


def test_slots(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert runner_lib.slots(3) == [{}, {}, {}]
  cores = os.sched_getaffinity(0)
  assert len(runner_lib.slots(None)) == len(cores)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {3})
  assert len(runner_lib.slots(None)) == 1
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,5')
  both = [{'CUDA_VISIBLE_DEVICES': '2'}, {'CUDA_VISIBLE_DEVICES': '5'}]
  assert runner_lib.slots(None) == runner_lib.slots(2) == both
  assert runner_lib.slots(1) == [{}]
  with pytest.raises(UserError, match='there are 2 GPUs'):
    runner_lib.slots(3)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '-1')
  assert runner_lib.slots(3) == [{}, {}, {}]


def test_the_end_of_a_long_log(create):
  """Whole lines only, from the end of the file."""
  trial = create('trial', 'true')
  trial.workdir.mkdir()
  line = {'split': 'train', 'loss': 1.0}
  with (trial.workdir / 'metrics.jsonl').open('w') as file:
    for step in range(5000):
      file.write(json.dumps({'step': step, **line}) + '\n')
    file.write('{"step": 9')
  found = runner_lib.last_lines(trial.workdir)
  assert 10 < len(found) < 1000
  assert [each['step'] for each in found] == list(range(5000))[-len(found) :]
  trial.update()
  assert trial.step == 4999
  with (trial.workdir / 'metrics.jsonl').open('a') as file:
    file.write('damaged\n')
  for workdir in (trial.workdir, trial.workdir / 'none'):
    assert runner_lib.last_lines(workdir) == []
