"""The example files for clusters say what their readers understand."""

import re
import shlex

import pytest
import yaml
from test_command_line import parse


@pytest.fixture
def objects(repo) -> dict[str, dict]:
    """What experiments/kubernetes/train.yaml declares, by kind."""
    text = (repo / "experiments" / "kubernetes" / "train.yaml").read_text()
    found = list(yaml.safe_load_all(text))
    by_kind = {one["kind"]: one for one in found}
    assert len(by_kind) == len(found)
    return by_kind


def test_kubernetes_takes_the_file(objects):
    validate = pytest.importorskip("kubernetes_validate")
    for one in objects.values():
        validate.validate(one, "1.31", strict=True)
    objects["Job"]["spec"]["completion"] = 2
    with pytest.raises(validate.ValidationError):
        validate.validate(objects["Job"], "1.31", strict=True)


def test_the_pods_are_what_jax_looks_for(objects):
    """As its K8sCluster asks: an indexed job behind a headless service, and who may ask."""
    job, service, role = (objects[kind] for kind in ("Job", "Service", "Role"))
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == job["spec"]["completions"] > 1
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    asked = {
        (group, what) for r in role["rules"] for group in r["apiGroups"] for what in r["resources"]
    }
    assert asked >= {("", "pods"), ("", "services"), ("batch", "jobs")}
    account, binding = objects["ServiceAccount"]["metadata"]["name"], objects["RoleBinding"]
    assert pod["serviceAccountName"] == account == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_the_pods_run_a_command_that_there_is(objects, repo, monkeypatch):
    monkeypatch.chdir(repo)
    pod = objects["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["skd-jax", "train"]
    config, workdir = parse(*container["args"])
    mounted = container["volumeMounts"][0]["mountPath"]
    assert workdir.startswith(mounted) and config.data.data_dir.startswith(mounted)
    assert "--distributed" in container["args"]


def test_the_sbatch_example_runs_a_command_that_there_is(repo):
    lines = (repo / "experiments" / "slurm" / "train.sbatch").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("srun ")]
    assert shlex.split(line) == ["srun", "skd-jax", "train", "$@", "--distributed"]
    given = [line for line in lines if line.startswith("#SBATCH ")]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in given)
    assert "#SBATCH --requeue" in given
