"""The manifests against the schemas of their kinds, and against what those don't check."""

import copy
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.ranks import REPOSITORY

FOLDER = REPOSITORY / "examples" / "kubernetes"
Json = dict[str, Any]


def documents(name: str) -> list[Json]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def strict(schema: Json) -> Json:
    """The schema as ``kubectl --validate=strict`` applies it: a key that an object's schema does not name is an error.

    Kubernetes's own word for numbers that may be strings is put into JSON Schema's.
    """
    schema = copy.deepcopy(schema)
    for part in _parts(schema):
        if part.get("x-kubernetes-int-or-string"):
            part["type"] = ["integer", "string"]
        if "properties" in part and "additionalProperties" not in part:
            part["additionalProperties"] = False
    # Objects of every kind have these; definitions leave them to the server.
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def _parts(schema: Json) -> Iterator[Json]:
    yield schema
    for inner in schema.get("properties", {}).values():
        yield from _parts(inner)
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            yield from _parts(schema[word])


def mistakes(manifest: Json, definitions: dict[tuple[str, str], Json]) -> list[str]:
    schema = strict(definitions[manifest["apiVersion"], manifest["kind"]])
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]


def pods(manifest: Json) -> list[Json]:
    """The specification of every pod."""
    if manifest["kind"] == "PyTorchJob":
        return [replica["template"]["spec"] for replica in manifest["spec"]["pytorchReplicaSpecs"].values()]
    return [job["template"]["spec"]["template"]["spec"] for job in manifest["spec"]["replicatedJobs"]]


def environment(container: Json) -> Json:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


@pytest.fixture(params=["pytorchjob.yaml", "jobset.yaml"])
def manifest(request: pytest.FixtureRequest) -> Json:
    (document,) = documents(request.param)
    return document


def test_a_manifest_is_valid_and_an_unknown_key_at_any_depth_is_not(
    manifest: Json, definitions: dict[tuple[str, str], Json]
) -> None:
    assert mistakes(manifest, definitions) == []
    for place in (manifest["spec"], pods(manifest)[-1], pods(manifest)[-1]["containers"][0]["securityContext"]):
        place["unknwon"] = 1
        assert any("unknwon" in said for said in mistakes(manifest, definitions))
        del place["unknwon"]
    pods(manifest)[-1]["terminationGracePeriodSeconds"] = "300"
    assert any("300" in said for said in mistakes(manifest, definitions))


def test_pods_may_do_nothing_but_train_and_write_to_their_volumes(manifest: Json) -> None:
    for pod in pods(manifest):
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 10001, "the images' user"
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        gpus = environment(container)["GPUS_PER_NODE"]
        assert container["resources"]["requests"]["nvidia.com/gpu"] == gpus
        assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


def test_mounts_have_volumes_and_claims_have_storage(manifest: Json) -> None:
    claims = {claim["metadata"]["name"]: claim["spec"]["accessModes"] for claim in documents("storage.yaml")}
    for pod in pods(manifest):
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == volumes.keys()
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "sizeLimit" in volumes[mounts["/dev/shm"]]["emptyDir"]
        kept = volumes[mounts["/checkpoints"]]["persistentVolumeClaim"]["claimName"]
        assert claims[kept] == ["ReadWriteMany"]
        assert claims[volumes[mounts["/inputs"]]["persistentVolumeClaim"]["claimName"]] == ["ReadOnlyMany"]
        settings = environment(container)
        assert settings["SAVE"].startswith("/checkpoints/")
        assert all(settings[name].startswith("/inputs/") for name in ("MODEL", "DATA"))


def test_the_wandb_key_is_a_reference_and_ranks_have_their_time_to_save_and_30_s_more(manifest: Json) -> None:
    for pod in pods(manifest):
        settings = environment(pod["containers"][0])
        assert settings["WANDB_API_KEY"] == {"secretKeyRef": {"name": "wandb", "key": "api-key", "optional": True}}
        assert pod["terminationGracePeriodSeconds"] == int(settings["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + 30


def test_the_pytorchjob_has_the_names_its_operator_looks_for_and_restarts() -> None:
    (job,) = documents("pytorchjob.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"}
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]
        assert replica["restartPolicy"] == "OnFailure"
        assert environment(container)["NNODES"] == str(sum(each["replicas"] for each in replicas.values()))
        assert job["spec"]["nprocPerNode"] == environment(container)["GPUS_PER_NODE"]


def test_the_pytorchjob_s_nodes_get_their_number_from_the_operator(tmp_path: Path) -> None:
    (container,) = pods(documents("pytorchjob.yaml")[0])[-1]["containers"]
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "finetune_llama_hft.sh").write_text('echo "$NODE_RANK" "$@"\n')
    operator = {"PATH": os.environ["PATH"], "RANK": "1"}
    done = subprocess.run(container["args"], cwd=tmp_path, env=operator, capture_output=True, text=True, check=True)
    assert done.stdout == "1 --save-interval 200 --keep-last 3\n"


def test_the_jobset_s_nodes_find_node_0_and_all_of_them_start_again() -> None:
    (jobset,) = documents("jobset.yaml")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    settings = environment(container)
    subdomain = jobset["spec"]["network"]["subdomain"]
    assert settings["MASTER_ADDR"] == f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{subdomain}"
    assert job["completionMode"] == "Indexed"
    assert settings["NNODES"] == str(job["completions"]) == str(job["parallelism"])
    assert re.search(r"\['(.+)'\]", settings["NODE_RANK"]["fieldRef"]["fieldPath"])[1] == (  # type: ignore[index]
        "batch.kubernetes.io/job-completion-index"
    )
    # One that a Job restarts in place, or tries again alone, would wait for partners that are gone.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    (mistake,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (mistake["action"], mistake["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
