"""A fleet for engines that run on many machines: Kubernetes manifests, or a configuration of Ray Serve LLM.

Kubernetes: per task a Deployment and a Service, and the same endpoint as on one machine in front of them. The image has
to hold vLLM and this project; checkpoints that are folders here lie in a volume, mounted at `/models`, under the names
of their tasks. A replica has its GPUs for itself, so shares of a device's memory do not come into it; a key for the API
is read from the Secret `taq-fleet`, key `api-key`, if it exists.

Ray: one application of `ray.serve.llm:build_openai_app` with every task as a model, for `serve deploy`.
"""

from pathlib import Path
from typing import Any

import yaml

from taq_vllm.fleet.services import ENDPOINT, serve_arguments
from taq_vllm.fleet.spec import Fleet, Member

MODELS = "/models"
_PORT = 8000
_SECRET = "taq-fleet"


class _Plain(yaml.SafeDumper):
    """Without anchors for what is said twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def kubernetes(fleet: Fleet, image: str, volume_claim: str | None) -> str:
    """Manifests for `kubectl apply`, as YAML documents.

    Args:
        fleet: what to serve.
        image: of a container with vLLM and this project.
        volume_claim: PersistentVolumeClaim with the checkpoints.

    Raises:
        ValueError: a checkpoint is a folder and there is no claim, or a task's name is no name of a Service.
    """
    documents: list[dict[str, Any]] = []
    for task, member in fleet.tasks.items():
        if task != task.lower() or "." in task or "_" in task:
            raise ValueError(f"task {task}: a Kubernetes Service takes lower-case letters, digits and - in its name")
        command = ["vllm", "serve", _checkpoint(task, member, volume_claim), *serve_arguments(member, task)]
        gpus = int(member.argument("--tensor-parallel-size") or 1)
        container = {
            "name": "vllm",
            "image": image,
            "command": [*command, "--host", "0.0.0.0", "--port", str(_PORT)],
            "env": [_key(), *({"name": k, "value": v} for k, v in member.environment.items())],
            "resources": {"limits": {"nvidia.com/gpu": str(gpus)}},
            # Loading a large model takes long; once it answers, it has to go on doing so.
            "startupProbe": {**_probe(), "periodSeconds": 10, "failureThreshold": 180},
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
    }
    documents += [_deployment(ENDPOINT, 1, container, []), _service(ENDPOINT)]
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False)


def ray_serve(fleet: Fleet) -> str:
    """A configuration for `serve deploy`, as YAML."""
    models = []
    for task, member in fleet.tasks.items():
        # Without the model's name, which Ray sets. Folders keep their path, which Ray's nodes have to see.
        arguments = _engine_arguments(serve_arguments(member, task)[2:])
        models.append(
            {
                "model_loading_config": {"model_id": task, "model_source": member.checkpoint},
                "engine_kwargs": arguments | {"gpu_memory_utilization": member.memory},
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


def _engine_arguments(arguments: tuple[str, ...]) -> dict[str, Any]:
    """`--max-model-len 512 --enforce-eager` as keyword arguments of vLLM's engine."""
    found: dict[str, Any] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            option, equals, value = argument.removeprefix("--").partition("=")
            name = option.replace("-", "_")
            if name.startswith("no_") and not equals:
                found[name.removeprefix("no_")] = False
            else:
                found[name] = yaml.safe_load(value) if equals else True
        elif name is not None:
            found[name] = yaml.safe_load(argument)
            name = None
        else:
            raise ValueError(f"got {argument} among the arguments of a task, which belongs to no option")
    return found


def _checkpoint(task: str, member: Member, volume_claim: str | None) -> str:
    if not Path(member.checkpoint).is_dir():
        return member.checkpoint
    if volume_claim is None:
        raise ValueError(f"{member.checkpoint} is a folder: give --volume-claim, a volume that holds it as {task}")
    return f"{MODELS}/{task}"


def _deployment(name: str, replicas: int, container: dict[str, Any], volumes: list[dict[str, Any]]) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "taq-fleet"}
    container = {
        **container,
        "ports": [{"containerPort": _PORT}],
        "readinessProbe": {**_probe(), "periodSeconds": 5},
    }
    pod = {"containers": [container], **({"volumes": volumes} if volumes else {})}
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
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "taq-fleet"}},
        "spec": {"selector": {"app.kubernetes.io/name": name}, "ports": [{"port": _PORT, "targetPort": _PORT}]},
    }


def _probe() -> dict[str, Any]:
    return {"httpGet": {"path": "/health", "port": _PORT}}


def _key() -> dict[str, Any]:
    source = {"secretKeyRef": {"name": _SECRET, "key": "api-key", "optional": True}}
    return {"name": "VLLM_API_KEY", "valueFrom": source}
