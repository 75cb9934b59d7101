"""The files of deploy/ fit the published schemas, the pinned versions and docs/cluster.md."""

import copy
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from project import ROOT
from ruamel.yaml import YAML

DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
STEPS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if re.match("[A-Z]", line)]


def read_yaml(name: str) -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all((DEPLOY / name).read_text()))


# The fields of the custom resource RayCluster that deploy/ uses: names, types and enumerations
# of KubeRay's API reference v1.6.2, required fields of its Go types, from which KubeRay generates
# the schema of the API server. Unlike that schema, this one refuses unknown fields.
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
AMOUNTS = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}


def strict(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "additionalProperties": False,
        "required": required.split(), "properties": properties,
    }  # fmt: skip


def listed(each: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": each}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
CONTAINER = strict(
    "name image", name=TEXT, image=TEXT,
    ports=listed(strict("containerPort", name=TEXT, containerPort=COUNT)),
    resources=strict("", requests=AMOUNTS, limits=AMOUNTS),
)  # fmt: skip
TEMPLATE = strict(
    "spec", spec=strict("containers", containers=listed(CONTAINER), serviceAccountName=TEXT)
)
RAY_CLUSTER = strict(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=strict("name", name=TEXT),
    spec=strict(
        "headGroupSpec rayVersion",
        rayVersion=TEXT,
        authOptions=strict("", mode={"enum": ["disabled", "token"]}, secretName=TEXT),
        headGroupSpec=strict(
            "template", serviceType=TEXT, enableIngress={"type": "boolean"},
            rayStartParams=TEXTS, template=TEMPLATE,
        ),
        workerGroupSpecs=listed(strict(
            "groupName template", groupName=TEXT, replicas=COUNT, minReplicas=COUNT,
            maxReplicas=COUNT, rayStartParams=TEXTS, template=TEMPLATE,
        )),
    ),
)  # fmt: skip


def put(document: Any, key: str, value: Any) -> Any:
    """Return a copy with another value at a key such as spec/workerGroupSpecs/0/replicas."""
    changed = copy.deepcopy(document)
    node, (*folders, last) = changed, key.split("/")
    for folder in folders:
        node = node[int(folder) if folder.isdigit() else folder]
    node[last] = value
    return changed


def test_the_kubernetes_cluster_fits_the_schema() -> None:
    cluster, policy = read_yaml("kuberay.yaml")
    jsonschema.validate(cluster, RAY_CLUSTER)
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("spec/authOptions/mode", "basic"),
        ("spec/authOptions/secret", "limpid-ray-token"),
        ("spec/workerGroupSpecs/0/replicas", "2"),
        ("spec/headGroupSpec/template/spec/containers", []),
    ],
)
def test_the_schema_refuses_what_kuberay_would(key: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(put(read_yaml("kuberay.yaml")[0], key, value), RAY_CLUSTER)


def groups(cluster: Any) -> list[Any]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def broken_promises(cluster: Any) -> Iterator[str]:
    """Yield the promises of docs/cluster.md that a RayCluster breaks."""
    spec, head = cluster["spec"], cluster["spec"]["headGroupSpec"]
    containers = [
        one for group in groups(cluster) for one in group["template"]["spec"]["containers"]
    ]
    if spec["authOptions"].get("mode") != "token" or not spec["authOptions"].get("secretName"):
        yield "token"
    if head.get("serviceType") != "ClusterIP" or head.get("enableIngress") is not False:
        yield "inside"
    if len({one["image"] for one in containers}) != 1:
        yield "image"
    if spec["rayVersion"] != CONSTRAINTS["ray"]:
        yield "version"
    if (
        len({group["template"]["spec"].get("serviceAccountName", "") for group in groups(cluster)})
        != 1
    ):
        yield "role"
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "head"


def test_the_kubernetes_cluster_keeps_its_promises() -> None:
    assert list(broken_promises(read_yaml("kuberay.yaml")[0])) == []


@pytest.mark.parametrize(
    ("key", "value", "promise"),
    [
        ("spec/authOptions/mode", "disabled", "token"),
        ("spec/authOptions/secretName", "", "token"),
        ("spec/headGroupSpec/serviceType", "LoadBalancer", "inside"),
        ("spec/headGroupSpec/enableIngress", True, "inside"),
        ("spec/workerGroupSpecs/0/template/spec/containers/0/image", "other:0.1.0", "image"),
        ("spec/rayVersion", "2.59.0", "version"),
        ("spec/workerGroupSpecs/0/template/spec/serviceAccountName", "default", "role"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", "4", "head"),
    ],
)
def test_a_broken_promise_is_found(key: str, value: Any, promise: str) -> None:
    assert list(broken_promises(put(read_yaml("kuberay.yaml")[0], key, value))) == [promise]


def test_only_pods_of_the_cluster_reach_the_cluster() -> None:
    documents = read_yaml("kuberay.yaml")
    # KubeRay creates the Service; there is no Ingress or Route of our own.
    assert [one["kind"] for one in documents] == ["RayCluster", "NetworkPolicy"]
    selected = {"matchLabels": {"ray.io/cluster": documents[0]["metadata"]["name"]}}
    assert documents[1]["spec"] == {
        "podSelector": selected,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": selected}]}],
    }


def test_virtual_machines_fit_the_schema_of_ray() -> None:
    (machines,) = read_yaml("vms.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(machines, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**machines, "head_node": {}}, schema)
    assert machines["head_node_type"] in machines["available_node_types"]


def test_virtual_machines_require_the_token_and_open_no_port() -> None:
    (machines,) = read_yaml("vms.yaml")
    (token,) = machines["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={token}" in machines["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in machines["docker"]["run_options"]
    assert {"head_image", "worker_image"}.isdisjoint(machines["docker"])
    assert machines["provider"]["use_internal_ips"] is True
    kinds = machines["available_node_types"].values()
    for kind in kinds:
        # Otherwise Ray creates a security group that is open to SSH from everywhere.
        assert kind["node_config"]["SecurityGroupIds"] and kind["node_config"]["IamInstanceProfile"]
        assert "docker" not in kind
    head = " ".join(machines["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    for command in machines["head_setup_commands"]:
        for name, version in re.findall(r"(\w+)==(\S+)", command):
            assert CONSTRAINTS[name] == version


def test_all_nodes_use_one_image_of_this_version() -> None:
    (machines,), (cluster, _) = read_yaml("vms.yaml"), read_yaml("kuberay.yaml")
    image = machines["docker"]["image"]
    assert {group["template"]["spec"]["containers"][0]["image"] for group in groups(cluster)} == {
        image
    }
    assert image.endswith(f"/limpid:{PROJECT['version']}")


def test_the_image_contains_the_dependencies_and_no_code(tmp_path: Path) -> None:
    (base,) = [rest for step, rest in STEPS if step == "FROM"]
    assert re.fullmatch(r"python:3\.\d+-slim", base)
    assert base.split(":")[1].removesuffix("-slim") in SpecifierSet(PROJECT["requires-python"])
    assert [rest for step, rest in STEPS if step == "COPY"] == ["pyproject.toml constraints.txt ./"]
    assert [rest for step, rest in STEPS if step == "USER"] == ["limpid"]
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
    (install,) = [rest for step, rest in STEPS if "pip install" in rest]
    assert "-c constraints.txt -r requirements.txt" in install
    listing = install.partition(" > ")[0]
    done = subprocess.run(
        ["sh", "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True
    )
    cluster = PROJECT["optional-dependencies"]["cluster"]
    assert done.stdout.splitlines() == [*PROJECT["dependencies"], *cluster]


def test_the_versions_that_must_match_are_pinned() -> None:
    required = [Requirement(line) for line in PROJECT["dependencies"]]
    for name in ("ray", "torch"):
        (specifier,) = [one.specifier for one in required if one.name == name]
        assert CONSTRAINTS[name] in specifier


# Cloud and storage keys, private keys, and any text long enough to be a key.
SECRET = re.compile(
    r"AKIA|ASIA|-----BEGIN|[0-9a-fA-F]{32}|[A-Za-z0-9+/]{40}|(?i:secret|password)\w*="
)


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_files_contain_no_secret(path: Path) -> None:
    assert not SECRET.search(path.read_text())


@pytest.mark.parametrize(
    "text", ["AWS_SECRET_ACCESS_KEY=x", "AKIAIOSFODNN7EXAMPLE", "token: " + "0f" * 32]
)
def test_a_secret_would_be_found(text: str) -> None:
    assert SECRET.search(text)
