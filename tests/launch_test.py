"""The scripts of launch/, with stand-ins for Python, gcloud, Slurm and GPUs."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))

# Each stand-in appends its arguments to $LOG, one shell-quoted line a call.
RECORD = """#!/usr/bin/env bash
{ printf '%s' "${0##*/}"; printf ' %q' "$@"; echo; } >>"$LOG"
"""
PYTHON = (
  RECORD
  + """
case "$*" in
  --version) echo "Python ${VERSION:-3.12.1}" ;;
  -c*) [[ ${VERSION:-3.12.1} != 3.9* ]] ;;
  *"-m venv"*)
    mkdir -p "${@: -1}/bin"
    [[ -z ${KILLED:-} ]] || kill -9 $PPID $$
    cp "$0" "${@: -1}/bin/python"
    for name in adapt-pruner ruff; do
      cp "$FAKES/record" "${@: -1}/bin/$name"
    done
    ;;
  *"pip install"*) exit "${PIP_STATUS:-0}" ;;
esac
"""
)
# A TPU whose queued resource and VM are the files $CLOUD/queue and $CLOUD/vm. A
# run takes the next line of $CLOUD/runs: its exit code, or "preempt".
GCLOUD = (
  RECORD
  + """
cd "$CLOUD"
case "$*" in
  *"queued-resources describe"*) state=queue ;;&
  *"tpu-vm describe"*) state=vm ;;&
  *describe*)
    if [[ -e broken ]]; then
      [[ ! -e lost ]] || rm broken lost
      echo "ERROR: PERMISSION_DENIED" >&2
      exit 1
    fi
    cat "$state" 2>/dev/null || { echo "ERROR: NOT_FOUND" >&2; exit 1; }
    ;;
  *"queued-resources create"*) echo ACTIVE >queue; echo READY >vm ;;
  *delete*) rm -f queue vm job ;;
  *"tpu_worker.sh start"*) echo running >job ;;
  *"tpu_worker.sh flags"*)
    [[ ! -e lost ]] || touch broken
    cat flags 2>/dev/null
    ;;
  *"tpu_worker.sh state"*) cat job 2>/dev/null || echo none ;;
  *"tpu_worker.sh follow"*)
    echo "line of the log"
    head -n 1 runs >job && sed -i 1d runs
    if [[ $(<job) == preempt ]]; then
      rm job && echo SUSPENDED >queue && echo PREEMPTED >vm && exit 255
    fi
    ;;
esac
exit 0
"""
)


@pytest.fixture
def box(tmp_path):
  """A copy of the repository's launch files and a PATH with stand-ins."""
  return Box(tmp_path)


class Box:
  def __init__(self, path):
    self.repo = path / "repo"
    self.fakes = path / "fakes"
    self.cloud = path / "cloud"
    self.log = path / "log"
    self.fakes.mkdir()
    self.cloud.mkdir()
    for name in ("launch", "configs"):
      shutil.copytree(ROOT / name, self.repo / name)
    (self.repo / "adapt_pruner_jax").mkdir()
    for name in ("setup.py", "pyproject.toml"):
      shutil.copy(ROOT / name, self.repo)
    self.fake("record", RECORD)
    self.fake("uname", '#!/bin/sh\necho "${PLATFORM:-Linux aarch64}"\n')
    for name in ("python3.13", "python3.11", "python3"):
      self.fake(name, "#!/bin/sh\necho 'shim: not found' >&2\nexit 127\n")
    self.fake("python3.12", PYTHON)
    self.env = {
      "PATH": f"{self.fakes}:/usr/bin:/bin",
      "HOME": str(path),
      "LOG": str(self.log),
      "FAKES": str(self.fakes),
      "CLOUD": str(self.cloud),
      "POLL_SECONDS": "0",
    }

  def fake(self, name, text):
    file = self.fakes / name
    file.write_text(text)
    file.chmod(0o755)

  def run(self, script, *args, **env):
    """Runs a script; returns its result and the stand-ins' calls."""
    self.log.write_text("")
    result = subprocess.run(
      ["bash", self.repo / "launch" / script, *args],
      env=self.env | env,
      cwd=self.repo,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=60,
    )
    return result, [shlex.split(s) for s in self.log.read_text().splitlines()]

  def fails(self, script, *args, **env):
    """Runs a script that must fail; returns its one line of error."""
    result, _ = self.run(script, *args, **env)
    assert result.returncode == 1, result
    (line,) = [s for s in result.stderr.splitlines() if "error" in s]
    assert "Traceback" not in result.stderr
    return line


def calls_to(name, calls):
  return [call[1:] for call in calls if call[0] == name]


def installs(calls):
  return [c[-1] for c in calls_to("python", calls) if "pip" in c]


# ---- the virtual environment and local.sh


def test_local_skips_broken_pythons_and_passes_arguments(box):
  result, calls = box.run("local.sh", "--config.seed=1", "--name=a b")
  assert result.returncode == 0, result.stderr
  assert ["-m", "venv", ".venv"] in calls_to("python3.12", calls)
  assert installs(calls) == ["."]
  assert calls_to("adapt-pruner", calls) == [
    ["run", "--workdir=runs/tiny", "--config.seed=1", "--name=a b"]
  ]


def test_local_lets_the_users_workdir_win(box):
  _, calls = box.run("local.sh", "--workdir=mine")
  assert calls_to("adapt-pruner", calls)[0][-1] == "--workdir=mine"
  _, calls = box.run("local.sh", WORKDIR="other")
  assert calls_to("adapt-pruner", calls) == [["run", "--workdir=other"]]


def test_second_run_installs_nothing(box):
  box.run("local.sh")
  _, calls = box.run("local.sh", PIP_STATUS="1")
  assert installs(calls) == []
  assert len(calls_to("adapt-pruner", calls)) == 1


def test_extras_add_up_and_a_changed_setup_installs_again(box):
  box.run("local.sh")
  _, calls = box.run("test.sh", "-k", "x")
  assert installs(calls) == [".[test]"]
  assert calls_to("python", calls)[-1] == ["-m", "pytest", "-k", "x"]
  for script in ("local.sh", "test.sh"):
    assert installs(box.run(script)[1]) == []
  (box.repo / "setup.py").write_text("changed")
  assert installs(box.run("local.sh")[1]) == [".[test]"]


def test_test_script_brings_the_tpu_compiler_where_there_is_a_wheel(box):
  _, calls = box.run("test.sh", PLATFORM="Linux x86_64")
  assert installs(calls) == [".[test,tpu]"]


def test_test_script_without_arguments_also_lints(box):
  result, calls = box.run("test.sh")
  assert result.returncode == 0, result.stderr
  assert calls_to("ruff", calls) == [["check"], ["format", "--check"]]
  assert calls_to("python", calls)[-1][:2] == ["-m", "pytest"]


def test_failed_install_is_said_and_tried_again(box):
  assert "the installation failed" in box.fails("local.sh", PIP_STATUS="1")
  result, calls = box.run("local.sh")
  assert result.returncode == 0
  assert installs(calls) == ["."]


def test_a_kill_while_the_venv_is_made(box):
  assert box.run("local.sh", KILLED="1")[0].returncode
  result, calls = box.run("local.sh")
  assert result.returncode == 0, result.stderr
  assert installs(calls) == ["."]


@pytest.mark.parametrize("change", ["moved", "other python", "broken venv"])
def test_venv_is_made_again(box, change):
  box.run("local.sh")
  env = {}
  if change == "moved":
    box.repo = box.repo.rename(box.repo.parent / "elsewhere")
  elif change == "other python":
    box.fake("mine", PYTHON.replace("3.12.1", "3.13.0"))
    env["PYTHON"] = "mine"
  else:
    (box.repo / ".venv/bin/python").unlink()
  result, calls = box.run("local.sh", **env)
  assert result.returncode == 0, result.stderr
  assert installs(calls) == ["."]
  assert installs(box.run("local.sh", **env)[1]) == []


def test_a_venv_of_another_is_left_alone(box):
  mine = box.repo / ".venv"
  mine.mkdir()
  (mine / "pyvenv.cfg").write_text("mine")
  assert "VENV=.venv-pruner" in box.fails("local.sh")
  assert (mine / "pyvenv.cfg").read_text() == "mine"


def test_old_python_is_one_clear_line(box):
  error = box.fails("local.sh", VERSION="3.9.7")
  assert "no Python 3.11 or newer" in error
  error = box.fails("local.sh", VERSION="3.9.7", PYTHON="python3.12")
  assert error.endswith(
    "PYTHON=python3.12 is not a Python 3.11 or newer with venv: Python 3.9.7"
  )
  error = box.fails("local.sh", PYTHON="nowhere/python")
  assert "PYTHON=nowhere/python is not a Python" in error
  assert not (box.repo / ".venv").exists()


def test_this_python_is_usable():
  """The check itself, with a Python that is no stand-in."""
  check = ". launch/venv.sh && usable " + shlex.quote(sys.executable)
  subprocess.run(["bash", "-c", check], cwd=ROOT, check=True)


@pytest.mark.parametrize(
  "script", ["local.sh", "test.sh", "gpu.sh", "slurm.sh"]
)
def test_dry_run_prints_and_does_nothing(box, script):
  box.fake("nvidia-smi", RECORD + "echo 580.1")
  result, calls = box.run(script, "--dry-run", "--flag=a b")
  assert result.returncode == 0, result.stderr
  printed = [s[2:] for s in result.stdout.splitlines() if s.startswith("+ ")]
  assert printed[0].endswith("-m venv .venv")
  assert "pip install" in printed[1]
  assert r"--flag=a\ b" in printed[-1]
  assert not (box.repo / ".venv").exists()
  assert not calls_to("adapt-pruner", calls)


def test_prove_plans_runs_and_reports(box):
  result, calls = box.run("prove.sh", "org/m", "--config.seed=1", RATIO="0.3")
  assert result.returncode == 0, result.stderr
  plan, run, report = calls_to("adapt-pruner", calls)
  assert plan[0] == "plan"
  assert run[:2] == ["run", "--workdir=runs/prove-m"]
  assert run[2:] == plan[1:]
  assert {"--config.model.path=org/m", "--config.prune.ratio=0.3"} <= {*run}
  assert run[-1] == "--config.seed=1"
  assert report == ["report", "--workdir=runs/prove-m"]
  assert {"data", "eval"} <= {*installs(calls)[0].strip(".[]").split(",")}
  assert "--config.train.dtype=float32" in run  # there is no accelerator
  box.fake("nvidia-smi", RECORD + "echo 580.1")
  _, run, _ = calls_to("adapt-pruner", box.run("prove.sh", "org/m")[1])
  assert "--config.train.dtype=bfloat16" in run
  assert "which model?" in box.fails("prove.sh", "--config.seed=1")


@pytest.mark.slow
def test_prove_goes_on_where_it_was_killed(small_model, tmp_path, process_env):
  """The script itself, with this Python, a small model and a real kill."""
  venv, work = tmp_path / "venv", tmp_path / "work"
  (venv / "bin").mkdir(parents=True)
  of_module = {"python": "", "adapt-pruner": "-m adapt_pruner_jax"}
  for name, module in of_module.items():
    program = venv / "bin" / name
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
    program.chmod(0o755)
  command = "cat setup.py pyproject.toml | cksum"
  sum_ = subprocess.check_output(command, shell=True, cwd=ROOT, text=True)
  extras = "data,eval,bucket,gpu,gpu-cuda12,tpu"
  (venv / ".installed").write_text(f"{ROOT}\n{sum_}{extras}\n")
  env = process_env(1) | {
    "VENV": str(venv),
    "WORKDIR": str(work),
    "TEXT": "embedded",
    "TOKENS": str(8 * 256),
  }
  fields = {
    "prune.stages": 1,
    "prune.step_size": 0.1,
    "calibration.samples": 8,
    "calibration.seq_len": 16,
    "data.seq_len": 32,
    "data.batch": 8,
    "checkpoint.steps": 4,
    "eval.tasks": "",
  }
  flags = [f"--config.{name}={value}" for name, value in fields.items()]

  def prove():
    with open(tmp_path / "said", "w") as said:
      return subprocess.Popen(
        ["bash", ROOT / "launch" / "prove.sh", small_model, *flags],
        env=env,
        stdout=said,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )

  said = lambda: (tmp_path / "said").read_text()
  running = prove()
  while not (work / "checkpoints" / "1").exists():  # behind the prune
    assert running.poll() is None, said()
    time.sleep(0.02)
  os.killpg(running.pid, signal.SIGKILL)
  running.wait()
  assert not (work / "summary.json").exists()
  assert prove().wait(300) == 0, said()
  assert "continuing at stage" in said()
  summary = json.loads((work / "summary.json").read_text())
  assert summary["params_after"] <= summary["target_params"]
  assert (work / "report.html").exists()


# ---- GPUs and Slurm


@pytest.mark.parametrize(
  ("driver", "extra"), [("580.65.06", "gpu"), ("550.54", "gpu-cuda12")]
)
def test_gpu_picks_cuda_by_driver(box, driver, extra):
  box.fake("nvidia-smi", RECORD + f"printf '{driver}\\n{driver}\\n'")
  result, calls = box.run("gpu.sh", "--config=configs/x.py", "--workdir=w")
  assert result.returncode == 0, result.stderr
  # Recipes of the pages read the hub and a bucket, and ask tasks.
  assert installs(calls) == [f".[data,eval,bucket,{extra}]"]
  assert calls_to("adapt-pruner", calls) == [
    ["run", "--config=configs/x.py", "--workdir=w"]
  ]


def test_gpu_without_gpu_is_one_clear_line(box):
  box.fake("nvidia-smi", "#!/bin/sh\necho broken >&2\nexit 9\n")
  assert "nvidia-smi finds no GPU" in box.fails("gpu.sh")


@pytest.mark.parametrize(
  ("status", "restarts"),
  [(0, 0), (1, 0), (75, 99), (76, 2), (134, 2), (137, 2), (76, 5)],
)
def test_slurm_requeues_a_stopped_run(box, status, restarts):
  """And one that has lost a process, but not for ever."""
  box.fake("nvidia-smi", "#!/bin/sh\necho 580.1\n")
  share = 'echo "of a GPU $XLA_PYTHON_CLIENT_MEM_FRACTION"'
  box.fake("srun", RECORD + f"{share}\nexit {status}")
  box.fake("scontrol", RECORD)
  result, calls = box.run(
    "slurm.sh",
    "--workdir=w",
    SLURM_JOB_ID="7",
    SLURM_RESTART_COUNT=str(restarts),
    SLURM_SUBMIT_DIR=str(box.repo),
  )
  assert result.returncode == status
  assert "of a GPU 0.92" in result.stdout  # what a plan counts with
  ((*_, program, command, distributed, flag),) = calls_to("srun", calls)
  assert program.endswith("bin/adapt-pruner")
  assert (command, distributed, flag) == ("run", "--distributed", "--workdir=w")
  requeued = [["requeue", "7"]] if status == 75 or restarts == 2 else []
  assert calls_to("scontrol", calls) == requeued


# ---- TPU

TPU = ("--name=pod", "--zone=z", "--type=v6e-16", "--project=p")
RUN = ("--", "--workdir=/mnt/b/run", "--config.eval.text=a b")


@pytest.fixture
def cloud(box):
  box.fake("gcloud", GCLOUD)
  return box


def steps(calls):
  """What was done to the TPU, without the questions."""
  words = {
    "queued-resources create": "create",
    "delete": "delete",
    "scp": "copy",
    "install": "install",
    "tpu_worker.sh start": "start",
    "tpu_worker.sh follow": "follow",
  }
  found = []
  for call in calls_to("gcloud", calls):
    assert "--zone=z" in call
    assert "--project=p" in call
    text = " ".join(call)
    found += [v for k, v in words.items() if k in text]
  return found


def test_tpu_run(cloud):
  (cloud.cloud / "runs").write_text("0\n")
  result, calls = cloud.run("tpu.sh", *TPU, *RUN)
  assert result.returncode == 0, result.stderr
  assert "line of the log" in result.stdout
  assert steps(calls) == ["create", "copy", "install", "start", "follow"]
  create, scp, start = (
    next(c for c in calls if word in " ".join(c))
    for word in ("create", "scp", "tpu_worker.sh start")
  )
  assert "--accelerator-type=v6e-16" in create
  assert "--runtime-version=v2-alpha-tpuv6e" in create
  assert "--spot" not in create
  assert "--worker=all" in scp
  assert "--worker=all" in start
  command = next(a for a in start if a.startswith("--command="))
  assert shlex.split(command.removeprefix("--command="))[2:] == [
    "start",
    *RUN[1:],
  ]


def test_tpu_needs_the_name_of_a_bucket_only(cloud):
  (cloud.cloud / "runs").write_text("0\n")
  run = ("--bucket=b", "--spot", "--", "--config.eval.text=a b")
  _, calls = cloud.run("tpu.sh", *TPU, *run)
  start = next(c for c in calls if "tpu_worker.sh start" in " ".join(c))
  command = next(a for a in start if a.startswith("--command="))
  name = TPU[0].removeprefix("--name=")
  assert shlex.split(command.removeprefix("--command="))[2:] == [
    *("start", f"--workdir=gs://b/{name}", "--config.eval.text=a b")
  ]


def test_tpu_that_is_there_is_used_and_a_run_is_joined(cloud):
  (cloud.cloud / "vm").write_text("READY\n")
  (cloud.cloud / "runs").write_text("0\n")
  _, calls = cloud.run("tpu.sh", *TPU, *RUN)
  assert steps(calls) == ["copy", "install", "start", "follow"]
  (cloud.cloud / "runs").write_text("0\n")
  (cloud.cloud / "job").write_text("running\n")
  (cloud.cloud / "flags").write_text("\n".join(RUN[1:]) + "\n")
  _, calls = cloud.run("tpu.sh", *TPU, *RUN)
  assert steps(calls) == ["follow"]
  (cloud.cloud / "job").write_text("running\n")
  error = cloud.fails("tpu.sh", *TPU, "--", "--workdir=gs://b/other")
  assert "busy with another run: adapt-pruner run --workdir=/mnt/b/run" in error


def test_a_network_that_was_away_is_waited_for(cloud):
  (cloud.cloud / "vm").write_text("READY\n")
  (cloud.cloud / "job").write_text("running\n")
  (cloud.cloud / "runs").write_text("running\n0\n")
  (cloud.cloud / "lost").touch()  # from when it has been asked once
  result, calls = cloud.run("tpu.sh", *TPU, *RUN)
  assert result.returncode == 0, result.stderr
  assert "gcloud cannot describe pod, trying again" in result.stderr
  assert steps(calls) == ["follow", "follow"]


def test_spot_tpu_continues_and_is_deleted(cloud):
  """Preempted twice, stopped once, finished."""
  (cloud.cloud / "runs").write_text("preempt\n75\npreempt\n0\n")
  result, calls = cloud.run("tpu.sh", *TPU, "--spot", "--delete", *RUN)
  assert result.returncode == 0, result.stderr
  begin = ["copy", "install", "start", "follow"]
  assert steps(calls) == [
    *["create", *begin, "delete"],
    *["create", *begin, *begin, "delete"],
    *["create", *begin, "delete"],
  ]
  assert all("--spot" in c for c in calls if "create" in c)
  assert not (cloud.cloud / "vm").exists()


def test_stopped_run_on_a_kept_tpu_says_so(cloud):
  (cloud.cloud / "runs").write_text("75\n")
  result, calls = cloud.run("tpu.sh", *TPU, *RUN)
  assert result.returncode == 75
  assert "has saved its state" in result.stderr
  assert "delete" not in steps(calls)


def test_run_that_lost_a_worker_is_started_again(cloud):
  (cloud.cloud / "runs").write_text("76\n134\n137\n0\n")
  result, calls = cloud.run("tpu.sh", *TPU, *RUN)
  assert result.returncode == 0, result.stderr
  assert steps(calls).count("start") == 4
  (cloud.cloud / "runs").write_text("76\n" * 9)
  error = cloud.fails("tpu.sh", *TPU, "--spot", *RUN)
  assert "a worker was gone 6 times" in error


def test_failed_run_keeps_the_tpu(cloud):
  (cloud.cloud / "runs").write_text("1\n")
  error = cloud.fails("tpu.sh", *TPU, "--spot", "--delete", *RUN)
  assert "the run ended with exit code 1" in error
  assert (cloud.cloud / "vm").exists()


@pytest.mark.parametrize("kind", ["queue", "vm"])
def test_tpu_delete(cloud, kind):
  (cloud.cloud / kind).write_text("ACTIVE\n")
  result, calls = cloud.run("tpu.sh", *TPU, "--delete")
  assert result.returncode == 0, result.stderr
  deleted = [" ".join(c) for c in calls if "delete" in c]
  assert len(deleted) == 1
  assert ("queued-resources delete pod --force" in deleted[0]) == (
    kind == "queue"
  )


def test_tpu_dry_run_needs_no_gcloud(box):
  box.env["PATH"] = str(box.fakes)
  for tool in ("bash", "cat", "dirname", "mktemp", "rm", "sleep"):
    (box.fakes / tool).symlink_to(shutil.which(tool))
  result, _ = box.run("tpu.sh", *TPU, "--spot", "--delete", "--dry-run", *RUN)
  assert result.returncode == 0, result.stderr
  printed = [
    ["gcloud", *shlex.split(line)[2:]]
    for line in result.stdout.splitlines()
    if line.startswith("+ gcloud")
  ]
  assert steps(printed) == [
    *["create", "copy", "install", "start", "follow", "delete"]
  ]


@pytest.mark.parametrize(
  ("args", "said"),
  [
    (("--zone=z",), "--name and --zone are needed"),
    (("--name=n", "--zone=z"), "nothing to do"),
    ((*TPU, "--config=x"), "unknown flag --config=x"),
    (("--name=n", "--zone=z", "--", "--x"), "--type is needed"),
    (("--name=n", "--zone=z", "--type=v9-8", *RUN), "give --version"),
    ((*TPU, "--spot", "--", "--workdir=w"), "--spot needs --bucket=B"),
    ((*TPU, "--bucket=b", *RUN), "--bucket or --workdir"),
    ((*TPU, "--bucket=b", "--", "--workdir", "w"), "--workdir=PLACE"),
  ],
)
def test_tpu_errors_are_one_clear_line(cloud, args, said):
  assert said in cloud.fails("tpu.sh", *args)


@pytest.mark.parametrize(
  ("file", "state", "said"),
  [
    ("broken", "", "gcloud cannot describe pod: ERROR: PERMISSION_DENIED"),
    ("queue", "FAILED", "the request for pod is FAILED"),
    ("vm", "STOPPED", "pod is STOPPED"),
  ],
)
def test_tpu_that_cannot_be_had_is_one_clear_line(cloud, file, state, said):
  (cloud.cloud / file).write_text(f"{state}\n")
  assert said in cloud.fails("tpu.sh", *TPU, *RUN)


def test_tpu_worker_runs_a_job_apart_from_its_shell(box):
  box.run("local.sh")
  program = box.repo / ".venv/bin/adapt-pruner"
  program.write_text("#!/bin/sh\necho args $*; sleep $3; exit $4\n")

  def worker(*args):
    result, _ = box.run("tpu_worker.sh", *args)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()

  assert worker("state") == "none"
  worker("start", "60", "0")
  assert worker("state") == "running"
  first = int((box.repo / "job.pid").read_text())
  worker("start", "0.5", "75")  # ends the one before
  assert worker("follow") == "args run --distributed 0.5 75"
  deadline = time.monotonic() + 30
  while worker("state") == "running":
    assert time.monotonic() < deadline
  assert worker("state") == "75"
  with pytest.raises(ProcessLookupError):
    os.killpg(first, 0)


# ---- all files


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_shellcheck(script):
  shellcheck = shutil.which(
    "shellcheck",
    path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
  )
  if not shellcheck:
    pytest.skip("shellcheck is not installed")
  result = subprocess.run(
    [shellcheck, "-x", script.relative_to(ROOT)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout


def test_wheel_carries_every_file(tmp_path):
  """Recipes and shipped files are found after `pip install` of a wheel too."""
  pytest.importorskip("setuptools", minversion="77")
  ignore = shutil.ignore_patterns("__pycache__")
  for name in ("adapt_pruner_jax", "configs"):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
  for name in ("setup.py", "pyproject.toml", "LICENSE"):
    shutil.copy(ROOT / name, tmp_path)
  expected = {
    str(f.relative_to(tmp_path)).replace(
      "configs/", "adapt_pruner_jax/configs/"
    )
    for folder in ("adapt_pruner_jax", "configs")
    for f in (tmp_path / folder).rglob("*")
    if f.is_file()
  }
  subprocess.run(
    [sys.executable, "setup.py", "--quiet", "bdist_wheel"],
    cwd=tmp_path,
    check=True,
    capture_output=True,
  )
  (wheel,) = (tmp_path / "dist").glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    carried = {n for n in archive.namelist() if ".dist-info/" not in n}
  assert carried == expected
