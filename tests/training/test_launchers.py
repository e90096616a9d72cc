"""Which process of how many, and where they meet: read from each launcher's variables."""

import pytest

from common.errors import UserError
from common.training.launchers import find, meeting_point


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        # srun, two nodes of four
        (
            {
                **{"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"},
                "SLURM_NTASKS": "8",
            },
            (6, 8, 2),
        ),
        # torchrun started by srun, once per node
        (
            {
                **{"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "0"},
                **{"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"},
            },
            (4, 8, 0),
        ),
        # The batch script of a job with four tasks, and a login shell within one: one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, (0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),
        (
            {
                **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
                **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMIX_RANK": "3"},
            },
            (3, 4, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, (1, 2, 0)),
        (
            {
                **{"PALS_RANKID": "13", "PALS_LOCAL_RANKID": "1"},
                **{"PMI_RANK": "13", "PMI_SIZE": "24"},
            },
            (13, 24, 1),
        ),
    ],
)
def test_place_is_read_from_the_launchers_variables(variables, world):
    assert tuple(find(variables)) == world


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK", "PALS_RANKID", "PMI_RANK"])
def test_number_without_a_count_is_an_error(name):
    """Each of the processes would otherwise make a run of its own."""
    with pytest.raises(UserError, match=f"error: {name} is '0' and .* is '': there is no such"):
        find({name: "0"})
    by_srun = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
    assert find({name: "0", **by_srun}) == (1, 2, 1)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": ""},
        {"RANK": "5", "WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "\u00b2"},
    ],
)
def test_process_that_cannot_be(variables):
    """It would train, log nothing, and end well; or wait."""
    with pytest.raises(UserError, match="error: RANK is .*there is no such process.\nhint: "):
        find(variables)


def test_number_on_the_node_that_is_none():
    assert find({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "gpu0"}) == (1, 2, 1)


def test_slurm_knows_the_node_where_pmi_does_not():
    """srun --mpi=pmi2; but within a Slurm job mpiexec starts one process per node by srun."""
    variables = {"PMI_RANK": "5", "PMI_SIZE": "8", "SLURM_LOCALID": "1"}
    variables |= {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}
    assert find(variables) == (5, 8, 1)
    variables |= {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert find(variables | {"MPI_LOCALRANKID": "1"}) == (5, 8, 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("nid001234", "nid001234"),
        ("nid[001234-001237,001240]", "nid001234"),
        ("frontier[00005,00009]", "frontier00005"),
        ("login1,nid[12-15]", "login1"),
        ("rack[1-2]node7,rack3node1", "rack1node7"),
    ],
)
def test_processes_of_slurm_meet_on_the_first_node(nodes, first):
    host, port = meeting_point({"SLURM_JOB_NODELIST": nodes, "SLURM_JOB_ID": "4711"})
    assert (host, port) == (first, 14711)


def test_meeting_point_of_pbs_and_of_the_user(tmp_path):
    (tmp_path / "nodes").write_text("x3001c0s7b0n0.hsn\nx3001c0s7b1n0.hsn\n")
    variables = {"PBS_NODEFILE": str(tmp_path / "nodes"), "PBS_JOBID": "123[4].aurora-pbs-01"}
    host, port = meeting_point(variables)
    assert host == "x3001c0s7b0n0.hsn" and 10000 <= port < 30000
    variables |= {"MASTER_ADDR": "here", "MASTER_PORT": "12345"}
    assert meeting_point(variables) == ("here", 12345)
    assert meeting_point({}) == ("127.0.0.1", 29500)


def test_list_of_nodes_that_names_none(tmp_path):
    """A node file that is gone, empty, or a folder: the two lines say what to export instead."""
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\n\xff\xfe")
    unusable = [
        *({"PBS_NODEFILE": str(tmp_path / name)} for name in ("gone", "empty", ".", "binary")),
        {"PBS_NODEFILE": "x" * 9999},
        *({"SLURM_STEP_NODELIST": value} for value in (",", "[]")),
    ]
    for variables in unusable:
        name = next(iter(variables))
        with pytest.raises(UserError, match=f"error: {name} is .*\nhint: .*MASTER_ADDR") as raised:
            meeting_point(variables)
        assert str(raised.value).count("\n") == 1
        assert meeting_point(variables | {"MASTER_ADDR": "here"})[0] == "here"


@pytest.mark.parametrize("port", ["abc", "0", "99999"])
def test_port_that_is_none(port):
    with pytest.raises(UserError, match="error: MASTER_PORT is .*not a port number.\nhint: "):
        meeting_point({"MASTER_PORT": port})


def test_a_number_of_pmix_without_a_count_does_not_make_a_run_of_its_own():
    with pytest.raises(UserError, match="PMIX_RANK is '3' and WORLD_SIZE is '': there is no such"):
        find({"PMIX_RANK": "3"})
    assert find({"PMIX_RANK": "3", "WORLD_SIZE": "4"}).rank == 3
