"""A fleet for engines that run on many machines: Kubernetes manifests, or a configuration of Ray Serve LLM.

Kubernetes: per task a Deployment and a Service, and the same endpoint as on one machine in front of them. The image has
to hold vLLM and this project; checkpoints that are folders here lie in a volume, mounted at `/models`, under the names
of their tasks. A replica has its GPUs for itself, so shares of a device's memory do not come into it. The key for the
API is `api-key` of the Secret `taq-fleet`. vLLM leaves some paths open all the same (`/invocations`): a NetworkPolicy
lets only the endpoint reach the servers, where the cluster's network knows such policies.

Ray: one application of `ray.serve.llm:build_openai_app` with every task as a model, for `serve deploy`. vLLM's own
parser reads the arguments, so that vLLM has to be installed where this is written. Ray's own classes took what is
written here (2.60, tried by hand); it has not been run. It asks for no key.
"""

import json
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from taq_vllm.fleet.services import serve_arguments
from taq_vllm.fleet.spec import ENDPOINT, KEY_VARIABLE, Fleet, TaskServers

MODELS = "/models"
_PORT = 8000
_SECRET = "taq-fleet"
_NAME, _PART_OF = "app.kubernetes.io/name", {"app.kubernetes.io/part-of": "taq-fleet"}


class _Plain(yaml.SafeDumper):
    """Without anchors for what is said twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def kubernetes(fleet: Fleet, image: str, volume_claim: str | None, has_key: bool = True) -> str:
    """Manifests for `kubectl apply`, as YAML documents.

    Args:
        fleet: what to serve.
        image: of a container with vLLM and this project.
        volume_claim: PersistentVolumeClaim with the checkpoints.
        has_key: requests have to bring the Secret's key; without it, whoever reaches the endpoint can ask the models,
            and register servers with its router.

    Raises:
        ValueError: a checkpoint is a folder and there is no claim, or a task's name is no name of a Service.
    """
    documents: list[dict[str, Any]] = []
    key = [_key()] if has_key else []
    for task, member in fleet.tasks.items():
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", task):
            raise ValueError(
                f"task {task}: a Kubernetes Service takes lower-case letters, digits and - in its name, a letter first"
            )
        command = ["vllm", "serve", _checkpoint(task, member, volume_claim), "--served-model-name", task]
        container = {
            "name": "vllm",
            "image": image,
            "command": [*command, *serve_arguments(member), "--host", "0.0.0.0", "--port", str(_PORT)],
            "env": [*key, *({"name": k, "value": v} for k, v in member.environment.items())],
            "resources": {"limits": {"nvidia.com/gpu": str(member.gpus)}},
            # Loading a large model takes long; once it answers, it has to go on doing so.
            "startupProbe": {**_probe(), "periodSeconds": 10, "failureThreshold": 180},
            "readinessProbe": {**_probe(), "periodSeconds": 5},
            "livenessProbe": {**_probe(), "periodSeconds": 10},
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        }
        volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
        if volume_claim:
            container["volumeMounts"].append({"name": "models", "mountPath": MODELS, "readOnly": True})
            volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": volume_claim, "readOnly": True}})
        documents += [_deployment(task, member.replicas, container, volumes), _service(task)]
    workers = [f"{task}=http://{task}:{_PORT}" for task in fleet.tasks]
    container = {
        "name": "router",
        "image": image,
        "command": ["python3", "-m", "taq_vllm.fleet.endpoint", "0.0.0.0", str(_PORT), *workers],
        "env": key,
        # Not its health, for which it asks for the key too.
        "readinessProbe": {"tcpSocket": {"port": _PORT}, "periodSeconds": 5},
    }
    documents += [_deployment(ENDPOINT, 1, container, []), _service(ENDPOINT), _servers_for_the_endpoint_alone()]
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False)


def ray_serve(fleet: Fleet) -> str:
    """A configuration for `serve deploy`, as YAML.

    Raises:
        ValueError: vLLM is not installed, or a task's arguments are none of vLLM's or of Ray's.
    """
    models = []
    for task, member in fleet.tasks.items():
        if member.gpus != member.shards:
            raise ValueError(
                f"task {task}: Ray gives a server here as many GPUs as tensor and pipeline parallelism take; give "
                "`replicas` instead of data parallelism, and no prefill context parallelism"
            )
        # Folders keep their path, which Ray's nodes have to see. A replica has its GPUs for itself.
        models.append(
            {
                "model_loading_config": {"model_id": task, "model_source": member.checkpoint},
                "engine_kwargs": _engine_arguments(task, serve_arguments(member)),
                "deployment_config": {"num_replicas": member.replicas},
                **({"runtime_env": {"env_vars": dict(member.environment)}} if member.environment else {}),
            }
        )
    application = {
        "name": "taq-fleet",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": models},
    }
    return yaml.safe_dump(
        {"http_options": {"host": fleet.host, "port": fleet.port}, "applications": [application]}, sort_keys=False
    )


def _engine_arguments(task: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """`--max-model-len 4K --enforce-eager` as keyword arguments of vLLM's engine and API server, without defaults."""
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise ValueError(
            f"vLLM reads the arguments of servers for Ray, and is not installed here ({error}): "
            "`pip install 'taq-vllm[cuda]'` or `'taq-vllm[cpu]'`"
        ) from error

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"task {task}: its arguments cannot be rendered for Ray: {message}")

    parser = AsyncEngineArgs.add_cli_args(FrontendArgs.add_cli_args(Parser(add_help=False)))
    defaults, found = vars(parser.parse_args([])), vars(parser.parse_args(list(arguments)))
    # vLLM makes objects of JSON, which Ray does by itself: for it they stay what was written.
    for action in parser._actions:
        if is_dataclass(found.get(action.dest)):
            action.type = json.loads
    plain = vars(parser.parse_args(list(arguments)))
    try:
        return json.loads(json.dumps({name: value for name, value in plain.items() if value != defaults.get(name)}))
    except TypeError as error:
        raise ValueError(f"task {task}: its arguments cannot be rendered for Ray, as plain values: {error}") from error


def _checkpoint(task: str, member: TaskServers, volume_claim: str | None) -> str:
    if not Path(member.checkpoint).is_dir():
        return member.checkpoint
    if volume_claim is None:
        raise ValueError(
            f"{member.checkpoint} is a folder of this machine: give --volume-claim, a PersistentVolumeClaim whose "
            f"folder {task!r} has its files"
        )
    return f"{MODELS}/{task}"


def _deployment(name: str, replicas: int, container: dict[str, Any], volumes: list[dict[str, Any]]) -> dict[str, Any]:
    labels = {_NAME: name, **_PART_OF}
    container = {**container, "ports": [{"containerPort": _PORT}]}
    # A Service named vllm would set VLLM_PORT, which means something else to vLLM.
    pod = {"enableServiceLinks": False, "containers": [container], **({"volumes": volumes} if volumes else {})}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": _PART_OF},
        "spec": {"selector": {_NAME: name}, "ports": [{"port": _PORT, "targetPort": _PORT}]},
    }


def _servers_for_the_endpoint_alone() -> dict[str, Any]:
    servers = {"matchLabels": _PART_OF, "matchExpressions": [{"key": _NAME, "operator": "NotIn", "values": [ENDPOINT]}]}
    endpoint = {"podSelector": {"matchLabels": {_NAME: ENDPOINT, **_PART_OF}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "taq-fleet", "labels": _PART_OF},
        "spec": {"podSelector": servers, "policyTypes": ["Ingress"], "ingress": [{"from": [endpoint]}]},
    }


def _probe() -> dict[str, Any]:
    return {"httpGet": {"path": "/health", "port": _PORT}}


def _key() -> dict[str, Any]:
    source = {"secretKeyRef": {"name": _SECRET, "key": "api-key"}}
    return {"name": KEY_VARIABLE, "valueFrom": source}
