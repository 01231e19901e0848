"""An S3 server on loopback, moto's, with one bucket, that can be told to fail.

  python benchmarks/bucket_server.py PORT

What it says at /fault?status=503&seconds=5&methods=PUT,POST is what it does
from then on: requests of these methods get that status, for so long.
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

BUCKET = "bucket"
CODES = {403: "AccessDenied", 429: "SlowDown", 503: "SlowDown"}


class Faulty:
  """A WSGI application that sometimes fails instead of the one it wraps."""

  def __init__(self, application: Callable):
    """Nothing fails yet."""
    self._application = application
    self._status, self._until, self._methods = 503, 0.0, frozenset()

  def __call__(self, environ: dict, start: Callable) -> Iterable[bytes]:
    """Answers a request."""
    if environ["PATH_INFO"] == "/fault":
      asked = dict(urllib.parse.parse_qsl(environ["QUERY_STRING"]))
      self._status = int(asked["status"])
      self._until = time.monotonic() + float(asked["seconds"])
      self._methods = frozenset(asked["methods"].split(","))
      start("200 OK", [])
      return [b""]
    method = environ["REQUEST_METHOD"]
    if method in self._methods and time.monotonic() < self._until:
      code = CODES[self._status]
      environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
      start(f"{self._status} {code}", [("Content-Type", "application/xml")])
      return [f"<Error><Code>{code}</Code></Error>".encode()]
    return self._application(environ, start)


def environment(port: int) -> dict[str, str]:
  """What leads S3's clients to the server."""
  return {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
  }


def ask(port: int, path: str, method: str = "GET", data: Any = None) -> bytes:
  """Sends the server a request without any signature."""
  url = f"http://127.0.0.1:{port}/{path}"
  request = urllib.request.Request(url, data=data, method=method)
  with urllib.request.urlopen(request, timeout=30) as answer:
    return answer.read()


def fault(port: int, status: int, seconds: float, methods: str) -> None:
  """Lets requests fail for so long."""
  ask(port, f"fault?status={status}&seconds={seconds}&methods={methods}")


@contextlib.contextmanager
def running() -> Iterator[int]:
  """A server in a process of its own, with the bucket; its port."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
    [sys.executable, __file__, str(port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    _make_bucket(port)
    yield port
  finally:
    process.kill()
    process.wait()


def _make_bucket(port: int) -> None:
  end = time.monotonic() + 60
  while True:
    try:
      ask(port, BUCKET, "PUT", b"")
      return
    except OSError:
      if time.monotonic() > end:
        raise
      time.sleep(0.1)


def main() -> None:
  from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    create_backend_app,
  )
  from werkzeug.serving import make_server

  application = Faulty(DomainDispatcherApplication(create_backend_app))
  port = int(sys.argv[1])
  make_server("127.0.0.1", port, application, threaded=True).serve_forever()


if __name__ == "__main__":
  main()
