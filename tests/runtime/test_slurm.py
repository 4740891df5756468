"""The job script on a real Slurm: two nodes on this machine, each with a host name of its own, thrown away after."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers import metrics_of, read_lines, read_tensors, run

ROOT = Path(__file__).parents[2]
SCRIPT, SLURM_CI = ROOT / "slurm/llava_med.sh", ROOT / "tests/slurm_ci.sh"


def lacking() -> str:
    """What it takes to start Slurm here and is not there; empty if nothing."""
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    if absent:
        return f"Slurm: no {', '.join(absent)} (bash tests/slurm_ci.sh install)"
    # a node is a name space with a host name of its own
    own = os.geteuid() == 0 and subprocess.run(["unshare", "-m", "-u", "true"], check=False).returncode == 0
    return "" if own else "root, and the right to make name spaces"


needs_slurm = pytest.mark.skipif(bool(lacking()), reason=f"needs {lacking()}")

ONE_CORE = ["--cpus-per-task=1", "--mem=1G"]
SHORT = ["--limit", "24", "--questions-per-step", "16", "--pack-tokens", "512", "--max-answer-tokens", "2"]
SHORT += ["--dtype", "fp32", "--device", "cpu"]
SHORT += ["--lora-dropout", "0"]  # each rank draws its own: two would not train what one trains
LONG = [*SHORT, "--epochs", "25", "--lr", "1e-4"]  # 50 steps
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


def clean_environment(**more) -> dict:
    """This process's environment as a user's is: nothing of Slurm, nothing of a rank."""
    ours = ("SLURM", "SBATCH", "MASTER_", "OMP_", "CUDA_", "HF_HUB_OFFLINE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in ("RANK", "WORLD_SIZE")}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in more.items()}}


def wait_for(what, seconds: float = 180, shown=lambda: ""):
    """The first true value of what(); fails with shown() when it takes too long."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, f"nothing after {seconds} s\n{shown()}"
        time.sleep(0.05)
    return value


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


class Slurm:
    """sbatch, scontrol and scancel of the throw-away cluster."""

    def __init__(self, folder: Path):
        self.folder = folder

    def call(self, *command, cwd: Path = ROOT, **environment) -> str:
        env = clean_environment(SLURM_CONF=self.folder / "slurm.conf", **environment)
        argv = [str(word) for word in command]
        return subprocess.run(argv, cwd=cwd, env=env, check=True, capture_output=True, text=True).stdout

    def submit(self, cwd: Path, *options, script: Path = SCRIPT, flags=(), **environment) -> str:
        return self.call("sbatch", "--parsable", *options, script, *flags, cwd=cwd, **environment).strip()

    def show(self, job: str) -> dict:
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))

    def ended(self, job: str, seconds: float = 180) -> dict:
        """What scontrol says of a job once it has ended, for good."""

        def look():
            shown = self.show(job)
            return shown if shown["JobState"] in ENDED else None

        return wait_for(look, seconds, lambda: self.show(job))


def outcome(shown: dict) -> tuple:
    return shown["JobState"], shown["ExitCode"], shown["Restarts"]


def log_of(folder: Path, job: str) -> str:
    path = folder / f"logs/llava_med_{job}.out"
    return path.read_text() if path.exists() else ""  # not yet


def free_port() -> int:
    """The first of three free ports, out of steps so wide that clusters of parallel runs do not share job IDs."""
    while True:
        port = random.randrange(10000, 20000, 50)
        try:
            for number in range(port, port + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
            return port
        except OSError:
            continue


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        subprocess.run(["bash", SLURM_CI, "start", folder, str(free_port())], check=True)
        yield Slurm(folder)
    finally:
        subprocess.run(["bash", SLURM_CI, "stop", folder], check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def where(demo_folder):
    """The environment that a user exports."""
    return {"MODEL": demo_folder / "model", "DATA": demo_folder / "data"}


def program(path: Path, text: str) -> Path:
    """A program to be started in place of Python, so that what the job script does is seen in seconds."""
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def slow(cluster, where, tmp_path_factory):
    """Jobs that take a minute or two, submitted before all others so that nothing waits for them: (folder, jobs).

    Slurm looks every 30 s whose time is up. The training needs hours and gets four minutes; it is signalled three
    minutes before their end, as the job script says: 30 to 60 s after its start. The deaf one gets one minute.
    """
    folder = tmp_path_factory.mktemp("slow")
    deaf = program(folder / "deaf", "trap '' USR1 TERM; while true; do sleep 1; done")
    hanging = program(folder / "hanging", '[ "$RANK" = 0 ] || exit 1; exec sleep 600')
    flags = [*SHORT, "--epochs", 5000]
    return folder, {
        "training": cluster.submit(folder, *ONE_CORE, "--time=4", flags=flags, OUT="run", **where),
        "deaf": cluster.submit(folder, *ONE_CORE, "--time=1", PYTHON=deaf),
        "hanging": cluster.submit(folder, *ONE_CORE, "--nodes=2", PYTHON=hanging),
    }


@pytest.fixture(scope="module")
def slurm(cluster, slow):
    """The cluster, on which the slow jobs are under way."""
    return cluster


@pytest.fixture
def stub(tmp_path):
    return lambda text: program(tmp_path / "stub", text)


@pytest.fixture(scope="module")
def undisturbed(slurm, where, tmp_path_factory):
    """A job submitted from a folder in which there is nothing: (folder, job)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, slurm.submit(folder, *ONE_CORE, flags=LONG, OUT="a run", **where)


# ------------------------------------------------------------------------------------------------------------
# What the script makes of it, whatever it starts
# ------------------------------------------------------------------------------------------------------------


@needs_slurm
def test_every_rank_knows_its_place_and_gets_the_arguments_as_they_are(slurm, stub, tmp_path):
    """Four ranks on two nodes; the script in a folder whose name would be cut in two at its blank."""
    (tmp_path / "my repo/slurm").mkdir(parents=True)
    (tmp_path / "my repo/train_llava_med.py").touch()
    for name in ("job.sh", "environment.sh"):
        shutil.copy(ROOT / "slurm" / name, tmp_path / "my repo/slurm")
    script = Path(shutil.copy(SCRIPT, tmp_path / "my repo/slurm"))
    tell = stub(
        'place="$RANK:$LOCAL_RANK:$WORLD_SIZE:$MASTER_ADDR:$MASTER_PORT $(hostname)"\n'
        'echo "$place $OMP_NUM_THREADS threads, GPUs ${CUDA_VISIBLE_DEVICES//[0-9]/n} $(printf "<%s>" "$@")"'
    )
    options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=3"]
    options += ["--export=PATH,HOME,PYTHON,MODEL=a model"]  # srun would pass on nothing else either
    flags = ["--lr", "1e-4", "a.sh b"]
    job = slurm.submit(tmp_path, *options, script=script, flags=flags, PYTHON=tell)
    assert outcome(slurm.ended(job)) == ("COMPLETED", "0:0", "0"), log_of(tmp_path, job)
    told = sorted(line for line in log_of(tmp_path, job).split("\n") if re.match(r"\d:", line))
    port = 20000 + int(job) % 12000
    given = f"<{tmp_path}/my repo/train_llava_med.py><--model><a model><--data><data/kvasir_vqa><--workers><2>"
    given += "<--out><runs/llava_med><--lr><1e-4><a.sh b>"
    places = [("0:0", "n1"), ("1:1", "n1"), ("2:0", "n2"), ("3:1", "n2")]
    assert told == [f"{rank}:4:n1:{port} {host} 3 threads, GPUs n,n {given}" for rank, host in places]


@needs_slurm
@pytest.mark.parametrize("code", [1, 86, 137])
def test_another_code_is_the_job_s_and_requeues_nothing(slurm, stub, tmp_path, code):
    job = slurm.submit(tmp_path, *ONE_CORE, PYTHON=stub(f"exit {code}"))
    assert outcome(slurm.ended(job)) == ("FAILED", f"{code}:0", "0")
    assert "back into the queue" not in log_of(tmp_path, job)


@needs_slurm
def test_ranks_that_leave_one_after_the_other_with_85_are_requeued_but_not_for_ever(slurm, tmp_path):
    once = program(tmp_path / "once", '[ -z "${SLURM_RESTART_COUNT:-}" ] || exit 0; sleep $((RANK * 2)); exit 85')
    always = program(tmp_path / "always", "exit 85")
    one = slurm.submit(tmp_path, *ONE_CORE, "--nodes=2", PYTHON=once)
    two = slurm.submit(tmp_path, *ONE_CORE, PYTHON=always, MAX_RESTARTS=1)
    assert outcome(slurm.ended(one)) == ("COMPLETED", "0:0", "1"), log_of(tmp_path, one)
    assert outcome(slurm.ended(two)) == ("FAILED", "85:0", "1"), log_of(tmp_path, two)


@needs_slurm
def test_a_log_that_cannot_be_written_in_logs_is_in_the_run_folder_or_at_home_and_says_why(slurm, stub, tmp_path):
    """Slurm's own output goes to /dev/null: without a log the job would fail, or run, without a word."""
    (tmp_path / "logs").touch()
    (tmp_path / "file").touch()
    works = stub("echo trained")
    one = slurm.submit(tmp_path, *ONE_CORE, PYTHON=works, OUT="run")
    two = slurm.submit(tmp_path, *ONE_CORE, PYTHON=works, OUT="file/run", HOME=tmp_path / "home")
    assert [outcome(slurm.ended(job)) for job in (one, two)] == [("COMPLETED", "0:0", "0")] * 2
    first = (tmp_path / f"run/llava_med_{one}.out").read_text()
    second = (tmp_path / f"home/llava_med_{two}.out").read_text()
    assert re.search(r"^no log in logs: mkdir: .*logs.*: File exists$", first, re.MULTILINE) and "\ntrained\n" in first
    assert re.search(r"^no log in file/run: mkdir: .*: Not a directory$", second, re.MULTILINE)
    assert "no log in logs: " in second and "\ntrained\n" in second


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


@needs_slurm
def test_a_signalled_job_requeues_itself_and_ends_as_if_nothing_had_been(slurm, undisturbed, where, tmp_path):
    job = slurm.submit(tmp_path, *ONE_CORE, flags=LONG, OUT="run", **where)
    wait_for(lambda: lines(tmp_path / "run/metrics.jsonl") >= 2, shown=lambda: log_of(tmp_path, job))
    slurm.call("scancel", "-s", "USR1", job)
    ended = slurm.ended(job)
    log = log_of(tmp_path, job)
    assert outcome(ended) == ("COMPLETED", "0:0", "1"), log
    assert "SIGUSR1: finishing this step, then saving" in log and "code 85: back into the queue" in log
    assert f"job {job}, restart 1, on " in log and "resuming from run/checkpoints/step-" in log
    assert log.count(" --resume auto") == 1  # whatever --resume named at first
    folder, other = undisturbed
    slurm.ended(other)
    mine, theirs = read_tensors(tmp_path / "run/adapter"), read_tensors(folder / "a run/adapter")
    assert mine.keys() == theirs.keys() and mine
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@needs_slurm
def test_a_job_trains_and_its_log_is_in_the_folder_of_submission(slurm, undisturbed):
    folder, job = undisturbed
    ended = slurm.ended(job)
    log = log_of(folder, job)
    assert outcome(ended) == ("COMPLETED", "0:0", "0"), log
    assert sorted(path.name for path in folder.iterdir()) == ["a run", "logs"]
    assert re.search(r"job \d+, restart 0, on n[12]\n", log) and re.search(r"rank 0 of 1 on n[12]\n", log)
    assert re.search(r"^question type +n +exact", log, re.MULTILINE)
    assert re.search(r"^micro average +24 ", log, re.MULTILINE)
    settings = json.loads((folder / "a run/config.json").read_text())["settings"]
    assert (settings["lr"], settings["workers"], settings["epochs"]) == (1e-4, 0, 25)


@needs_slurm
def test_a_job_that_reaches_its_time_limit_goes_on_and_a_cancelled_one_does_not(slurm, slow):
    folder, jobs = slow
    job = jobs["training"]

    def steps_after_restart() -> int:
        _, resumed, number = log_of(folder, job).partition("resuming from run/checkpoints/step-")
        return lines(folder / "run/metrics.jsonl") - int(number[:8]) if resumed else 0

    wait_for(lambda: steps_after_restart() > 0, shown=lambda: log_of(folder, job))
    slurm.call("scancel", job)
    ended = slurm.ended(job)
    log = log_of(folder, job)
    assert ended["JobState"] == "CANCELLED" and "SIGUSR1: finishing this step, then saving" in log, log
    assert int(ended["Restarts"]) == log.count("code 85: back into the queue") >= 1, log
    steps = [line["step"] for line in read_lines(folder / "run/metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


@needs_slurm
def test_an_array_trains_a_seed_a_task_and_requeues_one_task_alone(slurm, where, tmp_path):
    array = slurm.submit(tmp_path, *ONE_CORE, "--array=0-1", flags=LONG, OUT="run", **where)
    out = [tmp_path / "run/seed_0", tmp_path / "run/seed_1"]
    wait_for(lambda: all(lines(folder / "metrics.jsonl") >= 2 for folder in out))
    (whole,) = (task for task in (0, 1) if slurm.show(f"{array}_{task}")["JobId"] == array)  # has the array's number
    slurm.call("scancel", "-s", "USR1", f"{array}_{whole}")
    ended = [slurm.ended(f"{array}_{task}") for task in (0, 1)]
    restarts = ["1" if task == whole else "0" for task in (0, 1)]
    assert [outcome(shown) for shown in ended] == [("COMPLETED", "0:0", n) for n in restarts]
    assert [json.loads((folder / "config.json").read_text())["settings"]["seed"] for folder in out] == [0, 1]
    assert "restart 1" in log_of(tmp_path, f"{array}_{whole}")
    first, second = (read_tensors(folder / "adapter") for folder in out)
    assert first.keys() == second.keys() and first
    assert [name for name in first if torch.equal(first[name], second[name])] == []


@needs_slurm
def test_two_nodes_train_what_one_process_trains(slurm, where, demo_folder, tmp_path):
    flags = [*SHORT, "--max-steps", "6", "--epochs", "3"]
    job = slurm.submit(tmp_path, *ONE_CORE, "--nodes=2", flags=flags, OUT="two", **where)
    run(demo_folder, tmp_path / "one", *flags, "--report")
    ended = slurm.ended(job)
    log = log_of(tmp_path, job)
    assert outcome(ended) == ("COMPLETED", "0:0", "0"), log
    assert "on n1 n2\n" in log and "rank 0 of 2 on n1\n" in log and "rank 1 of 2 on n2\n" in log
    assert log.count("question type  ") == 1
    one, two = ([x for x in metrics_of(tmp_path / n) if "loss" in x] for n in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    assert [line["ids"] for line in two] == [line["ids"] for line in one]
    for mine, theirs in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


@needs_slurm
def test_a_chained_job_runs_only_after_one_that_succeeded(slurm, stub, tmp_path):
    bad = slurm.submit(tmp_path, *ONE_CORE, flags=["--no-such-flag"])
    never = slurm.submit(tmp_path, *ONE_CORE, f"--dependency=afterok:{bad}", PYTHON=stub("exit 0"))
    good = slurm.submit(tmp_path, *ONE_CORE, PYTHON=stub("sleep 2"))
    after = slurm.submit(tmp_path, *ONE_CORE, f"--dependency=afterok:{good}", PYTHON=stub("exit 0"))
    assert outcome(slurm.ended(after)) == ("COMPLETED", "0:0", "0")
    assert slurm.show(after)["StartTime"] >= slurm.show(good)["EndTime"]
    assert slurm.show(never)["JobState"] == "PENDING"
    assert outcome(slurm.ended(bad)) == ("FAILED", "2:0", "0")
    assert slurm.ended(never)["JobState"] == "CANCELLED"
    assert "unknown flag --no-such-flag" in log_of(tmp_path, bad)
    assert not (tmp_path / f"logs/llava_med_{never}.out").exists()


@needs_slurm
def test_the_qwen2vl_pipeline_ends_with_the_table_of_the_test_split(slurm, qwen_folder, tmp_path):
    """Check, overfit, train, evaluate: four jobs, each after the one before it."""
    flags = ["--tune", "full", "--lr", "3e-3", "--limit", "8", "--questions-per-step", "8"]
    flags += ["--max-steps", "3", "--dtype", "fp32", "--device", "cpu", "--max-answer-tokens", "16"]
    environment = {"MODEL": qwen_folder / "model", "DATA": qwen_folder / "data", "OUT": "run", "OVERFIT": "2"}
    environment["SBATCH"] = " ".join(ONE_CORE)
    said = slurm.call("bash", ROOT / "slurm/qwen2vl_pipeline.sh", *flags, cwd=tmp_path, **environment)
    jobs = dict(re.findall(r"(\w+) (\d+)\b", said.split("\n")[0]))
    assert list(jobs) == ["check", "overfit", "train", "evaluate"]
    ended = {name: slurm.ended(job) for name, job in jobs.items()}
    logs = {name: (tmp_path / f"logs/qwen2vl_{name}_{job}.out").read_text() for name, job in jobs.items()}
    for before, after in zip(jobs, list(jobs)[1:], strict=False):
        assert outcome(ended[after]) == ("COMPLETED", "0:0", "0"), logs[after]
        assert ended[after]["StartTime"] >= ended[before]["EndTime"]
    assert "check passed" in logs["check"] and "0 answers wrong (must be none)" in logs["overfit"]
    assert "macro average" in logs["train"] and "--eval-split val" in logs["train"]
    assert "question type" in logs["evaluate"] and "macro average" in logs["evaluate"]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["split"], results["micro"]["n"]) == ("test", 8)


@needs_slurm
def test_the_pipeline_starts_nothing_after_a_check_that_fails(slurm, qwen_folder, tmp_path):
    environment = {"MODEL": qwen_folder / "model", "DATA": tmp_path / "none", "SBATCH": " ".join(ONE_CORE)}
    said = slurm.call("bash", ROOT / "slurm/qwen2vl_pipeline.sh", cwd=tmp_path, **environment)
    jobs = dict(re.findall(r"(\w+) (\d+)\b", said.split("\n")[0]))
    assert outcome(slurm.ended(jobs["check"])) == ("FAILED", "1:0", "0")
    assert {slurm.ended(jobs[name])["JobState"] for name in ("overfit", "train", "evaluate")} == {"CANCELLED"}
    assert not (tmp_path / "runs").exists()


@needs_slurm
def test_a_job_that_does_not_leave_in_time_is_ended_and_its_log_says_so(slurm, slow):
    folder, jobs = slow
    ended = slurm.ended(jobs["deaf"])
    assert (ended["JobState"], ended["Restarts"]) == ("TIMEOUT", "0")
    assert "DUE TO TIME LIMIT" in log_of(folder, jobs["deaf"])


@needs_slurm
def test_a_rank_that_hangs_is_ended_a_minute_after_another_has_died(slurm, slow):
    folder, jobs = slow
    assert outcome(slurm.ended(jobs["hanging"])) == ("FAILED", "137:0", "0"), log_of(folder, jobs["hanging"])
    assert "First task exited 60s ago" in log_of(folder, jobs["hanging"])


# ------------------------------------------------------------------------------------------------------------
# Without Slurm
# ------------------------------------------------------------------------------------------------------------


def test_without_slurm_it_trains_here_and_a_signal_to_the_script_is_one_to_the_trainer(where, tmp_path):
    (tmp_path / "models").symlink_to(where["MODEL"])
    metrics = tmp_path / "run/metrics.jsonl"
    env = clean_environment(MODEL="models", DATA=where["DATA"], OUT="run")
    argv = ["bash", SCRIPT, *LONG]
    with (tmp_path / "first.txt").open("w") as log:
        process = subprocess.Popen(argv, cwd=tmp_path, env=env, stdout=log, stderr=subprocess.STDOUT)
        wait_for(lambda: lines(metrics) >= 2, shown=(tmp_path / "first.txt").read_text)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 85, (tmp_path / "first.txt").read_text()
    again = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from run/checkpoints/step-" in again.stdout and "question type  " in again.stdout
    assert [line["step"] for line in read_lines(metrics) if "loss" in line] == list(range(1, 51))
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("name", "more", "given"),
    [
        ("surg_video_vqa", {}, ""),
        ("surg_video_vqa", {"AUDIO_MODEL": "a whisper"}, "<--audio-model><a whisper>"),
        ("video_plain_lm", {}, ""),
        ("video_plain_lm", {"VISION_MODEL": "a dino", "CACHE": "c"}, "<--cache-features><c><--vision-model><a dino>"),
    ],
)
def test_other_models_and_folders_are_passed_on_where_there_are_some(stub, name, more, given):
    env = clean_environment(PYTHON=stub('printf "<%s>" "$@"'), MODEL="m", DATA="d", OUT="o", **more)
    argv = ["bash", ROOT / f"slurm/{name}.sh", "--epochs", "3"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"<{ROOT}/train_{name}.py><--model><m><--data><d><--out><o>{given}<--epochs><3>"


def test_python_is_the_one_named_else_the_repository_s_else_the_active_environment_s(stub, tmp_path):
    scripts = shutil.copytree(ROOT / "slurm", tmp_path / "repo/slurm")
    places = {name: tmp_path / name for name in ("PATH", "CONDA_PREFIX", "VIRTUAL_ENV", "repo/.venv")}
    for name, folder in places.items():
        (folder / "bin").mkdir(parents=True)
        program(folder / f"bin/python{'3' * (name == 'PATH')}", f"echo {name}")
    env = clean_environment(PATH=f"{tmp_path}/PATH/bin:{os.environ['PATH']}")
    for name in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"):
        env.pop(name, None)
    (tmp_path / "repo/.venv").rename(tmp_path / "later")
    for name in ("PATH", "CONDA_PREFIX", "VIRTUAL_ENV", "repo/.venv", "PYTHON"):
        env |= {name: str(places.get(name))} if name in ("CONDA_PREFIX", "VIRTUAL_ENV") else {}
        env |= {"PYTHON": str(stub("echo PYTHON"))} if name == "PYTHON" else {}
        if name == "repo/.venv":
            (tmp_path / "later").rename(tmp_path / name)
        done = subprocess.run(["bash", scripts / "llava_med.sh"], env=env, capture_output=True, text=True, check=True)
        used = "python3" if name == "PATH" else f"{tmp_path}/{name}/bin/python"
        assert (done.stdout, done.stderr) == (f"{name}\n", "" if name == "PYTHON" else f"Python: {used}\n")


def dry(script: str, folder: Path, *flags, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """A job script's --dry-run, as on a login node without Slurm."""
    env = clean_environment(**({"MODEL": folder / "model", "DATA": folder / "data", "OUT": "run"} | environment))
    argv = ["bash", ROOT / f"slurm/{script}.sh", "--dry-run", *map(str, flags)]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_a_dry_run_prints_what_would_run_and_leaves_nothing(qwen_folder, plain_folder, tmp_path):
    flags = ["--skip-bad", "--eval-only", "--blind", "shuffled"]  # of a job that is chained to the training
    one = dry("qwen2vl_pipeline", qwen_folder, *flags, cwd=tmp_path)
    two = dry("video_plain_lm", plain_folder, "--from-scratch", cwd=tmp_path, VISION_MODEL=plain_folder / "vision")
    assert one.returncode == two.returncode == 0, one.stdout + one.stderr + two.stdout + two.stderr
    given = f"--model {qwen_folder}/model --data {qwen_folder}/data --out run {' '.join(flags)}"
    assert f"the job would run {sys.executable} {ROOT}/train_qwen2vl_sentinel.py {given}\n" in one.stdout
    assert f"{qwen_folder}/model is complete" in one.stdout and "train: 8 questions" in one.stdout
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"]


def test_a_dry_run_refuses_in_seconds_what_would_end_the_job(demo_folder, stub, tmp_path):
    cut = shutil.copytree(demo_folder / "model", tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 100_000)
    (tmp_path / "file").touch()
    none = stub("echo 'ModuleNotFoundError: No module named torch'; exit 1")
    for flags, environment, reason in [
        ([], {"PYTHON": none}, f"{none} cannot train (ModuleNotFoundError: No module named torch): set PYTHON to one"),
        ([], {"MODEL": cut}, f"{cut}/model.safetensors: truncated or not safetensors"),
        ([], {"OUT": "file/run"}, "Not a directory"),
        ([], {"DATA": tmp_path / "none"}, f"--data {tmp_path}/none: no such folder"),
        (["--learning-rate", 1], {}, "unknown flag --learning-rate: here it is --lr"),
    ]:
        done = dry("llava_med", demo_folder, *flags, cwd=tmp_path, **environment)
        assert done.returncode in (1, 2) and reason in done.stderr, done.stdout + done.stderr
        assert "the job would run" not in done.stdout and not list(tmp_path.glob("run/*"))


def test_download_finds_what_is_there_and_lists_what_is_missing(demo_folder, tmp_path):
    whole, cut = demo_folder / "model", tmp_path / "cut"
    # a model in the cache, as the hub's client leaves it: found by its ID without a network, as a job finds it
    cached = tmp_path / "hub/models--organisation--name/snapshots/abc"
    shutil.copytree(whole, cached)
    (cached.parent.parent / "refs").mkdir()
    (cached.parent.parent / "refs/main").write_text("abc")
    shutil.copytree(whole, cut)
    os.truncate(cut / "model.safetensors", 100_000)
    argv = ["bash", ROOT / "slurm/download.sh", whole, "organisation/name", cut]
    env = clean_environment(HF_HOME=tmp_path, HF_HUB_OFFLINE=1)
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == f"{whole} is complete: {whole}\norganisation/name is complete: {cached}\n", done.stderr
    assert f"{cut}/model.safetensors: truncated or not safetensors (100000 bytes: " in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_nothing_of_one_cluster_is_in_a_script(path):
    text = path.read_text()
    assert (
        re.findall(r"--(?:account|partition|qos|constraint|nodelist|reservation|mail-user)|#SBATCH.* -\w ", text) == []
    )
    assert (
        re.findall(r"/(?:home|scratch|gpfs|lustre|data|work|project)s?\b/|[a-z]@[a-z]|\w\.(?:edu|org|com)\b", text)
        == []
    )
    assert re.findall(r"\b(?:module load|conda|source)\b|\b\d+\.\d+\.\d+\.\d+\b", text) == []
    subprocess.run(["bash", "-n", path], check=True)
