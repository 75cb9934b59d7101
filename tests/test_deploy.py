"""What lies in deploy/ fits the published schemas, the versions in use, and docs/cluster.md."""

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


# Of the custom resource RayCluster, the fields that are used here: names, types and enumerations as
# in KubeRay's API reference of v1.6.2, what is required as in its Go types, from which the schema
# that an API server checks is generated. Unlike that one it refuses what it does not know.
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


def put(document: Any, place: str, value: Any) -> Any:
    """Return a copy with another value at a place, as spec.workerGroupSpecs.0.replicas."""
    changed = copy.deepcopy(document)
    node, (*folders, last) = changed, place.split("/")
    for folder in folders:
        node = node[int(folder) if folder.isdigit() else folder]
    node[last] = value
    return changed


def test_the_cluster_on_kubernetes_fits_the_schema() -> None:
    cluster, policy = read_yaml("kuberay.yaml")
    jsonschema.validate(cluster, RAY_CLUSTER)
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("spec/authOptions/mode", "basic"),
        ("spec/authOptions/secret", "limpid-ray-token"),
        ("spec/workerGroupSpecs/0/replicas", "2"),
        ("spec/headGroupSpec/template/spec/containers", []),
    ],
)
def test_the_schema_refuses_what_kuberay_would(place: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(put(read_yaml("kuberay.yaml")[0], place, value), RAY_CLUSTER)


def groups(cluster: Any) -> list[Any]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def broken(cluster: Any) -> Iterator[str]:
    """Yield which promises a RayCluster does not keep."""
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


def test_the_cluster_on_kubernetes_keeps_its_promises() -> None:
    assert list(broken(read_yaml("kuberay.yaml")[0])) == []


@pytest.mark.parametrize(
    ("place", "value", "promise"),
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
def test_a_broken_promise_is_seen(place: str, value: Any, promise: str) -> None:
    assert list(broken(put(read_yaml("kuberay.yaml")[0], place, value))) == [promise]


def test_only_the_pods_of_the_cluster_reach_it() -> None:
    documents = read_yaml("kuberay.yaml")
    # No Service, Ingress or Route of our own beside what KubeRay makes.
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


def test_virtual_machines_ask_for_the_token_and_open_nothing() -> None:
    (machines,) = read_yaml("vms.yaml")
    (token,) = machines["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={token}" in machines["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in machines["docker"]["run_options"]
    assert {"head_image", "worker_image"}.isdisjoint(machines["docker"])
    assert machines["provider"]["use_internal_ips"] is True
    kinds = machines["available_node_types"].values()
    for kind in kinds:
        # Else Ray makes a security group of its own, open to SSH from everywhere.
        assert kind["node_config"]["SecurityGroupIds"] and kind["node_config"]["IamInstanceProfile"]
        assert "docker" not in kind
    head = " ".join(machines["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    for command in machines["head_setup_commands"]:
        for name, version in re.findall(r"(\w+)==(\S+)", command):
            assert CONSTRAINTS[name] == version


def test_one_image_serves_all() -> None:
    (machines,), (cluster, _) = read_yaml("vms.yaml"), read_yaml("kuberay.yaml")
    image = machines["docker"]["image"]
    assert {group["template"]["spec"]["containers"][0]["image"] for group in groups(cluster)} == {
        image
    }
    assert image.endswith(f"/limpid:{PROJECT['version']}")


def test_the_image_holds_the_dependencies_and_no_code(tmp_path: Path) -> None:
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
    asked = [Requirement(line) for line in PROJECT["dependencies"]]
    for name in ("ray", "torch"):
        (specifier,) = [one.specifier for one in asked if one.name == name]
        assert CONSTRAINTS[name] in specifier


# Keys of clouds and of stores, private keys, and anything long enough to be one.
SECRET = re.compile(
    r"AKIA|ASIA|-----BEGIN|[0-9a-fA-F]{32}|[A-Za-z0-9+/]{40}|(?i:secret|password)\w*="
)


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_no_secret_stands_in_clear(path: Path) -> None:
    assert not SECRET.search(path.read_text())


@pytest.mark.parametrize(
    "text", ["AWS_SECRET_ACCESS_KEY=x", "AKIAIOSFODNN7EXAMPLE", "token: " + "0f" * 32]
)
def test_a_secret_would_be_seen(text: str) -> None:
    assert SECRET.search(text)
