"""The job files, filled in as a user would, and run by stand-ins for the schedulers' commands."""

import os
import re
import shutil
import subprocess
import sys

import mlflow
import pytest
from conftest import KEY, ROOT, clean_environment
from modes import TOKENS

from common.connection.address import AMSC_TOKEN_URIS

JOBS = {path.name: path for path in sorted((ROOT / "jobs").glob("*.sh"))}
PLACEHOLDERS = {
    "<project>": "abc123",
    "<partition>": "gpu",
    "<queue>": "debug",
    "<version>": "6.4",
}
# Further ones stand in comments, for whoever needs them.
IN_COMMENTS = {"<...>", "<proxy>", "<port>", "<the ROCm wheels of pytorch.org>"}

# `sbatch [options] FILE arguments`: the options in the file, then those of the command line. EVENTS
# says when the time is up (SIGTERM for the ranks), and when the job is preempted (SIGKILL for all).
SBATCH = """
import os, pathlib, re, signal, subprocess, sys
typed = []
while sys.argv[1].startswith("--"):
    typed.append(sys.argv.pop(1))
lines = re.findall(r"^#SBATCH (--.*)", open(sys.argv[1]).read(), re.M)
options = dict(line.removeprefix("--").partition("=")[::2] for line in [*lines, *typed])
assert "requeue" in options and options["open-mode"] == "append" and "TERM" in options["signal"]
nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
os.environ |= {
    "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": options["job-name"],
    "SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(nodes * tasks), "SLURM_PROCID": "0",
    "SLURM_CPUS_PER_TASK": options["cpus-per-task"], "SLURM_JOB_NODELIST": "localhost",
    "SLURM_SUBMIT_DIR": os.getcwd(),
}
events, home = os.environ.pop("EVENTS", "").split(), pathlib.Path(os.environ["HOME"])
for restarts in range(1, 10):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(["bash", *sys.argv[1:]], start_new_session=True, **pipes)
    preempted = False
    for line in job.stdout:
        print(line, end="", flush=True)
        if events and line.startswith(f"epoch {events[0].split('@')[1]}/"):
            preempted = events.pop(0).startswith("preempted")
            if preempted:
                os.killpg(job.pid, signal.SIGKILL)
            else:
                for rank in (home / "ranks").read_text().split():
                    os.kill(int(rank), signal.SIGTERM)
    code = job.wait()
    if not preempted and not (home / "requeue").exists():
        sys.exit(code)
    (home / "requeue").unlink(missing_ok=True)
    os.environ["SLURM_RESTART_COUNT"] = str(restarts)
"""

# `scontrol requeue JOB`: the stand-in for sbatch starts it again.
SCONTROL = """
import os, pathlib, sys
assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]]
pathlib.Path(os.environ["HOME"], "requeue").touch()
"""

# `qsub [options] -- FILE arguments`: runs it in the home directory, without reading it.
QSUB = """
import os, pathlib, subprocess, sys
at = sys.argv.index("--")
assert "-A" in sys.argv[:at] and "filesystems=home" in " ".join(sys.argv[:at])
assert os.path.isabs(sys.argv[at + 1])
nodes = pathlib.Path(os.environ["HOME"], "nodes")
nodes.write_text("localhost\\n")
os.environ |= {
    "PBS_JOBID": f"{os.getpid()}.polaris-pbs-01", "PBS_JOBNAME": "mnist",
    "PBS_NODEFILE": str(nodes), "PBS_O_WORKDIR": os.getcwd(),
}
sys.exit(subprocess.run(sys.argv[at + 1:], cwd=os.environ["HOME"]).returncode)
"""

# `srun [options] command` and `mpiexec [options] command`: the command as often as it is to run.
LAUNCHER = """
import os, pathlib, subprocess, sys, time
options = sys.argv[1:sys.argv.index(next(a for a in sys.argv if a.endswith("/python")))]
command = sys.argv[len(options) + 1:]
if os.path.basename(sys.argv[0]) == "srun":
    assert "--kill-on-bad-exit=1" in options
    count, names = int(os.environ["SLURM_NTASKS"]), ("SLURM_PROCID", "SLURM_LOCALID")
    os.environ |= {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": str(count), "SLURM_STEP_ID": "0"}
else:
    count, names = int(options[options.index("-n") + 1]), ("PALS_RANKID", "PALS_LOCAL_RANKID")
    os.environ |= {"PMI_SIZE": str(count), "PALS_LOCAL_SIZE": options[options.index("--ppn") + 1]}
ranks = [subprocess.Popen(command, env=os.environ | dict.fromkeys(names, str(rank)))
    for rank in range(count)]
ids = " ".join(str(rank.pid) for rank in ranks)
pathlib.Path(os.environ["HOME"], "ranks").write_text(ids)
while None in (codes := [rank.poll() for rank in ranks]):
    if any(codes):
        for rank in ranks:
            rank.terminate()
    time.sleep(0.1)
sys.exit(max(map(abs, codes)))
"""


@pytest.fixture
def submit(tmp_path, mnist_dir):
    """A function that fills in a job file, submits it, and returns (exit code, job log, folder)."""
    names = ("home", "project", "commands", "scratch")
    home, project, commands, scratch = (tmp_path / name for name in names)
    for folder in (home, project, commands, scratch):
        folder.mkdir()
    for path in mnist_dir.iterdir():
        (scratch / path.name).symlink_to(path)
    (home / "mlflow-venv").symlink_to(sys.prefix)
    # Job files with `bash -l` read the machine's profile, which sets PATH, and then this one.
    (home / ".bash_profile").write_text(f'PATH="{commands}:$PATH"\n')
    for name in ("train_mnist_mlflow.py", "Modify_artifact_location.py", "common"):
        (project / name).symlink_to(ROOT / name)
    programs = {
        "sbatch": SBATCH,
        "scontrol": SCONTROL,
        "qsub": QSUB,
        "srun": LAUNCHER,
        "mpiexec": LAUNCHER,
    }
    for name, text in programs.items():
        (commands / name).write_text(f"#!{sys.executable}{text}")
    (commands / "module").write_text('#!/bin/bash\necho "module $*"\n')
    for command in commands.iterdir():
        command.chmod(0o755)

    def submit(name, *arguments, mode=0o600, events="", edit=str):
        shutil.copytree(ROOT / "jobs", project / "jobs", dirs_exist_ok=True)
        job = project / "jobs" / name
        text = re.sub("PER_NODE=(4|12) ", "PER_NODE=2 ", job.read_text()).replace("< 20", "< 2")
        for placeholder, value in {**PLACEHOLDERS, "<scratch>": str(scratch)}.items():
            text = text.replace(placeholder, value)
        job.write_text(edit(text))
        environment = clean_environment(
            HOME=str(home),
            SCRATCH=str(scratch),
            EVENTS=events,
            USER="8cf",
            GLOO_SOCKET_IFNAME="lo",
        )
        environment["PATH"] = f"{commands}{os.pathsep}{environment['PATH']}"
        # The command is the one in the file's own head, but for the size and the arguments.
        key_file = home / ".amsc_key"
        key_file.write_text(KEY)
        key_file.chmod(mode)
        (home / ".amsc").mkdir(exist_ok=True)
        (home / ".amsc" / "mlflow_token").write_text(TOKENS["ada"])
        (home / ".amsc" / "mlflow_token").chmod(mode)
        typed = re.search(r"^# +((?:sbatch|qsub) .*?) --epochs", text, re.M)[1]
        if typed.startswith("sbatch"):
            typed = typed.replace("sbatch", "sbatch --nodes=1 --ntasks-per-node=2")
        process = subprocess.run(
            ["bash", "-c", typed + ' "$@"', "bash", *arguments],
            cwd=project,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return process.returncode, process.stdout, project

    return submit


def test_there_are_five_and_a_shell_reads_them():
    assert len(JOBS) == 5
    subprocess.run(["bash", "-n", *JOBS.values()], check=True)
    if not shutil.which("shellcheck"):
        assert "REQUIRE_SERVERS" not in os.environ  # .ci/run installs it
        pytest.skip("no shellcheck")
    subprocess.run(["shellcheck", *JOBS.values()], check=True)


@pytest.mark.parametrize("name", JOBS)
def test_what_is_to_be_filled_in_stands_at_the_top(name):
    text = JOBS[name].read_text()
    found = set(re.findall(r"<[^<>\n]+>", text))
    assert {"<project>"} < found <= {*PLACEHOLDERS, "<scratch>", *IN_COMMENTS}
    head = text[: text.index("VENV=")]
    assert {word for word in found if word in head} >= found - IN_COMMENTS
    assert os.access(JOBS[name], os.X_OK)  # qsub runs it as a command


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_make_one_run(name, submit):
    arguments = (
        "--tracking_uri",
        "sqlite:///mlflow.db",
        "--batch_size",
        "128",
        "--note",
        "two words, and a comma",
        "--phase",
        "tuning",
    )
    code, log, folder = submit(name, *arguments)
    assert code == 0, log
    if name != "slurm.sh":
        assert log.startswith("module ")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert (run.data.params["processes"], run.data.params["batch_size"]) == ("2", "128")
    assert run.data.tags["mlflow.note.content"] == "two words, and a comma"
    assert run.data.tags["job.scheduler"] in ("slurm", "pbs")
    assert re.match(r"\d+(\.polaris-pbs-01)?$", run.data.tags["job.id"])
    assert run.data.tags["job.name"] == "mnist"
    assert log.count("\nepoch 1/1 ") == log.count("\nrun ") == 1


@pytest.mark.slow
def test_a_failure_fails_the_job(submit):
    """A key file that others may read; process 0 says so, and the other one does not stay."""
    code, log, _ = submit("slurm.sh", mode=0o644)
    assert code
    assert log.count("error: ") == 1 and "is open to others than its owner" in log, log
    assert KEY not in log


KEY_LINES = re.compile(
    r"^export AM_SC_API_KEY_FILE=.*\n# .* take a token: .*\n((?:# .*\n){3})", re.M
)


def with_a_token(text):
    """What the comment in a job file says: the lines in it in place of the one above."""
    return KEY_LINES.sub(lambda found: re.sub("^# ", "", found[1], flags=re.M), text)


def test_the_lines_for_a_token_are_the_same_everywhere():
    (lines,) = {KEY_LINES.search(path.read_text())[1] for path in JOBS.values()}
    names = re.findall(r"(\w+)=", lines)
    assert names == [
        *("MLFLOW_TRACKING_TOKEN_FILE", "MLFLOW_WORKSPACE"),
        *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    ]
    assert re.search("URI=(.*)", lines)[1] in AMSC_TOKEN_URIS


@pytest.mark.slow
def test_with_a_token_and_a_workspace(submit, institute):
    with institute.gateway() as gateway:
        code, log, _ = submit(
            "slurm.sh",
            *("--dataset", "digits", "--register", "--model_name", "MNIST_CNN_8cf"),
            edit=lambda text: with_a_token(text).replace(AMSC_TOKEN_URIS[0], gateway.uri),
        )
    assert code == 0, log
    words = "bearer token from MLFLOW_TRACKING_TOKEN_FILE valid until [^;]*; workspace default"
    assert re.search(words, log) and "  experiment mnist_cnn_pytorch_8cf  " in log, log
    sent = {request.headers.get("authorization") for request in gateway.requests}
    assert sent == {f"Bearer {TOKENS['ada']}"}
    assert not [request for request in gateway.requests if "x-api-key" in request.headers]
    assert {request.headers["x-mlflow-workspace"] for request in gateway.requests} == {"default"}


@pytest.mark.slow
def test_a_job_that_is_preempted_and_out_of_time_is_one_run(submit):
    """Once it is killed outright, once its time is up; it goes on as if nothing had happened."""
    arguments = ("--dataset", "digits", "--epochs", "6", "--batch_size", "256", "--register")
    arguments += ("--tracking_uri", "sqlite:///mlflow.db", "--precision", "fp32", "--experiment")
    code, log, folder = submit("slurm.sh", *arguments, "undisturbed")
    assert code == 0, log
    events = "preempted@2 time@4"
    code, log, folder = submit("slurm.sh", *arguments, "disturbed", events=events)
    assert code == 0, log
    assert log.count("stopped by SIGTERM; the run is marked KILLED.") == 1
    assert re.findall(r"^resume .* after epoch (\d+)$", log, re.M) == ["2", "4"]
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    histories = []
    for name in ("undisturbed", "disturbed"):
        experiment = client.get_experiment_by_name(name)
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"
        (model,) = client.search_logged_models([experiment.experiment_id])
        assert model.status == "READY"
        histories.append(
            [
                [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]
                for run_id in [run.info.run_id]
                for metric in ("train_loss", "val_accuracy")
            ]
        )
    assert histories[0] == histories[1] and len(histories[0][0]) == 6
    assert run.data.tags["continuations"] == "2"
    assert len(set(run.data.tags["jobs"].split(", "))) == 1  # a job keeps its number
    assert len(client.search_model_versions("name = 'MNIST_CNN'")) == 2


@pytest.mark.slow
def test_a_server_that_is_away_has_the_job_start_again_and_not_for_ever(submit):
    code, log, _ = submit("slurm.sh", "--tracking_uri", "http://127.0.0.1:9", "--dataset", "digits")
    assert code == 75 and log.count("error: no server answers") == 3, (
        log
    )  # at first, and twice more
