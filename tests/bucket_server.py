"""A bucket in memory: the part of Cloud Storage's JSON API that is used here.

By Google's client, which `bn_repro/runtime/buckets.py` uses. Preconditions on
generations hold for every request, unlike in other emulators. The API is
described at https://cloud.google.com/storage/docs/json_api/v1/objects.
"""

import base64
import hashlib
import http.server
import itertools
import json
import re
import threading
import time
from urllib.parse import parse_qsl, unquote, urlsplit
import uuid

import google_crc32c

_OBJECTS = r'/(?:upload/)?storage/v1/b/([^/]+)/o'
_OBJECT = r'/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)'
# The description of an object and its content, each after the same newline.
_MULTIPART = rb'--%(b)s(\r?\n).*?\1\1(.*?)\1--%(b)s\1.*?\1\1(.*?)\1--%(b)s--\s*'


class RefusedError(Exception):
  """A request that is answered with an HTTP status other than 200."""

  def __init__(self, status, message=''):
    self.status, self.message = status, message


class Store:
  """The objects of each bucket, by name, and the permissions denied to all.

  An object is a dict: its description, and its `data`.
  """

  def __init__(self):
    self.lock = threading.RLock()
    self.buckets, self.denied = {}, set()
    self.uploads = {}
    self.generations = itertools.count(time.time_ns() // 1000)

  def objects(self, bucket):
    if bucket not in self.buckets:
      raise RefusedError(404, 'The specified bucket does not exist.')
    return self.buckets[bucket]

  def check(self, bucket, name, query):
    """Checks the preconditions of a request; 0 is an object that is absent."""
    found = self.objects(bucket).get(name)
    generation = found['generation'] if found else '0'
    if query.get('ifGenerationMatch', generation) != generation:
      raise RefusedError(412, 'A precondition did not hold.')
    if query.get('ifGenerationNotMatch') == generation:
      raise RefusedError(304 if found else 412)

  def put(self, bucket, name, data, described, query):
    with self.lock:
      self.check(bucket, name, query)
      now = time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime())
      generation = str(next(self.generations))
      crc32c = google_crc32c.Checksum(data).digest()
      self.buckets[bucket][name] = {
        'kind': 'storage#object',
        'contentType': 'application/octet-stream',
        'metadata': {},
        **described,
        'bucket': bucket,
        'name': name,
        'id': f'{bucket}/{name}/{generation}',
        'generation': generation,
        'metageneration': '1',
        'etag': generation,
        'size': str(len(data)),
        'storageClass': 'STANDARD',
        'timeCreated': now,
        'updated': now,
        'md5Hash': base64.b64encode(hashlib.md5(data).digest()).decode(),
        'crc32c': base64.b64encode(crc32c).decode(),
        'data': data,
      }
      return self.get(bucket, name, {})

  def get(self, bucket, name, query):
    with self.lock:
      self.check(bucket, name, query)
      found = self.objects(bucket).get(name)
      if found is None or found['generation'] != query.get(
        'generation', found['generation']
      ):
        raise RefusedError(404, f'No such object: {bucket}/{name}')
      return found

  def delete(self, bucket, name, query):
    with self.lock:
      self.get(bucket, name, query)
      del self.buckets[bucket][name]

  def list(self, bucket, query):
    """A page of objects, and of folders if there is a delimiter."""
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    entries = {}
    with self.lock:
      for name, item in self.objects(bucket).items():
        if not name.startswith(prefix):
          continue
        head, cut, _ = name[len(prefix) :].partition(delimiter or '\0')
        entries[prefix + head + cut] = None if cut else public(item)
    page = [n for n in sorted(entries) if n > query.get('pageToken', '')]
    page = page[: int(query.get('maxResults', 1000))]
    listed = {
      'kind': 'storage#objects',
      'items': [entries[name] for name in page if entries[name]],
      'prefixes': [name for name in page if not entries[name]],
    }
    if page and page[-1] != max(entries):
      listed['nextPageToken'] = page[-1]
    return listed


def public(item):
  return {key: value for key, value in item.items() if key != 'data'}


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers one connection."""

  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def log_message(self, *arguments):
    pass

  def answer(self):
    """Answers one request."""
    url = urlsplit(self.path)
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    try:
      data = self.read_body()
      try:
        self.route(url.path, query, data)
      except RefusedError as error:
        content = {'code': error.status, 'message': error.message}
        self.reply({'error': content}, status=error.status)
    except ConnectionError:  # The client, or a proxy, has gone.
      self.close_connection = True

  do_GET = do_POST = do_PUT = do_DELETE = answer

  def read_body(self):
    if 'chunked' in self.headers.get('Transfer-Encoding', ''):
      parts = []
      while size := int(self.rfile.readline(), 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(parts)
    length = int(self.headers.get('Content-Length', 0))
    data = self.rfile.read(length)
    if len(data) < length:
      raise ConnectionError('cut')
    return data

  def reply(self, body=b'', headers=(), status=200):
    if not isinstance(body, bytes):
      body = json.dumps(body).encode()
      headers = (*headers, ('Content-Type', 'application/json'))
    if status in (204, 304):
      body = b''
    self.send_response(status)
    for name, value in (*headers, ('Content-Length', str(len(body)))):
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)

  def route(self, path, query, data):
    """Answers a request, or raises `RefusedError`."""
    store, method = self.server.store, self.command
    if found := re.fullmatch(_OBJECTS, path):
      if method == 'GET':
        self.reply(store.list(found[1], query))
      else:
        self.upload(found[1], query, data)
    elif found := re.fullmatch(_OBJECT, path):
      bucket, name = map(unquote, found.groups())
      if method == 'DELETE':
        store.delete(bucket, name, query)
        self.reply(status=204)
      elif query.get('alt') == 'media':
        self.download(store.get(bucket, name, query))
      else:
        self.reply(public(store.get(bucket, name, query)))
    elif found := re.fullmatch(r'/storage/v1/b/([^/]+)(/iam/.*)?', path):
      store.objects(found[1])
      asked = parse_qsl(urlsplit(self.path).query)
      asked = {value for key, value in asked if key == 'permissions'}
      granted = sorted(asked - store.denied)
      self.reply({'name': found[1], 'permissions': granted})
    else:
      raise RefusedError(501, f'not in this server: {method} {path}')

  def download(self, item):
    """Answers with an object or the part of it that is asked for."""
    data = item['data']
    headers = [
      ('ETag', item['etag']),
      ('X-Goog-Generation', item['generation']),
      ('X-Goog-Hash', f'crc32c={item["crc32c"]},md5={item["md5Hash"]}'),
      ('X-Goog-Stored-Content-Length', item['size']),
    ]
    part = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not part:
      self.reply(data, headers)
      return
    if part[1]:
      first, stop = int(part[1]), int(part[2] or len(data)) + 1
    else:
      first, stop = max(len(data) - int(part[2]), 0), len(data)
    if first >= len(data):
      raise RefusedError(416, 'Requested range not satisfiable')
    stop = min(stop, len(data))
    place = ('Content-Range', f'bytes {first}-{stop - 1}/{len(data)}')
    self.reply(data[first:stop], [*headers, place], 206)

  def upload(self, bucket, query, data):
    """Answers a request of one of the three kinds of uploads."""
    store, kind = self.server.store, query.get('uploadType')
    content_type = self.headers.get('Content-Type', '')
    if kind == 'media':
      name, described = query['name'], {'contentType': content_type}
    elif kind == 'multipart':
      boundary = re.search(r'boundary="?([^";]+)', content_type)[1].encode()
      pattern = _MULTIPART % {b'b': re.escape(boundary)}
      _, described, data = re.fullmatch(pattern, data, re.DOTALL).groups()
      described = json.loads(described)
      name = query.get('name') or described['name']
    elif 'upload_id' in query:
      self.resume_upload(query['upload_id'], data)
      return
    else:
      described = json.loads(data)
      name = query.get('name') or described['name']
      with store.lock:
        store.check(bucket, name, query)
      key = uuid.uuid4().hex
      store.uploads[key] = (bucket, name, described, query, bytearray())
      location = (
        f'http://{self.headers["Host"]}/upload/storage/v1/b/{bucket}/o'
        f'?uploadType=resumable&upload_id={key}'
      )
      self.reply(headers=[('Location', location)])
      return
    self.reply(public(store.put(bucket, name, data, described, query)))

  def resume_upload(self, key, data):
    """Adds a part to a resumable upload; the last part creates the object."""
    store = self.server.store
    if key not in store.uploads:
      raise RefusedError(404, 'No such upload')
    bucket, name, described, query, received = store.uploads[key]
    given = self.headers.get('Content-Range', f'bytes */{len(data)}')
    part = re.fullmatch(r'bytes (?:(\d+)-\d+|\*)/(\d+|\*)', given)
    if data:
      received[int(part[1] or 0) :] = data
    if part[2] == str(len(received)):
      item = store.put(bucket, name, bytes(received), described, query)
      del store.uploads[key]
      self.reply(public(item))
    else:
      last = [('Range', f'bytes=0-{len(received) - 1}')] if received else []
      self.reply(headers=last, status=308)


class Server(http.server.ThreadingHTTPServer):
  """Serves a `Store` at a free port of this machine, in threads."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.store = Store()
    threading.Thread(target=self.serve_forever, daemon=True).start()
