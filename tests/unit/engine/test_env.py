"""What the environment says, for every launcher and for none."""

from __future__ import annotations

import os

import pytest

from engine import env
from engine.errors import UserError

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2"}
SRUN_PMIX = {"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
PRTERUN = {"PMIX_RANK": "1"}
SBATCH = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
SRUN_SHELL = {"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}
ONE_RANK = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}
EMPTY = {"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": ""}
IMPLAUSIBLE = {"PMI_RANK": "5", "PMI_SIZE": "2"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("OMPI_", "PMI", "MV2_", "SLURM_", "OMP_", "HF_HUB_", "TRANSFORMERS_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "under_mpi", "rank"),
    [
        (OPEN_MPI, True, 1),
        (MVAPICH, True, 1),
        (HYDRA, True, 1),
        (SRUN_PMIX, True, 1),
        (PRTERUN, True, 1),
        (SBATCH, False, 0),
        (SRUN_SHELL, False, 0),
        (ONE_RANK, False, 0),
        (EMPTY, False, 0),
        (IMPLAUSIBLE, False, 0),
        ({}, False, 0),
    ],
)
def test_launchers(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], under_mpi: bool, rank: int
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert env.under_mpi() is under_mpi
    assert env.rank() == rank


@pytest.mark.parametrize(
    ("variables", "offline"),
    [
        ({}, False),
        ({"HF_HUB_OFFLINE": "1"}, True),
        ({"HF_HUB_OFFLINE": "true"}, True),
        ({"HF_HUB_OFFLINE": "0"}, False),
        ({"HF_HUB_OFFLINE": ""}, False),
        ({"TRANSFORMERS_OFFLINE": "yes"}, True),
        ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, False),
    ],
)
def test_hub_offline(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], offline: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert env.hub_offline() is offline


@pytest.mark.parametrize(("text", "threads"), [("4", 4), ("6,2", 6), (" 8 ", 8), ("", None)])
def test_thread_limit(monkeypatch: pytest.MonkeyPatch, text: str, threads: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert env.thread_limit() == threads


@pytest.mark.parametrize("text", ["0", "-2", "many", "2.5"])
def test_thread_limit_refuses_what_is_no_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(UserError, match=f"OMP_NUM_THREADS '{text}' is not a number of threads"):
        env.thread_limit()


def test_mpi_defaults_leave_the_users_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "OMPI_MCA_btl_sm_eager_limit"
    monkeypatch.setenv(name, "8192")
    env.set_mpi_defaults()
    assert os.environ[name] == "8192"


@pytest.mark.parametrize(
    ("value", "rounds"), [(None, False), ("", False), ("exact", False), (" int8 ", True)]
)
def test_int4_prompts(monkeypatch: pytest.MonkeyPatch, value: str | None, rounds: bool) -> None:
    monkeypatch.delenv(env.INT4_PROMPTS, raising=False)
    if value is not None:
        monkeypatch.setenv(env.INT4_PROMPTS, value)
    assert env.rounds_int4_prompts() is rounds
    assert env.own_settings() == ({env.INT4_PROMPTS: value} if value else {})


def test_int4_prompts_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.INT4_PROMPTS, "fast")
    with pytest.raises(UserError, match="INT4_PROMPTS 'fast' .* set it to exact or int8"):
        env.rounds_int4_prompts()
