"""A proxy between a client and `bucket_server`, which injects faults.

`Proxy.rule(method, path, number)` decides about each request, of which `number`
came before; it returns None to pass it on, or a fault:

  ('delay', seconds)       passes it on after a while
  ('status', code)         answers with an HTTP status
  ('cut request', bytes)   passes on all but the last bytes of the body, or
                           nothing if there is no body; closes both ends
  ('cut reply', bytes)     passes on the request, and all but the last bytes
                           of the answer
  ('lost reply',)          passes on the request; closes instead of answering
  ('hang', seconds)        closes after a while
  ('stale',)               answers a listing as the one before was answered
"""

import itertools
import socket
import socketserver
import threading
import time


def first(count, fault, method='', text=''):
  """A rule: the first requests of a method, with a text in their path, fail."""
  left = itertools.repeat(None, count)

  def rule(requested, path, number):
    matches = requested.startswith(method) and text in path
    return fault if matches and next(left, 'none left') is None else None

  return rule


def always(fault, method='', text=''):
  """A rule: all of these requests fail."""
  return first(10**9, fault, method, text)


def _read_head(file):
  """The first line and the headers of a message; b'' at the end."""
  lines = [file.readline()]
  while lines[-1].strip():
    lines.append(file.readline())
  return b''.join(lines)


def _read_body(file, head):
  """The body of a message, as it is sent."""
  fields = dict(
    line.lower().split(b': ', 1) for line in head.split(b'\r\n')[1:-2]
  )
  if b'chunked' not in fields.get(b'transfer-encoding', b''):
    return file.read(int(fields.get(b'content-length', 0)))
  parts = []
  while True:
    size = file.readline()
    parts += [size, file.read(int(size, 16)), file.readline()]
    if int(size, 16) == 0:
      return b''.join(parts)


class _Handler(socketserver.StreamRequestHandler):
  disable_nagle_algorithm = True

  def handle(self):
    try:
      with socket.create_connection(self.server.upstream) as upstream:
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with upstream.makefile('rb') as replies:
          while self.pass_on(upstream, replies):
            pass
    except OSError:  # One of the ends has gone.
      pass

  def pass_on(self, upstream, replies):
    """Passes on a request and its reply; returns whether to go on."""
    head = _read_head(self.rfile)
    if not head:
      return False
    method, path = head.decode().split()[:2]
    kind, *value = self.server.fault(method, path) or ('pass',)
    if b'expect: 100-continue\r\n' in head.lower():
      self.wfile.write(b'HTTP/1.1 100 Continue\r\n\r\n')
      start = head.lower().index(b'expect: 100-continue\r\n')
      head = head[:start] + head[start + 22 :]
    body = _read_body(self.rfile, head)
    if kind in ('delay', 'hang'):
      time.sleep(value[0])
    if kind == 'hang':
      return False
    if kind == 'status':
      text = b'{"error": {"code": %d, "message": "injected"}}' % value[0]
      self.wfile.write(
        b'HTTP/1.1 %d Injected\r\nContent-Type: application/json\r\n'
        b'Content-Length: %d\r\n\r\n' % (value[0], len(text)) + text
      )
      return True
    if kind == 'cut request':
      upstream.sendall(body and (head + body)[: -value[0]])
      return False
    if kind == 'stale' and path in self.server.listings:
      self.wfile.write(self.server.listings[path])
      return True
    upstream.sendall(head + body)
    head = _read_head(replies)
    body = _read_body(replies, head)
    if method == 'GET' and '/o?' in path:
      self.server.listings[path] = head + body
    if kind == 'lost reply':
      return False
    if kind == 'cut reply':
      self.wfile.write((head + body)[: -value[0]])
      return False
    self.wfile.write(head + body)
    return True


class Proxy(socketserver.ThreadingTCPServer):
  """Serves at a free port of this machine, in threads.

  Attributes:
    rule: decides about each request, see the module.
    seen: the requests so far, as 'METHOD PATH'.
    listings: the last reply to each request for a listing, by its path.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, upstream):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.upstream = upstream
    self.lock = threading.Lock()
    self.reset()
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def reset(self):
    self.rule = None
    self.seen, self.listings = [], {}

  def fault(self, method, path):
    with self.lock:
      self.seen.append(f'{method} {path}')
      return self.rule and self.rule(method, path, len(self.seen) - 1)
