"""The claim of a workdir in a bucket; `workdir_test` has that of a local one.

A claim expires after five seconds here, which a busy machine does not exceed.
"""

import threading
import time

import bucket_proxy
from google.cloud.storage import retry
import pytest

from bn_repro import files
from bn_repro.errors import TemporaryError, UserError
from bn_repro.runtime import buckets, claims

EXPIRES = 5.0


@pytest.fixture
def create(bucket, tmp_path, monkeypatch):
  """Creates a claim of the same workdir for another process."""
  quick = retry.DEFAULT_RETRY.with_delay(initial=0.05)
  monkeypatch.setattr(retry, 'DEFAULT_RETRY', quick)
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  workdir = files.parse_place('--workdir', f'{bucket.path}/run')
  created = []

  def create():
    created.append(claims.Claim(workdir, EXPIRES))
    return created[-1]

  yield create
  bucket.proxy.rule = None
  for claim in created:
    claim.release()


def stop(claim, tmp_path):
  """Stops a process on another machine: it neither works nor releases."""
  claim._stopped.set()
  claim._thread.join()
  for path in tmp_path.glob('bn_repro-*'):
    path.unlink()


def race(create):
  """Eight processes take a claim at once; the claims that they took."""
  barrier, taken, problems = threading.Barrier(8), [], []

  def take():
    claim = create()
    barrier.wait()
    try:
      claim.take()
      taken.append(claim)
    except UserError as error:
      problems.extend(error.problems)

  threads = [threading.Thread(target=take) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(problems) == 8 - len(taken)
  for problem in problems:
    assert problem.startswith('--workdir=gs://bucket/run: in use by process ')
  return taken


def test_one_of_eight_takes_a_free_claim(create, tmp_path):
  (winner,) = race(create)
  winner.renew()
  winner.release()
  assert list(tmp_path.iterdir()) == []


def test_one_of_eight_takes_over_a_dead_one(create, tmp_path, capsys):
  """And the dead one, should it wake up, finds out when it renews its claim."""
  dead = create()
  dead.take()
  stop(dead, tmp_path)
  start = time.monotonic()
  (winner,) = race(create)
  assert time.monotonic() - start > EXPIRES
  assert 'run: claimed by process' in capsys.readouterr().out
  with pytest.raises(claims.ClaimLost, match='has taken it over') as caught:
    dead.renew()
  assert caught.value.exit_code == 75
  with pytest.raises(claims.ClaimLost, match='has taken it over'):
    dead.check()
  dead.release()
  winner.renew()


def test_a_live_claim_is_never_taken_over(create):
  live = create()
  live.take()
  end = time.monotonic() + 2 * EXPIRES
  while (start := time.monotonic()) < end:
    with pytest.raises(TemporaryError, match='in use by process'):
      create().take()
    # It says so as soon as it knows.
    assert time.monotonic() - start < EXPIRES
    live.check()
  live.renew()


def test_a_holder_stops_before_another_one_starts(create, tmp_path):
  """Its requests fail from now on; those of the other one do not."""
  cut_off, other = create(), create()
  cut_off.take()
  for path in tmp_path.iterdir():  # As if on another machine.
    path.unlink()

  def fail():
    raise TemporaryError('cut off')

  cut_off.renew = fail
  taking = threading.Thread(target=other.take)
  taking.start()
  with pytest.raises(claims.ClaimLost, match='could not renew its claim'):
    while taking.is_alive():
      cut_off.check()
      time.sleep(0.01)
  assert taking.is_alive()
  taking.join()
  other.check()


def test_a_holder_survives_a_short_outage(create, bucket):
  claim = create()
  claim.take()
  bucket.proxy.rule = bucket_proxy.always(('status', 503))
  time.sleep(EXPIRES / 2)
  claim.check()
  bucket.proxy.rule = None
  claim.renew()
  claim.check()


def test_a_process_that_was_killed_on_this_machine(create, capsys):
  """Its successor does not wait."""
  killed = create()
  killed.take()
  killed._stopped.set()
  killed._alive.close()  # The kernel does.
  create().take()
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
  'fault',
  [
    *(('status', 503), ('status', 429), ('cut request', 3), ('cut reply', 1)),
    *(('lost reply',), ('hang', 0.6)),
  ],
  ids=str,
)
def test_faults_that_pass(fault, create, bucket, monkeypatch):
  """The claim is taken, renewed and released as if there were none."""
  monkeypatch.setattr(buckets, '_TIMEOUT', 0.3)
  claim = create()
  for operation in (claim.take, claim.renew, claim.release):
    bucket.proxy.rule = bucket_proxy.first(1, fault, 'POST')
    operation()
    bucket.proxy.rule = bucket_proxy.first(1, fault, 'GET')
    if operation == claim.release:
      assert bucket.objects == {}
    else:
      claim.renew()


def test_stale_listings_do_no_harm(create, bucket):
  """Claims ask for none."""
  claim = create()
  claim.take()
  with pytest.raises(UserError, match='in use by'):
    create().take()
  claim.release()
  assert not [seen for seen in bucket.proxy.seen if seen.startswith('GET /st')]


@pytest.mark.parametrize(
  'status, kind', [(403, UserError), (503, TemporaryError)]
)
def test_a_bucket_that_does_not_answer(status, kind, create, bucket, tmp_path):
  bucket.proxy.rule = bucket_proxy.always(('status', status))
  with pytest.raises(UserError) as caught:
    create().take()
  assert type(caught.value) is kind
  assert bucket.objects == {} and list(tmp_path.iterdir()) == []


def test_a_claim_that_was_deleted(create, bucket):
  """By a user, who deletes the workdir of a run."""
  claim = create()
  claim.take()
  del bucket.objects['run/lock']
  with pytest.raises(claims.ClaimLost, match='another process has taken it'):
    claim.renew()
  claim.release()
  assert bucket.objects == {}


def test_a_claim_that_was_edited(create):
  """Is a claim that nobody renews."""
  claim = create()
  for content in (b'', b'\xff', b'null', b'{"id": 1}'):
    buckets.write(claim._place, content)
  claim.take()
  claim.renew()
